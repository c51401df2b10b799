"""Blue/green deployments as rules: which are refused, how they shift the traffic, and who gets the next request."""

import pytest

from local.sagemaker.errors import ValidationException
from local.sagemaker.fleets import VariantPlan, smooth_choice
from local.sagemaker.rollout import capacity, check, default_deployment, steps


def policy(kind: str, wait: int, last: int, **size) -> dict:
    return {
        "TrafficRoutingConfiguration": {"Type": kind, "WaitIntervalInSeconds": wait} | size,
        "TerminationWaitInSeconds": last,
    }


def percent(value: int) -> dict:
    return {"Type": "CAPACITY_PERCENT", "Value": value}


def instances(value: int) -> dict:
    return {"Type": "INSTANCE_COUNT", "Value": value}


def test_traffic_shifts():
    assert steps(default_deployment()["BlueGreenUpdatePolicy"], 2) == [(1.0, 0.0)]
    # Nothing to wait for between shifts where there is one only.
    assert steps(policy("ALL_AT_ONCE", 5, 9), 2) == [(1.0, 9.0)]
    assert steps(policy("CANARY", 60, 9, CanarySize=percent(30)), 2) == [(0.3, 60.0), (1.0, 9.0)]
    assert steps(policy("LINEAR", 5, 9, LinearStepSize=instances(1)), 3) == [
        (pytest.approx(1 / 3), 5.0),
        (pytest.approx(2 / 3), 5.0),
        (1.0, 9.0),
    ]
    assert steps(policy("LINEAR", 5, 9, LinearStepSize=percent(40)), 3) == [(0.4, 5.0), (0.8, 5.0), (1.0, 9.0)]
    assert len(steps(policy("LINEAR", 5, 9, LinearStepSize=percent(10)), 3)) == 10


@pytest.mark.parametrize(
    ("kind", "size", "counts", "expected"),
    [
        ("CANARY", {"CanarySize": percent(50)}, [2], None),
        ("CANARY", {"CanarySize": percent(51)}, [9], "CanarySize must be less than or equal to 50%"),
        ("CANARY", {"CanarySize": instances(2)}, [4], None),
        ("CANARY", {"CanarySize": instances(2)}, [3], "found 2 of 3 instances"),
        ("CANARY", {"CanarySize": instances(2)}, [9, 3], "found 2 of 3 instances"),
        ("CANARY", {"CanarySize": percent(50)}, [1], "at least 2 instances"),
        ("CANARY", {}, [4], "You must specify CanarySize"),
        ("CANARY", {"CanarySize": percent(50), "LinearStepSize": percent(50)}, [4], "LinearStepSize must not be"),
        ("LINEAR", {"LinearStepSize": percent(10)}, [2], None),
        ("LINEAR", {"LinearStepSize": percent(9)}, [2], "at least 10%"),
        ("LINEAR", {"LinearStepSize": instances(1)}, [11], "at least 10%"),
        ("ALL_AT_ONCE", {}, [1], None),
        ("ALL_AT_ONCE", {"CanarySize": percent(50)}, [2], "CanarySize must not be"),
    ],
)
def test_which_deployments_are_refused(kind, size, counts, expected):
    plans = [VariantPlan(f"v{count}", "model", {}, "role", 1.0, count) for count in counts]
    deployment = {"BlueGreenUpdatePolicy": policy(kind, 1, 1, **size)}
    if expected is None:
        check(deployment, plans)
    else:
        with pytest.raises(ValidationException, match=expected):
            check(deployment, plans)


def test_capacity_in_words():
    assert capacity(3, 0.3) == "canary capacity of 1 instance(s)"
    assert capacity(4, 0.5) == "canary capacity of 2 instance(s)"
    assert capacity(3, 1.0) == "full capacity of 3 instance(s)"


def test_weighted_choice_is_exact_over_short_stretches():
    class Item:
        credit = 0.0

    a, b = Item(), Item()
    chosen = [smooth_choice([a, b], [0.75, 0.25]) for _ in range(8)]
    assert chosen.count(b) == 2 and chosen[:4].count(b) == 1
