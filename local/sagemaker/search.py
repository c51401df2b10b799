"""The search of a tuning job: SageMaker's parameter ranges in Optuna's terms, and what the objectives decide."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .errors import ValidationException

if TYPE_CHECKING:
    import optuna

MAX_HYPERPARAMETERS = 30  # AWS's limit for all ranges of a tuning job together
LOG_SCALE_RATIO = 100.0  # Auto scaling searches logarithmically when a positive range spans two orders of magnitude
WIDE = 1000  # whole numbers in a range from which on it is searched as a continuous one: Optuna lists smaller ones
IMPROVEMENT = 0.01  # BestObjectiveNotImproving: a training job that gains less than this share has not improved
# AWS publishes the rule of early stopping, but not from when on it applies: these numbers are ours.
EARLY_STOPPING_JOBS = 3  # completed training jobs before any other is stopped
EARLY_STOPPING_SHARE = 0.25  # of the values that completed jobs reported (median), before a job is judged
EARLY_STOPPING_VALUES = 2  # values that a job must have reported, however short the others were


class SearchSpace:
    """ParameterRanges as Optuna's distributions, and hyperparameter texts as Optuna's values and back."""

    def __init__(self, ranges: dict) -> None:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        self.ranges = {item["Name"]: item for items in ranges.values() for item in items}
        self.integers = {item["Name"] for item in ranges.get("IntegerParameterRanges", [])}
        self.distributions: dict[str, Any] = {}
        for item in ranges.get("ContinuousParameterRanges", []):
            low, high = limits(item)
            if is_reversed(item):
                low, high = 1 - high, 1 - low
            logarithmic = is_reversed(item) or is_logarithmic(item)
            self.distributions[item["Name"]] = FloatDistribution(low, high, log=logarithmic)
        for item in ranges.get("IntegerParameterRanges", []):
            low, high = map(int, limits(item))
            kind = IntDistribution if high - low < WIDE else FloatDistribution
            self.distributions[item["Name"]] = kind(low, high, log=is_logarithmic(item))
        for item in ranges.get("CategoricalParameterRanges", []):
            self.distributions[item["Name"]] = CategoricalDistribution(item["Values"])

    def texts(self, parameters: dict[str, Any]) -> dict[str, str]:
        """A proposal of Optuna's as hyperparameters, which are texts."""
        found = {}
        for name, value in parameters.items():
            item = self.ranges[name]
            if is_reversed(item):
                low, high = limits(item)
                value = min(max(1 - value, low), high)
            found[name] = str(round(value) if name in self.integers else value)
        return found

    def parameters(self, texts: dict[str, str]) -> dict[str, Any] | None:
        """The hyperparameters of an earlier training job as Optuna's values; None if they are not in this space."""
        found: dict[str, Any] = {}
        for name, distribution in self.distributions.items():
            item = self.ranges[name]
            text = texts.get(name, "")
            if "Values" in item:
                if text not in item["Values"]:
                    return None
                found[name] = text
                continue
            value = number(text.strip('"'))
            low, high = limits(item)
            if value is None or not low <= value <= high:
                return None
            if name in self.integers and not value.is_integer():
                return None
            value = 1 - value if is_reversed(item) else value
            found[name] = type(distribution.low)(min(max(value, distribution.low), distribution.high))
        return found


def new_study(config: dict, space: SearchSpace, earlier: Iterable[tuple[dict[str, str], float]] = ()) -> optuna.Study:
    """The Optuna study of a tuning job.

    `config` is HyperParameterTuningJobConfig; `earlier` the trials of a warm start's parents, as (hyperparameters,
    objective): those that lie in the search space become trials of the study, which count as its random beginning.
    Importing Optuna takes a moment, and so does each proposal: neither belongs on the event loop.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed = config.get("RandomSeed")
    sampler: optuna.samplers.BaseSampler
    if config["Strategy"] == "Random":
        sampler = optuna.samplers.RandomSampler(seed=seed)
    else:
        # Regression by a Gaussian process, as on AWS. It knows of running trials, so that parallel ones do not all go
        # to one place. A small budget must not be spent on random starts alone.
        startup = max(2, min(10, config["ResourceLimits"]["MaxNumberOfTrainingJobs"] // 3))
        sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
    study = optuna.create_study(direction="maximize" if is_maximised(config) else "minimize", sampler=sampler)
    for texts, value in earlier:
        if (parameters := space.parameters(texts)) is not None:
            study.add_trial(
                optuna.trial.create_trial(params=parameters, distributions=space.distributions, value=value)
            )
    return study


def is_maximised(config: dict) -> bool:
    """Whether more of the objective is better."""
    return config["HyperParameterTuningJobObjective"]["Type"] == "Maximize"


def falls_behind(values: list[float], completed: list[list[float]], maximise: bool) -> bool:
    """Whether a training job is to be stopped early (TrainingJobEarlyStoppingType Auto).

    `values` are those of the objective that it reported so far, `completed` those of each completed training job. AWS's
    rule: its latest value is worse than the median of the others' averages up to the same number of values.
    """
    completed = [found for found in ([*filter(math.isfinite, reported)] for reported in completed) if found]
    if len(completed) < EARLY_STOPPING_JOBS:
        return False
    usual = statistics.median(len(found) for found in completed)
    if len(values) < max(EARLY_STOPPING_VALUES, EARLY_STOPPING_SHARE * usual):
        return False
    median = statistics.median(statistics.fmean(found[: len(values)]) for found in completed)
    return values[-1] < median if maximise else values[-1] > median


def not_improving(values: Iterable[float], maximise: bool) -> int:
    """How many of the objective's values, in order of the training jobs' ends, came after the last real improvement.

    >>> not_improving([0.5, 0.9, 0.904, 0.3], maximise=True)
    2
    """
    best: float | None = None
    since = 0
    for value in values:
        gain = math.inf if best is None else (value - best if maximise else best - value)
        if best is None or (gain > 0 and gain >= IMPROVEMENT * abs(best)):
            best, since = value, 0
        else:
            since += 1
    return since


def number(text: str) -> float | None:
    """The finite number that a text says, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def limits(item: dict) -> tuple[float, float]:
    """MinValue and MaxValue of a range that was checked."""
    return float(item["MinValue"]), float(item["MaxValue"])


