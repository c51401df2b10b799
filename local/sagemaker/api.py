"""SageMaker's protocol: JSON 1.1 for the control plane, REST for InvokeEndpoint. What a request means is elsewhere.

`handle` is what the emulator calls for each request; `start` brings back what a stop interrupted, and `shutdown` ends
every process.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Awaitable, Callable
from urllib.parse import unquote

from . import host, support, tags, validation
from .endpoints import Endpoints
from .errors import NotImplementedLocally, SageMakerError, UnknownOperation
from .jobs import Work
from .packages import Packages
from .processing import ProcessingJobs
from .registry import Registry
from .settings import Settings
from .store import Store
from .training import TrainingJobs
from .tuning import TuningJobs

logger = logging.getLogger(__name__)
INVOCATION = re.compile(
    r"^/endpoints/(?P<name>[^/]+)/(?P<how>invocations|async-invocations|invocations-response-stream)/?$"
)
NOT_INVOKED = {
    "async-invocations": "InvokeEndpointAsync",
    "invocations-response-stream": "InvokeEndpointWithResponseStream",
}
Action = Callable[[dict], Awaitable[dict]]
Response = tuple[int, dict[str, str], bytes]


class SageMaker:
    """The whole service: its state, its work, and which action is whose."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.store = Store(self.settings.state_dir / "state")
        self.work = Work(self.settings)
        self.packages = packages = Packages(self.store)
        self.registry = registry = Registry(self.store, self.work, packages)
        self.tags = tagging = tags.Tags(self.store)
        self.training = training = TrainingJobs(self.store, self.work)
        self.processing = processing = ProcessingJobs(self.store, self.work)
        self.tuning = tuning = TuningJobs(self.store, self.work, training)
        self.endpoints = endpoints = Endpoints(self.store, self.work, registry)
        self.actions: dict[str, Action] = {
            "CreateTrainingJob": training.create,
            "DescribeTrainingJob": training.describe,
            "ListTrainingJobs": training.listing,
            "StopTrainingJob": training.stop,
            "CreateHyperParameterTuningJob": tuning.create,
            "DescribeHyperParameterTuningJob": tuning.describe,
            "ListHyperParameterTuningJobs": tuning.listing,
            "StopHyperParameterTuningJob": tuning.stop,
            "ListTrainingJobsForHyperParameterTuningJob": tuning.list_training_jobs,
            "CreateProcessingJob": processing.create,
            "DescribeProcessingJob": processing.describe,
            "ListProcessingJobs": processing.listing,
            "StopProcessingJob": processing.stop,
            "CreateModel": registry.create_model,
            "DescribeModel": registry.describe_model,
            "ListModels": registry.list_models,
            "DeleteModel": registry.delete_model,
            "CreateEndpointConfig": registry.create_config,
            "DescribeEndpointConfig": registry.describe_config,
            "ListEndpointConfigs": registry.list_configs,
            "DeleteEndpointConfig": registry.delete_config,
            "CreateEndpoint": endpoints.create,
            "DescribeEndpoint": endpoints.describe,
            "ListEndpoints": endpoints.listing,
            "UpdateEndpoint": endpoints.update,
            "UpdateEndpointWeightsAndCapacities": endpoints.update_weights_and_capacities,
            "DeleteEndpoint": endpoints.delete,
            "CreateModelPackageGroup": packages.create_group,
            "DescribeModelPackageGroup": packages.describe_group,
            "ListModelPackageGroups": packages.list_groups,
            "DeleteModelPackageGroup": packages.delete_group,
            "CreateModelPackage": packages.create,
            "DescribeModelPackage": packages.describe,
            "BatchDescribeModelPackage": packages.describe_batch,
            "ListModelPackages": packages.list,
            "UpdateModelPackage": packages.update,
            "DeleteModelPackage": packages.delete,
            "AddTags": tagging.add,
            "ListTags": tagging.list,
            "DeleteTags": tagging.delete,
        }
        self.recovered = False

    def recover(self) -> None:
        """Once, on the event loop: jobs that died with the last emulator fail, endpoints come up again."""
        if self.recovered:
            return
        self.recovered = True
        self.work.processes.end_left_behind()
        shutil.rmtree(self.settings.state_dir / "models", ignore_errors=True)  # unpacked for servers that are gone
        for account, region in sorted(self.store.scopes()):
            with host.scope(account, region):
                self.training.recover()
                self.tuning.recover()  # counts what became of its training jobs
                self.processing.recover()
                self.endpoints.recover()

    async def handle(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Response:
        """One request; every failure is an answer."""
        self.recover()
        invocation = INVOCATION.match(path)
        try:
            if invocation and method == "POST":
                if invocation["how"] != "invocations":
                    raise NotImplementedLocally(f"The action {NOT_INVOKED[invocation['how']]}")
                return await self.endpoints.router.invoke(unquote(invocation["name"]), headers, body)
            return await self._act(headers, body)
        except SageMakerError as error:
            return answer_error(error)
        except Exception:
            logger.exception("the local SageMaker failed on %s %s", method, headers.get("x-amz-target", path))
            return answer_error(SageMakerError("An internal failure occurred; the emulator's log has the details."))

    async def _act(self, headers: dict[str, str], body: bytes) -> Response:
        service, _, action = headers.get("x-amz-target", "").partition(".")
        if service != "SageMaker" or not action:
            raise UnknownOperation
        operation = validation.operation(action)
        if action not in self.actions:
            raise NotImplementedLocally(f"The action {action}")
        request = validation.parse(action, body)
        validation.validate(action, request)
        support.check(action, request)
        tags.check(request.get("Tags", []))
        result = await self.actions[action](request)
        shape = operation.output_shape
        shown = {key: result[key] for key in (shape.members if shape else ()) if result.get(key) is not None}
        content = json.dumps(shown).encode() if shape else b""
        return 200, {"Content-Type": "application/x-amz-json-1.1"}, content


def answer_error(error: SageMakerError) -> Response:
    """An error as both protocols carry it: in the header for REST, in the body for JSON 1.1."""
    message = {"message": error.message, "Message": error.message} if error.message else {}
    content = json.dumps({"__type": error.code} | message | error.extra)
    headers = {"Content-Type": "application/x-amz-json-1.1", "x-amzn-ErrorType": error.code}
    return error.status, headers, content.encode()


_service: SageMaker | None = None


def service() -> SageMaker:
    """The one service of this emulator, made on first use from the environment."""
    global _service
    if _service is None:
        _service = SageMaker()
    return _service


async def handle(method: str, path: str, headers: dict[str, str], body: bytes, query: dict) -> Response:
    """A request, as the emulator hands it over: header names in lower case, account and region in its context."""
    return await service().handle(method, path, headers, body)


async def start() -> None:
    """Brings endpoints back after a restart. Without it the first request does."""
    service().recover()


def shutdown() -> None:
    """Stops every job and every server, and waits until they have ended. Callable without an event loop, and twice."""
    if _service is not None:
        _service.store.frozen = True
        _service.work.close()
