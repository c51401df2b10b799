"""Processing jobs: one command between S3 and S3."""

import json
import textwrap

import pytest
from botocore.exceptions import ClientError

from tests.makers.sagemaker import BUCKET, PROCESSOR, processing, until

OUT = "/opt/ml/processing/out"


def test_processing_job_maps_paths_and_puts_the_image_on_the_import_path(world):
    world.put("proc/run.py", textwrap.dedent(PROCESSOR).encode())
    world.sagemaker.create_processing_job(
        ProcessingJobName="process",
        RoleArn=world.role,
        AppSpecification={
            "ImageUri": "local/server:1",
            "ContainerEntrypoint": ["python3", "/opt/ml/processing/input/code/run.py"],
            "ContainerArguments": ["/opt/ml/processing/input/data", "--out=/opt/ml/processing/output/names"],
        },
        ProcessingResources={"ClusterConfig": {"InstanceCount": 1, "InstanceType": "ml.m5.large", "VolumeSizeInGB": 5}},
        ProcessingInputs=[
            {
                "InputName": name,
                "S3Input": {
                    "S3Uri": uri,
                    "LocalPath": f"/opt/ml/processing/input/{name}",
                    "S3DataType": "S3Prefix",
                    "S3InputMode": "File",
                },
            }
            for name, uri in (("code", f"s3://{BUCKET}/proc/run.py"), ("data", f"s3://{BUCKET}/data/a"))
        ],
        ProcessingOutputConfig={
            "Outputs": [
                {
                    "OutputName": "names",
                    "S3Output": {
                        "S3Uri": f"s3://{BUCKET}/processed",
                        "LocalPath": "/opt/ml/processing/output/names",
                        "S3UploadMode": "EndOfJob",
                    },
                }
            ]
        },
    )
    job = until(
        lambda: world.sagemaker.describe_processing_job(ProcessingJobName="process"),
        lambda found: found["ProcessingJobStatus"] not in ("InProgress", "Stopping"),
        30,
    )
    assert job["ProcessingJobStatus"] == "Completed", job
    assert world.s3.get_object(Bucket=BUCKET, Key="processed/sub/names.txt")["Body"].read() == b"1.txt,2.txt"


def process(world, name: str, script: str, **more) -> None:
    """Starts a job that runs a script, with an output folder at /opt/ml/processing/out."""
    uri = world.put(f"processing/{name}.py", textwrap.dedent(script).encode())
    output = {
        "S3Uri": f"s3://{BUCKET}/processed/{name}",
        "LocalPath": OUT,
        "S3UploadMode": more.pop("mode", "EndOfJob"),
    }
    world.sagemaker.create_processing_job(
        **processing(name)
        | {
            "AppSpecification": {
                "ImageUri": "local/server:1",
                "ContainerEntrypoint": ["python3", f"/opt/ml/processing/input/{name}.py"],
                "ContainerArguments": ["--out", OUT],
            },
            "ProcessingInputs": [
                {
                    "InputName": "code",
                    "S3Input": {
                        "S3Uri": uri,
                        "LocalPath": "/opt/ml/processing/input",
                        "S3DataType": "S3Prefix",
                        "S3InputMode": "File",
                    },
                }
            ],
            "ProcessingOutputConfig": {"Outputs": [{"OutputName": "out", "S3Output": output}]},
        }
        | more
    )


def processed(world, name: str) -> dict:
    return until(
        lambda: world.sagemaker.describe_processing_job(ProcessingJobName=name),
        lambda found: found["ProcessingJobStatus"] not in ("InProgress", "Stopping"),
        30,
    )


def keys(world, name: str) -> list[str]:
    prefix = f"processed/{name}/"
    found = world.s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return [item["Key"].removeprefix(prefix) for item in found]


