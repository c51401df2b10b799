"""The whole loop in the local AWS, IAM enforced, on tiny pictures: one story, told in the order of the tests."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from boto3.dynamodb.conditions import Key

from local.emulator import Emulator
from local.stack import Stack
from tests.makers import template
from tests.makers.coloured import coloured
from tests.makers.waiting import wait_for
from tools import delete_stack, runs
from tools.stack import ToolError

PARAMETERS = {
    "PretrainedWeights": "none",
    "Unfreeze": "all",
    "ImageSize": "32",
    "MinPicturesPerClass": "8",
    "MinNewPictures": "1",
    "QuietPeriodSeconds": "4",
    "TuningJobs": "2",
    "EpochsMin": "4",
    "EpochsMax": "8",
    "BatchSizes": "8,16",
    "LearningRateMin": "0.001",
    "LearningRateMax": "0.003",
    "DriftMinPictures": "50",
    "GateMinTestPictures": "4",  # there is only a handful
    "GateMaxDrop": "1",  # which excludes nothing
    "EndpointInstanceCount": "1",
    "EndpointMaxInstanceCount": "2",
    "EndpointTargetInvocations": "100000",  # more than these tests send: what scales is what a test scales
}


class Loop:
    """The deployed stack, as its users see it."""

    def __init__(self, aws: Emulator, stack: Stack, outputs: dict[str, str]) -> None:
        self.aws, self.stack, self.outputs = aws, stack, outputs
        session: Any = boto3
        self.client: Callable[[str], Any] = session.client
        self.s3, self.sfn = self.client("s3"), self.client("stepfunctions")
        self.bucket, self.machine = outputs["DataBucketName"], outputs["RetrainStateMachineArn"]
        self.predictions = session.resource("dynamodb").Table(outputs["PredictionsTableName"])
        self.state = session.resource("dynamodb").Table(outputs["LoopStateTableName"])

    def label(self, name: str, count: int, seed: int) -> None:
        for number, data in enumerate(coloured(name, count, seed)):
            self.s3.put_object(Bucket=self.bucket, Key=f"labelled/{name}/{seed}-{number}.jpg", Body=data)

    def drop(self, key: str, data: bytes) -> None:
        self.s3.put_object(Bucket=self.bucket, Key=f"inbox/{key}", Body=data)

    def row(self, key: str) -> dict[str, Any]:
        wanted = {"image": f"{self.bucket}/inbox/{key}", "version": "current"}
        return self.predictions.get_item(Key=wanted).get("Item", {})

    def executions(self) -> list[dict[str, Any]]:
        return self.sfn.list_executions(stateMachineArn=self.machine)["executions"]

    def ended(self, count: int, seconds: float = 240) -> dict[str, Any]:
        """The newest of `count` executions, when it has ended."""
        wait_for(lambda: len(self.executions()) >= count and self.executions()[0]["status"] != "RUNNING", seconds)
        assert len(self.executions()) == count
        return self.sfn.describe_execution(executionArn=self.executions()[0]["executionArn"])

    def champion(self) -> dict[str, Any] | None:
        return self.state.get_item(Key={"pk": "champion", "sk": "champion"}, ConsistentRead=True).get("Item")

    def scaling(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The scalable target of the endpoint and its policy."""
        client = self.client("application-autoscaling")
        (target,) = client.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
        (policy,) = client.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
        return target, policy

    def instances(self) -> int:
        """How many the endpoint has, once it is not being changed."""
        client = self.client("sagemaker")
        wait_for(lambda: client.describe_endpoint(EndpointName="houndloop")["EndpointStatus"] == "InService", 60)
        (variant,) = client.describe_endpoint(EndpointName="houndloop")["ProductionVariants"]
        assert variant["CurrentInstanceCount"] == variant["DesiredInstanceCount"]
        return variant["CurrentInstanceCount"]

    def item(self, pk: str, sk: str) -> dict[str, Any]:
        return self.state.get_item(Key={"pk": pk, "sk": sk}, ConsistentRead=True).get("Item", {})

    def deployments(self) -> list[dict[str, Any]]:
        """Newest first."""
        newest = {"KeyConditionExpression": Key("pk").eq("deployment"), "ScanIndexForward": False}
        return self.state.query(**newest, ConsistentRead=True)["Items"]

    def locked(self) -> bool:
        return bool(self.item("lock", "lock"))

    def log(self) -> str:
        """What the functions logged."""
        pages = (
            self.client("logs")
            .get_paginator("filter_log_events")
            .paginate(logGroupName="/houndloop/houndloop/functions")
        )
        return "\n".join(event["message"] for page in pages for event in page["events"])


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory, build: Path) -> Iterator[Loop]:
    with pytest.MonkeyPatch.context() as patch, Emulator(state=tmp_path_factory.mktemp("aws"), auth=True) as aws:
        for name, value in aws.environment().items():
            patch.setenv(name, value)
        stack = Stack(aws)
        stack.build_dir = build
        yield Loop(aws, stack, stack.deploy(PARAMETERS))


