"""Endpoints: real servers, made, updated, rolled back, scaled and deleted, with requests that go on all the time."""

import os
import signal
import textwrap
import threading
import time

import boto3
import pytest
from botocore.exceptions import ClientError

from local.emulator import Emulator
from tests.makers.sagemaker import HALF, SERVER, Load, World, alive, deployment, until

IN_PROGRESS = "ValidationException.*Cannot update in-progress endpoint"


def config(world, name: str, *variants: tuple[str, str, int, float]) -> str:
    """An endpoint configuration of (variant, model, instances, weight)."""
    world.sagemaker.create_endpoint_config(
        EndpointConfigName=name,
        ProductionVariants=[
            {
                "VariantName": variant,
                "ModelName": model,
                "InitialInstanceCount": count,
                "InitialVariantWeight": weight,
                "InstanceType": "ml.c5.large",
            }
            for variant, model, count, weight in variants
        ],
    )
    return name


def made(world, name: str, config_name: str) -> dict:
    world.sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=config_name)
    found = world.endpoint(name)
    assert found["EndpointStatus"] == "InService", found
    return found


def scale(world, name: str, **change) -> None:
    world.sagemaker.update_endpoint_weights_and_capacities(
        EndpointName=name, DesiredWeightsAndCapacities=[{"VariantName": "AllTraffic"} | change]
    )


def gone(world, name: str) -> bool:
    return name not in [found["EndpointName"] for found in world.sagemaker.list_endpoints(MaxResults=100)["Endpoints"]]


def test_what_a_poller_sees_of_a_creation(world):
    world.model("first", "one")
    world.sagemaker.create_endpoint(EndpointName="plain", EndpointConfigName="first")
    found = world.sagemaker.describe_endpoint(EndpointName="plain")
    assert found["EndpointStatus"] == "Creating" and found["EndpointConfigName"] == "first"
    pending = found["PendingDeploymentSummary"]
    (variant,) = pending["ProductionVariants"]
    (stage,) = variant["VariantStatus"]
    assert pending["EndpointConfigName"] == "first" and pending["StartTime"]
    assert (stage["Status"], stage["StatusMessage"]) == ("Creating", "Launching 2 instance(s).") and stage["StartTime"]
    assert (variant["CurrentInstanceCount"], variant["DesiredInstanceCount"]) == (0, 2)
    assert variant["InstanceType"] == "ml.c5.large"
    for change in (
        lambda: world.sagemaker.update_endpoint(EndpointName="plain", EndpointConfigName="first"),
        lambda: world.sagemaker.delete_endpoint(EndpointName="plain"),
        lambda: scale(world, "plain", DesiredInstanceCount=1),
    ):
        with pytest.raises(ClientError, match=IN_PROGRESS):
            change()
    with pytest.raises(ClientError, match="Cannot create already existing endpoint"):
        world.sagemaker.create_endpoint(EndpointName="plain", EndpointConfigName="first")
    found = world.endpoint("plain")
    assert found["EndpointStatus"] == "InService" and "PendingDeploymentSummary" not in found, found
    (variant,) = found["ProductionVariants"]
    assert (variant["CurrentInstanceCount"], variant["DesiredInstanceCount"]) == (2, 2)
    assert (variant["CurrentWeight"], variant["DesiredWeight"]) == (1.0, 1.0)
    assert variant["DeployedImages"][0]["SpecifiedImage"] == "local/server:1" and "VariantStatus" not in variant
    world.sagemaker.delete_endpoint(EndpointName="plain")
    until(lambda: gone(world, "plain"), bool, 20)
    with pytest.raises(ClientError, match="ValidationError.*not found"):
        world.invoke("plain")


def test_requests_of_a_dead_instance_go_to_a_healthy_one(world):
    world.model("crashing", "alive")
    made(world, "crashing", "crashing")
    before = {world.invoke("crashing")["pid"] for _ in range(4)}
    with Load(world, "crashing", body=b"sleep 0.1") as load:  # some requests are always under way
        time.sleep(0.5)
        os.kill(min(before), signal.SIGKILL)
        after = until(lambda: {world.invoke("crashing")["pid"] for _ in range(4)}, lambda pids: len(pids) == 2, 20)
    assert load.failures == [] and len(load.answers) > 10
    assert before & after == {max(before)}, "the dead one was replaced"
    world.sagemaker.delete_endpoint(EndpointName="crashing")


