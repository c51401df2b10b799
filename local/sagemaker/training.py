"""Training jobs: the real script in a process, under the container contract."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from typing import TYPE_CHECKING, Any

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
    algorithm_error,
    check_local_path,
    check_metric_definitions,
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
from .transfers import Cancelled, Mirror, NothingThere, TransferError, Transfers

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
CHECKPOINTS = "/opt/ml/checkpoints"  # CheckpointConfig.LocalPath, unless it says otherwise
TENSORS = "/opt/ml/output/tensors"  # DebugHookConfig.LocalPath, unless it says otherwise


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
        if self.store.by_arn(job_arn):  # ARNs are in lower case, so names do not differ by case alone
            raise ResourceInUse(
                "Training job names must be unique within an AWS account and region, and a training "
                f"job with this name already exists ({job_arn})"
            )
        created = now()
        model = "model" if request["OutputDataConfig"].get("CompressionType") == "NONE" else "model.tar.gz"
        job = record(
            KIND,
            name,
            job_arn,
            **as_described(request),
            **tuning,
            TrainingJobArn=job_arn,
            TrainingJobStatus="InProgress",
            SecondaryStatus="Starting",
            SecondaryStatusTransitions=[],
            CreationTime=created,
            LastModifiedTime=created,
            ModelArtifacts={"S3ModelArtifacts": f"{output_prefix(request)}/{model}"},
            FinalMetricDataList=[],
            ProfilingStatus="Enabled" if profiled(request) else "Disabled",
            _tags=request.get("Tags", []),
        )
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
            check_uri(channel["DataSource"]["S3DataSource"]["S3Uri"])
        check_uri(request["OutputDataConfig"]["S3OutputPath"])
        for name in ("CheckpointConfig", "DebugHookConfig", "ProfilerConfig"):
            config = request.get(name) or {}
            check_uri(config.get("S3Uri") or config.get("S3OutputPath") or "s3://")
            check_local_path(config.get("LocalPath", "/opt/ml"), "/opt/ml", f"{name}.LocalPath")

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

    def _move(self, job: Record, secondary: str) -> None:
        """The job's next secondary status."""
        stamp = now()
        transitions = job["SecondaryStatusTransitions"]
        if transitions:
            transitions[-1]["EndTime"] = stamp
        job["SecondaryStatus"] = secondary
        job["LastModifiedTime"] = stamp
        entry = {"Status": secondary, "StartTime": stamp, "StatusMessage": MESSAGES[secondary]}
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
        self._move(job, secondary)

    async def _run(self, job: Record, stop: asyncio.Event) -> None:
        folder = self.folder(job["TrainingJobName"])
        try:
            async with self.work.slot(stop):
                try:
                    await self._work(job, stop)
                finally:
                    # Its outputs are in S3 by now; the log stays.
                    await self.work.blocking(shutil.rmtree, folder / "opt", True)
        except (Stopped, Cancelled):
            self._finish(job, "Stopped", "Stopped")
        except TransferError as error:
            self._finish(job, "Failed", "Failed", str(error))
        except toolkit.EntryPointError as error:
            self._finish(job, "Failed", "Failed", f"AlgorithmError: {error}, exit code: 1")
        except Exception as error:
            self._finish(job, "Failed", "Failed", internal_error(error))
            raise
        finally:
            self.stops.pop(job["TrainingJobArn"], None)

    async def _work(self, job: Record, stop: asyncio.Event) -> None:
        folder = self.folder(job["TrainingJobName"])
        await self.work.blocking(shutil.rmtree, folder, True)
        container = Container(folder, self.work.settings)
        role_environment = host.role_environment(job["RoleArn"], job["TrainingJobArn"])
        transfers = Transfers(role_environment, job["RoleArn"], stop.is_set)
        job["TrainingStartTime"] = now()
        self._progress(job, "Downloading")
        mirrors = await self.work.blocking(self._bring_in, job, container, transfers)
        if stop.is_set():
            raise Stopped
        cores = self.work.cores()
        argv, own = self._command(job, container, cores)
        # Of three cores or more one is left to everything else: threads that spin until the last of them has come, as
        # oneDNN's do in bfloat16, take several times as long as soon as another process wants a core of theirs.
        threads = min(cores, max(2, cores - 1))
        env = base_environment() | {"OMP_NUM_THREADS": str(threads)} | role_environment | own
        definitions = job["AlgorithmSpecification"].get("MetricDefinitions", [])
        metrics = MetricReader(definitions, LOG_GROUP, {"TrainingJobName": job["TrainingJobName"]})
        if objective := job.get("HyperParameters", {}).get("_tuning_objective_metric"):
            job["_objective"] = metrics.follow(objective)  # by which the tuning job stops those that fall behind
        self._progress(job, "Training")
        stream = f"{job['TrainingJobName']}/algo-1-{int(job['CreationTime'])}"
        cwd = container.code if container.code.is_dir() else container.opt_ml
        limit = job["StoppingCondition"].get("MaxRuntimeInSeconds", DEFAULT_MAX_RUNTIME)
        async with LogFollower(container.log, LOG_GROUP, stream, metrics), uploading(self.work, mirrors):
            outcome = await self.work.run(container, argv, env, cwd, limit, stop)
        job["FinalMetricDataList"] = metrics.final()
        self._progress(job, "Uploading")
        failed = outcome.code != 0 and not outcome.timed_out and not stop.is_set()
        reason = failure_reason(job, container, argv, outcome) if failed else ""
        try:
            await self.work.blocking(self._take_out, job, container, transfers, mirrors, not failed)
        except TransferError as error:
            reason = reason or str(error)  # a job's own failure is what is told
        if reason:
            self._finish(job, "Failed", "Failed", reason)
        elif outcome.timed_out:
            self._finish(job, "Stopped", "MaxRuntimeExceeded")
        elif stop.is_set():
            self._finish(job, "Stopped", "Stopped")
        else:
            self._finish(job, "Completed", "Completed")

    def _bring_in(self, job: Record, container: Container, transfers: Transfers) -> list[Mirror]:
        """Configuration files, channels, checkpoints and source. Returns what is uploaded as the job goes. Blocking."""
        algorithm = job["AlgorithmSpecification"]
        channels = job.get("InputDataConfig", [])
        container.write_config("hyperparameters", job.get("HyperParameters", {}))
        container.write_config("resourceconfig", resource_config(job["ResourceConfig"].get("InstanceType", "")))
        container.write_config(
            "inputdataconfig",
            {
                channel["ChannelName"]: {
                    "TrainingInputMode": channel.get("InputMode") or algorithm["TrainingInputMode"],
                    "S3DistributionType": channel["DataSource"]["S3DataSource"]["S3DataDistributionType"],
                    "RecordWrapperType": channel["RecordWrapperType"],
                }
                | ({"ContentType": channel["ContentType"]} if "ContentType" in channel else {})
                for channel in channels
            },
        )
        for channel in channels:
            source = channel["DataSource"]["S3DataSource"]
            transfers.download(source["S3Uri"], source["S3DataType"], container.channel(channel["ChannelName"]))
        mirrors = []
        if config := job.get("CheckpointConfig"):
            config = localised(container, config, CHECKPOINTS)
            container.write_config("checkpointconfig", config)
            folder = container.path(config["LocalPath"])
            folder.mkdir(parents=True, exist_ok=True)
            mirrors.append(Mirror(transfers, folder, config["S3Uri"]))
            with contextlib.suppress(NothingThere):  # the first run has none
                transfers.download(config["S3Uri"].rstrip("/") + "/", "S3Prefix", folder)
            mirrors[-1].same()
        if config := job.get("DebugHookConfig"):
            config = localised(container, config, TENSORS)
            container.write_config("debughookconfig", config)
            uri = f"{config['S3OutputPath'].rstrip('/')}/{job['TrainingJobName']}/debug-output"
            mirrors.append(Mirror(transfers, container.path(config["LocalPath"]), uri))
        if config := profiled(job):
            container.write_config("profilerconfig", config | {"LocalPath": str(container.output / "profiler")})
            uri = f"{config['S3OutputPath'].rstrip('/')}/{job['TrainingJobName']}/profiler-output"
            mirrors.append(Mirror(transfers, container.output / "profiler", uri))
        source = str(toolkit.decoded(job.get("HyperParameters", {})).get(toolkit.SUBMIT_DIRECTORY, ""))
        if source:
            transfers.unpack(source, container.code)
        return mirrors

    def _command(self, job: Record, container: Container, cores: int) -> tuple[list[str], dict[str, str]]:
        """The command line and the job's own environment; raises EntryPointError."""
        algorithm = job["AlgorithmSpecification"]
        own = container.localised_values(toolkit.user_hyperparameters(job.get("HyperParameters", {})))
        words = toolkit.arguments(own)
        if is_script(job):
            program = str(toolkit.decoded(job["HyperParameters"])[toolkit.PROGRAM])
            argv = toolkit.command(container, program, words, sys.executable)
            _, env = container.command(algorithm["TrainingImage"], [], [])
            env["PYTHONPATH"] = os.pathsep.join([str(container.code), *env.values()])
            tell_requirements(container)
        else:
            entrypoint = algorithm.get("ContainerEntrypoint", [])
            default = [] if entrypoint else ["train"]
            argv, env = container.command(
                algorithm["TrainingImage"], entrypoint, algorithm.get("ContainerArguments", default)
            )
        env |= toolkit.environment(container, job, words, cores)
        env |= {"TRAINING_JOB_NAME": job["TrainingJobName"], "TRAINING_JOB_ARN": job["TrainingJobArn"]}
        for name, variable in (("debughook", "SMDEBUG_CONFIG_FILE_PATH"), ("profiler", "SMPROFILER_CONFIG_PATH")):
            if (path := container.config / f"{name}config.json").is_file():
                env[variable] = str(path)
        return argv, env | container.localised_values(job.get("Environment", {}))

    def _take_out(
        self, job: Record, container: Container, transfers: Transfers, mirrors: list[Mirror], with_model: bool
    ) -> None:
        """The model, the other output and what was uploaded on the way. Blocking."""
        for mirror in mirrors:
            mirror.sync()
        base = output_prefix(job)
        for folder, name in ((container.model, "model"), (container.output_data, "output")):
            if (name == "model" and not with_model) or not folder.is_dir() or not any(folder.iterdir()):
                continue
            if job["OutputDataConfig"].get("CompressionType") == "NONE":
                transfers.upload(folder, f"{base}/{folder.name}")
            else:
                transfers.pack(folder, f"{base}/{name}.tar.gz")

    def recover(self) -> None:
        """After a restart: jobs that were at work died with the emulator."""
        for job in self.store.all(KIND):
            if job["TrainingJobStatus"] not in ENDED:
                self._finish(job, "Failed", "Failed", died_with_emulator())
                self.work.start(self.work.blocking(shutil.rmtree, self.folder(job["TrainingJobName"]) / "opt", True))