def test_every_substitution_is_resolved_in_what_was_deployed(loop: Loop):
    definition = loop.sfn.describe_state_machine(stateMachineArn=loop.machine)["definition"]
    assert "${" not in definition
    for function in loop.client("lambda").list_functions()["Functions"]:
        assert "${" not in json.dumps(function["Environment"]["Variables"])


def test_the_zips_are_small(loop: Loop):
    client = loop.client("lambda")
    functions = {f["FunctionName"]: f["CodeSize"] for f in client.list_functions()["Functions"]}
    layers = {}
    for layer in client.list_layers()["Layers"]:
        version = layer["LatestMatchingVersion"]["Version"]
        found = client.get_layer_version(LayerName=layer["LayerName"], VersionNumber=version)
        layers[layer["LayerName"]] = found["Content"]["CodeSize"]
    for name, size in (functions | layers).items():
        print(f"{size / 1e6:6.2f} MB  {name}")
    assert len(functions) == len(template.resources("AWS::Serverless::Function")) and max(functions.values()) < 0.1e6
    assert layers.keys() == {"Powertools", "Preprocessing", "TrainingSource", "ServingSource"}
    assert all(0 < size < 10e6 for size in layers.values())


def test_pictures_wait_for_the_first_model_and_what_is_none_is_rejected(loop: Loop):
    keys = ["a b+c%20.jpg", "ünïcödé 🐕.jpg", "plain.jpg"]
    for key, data in zip(keys, coloured("red", 3, seed=1), strict=True):
        loop.drop(key, data)
    loop.drop("notes.txt", b"hello")
    loop.drop("cut.jpg", next(coloured("red", 1, seed=2))[:700])
    loop.drop("empty.jpg", b"")
    wait_for(lambda: all(loop.row(k) for k in [*keys, "notes.txt", "cut.jpg", "empty.jpg"]), 60)
    assert [loop.row(key)["status"] for key in keys] == ["WAITING"] * 3
    for key, reason in {"notes.txt": "not an image", "cut.jpg": "truncated", "empty.jpg": "empty"}.items():
        assert loop.row(key)["status"] == "REJECTED" and reason in loop.row(key)["reason"]


def test_too_few_pictures_start_nothing_and_the_log_says_how_many_are_missing(loop: Loop):
    loop.label("red", 5, seed=1)
    wait_for(lambda: "red has 5 of the 8 pictures a class needs: 3 missing" in loop.log(), 60)
    assert loop.executions() == []
    decision = loop.item("decision", "last")
    assert decision["decision"] == "NO_RUN" and "3 missing" in decision["why"]


def test_two_bursts_of_labels_make_one_run_and_its_model_goes_live(loop: Loop):
    loop.label("red", 12, seed=2)
    loop.label("green", 12, seed=2)
    time.sleep(2)  # within the quiet period
    loop.label("green", 5, seed=3)
    run = loop.ended(1)
    assert run["status"] == "SUCCEEDED", run.get("cause")
    assert json.loads(run["output"])["outcome"] == "PROMOTED"
    assert json.loads(loop.champion()["classes"]) == ["green", "red"] and not loop.locked()


