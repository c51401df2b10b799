"""CloudWatch Logs: FilterLogEvents by the prefix of the streams' names and page by page, and streams of bounded length.

ministack ignores the prefix, leaves out what does not fit into one answer, without saying so, and keeps every event
twice for ever: an endpoint that is called for days would fill the memory.

For ministack's authors: FilterLogEvents.
https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_FilterLogEvents.html
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

from ministack.core.responses import AccountRegionScopedDict, error_response_json, json_response
from ministack.services import cloudwatch_logs

from . import expect

MAX_EVENTS = 10_000  # in one answer
EVENTS_KEPT = 100_000  # of a log stream
NO_STREAM = [""]  # names of streams that no group has; with an empty list the original looks into all


def names_of(group: str, prefix: str) -> list[str]:
    """The log streams whose names begin with `prefix`."""
    streams = cloudwatch_logs._log_groups.get(group, {}).get("streams", {})
    return [name for name in list(streams) if name.startswith(prefix)]


def _filtering(original: Callable[[dict], tuple]) -> Callable[[dict], tuple]:
    def filter_log_events(data: dict) -> tuple:
        """As the original. A token is the time of the last event given, and how many of that time were given."""
        request, prefix, token = dict(data), data.get("logStreamNamePrefix"), data.get("nextToken")
        if prefix and data.get("logStreamNames"):
            message = "logStreamNames and logStreamNamePrefix must not be used together."
            return error_response_json("InvalidParameterException", message, 400)
        if prefix:
            group = cloudwatch_logs._resolve_log_group_name(data)
            request["logStreamNames"] = names_of(group, prefix) or NO_STREAM
        moment, given = request.get("startTime"), 0
        if token:
            try:
                moment, given = map(int, token.split("/"))
            except ValueError:
                return error_response_json("InvalidParameterException", "The specified nextToken is invalid.", 400)
        limit = min(data.get("limit") or MAX_EVENTS, MAX_EVENTS)
        asked = min(given + limit + 1, MAX_EVENTS)
        status, headers, body = original({**request, "startTime": moment, "limit": asked})
        if status != 200:
            return status, headers, body
        found = json.loads(body)["events"]
        events = found[given : given + limit]
        answer: dict = {"events": events, "searchedLogStreams": []}
        if events and len(found) == asked:
            last = events[-1]["timestamp"]
            same = sum(event["timestamp"] == last for event in found[: given + limit])
            answer["nextToken"] = f"{last}/{same}"
        return json_response(answer)

    return filter_log_events


def shorten(group: str, name: str | None = None) -> None:
    """Forget the oldest events of a log stream, or of each of the group, if it has become too long."""
    streams = cloudwatch_logs._log_groups.get(group, {}).get("streams", {})
    for stream in [streams[name]] if name in streams else list(streams.values()):
        if len(stream["events"]) > EVENTS_KEPT * 1.1:  # seldom: what remains is moved
            with cloudwatch_logs._log_events_lock:
                forgotten = stream["events"][:-EVENTS_KEPT]
                del stream["events"][:-EVENTS_KEPT]
            for event in forgotten:
                cloudwatch_logs._log_records.pop(event.get("eventId"), None)


def _shortening(original: Callable[[dict], tuple]) -> Callable[[dict], tuple]:
    def put_log_events(data: dict) -> tuple:
        answer = original(data)
        shorten(data.get("logGroupName", ""), data.get("logStreamName"))
        return answer

    return put_log_events


def install() -> None:
    """Replace FilterLogEvents, and keep the streams short."""
    expect("logs", cloudwatch_logs, "_log_groups", kind=AccountRegionScopedDict)
    expect("logs", cloudwatch_logs, "_log_records", kind=AccountRegionScopedDict)
    expect("logs", cloudwatch_logs, "_log_events_lock", kind=type(threading.Lock()))
    cloudwatch_logs._put_log_events = _shortening(expect("logs", cloudwatch_logs, "_put_log_events", "data"))
    expect("logs", cloudwatch_logs, "_resolve_log_group_name", "data")
    cloudwatch_logs._filter_log_events = _filtering(expect("logs", cloudwatch_logs, "_filter_log_events", "data"))
