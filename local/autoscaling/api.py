"""Application Auto Scaling's protocol (JSON 1.1), and what is registered: scalable targets and their policies."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import logging
import re
import uuid
from collections.abc import Awaitable, Callable

import botocore.session
from botocore.model import ServiceModel

from local.sagemaker import host, validation
from local.sagemaker.api import Response, answer_error
from local.sagemaker.errors import SageMakerError, SerializationException, UnknownOperation, ValidationException
from local.sagemaker.settings import Settings
from local.sagemaker.store import Record, Store, now, record

from . import checks, policies
from .checks import DIMENSION, NAMESPACE, Refusal
from .scaler import ACTIVITY, POLICY, TARGET, Call, Refused, Scaler, invokes, variant_of

logger = logging.getLogger(__name__)
PREFIX = "AnyScaleFrontendService"
SUSPENSIONS = ("DynamicScalingInSuspended", "DynamicScalingOutSuspended", "ScheduledScalingSuspended")
BURSTABLE = re.compile(r"ml\.t\d")
PAGE, POLICY_PAGE = 50, 10  # the most items of a Describe answer, by the API reference


@functools.cache
def service_model() -> ServiceModel:
    """Application Auto Scaling's service model."""
    return botocore.session.get_session().get_service_model("application-autoscaling")


