"""What a `kill -9` of the local AWS costs.

    python -m benchmarks.crash
    python -m benchmarks.crash --rounds 5 --seed 1

Each round works against an emulator that keeps its state (objects, rows, messages, alarms, and models, endpoint
configurations, training jobs and endpoints of SageMaker), kills it at a random moment, starts another on the same
state and looks for everything that was ever acknowledged. A write's age is the time from its acknowledgement to the
kill. Ends with 1 if SageMaker lost anything, if anything was unreadable or half written, if an endpoint or a process
was not as it should be, or if a lost write was older than a second.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import psutil
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from local.emulator import Emulator

ROUNDS = 20
WORK_SECONDS = (1.0, 4.0)  # the kill comes at a moment between them
ALLOWED_SECONDS = 1.0  # of the emulator's own writes
ENDPOINTS = 3  # created in the first rounds, one each
SETTLE_SECONDS = 60.0  # for endpoints to come back and jobs to have their end
ORPHAN_SECONDS = 10.0  # for what the killed emulator had started to end
ROWS = 20_000  # that lie there beside what is written
BUCKET, TABLE, FULL, QUEUE = "crash-objects", "crash-rows", "crash-full", "crash-messages"
ROLE = "arn:aws:iam::000000000000:role/crash"
IMAGE = "000000000000.dkr.ecr.us-east-1.amazonaws.com/training:1"
SAGEMAKER = ("model", "endpoint configuration", "training job", "endpoint")

SERVER = """
import os, pathlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def answer(self):
        body = pathlib.Path(os.environ["MODEL_DIR"], "answer.txt").read_bytes()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer

    def log_message(self, *arguments):
        pass

ThreadingHTTPServer(("127.0.0.1", int(os.environ["SAGEMAKER_BIND_TO_PORT"])), Handler).serve_forever()
"""
SCRIPT = """
import argparse, time
parser = argparse.ArgumentParser()
parser.add_argument("--seconds", type=float)
time.sleep(parser.parse_args().seconds)
"""


@dataclass(frozen=True)
class Write:
    """An acknowledged write: what it was, what must be found, and when the answer was there (monotonic seconds)."""

    kind: str
    key: str
    value: str
    moment: float


@dataclass
class Round:
    """What one round found. Ages are seconds."""

    acknowledged: Counter = field(default_factory=Counter)
    lost: list[Write] = field(default_factory=list)
    ages: list[float] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    endpoints: tuple[int, int] = (0, 0)  # back, of all
    jobs: tuple[int, int] = (0, 0)  # ended, with a reason if they failed, of all
    delivered: tuple[int, int] = (0, 0)
    orphans: int = 0
    restart: float = 0.0
    load: float = 0.0


def archive(name: str, text: str) -> bytes:
    """A tar.gz of one file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(text.encode())
        tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


class Account:
    """Clients of one emulator. They do not retry: what is not acknowledged does not count."""

    def __init__(self, aws: Emulator) -> None:
        def client(service: Any) -> Any:
            return boto3.client(
                service,
                endpoint_url=aws.endpoint_url,
                region_name="us-east-1",
                aws_access_key_id="test",
                aws_secret_access_key="test",
                config=Config(retries={"max_attempts": 0}, max_pool_connections=16, read_timeout=20),
            )

        self.s3, self.dynamodb, self.sqs, self.cloudwatch, self.sagemaker, self.runtime = map(
            client, ("s3", "dynamodb", "sqs", "cloudwatch", "sagemaker", "sagemaker-runtime")
        )

    def prepare(self, rows: int) -> None:
        """What the work needs, and a table with `rows` rows."""
        self.s3.create_bucket(Bucket=BUCKET)
        self.s3.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
        self.s3.put_object(Bucket=BUCKET, Key="code/sourcedir.tar.gz", Body=archive("train.py", SCRIPT))
        self.s3.put_object(Bucket=BUCKET, Key="code/model.tar.gz", Body=archive("answer.txt", "here"))
        for table in (TABLE, FULL):
            self.dynamodb.create_table(
                TableName=table,
                KeySchema=[{"AttributeName": "pk", "KeyType": "HASH"}],
                AttributeDefinitions=[{"AttributeName": "pk", "AttributeType": "S"}],
                BillingMode="PAY_PER_REQUEST",
            )
        for start in range(0, rows, 25):
            some = [{"pk": {"S": f"{row:06}"}, "v": {"S": "x" * 400}} for row in range(start, min(start + 25, rows))]
            self.dynamodb.batch_write_item(RequestItems={FULL: [{"PutRequest": {"Item": item}} for item in some]})
        self.sqs.create_queue(QueueName=QUEUE, Attributes={"VisibilityTimeout": "1"})

    def queue(self) -> str:
        """The URL of the queue."""
        return str(self.sqs.get_queue_url(QueueName=QUEUE)["QueueUrl"])


