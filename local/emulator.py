"""Starting and stopping AWS on this machine.

    with Emulator() as aws:
        s3 = boto3.client("s3", endpoint_url=aws.endpoint_url)

The emulator is a child process in a session of its own. It ends with everything it started (functions, jobs,
endpoints) when it is stopped, and also when the process that started it is interrupted or killed.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

from local import objects, processes
from local.sagemaker.processes import left_behind

CHECKOUT = Path(__file__).resolve().parent.parent
STATE = CHECKOUT / ".houndloop"
HOST = "127.0.0.1"
REGION = "us-east-1"
ACCOUNT = "000000000000"
START_SECONDS = 60.0
STOP_SECONDS = 12.0  # a little more than the emulator gives itself
GONE_SECONDS = 1.0  # until the kernel has taken away a process that was killed, and its lock


class EmulatorError(Exception):
    """The emulator could not be started. The text is one sentence for the user."""


def free_port() -> int:
    """A port that is free on 127.0.0.1 at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    """Refuse a port that the emulator could not listen on.

    Raises:
        EmulatorError: it is taken, not allowed, or no port at all.
    """
    if not 0 < port < 65536:
        raise EmulatorError(f"{port} is not a port: set PORT (or --port) to a number from 1024 to 65535.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except PermissionError:
            raise EmulatorError(f"Port {port} needs privileges: set PORT (or --port) to one from 1024 up.") from None
        except OSError:
            raise EmulatorError(
                f"Port {port} on {HOST} is already in use: stop what listens there (a demo that was kept: make down), "
                f"or set PORT (or --port) to another port, such as {free_port()}."
            ) from None


class Emulator:
    """AWS on this machine, from `start()` to `stop()`, or as a context manager.

    Args:
        port: where to listen on 127.0.0.1; any free port by default.
        state: the folder for everything that it writes (`.houndloop` in the checkout); logs in `emulator.log`.
        auth: whether IAM policies are enforced.
        keep: whether what an earlier emulator saved in `state` is loaded, and this one's state saved, as it goes: a
            kill costs its last second. Otherwise it begins with an empty account.
        environment: more environment variables for the process.
    """

    def __init__(
        self,
        port: int | None = None,
        state: Path = STATE,
        auth: bool = True,
        keep: bool = False,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.port = port or 0
        self.state = Path(state).resolve()
        self.auth = auth
        self.keep = keep
        self.more_environment = environment or {}
        self.log = self.state / "emulator.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint_url(self) -> str:
        """The one URL of all services."""
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """The emulator's process id.

        Raises:
            EmulatorError: it is not running.
        """
        if self._process is None:
            raise EmulatorError("The emulator is not running: call start() first.")
        return self._process.pid

    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def environment(self) -> dict[str, str]:
        """The variables with which boto3, the aws command line and sam speak to this emulator and to nothing else."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_PAGER": "",
            "SAM_CLI_TELEMETRY": "0",
        }

    def start(self) -> Emulator:
        """Start the process and wait until it answers.

        Raises:
            EmulatorError: the port or the state folder is taken, or the process ended or did not answer (with the
                end of its log).
        """
        if self._process is not None:
            raise EmulatorError(f"The emulator is already running at {self.endpoint_url}.")
        if self.port:
            check_port(self.port)
        else:
            self.port = free_port()
        with self._lock_state(GONE_SECONDS) as lock:
            self._prepare_state()
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "local.server"],
                    cwd=CHECKOUT,
                    env=self._process_environment(),
                    stdin=subprocess.PIPE,  # closes when this process ends, which ends the emulator
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=[lock.fileno()],  # holds the lock for as long as it lives
                )
        atexit.register(self.stop)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop the emulator and everything below it; nothing happens if it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.stop)
        below = processes.descendants(process.pid)
        if process.stdin:
            with contextlib.suppress(OSError):
                process.stdin.close()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            # Whatever did not go with it: after a kill, or because it was started at the last moment.
            processes.end([*below, *_session(process.pid), *left_behind(self.state / "sagemaker")])
            with contextlib.suppress(EmulatorError), self._lock_state():  # the next one may have the folder by now
                # The logs stay: whoever looks for why something failed looks after it ended.
                self._remove(*(("tmp",) if self.keep else ("tmp", "state", "s3", "sagemaker/models")))

    def __enter__(self) -> Emulator:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _lock_state(self, patience: float = 0.0) -> IO[bytes]:
        """Take the state folder: two emulators in one would delete each other's files.

        Raises:
            EmulatorError: another emulator has it, for longer than `patience` seconds.
        """
        self.state.mkdir(parents=True, exist_ok=True)
        lock = (self.state / "lock").open("ab")
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except OSError:
                if time.monotonic() >= deadline:
                    lock.close()
                    raise EmulatorError(
                        f"Another emulator runs with its state in {self.state}: stop it first (Ctrl-C, or `make down`)."
                    ) from None
            time.sleep(0.05)

    def _remove(self, *folders: str) -> None:
        for folder in folders:
            shutil.rmtree(self.state / folder, ignore_errors=True)

    def _prepare_state(self) -> None:
        self._remove(*(("tmp",) if self.keep else ("tmp", "state", "s3", "sagemaker")))
        for folder in ("tmp", "state", "s3"):
            (self.state / folder).mkdir(parents=True, exist_ok=True)
        objects.recover(self.state / "s3")

    def _process_environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "SAM_CLI_"))}
        keep = "1" if self.keep else "0"
        environment.update(
            {
                "GATEWAY_PORT": str(self.port),
                "BIND_HOST": HOST,
                "MINISTACK_HOST": HOST,  # in the URLs of queues
                "IOT_MTLS_ENABLED": "0",
                "SFTP_ENABLED": "0",
                "AUTH": "true" if self.auth else "false",
                "PERSIST_STATE": keep,
                "STATE_DIR": str(self.state / "state"),
                "S3_PERSIST": keep,
                "S3_DATA_DIR": str(self.state / "s3"),
                "HOUNDLOOP_STATE_DIR": str(self.state),
                "TMPDIR": str(self.state / "tmp"),  # code of functions, too, is unpacked there
                "DOCKER_HOST": f"unix://{self.state / 'no-container-engine'}",  # ministack cleans up containers
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": REGION,
                "AWS_EC2_METADATA_DISABLED": "true",
                "BOTO_DISABLE_CRT": "true",  # Lambda has no awscrt, which would hash what is sent 4 KB at a time
                "PYTHONUNBUFFERED": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")])),
            }
        )
        environment.update(self.more_environment)
        return environment

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise EmulatorError(
                    f"The emulator ended while it started, with status {self._process.returncode}:\n{tail(self.log)}"
                )
            try:
                with urllib.request.urlopen(f"{self.endpoint_url}/_ministack/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise EmulatorError(f"The emulator did not answer within {START_SECONDS:.0f} seconds:\n{tail(self.log)}")


def tail(path: Path, lines: int = 25) -> str:
    """The last lines of a log, with its path."""
    try:
        text = path.read_text(errors="replace").splitlines()[-lines:]
    except OSError:
        text = ["(no log)"]
    return "\n".join([*text, f"(whole log: {path})"])


def _session(leader: int) -> list[psutil.Process]:
    """The processes of a session whose leader may be gone already."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if process.pid != leader and os.getsid(process.pid) == leader:
                members.append(process)
    return members
