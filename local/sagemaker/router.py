"""InvokeEndpoint: chooses variant and instance for each request, passes it on, and counts what came of it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import botocore.session

from . import host, support
from .connections import BrokenAnswer, NotReached
from .errors import (
    ModelError,
    NotImplementedLocally,
    RequestEntityTooLarge,
    ServiceUnavailable,
    ThrottlingException,
    ValidationError,
)
from .fleets import Traffic, Variant
from .instances import Instance, InstanceDied
from .settings import REAL_TIME_BODY_LIMIT, SERVERLESS_BODY_LIMIT
from .store import Store

NAMESPACE = "AWS/SageMaker"
METRICS_INTERVAL = 0.5  # seconds of invocations that go to CloudWatch as one
TIMED_OUT = 0  # the status in AWS's message when the container has not answered in time
NO_INSTANCE = -1  # none was reached
MESSAGE_LIMIT = 2048  # characters of ModelError's messages, by the service model
UNITS = {
    "Invocations": "None",
    "InvocationsPerInstance": "None",
    "Invocation4XXErrors": "None",
    "Invocation5XXErrors": "None",
    "InvocationModelErrors": "None",
    "ModelLatency": "Microseconds",
    "OverheadLatency": "Microseconds",
}
FORWARDED = {  # the headers that the container sees; AWS drops all others
    "content-type": "Content-Type",
    "accept": "Accept",
    "x-amzn-sagemaker-custom-attributes": "X-Amzn-SageMaker-Custom-Attributes",
    "x-amzn-sagemaker-inference-id": "X-Amzn-SageMaker-Inference-Id",
}
RETURNED = {"x-amzn-sagemaker-custom-attributes": "X-Amzn-SageMaker-Custom-Attributes"}


def _refused_headers() -> dict[str, str]:
    """The headers of InvokeEndpoint that nothing here acts on, with the parameter that each carries."""
    operation = botocore.session.get_session().get_service_model("sagemaker-runtime").operation_model("InvokeEndpoint")
    assert operation.input_shape is not None
    members = operation.input_shape.members.items()
    accepted = support.ACTIONS["InvokeEndpoint"].fields
    return {
        member.serialization["name"].lower(): name
        for name, member in members
        if member.serialization.get("location") == "header" and name not in accepted
    }


REFUSED = _refused_headers()


class Router:
    """What stands before all endpoints. `traffic` holds those that serve, by ARN."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.traffic: dict[str, Traffic] = {}
        self.metrics = InvocationMetrics()

    async def invoke(self, name: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        """InvokeEndpoint: the container's 2xx as it is, anything else as ModelError."""
        began = time.perf_counter()
        for refused in headers.keys() & REFUSED.keys():
            raise NotImplementedLocally(f"InvokeEndpoint.{REFUSED[refused]}")
        fleet = self._traffic(name).choose()
        target = headers.get("x-amzn-sagemaker-target-variant")
        variant = fleet.choose(target)
        if variant is None:
            raise ValidationError(f"Variant {target} could not be found for this endpoint.")
        serverless = variant.plan.serverless
        limit = SERVERLESS_BODY_LIMIT if serverless else REAL_TIME_BODY_LIMIT
        if len(body) > limit:
            raise RequestEntityTooLarge(f"HTTP content length exceeded {limit} bytes.")
        if serverless and variant.concurrent >= serverless["MaxConcurrency"]:
            raise ThrottlingException("Rate exceeded")
        variant.concurrent += 1
        try:
            status, answer_headers, answer, latency = await forward(variant, headers, body)
        finally:
            variant.concurrent -= 1
        if 200 <= status < 300 and len(answer) > limit:
            status, answer = 500, f"The answer is larger than {limit} bytes.".encode()
        overhead = time.perf_counter() - began - latency
        self.metrics.count((name, variant.name, fleet.config_name), len(variant.ready()), status, latency, overhead)
        if status == NO_INSTANCE:
            raise ServiceUnavailable("No instance of the endpoint is ready. Please retry.")
        if not 200 <= status < 300:
            raise model_error(name, status, answer)
        out = {
            "Content-Type": answer_headers.get("content-type", "application/octet-stream"),
            "x-Amzn-Invoked-Production-Variant": variant.name,
        }
        return 200, out | {RETURNED[key]: answer_headers[key] for key in RETURNED if key in answer_headers}, answer

    def _traffic(self, name: str) -> Traffic:
        endpoint = self.store.find("endpoint", name)
        if endpoint is not None and (traffic := self.traffic.get(endpoint["_arn"])):
            return traffic
        if endpoint is not None and endpoint["EndpointStatus"] in ("SystemUpdating", "RollingBack"):
            raise ServiceUnavailable("The endpoint is being started again. Please retry.")
        # Also before an endpoint was first in service, and after that: the runtime knows only those that serve.
        raise ValidationError(f"Endpoint {name} of account {host.account()} not found.", ErrorCode="NO_SUCH_ENDPOINT")


async def forward(variant: Variant, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes, float]:
    """Sends the request to the instance whose turn it is: (status, headers, body, seconds that the model took).

    Goes on to another instance if the first was not reached at all, and, once, if its process ended before a byte of
    an answer came: a load balancer does so too when a connection is reset, and a request that itself kills the server
    takes two instances with it and not all. A server that lives may have acted on the request, so that one is not sent
    again.
    """
    sent = {FORWARDED[name]: value for name, value in headers.items() if name in FORWARDED}
    tried: set[Instance] = set()
    deaths = 0
    began = time.perf_counter()
    while instance := variant.next(tried):
        tried.add(instance)
        try:
            status, answer_headers, answer = await instance.invoke(sent, body)
        except NotReached:
            continue
        except InstanceDied as error:
            deaths += 1
            if deaths < 2:
                continue
            return 502, {}, f"The container ended: {error}".encode(), time.perf_counter() - began
        except TimeoutError:
            message = (
                b"Your invocation timed out while waiting for a response from container primary. Review the latency "
                b"metrics for each container in Amazon CloudWatch, resolve the issue, and try again."
            )
            return TIMED_OUT, {}, message, time.perf_counter() - began
        except BrokenAnswer as error:
            return 502, {}, f"The connection to the container broke: {error}".encode(), time.perf_counter() - began
        return status, answer_headers, answer, time.perf_counter() - began
    return NO_INSTANCE, {}, b"", time.perf_counter() - began


def model_error(name: str, status: int, answer: bytes) -> ModelError:
    """What a caller sees of a container that answered with anything but 2xx."""
    side = "client" if 400 <= status < 500 else "server"
    original = answer.decode(errors="replace")
    fits = len(original) <= MESSAGE_LIMIT
    said = f'with message "{original}"' if fits else "and could not load the entire response body"
    group, region = f"/aws/sagemaker/Endpoints/{name}", host.region()
    return ModelError(
        f"Received {side} error ({status}) from primary {said}. See "
        f"https://{region}.console.aws.amazon.com/cloudwatch/home?region={region}#logEventViewer:group={group} in "
        f"account {host.account()} for more information.",
        OriginalStatusCode=status,
        OriginalMessage=original[:MESSAGE_LIMIT],
        LogStreamArn=f"arn:aws:logs:{region}:{host.account()}:log-group:{group}",
    )


class InvocationMetrics:
    """The metrics that SageMaker publishes for each invocation, by endpoint and variant, and by fleet as well.

    https://docs.aws.amazon.com/sagemaker/latest/dg/monitoring-cloudwatch.html. They are summed up for half a second
    and published with how often each value occurred, so that a busy endpoint costs no more memory than an idle one.
    """

    def __init__(self) -> None:
        self._counted: dict[tuple, dict[str, Counter[float]]] = {}

    def count(self, names: tuple[str, str, str], instances: int, status: int, latency: float, overhead: float) -> None:
        """One invocation of (endpoint, variant, endpoint configuration); times in seconds."""
        key = (host.account(), host.region(), *names)
        counters = self._counted.get(key)
        if counters is None:
            counters = self._counted[key] = {metric: Counter() for metric in UNITS}
            # In the account and region of this request, as everything that it starts.
            asyncio.get_running_loop().call_later(METRICS_INTERVAL, self._publish, key, time.time())
        counters["Invocations"][1.0] += 1
        counters["InvocationsPerInstance"][1 / max(1, instances)] += 1
        counters["Invocation4XXErrors"][float(400 <= status < 500)] += 1
        counters["Invocation5XXErrors"][float(status >= 500 or status <= 0)] += 1
        counters["InvocationModelErrors"][float(not 200 <= status < 300)] += 1
        counters["ModelLatency"][_microseconds(latency)] += 1
        counters["OverheadLatency"][_microseconds(overhead)] += 1

    def _publish(self, key: tuple, moment: float) -> None:
        endpoint, variant, config = key[2:]
        dimensions = {"EndpointName": endpoint, "VariantName": variant}
        for metric, values in self._counted.pop(key).items():
            for more in ({}, {"EndpointConfigName": config}):  # the latter lets an alarm watch one fleet alone
                host.record_values(NAMESPACE, metric, values, UNITS[metric], dimensions | more, moment)


def _microseconds(seconds: float) -> float:
    """Three digits, so that equal latencies meet."""
    return float(f"{max(0.0, seconds) * 1e6:.2e}")
