"""Training jobs: the script under the container contract, failures, stops, limits."""

import io
import json
import tarfile

import pytest
from botocore.exceptions import ClientError

from tests.makers.sagemaker import BUCKET, alive, until


def test_training_job_runs_the_script_under_the_container_contract(world):
    world.train(
        "good",
        hyperparameters={"x": "2.5", "kind": '"quoted"'},
        InputDataConfig=[
            {
                "ChannelName": "training",
                "DataSource": {
                    "S3DataSource": {
                        "S3DataType": "S3Prefix",
                        "S3Uri": f"s3://{BUCKET}/data/",
                        "S3DataDistributionType": "FullyReplicated",
                    }
                },
            }
        ],
    )
    job = world.trained("good")
    assert job["TrainingJobStatus"] == "Completed", job.get("FailureReason")
    assert [step["Status"] for step in job["SecondaryStatusTransitions"]] == [
        "Starting",
        "Downloading",
        "Training",
        "Uploading",
        "Completed",
    ]
    assert job["FinalMetricDataList"][0]["MetricName"] == "objective"
    assert job["FinalMetricDataList"][0]["Value"] == pytest.approx(-0.25)
    assert job["BillableTimeInSeconds"] >= 1 and job["TrainingEndTime"] > job["TrainingStartTime"]
    uri = job["ModelArtifacts"]["S3ModelArtifacts"]
    assert uri == f"s3://{BUCKET}/out/good/output/model.tar.gz"
    content = world.s3.get_object(Bucket=BUCKET, Key="out/good/output/model.tar.gz")["Body"].read()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        seen = json.load(tar.extractfile("seen.json"))
    assert seen["files"] == ["a/1.txt", "a/2.txt", "b/3.txt"]
    assert seen["hps"] == {"x": 2.5, "kind": "quoted"}
    assert seen["argv"] == ["--kind", "quoted", "-x", "2.5"]  # one letter: one dash
    assert seen["job"] == "good" and seen["main"] == "__main__" and seen["cwd"].endswith("/opt/ml/code")
    world.s3.head_object(Bucket=BUCKET, Key="out/good/output/output.tar.gz")
    lines = [
        event["message"]
        for event in world.logs.filter_log_events(
            logGroupName="/aws/sagemaker/TrainingJobs", logStreamNamePrefix="good/algo-1-"
        )["events"]
    ]
    assert "objective=-0.250000;" in lines
    assert any("requirements.txt is not installed" in line for line in lines)


def test_manifest_file_channel_and_role_are_the_jobs_own(world):
    manifest = world.put("some.manifest", json.dumps([{"prefix": f"s3://{BUCKET}/data/"}, "a/2.txt"]).encode())
    world.train(
        "manifest",
        hyperparameters={"mode": "aws"},
        InputDataConfig=[
            {
                "ChannelName": "training",
                "DataSource": {"S3DataSource": {"S3DataType": "ManifestFile", "S3Uri": manifest}},
            }
        ],
    )
    job = world.trained("manifest")
    assert job["TrainingJobStatus"] == "Completed", job.get("FailureReason")
    content = world.s3.get_object(Bucket=BUCKET, Key="out/manifest/output/model.tar.gz")["Body"].read()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert json.load(tar.extractfile("seen.json"))["files"] == ["a/2.txt"]
    text = "\n".join(
        event["message"]
        for event in world.logs.filter_log_events(
            logGroupName="/aws/sagemaker/TrainingJobs", logStreamNamePrefix="manifest/"
        )["events"]
    )
    assert "assumed-role/jobs/SageMaker" in text
    assert "denied" in text and "not authorized to perform: dynamodb:ListTables" in text


def test_failures_say_why(world):
    world.train("fails", hyperparameters={"mode": "fail"})
    world.train("fails-in-words", hyperparameters={"mode": "failure-file"})
    world.train(
        "fails-to-load",
        InputDataConfig=[
            {
                "ChannelName": "training",
                "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": f"s3://{BUCKET}/nothing-here/"}},
            }
        ],
    )
    job = world.trained("fails")
    assert job["TrainingJobStatus"] == job["SecondaryStatus"] == "Failed"
    assert job["FailureReason"].startswith("AlgorithmError: ExecuteUserScriptError:\nExitCode 1")
    assert "RuntimeError: the data is wrong" in job["FailureReason"]
    assert (
        world.trained("fails-in-words")["FailureReason"]
        == "AlgorithmError: ValueError: class without pictures, exit code: 3"
    )
    assert (
        f'No S3 objects found under S3 URL "s3://{BUCKET}/nothing-here/"'
        in world.trained("fails-to-load")["FailureReason"]
    )
    with pytest.raises(ClientError, match="ResourceInUse.*Training job names must be unique"):
        world.train("fails")


def test_stop_ends_the_job_and_everything_it_started(world):
    world.train("stopped", hyperparameters={"mode": "sleep"})
    until(lambda: alive("# stopped"), lambda pids: len(pids) >= 2, 30)
    world.sagemaker.stop_training_job(TrainingJobName="stopped")
    assert world.sagemaker.describe_training_job(TrainingJobName="stopped")["TrainingJobStatus"] in (
        "Stopping",
        "Stopped",
    )
    job = world.trained("stopped")
    assert (job["TrainingJobStatus"], job["SecondaryStatus"]) == ("Stopped", "Stopped")
    until(lambda: alive("# stopped"), lambda pids: not pids, 5)
    with pytest.raises(ClientError, match="The request was rejected because the training job is in status Stopped"):
        world.sagemaker.stop_training_job(TrainingJobName="stopped")


def test_a_job_over_its_time_is_ended(world):
    world.train("too-long", hyperparameters={"mode": "sleep"}, StoppingCondition={"MaxRuntimeInSeconds": 1})
    job = world.trained("too-long")
    assert (job["TrainingJobStatus"], job["SecondaryStatus"]) == ("Stopped", "MaxRuntimeExceeded")
    until(lambda: alive("# too-long"), lambda pids: not pids, 5)


def test_more_jobs_than_room_wait_as_starting(world):
    for number in range(3):
        world.train(f"queue-{number}", hyperparameters={"mode": "sleep"})
    until(
        lambda: [
            world.sagemaker.describe_training_job(TrainingJobName=f"queue-{n}")["SecondaryStatus"] for n in range(3)
        ],
        lambda seen: seen == ["Training", "Training", "Starting"],
        30,
    )
    for number in reversed(range(3)):
        world.sagemaker.stop_training_job(TrainingJobName=f"queue-{number}")
    for number in range(3):
        assert world.trained(f"queue-{number}")["TrainingJobStatus"] == "Stopped"
