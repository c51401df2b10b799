"""The workflow's own decisions, as the local Step Functions executes them: what it does about what a training found.

The definition is the deployed one; only its jobs and functions are replaced, each by a Pass state that puts out what it
would have been called with, and by an answer. Tables, topic and bucket are real.
"""

import itertools
import json
import re
import textwrap
from collections.abc import Collection
from functools import cache
from typing import Any
from unittest.mock import ANY

import boto3
import pytest

from local.emulator import Emulator
from tests.makers import template
from tests.makers.sagemaker import BUCKET, SERVER, World
from tests.makers.waiting import wait_for

DEFINITION = (template.ROOT / "statemachine" / "retrain.asl.json").read_text()
ARTIFACTS = "houndloop-artifacts"
REPLACED = ("lambda:", "sagemaker:", "codebuild:", "aws-sdk:sagemaker:", "aws-sdk:applicationautoscaling:")
CHAMPION = {
    "pk": {"S": "champion"},
    "sk": {"S": "champion"},
    "classes": {"S": '["b"]'},
    "artifact": {"S": f"s3://{ARTIFACTS}/runs/1/model.tar.gz"},
}
# Answers are JSONata, and may speak of the run's variables.
ANSWERS = {
    "PublishSources": "{'Payload': {'code': {'archive': 's3://c/a', 'files': 's3://c/f/', 'hash': 'c'}, "
    f"'weights': 's3://{ARTIFACTS}/weights/', 'serving': {{'image': 'image', 'hash': 's', 'source': 's'}}}}}}",
    "SnapshotDataset": "{'Payload': {'hash': 'd', 'uri': 's3://d', 'classes': ['a', 'b'], 'takenAt': 'now', "
    "'trained': false}}",
    "Tune": "{'HyperParameterTuningJobName': 'tuning'}",
    "ReadTuning": "{'BestTrainingJob': {'TunedHyperParameters': {'lr': '0.001', 'batch-size': '32', 'epochs': '5'}}}",
    "DescribeTraining": "{'TrainingJobStatus': 'Completed', "
    "'ModelArtifacts': {'S3ModelArtifacts': 's3://' & $trainingJob & '/model.tar.gz'}}",
    "Judge": "{'Payload': $evaluation ? {'promote': true, 'sentence': 'better', 'accuracy': 0.9, 'preprocess': '{}', "
    "'precision': 'int8', 'evaluation': 's3://e', 'metadata': {'precision': 'int8', 'verdict': 's3://v'}} : "
    "{'promote': false, 'sentence': 'blocking findings', 'accuracy': null, 'metadata': {'verdict': 's3://v'}}}",
    "Register": "{'ModelPackageArn': 'arn'}",
    "FindEndpoint": "{'Endpoints': []}",
    "FindScaling": "{'ScalableTargets': []}",
    "DescribeEndpoint": "{'EndpointStatus': 'InService', 'EndpointConfigName': 'loop-' & $runId}",
    "Replay": "{'Payload': {'next': null}}",
}

SERVERLESS = {"EndpointMode": "serverless", "ServerlessMemoryMB": "2048", "ServerlessMaxConcurrency": "5"}

SECOND_FAILS = "$first = null ? 'Completed' : 'Failed'"


def findings(
    *rules: str, accuracy: float = 0.9, blocking: bool = False, reason: str = "", recommendation: dict | None = None
) -> dict[str, Any]:
    """findings.json of a training in which `rules` found something."""
    return {
        "blocking": blocking,
        "verdict": {"status": "EndedEarly" if reason else "Completed", "rule": None, "epoch": 3, "reason": reason},
        "recommendation": recommendation or {},
        "rules": [{"rule": "StepOutlier", "status": "NoIssuesFound", "blocking": False}]
        + [{"rule": rule, "status": "IssuesFound", "blocking": blocking} for rule in rules],
        "summary": {"metrics": {"validation_accuracy": accuracy}},
    }


def found(first: dict, second: dict | None = None) -> dict[str, str]:
    """The answer of ReadFindings: of the first training, and of one that follows."""
    one, two = json.dumps(json.dumps(first)), json.dumps(json.dumps(second or first))
    return {"ReadFindings": f"{{'Body': $first = null ? {one} : {two}}}"}


