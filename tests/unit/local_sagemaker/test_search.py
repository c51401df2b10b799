"""The search space of a tuning job, the rules that AWS documents for its trials, and what a warm start takes over."""

import math

import pytest
from optuna.trial import TrialState

from local.sagemaker import tuning, warmstart
from local.sagemaker.errors import ValidationException
from local.sagemaker.search import SearchSpace, check_ranges, falls_behind, new_study, not_improving

RANGES = {
    "ContinuousParameterRanges": [
        {"Name": "lr", "MinValue": "0.0001", "MaxValue": "0.1", "ScalingType": "Auto"},
        {"Name": "momentum", "MinValue": "0.5", "MaxValue": "0.999", "ScalingType": "ReverseLogarithmic"},
        {"Name": "drop", "MinValue": "0", "MaxValue": "0.5", "ScalingType": "Linear"},
    ],
    "IntegerParameterRanges": [{"Name": "epochs", "MinValue": "1", "MaxValue": "8", "ScalingType": "Linear"}],
    "CategoricalParameterRanges": [{"Name": "batch-size", "Values": ["16", '"32"']}],
}
TEXTS = {"lr": "0.01", "momentum": "0.9", "drop": "0.25", "epochs": "3", "batch-size": '"32"'}
WIDE = {"IntegerParameterRanges": [{"Name": "n", "MinValue": "1", "MaxValue": "2000000000", "ScalingType": "Auto"}]}


def config(strategy: str = "Bayesian", **resources) -> dict:
    return {
        "Strategy": strategy,
        "RandomSeed": 7,
        "HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": "objective"},
        "ResourceLimits": {"MaxNumberOfTrainingJobs": 12, "MaxParallelTrainingJobs": 1} | resources,
    }


def test_parameter_ranges_become_a_search_space_and_its_values_texts():
    space = SearchSpace(RANGES)
    assert space.distributions["lr"].log and not space.distributions["drop"].log
    assert space.distributions["momentum"].log and space.distributions["momentum"].low == pytest.approx(0.001)
    values = {"lr": 0.01, "momentum": 0.1, "drop": 0.25, "epochs": 3, "batch-size": '"32"'}
    assert space.texts(values) == TEXTS
    assert space.parameters(TEXTS) == values | {"momentum": pytest.approx(0.1)}


@pytest.mark.parametrize("ends", [("0", "0.999"), ("0.3", "0.7")])
def test_reverse_logarithmic_proposals_stay_within_their_range(ends):
    low, high = ends
    item = {"Name": "m", "MinValue": low, "MaxValue": high, "ScalingType": "ReverseLogarithmic"}
    space = SearchSpace({"ContinuousParameterRanges": [item]})
    distribution = space.distributions["m"]
    for value in (distribution.low, distribution.high):
        text = space.texts({"m": value})["m"]
        assert float(low) <= float(text) <= float(high)
        assert space.parameters({"m": text}) is not None


def test_wide_integer_ranges_give_whole_numbers_and_take_no_room():
    space = SearchSpace(WIDE)
    study = new_study(config(), space, [({"n": str(10**number)}, -abs(number - 4.0)) for number in range(10)])
    [text] = space.texts(study.ask(space.distributions).params).values()
    assert 10**2 < int(text) < 10**6
    assert space.parameters({"n": text}) is not None and space.parameters({"n": "2.5"}) is None


@pytest.mark.parametrize(
    "change",
    [{"lr": "0.2"}, {"lr": "nan"}, {"lr": "fast"}, {"epochs": "2.5"}, {"epochs": "9"}, {"batch-size": "32"}],
)
def test_trials_outside_the_ranges_are_not_taken_over(change):
    assert SearchSpace(RANGES).parameters(TEXTS | change) is None


def test_a_study_begins_with_the_trials_of_the_parents():
    space = SearchSpace(RANGES)
    earlier = [(TEXTS, 0.5), (TEXTS | {"epochs": "99"}, 0.9), (TEXTS | {"epochs": "4"}, 0.7)]
    study = new_study(config(), space, earlier)
    assert [trial.value for trial in study.trials] == [0.5, 0.7]
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)
    assert [trial.params["epochs"] for trial in study.trials] == [3, 4]


