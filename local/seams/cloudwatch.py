"""CloudWatch alarms that judge what AWS would judge, and tell EventBridge.

ministack's alarms mix all dimensions of a metric, know nothing of missing data, and look only when somebody puts a
metric: a rollback guarded by one would happen, or not, for the wrong reason. This evaluator follows
https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/alarm-evaluation.html once a second.

What it cannot judge (metric math, anomaly detection, trimmed means, suppressed composite alarms) is refused by name;
ministack accepts such an alarm and never evaluates it. Periods may be any number of seconds, for tests. Actions other
than SNS topics and scaling policies (`autoscaling`) do nothing.

For ministack's authors: `datapoints`, `judge` and the timer as the evaluator, the event, and the refusals.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from ministack.core import responses
from ministack.services import cloudwatch, eventbridge

from . import expect, metrics

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
        and _breaches(alarm, current)
    ):
        newest = running
    return [(bucket * period, value(bucket)) for bucket in range(newest, newest - count - RANGE_BEYOND, -1)]


def judge(alarm: dict, points: list[tuple[float, float | None]]) -> str | None:
    """The state that data points (newest first) put the alarm in; None to keep the state it has."""
    count = int(alarm.get("EvaluationPeriods") or 1)
    needed = int(alarm.get("DatapointsToAlarm") or count)
    present = [value for _, value in points if value is not None][:count]
    breaching = sum(_breaches(alarm, value) for value in present)
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
    if not present:
        return "INSUFFICIENT_DATA"
    # Too little data, and all of it breaches: not before the oldest point is as old as so many data points would be.
    oldest = max(age for age, (_, value) in enumerate(points, start=1) if value is not None)
    return "ALARM" if oldest >= needed else None


def reason(alarm: dict, state: str, points: list[tuple[float, float | None]]) -> str:
    """Why, in CloudWatch's words."""
    count = int(alarm["EvaluationPeriods"])
    present = [(start, value) for start, value in points if value is not None][:count]
    many = count > 1
    if not present and state == "INSUFFICIENT_DATA":
        return f"Insufficient Data: {count} datapoint{'s were' if many else ' was'} unknown."
    if not present:
        treatment = "Breaching" if alarm.get("TreatMissingData") == "breaching" else "NonBreaching"
        return (
            f"Threshold Crossed: no datapoints were received for {count} period{'s' if many else ''} and "
            f"{count} missing datapoint{'s were' if many else ' was'} treated as [{treatment}]."
        )
    agreeing = [point for point in present if _breaches(alarm, point[1]) == (state == "ALARM")]
    shown = ", ".join(f"{value} ({datetime.fromtimestamp(start, UTC):%d/%m/%y %H:%M:%S})" for start, value in agreeing)
    verb = ("were " if len(agreeing) > 1 else "was ") + ("" if state == "ALARM" else "not ")
    counted, least = f"{len(agreeing)} datapoint{'s' if len(agreeing) > 1 else ''}", ""
    if alarm.get("DatapointsToAlarm"):
        counted = f"{len(agreeing)} out of the last {count} datapoints"
        needed = int(alarm["DatapointsToAlarm"])
        needed, change = (needed, "OK -> ALARM") if state == "ALARM" else (count - needed + 1, "ALARM -> OK")
        least = f" (minimum {needed} datapoint{'s' if needed > 1 else ''} for {change} transition)"
    operator = WORDS[alarm["ComparisonOperator"]]
    return f"Threshold Crossed: {counted} [{shown}] {verb}{operator} the threshold ({alarm['Threshold']}){least}."


def _breaches(alarm: dict, value: float | None) -> bool:
    return value is not None and BREACHES[alarm["ComparisonOperator"]](value, alarm["Threshold"])


