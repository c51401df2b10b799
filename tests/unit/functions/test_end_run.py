"""end_run and clean_up by themselves; tests/integration/test_failures.py has end_run with the whole workflow."""

import json
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from clean_up import app as clean_up
from common import aws as aws_module
from common import clock
from end_run import app as end_run
from tests.makers import events

EXECUTION = events.document("execution_aborted")["detail"]["executionArn"]
LOCK = {"pk": "lock", "sk": "lock"}
LONG_AGO = "2026-02-26T01:02:03.000Z"


class SageMaker:
    """One job of each kind runs; there is no endpoint. What has ended meanwhile cannot be stopped."""

    def __init__(self) -> None:
        self.stopped, self.ended = list[str](), set[str]()

    def list_hyper_parameter_tuning_jobs(self, NameContains: str, **_: Any) -> dict[str, Any]:
        return {"HyperParameterTuningJobSummaries": [{"HyperParameterTuningJobName": f"{NameContains}-0"}]}

    def list_training_jobs(self, NameContains: str, **_: Any) -> dict[str, Any]:
        return {"TrainingJobSummaries": [{"TrainingJobName": f"{NameContains}-0"}]}

    def list_processing_jobs(self, NameContains: str, **_: Any) -> dict[str, Any]:
        return {"ProcessingJobSummaries": []}

    def _stop(self, name: str) -> None:
        if name in self.ended:
            text = "The request was rejected because the job is in status Completed."
            raise ClientError({"Error": {"Code": "ValidationException", "Message": text}}, "Stop")
        self.stopped.append(name)

    def stop_hyper_parameter_tuning_job(self, HyperParameterTuningJobName: str) -> None:
        self._stop(HyperParameterTuningJobName)

    def stop_training_job(self, TrainingJobName: str) -> None:
        self._stop(TrainingJobName)


class States:
    """One execution, that of the event."""

    status = "ABORTED"
    redrives = 0

    def describe_execution(self, executionArn: str) -> dict[str, Any]:
        if executionArn != EXECUTION:
            raise ClientError({"Error": {"Code": "ExecutionDoesNotExist", "Message": ""}}, "DescribeExecution")
        started = datetime(2026, 2, 26, 1, 2, 3, 999_000, tzinfo=UTC)
        return {
            "executionArn": EXECUTION,
            "status": self.status,
            "startDate": started,
            "input": "{}",
            "cause": "enough",
            "redriveCount": self.redrives,
        }

    def get_execution_history(self, **_: Any) -> dict[str, Any]:
        return {"events": [{"type": "TaskStateEntered", "stateEnteredEventDetails": {"name": "Tune"}}]}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    fakes = {"sagemaker": SageMaker(), "stepfunctions": States()}
    client = aws_module.client
    monkeypatch.setattr(aws_module, "client", lambda name: fakes.get(name) or client(name))
    return SimpleNamespace(**fakes)


def event(execution: str = EXECUTION) -> dict[str, Any]:
    found = events.document("execution_aborted")
    found["detail"]["executionArn"] = execution
    return found


def test_a_run_that_ended_by_itself_is_recorded_its_jobs_stopped_and_its_lock_freed(aws, context, world):
    aws.state.put_item(Item=LOCK | {"holder": EXECUTION, "run": "260226010203"})
    world.sagemaker.ended.add("houndloop-260226010203-0")  # between the list and the stop
    assert end_run.handler(event(), context)["freed"]
    assert world.sagemaker.stopped == ["houndloop-260226010203-train-0"]
    assert "Item" not in aws.state.get_item(Key=LOCK)
    run = aws.state.get_item(Key={"pk": "run", "sk": "260226010203"})["Item"]
    assert (run["outcome"], run["message"]) == ("ABORTED", "it was aborted in Tune: enough")


def test_an_end_that_step_functions_does_not_know_of_yet_is_asked_about_again(aws, context, world):
    """DescribeExecution is eventually consistent, and the event comes once."""
    world.stepfunctions.status = "RUNNING"
    aws.state.put_item(Item=LOCK | {"holder": EXECUTION, "run": "260226010203"})
    with pytest.raises(end_run.StillRunning, match="has ended"):
        end_run.handler(event(), context)
    assert world.sagemaker.stopped == [] and aws.state.get_item(Key=LOCK)["Item"]["holder"] == EXECUTION


def test_a_run_that_was_redriven_keeps_its_lock(aws, context, world):
    world.stepfunctions.status, world.stepfunctions.redrives = "RUNNING", 1
    aws.state.put_item(Item=LOCK | {"holder": EXECUTION, "run": "260226010203"})
    assert end_run.handler(event(), context) == {"freed": False, "why": "it runs again"}
    assert aws.state.get_item(Key=LOCK)["Item"]["holder"] == EXECUTION


@pytest.mark.parametrize(
    ("status", "since", "freed"), [("RUNNING", LONG_AGO, False), ("ABORTED", LONG_AGO, True), ("ABORTED", None, False)]
)
def test_every_hour_it_looks_whether_the_locks_holder_is_dead(aws, context, world, status, since, freed):
    """Of a lock that is fresh the event is yet to come."""
    world.stepfunctions.status = status
    lock = {"holder": EXECUTION, "run": "260226010203", "since": since or clock.iso(clock.now())}
    aws.state.put_item(Item=LOCK | lock)
    assert end_run.handler({}, context)["freed"] is freed
    assert ("Item" not in aws.state.get_item(Key=LOCK)) is freed
    assert end_run.handler({}, context) == {"freed": False}


