"""Step Functions: what a state machine's LoggingConfiguration asks for, written to CloudWatch Logs.

ministack keeps the configuration, as CloudFormation spells it if a template gave it, and writes nothing. Tracing has
no effect here: there is no X-Ray.

For ministack's authors: all of it.
https://docs.aws.amazon.com/step-functions/latest/dg/cw-logs.html
https://docs.aws.amazon.com/step-functions/latest/dg/cloudwatch-log-level.html
"""

from __future__ import annotations

import json
import logging
import time
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from ministack import app
from ministack.core import iam_evaluator
from ministack.core.responses import error_response_json, get_region
from ministack.services import cloudwatch_logs
from ministack.services import stepfunctions as states
from ministack.services.cloudformation import provisioners

from . import expect, sessions

logger = logging.getLogger("houndloop.statelogs")

MAX_PAYLOAD = 248 * 1024  # characters of an escaped input or output; CloudWatch Logs' quota leaves no more
DELIVERY = ("CreateLogDelivery", "GetLogDelivery", "UpdateLogDelivery", "DeleteLogDelivery", "ListLogDeliveries")
PERMISSIONS = tuple(
    f"logs:{action}" for action in (*DELIVERY, "PutResourcePolicy", "DescribeResourcePolicies", "DescribeLogGroups")
)
FATAL = ("ExecutionAborted", "ExecutionFailed", "ExecutionTimedOut")
PAYLOADS = ("input", "output", "parameters")


# --- Configuration ---------------------------------------------------------------------------------------------------


def group_of(configuration: dict) -> str | None:
    """The name of the log group that a configuration names; None if it logs nothing."""
    if (configuration.get("level") or "OFF") == "OFF":
        return None
    arn = configuration["destinations"][0]["cloudWatchLogsLogGroup"]["logGroupArn"]
    return str(arn).split(":log-group:", 1)[-1].removesuffix(":*")


def refusal(configuration: dict, role_arn: str) -> tuple[str, str] | None:
    """Why AWS would not take a configuration for a state machine with this role: error code and message."""
    if (configuration.get("level") or "OFF") == "OFF":
        return None
    invalid = "InvalidLoggingConfiguration"
    destinations = configuration.get("destinations") or []
    if len(destinations) != 1:
        return invalid, "Invalid Logging Configuration: Must specify exactly one Log Destination."
    arn = str((destinations[0].get("cloudWatchLogsLogGroup") or {}).get("logGroupArn") or "")
    if not arn.endswith(":*") or group_of(configuration) not in cloudwatch_logs._log_groups:
        return invalid, "Invalid Logging Configuration: Log Destination not found."  # the ARN has to end with :*
    if app.AUTH:
        access_key = sessions.of_role(role_arn, "StepFunctions").access_key
        for permission in PERMISSIONS:
            if iam_evaluator.enforce(access_key, permission, "logs", get_region(), resource_arn="*") is not None:
                message = "The state machine IAM Role is not authorized to access the Log Destination"
                return "AccessDeniedException", message
    return None


def from_template(properties: dict) -> dict:
    """A state machine's properties with the LoggingConfiguration spelled as the API spells it."""
    given = properties.get("LoggingConfiguration")
    if not given or "level" in given:
        return properties
    include = given.get("IncludeExecutionData", False)
    configuration: dict[str, Any] = {
        "level": given.get("Level", "OFF"),
        "includeExecutionData": include if isinstance(include, bool) else str(include).lower() == "true",
    }
    if given.get("Destinations"):
        configuration["destinations"] = [
            {"cloudWatchLogsLogGroup": {"logGroupArn": each["CloudWatchLogsLogGroup"]["LogGroupArn"]}}
            for each in given["Destinations"]
        ]
    return properties | {"LoggingConfiguration": configuration}


def _checking(original: Callable[[dict], tuple]) -> Callable[[dict], tuple]:
    def create_or_update(data: dict) -> tuple:
        configuration = data.get("loggingConfiguration")
        if configuration:
            existing = states._state_machines.get(data.get("stateMachineArn", ""), {})
            refused = refusal(configuration, data.get("roleArn") or existing.get("roleArn", ""))
            if refused:
                return error_response_json(*refused, 400)
        return original(data)

    return create_or_update


# --- Events ----------------------------------------------------------------------------------------------------------


def wanted(level: str, event_type: str) -> bool:
    """Whether a log of this level has events of this type."""
    if level in ("ALL", "FATAL"):
        return level == "ALL" or event_type in FATAL
    return level == "ERROR" and event_type.endswith(("Failed", "Aborted", "TimedOut", "FailStateEntered"))


