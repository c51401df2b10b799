"""The capacity that scaling policies ask for, by the rules and examples of AWS's pages on them."""

import pytest

from local.autoscaling.policies import STEPS, TRACKING, alarm_period, tracking_alarms, wanted_capacity

NOW = 10_000.0
HIGH = {"ComparisonOperator": "GreaterThanThreshold", "Threshold": 60.0}
LOW = {"ComparisonOperator": "LessThanThreshold", "Threshold": 60.0}


def tracking(target=100.0, **policy):
    config = {"TargetValue": target, "PredefinedMetricSpecification": {}}
    resource = {"ResourceId": "endpoint/e/variant/v"}
    return {"PolicyType": TRACKING, "TargetTrackingScalingPolicyConfiguration": config} | resource | policy


def stepping(kind, *steps, **config):
    bounds = ("MetricIntervalLowerBound", "MetricIntervalUpperBound", "ScalingAdjustment")
    adjustments = [
        {name: value for name, value in zip(bounds, step, strict=True) if value is not None} for step in steps
    ]
    config |= {"AdjustmentType": kind, "StepAdjustments": adjustments}
    return {"PolicyType": STEPS, "StepScalingPolicyConfiguration": config}


@pytest.mark.parametrize(
    ("alarm", "values", "current", "wanted"),
    [
        (HIGH, {1: 101.0}, 2, 3),
        (HIGH, {1: 250.0}, 2, 5),
        (HIGH, {1: 100.0}, 2, 2),
        (HIGH, {3: 900.0, 2: 900.0, 1: 150.0}, 2, 3),  # the newest complete period decides
        (HIGH, {1: 150.0, 0: 20.0}, 2, 3),  # of which the running one may only add
        (HIGH, {1: 150.0, 0: 400.0}, 2, 8),
        (HIGH, {}, 2, None),
        (LOW, {1: 10.0}, 4, 1),
        (LOW, {1: 10.0, 9: 40.0}, 4, 2),  # the busiest period decides
        (LOW, {1: 0.0}, 4, 0),
        (LOW, {1: 89.0}, 4, 4),  # 3 would have 119 each
        (LOW, {}, 4, None),
    ],
)
def test_target_tracking_is_proportional(alarm, values, current, wanted):
    assert wanted_capacity(tracking(), alarm, values, current, NOW) == wanted


def test_only_a_larger_scale_out_happens_while_one_cools_down():
    policy = tracking(_scaled_out={"at": NOW - 299, "from": 2})
    assert wanted_capacity(policy, HIGH, {1: 200.0}, 4, NOW) == 4
    assert wanted_capacity(policy, HIGH, {1: 300.0}, 4, NOW) == 6
    assert wanted_capacity(policy, HIGH, {1: 200.0}, 4, NOW + 1) == 8


def test_scale_in_waits_for_the_last_one_and_not_for_a_scale_out():
    policy = tracking(_scaled_in={"at": NOW - 299, "from": 5}, _scaled_out={"at": NOW, "from": 1})
    assert wanted_capacity(policy, LOW, {1: 10.0}, 4, NOW) is None
    assert wanted_capacity(policy, LOW, {1: 10.0}, 4, NOW + 1) == 1
    assert wanted_capacity(policy, HIGH, {1: 600.0}, 4, NOW) == 6


OUT = stepping("PercentChangeInCapacity", (0, 10, 0), (10, 20, 10), (20, None, 30))
IN = stepping("PercentChangeInCapacity", (-10, 0, 0), (-20, -10, -10), (None, -20, -30))


@pytest.mark.parametrize(
    ("policy", "alarm", "value", "current", "wanted"),
    [
        (OUT, HIGH, 69.9, 10, 10),
        (OUT, HIGH, 70.0, 10, 11),  # the lower bound belongs to the step above
        (OUT, HIGH, 79.0, 10, 11),
        (OUT, HIGH, 85.0, 10, 13),
        (IN, LOW, 50.0, 10, 9),  # below, the upper bound does
        (IN, LOW, 50.1, 10, 10),
        (IN, LOW, 35.0, 10, 7),
        (stepping("PercentChangeInCapacity", (0, None, 10)), HIGH, 61.0, 4, 5),  # 0.4 is rounded to 1
        (stepping("PercentChangeInCapacity", (0, None, 127)), HIGH, 61.0, 10, 22),  # 12.7 to 12
        (stepping("PercentChangeInCapacity", (None, 0, -66)), LOW, 59.0, 10, 4),  # -6.6 to -6
        (stepping("PercentChangeInCapacity", (0, None, 25), MinAdjustmentMagnitude=2), HIGH, 61.0, 4, 6),
        (stepping("ChangeInCapacity", (0, None, 3)), HIGH, 61.0, 4, 7),
        (stepping("ExactCapacity", (0, None, 5)), HIGH, 61.0, 4, 5),
        (stepping("ChangeInCapacity", (5, None, 3)), HIGH, 61.0, 4, None),  # no step for this value
    ],
)
def test_step_scaling_takes_the_step_of_the_breach(policy, alarm, value, current, wanted):
    assert wanted_capacity(policy, alarm, {1: value}, current, NOW) == wanted


def test_step_scaling_aggregates_as_it_is_told():
    values = {2: 61.0, 1: 85.0}
    for how, wanted in (("Minimum", 10), ("Average", 11), ("Maximum", 13)):
        config = OUT["StepScalingPolicyConfiguration"] | {"MetricAggregationType": how}
        policy = OUT | {"StepScalingPolicyConfiguration": config}
        assert wanted_capacity(policy, HIGH, values, 10, NOW) == wanted


def test_what_a_step_added_counts_towards_a_larger_one():
    policy = stepping("ChangeInCapacity", (0, 10, 2), (10, None, 3)) | {"_scaled_out": {"at": NOW - 1, "from": 4}}
    assert wanted_capacity(policy, HIGH, {1: 65.0}, 6, NOW) == 6
    assert wanted_capacity(policy, HIGH, {1: 75.0}, 6, NOW) == 7
    assert wanted_capacity(policy, HIGH, {1: 75.0}, 6, NOW + 300) == 9


def test_the_alarms_wait_three_minutes_out_and_fifteen_in(monkeypatch):
    monkeypatch.delenv("HOUNDLOOP_SCALING_PERIOD", raising=False)
    high, low = tracking_alarms(tracking(70.0), "arn", alarm_period(), ["a", "b"])
    assert (high["Period"], high["EvaluationPeriods"], high["Threshold"]) == (60, 3, 70.0)
    assert (low["Period"], low["EvaluationPeriods"], low["Threshold"]) == (60, 15, 63.0)


@pytest.mark.parametrize("text", ["0", "soon", "-1", "1.5"])
def test_a_period_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("HOUNDLOOP_SCALING_PERIOD", text)
    with pytest.raises(SystemExit, match="HOUNDLOOP_SCALING_PERIOD must be a whole number of seconds"):
        alarm_period()
