"""Tuning jobs: real training jobs, chosen by a search."""

import json
import os
import re
import signal

import boto3
import pytest
from botocore.exceptions import ClientError

from local.emulator import Emulator
from tests.makers.sagemaker import BUCKET, World, alive, archive, tuning, until

# Reports its level four times, the level that stands at the job's number; a level of 0 is reported until it is stopped.
LEVELS = """
    import argparse, itertools, os, time
    parser = argparse.ArgumentParser()
    parser.add_argument("-x")
    parser.add_argument("--levels")
    options = parser.parse_args()
    number = int(os.environ["TRAINING_JOB_NAME"].rsplit("-", 2)[1])
    level = float(options.levels.split()[number - 1])
    for step in itertools.count():
        if step == 4 and level:
            break
        print(f"objective={level};", flush=True)
        time.sleep(0.05)
"""
METRIC = "FinalHyperParameterTuningJobObjectiveMetric"


def definition(source: str = "sourcedir", **static: str) -> dict:
    made = tuning("any")["TrainingJobDefinition"]
    made["StaticHyperParameters"] |= {"sagemaker_submit_directory": f"s3://{BUCKET}/code/{source}.tar.gz"} | static
    return made


def levels(world, *values: float) -> dict:
    world.put("code/levels.tar.gz", archive(train_py=LEVELS))
    return definition("levels", levels=" ".join(map(str, values)))


def config(jobs: int, parallel: int = 1, **more) -> dict:
    return {
        "Strategy": "Random",
        "RandomSeed": 1,
        "HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": "objective"},
        "ResourceLimits": {"MaxNumberOfTrainingJobs": jobs, "MaxParallelTrainingJobs": parallel},
        "ParameterRanges": {"ContinuousParameterRanges": [{"Name": "x", "MinValue": "-10", "MaxValue": "10"}]},
    } | more


def tune(world, name: str, config: dict, definition: dict, **more) -> None:
    world.sagemaker.create_hyper_parameter_tuning_job(
        HyperParameterTuningJobName=name,
        HyperParameterTuningJobConfig=config,
        TrainingJobDefinition=definition,
        **more,
    )


def describe(world, name: str) -> dict:
    return world.sagemaker.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName=name)


def tuned(world, name: str, status: str = "Completed") -> dict:
    job = until(
        lambda: describe(world, name),
        lambda found: found["HyperParameterTuningJobStatus"] not in ("InProgress", "Stopping"),
        120,
    )
    assert job["HyperParameterTuningJobStatus"] == status, job
    return job


def trials(world, name: str, **more) -> list[dict]:
    found = world.sagemaker.list_training_jobs_for_hyper_parameter_tuning_job(
        HyperParameterTuningJobName=name, **({"MaxResults": 100} | more)
    )
    return found["TrainingJobSummaries"]