def proposals(earlier: list, count: int = 5) -> list[float]:
    """What a search for the maximum of -(x - 3)² in [-10, 10] proposes."""
    space = SearchSpace({"ContinuousParameterRanges": [{"Name": "x", "MinValue": "-10", "MaxValue": "10"}]})
    study = new_study(config(), space, earlier)
    found = []
    for _ in range(count):
        trial = study.ask(space.distributions)
        found.append(trial.params["x"])
        study.tell(trial, -((trial.params["x"] - 3) ** 2))
    return found


def test_a_search_that_knows_the_parents_trials_looks_where_they_were_good():
    parents = [({"x": str(x)}, -((x - 3.0) ** 2)) for x in range(-10, 11)]
    cold, warm = proposals([]), proposals(parents)
    assert cold == proposals([]) and warm == proposals(parents), "the same seed, the same proposals"
    assert sorted(abs(x - 3) for x in warm)[2] < 2 < sorted(abs(x - 3) for x in cold)[2]


@pytest.mark.parametrize("strategy", ["Random", "Bayesian"])
def test_the_same_seed_gives_the_same_proposals(strategy):
    space = SearchSpace(RANGES)
    first, second = (new_study(config(strategy), space).ask(space.distributions).params for _ in range(2))
    assert first == second


COMPLETED = [[1.0, 3.0, 5.0, 7.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 9.0, 9.0]]  # averages after two: 2, 2, 0


@pytest.mark.parametrize(
    ("values", "completed", "maximise", "expected"),
    [
        ([9.0, 1.9], COMPLETED, True, True),  # the latest value counts, not the best
        ([0.0, 2.0], COMPLETED, True, False),  # as good as the median
        ([9.0, 2.1], COMPLETED, False, True),
        ([9.0, 1.9], COMPLETED, False, False),
        ([0.0], COMPLETED, True, False),  # too early to judge it
        ([0.0, 0.0], COMPLETED[:2], True, False),  # too few to judge it by
        ([0.0, 0.0], [*COMPLETED[:2], []], True, False),  # those that reported nothing do not count
        ([9.0, 1.9], [[math.nan, *values] for values in COMPLETED], True, True),
        ([9.0, math.nan], COMPLETED, True, False),
        ([0.0] * 9, [values * 10 for values in COMPLETED], True, False),  # not yet a quarter of the others' length
        ([0.0] * 10, [values * 10 for values in COMPLETED], True, True),
        ([2.5] * 6, COMPLETED, True, True),  # longer than the others: their whole averages, 4, 2 and 4.5
    ],
)
def test_early_stopping_by_the_median_of_averages(values, completed, maximise, expected):
    assert falls_behind(values, completed, maximise) is expected


@pytest.mark.parametrize(
    ("values", "maximise", "expected"),
    [
        ([], True, 0),
        ([0.5, 0.9, 0.904, 0.3], True, 2),  # 0.904 is less than one per cent better
        ([0.5, 0.9, 0.95], True, 0),
        ([3.0, 2.0, 2.5, 1.0, 1.0, 0.995], False, 2),
        ([0.0, 0.0, 0.1], True, 0),
        ([-1.0, -0.995, -0.5], True, 0),
    ],
)
def test_training_jobs_since_the_last_improvement(values, maximise, expected):
    assert not_improving(values, maximise) == expected


