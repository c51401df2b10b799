"""Serving instances: one server process each, started, watched, started again, drained and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from collections import deque
from pathlib import Path

from .connections import BrokenAnswer, Connection, NotReached
from .container import last_lines
from .jobs import LogFollower, Work
from .processes import Process, SpawnError, base_environment
from .settings import INVOCATION_TIMEOUT, LOCAL_IMAGE

logger = logging.getLogger(__name__)
PING_TIMEOUT = 2.0  # seconds a container has to answer /ping, AWS's limit
PING_INTERVAL = 0.2  # seconds between health checks of a starting instance
HEALTH_INTERVAL = 5.0  # seconds between health checks of an instance that serves
FAILED_PINGS = 6  # one after the other, before an instance that serves counts as dead: half a minute
RESTART_DELAY = 0.5  # seconds before a dead instance is started again; doubled each time, up to the limit
RESTART_DELAY_LIMIT = 60.0
DEATH_NOTICE = 1.0  # seconds after a connection broke within which the end of its process would be known
STARTS_BEFORE_FAILURE = 3  # ends before the first 200 of /ping after which a fleet is given up; later it never is
SERVER_GRACE = 30.0  # seconds between SIGTERM and SIGKILL of a server
MODEL = "/opt/ml/model"  # where a container finds its model
LAST_LINES, LAST_CHARACTERS = 8, 700  # of a log, in a reason: the end matters, and FailureReason has a limit


class InstanceDied(Exception):
    """The server's process ended before it had answered anything of the request."""


class HealthError(Exception):
    """An instance did not become healthy; the text is the reason."""