def with_answers(answers: dict[str, str], substitutions: dict[str, str], real: Collection[str]) -> str:
    definition = json.loads(re.sub(r"\$\{(\w+)\}", lambda match: substitutions.get(match[1], match[1]), DEFINITION))
    for name, state in definition["States"].items():
        if state["Type"] != "Task" or name in real or name not in answers and not called(state).startswith(REPLACED):
            continue
        text = json.dumps({"Assign": state.get("Assign", {}), "Output": {"arguments": state["Arguments"]}})
        answer = json.dumps(f"({answers.get(name, '{}')})")[1:-1]
        text = text.replace("$states.result", answer).replace("$states.context.State.RetryCount", "0")
        definition["States"][name] = {"Type": "Pass", "Next": state["Next"]} | json.loads(text)
    return json.dumps(definition)


def called(state: dict[str, Any]) -> str:
    return state["Resource"].removeprefix("arn:aws:states:::")


KEYS = {"region_name": "us-east-1", "aws_access_key_id": "test", "aws_secret_access_key": "test"}
session: Any = boto3


@cache
def client_of(url: str, service: str) -> Any:
    return session.client(service, endpoint_url=url, **KEYS)


class Workflow:
    """Runs of the workflow over one table."""

    numbers = itertools.count()

    def __init__(self, aws: Emulator) -> None:
        client = self.client = lambda service: client_of(aws.endpoint_url, service)
        self.states, self.table, self.s3 = client("stepfunctions"), client("dynamodb"), client("s3")
        self.name = f"state{next(self.numbers)}"
        self.table.create_table(
            TableName=self.name,
            KeySchema=[{"AttributeName": "pk", "KeyType": "HASH"}, {"AttributeName": "sk", "KeyType": "RANGE"}],
            AttributeDefinitions=[{"AttributeName": name, "AttributeType": "S"} for name in ("pk", "sk")],
            BillingMode="PAY_PER_REQUEST",
        )
        self.s3.create_bucket(Bucket=ARTIFACTS)
        self.topic = client("sns").create_topic(Name="topic")["TopicArn"]
        iam = client("iam")
        services = ("dynamodb", "s3", "sns", "sagemaker", "application-autoscaling", "cloudwatch", "states")
        actions = [*(f"{service}:*" for service in services), "iam:PassRole"]
        allow = {"Effect": "Allow", "Action": actions, "Resource": "*"}
        trust = {"Effect": "Allow", "Principal": {"Service": "states.amazonaws.com"}, "Action": "sts:AssumeRole"}
        document = lambda statement: json.dumps({"Version": "2012-10-17", "Statement": [statement]})  # noqa: E731
        self.role = iam.create_role(RoleName=self.name, AssumeRolePolicyDocument=document(trust))["Role"]["Arn"]
        iam.put_role_policy(RoleName=self.name, PolicyName="all", PolicyDocument=document(allow))

    def values(self, **substitutions: str) -> dict[str, str]:
        """What the definition's substitutions stand for."""
        return {
            "Name": "loop", "Partition": "aws", "LoopStateTable": self.name, "Topic": self.topic,
            "ArtifactBucket": ARTIFACTS,
            "ImageSize": "32", "Unfreeze": "all", "Seed": "0", "PollSeconds": "0", "BakingSeconds": "1",
            "EndpointInstanceCount": "2", "EndpointMaxInstanceCount": "2", "ProbeSeconds": "1",
            "JobMaxSeconds": "60", "TuningJobs": "2", "TuningParallelJobs": "1", "BatchSizes": "16,32",
            "UseSpotTraining": "false", "ManagedDebugger": "false",
            "TrainingInstanceType": "ml.c5.xlarge", "FollowInstanceTypes": "", "EndpointMode": "real-time",
            "EndpointInstanceType": "ml.c7i.large", "EvaluationInstanceType": "", "ServingPrecision": "auto",
            "PrepareVolumeGB": "100",
        } | substitutions  # fmt: skip

    def run(
        self,
        answers: dict[str, str],
        real: Collection[str] = (),
        status: str = "SUCCEEDED",
        given: str = "{}",
        **substitutions: str,
    ) -> dict[str, Any]:
        """An execution to its end: states with their outputs, in order, and how the run was recorded.

        `real` names states that do call what they call.
        """
        values = self.values(**substitutions)
        machine = self.states.create_state_machine(
            name=f"{self.name}-{next(self.numbers)}",
            definition=with_answers(ANSWERS | answers, values, real),
            roleArn=self.role,
        )["stateMachineArn"]
        execution = self.states.start_execution(stateMachineArn=machine, input=given)["executionArn"]

        def ended() -> dict[str, Any] | None:
            described = self.states.describe_execution(executionArn=execution)
            return described if described["status"] != "RUNNING" else None

        described = wait_for(ended, 60)
        assert described["status"] == status, described.get("cause")
        pages = self.states.get_paginator("get_execution_history").paginate(executionArn=execution)
        exited = [e["stateExitedEventDetails"] for page in pages for e in page["events"] if "Exited" in e["type"]]
        self.output = json.loads(described["output"]) if status == "SUCCEEDED" else {"why": described["cause"]}
        self.visited = [event["name"] for event in exited]
        self.outputs = {event["name"]: json.loads(event["output"]) for event in exited}
        self.requests = [json.loads(e["output"])["arguments"] for e in exited if e["name"] == "Train"]
        self.record = self.item("run", self.output.get("run", "-"))
        if self.item("lock", "lock").get("holder") == execution:  # end_run, which frees it then, is not here
            self.table.delete_item(TableName=self.name, Key={"pk": {"S": "lock"}, "sk": {"S": "lock"}})
        return self.output

    def arguments(self, name: str) -> dict[str, Any]:
        """What the job or function of a state would have been called with."""
        return self.outputs[name]["arguments"]

    def item(self, pk: str, sk: str) -> dict[str, str]:
        item = self.table.get_item(TableName=self.name, Key={"pk": {"S": pk}, "sk": {"S": sk}}).get("Item", {})
        return {name: value["S"] for name, value in item.items() if "S" in value}


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory):
    with Emulator(state=tmp_path_factory.mktemp("aws")) as emulator:
        yield emulator


