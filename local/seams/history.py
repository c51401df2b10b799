"""Step Functions: an execution's history in AWS's words, with the logs and metrics that follow from it.

ministack's history names tasks by their whole ARN, knows no event before another, leaves out the start of tasks, and
goes on after the execution has ended. Here every event is put right as it is added, and passed on: to the state
machine's log group (`statelogs`) and to AWS/States. The states inside Map and Parallel have no events of their own.

For ministack's authors: `as_on_aws`, `previousEventId`, and the end of the history.
https://docs.aws.amazon.com/step-functions/latest/apireference/API_HistoryEvent.html
https://docs.aws.amazon.com/step-functions/latest/dg/procedure-cw-metrics.html
"""

from __future__ import annotations

import contextvars
import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from ministack.core.responses import get_region
from ministack.services import stepfunctions as states

from . import expect, metrics, statelogs

ENDED = "Houndloop.ExecutionEnded"  # the error of a task whose execution is over; never shown, retried or caught

_previous: contextvars.ContextVar[int] = contextvars.ContextVar("previous_event", default=0)
_arguments: contextvars.ContextVar[Any] = contextvars.ContextVar("arguments", default=None)
_scheduled: contextvars.ContextVar[tuple[str, float]] = contextvars.ContextVar("scheduled", default=("", 0.0))
_lock = threading.Lock()


def details_of(event: dict) -> dict:
    """An event's details, whatever its type calls them."""
    return next((value for name, value in event.items() if name.endswith("EventDetails")), {})


def details_name(event_type: str) -> str:
    """The member that holds the details of an event of this type."""
    for end in ("Entered", "Exited"):
        if event_type.endswith(f"State{end}"):
            return f"state{end}EventDetails"
    return f"{event_type[0].lower()}{event_type[1:]}EventDetails"


def as_on_aws(event_type: str, details: dict, arguments: Any, region: str) -> tuple[str, dict]:
    """Type and details of a task's event as AWS has them, from ministack's."""
    resource = details.get("resource")
    if not event_type.startswith("Task") or not resource:
        return event_type, details
    details = {name: value for name, value in details.items() if name not in ("resource", "resourceType")}
    if event_type == "TaskFailed" and details.get("error") == "States.Timeout":
        event_type = "TaskTimedOut"
    if re.match(r"arn:[^:]+:lambda:", resource):
        if event_type == "TaskScheduled":
            details |= {"resource": resource, "input": json.dumps(arguments)}
        return event_type.replace("Task", "LambdaFunction"), details
    if ":activity:" in resource:
        return event_type, details | {"resource": resource, "resourceType": "activity"}
    found = re.fullmatch(r"arn:[^:]+:states:[^:]*:[^:]*:(.+?):([A-Za-z0-9]+(?:\..+)?)", resource)
    service, action = found.groups() if found else ("", resource)
    details |= {"resource": action, "resourceType": service}
    if event_type == "TaskScheduled":
        details |= {"region": region, "parameters": json.dumps(arguments)}
    return event_type, details


# --- Metrics ---------------------------------------------------------------------------------------------------------


def measure_task(event_type: str, resource: str) -> None:
    """Record what the event of a task means for the metrics of its function or integration."""
    if ":activity:" in resource or not resource:
        return
    function = event_type.startswith("LambdaFunction")
    kind = "LambdaFunction" if function else "ServiceIntegration"
    end = event_type.removeprefix("LambdaFunction").removeprefix("Task")
    dimensions = {f"{kind}Arn" if function else f"{kind}ResourceArn": resource}
    if end in ("Scheduled", "Started", "Succeeded", "Failed", "TimedOut"):
        metrics.record("AWS/States", f"{kind}s{end}", 1, dimensions)
    if end in ("Succeeded", "Failed", "TimedOut"):
        took = (time.monotonic() - _scheduled.get()[1]) * 1000
        for name, value in (("Time", took), ("RunTime", took), ("ScheduleTime", 0)):  # nothing waits for its turn here
            metrics.record("AWS/States", f"{kind}{name}", value, dimensions)


def measure_execution(execution: dict, event_type: str) -> None:
    """Record the start or the end of an execution."""
    dimensions = {"StateMachineArn": execution["stateMachineArn"]}
    metrics.record("AWS/States", event_type.replace("Execution", "Executions"), 1, dimensions)
    started, stopped = (states._iso_to_epoch_ms(execution.get(name)) for name in ("startDate", "stopDate"))
    if event_type != "ExecutionStarted" and started and stopped:
        metrics.record("AWS/States", "ExecutionTime", stopped - started, dimensions)


# --- Events ----------------------------------------------------------------------------------------------------------


def _adding(original: Callable[..., dict]) -> Callable[..., dict]:
    def add(execution: dict, event_type: str, details: dict) -> dict:
        with _lock:  # ids count the events: two branches must not get the same
            # What ends an execution from outside follows no state.
            previous = 0 if event_type in ("ExecutionAborted", "ExecutionTimedOut") else _previous.get()
            event = original(execution, event_type, {"previousEventId": previous, details_name(event_type): details})
        _previous.set(event["id"])
        statelogs.write(execution, event, details)
        return event

    def add_event(execution: dict, event_type: str, details: dict | None = None) -> dict:
        given = details_of(details or {})
        ends = event_type.startswith("Execution")
        if given.get("error") == ENDED or (execution["status"] != "RUNNING" and not ends):
            return {}  # AWS's history ends with the execution
        if ends:
            measure_execution(execution, event_type)
            return add(execution, event_type, given)
        resource = given.get("resource", "")
        if event_type == "TaskScheduled":
            _scheduled.set((resource, time.monotonic()))
        event_type, given = as_on_aws(event_type, given, _arguments.get(), get_region())
        event = add(execution, event_type, given)
        measure_task(event_type, resource)
        if event_type.endswith("Scheduled"):
            begun = event_type.replace("Scheduled", "Started")
            add(execution, begun, {name: given[name] for name in ("resource", "resourceType") if name in given})
            measure_task(begun, resource)
        return event

    return add_event


def _starting(original: Callable[[str], None]) -> Callable[[str], None]:
    def run_execution(exec_arn: str) -> None:
        execution = states._executions.get(exec_arn)
        if execution is not None:
            _previous.set(0)  # AWS gives the first state 0 too
            measure_execution(execution, "ExecutionStarted")
            started = execution["events"][0]
            started["previousEventId"] = 0
            statelogs.write(execution, started, details_of(started))
        original(exec_arn)

    return run_execution


def _remembering(original: Callable[..., Any]) -> Callable[..., Any]:
    def arguments(*given: Any, **named: Any) -> Any:
        """As the original; the last arguments made before a task is scheduled are its own."""
        made = original(*given, **named)
        _arguments.set(made)
        return made

    return arguments


def install() -> None:
    """Replace how events are added, and note what tasks are called with."""

    def here(name: str, *parameters: str) -> Any:
        return expect("history", states, name, *parameters)

    here("_iso_to_epoch_ms", "iso")
    states._add_event = _adding(here("_add_event", "execution", "event_type", "details"))
    states._run_execution = _starting(here("_run_execution", "exec_arn"))
    states._apply_parameters = _remembering(here("_apply_parameters", "state_def", "data", "ctx"))
    states._apply_jsonata_arguments = _remembering(here("_apply_jsonata_arguments", "state_def", "raw_input", "ctx"))
