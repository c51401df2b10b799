"""What scaling policies mean, in pure functions: the alarms they need, and the capacity they ask for.

https://docs.aws.amazon.com/autoscaling/application/userguide/target-tracking-scaling-policy-overview.html
https://docs.aws.amazon.com/autoscaling/application/userguide/step-scaling-policy-overview.html
"""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Callable, Iterable
from typing import Any

TRACKING, STEPS = "TargetTrackingScaling", "StepScaling"
CONFIGURATIONS = {TRACKING: "TargetTrackingScalingPolicyConfiguration", STEPS: "StepScalingPolicyConfiguration"}
INVOCATIONS = "SageMakerVariantInvocationsPerInstance"
RESOURCE = re.compile(r"endpoint/[^/]+/variant/[^/]+")
COOLDOWN = 300  # seconds, AWS's default for endpoint variants
HIGH_PERIODS, LOW_PERIODS = 3, 15  # that the metric must be above the target, or below LOW_SHARE of it
LOW_SHARE = 0.9


def alarm_period() -> int:
    """Seconds of one period of the alarms of target tracking: 60 on AWS; HOUNDLOOP_SCALING_PERIOD to see it sooner."""
    text = os.environ.get("HOUNDLOOP_SCALING_PERIOD") or "60"
    if not text.isdecimal() or int(text) < 1:
        raise SystemExit(f"HOUNDLOOP_SCALING_PERIOD must be a whole number of seconds, found {text!r}: correct it.")
    return int(text)


def configuration(policy: dict) -> dict:
    """The policy's own part, whichever type it has."""
    return policy[CONFIGURATIONS[policy["PolicyType"]]]


def dimensions(resource: str) -> dict[str, str]:
    """The dimensions of a variant's metrics, from a resource id (`endpoint/<name>/variant/<name>`)."""
    _, endpoint, _, variant = resource.split("/")
    return {"EndpointName": endpoint, "VariantName": variant}


def tracked_metric(config: dict, resource: str) -> dict[str, Any]:
    """What target tracking looks at, as PutMetricAlarm wants it."""
    custom = config.get("CustomizedMetricSpecification")
    if custom:
        return {name: custom[name] for name in custom if name != "Metrics"}
    return {
        "Namespace": "AWS/SageMaker",
        "MetricName": "InvocationsPerInstance",
        "Dimensions": [{"Name": name, "Value": value} for name, value in dimensions(resource).items()],
        "Statistic": "Sum",
    }


def tracking_alarms(policy: dict, action: str, period: int, ids: Iterable[str]) -> list[dict[str, Any]]:
    """The alarms of a target tracking policy, as PutMetricAlarm requests that invoke `action`.

    One above the target, and, unless scale-in is disabled, one below. `ids` end their names.
    """
    config, resource = configuration(policy), policy["ResourceId"]
    target = config["TargetValue"]
    kinds = [("AlarmHigh", "GreaterThanThreshold", HIGH_PERIODS, target)]
    if not config.get("DisableScaleIn"):
        kinds.append(("AlarmLow", "LessThanThreshold", LOW_PERIODS, LOW_SHARE * target))
    return [
        tracked_metric(config, resource)
        | {
            "AlarmName": f"TargetTracking-{resource}-{kind}-{id}",
            "AlarmDescription": f"DO NOT EDIT OR DELETE. For TargetTrackingScaling policy {action}.",
            "AlarmActions": [action],
            "ActionsEnabled": True,
            "Period": period,
            "EvaluationPeriods": periods,
            "ComparisonOperator": comparison,
            "Threshold": threshold,
        }
        for (kind, comparison, periods, threshold), id in zip(kinds, ids, strict=False)
    ]


def may_scale_in(policy: dict) -> bool:
    """Whether a target tracking policy must agree before target tracking scales in."""
    return policy["PolicyType"] == TRACKING and not configuration(policy).get("DisableScaleIn")