def test_an_endpoint_whose_server_is_sick_fails_with_the_reason(world):
    world.model("sick", "never", SICK="1")
    config(world, "sick-soon", ("AllTraffic", "sick", 1, 1.0))
    world.sagemaker.create_endpoint(EndpointName="sick", EndpointConfigName="sick-soon")
    found = world.endpoint("sick")
    assert found["EndpointStatus"] == "Failed" and "PendingDeploymentSummary" not in found
    assert "production variant AllTraffic did not pass the ping health check" in found["FailureReason"]
    assert "serving never" in found["FailureReason"], "the last lines of its log"
    with pytest.raises(ClientError, match="ValidationError"):
        world.invoke("sick")
    with pytest.raises(ClientError, match="in status Failed"):
        world.sagemaker.update_endpoint(EndpointName="sick", EndpointConfigName="sick-soon")
    with pytest.raises(ClientError, match="in status Failed"):
        scale(world, "sick", DesiredInstanceCount=2)
    world.sagemaker.delete_endpoint(EndpointName="sick")
    until(lambda: gone(world, "sick"), bool, 20)


@pytest.mark.parametrize(
    ("kind", "size"), [("CANARY", {"CanarySize": HALF}), ("LINEAR", {"LinearStepSize": HALF}), ("ALL_AT_ONCE", {})]
)
def test_an_update_under_load_fails_no_request(world, kind, size):
    name = f"update-{kind.lower().replace('_', '-')}"
    world.model(f"{name}-blue", "blue")
    world.model(f"{name}-green", "green")
    world.alarm(f"{name}-quiet", "OK")
    made(world, name, f"{name}-blue")
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
        with pytest.raises(ClientError, match=IN_PROGRESS):
            world.sagemaker.delete_endpoint(EndpointName=name)
        found = world.endpoint(name)
        time.sleep(0.5)
    assert load.failures == []
    assert found["EndpointConfigName"] == f"{name}-green" and "PendingDeploymentSummary" not in found
    assert found["LastDeploymentConfig"] == deployment(kind, f"{name}-quiet", **size)
    colours = [colour for _, colour in sorted(load.answers)]
    assert colours[0] == "blue" and colours[-1] == "green"
    if kind != "ALL_AT_ONCE":
        first = colours.index("green")
        last = len(colours) - 1 - colours[::-1].index("blue")
        share = colours[first:last].count("green") / max(1, last - first)
        assert 0.35 < share < 0.65, f"the canary got {share:.2f} of the traffic"
    world.sagemaker.delete_endpoint(EndpointName=name)


def test_what_a_poller_sees_of_a_canary(world):
    world.model("stages-blue", "blue")
    world.model("stages-green", "green")
    world.alarm("stages-quiet", "OK")
    made(world, "stages", "stages-blue")
    world.sagemaker.update_endpoint(
        EndpointName="stages",
        EndpointConfigName="stages-green",
        DeploymentConfig=deployment("CANARY", "stages-quiet", wait=1, CanarySize=HALF),
    )
    seen = []

    def look():
        found = world.sagemaker.describe_endpoint(EndpointName="stages")
        for variant in found.get("PendingDeploymentSummary", {}).get("ProductionVariants", []):
            (stage,) = variant["VariantStatus"]
            entry = (stage["Status"], stage["StatusMessage"], variant["CurrentInstanceCount"])
            if entry not in seen:
                seen.append(entry)
        return found

    until(look, lambda found: found["EndpointStatus"] == "InService", 30)
    baking = "Baking for 1 seconds ({}) with traffic enabled on {} capacity of {} instance(s)."
    stages = [entry for entry in seen if entry[0] != "ActivatingTraffic"]  # which is over at once
    assert stages == [
        ("Creating", "Launching 2 instance(s).", 0),
        ("Baking", baking.format("WaitIntervalInSeconds", "canary", 1), 1),
        ("Baking", baking.format("TerminationWaitInSeconds", "full", 2), 2),
    ]
    # The next update may do as this one did.
    world.sagemaker.update_endpoint(
        EndpointName="stages", EndpointConfigName="stages-blue", RetainDeploymentConfig=True
    )
    found = world.endpoint("stages")
    assert found["LastDeploymentConfig"] == deployment("CANARY", "stages-quiet", wait=1, CanarySize=HALF)
    world.sagemaker.update_endpoint(EndpointName="stages", EndpointConfigName="stages-green")
    routing = world.endpoint("stages")["LastDeploymentConfig"]["BlueGreenUpdatePolicy"]["TrafficRoutingConfiguration"]
    assert routing["Type"] == "ALL_AT_ONCE", "it is kept only if asked for"
    world.sagemaker.delete_endpoint(EndpointName="stages")


