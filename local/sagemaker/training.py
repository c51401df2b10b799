"""Training jobs: the real script in a process, under the container contract."""

from __future__ import annotations

import asyncio
import shutil
import sys
from typing import TYPE_CHECKING

from . import host, toolkit
from .container import Container, last_lines, resource_config
from .errors import NotImplementedLocally, ResourceInUse, ValidationException
from .jobs import (
    FAILURE_REASON_LIMIT,
    LogFollower,
    MetricReader,
    Outcome,
    Stopped,
    Work,
    check_metric_definitions,
    check_role,
    summaries,
)
from .processes import base_environment
from .settings import LOCAL_IMAGE
from .store import Record, Store, arn, now, page, record
from .transfers import TransferError, Transfers

if TYPE_CHECKING:
    from pathlib import Path

KIND = "training-job"
LOG_GROUP = "/aws/sagemaker/TrainingJobs"
MESSAGES = {  # StatusMessage of each secondary status, in AWS's words
    "Starting": "Starting the training job",
    "Downloading": "Downloading input data",
    "Training": "Training image download completed. Training in progress.",
    "Uploading": "Uploading generated training model",
    "Stopping": "Stopping the training job",
    "Completed": "Training job completed",
    "Stopped": "Training job stopped",
    "MaxRuntimeExceeded": "Training job runtime exceeded MaxRuntimeInSeconds provided",
    "Failed": "Training job failed",
}
ENDED = {"Completed", "Failed", "Stopped"}
DEFAULT_MAX_RUNTIME = 86400  # seconds, AWS's default for MaxRuntimeInSeconds


