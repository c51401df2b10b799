"""What each action takes here: fields that are acted on, fields without effect, values that are left out.

The one definition of it. `check` holds every request to this table, and docs/local-sagemaker.md is written from it
(`python -m local.sagemaker.support`). A field that is in neither list is refused by name, so that nothing which would
matter on AWS is silently accepted here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .errors import NotImplementedLocally


def paths(text: str) -> frozenset[str]:
    """The fields that a tree names: names apart by blanks, what is below one in braces; lists are not shown.

    A name without braces stands for everything below it.

    >>> sorted(paths("Name Input{Uri Mode}"))
    ['Input.Mode', 'Input.Uri', 'Name']
    """
    found: set[str] = set()
    above: list[str] = []
    last = ""
    for word in re.findall(r"[A-Za-z0-9]+|[{}]", text):
        if word == "{":
            found.discard(last)
            above.append(last)
        elif word == "}":
            above.pop()
        else:
            last = f"{above[-1]}.{word}" if above else word
            found.add(last)
    return frozenset(found)


@dataclass(frozen=True)
class Action:
    """One action. `acts`: a tree for `paths`; `no_effect`: {field: why}; `values`: {field: those that are there}."""

    acts: str
    no_effect: dict[str, str] = field(default_factory=dict)
    values: dict[str, tuple] = field(default_factory=dict)

    @functools.cached_property
    def fields(self) -> frozenset[str]:
        """Every field that is accepted."""
        return paths(self.acts) | set(self.no_effect)


def below(prefix: str, table: dict[str, Any]) -> dict[str, Any]:
    """The same table for fields that stand below `prefix`."""
    return {f"{prefix}.{name}": value for name, value in table.items()}


# Why a field has no effect.
DISK = "jobs and models lie on this machine's disk"
ENCRYPTION = "nothing is encrypted on this machine"
HARDWARE = "what runs, runs on this machine; the name is shown in descriptions and to the script"
NETWORK = "every process has this machine's network, and all servers are on 127.0.0.1"
ONE_HOST = "there is one instance, which gets everything"

CHANNEL_MODES = ("File", "FastFile")
S3_TYPES = ("S3Prefix", "ManifestFile")

TRAINING = """
    RoleArn Environment
    AlgorithmSpecification{TrainingImage TrainingInputMode MetricDefinitions}
    InputDataConfig{ChannelName DataSource{S3DataSource{S3DataType S3Uri}} ContentType CompressionType RecordWrapperType
        InputMode}
    OutputDataConfig{S3OutputPath CompressionType} ResourceConfig{InstanceCount}
    StoppingCondition{MaxRuntimeInSeconds MaxWaitTimeInSeconds} CheckpointConfig EnableManagedSpotTraining
"""
TRAINING_NO_EFFECT = {
    "InputDataConfig.DataSource.S3DataSource.S3DataDistributionType": ONE_HOST,
    "OutputDataConfig.KmsKeyId": ENCRYPTION,
    "ResourceConfig.InstanceType": HARDWARE,
    "ResourceConfig.VolumeSizeInGB": DISK,
    "ResourceConfig.VolumeKmsKeyId": ENCRYPTION,
    "VpcConfig": NETWORK,
    "EnableNetworkIsolation": NETWORK,
    "EnableInterContainerTrafficEncryption": NETWORK,
}
TRAINING_VALUES: dict[str, tuple] = {
    "AlgorithmSpecification.TrainingInputMode": CHANNEL_MODES,
    "InputDataConfig.InputMode": CHANNEL_MODES,
    "InputDataConfig.DataSource.S3DataSource.S3DataType": S3_TYPES,
    "InputDataConfig.CompressionType": ("None",),
    "InputDataConfig.RecordWrapperType": ("None",),
    "OutputDataConfig.CompressionType": ("GZIP", "NONE"),
    "ResourceConfig.InstanceCount": (1,),
}
CONTAINER = "Image ModelDataUrl Environment Mode ModelPackageName"
CONTAINER_NO_EFFECT = {"ContainerHostname": "a model has one container, which needs no name"}
ROUTING_SIZES = "CanarySize LinearStepSize"
DEPLOYMENT = f"""
    DeploymentConfig{{BlueGreenUpdatePolicy{{TrafficRoutingConfiguration{{Type WaitIntervalInSeconds {ROUTING_SIZES}}}
        TerminationWaitInSeconds MaximumExecutionTimeoutInSeconds}} AutoRollbackConfiguration}}