def is_reversed(item: dict) -> bool:
    """Whether a numeric range is searched by its distance from 1."""
    return item.get("ScalingType") == "ReverseLogarithmic"


def is_logarithmic(item: dict) -> bool:
    """Whether a numeric range is searched by magnitude."""
    low, high = limits(item)
    scaling = item.get("ScalingType", "Auto")
    return scaling == "Logarithmic" or (scaling == "Auto" and low > 0 and high / low >= LOG_SCALE_RATIO)


def check_ranges(ranges: dict, static: dict[str, str], jobs: int) -> None:
    """Raises ValidationException for ParameterRanges that cannot be searched with `jobs` training jobs."""
    names = [item["Name"] for items in ranges.values() for item in items]
    if not names:
        raise ValidationException("You must specify at least one hyperparameter range in ParameterRanges.")
    if len(names) > MAX_HYPERPARAMETERS:
        raise ValidationException(
            f"The number of hyperparameters in ParameterRanges, {len(names)}, is greater than the limit of "
            f"{MAX_HYPERPARAMETERS}."
        )
    if len(set(names)) < len(names):
        raise ValidationException("Hyperparameter names in ParameterRanges must be unique.")
    if both := sorted(set(names) & set(static)):
        raise ValidationException(f"Hyperparameters {both} cannot be both static and tuned.")
    combinations = 1.0
    for item in ranges.get("ContinuousParameterRanges", []):
        check_range(item)
        combinations = math.inf
    for item in ranges.get("IntegerParameterRanges", []):
        low, high = check_range(item)
        if not (low.is_integer() and high.is_integer()):
            raise ValidationException(
                f"MinValue and MaxValue of the integer hyperparameter {item['Name']!r} must be integers, found "
                f"{item['MinValue']!r} and {item['MaxValue']!r}."
            )
        combinations *= high - low + 1
    for item in ranges.get("CategoricalParameterRanges", []):
        if len(set(item["Values"])) < len(item["Values"]):
            raise ValidationException(f"The values of the categorical hyperparameter {item['Name']!r} must be unique.")
        combinations *= len(item["Values"])
    if combinations < jobs:
        raise ValidationException(
            "You don't have enough combinations of hyperparameter ranges. The total number of hyperparameter "
            f"combinations for the provided ranges [{combinations}] must be equal or greater than the value of "
            f"MaxNumberOfJobs, [{jobs}]. Provide additional ranges."
        )


def check_range(item: dict) -> tuple[float, float]:
    """The ends of a numeric range; raises ValidationException for one that cannot be searched.

    AWS takes no range of a single value, and no value of a category twice (aws/amazon-sagemaker-feedback, issue 195).
    """
    name = item["Name"]
    low, high = number(item["MinValue"]), number(item["MaxValue"])
    if low is None or high is None:
        raise ValidationException(
            f"MinValue and MaxValue of the hyperparameter {name!r} must be numbers, found {item['MinValue']!r} and "
            f"{item['MaxValue']!r}."
        )
    if low >= high:
        raise ValidationException(
            f"MinValue of the hyperparameter {name!r} ({low:g}) must be less than MaxValue ({high:g})."
        )
    scaling = item.get("ScalingType", "Auto")
    if scaling == "Logarithmic" and low <= 0:
        raise ValidationException(f"Logarithmic scaling of the hyperparameter {name!r} needs values greater than 0.")
    if scaling == "ReverseLogarithmic" and not 0 <= low < high < 1:
        raise ValidationException(
            f"ReverseLogarithmic scaling of the hyperparameter {name!r} needs values within the range 0<=x<1.0."
        )
    return low, high
