"""CloudWatch metrics in bounded space, refused where CloudWatch refuses them, and metrics from the logs of functions.

ministack keeps every data point as it came, for two weeks, and reads them all for each query: a function that is
called 50 times a second would fill the memory in a day. Here a metric keeps seconds for five minutes, minutes after
that, and forgets them after 15 days, as CloudWatch forgets minutes. It also answers for a metric without dimensions by
that metric alone; ministack mixes in those of every dimension.

`EMITTED` is what services publish by themselves; `record` refuses what is not in it. Traces of X-Ray are not kept.

For ministack's authors: `Series` in place of the lists in `cloudwatch._metrics`, the two queries' dimensions,
`refusal`, and the order of GetMetricData.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ministack.core import responses
from ministack.services import cloudwatch

from . import expect

logger = logging.getLogger("houndloop.metrics")

MINUTE = 60
# AWS keeps seconds for 3 hours, and percentiles for good. https://docs.aws.amazon.com/AmazonCloudWatch/latest/
# APIReference/API_GetMetricStatistics.html
SECONDS_KEPT = 5 * MINUTE  # older data points are a minute's, with their values to three digits
VALUES_KEPT = 3 * 60 * MINUTE  # older ones are statistic sets, of which CloudWatch knows no percentiles either
MINUTES_KEPT = 15 * 24 * 60 * MINUTE
# What is accepted. https://docs.aws.amazon.com/AmazonCloudWatch/latest/APIReference/API_MetricDatum.html
LARGEST = 2.0**360
OLDEST, NEWEST = -14 * 24 * 60 * MINUTE, 2 * 60 * MINUTE  # relative to now

Key = tuple[int, str]  # start, in seconds; unit


@dataclass(frozen=True)
class Emitted:
    """Metrics that a service publishes with one set of dimensions."""

    namespace: str
    dimensions: tuple[str, ...]
    units: dict[str, str]


_INVOCATIONS = {
    "Invocations": "Count",
    "Errors": "Count",
    "Throttles": "Count",
    "ConcurrentExecutions": "Count",
    "Duration": "Milliseconds",
}
_ENDPOINTS = {
    "Invocations": "None",
    "InvocationsPerInstance": "None",
    "Invocation4XXErrors": "None",
    "Invocation5XXErrors": "None",
    "InvocationModelErrors": "None",
    "ModelLatency": "Microseconds",
    "OverheadLatency": "Microseconds",
}


def _of_tasks(singular: str, plural: str) -> dict[str, str]:
    counts = {f"{plural}{end}": "Count" for end in ("Scheduled", "Started", "Succeeded", "Failed", "TimedOut")}
    return counts | {f"{singular}{end}": "Milliseconds" for end in ("Time", "RunTime", "ScheduleTime")}


# https://docs.aws.amazon.com/lambda/latest/dg/monitoring-metrics-types.html
# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-available-cloudwatch-metrics.html
# https://docs.aws.amazon.com/step-functions/latest/dg/procedure-cw-metrics.html
# https://docs.aws.amazon.com/sagemaker/latest/dg/monitoring-cloudwatch.html (recorded by local/sagemaker)
EMITTED = (
    Emitted("AWS/Lambda", ("FunctionName",), _INVOCATIONS),
    Emitted("AWS/Lambda", (), _INVOCATIONS),
    Emitted(
        "AWS/SQS",
        ("QueueName",),
        {
            "ApproximateNumberOfMessagesVisible": "Count",
            "ApproximateNumberOfMessagesNotVisible": "Count",
            "ApproximateNumberOfMessagesDelayed": "Count",
            "ApproximateAgeOfOldestMessage": "Seconds",
            "NumberOfMessagesSent": "Count",
            "NumberOfMessagesReceived": "Count",
            "NumberOfMessagesDeleted": "Count",
            "NumberOfEmptyReceives": "Count",
            "SentMessageSize": "Bytes",
        },
    ),
    Emitted(
        "AWS/States",
        ("StateMachineArn",),
        {
            "ExecutionsStarted": "Count",
            "ExecutionsSucceeded": "Count",
            "ExecutionsFailed": "Count",
            "ExecutionsAborted": "Count",
            "ExecutionsTimedOut": "Count",
            "ExecutionTime": "Milliseconds",
        },
    ),
    Emitted("AWS/States", ("LambdaFunctionArn",), _of_tasks("LambdaFunction", "LambdaFunctions")),
    Emitted("AWS/States", ("ServiceIntegrationResourceArn",), _of_tasks("ServiceIntegration", "ServiceIntegrations")),
    Emitted("AWS/SageMaker", ("EndpointName", "VariantName"), _ENDPOINTS),
    Emitted("AWS/SageMaker", ("EndpointName", "VariantName", "EndpointConfigName"), _ENDPOINTS),
)
_UNITS = {(group.namespace, group.dimensions, name): unit for group in EMITTED for name, unit in group.units.items()}

samplers: list[Callable[[float], None]] = []  # called once a second with the time, for metrics that are levels
_lock = threading.RLock()
_compacted = 0.0


def record(namespace: str, name: str, value: float, dimensions: dict[str, str], moment: float | None = None) -> None:
    """Publish a data point of a service's own metric, in the current account and region.

    Raises:
        KeyError: `EMITTED` has no such metric.
    """
    unit = _UNITS[namespace, tuple(dimensions), name]
    cloudwatch._store_datum(
        namespace, name, dimensions, time.time() if moment is None else moment, unit, value, None, None, None
    )


# --- Storage ---------------------------------------------------------------------------------------------------------


class Series:
    """The data points of one metric, with the interface of the list that ministack keeps them in.

    A data point stands for a second, later for a minute: a statistic set (`_stat`) with the number of times that each
    value was seen (`_values`), for percentiles. Count, sum, minimum and maximum stay exact throughout. A data point
    that was given out never changes, it is replaced, so that whoever saves the state need not copy it.
    """

    def __init__(self, points: Iterable[dict] = ()) -> None:
        self._points: dict[Key, dict] = {}
        self._order: list[Key] = []
        self._own: set[Key] = set()  # data points that were not given out since they were made, and may be changed
        self._minutes_before = self._sets_before = 0  # older points stand for a minute, have no values any more
        for point in points:
            self.append(point)

    def append(self, point: dict) -> None:
        """Add a data point as ministack makes them: a value seen `Count` times, or a statistic set."""
        count, total, low, high = cloudwatch._point_stats(point)
        if count <= 0:
            return
        second, unit = int(point["Timestamp"] // 1), point.get("Unit") or "None"
        with _lock:
            late = second < self._minutes_before
            start = second - second % MINUTE if late else second
            key = (start, unit)
            if key not in self._points:
                insort(self._order, key)
                self._points[key] = _empty(key, point.get("Dimensions") or {})
            elif key not in self._own:
                self._points[key] = _copied(self._points[key])
            self._own.add(key)
            values = None if start < self._sets_before else _values(point)
            _merge(self._points[key], (count, total, low, high), values, rounded=late)

    def compact(self, now: float) -> None:
        """Make minutes of what is old enough, and forget what is older still."""
        minutes, sets, kept = (int((now - age) // MINUTE) * MINUTE for age in (SECONDS_KEPT, VALUES_KEPT, MINUTES_KEPT))
        with _lock:
            merged: dict[Key, dict] = {}
            slice_ = self._slice(self._minutes_before, minutes)
            for start, unit in self._order[slice_]:
                point = self._points.pop((start, unit))
                key = (start - start % MINUTE, unit)
                minute = merged.setdefault(key, _empty(key, point["Dimensions"]))
                _merge(minute, cloudwatch._point_stats(point), point["_values"], rounded=True)
            self._order[slice_] = sorted(merged)
            self._points.update(merged)
            for key in self._order[self._slice(self._sets_before, sets)]:
                self._points[key] = {**self._points[key], "_values": None}
            for key in self._order[self._slice(0, kept)]:
                del self._points[key]
            del self._order[self._slice(0, kept)]
            self._own.clear()
            self._minutes_before, self._sets_before = minutes, sets

    def since(self, moment: float) -> list[dict]:
        """The data points of this time and later, oldest first."""
        with _lock:
            self._own.clear()
            first = bisect_left(self._order, (math.floor(moment), ""))
            return [self._points[key] for key in self._order[first:]]

    def _slice(self, start: int, end: int) -> slice:
        return slice(bisect_left(self._order, (start, "")), bisect_left(self._order, (end, "")))

    def __iter__(self) -> Iterator[dict]:
        return iter(self.since(0))

    def __getitem__(self, index: int) -> dict:
        with _lock:
            self._own.clear()
            return self._points[self._order[index]]

    def __len__(self) -> int:
        return len(self._order)

    def __deepcopy__(self, memo: dict) -> list[dict]:
        """A copy is a plain list, which is what ministack makes one for: to save it as JSON."""
        return list(self)


def _empty(key: Key, dimensions: dict) -> dict:
    start, unit = key
    return {"Timestamp": float(start), "Unit": unit, "Dimensions": dimensions, "_stat": {}, "_values": {}}


def _values(point: dict) -> dict[float, float] | None:
    """How often a data point saw each value; None where only its statistics are known."""
    if "_values" in point:  # of a Series, perhaps one that was saved as JSON, with text for keys
        return point["_values"] and {float(value): float(count) for value, count in point["_values"].items()}
    count, total, low, high = cloudwatch._point_stats(point)
    return {low: count} if low == high and total == low * count else None


def _copied(point: dict) -> dict:
    values = point["_values"]
    return {**point, "_stat": dict(point["_stat"]), "_values": values if values is None else dict(values)}


def _merge(point: dict, stats: tuple, values: dict[float, float] | None, rounded: bool) -> None:
    """Add statistics, and how often each value was seen, to a data point that nobody else has."""
    count, total, low, high = stats
    had, seen = point["_stat"], point["_values"]
    if values is None or seen is None:
        point["_values"] = None
    else:
        for value, times in values.items():
            value = float(f"{value:.3g}") if rounded else value
            seen[value] = seen.get(value, 0.0) + times
    had["SampleCount"] = had.get("SampleCount", 0.0) + count
    had["Sum"] = had.get("Sum", 0.0) + total
    had["Minimum"] = min(had.get("Minimum", low), low)
    had["Maximum"] = max(had.get("Maximum", high), high)


def series(key: tuple[str, str, str]) -> Series:
    """The metric of (namespace, name, dimensions' key) in the current account and region, made if there is none."""
    with _lock:
        if key not in cloudwatch._metrics:
            cloudwatch._metrics[key] = Series()
        return cloudwatch._metrics[key]


def _restoring(original: Callable[[dict], None]) -> Callable[[dict], None]:
    def restore_state(data: dict) -> None:
        """As the original, of which the metrics are plain lists."""
        original(data)
        for key, points in cloudwatch._metrics.all_items():
            cloudwatch._metrics.set_scoped(*key, Series(points))

    return restore_state


def compact(now: float) -> None:
    """Compact every metric of every account and region, and forget those without data points."""
    for key, points in cloudwatch._metrics.all_items():
        points.compact(now)
        if not points:
            cloudwatch._metrics.pop_scoped(*key, None)


def _compact_each_minute(now: float) -> None:
    global _compacted
    if now - _compacted >= MINUTE:
        _compacted = now
        compact(now)


def tick(now: float) -> None:
    """What has to be done once a second: take samples, and, once a minute, compact."""
    for task in (*samplers, _compact_each_minute):
        try:
            task(now)
        except Exception:  # one service's metrics must not stop the others', nor the alarms
            logger.exception("%s.%s failed", task.__module__, task.__name__)


# --- Refusals --------------------------------------------------------------------------------------------------------


def refusal(data: list[dict], now: float) -> str | None:
    """Why CloudWatch takes no data point of a PutMetricData request, which is whole or not at all; None if it does."""
    for number, datum in enumerate(data, 1):
        name = f"MetricData.member.{number}"
        given = [("Value", datum.get("Value")), *(("Values", value) for value in datum.get("Values") or [])]
        given += [(f"StatisticValues.{each}", value) for each, value in (datum.get("StatisticValues") or {}).items()]
        for member, value in given:
            if value is not None and not abs(float(value)) <= LARGEST:  # NaN, which comes as text, is not either
                return f"The value {value} for parameter {name}.{member} is invalid."
        if datum.get("Counts") and len(datum["Counts"]) != len(datum.get("Values") or []):
            return f"The parameters {name}.Values and {name}.Counts must be of the same size."
        age = (cloudwatch._parse_ts(datum.get("Timestamp")) or now) - now
        if age < OLDEST:
            return f"The parameter {name}.Timestamp must specify a time within the past two weeks."
        if age > NEWEST:
            return f"The parameter {name}.Timestamp must specify a time no more than two hours in the future."
    return None


def _refusing(original: Callable[..., tuple]) -> Callable[..., tuple]:
    def put_metric_data(params: dict, cbor_data: dict, is_cbor: bool, is_json: bool = False) -> tuple:
        refused = refusal(cbor_data.get("MetricData") or [], time.time())
        if refused:
            return cloudwatch._error("InvalidParameterValue", refused, 400, use_json=is_json, use_cbor=is_cbor)
        return original(params, cbor_data, is_cbor, is_json)

    return put_metric_data


# --- Embedded metric format ------------------------------------------------------------------------------------------

MAX_METRICS, MAX_VALUES, MAX_DIMENSIONS = 100, 100, 30  # of the specification, per directive, metric and set
SIZES = ("Bytes", "Kilobytes", "Megabytes", "Gigabytes", "Terabytes", "Bits", "Kilobits", "Megabits", "Gigabits")
STANDARD_UNITS = {"Seconds", "Microseconds", "Milliseconds", "Percent", "Count", "Count/Second", "None"}.union(
    (*SIZES, "Terabits"), (f"{size}/Second" for size in (*SIZES, "Terabits"))
)


def embedded_metrics(line: str, now: float) -> list[tuple[str, str, dict, float, str, list[float]]]:
    """The metrics in one log line of the embedded metric format:
    (namespace, name, dimensions, timestamp in seconds, unit, values). A line that breaks the format has none.

    StorageResolution needs no heed: everything has the resolution of a second here.
    https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch_Embedded_Metric_Format_Specification.html
    """
    start = line.find("{")  # Lambda may write the time and the request's id before it
    if start < 0 or '"_aws"' not in line:
        return []
    try:
        document = json.loads(line[start:])
        metadata = document["_aws"]
        moment = metadata["Timestamp"] / 1000
        if not OLDEST <= moment - now <= NEWEST:
            return []
        return [
            (_text(directive["Namespace"]), name, dimensions, moment, unit, values)
            for directive in metadata["CloudWatchMetrics"]
            for name, unit, values in _targets(document, directive["Metrics"])
            for dimensions in (_dimension_set(document, names) for names in directive["Dimensions"])
        ]
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return []


def _targets(document: dict, definitions: list[dict]) -> list[tuple[str, str, list[float]]]:
    found = []
    for definition in definitions:
        value, unit = document[definition["Name"]], definition.get("Unit", "None")
        values = value if isinstance(value, list) else [value]
        if len(values) > MAX_VALUES or unit not in STANDARD_UNITS:
            raise ValueError(definition)
        if any(isinstance(each, bool) or not isinstance(each, (int, float)) for each in values):
            raise TypeError(definition)
        if not all(abs(each) <= LARGEST for each in values):  # nor is NaN
            raise ValueError(definition)
        found.append((_text(definition["Name"]), unit, [float(each) for each in values]))
    if len(found) > MAX_METRICS:
        raise ValueError(definitions)
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _dimension_set(document: dict, names: list[str]) -> dict[str, str]:
    dimensions = {name: document[name] for name in names}
    if len(names) > MAX_DIMENSIONS or not all(isinstance(value, str) for value in dimensions.values()):
        raise ValueError(names)
    return dimensions


# --- Queries ---------------------------------------------------------------------------------------------------------


def _newest_first(original: Callable[..., tuple]) -> Callable[..., tuple]:
    def get_metric_data(params: dict, cbor_data: dict, is_cbor: bool, is_json: bool = False) -> tuple:
        """As the original, whose results are always oldest first."""
        status, headers, body = original(params, cbor_data, is_cbor, is_json)
        if status != 200 or not is_json or cbor_data.get("ScanBy") == "TimestampAscending":
            return status, headers, body
        answer = json.loads(body)
        for result in answer["MetricDataResults"]:
            result["Timestamps"].reverse()
            result["Values"].reverse()
        return status, headers, json.dumps(answer).encode()

    return get_metric_data


# --- Installation ----------------------------------------------------------------------------------------------------


class Exactly(dict):
    """Dimensions that a query means as they are, none included: ministack takes an empty mapping for "any"."""

    def __bool__(self) -> bool:
        return True


def install() -> None:
    """Replace how ministack stores metrics, and what a query's dimensions mean."""

    def here(name: str, *parameters: str, kind: type | None = None) -> Any:
        return expect("metrics", cloudwatch, name, *parameters, kind=kind)

    here("_metrics", kind=responses.AccountRegionScopedDict)
    here("_metric_bucket", "key")
    here("_evict_old_metrics")
    here("_point_stats", "pt")
    here("_store_datum", "namespace", "name", "dims", "ts", "unit", "value", "values", "counts", "stat_values")
    dimensions_of = here("_dims_from_list", "dimensions")
    samples_of = here("_percentile_samples", "points")

    def percentile_samples(points: list[dict]) -> list[tuple[float, float]] | None:
        samples: list[tuple[float, float]] = []
        for point in points:
            values = point.get("_values")
            found = list(values.items()) if values else samples_of([point])
            if not found or min(found)[0] < 0:  # CloudWatch has none for a period with negative values
                return None
            samples += found
        return samples or None

    here("_parse_ts", "value")
    here("_error", "code", "message", "status", "use_json", "use_cbor")
    cloudwatch._get_metric_data = _newest_first(here("_get_metric_data", "params", "cbor_data", "is_cbor", "is_json"))
    cloudwatch._put_metric_data = _refusing(here("_put_metric_data", "params", "cbor_data", "is_cbor", "is_json"))
    cloudwatch._metric_bucket = series
    cloudwatch._restore_state = _restoring(here("_restore_state", "data"))
    cloudwatch._evict_old_metrics = lambda: None  # `compact` does it
    cloudwatch._percentile_samples = percentile_samples
    cloudwatch._dims_from_list = lambda dimensions: Exactly(dimensions_of(dimensions))