def test_a_job_knows_its_configuration_and_leaves_a_message(world):
    script = """
        import json, os, pathlib, sys
        out = pathlib.Path(sys.argv[2])
        opt_ml = out.parents[1]
        config = {path.stem: json.loads(path.read_text()) for path in (opt_ml / "config").iterdir()}
        (out / "seen.json").write_text(json.dumps(config | {"greeting": os.environ["GREETING"]}))
        (opt_ml / "output" / "message").write_text("Completed: nothing wrong" + "." * 5000)
    """
    process(world, "configured", script, Environment={"GREETING": "hello"})
    job = processed(world, "configured")
    assert job["ProcessingJobStatus"] == "Completed"
    assert len(job["ExitMessage"]) == 1024 and job["ExitMessage"].startswith("Completed: nothing wrong...")
    assert job["StoppingCondition"] == {"MaxRuntimeInSeconds": 86400}
    assert job["ProcessingInputs"][0]["AppManaged"] is False
    assert job["ProcessingStartTime"] <= job["ProcessingEndTime"]
    seen = json.loads(world.s3.get_object(Bucket=BUCKET, Key="processed/configured/seen.json")["Body"].read())
    assert seen["greeting"] == "hello" and seen["resourceconfig"]["hosts"] == ["algo-1"]
    assert seen["processingjobconfig"]["AppSpecification"]["ContainerArguments"] == ["--out", OUT]
    assert seen["processingjobconfig"]["ProcessingJobName"] == "configured"


def test_failures_say_why_and_their_output_is_kept(world):
    script = """
        import pathlib, sys
        out = pathlib.Path(sys.argv[2])
        (out / "so-far").write_text("x")
        message = (out.parents[1] / "output" / "message")
        message.write_bytes(bytes([0xff, 0xfe]) if "bytes" in __file__ else b"gave up")
        sys.exit(0 if "bytes" in __file__ else "no pictures")
    """
    process(world, "gives-up", script)
    process(world, "bad-bytes", script)
    process(world, "no-program", script, AppSpecification={"ImageUri": "x", "ContainerEntrypoint": ["/no/such/thing"]})
    job = processed(world, "gives-up")
    assert job["ProcessingJobStatus"] == "Failed" and job["ExitMessage"] == "gave up"
    assert job["FailureReason"] == "AlgorithmError: See job logs for more information"
    assert keys(world, "gives-up") == ["so-far"]
    assert processed(world, "bad-bytes")["FailureReason"].startswith("ClientError: The exit message")
    assert processed(world, "no-program")["FailureReason"].startswith("AlgorithmError")


def test_continuous_output_is_uploaded_while_the_job_runs_and_stop_ends_it(world):
    script = """
        import pathlib, sys, time
        (pathlib.Path(sys.argv[2]) / "first").write_text("x")
        time.sleep(300)
    """
    process(world, "continuous", script, mode="Continuous")
    until(lambda: keys(world, "continuous"), lambda found: found == ["first"], 20)
    assert (
        world.sagemaker.describe_processing_job(ProcessingJobName="continuous")["ProcessingJobStatus"] == "InProgress"
    )
    world.sagemaker.stop_processing_job(ProcessingJobName="continuous")
    assert processed(world, "continuous")["ProcessingJobStatus"] == "Stopped"
    with pytest.raises(ClientError, match="ValidationException"):
        world.sagemaker.stop_processing_job(ProcessingJobName="continuous")


def test_a_job_over_its_time_is_stopped(world):
    process(world, "too-slow", "import time; time.sleep(300)", StoppingCondition={"MaxRuntimeInSeconds": 1})
    assert processed(world, "too-slow")["ProcessingJobStatus"] == "Stopped"


def test_paths_outside_the_job_s_part_of_the_container_are_refused(world):
    for path in ("/opt/ml/model", "/tmp/out", "/opt/ml/processing/../../../etc"):
        output = {"S3Uri": f"s3://{BUCKET}/x", "LocalPath": path, "S3UploadMode": "EndOfJob"}
        with pytest.raises(ClientError, match="ValidationException.*below /opt/ml/processing"):
            process(
                world,
                "outside",
                "",
                ProcessingOutputConfig={"Outputs": [{"OutputName": "out", "S3Output": output}]},
            )


def test_lists_are_filtered_and_sorted(world):
    for name in ("plist-b", "plist-a"):
        process(world, name, "raise SystemExit(1)" if name == "plist-a" else "")
        processed(world, name)

    def names(**query) -> list[str]:
        found = world.sagemaker.list_processing_jobs(NameContains="PLIST-", **query)["ProcessingJobSummaries"]
        return [item["ProcessingJobName"] for item in found]

    assert names(SortBy="Name", SortOrder="Ascending") == ["plist-a", "plist-b"]
    assert names(SortBy="CreationTime", SortOrder="Descending") == ["plist-a", "plist-b"]
    assert names(StatusEquals="Failed") == ["plist-a"] and names(StatusEquals="Stopped") == []
