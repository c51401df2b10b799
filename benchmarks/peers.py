"""The servers that are compared, each as its users would set it up, started and stopped one at a time."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.environments import environment
from local.emulator import CHECKOUT

SERVERS = Path(__file__).parent / "servers"
PATIENCE = 90.0  # seconds for a server to come up
BOUNDARY = "picture-1f0c3f7a"


@dataclass(frozen=True)
class Server:
    """How a server is run. `command` is made of its environment's python, a folder of its own, the port and workers."""

    name: str
    precision: str
    requirements: str
    command: Callable[[Path, Path, int, int], list[str]]
    path: str = "/invocations"
    torch: bool = True
    form: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[Path, Path, Path, int, int], None] | None = None

    @property
    def kind(self) -> str:
        """The name of its environment."""
        return self.name.split(",")[0].lower()

    @property
    def content_type(self) -> str:
        return f"multipart/form-data; boundary={BOUNDARY}" if self.form else "image/jpeg"

    def body(self, picture: bytes) -> bytes:
        """The request's body."""
        if not self.form:
            return picture
        disposition = 'Content-Disposition: form-data; name="picture"; filename="picture.jpg"'
        head = f"--{BOUNDARY}\r\n{disposition}\r\nContent-Type: image/jpeg\r\n\r\n"
        return head.encode() + picture + f"\r\n--{BOUNDARY}--\r\n".encode()

    def python(self) -> Path:
        """Its environment's python, which is made where there is none."""
        return environment(self.kind, self.requirements, self.torch)


def ours(precision: str, artifact: Path) -> Server:
    def command(python: Path, folder: Path, port: int, workers: int) -> list[str]:
        words = [str(python), str(CHECKOUT / "inference"), "serve", "--model-dir", str(artifact)]
        return [*words, "--port", str(port), "--workers", str(workers)]

    text = (CHECKOUT / "inference" / "requirements.txt").read_text()
    environment = {"PRECISION": precision, "MALLOC_ARENA_MAX": "1"}  # the latter as in the image
    return Server(f"Houndloop, {precision}", precision, text, command, torch=False, environment=environment)


def fastapi(torch: str = "eager") -> Server:
    def command(python: Path, folder: Path, port: int, workers: int) -> list[str]:
        words = [str(python), "-m", "uvicorn", "fastapi_server:app", "--port", str(port), "--workers", str(workers)]
        return [*words, "--no-access-log", "--log-level", "warning"]

    name = "FastAPI" if torch == "eager" else f"FastAPI, {torch}"
    return Server(name, "f32", requirements("fastapi"), command, environment={"TORCH": torch})


def litserve() -> Server:
    def command(python: Path, folder: Path, port: int, workers: int) -> list[str]:
        return [str(python), str(SERVERS / "litserve_server.py"), str(port), str(workers)]

    return Server("LitServe", "f32", requirements("litserve"), command, form=True)


def bentoml() -> Server:
    def command(python: Path, folder: Path, port: int, workers: int) -> list[str]:
        words = [str(python), "-m", "bentoml", "serve", "bentoml_server:Pictures", "--host", "127.0.0.1"]
        return [*words, "--port", str(port), "--working-dir", str(SERVERS)]

    # It looks for newer versions and reports its use otherwise.
    quiet = {"BENTOML_DO_NOT_TRACK": "True", "DO_NOT_TRACK": "1"}
    return Server("BentoML", "f32", requirements("bentoml"), command, environment=quiet)


def torchserve() -> Server:
    def prepare(python: Path, folder: Path, artifact: Path, port: int, workers: int) -> None:
        """The archive, and a configuration of as many workers as there are cores."""
        (folder / "store").mkdir()
        files = ",".join(map(str, (SERVERS / "classifier.py", artifact / "weights.pt", artifact / "classes.json")))
        archive = [str(python.parent / "torch-model-archiver"), "--model-name", "resnet", "--version", "1"]
        archive += ["--handler", str(SERVERS / "torchserve_handler.py"), "--extra-files", files]
        done = subprocess.run(
            [*archive, "--export-path", str(folder / "store")], capture_output=True, text=True, cwd=folder
        )
        if done.returncode:
            raise RuntimeError(f"TorchServe's model archive could not be made: {done.stderr[-1500:]}")
        settings = {
            "inference_address": f"http://127.0.0.1:{port}",
            "management_address": f"http://127.0.0.1:{free_port()}",
            "metrics_address": f"http://127.0.0.1:{free_port()}",
            "default_workers_per_model": workers,
            "job_queue_size": 1000,
            "disable_system_metrics": "true",
            "model_store": folder / "store",
            "load_models": "resnet.mar",
        }
        (folder / "config.properties").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))

    def command(python: Path, folder: Path, port: int, workers: int) -> list[str]:
        words = [str(python.parent / "torchserve"), "--start", "--foreground", "--ncs", "--disable-token-auth"]
        return [*words, "--ts-config", str(folder / "config.properties")]

    return Server(
        "TorchServe", "f32", requirements("torchserve"), command, path="/predictions/resnet", prepare=prepare
    )  # fmt: skip


