"""Endpoints: fleets of serving processes, blue/green updates that watch alarms, and the router in front of them."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import shutil
import time
import uuid
from pathlib import Path

from . import host
from .errors import (
    ModelError,
    RequestEntityTooLarge,
    ServiceUnavailable,
    ThrottlingException,
    ValidationError,
    ValidationException,
)
from .instances import (
    BrokenAnswer,
    Fleet,
    HealthError,
    Instance,
    NotReached,
    Variant,
    serving_command,
    serving_environment,
    smooth_choice,
)
from .jobs import FAILURE_REASON_LIMIT, Work, summaries
from .registry import Registry, could_not_find
from .settings import REAL_TIME_BODY_LIMIT, SERVERLESS_BODY_LIMIT
from .store import Record, Store, arn, now, page, record
from .transfers import TransferError, Transfers

logger = logging.getLogger(__name__)
KIND = "endpoint"
NAMESPACE = "AWS/SageMaker"
ALARM_INTERVAL = 0.5  # seconds between looks at the alarms
SERVER_GRACE = 30.0  # seconds between SIGTERM and SIGKILL of a server
MAX_CANARY_PERCENT = 50
LINEAR_PERCENT = (10, 50)
FORWARDED = {  # the runtime API's headers, as the container sees them
    "content-type": "Content-Type",
    "accept": "Accept",
    "x-amzn-sagemaker-custom-attributes": "X-Amzn-SageMaker-Custom-Attributes",
    "x-amzn-sagemaker-inference-id": "X-Amzn-SageMaker-Inference-Id",
    "x-amzn-sagemaker-target-model": "X-Amzn-SageMaker-Target-Model",
}


class RolledBack(Exception):
    """The update is undone; the text is the reason."""


class Traffic:
    """What answers for one endpoint now: the live fleet, and during an update the new one with its share."""

    def __init__(self, blue: Fleet) -> None:
        self.blue = blue
        self.green: Fleet | None = None
        self.share = 0.0  # of the requests that green gets

    def choose(self) -> Fleet:
        """The fleet for the next request."""
        if self.green is None or self.share <= 0:
            return self.blue
        if self.share >= 1:
            return self.green
        return smooth_choice([self.blue, self.green], [1 - self.share, self.share])


class Endpoints:
    """CreateEndpoint, UpdateEndpoint, InvokeEndpoint and their siblings."""

    def __init__(self, store: Store, work: Work, registry: Registry) -> None:
        self.store, self.work, self.registry = store, work, registry
        self.traffic: dict[str, Traffic] = {}  # by ARN

    # Control plane

    async def create(self, request: dict) -> dict:
        """CreateEndpoint."""
        name = request["EndpointName"]
        endpoint_arn = arn(KIND, name)
        if self.store.find(KIND, name):
            raise ValidationException(f'Cannot create already existing endpoint "{endpoint_arn}".')
        self.registry.config(request["EndpointConfigName"])
        if request.get("DeploymentConfig"):
            self._check_deployment(request["DeploymentConfig"], request["EndpointConfigName"])
        created = now()
        endpoint = record(
            KIND,
            name,
            endpoint_arn,
            EndpointName=name,
            EndpointArn=endpoint_arn,
            EndpointConfigName=request["EndpointConfigName"],
            EndpointStatus="Creating",
            CreationTime=created,
            LastModifiedTime=created,
            LastDeploymentConfig=request.get("DeploymentConfig"),
            _tags=request.get("Tags", []),
        )
        self.store.save(endpoint)
        self.work.start(self._create(endpoint))
        return {"EndpointArn": endpoint_arn}

    async def _create(self, endpoint: Record) -> None:
        fleet: Fleet | None = None
        try:
            fleet = await self._build(endpoint, endpoint["EndpointConfigName"])
            fleet.start()
            await fleet.healthy(self._health_timeout(fleet.config_name))
        except asyncio.CancelledError:
            if fleet:
                await self._retire(fleet)
            raise
        except Exception as error:
            if not isinstance(error, HealthError | TransferError | ValidationException):
                logger.exception("endpoint %s could not be created", endpoint["EndpointName"])
            if fleet:
                await self._retire(fleet)
            self._become(endpoint, "Failed", str(error))
            return
        self.traffic[endpoint["_arn"]] = Traffic(fleet)
        self._serve(endpoint, fleet)

    def _serve(self, endpoint: Record, fleet: Fleet, reason: str = "") -> None:
        """The endpoint is in service with this fleet."""
        endpoint["EndpointConfigName"] = fleet.config_name
        endpoint["ProductionVariants"] = self._variants(fleet)
        endpoint.pop("PendingDeploymentSummary", None)
        self._become(endpoint, "InService", reason)

    def _become(self, endpoint: Record, status: str, reason: str = "") -> None:
        endpoint["EndpointStatus"] = status
        endpoint["LastModifiedTime"] = now()
        endpoint.pop("FailureReason", None)
        if reason:
            endpoint["FailureReason"] = reason[:FAILURE_REASON_LIMIT]
        self.store.save(endpoint)

    def _variants(self, fleet: Fleet) -> list[dict]:
        """ProductionVariants as DescribeEndpoint shows them."""
        shown = []
        for variant in fleet.variants:
            config = self.store.find("endpoint-config", fleet.config_name) or {"ProductionVariants": []}
            model = next(
                (item["ModelName"] for item in config["ProductionVariants"] if item["VariantName"] == variant.name), ""
            )
            images = []
            if model and self.store.find("model", model):
                image = self.registry.model_container(model)[0].get("Image", "")
                images = [{"SpecifiedImage": image, "ResolvedImage": image, "ResolutionTime": now()}]
            entry = {
                "VariantName": variant.name,
                "DeployedImages": images,
                "CurrentWeight": variant.weight,
                "DesiredWeight": variant.weight,
            }
            if variant.serverless:
                entry |= {"CurrentServerlessConfig": variant.serverless, "DesiredServerlessConfig": variant.serverless}
            else:
                entry |= {
                    "CurrentInstanceCount": len(variant.instances),
                    "DesiredInstanceCount": len(variant.instances),
                }
            shown.append(entry)
        return shown

    async def _build(self, endpoint: Record, config_name: str) -> Fleet:
        """The fleet of a configuration: models unpacked once each, no process started yet."""
        config = self.registry.config(config_name)
        log_group = f"/aws/sagemaker/Endpoints/{endpoint['EndpointName']}"
        folder = self.work.settings.state_dir / "endpoints" / host.account() / host.region() / endpoint["_name"]
        folder.mkdir(parents=True, exist_ok=True)
        counts = [
            1 if "ServerlessConfig" in item else item["InitialInstanceCount"] for item in config["ProductionVariants"]
        ]
        variants = []
        for definition, count in zip(config["ProductionVariants"], counts, strict=True):
            container, role = self.registry.model_container(definition["ModelName"])
            role_environment = host.role_environment(role, endpoint["_arn"])
            model = await self._model_folder(container, Transfers(role_environment, role))
            argv = serving_command(container["Image"], self.work.settings.checkout)
            env = serving_environment(container, model, role_environment, sum(counts))
            instances = [
                Instance(
                    self.work,
                    argv,
                    env,
                    folder,
                    log_group,
                    f"{definition['VariantName']}/i-{uuid.uuid4().hex[:17]}",
                    model,
                )
                for _ in range(count)
            ]
            variants.append(Variant(definition, instances))
        return Fleet(config_name, variants)

    async def _model_folder(self, container: dict, transfers: Transfers) -> Path:
        """Where the model's data lies unpacked, for all instances that serve it."""
        url = container.get("ModelDataUrl", "")
        folder = self.work.settings.state_dir / "models" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}"
        folder = folder.with_name(f"{folder.name}-{uuid.uuid4().hex[:8]}")  # the object may have changed since
        if url:
            await self.work.blocking(transfers.unpack, url, folder)
        else:
            folder.mkdir(parents=True)
        return folder

    def _health_timeout(self, config_name: str) -> float:
        variants = self.registry.config(config_name)["ProductionVariants"]
        asked = [item.get("ContainerStartupHealthCheckTimeoutInSeconds") for item in variants]
        return max([seconds for seconds in asked if seconds] or [self.work.settings.health_timeout])

    def _get(self, request: dict) -> Record:
        name = request["EndpointName"]
        return self.store.get(KIND, name, lambda: could_not_find("endpoint", arn(KIND, name)))

    async def describe(self, request: dict) -> dict:
        """DescribeEndpoint."""
        return self._get(request)

    async def listing(self, request: dict) -> dict:
        """ListEndpoints."""
        found, token = page(self.store.all(KIND), request, "EndpointName", "EndpointStatus")
        return {
            "Endpoints": [
                *summaries(found, "EndpointName", "EndpointArn", "CreationTime", "LastModifiedTime", "EndpointStatus")
            ],
            "NextToken": token,
        }

    async def delete(self, request: dict) -> dict:
        """DeleteEndpoint: drains in the background, and the name is free when that is done."""
        endpoint = self._get(request)
        if endpoint["EndpointStatus"] not in ("InService", "Failed", "OutOfService"):
            raise ValidationException(f'Cannot update in-progress endpoint "{endpoint["_arn"]}".')
        self._become(endpoint, "Deleting")
        self.work.start(self._delete(endpoint))
        return {}

    async def _delete(self, endpoint: Record) -> None:
        traffic = self.traffic.pop(endpoint["_arn"], None)
        if traffic:
            await self._retire(traffic.blue)
        self.store.delete(endpoint)

    async def _retire(self, fleet: Fleet) -> None:
        """Drains and stops a fleet, and removes its unpacked models; a fleet without requests has nothing to drain."""
        await fleet.stop(self.work.settings.drain_timeout, SERVER_GRACE)
        for folder in {instance.cwd for instance in fleet.instances}:
            await self.work.blocking(shutil.rmtree, folder, True)

    # Updates

    async def update(self, request: dict) -> dict:
        """UpdateEndpoint: a new fleet beside the old one, traffic shifted as DeploymentConfig says."""
        endpoint = self._get(request)
        config_name = request["EndpointConfigName"]
        self.registry.config(config_name)
        if endpoint["EndpointStatus"] not in ("InService", "Failed") or endpoint["_arn"] not in self.traffic:
            if endpoint["EndpointStatus"] == "Failed":
                raise ValidationException(
                    f'Cannot update endpoint "{endpoint["_arn"]}" because it is in status Failed.'
                )
            raise ValidationException(f'Cannot update in-progress endpoint "{endpoint["_arn"]}".')
        deployment = request.get("DeploymentConfig") or {}
        if request.get("RetainDeploymentConfig") and not deployment:
            deployment = endpoint.get("LastDeploymentConfig") or {}
        if deployment:
            self._check_deployment(deployment, config_name)
        endpoint["LastDeploymentConfig"] = deployment or default_deployment()
        endpoint["PendingDeploymentSummary"] = {
            "EndpointConfigName": config_name,
            "StartTime": now(),
            "ProductionVariants": [],
        }
        self._become(endpoint, "Updating")
        self.work.start(self._update(endpoint, config_name, endpoint["LastDeploymentConfig"]))
        return {"EndpointArn": endpoint["_arn"]}

    def _check_deployment(self, deployment: dict, config_name: str) -> None:
        variants = self.registry.config(config_name)["ProductionVariants"]
        if any("ServerlessConfig" in variant for variant in variants):
            raise ValidationException("DeploymentConfig is not supported for serverless endpoints.")
        alarms = deployment.get("AutoRollbackConfiguration", {}).get("Alarms", [])
        missing = [
            name
            for name, state in host.alarm_states(item.get("AlarmName", "") for item in alarms).items()
            if state is None
        ]
        if missing:
            raise ValidationException(f"The following CloudWatch alarms could not be found: {missing}.")
        policy = deployment.get("BlueGreenUpdatePolicy")
        if not policy:
            return
        routing = policy["TrafficRoutingConfiguration"]
        if routing["Type"] == "ALL_AT_ONCE":
            return
        member = "CanarySize" if routing["Type"] == "CANARY" else "LinearStepSize"
        if not (size := routing.get(member)):
            raise ValidationException(f"You must specify {member} for traffic routing of type {routing['Type']}.")
        total = sum(variant["InitialInstanceCount"] for variant in variants)
        percent = size["Value"] if size["Type"] == "CAPACITY_PERCENT" else 100 * size["Value"] / total
        if percent > MAX_CANARY_PERCENT:
            raise ValidationException(
                f"{member} must be less than or equal to {MAX_CANARY_PERCENT}% of the variant's "
                f"total instance count, found {size['Value']} of {total} instances."
                if size["Type"] == "INSTANCE_COUNT"
                else f"{member} must be less than or equal to {MAX_CANARY_PERCENT}%, found {size['Value']}%."
            )
        if routing["Type"] == "LINEAR" and percent < LINEAR_PERCENT[0]:
            raise ValidationException(
                f"LinearStepSize must be at least {LINEAR_PERCENT[0]}% of the variant's total "
                f"instance count, found {percent:g}%."
            )

    async def _update(self, endpoint: Record, config_name: str, deployment: dict) -> None:
        traffic = self.traffic[endpoint["_arn"]]
        policy = deployment.get("BlueGreenUpdatePolicy") or default_deployment()["BlueGreenUpdatePolicy"]
        alarms = [item["AlarmName"] for item in deployment.get("AutoRollbackConfiguration", {}).get("Alarms", [])]
        limit = policy.get("MaximumExecutionTimeoutInSeconds", math.inf)
        deadline = time.monotonic() + limit
        blue = traffic.blue
        green: Fleet | None = None
        try:
            green = await self._build(endpoint, config_name)
            green.start()
            self._pending(endpoint, green, "Creating")
            await green.healthy(min(limit, self._health_timeout(config_name)))
            traffic.green = green
            blue.credit = green.credit = 0.0
            for share, wait in steps(policy, len(green.instances)):
                traffic.share = share
                self._pending(endpoint, green, "Baking")
                await self._bake(wait, alarms, deadline)
        except Exception as error:
            if not isinstance(error, RolledBack | HealthError | TransferError | ValidationException):
                logger.exception("the update of endpoint %s failed", endpoint["EndpointName"])
            traffic.green, traffic.share = None, 0.0
            self._become(endpoint, "RollingBack", str(error))
            if green:
                await self._retire(green)
            self._serve(endpoint, blue, str(error))
            return
        traffic.blue, traffic.green, traffic.share = green, None, 0.0
        await self._retire(blue)
        self._serve(endpoint, green)

    def _pending(self, endpoint: Record, green: Fleet, stage: str) -> None:
        """PendingDeploymentSummary of an endpoint that is being updated."""
        variants = self._variants(green)
        for variant in variants:
            variant["VariantStatus"] = [{"Status": stage, "StartTime": now()}]
        endpoint["PendingDeploymentSummary"]["ProductionVariants"] = variants
        self.store.save(endpoint)

    async def _bake(self, seconds: float, alarms: list[str], deadline: float) -> None:
        """Waits while watching the alarms; raises RolledBack."""
        end = time.monotonic() + seconds
        while True:
            ringing = [name for name, state in host.alarm_states(alarms).items() if state == "ALARM"]
            if ringing:
                raise RolledBack(
                    "The endpoint update was rolled back because the following CloudWatch alarms went "
                    f"into ALARM state: {', '.join(ringing)}."
                )
            left = end - time.monotonic()
            if left <= 0:
                return
            if time.monotonic() > deadline:
                raise RolledBack(
                    "The endpoint update was rolled back because it did not end within "
                    "MaximumExecutionTimeoutInSeconds."
                )
            await asyncio.sleep(min(left, ALARM_INTERVAL))

    # Runtime

    async def invoke(self, name: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        """InvokeEndpoint: the container's 2xx as it is, anything else as ModelError."""
        began = time.perf_counter()
        endpoint = self.store.find(KIND, name)
        if endpoint is None or endpoint["EndpointStatus"] == "Deleting":
            raise ValidationError(f"Endpoint {name} of account {host.account()} not found.")
        traffic = self.traffic.get(endpoint["_arn"])
        if traffic is None:
            raise ValidationError(
                f"Endpoint {name} of account {host.account()} is not in service (status {endpoint['EndpointStatus']})."
            )
        variant = self._variant(traffic.choose(), headers.get("x-amzn-sagemaker-target-variant"))
        limit = SERVERLESS_BODY_LIMIT if variant.serverless else REAL_TIME_BODY_LIMIT
        if len(body) > limit:
            raise RequestEntityTooLarge(f"HTTP content length exceeded {limit} bytes.")
        if variant.serverless and variant.concurrent >= variant.serverless["MaxConcurrency"]:
            raise ThrottlingException("Rate exceeded")
        variant.concurrent += 1
        try:
            status, answer_headers, answer, latency = await self._forward(variant, headers, body)
        finally:
            variant.concurrent -= 1
        self._record(name, variant.name, status, latency, time.perf_counter() - began - latency)
        if not 200 <= status < 300:
            raise self._model_error(name, status, answer)
        out = {
            "Content-Type": answer_headers.get("content-type", "application/octet-stream"),
            "x-Amzn-Invoked-Production-Variant": variant.name,
        }
        if attributes := answer_headers.get("x-amzn-sagemaker-custom-attributes"):
            out["X-Amzn-SageMaker-Custom-Attributes"] = attributes
        return 200, out, answer

    @staticmethod
    def _variant(fleet: Fleet, target: str | None) -> Variant:
        if target:
            for variant in fleet.variants:
                if variant.name == target:
                    return variant
            raise ValidationError(f"Variant {target} could not be found for this endpoint.")
        if len(fleet.variants) == 1:
            return fleet.variants[0]
        return smooth_choice(fleet.variants, [variant.weight for variant in fleet.variants])

    @staticmethod
    async def _forward(variant: Variant, headers: dict[str, str], body: bytes) -> tuple[int, dict, bytes, float]:
        """Sends the request to one instance, and to the next only if the first was not reached at all."""
        sent = {FORWARDED[name]: value for name, value in headers.items() if name in FORWARDED}
        for instance in variant.candidates():
            began = time.perf_counter()
            try:
                status, answer_headers, answer = await instance.invoke(sent, body)
            except NotReached:
                continue
            except TimeoutError:
                message = b"Your invocation timed out while waiting for a response from container primary."
                return 504, {}, message, time.perf_counter() - began
            except BrokenAnswer as error:
                message = f"The connection to container primary broke: {error}".encode()
                return 503, {}, message, time.perf_counter() - began
            return status, answer_headers, answer, time.perf_counter() - began
        raise ServiceUnavailable("No instance of the endpoint is ready. Please retry.")

    @staticmethod
    def _record(endpoint: str, variant: str, status: int, latency: float, overhead: float) -> None:
        """The metrics that SageMaker publishes for each invocation; latencies in microseconds."""
        dimensions = {"EndpointName": endpoint, "VariantName": variant}
        for name, value, unit in (
            ("Invocations", 1.0, "None"),
            ("Invocation4XXErrors", float(400 <= status < 500), "None"),
            ("Invocation5XXErrors", float(status >= 500), "None"),
            ("InvocationModelErrors", float(not 200 <= status < 300), "None"),
            ("ModelLatency", latency * 1e6, "Microseconds"),
            ("OverheadLatency", max(0.0, overhead) * 1e6, "Microseconds"),
        ):
            host.record_metric(NAMESPACE, name, value, unit, dimensions)

    @staticmethod
    def _model_error(name: str, status: int, answer: bytes) -> ModelError:
        side = "client" if 400 <= status < 500 else "server"
        original = answer.decode(errors="replace")
        group, region = f"/aws/sagemaker/Endpoints/{name}", host.region()
        return ModelError(
            f'Received {side} error ({status}) from primary with message "{original}". See '
            f"https://{region}.console.aws.amazon.com/cloudwatch/home?region={region}#logEventViewer:group={group} in "
            f"account {host.account()} for more information.",
            OriginalStatusCode=status,
            OriginalMessage=original,
            LogStreamArn=f"arn:aws:logs:{region}:{host.account()}:log-group:{group}",
        )

    def recover(self) -> None:
        """After a restart: endpoints that were in service, or on the way, are brought up with what they last served."""
        for endpoint in self.store.all(KIND):
            status = endpoint["EndpointStatus"]
            if status == "Deleting":
                self.store.delete(endpoint)
            elif status != "Failed":
                endpoint.pop("PendingDeploymentSummary", None)
                self._become(endpoint, "Creating" if status == "Creating" else "Updating")
                self.work.start(self._create(endpoint))


def default_deployment() -> dict:
    """What UpdateEndpoint does without a DeploymentConfig."""
    return {
        "BlueGreenUpdatePolicy": {
            "TrafficRoutingConfiguration": {"Type": "ALL_AT_ONCE", "WaitIntervalInSeconds": 0},
            "TerminationWaitInSeconds": 0,
        }
    }


def steps(policy: dict, instances: int) -> list[tuple[float, float]]:
    """The traffic shifts of a blue/green policy: (green's share afterwards, seconds of baking).

    The last bake lasts TerminationWaitInSeconds: then the old fleet goes.

    >>> steps({"TrafficRoutingConfiguration": {"Type": "CANARY", "WaitIntervalInSeconds": 60,
    ...        "CanarySize": {"Type": "INSTANCE_COUNT", "Value": 1}}, "TerminationWaitInSeconds": 5}, 4)
    [(0.25, 60.0), (1.0, 5.0)]
    """
    routing = policy["TrafficRoutingConfiguration"]
    wait = float(routing.get("WaitIntervalInSeconds", 0))
    last = float(policy.get("TerminationWaitInSeconds", 0))
    size = routing.get("CanarySize") if routing["Type"] == "CANARY" else routing.get("LinearStepSize")
    if routing["Type"] == "ALL_AT_ONCE" or not size:
        # AWS bakes all traffic for TerminationWaitInSeconds before the old fleet goes.
        return [(1.0, max(last, wait))]
    portion = size["Value"] / (100 if size["Type"] == "CAPACITY_PERCENT" else max(1, instances))
    portion = min(portion, MAX_CANARY_PERCENT / 100)
    if routing["Type"] == "CANARY":
        return [(portion, wait), (1.0, last)]
    count = math.ceil(1 / portion - 1e-9)
    return [(min(1.0, portion * step), wait if step < count else last) for step in range(1, count + 1)]