def test_tuning_finds_the_best_of_a_quadratic(world):
    ranges = config(1)["ParameterRanges"] | {"CategoricalParameterRanges": [{"Name": "kind", "Values": ["a", '"b"']}]}
    tune(
        world,
        "quadratic",
        config(10, 2, Strategy="Bayesian", ParameterRanges=ranges),
        definition(mode="ok"),
        Tags=[{"Key": "team", "Value": "dogs"}],
    )
    job = tuned(world, "quadratic")
    assert job["TrainingJobStatusCounters"] == {
        "Completed": 10,
        "InProgress": 0,
        "RetryableError": 0,
        "NonRetryableError": 0,
        "Stopped": 0,
    }
    assert job["ObjectiveStatusCounters"] == {"Succeeded": 10, "Pending": 0, "Failed": 0}
    assert job["ConsumedResources"]["RuntimeInSeconds"] >= 1
    assert job["HyperParameterTuningEndTime"] > job["CreationTime"]
    assert job["HyperParameterTuningJobConfig"]["TrainingJobEarlyStoppingType"] == "Off"
    assert job["TrainingJobDefinition"]["StaticHyperParameters"]["_tuning_objective_metric"] == "objective"
    assert "WarmStartConfig" not in job and "OverallBestTrainingJob" not in job and "FailureReason" not in job

    by_value = trials(world, "quadratic", SortBy="FinalObjectiveMetricValue", SortOrder="Descending")
    values = [trial[METRIC]["Value"] for trial in by_value]
    assert len(values) == 10 and values == sorted(values, reverse=True)
    assert trials(world, "quadratic", SortBy="FinalObjectiveMetricValue") == by_value[::-1]
    names = [trial["TrainingJobName"] for trial in trials(world, "quadratic")]
    assert names == sorted(names)
    assert all(re.fullmatch(f"quadratic-{number:03d}-[0-9a-f]{{8}}", name) for number, name in enumerate(names, 1))
    pages = world.sagemaker.get_paginator("list_training_jobs_for_hyper_parameter_tuning_job").paginate(
        HyperParameterTuningJobName="quadratic", StatusEquals="Completed", PaginationConfig={"PageSize": 7}
    )
    assert [trial["TrainingJobName"] for page in pages for trial in page["TrainingJobSummaries"]] == names
    assert trials(world, "quadratic", StatusEquals="Failed") == []

    best = job["BestTrainingJob"]
    assert best == by_value[0] and best["ObjectiveStatus"] == "Succeeded"
    assert best["TunedHyperParameters"].keys() == {"x", "kind"}
    x = float(best["TunedHyperParameters"]["x"])
    assert best[METRIC] == {"MetricName": "objective", "Value": pytest.approx(-((x - 3) ** 2), abs=1e-3)}
    assert abs(x - 3) < 2, "ten trials should come nearer to 3 than that"
    child = world.sagemaker.describe_training_job(TrainingJobName=best["TrainingJobName"])
    assert child["TuningJobArn"] == job["HyperParameterTuningJobArn"]
    assert child["HyperParameters"].items() >= best["TunedHyperParameters"].items()
    assert child["HyperParameters"]["_tuning_objective_metric"] == "objective"
    assert {trial["TunedHyperParameters"]["kind"] for trial in by_value} == {"a", '"b"'}, "as given, quotes and all"
    tags = world.sagemaker.list_tags(ResourceArn=child["TrainingJobArn"])["Tags"]
    assert tags == [{"Key": "team", "Value": "dogs"}]

    listed = world.sagemaker.list_hyper_parameter_tuning_jobs(NameContains="quadratic", StatusEquals="Completed")
    [shown] = listed["HyperParameterTuningJobSummaries"]
    assert shown["Strategy"] == "Bayesian" and shown["ResourceLimits"]["MaxNumberOfTrainingJobs"] == 10
    assert shown["TrainingJobStatusCounters"] == job["TrainingJobStatusCounters"]
    with pytest.raises(ClientError, match="ResourceInUse"):
        tune(world, "Quadratic", config(1), definition())
    with pytest.raises(ClientError, match="in status Completed"):
        world.sagemaker.stop_hyper_parameter_tuning_job(HyperParameterTuningJobName="quadratic")


def proposed(world, name: str) -> list[float]:
    return [float(trial["TunedHyperParameters"]["x"]) for trial in trials(world, name)]


def warm_start(kind: str, *parents: str) -> dict:
    return {
        "WarmStartType": kind,
        "ParentHyperParameterTuningJobs": [{"HyperParameterTuningJobName": parent} for parent in parents],
    }


