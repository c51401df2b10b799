"""The local SageMaker through boto3 alone: real jobs and endpoints, with tiny scripts that need no torch."""

import io
import json
import os
import signal
import tarfile
import textwrap
import threading
import time
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from local.emulator import Emulator

TRAINING_IMAGE = "000000000000.dkr.ecr.us-east-1.amazonaws.com/pytorch-training:2.13"
BUCKET = "jobs-bucket"

SCRIPT = """
    import argparse, json, os, pathlib, subprocess, sys, time
    parser = argparse.ArgumentParser()
    parser.add_argument("-x", type=float, default=0.0)
    parser.add_argument("--kind", default='"plain"')
    parser.add_argument("--mode", default="ok")
    options = parser.parse_args()
    print("mode", options.mode, flush=True)
    if options.mode == "fail":
        print("about to fail", flush=True)
        raise RuntimeError("the data is wrong")
    if options.mode == "failure-file":
        opt_ml = pathlib.Path(os.environ["SM_OUTPUT_DIR"])
        (opt_ml / "failure").write_text("ValueError: class without pictures")
        sys.exit(3)
    if options.mode == "sleep":
        # A child, and one that leaves the process group: both must end with the job.
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)  # " + os.environ["TRAINING_JOB_NAME"]])
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)  # " + os.environ["TRAINING_JOB_NAME"]],
                         start_new_session=True)
        time.sleep(300)
    if options.mode == "aws":
        import boto3
        print("who", boto3.client("sts").get_caller_identity()["Arn"], flush=True)
        try:
            boto3.client("dynamodb").list_tables()
        except Exception as error:
            print("denied", type(error).__name__, error, flush=True)
    channel = pathlib.Path(os.environ.get("SM_CHANNEL_TRAINING", "/nonexistent"))
    files = sorted(str(path.relative_to(channel)) for path in channel.rglob("*") if path.is_file())
    model = pathlib.Path(os.environ["SM_MODEL_DIR"])
    (model / "seen.json").write_text(json.dumps({
        "files": files, "hps": json.loads(os.environ["SM_HPS"]), "argv": sys.argv[1:],
        "job": os.environ["TRAINING_JOB_NAME"], "cwd": os.getcwd(), "main": __name__}))
    pathlib.Path(os.environ["SM_OUTPUT_DATA_DIR"], "note.txt").write_text("kept")
    print(f"objective={-(options.x - 3.0) ** 2:.6f};", flush=True)
"""

SERVER = """
    import json, os, pathlib, signal, sys, time
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    answer = pathlib.Path(os.environ["MODEL_DIR"], "answer.txt").read_text()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def reply(self, status, body):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.reply(500 if os.environ.get("SICK") else 200, b"")

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(0.01)
            if body == b"die":
                os._exit(1)
            if body.startswith(b"status "):
                self.reply(int(body.split()[1]), b'{"error": "asked for"}')
                return
            self.reply(200, json.dumps({"answer": answer, "pid": os.getpid(), "length": len(body),
                                        "type": self.headers["Content-Type"]}).encode())

        def log_message(self, *arguments):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

    assert sys.argv[1] == "serve"
    print("serving", answer, flush=True)
    Server(("127.0.0.1", int(os.environ["SAGEMAKER_BIND_TO_PORT"])), Handler).serve_forever()
"""

PROCESSOR = """
    import os, pathlib, sys
    import helper
    given = pathlib.Path(sys.argv[1])
    out = pathlib.Path(sys.argv[2].split("=")[1])
    (out / "sub").mkdir()
    (out / "sub" / "names.txt").write_text(helper.join(sorted(path.name for path in given.iterdir())))
    print("processed", os.environ["PROCESSING_JOB_NAME"])
"""


def archive(**files: str) -> bytes:
    """A tar.gz with these files (`a_py` is a.py)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in files.items():
            data = textwrap.dedent(text).encode()
            info = tarfile.TarInfo(name.replace("_", "."))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def alive(marker: str) -> list[int]:
    """Processes whose command line holds the marker."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            if marker in (entry / "cmdline").read_bytes().decode(errors="replace") and state != "Z":
                found.append(int(entry.name))
        except OSError:
            continue
    return found