def requirements(name: str) -> str:
    return (SERVERS / f"{name}.txt").read_text()


def missing_java() -> str:
    """Why TorchServe cannot run here; empty if it can."""
    if shutil.which("java") is None:
        return "TorchServe needs a Java runtime, and there is no java: apt-get install openjdk-17-jre-headless"
    return ""


class Running:
    """A server's processes."""

    def __init__(self, process: subprocess.Popen[bytes], server: Server, port: int, log: Path) -> None:
        self.process, self.server, self.port, self.log = process, server, port, log
        self.url = f"http://127.0.0.1:{port}{server.path}"
        self.start_seconds = 0.0

    def tree(self) -> list[psutil.Process]:
        """All that live."""
        return tree(self.process.pid)

    def ask(self, picture: bytes) -> list[tuple[str, float]]:
        """What it answers about a picture: (class, probability), the likeliest first. Raises RuntimeError."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            headers = {"Content-Type": self.server.content_type}
            connection.request("POST", self.server.path, self.server.body(picture), headers)
            response = connection.getresponse()
            body = response.read()
        if response.status != 200:
            raise RuntimeError(f"{self.server.name} answers {response.status}: {body[:500]!r}; see {self.log}")
        (prediction,) = json.loads(body)["predictions"]
        return [(row["class"], float(row["probability"])) for row in prediction["classes"]]

    def wait(self, picture: bytes) -> None:
        """Until it answers about a picture. Raises RuntimeError when it ends, or does not in time."""
        began = time.monotonic()
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.server.name} ended with {self.process.returncode}: {tail(self.log)}")
            try:
                self.ask(picture)
                break
            except (OSError, http.client.HTTPException, RuntimeError, ValueError) as error:
                if time.monotonic() - began > PATIENCE:
                    raise RuntimeError(f"{self.server.name} is not up after {PATIENCE:.0f} s: {error}") from error
                time.sleep(0.1)
        self.start_seconds = time.monotonic() - began


@contextlib.contextmanager
def running(
    server: Server, artifact: Path, folder: Path, cores: Sequence[int], picture: bytes
) -> Iterator[Running]:  # fmt: skip
    """The server with a worker for each of these cores, ready; all its processes are gone afterwards."""
    python = server.python()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    port, workers = free_port(), len(cores)
    if server.prepare:
        server.prepare(python, folder, artifact, port, workers)
    own = {
        "CLASSIFIER": str(artifact),
        "WORKERS": str(workers),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": str(SERVERS),
        "LOG_LOCATION": str(folder / "logs"),  # TorchServe's
        "METRICS_LOCATION": str(folder / "logs"),
        "TMPDIR": str(folder),
        "HOME": str(folder),  # BentoML writes to it
    }
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            server.command(python, folder, port, workers),
            cwd=SERVERS if server.torch and not server.prepare else folder,
            env=os.environ | own | server.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    found = Running(process, server, port, log)
    try:
        found.wait(picture)
        yield found
    finally:
        stop(process)


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that are below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a server with all its processes: in order, if they do so in time."""
    members = tree(process.pid)
    process.terminate()
    _, alive = psutil.wait_procs(members, timeout=15)
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    with contextlib.suppress(ProcessLookupError):  # what was handed to another parent meanwhile
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(alive, timeout=5)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:]


@dataclass(frozen=True)
class Footprint:
    """Processor seconds so far and bytes of memory of a tree of processes; shared pages count once."""

    seconds: float
    memory: int

    @classmethod
    def of(cls, members: list[psutil.Process]) -> Footprint:
        seconds, memory = 0.0, 0
        for member in members:
            with contextlib.suppress(psutil.Error):
                times = member.cpu_times()
                seconds += times.user + times.system
                full = member.memory_full_info()
                memory += getattr(full, "pss", None) or full.uss  # where there is no PSS, what is shared is left out
        return cls(seconds, memory)