class Worker:
    """Writes from several threads until the emulator is gone."""

    def __init__(self, account: Account, number: int, seed: int) -> None:
        self.account, self.number, self.seed = account, number, seed
        self.writes: list[Write] = []
        self._over = threading.Event()
        tasks = [self._objects, self._rows, self._messages, self._alarms, self._models, self._jobs]
        if number <= ENDPOINTS:
            tasks.append(self._endpoint)
        self._threads = [threading.Thread(target=self._run, args=(task,), daemon=True) for task in tasks]

    def __enter__(self) -> Worker:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, task: Callable[[random.Random, str], Iterator[None]]) -> None:
        chance = random.Random(f"{self.seed} {self.number} {task.__name__}")
        count = 0
        with contextlib.suppress(BotoCoreError, ClientError, OSError):  # the emulator was killed
            while not self._over.is_set():
                count += 1
                for _ in task(chance, f"{self.number}-{count}"):
                    if self._over.is_set():
                        return

    def _noted(self, kind: str, key: str, value: str = "") -> None:
        self.writes.append(Write(kind, key, value, time.monotonic()))

    def _objects(self, chance: random.Random, name: str) -> Iterator[None]:
        for key in (f"one/{name}", "again/and-again"):
            body = chance.randbytes(chance.randrange(1, 60_000))
            digest = hashlib.md5(body).hexdigest()
            self.account.s3.put_object(Bucket=BUCKET, Key=key, Body=body, Metadata={"digest": digest, "n": name})
            self._noted("object" if key.startswith("one/") else "object again", key, name if key[0] == "a" else digest)
            yield

    def _rows(self, chance: random.Random, name: str) -> Iterator[None]:
        self.account.dynamodb.put_item(TableName=TABLE, Item={"pk": {"S": f"one/{name}"}, "v": {"S": name * 20}})
        self._noted("row", f"one/{name}", name * 20)
        yield
        both = [
            {"Put": {"TableName": TABLE, "Item": {"pk": {"S": f"{side}/{name}"}, "v": {"S": name}}}}
            for side in ("left", "right")
        ]
        self.account.dynamodb.transact_write_items(TransactItems=both)
        for side in ("left", "right"):
            self._noted("row", f"{side}/{name}", name)
        yield

    def _messages(self, chance: random.Random, name: str) -> Iterator[None]:
        queue = self.account.queue()
        self.account.sqs.send_message(QueueUrl=queue, MessageBody=name, DelaySeconds=chance.choice((0, 0, 0, 2)))
        self._noted("message", name)
        if chance.random() < 0.2:  # in flight when the emulator dies: nobody deletes them
            self.account.sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=3)
        yield

    def _alarms(self, chance: random.Random, name: str) -> Iterator[None]:
        alarm = {"Namespace": "Crash", "MetricName": "M", "Statistic": "Sum", "Period": 60, "EvaluationPeriods": 1}
        self.account.cloudwatch.put_metric_alarm(
            AlarmName=name, Threshold=1.0, ComparisonOperator="GreaterThanThreshold", **alarm
        )
        self._noted("alarm", name)
        time.sleep(0.05)
        yield

    def _models(self, chance: random.Random, name: str) -> Iterator[None]:
        self._model(name)
        time.sleep(0.05)
        yield

    def _model(self, name: str) -> None:
        container = {"Image": "local/server:1", "ModelDataUrl": f"s3://{BUCKET}/code/model.tar.gz"}
        self.account.sagemaker.create_model(ModelName=name, ExecutionRoleArn=ROLE, PrimaryContainer=container)
        self._noted("model", name)
        variant = {"VariantName": "AllTraffic", "ModelName": name, "InitialInstanceCount": 1}
        self.account.sagemaker.create_endpoint_config(
            EndpointConfigName=name, ProductionVariants=[{**variant, "InstanceType": "ml.c5.large"}]
        )
        self._noted("endpoint configuration", name)

    def _jobs(self, chance: random.Random, name: str) -> Iterator[None]:
        self.account.sagemaker.create_training_job(
            TrainingJobName=name,
            RoleArn=ROLE,
            AlgorithmSpecification={"TrainingImage": IMAGE, "TrainingInputMode": "File"},
            HyperParameters={
                "sagemaker_program": "train.py",
                "sagemaker_submit_directory": f"s3://{BUCKET}/code/sourcedir.tar.gz",
                "seconds": chance.choice(("0", "600")),
            },
            OutputDataConfig={"S3OutputPath": f"s3://{BUCKET}/out"},
            ResourceConfig={"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 1},
            StoppingCondition={"MaxRuntimeInSeconds": 900},
        )
        self._noted("training job", name)
        time.sleep(chance.uniform(0.2, 1.0))
        yield

    def _endpoint(self, chance: random.Random, name: str) -> Iterator[None]:
        name = f"endpoint-{name}"
        self._model(name)
        self.account.sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=name)
        self._noted("endpoint", name)
        self._over.wait()
        yield