def test_the_lock_of_another_run_stays(aws, context, world):
    aws.state.put_item(Item=LOCK | {"holder": "arn:another", "run": "78"})
    assert end_run.handler(event(), context) == {"freed": False}
    assert world.sagemaker.stopped == [] and aws.state.get_item(Key=LOCK)["Item"]["run"] == "78"


def test_a_lock_whose_execution_never_was_is_freed(aws, context, world):
    nobody = EXECUTION.replace("execution-name", "nobody")
    aws.state.put_item(Item=LOCK | {"holder": nobody, "run": "77"})
    assert end_run.handler(event(nobody), context) == {"freed": True}


# --- Cleaning up ---


@pytest.fixture
def left(aws, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Six runs whose models, configurations and files are there; the third one's deployment failed."""
    monkeypatch.setenv("KEEP_DEPLOYMENTS", "2")
    sagemaker, role = boto3.client("sagemaker"), "arn:aws:iam::123456789012:role/r"
    runs = [f"26022601020{number}" for number in range(6)]
    for number, run in enumerate(runs, start=1):
        for name in (f"houndloop-{run}", f"houndloop-other-{run}"):
            sagemaker.create_model(ModelName=name, ExecutionRoleArn=role, PrimaryContainer={"Image": "i"})
            variant = {"VariantName": "v", "ModelName": name, "InstanceType": "ml.m5.large", "InitialInstanceCount": 1}
            sagemaker.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant])
        for file in ("prepared/a.npy", "trials/t/model.tar.gz", "regularised/checkpoints/c.pt", "verdict.json"):
            aws.s3.put_object(Bucket=aws.artifacts, Key=f"runs/{run}/{file}", Body=b"")
        item = {"pk": "deployment", "sk": f"{number:06d}", "deployment": number, "run": run}
        item |= {"endpoint_config": f"houndloop-{run}", "outcome": "FAILED" if number == 3 else "PROMOTED"}
        aws.state.put_item(Item=item)
    sagemaker.create_endpoint(EndpointName="houndloop", EndpointConfigName=f"houndloop-{runs[1]}")
    aws.state.put_item(Item={"pk": "training", "sk": "last", "run": runs[4]})

    def models() -> list[str]:
        names = [model["ModelName"] for model in sagemaker.list_models(MaxResults=100)["Models"]]
        configs = sagemaker.list_endpoint_configs(MaxResults=100)["EndpointConfigs"]
        assert {config["EndpointConfigName"] for config in configs} == set(names)
        return sorted(names)

    def files(run: str) -> set[str]:
        listed = aws.s3.list_objects_v2(Bucket=aws.artifacts, Prefix=f"runs/{run}/").get("Contents", [])
        return {item["Key"].removeprefix(f"runs/{run}/") for item in listed}

    return SimpleNamespace(runs=runs, models=models, files=files)


def test_what_is_live_and_the_last_deployments_are_kept(aws, context, left):
    context.get_remaining_time_in_millis = lambda: 100_000
    assert clean_up.handler({"run": left.runs[5]}, context)["models"] == 3
    mine = [name for name in left.models() if "other" not in name]
    assert mine == [f"houndloop-{left.runs[number]}" for number in (1, 4, 5)], "the live one, and the last two"
    assert len(left.models()) == 3 + 6, "another stack's models are its own"


def test_working_files_of_old_runs_go_and_documents_stay(aws, context, left):
    context.get_remaining_time_in_millis = lambda: 100_000
    clean_up.handler({"run": left.runs[5]}, context)
    assert [left.files(run) for run in left.runs[:4]] == [{"verdict.json"}] * 4
    assert all(len(left.files(run)) == 4 for run in left.runs[4:]), "its own, and what the next run starts from"


def test_what_there_is_no_time_for_is_left_to_the_next_run(aws, context, left):
    context.get_remaining_time_in_millis = lambda: clean_up.RESERVE_MS - 1
    assert clean_up.handler({"run": left.runs[5]}, context) == {"models": 3, "objects": 0}
    context.get_remaining_time_in_millis = lambda: 100_000
    assert clean_up.handler({"run": left.runs[5]}, context) == {"models": 0, "objects": 12}


def test_the_message_tells_the_reason_and_where_to_look(aws, context, world, monkeypatch):
    sent: list[dict[str, Any]] = []
    sns = boto3.client("sns")
    monkeypatch.setattr(sns, "publish", lambda **message: sent.append(message))
    client = aws_module.client
    monkeypatch.setattr(aws_module, "client", lambda name: sns if name == "sns" else client(name))
    aws.state.put_item(Item=LOCK | {"holder": EXECUTION, "run": "260226010203"})
    end_run.handler(event(), context)
    (message,) = sent
    told = json.loads(message["Message"])
    assert message["Subject"] == "Houndloop run 260226010203: ABORTED" and EXECUTION in told["link"]
    assert told["why"] == "it was aborted in Tune: enough" and len(told["stopped_jobs"]) == 2