def as_described(request: dict) -> dict[str, Any]:
    """The request's members as DescribeTrainingJob shows them, with what AWS fills in."""
    channels = [
        {"CompressionType": "None", "RecordWrapperType": "None"}
        | channel
        | {
            "DataSource": {
                "S3DataSource": {"S3DataDistributionType": "FullyReplicated"} | channel["DataSource"]["S3DataSource"]
            }
        }
        for channel in request.get("InputDataConfig") or []
    ]
    return (
        {
            "EnableNetworkIsolation": False,
            "EnableInterContainerTrafficEncryption": False,
            "EnableManagedSpotTraining": False,
        }
        | {name: value for name, value in request.items() if name not in ("Tags", "InputDataConfig")}
        | ({"InputDataConfig": channels} if channels else {})
        | {
            "AlgorithmSpecification": {"EnableSageMakerMetricsTimeSeries": False} | request["AlgorithmSpecification"],
            "OutputDataConfig": {"KmsKeyId": ""} | request["OutputDataConfig"],
            "StoppingCondition": {"MaxRuntimeInSeconds": DEFAULT_MAX_RUNTIME}
            | (request.get("StoppingCondition") or {}),
        }
    )


def output_prefix(job: dict) -> str:
    """Where a job's outputs go."""
    return f"{job['OutputDataConfig']['S3OutputPath'].rstrip('/')}/{job['TrainingJobName']}/output"