@pytest.fixture
def workflow(aws: Emulator) -> Workflow:
    return Workflow(aws)


def test_a_sound_training_is_evaluated_and_promoted(workflow: Workflow):
    assert workflow.run(found(findings()))["outcome"] == "PROMOTED"
    (request,) = workflow.requests
    run = workflow.output["run"]
    assert request["TrainingJobName"] == f"loop-{run}-train-0"
    assert request["HyperParameters"].items() >= {"lr": "0.001", "profile": "true", "seed": "0"}.items()
    assert [channel["ChannelName"] for channel in request["InputDataConfig"]] == ["training", "weights"]
    assert request["ProfilerConfig"] == {"DisableProfiler": True} and "DebugRuleConfigurations" not in request
    assert workflow.record["report"] == f"s3://{ARTIFACTS}/runs/{run}/report.html"
    assert (workflow.record["note"], workflow.record["recommendation"]) == ("", "{}")


def test_a_model_is_served_in_the_precision_that_was_chosen_for_it(workflow: Workflow):
    workflow.run(found(findings()))
    arguments = workflow.arguments("Evaluate")["AppSpecification"]["ContainerArguments"]
    assert arguments[:2] == ["--precision", "auto"] and arguments[-2:] == ["--champion-precision", "f32"]
    assert workflow.arguments("CreateModel")["PrimaryContainer"]["Environment"]["PRECISION"] == "int8"
    assert workflow.arguments("Register")["CustomerMetadataProperties"]["precision"] == "int8"
    assert workflow.item("champion", "champion")["precision"] == "int8"
    workflow.run(found(findings()))
    arguments = workflow.arguments("Evaluate")["AppSpecification"]["ContainerArguments"]
    assert arguments[-2:] == ["--champion-precision", "int8"], "what this champion is served in"
    *_, settled, champion = workflow.arguments("Evaluate")["ProcessingInputs"]
    assert (settled["InputName"], champion["InputName"]) == ("settled", "champion")
    assert settled["S3Input"]["S3Uri"] == f"s3://{ARTIFACTS}/datasets/d/manifest.jsonl", "what this champion learnt"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "ml.c7i.xlarge"),
        ({"EndpointInstanceType": "ml.m7i-flex.2xlarge"}, "ml.m7i-flex.xlarge"),
        ({"EndpointInstanceType": "ml.c5d.large", "EvaluationInstanceType": "ml.c5.xlarge"}, "ml.c5.xlarge"),
        (SERVERLESS | {"ProcessingInstanceType": "ml.m5.large"}, "ml.m5.large"),
    ],
)
def test_models_are_evaluated_on_the_processors_that_serve_them(workflow: Workflow, given: dict, expected: str):
    workflow.run(found(findings()), **given)
    cluster = workflow.arguments("Evaluate")["ProcessingResources"]["ClusterConfig"]
    assert cluster["InstanceType"] == expected


