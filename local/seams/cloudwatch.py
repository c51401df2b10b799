"""CloudWatch alarms that judge what AWS would judge, and metrics from the logs of functions.

ministack's alarms mix all dimensions of a metric, know nothing of missing data, and look only when somebody puts a
metric: a rollback guarded by one would happen, or not, for the wrong reason. This evaluator follows
https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/alarm-evaluation.html once a second.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from ministack.core import responses
from ministack.services import cloudwatch, lambda_svc

from . import expect

logger = logging.getLogger("houndloop.cloudwatch")

INTERVAL_SECONDS = 1.0
RANGE_BEYOND = 2  # periods looked at beyond EvaluationPeriods, to make up for missing data points
BREACHES = {
    "GreaterThanOrEqualToThreshold": lambda value, threshold: value >= threshold,
    "GreaterThanThreshold": lambda value, threshold: value > threshold,
    "LessThanThreshold": lambda value, threshold: value < threshold,
    "LessThanOrEqualToThreshold": lambda value, threshold: value <= threshold,
}
WORDS = {
    "GreaterThanOrEqualToThreshold": "greater than or equal to",
    "GreaterThanThreshold": "greater than",
    "LessThanThreshold": "less than",
    "LessThanOrEqualToThreshold": "less than or equal to",
}
ONLY_GROWS = ("Sum", "Maximum", "SampleCount")  # statistics that more data in a period can only raise


def datapoints(alarm: dict, points: list[dict], now: float) -> list[tuple[float, float | None]]:
    """The alarm's data points, newest first: (start of the period, statistic or None where there is no data).

    Periods count once they are complete. The running one counts early if its statistic can only grow and breaches
    already: nothing that follows can undo that.
    """
    period, count = int(alarm.get("Period") or 60), int(alarm.get("EvaluationPeriods") or 1)
    statistic = alarm.get("ExtendedStatistic") or alarm.get("Statistic") or "Average"
    running = int(now // period)
    oldest = running - count - RANGE_BEYOND
    buckets: dict[int, list[dict]] = {}
    for point in points:
        bucket = int(point["Timestamp"] // period)
        if oldest <= bucket <= running and alarm.get("Unit") in (None, "", point["Unit"]):
            buckets.setdefault(bucket, []).append(point)

    def value(bucket: int) -> float | None:
        stats = cloudwatch._calc_stats(buckets.get(bucket, []))
        return cloudwatch._stat_value(stats, statistic, buckets[bucket]) if stats else None

    newest = running - 1
    current = value(running)
    if (
        current is not None
        and statistic in ONLY_GROWS
        and "Greater" in alarm["ComparisonOperator"]
        and BREACHES[alarm["ComparisonOperator"]](current, alarm["Threshold"])
    ):
        newest = running
    return [(bucket * period, value(bucket)) for bucket in range(newest, newest - count - RANGE_BEYOND, -1)]


def judge(alarm: dict, points: list[tuple[float, float | None]]) -> str | None:
    """The state that data points (newest first) put the alarm in; None to keep the state it has."""
    count = int(alarm.get("EvaluationPeriods") or 1)
    needed = int(alarm.get("DatapointsToAlarm") or count)
    breaches = BREACHES[alarm["ComparisonOperator"]]
    present = [value for _, value in points if value is not None][:count]
    breaching = sum(breaches(value, alarm["Threshold"]) for value in present)
    missing = count - len(present)
    treatment = alarm.get("TreatMissingData") or "missing"
    if breaching >= needed:
        return "ALARM"
    if not missing or treatment == "notBreaching":
        return "OK"
    if treatment == "breaching":
        return "ALARM" if breaching + missing >= needed else "OK"
    if breaching < len(present):  # a data point says that all is well
        return "OK"
    if treatment == "ignore":
        return None
    return "ALARM" if present else "INSUFFICIENT_DATA"


def reason(alarm: dict, state: str, points: list[tuple[float, float | None]]) -> str:
    """Why, in CloudWatch's words."""
    present = [(start, value) for start, value in points if value is not None][: int(alarm["EvaluationPeriods"])]
    if not present:
        return f"Threshold Crossed: no datapoints were received for {alarm['EvaluationPeriods']} period(s)."
    shown = ", ".join(f"{value} ({datetime.fromtimestamp(start, UTC):%d/%m/%y %H:%M:%S})" for start, value in present)
    plural = "s" if len(present) > 1 else ""
    verb = ("were " if plural else "was ") + ("" if state == "ALARM" else "not ")
    return (
        f"Threshold Crossed: {len(present)} datapoint{plural} [{shown}] {verb}"
        f"{WORDS[alarm['ComparisonOperator']]} the threshold ({alarm['Threshold']})."
    )