def found(account: Account, result: Round) -> Callable[[Write], bool]:
    """Read everything back. Returns whether a write is there; what contradicts itself goes into `result.torn`."""
    there: dict[tuple[str, str], str] = {}
    for page in account.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for entry in page.get("Contents", []):
            there["object", entry["Key"]] = entry["ETag"].strip('"')
    for key in [key for _, key in there if not key.startswith(("code/", "out/"))]:
        answer = account.s3.get_object(Bucket=BUCKET, Key=key)
        digest = hashlib.md5(answer["Body"].read()).hexdigest()
        if not digest == answer["ETag"].strip('"') == answer["Metadata"].get("digest"):
            result.torn.append(f"s3://{BUCKET}/{key}")
        if key.startswith("again/"):
            there["object again", key] = answer["Metadata"].get("n", "")
    for page in account.dynamodb.get_paginator("scan").paginate(TableName=TABLE):
        for item in page["Items"]:
            there["row", item["pk"]["S"]] = item["v"]["S"]
    there["rows", FULL] = str(account.dynamodb.describe_table(TableName=FULL)["Table"]["ItemCount"])
    for key in [key for kind, key in there if kind == "row" and key.startswith(("left/", "right/"))]:
        side, _, name = key.partition("/")
        if ("row", f"{'right' if side == 'left' else 'left'}/{name}") not in there:
            result.torn.append(f"transaction {name}")
    for page in account.cloudwatch.get_paginator("describe_alarms").paginate():
        there.update({("alarm", alarm["AlarmName"]): "" for alarm in page["MetricAlarms"]})
    for kind, action, member, name in (
        ("model", "list_models", "Models", "ModelName"),
        ("endpoint configuration", "list_endpoint_configs", "EndpointConfigs", "EndpointConfigName"),
        ("training job", "list_training_jobs", "TrainingJobSummaries", "TrainingJobName"),
        ("endpoint", "list_endpoints", "Endpoints", "EndpointName"),
    ):
        for page in account.sagemaker.get_paginator(action).paginate(MaxResults=100):
            there.update({(kind, entry[name]): "" for entry in page[member]})

    def is_there(write: Write) -> bool:
        value = there.get((write.kind, write.key))
        if write.kind == "object again":  # a later put, that was not acknowledged, may have replaced it
            return value is not None and _order(value) >= _order(write.value)
        return value == write.value

    return is_there


def _order(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split("-")) if name else ()


def receive(account: Account) -> set[str]:
    """Take every message out of the queue; those that are in flight or delayed come within seconds."""
    queue = account.queue()
    bodies: set[str] = set()
    while True:
        answer = account.sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=10)
        messages = answer.get("Messages", [])
        bodies |= {message["Body"] for message in messages}
        if messages:
            entries = [{"Id": str(i), "ReceiptHandle": one["ReceiptHandle"]} for i, one in enumerate(messages)]
            account.sqs.delete_message_batch(QueueUrl=queue, Entries=entries)
            continue
        counts = account.sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["All"])["Attributes"]
        if not any(int(count) for name, count in counts.items() if name.startswith("ApproximateNumber")):
            return bodies
        time.sleep(0.1)


def settled(looked: Callable[[str], bool], names: list[str]) -> int:
    """For how many names `looked` comes true in time."""
    waiting, deadline = set(names), time.monotonic() + SETTLE_SECONDS
    while waiting and time.monotonic() < deadline:
        waiting -= {name for name in waiting if looked(name)}
        if waiting:
            time.sleep(0.1)
    return len(names) - len(waiting)


def answers(account: Account, name: str) -> bool:
    """Whether an endpoint is in service and answers."""
    try:
        answer = account.runtime.invoke_endpoint(EndpointName=name, ContentType="text/plain", Body=b"?")
    except ClientError:
        return False
    return bool(answer["Body"].read() == b"here")


