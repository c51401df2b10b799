"""Application Auto Scaling, which ministack does not have: routed to `local.autoscaling`, and guarded by IAM.

SageMaker heeds scalable targets, as on AWS: an endpoint that is deleted takes its targets with it, and a variant that
scales keeps its instance type.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from ministack import app
from ministack.core import iam_actions, iam_evaluator, router
from ministack.core.responses import get_account_id, get_region
from ministack.services import cloudwatch
from ministack.services.cloudformation import provisioners

from local.autoscaling import api
from local.autoscaling.policies import RESOURCE, TRACKING
from local.autoscaling.scaler import Refused
from local.sagemaker.api import answer_error
from local.sagemaker.errors import ValidationException

from . import cloudformation, expect

SERVICE = "application-autoscaling"
TARGET_PREFIXES = {"sagemaker": "SageMaker", "monitoring": "GraniteServiceVersion20100801"}
# What AWS asks of the caller beside the action: the rights to what is then done for him.
# https://docs.aws.amazon.com/autoscaling/application/userguide/security_iam_id-based-policy-examples.html
ON_ENDPOINT = ("sagemaker:DescribeEndpoint", "sagemaker:UpdateEndpointWeightsAndCapacities")
ON_ALARMS = ("cloudwatch:PutMetricAlarm", "cloudwatch:DescribeAlarms", "cloudwatch:DeleteAlarms")
Handler = Callable[[str, str, dict, bytes, dict], Awaitable[tuple[int, dict, bytes]]]


async def call(service: str, action: str, request: dict) -> dict:
    """Call a service of this emulator in process, with the emulator's own rights; AWS uses a service-linked role.

    Raises:
        Refused: in the other service's words.
    """
    headers = {
        "x-amz-target": f"{TARGET_PREFIXES[service]}.{action}",
        "content-type": "application/x-amz-json-1.1",
        "authorization": "AWS4-HMAC-SHA256 "
        f"Credential={get_account_id()}/20260101/{get_region()}/{service}/aws4_request",
    }
    body = json.dumps(request).encode()
    status, _, answer = await app.SERVICE_HANDLERS[service]("POST", "/", headers, body, {})
    found = json.loads(answer) if answer else {}
    if status >= 300:
        code = found.get("__type", "").rpartition("#")[2]
        raise Refused(status, code, found.get("message") or found.get("Message") or f"{action}: HTTP {status}")
    return found


def denied(headers: dict, query: dict, action: str, resource: str, context: dict[str, str] | None = None) -> bool:
    """Whether IAM is enforced and does not let the caller do this; conditions may ask about `context`."""
    if not app.AUTH:
        return False
    access_key, service = router.extract_access_key_id(headers, query), action.partition(":")[0]
    answer = iam_evaluator.enforce(
        access_key, action, service, get_region(), resource_arn=resource, service_context=context
    )
    return isinstance(answer, iam_evaluator.EvalResult)


async def further_permissions(action: str, request: dict) -> list[tuple[str, str]]:
    """What the caller must be allowed beside the action: (action, resource ARN)."""
    resource, where = str(request.get("ResourceId")), f"{get_region()}:{get_account_id()}"
    if not RESOURCE.fullmatch(resource):
        return []
    if action == "RegisterScalableTarget":
        endpoint = await api.service(call).scaler.endpoint(resource)
        if endpoint is None:
            return []  # which is what is wrong with it
        config = f"arn:aws:sagemaker:{where}:endpoint-config/{endpoint['EndpointConfigName'].lower()}"
        needed = [(permission, endpoint["EndpointArn"]) for permission in ON_ENDPOINT]
        return [*needed, ("sagemaker:DescribeEndpointConfig", config)]
    if action == "PutScalingPolicy" and request.get("PolicyType") == TRACKING:
        alarm = f"arn:aws:cloudwatch:{where}:alarm:TargetTracking-{resource}-AlarmHigh"
        return [(permission, alarm) for permission in ON_ALARMS]
    return []


async def handle_request(method: str, path: str, headers: dict, body: bytes, query: dict) -> tuple[int, dict, bytes]:
    """Answer one request, as ministack calls a service."""
    action = headers.get("x-amz-target", "").rpartition(".")[2]
    needed = await further_permissions(action, _parsed(body))
    missing = [permission for permission, resource in needed if denied(headers, query, permission, resource)]
    if missing:
        return answer_error(ValidationException(f"User is missing the following permissions: {', '.join(missing)}"))
    return await api.service(call).handle(headers, body)


def resource_arn(action: str, request: dict) -> str:
    """The ARN that AWS checks an action on: a scalable target, by the name it has once it is registered."""
    if action.startswith("Describe"):
        return "*"
    if "ResourceARN" in request:
        return str(request["ResourceARN"])
    target = api.service(call).store.find(api.TARGET, str(request.get("ResourceId")))
    return target["_arn"] if target else f"arn:aws:{SERVICE}:{get_region()}:{get_account_id()}:scalable-target/*"


def condition_keys(request: dict) -> dict[str, str]:
    """What a policy's conditions may ask about a request."""
    members = {"service-namespace": "ServiceNamespace", "scalable-dimension": "ScalableDimension"}
    return {f"{SERVICE}:{key}": str(request[name]) for key, name in members.items() if name in request}