"""
CREATED = "CreationTimeAfter CreationTimeBefore"
MODIFIED = "LastModifiedTimeAfter LastModifiedTimeBefore"
PAGE = "NextToken MaxResults"
SORTED = "SortBy SortOrder"

ACTIONS: dict[str, Action] = {
    "CreateTrainingJob": Action(
        f"""TrainingJobName HyperParameters Tags {TRAINING}
        AlgorithmSpecification{{ContainerEntrypoint ContainerArguments}} DebugHookConfig ProfilerConfig""",
        TRAINING_NO_EFFECT
        | {"AlgorithmSpecification.EnableSageMakerMetricsTimeSeries": "metrics go to CloudWatch, as they do with it"},
        TRAINING_VALUES,
    ),
    "DescribeTrainingJob": Action("TrainingJobName"),
    "ListTrainingJobs": Action(f"{PAGE} {CREATED} {MODIFIED} NameContains StatusEquals {SORTED}"),
    "StopTrainingJob": Action("TrainingJobName"),
    "CreateHyperParameterTuningJob": Action(
        f"""HyperParameterTuningJobName Tags WarmStartConfig
        HyperParameterTuningJobConfig{{Strategy HyperParameterTuningJobObjective RandomSeed TrainingJobEarlyStoppingType
            TuningJobCompletionCriteria{{TargetObjectiveMetricValue BestObjectiveNotImproving
                ConvergenceDetected{{CompleteOnConvergence}}}}
            ResourceLimits{{MaxNumberOfTrainingJobs MaxParallelTrainingJobs MaxRuntimeInSeconds}}
            ParameterRanges{{ContinuousParameterRanges IntegerParameterRanges CategoricalParameterRanges}}}}
        TrainingJobDefinition{{StaticHyperParameters {TRAINING}}}""",
        below("TrainingJobDefinition", TRAINING_NO_EFFECT),
        below("TrainingJobDefinition", TRAINING_VALUES)
        | {
            "HyperParameterTuningJobConfig.Strategy": ("Bayesian", "Random"),
            "HyperParameterTuningJobConfig.TuningJobCompletionCriteria.ConvergenceDetected.CompleteOnConvergence": (
                "Disabled",
            ),
        },
    ),
    "DescribeHyperParameterTuningJob": Action("HyperParameterTuningJobName"),
    "ListHyperParameterTuningJobs": Action(f"{PAGE} {CREATED} {MODIFIED} NameContains StatusEquals {SORTED}"),
    "StopHyperParameterTuningJob": Action("HyperParameterTuningJobName"),
    "ListTrainingJobsForHyperParameterTuningJob": Action(f"HyperParameterTuningJobName {PAGE} StatusEquals {SORTED}"),
    "CreateProcessingJob": Action(
        """ProcessingJobName RoleArn AppSpecification Environment StoppingCondition Tags
        ProcessingInputs{InputName S3Input{S3Uri LocalPath S3DataType S3InputMode S3CompressionType}}
        ProcessingOutputConfig{Outputs{OutputName S3Output{S3Uri LocalPath S3UploadMode}}}
        ProcessingResources{ClusterConfig{InstanceCount}}""",
        {
            "ProcessingInputs.S3Input.S3DataDistributionType": ONE_HOST,
            "ProcessingOutputConfig.KmsKeyId": ENCRYPTION,
            "ProcessingResources.ClusterConfig.InstanceType": HARDWARE,
            "ProcessingResources.ClusterConfig.VolumeSizeInGB": DISK,
            "ProcessingResources.ClusterConfig.VolumeKmsKeyId": ENCRYPTION,
            "NetworkConfig": NETWORK,
        },
        {
            "ProcessingInputs.S3Input.S3DataType": S3_TYPES,
            "ProcessingInputs.S3Input.S3InputMode": ("File",),
            "ProcessingInputs.S3Input.S3CompressionType": ("None",),
            "ProcessingResources.ClusterConfig.InstanceCount": (1,),
        },
    ),
    "DescribeProcessingJob": Action("ProcessingJobName"),
    "ListProcessingJobs": Action(f"{PAGE} {CREATED} {MODIFIED} NameContains StatusEquals {SORTED}"),
    "StopProcessingJob": Action("ProcessingJobName"),
    "CreateModel": Action(
        f"ModelName PrimaryContainer{{{CONTAINER}}} Containers{{{CONTAINER}}} ExecutionRoleArn Tags",
        below("PrimaryContainer", CONTAINER_NO_EFFECT)
        | below("Containers", CONTAINER_NO_EFFECT)
        | {"VpcConfig": NETWORK, "EnableNetworkIsolation": NETWORK},
        {"PrimaryContainer.Mode": ("SingleModel",), "Containers.Mode": ("SingleModel",)},
    ),
    "DescribeModel": Action("ModelName"),
    "ListModels": Action(f"{PAGE} {CREATED} NameContains {SORTED}"),
    "DeleteModel": Action("ModelName"),
    "CreateEndpointConfig": Action(
        """EndpointConfigName Tags ProductionVariants{VariantName ModelName InitialInstanceCount InitialVariantWeight
            ServerlessConfig{MemorySizeInMB MaxConcurrency} ContainerStartupHealthCheckTimeoutInSeconds}""",
        {
            "ProductionVariants.InstanceType": HARDWARE,
            "ProductionVariants.VolumeSizeInGB": DISK,
            "ProductionVariants.ModelDataDownloadTimeoutInSeconds": "models come from this machine's own S3",
            "ProductionVariants.EnableSSMAccess": "the server is a process of this machine",
            "ProductionVariants.InferenceAmiVersion": HARDWARE,
            "KmsKeyId": ENCRYPTION,
            "ExecutionRoleArn": "each model's own role is used",
            "VpcConfig": NETWORK,
            "EnableNetworkIsolation": NETWORK,
        },
    ),
    "DescribeEndpointConfig": Action("EndpointConfigName"),
    "ListEndpointConfigs": Action(f"{PAGE} {CREATED} NameContains {SORTED}"),
    "DeleteEndpointConfig": Action("EndpointConfigName"),
    "CreateEndpoint": Action(f"EndpointName EndpointConfigName Tags {DEPLOYMENT}"),
    "DescribeEndpoint": Action("EndpointName"),
    "ListEndpoints": Action(f"{PAGE} {CREATED} {MODIFIED} NameContains StatusEquals {SORTED}"),
    "UpdateEndpoint": Action(
        f"""EndpointName EndpointConfigName RetainDeploymentConfig {DEPLOYMENT}
        RetainAllVariantProperties ExcludeRetainedVariantProperties{{VariantPropertyType}}""",
        values={"ExcludeRetainedVariantProperties.VariantPropertyType": ("DesiredInstanceCount", "DesiredWeight")},
    ),
    "UpdateEndpointWeightsAndCapacities": Action(
        """EndpointName DesiredWeightsAndCapacities{VariantName DesiredWeight DesiredInstanceCount
            ServerlessUpdateConfig{MaxConcurrency}}"""
    ),
    "DeleteEndpoint": Action("EndpointName"),
    "InvokeEndpoint": Action("EndpointName Body ContentType Accept CustomAttributes TargetVariant InferenceId"),
    "CreateModelPackageGroup": Action("ModelPackageGroupName ModelPackageGroupDescription Tags"),
    "DescribeModelPackageGroup": Action("ModelPackageGroupName"),
    "ListModelPackageGroups": Action(f"{PAGE} {CREATED} NameContains {SORTED}"),
    "DeleteModelPackageGroup": Action("ModelPackageGroupName"),
    "CreateModelPackage": Action(
        """ModelPackageGroupName ModelPackageDescription InferenceSpecification ModelApprovalStatus MetadataProperties
        ModelMetrics ClientToken CustomerMetadataProperties Domain Task SamplePayloadUrl Tags ModelCard SourceUri""",
        {"SkipModelValidation": "nothing is validated by running it"},
    ),
    "DescribeModelPackage": Action("ModelPackageName"),
    "ListModelPackages": Action(
        f"{PAGE} {CREATED} NameContains ModelApprovalStatus ModelPackageGroupName ModelPackageType {SORTED}"
    ),
    "UpdateModelPackage": Action(
        """ModelPackageArn ModelApprovalStatus ApprovalDescription CustomerMetadataProperties
        CustomerMetadataPropertiesToRemove SourceUri""",
        {"ClientToken": "the same update twice changes no more than once"},
    ),
    "BatchDescribeModelPackage": Action("ModelPackageArnList"),
    "DeleteModelPackage": Action("ModelPackageName"),
    "AddTags": Action("ResourceArn Tags"),
    "ListTags": Action(f"ResourceArn {PAGE}"),
    "DeleteTags": Action("ResourceArn TagKeys"),
}


def check(action: str, request: dict) -> None:
    """Raises NotImplementedLocally for the first field or value of a request that nothing here acts on."""
    support = ACTIONS.get(action)
    if support is None:
        raise NotImplementedLocally(f"The action {action}")
    accepted = support.fields
    for path, value in _given(request, accepted):
        if path not in accepted:
            raise NotImplementedLocally(f"{action}.{path}")
        if value not in support.values.get(path, (value,)):
            raise NotImplementedLocally(f"{action}.{path} {value}")


def _given(value: Any, accepted: frozenset[str], path: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a request that say something, down to where the table's own fields end."""
    if isinstance(value, list):
        for item in value:
            yield from _given(item, accepted, path)
    elif isinstance(value, dict) and path not in accepted and (not path or is_above(path, accepted)):
        for name, member in value.items():
            yield from _given(member, accepted, f"{path}.{name}" if path else name)
    elif value is not False and value != {}:
        yield path, value


def is_above(path: str, accepted: frozenset[str]) -> bool:
    """Whether something below the field is accepted."""
    return any(name.startswith(f"{path}.") for name in accepted)


if __name__ == "__main__":
    from . import reference

    print(reference.page(), end="")
