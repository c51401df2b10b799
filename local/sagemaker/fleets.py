"""Fleets: the instances that serve one endpoint configuration, and which of them gets the next request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .instances import Instance


@dataclass(frozen=True)
class VariantPlan:
    """What one production variant shall be: enough to start it without its configuration and model, which AWS lets
    users delete while an endpoint serves them."""

    name: str
    model: str
    container: dict[str, Any]
    role: str
    weight: float
    count: int
    instance_type: str | None = None
    serverless: dict[str, int] | None = None
    health_timeout: float | None = None

    @classmethod
    def of(cls, definition: dict, container: dict, role: str) -> VariantPlan:
        """From a member of ProductionVariants, with its model's container and role."""
        return cls(
            name=definition["VariantName"],
            model=definition["ModelName"],
            container=container,
            role=role,
            weight=float(definition.get("InitialVariantWeight", 1.0)),
            count=1 if "ServerlessConfig" in definition else definition["InitialInstanceCount"],
            instance_type=definition.get("InstanceType"),
            serverless=definition.get("ServerlessConfig"),
            health_timeout=definition.get("ContainerStartupHealthCheckTimeoutInSeconds"),
        )


class Variant:
    """One production variant at work. `new_instance` makes one more, not started yet."""

    def __init__(self, plan: VariantPlan, new_instance: Callable[[], Instance]) -> None:
        self.plan = plan
        self.new_instance = new_instance
        self.instances = [new_instance() for _ in range(plan.count)]
        self.concurrent = 0
        self.credit = 0.0  # of the smooth weighted round robin
        self._turn = 0

    @property
    def name(self) -> str:
        """The variant's name."""
        return self.plan.name

    def ready(self) -> list[Instance]:
        """The instances that take requests."""
        return [instance for instance in self.instances if instance.ready]

    def next(self, tried: set[Instance]) -> Instance | None:
        """The ready instance whose turn it is, of those that were not tried; None if there is none."""
        ready = [instance for instance in self.ready() if instance not in tried]
        if not ready:
            return None
        self._turn += 1
        return ready[self._turn % len(ready)]


class Fleet:
    """Every variant of one endpoint configuration, at work since `since` (seconds since the epoch)."""

    def __init__(self, config_name: str, variants: list[Variant], since: float) -> None:
        self.config_name = config_name
        self.variants = variants
        self.since = since
        self.credit = 0.0

    @property
    def instances(self) -> list[Instance]:
        """All of them."""
        return [instance for variant in self.variants for instance in variant.instances]

    def choose(self, target: str | None) -> Variant | None:
        """The variant for the next request: the one that it names, else by weight; None if there is no such name."""
        if target:
            return next((variant for variant in self.variants if variant.name == target), None)
        if len(self.variants) == 1:
            return self.variants[0]
        return smooth_choice(self.variants, [variant.plan.weight for variant in self.variants])


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

    def shift(self, green: Fleet, share: float) -> None:
        """From now on `green` gets this share of the requests."""
        if self.green is not green:
            self.blue.credit = green.credit = 0.0
        self.green, self.share = green, share

    def settle(self, fleet: Fleet) -> None:
        """From now on `fleet` gets everything."""
        self.blue, self.green, self.share = fleet, None, 0.0


async def healthy(variant: str, instances: Iterable[Instance], timeout: float) -> None:
    """Waits until every instance answers /ping with 200; raises HealthError of the first that does not."""
    deadline = time.monotonic() + timeout
    for instance in instances:
        await instance.healthy(deadline, variant)


async def stop(instances: Iterable[Instance], drain: float) -> None:
    """Drains and ends instances, side by side."""
    await asyncio.gather(*(instance.stop(drain) for instance in instances))


def smooth_choice(items: list[Any], weights: list[float]) -> Any:
    """Smooth weighted round robin over objects with a `credit`: exact shares over any short stretch, no randomness."""
    total = sum(weights)
    for item, weight in zip(items, weights, strict=True):
        item.credit += weight
    chosen = max(items, key=lambda item: item.credit)
    chosen.credit -= total
    return chosen
