"""Endpoints: real servers behind a router, through updates, rollbacks and crashes."""

import time

import pytest
from botocore.exceptions import ClientError

from tests.makers.sagemaker import HALF, Load, deployment, until


def test_endpoint_answers_and_reports_its_models_errors(world):
    world.model("first", "one")
    world.sagemaker.create_endpoint(EndpointName="plain", EndpointConfigName="first")
    with pytest.raises(ClientError, match="Cannot update in-progress endpoint"):
        world.sagemaker.update_endpoint(EndpointName="plain", EndpointConfigName="first")
    found = world.endpoint("plain")
    assert found["EndpointStatus"] == "InService", found
    assert found["ProductionVariants"][0]["CurrentInstanceCount"] == 2
    answers = [world.invoke("plain") for _ in range(6)]
    assert {answer["answer"] for answer in answers} == {"one"}
    assert len({answer["pid"] for answer in answers}) == 2, "requests go round both instances"
    assert answers[0]["length"] == 5 and answers[0]["type"] == "text/plain"
    with pytest.raises(ClientError) as caught:
        world.invoke("plain", b"status 429")
    error = caught.value.response
    assert error["Error"]["Code"] == "ModelError" and error["ResponseMetadata"]["HTTPStatusCode"] == 424
    assert error["OriginalStatusCode"] == 429 and error["OriginalMessage"] == '{"error": "asked for"}'
    with pytest.raises(ClientError, match="ValidationError.*Endpoint nobody of account 000000000000 not found"):
        world.invoke("nobody")
    with pytest.raises(ClientError, match="HTTP content length exceeded"):
        world.invoke("plain", b"x" * (6 * 1024 * 1024 + 1))
    metrics = world.cloudwatch.get_metric_statistics(
        Namespace="AWS/SageMaker",
        MetricName="Invocation4XXErrors",
        Period=3600,
        Statistics=["Sum", "SampleCount"],
        Dimensions=[{"Name": "EndpointName", "Value": "plain"}, {"Name": "VariantName", "Value": "AllTraffic"}],
        StartTime=time.time() - 3000,
        EndTime=time.time() + 600,
    )["Datapoints"]
    assert sum(point["Sum"] for point in metrics) == 1 and sum(point["SampleCount"] for point in metrics) == 7


def test_a_crashed_instance_is_started_again(world):
    world.model("crashing", "alive")
    world.sagemaker.create_endpoint(EndpointName="crashing", EndpointConfigName="crashing")
    world.endpoint("crashing", "InService")
    before = {world.invoke("crashing")["pid"] for _ in range(4)}
    with pytest.raises(ClientError, match="ModelError"):
        world.invoke("crashing", b"die")
    for _ in range(10):
        assert world.invoke("crashing")["answer"] == "alive"  # by the other instance
    after = until(lambda: {world.invoke("crashing")["pid"] for _ in range(4)}, lambda pids: len(pids) == 2, 20)
    assert len(before & after) == 1


def test_an_endpoint_whose_server_is_sick_fails_with_the_reason(world):
    world.model("sick", "never", SICK="1")
    world.sagemaker.create_endpoint_config(
        EndpointConfigName="sick-soon",
        ProductionVariants=[
            {"VariantName": "AllTraffic", "ModelName": "sick", "InitialInstanceCount": 1, "InstanceType": "ml.c5.large"}
        ],
    )
    world.sagemaker.create_endpoint(EndpointName="sick", EndpointConfigName="sick-soon")
    found = world.endpoint("sick")
    assert found["EndpointStatus"] == "Failed"
    assert "did not pass the ping health check" in found["FailureReason"]
    with pytest.raises(ClientError, match="ValidationError"):
        world.invoke("sick")
    world.sagemaker.delete_endpoint(EndpointName="sick")


