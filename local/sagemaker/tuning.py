"""Hyperparameter tuning jobs: Optuna proposes, real training jobs answer."""

from __future__ import annotations

import asyncio
import math
import uuid
from typing import TYPE_CHECKING, Any

from .errors import ResourceInUse, ResourceNotFound, ValidationException
from .jobs import Work, check_metric_definitions, summaries
from .store import Record, Store, arn, now, page, pick, record
from .training import ENDED, TrainingJobs

if TYPE_CHECKING:
    import optuna

KIND = "hyper-parameter-tuning-job"
MAX_FAILURES = 5  # AWS gives up when the first five training jobs all failed
LOG_SCALE_RATIO = 100.0  # Auto scaling searches logarithmically when a positive range spans two orders of magnitude
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
        self._check(request)
        if self.store.find(KIND, name):
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
            _children=[],
        )
        self._count(job)
        self.store.save(job)
        stop = self.stops[job_arn] = asyncio.Event()
        self.work.start(self._run(job, stop))
        return {"HyperParameterTuningJobArn": job_arn}

    def _check(self, request: dict) -> None:
        config = request["HyperParameterTuningJobConfig"]
        limits = config["ResourceLimits"]
        if limits.get("MaxNumberOfTrainingJobs") is None:
            raise ValidationException("You must specify MaxNumberOfTrainingJobs in ResourceLimits.")
        if limits["MaxParallelTrainingJobs"] > limits["MaxNumberOfTrainingJobs"]:
            raise ValidationException("MaxParallelTrainingJobs cannot be greater than MaxNumberOfTrainingJobs.")
        ranges = config.get("ParameterRanges", {})
        names = [item["Name"] for items in ranges.values() for item in items]
        if not names:
            raise ValidationException("You must specify at least one hyperparameter range in ParameterRanges.")
        if len(set(names)) < len(names):
            raise ValidationException("Hyperparameter names in ParameterRanges must be unique.")
        for item in ranges.get("ContinuousParameterRanges", []) + ranges.get("IntegerParameterRanges", []):
            check_range(item)
        definition = request.get("TrainingJobDefinition")
        if not definition or "HyperParameterTuningJobObjective" not in config:
            raise ValidationException("You must specify TrainingJobDefinition and HyperParameterTuningJobObjective.")
        if both := set(names) & set(definition.get("StaticHyperParameters", {})):
            raise ValidationException(f"Hyperparameters {sorted(both)} cannot be both static and tuned.")
        objective = config["HyperParameterTuningJobObjective"]["MetricName"]
        definitions = definition["AlgorithmSpecification"].get("MetricDefinitions", [])
        check_metric_definitions(definitions)
        if objective not in {item["Name"] for item in definitions}:
            raise ValidationException(
                f"The objective metric {objective!r} is not among the MetricDefinitions of the training job definition."
            )
        self.training.check(self._child_request("check-000", definition, {}, objective))

    def _get(self, request: dict) -> Record:
        name = request["HyperParameterTuningJobName"]
        return self.store.get(
            KIND,
            name,
            lambda: ResourceNotFound(
                f"Amazon SageMaker can't find a tuning job with the name {name}. Check the name and try again."
            ),
        )

    async def describe(self, request: dict) -> dict:
        """DescribeHyperParameterTuningJob."""
        return self._get(request)

    async def listing(self, request: dict) -> dict:
        """ListHyperParameterTuningJobs."""
        jobs, token = page(
            self.store.all(KIND),
            request,
            "HyperParameterTuningJobName",
            "HyperParameterTuningJobStatus",
            default_sort="Name",
        )
        found = [
            summary
            | {
                "Strategy": job["HyperParameterTuningJobConfig"]["Strategy"],
                "ResourceLimits": job["HyperParameterTuningJobConfig"]["ResourceLimits"],
            }
            for job, summary in zip(
                jobs,
                summaries(
                    jobs,
                    "HyperParameterTuningJobName",
                    "HyperParameterTuningJobArn",
                    "HyperParameterTuningJobStatus",
                    "CreationTime",
                    "HyperParameterTuningEndTime",
                    "LastModifiedTime",
                    "TrainingJobStatusCounters",
                    "ObjectiveStatusCounters",
                ),
                strict=True,
            )
        ]
        return {"HyperParameterTuningJobSummaries": found, "NextToken": token}

    async def list_training_jobs(self, request: dict) -> dict:
        """ListTrainingJobsForHyperParameterTuningJob."""
        job = self._get(request)
        objective = job["HyperParameterTuningJobConfig"]["HyperParameterTuningJobObjective"]
        found = []
        for child in self._children(job):
            summary = self._summary(job, child) | {"_value": math.nan}
            if metric := summary.get("FinalHyperParameterTuningJobObjectiveMetric"):
                summary["_value"] = metric["Value"]
            found.append(summary)
        if request.get("SortBy") == "FinalObjectiveMetricValue":
            found = [item for item in found if not math.isnan(item["_value"])]
            order = request.get("SortOrder", "Descending" if objective["Type"] == "Maximize" else "Ascending")
            found.sort(key=lambda item: item["_value"], reverse=order == "Descending")
            start, token = page(
                found,
                {
                    **pick(request, "StatusEquals", "MaxResults", "NextToken"),
                    "SortBy": "_none",
                    "SortOrder": "Ascending",
                },
                "TrainingJobName",
                "TrainingJobStatus",
            )
        else:
            start, token = page(found, request, "TrainingJobName", "TrainingJobStatus")
        return {
            "TrainingJobSummaries": [{key: value for key, value in item.items() if key != "_value"} for item in start],
            "NextToken": token,
        }

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
        found = (self.store.find("training-job", name) for name in job["_children"])
        return [child for child in found if child]

    def _summary(self, job: Record, child: Record) -> dict:
        """A training job as the tuning job's answers show it."""
        summary = pick(
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
        tuned = {item["Name"] for items in ranges.values() for item in items}
        summary["TunedHyperParameters"] = {
            key: value for key, value in child["HyperParameters"].items() if key in tuned
        }
        objective = job["HyperParameterTuningJobConfig"]["HyperParameterTuningJobObjective"]
        value = objective_value(child, objective["MetricName"])
        if child["TrainingJobStatus"] not in ENDED:
            summary["ObjectiveStatus"] = "Pending"
        elif value is not None:
            summary["ObjectiveStatus"] = "Succeeded"
            summary["FinalHyperParameterTuningJobObjectiveMetric"] = {
                "Type": objective["Type"],
                "MetricName": objective["MetricName"],
                "Value": value,
            }
        else:
            summary["ObjectiveStatus"] = "Failed"
        return summary

    def _count(self, job: Record) -> None:
        """Brings the counters and the best training job up to date."""
        children = [self._summary(job, child) for child in self._children(job)]
        status = [child["TrainingJobStatus"] for child in children]
        goal = [child["ObjectiveStatus"] for child in children]
        job["TrainingJobStatusCounters"] = {
            "Completed": status.count("Completed"),
            "InProgress": status.count("InProgress") + status.count("Stopping"),
            "RetryableError": 0,
            "NonRetryableError": status.count("Failed"),
            "Stopped": status.count("Stopped"),
        }
        job["ObjectiveStatusCounters"] = {name: goal.count(name) for name in ("Succeeded", "Pending", "Failed")}
        metric = "FinalHyperParameterTuningJobObjectiveMetric"
        scored = [child for child in children if metric in child]
        if scored:
            maximise = scored[0][metric]["Type"] == "Maximize"
            job["BestTrainingJob"] = sorted(scored, key=lambda child: child[metric]["Value"], reverse=maximise)[0]

    def _become(self, job: Record, status: str, reason: str = "") -> None:
        self._count(job)
        job["HyperParameterTuningJobStatus"] = status
        job["LastModifiedTime"] = now()
        if status in ENDED:
            job["HyperParameterTuningEndTime"] = job["LastModifiedTime"]
        if reason:
            job["FailureReason"] = reason
        self.store.save(job)

    async def _run(self, job: Record, stop: asyncio.Event) -> None:
        try:
            await self._search(job, stop)
        except Exception as error:
            self._become(job, "Failed", f"InternalServerError: {error!r}. Please try again.")
            raise
        finally:
            self.stops.pop(job["HyperParameterTuningJobArn"], None)

    async def _search(self, job: Record, stop: asyncio.Event) -> None:
        config = job["HyperParameterTuningJobConfig"]
        limits = config["ResourceLimits"]
        study = await self.work.blocking(new_study, config)
        space = SearchSpace(config["ParameterRanges"])
        deadline = job["CreationTime"] + limits.get("MaxRuntimeInSeconds", math.inf)
        running: dict[str, optuna.trial.Trial] = {}
        while True:
            for name, trial in list(running.items()):
                child = self.store.find("training-job", name)
                if child is None or child["TrainingJobStatus"] in ENDED:
                    self._tell(study, trial, child, config)
                    del running[name]
                    self._become(job, job["HyperParameterTuningJobStatus"])
            stopping = stop.is_set() or now() > deadline or self._hopeless(job)
            full = len(job["_children"]) >= limits["MaxNumberOfTrainingJobs"]
            if (stopping or full) and not running:
                break
            if stopping:
                for name in running:
                    child = self.store.find("training-job", name)
                    if child and child["TrainingJobStatus"] == "InProgress":
                        await self.training.stop({"TrainingJobName": name})
            elif not full and len(running) < limits["MaxParallelTrainingJobs"]:
                trial = study.ask(space.distributions)
                running[self._start(job, space.values(trial.params))] = trial
                continue
            await asyncio.sleep(POLL)
        if stop.is_set():
            self._become(job, "Stopped")
        elif "BestTrainingJob" in job:
            self._become(job, "Completed")
        else:
            self._become(
                job,
                "Failed",
                f"No training job succeeded after {len(job['_children'])} attempts. For "
                "additional details, please take a look at the training job failures by listing training "
                "jobs for the hyperparameter tuning job.",
            )

    def _hopeless(self, job: Record) -> bool:
        counters = job["TrainingJobStatusCounters"]
        return counters["NonRetryableError"] >= MAX_FAILURES and counters["Completed"] == 0

    def _start(self, job: Record, values: dict[str, str]) -> str:
        """Starts one training job with these hyperparameters; returns its name."""
        number = len(job["_children"]) + 1
        name = f"{job['HyperParameterTuningJobName']}-{number:03d}-{uuid.uuid4().hex[:8]}"
        objective = job["HyperParameterTuningJobConfig"]["HyperParameterTuningJobObjective"]["MetricName"]
        request = self._child_request(name, job["TrainingJobDefinition"], values, objective)
        self.training.submit(request, TuningJobArn=job["HyperParameterTuningJobArn"])
        job["_children"].append(name)
        self._become(job, job["HyperParameterTuningJobStatus"])
        return name

    @staticmethod
    def _child_request(name: str, definition: dict, values: dict[str, str], objective: str) -> dict:
        request = {key: value for key, value in definition.items() if key != "StaticHyperParameters"}
        return request | {
            "TrainingJobName": name,
            "HyperParameters": definition.get("StaticHyperParameters", {})
            | values
            | {"_tuning_objective_metric": objective},
        }

    @staticmethod
    def _tell(study: optuna.Study, trial: optuna.trial.Trial, child: Record | None, config: dict) -> None:
        import optuna

        value = objective_value(child, config["HyperParameterTuningJobObjective"]["MetricName"]) if child else None
        if value is None or not math.isfinite(value):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, value)

    def recover(self) -> None:
        """After a restart: tuning jobs that were at work died with the emulator."""
        for job in self.store.all(KIND):
            if job["HyperParameterTuningJobStatus"] not in ENDED:
                self._become(
                    job, "Failed", "InternalServerError: The local AWS was stopped while the job ran. Please try again."
                )


