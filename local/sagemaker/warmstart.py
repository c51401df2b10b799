"""Warm start: what a tuning job may change against its parents, and the trials that it takes over from them."""

from __future__ import annotations

from collections.abc import Iterable

from .errors import ValidationException
from .search import number
from .store import Record

MAX_CHANGES = 10  # AWS's limit for changes from tunable to static plus changes of static values
# TrainingJobDefinition's members that may differ from a parent's, in AWS's spelling; with the same data and algorithm,
# not those that hold them.
MAY_CHANGE = (
    "algorithmSpecification",
    "inputDataConfig",
    "outputDataConfig",
    "staticHyperParameters",
    "roleArn",
    "resourceConfig",
    "stoppingCondition",
    "vpcConfig",
    "enableManagedSpotTraining",
    "checkpointConfig",
)
SAME_DATA_AND_ALGORITHM = ("algorithmSpecification", "inputDataConfig")


def is_identical(job: Record) -> bool:
    """Whether a tuning job goes on with the same data and algorithm, so that all objectives can be compared."""
    return job.get("WarmStartConfig", {}).get("WarmStartType") == "IdenticalDataAndAlgorithm"


def parents(job: Record) -> list[str]:
    """The names of the tuning jobs that a tuning job starts from."""
    named = job.get("WarmStartConfig", {}).get("ParentHyperParameterTuningJobs", [])
    return [parent.get("HyperParameterTuningJobName", "") for parent in named]


def check(job: Record, parent: Record, ended: Iterable[str]) -> None:
    """Raises ValidationException for a parent that `job` (a request, or a record) cannot start from."""
    name, status = parent["HyperParameterTuningJobName"], parent["HyperParameterTuningJobStatus"]
    if status not in ended:
        raise ValidationException(
            f"The parent tuning job {name} must be Completed, Stopped or Failed for a warm start, and is {status}."
        )
    config, earlier = job["HyperParameterTuningJobConfig"], parent["HyperParameterTuningJobConfig"]
    if config["HyperParameterTuningJobObjective"] != earlier["HyperParameterTuningJobObjective"]:
        raise ValidationException(
            f"The objective metric of a warm start tuning job must be the same as that of its parent tuning job {name}."
        )
    tuned, tuned_before = _kinds(config), _kinds(earlier)
    static = job["TrainingJobDefinition"]["StaticHyperParameters"]
    static_before = parent["TrainingJobDefinition"]["StaticHyperParameters"]
    if tuned.keys() | static.keys() != tuned_before.keys() | static_before.keys():
        raise ValidationException(
            "The set of tunable plus static HyperParameter names is not the same across current and parent tuning "
            "jobs. Please ensure this set is constant when warm starting. Note that previously static "
            "HyperParameters can be tuned in warm start jobs and vice versa."
        )
    for hyperparameter in sorted(tuned.keys() & tuned_before.keys()):
        if tuned[hyperparameter] != tuned_before[hyperparameter]:
            raise ValidationException(
                f"The type of the hyperparameter {hyperparameter!r} must be as in the parent tuning job {name}."
            )
    if (changes := _changes(static, static_before, earlier)) > MAX_CHANGES:
        raise ValidationException(
            f"{changes} changes of hyperparameters from tunable to static and of static values against the parent "
            f"tuning job {name} are more than the limit of {MAX_CHANGES}."
        )
    _check_definition(job, parent)


def _kinds(config: dict) -> dict[str, str]:
    """The type of each tuned hyperparameter: the name of the list it stands in."""
    return {item["Name"]: kind for kind, items in config["ParameterRanges"].items() for item in items}


def _changes(static: dict[str, str], static_before: dict[str, str], earlier: dict) -> int:
    """How many changes AWS counts: each value that a category had or has is one, a number is one."""
    before = {item["Name"]: item for items in earlier["ParameterRanges"].values() for item in items}
    count = 0
    for name, value in static.items():
        if name in before:
            count += len(before[name].get("Values", [""]))
        elif static_before[name] != value:
            count += 1 if number(value) is not None else 2
    return count


def _check_definition(job: Record, parent: Record) -> None:
    allowed = [name for name in MAY_CHANGE if not (is_identical(job) and name in SAME_DATA_AND_ALGORITHM)]
    now, before = job["TrainingJobDefinition"], parent["TrainingJobDefinition"]
    differ = {key for key in now.keys() | before.keys() if (now.get(key) or None) != (before.get(key) or None)}
    if {key[0].lower() + key[1:] for key in differ} - set(allowed):
        raise ValidationException(
            f"Only the following fields in TrainingJobDefinition are allowed to change: [{', '.join(allowed)}]."
        )
