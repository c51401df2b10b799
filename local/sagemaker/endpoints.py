"""Endpoints: made, updated blue/green under the eyes of alarms, scaled, deleted, and brought back after a restart."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from . import host, rollout
from .errors import ResourceLimitExceeded, ValidationException
from .fleets import Fleet, Traffic, Variant, VariantPlan, healthy, stop
from .instances import HealthError, Instance, serving_command, serving_environment
from .jobs import FAILURE_REASON_LIMIT, Work, summaries
from .registry import Registry, could_not_find
from .rollout import RolledBack
from .router import Router
from .store import Record, Store, arn, now, page, record
from .transfers import TransferError, Transfers

logger = logging.getLogger(__name__)
KIND = "endpoint"
INSTANCE_QUOTA = 100  # of one type, in an account and region; AWS's differ by type, and are smaller at first
ALARM_INTERVAL = 0.5  # seconds between looks at the alarms
EXPECTED = (RolledBack, HealthError, TransferError, ValidationException)  # whose text is the reason, without a trace


class Endpoints:
    """CreateEndpoint, UpdateEndpoint and their siblings. What serves now is known to `router`."""

    def __init__(self, store: Store, work: Work, registry: Registry) -> None:
        self.store, self.work, self.registry = store, work, registry
        self.router = Router(store)

    # Creation, description, deletion

    async def create(self, request: dict) -> dict:
        """CreateEndpoint."""
        name = request["EndpointName"]
        endpoint_arn = arn(KIND, name)
        if self.store.by_arn(endpoint_arn):  # ARNs are in lower case, so names do not differ by case alone
            raise ValidationException(f'Cannot create already existing endpoint "{endpoint_arn}".')
        config_name = request["EndpointConfigName"]
        plans = self._plans(config_name)
        if deployment := request.get("DeploymentConfig"):
            self._check_deployment(deployment, plans)
        self._check_quota(plans)
        created = now()
        endpoint = record(
            KIND,
            name,
            endpoint_arn,
            EndpointName=name,
            EndpointArn=endpoint_arn,
            EndpointConfigName=config_name,
            EndpointStatus="Creating",
            CreationTime=created,
            LastModifiedTime=created,
            LastDeploymentConfig=deployment,
            _tags=request.get("Tags", []),
            _serving=serving(config_name, plans),
        )
        self._pending(endpoint, config_name, plans)
        self.work.start(self._start(endpoint))
        return {"EndpointArn": endpoint_arn}

    async def _start(self, endpoint: Record, reason: str = "") -> None:
        """Brings up what the record says the endpoint serves: at first, and after a restart (with its reason)."""
        fleet: Fleet | None = None
        kept = endpoint["_serving"]
        plans = [VariantPlan(**plan) for plan in kept["variants"]]
        try:
            fleet = await self._build(endpoint, kept["config"], plans)
            await self._launch(fleet)
        except asyncio.CancelledError:
            if fleet:
                await self._retire(fleet)
            raise
        except Exception as error:
            if not isinstance(error, EXPECTED):
                logger.exception("endpoint %s could not be started", endpoint["EndpointName"])
            if fleet:
                await self._retire(fleet)
            endpoint.pop("PendingDeploymentSummary", None)
            self._become(endpoint, "Failed", str(error))
            return
        self.router.traffic[endpoint["_arn"]] = Traffic(fleet)
        self._serve(endpoint, fleet, reason)

    def _get(self, request: dict) -> Record:
        name = request["EndpointName"]
        return self.store.get(KIND, name, lambda: could_not_find("endpoint", arn(KIND, name)))

    async def describe(self, request: dict) -> dict:
        """DescribeEndpoint."""
        return self._get(request)

    async def listing(self, request: dict) -> dict:
        """ListEndpoints."""
        found, token = page(self.store.all(KIND), request, "EndpointName", "EndpointStatus", default_order="Descending")
        return {
            "Endpoints": [
                *summaries(found, "EndpointName", "EndpointArn", "CreationTime", "LastModifiedTime", "EndpointStatus")
            ],
            "NextToken": token,
        }

    async def delete(self, request: dict) -> dict:
        """DeleteEndpoint: drains in the background, and the name is free when that is done."""
        endpoint = self._get(request)
        if endpoint["EndpointStatus"] not in ("InService", "Failed"):
            raise in_progress(endpoint)
        self._become(endpoint, "Deleting")
        self.work.start(self._delete(endpoint))
        return {}

    async def _delete(self, endpoint: Record) -> None:
        if traffic := self.router.traffic.pop(endpoint["_arn"], None):
            await self._retire(traffic.blue)
        await self._remove(self._logs() / endpoint["_name"])
        self.store.delete(endpoint)

    # Updates

    def _settled(self, endpoint: Record) -> Traffic:
        """The traffic of an endpoint that may be changed; raises ValidationException for one that may not."""
        if endpoint["EndpointStatus"] == "Failed":
            # "DeleteEndpoint is the only operation that can be performed on a failed endpoint."
            raise ValidationException(f'Cannot update endpoint "{endpoint["_arn"]}" because it is in status Failed.')
        if endpoint["EndpointStatus"] != "InService":
            raise in_progress(endpoint)
        return self.router.traffic[endpoint["_arn"]]

    async def update(self, request: dict) -> dict:
        """UpdateEndpoint: a new fleet beside the old one, traffic shifted as DeploymentConfig says."""
        endpoint = self._get(request)
        config_name = request["EndpointConfigName"]
        plans = self._plans(config_name)
        blue = self._settled(endpoint).blue
        self.registry.config(blue.config_name)  # AWS needs the old configuration, too, though it lets users delete it
        excluded = [item["VariantPropertyType"] for item in request.get("ExcludeRetainedVariantProperties", [])]
        if request.get("RetainAllVariantProperties"):
            plans = retained(plans, blue, excluded)
        deployment = request.get("DeploymentConfig") or {}
        if request.get("RetainDeploymentConfig") and not deployment:
            deployment = endpoint.get("LastDeploymentConfig") or {}
        if deployment:
            if {plan.name for plan in plans} != {variant.name for variant in blue.variants}:
                raise ValidationException(
                    "With a DeploymentConfig, the new endpoint configuration must have the same variant names as the "
                    f'old one "{blue.config_name}".'
                )
            self._check_deployment(deployment, plans)
        if any(plan.serverless for plan in plans) and not any(variant.plan.serverless for variant in blue.variants):
            # https://docs.aws.amazon.com/sagemaker/latest/dg/serverless-endpoints.html, feature exclusions
            raise ValidationException(
                f'Endpoint "{endpoint["_arn"]}" is instance-based and cannot be converted to a serverless endpoint.'
            )
        self._check_quota(plans)
        endpoint["LastDeploymentConfig"] = deployment or rollout.default_deployment()
        endpoint["EndpointStatus"] = "Updating"
        self._pending(endpoint, config_name, plans)
        self.work.start(self._update(endpoint, config_name, plans, endpoint["LastDeploymentConfig"]))
        return {"EndpointArn": endpoint["_arn"]}

    def _check_deployment(self, deployment: dict, plans: list[VariantPlan]) -> None:
        rollout.check(deployment, plans)
        states = host.alarm_states(rollout.alarm_names(deployment))
        if missing := [name for name, state in states.items() if state is None]:
            raise ValidationException(f"The following CloudWatch alarms could not be found: {missing}.")

    async def _update(self, endpoint: Record, config_name: str, plans: list[VariantPlan], deployment: dict) -> None:
        traffic = self.router.traffic[endpoint["_arn"]]
        policy = deployment.get("BlueGreenUpdatePolicy") or rollout.default_deployment()["BlueGreenUpdatePolicy"]
        alarms = rollout.alarm_names(deployment)
        blue = traffic.blue
        green: Fleet | None = None
        try:
            async with asyncio.timeout(policy.get("MaximumExecutionTimeoutInSeconds")) as clock:
                green = await self._build(endpoint, config_name, plans)
                await self._launch(green)
                watch(alarms)  # one that rings already stops the update before it has touched the traffic
                shifts = rollout.steps(policy, min(plan.count for plan in plans))
                for share, wait in shifts:
                    self._stage(endpoint, green, share, "ActivatingTraffic", "Activating traffic on {capacity}.")
                    traffic.shift(green, share)
                    name = "TerminationWaitInSeconds" if share >= 1 else "WaitIntervalInSeconds"
                    text = f"Baking for {wait:.0f} seconds ({name}) with traffic enabled on {{capacity}}."
                    self._stage(endpoint, green, share, "Baking", text)
                    await bake(wait, alarms)
        except Exception as error:
            reason = str(error)
            if isinstance(error, TimeoutError) and clock.expired():
                reason = "The update was rolled back because it did not end within MaximumExecutionTimeoutInSeconds."
            elif not isinstance(error, EXPECTED):
                logger.exception("the update of endpoint %s failed", endpoint["EndpointName"])
            traffic.settle(blue)
            if green:
                self._stage(endpoint, green, 0.0, "Deleting", "Terminating {count} instance(s).")
            self._become(endpoint, "RollingBack", reason)
            if green:
                await self._retire(green)
            self._serve(endpoint, blue, reason)
            return
        traffic.settle(green)
        self._commit(endpoint, config_name, plans)
        endpoint["ProductionVariants"] = [
            summary(blue, variant, status("Deleting", f"Terminating {len(variant.instances)} instance(s)."))
            for variant in blue.variants
        ]
        self.store.save(endpoint)
        await self._retire(blue)
        self._serve(endpoint, green)

    async def update_weights_and_capacities(self, request: dict) -> dict:
        """UpdateEndpointWeightsAndCapacities: new instances get requests once healthy, surplus ones are drained."""
        endpoint = self._get(request)
        fleet = self._settled(endpoint).blue
        changes: dict[str, dict] = {}
        for item in request["DesiredWeightsAndCapacities"]:
            name = item["VariantName"]
            if name in changes:
                raise ValidationException(f'The variant name "{name}" was non-unique within the request.')
            if name not in [variant.name for variant in fleet.variants]:
                raise ValidationException(
                    f'The variant name(s) "{name}" is/are not present within endpoint configuration '
                    f'"{fleet.config_name}".'
                )
            changes[name] = item
        wanted = [rescaled(variant.plan, changes.get(variant.name, {})) for variant in fleet.variants]
        pairs = zip(fleet.variants, wanted, strict=True)
        self._check_quota([replace(plan, count=plan.count - variant.plan.count) for variant, plan in pairs])
        endpoint["ProductionVariants"] = [
            summary(fleet, variant, status("Updating", scaling(variant.plan.count, plan.count)), plan)
            for variant, plan in zip(fleet.variants, wanted, strict=True)
        ]
        self._become(endpoint, "Updating")
        self.work.start(self._rescale(endpoint, fleet, wanted))
        return {"EndpointArn": endpoint["_arn"]}

    async def _rescale(self, endpoint: Record, fleet: Fleet, wanted: list[VariantPlan]) -> None:
        pairs = list(zip(fleet.variants, wanted, strict=True))
        added = {
            variant.name: [variant.new_instance() for _ in range(plan.count - len(variant.instances))]
            for variant, plan in pairs
        }
        new = [instance for instances in added.values() for instance in instances]
        try:
            for instance in new:
                instance.start()
            for variant, plan in pairs:
                await healthy(variant.name, added[variant.name], self._health_timeout(plan))
        except Exception as error:
            if not isinstance(error, EXPECTED):
                logger.exception("endpoint %s could not be scaled", endpoint["EndpointName"])
            self._become(endpoint, "RollingBack", str(error))
            await stop(new, 0)
            self._serve(endpoint, fleet, str(error))
            return
        surplus: list[Instance] = []
        for variant, plan in pairs:
            variant.plan, variant.credit = plan, 0.0
            kept = sorted([*variant.instances, *added[variant.name]], key=lambda instance: not instance.ready)
            variant.instances = kept[: plan.count]
            surplus += kept[plan.count :]
        self._commit(endpoint, fleet.config_name, wanted)
        self.store.save(endpoint)
        await stop(surplus, self.work.settings.drain_timeout)
        self._serve(endpoint, fleet)

    def _commit(self, endpoint: Record, config_name: str, plans: list[VariantPlan]) -> None:
        """From here on the change is made: a restart brings back what is new."""
        endpoint["_serving"], endpoint["_changed"] = serving(config_name, plans), True

    # Fleets

    def _check_quota(self, plans: list[VariantPlan]) -> None:
        """Raises ResourceLimitExceeded, in AWS's words, if these instances were too many beside those in use."""
        used, added = Counter[str | None](), Counter[str | None]()
        for endpoint in self.store.all(KIND):
            if endpoint["EndpointStatus"] != "Failed":
                for kept in endpoint["_serving"]["variants"]:
                    used[kept["instance_type"]] += kept["count"]
        for plan in plans:
            added[plan.instance_type] += plan.count
        for kind, count in added.items():
            if kind and count > 0 and used[kind] + count > INSTANCE_QUOTA:
                raise ResourceLimitExceeded(
                    f"The account-level service limit '{kind} for endpoint usage' is {INSTANCE_QUOTA} Instances, with "
                    f"current utilization of {used[kind]} Instances and a request delta of {count} Instances. Please "
                    "use AWS Service Quotas to request an increase for this quota. If AWS Service Quotas is not "
                    "available, contact AWS support to request an increase for this quota."
                )

    def _plans(self, config_name: str) -> list[VariantPlan]:
        """What an endpoint configuration asks for; raises ValidationException if it, or a model of it, is not there."""
        return [
            VariantPlan.of(definition, *self.registry.model_container(definition["ModelName"]))
            for definition in self.registry.config(config_name)["ProductionVariants"]
        ]

    def _logs(self) -> Path:
        return self.work.settings.state_dir / "endpoints" / host.account() / host.region()

    async def _build(self, endpoint: Record, config_name: str, plans: list[VariantPlan]) -> Fleet:
        """A fleet: models unpacked once each, no process started yet."""
        folder = self._logs() / endpoint["_name"]  # of its instances' logs, each for as long as the instance
        folder.mkdir(parents=True, exist_ok=True)
        fleet = Fleet(config_name, [], now())
        instances = sum(plan.count for plan in plans)
        try:
            for plan in plans:
                fleet.variants.append(await self._variant(endpoint, plan, folder, instances))
        except Exception:
            await self._retire(fleet)
            raise
        return fleet

    async def _variant(self, endpoint: Record, plan: VariantPlan, folder: Path, instances: int) -> Variant:
        """A variant of a fleet that has so many instances in all, whose logs are in `folder`."""
        role_environment = host.role_environment(plan.role, endpoint["_arn"])
        argv = serving_command(plan.container["Image"], self.work.settings.checkout)
        model = await self._model_folder(plan.container, Transfers(role_environment, plan.role))
        env = serving_environment(plan.container, model, role_environment, instances)
        group = f"/aws/sagemaker/Endpoints/{endpoint['EndpointName']}"

        def new_instance() -> Instance:
            stream = f"{plan.name}/i-{uuid.uuid4().hex[:17]}"
            return Instance(self.work, argv, env, folder, group, stream, model)

        return Variant(plan, new_instance)

    async def _model_folder(self, container: dict, transfers: Transfers) -> Path:
        """Where the model's data lies unpacked, for all instances that serve it."""
        url = container.get("ModelDataUrl", "")
        folder = self.work.settings.state_dir / "models" / uuid.uuid4().hex
        if not url:
            folder.mkdir(parents=True)
            return folder
        try:
            await self.work.blocking(transfers.unpack, url, folder)
        except Exception:
            await self._remove(folder)
            raise
        return folder

    async def _remove(self, folder: Path) -> None:
        await self.work.blocking(shutil.rmtree, folder, True)

    async def _launch(self, fleet: Fleet) -> None:
        """Starts every instance and waits until all are healthy; raises HealthError."""
        for instance in fleet.instances:
            instance.start()
        for variant in fleet.variants:
            await healthy(variant.name, variant.instances, self._health_timeout(variant.plan))

    def _health_timeout(self, plan: VariantPlan) -> float:
        return plan.health_timeout or self.work.settings.health_timeout

    async def _retire(self, fleet: Fleet) -> None:
        """Drains and stops a fleet, and removes its unpacked models; a fleet without requests has nothing to drain."""
        folders = {instance.cwd for instance in fleet.instances}
        await stop(fleet.instances, self.work.settings.drain_timeout)
        for folder in folders:
            await self._remove(folder)

    # What a poller sees

    def _become(self, endpoint: Record, state: str, reason: str = "") -> None:
        endpoint["EndpointStatus"] = state
        endpoint["LastModifiedTime"] = now()
        for member in ("FailureReason", "_changed"):
            endpoint.pop(member, None)
        if reason:
            endpoint["FailureReason"] = reason[:FAILURE_REASON_LIMIT]
        self.store.save(endpoint)

    def _serve(self, endpoint: Record, fleet: Fleet, reason: str = "") -> None:
        """The endpoint is in service with this fleet."""
        endpoint["EndpointConfigName"] = fleet.config_name
        endpoint["ProductionVariants"] = [summary(fleet, variant) for variant in fleet.variants]
        endpoint.pop("PendingDeploymentSummary", None)
        self._become(endpoint, "InService", reason)

    def _pending(self, endpoint: Record, config_name: str, plans: list[VariantPlan]) -> None:
        """A deployment begins: its PendingDeploymentSummary, while the instances are on their way."""
        started = now()
        endpoint["PendingDeploymentSummary"] = {
            "EndpointConfigName": config_name,
            "StartTime": started,
            "ProductionVariants": [
                described(plan, started)
                | current(plan, 0, 0.0)
                | {"VariantStatus": status("Creating", f"Launching {plan.count} instance(s).")}
                for plan in plans
            ],
        }
        self._become(endpoint, endpoint["EndpointStatus"])

    def _stage(self, endpoint: Record, green: Fleet, share: float, state: str, text: str) -> None:
        """The deployment has got to this stage, with this share of the traffic on the new fleet."""
        endpoint["PendingDeploymentSummary"]["ProductionVariants"] = [
            described(variant.plan, green.since)
            | current(variant.plan, rollout.active(variant.plan.count, share), variant.plan.weight)
            | {
                "VariantStatus": status(
                    state,
                    text.format(capacity=rollout.capacity(variant.plan.count, share), count=len(variant.instances)),
                )
            }
            for variant in green.variants
        ]
        self.store.save(endpoint)

    def recover(self) -> None:
        """After a restart: endpoints come back with what they last served; one that was being made goes on."""
        shutil.rmtree(self._logs(), ignore_errors=True)  # of instances that are gone
        for endpoint in self.store.all(KIND):
            state, reason = endpoint["EndpointStatus"], endpoint.get("FailureReason", "")
            if state == "Deleting":
                self.store.delete(endpoint)
            elif state != "Failed":
                if state == "InService" or endpoint.get("_changed"):
                    state = "SystemUpdating"  # not touched by its owner, and not to be touched until it is back
                elif state == "Updating":
                    state, reason = "RollingBack", "The update was interrupted by a restart."
                if state != "Creating":
                    endpoint.pop("PendingDeploymentSummary", None)
                self._become(endpoint, state, reason)
                self.work.start(self._start(endpoint, reason))