def test_the_pictures_that_waited_are_classified(loop: Loop):
    keys = ["a b+c%20.jpg", "ünïcödé 🐕.jpg", "plain.jpg"]
    wait_for(lambda: all(loop.row(key)["status"] == "CLASSIFIED" for key in keys), 60)
    for key in keys:
        row = loop.row(key)
        assert row["model_version"] == loop.champion()["model_version"] and row["deployment"] == 1
        assert {c["class"] for c in row["classes"]} == {"red", "green"}


def test_the_run_leaves_its_documents(loop: Loop):
    prefix = f"runs/{loop.champion()['model_version']}"
    bucket = loop.outputs["ArtifactBucketName"]
    read = lambda name: loop.s3.get_object(Bucket=bucket, Key=f"{prefix}/{name}")["Body"].read()  # noqa: E731
    assert json.loads(read("verdict.json"))["promote"] and json.loads(read("evaluation/evaluation.json"))["challenger"]
    assert b"promoted" in read("verdict.html")
    rules = {rule["rule"]: rule["status"] for rule in json.loads(read("findings.json"))["rules"]}
    assert {"VanishingGradient", "Overfit", "LowGPUUtilization"} <= rules.keys() and "Error" not in rules.values()
    assert b"<html" in read("report.html").lower()
    assert b"http://" not in read("report.html")[:2000]


def test_the_champion_is_in_the_registry_with_its_figures_and_its_lineage(loop: Loop):
    champion = loop.champion()
    package = loop.client("sagemaker").describe_model_package(ModelPackageName=champion["model_package"])
    prefix = f"s3://{loop.outputs['ArtifactBucketName']}/runs/{champion['model_version']}"
    assert package["ModelApprovalStatus"] == "Approved"
    metrics = package["ModelMetrics"]["ModelQuality"]["Statistics"]["S3Uri"]
    properties = package["CustomerMetadataProperties"]
    assert metrics == properties["evaluation"] == f"{prefix}/evaluation/evaluation.json"
    assert properties["verdict"] == f"{prefix}/verdict.json" and properties["dataset"] == champion["dataset_hash"]
    assert {"datasetUri", "code", "tuningJob", "trainingJob", "accuracy", "latencyMs"} <= properties.keys()


def test_the_model_is_served_in_the_precision_that_the_evaluation_chose(loop: Loop):
    version = loop.champion()["model_version"]
    key = f"runs/{version}/evaluation/model_card.json"
    card = json.loads(loop.s3.get_object(Bucket=loop.outputs["ArtifactBucketName"], Key=key)["Body"].read())
    serving = card["serving"]
    assert {"f32", "int8"} <= serving["measured"].keys() and serving["reference"] == "torch"
    assert card["model_version"] == version and loop.champion()["precision"] == serving["chosen"]
    model = loop.client("sagemaker").describe_model(ModelName=f"houndloop-{version}")
    assert model["PrimaryContainer"]["Environment"]["PRECISION"] == serving["chosen"]


def test_the_endpoint_scales_once_it_is_in_service(loop: Loop):
    target, policy = loop.scaling()
    assert target["ResourceId"] == policy["ResourceId"] == "endpoint/houndloop/variant/AllTraffic"
    assert (target["MinCapacity"], target["MaxCapacity"]) == (1, 2) and len(policy["Alarms"]) == 2
    assert policy["TargetTrackingScalingPolicyConfiguration"]["TargetValue"] == 100_000
    assert loop.instances() == 1
    two = {"VariantName": "AllTraffic", "DesiredInstanceCount": 2}  # as the service does when an alarm asks for it
    sagemaker = loop.client("sagemaker")
    sagemaker.update_endpoint_weights_and_capacities(EndpointName="houndloop", DesiredWeightsAndCapacities=[two])
    assert loop.instances() == 2