def reason_data(alarm: dict, points: list[tuple[float, float | None]], now: float) -> str:
    """Why, as JSON: the data points in question, oldest first."""
    present = [(start, value) for start, value in points if value is not None][: int(alarm["EvaluationPeriods"])]
    data: dict[str, Any] = {"version": "1.0", "queryDate": _stamp(now)}
    if present:
        data["startDate"] = _stamp(present[-1][0])
    if alarm.get("Unit"):
        data["unit"] = alarm["Unit"]
    data |= {
        "statistic": alarm.get("ExtendedStatistic") or alarm.get("Statistic"),
        "period": int(alarm["Period"]),
        "recentDatapoints": [value for _, value in reversed(present)],
        "threshold": alarm["Threshold"],
        "evaluatedDatapoints": [{"timestamp": _stamp(start), "value": value} for start, value in present],
    }
    return json.dumps(data)


def _stamp(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "+0000")


def evaluate_alarm(alarm: dict) -> None:
    """Put one metric alarm of the current account and region in the state that its data calls for."""
    if not alarm.get("Namespace") or not alarm.get("MetricName") or alarm.get("ComparisonOperator") not in BREACHES:
        return  # of a stack: ministack's CloudFormation takes what PutMetricAlarm refuses
    dimensions = cloudwatch._dims_key(cloudwatch._dims_from_list(alarm.get("Dimensions") or []))
    series = cloudwatch._metrics.get((alarm["Namespace"], alarm["MetricName"], dimensions))
    now = time.time()
    looked_at = (int(alarm["EvaluationPeriods"]) + RANGE_BEYOND + 1) * int(alarm["Period"])
    judged = datapoints(alarm, series.since(now - looked_at) if series else [], now)
    old, new = alarm["StateValue"], judge(alarm, judged)
    if new is None or new == old:
        return
    why = reason(alarm, new, judged)
    alarm.update(
        StateValue=new,
        StateReason=why,
        StateReasonData=reason_data(alarm, judged, now),
        StateUpdatedTimestamp=int(now),
        StateTransitionedTimestamp=int(now),
    )
    cloudwatch._record_history(alarm["AlarmName"], old, new, why)
    cloudwatch._dispatch_alarm_actions(alarm, old, new, why)
    cloudwatch._evaluate_parent_alarms(alarm)


def evaluate_for_ever() -> None:
    """Keep the metrics, and judge all alarms of all accounts and regions, once a second."""
    while True:
        time.sleep(INTERVAL_SECONDS)
        metrics.tick(time.time())
        for (account, region, name), alarm in list(cloudwatch._alarms._data.items()):
            try:
                with responses.request_scope(account, region):
                    evaluate_alarm(alarm)
            except Exception:  # one broken alarm must not stop the others
                logger.exception("alarm %s could not be evaluated", name)


# --- Events ----------------------------------------------------------------------------------------------------------

_told: dict[str, dict] = {}  # the state that EventBridge was last told of, by the alarm's ARN


def state_change(alarm: dict, previous: dict) -> dict:
    """The detail of the event "CloudWatch Alarm State Change".

    https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/cloudwatch-and-eventbridge.html
    """
    configuration: dict[str, Any] = {"description": alarm.get("AlarmDescription") or ""}
    if "AlarmRule" in alarm:
        configuration["alarmRule"] = alarm["AlarmRule"]
    else:
        metric = {
            "namespace": alarm["Namespace"],
            "name": alarm["MetricName"],
            "dimensions": {each["Name"]: each["Value"] for each in alarm.get("Dimensions") or []},
        }
        stat = alarm.get("ExtendedStatistic") or alarm.get("Statistic")
        configuration["metrics"] = [
            {
                "id": alarm["AlarmArn"].rsplit(":", 1)[-1],
                "metricStat": {"metric": metric, "period": int(alarm["Period"]), "stat": stat},
                "returnData": True,
            }
        ]
    return {
        "alarmName": alarm["AlarmName"],
        "configuration": configuration,
        "previousState": previous,
        "state": _state(alarm),
    }