def test_a_warm_start_goes_on_from_the_trials_of_its_parents(world):
    tune(world, "parent", config(10, 2), definition())
    parent = tuned(world, "parent")
    bayesian = config(3, Strategy="Bayesian")
    tune(world, "cold", bayesian, definition())
    identical = warm_start("IdenticalDataAndAlgorithm", "parent")
    tune(world, "warm", bayesian, definition(), WarmStartConfig=identical)
    tuned(world, "cold")
    warm = tuned(world, "warm")
    # The same seed: without the parent's trials the search would have begun as the cold one did.
    assert proposed(world, "warm")[0] != proposed(world, "cold")[0]
    assert sorted(abs(x - 3) for x in proposed(world, "warm"))[1] < 3, "near the best of the parent's trials"
    assert warm["WarmStartConfig"] == identical
    candidates = [parent["BestTrainingJob"], warm["BestTrainingJob"]]
    best = max(candidates, key=lambda shown: shown[METRIC]["Value"])
    family = "parent" if best is candidates[0] else "warm"
    assert warm["OverallBestTrainingJob"] == best | {"TuningJobName": family}

    narrow = {"ContinuousParameterRanges": [{"Name": "x", "MinValue": "50", "MaxValue": "51"}]}
    tune(
        world,
        "transfer",
        config(1, Strategy="Bayesian", ParameterRanges=narrow),
        definition() | {"InputDataConfig": [channel("training")]},
        WarmStartConfig=warm_start("TransferLearning", "parent"),
    )
    transfer = tuned(world, "transfer")
    assert 50 <= proposed(world, "transfer")[0] <= 51 and "OverallBestTrainingJob" not in transfer


def channel(name: str) -> dict:
    source = {"S3DataType": "S3Prefix", "S3Uri": f"s3://{BUCKET}/data/"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}}


@pytest.fixture(scope="module")
def ended(world):
    tune(world, "ended", config(1), definition())
    tuned(world, "ended")
    return "ended"


MINIMISED = {"HyperParameterTuningJobObjective": {"Type": "Minimize", "MetricName": "objective"}}
AS_INTEGER = {"ParameterRanges": {"IntegerParameterRanges": [{"Name": "x", "MinValue": "1", "MaxValue": "9"}]}}


@pytest.mark.parametrize(
    ("parents", "changed", "made", "expected"),
    [
        (["nobody"], {}, {}, "can't find a tuning job with the name nobody"),
        (["ended", "ended"], {}, {}, "must be unique"),
        (list("abcdef"), {}, {}, "Member must have length less than or equal to 5"),
        (["ended"], MINIMISED, {}, "The objective metric of a warm start tuning job must be the same"),
        (["ended"], AS_INTEGER, {}, "The type of the hyperparameter 'x' must be"),
        (
            ["ended"],
            {},
            {"StaticHyperParameters": {"sagemaker_program": "train.py"}},
            "The set of tunable plus static HyperParameter names is not the same across current and parent tuning jobs",
        ),
        (
            ["ended"],
            {},
            {"InputDataConfig": [channel("training")]},
            r"Only the following fields in TrainingJobDefinition are allowed to change: \[outputDataConfig, static",
        ),
        (["ended"], {}, {"Environment": {"A": "B"}}, "Only the following fields in TrainingJobDefinition are allowed"),
    ],
)
def test_what_a_warm_start_may_not_change(world, ended, parents, changed, made, expected):
    start = warm_start("IdenticalDataAndAlgorithm", *parents)
    with pytest.raises(ClientError, match=expected):
        tune(world, "refused", config(1) | changed, definition() | made, WarmStartConfig=start)


def test_training_jobs_that_fall_behind_are_stopped_early(world):
    # The first three are what the others are measured by; the fourth is better, the last two would go on for ever.
    early = config(6, 2, TrainingJobEarlyStoppingType="Auto")
    tune(world, "early", early, levels(world, 2, 2, 2, 5, 0, 0))
    job = tuned(world, "early")
    assert [trial["TrainingJobStatus"] for trial in trials(world, "early")] == ["Completed"] * 4 + ["Stopped"] * 2
    assert job["TrainingJobStatusCounters"]["Stopped"] == 2
    assert job["ObjectiveStatusCounters"] == {"Succeeded": 6, "Pending": 0, "Failed": 0}, "their last value counts"
    assert job["BestTrainingJob"][METRIC]["Value"] == 5


