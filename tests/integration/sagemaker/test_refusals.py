"""What AWS refuses, in AWS's words; what is not here, by name. Each rule has its line."""

import json

import pytest
from botocore import xform_name
from botocore.exceptions import ClientError

from tests.makers.sagemaker import BUCKET, ROLE, container, processing, training, tuning, until, variant

ARN = "arn:aws:sagemaker:us-east-1:000000000000"
NOWHERE = f"{ARN}:model/nowhere"
PACKAGE = f"{ARN}:model-package/taken/1"
MODEL = {"ModelName": "new", "ExecutionRoleArn": ROLE, "PrimaryContainer": container()}
NAME_PATTERN = "[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}"
STRANGER = "arn:aws:iam::000000000000:role/nobody"
CHANNEL = {"ChannelName": "training", "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "s3://b/k"}}}
TWICE = [{"Key": "a", "Value": "1"}, {"Key": "a", "Value": "2"}]
MINE = "System prefix 'aws:' reserved for AWS usage in tag key: "


def config(*variants, **more):
    return {"EndpointConfigName": "new", "ProductionVariants": list(variants)} | more


def serverless(memory=2048, **more):
    found = variant(ServerlessConfig={"MemorySizeInMB": memory, "MaxConcurrency": 1}, **more)
    return {key: value for key, value in found.items() if key not in ("InstanceType", "InitialInstanceCount")}


def update(routing, **more):
    policy = {"TrafficRoutingConfiguration": {"WaitIntervalInSeconds": 1} | routing}
    return {
        "EndpointName": "taken",
        "EndpointConfigName": "taken",
        "DeploymentConfig": {"BlueGreenUpdatePolicy": policy} | more,
    }


def size(member, value, kind="CAPACITY_PERCENT"):
    return {"Type": "CANARY" if member == "CanarySize" else "LINEAR", member: {"Type": kind, "Value": value}}


def alarms(*names):
    return {"AutoRollbackConfiguration": {"Alarms": [{"AlarmName": name} for name in names]}}


def one(value, path, constraint):
    return f"1 validation error detected: Value {value} at '{path}' failed to satisfy constraint: {constraint}"


def changed(request, path, value):
    """The request with one member changed, that a path of names leads to."""
    name, _, rest = path.partition(".")
    return request | {name: changed(request.get(name, {}), rest, value) if rest else value}


NO_JOB = "Requested resource not found."
NO_PROCESSING_JOB = "Could not find requested job with name: nowhere"
NO_TUNING_JOB = "Amazon SageMaker can't find a tuning job with the name nowhere. Check the name and try again."
NO_MODEL = f'Could not find model "{NOWHERE}".'
NO_CONFIG = f'Could not find endpoint configuration "{ARN}:endpoint-config/nowhere".'
NO_ENDPOINT = f'Could not find endpoint "{ARN}:endpoint/nowhere".'
NO_GROUP = f"ModelPackageGroup {ARN}:model-package-group/nowhere does not exist."
NO_PACKAGE = f"ModelPackage {ARN}:model-package/taken/9 does not exist."
ONE_OF = "Specify one of either Image and Model Data URL or ModelPackageName in container definition."
NO_DATA = f'Could not access model data at s3://{BUCKET}/nowhere. Please ensure that the role "{ROLE}" exists and …'
STRANGERS_MODEL = (
    f'The execution role ARN "{STRANGER}" is invalid. Please ensure that the role exists and that its trust '
    'relationship policy allows the action "sts:AssumeRole" for the service principal "sagemaker.amazonaws.com".'
)
STRANGERS_JOB = f"Could not assume role {STRANGER}. Please ensure that the role exists and allows …"

# (action, request, code, message); a message that ends with … is the beginning of it.
REFUSED = [
    # What does not exist
    ("DescribeTrainingJob", {"TrainingJobName": "nowhere"}, "ValidationException", NO_JOB),
    ("StopTrainingJob", {"TrainingJobName": "nowhere"}, "ValidationException", NO_JOB),
    ("DescribeProcessingJob", {"ProcessingJobName": "nowhere"}, "ValidationException", NO_PROCESSING_JOB),
    ("StopProcessingJob", {"ProcessingJobName": "nowhere"}, "ValidationException", NO_PROCESSING_JOB),
    *(
        (action, {"HyperParameterTuningJobName": "nowhere"}, "ResourceNotFound", NO_TUNING_JOB)
        for action in (
            "DescribeHyperParameterTuningJob",
            "StopHyperParameterTuningJob",
            "ListTrainingJobsForHyperParameterTuningJob",
        )
    ),
    ("DescribeModel", {"ModelName": "nowhere"}, "ValidationException", NO_MODEL),
    ("DeleteModel", {"ModelName": "nowhere"}, "ValidationException", NO_MODEL),
    ("CreateEndpointConfig", config(variant(ModelName="nowhere")), "ValidationException", NO_MODEL),
    ("DescribeEndpointConfig", {"EndpointConfigName": "nowhere"}, "ValidationException", NO_CONFIG),
    ("DeleteEndpointConfig", {"EndpointConfigName": "nowhere"}, "ValidationException", NO_CONFIG),
    ("CreateEndpoint", {"EndpointName": "new", "EndpointConfigName": "nowhere"}, "ValidationException", NO_CONFIG),
    ("UpdateEndpoint", {"EndpointName": "taken", "EndpointConfigName": "nowhere"}, "ValidationException", NO_CONFIG),
    ("UpdateEndpoint", {"EndpointName": "nowhere", "EndpointConfigName": "taken"}, "ValidationException", NO_ENDPOINT),
    ("DescribeEndpoint", {"EndpointName": "nowhere"}, "ValidationException", NO_ENDPOINT),
    ("DeleteEndpoint", {"EndpointName": "nowhere"}, "ValidationException", NO_ENDPOINT),
    ("DescribeModelPackageGroup", {"ModelPackageGroupName": "nowhere"}, "ValidationException", NO_GROUP),
    ("DeleteModelPackageGroup", {"ModelPackageGroupName": "nowhere"}, "ValidationException", NO_GROUP),
    ("CreateModelPackage", {"ModelPackageGroupName": "nowhere"}, "ValidationException", NO_GROUP),
    ("ListModelPackages", {"ModelPackageGroupName": "nowhere"}, "ValidationException", NO_GROUP),
    ("DescribeModelPackage", {"ModelPackageName": "taken/9"}, "ValidationException", NO_PACKAGE),
    ("DeleteModelPackage", {"ModelPackageName": f"{PACKAGE[:-1]}9"}, "ValidationException", NO_PACKAGE),
    ("UpdateModelPackage", {"ModelPackageArn": f"{PACKAGE[:-1]}9"}, "ValidationException", NO_PACKAGE),
    (
        "CreateModel",
        changed(MODEL, "PrimaryContainer", {"ModelPackageName": "taken/9"}),
        "ValidationException",
        NO_PACKAGE,
    ),
    *(
        (action, {"ResourceArn": NOWHERE} | more, "ValidationException", f"Could not find resource {NOWHERE}.")
        for action, more in (("AddTags", {"Tags": []}), ("ListTags", {}), ("DeleteTags", {"TagKeys": ["a"]}))
    ),
    # Names that are taken
    (
        "CreateTrainingJob",
        training("taken"),
        "ResourceInUse",
        "Training job names must be unique within an AWS account and region, and a training job with this name "
        f"already exists ({ARN}:training-job/taken)",
    ),
    (
        "CreateHyperParameterTuningJob",
        tuning("taken"),
        "ResourceInUse",
        "Hyper parameter tuning job names must be unique within an AWS account and region, and a hyper parameter "
        f"tuning job with this name already exists ({ARN}:hyper-parameter-tuning-job/taken)",
    ),
    (
        "CreateProcessingJob",
        processing("taken"),
        "ResourceInUse",
        "Job name must be unique within an AWS account and region, and a job with this name already exists "
        f"({ARN}:processing-job/taken)",
    ),
    *(
        (
            "CreateModel",
            MODEL | {"ModelName": name},
            "ValidationException",
            f'Cannot create already existing model "{ARN}:model/taken".',
        )
        for name in ("taken", "TAKEN")  # ARNs are in lower case
    ),
    *(
        (
            "CreateEndpointConfig",
            config(variant(), EndpointConfigName=name),
            "ValidationException",
            f'Cannot create already existing endpoint configuration "{ARN}:endpoint-config/taken".',
        )
        for name in ("taken", "TAKEN")
    ),
    (
        "CreateEndpoint",
        {"EndpointName": "taken", "EndpointConfigName": "taken"},
        "ValidationException",
        f'Cannot create already existing endpoint "{ARN}:endpoint/taken".',
    ),
    *(
        (
            "CreateModelPackageGroup",
            {"ModelPackageGroupName": name},
            "ValidationException",
            f"Model Package Group already exists: {ARN}:model-package-group/taken",
        )
        for name in ("taken", "TAKEN")
    ),
    # What is in use
    (
        "DeleteModelPackageGroup",
        {"ModelPackageGroupName": "taken"},
        "ConflictException",
        f"Model Package Group {ARN}:model-package-group/taken cannot be deleted because it still contains Model "
        "Packages.",
    ),
    # Roles
    ("CreateModel", MODEL | {"ExecutionRoleArn": STRANGER}, "ValidationException", STRANGERS_MODEL),
    ("CreateTrainingJob", training("new") | {"RoleArn": STRANGER}, "ValidationException", STRANGERS_JOB),
    ("CreateProcessingJob", processing("new") | {"RoleArn": STRANGER}, "ValidationException", STRANGERS_JOB),
    (
        "CreateHyperParameterTuningJob",
        changed(tuning("new"), "TrainingJobDefinition.RoleArn", STRANGER),
        "ValidationException",
        STRANGERS_JOB,
    ),
    # Models
    (
        "CreateModel",
        MODEL | {"Containers": [container()]},
        "ValidationException",
        "Only one of PrimaryContainer and Containers may be specified.",
    ),
    (
        "CreateModel",
        {"ModelName": "new", "ExecutionRoleArn": ROLE},
        "ValidationException",
        "You must provide at least one container in PrimaryContainer or Containers.",
    ),
    (
        "CreateModel",
        {"ModelName": "new", "PrimaryContainer": container()},
        "ValidationException",
        "You must specify ExecutionRoleArn.",
    ),
    (
        "CreateModel",
        MODEL | {"PrimaryContainer": container(ModelPackageName=PACKAGE)},
        "ValidationException",
        ONE_OF,
    ),
    ("CreateModel", MODEL | {"PrimaryContainer": {"Environment": {"A": "b"}}}, "ValidationException", ONE_OF),
    (
        "CreateModel",
        MODEL | {"PrimaryContainer": {"ModelPackageName": PACKAGE}},
        "ValidationException",
        f"ModelPackage {PACKAGE} must be Approved to be deployed, found PendingManualApproval.",
    ),
    (
        "CreateModel",
        MODEL | {"PrimaryContainer": container(Image="local/nowhere:1")},
        "ValidationException",
        "Requested image local/nowhere:1 not found.",
    ),
    (
        "CreateModel",
        MODEL | {"PrimaryContainer": container(ModelDataUrl=f"s3://{BUCKET}/nowhere")},
        "ValidationException",
        NO_DATA,
    ),
    (
        "CreateModel",
        MODEL | {"PrimaryContainer": container(ModelDataUrl="s3://[no-bucket/nowhere")},
        "ValidationException",
        "Could not access model data at s3://[no-bucket/nowhere. …",
    ),
    # Endpoint configurations
    (
        "CreateEndpointConfig",
        config(variant(), variant()),
        "ValidationException",
        "Variant names must be unique within an endpoint configuration.",
    ),
    (
        "CreateEndpointConfig",
        config(*(variant(VariantName=f"v{number}") for number in range(11))),
        "ValidationException",
        "1 validation error detected: Value '[{VariantName=v0, …",
    ),
    *(
        (
            "CreateEndpointConfig",
            config({key: value for key, value in variant().items() if key != missing}),
            "ValidationException",
            "You must specify InstanceType and InitialInstanceCount for the variant 'AllTraffic', or a "
            "ServerlessConfig.",
        )
        for missing in ("InstanceType", "InitialInstanceCount")
    ),
    (
        "CreateEndpointConfig",
        config(serverless() | {"InstanceType": "ml.c5.large"}),
        "ValidationException",
        "InstanceType and ServerlessConfig cannot both be specified for the variant 'AllTraffic'.",
    ),
    (
        "CreateEndpointConfig",
        config(serverless(1500)),
        "ValidationException",
        one(
            "'1500'",
            "productionVariants.1.member.serverlessConfig.memorySizeInMB",
            "Member must satisfy enum value set: [1024, 2048, 3072, 4096, 5120, 6144]",
        ),
    ),
    (
        "CreateEndpointConfig",
        config(serverless(), serverless(VariantName="other")),
        "ValidationException",
        "A serverless endpoint can have one production variant only.",
    ),
    (
        "CreateEndpointConfig",
        config(variant(InitialVariantWeight=0), variant(VariantName="other", InitialVariantWeight=0.0)),
        "ValidationException",
        "The sum of the weights of the production variants must be greater than 0.",
    ),
    # Deployments
    (
        "UpdateEndpoint",
        update(size("CanarySize", 51)),
        "ValidationException",
        "CanarySize must be less than or equal to 50% …",
    ),
    (
        "UpdateEndpoint",
        update(size("CanarySize", 2, "INSTANCE_COUNT")),
        "ValidationException",
        "CanarySize must be less than or equal to 50% …",
    ),
    (
        "UpdateEndpoint",
        update(size("LinearStepSize", 60)),
        "ValidationException",
        "LinearStepSize must be less than or equal to 50% …",
    ),
    (
        "UpdateEndpoint",
        update(size("LinearStepSize", 9)),
        "ValidationException",
        "LinearStepSize must be at least 10% …",
    ),
    (
        "UpdateEndpoint",
        update({"Type": "CANARY"}),
        "ValidationException",
        "You must specify CanarySize for traffic routing of type CANARY.",
    ),
    (
        "UpdateEndpoint",
        update({"Type": "LINEAR"}),
        "ValidationException",
        "You must specify LinearStepSize for traffic routing of type LINEAR.",
    ),
    (
        "UpdateEndpoint",
        update({"Type": "SLOW"}),
        "ValidationException",
        one(
            "'SLOW'",
            "deploymentConfig.blueGreenUpdatePolicy.trafficRoutingConfiguration.type",
            "Member must satisfy enum value set: [ALL_AT_ONCE, CANARY, LINEAR]",
        ),
    ),
    (
        "UpdateEndpoint",
        update({"Type": "ALL_AT_ONCE", "WaitIntervalInSeconds": 3601}),
        "ValidationException",
        one(
            "'3601'",
            "deploymentConfig.blueGreenUpdatePolicy.trafficRoutingConfiguration.waitIntervalInSeconds",
            "Member must have value less than or equal to 3600",
        ),
    ),
    (
        "UpdateEndpoint",
        update({"Type": "ALL_AT_ONCE"}, **alarms()),
        "ValidationException",
        one(
            "'[]'",
            "deploymentConfig.autoRollbackConfiguration.alarms",
            "Member must have length greater than or equal to 1",
        ),
    ),
    (
        "UpdateEndpoint",
        update({"Type": "ALL_AT_ONCE"}, **alarms(*"abcdefghijk")),
        "ValidationException",
        one(
            f"'[{', '.join(f'{{AlarmName={name}}}' for name in 'abcdefghijk')}]'",
            "deploymentConfig.autoRollbackConfiguration.alarms",
            "Member must have length less than or equal to 10",
        ),
    ),
    (
        "UpdateEndpoint",
        update({"Type": "ALL_AT_ONCE"}, **alarms("nowhere")),
        "ValidationException",
        "The following CloudWatch alarms could not be found: ['nowhere'].",
    ),
    (
        "CreateEndpoint",
        update({"Type": "ALL_AT_ONCE"}) | {"EndpointName": "new", "EndpointConfigName": "taken-serverless"},
        "ValidationException",
        "DeploymentConfig is not supported for serverless endpoints.",
    ),
    # Jobs
    (
        "CreateHyperParameterTuningJob",
        tuning("x" * 33),
        "ValidationException",
        "2 validation errors detected: "
        f"Value '{'x' * 33}' at 'hyperParameterTuningJobName' failed to satisfy constraint: Member must have length "
        f"less than or equal to 32; Value '{'x' * 33}' at 'hyperParameterTuningJobName' failed to satisfy constraint: "
        "Member must satisfy regular expression pattern: [a-zA-Z0-9](-*[a-zA-Z0-9]){0,31}",
    ),
    (
        "CreateTrainingJob",
        training("new") | {"EnableManagedSpotTraining": True},
        "ValidationException",
        "Invalid MaxWaitTimeInSeconds. It must be present and be greater than or equal to MaxRuntimeInSeconds",
    ),
    (
        "CreateTrainingJob",
        training("new") | {"InputDataConfig": [CHANNEL, CHANNEL]},
        "ValidationException",
        "Channel names in InputDataConfig must be unique.",
    ),
    (
        "CreateTrainingJob",
        training("new") | {"CheckpointConfig": {"S3Uri": "s3://b/k", "LocalPath": "/var/checkpoints"}},
        "ValidationException",
        "Invalid CheckpointConfig.LocalPath '/var/checkpoints': …",
    ),
    # Model packages
    ("CreateModelPackage", {}, "ValidationException", "Missing ARN."),
    (
        "CreateModelPackage",
        {"ModelPackageGroupName": "taken", "Tags": [{"Key": "a", "Value": "b"}]},
        "ValidationException",
        "Tags cannot be given for a versioned model package: it has those of its group.",
    ),
    (
        "UpdateModelPackage",
        {"ModelPackageArn": PACKAGE, "ModelApprovalStatus": "Maybe"},
        "ValidationException",
        one(
            "'Maybe'",
            "modelApprovalStatus",
            "Member must satisfy enum value set: [Approved, Rejected, PendingManualApproval]",
        ),
    ),
    (
        "UpdateModelPackage",
        {"ModelPackageArn": PACKAGE, "CustomerMetadataProperties": {"a": ""}},
        "ValidationException",
        one(
            "'{a=}'",
            "customerMetadataProperties",
            "Map value must satisfy constraint: [Member must have length less than or equal to 256, Member must have "
            "length greater than or equal to 1, Member must satisfy regular expression pattern: "
            r"([\p{L}\p{Z}\p{N}_.:\/=+\-@]*)${1,256}]",
        ),
    ),
    # Tags
    (
        "CreateModelPackageGroup",
        {"ModelPackageGroupName": "new", "Tags": [{"Key": "aws:x", "Value": "b"}]},
        "ValidationException",
        f"{MINE}aws:x",
    ),
    (
        "AddTags",
        {"ResourceArn": f"{ARN}:model/taken", "Tags": [{"Key": "AWS:x", "Value": "b"}]},
        "ValidationException",
        f"{MINE}AWS:x",
    ),
    (
        "DeleteTags",
        {"ResourceArn": f"{ARN}:model/taken", "TagKeys": ["aws:cloudformation:stack-name"]},
        "ValidationException",
        f"{MINE}aws:cloudformation:stack-name",
    ),
    (
        "CreateTrainingJob",
        training("new") | {"Tags": TWICE},
        "ValidationException",
        "Duplicate tag keys found: a",
    ),
    (
        "AddTags",
        {"ResourceArn": f"{ARN}:model/taken", "Tags": [{"Key": str(number), "Value": ""} for number in range(51)]},
        "ValidationException",
        "1 validation error detected: Value '[{Key=0, Value=}, …",
    ),
    ("AddTags", {"ResourceArn": "model/taken", "Tags": []}, "ValidationException", "1 validation error detected: …"),
    # Lists
    *(
        (action, {"NextToken": "bm9uc2Vuc2U="}, "ValidationException", 'Invalid pagination token because "{0}".')
        for action in ("ListTrainingJobs", "ListProcessingJobs", "ListModels", "ListEndpoints", "ListModelPackages")
    ),
    (
        "ListModels",
        {"MaxResults": 101, "SortBy": "Size"},
        "ValidationException",
        "2 validation errors detected: "
        "Value 'Size' at 'sortBy' failed to satisfy constraint: Member must satisfy enum value set: "
        "[Name, CreationTime]; Value '101' at 'maxResults' failed to satisfy constraint: Member must have value less "
        "than or equal to 100",
    ),
    (
        "ListEndpoints",
        {"MaxResults": 0},
        "ValidationException",
        one("'0'", "maxResults", "Member must have value greater than or equal to 1"),
    ),
    # The service model's constraints
    (
        "CreateEndpoint",
        {"EndpointName": "_"},
        "ValidationException",
        "2 validation errors detected: "
        "Value null at 'endpointConfigName' failed to satisfy constraint: Member must not be null; "
        f"Value '_' at 'endpointName' failed to satisfy constraint: Member must satisfy regular expression pattern: "
        f"{NAME_PATTERN}",
    ),
    (
        "CreateModel",
        changed(MODEL, "PrimaryContainer.Environment", {"1st": "a"}),
        "ValidationException",
        one(
            "'{1st=a}'",
            "primaryContainer.environment",
            "Map keys must satisfy constraint: [Member must have length less than or equal to 1024, Member must have "
            "length greater than or equal to 0, Member must satisfy regular expression pattern: "
            "[a-zA-Z_][a-zA-Z0-9_]*]",
        ),
    ),
    (
        "AddTags",
        {"ResourceArn": f"{ARN}:model/taken", "Tags": [{"Key": "k"}]},
        "ValidationException",
        one("null", "tags.1.member.value", "Member must not be null"),
    ),
]

AUGMENTED = changed(CHANNEL, "DataSource.S3DataSource.S3DataType", "AugmentedManifestFile")
CAPTURE = {"InitialSamplingPercentage": 1, "DestinationS3Uri": "s3://b/k", "CaptureOptions": [{"CaptureMode": "Input"}]}
RULE = {"RuleConfigurationName": "r", "RuleEvaluatorImage": "i"}
STRATEGY = "HyperParameterTuningJobConfig.Strategy"
STATE = {"Stage": "Development", "StageStatus": "PendingApproval"}
ROLLING = {"MaximumBatchSize": {"Type": "INSTANCE_COUNT", "Value": 1}, "WaitIntervalInSeconds": 0}

# (action, request, what the answer names)
NOT_HERE = [
    *(
        (
            "CreateHyperParameterTuningJob",
            changed(tuning("new"), STRATEGY, strategy),
            f"{{action}}.{STRATEGY} {strategy}",
        )
        for strategy in ("Grid", "Hyperband")
    ),
    (
        "CreateTrainingJob",
        changed(training("new"), "AlgorithmSpecification.TrainingInputMode", "Pipe"),
        "{action}.AlgorithmSpecification.TrainingInputMode Pipe",
    ),
    (
        "CreateTrainingJob",
        training("new") | {"InputDataConfig": [CHANNEL | {"InputMode": "Pipe"}]},
        "{action}.InputDataConfig.InputMode Pipe",
    ),
    (
        "CreateTrainingJob",
        training("new") | {"InputDataConfig": [AUGMENTED]},
        "{action}.InputDataConfig.DataSource.S3DataSource.S3DataType AugmentedManifestFile",
    ),
    (
        "CreateTrainingJob",
        changed(training("new"), "ResourceConfig.InstanceCount", 2),
        "{action}.ResourceConfig.InstanceCount 2",
    ),
    (
        "CreateTrainingJob",
        changed(training("new"), "ResourceConfig.KeepAlivePeriodInSeconds", 60),
        "{action}.ResourceConfig.KeepAlivePeriodInSeconds",
    ),
    (
        "CreateTrainingJob",
        changed(training("new"), "StoppingCondition.MaxPendingTimeInSeconds", 7200),
        "{action}.StoppingCondition.MaxPendingTimeInSeconds",
    ),
    (
        "CreateTrainingJob",
        training("new") | {"OutputDataConfig": {"S3OutputPath": "https://b.s3.us-east-1.amazonaws.com/k"}},
        "The URI 'https://b.s3.us-east-1.amazonaws.com/k', which does not start with s3://,",
    ),
    ("CreateTrainingJob", training("new") | {"DebugRuleConfigurations": [RULE]}, "{action}.DebugRuleConfigurations"),
    (
        "CreateModel",
        MODEL | {"PrimaryContainer": container(Mode="MultiModel")},
        "{action}.PrimaryContainer.Mode MultiModel",
    ),
    (
        "CreateModel",
        {"ModelName": "new", "ExecutionRoleArn": ROLE, "Containers": [container(), container()]},
        "A model of several containers",
    ),
    (
        "CreateModel",
        MODEL | {"PrimaryContainer": container(Image="000000000000.dkr.ecr.us-east-1.amazonaws.com/x:1")},
        "Serving from the container image '000000000000.dkr.ecr.us-east-1.amazonaws.com/x:1' (local/<folder>:<tag> "
        "are the images of this machine)",
    ),
    (
        "CreateEndpointConfig",
        config({key: value for key, value in variant().items() if key != "ModelName"}),
        "A production variant without ModelName (inference components)",
    ),
    (
        "CreateEndpointConfig",
        config(variant(), ShadowProductionVariants=[variant()]),
        "{action}.ShadowProductionVariants",
    ),
    ("CreateEndpointConfig", config(variant(), DataCaptureConfig=CAPTURE), "{action}.DataCaptureConfig"),
    (
        "CreateEndpointConfig",
        config(variant(), AsyncInferenceConfig={"OutputConfig": {"S3OutputPath": "s3://b/k"}}),
        "{action}.AsyncInferenceConfig",
    ),
    (
        "CreateEndpointConfig",
        config(variant(), ExplainerConfig={"ClarifyExplainerConfig": {"ShapConfig": {"ShapBaselineConfig": {}}}}),
        "{action}.ExplainerConfig",
    ),
    (
        "CreateEndpointConfig",
        config(variant(RoutingConfig={"RoutingStrategy": "RANDOM"})),
        "{action}.ProductionVariants.RoutingConfig",
    ),
    (
        "CreateEndpoint",
        {"EndpointName": "new", "EndpointConfigName": "taken", "DeploymentConfig": {"RollingUpdatePolicy": ROLLING}},
        "{action}.DeploymentConfig.RollingUpdatePolicy",
    ),
    ("CreateModelPackage", {"ModelPackageName": "new"}, "{action}.ModelPackageName"),
    ("CreateModelPackage", {"ModelPackageGroupName": "taken", "ModelLifeCycle": STATE}, "{action}.ModelLifeCycle"),
    ("UpdateModelPackage", {"ModelPackageArn": PACKAGE, "ModelLifeCycle": STATE}, "{action}.ModelLifeCycle"),
    ("ListModelPackageGroups", {"CrossAccountFilterOption": "CrossAccount"}, "{action}.CrossAccountFilterOption"),
]


def refusal(client, action, request):
    """Code, HTTP status and message of an answer that must be a refusal."""
    with pytest.raises(ClientError) as caught:
        getattr(client, xform_name(action))(**request)
    answer = caught.value.response
    error = answer["Error"]
    return error["Code"], answer["ResponseMetadata"]["HTTPStatusCode"], error.get("Message", "")


@pytest.mark.parametrize(("action", "request_", "code", "message"), REFUSED)
def test_what_aws_refuses_is_refused_in_its_words(world, taken, action, request_, code, message):
    found_code, status, found = refusal(world.sagemaker, action, request_)
    assert (found_code, status) == (code, 400), found
    if message.endswith("…"):
        assert found.startswith(message[:-1])
    else:
        assert found == message


@pytest.mark.parametrize(("action", "request_", "what"), NOT_HERE)
def test_what_is_not_here_is_refused_by_name(world, taken, action, request_, what):
    message = f"{what.format(action=action)} is not implemented by the local SageMaker."
    assert refusal(world.sagemaker, action, request_) == ("NotImplemented", 501, message)


def test_a_refused_request_leaves_nothing_behind(world, taken):
    for action, listed, name in (
        ("list_training_jobs", "TrainingJobSummaries", "TrainingJobName"),
        ("list_models", "Models", "ModelName"),
        ("list_endpoint_configs", "EndpointConfigs", "EndpointConfigName"),
        ("list_endpoints", "Endpoints", "EndpointName"),
        ("list_model_package_groups", "ModelPackageGroupSummaryList", "ModelPackageGroupName"),
    ):
        found = getattr(world.sagemaker, action)(NameContains="new", MaxResults=100)[listed]
        assert "new" not in [item[name] for item in found]


def test_tags_and_metadata_have_their_limits_also_over_several_requests(world):
    client = world.sagemaker
    arn = client.create_model_package_group(ModelPackageGroupName="limits")["ModelPackageGroupArn"]
    client.add_tags(ResourceArn=arn, Tags=[{"Key": f"k{number}", "Value": ""} for number in range(50)])
    client.add_tags(ResourceArn=arn, Tags=[{"Key": "k0", "Value": "new"}])
    tag = {"ResourceArn": arn, "Tags": [{"Key": "another", "Value": ""}]}
    assert refusal(client, "AddTags", tag)[2] == f"The number of tags of {arn} would exceed 50."
    package = client.create_model_package(
        ModelPackageGroupName="limits", CustomerMetadataProperties={f"k{number}": "v" for number in range(50)}
    )["ModelPackageArn"]
    more = {"ModelPackageArn": package, "CustomerMetadataProperties": {"another": "v"}}
    message = "The number of CustomerMetadataProperties would exceed 50."
    assert refusal(client, "UpdateModelPackage", more) == ("ValidationException", 400, message)
    client.update_model_package(**more, CustomerMetadataPropertiesToRemove=["k0"])


def test_a_client_token_is_good_for_one_request(world):
    client = world.sagemaker
    client.create_model_package_group(ModelPackageGroupName="tokens")
    request = {"ModelPackageGroupName": "tokens", "ClientToken": "once"}
    first = client.create_model_package(**request)
    assert client.create_model_package(**request)["ModelPackageArn"] == first["ModelPackageArn"]
    found = refusal(client, "CreateModelPackage", request | {"ModelPackageDescription": "another"})
    assert found == ("ConflictException", 400, "The client token was used before, with other parameters.")
    assert client.create_model_package(ModelPackageGroupName="tokens")["ModelPackageArn"].endswith("/tokens/2")


@pytest.mark.parametrize(
    ("resource", "request_", "error", "cause"),
    [
        ("sagemaker:createTrainingJob", training("taken"), "SageMaker.ResourceInUseException", "names must be unique"),
        (
            "sagemaker:createEndpoint",
            {"EndpointName": "new", "EndpointConfigName": "nowhere"},
            "SageMaker.AmazonSageMakerException",
            f"{NO_CONFIG} (Service: SageMaker; Status Code: 400; Error Code: ValidationException; Request ID: ",
        ),
        (
            "aws-sdk:sagemaker:createEndpoint",
            {"EndpointName": "new", "EndpointConfigName": "nowhere"},
            "SageMaker.SageMakerException",
            f"{NO_CONFIG} (Service: SageMaker, Status Code: 400, Request ID: ",
        ),
        (
            "aws-sdk:sagemaker:describeHyperParameterTuningJob",
            {"HyperParameterTuningJobName": "nowhere"},
            "SageMaker.ResourceNotFoundException",
            NO_TUNING_JOB,
        ),
    ],
)
def test_step_functions_sees_the_same_refusals(world, taken, states_role, resource, request_, error, cause):
    states = world.client("stepfunctions")
    task = {"Type": "Task", "Resource": f"arn:aws:states:::{resource}", "Parameters": request_, "End": True}
    machine = states.create_state_machine(
        name=f"refused-{resource}".replace(":", "-"),
        definition=json.dumps({"StartAt": "Task", "States": {"Task": task}}),
        roleArn=states_role,
    )["stateMachineArn"]
    execution = states.start_execution(stateMachineArn=machine)["executionArn"]
    found = until(
        lambda: states.describe_execution(executionArn=execution), lambda found: found["status"] != "RUNNING", 30
    )
    assert (found["status"], found["error"]) == ("FAILED", error)
    assert cause in found["cause"]


@pytest.fixture(scope="module")
def states_role(world):
    iam = world.client("iam")
    trust = {"Effect": "Allow", "Principal": {"Service": "states.amazonaws.com"}, "Action": "sts:AssumeRole"}
    policy = {"Effect": "Allow", "Action": ["sagemaker:*", "iam:PassRole"], "Resource": "*"}
    role = iam.create_role(
        RoleName="states", AssumeRolePolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [trust]})
    )["Role"]["Arn"]
    iam.put_role_policy(
        RoleName="states",
        PolicyName="sagemaker",
        PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [policy]}),
    )
    return role
