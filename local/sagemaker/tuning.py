"""Hyperparameter tuning jobs: Optuna proposes, real training jobs answer."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING

from . import search, warmstart
from .errors import ResourceInUse, ResourceLimitExceeded, ResourceNotFound, SageMakerError, ValidationException
from .jobs import (
    FAILURE_REASON_LIMIT,
    Work,
    check_metric_definitions,
    died_with_emulator,
    internal_error,
    summaries,
)
from .store import Record, Store, arn, now, page, pick, record
from .training import ENDED, TrainingJobs
from .training import KIND as TRAINING_JOB

if TYPE_CHECKING:
    import optuna

KIND = "hyper-parameter-tuning-job"
METRIC = "FinalHyperParameterTuningJobObjectiveMetric"
OBJECTIVE = "_tuning_objective_metric"  # the hyperparameter that AWS adds to the static ones
MAX_ATTEMPTS = 5  # AWS gives up when none of the first five training jobs succeeded
MAX_PARALLEL = 100  # AWS's limits, at the most that it grants on request
MAX_TRAINING_JOBS = {"Bayesian": 500, "Random": 10_000}  # with those of a warm start's parents
POLL = 0.2  # seconds between looks at the running trials


class TuningJobs:
    """CreateHyperParameterTuningJob and its siblings."""

    def __init__(self, store: Store, work: Work, training: TrainingJobs) -> None:
        self.store, self.work, self.training = store, work, training
        self.stops: dict[str, asyncio.Event] = {}

    async def create(self, request: dict) -> dict:
        """CreateHyperParameterTuningJob."""
        name = request["HyperParameterTuningJobName"]
        job_arn = arn(KIND, name)
        request = as_described(request)
        self._check(request)
        if self.store.by_arn(job_arn):
            raise ResourceInUse(
                "Hyper parameter tuning job names must be unique within an AWS account and region, "
                f"and a hyper parameter tuning job with this name already exists ({job_arn})"
            )
        created = now()
        job = record(
            KIND,
            name,
            job_arn,
            **{key: value for key, value in request.items() if key != "Tags"},
            HyperParameterTuningJobArn=job_arn,
            HyperParameterTuningJobStatus="InProgress",
            CreationTime=created,
            LastModifiedTime=created,
            _tags=request.get("Tags", []),
        )
        self._count(job)
        self.store.save(job)
        stop = self.stops[job_arn] = asyncio.Event()
        self.work.start(self._run(job, stop))
        return {"HyperParameterTuningJobArn": job_arn}

    def _check(self, request: dict) -> None:
        config, definition = request["HyperParameterTuningJobConfig"], request["TrainingJobDefinition"]
        resources = config["ResourceLimits"]
        jobs, parallel = resources.get("MaxNumberOfTrainingJobs"), resources["MaxParallelTrainingJobs"]
        if jobs is None:
            raise ValidationException("You must specify MaxNumberOfTrainingJobs in ResourceLimits.")
        if parallel > jobs:
            raise ValidationException("MaxParallelTrainingJobs cannot be greater than MaxNumberOfTrainingJobs.")
        check_limit("Maximum number of parallel training jobs per hyperparameter tuning job", MAX_PARALLEL, parallel)
        definitions = definition["AlgorithmSpecification"].get("MetricDefinitions", [])
        check_metric_definitions(definitions)
        if definition["StaticHyperParameters"][OBJECTIVE] not in {item["Name"] for item in definitions}:
            raise ValidationException(
                "A metric is required for this hyperparameter tuning job objective. "
                "Provide a metric in the metric definitions."
            )
        search.check_ranges(config.get("ParameterRanges", {}), definition["StaticHyperParameters"], jobs)
        parents = self._parents(request)
        for parent in parents:
            warmstart.check(request, parent, ENDED)
        check_limit(
            "Maximum number of training jobs per hyperparameter tuning job",
            MAX_TRAINING_JOBS[config["Strategy"]],
            jobs + sum(len(self._children(parent)) for parent in parents),
        )
        self.training.check(child_request(request, "check-000", {}))

    def _parents(self, job: Record) -> list[Record]:
        names = warmstart.parents(job)
        if len(set(names)) < len(names):
            raise ValidationException("The parent tuning jobs of a warm start must be unique.")
        return [self._get({"HyperParameterTuningJobName": name}, ValidationException) for name in names]

    def _get(self, request: dict, error: type[SageMakerError] = ResourceNotFound) -> Record:
        name = request["HyperParameterTuningJobName"]
        return self.store.get(
            KIND,
            name,
            lambda: error(
                f"Amazon SageMaker can't find a tuning job with the name {name}. Check the name and try again."
            ),
        )

    async def describe(self, request: dict) -> dict:
        """DescribeHyperParameterTuningJob."""
        job = self._get(request)
        runtime = job.get("HyperParameterTuningEndTime", now()) - job["CreationTime"]
        return job | {"ConsumedResources": {"RuntimeInSeconds": int(runtime)}}

    async def listing(self, request: dict) -> dict:
        """ListHyperParameterTuningJobs."""
        found, token = page(
            self.store.all(KIND),
            request,
            "HyperParameterTuningJobName",
            "HyperParameterTuningJobStatus",
            default_sort="Name",
        )
        shown = summaries(
            found,
            "HyperParameterTuningJobName",
            "HyperParameterTuningJobArn",
            "HyperParameterTuningJobStatus",
            "CreationTime",
            "HyperParameterTuningEndTime",
            "LastModifiedTime",
            "TrainingJobStatusCounters",
            "ObjectiveStatusCounters",
        )
        return {
            "HyperParameterTuningJobSummaries": [
                item | pick(job["HyperParameterTuningJobConfig"], "Strategy", "ResourceLimits")
                for job, item in zip(found, shown, strict=True)
            ],
            "NextToken": token,
        }

    async def list_training_jobs(self, request: dict) -> dict:
        """ListTrainingJobsForHyperParameterTuningJob."""
        job = self._get(request)
        found = [summary(job, child) for child in self._children(job)]
        if (by := request.get("SortBy")) == "FinalObjectiveMetricValue":
            found = [item | {by: item[METRIC]["Value"]} for item in found if METRIC in item]
        shown, token = page(found, request, "TrainingJobName", "TrainingJobStatus", default_sort="Name")
        for item in shown:
            item.pop("FinalObjectiveMetricValue", None)
        return {"TrainingJobSummaries": shown, "NextToken": token}

    async def stop(self, request: dict) -> dict:
        """StopHyperParameterTuningJob: what runs is stopped, what ended stays."""
        job = self._get(request)
        if job["HyperParameterTuningJobStatus"] in ENDED:
            raise ValidationException(
                "The request was rejected because the hyperparameter tuning job is in status "
                f"{job['HyperParameterTuningJobStatus']}."
            )
        self._become(job, "Stopping")
        self.stops[job["HyperParameterTuningJobArn"]].set()
        return {}

    def _children(self, job: Record) -> list[Record]:
        """The training jobs that the tuning job launched, the first first."""
        found = (child for child in self.store.all(TRAINING_JOB) if child.get("TuningJobArn") == job["_arn"])
        return sorted(found, key=lambda child: (child["CreationTime"], child["_name"]))

    def _count(self, job: Record) -> None:
        """Brings up to date what Describe tells of the training jobs: counters, the best, those without improvement."""
        children = [summary(job, child) for child in self._children(job)]
        status = [child["TrainingJobStatus"] for child in children]
        goal = [child["ObjectiveStatus"] for child in children]
        internal = sum(child.get("FailureReason", "").startswith("InternalServerError") for child in children)
        job["TrainingJobStatusCounters"] = {
            "Completed": status.count("Completed"),
            "InProgress": status.count("InProgress") + status.count("Stopping"),
            "RetryableError": internal,
            "NonRetryableError": status.count("Failed") - internal,
            "Stopped": status.count("Stopped"),
        }
        job["ObjectiveStatusCounters"] = {name: goal.count(name) for name in ("Succeeded", "Pending", "Failed")}
        maximise = search.is_maximised(job["HyperParameterTuningJobConfig"])
        scored = [child for child in children if METRIC in child]
        if found := best(scored, maximise):
            job["BestTrainingJob"] = found
        by_end = sorted(scored, key=lambda child: child["TrainingEndTime"])
        job["TuningJobCompletionDetails"] = {
            "NumberOfTrainingJobsObjectiveNotImproving": search.not_improving(
                (child[METRIC]["Value"] for child in by_end), maximise
            )
        }
        if warmstart.is_identical(job):
            bests = [
                family["BestTrainingJob"] | {"TuningJobName": family["HyperParameterTuningJobName"]}
                for family in [job, *self._parents(job)]
                if "BestTrainingJob" in family
            ]
            if found := best(bests, maximise):
                job["OverallBestTrainingJob"] = found

    def _become(self, job: Record, status: str = "", reason: str = "") -> None:
        """The job's next status, or the same one with what its training jobs have come to."""
        self._count(job)
        job["HyperParameterTuningJobStatus"] = status or job["HyperParameterTuningJobStatus"]
        job["LastModifiedTime"] = now()
        if status in ENDED:
            job["HyperParameterTuningEndTime"] = job["LastModifiedTime"]
        if reason:
            job["FailureReason"] = reason[:FAILURE_REASON_LIMIT]
        self.store.save(job)

    async def _run(self, job: Record, stop: asyncio.Event) -> None:
        try:
            await self._search(job, stop)
            await self._halt(job)
        except SageMakerError as error:  # a training job was refused, as when its role has gone
            await self._halt(job)
            self._become(job, "Failed", f"ClientError: {error.message}")
        except Exception as error:
            await self._halt(job)
            self._become(job, "Failed", internal_error(error))
            raise
        else:
            self._finish(job, stop)
        finally:
            self.stops.pop(job["HyperParameterTuningJobArn"], None)

    async def _search(self, job: Record, stop: asyncio.Event) -> None:
        """Launches training jobs until there are enough of them, or something else ends the search."""
        config = job["HyperParameterTuningJobConfig"]
        resources = config["ResourceLimits"]
        space = await self.work.blocking(search.SearchSpace, config["ParameterRanges"])
        study = await self.work.blocking(search.new_study, config, space, self._earlier(job))
        running: dict[str, optuna.trial.Trial] = {}
        while not (stop.is_set() or is_over(job, now())):
            children = self._children(job)
            ended = [child for child in children if child["_name"] in running and has_ended(child)]
            for child in ended:
                tell(study, running.pop(child["_name"]), objective_value(child))
            if ended:
                self._become(job)
            elif len(children) < resources["MaxNumberOfTrainingJobs"] and (
                len(running) < resources["MaxParallelTrainingJobs"]
            ):
                trial = await self.work.blocking(study.ask, space.distributions)
                if not stop.is_set():
                    running[self._launch(job, len(children) + 1, space.texts(trial.params))] = trial
            elif not running:
                return
            else:
                if config["TrainingJobEarlyStoppingType"] == "Auto":
                    await self._stop_early(children, search.is_maximised(config))
                await asyncio.sleep(POLL)

    def _earlier(self, job: Record) -> list[tuple[dict[str, str], float]]:
        """The trials of the parents: hyperparameters and objective of each training job that has one."""
        children = [child for parent in self._parents(job) for child in self._children(parent)]
        values = [(child["HyperParameters"], objective_value(child)) for child in children]
        return [(texts, value) for texts, value in values if value is not None]

    def _launch(self, job: Record, number: int, values: dict[str, str]) -> str:
        """Starts a training job with these hyperparameters; returns its name."""
        name = f"{job['HyperParameterTuningJobName']}-{number:03d}-{uuid.uuid4().hex[:8]}"
        request = child_request(job, name, values) | {"Tags": job["_tags"]}
        self.training.submit(request, TuningJobArn=job["_arn"])
        self._become(job)
        return name

    async def _stop_early(self, children: list[Record], maximise: bool) -> None:
        """Stops the training jobs that fall behind those that completed."""
        completed = [child.get("_objective", []) for child in children if child["TrainingJobStatus"] == "Completed"]
        for child in children:
            if child["TrainingJobStatus"] == "InProgress" and search.falls_behind(
                child.get("_objective", []), completed, maximise
            ):
                await self.training.stop({"TrainingJobName": child["_name"]})

    async def _halt(self, job: Record) -> None:
        """Stops the training jobs that still run, and waits for their end."""
        while running := [child for child in self._children(job) if not has_ended(child)]:
            for child in running:
                if child["TrainingJobStatus"] == "InProgress":
                    await self.training.stop({"TrainingJobName": child["_name"]})
            await asyncio.sleep(POLL)

    def _finish(self, job: Record, stop: asyncio.Event) -> None:
        self._count(job)
        if stop.is_set():
            self._become(job, "Stopped")
        elif "BestTrainingJob" in job:
            self._become(job, "Completed")
        else:
            attempts = min(MAX_ATTEMPTS, len(self._children(job)))
            self._become(
                job,
                "Failed",
                f"No training job succeeded after {attempts} attempts. For additional details, please take a look at "
                "the training job failures by listing training jobs for the hyperparameter tuning job.",
            )

    def recover(self) -> None:
        """After a restart: tuning jobs that were at work died with the emulator."""
        for job in self.store.all(KIND):
            if job["HyperParameterTuningJobStatus"] not in ENDED:
                self._become(job, "Failed", died_with_emulator())


