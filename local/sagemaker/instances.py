"""Serving instances: one server process each, the connections to it, and the fleets they form."""

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
from typing import Any

from .container import last_lines
from .jobs import LogFollower, Work
from .processes import Process, SpawnError, base_environment
from .settings import INVOCATION_TIMEOUT, LOCAL_IMAGE

logger = logging.getLogger(__name__)
PING_INTERVAL = 0.2  # seconds between health checks of a starting instance
RESTART_DELAY = 0.5  # seconds before a dead instance is started again; doubled each time, up to a minute
IDLE_LIMIT = 2.0  # seconds a connection may lie idle: less than any server's keep-alive, so none is found closed
STARTS_BEFORE_FAILURE = 3  # ends before the first 200 of /ping after which a fleet is given up; later it never is


class NotReached(Exception):
    """No connection to the server could be made: it has seen nothing of the request."""


class BrokenAnswer(Exception):
    """The connection broke after the request was sent: the server may have acted on it."""


class HealthError(Exception):
    """An instance did not become healthy; the text is the reason."""


class Connection:
    """One keep-alive HTTP/1.1 connection to a server on 127.0.0.1."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.idle_since = time.monotonic()

    @classmethod
    async def open(cls, port: int) -> Connection:
        """Connects; raises NotReached."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        except OSError as error:
            raise NotReached(str(error)) from error
        return cls(reader, writer)

    @property
    def usable(self) -> bool:
        """Whether it may carry another request: not closed by the server, and not idle so long that it may be."""
        fresh = time.monotonic() - self.idle_since < IDLE_LIMIT
        return fresh and not self.reader.at_eof() and not self.writer.is_closing()

    async def request(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict, bytes, bool]:
        """One exchange: (status, headers in lower case, body, whether the connection may be kept)."""
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        try:
            self.writer.write("\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n")
            self.writer.write(body)
            await self.writer.drain()
            return await self._answer()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
            raise BrokenAnswer(f"{type(error).__name__}: {error}") from error

    async def _answer(self) -> tuple[int, dict, bytes, bool]:
        status = 100
        while 100 <= status < 200:
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *rest = head.rstrip("\r\n").split("\r\n")
            version, code, *_ = first.split(" ", 2)
            status = int(code)
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
        keep = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        if "chunked" in headers.get("transfer-encoding", "").lower():
            body = b""
            while size := int((await self.reader.readline()).split(b";")[0], 16):
                body += await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            while (await self.reader.readline()).strip():
                pass
        elif "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        elif status in (204, 304):
            body = b""
        else:
            body, keep = await self.reader.read(), False
        self.idle_since = time.monotonic()
        return status, headers, body, keep

    def close(self) -> None:
        """Closes without waiting."""
        self.writer.close()