def in_progress(endpoint: Record) -> ValidationException:
    """AWS's words for what cannot be changed or deleted now."""
    return ValidationException(f'Cannot update in-progress endpoint "{endpoint["_arn"]}".')


def serving(config_name: str, plans: list[VariantPlan]) -> dict:
    """What an endpoint's record keeps of the fleet that serves, to bring it back after a restart."""
    return {"config": config_name, "variants": [asdict(plan) for plan in plans]}


def retained(plans: list[VariantPlan], blue: Fleet, excluded: list[str]) -> list[VariantPlan]:
    """RetainAllVariantProperties: weights and instance counts stay, but for the excluded ones."""
    now_serving = {variant.name: variant.plan for variant in blue.variants}
    result = []
    for plan in plans:
        old = now_serving.get(plan.name)
        if old and "DesiredWeight" not in excluded:
            plan = replace(plan, weight=old.weight)
        if old and "DesiredInstanceCount" not in excluded and not plan.serverless and not old.serverless:
            plan = replace(plan, count=old.count)
        result.append(plan)
    return result


def rescaled(plan: VariantPlan, change: dict) -> VariantPlan:
    """The plan with what a member of DesiredWeightsAndCapacities says; raises ValidationException."""
    count, serverless = change.get("DesiredInstanceCount"), change.get("ServerlessUpdateConfig")
    if count is not None and plan.serverless:
        raise ValidationException(f"DesiredInstanceCount is not supported for the serverless variant {plan.name}.")
    if serverless and not plan.serverless:
        raise ValidationException(f"ServerlessUpdateConfig is only supported for serverless variants, not {plan.name}.")
    if count == 0:
        raise ValidationException(f"DesiredInstanceCount of the variant {plan.name} must be at least 1.")
    return replace(
        plan,
        count=plan.count if count is None else count,
        weight=float(change.get("DesiredWeight", plan.weight)),
        serverless=(plan.serverless or {}) | serverless if serverless else plan.serverless,
    )