def continuous(low: str, high: str, scaling: str = "Auto") -> dict:
    return {"ContinuousParameterRanges": [{"Name": "x", "MinValue": low, "MaxValue": high, "ScalingType": scaling}]}


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ({}, "at least one hyperparameter range"),
        (continuous("2", "1"), "must be less than MaxValue"),
        (continuous("1", "1"), "must be less than MaxValue"),
        (continuous("a", "1"), "must be numbers"),
        (continuous("0", "inf"), "must be numbers"),
        (continuous("0", "1", "Logarithmic"), "values greater than 0"),
        (continuous("0", "1", "ReverseLogarithmic"), "within the range 0<=x<1.0"),
        ({"IntegerParameterRanges": [{"Name": "x", "MinValue": "1.5", "MaxValue": "3"}]}, "must be integers"),
        (
            continuous("0", "1") | {"CategoricalParameterRanges": [{"Name": "x", "Values": ["a"]}]},
            "must be unique",
        ),
        ({"CategoricalParameterRanges": [{"Name": "x", "Values": ["a", "a"]}]}, "must be unique"),
        (continuous("0", "1") | {"CategoricalParameterRanges": [{"Name": "mode", "Values": ["a"]}]}, "both static and"),
        (
            {"CategoricalParameterRanges": [{"Name": f"x{number}", "Values": ["a", "b"]} for number in range(31)]},
            "greater than the limit of 30",
        ),
        (
            {
                "IntegerParameterRanges": [{"Name": "x", "MinValue": "1", "MaxValue": "3"}],
                "CategoricalParameterRanges": [{"Name": "y", "Values": ["a"]}],
            },
            r"for the provided ranges \[3\.0\] must be equal or greater than the value of MaxNumberOfJobs, \[10\]",
        ),
    ],
)
def test_ranges_that_cannot_be_searched_are_refused(ranges, expected):
    with pytest.raises(ValidationException, match=expected):
        check_ranges(ranges, {"mode": "ok"}, 10)


def job(**members) -> dict:
    return {
        "HyperParameterTuningJobConfig": config(),
        "CreationTime": 1000.0,
        "ObjectiveStatusCounters": {"Succeeded": 1, "Pending": 1, "Failed": 0},
        "TuningJobCompletionDetails": {"NumberOfTrainingJobsObjectiveNotImproving": 0},
    } | members


def test_a_tuning_job_ends_at_its_maximum_run_time():
    limited = job(HyperParameterTuningJobConfig=config(MaxRuntimeInSeconds=120))
    assert not tuning.is_over(limited, 1119.9) and tuning.is_over(limited, 1120)
    assert not tuning.is_over(job(), 1e9)


def test_five_failures_end_a_tuning_job_unless_a_training_job_succeeded():
    assert tuning.is_over(job(ObjectiveStatusCounters={"Succeeded": 0, "Pending": 1, "Failed": 5}), 1000)
    assert not tuning.is_over(job(ObjectiveStatusCounters={"Succeeded": 0, "Pending": 1, "Failed": 4}), 1000)
    assert not tuning.is_over(job(ObjectiveStatusCounters={"Succeeded": 1, "Pending": 1, "Failed": 7}), 1000)


def family(static: dict, ranges: dict, **members) -> dict:
    return {
        "HyperParameterTuningJobName": "parent",
        "HyperParameterTuningJobStatus": "Completed",
        "HyperParameterTuningJobConfig": config() | {"ParameterRanges": ranges},
        "TrainingJobDefinition": {"StaticHyperParameters": static},
    } | members


def test_changes_of_static_hyperparameters_are_counted_as_aws_counts_them():
    many = {"CategoricalParameterRanges": [{"Name": "c", "Values": list("abcdefgh")}]}
    parent = family({"text": "red", "number": "1", "x": "0"}, many)
    wide = continuous("0", "1")
    # Eight values of a category that is static now and one number changed: nine. A changed word more is two.
    warmstart.check(family({"text": "red", "number": "2", "c": "a"}, wide), parent, {"Completed"})
    with pytest.raises(ValidationException, match="11 changes"):
        warmstart.check(family({"text": "blue", "number": "2", "c": "a"}, wide), parent, {"Completed"})
    with pytest.raises(ValidationException, match="The set of tunable plus static HyperParameter names"):
        warmstart.check(family({"text": "red", "c": "a"}, wide), parent, {"Completed"})
    with pytest.raises(ValidationException, match="The type of the hyperparameter 'c'"):
        integers = {"IntegerParameterRanges": [{"Name": "c", "MinValue": "0", "MaxValue": "9"}]}
        warmstart.check(
            family(parent["TrainingJobDefinition"]["StaticHyperParameters"], integers), parent, {"Completed"}
        )