def guarded(sagemaker: Handler) -> Handler:
    """SageMaker's handler, with what it asks Application Auto Scaling before it deletes or updates an endpoint."""

    async def handle(method: str, path: str, headers: dict, body: bytes, query: dict) -> tuple[int, dict, bytes]:
        action = headers.get("x-amz-target", "").rpartition(".")[2]
        if action not in ("DeleteEndpoint", "UpdateEndpoint"):
            return await sagemaker(method, path, headers, body, query)
        scaling, request = api.service(call), _parsed(body)
        targets = scaling.targets_of(str(request.get("EndpointName")))
        problem = ""
        if targets and action == "UpdateEndpoint":
            problem = await _update_problem(targets, request)
        elif any(
            denied(headers, query, f"{SERVICE}:DeregisterScalableTarget", target["_arn"], condition_keys(target))
            for target in targets
        ):
            problem = (
                "An Application AutoScaling scalable target exists for a variant being deleted, and the IAM identity "
                f"used to invoke DeleteEndpoint does not have {SERVICE}:DeregisterScalableTarget permission to "
                "deregister the scalable target."
            )
        if problem:
            return answer_error(ValidationException(problem))
        answer = await sagemaker(method, path, headers, body, query)
        if action == "DeleteEndpoint" and answer[0] < 300:
            for target in targets:
                await scaling.scaler.forget(target)
        return answer

    return handle


async def _update_problem(targets: list[dict], request: dict) -> str:
    """Why an endpoint with these targets may not get this configuration; empty if it may."""
    try:
        before = await call("sagemaker", "DescribeEndpoint", {"EndpointName": request["EndpointName"]})
        old, new = [
            (await call("sagemaker", "DescribeEndpointConfig", {"EndpointConfigName": name}))["ProductionVariants"]
            for name in (before["EndpointConfigName"], request.get("EndpointConfigName"))
        ]
    except Refused:
        return ""  # SageMaker says what is wrong with the request
    changed = []
    for target in targets:
        was, becomes = (api.variant_of(variants, target["ResourceId"]) for variants in (old, new))
        if was and (becomes is None or becomes.get("InstanceType") != was.get("InstanceType")):
            changed.append(was["VariantName"])
    if not changed:
        return ""
    return (
        f'The variant(s) "[{", ".join(changed)}]" must be deregistered as scalable targets with AWS Auto Scaling '
        "before they can be removed or have their instance type updated."
    )


def _parsed(body: bytes) -> dict:
    try:
        request = json.loads(body or b"{}")
    except (ValueError, RecursionError):  # the service itself refuses it
        return {}
    return request if isinstance(request, dict) else {}


# --- CloudFormation --------------------------------------------------------------------------------------------------


def provision(action: str, props: dict) -> dict:
    """Call an action for CloudFormation, where numbers and booleans may come as text, from parameters."""
    shape = api.service_model().operation_model(action).input_shape
    return cloudformation.call(SERVICE, api.PREFIX, action, typed(shape, props))


def typed(shape: Any, value: Any) -> Any:
    """A template's value with the types that the API wants."""
    kind = shape.type_name
    if kind == "structure" and isinstance(value, dict):
        return {
            name: typed(shape.members[name], item) if name in shape.members else item for name, item in value.items()
        }
    if kind == "list" and isinstance(value, list):
        return [typed(shape.member, item) for item in value]
    if isinstance(value, str) and kind in ("integer", "long", "double", "float"):
        return int(value) if kind in ("integer", "long") else float(value)
    if isinstance(value, str) and kind == "boolean":
        return value.lower() == "true"
    return value


KEY = ("ResourceId", "ScalableDimension", "ServiceNamespace")


def create_target(logical_id: str, props: dict, stack_name: str) -> tuple[str, dict]:
    """`AWS::ApplicationAutoScaling::ScalableTarget`: `Ref` is its resource id, dimension and namespace."""
    if props.get("ScheduledActions"):
        raise ValueError("ScheduledActions are not implemented by the local Application Auto Scaling.")
    provision("RegisterScalableTarget", props)
    reference = "|".join(props[name] for name in KEY)
    return reference, {"Id": reference}