def test_a_green_fleet_that_answers_5xx_brings_the_old_one_back(world):
    world.model("back-blue", "blue")
    world.model("back-green", "green", BROKEN="1")
    made(world, "back", "back-blue")
    dimensions = {"EndpointName": "back", "VariantName": "AllTraffic", "EndpointConfigName": "back-green"}
    world.cloudwatch.put_metric_alarm(
        AlarmName="back-errors",
        Namespace="AWS/SageMaker",
        MetricName="Invocation5XXErrors",
        Dimensions=[{"Name": name, "Value": value} for name, value in dimensions.items()],
        Statistic="Sum",
        Period=10,
        EvaluationPeriods=1,
        Threshold=3,
        ComparisonOperator="GreaterThanThreshold",
        TreatMissingData="notBreaching",
    )
    with Load(world, "back") as load:
        world.sagemaker.update_endpoint(
            EndpointName="back",
            EndpointConfigName="back-green",
            DeploymentConfig=deployment("CANARY", "back-errors", wait=60, CanarySize=HALF),
        )
        found = world.endpoint("back")
        failures = len(load.failures)
        until(lambda: len(load.answers), lambda count: count > 50, 10)
    assert (found["EndpointStatus"], found["EndpointConfigName"]) == ("InService", "back-blue")
    assert "CloudWatch alarms" in found["FailureReason"] and "back-errors" in found["FailureReason"]
    assert failures > 3 and len(load.failures) == failures, "none after the rollback"
    assert all(error.response.get("OriginalMessage") == "broken" for error in load.failures), "none but the broken ones"
    assert {colour for _, colour in load.answers} == {"blue"}
    world.sagemaker.delete_endpoint(EndpointName="back")


def test_an_alarm_that_rings_beforehand_keeps_the_new_fleet_from_the_traffic(world):
    world.model("ringing-blue", "blue")
    world.model("ringing-green", "green")
    world.alarm("ringing", "ALARM")
    made(world, "ringing", "ringing-blue")
    with Load(world, "ringing") as load:
        world.sagemaker.update_endpoint(
            EndpointName="ringing",
            EndpointConfigName="ringing-green",
            DeploymentConfig=deployment("CANARY", "ringing", wait=60, CanarySize=HALF),
        )
        found = world.endpoint("ringing")
    assert found["EndpointConfigName"] == "ringing-blue" and "ringing" in found["FailureReason"]
    assert load.failures == [] and {colour for _, colour in load.answers} == {"blue"}
    # A later update that goes well leaves nothing of the reason.
    world.sagemaker.update_endpoint(EndpointName="ringing", EndpointConfigName="ringing-green")
    found = world.endpoint("ringing")
    assert found["EndpointConfigName"] == "ringing-green" and "FailureReason" not in found
    world.sagemaker.delete_endpoint(EndpointName="ringing")


def test_a_green_fleet_that_is_never_healthy_is_rolled_back(world):
    world.model("sound", "sound")
    world.model("unsound", "unsound", SICK="1")
    made(world, "health", "sound")
    images = world.emulator.more_environment["HOUNDLOOP_IMAGES"]
    servers = len(alive(images))
    world.sagemaker.update_endpoint(EndpointName="health", EndpointConfigName="unsound")
    found = world.endpoint("health")
    assert (found["EndpointStatus"], found["EndpointConfigName"]) == ("InService", "sound")
    assert "ping health check" in found["FailureReason"]
    assert world.invoke("health")["answer"] == "sound"
    assert len(alive(images)) <= servers, "nothing of it runs on"
    world.sagemaker.delete_endpoint(EndpointName="health")


