"""Processes of jobs and endpoint servers, as the emulator sees them: start, signal, wait. The warden does the work."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import psutil

from local import processes

from .settings import Settings

logger = logging.getLogger(__name__)
WARDEN = Path(__file__).with_name("warden.py")
MARK = "HOUNDLOOP_SAGEMAKER"  # in the environment of every process here and below: the state folder that it is for
# What a job sees of the emulator's own environment: what it needs to find programs and caches, and no credentials.
INHERITED = (
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "TZ",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "TORCH_HOME",
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
)


def left_behind(state_dir: Path) -> list[psutil.Process]:
    """Every process of jobs and servers for this state folder, whichever emulator started it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # others' processes do not show their environment
            if process.environ().get(MARK) == str(state_dir):
                found.append(process)
    return found


def base_environment() -> dict[str, str]:
    """The variables that every job and server starts from."""
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    # OpenMP's threads wait asleep: here jobs share the cores, and threads that spin take them from those that work.
    own = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return inherited | own


class SpawnError(Exception):
    """The process could not be started."""


class Process:
    """One process group, known by its leader."""

    def __init__(self, owner: Processes, log: Path) -> None:
        self.id = uuid.uuid4().hex
        self.pid = 0
        self.log = log
        self._owner = owner
        loop = asyncio.get_running_loop()
        self.started: asyncio.Future[int] = loop.create_future()
        self.ended: asyncio.Future[int] = loop.create_future()

    @property
    def running(self) -> bool:
        """Whether the leader has not ended."""
        return not self.ended.done()

    async def wait(self) -> int:
        """The exit code; negative is the signal that ended it."""
        return await asyncio.shield(self.ended)

    def signal(self, number: int) -> None:
        """Signals the whole group; nothing if it has ended."""
        if self.running:
            self._owner.send({"signal": self.id, "number": int(number)})

    async def stop(self, grace: float) -> int:
        """SIGTERM, `grace` seconds, SIGKILL. Returns the exit code."""
        self.signal(signal.SIGTERM)
        try:
            return await asyncio.wait_for(self.wait(), grace)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            return await self.wait()


class Processes:
    """Every process of this emulator. The warden starts with the first of them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._known: dict[str, Process] = {}
        self._warden: subprocess.Popen | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reader_task: asyncio.Task | None = None
        self._starting = asyncio.Lock()
        self._closed = False

    async def spawn(self, argv: list[str], env: dict[str, str], cwd: Path, log: Path, preload: bool = False) -> Process:
        """Starts a process group whose output is appended to `log`; raises SpawnError.

        `preload` runs a Python script in an interpreter that has the usual modules imported already.
        """
        if self._closed:
            raise SpawnError("the local AWS is stopping")
        async with self._starting:
            if self._warden is None:
                await self._start_warden()
        process = Process(self, log)
        self._known[process.id] = process
        env = env | {MARK: str(self.settings.state_dir)}
        log.parent.mkdir(parents=True, exist_ok=True)
        self.send({"spawn": process.id, "argv": argv, "env": env, "cwd": str(cwd), "log": str(log), "preload": preload})
        try:
            process.pid = await process.started
        except asyncio.CancelledError:
            process.signal(signal.SIGKILL)  # obeyed after the spawn, so nobody's process is left running
            raise
        return process

    async def _start_warden(self) -> None:
        ours, theirs = socket.socketpair()
        environment = base_environment() | {
            "OMP_NUM_THREADS": str(self.settings.threads_per_job),
            MARK: str(self.settings.state_dir),  # a forked job shows the environment that the warden began with
        }
        self._warden = subprocess.Popen(
            [sys.executable, str(WARDEN), str(theirs.fileno()), ",".join(self.settings.preload)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._reader_task = asyncio.create_task(self._listen(reader))

    def send(self, message: dict) -> None:
        """Tells the warden; nothing if it has gone, because its processes went with it."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                self._heard(json.loads(line))
        self._warden_gone()

    def _heard(self, message: dict) -> None:
        if (identity := message.get("started")) and (process := self._known.get(identity)):
            _settle(process.started, message["pid"])
        elif (identity := message.get("failed")) and (process := self._known.pop(identity, None)):
            _settle(process.started, SpawnError(message["reason"]))
        elif (identity := message.get("exited")) and (process := self._known.pop(identity, None)):
            _settle(process.ended, message["code"])

    def _warden_gone(self) -> None:
        """The warden died, or was told to end: so did every process. What is asked for next gets a new warden."""
        if self._warden is not None and self._known:
            logger.warning("the parent of the SageMaker jobs ended; %d processes ended with it", len(self._known))
        if self._warden is not None:
            self._warden.poll()
        for process in self._known.values():
            if process.pid:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
            _settle(process.started, SpawnError("the parent of the jobs ended"))
            _settle(process.ended, -signal.SIGKILL)
        self._known.clear()
        self._warden, self._writer = None, None
        self.end_left_behind()

    def end_left_behind(self) -> None:
        """Ends what an earlier emulator or warden could not, because it was killed. Not while a warden is at work."""
        if orphans := left_behind(self.settings.state_dir):
            logger.warning("ending %d processes that an earlier run left behind", len(orphans))
            processes.end(orphans)

    def close(self) -> None:
        """Stops every process and waits for it, whether or not an event loop still runs. May be called twice."""
        self._closed = True
        warden, self._warden = self._warden, None
        if warden is None:
            return
        with contextlib.suppress(ProcessLookupError):
            warden.send_signal(signal.SIGTERM)
        try:
            warden.wait(10)
        except subprocess.TimeoutExpired:
            for process in self._known.values():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
            warden.kill()
            warden.wait()


def _settle(future: asyncio.Future, result: int | SpawnError) -> None:
    if not future.done():
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            if isinstance(result, SpawnError):
                future.set_exception(result)
            else:
                future.set_result(result)
