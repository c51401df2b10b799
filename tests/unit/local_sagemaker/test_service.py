"""Requests against a service with a state folder of its own, without the emulator."""

import asyncio
import json
import signal
import sys

import pytest

from local.sagemaker import host, validation
from local.sagemaker.api import SageMaker
from local.sagemaker.errors import ValidationException
from local.sagemaker.jobs import CHUNK, LogFollower, MetricReader, check_metric_definitions
from local.sagemaker.processes import Processes
from local.sagemaker.store import Store, page, record
from local.sagemaker.tuning import SearchSpace, check_range


def call(service: SageMaker, action: str, request: dict) -> tuple[int, dict]:
    headers = {"x-amz-target": f"SageMaker.{action}"}

    async def act():
        return await service.handle("POST", "/", headers, json.dumps(request).encode())

    status, _, body = asyncio.run(act())
    return status, json.loads(body or b"{}")


def test_what_was_acknowledged_is_there_after_a_restart(settings):
    service = SageMaker(settings)
    status, made = call(service, "CreateModelPackageGroup", {"ModelPackageGroupName": "Dogs"})
    assert status == 200 and made["ModelPackageGroupArn"].endswith("model-package-group/dogs")
    status, found = call(SageMaker(settings), "DescribeModelPackageGroup", {"ModelPackageGroupName": "Dogs"})
    assert status == 200 and found["ModelPackageGroupStatus"] == "Completed"
    assert not [name for name in found if name.startswith("_")]


def test_actions_unknown_to_aws_and_actions_not_here_are_told_apart(settings):
    service = SageMaker(settings)
    assert call(service, "CreateNonsense", {})[1]["__type"] == "UnknownOperationException"
    status, answer = call(service, "CreateTransformJob", {})
    assert (status, answer["__type"]) == (501, "NotImplemented") and "CreateTransformJob" in answer["message"]


def test_every_action_of_the_table_is_sagemakers(settings):
    assert set(SageMaker(settings).actions) <= set(validation.service_model().operation_names)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({}, "Value null at 'endpointName' failed to satisfy constraint: Member must not be null"),
        ({"EndpointName": "x" * 64, "EndpointConfigName": "c"}, "Member must have length less than or equal to 63"),
        ({"EndpointName": 5, "EndpointConfigName": "c"}, "Value '5' at 'endpointName'"),
        (
            {"EndpointName": "e", "EndpointConfigName": "c", "Tags": [{"Key": "k"}]},
            "Value null at 'tags.1.member.value' failed to satisfy constraint: Member must not be null",
        ),
        (
            {
                "EndpointName": "e",
                "EndpointConfigName": "c",
                "DeploymentConfig": {
                    "BlueGreenUpdatePolicy": {
                        "TrafficRoutingConfiguration": {"Type": "SLOW", "WaitIntervalInSeconds": 1}
                    }
                },
            },
            "Member must satisfy enum value set: [ALL_AT_ONCE, CANARY, LINEAR]",
        ),
        (
            {
                "EndpointName": "e",
                "EndpointConfigName": "c",
                "DeploymentConfig": {
                    "BlueGreenUpdatePolicy": {
                        "TrafficRoutingConfiguration": {"Type": "CANARY", "WaitIntervalInSeconds": 9999}
                    }
                },
            },
            "Member must have value less than or equal to 3600",
        ),
    ],
)
def test_constraints_of_the_service_model(request_, expected):
    with pytest.raises(ValidationException) as caught:
        validation.validate("CreateEndpoint", request_)
    assert expected in str(caught.value)


def test_lists_are_filtered_sorted_and_paged(tmp_path):
    store = Store(tmp_path)
    for number in range(5):
        store.save(record("thing", f"t{number}", f"arn:{number}", Name=f"t{number}", CreationTime=100.0 + number))
    first, token = page(store.all("thing"), {"MaxResults": 2}, "Name")
    assert [item["Name"] for item in first] == ["t4", "t3"]
    second, _ = page(store.all("thing"), {"MaxResults": 2, "NextToken": token}, "Name")
    assert [item["Name"] for item in second] == ["t2", "t1"]
    found, token = page(store.all("thing"), {"SortBy": "Name", "CreationTimeAfter": 102}, "Name")
    assert [item["Name"] for item in found] == ["t2", "t3", "t4"] and token is None
    with pytest.raises(ValidationException, match="NextToken"):
        page(store.all("thing"), {"NextToken": "nonsense"}, "Name")


def test_metrics_are_read_from_the_log_and_the_last_value_stays():
    reader = MetricReader([{"Name": "acc", "Regex": r"acc=([0-9\.]+);"}], "Test", {})
    for line in ("acc=0.5; loss=1", "nothing", "acc=...; broken", "acc=0.75;"):
        reader(line)
    assert [(item["MetricName"], item["Value"]) for item in reader.final()] == [("acc", 0.75)]
    with pytest.raises(ValidationException, match="no capturing group"):
        check_metric_definitions([{"Name": "a", "Regex": "a"}])