def as_described(request: dict) -> dict:
    """The request with the defaults that Describe shows; raises ValidationException if there is nothing to tune."""
    config, definition = request["HyperParameterTuningJobConfig"], request.get("TrainingJobDefinition")
    if not definition or "HyperParameterTuningJobObjective" not in config:
        raise ValidationException("You must specify TrainingJobDefinition and HyperParameterTuningJobObjective.")
    ranges = {
        kind: [item if "Values" in item else {"ScalingType": "Auto"} | item for item in items]
        for kind, items in config.get("ParameterRanges", {}).items()
    }
    static = definition.get("StaticHyperParameters", {})
    return request | {
        "HyperParameterTuningJobConfig": {"TrainingJobEarlyStoppingType": "Off"} | config | {"ParameterRanges": ranges},
        "TrainingJobDefinition": {
            "EnableNetworkIsolation": False,
            "EnableInterContainerTrafficEncryption": False,
            "EnableManagedSpotTraining": False,
        }
        | definition
        | {"StaticHyperParameters": static | {OBJECTIVE: config["HyperParameterTuningJobObjective"]["MetricName"]}},
    }


def child_request(job: Record, name: str, values: dict[str, str]) -> dict:
    """CreateTrainingJob's request for a trial with these hyperparameters."""
    definition = job["TrainingJobDefinition"]
    request = {key: value for key, value in definition.items() if key != "StaticHyperParameters"}
    return request | {"TrainingJobName": name, "HyperParameters": definition["StaticHyperParameters"] | values}