class Instance:
    """One server process, kept alive until it is stopped."""

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
        self._stopping = False
        self._task: asyncio.Task | None = None

    def start(self) -> None:
        """Starts the server and keeps it running, in the background."""
        self._task = self.work.start(self._keep_alive())

    async def _keep_alive(self) -> None:
        delay, starts, served = RESTART_DELAY, 0, False
        async with LogFollower(self.log, self.log_group, self.stream):
            while not self._stopping:
                starts += 1
                self._port = free_port()
                env = self.env | {"SAGEMAKER_BIND_TO_PORT": str(self._port)}
                try:
                    self._process = await self.work.processes.spawn(self.argv, env, self.cwd, self.log)
                except SpawnError as error:
                    self.failure = str(error)
                    return
                began = time.monotonic()
                pinging = asyncio.create_task(self._ping_until_ready(self._process))
                try:
                    code = await self._process.wait()
                finally:
                    pinging.cancel()
                served, self.ready = served or self.ready, False
                self._forget_connections()
                if self._stopping:
                    return
                logger.warning("%s ended with code %d; starting it again", self.stream, code)
                if not served and starts >= STARTS_BEFORE_FAILURE:
                    self.failure = f"it ended {starts} times before it was healthy, the last time with code {code}"
                    return
                if time.monotonic() - began > 60:
                    delay = RESTART_DELAY
                await asyncio.sleep(delay)
                delay = min(60.0, delay * 2)

    def last_words(self) -> str:
        """The end of the server's log, to go with a reason."""
        lines = last_lines(self.log, 8)
        return " Last lines of its log: " + " | ".join(lines) if lines else ""

    async def _ping_until_ready(self, process: Process) -> None:
        while process.running:
            with contextlib.suppress(NotReached, BrokenAnswer, TimeoutError):
                async with asyncio.timeout(2):  # AWS's limit for an answer to /ping
                    connection = await Connection.open(self._port)
                    try:
                        status, *_ = await connection.request("GET", "/ping", {"Connection": "close"}, b"")
                    finally:
                        connection.close()
                if status == 200:
                    self.ready = True
                    return
            await asyncio.sleep(PING_INTERVAL)

    def _forget_connections(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def invoke(self, headers: dict[str, str], body: bytes) -> tuple[int, dict, bytes]:
        """POST /invocations; raises NotReached, BrokenAnswer or TimeoutError."""
        self.in_flight += 1
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
        finally:
            self.in_flight -= 1
            if connection is not None:
                if keep and self.ready:
                    self._idle.append(connection)
                else:
                    connection.close()

    async def stop(self, drain: float, grace: float) -> None:
        """Takes no more requests, lets those in flight end (`drain` seconds at most), ends the process."""
        self._stopping, self.ready = True, False
        deadline = time.monotonic() + drain
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._forget_connections()
        if self._process is not None and self._process.running:
            await self._process.stop(grace)
        if self._task is not None:
            # It may be between two starts: it sees `_stopping` only after its pause.
            done, _ = await asyncio.wait({self._task}, timeout=0.5)
            if not done:
                self._task.cancel()
            if self._process is not None and self._process.running:
                await self._process.stop(grace)


class Variant:
    """The instances of one production variant, and the share of the fleet's requests that goes to it."""

    def __init__(self, definition: dict, instances: list[Instance]) -> None:
        self.name = definition["VariantName"]
        self.weight = float(definition.get("InitialVariantWeight", 1.0))
        self.serverless = definition.get("ServerlessConfig")
        self.instances = instances
        self.concurrent = 0
        self.credit = 0.0  # of the smooth weighted round robin
        self._turn = 0

    def candidates(self) -> list[Instance]:
        """Ready instances, the one whose turn it is first."""
        ready = [instance for instance in self.instances if instance.ready]
        self._turn += 1
        turn = self._turn % len(ready) if ready else 0
        return ready[turn:] + ready[:turn]


class Fleet:
    """Every variant of one endpoint configuration, at work."""

    def __init__(self, config_name: str, variants: list[Variant]) -> None:
        self.config_name = config_name
        self.variants = variants
        self.credit = 0.0

    @property
    def instances(self) -> list[Instance]:
        """All of them."""
        return [instance for variant in self.variants for instance in variant.instances]

    def start(self) -> None:
        """Starts every instance."""
        for instance in self.instances:
            instance.start()

    async def healthy(self, timeout: float) -> None:
        """Waits until every instance answers /ping with 200; raises HealthError."""
        deadline = time.monotonic() + timeout
        for variant in self.variants:
            for instance in variant.instances:
                while not instance.ready:
                    if instance.failure or time.monotonic() > deadline:
                        raise HealthError(
                            f"The primary container for production variant {variant.name} did not pass the ping "
                            "health check. Please check CloudWatch logs for this endpoint."
                            + (f" ({instance.failure})" if instance.failure else "")
                            + instance.last_words()
                        )
                    await asyncio.sleep(0.05)

    async def stop(self, drain: float, grace: float) -> None:
        """Drains and ends every instance, side by side."""
        await asyncio.gather(*(instance.stop(drain, grace) for instance in self.instances))


def serving_command(image: str, checkout: Path) -> list[str]:
    """`serve` of a local image."""
    match = LOCAL_IMAGE.match(image)
    if match is None:
        raise HealthError(f"The image {image!r} cannot be run here.")
    return [sys.executable, str(checkout / match["folder"]), "serve"]


def serving_environment(
    container: dict, model: Path, role_environment: dict[str, str], instances: int
) -> dict[str, str]:
    """The environment of a server, but for its port. `/opt/ml/model` is the folder where the model was unpacked."""
    threads = max(1, (os.cpu_count() or 1) // max(1, instances))
    own = {
        name: str(model) + value.removeprefix("/opt/ml/model") if value.startswith("/opt/ml/model") else value
        for name, value in container.get("Environment", {}).items()
    }
    return (
        base_environment()
        | role_environment
        | {"OMP_NUM_THREADS": str(threads)}
        | own
        | {"MODEL_DIR": own.get("MODEL_DIR", str(model))}
    )


def free_port() -> int:
    """A port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def smooth_choice(items: list[Any], weights: list[float]) -> Any:
    """Smooth weighted round robin over objects with a `credit`: exact shares over any short stretch, no randomness."""
    total = sum(weights)
    for item, weight in zip(items, weights, strict=True):
        item.credit += weight
    chosen = max(items, key=lambda item: item.credit)
    chosen.credit -= total
    return chosen