@pytest.mark.parametrize("rule", ["VanishingGradient", "ExplodingTensor", "LossNotDecreasing"])
def test_a_training_that_ended_early_is_not_evaluated(workflow: Workflow, rule: str):
    reason = f"{rule} in step 12: train loss nan"
    given = findings(rule, blocking=True, reason=reason)
    output = workflow.run(found(given))
    assert (output["outcome"], output["why"]) == ("REJECTED", "blocking findings")
    assert "BlockPromotion" in workflow.visited and "Evaluate" not in workflow.visited
    judged = workflow.arguments("Judge")["Payload"]
    assert judged["evaluation"] is None and judged["findings"] == given
    assert workflow.outputs["BlockPromotion"]["verdict"]["status"] == "EndedEarly"
    assert [found["rule"] for found in workflow.outputs["BlockPromotion"]["blocking"]] == [rule]
    assert workflow.item("dataset", "last")["outcome"] == "REJECTED" and workflow.item("lock", "lock") == {}


def test_overfitting_trains_once_more_and_goes_on_with_a_note(workflow: Workflow):
    """Also when the second training overfits too."""
    advice = {"batch_size": 64}
    first = findings("Overfit", "BatchSize", accuracy=0.8, recommendation=advice)
    output = workflow.run(found(first, findings("Overfit", accuracy=0.8)))
    assert output["outcome"] == "PROMOTED" and workflow.visited.count("Regularise") == 1
    assert json.loads(workflow.record["recommendation"]) == advice
    first, second = workflow.requests
    run = output["run"]
    assert second["TrainingJobName"] == f"loop-{run}-train-regularised-0"
    stronger = {"augmentation": "strong", "weight-decay": "0.2", "label-smoothing": "0.2"}
    assert not stronger.items() & first["HyperParameters"].items()
    assert second["HyperParameters"] == first["HyperParameters"] | stronger | {
        "run-uri": f"s3://{ARTIFACTS}/runs/{run}/regularised"
    }
    assert second["CheckpointConfig"]["S3Uri"] != first["CheckpointConfig"]["S3Uri"]
    challenger = workflow.arguments("Evaluate")["ProcessingInputs"][3]
    assert challenger["InputName"] == "challenger"
    assert challenger["S3Input"]["S3Uri"] == f"s3://loop-{run}-train-regularised-0/model.tar.gz"
    assert workflow.record["report"] == f"s3://{ARTIFACTS}/runs/{run}/regularised/report.html"
    assert workflow.record["note"].endswith("; the second does too") and workflow.record["note"] in output["why"]


@pytest.mark.parametrize(
    ("second", "answers"),
    [
        (findings(accuracy=0.7), {}),
        (findings("LossNotDecreasing", accuracy=0.9, blocking=True), {}),
        (
            findings(),
            {"DescribeTraining": ANSWERS["DescribeTraining"].replace("'Completed'", SECOND_FAILS)},
        ),
    ],
    ids=["worse", "blocked", "failed"],
)  # fmt: skip
def test_a_second_training_that_is_no_better_gives_way_to_the_first(workflow: Workflow, second, answers):
    output = workflow.run(found(findings("Overfit", accuracy=0.8), second) | answers)
    run = output["run"]
    assert output["outcome"] == "PROMOTED" and "KeepFirstTraining" in workflow.visited
    challenger = workflow.arguments("Evaluate")["ProcessingInputs"][3]["S3Input"]["S3Uri"]
    assert challenger == f"s3://loop-{run}-train-0/model.tar.gz"
    assert workflow.arguments("Register")["CustomerMetadataProperties"]["trainingJob"] == f"loop-{run}-train-0"
    assert workflow.record["report"] == f"s3://{ARTIFACTS}/runs/{run}/report.html"
    assert "no better" in workflow.record["note"]
    assert [rule["rule"] for rule in workflow.arguments("Judge")["Payload"]["findings"]["rules"]][1:] == ["Overfit"]


