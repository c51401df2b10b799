"""The rules by which executions retry, end and pause, apart from the emulator that runs them."""

import pytest

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