class TrainingJobs:
    """CreateTrainingJob and its siblings."""

    def __init__(self, store: Store, work: Work) -> None:
        self.store, self.work = store, work
        self.stops: dict[str, asyncio.Event] = {}  # by ARN, of the jobs at work

    def folder(self, name: str) -> Path:
        """The job's folder."""
        return self.work.settings.state_dir / "jobs" / host.account() / host.region() / KIND / name

    async def create(self, request: dict) -> dict:
        """CreateTrainingJob."""
        return {"TrainingJobArn": self.submit(request)["TrainingJobArn"]}

    def submit(self, request: dict, **tuning: str) -> Record:
        """Checks the request, stores the job and starts it; `tuning` is TuningJobArn for a tuning job's child."""
        name = request["TrainingJobName"]
        job_arn = arn(KIND, name)
        self.check(request)
        if self.store.find(KIND, name):
            raise ResourceInUse(
                "Training job names must be unique within an AWS account and region, and a training "
                f"job with this name already exists ({job_arn})"
            )
        created = now()
        output = request["OutputDataConfig"]["S3OutputPath"].rstrip("/")
        job = record(
            KIND,
            name,
            job_arn,
            **{key: value for key, value in request.items() if key != "Tags"},
            **tuning,
            TrainingJobArn=job_arn,
            TrainingJobStatus="InProgress",
            SecondaryStatus="Starting",
            SecondaryStatusTransitions=[],
            CreationTime=created,
            LastModifiedTime=created,
            ModelArtifacts={"S3ModelArtifacts": f"{output}/{name}/output/model.tar.gz"},
            FinalMetricDataList=[],
            _tags=request.get("Tags", []),
        )
        job.setdefault("StoppingCondition", {"MaxRuntimeInSeconds": DEFAULT_MAX_RUNTIME})
        self._move(job, "Starting")
        stop = self.stops[job_arn] = asyncio.Event()
        self.work.start(self._run(job, stop))
        return job

    def check(self, request: dict) -> None:
        """Refuses what AWS refuses, and images that mean nothing here; a tuning job asks before it starts any."""
        algorithm = request.get("AlgorithmSpecification", {})
        image = algorithm.get("TrainingImage", "")
        if not image:
            raise ValidationException(
                "You must specify either a TrainingImage or an AlgorithmName in AlgorithmSpecification."
            )
        if not (
            LOCAL_IMAGE.match(image)
            or toolkit.is_script_mode(request.get("HyperParameters", {}))
            or algorithm.get("ContainerEntrypoint")
        ):
            raise NotImplementedLocally(
                f"Running the container image {image!r} without script mode "
                "(hyperparameter sagemaker_program) or ContainerEntrypoint"
            )
        check_metric_definitions(algorithm.get("MetricDefinitions", []))
        check_role(request["RoleArn"])
        if not request.get("ResourceConfig"):
            raise ValidationException("You must specify ResourceConfig.")
        condition = request.get("StoppingCondition", {})
        if request.get("EnableManagedSpotTraining") and condition.get("MaxWaitTimeInSeconds", 0) < condition.get(
            "MaxRuntimeInSeconds", DEFAULT_MAX_RUNTIME
        ):
            raise ValidationException(
                "Invalid MaxWaitTimeInSeconds. It must be present and be greater than or equal to MaxRuntimeInSeconds"
            )
        names = [channel["ChannelName"] for channel in request.get("InputDataConfig", [])]
        if len(set(names)) < len(names):
            raise ValidationException("Channel names in InputDataConfig must be unique.")
        for channel in request.get("InputDataConfig", []):
            if not channel["DataSource"].get("S3DataSource"):
                raise ValidationException(f"The channel {channel['ChannelName']!r} has no S3DataSource.")

    async def describe(self, request: dict) -> dict:
        """DescribeTrainingJob."""
        return self._get(request)

    def _get(self, request: dict) -> Record:
        return self.store.get(
            KIND, request["TrainingJobName"], lambda: ValidationException("Requested resource not found.")
        )

    async def listing(self, request: dict) -> dict:
        """ListTrainingJobs."""
        jobs, token = page(self.store.all(KIND), request, "TrainingJobName", "TrainingJobStatus")
        return {
            "TrainingJobSummaries": [
                *summaries(
                    jobs,
                    "TrainingJobName",
                    "TrainingJobArn",
                    "CreationTime",
                    "TrainingEndTime",
                    "LastModifiedTime",
                    "TrainingJobStatus",
                    "SecondaryStatus",
                )
            ],
            "NextToken": token,
        }

    async def stop(self, request: dict) -> dict:
        """StopTrainingJob."""
        job = self._get(request)
        if job["TrainingJobStatus"] in ENDED:
            raise ValidationException(
                f"The request was rejected because the training job is in status {job['TrainingJobStatus']}."
            )
        if job["TrainingJobStatus"] == "InProgress":
            job["TrainingJobStatus"] = "Stopping"
            self._move(job, "Stopping")
            self.stops[job["TrainingJobArn"]].set()
        return {}

    def _move(self, job: Record, secondary: str, message: str = "") -> None:
        """The job's next secondary status."""
        stamp = now()
        transitions = job["SecondaryStatusTransitions"]
        if transitions:
            transitions[-1]["EndTime"] = stamp
        job["SecondaryStatus"] = secondary
        job["LastModifiedTime"] = stamp
        entry = {"Status": secondary, "StartTime": stamp, "StatusMessage": message or MESSAGES[secondary]}
        if secondary in ENDED | {"MaxRuntimeExceeded"}:
            entry["EndTime"] = stamp
        transitions.append(entry)
        self.store.save(job)

    def _progress(self, job: Record, secondary: str) -> None:
        """The next step of a job, unless it is stopping: then its status says so until its end."""
        if job["TrainingJobStatus"] == "InProgress":
            self._move(job, secondary)

    def _finish(self, job: Record, status: str, secondary: str, reason: str = "") -> None:
        job["TrainingJobStatus"] = status
        job["TrainingEndTime"] = now()
        if reason:
            job["FailureReason"] = reason[:FAILURE_REASON_LIMIT]
        if "TrainingStartTime" in job:
            seconds = max(1, round(job["TrainingEndTime"] - job["TrainingStartTime"]))
            job["TrainingTimeInSeconds"] = job["BillableTimeInSeconds"] = seconds
        self._move(job, secondary, reason[:FAILURE_REASON_LIMIT])

    async def _run(self, job: Record, stop: asyncio.Event) -> None:
        try:
            async with self.work.slot(stop):
                await self._work(job, stop)
        except Stopped:
            self._finish(job, "Stopped", "Stopped")
        except TransferError as error:
            self._finish(job, "Failed", "Failed", str(error))
        except Exception as error:
            self._finish(job, "Failed", "Failed", f"InternalServerError: {error!r}. Please try again.")
            raise
        finally:
            self.stops.pop(job["TrainingJobArn"], None)

    async def _work(self, job: Record, stop: asyncio.Event) -> None:
        folder = self.folder(job["TrainingJobName"])
        shutil.rmtree(folder, ignore_errors=True)
        container = Container(folder, self.work.settings)
        role_environment = host.role_environment(job["RoleArn"], job["TrainingJobArn"])
        transfers = Transfers(role_environment, job["RoleArn"])
        job["TrainingStartTime"] = now()
        self._progress(job, "Downloading")
        await self.work.blocking(self._bring_in, job, container, transfers)
        if stop.is_set():
            raise Stopped
        argv, own = self._command(job, container)
        env = base_environment() | {"OMP_NUM_THREADS": str(self.work.settings.threads_per_job)} | role_environment | own
        definitions = job["AlgorithmSpecification"].get("MetricDefinitions", [])
        metrics = MetricReader(definitions, LOG_GROUP, {"TrainingJobName": job["TrainingJobName"]})
        self._progress(job, "Training")
        stream = f"{job['TrainingJobName']}/algo-1-{int(job['CreationTime'])}"
        cwd = container.code if container.code.is_dir() else container.opt_ml
        limit = job["StoppingCondition"].get("MaxRuntimeInSeconds", DEFAULT_MAX_RUNTIME)
        async with LogFollower(container.log, LOG_GROUP, stream, metrics):
            outcome = await self.work.run(container, argv, env, cwd, limit, stop)
        job["FinalMetricDataList"] = metrics.final()
        self._progress(job, "Uploading")
        await self.work.blocking(self._take_out, job, container, transfers, outcome)
        if outcome.timed_out:
            self._finish(job, "Stopped", "MaxRuntimeExceeded")
        elif outcome.stopped:
            self._finish(job, "Stopped", "Stopped")
        elif outcome.code == 0:
            self._finish(job, "Completed", "Completed")
        else:
            self._finish(job, "Failed", "Failed", failure_reason(container, argv, outcome.code))
        await self.work.blocking(container.clear)

    def _bring_in(self, job: Record, container: Container, transfers: Transfers) -> None:
        """Configuration files, channels, checkpoints and source. Blocking."""
        algorithm = job["AlgorithmSpecification"]
        channels = job.get("InputDataConfig", [])
        container.write_config("hyperparameters", job.get("HyperParameters", {}))
        container.write_config("resourceconfig", resource_config(job["ResourceConfig"].get("InstanceType", "")))
        container.write_config(
            "inputdataconfig",
            {
                channel["ChannelName"]: {
                    "TrainingInputMode": channel.get("InputMode") or algorithm["TrainingInputMode"],
                    "S3DistributionType": channel["DataSource"]["S3DataSource"].get(
                        "S3DataDistributionType", "FullyReplicated"
                    ),
                    "RecordWrapperType": channel.get("RecordWrapperType", "None"),
                }
                | ({"ContentType": channel["ContentType"]} if "ContentType" in channel else {})
                for channel in channels
            },
        )
        if "DebugHookConfig" in job:
            container.write_config("debughookconfig", job["DebugHookConfig"])
        if "ProfilerConfig" in job:
            container.write_config("profilerconfig", job["ProfilerConfig"])
        for channel in channels:
            source = channel["DataSource"]["S3DataSource"]
            folder = container.opt_ml / "input" / "data" / channel["ChannelName"]
            transfers.download(source["S3Uri"], source["S3DataType"], folder)
        if checkpoints := job.get("CheckpointConfig"):
            folder = container.path(checkpoints.get("LocalPath", "/opt/ml/checkpoints"))
            folder.mkdir(parents=True, exist_ok=True)
            try:
                transfers.download(checkpoints["S3Uri"].rstrip("/") + "/", "S3Prefix", folder)
            except TransferError as error:
                if "No S3 objects found" not in str(error):  # the first run has none
                    raise
        source = str(toolkit.decoded(job.get("HyperParameters", {})).get(toolkit.SUBMIT_DIRECTORY, ""))
        if source:
            transfers.unpack(source, container.code)

    def _command(self, job: Record, container: Container) -> tuple[list[str], dict[str, str]]:
        """The command line and the job's own environment."""
        algorithm = job["AlgorithmSpecification"]
        hyperparameters = job.get("HyperParameters", {})
        words = toolkit.arguments(toolkit.user_hyperparameters(hyperparameters))
        words = [container.localised(word) for word in words]
        entrypoint = algorithm.get("ContainerEntrypoint", [])
        if toolkit.is_script_mode(hyperparameters) and not entrypoint:
            program = str(toolkit.decoded(hyperparameters)[toolkit.PROGRAM])
            argv = toolkit.command(container, program, words, sys.executable)
            _, env = container.command(algorithm["TrainingImage"], [], [])
            if (container.code / "requirements.txt").is_file():
                with container.log.open("a") as log:
                    log.write(
                        "requirements.txt is not installed here: the running environment "
                        f"({sys.prefix}) is used as it is.\n"
                    )
        else:
            default = [] if entrypoint else ["train"]
            argv, env = container.command(
                algorithm["TrainingImage"], entrypoint, algorithm.get("ContainerArguments", default)
            )
        channels = [channel["ChannelName"] for channel in job.get("InputDataConfig", [])]
        env |= toolkit.environment(container, job, channels, words)
        env |= {
            "TRAINING_JOB_NAME": job["TrainingJobName"],
            "TRAINING_JOB_ARN": job["TrainingJobArn"],
            "SAGEMAKER_JOB_NAME": job["TrainingJobName"],
        }
        env |= {name: container.localised(value) for name, value in job.get("Environment", {}).items()}
        return argv, env

    def _take_out(self, job: Record, container: Container, transfers: Transfers, outcome: Outcome) -> None:
        """The model, the other output and the checkpoints. Blocking."""
        base = f"{job['OutputDataConfig']['S3OutputPath'].rstrip('/')}/{job['TrainingJobName']}/output"
        if outcome.code == 0 or outcome.stopped or outcome.timed_out:
            transfers.pack(container.model, f"{base}/model.tar.gz")
        if any(container.output_data.iterdir()):
            transfers.pack(container.output_data, f"{base}/output.tar.gz")
        if checkpoints := job.get("CheckpointConfig"):
            transfers.upload(container.path(checkpoints.get("LocalPath", "/opt/ml/checkpoints")), checkpoints["S3Uri"])

    def recover(self) -> None:
        """After a restart: jobs that were at work died with the emulator."""
        for job in self.store.all(KIND):
            if job["TrainingJobStatus"] not in ENDED:
                self._finish(
                    job,
                    "Failed",
                    "Failed",
                    "InternalServerError: The local AWS was stopped while the job ran. Please try again.",
                )


def failure_reason(container: Container, argv: list[str], code: int) -> str:
    """FailureReason of a container that failed by itself: what it wrote to `failure`, or the end of its log."""
    if written := container.failure():
        return f"AlgorithmError: {written}, exit code: {code}"
    command = " ".join(argv)
    reason = f'AlgorithmError: ExecuteUserScriptError:\nExitCode {code}\nErrorMessage "'
    rest = f'"\nCommand "{command[:200]}", exit code: {code}'
    return reason + "\n".join(last_lines(container.log, 12))[-(FAILURE_REASON_LIMIT - len(reason) - len(rest)) :] + rest