def test_a_new_class_is_learnt_and_no_request_fails_meanwhile(loop: Loop):
    stop, sent, failures = threading.Event(), [], []
    runtime = loop.client("sagemaker-runtime")

    def ask() -> None:
        data = next(coloured("red", 1, seed=9))
        while not stop.wait(0.1):
            try:
                runtime.invoke_endpoint(EndpointName="houndloop", ContentType="image/jpeg", Body=data)
                sent.append(1)
            except Exception as error:
                failures.append(repr(error))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        loop.label("blue", 17, seed=4)
        run = loop.ended(2)
    finally:
        stop.set()
        asking.join()
    assert run["status"] == "SUCCEEDED", run.get("cause")
    assert json.loads(loop.champion()["classes"]) == ["blue", "green", "red"], run["output"]
    assert loop.champion()["deployment"] == 2
    assert not failures and len(sent) > 50
    config = loop.client("sagemaker").describe_endpoint(EndpointName="houndloop")["EndpointConfigName"]
    assert config == loop.champion()["endpoint_config"]
    loop.drop("blue.jpg", next(coloured("blue", 1, seed=5)))
    wait_for(lambda: loop.row("blue.jpg").get("status") == "CLASSIFIED", 60)
    assert loop.row("blue.jpg")["label"] == "blue"


def test_the_update_kept_the_scaling_and_what_the_endpoint_had_scaled_to(loop: Loop):
    """With two instances there was a canary, whatever number was configured."""
    assert loop.instances() == 2
    target, policy = loop.scaling()
    assert (
        target["CreationTime"]
        < loop.sfn.describe_execution(executionArn=loop.executions()[0]["executionArn"])["startDate"]
    ), "it was kept, not made anew"
    assert policy["PolicyName"] == "houndloop" and len(policy["Alarms"]) == 2
    last = loop.client("sagemaker").describe_endpoint(EndpointName="houndloop")["LastDeploymentConfig"]
    assert last["BlueGreenUpdatePolicy"]["TrafficRoutingConfiguration"]["Type"] == "CANARY"


def test_it_started_from_what_the_first_run_left(loop: Loop):
    """Its prepared pictures, and its model."""
    sagemaker, run = loop.client("sagemaker"), loop.champion()["model_version"]
    first = loop.state.get_item(Key={"pk": "deployment", "sk": "000001"})["Item"]
    prepare = sagemaker.describe_processing_job(ProcessingJobName=f"houndloop-{run}-prepare-0")
    inputs = {source["InputName"]: source["S3Input"]["S3Uri"] for source in prepare["ProcessingInputs"]}
    assert inputs["previous"].endswith(f"/runs/{first['model_version']}/prepared/")
    training = sagemaker.describe_training_job(TrainingJobName=f"houndloop-{run}-train-0")
    channels = {channel["ChannelName"]: channel["DataSource"] for channel in training["InputDataConfig"]}
    assert channels["champion"]["S3DataSource"]["S3Uri"] == first["artifact"]
    last = loop.state.get_item(Key={"pk": "training", "sk": "last"})["Item"]
    assert last["prepared"].endswith(f"/runs/{run}/prepared")


def test_the_same_dataset_is_not_trained_again(loop: Loop):
    loop.sfn.start_execution(stateMachineArn=loop.machine, name="again", input="{}")
    run = loop.ended(3)
    assert json.loads(run["output"])["outcome"] == "NOTHING_NEW" and not loop.locked()


