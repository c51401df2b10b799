"""SageMaker as a service of the emulator: routed to `local.sagemaker`, and guarded by IAM like every other.

ministack asks the policies of the caller before it calls a service, but knows neither which action and resource a
SageMaker request is about nor the permissions that AWS asks for on top: `iam:PassRole` for the role that a job will
run with, `sagemaker:AddTags` for tags given at creation, and the endpoint configuration of an endpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from ministack import app
from ministack.core import iam_actions, iam_evaluator, router
from ministack.core.responses import get_account_id, get_region
from ministack.services import eventbridge

from . import expect

# The resource type in an ARN, for the parameter that names the resource. In the order in which they are looked for:
# the first that a request has is what it is about.
RESOURCE_TYPES = {
    "TrainingJobName": "training-job",
    "HyperParameterTuningJobName": "hyper-parameter-tuning-job",
    "ProcessingJobName": "processing-job",
    "TransformJobName": "transform-job",
    "EndpointName": "endpoint",
    "EndpointConfigName": "endpoint-config",
    "ModelPackageName": "model-package",
    "ModelPackageGroupName": "model-package-group",
    "ModelName": "model",
}
INVOCATION = re.compile(r"^/endpoints/([^/]+)/(?:invocations|async-invocations|invocations-response-stream)$")
ROLE_PARAMETERS = ("RoleArn", "ExecutionRoleArn")


def resource_arn(action: str, request: dict, path: str, region: str, account: str) -> str:
    """The ARN that AWS checks `action` (without its namespace) on, `*` for actions on no single resource."""
    prefix = f"arn:aws:sagemaker:{region}:{account}:"
    invocation = INVOCATION.match(path)
    if invocation:
        return f"{prefix}endpoint/{unquote(invocation[1]).lower()}"
    if "ResourceArn" in request:  # AddTags, ListTags, DeleteTags
        return str(request["ResourceArn"])
    if "ModelPackageArn" in request:
        return str(request["ModelPackageArn"])
    if action == "CreateModelPackage" and "ModelPackageGroupName" in request:
        # Version numbers are given out by SageMaker; policies can only name the group's versions with a wildcard.
        return f"{prefix}model-package/{_name(request['ModelPackageGroupName'])}/1"
    if action.startswith(("List", "Search")) and action != "ListTrainingJobsForHyperParameterTuningJob":
        return "*"
    for parameter, resource_type in RESOURCE_TYPES.items():
        value = request.get(parameter)
        if value:
            return str(value) if str(value).startswith("arn:") else f"{prefix}{resource_type}/{str(value).lower()}"
    return "*"


def _name(name_or_arn: str) -> str:
    return name_or_arn.rsplit("/", 1)[-1].lower()


def _parsed(body: bytes) -> dict:
    try:
        request = json.loads(body or b"{}")
    except (ValueError, RecursionError):  # a picture, or a malformed request, which the service itself refuses
        return {}
    return request if isinstance(request, dict) else {}


def further_permissions(action: str, request: dict, region: str, account: str) -> Iterator[tuple[str, str, dict]]:
    """What AWS asks for beside the action itself: (action, resource ARN, condition keys)."""
    prefix = f"arn:aws:sagemaker:{region}:{account}:"
    for parameter in ROLE_PARAMETERS:
        if request.get(parameter):
            yield "iam:PassRole", str(request[parameter]), {"iam:PassedToService": "sagemaker.amazonaws.com"}
    for definition in _training_definitions(request):
        yield "iam:PassRole", definition, {"iam:PassedToService": "sagemaker.amazonaws.com"}
    if action.startswith("Create") and request.get("Tags"):
        yield "sagemaker:AddTags", resource_arn(action, request, "/", region, account), {}
    if action in ("CreateEndpoint", "UpdateEndpoint") and request.get("EndpointConfigName"):
        yield f"sagemaker:{action}", f"{prefix}endpoint-config/{_name(request['EndpointConfigName'])}", {}


def _training_definitions(request: dict) -> Iterator[str]:
    """Roles of a tuning job's trials."""
    definitions = [request.get("TrainingJobDefinition"), *(request.get("TrainingJobDefinitions") or [])]
    for definition in definitions:
        if isinstance(definition, dict) and definition.get("RoleArn"):
            yield definition["RoleArn"]