def check_limit(quota: str, limit: int, wanted: int) -> None:
    """Raises ResourceLimitExceeded, in AWS's words."""
    if wanted > limit:
        raise ResourceLimitExceeded(
            f"The account-level service limit '{quota}' is {limit} Training Jobs, with current utilization of 0 "
            f"Training Jobs and a request delta of {wanted} Training Jobs. Please use AWS Service Quotas to request an "
            "increase for this quota. If AWS Service Quotas is not available, contact AWS support to request an "
            "increase for this quota."
        )


def is_over(job: Record, moment: float) -> bool:
    """Whether a limit or a completion criterion ends the search at this moment (seconds since the epoch)."""
    config = job["HyperParameterTuningJobConfig"]
    if moment - job["CreationTime"] >= config["ResourceLimits"].get("MaxRuntimeInSeconds", math.inf):
        return True
    objectives = job["ObjectiveStatusCounters"]
    if objectives["Failed"] >= MAX_ATTEMPTS and not objectives["Succeeded"]:
        return True
    criteria = config.get("TuningJobCompletionCriteria", {})
    target = criteria.get("TargetObjectiveMetricValue")
    if target is not None and "BestTrainingJob" in job:
        value = job["BestTrainingJob"][METRIC]["Value"]
        if value >= target if search.is_maximised(config) else value <= target:
            return True
    patience = criteria.get("BestObjectiveNotImproving", {}).get("MaxNumberOfTrainingJobsNotImproving", math.inf)
    return job["TuningJobCompletionDetails"]["NumberOfTrainingJobsObjectiveNotImproving"] >= patience


