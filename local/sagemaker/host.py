"""Everything the local SageMaker asks of the emulator it lives in: identity, credentials, logs, metrics, alarms.

The only module here that knows ministack, so that a new version of it is met in one place.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping

from ministack.core import responses


def account() -> str:
    """The account of the request, or of the request that started this task."""
    return responses.get_account_id()


def region() -> str:
    """The region of the request, or of the request that started this task."""
    return responses.get_region()


def scope(account_id: str, region_name: str) -> contextlib.AbstractContextManager:
    """Pins account and region for work that no request started."""
    return responses.request_scope(account_id, region_name)


def endpoint_url() -> str:
    """Where a job's own AWS calls go."""
    from ministack import app

    return f"http://127.0.0.1:{app._resolve_port()}"


def can_assume(role_arn: str) -> bool:
    """Whether the role is there and trusts SageMaker. Without authorisation every role does, as with functions."""
    from ministack import app
    from ministack.services import iam

    if not app.AUTH:
        return True
    role = next((role for role in iam._roles.values() if role.get("Arn") == role_arn), None)
    return role is not None and trusts(role.get("AssumeRolePolicyDocument") or "{}", "sagemaker.amazonaws.com")


def trusts(document: str | dict, service: str) -> bool:
    """Whether a role's trust policy lets the service assume the role."""
    statements = (json.loads(document) if isinstance(document, str) else document).get("Statement", [])
    for statement in [statements] if isinstance(statements, dict) else statements:
        principal = statement.get("Principal", {})
        named = principal.get("Service", []) if isinstance(principal, dict) else []
        if statement.get("Effect") == "Allow" and service in ([named] if isinstance(named, str) else named):
            return True
    return False


def role_environment(role_arn: str, resource_arn: str) -> dict[str, str]:
    """AWS_* variables that make boto3 act as `role_arn` for `resource_arn`, against this emulator.

    Under AUTH it is a session of the role, so that the role's policies bind the job. Its keys stay the same for the
    resource, so a running job's stay valid, and differ from those that an earlier emulator gave.
    """
    from ministack import app

    from local.seams import sessions

    environment = {"AWS_ENDPOINT_URL": endpoint_url(), "AWS_REGION": region(), "AWS_DEFAULT_REGION": region()}
    if not app.AUTH:
        return environment | {"AWS_ACCESS_KEY_ID": account(), "AWS_SECRET_ACCESS_KEY": "test"}
    return environment | sessions.of_role(role_arn, "SageMaker", f"{os.getpid()}:{resource_arn}").for_environment()


async def open_log_stream(group: str, stream: str) -> None:
    """Makes the log group and stream; that they exist already is no error."""
    await _logs("CreateLogGroup", {"logGroupName": group})
    await _logs("CreateLogStream", {"logGroupName": group, "logStreamName": stream})


async def put_log_lines(group: str, stream: str, lines: Iterable[str]) -> None:
    """Appends lines to a stream of CloudWatch Logs, stamped now. Empty lines are left out, as the real agent does."""
    stamp = int(time.time() * 1000)
    events = [{"timestamp": stamp, "message": line} for line in lines if line]
    if events:
        await _logs("PutLogEvents", {"logGroupName": group, "logStreamName": stream, "logEvents": events})


async def _logs(action: str, payload: dict) -> None:
    from ministack.services import cloudwatch_logs

    headers = {"x-amz-target": f"Logs_20140328.{action}", "content-type": "application/x-amz-json-1.1"}
    await cloudwatch_logs.handle_request("POST", "/", headers, json.dumps(payload).encode(), {})


def record_metric(namespace: str, name: str, value: float, unit: str, dimensions: dict[str, str]) -> None:
    """Publishes one CloudWatch data point."""
    from ministack.services import cloudwatch

    cloudwatch.record_metric(namespace, name, value, unit, dimensions)


def record_values(
    namespace: str, name: str, values: Mapping[float, int], unit: str, dimensions: dict[str, str], moment: float
) -> None:
    """Publishes values with how often each occurred, as of `moment` (seconds since the epoch)."""
    from ministack.services import cloudwatch

    counts = list(values.values())
    cloudwatch._store_datum(namespace, name, dimensions, moment, unit, None, list(values), counts, None)


def alarm_states(names: Iterable[str]) -> dict[str, str | None]:
    """The state of each alarm (`OK`, `ALARM`, `INSUFFICIENT_DATA`), None for one that does not exist."""
    from ministack.services import cloudwatch

    states: dict[str, str | None] = {}
    for name in names:
        alarm = cloudwatch._alarms.get(name) or cloudwatch._composite_alarms.get(name)
        states[name] = alarm["StateValue"] if alarm else None
    return states


def put_event(detail_type: str, resources: list[str], detail: dict) -> None:
    """Puts an event of SageMaker on the default bus; its rules' targets have it when this returns."""
    from ministack.services import eventbridge

    entry = {"Source": "aws.sagemaker", "DetailType": detail_type, "Resources": resources, "Detail": json.dumps(detail)}
    eventbridge._put_events({"Entries": [entry]}, allow_aws_source=True)