async def handle_request(method: str, path: str, headers: dict, body: bytes, query: dict) -> tuple[int, dict, bytes]:
    """Answer one request, as ministack calls a service."""
    from local.sagemaker import api

    target = headers.get("x-amz-target", "")
    if app.AUTH and target:
        action = target.rsplit(".", 1)[-1]
        access_key = router.extract_access_key_id(headers, query)
        region, account = get_region(), get_account_id()
        for needed, resource, keys in further_permissions(action, _parsed(body), region, account):
            denied = iam_evaluator.enforce(
                access_key, needed, "sagemaker", region, resource_arn=resource, service_context=keys
            )
            if isinstance(denied, iam_evaluator.EvalResult):
                return _access_denied(needed, resource, denied)
    status, response_headers, response_body = await api.handle(method, path, headers, body, query)
    if INVOCATION.match(path):
        # The container's media type is its own; of `Content-Type` ministack makes that of SageMaker's protocol.
        return status, {name.lower(): value for name, value in response_headers.items()}, response_body
    return status, dict(response_headers), response_body


def _access_denied(action: str, resource: str, denied: Any) -> tuple[int, dict, bytes]:
    because = (
        "with an explicit deny in an identity-based policy"
        if denied.decision == "Deny"
        else f"because no identity-based policy allows the {action} action"
    )
    message = f"User: {denied.principal_arn} is not authorized to perform: {action} on resource: {resource} {because}"
    answer = {"__type": "AccessDeniedException", "Message": message, "message": message}
    return 400, {"Content-Type": "application/x-amz-json-1.1"}, json.dumps(answer).encode()


async def start() -> None:
    """Bring back the endpoints of an emulator whose state was kept."""
    from local.sagemaker import api

    await api.start()


def shutdown() -> None:
    """Stop every job and endpoint process."""
    from local.sagemaker import api

    api.shutdown()


def install() -> None:
    """Register SageMaker with ministack's router, its handlers and its IAM."""
    expect("sagemaker", eventbridge, "_put_events", "data", "allow_aws_source")  # local.sagemaker.host
    handlers = expect("sagemaker", app, "SERVICE_HANDLERS", kind=dict)
    patterns = expect("sagemaker", router, "SERVICE_PATTERNS", kind=dict)
    namespaces = expect("sagemaker", iam_actions, "SERVICE_TO_IAM_NAMESPACE", kind=dict)
    models = expect("sagemaker", iam_actions, "_BOTOCORE_SERVICE_MAP", kind=dict)
    expect(
        "sagemaker",
        iam_evaluator,
        "enforce",
        "access_key_id",
        "iam_action",
        "service",
        "region",
        "resource_arn",
        "service_context",
    )
    expect("sagemaker", router, "extract_access_key_id", "headers", "query_params")
    known = expect(
        "sagemaker",
        iam_actions,
        "extract_resource_arn",
        "service",
        "method",
        "path",
        "headers",
        "body",
        "query_params",
        "region",
        "account_id",
    )

    handlers["sagemaker"] = handle_request
    patterns["sagemaker"] = {"target_prefixes": ["SageMaker."], "host_patterns": [r"sagemaker\."]}
    namespaces["sagemaker"] = "sagemaker"
    models["sagemaker"] = ["sagemaker-runtime"]  # finds InvokeEndpoint by its path

    def extract_resource_arn(
        service: str,
        method: str,
        path: str,
        headers: dict,
        body: bytes,
        query_params: dict,
        region: str,
        account_id: str,
    ) -> str:
        if service != "sagemaker":
            return known(service, method, path, headers, body, query_params, region, account_id)
        action = headers.get("x-amz-target", "").rsplit(".", 1)[-1]
        return resource_arn(action, _parsed(body) if action else {}, path, region, account_id)

    iam_actions.extract_resource_arn = extract_resource_arn