def test_updates_that_are_refused(world):
    world.model("refused", "one")
    config(world, "refused-other", ("Other", "refused", 2, 1.0))
    config(world, "refused-gone", ("AllTraffic", "refused", 1, 1.0))
    world.alarm("refused-quiet", "OK")
    made(world, "refused", "refused-gone")

    def update(config_name: str = "refused", **request) -> None:
        world.sagemaker.update_endpoint(EndpointName="refused", EndpointConfigName=config_name, **request)

    def rollout(**more) -> dict:
        return {"DeploymentConfig": deployment("CANARY", "refused-quiet", CanarySize=HALF) | more}

    half, whole = HALF, {"Type": "CAPACITY_PERCENT", "Value": 60}
    policy = {"MaximumBatchSize": half, "WaitIntervalInSeconds": 1}
    for request, expected in (
        ({"DeploymentConfig": deployment("CANARY", CanarySize=whole)}, "less than or equal to 50%"),
        ({"DeploymentConfig": deployment("LINEAR", LinearStepSize={"Type": "CAPACITY_PERCENT", "Value": 5})}, "10%"),
        ({"DeploymentConfig": deployment("CANARY", wait=3601, CanarySize=half)}, "waitIntervalInSeconds.*3600"),
        (rollout(AutoRollbackConfiguration={"Alarms": []}), "alarms.*greater than or equal to 1"),
        (rollout(AutoRollbackConfiguration={"Alarms": [{"AlarmName": "a"}] * 11}), "alarms.*less than or equal to 10"),
        (rollout(AutoRollbackConfiguration={"Alarms": [{"AlarmName": "nobody"}]}), "alarms could not be found.*nobody"),
        ({"DeploymentConfig": {"RollingUpdatePolicy": policy}}, "NotImplemented.*RollingUpdatePolicy"),
        ({"config_name": "missing"}, 'Could not find endpoint configuration "arn.*/missing"'),
        ({"config_name": "refused-other"} | rollout(), "the same variant names"),
    ):
        with pytest.raises(ClientError, match=expected):
            update(**request)
    with pytest.raises(ClientError, match="NotImplemented.*VariantPropertyType DataCaptureConfig"):
        update(ExcludeRetainedVariantProperties=[{"VariantPropertyType": "DataCaptureConfig"}])
    # A canary is a part of the new fleet, and one instance has no part.
    with pytest.raises(ClientError, match="at least 2 instances"):
        update(config_name="refused-gone", **rollout())
    # The configuration in use may be deleted; what it serves is served on, but an update wants it.
    world.sagemaker.delete_endpoint_config(EndpointConfigName="refused-gone")
    assert world.invoke("refused")["answer"] == "one"
    with pytest.raises(ClientError, match='Could not find endpoint configuration "arn.*/refused-gone"'):
        update()
    assert world.sagemaker.describe_endpoint(EndpointName="refused")["EndpointStatus"] == "InService"
    world.sagemaker.delete_endpoint(EndpointName="refused")


def test_scaling_out_and_in_under_load_fails_no_request(world):
    world.model("scaled", "scaled")
    made(world, "scaled", "scaled")
    with Load(world, "scaled", threads=6, body=b"sleep 0.1") as load:
        before = until(lambda: {world.invoke("scaled")["pid"] for _ in range(6)}, lambda pids: len(pids) == 2, 20)
        scale(world, "scaled", DesiredInstanceCount=4)
        found = world.sagemaker.describe_endpoint(EndpointName="scaled")
        (variant,) = found["ProductionVariants"]
        assert found["EndpointStatus"] == "Updating" and found["EndpointConfigName"] == "scaled"
        assert (variant["CurrentInstanceCount"], variant["DesiredInstanceCount"]) == (2, 4)
        assert [(stage["Status"], stage["StatusMessage"]) for stage in variant["VariantStatus"]] == [
            ("Updating", "Scaling out desired instance count to 4.")
        ]
        with pytest.raises(ClientError, match=IN_PROGRESS):
            scale(world, "scaled", DesiredInstanceCount=1)
        found = world.endpoint("scaled")
        assert found["ProductionVariants"][0]["CurrentInstanceCount"] == 4
        out = until(lambda: {world.invoke("scaled")["pid"] for _ in range(12)}, lambda pids: len(pids) == 4, 20)
        assert before < out
        scale(world, "scaled", DesiredInstanceCount=1)
        found = world.endpoint("scaled")
        assert found["ProductionVariants"][0]["CurrentInstanceCount"] == 1
        assert len({world.invoke("scaled")["pid"] for _ in range(6)}) == 1
    assert load.failures == [] and len(load.answers) > 10
    for pid in out - {world.invoke("scaled")["pid"]}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    for changes, expected in (
        (
            [{"VariantName": "Other", "DesiredInstanceCount": 1}],
            'variant name\\(s\\) "Other" is/are not present within',
        ),
        ([{"VariantName": "AllTraffic"}] * 2, '"AllTraffic" was non-unique within the request'),
        ([{"VariantName": "AllTraffic", "DesiredInstanceCount": 0}], "must be at least 1"),
        (
            [{"VariantName": "AllTraffic", "DesiredInstanceCount": 10_000}],
            "ResourceLimitExceeded.*service limit 'ml.c5.large for endpoint usage' is 100 Instances.*delta of 9999",
        ),
        ([{"VariantName": "AllTraffic", "DesiredWeight": -1}], "greater than or equal to 0"),
        ([{"VariantName": "AllTraffic", "ServerlessUpdateConfig": {"MaxConcurrency": 2}}], "only supported for server"),
    ):
        with pytest.raises(ClientError, match=expected):
            world.sagemaker.update_endpoint_weights_and_capacities(
                EndpointName="scaled", DesiredWeightsAndCapacities=changes
            )
    world.sagemaker.delete_endpoint(EndpointName="scaled")


