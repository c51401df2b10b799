"""Tuning jobs: real training jobs, chosen by a search."""

import pytest
from botocore.exceptions import ClientError

from tests.makers.sagemaker import BUCKET, TRAINING_IMAGE, until


def test_tuning_finds_the_best_of_a_quadratic(world):
    definition = {
        "StaticHyperParameters": {
            "sagemaker_program": "train.py",
            "mode": "ok",
            "sagemaker_submit_directory": f"s3://{BUCKET}/code/sourcedir.tar.gz",
        },
        "AlgorithmSpecification": {
            "TrainingImage": TRAINING_IMAGE,
            "TrainingInputMode": "File",
            "MetricDefinitions": [{"Name": "objective", "Regex": "objective=([-0-9.]+);"}],
        },
        "RoleArn": world.role,
        "OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/tuning"},
        "ResourceConfig": {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 10},
        "StoppingCondition": {"MaxRuntimeInSeconds": 60},
    }
    config = {
        "Strategy": "Bayesian",
        "RandomSeed": 1,
        "HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": "objective"},
        "ResourceLimits": {"MaxNumberOfTrainingJobs": 16, "MaxParallelTrainingJobs": 2},
        "ParameterRanges": {
            "ContinuousParameterRanges": [{"Name": "x", "MinValue": "-10", "MaxValue": "10"}],
            "CategoricalParameterRanges": [{"Name": "kind", "Values": ["a", "b"]}],
        },
    }
    world.sagemaker.create_hyper_parameter_tuning_job(
        HyperParameterTuningJobName="quadratic", HyperParameterTuningJobConfig=config, TrainingJobDefinition=definition
    )
    job = until(
        lambda: world.sagemaker.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName="quadratic"),
        lambda found: found["HyperParameterTuningJobStatus"] != "InProgress",
        120,
    )
    assert job["HyperParameterTuningJobStatus"] == "Completed", job
    assert job["TrainingJobStatusCounters"]["Completed"] == 16
    assert job["ObjectiveStatusCounters"] == {"Succeeded": 16, "Pending": 0, "Failed": 0}
    trials = world.sagemaker.list_training_jobs_for_hyper_parameter_tuning_job(
        HyperParameterTuningJobName="quadratic",
        SortBy="FinalObjectiveMetricValue",
        MaxResults=100,
    )["TrainingJobSummaries"]
    values = [trial["FinalHyperParameterTuningJobObjectiveMetric"]["Value"] for trial in trials]
    assert len(values) == 16 and values == sorted(values, reverse=True)
    best = job["BestTrainingJob"]
    assert best["TrainingJobName"] == trials[0]["TrainingJobName"]
    assert best["TunedHyperParameters"].keys() == {"x", "kind"}
    x = float(best["TunedHyperParameters"]["x"])
    assert best["FinalHyperParameterTuningJobObjectiveMetric"]["Value"] == pytest.approx(-((x - 3) ** 2), abs=1e-3)
    assert abs(x - 3) < 2, "sixteen trials should come nearer to 3 than that"
    child = world.sagemaker.describe_training_job(TrainingJobName=best["TrainingJobName"])
    assert child["TuningJobArn"] == job["HyperParameterTuningJobArn"]
    with pytest.raises(ClientError, match="NotImplemented.*Hyperband"):
        world.sagemaker.create_hyper_parameter_tuning_job(
            HyperParameterTuningJobName="other",
            TrainingJobDefinition=definition,
            HyperParameterTuningJobConfig=config | {"Strategy": "Hyperband"},
        )