def test_the_next_run_follows_a_recommendation_where_it_safely_can(workflow: Workflow):
    advice = {"batch_size": 64, "loader_workers": 3, "instance_type": "ml.g5.2xlarge"}
    workflow.run(found(findings("LowGPUUtilization", recommendation=advice)))
    assert json.loads(workflow.record["recommendation"]) == advice
    assert workflow.output["recommendation"] == workflow.outputs["Recommend"]["recommendation"] == advice
    assert workflow.outputs["FollowAdvice"]["advice"] == {}
    ranges = lambda: workflow.arguments("Tune")["HyperParameterTuningJobConfig"]["ParameterRanges"]  # noqa: E731
    assert ranges()["CategoricalParameterRanges"][0]["Values"] == ["16", "32"]

    workflow.run(found(findings()))  # which recommends nothing: what was followed stays
    for _ in range(2):
        assert workflow.outputs["FollowAdvice"]["advice"] == advice
        assert ranges()["CategoricalParameterRanges"][0]["Values"] == ["16", "32", "64"]
        trials = workflow.arguments("Tune")["TrainingJobDefinition"]
        for parameters in (trials["StaticHyperParameters"], workflow.requests[0]["HyperParameters"]):
            assert parameters["loader-workers"] == "3"
        assert trials["ResourceConfig"]["InstanceType"] == "ml.c5.xlarge", "an instance is a matter of quota and price"
        workflow.run(found(findings()))

    workflow.run(found(findings()), FollowInstanceTypes="ml.g5.xlarge,ml.g5.2xlarge")
    assert workflow.requests[0]["ResourceConfig"]["InstanceType"] == "ml.g5.2xlarge"


def test_advice_about_another_machine_is_not_followed(workflow: Workflow):
    workflow.run(found(findings("BatchSize", recommendation={"batch_size": 64})))
    workflow.run(found(findings()), TrainingInstanceType="ml.g5.xlarge", BatchSizes="16")
    tuning = workflow.arguments("Tune")["HyperParameterTuningJobConfig"]["ParameterRanges"]
    assert tuning["CategoricalParameterRanges"][0]["Values"] == ["16"]


def test_the_next_run_starts_from_what_is_there(workflow: Workflow):
    """Prepared pictures of the last run, as long as they are there, and the champion."""
    workflow.table.put_item(TableName=workflow.name, Item=CHAMPION)
    inputs = lambda: {i["InputName"]: i["S3Input"]["S3Uri"] for i in workflow.arguments("Prepare")["ProcessingInputs"]}  # noqa: E731
    first = workflow.run(found(findings(blocking=True)))["run"]
    assert inputs().keys() == {"code", "dataset", "images", "weights"}
    channels = {
        channel["ChannelName"]: channel["DataSource"]["S3DataSource"]["S3Uri"]
        for channel in workflow.arguments("Tune")["TrainingJobDefinition"]["InputDataConfig"]
    }
    assert channels["champion"] == CHAMPION["artifact"]["S"] and channels["training"].endswith("/prepared/")
    assert channels == {
        c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3Uri"] for c in workflow.requests[0]["InputDataConfig"]
    }

    workflow.s3.put_object(Bucket=ARTIFACTS, Key=f"runs/{first}/prepared/train.npy", Body=b"")
    workflow.run(found(findings(blocking=True)))
    assert inputs()["previous"] == f"s3://{ARTIFACTS}/runs/{first}/prepared/"
    workflow.s3.delete_object(Bucket=ARTIFACTS, Key=f"runs/{first}/prepared/train.npy")
    workflow.run(found(findings(blocking=True)))
    assert "previous" not in inputs()