def has_ended(child: Record) -> bool:
    """Whether a training job has come to its end."""
    return child["TrainingJobStatus"] in ENDED


def objective_value(child: Record) -> float | None:
    """The last value of the objective that a training job logged; None while it runs, if it failed or never did."""
    if child["TrainingJobStatus"] not in ("Completed", "Stopped"):
        return None
    metric = child["HyperParameters"][OBJECTIVE]
    values = [item["Value"] for item in child["FinalMetricDataList"] if item["MetricName"] == metric]
    return values[-1] if values else None


def tell(study: optuna.Study, trial: optuna.trial.Trial, value: float | None) -> None:
    """The outcome of a trial."""
    import optuna

    study.tell(trial, value, state=optuna.trial.TrialState.FAIL if value is None else None)


def summary(job: Record, child: Record) -> dict:
    """A training job as the tuning job's answers show it."""
    shown = pick(
        child,
        "TrainingJobName",
        "TrainingJobArn",
        "CreationTime",
        "TrainingStartTime",
        "TrainingEndTime",
        "TrainingJobStatus",
        "FailureReason",
    )
    ranges = job["HyperParameterTuningJobConfig"]["ParameterRanges"]
    tuned = [item["Name"] for items in ranges.values() for item in items]
    shown["TunedHyperParameters"] = pick(child["HyperParameters"], *tuned)
    value = objective_value(child)
    if value is not None:
        shown[METRIC] = {"MetricName": child["HyperParameters"][OBJECTIVE], "Value": value}
    shown["ObjectiveStatus"] = "Succeeded" if value is not None else "Failed" if has_ended(child) else "Pending"
    return shown


def best(scored: Iterable[dict], maximise: bool) -> dict | None:
    """The summary with the best objective, the first of equals; None where there is none."""
    choose = max if maximise else min
    return choose(scored, key=lambda shown: shown[METRIC]["Value"], default=None)
