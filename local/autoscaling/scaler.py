"""Acts on alarms: looks at every scalable target once a second, and changes its variant where a policy asks for it."""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from local.sagemaker import host
from local.sagemaker.store import Record, Store, now, record

from . import policies

logger = logging.getLogger(__name__)
TARGET, POLICY, ACTIVITY = "scalable-target", "scaling-policy", "scaling-activity"
INTERVAL = 1.0  # seconds between looks
ZERO_INTERVAL = 60.0  # seconds between the zeros that a variant without requests reports
UUID_LENGTH = 36
KEPT = 500  # activities of an account and region; AWS shows those of six weeks

Call = Callable[[str, str, dict], Awaitable[dict]]  # (service, action, request) to the answer; raises Refused


class Refused(Exception):
    """Another service refused a call."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Scaler:
    """What happens to scalable targets over time."""

    def __init__(self, store: Store, call: Call) -> None:
        self.store, self.call = store, call
        self.alarmed: set[tuple[str, str, str]] = set()  # (account, region, alarm): new in ALARM; other threads add
        self._asked: dict[tuple[str, str, str], float] = {}  # when an alarm that stays in ALARM was last acted on

    async def watch(self) -> None:
        """Look after all targets, until cancelled."""
        await self._everywhere(self._restore_alarms)
        while True:
            await asyncio.sleep(INTERVAL)
            await self._everywhere(self._look)

    async def _everywhere(self, work: Callable[[], Awaitable[None]]) -> None:
        for account, region in sorted(self.store.scopes()):
            with host.scope(account, region):
                try:
                    await work()
                except Exception:
                    logger.exception("the scalable targets of %s in %s could not be looked after", account, region)

    async def _restore_alarms(self) -> None:
        """Put again what CloudWatch had not saved when the emulator was killed."""
        for policy in self.store.all(POLICY):
            names = [alarm["AlarmName"] for alarm in policy["Alarms"]]
            if names and len(await self.describe_alarms(AlarmNames=names)) < len(names):
                await self.put_alarms(policy, [name[-UUID_LENGTH:] for name in names])

    async def _look(self) -> None:
        targets = list(self.store.all(TARGET))
        alarms = await self._alarms() if targets else []
        for target in targets:
            try:
                await self._tend(target, alarms)
            except Exception:  # one broken target must not stop the others
                logger.exception("the scalable target %s could not be looked after", target["ResourceId"])

    async def _alarms(self) -> list[dict]:
        """The alarms that invoke policies now: in ALARM, or put there since the last look."""
        scope = (host.account(), host.region())
        found = {alarm["AlarmName"]: alarm for alarm in await self.describe_alarms(StateValue="ALARM")}
        new = {key for key in self.alarmed.copy() if key[:2] == scope}
        self.alarmed -= new
        for key in [key for key in self._asked if key[:2] == scope and (key[2] not in found or key in new)]:
            del self._asked[key]
        if missing := sorted({name for *_, name in new} - found.keys()):
            found |= {alarm["AlarmName"]: alarm for alarm in await self.describe_alarms(AlarmNames=missing)}
        return [alarm for alarm in found.values() if alarm.get("ActionsEnabled", True)]

    async def describe_alarms(self, **request: Any) -> list[dict]:
        """All pages of DescribeAlarms, metric alarms only."""
        found: list[dict] = []
        token: dict[str, str] = {}
        while True:
            answer = await self.call("monitoring", "DescribeAlarms", request | {"MaxRecords": 100} | token)
            found += answer.get("MetricAlarms", [])
            if not answer.get("NextToken"):
                return found
            token = {"NextToken": answer["NextToken"]}

    # One target

    async def endpoint(self, resource: str) -> dict | None:
        """The endpoint of a resource id, as DescribeEndpoint shows it; None when it is not there."""
        name = policies.dimensions(resource)["EndpointName"]
        try:
            return await self.call("sagemaker", "DescribeEndpoint", {"EndpointName": name})
        except Refused as error:
            if error.code != "ValidationException":
                raise
            return None

    async def _tend(self, target: Record, alarms: list[dict]) -> None:
        endpoint = await self.endpoint(target["ResourceId"])
        if endpoint is None or endpoint["EndpointStatus"] == "Deleting":
            await self.forget(target)  # as SageMaker does when it deletes an endpoint
            return
        variant = variant_of(endpoint.get("ProductionVariants"), target["ResourceId"])
        if variant is None or endpoint["EndpointStatus"] not in ("InService", "Failed"):
            return  # being created, updated or rolled back: nothing is changed meanwhile
        self._settle(target, endpoint["EndpointStatus"], variant)
        if endpoint["EndpointStatus"] != "InService":
            return
        self._report_zero(target)
        current = variant["DesiredInstanceCount"]
        if target.pop("_bounds_due", False):
            self.store.save(target)
            count = within(target, current)
            if count != current:
                bound = "minimum" if count > current else "maximum"
                await self._scale(target, current, count, f"{bound} capacity was set to {count}")
                return
        await self._follow(target, current, alarms)

    async def forget(self, target: Record) -> None:
        """Remove a target with its policies and their alarms; its activities stay."""
        for policy in self.policies(target):
            await self.forget_policy(policy)
        self.store.delete(target)

    async def forget_policy(self, policy: Record) -> None:
        """Remove a policy, and the alarms that were made for it."""
        await self.delete_alarms(policy)
        self.store.delete(policy)

    async def put_alarms(self, policy: Record, ids: list[str]) -> None:
        """Put the alarms of a target tracking policy; `ids` end their names."""
        action = f"{policy['PolicyARN']}:createdBy/{policy['_created_by']}"
        policy["Alarms"] = []
        for alarm in policies.tracking_alarms(policy, action, policies.alarm_period(), ids):
            await self.call("monitoring", "PutMetricAlarm", alarm)
            name = alarm["AlarmName"]
            alarm_arn = f"arn:aws:cloudwatch:{host.region()}:{host.account()}:alarm:{name}"
            policy["Alarms"].append({"AlarmName": name, "AlarmARN": alarm_arn})

    async def delete_alarms(self, policy: Record) -> None:
        """Delete the alarms that were made for a policy."""
        names = [alarm["AlarmName"] for alarm in policy.get("Alarms", [])]
        if names:
            await self.call("monitoring", "DeleteAlarms", {"AlarmNames": names})

    def policies(self, target: Record) -> list[Record]:
        """The policies of a target."""
        return [policy for policy in self.store.all(POLICY) if policy["_target"] == target["_name"]]

    def _report_zero(self, target: Record) -> None:
        """SageMaker reports zero for a variant that scales and gets no requests, so that it scales in.

        Here it does so for one with requests, too: a zero changes no sum.
        """
        if now() - target.get("_zero_at", 0.0) >= min(ZERO_INTERVAL, policies.alarm_period()):
            target["_zero_at"] = now()
            named = policies.dimensions(target["ResourceId"])
            host.record_metric("AWS/SageMaker", "InvocationsPerInstance", 0.0, "None", named)

    # Decisions

    async def _follow(self, target: Record, current: int, alarms: list[dict]) -> None:
        """Do what the policies ask for, where an alarm is new, or has been in ALARM for another period."""
        triggered = [(policy, alarm) for policy in self.policies(target) for alarm in alarms if invokes(alarm, policy)]
        moment = now()
        keys = {(host.account(), host.region(), alarm["AlarmName"]): alarm["Period"] for _, alarm in triggered}
        due = [key for key, period in keys.items() if moment - self._asked.get(key, -math.inf) >= period]
        self._asked |= dict.fromkeys(due, moment)
        if not due:
            return
        asked: list[tuple[int, Record, dict]] = []
        for policy, alarm in triggered:
            count = policies.wanted_capacity(policy, alarm, await self._values(alarm), current, moment)
            if count is not None:
                asked.append((count, policy, alarm))
        await self._choose(target, current, asked)

    async def _choose(self, target: Record, current: int, asked: list[tuple[int, Record, dict]]) -> None:
        """The largest capacity wins. Target tracking scales in only if all of its policies for the target would."""
        suspended = target["SuspendedState"]
        if any(count > current or policies.rises(alarm) for count, _, alarm in asked):
            asked = [item for item in asked if item[0] >= current]
            if suspended["DynamicScalingOutSuspended"]:
                return
        elif suspended["DynamicScalingInSuspended"]:
            return
        else:
            ready = {policy["_name"] for _, policy, _ in asked}
            if any(policies.may_scale_in(policy) and policy["_name"] not in ready for policy in self.policies(target)):
                asked = [item for item in asked if item[1]["PolicyType"] != policies.TRACKING]
        if not asked:
            return
        wanted, policy, alarm = max(asked, key=lambda item: item[0])
        cause = f"monitor alarm {alarm['AlarmName']} in state ALARM triggered policy {policy['PolicyName']}"
        count = within(target, wanted)
        out = policies.rises(alarm) if wanted == current else wanted > current
        if count != current and (count > current) == out:
            await self._scale(target, current, count, cause, policy)
        elif out and current >= target["MaxCapacity"]:
            self._not_scaled(target, cause, "AlreadyAtMaxCapacity", MaxCapacity=target["MaxCapacity"])
        elif not out and current <= target["MinCapacity"]:
            self._not_scaled(target, cause, "AlreadyAtMinCapacity", MinCapacity=target["MinCapacity"])
        else:
            self._not_scaled(target, cause, "AlreadyAtDesiredCapacity", CurrentCapacity=current)

    async def _values(self, alarm: dict) -> dict[int, float]:
        """The alarm's statistic over its evaluation periods, by how many periods ago."""
        period, statistic, percentile = alarm["Period"], alarm.get("Statistic"), alarm.get("ExtendedStatistic")
        running = int(now() // period)
        request = {name: alarm[name] for name in ("Namespace", "MetricName", "Dimensions", "Unit") if alarm.get(name)}
        request |= {"ExtendedStatistics": [percentile]} if percentile else {"Statistics": [statistic]}
        request |= {"StartTime": (running - alarm["EvaluationPeriods"]) * period, "EndTime": (running + 1) * period}
        answer = await self.call("monitoring", "GetMetricStatistics", request | {"Period": period})
        return {
            running - int(point["Timestamp"] // period): (
                point["ExtendedStatistics"][percentile] if percentile else point[statistic]
            )
            for point in answer["Datapoints"]
        }

    # Activities

    async def _scale(self, target: Record, current: int, count: int, cause: str, policy: Record | None = None) -> None:
        names = policies.dimensions(target["ResourceId"])
        wish = [{"VariantName": names["VariantName"], "DesiredInstanceCount": count}]
        activity = self._activity(target, f"Setting desired instance count to {count}.", cause)
        activity |= {"_from": current, "_to": count, "_policy": policy["_name"] if policy else ""}
        try:
            await self.call(
                "sagemaker",
                "UpdateEndpointWeightsAndCapacities",
                {"EndpointName": names["EndpointName"], "DesiredWeightsAndCapacities": wish},
            )
        except Refused as error:
            activity["EndTime"], activity["StatusCode"] = now(), "Failed"
            activity["StatusMessage"] = (
                f"Failed to set desired instance count to {count}. Reason: {error.message} (Service: AmazonSageMaker; "
                f"Status Code: {error.status}; Error Code: {error.code}; Request ID: {uuid.uuid4()}; Proxy: null)."
            )
        else:
            activity["StatusCode"] = "InProgress"
            activity["StatusMessage"] = (
                f"Successfully set desired instance count to {count}. Waiting for change to be fulfilled by sagemaker."
            )
            target["_activity"] = activity["ActivityId"]
            self.store.save(target)
        self._keep(activity)

    def _settle(self, target: Record, status: str, variant: dict) -> None:
        """Say how the activity that was in progress ended, now that the endpoint is no longer being updated."""
        activity = self.store.find(ACTIVITY, target.get("_activity", ""))
        if activity is None:
            return
        fulfilled = status == "InService" and variant["CurrentInstanceCount"] == activity["_to"]
        code, how = ("Successful", "successfully") if fulfilled else ("Unfulfilled", "not")
        text = f"Successfully set desired instance count to {activity['_to']}. Change {how} fulfilled by sagemaker."
        self._keep(activity | {"EndTime": now(), "StatusCode": code, "StatusMessage": text})
        policy = self.store.find(POLICY, activity["_policy"])
        if fulfilled and policy:
            direction = "_scaled_out" if activity["_to"] > activity["_from"] else "_scaled_in"
            policy[direction] = {"at": now(), "from": activity["_from"]}
            if direction == "_scaled_out":
                policy.pop("_scaled_in", None)  # a scale-out ends the cooldown of the scale-in before it
            self.store.save(policy)
        del target["_activity"]
        self.store.save(target)

    def _not_scaled(self, target: Record, cause: str, code: str, **capacity: int) -> None:
        """Note why nothing was changed, unless that is what was noted last."""
        activities = [item for item in self.store.all(ACTIVITY) if item["ResourceId"] == target["ResourceId"]]
        last = max(activities, key=lambda item: item["StartTime"], default={})
        if [reason["Code"] for reason in last.get("NotScaledReasons", [])] == [code]:
            return
        activity = self._activity(target, "Attempting to scale due to alarm triggered", cause)
        activity["StatusCode"] = "Successful" if code == "AlreadyAtDesiredCapacity" else "Failed"
        activity["NotScaledReasons"] = [{"Code": code} | capacity]
        self._keep(activity)

    def _activity(self, target: Record, description: str, cause: str) -> Record:
        id = str(uuid.uuid4())
        identity = {name: target[name] for name in ("ServiceNamespace", "ResourceId", "ScalableDimension")}
        return record(
            ACTIVITY, id, id, ActivityId=id, **identity, Description=description, Cause=cause, StartTime=now()
        )

    def _keep(self, activity: Record) -> None:
        self.store.save(activity)
        for old in sorted(self.store.all(ACTIVITY), key=lambda item: item["StartTime"])[:-KEPT]:
            self.store.delete(old)


def within(target: dict, count: int) -> int:
    """A count, kept within the target's bounds."""
    return max(target["MinCapacity"], min(target["MaxCapacity"], count))


def variant_of(variants: list[dict] | None, resource: str) -> dict | None:
    """The one of some ProductionVariants that a resource id names."""
    name = policies.dimensions(resource)["VariantName"]
    return next((variant for variant in variants or [] if variant["VariantName"] == name), None)


def invokes(alarm: dict, policy: Record) -> bool:
    """Whether the alarm, in ALARM, invokes the policy: by its ARN, to which target tracking adds `:createdBy/…`."""
    return any(f"{action}:".startswith(f"{policy['_arn']}:") for action in alarm.get("AlarmActions") or [])