def test_only_where_a_class_is_new_it_starts_from_the_champion(workflow: Workflow):
    """A converged model's loss cannot fall on what it knows."""
    workflow.table.put_item(TableName=workflow.name, Item=CHAMPION | {"classes": {"S": '["c", "b", "a"]'}})
    workflow.run(found(findings()))
    assert [channel["ChannelName"] for channel in workflow.requests[0]["InputDataConfig"]] == ["training", "weights"]
    assert workflow.arguments("Evaluate")["ProcessingInputs"][-1]["InputName"] == "champion"


def test_managed_debugger_adds_its_rules_to_both_trainings(workflow: Workflow):
    workflow.run(found(findings("Overfit"), findings()), ManagedDebugger="true")
    for request in workflow.requests:
        named = [rule["RuleConfigurationName"] for rule in request["DebugRuleConfigurations"]]
        named += [rule["RuleConfigurationName"] for rule in request["ProfilerRuleConfigurations"]]
        assert named == ["VanishingGradient", "Overfit", "LowGPUUtilization", "ProfilerReport"]


LIVE = {  # an endpoint with three instances, which scales
    "FindEndpoint": "{'Endpoints': [{'EndpointName': 'loop', 'EndpointStatus': 'InService'}]}",
    "FindScaling": "{'ScalableTargets': [{}]}",
    "ReadEndpoint": "{'EndpointConfigName': 'loop-1', 'ProductionVariants': "
    "[{'VariantName': 'AllTraffic', 'DesiredInstanceCount': 3}]}",
    "ReadEndpointConfig": "{'ProductionVariants': [{'VariantName': 'AllTraffic', 'InstanceType': 'ml.c7i.large'}]}",
}
SCALING = {"EndpointMaxInstanceCount": "4", "EndpointTargetInvocations": "300", "EndpointInstanceType": "ml.c7i.large"}


def routing(workflow: Workflow) -> str:
    config = workflow.arguments("UpdateEndpoint")["DeploymentConfig"]
    return config["BlueGreenUpdatePolicy"]["TrafficRoutingConfiguration"]["Type"]


def test_a_new_endpoint_is_given_its_scaling_once_it_is_in_service(workflow: Workflow):
    assert workflow.run(found(findings()), **SCALING)["outcome"] == "PROMOTED"
    after = workflow.visited[workflow.visited.index("Promote") :]
    assert after[1:5] == ["IsAutoscaled", "RegisterScaling", "PutScalingPolicy", "IsPromoted"] and "Replay" in after
    registered = workflow.arguments("RegisterScaling")
    assert (registered["MinCapacity"], registered["MaxCapacity"]) == (2, 4)
    assert registered["ResourceId"] == "endpoint/loop/variant/AllTraffic"
    policy = workflow.arguments("PutScalingPolicy")["TargetTrackingScalingPolicyConfiguration"]
    assert policy["TargetValue"] == 300


def test_an_update_keeps_what_the_endpoint_scaled_to(workflow: Workflow):
    workflow.run(found(findings()) | LIVE, **SCALING)
    assert workflow.arguments("UpdateEndpoint")["RetainAllVariantProperties"] is True
    assert "StopScaling" not in workflow.visited and "PutScalingPolicy" in workflow.visited
    assert routing(workflow) == "CANARY"


@pytest.mark.parametrize(
    ("changes", "retains"),
    [
        ({"EndpointInstanceType": "ml.c7i.xlarge"}, True),  # which SageMaker refuses while the variant scales
        ({"EndpointMaxInstanceCount": "2"}, False),
    ],
    ids=["another instance type", "no more scaling"],
)
def test_an_update_that_may_not_scale_on_ends_the_scaling_first(workflow: Workflow, changes, retains):
    workflow.run(found(findings()) | LIVE, **SCALING | changes)
    stopped, updated = (workflow.visited.index(name) for name in ("StopScaling", "UpdateEndpoint"))
    assert stopped < updated and ("RegisterScaling" in workflow.visited) == retains
    assert workflow.arguments("UpdateEndpoint")["RetainAllVariantProperties"] is retains


@pytest.mark.parametrize(("live", "expected"), [("1", "ALL_AT_ONCE"), ("3", "CANARY")])
def test_the_instances_that_are_there_decide_about_the_canary(workflow: Workflow, live: str, expected: str):
    answers = LIVE | {"ReadEndpoint": LIVE["ReadEndpoint"].replace("3", live)}
    workflow.run(found(findings()) | answers, **SCALING | {"EndpointInstanceCount": "1"})
    assert routing(workflow) == expected


