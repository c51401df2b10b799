"""What must hold of the workflow's definition, whatever it says."""

import json
import re
from fnmatch import fnmatchcase
from typing import Any

import boto3
import pytest
from ministack.services import stepfunctions as interpreter

from tests.makers import template

DEFINITION = json.loads((template.ROOT / "statemachine" / "retrain.asl.json").read_text())
STATES: dict[str, dict[str, Any]] = DEFINITION["States"]
TASKS = {name: state for name, state in STATES.items() if state["Type"] == "Task"}

# From there on a run has the lock, or has ended.
LOCK = {"TakeLock", "ReadLock", "IsLocked", "DescribeHolder", "IsHolderDead", "EndHolder", "WaitForLock"}

# What Step Functions itself calls for each optimized integration, beside the action of the name.
OPTIMIZED = {
    "lambda:invoke": {"lambda:InvokeFunction"},
    "sagemaker:createProcessingJob.sync": {
        "sagemaker:CreateProcessingJob", "sagemaker:DescribeProcessingJob", "sagemaker:StopProcessingJob",
        "sagemaker:AddTags", "sagemaker:ListTags", "iam:PassRole",
        "events:PutTargets", "events:PutRule", "events:DescribeRule",
    },
    "sagemaker:createHyperParameterTuningJob.sync": {
        "sagemaker:CreateHyperParameterTuningJob", "sagemaker:DescribeHyperParameterTuningJob",
        "sagemaker:StopHyperParameterTuningJob", "sagemaker:AddTags", "iam:PassRole",
        "events:PutTargets", "events:PutRule", "events:DescribeRule",
    },
    "codebuild:startBuild.sync": {
        "codebuild:StartBuild", "codebuild:StopBuild", "codebuild:BatchGetBuilds",
        "events:PutTargets", "events:PutRule", "events:DescribeRule",
    },
    "dynamodb:putItem": {"dynamodb:PutItem"},
    "dynamodb:getItem": {"dynamodb:GetItem"},
    "dynamodb:updateItem": {"dynamodb:UpdateItem"},
    "dynamodb:deleteItem": {"dynamodb:DeleteItem"},
    "sns:publish": {"sns:Publish"},
}  # fmt: skip
# Where the IAM action is not the API's name, or there is more to it.
SDK = {
    "dynamodb:transactWriteItems": {"dynamodb:PutItem"},
    "s3:listObjectsV2": {"s3:ListBucket"},
    "sfn:describeExecution": {"states:DescribeExecution"},
    "sagemaker:createTrainingJob": {"sagemaker:CreateTrainingJob", "iam:PassRole"},
    "sagemaker:createModel": {"sagemaker:CreateModel", "iam:PassRole"},
    "sagemaker:createModelPackage": {
        "sagemaker:CreateModelPackage", "s3:GetObject", "ecr:BatchGetImage", "ecr:DescribeImages",
    },
    "sagemaker:updateEndpoint": {"sagemaker:UpdateEndpoint", "cloudwatch:DescribeAlarms"},
    "sagemaker:deleteEndpoint": {"sagemaker:DeleteEndpoint", "application-autoscaling:DeregisterScalableTarget"},
    "applicationautoscaling:describeScalableTargets": {"application-autoscaling:DescribeScalableTargets"},
    "applicationautoscaling:deregisterScalableTarget": {"application-autoscaling:DeregisterScalableTarget"},
    "applicationautoscaling:registerScalableTarget": {
        "application-autoscaling:RegisterScalableTarget", "sagemaker:DescribeEndpoint",
        "sagemaker:DescribeEndpointConfig", "sagemaker:UpdateEndpointWeightsAndCapacities",
        "iam:CreateServiceLinkedRole",
    },
    "applicationautoscaling:putScalingPolicy": {
        "application-autoscaling:PutScalingPolicy", "cloudwatch:PutMetricAlarm", "cloudwatch:DescribeAlarms",
        "cloudwatch:DeleteAlarms",
    },
}  # fmt: skip
# Step Functions names services as the SDK for Java does.
BOTO3_NAMES = {"applicationautoscaling": "application-autoscaling", "sfn": "stepfunctions"}
# Every field that goes through an optimized integration. Those hold an older model of the API and refuse a newer field
# only when it runs, so each addition here is a decision: is it a field that has been there for years?
OPTIMIZED_FIELDS = {
    "sagemaker:createProcessingJob.sync": {
        "ProcessingJobName", "AppSpecification", "ProcessingInputs", "ProcessingOutputConfig", "ProcessingResources",
        "StoppingCondition", "RoleArn",
    },
    "sagemaker:createHyperParameterTuningJob.sync": {
        "HyperParameterTuningJobName", "HyperParameterTuningJobConfig", "TrainingJobDefinition",
        "TrainingJobDefinition.StaticHyperParameters", "TrainingJobDefinition.AlgorithmSpecification",
        "TrainingJobDefinition.InputDataConfig", "TrainingJobDefinition.OutputDataConfig",
        "TrainingJobDefinition.ResourceConfig", "TrainingJobDefinition.StoppingCondition",
        "TrainingJobDefinition.RoleArn",
        "HyperParameterTuningJobConfig.Strategy", "HyperParameterTuningJobConfig.HyperParameterTuningJobObjective",
        "HyperParameterTuningJobConfig.ResourceLimits", "HyperParameterTuningJobConfig.ParameterRanges",
    },
    "codebuild:startBuild.sync": {"ProjectName", "SourceLocationOverride", "EnvironmentVariablesOverride"},
}  # fmt: skip