class Instance:
    """One server process, kept alive until it is stopped. `cwd` is the folder of its model."""

    def __init__(
        self, work: Work, argv: list[str], env: dict[str, str], folder: Path, log_group: str, stream: str, cwd: Path
    ) -> None:
        self.work, self.argv, self.env, self.cwd = work, argv, env, cwd
        self.log = folder / f"{stream.replace('/', '-')}.log"
        self.log_group, self.stream = log_group, stream
        self.ready = False
        self.in_flight = 0
        self.failure = ""
        self._port = 0
        self._process: Process | None = None
        self._idle: deque[Connection] = deque()
        self._served = False  # whether it ever was healthy
        self._stopping = asyncio.Event()
        self._task: asyncio.Task | None = None

    def start(self) -> None:
        """Starts the server and keeps it running, in the background."""
        self._task = self.work.start(self._keep_alive())

    async def _keep_alive(self) -> None:
        delay, starts = RESTART_DELAY, 0
        async with LogFollower(self.log, self.log_group, self.stream):
            while not self._stopping.is_set():
                starts += 1
                self._port = free_port()
                env = self.env | {"SAGEMAKER_BIND_TO_PORT": str(self._port)}
                try:
                    self._process = await self.work.processes.spawn(self.argv, env, self.cwd, self.log)
                except SpawnError as error:
                    if not self._served:
                        self.failure = str(error)
                        return
                    logger.warning("%s could not be started again yet: %s", self.stream, error)
                    delay = await self._pause(delay)
                    continue
                if self._stopping.is_set():
                    await self._process.stop(SERVER_GRACE)
                    return
                began = time.monotonic()
                watching = asyncio.create_task(self._watch(self._process))
                try:
                    code = await self._process.wait()
                finally:
                    watching.cancel()
                self.ready = False
                self._forget_connections()
                if self._stopping.is_set():
                    return
                logger.warning("%s ended with code %d; starting it again", self.stream, code)
                if not self._served and starts >= STARTS_BEFORE_FAILURE:
                    self.failure = f"it ended {starts} times before it was healthy, the last time with code {code}"
                    return
                if time.monotonic() - began > RESTART_DELAY_LIMIT:
                    delay = RESTART_DELAY
                delay = await self._pause(delay)

    async def _pause(self, seconds: float) -> float:
        """Waits so long before the next start, or until there shall be none. Returns the seconds of the next pause."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
        return min(RESTART_DELAY_LIMIT, seconds * 2)

    async def healthy(self, deadline: float, variant: str) -> None:
        """Waits until /ping answers 200; raises HealthError when the time (of time.monotonic) has come."""
        while not self.ready:
            if self.failure or time.monotonic() > deadline:
                lines = last_lines(self.log, LAST_LINES)
                raise HealthError(
                    f"The primary container for production variant {variant} did not pass the ping health check. "
                    "Please check CloudWatch logs for this endpoint."
                    + (f" ({self.failure})" if self.failure else "")
                    + (" Last lines of its log: " + " | ".join(lines)[-LAST_CHARACTERS:] if lines else "")
                )
            await asyncio.sleep(0.05)

    async def _watch(self, process: Process) -> None:
        """Pings until the server is ready, and then for as long as it runs: one that hangs is ended, to be replaced."""
        failed = 0
        while process.running:
            if await self._ping():
                failed, self.ready, self._served = 0, not self._stopping.is_set(), True
            else:
                failed += 1
            if self.ready and failed >= FAILED_PINGS:
                logger.warning("%s answered none of %d pings; starting it again", self.stream, failed)
                self.ready = False
                await process.stop(SERVER_GRACE)
                return
            await asyncio.sleep(HEALTH_INTERVAL if self.ready else PING_INTERVAL)

    async def _ping(self) -> bool:
        status = 0
        with contextlib.suppress(NotReached, BrokenAnswer, TimeoutError):
            async with asyncio.timeout(PING_TIMEOUT):
                connection = await Connection.open(self._port)
                try:
                    status, *_ = await connection.request("GET", "/ping", {"Connection": "close"}, b"")
                finally:
                    connection.close()
        return status == 200

    def _forget_connections(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def invoke(self, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        """POST /invocations; raises NotReached, InstanceDied, BrokenAnswer or TimeoutError."""
        self.in_flight += 1
        process = self._process
        connection: Connection | None = None
        keep = False
        try:
            async with asyncio.timeout(INVOCATION_TIMEOUT):
                while self._idle and connection is None:
                    candidate = self._idle.pop()
                    if candidate.usable:
                        connection = candidate
                    else:
                        candidate.close()
                if connection is None:
                    connection = await Connection.open(self._port)
                status, answer_headers, answer, keep = await connection.request("POST", "/invocations", headers, body)
            return status, answer_headers, answer
        except BrokenAnswer as error:
            if process is not None and not error.began:
                await asyncio.wait([process.ended], timeout=DEATH_NOTICE)
                if not process.running:
                    raise InstanceDied(str(error)) from error
            raise
        finally:
            self.in_flight -= 1
            if connection is not None:
                if keep and self.ready:
                    self._idle.append(connection)
                    while self._idle and not self._idle[0].usable:  # left from when more were needed
                        self._idle.popleft().close()
                else:
                    connection.close()

    async def stop(self, drain: float) -> None:
        """Takes no more requests, lets those in flight end (`drain` seconds at most), ends the process."""
        self._stopping.set()
        self.ready = False
        deadline = time.monotonic() + drain
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._forget_connections()
        if self._process is not None and self._process.running:
            await self._process.stop(SERVER_GRACE)
        if self._task is not None:
            await asyncio.wait({self._task})
        self.log.unlink(missing_ok=True)  # CloudWatch Logs has it all


def serving_command(image: str, checkout: Path) -> list[str]:
    """`serve` of a local image."""
    match = LOCAL_IMAGE.match(image)
    if match is None:
        raise HealthError(f"The image {image!r} cannot be run here.")
    return [sys.executable, str(checkout / match["folder"]), "serve"]


def serving_environment(
    container: dict, model: Path, role_environment: dict[str, str], instances: int
) -> dict[str, str]:
    """The environment of a server, but for its port. Paths below `MODEL` are below the folder of the unpacked model."""
    threads = max(1, (os.cpu_count() or 1) // max(1, instances))
    own = {
        name: str(model) + value.removeprefix(MODEL) if f"{value}/".startswith(f"{MODEL}/") else value
        for name, value in container.get("Environment", {}).items()
    }
    return (
        base_environment()
        | role_environment
        | {"OMP_NUM_THREADS": str(threads)}
        | own
        | {"MODEL_DIR": own.get("MODEL_DIR", str(model))}
    )


_given_out: deque[int] = deque(maxlen=500)


def free_port() -> int:
    """A port of 127.0.0.1 that is free now, and was not given out lately: a server may be about to take it."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port not in _given_out:
            _given_out.append(port)
            return port