class World:
    """A running emulator, its clients, and the things that every test needs."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.sagemaker = self.client("sagemaker")
        self.s3 = self.client("s3")
        self.logs = self.client("logs")
        self.cloudwatch = self.client("cloudwatch")
        self.runtime = self.client("sagemaker-runtime", retries={"max_attempts": 0}, max_pool_connections=32)
        iam = self.client("iam")
        trust = {
            "Version": "2012-10-17",
            "Statement": [
                {"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}
            ],
        }
        self.role = iam.create_role(RoleName="jobs", AssumeRolePolicyDocument=json.dumps(trust))["Role"]["Arn"]
        iam.put_role_policy(
            RoleName="jobs",
            PolicyName="s3",
            PolicyDocument=json.dumps(
                {
                    "Version": "2012-10-17",
                    "Statement": [
                        {
                            "Effect": "Allow",
                            "Action": ["s3:GetObject", "s3:PutObject"],
                            "Resource": f"arn:aws:s3:::{BUCKET}/*",
                        },
                        {"Effect": "Allow", "Action": "s3:ListBucket", "Resource": f"arn:aws:s3:::{BUCKET}"},
                    ],
                }
            ),
        )
        self.s3.create_bucket(Bucket=BUCKET)
        self.put("code/sourcedir.tar.gz", archive(train_py=SCRIPT, requirements_txt="nothing\n"))
        for name in ("a/1.txt", "a/2.txt", "b/3.txt"):
            self.put(f"data/{name}", name.encode())

    def client(self, service: str, **config):
        variables = self.emulator.environment()
        return boto3.client(
            service,
            endpoint_url=variables["AWS_ENDPOINT_URL"],
            region_name=variables["AWS_REGION"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
            config=Config(parameter_validation=False, **config),
        )

    def put(self, key: str, body: bytes) -> str:
        self.s3.put_object(Bucket=BUCKET, Key=key, Body=body)
        return f"s3://{BUCKET}/{key}"

    def train(self, name: str, **more) -> dict:
        hyperparameters = {
            "sagemaker_program": "train.py",
            "sagemaker_submit_directory": f"s3://{BUCKET}/code/sourcedir.tar.gz",
        }
        request = {
            "TrainingJobName": name,
            "HyperParameters": hyperparameters | more.pop("hyperparameters", {}),
            "AlgorithmSpecification": {
                "TrainingImage": TRAINING_IMAGE,
                "TrainingInputMode": "File",
                "MetricDefinitions": [{"Name": "objective", "Regex": "objective=([-0-9.]+);"}],
            },
            "RoleArn": self.role,
            "OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/out"},
            "ResourceConfig": {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 10},
            "StoppingCondition": {"MaxRuntimeInSeconds": 120},
        } | more
        return self.sagemaker.create_training_job(**request)

    def trained(self, name: str, *statuses: str, timeout: float = 60) -> dict:
        return until(
            lambda: self.sagemaker.describe_training_job(TrainingJobName=name),
            lambda job: job["TrainingJobStatus"] in (statuses or ("Completed", "Failed", "Stopped")),
            timeout,
        )

    def model(self, name: str, answer: str, **environment: str) -> str:
        """A model and an endpoint configuration of the same name, with two instances."""
        url = self.put(f"models/{name}.tar.gz", archive(answer_txt=answer))
        self.sagemaker.create_model(
            ModelName=name,
            ExecutionRoleArn=self.role,
            PrimaryContainer={"Image": "local/server:1", "ModelDataUrl": url, "Environment": environment},
        )
        self.sagemaker.create_endpoint_config(
            EndpointConfigName=name,
            ProductionVariants=[
                {
                    "VariantName": "AllTraffic",
                    "ModelName": name,
                    "InitialInstanceCount": 2,
                    "InstanceType": "ml.c5.large",
                }
            ],
        )
        return name

    def endpoint(self, name: str, *statuses: str, timeout: float = 60) -> dict:
        return until(
            lambda: self.sagemaker.describe_endpoint(EndpointName=name),
            lambda found: found["EndpointStatus"] in (statuses or ("InService", "Failed")),
            timeout,
        )

    def invoke(self, name: str, body: bytes = b"hello") -> dict:
        answer = self.runtime.invoke_endpoint(EndpointName=name, ContentType="text/plain", Body=body)
        return json.loads(answer["Body"].read())

    def alarm(self, name: str, state: str) -> str:
        self.cloudwatch.put_metric_alarm(
            AlarmName=name,
            Namespace="Test",
            MetricName=name,
            Statistic="Sum",
            Period=60,
            EvaluationPeriods=1,
            Threshold=1e9,
            TreatMissingData="ignore",
            ComparisonOperator="GreaterThanThreshold",
        )
        self.cloudwatch.set_alarm_state(AlarmName=name, StateValue=state, StateReason="test")
        return name


def until(look, good, timeout: float):
    """Looks until it is good; fails with what was last seen."""
    deadline = time.monotonic() + timeout
    while not good(seen := look()):
        assert time.monotonic() < deadline, f"not reached in {timeout} s: {json.dumps(seen, default=str)[:1500]}"
        time.sleep(0.1)
    return seen


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    images = tmp_path_factory.mktemp("images")
    (images / "server").mkdir()
    (images / "server" / "__main__.py").write_text(textwrap.dedent(SERVER))
    (images / "server" / "helper.py").write_text("join = ','.join\n")
    environment = {
        "HOUNDLOOP_IMAGES": str(images),
        "HOUNDLOOP_STOP_GRACE": "1",
        "HOUNDLOOP_MAX_JOBS": "2",
        "HOUNDLOOP_PRELOAD": "json",
        "HOUNDLOOP_HEALTH_TIMEOUT": "5",
    }
    with Emulator(state=tmp_path_factory.mktemp("state"), auth=True, environment=environment) as emulator:
        yield World(emulator)


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


def test_endpoint_answers_and_reports_its_models_errors(world):
    world.model("first", "one")
    world.sagemaker.create_endpoint(EndpointName="plain", EndpointConfigName="first")
    with pytest.raises(ClientError, match="Cannot update in-progress endpoint"):
        world.sagemaker.update_endpoint(EndpointName="plain", EndpointConfigName="first")
    found = world.endpoint("plain")
    assert found["EndpointStatus"] == "InService", found
    assert found["ProductionVariants"][0]["CurrentInstanceCount"] == 2
    answers = [world.invoke("plain") for _ in range(6)]
    assert {answer["answer"] for answer in answers} == {"one"}
    assert len({answer["pid"] for answer in answers}) == 2, "requests go round both instances"
    assert answers[0]["length"] == 5 and answers[0]["type"] == "text/plain"
    with pytest.raises(ClientError) as caught:
        world.invoke("plain", b"status 429")
    error = caught.value.response
    assert error["Error"]["Code"] == "ModelError" and error["ResponseMetadata"]["HTTPStatusCode"] == 424
    assert error["OriginalStatusCode"] == 429 and error["OriginalMessage"] == '{"error": "asked for"}'
    with pytest.raises(ClientError, match="ValidationError.*Endpoint nobody of account 000000000000 not found"):
        world.invoke("nobody")
    with pytest.raises(ClientError, match="HTTP content length exceeded"):
        world.invoke("plain", b"x" * (6 * 1024 * 1024 + 1))
    metrics = world.cloudwatch.get_metric_statistics(
        Namespace="AWS/SageMaker",
        MetricName="Invocation4XXErrors",
        Period=3600,
        Statistics=["Sum", "SampleCount"],
        Dimensions=[{"Name": "EndpointName", "Value": "plain"}, {"Name": "VariantName", "Value": "AllTraffic"}],
        StartTime=time.time() - 3000,
        EndTime=time.time() + 600,
    )["Datapoints"]
    assert sum(point["Sum"] for point in metrics) == 1 and sum(point["SampleCount"] for point in metrics) == 7


def test_a_crashed_instance_is_started_again(world):
    world.model("crashing", "alive")
    world.sagemaker.create_endpoint(EndpointName="crashing", EndpointConfigName="crashing")
    world.endpoint("crashing", "InService")
    before = {world.invoke("crashing")["pid"] for _ in range(4)}
    with pytest.raises(ClientError, match="ModelError"):
        world.invoke("crashing", b"die")
    for _ in range(10):
        assert world.invoke("crashing")["answer"] == "alive"  # by the other instance
    after = until(lambda: {world.invoke("crashing")["pid"] for _ in range(4)}, lambda pids: len(pids) == 2, 20)
    assert len(before & after) == 1


def test_an_endpoint_whose_server_is_sick_fails_with_the_reason(world):
    world.model("sick", "never", SICK="1")
    world.sagemaker.create_endpoint_config(
        EndpointConfigName="sick-soon",
        ProductionVariants=[
            {"VariantName": "AllTraffic", "ModelName": "sick", "InitialInstanceCount": 1, "InstanceType": "ml.c5.large"}
        ],
    )
    world.sagemaker.create_endpoint(EndpointName="sick", EndpointConfigName="sick-soon")
    found = world.endpoint("sick")
    assert found["EndpointStatus"] == "Failed"
    assert "did not pass the ping health check" in found["FailureReason"]
    with pytest.raises(ClientError, match="ValidationError"):
        world.invoke("sick")
    world.sagemaker.delete_endpoint(EndpointName="sick")


class Load:
    """Invokes an endpoint from a few threads for as long as it lasts, and keeps what came back."""

    def __init__(self, world: World, endpoint: str, threads: int = 4) -> None:
        self.world, self.name = world, endpoint
        self.answers: list[tuple[float, str]] = []
        self.failures: list[Exception] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self.answers.append((time.monotonic(), self.world.invoke(self.name)["answer"]))
            except Exception as error:
                self.failures.append(error)
            time.sleep(0.02)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def deployment(kind: str, *alarms: str, wait: int = 2, **size) -> dict:
    routing = {"Type": kind, "WaitIntervalInSeconds": wait} | size
    policy = {"BlueGreenUpdatePolicy": {"TrafficRoutingConfiguration": routing, "TerminationWaitInSeconds": 1}}
    rollback = {"AutoRollbackConfiguration": {"Alarms": [{"AlarmName": name} for name in alarms]}}
    return policy | rollback if alarms else policy


HALF = {"Type": "CAPACITY_PERCENT", "Value": 50}


@pytest.mark.parametrize(
    ("kind", "size"), [("CANARY", {"CanarySize": HALF}), ("LINEAR", {"LinearStepSize": HALF}), ("ALL_AT_ONCE", {})]
)
def test_an_update_under_load_fails_no_request(world, kind, size):
    name = f"update-{kind.lower().replace('_', '-')}"
    world.model(f"{name}-blue", "blue")
    world.model(f"{name}-green", "green")
    world.alarm(f"{name}-quiet", "OK")
    world.sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=f"{name}-blue")
    world.endpoint(name, "InService")
    with Load(world, name) as load:
        time.sleep(0.5)
        world.sagemaker.update_endpoint(
            EndpointName=name,
            EndpointConfigName=f"{name}-green",
            DeploymentConfig=deployment(kind, f"{name}-quiet", **size),
        )
        updating = world.sagemaker.describe_endpoint(EndpointName=name)
        assert updating["EndpointStatus"] == "Updating" and updating["EndpointConfigName"] == f"{name}-blue"
        assert updating["PendingDeploymentSummary"]["EndpointConfigName"] == f"{name}-green"
        found = world.endpoint(name)
        time.sleep(0.5)
    assert load.failures == []
    assert found["EndpointConfigName"] == f"{name}-green" and "PendingDeploymentSummary" not in found
    colours = [colour for _, colour in sorted(load.answers)]
    assert colours[0] == "blue" and colours[-1] == "green"
    if kind != "ALL_AT_ONCE":
        first = colours.index("green")
        last = len(colours) - 1 - colours[::-1].index("blue")
        share = colours[first:last].count("green") / max(1, last - first)
        assert 0.35 < share < 0.65, f"the canary got {share:.2f} of the traffic"
    world.sagemaker.delete_endpoint(EndpointName=name)


def test_an_alarm_in_the_baking_period_brings_the_old_fleet_back(world):
    world.model("back-blue", "blue")
    world.model("back-green", "green")
    world.alarm("back-alarm", "OK")
    world.sagemaker.create_endpoint(EndpointName="back", EndpointConfigName="back-blue")
    world.endpoint("back", "InService")
    with Load(world, "back") as load:
        world.sagemaker.update_endpoint(
            EndpointName="back",
            EndpointConfigName="back-green",
            DeploymentConfig=deployment("CANARY", "back-alarm", wait=60, CanarySize=HALF),
        )
        until(lambda: load.answers[-20:], lambda seen: any(colour == "green" for _, colour in seen), 30)
        world.alarm("back-alarm", "ALARM")
        found = world.endpoint("back")
        until(lambda: load.answers[-40:], lambda seen: {colour for _, colour in seen} == {"blue"}, 10)
    assert load.failures == []
    assert (found["EndpointStatus"], found["EndpointConfigName"]) == ("InService", "back-blue")
    assert "back-alarm" in found["FailureReason"]
    world.sagemaker.delete_endpoint(EndpointName="back")


def test_a_green_fleet_that_is_never_healthy_is_rolled_back(world):
    world.model("sound", "sound")
    world.model("unsound", "unsound", SICK="1")
    world.sagemaker.create_endpoint(EndpointName="health", EndpointConfigName="sound")
    world.endpoint("health", "InService")
    world.sagemaker.update_endpoint(EndpointName="health", EndpointConfigName="unsound")
    found = world.endpoint("health")
    assert (found["EndpointStatus"], found["EndpointConfigName"]) == ("InService", "sound")
    assert "ping health check" in found["FailureReason"]
    assert world.invoke("health")["answer"] == "sound"
    with pytest.raises(ClientError, match="less than or equal to 50%"):
        world.sagemaker.update_endpoint(
            EndpointName="health",
            EndpointConfigName="sound",
            DeploymentConfig=deployment("CANARY", CanarySize={"Type": "CAPACITY_PERCENT", "Value": 60}),
        )


def test_serverless_endpoint_is_bounded(world):
    world.model("serverless-model", "small")
    world.sagemaker.create_endpoint_config(
        EndpointConfigName="serverless",
        ProductionVariants=[
            {
                "VariantName": "AllTraffic",
                "ModelName": "serverless-model",
                "ServerlessConfig": {"MemorySizeInMB": 2048, "MaxConcurrency": 1},
            }
        ],
    )
    world.sagemaker.create_endpoint(EndpointName="serverless", EndpointConfigName="serverless")
    assert "CurrentServerlessConfig" in world.endpoint("serverless", "InService")["ProductionVariants"][0]
    with Load(world, "serverless", threads=6) as load:
        time.sleep(1)
    assert load.answers
    assert {error.response["Error"]["Code"] for error in load.failures} == {"ThrottlingException"}
    world.sagemaker.delete_endpoint(EndpointName="serverless")


def test_requests_are_refused_in_awss_words(world):
    with pytest.raises(ClientError) as caught:
        world.sagemaker.create_training_job(TrainingJobName="bad name", OutputDataConfig={})
    message = caught.value.response["Error"]["Message"]
    assert caught.value.response["Error"]["Code"] == "ValidationException"
    assert message.startswith("3 validation errors detected: ")
    assert "Value null at 'roleArn' failed to satisfy constraint: Member must not be null" in message
    assert (
        "Value 'bad name' at 'trainingJobName' failed to satisfy constraint: Member must satisfy regular "
        "expression pattern: " in message
    )
    with pytest.raises(ClientError, match='Could not find endpoint "arn:aws:sagemaker:us-east-1:000000000000:endpo'):
        world.sagemaker.describe_endpoint(EndpointName="Missing")
    with pytest.raises(ClientError, match="NotImplemented.*CreateTransformJob"):
        world.sagemaker.create_transform_job()
    with pytest.raises(ClientError, match="NotImplemented.*DebugRuleConfigurations"):
        world.train("refused", DebugRuleConfigurations=[{"RuleConfigurationName": "r", "RuleEvaluatorImage": "i"}])
    with pytest.raises(ClientError, match="Could not assume role"):
        world.train("refused", RoleArn="arn:aws:iam::000000000000:role/nobody")
    with pytest.raises(ClientError, match="Could not access model data"):
        world.sagemaker.create_model(
            ModelName="no-data",
            ExecutionRoleArn=world.role,
            PrimaryContainer={"Image": "local/server:1", "ModelDataUrl": f"s3://{BUCKET}/nowhere.tar.gz"},
        )


def test_packages_tags_and_lists(world):
    client = world.sagemaker
    client.create_model_package_group(ModelPackageGroupName="dogs", Tags=[{"Key": "a", "Value": "1"}])
    specification = {
        "Containers": [{"Image": "local/server:1", "ModelDataUrl": f"s3://{BUCKET}/m.tar.gz"}],
        "SupportedContentTypes": ["image/jpeg"],
        "SupportedResponseMIMETypes": ["application/json"],
    }
    arns = [
        client.create_model_package(ModelPackageGroupName="dogs", InferenceSpecification=specification)[
            "ModelPackageArn"
        ]
        for _ in range(3)
    ]
    assert [arn.rsplit("/", 1)[1] for arn in arns] == ["1", "2", "3"]
    client.update_model_package(ModelPackageArn=arns[1], ModelApprovalStatus="Approved")
    assert client.describe_model_package(ModelPackageName=arns[1])["ModelApprovalStatus"] == "Approved"
    pages = list(
        client.get_paginator("list_model_packages").paginate(
            ModelPackageGroupName="dogs", PaginationConfig={"PageSize": 2}
        )
    )
    assert [len(page["ModelPackageSummaryList"]) for page in pages] == [2, 1]
    with pytest.raises(ClientError, match="ConflictException"):
        client.delete_model_package_group(ModelPackageGroupName="dogs")
    for arn in arns:
        client.delete_model_package(ModelPackageName=arn)
    group = client.describe_model_package_group(ModelPackageGroupName="dogs")["ModelPackageGroupArn"]
    client.add_tags(ResourceArn=group, Tags=[{"Key": "a", "Value": "2"}, {"Key": "b", "Value": "3"}])
    client.delete_tags(ResourceArn=group, TagKeys=["b"])
    assert client.list_tags(ResourceArn=group)["Tags"] == [{"Key": "a", "Value": "2"}]
    client.delete_model_package_group(ModelPackageGroupName="dogs")
    with pytest.raises(ClientError, match="does not exist"):
        client.describe_model_package_group(ModelPackageGroupName="dogs")


def test_a_kill_leaves_no_orphan_and_a_restart_brings_endpoints_back(tmp_path):
    images = tmp_path / "images"
    (images / "server").mkdir(parents=True)
    (images / "server" / "__main__.py").write_text(textwrap.dedent(SERVER))
    environment = {"HOUNDLOOP_IMAGES": str(images), "HOUNDLOOP_PRELOAD": "json", "S3_PERSIST": "1"}
    with Emulator(state=tmp_path / "state", auth=False, keep=True, environment=environment) as emulator:
        first = World(emulator)
        first.model("kept", "kept")
        first.sagemaker.create_endpoint(EndpointName="kept", EndpointConfigName="kept")
        first.endpoint("kept", "InService")
        first.train("orphan", hyperparameters={"mode": "sleep"})
        until(lambda: alive("# orphan"), lambda pids: len(pids) >= 2, 30)
        servers = alive(str(images / "server"))
        assert len(servers) == 2
        os.kill(emulator.pid, signal.SIGKILL)
        until(lambda: alive("# orphan") + alive(str(images / "server")), lambda pids: not pids, 10)
    with Emulator(state=tmp_path / "state", auth=False, keep=True, environment=environment) as emulator:
        client = boto3.client(
            "sagemaker",
            endpoint_url=emulator.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        job = client.describe_training_job(TrainingJobName="orphan")
        assert job["TrainingJobStatus"] == "Failed" and "InternalServerError" in job["FailureReason"]
        found = until(
            lambda: client.describe_endpoint(EndpointName="kept"),
            lambda seen: seen["EndpointStatus"] in ("InService", "Failed"),
            30,
        )
        assert found["EndpointStatus"] == "InService", found
    assert not alive(str(images / "server"))
