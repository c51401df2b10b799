"""Metrics in bounded space, the embedded metric format, and data for what the template watches."""

import copy
import json
import re

import pytest
from ministack.services import cloudwatch, cloudwatch_logs

from local.emulator import ACCOUNT, REGION
from local.sagemaker import router
from local.seams import logs, metrics
from local.seams.metrics import MINUTE, SECONDS_KEPT, VALUES_KEPT, Series, embedded_metrics
from tests.makers import template

T0 = 1_700_000_040  # a whole minute


def fill(seconds, per_second=4, start=T0):
    """A series of latencies from 10 to 19.9 that was kept, as the timer does, once a minute."""
    series = Series()
    for second in range(seconds):
        for n in range(per_second):
            value = 10 + (second * per_second + n) % 100 / 10
            series.append({"Timestamp": start + second + n / per_second, "Unit": "Milliseconds", "Value": value})
        if second % MINUTE == 0:
            series.compact(start + second)
    series.compact(start + seconds)
    return series


# --- Storage ---


def test_a_day_of_data_takes_a_data_point_a_minute():
    day = 24 * 60 * MINUTE
    series = fill(day, per_second=1)
    assert len(series) <= SECONDS_KEPT + MINUTE + day / MINUTE
    assert sum(len(point["_values"] or ()) for point in series) <= SECONDS_KEPT + MINUTE + VALUES_KEPT  # 1 a second
    stats = cloudwatch._calc_stats(list(series))
    assert (stats["SampleCount"], stats["Minimum"], stats["Maximum"]) == (day, 10.0, 19.9)
    assert stats["Sum"] == pytest.approx(day * 14.95)


def test_more_data_in_a_second_takes_no_more_data_points():
    assert len(fill(10 * MINUTE, per_second=50)) == len(fill(10 * MINUTE, per_second=1))


def test_data_is_forgotten_after_fifteen_days():
    series = fill(2 * MINUTE)
    series.compact(T0 + metrics.MINUTES_KEPT + MINUTE)
    assert len(series) == 1
    series.compact(T0 + metrics.MINUTES_KEPT + 2 * MINUTE)
    assert len(series) == 0


def test_percentiles_last_for_three_hours():
    series = fill(VALUES_KEPT + 10 * MINUTE, per_second=1)
    young = series.since(T0 + 20 * MINUTE)
    samples = [{"Value": value, "Count": n} for point in young for value, n in point["_values"].items()]
    assert cloudwatch._percentile(cloudwatch._percentile_samples(samples), 50) == pytest.approx(15, rel=0.01)
    assert series[0]["_values"] is None


def test_late_data_goes_to_the_minute_it_belongs_to():
    series = fill(20 * MINUTE, per_second=1)
    before = len(series)
    series.append({"Timestamp": T0 + 90, "Unit": "Milliseconds", "Value": 1000.0})
    assert len(series) == before
    assert next(point for point in series if point["Timestamp"] == T0 + 60)["_stat"]["Maximum"] == 1000.0


def test_a_data_point_that_was_given_out_does_not_change():
    series = fill(1)
    before = list(series)
    kept = copy.deepcopy(before[0])
    series.append({"Timestamp": T0, "Unit": "Milliseconds", "Value": 7.0})
    assert before == [kept] and series[0]["_stat"]["Minimum"] == 7.0


def test_units_are_kept_apart():
    series = Series()
    for unit in ("Count", "Bytes", "Count"):
        series.append({"Timestamp": T0, "Unit": unit, "Value": 1.0})
    assert {point["Unit"]: point["_stat"]["SampleCount"] for point in series} == {"Count": 2.0, "Bytes": 1.0}


def test_a_copy_is_plain_and_a_series_can_be_made_of_it_again():
    series = fill(VALUES_KEPT + 10 * MINUTE, per_second=1)
    series.append({"Timestamp": T0 + VALUES_KEPT, "_stat": {"SampleCount": 2, "Sum": 5, "Minimum": 1, "Maximum": 4}})
    saved = json.loads(json.dumps(copy.deepcopy(series)))
    assert list(Series(saved)) == list(series)


def test_only_what_is_declared_is_recorded():
    with pytest.raises(KeyError):
        metrics.record("AWS/SQS", "NumberOfMessagesLost", 1, {"QueueName": "q"})
    with pytest.raises(KeyError):
        metrics.record("AWS/SQS", "NumberOfMessagesSent", 1, {"Queue": "q"})


# --- Embedded metric format ---


def document(definitions, dimensions=(("service",),), **members):
    directive = {"Namespace": "N", "Dimensions": dimensions, "Metrics": definitions}
    metadata = {"Timestamp": T0 * 1000, "CloudWatchMetrics": [directive]}
    return json.dumps({"_aws": metadata, "service": "s", **members})


