"""The workflow's own decisions, as the local Step Functions executes them: what it does about what a training found.

The definition is the deployed one; only its jobs and functions are replaced, each by a Pass state that puts out what it
would have been called with, and by an answer. Tables, topic and bucket are real.
"""

import itertools
import json
import re
from typing import Any

import boto3
import pytest

from local.emulator import Emulator
from tests.makers import template
from tests.makers.waiting import wait_for

DEFINITION = (template.ROOT / "statemachine" / "retrain.asl.json").read_text()
ARTIFACTS = "houndloop-artifacts"
REPLACED = ("lambda:", "sagemaker:", "codebuild:", "aws-sdk:sagemaker:")
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
    "Judge": "{'Payload': {'promote': true, 'sentence': 'better', 'accuracy': 0.9, 'preprocess': '{}'}}",
    "Register": "{'ModelPackageArn': 'arn'}",
    "FindEndpoint": "{'Endpoints': []}",
    "DescribeEndpoint": "{'EndpointStatus': 'InService', 'EndpointConfigName': 'loop-' & $runId}",
    "Replay": "{'Payload': {'next': null}}",
}

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


def with_answers(answers: dict[str, str], substitutions: dict[str, str]) -> str:
    definition = json.loads(re.sub(r"\$\{(\w+)\}", lambda match: substitutions.get(match[1], match[1]), DEFINITION))
    for name, state in definition["States"].items():
        if state["Type"] != "Task" or name not in answers and not called(state).startswith(REPLACED):
            continue
        text = json.dumps({"Assign": state.get("Assign", {}), "Output": {"arguments": state["Arguments"]}})
        answer = json.dumps(f"({answers.get(name, '{}')})")[1:-1]
        text = text.replace("$states.result", answer).replace("$states.context.State.RetryCount", "0")
        definition["States"][name] = {"Type": "Pass", "Next": state["Next"]} | json.loads(text)
    return json.dumps(definition)


def called(state: dict[str, Any]) -> str:
    return state["Resource"].removeprefix("arn:aws:states:::")


class Workflow:
    """Runs of the workflow over one table."""

    numbers = itertools.count()

    def __init__(self, aws: Emulator) -> None:
        session: Any = boto3
        keys = {"region_name": "us-east-1", "aws_access_key_id": "test", "aws_secret_access_key": "test"}
        client = lambda service: session.client(service, endpoint_url=aws.endpoint_url, **keys)  # noqa: E731
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
        allow = {"Effect": "Allow", "Action": ["dynamodb:*", "s3:*", "sns:*"], "Resource": "*"}
        trust = {"Effect": "Allow", "Principal": {"Service": "states.amazonaws.com"}, "Action": "sts:AssumeRole"}
        document = lambda statement: json.dumps({"Version": "2012-10-17", "Statement": [statement]})  # noqa: E731
        self.role = iam.create_role(RoleName=self.name, AssumeRolePolicyDocument=document(trust))["Role"]["Arn"]
        iam.put_role_policy(RoleName=self.name, PolicyName="all", PolicyDocument=document(allow))

    def run(self, answers: dict[str, str], **substitutions: str) -> dict[str, Any]:
        """An execution to its end: states with their outputs, in order, and how the run was recorded."""
        values = {
            "Name": "loop", "LoopStateTable": self.name, "Topic": self.topic, "ArtifactBucket": ARTIFACTS,
            "ImageSize": "32", "Unfreeze": "all", "Seed": "0", "PollSeconds": "0", "BakingSeconds": "1",
            "EndpointInstanceCount": "2", "ProbeSeconds": "1", "JobMaxSeconds": "60", "TuningJobs": "2",
            "TuningParallelJobs": "1", "BatchSizes": "16,32", "UseSpotTraining": "false", "ManagedDebugger": "false",
            "TrainingInstanceType": "ml.c5.xlarge", "FollowInstanceTypes": "", "EndpointMode": "real-time",
        } | substitutions  # fmt: skip
        machine = self.states.create_state_machine(
            name=f"{self.name}-{next(self.numbers)}",
            definition=with_answers(ANSWERS | answers, values),
            roleArn=self.role,
        )["stateMachineArn"]
        execution = self.states.start_execution(stateMachineArn=machine, input="{}")["executionArn"]

        def ended() -> dict[str, Any] | None:
            described = self.states.describe_execution(executionArn=execution)
            return described if described["status"] != "RUNNING" else None

        described = wait_for(ended, 60)
        assert described["status"] == "SUCCEEDED", described
        pages = self.states.get_paginator("get_execution_history").paginate(executionArn=execution)
        exited = [e["stateExitedEventDetails"] for page in pages for e in page["events"] if "Exited" in e["type"]]
        self.output = json.loads(described["output"])
        self.visited = [event["name"] for event in exited]
        self.outputs = {event["name"]: json.loads(event["output"]) for event in exited}
        self.requests = [json.loads(e["output"])["arguments"] for e in exited if e["name"] == "Train"]
        self.record = self.item("run", self.output["run"])
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


@pytest.mark.parametrize("rule", ["VanishingGradient", "ExplodingTensor", "LossNotDecreasing"])
def test_a_training_that_ended_early_is_not_evaluated(workflow: Workflow, rule: str):
    reason = f"{rule} in step 12: train loss nan"
    output = workflow.run(found(findings(rule, blocking=True, reason=reason)))
    assert output["outcome"] == "REJECTED"
    assert output["why"] == f"blocking findings: {rule}; ended early: {reason}"
    assert "BlockPromotion" in workflow.visited and not {"Evaluate", "Register"} & set(workflow.visited)
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