def _state(alarm: dict) -> dict:
    state = {
        "value": alarm["StateValue"],
        "reason": alarm["StateReason"],
        "timestamp": _stamp(alarm["StateUpdatedTimestamp"]),
    }
    return state | ({"reasonData": alarm["StateReasonData"]} if alarm.get("StateReasonData") else {})


def _telling(original: Callable[[dict, str, str, str], None]) -> Callable[[dict, str, str, str], None]:
    def dispatch_alarm_actions(alarm: dict, old_state: str, new_state: str, reason: str) -> None:
        """As the original, and the event, which needs no actions enabled."""
        original(alarm, old_state, new_state, reason)
        previous, _told[alarm["AlarmArn"]] = _told.get(alarm["AlarmArn"], {}), _state(alarm)
        if previous.get("value") != old_state:  # not told yet in this process
            previous = {"value": old_state}
        entry = {
            "Source": "aws.cloudwatch",
            "DetailType": "CloudWatch Alarm State Change",
            "Detail": json.dumps(state_change(alarm, previous)),
            "Resources": [alarm["AlarmArn"]],
        }
        try:
            eventbridge._put_events({"Entries": [entry]}, allow_aws_source=True)
        except Exception:  # a target that fails must not keep the alarm from its parents
            logger.exception("the change of %s was not told", alarm["AlarmArn"])

    return dispatch_alarm_actions


# --- Refusals --------------------------------------------------------------------------------------------------------

ALARM_MEMBERS = {
    *("AlarmName", "AlarmDescription", "ActionsEnabled", "AlarmActions", "OKActions", "InsufficientDataActions"),
    *("Namespace", "MetricName", "Dimensions", "Unit", "Statistic", "ExtendedStatistic", "Period", "Threshold"),
    *("EvaluationPeriods", "DatapointsToAlarm", "ComparisonOperator", "TreatMissingData", "Tags"),
}
COMPOSITE_MEMBERS = {
    *("AlarmName", "AlarmDescription", "ActionsEnabled", "AlarmActions", "OKActions", "InsufficientDataActions"),
    *("AlarmRule", "Tags"),
}
STATES = ("INSUFFICIENT_DATA", "ALARM", "OK")
STATISTICS = ("Maximum", "SampleCount", "Sum", "Minimum", "Average")
TREATMENTS = ("breaching", "notBreaching", "ignore", "missing")
NO_EFFECT = {"EvaluateLowSampleCountPercentile": "evaluate"}  # accepted where it says what is done anyway


def refusal(action: str, members: set[str], request: dict) -> tuple[str, str, int] | None:
    """Code, message and HTTP status for a request that has what is not there, or that AWS refuses too."""
    for name, value in request.items():
        if name not in members and value not in (None, [], NO_EFFECT.get(name)):
            return "NotImplemented", f"{action} with {name} is not implemented by the local CloudWatch.", 501
    extended = request.get("ExtendedStatistic")
    if extended and not re.fullmatch(r"p\d{1,2}(\.\d+)?|p100", extended):
        return "NotImplemented", f"The statistic {extended} is not implemented by the local CloudWatch.", 501
    if extended and request.get("Statistic"):
        message = "The parameters Statistic and ExtendedStatistic are mutually exclusive, and you have specified both."
        return "InvalidParameterCombination", message, 400
    if action == "PutMetricAlarm":
        for name in ("MetricName", "Namespace"):
            if not request.get(name):
                return "ValidationError", f"{name} must not be null", 400
        if request.get("Statistic") not in (None, *STATISTICS):
            return "ValidationError", _no_member("statistic", request["Statistic"], STATISTICS), 400
        if request.get("TreatMissingData") not in (None, *TREATMENTS):
            return "ValidationError", _no_member("treatMissingData", request["TreatMissingData"], TREATMENTS), 400
        if request.get("ComparisonOperator") not in BREACHES:
            return "NotImplemented", f"ComparisonOperator {request.get('ComparisonOperator')} is not implemented.", 501
        if int(request.get("DatapointsToAlarm") or 1) > int(request.get("EvaluationPeriods") or 1):
            message = "The parameter DatapointsToAlarm must not be greater than EvaluationPeriods."
            return "ValidationError", message, 400
    return None