def test_each_dimension_set_makes_a_metric_of_all_values():
    line = document([{"Name": "Seen", "Unit": "Count"}], [["service"], []], Seen=[1, 2])
    assert embedded_metrics(line, T0) == [
        ("N", "Seen", {"service": "s"}, float(T0), "Count", [1.0, 2.0]),
        ("N", "Seen", {}, float(T0), "Count", [1.0, 2.0]),
    ]


def test_what_lambda_writes_before_the_document_does_no_harm():
    line = document([{"Name": "Seen", "StorageResolution": 1}], Seen=1.5)
    found = embedded_metrics(f"2026-11-22T10:00:00Z 8f5e7b8e-0000 INFO {line}", T0)
    assert found == [("N", "Seen", {"service": "s"}, float(T0), "None", [1.5])]


@pytest.mark.parametrize(
    "line",
    [
        "{'_aws'}",
        '{"_aws": {}, "other": "thing"}',
        document([{"Name": "Seen"}], Seen="3"),
        document([{"Name": "Seen"}], Seen=[1, True]),
        document([{"Name": "Seen"}], Seen=[1] * 101),
        document([{"Name": "Seen", "Unit": "Parsecs"}], Seen=1),
        document([{"Name": "Seen"}]),
        document([{"Name": "Seen"}], [["region"]], Seen=1),
        document([{"Name": "Seen"}], [["Seen"]], Seen=1),
        document([{"Name": f"m{n}"} for n in range(101)], **{f"m{n}": 1 for n in range(101)}),
        document([{"Name": "Seen"}], Seen=1) + " and more",
        document([{"Name": "Seen"}], Seen=float("nan")),
        document([{"Name": "Seen"}], Seen=10**400),
        document([{"Name": "Seen"}], Seen=1).replace('"N"', "[1]"),
        document([{"Name": "Seen"}], Seen=1).replace(str(T0 * 1000), "9" * 400),
        document([{"Name": "Seen"}], Seen=1).replace(str(T0 * 1000), str((T0 + 3 * 3600) * 1000)),
        '{"_aws": ' + "[" * 100_000,
    ],
)
def test_a_line_that_breaks_the_format_has_no_metrics(line):
    assert embedded_metrics(line, T0) == []


# --- Logs ---


def test_a_log_stream_keeps_its_newest_events(monkeypatch):
    monkeypatch.setattr(logs, "EVENTS_KEPT", 100)
    stream = {"events": [{"eventId": n} for n in range(111)]}
    monkeypatch.setitem(cloudwatch_logs._log_groups._data, (ACCOUNT, REGION, "g"), {"streams": {"s": stream}})
    records = {(ACCOUNT, REGION, n): {} for n in range(111)}
    monkeypatch.setattr(cloudwatch_logs._log_records, "_data", records)
    logs.shorten("g")
    assert [event["eventId"] for event in stream["events"]] == [key[2] for key in records] == list(range(11, 111))


# --- The template ---


def metrics_of_alarms():
    for name, alarm in template.resources("AWS::CloudWatch::Alarm").items():
        yield name, alarm["Namespace"], alarm["MetricName"], [each["Name"] for each in alarm.get("Dimensions", [])]


def metrics_of_dashboards():
    for name, dashboard in template.resources("AWS::CloudWatch::Dashboard").items():
        body = dashboard["DashboardBody"]
        text = body["Fn::Sub"] if isinstance(body, dict) else body
        for widget in json.loads(text[0] if isinstance(text, list) else text)["widgets"]:
            row: list[str] = []
            for given in widget["properties"].get("metrics", []):
                words = [word for word in given if isinstance(word, str)]
                if not words:
                    continue  # an expression over the others
                row = [row[n] if word == "." else word for n, word in enumerate(words)]
                yield name, row[0], row[1], row[2::2]


def ours():
    """The namespace in which the functions publish."""
    return template.template()["Globals"]["Function"]["Environment"]["Variables"]["POWERTOOLS_METRICS_NAMESPACE"]


@pytest.mark.parametrize("name, namespace, metric, dimensions", [*metrics_of_alarms(), *metrics_of_dashboards()])
def test_what_the_template_watches_has_data_here(name, namespace, metric, dimensions):
    if namespace == ours():
        sources = "".join(path.read_text() for path in (template.ROOT / "functions").rglob("*.py"))
        assert re.search(rf'["\']{metric}["\']', sources), f"no function publishes {metric}"
        return
    groups = [group for group in metrics.EMITTED if group.namespace == namespace]
    found = [group for group in groups if sorted(group.dimensions) == sorted(dimensions)]
    assert any(metric in group.units for group in found), f"{name} watches {namespace} {metric} by {dimensions}"


def test_what_is_declared_of_endpoints_is_what_their_router_records():
    units = [group.units for group in metrics.EMITTED if group.namespace == router.NAMESPACE]
    assert units and all(each == router.UNITS for each in units)
