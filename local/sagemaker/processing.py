"""Processing jobs: one command with S3 inputs before it and S3 outputs after it."""

from __future__ import annotations

import asyncio
import codecs
import json
import shutil
from typing import TYPE_CHECKING, Any

from . import host
from .container import Container
from .errors import NotImplementedLocally, ResourceInUse, ValidationException
from .jobs import (
    FAILURE_REASON_LIMIT,
    LogFollower,
    Stopped,
    Work,
    check_local_path,
    check_role,
    check_uri,
    died_with_emulator,
    internal_error,
    summaries,
    uploading,
)
from .processes import base_environment
from .settings import LOCAL_IMAGE
from .store import Record, Store, arn, now, page, record
from .transfers import Cancelled, Mirror, TransferError, Transfers

if TYPE_CHECKING:
    from pathlib import Path

KIND = "processing-job"
LOG_GROUP = "/aws/sagemaker/ProcessingJobs"
ENDED = {"Completed", "Failed", "Stopped"}
DEFAULT_MAX_RUNTIME = 86400  # seconds
RESERVED = "/opt/ml/processing"  # where AWS wants inputs and outputs to be
CONFIGURATION = {  # what processingjobconfig.json tells the container
    "ProcessingJobArn",
    "ProcessingJobName",
    "AppSpecification",
    "Environment",
    "ProcessingInputs",
    "ProcessingOutputConfig",
    "ProcessingResources",
    "RoleArn",
    "StoppingCondition",
}
EXIT_MESSAGE_LIMIT = 1024  # characters of /opt/ml/output/message
ALGORITHM_ERROR = "AlgorithmError: See job logs for more information"  # of every container that fails by itself