def ended(account: Account, name: str) -> bool:
    """Whether a training job has come to its end, with a reason if it failed."""
    job = account.sagemaker.describe_training_job(TrainingJobName=name)
    return job["TrainingJobStatus"] == "Completed" or bool(job.get("FailureReason"))


def started_by(state: Path) -> list[psutil.Process]:
    """The processes of emulators with this state: each has its folder for temporary files from there."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("TMPDIR") == str(state / "tmp") and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def integrity(state: Path) -> list[str]:
    """What is wrong with a killed emulator's file, looked at in a copy."""
    with tempfile.TemporaryDirectory() as folder:
        for file in (state / "state").glob("state.sqlite*"):
            shutil.copy(file, folder)
        try:
            connection = sqlite3.connect(Path(folder, "state.sqlite"))
            with contextlib.closing(connection):
                answer = connection.execute("PRAGMA integrity_check").fetchone()[0]
        except sqlite3.DatabaseError as error:
            answer = str(error)
    return [] if answer == "ok" else [answer]


def unreadable(aws: Emulator) -> list[str]:
    """What the emulator set aside because it could not read it."""
    files = [str(path) for path in aws.state.rglob("*unreadable*")]
    log = aws.log.read_text(errors="replace").splitlines()
    return files + [line for line in log if "unreadable" in line or "could not be restored" in line]


class Benchmark:
    """The rounds, over one state."""

    def __init__(self, folder: Path, seed: int, rows: int) -> None:
        self.folder, self.seed = folder, seed
        self.chance = random.Random(seed)
        (folder / "images" / "server").mkdir(parents=True)
        (folder / "images" / "server" / "__main__.py").write_text(SERVER)
        self.kept: list[Write] = []  # acknowledged in this round or an earlier one, and not known to be lost
        self.rounds: list[Round] = []
        self.aws = self._start()
        self.account = Account(self.aws)
        self.account.prepare(rows)
        self.kept.append(Write("rows", FULL, str(rows), time.monotonic()))
        time.sleep(2 * ALLOWED_SECONDS)

    def _start(self) -> Emulator:
        environment = {"HOUNDLOOP_IMAGES": str(self.folder / "images"), "HOUNDLOOP_PRELOAD": "json"}
        return Emulator(state=self.folder / "state", auth=False, keep=True, environment=environment).start()

    def round(self) -> Round:
        """Work, kill, restart, look."""
        result = Round(load=os.getloadavg()[0])
        with Worker(self.account, len(self.rounds) + 1, self.seed) as worker:
            time.sleep(self.chance.uniform(*WORK_SECONDS))
            before = started_by(self.aws.state)
            killed = time.monotonic()
            os.kill(self.aws.pid, signal.SIGKILL)
        result.unreadable = integrity(self.aws.state)
        dead, began = self.aws, time.monotonic()
        self.aws = self._start()
        result.restart = time.monotonic() - began
        result.acknowledged = Counter(write.kind for write in worker.writes)
        self._look(worker.writes, killed, result)
        _, alive = psutil.wait_procs(before, timeout=ORPHAN_SECONDS)
        result.orphans = len([process for process in alive if process.status() != psutil.STATUS_ZOMBIE])
        dead.stop()
        self.rounds.append(result)
        return result

    def _look(self, writes: list[Write], killed: float, result: Round) -> None:
        self.account = Account(self.aws)
        self.kept += writes
        is_there = found(self.account, result)
        sent = [write for write in self.kept if write.kind == "message"]
        bodies = receive(self.account)
        result.lost = [
            write for write in self.kept if not (write.key in bodies if write.kind == "message" else is_there(write))
        ]
        result.ages = [max(0.0, killed - write.moment) for write in result.lost]
        result.delivered = (len([write for write in sent if write.key in bodies]), len(sent))
        endpoints = [write.key for write in self.kept if write.kind == "endpoint"]
        jobs = [write.key for write in writes if write.kind == "training job"]
        lost = set(result.lost)
        there = {write.key for write in self.kept if write.kind == "training job" and write not in lost}
        result.endpoints = (settled(lambda name: answers(self.account, name), endpoints), len(endpoints))
        result.jobs = (settled(lambda name: name in there and ended(self.account, name), jobs), len(jobs))
        result.unreadable += unreadable(self.aws)
        self.kept = [write for write in self.kept if write not in lost and write.kind != "message"]

    def close(self) -> None:
        """Stop the last emulator."""
        self.aws.stop()


