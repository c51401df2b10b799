"""Processing jobs: one command with S3 inputs before it and S3 outputs after it."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING

from . import host
from .container import Container
from .errors import NotImplementedLocally, ResourceInUse, ValidationException
from .jobs import (
    FAILURE_REASON_LIMIT,
    LogFollower,
    Stopped,
    Work,
    check_role,
    summaries,
)
from .processes import base_environment
from .settings import LOCAL_IMAGE
from .store import Record, Store, arn, now, page, record
from .training import failure_reason
from .transfers import TransferError, Transfers

if TYPE_CHECKING:
    from pathlib import Path

KIND = "processing-job"
LOG_GROUP = "/aws/sagemaker/ProcessingJobs"
ENDED = {"Completed", "Failed", "Stopped"}
DEFAULT_MAX_RUNTIME = 86400  # seconds


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
        if self.store.find(KIND, name):
            raise ResourceInUse(
                "Job name must be unique within an AWS account and region, and a job with this name "
                f"already exists ({job_arn})"
            )
        created = now()
        job = record(
            KIND,
            name,
            job_arn,
            **{key: value for key, value in request.items() if key != "Tags"},
            ProcessingJobArn=job_arn,
            ProcessingJobStatus="InProgress",
            CreationTime=created,
            LastModifiedTime=created,
            _tags=request.get("Tags", []),
        )
        job.setdefault("StoppingCondition", {"MaxRuntimeInSeconds": DEFAULT_MAX_RUNTIME})
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
        for item in request.get("ProcessingOutputConfig", {}).get("Outputs", []):
            if not (item.get("S3Output") or {}).get("LocalPath"):
                raise ValidationException(
                    f"ProcessingOutput {item['OutputName']!r} needs an S3Output with a LocalPath."
                )

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
        try:
            async with self.work.slot(stop):
                await self._work(job, stop)
        except Stopped:
            self._become(job, "Stopped")
        except TransferError as error:
            self._become(job, "Failed", str(error))
        except Exception as error:
            self._become(job, "Failed", f"InternalServerError: {error!r}. Please try again.")
            raise
        finally:
            self.stops.pop(job["ProcessingJobArn"], None)

    async def _work(self, job: Record, stop: asyncio.Event) -> None:
        folder = self.folder(job["ProcessingJobName"])
        shutil.rmtree(folder, ignore_errors=True)
        container = Container(folder, self.work.settings)
        role_environment = host.role_environment(job["RoleArn"], job["ProcessingJobArn"])
        transfers = Transfers(role_environment, job["RoleArn"])
        await self.work.blocking(self._bring_in, job, container, transfers)
        if stop.is_set():
            raise Stopped
        application = job["AppSpecification"]
        argv, own = container.command(
            application["ImageUri"],
            application.get("ContainerEntrypoint", []),
            application.get("ContainerArguments", []),
        )
        own |= {"PROCESSING_JOB_NAME": job["ProcessingJobName"], "PROCESSING_JOB_ARN": job["ProcessingJobArn"]}
        own |= {name: container.localised(value) for name, value in job.get("Environment", {}).items()}
        env = base_environment() | {"OMP_NUM_THREADS": str(self.work.settings.threads_per_job)} | role_environment | own
        job["ProcessingStartTime"] = now()
        self.store.save(job)
        stream = f"{job['ProcessingJobName']}/algo-1-{int(job['CreationTime'])}"
        limit = job["StoppingCondition"].get("MaxRuntimeInSeconds", DEFAULT_MAX_RUNTIME)
        async with LogFollower(container.log, LOG_GROUP, stream):
            outcome = await self.work.run(container, argv, env, container.opt_ml, limit, stop)
        if message := container.failure():
            job["ExitMessage"] = message[:FAILURE_REASON_LIMIT]
        await self.work.blocking(self._take_out, job, container, transfers)
        if outcome.timed_out or outcome.stopped:
            self._become(job, "Stopped")
        elif outcome.code == 0:
            self._become(job, "Completed")
        else:
            self._become(job, "Failed", failure_reason(container, argv, outcome.code))
        await self.work.blocking(container.clear)

    def _bring_in(self, job: Record, container: Container, transfers: Transfers) -> None:
        """The configuration files and the inputs, and empty folders for the outputs. Blocking."""
        cluster = job["ProcessingResources"]["ClusterConfig"]
        container.write_config("processingjobconfig", {key: value for key, value in job.items() if key[0] != "_"})
        container.write_config(
            "resourceconfig",
            {"current_host": "algo-1", "hosts": ["algo-1"], "current_instance_type": cluster["InstanceType"]},
        )
        for item in job.get("ProcessingInputs", []):
            source = item["S3Input"]
            transfers.download(source["S3Uri"], source["S3DataType"], container.path(source["LocalPath"]))
        for item in job.get("ProcessingOutputConfig", {}).get("Outputs", []):
            container.path(item["S3Output"]["LocalPath"]).mkdir(parents=True, exist_ok=True)

    def _take_out(self, job: Record, container: Container, transfers: Transfers) -> None:
        """Uploads the outputs, of a failed job too, as SageMaker does. Blocking."""
        for item in job.get("ProcessingOutputConfig", {}).get("Outputs", []):
            output = item["S3Output"]
            transfers.upload(container.path(output["LocalPath"]), output["S3Uri"])

    def recover(self) -> None:
        """After a restart: jobs that were at work died with the emulator."""
        for job in self.store.all(KIND):
            if job["ProcessingJobStatus"] not in ENDED:
                self._become(
                    job, "Failed", "InternalServerError: The local AWS was stopped while the job ran. Please try again."
                )
