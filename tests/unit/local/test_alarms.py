"""The alarm evaluator against the tables of AWS's page on missing data."""

import pytest

from local.seams.cloudwatch import datapoints, judge

MISSING = {"missing": 0, "ignore": 1, "breaching": 2, "notBreaching": 3}


def alarm(**more):
    return {
        "ComparisonOperator": "GreaterThanThreshold",
        "Threshold": 0.5,
        "EvaluationPeriods": 3,
        "Period": 10,
        "Statistic": "Sum",
        **more,
    }


# Oldest first, as AWS prints them: 0 is fine, X breaches, - is missing. Then the states for missing, ignore (None:
# keep the state), breaching and notBreaching.
# https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/alarms-and-missing-data.html
THREE_OF_THREE = [
    ("0 - X - X", ["OK", "OK", "OK", "OK"]),
    ("- - - - 0", ["OK", "OK", "OK", "OK"]),
    ("- - - - -", ["INSUFFICIENT_DATA", None, "ALARM", "OK"]),
    ("0 X X - X", ["ALARM", "ALARM", "ALARM", "ALARM"]),
    ("- - X - -", ["ALARM", None, "ALARM", "OK"]),
    ("- - - - X", [None, None, "ALARM", "OK"]),  # from here on what the page says below its tables
    ("- - - X -", [None, None, "ALARM", "OK"]),
    ("- - - X X", [None, None, "ALARM", "OK"]),
]
TWO_OF_THREE = [
    ("0 - X - X", ["ALARM", "ALARM", "ALARM", "ALARM"]),
    ("0 0 X 0 X", ["ALARM", "ALARM", "ALARM", "ALARM"]),
    ("0 - X - -", ["OK", "OK", "ALARM", "OK"]),
    ("- - - - 0", ["OK", "OK", "ALARM", "OK"]),
    ("- - - X -", ["ALARM", None, "ALARM", "OK"]),
]


@pytest.mark.parametrize("treatment", MISSING)
@pytest.mark.parametrize(
    "needed, pattern, states", [(3, *row) for row in THREE_OF_THREE] + [(2, *row) for row in TWO_OF_THREE]
)
def test_missing_data_is_judged_as_awss_tables_say(needed, pattern, states, treatment):
    values = [{"0": 0.0, "X": 1.0, "-": None}[sign] for sign in reversed(pattern.split())]
    points = [(float(-age), value) for age, value in enumerate(values)]
    assert judge(alarm(DatapointsToAlarm=needed, TreatMissingData=treatment), points) == states[MISSING[treatment]]


def point(second, value=1.0, unit="Count"):
    return {"Timestamp": second, "Value": value, "Unit": unit}


def test_periods_are_aligned_and_complete_before_they_count():
    fine = alarm(Threshold=5, EvaluationPeriods=2)
    found = datapoints(fine, [point(100), point(109.9), point(110), point(121)], now=125)
    assert found[:3] == [(110, 1.0), (100, 2.0), (90, None)]


def test_a_sum_that_breaches_already_counts_before_its_period_ends():
    assert datapoints(alarm(EvaluationPeriods=1), [point(121)], now=125)[0] == (120, 1.0)
    low = alarm(ComparisonOperator="LessThanThreshold", Threshold=5, EvaluationPeriods=1)
    assert datapoints(low, [point(121)], now=125)[0] == (110, None), "more data could still lift it"


def test_percentiles_and_units():
    high = alarm(ExtendedStatistic="p90", Threshold=100, EvaluationPeriods=1, Unit="Microseconds")
    points = [point(110 + n / 20, n, "Microseconds") for n in range(101)] + [point(111, 9e9, "Count")]
    assert datapoints(high, points, now=121)[0] == (110, 90.0)