def evaluate_alarm(alarm: dict) -> None:
    """Put one metric alarm of the current account and region in the state that its data calls for."""
    if not alarm.get("Namespace") or not alarm.get("MetricName") or alarm.get("ComparisonOperator") not in BREACHES:
        return  # metric math and anomaly detection, which ministack refuses or does not have
    dimensions = cloudwatch._dims_key(cloudwatch._dims_from_list(alarm.get("Dimensions") or []))
    points = cloudwatch._metrics.get((alarm["Namespace"], alarm["MetricName"], dimensions)) or []
    judged = datapoints(alarm, list(points), time.time())
    old, new = alarm["StateValue"], judge(alarm, judged)
    if new is None or new == old:
        return
    why = reason(alarm, new, judged)
    alarm.update(StateValue=new, StateReason=why, StateUpdatedTimestamp=int(time.time()))
    cloudwatch._record_history(alarm["AlarmName"], old, new, why)
    cloudwatch._dispatch_alarm_actions(alarm, old, new, why)
    cloudwatch._evaluate_parent_alarms(alarm)


def evaluate_for_ever() -> None:
    """Judge all alarms of all accounts and regions, once a second."""
    while True:
        time.sleep(INTERVAL_SECONDS)
        for (account, region, name), alarm in list(cloudwatch._alarms._data.items()):
            try:
                responses.set_request_account_id(account)
                responses.set_request_region(region)
                evaluate_alarm(alarm)
            except Exception:  # one broken alarm must not stop the others
                logger.exception("alarm %s could not be evaluated", name)


def embedded_metrics(line: str) -> Iterator[tuple[str, str, dict, float, str, list[float]]]:
    """The metrics in one log line of the embedded metric format:
    (namespace, name, dimensions, timestamp in seconds, unit, values).

    https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch_Embedded_Metric_Format_Specification.html
    """
    start = line.find("{")
    if start < 0 or '"_aws"' not in line:
        return
    try:
        document = json.loads(line[start:])
        metadata = document["_aws"]
        for directive in metadata["CloudWatchMetrics"]:
            for names in directive.get("Dimensions") or [[]]:
                dimensions = {name: str(document[name]) for name in names}
                for metric in directive["Metrics"]:
                    found = document[metric["Name"]]
                    values = [float(value) for value in (found if isinstance(found, list) else [found])]
                    yield (
                        directive["Namespace"],
                        metric["Name"],
                        dimensions,
                        metadata["Timestamp"] / 1000,
                        metric.get("Unit", "None"),
                        values,
                    )
    except (KeyError, TypeError, ValueError):  # a line that only looks like one: CloudWatch drops it as well
        return


def install() -> None:
    """Replace the evaluator, start its timer, and read metrics from the logs of functions."""

    def here(name: str, *parameters: str, kind: type | None = None) -> Any:
        return expect("cloudwatch", cloudwatch, name, *parameters, kind=kind)

    for name, parameters in {
        "_evaluate_alarm": ("alarm",),
        "_evaluate_all_alarms": (),
        "_evaluate_parent_alarms": ("child",),
        "_record_history": ("alarm_name", "old_state", "new_state", "reason"),
        "_dispatch_alarm_actions": ("alarm", "old_state", "new_state", "reason"),
        "_calc_stats": ("points",),
        "_stat_value": ("stats", "stat_name", "points"),
        "_dims_key": ("dims",),
        "_dims_from_list": ("dimensions",),
    }.items():
        here(name, *parameters)
    here("_alarms", kind=responses.AccountRegionScopedDict)
    here("_metrics", kind=responses.AccountRegionScopedDict)
    store = here("_store_datum", "namespace", "name", "dims", "ts", "unit", "value", "values", "counts", "stat_values")
    emit = expect("cloudwatch", lambda_svc, "_emit_lambda_logs", "func", "request_id", "log_text")

    def emit_lambda_logs(func: dict, request_id: str, log_text: str, *more: Any, **named: Any) -> None:
        emit(func, request_id, log_text, *more, **named)
        for line in (log_text or "").splitlines():
            for namespace, name, dimensions, moment, unit, values in embedded_metrics(line):
                store(namespace, name, dimensions, moment, unit, None, values, None, None)

    cloudwatch._evaluate_alarm = evaluate_alarm
    cloudwatch._evaluate_all_alarms = lambda: None  # the timer does it
    lambda_svc._emit_lambda_logs = emit_lambda_logs
    threading.Thread(target=evaluate_for_ever, name="alarms", daemon=True).start()