def table(rounds: list[Round]) -> Table:
    """The rounds, and their sum, for people."""
    shown = Table(title="What kill -9 costs (ages in ms; lost writes, by the time from acknowledgement to kill)")
    for name in ("round", "acknowledged", "lost", "youngest", "oldest", "SageMaker", "lost", "torn", "unreadable"):
        shown.add_column(name, justify="right")
    for name in ("endpoints", "jobs", "messages", "orphans", "restart", "load"):
        shown.add_column(name, justify="right")
    for number, one in enumerate([*rounds, None], 1):
        figures = summary([one] if one else rounds)
        if one is None:
            shown.add_section()
        shown.add_row(
            str(number) if one else "all",
            f"{figures['acknowledged']:,}",
            str(figures["lost"]),
            _milliseconds(figures["youngest_lost_seconds"]),
            _milliseconds(figures["oldest_lost_seconds"]),
            str(figures["sagemaker_acknowledged"]),
            str(figures["sagemaker_lost"]),
            str(figures["torn"]),
            str(figures["unreadable"]),
            *(f"{figures[name][0]}/{figures[name][1]}" for name in ("endpoints", "jobs", "messages")),
            str(figures["orphans"]),
            f"{figures['restart_seconds']:.1f} s",
            f"{figures['load']:.1f}",
        )
    return shown


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.0f}"


def summary(rounds: list[Round]) -> dict[str, Any]:
    """The figures of some rounds together."""
    acknowledged: Counter = sum((one.acknowledged for one in rounds), Counter())
    lost = [write for one in rounds for write in one.lost]
    ages = [age for one in rounds for age in one.ages]

    def both(name: str) -> tuple[int, int]:
        pairs = [getattr(one, name) for one in rounds]
        return sum(first for first, _ in pairs), sum(second for _, second in pairs)

    return {
        "rounds": len(rounds),
        "acknowledged": acknowledged.total(),
        "acknowledged_by_kind": dict(acknowledged),
        "lost": len(lost),
        "lost_by_kind": dict(Counter(write.kind for write in lost)),
        "youngest_lost_seconds": round(min(ages), 3) if ages else None,
        "oldest_lost_seconds": round(max(ages), 3) if ages else None,
        "sagemaker_acknowledged": sum(acknowledged[kind] for kind in SAGEMAKER),
        "sagemaker_lost": len([write for write in lost if write.kind in SAGEMAKER]),
        "torn": sum(len(one.torn) for one in rounds),
        "unreadable": sum(len(one.unreadable) for one in rounds),
        "endpoints": both("endpoints"),
        "jobs": both("jobs"),
        "messages": both("delivered"),
        "orphans": sum(one.orphans for one in rounds),
        "restart_seconds": round(max(one.restart for one in rounds), 2),
        "load": round(max(one.load for one in rounds), 1),
    }


def problems(rounds: list[Round]) -> list[str]:
    """What was promised and not kept."""
    figures = summary(rounds)
    broken = [f"{figures[name]} {name}" for name in ("torn", "unreadable", "orphans") if figures[name]]
    if figures["sagemaker_lost"]:
        broken.append(f"SageMaker lost {figures['sagemaker_lost']} writes that it had acknowledged")
    broken += [
        f"{there} of {total} {name} as they should be"
        for name, (there, total) in ((name, figures[name]) for name in ("endpoints", "jobs"))
        if there < total
    ]
    if (figures["oldest_lost_seconds"] or 0) > ALLOWED_SECONDS:
        broken.append(f"a lost write was {figures['oldest_lost_seconds']:.2f} s old")
    return broken


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"work, kill, restart: so often ({ROUNDS})")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and writes (0)")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"rows that lie in another table ({ROWS})")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    console = Console(stderr=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 160)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(prefix="crash-") as folder, Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=options.rounds)
        benchmark = Benchmark(Path(folder), options.seed, options.rows)
        try:
            for _ in range(options.rounds):
                progress.update(task, description="work, kill, restart, look")
                result = benchmark.round()
                for what in (*result.torn, *result.unreadable):
                    progress.console.print(f"[red]round {len(benchmark.rounds)}: {what}")
                progress.advance(task)
        finally:
            benchmark.close()
    rounds = benchmark.rounds
    console.print(table(rounds))
    broken = problems(rounds)
    if summary(rounds)["load"] > (os.cpu_count() or 1):
        console.print(
            f"The machine was loaded ({summary(rounds)['load']} on {os.cpu_count()} cores): ages are too high."
        )
    for problem in broken:
        console.print(f"[red]{problem}")
    print(json.dumps({**summary(rounds), "kept": not broken}))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