def test_variants_share_the_traffic_by_weight(world):
    world.model("variant-a", "a")
    world.model("variant-b", "b")
    two = config(world, "variants", ("A", "variant-a", 1, 3.0), ("B", "variant-b", 1, 1.0))
    made(world, "variants", two)

    def answers(**target: str) -> list[str]:
        return [
            world.runtime.invoke_endpoint(EndpointName="variants", Body=b"x", **target)["InvokedProductionVariant"]
            for _ in range(16)
        ]

    assert answers().count("B") == 4
    assert set(answers(TargetVariant="B")) == {"B"}
    world.sagemaker.update_endpoint_weights_and_capacities(
        EndpointName="variants",
        DesiredWeightsAndCapacities=[
            {"VariantName": "A", "DesiredWeight": 0},
            {"VariantName": "B", "DesiredWeight": 2, "DesiredInstanceCount": 2},
        ],
    )
    found = world.endpoint("variants")
    assert {variant["VariantName"]: variant["CurrentWeight"] for variant in found["ProductionVariants"]} == {
        "A": 0.0,
        "B": 2.0,
    }
    assert set(answers()) == {"B"}
    assert set(answers(TargetVariant="A")) == {"A"}, "one without weight can still be asked for"

    def counts_and_weights(**request) -> list[tuple[int, float]]:
        world.sagemaker.update_endpoint(EndpointName="variants", EndpointConfigName=two, **request)
        variants = world.endpoint("variants")["ProductionVariants"]
        return [(variant["CurrentInstanceCount"], variant["CurrentWeight"]) for variant in variants]

    assert counts_and_weights(RetainAllVariantProperties=True) == [(1, 0.0), (2, 2.0)]
    excluded = [{"VariantPropertyType": "DesiredWeight"}]
    assert counts_and_weights(RetainAllVariantProperties=True, ExcludeRetainedVariantProperties=excluded) == [
        (1, 3.0),
        (2, 1.0),
    ]
    assert counts_and_weights() == [(1, 3.0), (1, 1.0)], "without it, the configuration's"
    world.sagemaker.delete_endpoint(EndpointName="variants")


