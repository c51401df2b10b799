"""EventBridge events of SageMaker: `… State Change` on the default bus whenever a resource's status changes.

The store asks here with every record that it saves or deletes, so no other module has to think of events. What counts
as a change is told by the table below; a record remembers what was last announced, so that a restart repeats nothing.
"""

from __future__ import annotations

import datetime
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from botocore.model import ListShape, MapShape, Shape, StructureShape

from . import host, validation

logger = logging.getLogger(__name__)
TOLD = "_told"  # the record's member that holds what was last announced


@dataclass(frozen=True)
class Event:
    """`detail_type`; the action whose answer the detail is like; the members whose change is a state change."""

    detail_type: str
    action: str
    members: tuple[str, ...] = ()


EVENTS: dict[str, Event] = {
    "training-job": Event(
        "SageMaker Training Job State Change", "DescribeTrainingJob", ("TrainingJobStatus", "SecondaryStatus")
    ),
    "processing-job": Event("SageMaker Processing Job State Change", "DescribeProcessingJob", ("ProcessingJobStatus",)),
    "hyper-parameter-tuning-job": Event(
        "SageMaker HyperParameter Tuning Job State Change",
        "DescribeHyperParameterTuningJob",
        ("HyperParameterTuningJobStatus",),
    ),
    "model": Event("SageMaker Model State Change", "DescribeModel"),  # made and deleted
    "endpoint-config": Event("SageMaker Endpoint Config State Change", "DescribeEndpointConfig"),  # likewise
    "endpoint": Event("SageMaker Endpoint State Change", "DescribeEndpoint", ("EndpointStatus",)),
    "model-package": Event(
        "SageMaker Model Package State Change",
        "DescribeModelPackage",
        ("ModelPackageStatus", "ModelApprovalStatus"),
    ),
}
DEPLOYMENT = Event("SageMaker Endpoint Deployment State Change", "DescribeEndpoint")


def due(record: dict) -> list[Event]:
    """The events that a record about to be saved gives rise to; the record remembers them as told."""
    event = EVENTS.get(record["_kind"])
    if event is None:
        return []
    state = {"": [record.get(member) for member in event.members]}
    if record["_kind"] == "endpoint":
        state["deployment"] = _stages(record)
    before, record[TOLD] = record.get(TOLD, {}), state
    changed = [event] if before.get("") != state[""] else []
    if state.get("deployment") and before.get("deployment") != state["deployment"]:
        changed.append(DEPLOYMENT)
    return changed


def deleted(record: dict) -> list[Event]:
    """The events of a record that is deleted: of what has no status, its going is the change."""
    event = EVENTS.get(record["_kind"])
    return [event] if event and not event.members else []


def send(record: dict, events: list[Event]) -> None:
    """Puts events on the default bus of the record's account and region."""
    for event in events:
        try:
            host.put_event(event.detail_type, [record["_arn"]], detail(record, event))
        except Exception:  # a rule's target that cannot be reached is no reason to fail the job
            logger.exception("the event of %s could not be delivered", record["_arn"])


def detail(record: dict, event: Event) -> dict[str, Any]:
    """The record as its Describe action shows it, in the manner of events: times in milliseconds, tags as a map."""
    shape = validation.operation(event.action).output_shape
    if event.action == "DescribeModelPackage":
        return _converted(shape, record, _iso)
    shown = _converted(shape, record, _milliseconds)
    if "EndpointStatus" in shown:  # IN_SERVICE, where the API says InService
        shown["EndpointStatus"] = re.sub(r"(?<!^)(?=[A-Z])", "_", shown["EndpointStatus"]).upper()
    return shown | {"Tags": {tag["Key"]: tag["Value"] for tag in record.get("_tags", [])}}


def _stages(record: dict) -> list:
    """Where an endpoint's deployment is: the statuses of the variants that are changing."""
    pending = record.get("PendingDeploymentSummary", {}).get("ProductionVariants", [])
    return [
        [variant["VariantName"], [[state["Status"], state.get("StatusMessage")] for state in variant["VariantStatus"]]]
        for variant in [*pending, *record.get("ProductionVariants", [])]
        if variant.get("VariantStatus")
    ]


def _converted(shape: Shape | None, value: Any, time: Callable[[float], Any]) -> Any:
    """`value` with only the members of `shape`, and its times as `time` writes them."""
    if isinstance(shape, StructureShape):
        return {
            name: _converted(member, value[name], time)
            for name, member in shape.members.items()
            if value.get(name) is not None
        }
    if isinstance(shape, ListShape):
        return [_converted(shape.member, item, time) for item in value]
    if isinstance(shape, MapShape):
        return {key: _converted(shape.value, item, time) for key, item in value.items()}
    return time(value) if shape is not None and shape.type_name == "timestamp" else value


def _milliseconds(moment: float) -> int:
    return round(moment * 1000)


def _iso(moment: float) -> str:
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