def objective_value(child: Record, metric: str) -> float | None:
    """The last value of the objective that the training job logged; None while it runs or if it never did."""
    if child["TrainingJobStatus"] not in ("Completed", "Stopped"):
        return None
    values = [item["Value"] for item in child["FinalMetricDataList"] if item["MetricName"] == metric]
    return values[-1] if values else None


def check_range(item: dict) -> None:
    """Raises ValidationException for a numeric range that cannot be searched."""
    name = item["Name"]
    try:
        low, high = float(item["MinValue"]), float(item["MaxValue"])
    except ValueError:
        raise ValidationException(
            f"MinValue and MaxValue of the hyperparameter {name!r} must be numbers, found "
            f"{item['MinValue']!r} and {item['MaxValue']!r}."
        ) from None
    if low > high:
        raise ValidationException(
            f"MinValue of the hyperparameter {name!r} ({low:g}) is greater than MaxValue ({high:g})."
        )
    scaling = item.get("ScalingType", "Auto")
    if scaling == "Logarithmic" and low <= 0:
        raise ValidationException(f"Logarithmic scaling of the hyperparameter {name!r} needs a MinValue above 0.")
    if scaling == "ReverseLogarithmic" and not 0 <= low <= high < 1:
        raise ValidationException(
            f"ReverseLogarithmic scaling of the hyperparameter {name!r} needs values from 0 to below 1."
        )