def test_a_deployment_that_trips_an_alarm_is_rolled_back_and_recorded_as_that(loop: Loop):
    before = loop.champion()
    sagemaker, cloudwatch = loop.client("sagemaker"), loop.client("cloudwatch")
    started = loop.sfn.start_execution(stateMachineArn=loop.machine, name="worse", input='{"force": true}')
    status = lambda: sagemaker.describe_endpoint(EndpointName="houndloop")["EndpointStatus"]  # noqa: E731
    wait_for(lambda: status() == "Updating", 240)
    cloudwatch.put_metric_data(
        Namespace="AWS/SageMaker",
        MetricData=[
            {
                "MetricName": "Invocation5XXErrors",
                "Dimensions": [
                    {"Name": "EndpointName", "Value": "houndloop"},
                    {"Name": "VariantName", "Value": "AllTraffic"},
                ],
                "Value": 7,
            }
        ],
    )
    describe = lambda: loop.sfn.describe_execution(executionArn=started["executionArn"])  # noqa: E731
    wait_for(lambda: describe()["status"] != "RUNNING", 120)
    assert describe()["status"] == "FAILED" and describe()["error"] == "ROLLED_BACK"
    assert loop.champion() == before and not loop.locked()
    live = sagemaker.describe_endpoint(EndpointName="houndloop")
    assert (live["EndpointStatus"], live["EndpointConfigName"]) == ("InService", before["endpoint_config"])
    deployment = loop.state.get_item(Key={"pk": "deployment", "sk": "000003"})["Item"]
    assert deployment["outcome"] == "ROLLED_BACK" and deployment["verdict"]
    loop.drop("after.jpg", next(coloured("green", 1, seed=6)))
    wait_for(lambda: loop.row("after.jpg").get("status") == "CLASSIFIED", 60)
    assert loop.row("after.jpg")["deployment"] == 2
    assert loop.scaling()[0]["MaxCapacity"] == loop.instances() == 2


def test_a_second_run_cannot_start_beside_the_first_and_an_aborted_one_leaves_nothing(loop: Loop):
    started = loop.sfn.start_execution(stateMachineArn=loop.machine, name="forced", input='{"force": true}')
    wait_for(loop.locked, 30)
    beside = loop.sfn.start_execution(stateMachineArn=loop.machine, name="beside", input='{"force": true}')
    wait_for(lambda: loop.sfn.describe_execution(executionArn=beside["executionArn"])["status"] == "FAILED", 60)
    assert "another run holds the lock" in loop.sfn.describe_execution(executionArn=beside["executionArn"])["cause"]
    assert loop.locked(), "the run that was refused must not free the other's lock"
    sagemaker = loop.client("sagemaker")
    running = lambda: sagemaker.list_training_jobs(StatusEquals="InProgress")["TrainingJobSummaries"]  # noqa: E731
    wait_for(running, 120)
    loop.sfn.stop_execution(executionArn=started["executionArn"])
    wait_for(lambda: not loop.locked(), 60)
    wait_for(lambda: not running(), 60)
    assert loop.champion()["deployment"] == 2


def test_the_lock_of_a_dead_run_is_taken_over(loop: Loop):
    """By the next run, and by labels that wait."""
    (dead,) = (one["executionArn"] for one in loop.executions() if one["name"] == "forced")
    lock = {"pk": "lock", "sk": "lock", "holder": dead, "run": "260101000000", "since": "2026-01-01T00:00:00.000Z"}
    loop.state.put_item(Item=lock)
    started = loop.sfn.start_execution(stateMachineArn=loop.machine, name="after-a-dead-one", input="{}")
    describe = lambda: loop.sfn.describe_execution(executionArn=started["executionArn"])  # noqa: E731
    wait_for(lambda: describe()["status"] != "RUNNING", 60)
    assert json.loads(describe()["output"])["outcome"] == "NOTHING_NEW" and not loop.locked()

    loop.state.put_item(Item=lock)
    loop.label("yellow", 1, seed=7)
    wait_for(lambda: not loop.locked(), 60)
    wait_for(lambda: "is cleaned up after" in loop.item("decision", "last").get("why", ""), 10)


def test_drift_is_measured(loop: Loop):
    for number, data in enumerate(coloured("red", 60, seed=8)):
        loop.drop(f"drift-{number}.jpg", data)
    wait_for(lambda: all(loop.row(f"drift-{number}.jpg").get("status") == "CLASSIFIED" for number in range(60)), 60)
    client = loop.client("lambda")
    (name,) = (f["FunctionName"] for f in client.list_functions()["Functions"] if "WatchDrift" in f["FunctionName"])
    answer = json.loads(client.invoke(FunctionName=name, Payload=b"{}")["Payload"].read())
    document = loop.item("drift", "last")
    assert answer["sentence"] == document["sentence"] and "the class mix has" in document["sentence"], answer
    assert document["pictures"] >= 60 and document["deployment"] == 2