def profiled(job: dict) -> dict:
    """The ProfilerConfig of a job whose profiler is on; empty for one whose is not."""
    config = job.get("ProfilerConfig") or {}
    return config if config.get("S3OutputPath") and not config.get("DisableProfiler") else {}


def localised(container: Container, config: dict, default: str) -> dict:
    """A configuration with its LocalPath in the job's folder."""
    return config | {"LocalPath": container.localised(config.get("LocalPath") or default)}


def is_script(job: dict) -> bool:
    """Whether the toolkit runs the job's script, rather than the container its own command."""
    return toolkit.is_script_mode(job.get("HyperParameters", {})) and not job["AlgorithmSpecification"].get(
        "ContainerEntrypoint"
    )


def tell_requirements(container: Container) -> None:
    """Says in the log that requirements.txt is not installed, and what of it is not there."""
    path = container.code / "requirements.txt"
    if not path.is_file():
        return
    container.note(f"requirements.txt is not installed here: the running environment ({sys.prefix}) is used as it is.")
    if missing := toolkit.unsatisfied(path.read_text(errors="replace")):
        container.note(
            f"requirements.txt asks for what is not there: {', '.join(missing)}. To have it: "
            f"{sys.executable} -m pip install …, or leave it out."
        )


def failure_reason(job: dict, container: Container, argv: list[str], outcome: Outcome) -> str:
    """FailureReason of a training that failed by itself.

    The toolkit, which is what a container runs in script mode, writes a `failure` of its own and exits with 1.
    """
    if not is_script(job):
        return algorithm_error(container, outcome.exit_code)
    lines = last_lines(container.log, 100)
    return algorithm_error(container, 1, lambda room: toolkit.failure(lines, argv, outcome.code, room))