def delete_target(physical_id: str, props: dict) -> None:
    """Deregister; one that is gone, with its endpoint, is no error."""
    _remove("DeregisterScalableTarget", dict(zip(KEY, physical_id.split("|"), strict=True)))


def create_policy(logical_id: str, props: dict, stack_name: str) -> tuple[str, dict]:
    """`AWS::ApplicationAutoScaling::ScalingPolicy`: `Ref` is its ARN."""
    arn = provision("PutScalingPolicy", _policy(props))["PolicyARN"]
    return arn, {"Arn": arn}


def delete_policy(physical_id: str, props: dict) -> None:
    """Delete the policy; one that is gone, with its target, is no error."""
    _remove("DeleteScalingPolicy", {name: _policy(props)[name] for name in ("PolicyName", *KEY)})


def _remove(action: str, request: dict) -> None:
    try:
        provision(action, request)
    except ValueError as error:
        if not str(error).startswith("No scal"):
            raise


def provisioner(create: Callable, delete: Callable) -> dict[str, Callable]:
    """A resource type for ministack. To create what is there changes it; with another identity it is another one."""

    def update(physical_id: str, old: dict, new: dict, stack_name: str) -> tuple[str, dict]:
        made = create("", new, stack_name)
        if made[0] != physical_id:
            delete(physical_id, old)
        return made

    return {"create": create, "update": update, "delete": delete}


def _policy(props: dict) -> dict:
    """A policy's properties as a request: its target may be given as the target's reference."""
    request = {name: value for name, value in props.items() if name != "ScalingTargetId"}
    if reference := props.get("ScalingTargetId"):
        request |= zip(KEY, reference.split("|"), strict=True)
    return request


# --- Installation ----------------------------------------------------------------------------------------------------


async def start() -> None:
    """Go on watching the scalable targets of an emulator whose state was kept."""
    api.service(call)


def install() -> None:
    """Register the service with ministack's router, handlers, IAM and CloudFormation, and listen to alarms."""
    handlers = expect("autoscaling", app, "SERVICE_HANDLERS", kind=dict)
    patterns = expect("autoscaling", router, "SERVICE_PATTERNS", kind=dict)
    namespaces = expect("autoscaling", iam_actions, "SERVICE_TO_IAM_NAMESPACE", kind=dict)
    resources = expect("autoscaling", provisioners, "_RESOURCE_HANDLERS", kind=dict)
    known = expect("autoscaling", iam_actions, "extract_resource_arn", "service", "method", "path", "headers", "body")
    enforced = ("access_key_id", "iam_action", "service", "region", "resource_arn", "service_context")
    expect("autoscaling", iam_evaluator, "enforce", *enforced)
    expect("autoscaling", router, "extract_access_key_id", "headers", "query_params")
    tags = expect("autoscaling", iam_actions, "request_tag_context", "service", "iam_action", "body", "params")
    dispatch = expect("autoscaling", cloudwatch, "_dispatch_alarm_actions", "alarm", "old_state", "new_state", "reason")

    handlers[SERVICE] = handle_request
    handlers["sagemaker"] = guarded(handlers["sagemaker"])
    patterns[SERVICE] = {"target_prefixes": [f"{api.PREFIX}."], "credential_scope": SERVICE}
    namespaces[SERVICE] = SERVICE
    resources["AWS::ApplicationAutoScaling::ScalableTarget"] = provisioner(create_target, delete_target)
    resources["AWS::ApplicationAutoScaling::ScalingPolicy"] = provisioner(create_policy, delete_policy)

    def extract_resource_arn(service: str, method: str, path: str, headers: dict, body: bytes, *more: Any) -> str:
        if service != SERVICE:
            return known(service, method, path, headers, body, *more)
        return resource_arn(headers.get("x-amz-target", "").rpartition(".")[2], _parsed(body))

    def request_tag_context(service: str, iam_action: str, body: bytes, params: dict) -> dict:
        context = tags(service, iam_action, body, params)
        return context | condition_keys(_parsed(body)) if service == SERVICE else context

    def dispatch_alarm_actions(alarm: dict, old_state: str, new_state: str, reason: str) -> None:
        dispatch(alarm, old_state, new_state, reason)
        if new_state == "ALARM" and any(":scalingPolicy:" in action for action in alarm.get("AlarmActions") or []):
            api.alarmed(get_account_id(), get_region(), alarm["AlarmName"])

    iam_actions.extract_resource_arn = extract_resource_arn
    iam_actions.request_tag_context = request_tag_context
    cloudwatch._dispatch_alarm_actions = dispatch_alarm_actions