@pytest.mark.parametrize(
    ("kind", "size"), [("CANARY", {"CanarySize": HALF}), ("LINEAR", {"LinearStepSize": HALF}), ("ALL_AT_ONCE", {})]
)
def test_an_update_under_load_fails_no_request(world, kind, size):
    name = f"update-{kind.lower().replace('_', '-')}"
    world.model(f"{name}-blue", "blue")
    world.model(f"{name}-green", "green")
    world.alarm(f"{name}-quiet", "OK")
    world.sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=f"{name}-blue")
    world.endpoint(name, "InService")
    with Load(world, name) as load:
        time.sleep(0.5)
        world.sagemaker.update_endpoint(
            EndpointName=name,
            EndpointConfigName=f"{name}-green",
            DeploymentConfig=deployment(kind, f"{name}-quiet", **size),
        )
        updating = world.sagemaker.describe_endpoint(EndpointName=name)
        assert updating["EndpointStatus"] == "Updating" and updating["EndpointConfigName"] == f"{name}-blue"
        assert updating["PendingDeploymentSummary"]["EndpointConfigName"] == f"{name}-green"
        found = world.endpoint(name)
        time.sleep(0.5)
    assert load.failures == []
    assert found["EndpointConfigName"] == f"{name}-green" and "PendingDeploymentSummary" not in found
    colours = [colour for _, colour in sorted(load.answers)]
    assert colours[0] == "blue" and colours[-1] == "green"
    if kind != "ALL_AT_ONCE":
        first = colours.index("green")
        last = len(colours) - 1 - colours[::-1].index("blue")
        share = colours[first:last].count("green") / max(1, last - first)
        assert 0.35 < share < 0.65, f"the canary got {share:.2f} of the traffic"
    world.sagemaker.delete_endpoint(EndpointName=name)


def test_an_alarm_in_the_baking_period_brings_the_old_fleet_back(world):
    world.model("back-blue", "blue")
    world.model("back-green", "green")
    world.alarm("back-alarm", "OK")
    world.sagemaker.create_endpoint(EndpointName="back", EndpointConfigName="back-blue")
    world.endpoint("back", "InService")
    with Load(world, "back") as load:
        world.sagemaker.update_endpoint(
            EndpointName="back",
            EndpointConfigName="back-green",
            DeploymentConfig=deployment("CANARY", "back-alarm", wait=60, CanarySize=HALF),
        )
        until(lambda: load.answers[-20:], lambda seen: any(colour == "green" for _, colour in seen), 30)
        world.alarm("back-alarm", "ALARM")
        found = world.endpoint("back")
        until(lambda: load.answers[-40:], lambda seen: {colour for _, colour in seen} == {"blue"}, 10)
    assert load.failures == []
    assert (found["EndpointStatus"], found["EndpointConfigName"]) == ("InService", "back-blue")
    assert "back-alarm" in found["FailureReason"]
    world.sagemaker.delete_endpoint(EndpointName="back")


def test_a_green_fleet_that_is_never_healthy_is_rolled_back(world):
    world.model("sound", "sound")
    world.model("unsound", "unsound", SICK="1")
    world.sagemaker.create_endpoint(EndpointName="health", EndpointConfigName="sound")
    world.endpoint("health", "InService")
    world.sagemaker.update_endpoint(EndpointName="health", EndpointConfigName="unsound")
    found = world.endpoint("health")
    assert (found["EndpointStatus"], found["EndpointConfigName"]) == ("InService", "sound")
    assert "ping health check" in found["FailureReason"]
    assert world.invoke("health")["answer"] == "sound"
    with pytest.raises(ClientError, match="less than or equal to 50%"):
        world.sagemaker.update_endpoint(
            EndpointName="health",
            EndpointConfigName="sound",
            DeploymentConfig=deployment("CANARY", CanarySize={"Type": "CAPACITY_PERCENT", "Value": 60}),
        )


def test_serverless_endpoint_is_bounded(world):
    world.model("serverless-model", "small")
    world.sagemaker.create_endpoint_config(
        EndpointConfigName="serverless",
        ProductionVariants=[
            {
                "VariantName": "AllTraffic",
                "ModelName": "serverless-model",
                "ServerlessConfig": {"MemorySizeInMB": 2048, "MaxConcurrency": 1},
            }
        ],
    )
    world.sagemaker.create_endpoint(EndpointName="serverless", EndpointConfigName="serverless")
    assert "CurrentServerlessConfig" in world.endpoint("serverless", "InService")["ProductionVariants"][0]
    with Load(world, "serverless", threads=6) as load:
        time.sleep(1)
    assert load.answers
    assert {error.response["Error"]["Code"] for error in load.failures} == {"ThrottlingException"}
    world.sagemaker.delete_endpoint(EndpointName="serverless")
