"""Training jobs: the script under the container contract, failures, stops, limits."""

import datetime
import io
import json
import os
import tarfile

import psutil
import pytest
from botocore.exceptions import ClientError

from tests.makers.sagemaker import BUCKET, alive, archive, training, until

LOGS = "/aws/sagemaker/TrainingJobs"


def channel(name: str, uri: str, kind: str = "S3Prefix", **more) -> dict:
    return {"ChannelName": name, "DataSource": {"S3DataSource": {"S3DataType": kind, "S3Uri": uri}}} | more


def train(world, name: str, script: str, hyperparameters: dict | None = None, **more) -> None:
    """Starts a job with a script of its own, or with more files (`{"bin/run.sh": …}` in `files`)."""
    files = {"train.py": script} | more.pop("files", {})
    source = world.put(f"code/{name}.tar.gz", archive(**files))
    world.train(name, hyperparameters={"sagemaker_submit_directory": source} | (hyperparameters or {}), **more)


def status(world, name: str) -> str:
    return world.sagemaker.describe_training_job(TrainingJobName=name)["SecondaryStatus"]


def keys(world, prefix: str) -> list[str]:
    found = world.s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return [item["Key"].removeprefix(prefix) for item in found]


def content(world, key: str) -> bytes:
    return world.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()


def stream(world, name: str) -> dict:
    """The job's log stream, as the arguments of a call."""
    found = world.logs.describe_log_streams(logGroupName=LOGS, logStreamNamePrefix=f"{name}/algo-1-")["logStreams"]
    return {"logGroupName": LOGS, "logStreamName": found[0]["logStreamName"]}


def lines(world, name: str) -> list[str]:
    """The beginning of a job's log."""
    return [
        event["message"] for event in world.logs.get_log_events(**stream(world, name), startFromHead=True)["events"]
    ]


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
    steps = [(step["Status"], step["StatusMessage"]) for step in job["SecondaryStatusTransitions"]]
    assert steps == [
        ("Starting", "Starting the training job"),
        ("Downloading", "Downloading input data"),
        ("Training", "Training image download completed. Training in progress."),
        ("Uploading", "Uploading generated training model"),
        ("Completed", "Training job completed"),
    ]
    assert all(step["StartTime"] <= step["EndTime"] for step in job["SecondaryStatusTransitions"])
    for always in ("EnableNetworkIsolation", "EnableInterContainerTrafficEncryption", "EnableManagedSpotTraining"):
        assert job[always] is False
    assert job["InputDataConfig"][0]["CompressionType"] == job["InputDataConfig"][0]["RecordWrapperType"] == "None"
    assert job["ProfilingStatus"] == "Disabled" and job["TrainingTimeInSeconds"] >= 1
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
    said = lines(world, "good")
    assert "objective=-0.250000;" in said
    assert any("requirements.txt is not installed" in line for line in said)
    assert any("asks for what is not there: nothing (not installed)" in line for line in said)
    values = world.cloudwatch.get_metric_statistics(
        Namespace=LOGS,
        MetricName="objective",
        Dimensions=[{"Name": "TrainingJobName", "Value": "good"}],
        StartTime=job["CreationTime"] - datetime.timedelta(minutes=1),
        EndTime=job["TrainingEndTime"] + datetime.timedelta(minutes=2),
        Period=60,
        Statistics=["Maximum"],
    )["Datapoints"]
    assert [point["Maximum"] for point in values] == [pytest.approx(-0.25)]


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
    text = "\n".join(lines(world, "manifest"))
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
        == "AlgorithmError: ValueError: class without pictures, exit code: 1"
    )
    assert world.trained("fails-in-words")["SecondaryStatusTransitions"][-1]["StatusMessage"] == "Training job failed"
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
        job = world.trained(f"queue-{number}")
        assert job["TrainingJobStatus"] == "Stopped"
        assert ("BillableTimeInSeconds" in job) == (number < 2)  # nobody pays for waiting