def test_one_command_goes_back_to_an_earlier_model(loop: Loop, capsys: pytest.CaptureFixture[str]):
    *_, first = before = loop.deployments()
    wait_for(lambda: not loop.locked(), 60)
    assert runs.back(runs.Loop(loop.outputs), None, "to see whether it goes", wait=True) == 0
    assert f"PROMOTED: back to the model {first['model_version']} of deployment 1: to see" in capsys.readouterr().out
    champion = loop.champion()
    number = before[0]["deployment"] + 1
    assert champion and (champion["model_version"], champion["deployment"]) == (first["model_version"], number)
    live = loop.client("sagemaker").describe_endpoint(EndpointName="houndloop")
    assert live["EndpointConfigName"] == champion["endpoint_config"] != first["endpoint_config"]
    loop.drop("back.jpg", next(coloured("green", 1, seed=8)))
    wait_for(lambda: loop.row("back.jpg").get("status") == "CLASSIFIED", 60)
    assert loop.row("back.jpg")["deployment"] == number


def test_a_run_killed_in_the_middle_of_a_deployment_leaves_the_champion_serving(loop: Loop):
    """The endpoint ends its update, and then goes back."""
    before, sagemaker = loop.champion(), loop.client("sagemaker")
    assert before
    started = loop.sfn.start_execution(stateMachineArn=loop.machine, name="killed", input='{"deploy": 2}')
    status = lambda: sagemaker.describe_endpoint(EndpointName="houndloop")["EndpointStatus"]  # noqa: E731
    wait_for(lambda: status() == "Updating", 60)
    loop.sfn.stop_execution(executionArn=started["executionArn"], cause="the test killed it")
    wait_for(lambda: loop.executions()[0]["name"].startswith("recover-"), 60)
    wait_for(lambda: not loop.locked(), 180)
    (recovery,) = [e for e in loop.executions() if e["name"].startswith("recover-")]
    ended = loop.sfn.describe_execution(executionArn=recovery["executionArn"])
    assert ended["status"] == "SUCCEEDED", ended.get("cause")
    after, live = loop.champion(), sagemaker.describe_endpoint(EndpointName="houndloop")
    assert after and after["model_version"] == before["model_version"]
    assert (live["EndpointStatus"], live["EndpointConfigName"]) == ("InService", after["endpoint_config"])
    killed = loop.deployments()[1]
    assert (
        killed["deployment"] == before["deployment"] + 1
        and killed["outcome"] == "ABORTED"
        and "the test killed it" in killed["message"]
    )


def test_only_the_last_models_are_kept(loop: Loop):
    names = {model["ModelName"] for model in loop.client("sagemaker").list_models(MaxResults=100)["Models"]}
    whole = [d["endpoint_config"] for d in loop.deployments() if d["outcome"] in ("PROMOTED", "ROLLED_BACK")]
    assert names == set(whole[:3]) and len(whole) > 3


def test_the_stack_is_deleted_with_all_that_it_made(loop: Loop):
    assert delete_stack.delete("houndloop", ask=lambda question: "no") == 1
    assert delete_stack.delete("houndloop", ask=None) == 0
    sagemaker = loop.client("sagemaker")
    assert sagemaker.list_endpoints()["Endpoints"] == [] and sagemaker.list_models()["Models"] == []
    targets = loop.client("application-autoscaling").describe_scalable_targets(ServiceNamespace="sagemaker")
    assert targets["ScalableTargets"] == []
    left = {bucket["Name"] for bucket in loop.s3.list_buckets()["Buckets"]}
    assert not left & {loop.outputs["DataBucketName"], loop.outputs["ArtifactBucketName"]}
    with pytest.raises(ToolError, match="There is no stack houndloop"):
        delete_stack.delete("houndloop", ask=None)