def test_parameter_ranges_become_a_search_space():
    space = SearchSpace(
        {
            "ContinuousParameterRanges": [
                {"Name": "lr", "MinValue": "0.0001", "MaxValue": "0.1", "ScalingType": "Auto"},
                {"Name": "momentum", "MinValue": "0.5", "MaxValue": "0.999", "ScalingType": "ReverseLogarithmic"},
                {"Name": "drop", "MinValue": "0", "MaxValue": "0.5", "ScalingType": "Linear"},
            ],
            "IntegerParameterRanges": [{"Name": "epochs", "MinValue": "1", "MaxValue": "8", "ScalingType": "Linear"}],
            "CategoricalParameterRanges": [{"Name": "batch-size", "Values": ["16", "32"]}],
        }
    )
    assert space.distributions["lr"].log and not space.distributions["drop"].log
    assert space.distributions["momentum"].low == pytest.approx(0.001)
    values = space.values({"lr": 0.01, "momentum": 0.1, "epochs": 3, "batch-size": "32"})
    assert values == {"lr": "0.01", "momentum": "0.9", "epochs": "3", "batch-size": "32"}
    with pytest.raises(ValidationException, match="greater than MaxValue"):
        check_range({"Name": "x", "MinValue": "2", "MaxValue": "1"})


TRAINING = {
    "TrainingJobName": "t",
    "AlgorithmSpecification": {"TrainingImage": "local/training", "TrainingInputMode": "File"},
    "RoleArn": "arn:aws:iam::000000000000:role/jobs",
    "OutputDataConfig": {"S3OutputPath": "s3://jobs-bucket/out"},
    "ResourceConfig": {"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 1},
    "StoppingCondition": {"MaxRuntimeInSeconds": 60},
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"OutputDataConfig": {"S3OutputPath": "s3://jobs-bucket/out", "CompressionType": "NONE"}},
            "OutputDataConfig.CompressionType NONE is not implemented",
        ),
        (
            {"ResourceConfig": TRAINING["ResourceConfig"] | {"KeepAlivePeriodInSeconds": 60}},
            "ResourceConfig.KeepAlivePeriodInSeconds is not implemented",
        ),
        (
            {"StoppingCondition": {"MaxRuntimeInSeconds": 60, "MaxPendingTimeInSeconds": 7200}},
            "StoppingCondition.MaxPendingTimeInSeconds is not implemented",
        ),
        ({"EnableManagedSpotTraining": True}, "Invalid MaxWaitTimeInSeconds. It must be present"),
    ],
)
def test_what_a_job_would_not_do_is_refused(settings, monkeypatch, change, expected):
    monkeypatch.setattr(host, "can_assume", lambda role_arn: True)
    status, answer = call(SageMaker(settings), "CreateTrainingJob", TRAINING | change)
    assert status >= 400 and expected in answer["message"]


@pytest.mark.parametrize(
    ("principal", "trusted"),
    [
        ({"Service": "sagemaker.amazonaws.com"}, True),
        ({"Service": ["states.amazonaws.com", "sagemaker.amazonaws.com"]}, True),
        ({"Service": "lambda.amazonaws.com"}, False),
        ({"AWS": "arn:aws:iam::000000000000:root"}, False),
        ("*", False),
    ],
)
def test_a_job_needs_a_role_that_trusts_sagemaker(principal, trusted):
    statement = {"Effect": "Allow", "Principal": principal, "Action": "sts:AssumeRole"}
    assert host.trusts({"Statement": statement}, "sagemaker.amazonaws.com") is trusted
    assert host.trusts(json.dumps({"Statement": [statement]}), "sagemaker.amazonaws.com") is trusted


def test_a_flood_in_a_log_arrives_whole_and_lets_others_work(tmp_path, monkeypatch):
    log = tmp_path / "log"
    lines = [f"{number:07d}" for number in range(3 * CHUNK // 8)]
    log.write_text("\n".join(lines) + "\n" + "=" * 2 * CHUNK + "\nno newline at the end")
    seen, turns, sent = [], [], []

    async def put(group, stream, texts):
        sent.append(len(turns))

    async def nothing(*_):
        pass

    async def other():
        while True:
            turns.append(None)
            await asyncio.sleep(0)

    async def follow():
        work = asyncio.create_task(other())
        async with LogFollower(log, "group", "stream", seen.append):
            pass
        work.cancel()

    monkeypatch.setattr(host, "put_log_lines", put)
    monkeypatch.setattr(host, "open_log_stream", nothing)
    asyncio.run(follow())
    assert seen[: len(lines)] == lines and seen[-1] == "no newline at the end"
    assert "".join(seen[len(lines) : -1]) == "=" * 2 * CHUNK
    assert len(set(sent)) > 3


def test_a_process_whose_start_was_given_up_is_ended(settings, tmp_path):
    async def give_up() -> int:
        processes = Processes(settings)
        sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
        try:
            start = asyncio.create_task(processes.spawn(sleeper, {}, tmp_path, tmp_path / "log"))
            while not processes._known:
                await asyncio.sleep(0.001)
            [process] = processes._known.values()
            start.cancel()
            return await asyncio.wait_for(process.wait(), 10)
        finally:
            processes.close()

    assert asyncio.run(give_up()) == -signal.SIGKILL