def new_study(config: dict) -> optuna.Study:
    """The Optuna study of a tuning job; importing Optuna takes a moment, so off the event loop."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = config.get("RandomSeed")
    limits = config["ResourceLimits"]
    sampler: optuna.samplers.BaseSampler
    if config["Strategy"] == "Random":
        sampler = optuna.samplers.RandomSampler(seed=seed)
    else:
        # A small budget must not be spent on random starts alone; running trials count as bad ones (constant liar),
        # so that parallel trials do not all go to one place.
        startup = max(2, min(10, limits["MaxNumberOfTrainingJobs"] // 3))
        sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=limits["MaxParallelTrainingJobs"] > 1
        )
    maximise = config["HyperParameterTuningJobObjective"]["Type"] == "Maximize"
    return optuna.create_study(direction="maximize" if maximise else "minimize", sampler=sampler)


class SearchSpace:
    """SageMaker's ParameterRanges as Optuna's distributions, and Optuna's numbers as hyperparameter texts."""

    def __init__(self, ranges: dict) -> None:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        self.distributions: dict[str, Any] = {}
        self.reversed: set[str] = set()
        for item in ranges.get("ContinuousParameterRanges", []):
            low, high = float(item["MinValue"]), float(item["MaxValue"])
            if item.get("ScalingType") == "ReverseLogarithmic":
                self.reversed.add(item["Name"])
                low, high = 1 - high, 1 - low
            self.distributions[item["Name"]] = FloatDistribution(
                low, high, log=item["Name"] in self.reversed or is_logarithmic(item)
            )
        for item in ranges.get("IntegerParameterRanges", []):
            self.distributions[item["Name"]] = IntDistribution(
                int(float(item["MinValue"])), int(float(item["MaxValue"])), log=is_logarithmic(item)
            )
        for item in ranges.get("CategoricalParameterRanges", []):
            self.distributions[item["Name"]] = CategoricalDistribution(item["Values"])

    def values(self, parameters: dict[str, Any]) -> dict[str, str]:
        """Hyperparameters are texts."""
        return {name: str(1 - value if name in self.reversed else value) for name, value in parameters.items()}


def is_logarithmic(item: dict) -> bool:
    """Whether a numeric range is searched by magnitude."""
    low, high = float(item["MinValue"]), float(item["MaxValue"])
    scaling = item.get("ScalingType", "Auto")
    return scaling == "Logarithmic" or (scaling == "Auto" and low > 0 and high / low >= LOG_SCALE_RATIO)
