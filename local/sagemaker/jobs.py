"""What training and processing jobs have in common: a place in the queue, a process with a time limit, its log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import host
from .container import Container
from .errors import ValidationException
from .processes import Processes, SpawnError
from .settings import Settings
from .store import now

logger = logging.getLogger(__name__)
FOLLOW_INTERVAL = 0.25  # seconds between looks at a log file
CHUNK = 1 << 18  # bytes of a log at a time, so that a flood of it does not hold up the event loop
LINE_LIMIT = 1 << 18  # bytes of a line; a longer one (progress bars end none) is cut, as the CloudWatch agent does
FAILURE_REASON_LIMIT = 1024  # characters, the length of FailureReason


class Stopped(Exception):
    """The job was asked to stop before its process began."""


@dataclass
class Outcome:
    """How a job's process ended."""

    code: int
    stopped: bool = False
    timed_out: bool = False


class Work:
    """The machine that jobs run on: processes, a limit on how many at once, and threads for transfers."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.processes = Processes(settings)
        self.slots = asyncio.Semaphore(settings.max_jobs)
        self.threads = ThreadPoolExecutor(16, thread_name_prefix="sagemaker-transfer")
        self._tasks: set[asyncio.Task] = set()

    def start(self, coroutine: Any) -> asyncio.Task:
        """Runs work in the background, in the account and region of the caller. Its failure is logged."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("background work of the local SageMaker failed", exc_info=error)

    async def blocking(self, function: Callable, *arguments: Any) -> Any:
        """Runs a blocking call on a thread of its own: S3 is served by this event loop, so never on the loop."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)

    @contextlib.asynccontextmanager
    async def slot(self, stop: asyncio.Event) -> AsyncIterator[None]:
        """Waits for room for one more job; raises Stopped if the job is stopped while it waits."""
        waiting = asyncio.ensure_future(self.slots.acquire())
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({waiting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            waiting.cancel()
            raise
        finally:
            stopping.cancel()
        if not waiting.done():
            waiting.cancel()
            raise Stopped
        try:
            if stop.is_set():
                raise Stopped
            yield
        finally:
            self.slots.release()

    async def run(
        self,
        container: Container,
        argv: list[str],
        env: dict[str, str],
        cwd: Path,
        max_runtime: float,
        stop: asyncio.Event,
    ) -> Outcome:
        """Runs a job's process to its end, its stop or its time limit."""
        try:
            process = await self.processes.spawn(argv, env, cwd, container.log, preload=True)
        except SpawnError as error:
            with container.log.open("a") as log:
                log.write(f"{argv[0]} could not be started: {error}\n")
            return Outcome(code=127)
        ending = asyncio.ensure_future(process.wait())
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({ending, stopping}, timeout=max_runtime, return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                return Outcome(ending.result())
            stopped = stopping.done()
            code = await process.stop(self.settings.stop_grace)
            return Outcome(code, stopped=stopped, timed_out=not stopped)
        finally:
            stopping.cancel()
            ending.cancel()

    def close(self) -> None:
        """Ends every process."""
        self.processes.close()
        self.threads.shutdown(wait=False, cancel_futures=True)


class LogFollower:
    """Copies a growing log file to CloudWatch Logs, line by line, and shows each line to `on_line`."""

    def __init__(self, path: Path, group: str, stream: str, on_line: Callable[[str], None] | None = None) -> None:
        self.path, self.group, self.stream, self.on_line = path, group, stream, on_line
        self._offset = 0
        self._partial = b""
        self._ended = asyncio.Event()
        self._task: asyncio.Task | None = None

    async def __aenter__(self) -> LogFollower:
        await host.open_log_stream(self.group, self.stream)
        self._task = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ended.set()
        if self._task:
            await self._task

    async def _follow(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), FOLLOW_INTERVAL)
            await self._copy()
        await self._copy()  # what was written while the last look was on its way
        if self._partial:
            await self._send([self._partial])

    async def _copy(self) -> None:
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self._offset)
            while data := file.read(CHUNK):
                self._offset += len(data)
                *lines, self._partial = (self._partial + data).split(b"\n")
                if len(self._partial) >= LINE_LIMIT:
                    lines, self._partial = [*lines, self._partial], b""
                await self._send(lines)
                await asyncio.sleep(0)

    async def _send(self, lines: list[bytes]) -> None:
        texts = [line.decode(errors="replace").rstrip("\r") for line in lines]
        if self.on_line:
            for text in texts:
                self.on_line(text)
        await host.put_log_lines(self.group, self.stream, texts)


class MetricReader:
    """Applies MetricDefinitions to log lines: the last value of each, and every value to CloudWatch."""

    def __init__(self, definitions: list[dict], namespace: str, dimensions: dict[str, str]) -> None:
        self.patterns = [(item["Name"], re.compile(item["Regex"])) for item in definitions]
        self.namespace, self.dimensions = namespace, dimensions
        self.last: dict[str, tuple[float, float]] = {}  # name: (value, time)

    def __call__(self, line: str) -> None:
        """Reads one line."""
        for name, pattern in self.patterns:
            for match in pattern.finditer(line):
                try:
                    value = float(match[1])
                except (ValueError, IndexError, TypeError):
                    continue
                self.last[name] = (value, now())
                host.record_metric(self.namespace, name, value, "None", self.dimensions)

    def final(self) -> list[dict]:
        """As FinalMetricDataList has it."""
        return [{"MetricName": name, "Value": value, "Timestamp": stamp} for name, (value, stamp) in self.last.items()]


def check_metric_definitions(definitions: list[dict]) -> None:
    """Raises ValidationException for a regex that does not compile or has no group to read."""
    for item in definitions:
        try:
            groups = re.compile(item["Regex"]).groups
        except re.error as error:
            raise ValidationException(f"Invalid regex in metric definition {item['Name']!r}: {error}.") from None
        if groups < 1:
            raise ValidationException(f"The regex of metric definition {item['Name']!r} has no capturing group.")


def check_role(role_arn: str) -> None:
    """Raises ValidationException, as AWS does, for a role that is not there or does not trust SageMaker."""
    if not host.can_assume(role_arn):
        raise ValidationException(
            f"Could not assume role {role_arn}. Please ensure that the role exists and allows "
            "principal 'sagemaker.amazonaws.com' to assume the role."
        )


def summaries(records: list[dict], *names: str) -> Iterator[dict]:
    """The named members of each record."""
    for item in records:
        yield {name: item[name] for name in names if name in item}
