"""What a caller of an endpoint notices of updates, a rollback, scaling and a death; and what the router costs.

    python -m benchmarks.endpoint_update
    python -m benchmarks.endpoint_update --quick
    python -m benchmarks.endpoint_update --real

Finds out what an endpoint of three instances can take, then sends half of that, signed and with IAM on, at a steady
rate: over a canary update, a linear update, an update to a fleet that answers 500 and is rolled back by the alarm on
the router's own metrics, a scale-in, a scale-out, and the SIGKILL of an instance. Latency counts from the moment when
a request was due. The instances are small servers of this file that take a few milliseconds for each request, one at a
time; with --real they are `inference/` with a model that classifies by colour. Ends with 1 if a request failed that
the broken fleet did not itself refuse, if an update did not end as it should, or if the router's median overhead over
calling a server directly is above 2 ms. The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import signal
import statistics
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psutil
from botocore.credentials import Credentials
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.load import Client, Load, Sample, Signed, post, saturate
from local.emulator import CHECKOUT, Emulator

INSTANCES = 3
MAX_OVERHEAD = 2e-3  # seconds
CROP = bytes(224 * 224 * 3)  # what classify_images sends for one picture
BUCKET, ENDPOINT = "endpoint-update", "measured"
PATIENCE = 90.0  # seconds for an endpoint to come into service

SERVER = """
import asyncio, os, pathlib

VERSION = pathlib.Path(os.environ["MODEL_DIR"], "version.txt").read_bytes()
BROKEN, SECONDS = bool(os.environ.get("BROKEN")), float(os.environ["SECONDS"])


async def serve(reader, writer, turn):
    try:
        while True:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
            length = [int(line[15:]) for line in head.lower().split(b"\\r\\n") if line.startswith(b"content-length:")]
            await reader.readexactly(sum(length))
            status = b"200 OK"
            if head.startswith(b"POST"):
                async with turn:
                    await asyncio.sleep(SECONDS)
                status = b"500 Broken" if BROKEN else status
            writer.write(b"HTTP/1.1 %s\\r\\nContent-Type: text/plain\\r\\nContent-Length: %d\\r\\n\\r\\n%s"
                         % (status, len(VERSION), VERSION))
    except (EOFError, ConnectionError):
        writer.close()


async def main():
    turn = asyncio.Lock()
    server = await asyncio.start_server(
        lambda reader, writer: serve(reader, writer, turn), "127.0.0.1", int(os.environ["SAGEMAKER_BIND_TO_PORT"]),
        limit=1 << 20)
    await server.serve_forever()


