"""IAM: who gives a service a role must be allowed to pass it, `iam:PassRole`, to that service.

ministack checks the action alone. SageMaker's roles are checked in `sagemaker`, with its other permissions;
CloudFormation makes what a template describes with the rights of whoever deploys, unchecked here.

For ministack's authors: `ROLES`, as further checks beside the ones it makes for S3 and DynamoDB.
https://docs.aws.amazon.com/IAM/latest/UserGuide/id_roles_use_passrole.html
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

import jmespath
from ministack import app
from ministack.core import iam_actions
from ministack.core.responses import new_uuid

from . import expect

# Where the requests of an action name the roles that they pass.
ROLES = {
    "lambda:CreateFunction": "[Role]",
    "lambda:UpdateFunctionConfiguration": "[Role]",
    "states:CreateStateMachine": "[roleArn]",
    "states:UpdateStateMachine": "[roleArn]",
    "events:PutRule": "[RoleArn]",
    "events:PutTargets": "Targets[].RoleArn",
    "scheduler:CreateSchedule": "[Target.RoleArn]",
    "scheduler:UpdateSchedule": "[Target.RoleArn]",
    "codebuild:CreateProject": "[serviceRole]",
    "codebuild:UpdateProject": "[serviceRole]",
}
SERVICES = sorted({action.split(":")[0] for action in ROLES})

Handler = Callable[[str, str, dict, bytes, dict], Awaitable[tuple]]


def passed(action: str, body: bytes) -> list[str]:
    """The ARNs of the roles that a request passes."""
    try:
        found = jmespath.search(ROLES[action], json.loads(body or b"{}")) if action in ROLES else []
    except ValueError:  # no JSON: the service refuses it
        found = []
    return [role for role in found or [] if isinstance(role, str)]


def checked(service: str, handle: Handler) -> Handler:
    """A service's handler, behind the check."""

    async def handle_request(method: str, path: str, headers: dict, body: bytes, query_params: dict) -> tuple:
        action = iam_actions.extract_iam_action(service, method, path, headers, body, query_params)
        for role in passed(action or "", body):
            to = {"iam:PassedToService": f"{service}.amazonaws.com"}
            refused = app._enforce_data_plane(
                service,
                "iam:PassRole",
                headers,
                query_params,
                new_uuid(),
                resource_arn=role,
                service_context=to,
                named_resource=role,
            )
            if refused:
                return refused
        return await handle(method, path, headers, body, query_params)

    return handle_request


def install() -> None:
    """Put the check before the services that are given roles."""
    handlers = expect("passrole", app, "SERVICE_HANDLERS", kind=dict)
    expect("passrole", app, "_enforce_data_plane", "service", "iam_action", "headers", "query_params", "request_id")
    expect("passrole", iam_actions, "extract_iam_action", "service", "method", "path", "headers", "body")
    for service in SERVICES:
        handlers[service] = checked(service, handlers[service])