class AutoScaling:
    """The whole service."""

    def __init__(self, store: Store, call: Call) -> None:
        self.store, self.call = store, call
        self.scaler = Scaler(store, call)
        self.watching: asyncio.Task | None = None
        self.actions: dict[str, Callable[[dict], Awaitable[dict]]] = {
            "RegisterScalableTarget": self.register,
            "DescribeScalableTargets": self.describe_targets,
            "DeregisterScalableTarget": self.deregister,
            "PutScalingPolicy": self.put_policy,
            "DescribeScalingPolicies": self.describe_policies,
            "DeleteScalingPolicy": self.delete_policy,
            "DescribeScalingActivities": self.describe_activities,
            "TagResource": self.tag,
            "UntagResource": self.untag,
            "ListTagsForResource": self.list_tags,
        }

    async def handle(self, headers: dict[str, str], body: bytes) -> Response:
        """One request; every failure is an answer."""
        try:
            answer = await self._act(headers, body)
        except SageMakerError as error:
            return answer_error(error)
        except Refused as error:  # by SageMaker or CloudWatch, on the caller's behalf
            return answer_error(ValidationException(error.message))
        except Exception:
            logger.exception("the local Application Auto Scaling failed on %s", headers.get("x-amz-target"))
            return answer_error(SageMakerError("An internal failure occurred; the emulator's log has the details."))
        return 200, {"Content-Type": "application/x-amz-json-1.1"}, json.dumps(answer).encode()

    async def _act(self, headers: dict[str, str], body: bytes) -> dict:
        action = headers.get("x-amz-target", "").rpartition(".")[2]
        if action not in service_model().operation_names:
            raise UnknownOperation
        if action not in self.actions:
            raise checks.not_implemented(f"The action {action}")
        try:
            parsed = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            raise SerializationException from None
        request = validation.validate_shape(service_model().operation_model(action).input_shape, parsed)
        checks.check_scope(request)
        return await self.actions[action](request)

    # Scalable targets

    async def register(self, request: dict) -> dict:
        """RegisterScalableTarget: a new target, or changes to one; either way its bounds are put into effect."""
        resource = request["ResourceId"]
        target = self.store.find(TARGET, resource)
        if target is None:
            for bound in ("Minimum", "Maximum"):
                if f"{bound[:3]}Capacity" not in request:
                    raise ValidationException(f"{bound} capacity must be specified")
            target = self._new_target(resource, request.get("Tags", {}))
        elif "Tags" in request:
            raise ValidationException(
                "The scalable target that you tried to tag already exists. To update tags on an existing scalable "
                "target, use the TagResource API."
            )
        changed = target | {name: request[name] for name in ("MinCapacity", "MaxCapacity") if name in request}
        changed["SuspendedState"] = target["SuspendedState"] | request.get("SuspendedState", {})
        if changed["MinCapacity"] < 0:
            raise ValidationException("Minimum capacity cannot be less than 0")
        if changed["MaxCapacity"] < changed["MinCapacity"]:
            raise ValidationException("Maximum capacity cannot be less than minimum capacity")
        if await self._check_variant(resource) != "Creating":  # a resource that is not active is left as it is
            changed["_bounds_due"] = True
        target.update(changed)
        self.store.save(target)
        return {"ScalableTargetARN": target["ScalableTargetARN"]}

    def _new_target(self, resource: str, tags: dict[str, str]) -> Record:
        prefix, account = f"arn:aws:application-autoscaling:{host.region()}", host.account()
        target_arn = f"{prefix}:{account}:scalable-target/0ec5{uuid.uuid4().hex}"
        # As on AWS, RoleARN of a request has no effect: the service-linked role acts.
        role = (
            "sagemaker.application-autoscaling.amazonaws.com/AWSServiceRoleForApplicationAutoScaling_SageMakerEndpoint"
        )
        return record(
            TARGET,
            resource,
            target_arn,
            ServiceNamespace=NAMESPACE,
            ResourceId=resource,
            ScalableDimension=DIMENSION,
            RoleARN=f"arn:aws:iam::{account}:role/aws-service-role/{role}",
            CreationTime=now(),
            SuspendedState=dict.fromkeys(SUSPENSIONS, False),
            ScalableTargetARN=target_arn,
            _tags=tags,
        )

    async def _check_variant(self, resource: str) -> str:
        """The status of the endpoint; refuses a variant that is not there or cannot scale."""
        named = policies.dimensions(resource)
        endpoint = await self.scaler.endpoint(resource)
        endpoint_arn = f"arn:aws:sagemaker:{host.region()}:{host.account()}:endpoint/{named['EndpointName'].lower()}"
        if endpoint is None:
            raise ValidationException(f'Could not find endpoint "{endpoint_arn}".')
        config = {"EndpointConfigName": endpoint["EndpointConfigName"]}
        configured = variant_of(
            (await self.call("sagemaker", "DescribeEndpointConfig", config))["ProductionVariants"], resource
        )
        if configured is None:
            raise ValidationException(f'Could not find variant "{named["VariantName"]}" of endpoint "{endpoint_arn}".')
        if "ServerlessConfig" in configured:
            raise ValidationException(f"The scalable dimension {DIMENSION} does not apply to a serverless variant.")
        instance = configured.get("InstanceType", "")
        if BURSTABLE.match(instance):
            raise ValidationException(
                f"You cannot register a variant with {instance} instance type as a scalable target. This is because "
                "the burstable performance of these instances can lead to unpredictable behavior with Auto Scaling."
            )
        return endpoint["EndpointStatus"]

    def _target(self, request: dict, missing: str = "registered") -> Record:
        words = f"No scalable target {missing} for {described(request)}"
        return self.store.get(TARGET, request["ResourceId"], lambda: Refusal("ObjectNotFoundException", words))

    async def describe_targets(self, request: dict) -> dict:
        """DescribeScalableTargets."""
        wanted = request.get("ResourceIds")
        checks.check_filter(request, "ResourceIds")
        found = [target for target in self.store.all(TARGET) if not wanted or target["ResourceId"] in wanted]
        found.sort(key=lambda target: target["ResourceId"])
        return answer_page("ScalableTargets", found, request, PAGE)

    async def deregister(self, request: dict) -> dict:
        """DeregisterScalableTarget: with its policies and their alarms; the variant stays as it is."""
        await self.scaler.forget(self._target(request, "found"))
        return {}

    # Policies

    async def put_policy(self, request: dict) -> dict:
        """PutScalingPolicy: a new policy, or another configuration for one."""
        target = self._target(request)
        policy = self._policy(request)
        kind = request.get("PolicyType") or (policy or {}).get("PolicyType") or policies.STEPS
        if kind not in policies.CONFIGURATIONS:
            raise checks.not_implemented(f"PolicyType {kind}")
        member = policies.CONFIGURATIONS[kind]
        for other in (*policies.CONFIGURATIONS.values(), "PredictiveScalingPolicyConfiguration"):
            if other in request and other != member:
                raise ValidationException(f"{other} cannot be specified for a policy of type {kind}")
        config = request.get(member) or (policy or {}).get(member)
        if not config:
            raise ValidationException(f"{member} must be specified for a policy of type {kind}")
        if policy and policy["PolicyType"] != kind:
            raise ValidationException("The type of a scaling policy cannot be changed")
        (checks.check_tracking if kind == policies.TRACKING else checks.check_steps)(config)
        old = policy or self._new_policy(request, target, kind)
        policy = old | {member: config}
        if kind == policies.TRACKING:
            # Under new names, as with every change of a policy; the old ones go once these are there.
            await self.scaler.put_alarms(policy, [str(uuid.uuid4()), str(uuid.uuid4())])
            await self.scaler.delete_alarms(old)
        self.store.save(policy)
        return {"PolicyARN": policy["PolicyARN"], "Alarms": policy["Alarms"]}

    def _new_policy(self, request: dict, target: Record, kind: str) -> Record:
        id = str(uuid.uuid4())
        policy_arn = (
            f"arn:aws:autoscaling:{host.region()}:{host.account()}:scalingPolicy:{id}:"
            f"resource/{NAMESPACE}/{request['ResourceId']}:policyName/{request['PolicyName']}"
        )
        return record(
            POLICY,
            id,
            policy_arn,
            PolicyARN=policy_arn,
            PolicyName=request["PolicyName"],
            ServiceNamespace=NAMESPACE,
            ResourceId=request["ResourceId"],
            ScalableDimension=DIMENSION,
            PolicyType=kind,
            Alarms=[],
            CreationTime=now(),
            _target=target["_name"],
            _created_by=str(uuid.uuid4()),
        )

    def _policy(self, request: dict) -> Record | None:
        for policy in self.store.all(POLICY):
            if (policy["_target"], policy["PolicyName"]) == (request["ResourceId"], request["PolicyName"]):
                return policy
        return None

    async def describe_policies(self, request: dict) -> dict:
        """DescribeScalingPolicies."""
        names, resource = request.get("PolicyNames"), request.get("ResourceId")
        checks.check_filter(request, "ResourceId")
        found = [
            policy
            for policy in self.store.all(POLICY)
            if (not names or policy["PolicyName"] in names) and resource in (None, policy["ResourceId"])
        ]
        found.sort(key=lambda policy: (policy["CreationTime"], policy["PolicyName"]))
        alarms = await self.scaler.describe_alarms() if found else []
        shown = [policy | {"Alarms": alarms_of(policy, alarms)} for policy in found]
        return answer_page("ScalingPolicies", shown, request, POLICY_PAGE)

    async def delete_policy(self, request: dict) -> dict:
        """DeleteScalingPolicy: the alarms of target tracking go with it."""
        policy = self._policy(request)
        if policy is None:
            words = f"No scaling policy found for {described(request)}, policy name: {request['PolicyName']}"
            raise Refusal("ObjectNotFoundException", words)
        await self.scaler.forget_policy(policy)
        return {}

    # Activities and tags

    async def describe_activities(self, request: dict) -> dict:
        """DescribeScalingActivities: newest first; those that changed nothing only if asked for."""
        resource = request.get("ResourceId")
        checks.check_filter(request, "ResourceId")
        found = [
            activity
            for activity in self.store.all(ACTIVITY)
            if resource in (None, activity["ResourceId"])
            and (request.get("IncludeNotScaledActivities") or "NotScaledReasons" not in activity)
        ]
        found.sort(key=lambda activity: activity["StartTime"], reverse=True)
        return answer_page("ScalingActivities", found, request, PAGE)

    def _tagged(self, request: dict) -> Record:
        target = self.store.by_arn(request["ResourceARN"])
        if target is None or target["_kind"] != TARGET:
            words = f"The specified resource doesn't exist: {request['ResourceARN']}"
            raise Refusal("ResourceNotFoundException", words, ResourceName=request["ResourceARN"])
        return target

    async def tag(self, request: dict) -> dict:
        """TagResource."""
        target = self._tagged(request)
        target["_tags"] |= request["Tags"]
        self.store.save(target)
        return {}

    async def untag(self, request: dict) -> dict:
        """UntagResource."""
        target = self._tagged(request)
        target["_tags"] = {key: value for key, value in target["_tags"].items() if key not in request["TagKeys"]}
        self.store.save(target)
        return {}

    async def list_tags(self, request: dict) -> dict:
        """ListTagsForResource."""
        return {"Tags": self._tagged(request)["_tags"]}

    # What SageMaker asks

    def targets_of(self, endpoint: str) -> list[Record]:
        """The scalable targets among an endpoint's variants."""
        return [
            target
            for target in self.store.all(TARGET)
            if policies.dimensions(target["ResourceId"])["EndpointName"] == endpoint
        ]