def message(event: dict, details: dict, execution_arn: str, include_data: bool) -> str:
    """The text of one log event; numbers in it are text."""
    shown: dict[str, Any] = {}
    for name, value in details.items():
        if name not in PAYLOADS:
            shown[name] = value
        elif include_data and value is not None:
            cut = len(json.dumps(value)) > MAX_PAYLOAD
            shown[name] = value[:MAX_PAYLOAD] if cut else value
            if name != "parameters":
                shown[f"{name}Details"] = {"truncated": cut}
    return json.dumps(
        {
            "details": shown,
            "redrive_count": "0",
            "id": str(event["id"]),
            "type": event["type"],
            "previous_event_id": str(event.get("previousEventId", 0)),
            "event_timestamp": str(states._iso_to_epoch_ms(event["timestamp"])),
            "execution_arn": execution_arn,
        }
    )


def stream_of(machine: dict, now: datetime) -> str:
    """The log stream of the moment: one an hour for a standard workflow, one a minute for an express one."""
    period, end = "%Y-%m-%d-%H-%M", f"{zlib.crc32(machine['name'].encode()):08x}"
    if machine.get("type", "STANDARD") == "STANDARD":
        period, end = "%Y-%m-%d-%H", "00000000"
    return f"states/{machine['name']}/{now:{period}}/{end}"


def put(group: str, stream: str, text: str, moment: int) -> None:
    """Append one line, stamped with milliseconds, to a stream that is made if it is not there."""
    if group not in cloudwatch_logs._log_groups:
        return  # deleted since; AWS delivers logs as best it can
    if stream not in cloudwatch_logs._log_groups[group]["streams"]:
        cloudwatch_logs._create_log_stream({"logGroupName": group, "logStreamName": stream})
    events = [{"timestamp": moment, "message": text}]
    cloudwatch_logs._put_log_events({"logGroupName": group, "logStreamName": stream, "logEvents": events})


def write(execution: dict, event: dict, details: dict) -> None:
    """Write one event of an execution's history to its state machine's log group, if the configuration asks for it."""
    machine = states._state_machines.get(execution["stateMachineArn"], {})
    configuration = machine.get("loggingConfiguration") or {}
    try:
        group = group_of(configuration)
        if group and wanted(configuration["level"], event["type"]):
            include = bool(configuration.get("includeExecutionData"))
            text = message(event, details, execution["executionArn"], include)
            moment = states._iso_to_epoch_ms(event["timestamp"]) or int(time.time() * 1000)
            put(group, stream_of(machine, datetime.fromtimestamp(moment / 1000, UTC)), text, moment)
    except Exception:  # a log must not fail an execution
        logger.exception("an event of %s was not logged", execution["executionArn"])


def install() -> None:
    """Check logging configurations, from the API and from templates."""

    def here(name: str, *parameters: str) -> Any:
        return expect("statelogs", states, name, *parameters)

    here("_iso_to_epoch_ms", "iso")
    expect("statelogs", cloudwatch_logs, "_create_log_stream", "data")
    expect("statelogs", cloudwatch_logs, "_put_log_events", "data")
    handlers = expect("statelogs", provisioners, "_RESOURCE_HANDLERS", kind=dict)["AWS::StepFunctions::StateMachine"]
    create = expect("statelogs", provisioners, "_sfn_state_machine_create", "logical_id", "props", "stack_name")
    update = expect("statelogs", provisioners, "_sfn_state_machine_update", "physical_id", "old_props", "new_props")
    expect("statelogs", provisioners, "_sfn_handler_error", "message")

    def create_from_template(logical_id: str, props: dict, stack_name: str) -> tuple[str, dict]:
        props = from_template(props)
        refused = refusal(props.get("LoggingConfiguration") or {}, props.get("RoleArn", ""))
        if refused:
            raise provisioners._sfn_handler_error(f"{refused[1]} (Service: Sfn, Status Code: 400)")
        return create(logical_id, props, stack_name)

    def update_from_template(physical_id: str, old: dict, new: dict, *rest: Any, **named: Any) -> Any:
        return update(physical_id, from_template(old), from_template(new), *rest, **named)

    handlers["create"], handlers["update"] = create_from_template, update_from_template
    states._create_state_machine = _checking(here("_create_state_machine", "data"))
    states._update_state_machine = _checking(here("_update_state_machine", "data"))
