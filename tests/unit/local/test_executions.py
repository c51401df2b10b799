"""The rules by which executions retry, end, pause and are logged, apart from the emulator that runs them."""

import json

import pytest

from local.seams import history, statelogs
from local.seams import stepfunctions as seam

RETRIER = {"ErrorEquals": ["States.ALL"], "IntervalSeconds": 10, "BackoffRate": 3}


def delay(retrier, count):
    found, index = seam._retrying(lambda retriers, error, counts: (retriers[0], 0))([retrier], "E", {0: count})
    assert index == 0
    return found["IntervalSeconds"] * found["BackoffRate"] ** count


@pytest.mark.parametrize("count, seconds", [(0, 10), (1, 30), (2, 40), (5, 40)])
def test_the_delay_of_a_retry_grows_to_its_maximum(count, seconds):
    assert delay({**RETRIER, "MaxDelaySeconds": 40}, count) == seconds


def test_full_jitter_stays_below_the_delay():
    delays = [delay({**RETRIER, "JitterStrategy": "FULL"}, 1) for _ in range(50)]
    assert all(0 <= seconds <= 30 for seconds in delays)
    assert len(set(delays)) > 1


def test_the_end_of_an_execution_is_not_an_error_that_a_state_may_catch():
    matches = seam._matching(lambda error_equals, error: True)
    assert matches(["States.ALL"], "States.TaskFailed")
    assert not matches(["States.ALL"], seam.ENDED)


def test_only_a_running_execution_can_fail():
    failed = []
    fail = seam._failing(lambda execution, error, cause: failed.append(execution["name"]))
    fail({"name": "running", "status": "RUNNING"}, "E", "c")
    fail({"name": "stopped", "status": "ABORTED"}, "E", "c")
    assert failed == ["running"]


def test_a_pause_ends_with_the_execution():
    current = seam._execution.set({"status": "ABORTED"})
    try:
        with pytest.raises(seam.ExecutionEnded):
            seam.pause(60)
    finally:
        seam._execution.reset(current)


# --- History and logs ---

FUNCTION = "arn:aws:lambda:us-east-1:000000000000:function:f"


@pytest.mark.parametrize(
    "event_type, resource, expected",
    [
        ("TaskStarted", "arn:aws:states:::lambda:invoke", ("TaskStarted", "lambda", "invoke")),
        (
            "TaskSucceeded",
            "arn:aws:states:::aws-sdk:sagemaker:describeEndpoint",
            ("TaskSucceeded", "aws-sdk:sagemaker", "describeEndpoint"),
        ),
        (
            "TaskSubmitted",
            "arn:aws:states:::sagemaker:createTrainingJob.sync",
            ("TaskSubmitted", "sagemaker", "createTrainingJob.sync"),
        ),
        (
            "TaskStarted",
            "arn:aws:states:::states:startExecution.sync:2",
            ("TaskStarted", "states", "startExecution.sync:2"),
        ),
        ("TaskSucceeded", FUNCTION, ("LambdaFunctionSucceeded", None, None)),
    ],
)
def test_events_name_a_tasks_service_and_action(event_type, resource, expected):
    found, details = history.as_on_aws(event_type, {"resource": resource, "resourceType": "states"}, {}, "us-east-1")
    assert (found, details.get("resourceType"), details.get("resource")) == expected


def test_what_a_task_is_called_with_is_in_its_history():
    scheduled = history.as_on_aws("TaskScheduled", {"resource": "arn:aws:states:::sns:publish"}, {"a": 1}, "eu-west-1")
    assert scheduled == (
        "TaskScheduled",
        {"resourceType": "sns", "resource": "publish", "region": "eu-west-1", "parameters": '{"a": 1}'},
    )
    called = history.as_on_aws("TaskScheduled", {"resource": FUNCTION}, {"a": 1}, "eu-west-1")
    assert called == ("LambdaFunctionScheduled", {"resource": FUNCTION, "input": '{"a": 1}'})


def test_a_task_that_timed_out_did_not_just_fail():
    details = {"resource": "arn:aws:states:::sns:publish", "error": "States.Timeout", "cause": "c"}
    assert history.as_on_aws("TaskFailed", details, None, "us-east-1")[0] == "TaskTimedOut"


# https://docs.aws.amazon.com/step-functions/latest/dg/cloudwatch-log-level.html
@pytest.mark.parametrize(
    "event_type, levels",
    [
        ("ExecutionStarted", {"ALL"}),
        ("ExecutionSucceeded", {"ALL"}),
        ("ExecutionFailed", {"ALL", "ERROR", "FATAL"}),
        ("ExecutionAborted", {"ALL", "ERROR", "FATAL"}),
        ("ExecutionTimedOut", {"ALL", "ERROR", "FATAL"}),
        ("FailStateEntered", {"ALL", "ERROR"}),
        ("LambdaFunctionScheduleFailed", {"ALL", "ERROR"}),
        ("MapIterationAborted", {"ALL", "ERROR"}),
        ("TaskTimedOut", {"ALL", "ERROR"}),
        ("TaskSubmitted", {"ALL"}),
        ("WaitStateExited", {"ALL"}),
    ],
)
def test_log_levels(event_type, levels):
    assert {level for level in ("ALL", "ERROR", "FATAL", "OFF") if statelogs.wanted(level, event_type)} == levels


def test_a_payload_that_cloudwatch_logs_could_not_hold_is_cut():
    event = {"id": 2, "type": "TaskStateEntered", "timestamp": "2026-11-22T10:00:00.500Z", "previousEventId": 0}
    large = "x" * 300_000
    logged = json.loads(statelogs.message(event, {"name": "S", "input": large}, "arn", include_data=True))
    assert logged["details"]["inputDetails"] == {"truncated": True}
    assert len(logged["details"]["input"]) == statelogs.MAX_PAYLOAD
    assert (logged["event_timestamp"], logged["previous_event_id"]) == ("1795341600500", "0")
    bare = json.loads(statelogs.message(event, {"name": "S", "input": large}, "arn", include_data=False))
    assert bare["details"] == {"name": "S"}