def described(request: dict) -> str:
    """What a request names, as AWS's errors say it."""
    return (
        f"service namespace: {request['ServiceNamespace']}, resource ID: {request['ResourceId']}, "
        f"scalable dimension: {request['ScalableDimension']}"
    )


def alarms_of(policy: Record, alarms: list[dict]) -> list[dict]:
    """The alarms made for a policy, or, of step scaling, those that name it as their action."""
    if policy["PolicyType"] == policies.TRACKING:
        return policy["Alarms"]
    named = [alarm for alarm in alarms if invokes(alarm, policy)]
    return [{"AlarmName": alarm["AlarmName"], "AlarmARN": alarm["AlarmArn"]} for alarm in named]


def answer_page(member: str, found: list[Record], request: dict, most: int) -> dict:
    """One page of a Describe answer."""
    start = 0
    if token := request.get("NextToken"):
        try:
            start = int(base64.urlsafe_b64decode(token.encode()))
        except ValueError:
            raise Refusal("InvalidNextTokenException", "The next token supplied is invalid") from None
    end = start + max(1, min(most, request.get("MaxResults", most)))
    shown = [{name: value for name, value in item.items() if not name.startswith("_")} for item in found[start:end]]
    more = {"NextToken": base64.urlsafe_b64encode(str(end).encode()).decode()} if end < len(found) else {}
    return {member: shown} | more


_service: AutoScaling | None = None


def service(call: Call) -> AutoScaling:
    """The one service of this emulator, made on first use, and watching from then on. `call` reaches other services."""
    global _service
    if _service is None:
        policies.alarm_period()  # a wrong setting shows at once
        _service = AutoScaling(Store(Settings().state_dir / "autoscaling"), call)
        _service.watching = asyncio.create_task(_service.scaler.watch())
    return _service


def alarmed(account: str, region: str, alarm: str) -> None:
    """An alarm that invokes a policy went into ALARM. Callable from any thread."""
    if _service is not None:
        _service.scaler.alarmed.add((account, region, alarm))