def _no_member(name: str, value: str, members: tuple[str, ...]) -> str:
    return (
        f"1 validation error detected: Value '{value}' at '{name}' failed to satisfy constraint: "
        f"Member must satisfy enum value set: [{', '.join(members)}]"
    )


def _refusing(action: str, members: set[str], original: Callable[..., tuple]) -> Callable[..., tuple]:
    def put_alarm(params: dict, cbor_data: dict, is_cbor: bool, is_json: bool = False) -> tuple:
        request = cbor_data
        if not (is_cbor or is_json):
            request = {name.split(".")[0]: cloudwatch._p(params, name) for name in params}
            request = {name: value for name, value in request.items() if name not in ("Action", "Version")}
        refused = refusal(action, members, request)
        if refused:
            return cloudwatch._error(*refused, use_json=is_json, use_cbor=is_cbor)
        return original(params, cbor_data, is_cbor, is_json)

    return put_alarm


def _setting(original: Callable[..., tuple]) -> Callable[..., tuple]:
    def set_alarm_state(params: dict, cbor_data: dict, is_cbor: bool, is_json: bool = False) -> tuple:
        """As the original, which takes any state, and leaves the data of the reason before."""
        name, state = (cbor_data.get(member) or cloudwatch._p(params, member) for member in ("AlarmName", "StateValue"))
        if state not in STATES:
            message = _no_member("stateValue", state, STATES)
            return cloudwatch._error("ValidationError", message, 400, use_json=is_json, use_cbor=is_cbor)
        cloudwatch._alarms.get(name, {}).pop("StateReasonData", None)
        return original(params, cbor_data, is_cbor, is_json)

    return set_alarm_state


def install() -> None:
    """Replace the evaluator, start its timer, and add what an alarm tells and refuses."""

    def here(name: str, *parameters: str, kind: type | None = None) -> Any:
        return expect("cloudwatch", cloudwatch, name, *parameters, kind=kind)

    for name, parameters in {
        "_evaluate_alarm": ("alarm",),
        "_evaluate_all_alarms": (),
        "_evaluate_parent_alarms": ("child",),
        "_record_history": ("alarm_name", "old_state", "new_state", "reason"),
        "_calc_stats": ("points",),
        "_stat_value": ("stats", "stat_name", "points"),
        "_dims_key": ("dims",),
        "_p": ("params", "key"),
        "_error": ("code", "message", "status", "use_json", "use_cbor"),
    }.items():
        here(name, *parameters)
    here("_alarms", kind=responses.AccountRegionScopedDict)
    expect("cloudwatch", eventbridge, "_put_events", "data", "allow_aws_source")
    dispatch = here("_dispatch_alarm_actions", "alarm", "old_state", "new_state", "reason")
    put_alarm = here("_put_metric_alarm", "params", "cbor_data", "is_cbor", "is_json")
    put_composite = here("_put_composite_alarm", "params", "cbor_data", "is_cbor", "is_json")
    set_state = here("_set_alarm_state", "params", "cbor_data", "is_cbor", "is_json")

    cloudwatch._evaluate_alarm = evaluate_alarm
    cloudwatch._evaluate_all_alarms = lambda: None  # the timer does it
    cloudwatch._dispatch_alarm_actions = _telling(dispatch)
    cloudwatch._put_metric_alarm = _refusing("PutMetricAlarm", ALARM_MEMBERS, put_alarm)
    cloudwatch._put_composite_alarm = _refusing("PutCompositeAlarm", COMPOSITE_MEMBERS, put_composite)
    cloudwatch._set_alarm_state = _setting(set_state)
    threading.Thread(target=evaluate_for_ever, name="alarms", daemon=True).start()