INSPECT = """
    import json, os, pathlib, sys
    opt_ml = pathlib.Path(os.environ["SM_MODEL_DIR"]).parent
    config = {path.stem: json.loads(path.read_text()) for path in (opt_ml / "input" / "config").iterdir()}
    data = {path.name: sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
            for path in (opt_ml / "input" / "data").iterdir()}
    variables = {name: os.environ.get(name) for name in ("SM_CHANNELS", "SM_NUM_CPUS", "OMP_NUM_THREADS", "GREETING")}
    (opt_ml / "model" / "seen.json").write_text(json.dumps(
        {"config": config, "data": data, "argv": sys.argv, "variables": variables, "opt_ml": str(opt_ml)}))
"""


def seen(world, name: str) -> dict:
    with tarfile.open(fileobj=io.BytesIO(content(world, f"out/{name}/output/model.tar.gz"))) as tar:
        return json.load(tar.extractfile("seen.json"))


def test_channels_and_configuration_files_are_where_the_container_expects_them(world):
    manifest = world.put(
        "two.manifest", json.dumps([{"prefix": f"s3://{BUCKET}/data/"}, "a/2.txt", "b/3.txt"]).encode()
    )
    train(
        world,
        "channels",
        INSPECT,
        {"lr": "0.1", "where": "/opt/ml/input/data/whole"},
        InputDataConfig=[
            channel("whole", f"s3://{BUCKET}/data", ContentType="text/plain"),
            channel("listed", manifest, "ManifestFile", InputMode="FastFile"),
            channel("single", f"s3://{BUCKET}/data/a/1.txt"),
        ],
        Environment={"GREETING": "hello"},
    )
    assert world.trained("channels")["TrainingJobStatus"] == "Completed"
    found = seen(world, "channels")
    assert found["data"] == {
        "whole": ["a/1.txt", "a/2.txt", "b/3.txt"],
        "listed": ["a/2.txt", "b/3.txt"],
        "single": ["1.txt"],
    }
    given = {"S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
    assert found["config"]["inputdataconfig"] == {
        "whole": given | {"TrainingInputMode": "File", "ContentType": "text/plain"},
        "listed": given | {"TrainingInputMode": "FastFile"},
        "single": given | {"TrainingInputMode": "File"},
    }
    assert found["config"]["hyperparameters"]["lr"] == "0.1"
    assert found["config"]["resourceconfig"]["hosts"] == ["algo-1"]
    assert found["argv"] == ["train.py", "--lr", "0.1", "--where", f"{found['opt_ml']}/input/data/whole"]
    assert json.loads(found["variables"]["SM_CHANNELS"]) == ["listed", "single", "whole"]
    assert found["variables"]["GREETING"] == "hello"
    # Alone, a job has the whole machine.
    assert found["variables"]["SM_NUM_CPUS"] == str(os.cpu_count())
    assert int(found["variables"]["OMP_NUM_THREADS"]) == {1: 1, 2: 2}.get(
        os.cpu_count() or 1, (os.cpu_count() or 1) - 1
    )
    until(lambda: os.path.exists(found["opt_ml"]), lambda there: not there, 10)  # what ended leaves no data on the disk


def test_jobs_side_by_side_share_the_cores(world):
    world.train("share-busy", hyperparameters={"mode": "sleep"})
    train(world, "share", INSPECT)
    world.trained("share", "Completed")
    assert seen(world, "share")["variables"]["SM_NUM_CPUS"] == str(max(1, os.cpu_count() // 2))
    world.sagemaker.stop_training_job(TrainingJobName="share-busy")
    world.trained("share-busy", "Stopped")


def test_a_script_in_a_folder_imports_from_the_source_and_a_shell_script_is_run(world):
    helper = "def run():\n    print('helped')\n"
    train(
        world,
        "nested",
        "",
        {"sagemaker_program": "bin/run.py"},
        files={"bin/run.py": "import helper\nhelper.run()\n", "helper.py": helper},
    )
    shell = '#!/bin/sh\necho "shell $0 $1 $2 in $SM_MODULE_NAME"\n'
    train(world, "shell", "", {"sagemaker_program": "run.sh", "lr": "two words"}, files={"run.sh": shell})
    train(world, "outside", "", {"sagemaker_program": "../run.py"})
    assert world.trained("nested")["TrainingJobStatus"] == "Completed" and "helped" in lines(world, "nested")
    assert world.trained("shell")["TrainingJobStatus"] == "Completed"
    assert "shell ./run.sh --lr two words in run.sh" in lines(world, "shell")
    reason = world.trained("outside")["FailureReason"]
    assert reason.startswith("AlgorithmError: The training entry point '../run.py' cannot be used")
    assert reason.endswith("exit code: 1")


def test_outputs_can_stay_uncompressed_and_a_job_without_a_model_uploads_none(world):
    output = {"S3OutputPath": f"s3://{BUCKET}/out", "CompressionType": "NONE"}
    world.train("plain-files", OutputDataConfig=output)
    train(world, "no-model", "print('nothing to keep')")
    job = world.trained("plain-files")
    assert job["ModelArtifacts"]["S3ModelArtifacts"] == f"s3://{BUCKET}/out/plain-files/output/model"
    assert keys(world, "out/plain-files/output/") == ["data/note.txt", "model/seen.json"]
    assert world.trained("no-model")["TrainingJobStatus"] == "Completed" and not keys(world, "out/no-model/")


CHECKPOINTS = """
    import os, pathlib, signal, sys, time
    folder = pathlib.Path(os.environ["SM_MODEL_DIR"]).parent / "checkpoints"
    print("before:", sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
    (folder / "epoch-2").mkdir()
    (folder / "epoch-2" / "weights").write_text("two")
    def last(*_):
        (folder / "last").write_text("saved at SIGTERM")
        (pathlib.Path(os.environ["SM_MODEL_DIR"]) / "model").write_text("unfinished")
        sys.exit(0)
    signal.signal(signal.SIGTERM, last)
    time.sleep(300)
"""


def test_checkpoints_come_back_and_are_uploaded_while_the_job_runs(world):
    world.put("checkpoints/one/epoch-1/weights", b"one")
    train(world, "checkpoints", CHECKPOINTS, CheckpointConfig={"S3Uri": f"s3://{BUCKET}/checkpoints/one"})
    until(lambda: keys(world, "checkpoints/one/"), lambda found: "epoch-2/weights" in found, 20)
    assert status(world, "checkpoints") == "Training"
    world.sagemaker.stop_training_job(TrainingJobName="checkpoints")
    job = world.trained("checkpoints")
    assert job["TrainingJobStatus"] == "Stopped"
    assert [step["Status"] for step in job["SecondaryStatusTransitions"]][-2:] == ["Stopping", "Stopped"]
    assert keys(world, "checkpoints/one/") == ["epoch-1/weights", "epoch-2/weights", "last"]
    assert content(world, "checkpoints/one/last") == b"saved at SIGTERM"
    assert keys(world, "out/checkpoints/output/") == ["model.tar.gz"]  # AWS keeps what a stopped job has saved
    assert "before: ['epoch-1/weights']" in lines(world, "checkpoints")


def test_the_debugger_s_hook_finds_its_configuration_and_its_output_is_uploaded(world):
    script = """
        import json, os, pathlib
        for variable in ("SMDEBUG_CONFIG_FILE_PATH", "SMPROFILER_CONFIG_PATH"):
            config = json.loads(pathlib.Path(os.environ[variable]).read_text())
            folder = pathlib.Path(config["LocalPath"])
            folder.mkdir()
            (folder / "file").write_text(json.dumps(config.get("HookParameters")))
    """
    train(
        world,
        "debugged",
        script,
        DebugHookConfig={"S3OutputPath": f"s3://{BUCKET}/debug", "HookParameters": {"save_interval": "10"}},
        ProfilerConfig={"S3OutputPath": f"s3://{BUCKET}/profile"},
    )
    job = world.trained("debugged")
    assert job["TrainingJobStatus"] == "Completed" and job["ProfilingStatus"] == "Enabled"
    assert content(world, "debug/debugged/debug-output/file") == b'{"save_interval": "10"}'
    assert keys(world, "profile/debugged/") == ["profiler-output/file"]


def test_what_a_job_breaks_does_not_break_its_end(world):
    script = """
        import os, shutil
        shutil.rmtree(os.environ["SM_OUTPUT_DIR"])
        print("objective=0.5; loss=1.0;")
        print("objective=0.6; loss=nan;")
        raise SystemExit("no model")
    """
    specification = training("any")["AlgorithmSpecification"]
    specification["MetricDefinitions"] = [{"Name": name, "Regex": f"{name}=(.*?);"} for name in ("objective", "loss")]
    train(world, "broken-folders", script, AlgorithmSpecification=specification)
    job = world.trained("broken-folders")
    assert "ErrorMessage" in job["FailureReason"] and "no model" in job["FailureReason"]
    assert [(item["MetricName"], item["Value"]) for item in job["FinalMetricDataList"]] == [("objective", 0.6)]

    corrupt = bytearray(archive(train_py="\n".join(f"# {number**7}" for number in range(1000))))
    corrupt[500:600] = bytes(100)
    source = world.put("code/corrupt.tar.gz", bytes(corrupt))
    world.train("corrupt", hyperparameters={"sagemaker_submit_directory": source})
    assert world.trained("corrupt")["FailureReason"].startswith(f"ClientError: {source} could not be unpacked")


def test_a_missing_key_of_a_manifest_is_named(world):
    manifest = world.put(
        "bad.manifest", json.dumps([{"prefix": f"s3://{BUCKET}/data/"}, "a/1.txt", "c/9.txt"]).encode()
    )
    world.train("missing-key", InputDataConfig=[channel("training", manifest, "ManifestFile")])
    job = world.trained("missing-key")
    assert job["FailureReason"].startswith("ClientError: Data download failed:NoSuchKey (404)")
    assert f"s3://{BUCKET}/data/c/9.txt" in job["FailureReason"]


def test_a_failure_is_not_hidden_by_a_second_one_at_the_upload(world):
    elsewhere = {"S3OutputPath": "s3://not-this-roles-bucket/out"}
    fails = """
        import os, pathlib
        pathlib.Path(os.environ["SM_OUTPUT_DATA_DIR"], "note").write_text("x")
        raise KeyError("the first reason")
    """
    train(world, "fails-twice", fails, OutputDataConfig=elsewhere)
    world.train("cannot-upload", OutputDataConfig=elsewhere)
    assert "the first reason" in world.trained("fails-twice")["FailureReason"]
    job = world.trained("cannot-upload")
    assert job["TrainingJobStatus"] == "Failed"
    assert job["FailureReason"].startswith("ClientError: Data upload failed:")


def test_a_process_that_is_killed_says_so(world):
    train(world, "killed-script", "import os, signal\nprint('going')\nos.kill(os.getpid(), signal.SIGKILL)\n")
    specification = {
        "TrainingImage": "local/server:1",
        "TrainingInputMode": "File",
        "ContainerEntrypoint": ["sh", "-c", "echo last words; kill -9 $$"],
    }
    world.train("killed-container", AlgorithmSpecification=specification)
    reason = world.trained("killed-script")["FailureReason"]
    assert "ExecuteUserScriptError:\nExitCode -9\n" in reason and reason.endswith(", exit code: 1")
    assert world.trained("killed-container")["FailureReason"] == "AlgorithmError: last words, exit code: 137"


def test_a_flood_of_log_lines_arrives_and_the_last_metric_counts(world):
    script = """
        for number in range(100_000):
            print(f"objective={number};" if number % 1000 == 999 else f"line {number}")
        print("x" * 3_000_000)
        print("the end")
    """
    train(world, "flood", script)
    job = world.trained("flood")
    assert job["TrainingJobStatus"] == "Completed"
    assert [item["Value"] for item in job["FinalMetricDataList"]] == [99_999]
    last = world.logs.get_log_events(**stream(world, "flood"), startFromHead=False, limit=1)["events"]
    assert [event["message"] for event in last] == ["the end"]


STUBBORN = """
    import os, signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(os.getpid())
    time.sleep(300)
"""


def test_a_job_that_ignores_sigterm_is_killed_after_the_grace_period(world):
    train(world, "stubborn", STUBBORN)
    until(lambda: status(world, "stubborn"), lambda found: found == "Training", 30)
    [pid] = until(lambda: lines(world, "stubborn"), bool, 30)
    assert psutil.pid_exists(int(pid))
    world.sagemaker.stop_training_job(TrainingJobName="stubborn")
    job = world.trained("stubborn")
    assert job["SecondaryStatus"] == "Stopped" and "FailureReason" not in job
    assert not psutil.pid_exists(int(pid))


def test_stop_while_the_data_comes_in_and_while_the_model_goes_out(world):
    # The same object very often: a long download, if nobody stopped it.
    manifest = world.put(
        "long.manifest", json.dumps([{"prefix": f"s3://{BUCKET}/data/"}, *["a/1.txt"] * 20_000]).encode()
    )
    world.train("stop-in", InputDataConfig=[channel("training", manifest, "ManifestFile")])
    until(lambda: status(world, "stop-in"), lambda found: found == "Downloading", 30)
    world.sagemaker.stop_training_job(TrainingJobName="stop-in")
    job = world.trained("stop-in", timeout=30)
    assert job["TrainingJobStatus"] == "Stopped"
    assert "Training" not in [step["Status"] for step in job["SecondaryStatusTransitions"]]

    script = """
        import os, pathlib
        for number in range(400):
            pathlib.Path(os.environ["SM_MODEL_DIR"], f"{number:04d}").write_text("x")
    """
    output = {"S3OutputPath": f"s3://{BUCKET}/out", "CompressionType": "NONE"}
    train(world, "stop-out", script, OutputDataConfig=output)
    until(lambda: status(world, "stop-out"), lambda found: found == "Uploading", 30)
    world.sagemaker.stop_training_job(TrainingJobName="stop-out")
    job = world.trained("stop-out")
    assert (job["TrainingJobStatus"], job["SecondaryStatus"]) == ("Stopped", "Stopped")
    assert len(keys(world, "out/stop-out/output/model/")) == 400


DAEMON = """
    import os, subprocess, sys, time
    # A daemon as daemons are made: in a session of its own, its parent gone, with a child in yet another one.
    sleep = "import time; time.sleep(300)  # " + os.environ["TRAINING_JOB_NAME"] + "-daemon"
    start = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', {!r}], start_new_session=True); "
    child = start.format(sleep) + sleep
    make = start.format(child)
    subprocess.run([sys.executable, "-c", make], check=True)
    time.sleep(300)
"""


def test_daemons_end_with_their_own_job_and_not_with_another(world):
    train(world, "demonic", DAEMON)
    until(lambda: alive("# demonic-daemon"), lambda pids: len(pids) == 2, 30)
    world.train("neighbour")
    assert world.trained("neighbour")["TrainingJobStatus"] == "Completed"
    assert len(alive("# demonic-daemon")) == 2
    world.sagemaker.stop_training_job(TrainingJobName="demonic")
    world.trained("demonic", "Stopped")
    until(lambda: alive("# demonic-daemon"), lambda pids: not pids, 5)


def test_lists_are_filtered_sorted_and_paged(world):
    since = datetime.datetime.now(datetime.UTC)
    for name in ("list-c", "list-a", "list-b"):
        train(world, name, "raise SystemExit(1)" if name == "list-b" else "")
        world.trained(name)
    since_b = world.sagemaker.describe_training_job(TrainingJobName="list-b")["CreationTime"]

    def names(**query) -> list[str]:
        pages = world.sagemaker.get_paginator("list_training_jobs").paginate(
            CreationTimeAfter=since, NameContains="LIST-", **query, PaginationConfig={"PageSize": 2}
        )
        return [item["TrainingJobName"] for page in pages for item in page["TrainingJobSummaries"]]

    assert names(SortBy="Name", SortOrder="Ascending") == ["list-a", "list-b", "list-c"]
    assert names(SortBy="CreationTime", SortOrder="Descending") == ["list-b", "list-a", "list-c"]
    assert names(SortBy="Status", SortOrder="Descending")[0] == "list-b"
    assert names(StatusEquals="Failed") == ["list-b"]
    assert names(LastModifiedTimeBefore=since_b, SortBy="Name", SortOrder="Ascending") == ["list-a", "list-c"]
    assert names(LastModifiedTimeAfter=since_b) == ["list-b"]
    assert names(CreationTimeBefore=since) == []