def test_a_deletion_lets_requests_end(world):
    world.model("drained", "drained")
    made(world, "drained", "drained")
    answers: list = []

    def ask() -> None:
        try:
            answers.append(world.invoke("drained", b"sleep 1.5")["answer"])
        except ClientError as error:
            answers.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    world.sagemaker.delete_endpoint(EndpointName="drained")
    assert world.sagemaker.describe_endpoint(EndpointName="drained")["EndpointStatus"] == "Deleting"
    with pytest.raises(ClientError, match="ValidationError.*not found"):
        world.invoke("drained")
    for thread in threads:
        thread.join()
    assert answers == ["drained"] * 4
    until(lambda: gone(world, "drained"), bool, 20)


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
    found = made(world, "serverless", "serverless")
    assert found["ProductionVariants"][0]["CurrentServerlessConfig"] == {"MemorySizeInMB": 2048, "MaxConcurrency": 1}
    with Load(world, "serverless", threads=6) as load:
        time.sleep(1)
    assert load.answers
    assert {error.response["Error"]["Code"] for error in load.failures} == {"ThrottlingException"}
    with pytest.raises(ClientError, match="HTTP content length exceeded 4194304 bytes"):
        world.invoke("serverless", bytes(4 * 1024 * 1024 + 1))
    with pytest.raises(ClientError, match="not supported for the serverless variant"):
        scale(world, "serverless", DesiredInstanceCount=2)
    scale(world, "serverless", ServerlessUpdateConfig={"MaxConcurrency": 6})
    found = world.endpoint("serverless")
    assert found["ProductionVariants"][0]["CurrentServerlessConfig"] == {"MemorySizeInMB": 2048, "MaxConcurrency": 6}
    with Load(world, "serverless", threads=6) as load:
        time.sleep(1)
    assert load.failures == []
    # It may become an endpoint with instances, and then not serverless again.
    world.sagemaker.update_endpoint(EndpointName="serverless", EndpointConfigName="serverless-model")
    assert world.endpoint("serverless")["ProductionVariants"][0]["CurrentInstanceCount"] == 2
    with pytest.raises(ClientError, match="cannot be converted to a serverless endpoint"):
        world.sagemaker.update_endpoint(EndpointName="serverless", EndpointConfigName="serverless")
    world.sagemaker.delete_endpoint(EndpointName="serverless")


def test_a_restart_brings_back_what_was_served(tmp_path):
    """The size it was scaled to; the old fleet of an interrupted update, but the new one once the old one has to go; a
    model that was deleted meanwhile."""
    images = tmp_path / "images"
    (images / "server").mkdir(parents=True)
    (images / "server" / "__main__.py").write_text(textwrap.dedent(SERVER))
    environment = {"HOUNDLOOP_IMAGES": str(images), "HOUNDLOOP_PRELOAD": "json", "S3_PERSIST": "1"}
    with Emulator(state=tmp_path / "state", auth=False, keep=True, environment=environment) as emulator:
        world = World(emulator)
        for name in ("kept", "other"):
            world.model(name, name)
        made(world, "scaled", "kept")
        made(world, "interrupted", "kept")
        made(world, "updated", "kept")
        scale(world, "scaled", DesiredInstanceCount=1)
        world.endpoint("scaled")
        world.sagemaker.delete_model(ModelName="kept")
        world.sagemaker.update_endpoint(
            EndpointName="interrupted",
            EndpointConfigName="other",
            DeploymentConfig=deployment("CANARY", wait=600, CanarySize=HALF),
        )
        until(
            lambda: {world.invoke("interrupted")["answer"] for _ in range(4)},
            lambda seen: seen == {"kept", "other"},
            20,
        )
        for _ in range(2):  # each instance of the old fleet has a request that it must answer before it ends
            threading.Thread(target=pytest.raises, args=(Exception, world.invoke, "updated", b"sleep 30")).start()
        time.sleep(0.5)
        world.sagemaker.update_endpoint(EndpointName="updated", EndpointConfigName="other")
        until(lambda: world.invoke("updated")["answer"], lambda answer: answer == "other", 20)
        assert world.sagemaker.describe_endpoint(EndpointName="updated")["EndpointStatus"] == "Updating"
        os.kill(emulator.pid, signal.SIGKILL)
    with Emulator(state=tmp_path / "state", auth=False, keep=True, environment=environment) as emulator:
        sagemaker = boto3.client(
            "sagemaker",
            endpoint_url=emulator.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

        def back(name: str) -> dict:
            return until(
                lambda: sagemaker.describe_endpoint(EndpointName=name),
                lambda seen: seen["EndpointStatus"] in ("InService", "Failed"),
                30,
            )

        found = back("scaled")
        assert found["EndpointStatus"] == "InService" and "FailureReason" not in found, found
        assert found["ProductionVariants"][0]["CurrentInstanceCount"] == 1
        found = back("interrupted")
        assert (found["EndpointStatus"], found["EndpointConfigName"]) == ("InService", "kept")
        assert "interrupted by a restart" in found["FailureReason"] and "PendingDeploymentSummary" not in found
        assert found["ProductionVariants"][0]["CurrentInstanceCount"] == 2
        found = back("updated")
        assert found["EndpointConfigName"] == "other" and "FailureReason" not in found
        assert len(alive(str(images / "server"))) == 5