def test_an_endpoint_that_does_not_scale_gets_the_configured_number_of_instances(workflow: Workflow):
    workflow.run(found(findings()) | {"FindEndpoint": LIVE["FindEndpoint"]})
    assert workflow.arguments("UpdateEndpoint")["RetainAllVariantProperties"] is False
    assert not {"StopScaling", "ReadEndpoint", "RegisterScaling"} & set(workflow.visited)


def test_serverless_has_neither_guardrails_nor_scaling(workflow: Workflow):
    answers = {"FindEndpoint": LIVE["FindEndpoint"]}
    assert workflow.run(found(findings()) | answers, **SCALING | SERVERLESS)["outcome"] == "PROMOTED"
    (variant,) = workflow.arguments("CreateEndpointConfig")["ProductionVariants"]
    assert variant["ServerlessConfig"] == {"MemorySizeInMB": 2048, "MaxConcurrency": 5}
    assert not variant.keys() & {"InstanceType", "InitialInstanceCount"}
    assert workflow.arguments("UpdateEndpoint").keys() == {"EndpointName", "EndpointConfigName"}
    assert "RegisterScaling" not in workflow.visited


def test_a_model_is_live_also_where_it_cannot_be_scaled(workflow: Workflow):
    """There is no endpoint here: Application Auto Scaling itself says so."""
    output = workflow.run(found(findings()), real=["RegisterScaling"], **SCALING)
    assert output["outcome"] == "PROMOTED" and "Replay" in workflow.visited
    assert "; the endpoint does not scale: Could not find endpoint" in output["why"]


def test_an_update_that_is_refused_is_tried_again_and_then_told(workflow: Workflow):
    """As one is while the endpoint scales."""
    workflow.run(found(findings()) | LIVE, real=["UpdateEndpoint"], status="FAILED", **SCALING)
    assert workflow.visited.count("PlanUpdate") == workflow.visited.count("FindScaling") == 5
    assert workflow.output["why"].startswith("UpdateEndpoint: ")


# --- The same with real endpoints ---

ENDPOINT_STATES = (
    "CreateModel", "CreateEndpointConfig", "FindEndpoint", "FindScaling", "ReadEndpoint", "ReadEndpointConfig",
    "StopScaling", "CreateEndpoint", "UpdateEndpoint", "DescribeEndpoint", "RegisterScaling", "PutScalingPolicy",
)  # fmt: skip