def test_completion_criteria_end_the_search(world):
    target = {"TargetObjectiveMetricValue": 1.5}
    lowest = {"Type": "Minimize", "MetricName": "objective"}
    tune(
        world,
        "target",
        config(9, TuningJobCompletionCriteria=target, HyperParameterTuningJobObjective=lowest),
        levels(world, 3, 2, 1, *[9] * 6),
    )
    patient = {"BestObjectiveNotImproving": {"MaxNumberOfTrainingJobsNotImproving": 3}}
    tune(world, "patience", config(9, TuningJobCompletionCriteria=patient), levels(world, 5, 5.02, 4, 5, *[9] * 5))
    job = tuned(world, "target")
    assert len(trials(world, "target")) == 3 and job["BestTrainingJob"][METRIC]["Value"] == 1
    assert job["TuningJobCompletionDetails"] == {"NumberOfTrainingJobsObjectiveNotImproving": 0}
    job = tuned(world, "patience")
    assert len(trials(world, "patience")) == 4 and job["BestTrainingJob"][METRIC]["Value"] == 5.02
    assert job["TuningJobCompletionDetails"] == {"NumberOfTrainingJobsObjectiveNotImproving": 3}


def test_five_failures_without_a_success_fail_the_tuning_job(world):
    tune(world, "failing", config(20, 2), definition(mode="fail"))
    job = tuned(world, "failing", "Failed")
    assert job["FailureReason"].startswith("No training job succeeded after 5 attempts. For additional details")
    assert "BestTrainingJob" not in job
    counters = job["TrainingJobStatusCounters"]
    assert 5 <= counters["NonRetryableError"] <= 6 and counters["InProgress"] == counters["Completed"] == 0
    assert job["ObjectiveStatusCounters"]["Failed"] == len(trials(world, "failing")) <= 6
    trial = trials(world, "failing")[0]
    assert trial["ObjectiveStatus"] == "Failed" and "the data is wrong" in trial["FailureReason"]
    assert METRIC not in trial and trials(world, "failing", SortBy="FinalObjectiveMetricValue") == []


def test_a_stopped_tuning_job_stops_its_training_jobs(world):
    tune(world, "halted", config(9, 2), definition(mode="sleep"))
    until(lambda: alive("# halted-"), lambda pids: len(pids) >= 2, 30)
    with pytest.raises(ClientError, match="must be Completed, Stopped or Failed for a warm start, and is InProgress"):
        start = warm_start("IdenticalDataAndAlgorithm", "halted")
        tune(world, "too-early", config(1), definition(mode="sleep"), WarmStartConfig=start)
    world.sagemaker.stop_hyper_parameter_tuning_job(HyperParameterTuningJobName="halted")
    assert describe(world, "halted")["HyperParameterTuningJobStatus"] in ("Stopping", "Stopped")
    job = tuned(world, "halted", "Stopped")
    assert "HyperParameterTuningEndTime" in job
    statuses = [trial["TrainingJobStatus"] for trial in trials(world, "halted")]
    assert statuses and set(statuses) == {"Stopped"}
    assert job["TrainingJobStatusCounters"]["Stopped"] == len(statuses)
    assert not alive("# halted-")

    tune(world, "at-once", config(9, 2), definition(mode="sleep"))
    world.sagemaker.stop_hyper_parameter_tuning_job(HyperParameterTuningJobName="at-once")
    tuned(world, "at-once", "Stopped")


def test_a_tuning_job_whose_next_training_job_is_refused_fails(world):
    iam = world.client("iam")
    trust = iam.get_role(RoleName="jobs")["Role"]["AssumeRolePolicyDocument"]
    role = iam.create_role(RoleName="passing", AssumeRolePolicyDocument=json.dumps(trust))["Role"]["Arn"]
    policy = iam.get_role_policy(RoleName="jobs", PolicyName="s3")["PolicyDocument"]
    iam.put_role_policy(RoleName="passing", PolicyName="s3", PolicyDocument=json.dumps(policy))
    tune(world, "orphaned", config(9), definition(mode="sleep") | {"RoleArn": role})
    until(lambda: alive("# orphaned-"), lambda pids: len(pids) >= 2, 30)
    iam.delete_role_policy(RoleName="passing", PolicyName="s3")
    iam.delete_role(RoleName="passing")
    [trial] = trials(world, "orphaned")
    world.sagemaker.stop_training_job(TrainingJobName=trial["TrainingJobName"])
    job = tuned(world, "orphaned", "Failed")
    assert job["FailureReason"].startswith(f"ClientError: Could not assume role {role}")
    assert len(trials(world, "orphaned")) == 1