class ProcessingJobs:
    """CreateProcessingJob and its siblings."""

    def __init__(self, store: Store, work: Work) -> None:
        self.store, self.work = store, work
        self.stops: dict[str, asyncio.Event] = {}  # by ARN, of the jobs at work

    def folder(self, name: str) -> Path:
        """The job's folder."""
        return self.work.settings.state_dir / "jobs" / host.account() / host.region() / KIND / name

    async def create(self, request: dict) -> dict:
        """CreateProcessingJob."""
        name = request["ProcessingJobName"]
        job_arn = arn(KIND, name)
        self._check(request)
        if self.store.by_arn(job_arn):  # ARNs are in lower case, so names do not differ by case alone
            raise ResourceInUse(
                "Job name must be unique within an AWS account and region, and a job with this name "
                f"already exists ({job_arn})"
            )
        created = now()
        job = record(
            KIND,
            name,
            job_arn,
            **as_described(request),
            ProcessingJobArn=job_arn,
            ProcessingJobStatus="InProgress",
            CreationTime=created,
            LastModifiedTime=created,
            _tags=request.get("Tags", []),
        )
        self.store.save(job)
        stop = self.stops[job_arn] = asyncio.Event()
        self.work.start(self._run(job, stop))
        return {"ProcessingJobArn": job_arn}

    def _check(self, request: dict) -> None:
        application = request["AppSpecification"]
        if not LOCAL_IMAGE.match(application["ImageUri"]) and not application.get("ContainerEntrypoint"):
            raise NotImplementedLocally(
                f"Running the container image {application['ImageUri']!r} without ContainerEntrypoint"
            )
        check_role(request["RoleArn"])
        for item in request.get("ProcessingInputs", []):
            source = item.get("S3Input") or {}
            if not source.get("LocalPath"):
                raise ValidationException(f"ProcessingInput {item['InputName']!r} needs an S3Input with a LocalPath.")
            check_local_path(source["LocalPath"], RESERVED, "LocalPath")
            check_uri(source["S3Uri"])
        for item in request.get("ProcessingOutputConfig", {}).get("Outputs", []):
            output = item.get("S3Output") or {}
            if not output.get("LocalPath"):
                raise ValidationException(
                    f"ProcessingOutput {item['OutputName']!r} needs an S3Output with a LocalPath."
                )
            check_local_path(output["LocalPath"], RESERVED, "LocalPath")
            check_uri(output["S3Uri"])

    def _get(self, request: dict) -> Record:
        name = request["ProcessingJobName"]
        return self.store.get(
            KIND, name, lambda: ValidationException(f"Could not find requested job with name: {name}")
        )

    async def describe(self, request: dict) -> dict:
        """DescribeProcessingJob."""
        return self._get(request)

    async def listing(self, request: dict) -> dict:
        """ListProcessingJobs."""
        jobs, token = page(self.store.all(KIND), request, "ProcessingJobName", "ProcessingJobStatus")
        return {
            "ProcessingJobSummaries": [
                *summaries(
                    jobs,
                    "ProcessingJobName",
                    "ProcessingJobArn",
                    "CreationTime",
                    "ProcessingEndTime",
                    "LastModifiedTime",
                    "ProcessingJobStatus",
                    "FailureReason",
                    "ExitMessage",
                )
            ],
            "NextToken": token,
        }

    async def stop(self, request: dict) -> dict:
        """StopProcessingJob."""
        job = self._get(request)
        if job["ProcessingJobStatus"] in ENDED:
            raise ValidationException(
                f"The request was rejected because the processing job is in status {job['ProcessingJobStatus']}."
            )
        if job["ProcessingJobStatus"] == "InProgress":
            self._become(job, "Stopping")
            self.stops[job["ProcessingJobArn"]].set()
        return {}

    def _become(self, job: Record, status: str, reason: str = "") -> None:
        job["ProcessingJobStatus"] = status
        job["LastModifiedTime"] = now()
        if status in ENDED:
            job["ProcessingEndTime"] = job["LastModifiedTime"]
        if reason:
            job["FailureReason"] = reason[:FAILURE_REASON_LIMIT]
        self.store.save(job)

    async def _run(self, job: Record, stop: asyncio.Event) -> None:
        folder = self.folder(job["ProcessingJobName"])
        try:
            async with self.work.slot(stop):
                try:
                    await self._work(job, stop)
                finally:
                    # Its outputs are in S3 by now; the log stays.
                    await self.work.blocking(shutil.rmtree, folder / "opt", True)
        except (Stopped, Cancelled):
            self._become(job, "Stopped")
        except TransferError as error:
            self._become(job, "Failed", str(error))
        except Exception as error:
            self._become(job, "Failed", internal_error(error))
            raise
        finally:
            self.stops.pop(job["ProcessingJobArn"], None)

    async def _work(self, job: Record, stop: asyncio.Event) -> None:
        folder = self.folder(job["ProcessingJobName"])
        await self.work.blocking(shutil.rmtree, folder, True)
        container = Container(folder, self.work.settings)
        role_environment = host.role_environment(job["RoleArn"], job["ProcessingJobArn"])
        transfers = Transfers(role_environment, job["RoleArn"], stop.is_set)
        mirrors = await self.work.blocking(self._bring_in, job, container, transfers)
        if stop.is_set():
            raise Stopped
        application = job["AppSpecification"]
        argv, own = container.command(
            application["ImageUri"],
            application.get("ContainerEntrypoint", []),
            application.get("ContainerArguments", []),
        )
        own |= {"PROCESSING_JOB_NAME": job["ProcessingJobName"], "PROCESSING_JOB_ARN": job["ProcessingJobArn"]}
        own |= container.localised_values(job.get("Environment", {}))
        env = base_environment() | {"OMP_NUM_THREADS": str(self.work.cores())} | role_environment | own
        job["ProcessingStartTime"] = now()
        self.store.save(job)
        stream = f"{job['ProcessingJobName']}/algo-1-{int(job['CreationTime'])}"
        limit = job["StoppingCondition"].get("MaxRuntimeInSeconds", DEFAULT_MAX_RUNTIME)
        continuous = [mirror for mirror, mode in mirrors if mode == "Continuous"]
        async with LogFollower(container.log, LOG_GROUP, stream), uploading(self.work, continuous):
            outcome = await self.work.run(container, argv, env, container.opt_ml, limit, stop)
        stopped = outcome.timed_out or stop.is_set()
        reason = ALGORITHM_ERROR if outcome.code and not stopped else ""
        try:
            job["ExitMessage"] = exit_message(container)
            for mirror, _ in mirrors:  # those of a failed job too, as SageMaker does
                await self.work.blocking(mirror.sync)
        except TransferError as error:
            reason = reason or str(error)  # a job's own failure is what is told
        if reason:
            self._become(job, "Failed", reason)
        else:
            self._become(job, "Stopped" if stopped else "Completed")

    def _bring_in(self, job: Record, container: Container, transfers: Transfers) -> list[tuple[Mirror, str]]:
        """Configuration files, inputs, and empty folders for outputs. Returns those with their mode. Blocking."""
        cluster = job["ProcessingResources"]["ClusterConfig"]
        for name, content in {
            "processingjobconfig": {key: value for key, value in job.items() if key in CONFIGURATION},
            "resourceconfig": {
                "current_host": "algo-1",
                "hosts": ["algo-1"],
                "current_instance_type": cluster["InstanceType"],
            },
        }.items():
            path = container.opt_ml / "config" / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content, indent=2))
        for item in job.get("ProcessingInputs", []):
            source = item["S3Input"]
            transfers.download(source["S3Uri"], source["S3DataType"], container.path(source["LocalPath"]))
        mirrors = []
        for item in job.get("ProcessingOutputConfig", {}).get("Outputs", []):
            output = item["S3Output"]
            folder = container.path(output["LocalPath"])
            folder.mkdir(parents=True, exist_ok=True)
            mirrors.append((Mirror(transfers, folder, output["S3Uri"]), output["S3UploadMode"]))
        return mirrors

    def recover(self) -> None:
        """After a restart: jobs that were at work died with the emulator."""
        for job in self.store.all(KIND):
            if job["ProcessingJobStatus"] not in ENDED:
                self._become(job, "Failed", died_with_emulator())
                self.work.start(self.work.blocking(shutil.rmtree, self.folder(job["ProcessingJobName"]) / "opt", True))


def as_described(request: dict) -> dict[str, Any]:
    """The request's members as DescribeProcessingJob shows them, with what AWS fills in."""
    given = {name: value for name, value in request.items() if name != "Tags"}
    if inputs := request.get("ProcessingInputs"):
        given["ProcessingInputs"] = [{"AppManaged": False} | item for item in inputs]
    if config := request.get("ProcessingOutputConfig"):
        outputs = [{"AppManaged": False} | item for item in config["Outputs"]]
        given["ProcessingOutputConfig"] = config | {"Outputs": outputs}
    return {"StoppingCondition": {"MaxRuntimeInSeconds": DEFAULT_MAX_RUNTIME}} | given


def exit_message(container: Container) -> str | None:
    """What the container wrote to `/opt/ml/output/message`; raises TransferError for what is not UTF-8, as AWS does."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(container.written("message"))  # may end within a letter
        return text[:EXIT_MESSAGE_LIMIT] or None
    except UnicodeDecodeError:
        raise TransferError("ClientError: The exit message of the container is not UTF-8 encoded.") from None