def rises(alarm: dict) -> bool:
    """Whether the alarm is about a metric that is too high."""
    return alarm["ComparisonOperator"].startswith("Greater")


def wanted_capacity(policy: dict, alarm: dict, values: dict[int, float], current: int, now: float) -> int | None:
    """The capacity that a policy asks for because one of its alarms is in ALARM.

    Args:
        values: the alarm's statistic by how many periods ago, 0 for the running one.
        current: the variant's desired instance count.

    Returns:
        The count, before the target's bounds; None where there is no data, or scale-in has to cool down.
    """
    config = configuration(policy)
    tracking = policy["PolicyType"] == TRACKING
    demand = (_tracking if tracking else _stepping)(config, alarm, values)
    if demand is None:
        return None
    out_cooldown, in_cooldown = (
        config.get(name, COOLDOWN)
        for name in (("ScaleOutCooldown", "ScaleInCooldown") if tracking else ("Cooldown", "Cooldown"))
    )
    wanted = demand(current)
    # The last activities of the policy in either direction, as {"at": seconds, "from": count}.
    out, into = policy.get("_scaled_out"), policy.get("_scaled_in")
    if wanted > current and out and now < out["at"] + out_cooldown:
        # What that one added counts towards this one: only a larger one changes anything.
        return max(current, demand(min(current, out["from"])))
    if wanted < current and into and now < into["at"] + in_cooldown:
        return None
    return wanted


def _tracking(config: dict, alarm: dict, values: dict[int, float]) -> Callable[[int], int] | None:
    """What target tracking makes of a count: as many as bring the metric, which is per instance, to the target.

    Too high, the newest period decides; too low, the busiest one.
    """
    if not values:
        return None
    if not rises(alarm):
        return lambda count: min(count, _proportional(count, max(values.values()), config["TargetValue"]))
    complete = [ago for ago in values if ago > 0]
    newest = max(values[min(complete)] if complete else 0.0, values.get(0, 0.0))
    return lambda count: max(count, _proportional(count, newest, config["TargetValue"]))


def _proportional(count: int, value: float, target: float) -> int:
    return math.ceil(count * value / target - 1e-9)


def _stepping(config: dict, alarm: dict, values: dict[int, float]) -> Callable[[int], int] | None:
    """What a step scaling policy makes of a count. Without data the metric counts as being at the threshold."""
    observed = list(values.values()) or [alarm["Threshold"]]
    aggregates = {"Minimum": min(observed), "Maximum": max(observed), "Average": statistics.fmean(observed)}
    excess = aggregates[config.get("MetricAggregationType", "Average")] - alarm["Threshold"]
    step = _step(config["StepAdjustments"], excess, rises(alarm))
    return None if step is None else lambda count: _adjusted(config, step, count)


def bounds(step: dict) -> tuple[float, float]:
    """A step's interval, relative to the alarm's threshold."""
    return step.get("MetricIntervalLowerBound", -math.inf), step.get("MetricIntervalUpperBound", math.inf)


def _step(steps: list[dict], excess: float, rising: bool) -> dict | None:
    """The step for a metric that is `excess` above the threshold (below it, if negative).

    The bound nearer to the threshold belongs to the step.
    """
    for step in steps:
        low, high = bounds(step)
        if low <= excess < high if rising else low < excess <= high:
            return step
    return None


def _adjusted(config: dict, step: dict, count: int) -> int:
    """The count after a step's adjustment of `count`."""
    adjustment = step["ScalingAdjustment"]
    if config["AdjustmentType"] == "ExactCapacity":
        return adjustment
    if config["AdjustmentType"] == "ChangeInCapacity":
        return count + adjustment
    change = count * adjustment / 100
    size = max(1 if 0 < abs(change) < 1 else math.floor(abs(change)), config.get("MinAdjustmentMagnitude", 0))
    return count + int(math.copysign(size, change)) if adjustment else count