def integration(state: dict[str, Any]) -> str:
    return state["Resource"].removeprefix("arn:${Partition}:states:::")


def actions(state: dict[str, Any]) -> set[str]:
    name = integration(state)
    if not name.startswith("aws-sdk:"):
        return OPTIMIZED[name]
    service, _, operation = name.removeprefix("aws-sdk:").partition(":")
    return SDK.get(f"{service}:{operation}", {f"{service}:{operation[0].upper()}{operation[1:]}"})


def allowed() -> list[str]:
    role = template.resources("AWS::IAM::Role")["RetrainRole"]
    statements = role["Policies"][0]["PolicyDocument"]["Statement"]
    found: list[str] = []
    for statement in statements:
        assert statement["Effect"] == "Allow"
        found += [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
    return found


@pytest.mark.parametrize("name", TASKS)
def test_every_action_is_within_the_roles_policy(name: str):
    for action in actions(TASKS[name]):
        assert any(fnmatchcase(action, pattern) for pattern in allowed()), f"{name} needs {action}"


def test_the_role_allows_nothing_that_no_state_needs():
    needed = set().union(*(actions(state) for state in TASKS.values()))
    logging = {a for a in allowed() if a.startswith(("logs:", "xray:"))}
    assert not set(allowed()) - needed - logging


@pytest.mark.parametrize("name", TASKS)
def test_every_task_retries_catches_and_has_a_time_limit(name: str):
    state = TASKS[name]
    assert state["Retry"] and state["TimeoutSeconds"] > 0
    assert "States.ALL" in [error for catcher in state["Catch"] for error in catcher["ErrorEquals"]]


def test_the_execution_itself_has_a_time_limit():
    """It leaves room for a tuning job, and for the longest that the others may take, a second training included."""
    longest = template.template()["Parameters"]["JobMaxSeconds"]["MaxValue"]
    assert STATES["Tune"]["TimeoutSeconds"] + 6 * longest < DEFINITION["TimeoutSeconds"] <= 14 * 86400


def test_the_disk_that_all_originals_must_fit_on_can_be_chosen():
    volume = STATES["Prepare"]["Arguments"]["ProcessingResources"]["ClusterConfig"]["VolumeSizeInGB"]
    assert volume == "{% $number('${PrepareVolumeGB}') %}"
    limits = template.template()["Parameters"]["PrepareVolumeGB"]
    assert (limits["MinValue"], limits["MaxValue"]) == (30, 16384), "as much as SageMaker gives a processing job"


def test_a_probe_that_fails_leaves_the_judgement_to_the_alarms():
    """The run must not end, and free the lock, while an update is under way."""
    assert [catcher["Next"] for catcher in STATES["ProbeEndpoint"]["Catch"]] == ["WaitForEndpoint"]


def test_a_model_that_is_live_is_recorded_whether_it_scales_or_not():
    """First the truth about the deployment, then the scaling; trouble with it is told, and ends nothing."""
    assert {STATES[name]["Next"] for name in ("Promote", "RecordRollback")} == {"IsAutoscaled"}
    for name in ("RegisterScaling", "PutScalingPolicy"):
        (catcher,) = STATES[name]["Catch"]
        assert catcher["Next"] == "IsPromoted" and "the endpoint does not scale" in catcher["Assign"]["message"]


def test_everything_that_scales_is_about_the_one_variant():
    arguments = [state["Arguments"] for state in TASKS.values() if "applicationautoscaling:" in state["Resource"]]
    assert len(arguments) == 4
    variant = "endpoint/${Name}/variant/AllTraffic"
    for each in arguments:
        assert each.get("ResourceId", each.get("ResourceIds")) in (variant, [variant])
        assert each["ServiceNamespace"] == "sagemaker"
        assert each["ScalableDimension"] == "sagemaker:variant:DesiredInstanceCount"


def test_the_last_run_is_remembered_however_its_model_was_judged():
    """What counts as newly labelled is counted from there, and so are new classes."""
    last = {"pk": {"S": "dataset"}, "sk": {"S": "last"}}.items()
    item = STATES["Judge"]["Assign"]["trained"][-1]
    assert last <= item.items() and {"run", "hash", "classes", "trained_at"} <= item.keys()
    for name in ("RecordRejection", "Promote", "RecordRollback"):
        assert "$map($trained, " in STATES[name]["Arguments"]["TransactItems"], name


@pytest.mark.parametrize(("poll", "job"), [(1, 4 * 86400), (15, 4 * 86400), (15, 14400)])
def test_waiting_for_the_longest_training_leaves_room_in_the_history(poll: int, job: int):
    """An execution's history holds 25,000 events; one look at the job costs eleven at most. There may be two jobs."""
    assert "/ 200000)" in STATES["WaitForTraining"]["Seconds"]
    age, looks = 3600.0, 0
    while age < 3600 + job:
        age, looks = age + max(poll, age // 200), looks + 1
    assert 11 * looks < 15_000


def following(state: dict[str, Any]) -> set[str]:
    found = {state.get("Next"), state.get("Default")}
    found |= {choice["Next"] for choice in state.get("Choices", [])}
    found |= {catcher["Next"] for catcher in state.get("Catch", [])}
    return {name for name in found if name}


def test_every_way_through_ends_at_the_lock():
    """A run frees its lock itself, or fails with it, and then end_run does. Nobody else ends a run."""
    reached, edge = {"WhatFor"}, {"WhatFor"}
    while edge:
        edge = set().union(*(following(STATES[name]) for name in edge if name != "FreeLock")) - reached
        reached |= edge
    assert "FreeLock" in reached and "Done" not in reached
    ends = {name for name, state in STATES.items() if "RunFailed" in following(state)}
    assert ends - LOCK == {"IsFailed", "FreeLock", "HowItEnded"}
    assert not STATES.keys() - reached - LOCK - {"Begin", "HowItEnded", "Done"}, "unreachable states"


def test_who_does_not_get_the_lock_touches_nothing():
    """From TakeLock on, until the lock is taken, every way out is the end: what follows is another run's."""
    reached, edge = {"TakeLock"}, {"TakeLock"}
    while edge:
        edge = set().union(*(following(STATES[name]) for name in edge)) - reached - {"WhatFor", "RunFailed"}
        reached |= edge
    assert reached == LOCK
    assert [name for name in reached if "WhatFor" in following(STATES[name])] == ["TakeLock"]
    writes = {integration(STATES[name]) for name in reached if STATES[name]["Type"] == "Task"}
    assert writes == {
        "dynamodb:putItem", "dynamodb:getItem", "aws-sdk:sfn:describeExecution", "lambda:invoke",
    }  # fmt: skip
    assert STATES["EndHolder"]["Arguments"]["FunctionName"] == "${EndRunFunction}"


def test_the_roles_that_ask_about_executions_name_this_machines():
    """By the machine's name, which is fixed: a role that refers to the machine that refers to the role is a circle."""
    machine = template.resources("AWS::Serverless::StateMachine")["Retrain"]
    assert machine["Name"] == {"Fn::Sub": "${Name}-retrain"}
    text = (template.ROOT / "template.yaml").read_text()
    arns = re.findall(r"Action: states:DescribeExecution\n\s+Resource: !Sub (\S+)", text)
    assert len(arns) >= 3 and all(arn.endswith(":execution:${Name}-retrain:*") for arn in arns)


def test_what_is_made_for_a_deployment_is_recorded_before():
    """end_run finds by the record what a run that died had begun."""
    makes = [name for name, state in TASKS.items() if re.search(r":(create|update)(Model|Endpoint)", state["Resource"])]
    assert {"CreateModel", "CreateEndpoint", "UpdateEndpoint"} <= set(makes)
    reached, edge = {"Begin"}, {"Begin"}
    while edge:
        edge = set().union(*(following(STATES[name]) for name in edge if name != "RecordDeployment")) - reached
        reached |= edge
    assert set(makes) & reached <= {"Register"}, "a model package is no deployment"


def test_a_job_is_tried_again_only_from_states_that_name_it_anew():
    """SageMaker keeps the names of jobs for good."""
    again = following(STATES["WhatAgain"])
    jobs = {name for name in TASKS if re.search(r":create\w*Job", TASKS[name]["Resource"])}
    assert again == jobs - {"Tune"}, "a tuning job does not say why its trials failed"
    for name in again:
        assert "4 * $again + $states.context.State.RetryCount" in json.dumps(TASKS[name]["Arguments"])
        assert f"'{name}'" in json.dumps(STATES["IsForNow"])
        assert all(rule["MaxAttempts"] < 4 for rule in TASKS[name]["Retry"])
    parameters = template.template()["Parameters"]
    (tail,) = re.findall(r"\{0,(\d+)\}", parameters["Name"]["AllowedPattern"])
    longest = len("a" * (int(tail) + 2) + "-" + "1" * 12 + "-" + str(4 * 2 + 3))
    assert longest <= 32, "of a tuning job"


def test_no_assignment_reads_what_is_assigned_beside_it():
    """AWS gives all assignments of a state the values from before it; the local Step Functions, one after another."""
    for name, state in STATES.items():
        for part in (state, *state.get("Choices", []), *state.get("Catch", [])):
            assigned = part.get("Assign", {})
            for variable, value in assigned.items():
                read = set(re.findall(r"\$(\w+)", json.dumps(value))) - {variable}
                assert not read & assigned.keys(), f"{name} assigns {variable}"


def test_every_substitution_is_given_and_used():
    used = set(re.findall(r"\$\{(\w+)\}", json.dumps(DEFINITION)))
    given = template.resources("AWS::Serverless::StateMachine")["Retrain"]["DefinitionSubstitutions"]
    assert used == given.keys()


@pytest.mark.parametrize("name", [n for n, s in TASKS.items() if integration(s) in OPTIMIZED_FIELDS])
def test_optimized_integrations_get_long_standing_fields_only(name: str):
    arguments = TASKS[name]["Arguments"]
    fields = set(arguments)
    for part in ("HyperParameterTuningJobConfig", "TrainingJobDefinition"):
        fields |= {f"{part}.{field}" for field in arguments.get(part, {})}
    assert fields <= OPTIMIZED_FIELDS[integration(TASKS[name])]


def test_every_family_that_serves_and_runs_jobs_has_an_xlarge_for_the_evaluation():
    """The evaluation runs on `ml.<the endpoint's family>.xlarge`; smaller ones are missing in some families."""
    model = boto3.client("sagemaker", region_name="us-east-1").meta.service_model
    jobs, endpoints = (set(model.shape_for(f"{kind}InstanceType").enum) for kind in ("Processing", "ProductionVariant"))
    families = {name.split(".")[1] for name in jobs} & {name.split(".")[1] for name in endpoints}
    assert {"c5", "c6i", "c7i", "m5", "m6i", "m7i", "r7i"} <= families
    assert {family[0] for family in families if f"ml.{family}.xlarge" not in jobs} <= {"p", "g"}, "GPUs do not serve"
    assert "'.xlarge'" in STATES["Evaluate"]["Arguments"]["ProcessingResources"]["ClusterConfig"]["InstanceType"]


@pytest.mark.parametrize("name", [n for n, s in TASKS.items() if "aws-sdk:" in s["Resource"]])
def test_sdk_integrations_name_operations_and_parameters_that_exist(name: str):
    service, _, operation = integration(TASKS[name]).removeprefix("aws-sdk:").partition(":")
    service = BOTO3_NAMES.get(service, service)
    model = boto3.client(service, region_name="us-east-1").meta.service_model
    shape = model.operation_model(operation[0].upper() + operation[1:]).input_shape
    arguments = TASKS[name]["Arguments"]
    if isinstance(arguments, dict):
        pascal = lambda names: {name[0].upper() + name[1:] for name in names}  # noqa: E731  whatever the API's own case
        assert set(arguments) <= pascal(shape.members)
        assert pascal(shape.required_members) <= set(arguments)


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        ('{"FailureReason": "AlgorithmError: …", "ExitMessage": "no pictures"}', "AlgorithmError: …: no pictures"),
        ('{"FailureReason": "CapacityError: none left"}', "CapacityError: none left"),
        ('{"errorMessage": "no weights", "stackTrace": ["…"]}', "States.TaskFailed: no weights"),
        ("it broke", "States.TaskFailed: it broke"),
    ],
)
def test_a_failed_run_says_why_in_the_words_of_its_job(cause: str, message: str):
    failure = {"State": "Prepare", "Error": "States.TaskFailed", "Cause": cause}
    context = {"_query_language": "JSONata", "variables": {"failure": failure}}
    told = interpreter._apply_jsonata_template(STATES["Failed"]["Assign"], {}, context, None, None)
    assert told["message"] == f"Prepare: {message}"
