"""Blue/green deployments as rules: which DeploymentConfig is one, and how it shifts the traffic when.

https://docs.aws.amazon.com/sagemaker/latest/dg/deployment-guardrails-blue-green.html
"""

from __future__ import annotations

import math

from .errors import ValidationException
from .fleets import VariantPlan

MAX_PERCENT = 50  # of the instances, of a canary and of a linear step
MIN_LINEAR_PERCENT = 10
SIZES = {"CANARY": "CanarySize", "LINEAR": "LinearStepSize"}  # the member that each type of shifting wants


class RolledBack(Exception):
    """The update is undone; the text is the reason."""


def default_deployment() -> dict:
    """What UpdateEndpoint does without a DeploymentConfig."""
    return {
        "BlueGreenUpdatePolicy": {
            "TrafficRoutingConfiguration": {"Type": "ALL_AT_ONCE", "WaitIntervalInSeconds": 0},
            "TerminationWaitInSeconds": 0,
        }
    }


def alarm_names(deployment: dict) -> list[str]:
    """The alarms that guard a deployment."""
    alarms = deployment.get("AutoRollbackConfiguration", {}).get("Alarms", [])
    return [alarm["AlarmName"] for alarm in alarms if "AlarmName" in alarm]


def check(deployment: dict, variants: list[VariantPlan]) -> None:
    """Raises ValidationException for a DeploymentConfig that cannot bring these variants about."""
    if any(variant.serverless for variant in variants):
        raise ValidationException("DeploymentConfig is not supported for serverless endpoints.")
    routing = deployment.get("BlueGreenUpdatePolicy", {}).get("TrafficRoutingConfiguration")
    if not routing:
        return
    kind = routing["Type"]
    for other, member in SIZES.items():
        if other == kind and not routing.get(member):
            raise ValidationException(f"You must specify {member} for traffic routing of type {kind}.")
        if other != kind and routing.get(member):
            raise ValidationException(f"{member} must not be specified for traffic routing of type {kind}.")
    if kind not in SIZES:
        return
    member, count = SIZES[kind], min(variant.count for variant in variants)
    size = routing[member]
    if size["Type"] == "CAPACITY_PERCENT":
        percent, found = size["Value"], f"{size['Value']}%"
        if count < 2 and percent <= MAX_PERCENT:
            raise ValidationException(
                f"Traffic routing of type {kind} needs variants of at least 2 instances, because {member} must be less "
                f"than or equal to {MAX_PERCENT}% of the variant's total instance count."
            )
    else:
        percent, found = 100 * size["Value"] / count, f"{size['Value']} of {count} instances"
    if percent > MAX_PERCENT:
        raise ValidationException(
            f"{member} must be less than or equal to {MAX_PERCENT}% of the variant's total instance count, "
            f"found {found}."
        )
    if kind == "LINEAR" and percent < MIN_LINEAR_PERCENT:
        raise ValidationException(
            f"{member} must be at least {MIN_LINEAR_PERCENT}% of the variant's total instance count, found {found}."
        )


def steps(policy: dict, instances: int) -> list[tuple[float, float]]:
    """The traffic shifts of a blue/green policy: (green's share afterwards, seconds of baking).

    `instances` is the number of the variant that has the fewest. The last bake lasts TerminationWaitInSeconds: then
    the old fleet goes.

    >>> steps({"TrafficRoutingConfiguration": {"Type": "CANARY", "WaitIntervalInSeconds": 60,
    ...        "CanarySize": {"Type": "INSTANCE_COUNT", "Value": 1}}, "TerminationWaitInSeconds": 5}, 4)
    [(0.25, 60.0), (1.0, 5.0)]
    """
    routing = policy["TrafficRoutingConfiguration"]
    last = float(policy.get("TerminationWaitInSeconds", 0))
    if routing["Type"] == "ALL_AT_ONCE":
        return [(1.0, last)]
    wait = float(routing.get("WaitIntervalInSeconds", 0))
    size = routing[SIZES[routing["Type"]]]
    portion = size["Value"] / (100 if size["Type"] == "CAPACITY_PERCENT" else max(1, instances))
    portion = min(portion, MAX_PERCENT / 100)
    if routing["Type"] == "CANARY":
        return [(portion, wait), (1.0, last)]
    count = math.ceil(1 / portion - 1e-9)
    return [(min(1.0, portion * step), wait if step < count else last) for step in range(1, count + 1)]


def active(count: int, share: float) -> int:
    """How many of `count` instances carry `share` of the traffic, as descriptions count them."""
    return min(count, math.ceil(count * share - 1e-9))


def capacity(count: int, share: float) -> str:
    """The active instances in the words of AWS's status messages."""
    return f"{'full' if share >= 1 else 'canary'} capacity of {active(count, share)} instance(s)"
