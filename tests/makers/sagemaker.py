"""A world for the local SageMaker's tests: a role, a bucket, small scripts and servers, and clients that reach them."""

import io
import json
import tarfile
import textwrap
import threading
import time
from pathlib import Path

import boto3
from botocore.config import Config

from local.emulator import Emulator

TRAINING_IMAGE = "000000000000.dkr.ecr.us-east-1.amazonaws.com/pytorch-training:2.13"
BUCKET = "jobs-bucket"
ROLE = "arn:aws:iam::000000000000:role/jobs"  # that World makes

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
            if attributes := self.headers["X-Amzn-SageMaker-Custom-Attributes"]:
                self.send_header("X-Amzn-SageMaker-Custom-Attributes", attributes)
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
            word, _, number = body[:40].partition(b" ")
            if word == b"sleep":
                time.sleep(float(number))
            if word == b"status":
                self.reply(int(number), b'{"error": "asked for"}')
            elif word == b"large":
                self.reply(500 if os.environ.get("BROKEN") else 200, bytes(int(number)))
            elif os.environ.get("BROKEN"):
                self.reply(500, b"broken")
            else:
                self.reply(200, json.dumps({"answer": answer, "pid": os.getpid(), "length": len(body),
                                            "type": self.headers["Content-Type"],
                                            "headers": dict(self.headers)}).encode())

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
        request = training(name)
        request["HyperParameters"] |= more.pop("hyperparameters", {})
        return self.sagemaker.create_training_job(**request | more)

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


class Load:
    """Invokes an endpoint from a few threads for as long as it lasts, and keeps what came back."""

    def __init__(self, world: World, endpoint: str, threads: int = 4, body: bytes = b"hello") -> None:
        self.world, self.name, self.body = world, endpoint, body
        self.answers: list[tuple[float, str]] = []
        self.failures: list[Exception] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self.answers.append((time.monotonic(), self.world.invoke(self.name, self.body)["answer"]))
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


def training(name: str) -> dict:
    """A request for a training job, as boto3's parameters."""
    return {
        "TrainingJobName": name,
        "HyperParameters": {
            "sagemaker_program": "train.py",
            "sagemaker_submit_directory": f"s3://{BUCKET}/code/sourcedir.tar.gz",
        },
        "AlgorithmSpecification": {
            "TrainingImage": TRAINING_IMAGE,
            "TrainingInputMode": "File",
            "MetricDefinitions": [{"Name": "objective", "Regex": "objective=([-0-9.]+);"}],
        },
        "RoleArn": ROLE,
        "OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/out"},
        "ResourceConfig": {"InstanceType": "ml.m5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 10},
        "StoppingCondition": {"MaxRuntimeInSeconds": 120},
    }


def tuning(name: str) -> dict:
    """A request for a tuning job of one training job."""
    definition = training("")
    definition["StaticHyperParameters"] = definition.pop("HyperParameters")
    del definition["TrainingJobName"]
    return {
        "HyperParameterTuningJobName": name,
        "HyperParameterTuningJobConfig": {
            "Strategy": "Random",
            "HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": "objective"},
            "ResourceLimits": {"MaxNumberOfTrainingJobs": 1, "MaxParallelTrainingJobs": 1},
            "ParameterRanges": {"ContinuousParameterRanges": [{"Name": "x", "MinValue": "-1", "MaxValue": "1"}]},
        },
        "TrainingJobDefinition": definition,
    }


def processing(name: str) -> dict:
    """A request for a processing job that does nothing."""
    return {
        "ProcessingJobName": name,
        "RoleArn": ROLE,
        "AppSpecification": {"ImageUri": "local/server:1", "ContainerEntrypoint": ["python3", "-c", "pass"]},
        "ProcessingResources": {
            "ClusterConfig": {"InstanceCount": 1, "InstanceType": "ml.m5.large", "VolumeSizeInGB": 5}
        },
    }


def container(**more) -> dict:
    """A container of a model, whose data is where `World.model` puts that of `taken`."""
    return {"Image": "local/server:1", "ModelDataUrl": f"s3://{BUCKET}/models/taken.tar.gz"} | more


def variant(**more) -> dict:
    """A production variant of the model `taken`."""
    return {
        "VariantName": "AllTraffic",
        "ModelName": "taken",
        "InitialInstanceCount": 2,
        "InstanceType": "ml.c5.large",
    } | more


def taken_names(world: World) -> str:
    """Makes one of each resource; returns the name of them all. A serverless configuration has `-serverless` added."""
    name, client = "taken", world.sagemaker
    client.create_training_job(**training(name))
    client.create_hyper_parameter_tuning_job(**tuning(name))
    client.create_processing_job(**processing(name))
    world.model(name, name)
    client.create_endpoint_config(
        EndpointConfigName=f"{name}-serverless",
        ProductionVariants=[
            {
                "VariantName": "AllTraffic",
                "ModelName": name,
                "ServerlessConfig": {"MemorySizeInMB": 2048, "MaxConcurrency": 2},
            }
        ],
    )
    client.create_endpoint(EndpointName=name, EndpointConfigName=name)
    client.create_model_package_group(ModelPackageGroupName=name)
    client.create_model_package(ModelPackageGroupName=name, InferenceSpecification={"Containers": [container()]})
    assert world.endpoint(name)["EndpointStatus"] == "InService"
    return name