REFUSALS = [
    (
        {"TuningJobCompletionCriteria": {"ConvergenceDetected": {"CompleteOnConvergence": "Enabled"}}},
        {},
        "NotImplemented.*CompleteOnConvergence Enabled",
    ),
    (
        {"ParameterRanges": {"AutoParameters": [{"Name": "x", "ValueHint": "1"}]}},
        {},
        "NotImplemented.*AutoParameters",
    ),
    ({}, {"RetryStrategy": {"MaximumRetryAttempts": 1}}, "NotImplemented.*RetryStrategy"),
    ({}, {"HyperParameterTuningResourceConfig": {"InstanceCount": 1}}, "NotImplemented.*TuningResourceConfig"),
    (
        {"HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": "other"}},
        {},
        "A metric is required for this hyperparameter tuning job objective. Provide a metric in the metric definitions",
    ),
    (
        {"ParameterRanges": {"CategoricalParameterRanges": [{"Name": "x", "Values": ["1", "2"]}]}},
        {},
        r"You don't have enough combinations of hyperparameter ranges.*provided ranges \[2.0\].*MaxNumberOfJobs, \[9\]",
    ),
    (
        {"ParameterRanges": {"ContinuousParameterRanges": [{"Name": "x", "MinValue": "1", "MaxValue": "1"}]}},
        {},
        "must be less than MaxValue",
    ),
    ({}, {"StaticHyperParameters": {"sagemaker_program": "train.py", "x": "1"}}, "cannot be both static and"),
    (
        {"ResourceLimits": {"MaxNumberOfTrainingJobs": 1, "MaxParallelTrainingJobs": 2}},
        {},
        "MaxParallelTrainingJobs cannot be greater than MaxNumberOfTrainingJobs",
    ),
    (
        {"ResourceLimits": {"MaxNumberOfTrainingJobs": 200, "MaxParallelTrainingJobs": 101}},
        {},
        "ResourceLimitExceeded.*The account-level service limit .* is 100 Training Jobs",
    ),
    (
        {"ResourceLimits": {"MaxNumberOfTrainingJobs": 9, "MaxParallelTrainingJobs": 1, "MaxRuntimeInSeconds": 60}},
        {},
        "Member must have value greater than or equal to 120",
    ),
]


@pytest.mark.parametrize(("changed", "made", "expected"), REFUSALS)
def test_tuning_jobs_that_aws_refuses_or_that_are_not_here(world, changed, made, expected):
    with pytest.raises(ClientError, match=expected):
        tune(world, "no", config(9) | changed, definition() | made)


@pytest.mark.parametrize("field", ["TrainingJobDefinitions", "Autotune"])
def test_other_ways_to_define_a_tuning_job_are_refused_by_name(world, field):
    value = {"Mode": "Enabled"} if field == "Autotune" else [definition()]
    with pytest.raises(ClientError, match=f"NotImplemented.*{field}"):
        tune(world, "no", config(9), definition(), **{field: value})


def test_a_tuning_job_that_died_with_the_emulator_has_failed(tmp_path):
    environment = {"HOUNDLOOP_PRELOAD": "json"}
    with Emulator(state=tmp_path, auth=False, keep=True, environment=environment) as emulator:
        first = World(emulator)
        tune(first, "lost", config(9), definition(mode="sleep"))
        until(lambda: alive("# lost-"), lambda pids: len(pids) >= 2, 30)
        os.kill(emulator.pid, signal.SIGKILL)
        until(lambda: alive("# lost-"), lambda pids: not pids, 10)
    with Emulator(state=tmp_path, auth=False, keep=True, environment=environment) as emulator:
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        client = boto3.client("sagemaker", endpoint_url=emulator.endpoint_url, **keys)
        job = client.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName="lost")
        assert job["HyperParameterTuningJobStatus"] == "Failed"
        assert job["FailureReason"].startswith("InternalServerError: ")
        assert job["TrainingJobStatusCounters"]["RetryableError"] == 1
        assert job["TrainingJobStatusCounters"]["InProgress"] == 0