class Endpoint(Workflow):
    """Runs whose last part is real: they deploy a small server, and scale it."""

    def __init__(self, aws: Emulator) -> None:
        super().__init__(aws)
        self.world = World(aws)
        self.scaling = self.world.client("application-autoscaling")
        self.world.model("small", "hello")
        for name in ("EndpointErrorsAlarm", "EndpointLatencyAlarm"):
            self.world.cloudwatch.put_metric_alarm(
                AlarmName=name, Namespace="n", MetricName="m", Period=60, EvaluationPeriods=1, Threshold=1,
                ComparisonOperator="GreaterThanThreshold", Statistic="Sum", TreatMissingData="notBreaching",
            )  # fmt: skip

    def deploy(self, status: str = "SUCCEEDED", **changes: str) -> dict[str, Any]:
        """One run; the endpoint's variant after it, and its instance type."""
        image = ANSWERS["PublishSources"].replace("'image': 'image'", "'image': 'local/server:1'")
        trained = ANSWERS["DescribeTraining"].replace(
            "'s3://' & $trainingJob & '/model.tar.gz'", f"'s3://{BUCKET}/models/small.tar.gz'"
        )
        answers = found(findings()) | {"PublishSources": image, "DescribeTraining": trained}
        values = SCALING | {"EndpointInstanceCount": "1", "PollSeconds": "1", "EndpointRoleArn": self.world.role}
        values |= {"TrafficShifting": "CANARY"} | changes
        output = self.run(answers, real=ENDPOINT_STATES, status=status, **values)
        if status == "FAILED":
            return output
        assert output["outcome"] == "PROMOTED" and output["why"] == "better"
        endpoint = self.world.sagemaker.describe_endpoint(EndpointName="loop")
        config = self.world.sagemaker.describe_endpoint_config(EndpointConfigName=endpoint["EndpointConfigName"])
        routes = endpoint["LastDeploymentConfig"]["BlueGreenUpdatePolicy"] if "UpdateEndpoint" in self.visited else {}
        return {
            "instances": endpoint["ProductionVariants"][0].get("CurrentInstanceCount"),
            "type": config["ProductionVariants"][0].get("InstanceType", "serverless"),
            "routing": routes.get("TrafficRoutingConfiguration", {}).get("Type"),
        }

    def target(self) -> dict[str, Any] | None:
        found = self.scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
        return found[0] if found else None

    def alarms(self) -> list[dict[str, Any]]:
        prefix = "TargetTracking-endpoint/loop/variant/AllTraffic-"
        return self.world.cloudwatch.describe_alarms(AlarmNamePrefix=prefix)["MetricAlarms"]

    def scale(self, count: int) -> None:
        """What Application Auto Scaling does when an alarm asks for it."""
        wish = [{"VariantName": "AllTraffic", "DesiredInstanceCount": count}]
        self.world.sagemaker.update_endpoint_weights_and_capacities(
            EndpointName="loop", DesiredWeightsAndCapacities=wish
        )


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory):
    images = tmp_path_factory.mktemp("images")
    (images / "server").mkdir()
    (images / "server" / "__main__.py").write_text(textwrap.dedent(SERVER))
    environment = {"HOUNDLOOP_IMAGES": str(images), "HOUNDLOOP_PRELOAD": "json"}
    with Emulator(state=tmp_path_factory.mktemp("endpoint"), environment=environment) as emulator:
        yield Endpoint(emulator)


def test_scaling_is_there_after_the_first_run_and_kept_over_updates(endpoint: Endpoint):
    assert endpoint.deploy() == {"instances": 1, "type": "ml.c7i.large", "routing": None}
    first = endpoint.target()
    assert first and (first["MinCapacity"], first["MaxCapacity"]) == (1, 4)
    assert [alarm["Threshold"] for alarm in endpoint.alarms()] == [300, 270]

    endpoint.scale(2)  # the run comes while it is at that, and waits
    after = endpoint.deploy(EndpointMaxInstanceCount="3", EndpointTargetInvocations="200")
    assert after == {"instances": 2, "type": "ml.c7i.large", "routing": "CANARY"}
    second = endpoint.target()
    assert second and second["ScalableTargetARN"] == first["ScalableTargetARN"] and second["MaxCapacity"] == 3
    assert [alarm["Threshold"] for alarm in endpoint.alarms()] == [200, 180]


def test_another_instance_type_is_taken_although_the_variant_scales(endpoint: Endpoint):
    before = endpoint.target()
    assert endpoint.deploy(EndpointInstanceType="ml.c7i.xlarge")["type"] == "ml.c7i.xlarge"
    after = endpoint.target()
    assert before and after and after["ScalableTargetARN"] != before["ScalableTargetARN"]
    assert len(endpoint.alarms()) == 2


def test_who_ends_the_scaling_gets_the_number_of_instances_that_is_configured(endpoint: Endpoint):
    off = {"EndpointInstanceType": "ml.c7i.xlarge", "EndpointMaxInstanceCount": "1"}
    assert endpoint.deploy(**off) == {"instances": 1, "type": "ml.c7i.xlarge", "routing": "ALL_AT_ONCE"}
    assert endpoint.target() is None and endpoint.alarms() == []


def test_a_serverless_endpoint_is_made_anew_and_updated_without_guardrails(endpoint: Endpoint):
    refused = endpoint.deploy(status="FAILED", **SERVERLESS)["why"]
    assert "cannot be converted to a serverless endpoint" in refused
    endpoint.world.sagemaker.delete_endpoint(EndpointName="loop")
    for _ in range(2):
        assert endpoint.deploy(**SERVERLESS) == {"instances": None, "type": "serverless", "routing": ANY}
        assert endpoint.target() is None and "RegisterScaling" not in endpoint.visited
    assert "UpdateEndpoint" in endpoint.visited