asyncio.run(main())
"""


@dataclass(frozen=True)
class Times:
    """Seconds: how long each part lasts, and how long a server takes for a request."""

    saturation: float = 5.0
    steady: float = 20.0
    wait: int = 6
    termination: int = 4
    after: float = 4.0
    service: float = 0.005
    comparisons: int = 600


QUICK = Times(saturation=2.0, steady=6.0, wait=2, termination=1, after=2.0, comparisons=300)


@dataclass
class Phase:
    """A stretch of the load, and what was to come of it."""

    name: str
    began: float
    ended: float = 0.0
    note: str = ""
    wrong: str = ""


class Account:
    """The emulator's account, prepared: role, bucket, caller, models, and an alarm on 5XX answers of the endpoint."""

    def __init__(self, aws: Emulator, images: Path, times: Times, real: bool) -> None:
        self.aws, self.images, self.times, self.real = aws, images, times, real
        variables = aws.environment()
        self.region = variables["AWS_REGION"]
        self.session = boto3.Session(
            variables["AWS_ACCESS_KEY_ID"], variables["AWS_SECRET_ACCESS_KEY"], region_name=self.region
        )
        self.sagemaker, self.s3 = self.client("sagemaker"), self.client("s3")
        self.s3.create_bucket(Bucket=BUCKET)
        iam = self.client("iam")
        trust = statement("sts:AssumeRole", Principal={"Service": "sagemaker.amazonaws.com"})
        self.role = iam.create_role(RoleName="servers", AssumeRolePolicyDocument=trust)["Role"]["Arn"]
        policy = statement(["s3:GetObject", "s3:ListBucket"], Resource="*")
        iam.put_role_policy(RoleName="servers", PolicyName="models", PolicyDocument=policy)
        iam.create_user(UserName="caller")
        policy = statement("sagemaker:InvokeEndpoint", Resource="arn:aws:sagemaker:*:*:endpoint/*")
        iam.put_user_policy(UserName="caller", PolicyName="invoke", PolicyDocument=policy)
        key = iam.create_access_key(UserName="caller")["AccessKey"]
        self.caller = Credentials(key["AccessKeyId"], key["SecretAccessKey"])

    def client(self, service: Any) -> Any:
        """A client of a service, as the account's root."""
        return self.session.client(service, endpoint_url=self.aws.endpoint_url)

    def model(self, version: str, instances: int = INSTANCES, seconds: float = 0.0, broken: bool = False) -> None:
        """A model and the endpoint configuration of the same name; its answers tell the version."""
        environment = {"SECONDS": str(seconds)} | ({"BROKEN": "1"} if broken else {})
        files, image = {"version.txt": version.encode()}, "server"
        if self.real and not broken:
            files, image, environment = colour_model(version), "inference", {"MODEL_VERSION": version}
        self.s3.put_object(Bucket=BUCKET, Key=f"{version}.tar.gz", Body=archive(files))
        self.sagemaker.create_model(
            ModelName=version,
            ExecutionRoleArn=self.role,
            PrimaryContainer={
                "Image": f"local/{image}:1",
                "ModelDataUrl": f"s3://{BUCKET}/{version}.tar.gz",
                "Environment": environment,
            },
        )
        variant = {"VariantName": "AllTraffic", "ModelName": version, "InstanceType": "ml.c5.large"}
        self.sagemaker.create_endpoint_config(
            EndpointConfigName=version, ProductionVariants=[variant | {"InitialInstanceCount": instances}]
        )

    def alarm(self) -> str:
        """An alarm that rings at more than five 5XX answers of the endpoint in ten seconds."""
        self.client("cloudwatch").put_metric_alarm(
            AlarmName="errors",
            Namespace="AWS/SageMaker",
            MetricName="Invocation5XXErrors",
            Dimensions=[{"Name": "EndpointName", "Value": ENDPOINT}, {"Name": "VariantName", "Value": "AllTraffic"}],
            Statistic="Sum",
            Period=10,
            EvaluationPeriods=1,
            Threshold=5,
            ComparisonOperator="GreaterThanThreshold",
            TreatMissingData="notBreaching",
        )
        return "errors"

    async def in_service(self, name: str) -> dict:
        """Waits until the endpoint has come to rest; raises TimeoutError, or RuntimeError if it failed."""
        async with asyncio.timeout(PATIENCE):
            while True:
                found = await asyncio.to_thread(self.sagemaker.describe_endpoint, EndpointName=name)
                if found["EndpointStatus"] == "Failed":
                    raise RuntimeError(f"The endpoint {name} failed: {found['FailureReason']}")
                if found["EndpointStatus"] == "InService":
                    return found
                await asyncio.sleep(0.25)

    async def created(self, name: str, config: str) -> None:
        """Makes an endpoint and waits for it."""
        self.sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=config)
        await self.in_service(name)

    def request(self, endpoint: str) -> Signed:
        """An invocation, signed as the caller."""
        url = f"{self.aws.endpoint_url}/endpoints/{endpoint}/invocations"
        body, content_type = self.payload()
        return Signed(url, body, content_type, self.caller, self.region)

    def payload(self) -> tuple[bytes, str]:
        """The body of a request, and its media type."""
        return (bytes(32 * 32 * 3) if self.real else CROP), "application/x-rgb-crops"

    def servers(self) -> list[psutil.Process]:
        """The instances' processes (of the real server, the first of each)."""
        found = []
        for process in psutil.Process(self.aws.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                command = process.cmdline()
                if len(command) > 2 and command[1].startswith(str(self.images)) and command[2] == "serve":
                    found.append((process, process.ppid()))
        pids = {process.pid for process, _ in found}
        return [process for process, parent in found if parent not in pids]


def statement(actions: str | list[str], **more: Any) -> str:
    """A policy document that allows something."""
    return json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": actions} | more]})


def archive(files: dict[str, bytes]) -> bytes:
    """A tar.gz of files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def colour_model(version: str) -> dict[str, bytes]:
    """An artifact for `inference/`."""
    sys.path.insert(0, str(CHECKOUT / "inference"))
    from tests.makers.models import make_artifact

    with tempfile.TemporaryDirectory() as folder:
        made = make_artifact(Path(folder), model_version=version)
        return {path.name: path.read_bytes() for path in made.iterdir()}


def version_of(body: bytes) -> str:
    """Which model answered."""
    return json.loads(body)["model_version"] if body.startswith(b"{") else body.decode()


async def overhead(account: Account) -> tuple[float, float]:
    """Median seconds of the same request to the server directly, and through the router; one after the other."""
    account.model("idle", instances=1)
    await account.created("idle", "idle")
    (server,) = account.servers()
    processes = [server, *server.children(recursive=True)]
    listening = {c.laddr.port for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    body, content_type = account.payload()
    direct = post(f"http://127.0.0.1:{min(listening)}/invocations", body, {"Content-Type": content_type})
    ways: list[tuple[Client, Callable[[], bytes]]] = [
        (Client(min(listening)), lambda: direct),
        (Client(account.aws.port), account.request("idle")),
    ]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(account.times.comparisons):
        for (client, request), taken in zip(ways, times, strict=True):
            sample = await client.sample(request(), time.perf_counter())
            if sample.status != 200:
                raise RuntimeError(f"The request was answered {sample.status}: {sample.body[:300]!r}")
            taken.append(sample.seconds)
    account.sagemaker.delete_endpoint(EndpointName="idle")
    async with asyncio.timeout(PATIENCE):
        while account.servers():
            await asyncio.sleep(0.1)
    return statistics.median(times[0]), statistics.median(times[1])


class Run:
    """The phases, one after the other, under one load."""

    def __init__(self, account: Account, progress: Progress) -> None:
        self.account, self.progress = account, progress
        self.phases: list[Phase] = []

    @contextlib.asynccontextmanager
    async def phase(self, name: str) -> AsyncIterator[Phase]:
        """A phase, shown while it lasts; it ends a little after what happens in it."""
        phase = Phase(name, time.perf_counter())
        self.phases.append(phase)
        task = self.progress.add_task(name, total=None)
        yield phase
        await asyncio.sleep(self.account.times.after)
        phase.ended = time.perf_counter()
        self.progress.update(task, total=1, completed=1)

    async def update(self, name: str, config: str, routing: dict, alarm: str, rolls_back: bool = False) -> None:
        """An update with traffic shifted so, and what is live afterwards."""
        times = self.account.times
        async with self.phase(name) as phase:
            before = self.account.sagemaker.describe_endpoint(EndpointName=ENDPOINT)["EndpointConfigName"]
            await asyncio.to_thread(
                self.account.sagemaker.update_endpoint,
                EndpointName=ENDPOINT,
                EndpointConfigName=config,
                DeploymentConfig={
                    "BlueGreenUpdatePolicy": {
                        "TrafficRoutingConfiguration": {"WaitIntervalInSeconds": times.wait} | routing,
                        "TerminationWaitInSeconds": times.termination,
                    },
                    "AutoRollbackConfiguration": {"Alarms": [{"AlarmName": alarm}]},
                },
            )
            found = await self.account.in_service(ENDPOINT)
            live = found["EndpointConfigName"]
            phase.note = f"{before} -> {live}" + (f"; {found['FailureReason']}" if "FailureReason" in found else "")
            if live != (before if rolls_back else config):
                phase.wrong = f"{live} is live"

    async def scale(self, name: str, count: int) -> None:
        """Another number of instances."""
        async with self.phase(name) as phase:
            await asyncio.to_thread(
                self.account.sagemaker.update_endpoint_weights_and_capacities,
                EndpointName=ENDPOINT,
                DesiredWeightsAndCapacities=[{"VariantName": "AllTraffic", "DesiredInstanceCount": count}],
            )
            await self.account.in_service(ENDPOINT)
            servers = len(self.account.servers())
            phase.note = f"{servers} instances"
            phase.wrong = "" if servers == count else f"{servers} instances run, not {count}"

    async def kill(self) -> None:
        """SIGKILL for one of the instances."""
        async with self.phase("instance killed") as phase:
            known = {process.pid for process in psutil.Process(self.account.aws.pid).children(recursive=True)}
            before = [server.pid for server in self.account.servers()]
            moment = time.monotonic()
            os.kill(min(before), signal.SIGKILL)
            async with asyncio.timeout(PATIENCE):
                while all(server.pid in known for server in self.account.servers()):
                    await asyncio.sleep(0.1)
            phase.note = f"1 of {len(before)} killed, another started after {time.monotonic() - moment:.1f} s"

    async def all(self) -> None:
        """Every phase."""
        alarm = self.account.alarm()
        step = {"Type": "INSTANCE_COUNT", "Value": 1}
        async with self.phase("steady state"):
            await asyncio.sleep(self.account.times.steady - self.account.times.after)
        await self.update("canary update", "v2", {"Type": "CANARY", "CanarySize": step}, alarm)
        await self.update("linear update", "v3", {"Type": "LINEAR", "LinearStepSize": step}, alarm)
        await self.update("rollback", "broken", {"Type": "CANARY", "CanarySize": step}, alarm, rolls_back=True)
        await self.scale("scale-in, 3 to 2", 2)
        await self.scale("scale-out, 2 to 3", 3)
        await self.kill()


def refused_by_broken_fleet(sample: Sample) -> bool:
    """Whether the answer is the broken fleet's own 500, as the router passes it on."""
    return sample.status == 424 and json.loads(sample.body).get("OriginalMessage") == "broken"


def outcome(phase: Phase, samples: list[Sample]) -> dict:
    """What came of a phase: counts, and latencies in milliseconds."""
    good = sorted(sample.seconds for sample in samples if sample.status == 200) or [float("nan")]
    other = [sample for sample in samples if sample.status != 200]
    failed = [sample for sample in other if phase.name != "rollback" or not refused_by_broken_fleet(sample)]
    return {
        "sent": len(samples),
        "failed": len(failed),
        "refused_by_broken_fleet": len(other) - len(failed),
        "p50_ms": round(1e3 * good[len(good) // 2], 2),
        "p99_ms": round(1e3 * good[int(len(good) * 0.99)], 2),
        "failures": sorted({f"{sample.status} {sample.body[:200]!r}" for sample in failed})[:3],
    }


def shifts(phase: Phase, samples: list[Sample]) -> Iterator[tuple[float, dict[str, float]]]:
    """When the traffic shifted: (seconds into the phase, share by model version), where the shares changed."""
    shown: dict[str, float] = {}
    for second in range(int(phase.ended - phase.began)):
        answered = [
            "broken" if refused_by_broken_fleet(sample) else version_of(sample.body)
            for sample in samples
            if second <= sample.due - phase.began < second + 1 and sample.status in (200, 424)
        ]
        shares = {version: count / len(answered) for version, count in sorted(Counter(answered).items())}
        versions = shares.keys() | shown.keys()
        if any(abs(shares.get(version, 0) - shown.get(version, 0)) > 0.1 for version in versions):
            shown = shares
            yield float(second), shares


async def measure(account: Account, console: Console) -> dict:
    """Runs everything; returns the result."""
    times = account.times
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:

        async def shown(name: str, work: Callable[[], Awaitable[Any]]) -> Any:
            task = progress.add_task(name, total=None)
            result = await work()
            progress.update(task, total=1, completed=1)
            return result

        direct, routed = await shown("router's overhead", lambda: overhead(account))
        for version in ("v1", "v2", "v3"):
            account.model(version, seconds=times.service)
        account.model("broken", seconds=times.service, broken=True)
        await shown(f"endpoint of {INSTANCES} instances", lambda: account.created(ENDPOINT, "v1"))
        client, request = Client(account.aws.port), account.request(ENDPOINT)
        most = await shown("what it can take", lambda: saturate(client, request, 8 * INSTANCES, times.saturation))
        capacity = sum(sample.status == 200 for sample in most) / times.saturation
        run = Run(account, progress)
        async with Load(client, request, capacity / 2) as load:
            await run.all()
    phases = {}
    console.print(
        f"\nRouter: {1e3 * (routed - direct):.2f} ms median overhead ({1e3 * routed:.2f} ms, {1e3 * direct:.2f} ms to "
        f"the server directly; {len(request.body):,} bytes, signed, IAM on).\n"
        f"The endpoint took {capacity:.0f} requests/s; the load was {load.rate:.0f}/s.\n"
    )
    table = Table("phase", "sent", "failed", "p50 ms", "p99 ms", "against steady p99", "when traffic shifted", "note")
    for phase in run.phases:
        samples = [sample for sample in load.samples if phase.began <= sample.due < phase.ended]
        result = phases[phase.name] = outcome(phase, samples)
        result["shifts"] = [
            {"at": at, "shares": {version: round(share, 2) for version, share in shares.items()}}
            for at, shares in shifts(phase, samples)
        ]
        if phase.wrong:
            result["wrong"] = phase.wrong
        own = f" + {result['refused_by_broken_fleet']} by the broken fleet" if phase.name == "rollback" else ""
        moved = "\n".join(
            f"{shift['at']:3.0f} s: " + ", ".join(f"{name} {share:.0%}" for name, share in shift["shares"].items())
            for shift in result["shifts"]
        )
        against = result["p99_ms"] / phases["steady state"]["p99_ms"]
        table.add_row(
            phase.name,
            str(result["sent"]),
            f"{result['failed']}{own}",
            f"{result['p50_ms']:.1f}",
            f"{result['p99_ms']:.1f}",
            f"x {against:.1f}",
            moved,
            phase.wrong or phase.note,
            style="red" if result["failed"] or phase.wrong else "",
        )
    console.print(table)
    failed = [sample for sample in [*most, *load.samples] if sample.status != 200]
    refused = sum(phase["refused_by_broken_fleet"] for phase in phases.values())
    return {
        "benchmark": "endpoint_update",
        "real": account.real,
        "overhead_ms": round(1e3 * (routed - direct), 3),
        "direct_ms": round(1e3 * direct, 3),
        "capacity_per_second": round(capacity, 1),
        "rate_per_second": round(load.rate, 1),
        "sent": len(most) + len(load.samples),
        "failed": len(failed) - refused,
        "refused_by_broken_fleet": refused,
        "phases": phases,
        "ok": len(failed) == refused and routed - direct <= MAX_OVERHEAD and not any(p.wrong for p in run.phases),
    }


def main() -> int:
    """The command."""
    command = argparse.ArgumentParser(
        prog="python -m benchmarks.endpoint_update",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--quick", action="store_true", help="shorter phases: 40 seconds instead of 90")
    command.add_argument("--real", action="store_true", help="serve with inference/ instead of a small server")
    arguments = command.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    with tempfile.TemporaryDirectory(prefix="endpoint-update-") as folder:
        images = Path(folder, "images")
        (images / "server").mkdir(parents=True)
        (images / "server" / "__main__.py").write_text(SERVER)
        (images / "inference").symlink_to(CHECKOUT / "inference")
        environment = {"HOUNDLOOP_IMAGES": str(images), "HOUNDLOOP_PRELOAD": "json"}
        with Emulator(state=Path(folder, "state"), environment=environment) as aws:
            account = Account(aws, images, QUICK if arguments.quick else Times(), arguments.real)
            result = asyncio.run(measure(account, console))
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