def scaling(old: int, new: int) -> str:
    """The status message of a variant whose instance count changes."""
    if new == old:
        return "Updating the variant."
    return f"Scaling {'out' if new > old else 'in'} desired instance count to {new}."


def status(state: str, text: str) -> list[dict]:
    """A VariantStatus, since now."""
    return [{"Status": state, "StatusMessage": text, "StartTime": now()}]


def described(plan: VariantPlan, since: float) -> dict:
    """What every summary of a variant has: name, images, and what is desired of it."""
    image = plan.container.get("Image", "")
    shown = {
        "VariantName": plan.name,
        "DeployedImages": [{"SpecifiedImage": image, "ResolvedImage": image, "ResolutionTime": since}],
        "DesiredWeight": plan.weight,
    }
    if plan.serverless:
        return shown | {"DesiredServerlessConfig": plan.serverless}
    return (
        shown
        | {"DesiredInstanceCount": plan.count}
        | ({"InstanceType": plan.instance_type} if plan.instance_type else {})
    )


def current(plan: VariantPlan, count: int, weight: float) -> dict:
    """What a variant has now, of what is desired of it."""
    of_kind = {"CurrentServerlessConfig": plan.serverless} if plan.serverless else {"CurrentInstanceCount": count}
    return {"CurrentWeight": weight} | of_kind


def summary(
    fleet: Fleet, variant: Variant, states: list[dict] | None = None, wanted: VariantPlan | None = None
) -> dict:
    """A member of DescribeEndpoint's ProductionVariants."""
    shown = described(wanted or variant.plan, fleet.since) | current(
        variant.plan, len(variant.instances), variant.plan.weight
    )
    shown.pop("InstanceType", None)
    return shown | ({"VariantStatus": states} if states else {})


def watch(alarms: Sequence[str]) -> None:
    """Raises RolledBack if one of the alarms rings."""
    ringing = [name for name, state in host.alarm_states(alarms).items() if state == "ALARM"]
    if ringing:
        raise RolledBack(
            "The update was rolled back because the following CloudWatch alarms went into ALARM state: "
            f"{', '.join(ringing)}."
        )


async def bake(seconds: float, alarms: Sequence[str]) -> None:
    """Waits while watching the alarms; raises RolledBack."""
    end = time.monotonic() + seconds
    while True:
        watch(alarms)
        left = end - time.monotonic()
        if left <= 0:
            return
        await asyncio.sleep(min(left, ALARM_INTERVAL))
