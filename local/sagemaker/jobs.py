"""What training and processing jobs have in common: a place in the queue, a process with a time limit, its log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from . import host
from .container import Container, last_lines
from .errors import NotImplementedLocally, ValidationException
from .processes import Processes, SpawnError
from .settings import Settings
from .store import now
from .transfers import Mirror, TransferError

logger = logging.getLogger(__name__)
FOLLOW_INTERVAL = 0.25  # seconds between looks at a log file
SYNC_INTERVAL = 1.0  # seconds between looks at the folders that are uploaded while a job runs
CHUNK = 1 << 16  # bytes of a log at a time, so that a flood of it does not hold up the event loop
LINE_LIMIT = 1 << 18  # bytes of a line; a longer one (progress bars end none) is cut, as the CloudWatch agent does
FAILURE_REASON_LIMIT = 1024  # characters, the length of FailureReason


class Stopped(Exception):
    """The job was asked to stop before its process began."""


@dataclass
class Outcome:
    """How a job's process ended."""

    code: int  # negative: the signal that ended it
    timed_out: bool = False

    @property
    def exit_code(self) -> int:
        """As a container engine counts: 137 for one that was killed."""
        return self.code if self.code >= 0 else 128 - self.code


class Work:
    """The machine that jobs run on: processes, a limit on how many at once, and threads for transfers."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.processes = Processes(settings)
        self.slots = asyncio.Semaphore(settings.max_jobs)
        self.threads = ThreadPoolExecutor(16, thread_name_prefix="sagemaker-transfer")
        self.jobs = 0  # that run or wait
        self._tasks: set[asyncio.Task] = set()

    def cores(self) -> int:
        """How many cores a job that begins now may use: all when it is alone, else its share.

        A job that comes later gets its share while the first goes on with what it has.
        """
        return max(1, (os.cpu_count() or 1) // max(1, min(self.jobs, self.settings.max_jobs)))

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
        self.jobs += 1
        try:
            await self._room(stop)
            try:
                yield
            finally:
                self.slots.release()
        finally:
            self.jobs -= 1

    async def _room(self, stop: asyncio.Event) -> None:
        waiting = asyncio.ensure_future(self.slots.acquire())
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({waiting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            if not waiting.done():
                waiting.cancel()
        if not waiting.done():
            raise Stopped
        if stop.is_set():
            self.slots.release()
            raise Stopped

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
            container.note(f"{argv[0]} could not be started: {error}")
            return Outcome(code=127)
        ending = asyncio.ensure_future(process.wait())
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({ending, stopping}, timeout=max_runtime, return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                return Outcome(ending.result())
            timed_out = not stopping.done()
            return Outcome(await process.stop(self.settings.stop_grace), timed_out)
        finally:
            stopping.cancel()
            ending.cancel()

    def close(self) -> None:
        """Ends every process."""
        self.processes.close()
        self.threads.shutdown(wait=False, cancel_futures=True)


class LogFollower:
    """Copies a growing log file to CloudWatch Logs, line by line, and shows the lines to `on_lines`."""

    def __init__(
        self, path: Path, group: str, stream: str, on_lines: Callable[[list[str]], None] | None = None
    ) -> None:
        self.path, self.group, self.stream, self.on_lines = path, group, stream, on_lines
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
        if self.on_lines:
            self.on_lines(texts)
        await host.put_log_lines(self.group, self.stream, texts)


class MetricReader:
    """Applies MetricDefinitions to log lines: the last value of each, and every value to CloudWatch."""

    def __init__(self, definitions: list[dict], namespace: str, dimensions: dict[str, str]) -> None:
        self.patterns = [(item["Name"], re.compile(item["Regex"])) for item in definitions]
        self.namespace, self.dimensions = namespace, dimensions
        self.last: dict[str, tuple[float, float]] = {}  # name: (value, time)
        self.followed: dict[str, list[float]] = {}  # name: every value

    def __call__(self, lines: list[str]) -> None:
        """Reads lines that were just written."""
        moment = now()
        for name, pattern in self.patterns:
            values = [
                value for line in lines for match in pattern.finditer(line) if (value := number(match[1])) is not None
            ]
            if not values:
                continue
            self.last[name] = (values[-1], moment)
            if name in self.followed:
                self.followed[name] += values
            counts = Counter(value for value in values if math.isfinite(value))  # CloudWatch takes no others
            host.record_values(self.namespace, name, counts, "None", self.dimensions, moment)

    def follow(self, name: str) -> list[float]:
        """Every value of a metric from now on, as a list that grows."""
        return self.followed.setdefault(name, [])

    def final(self) -> list[dict]:
        """As FinalMetricDataList has it: without metrics that ended as nan or infinity, which JSON cannot carry."""
        return [
            {"MetricName": name, "Value": value, "Timestamp": stamp}
            for name, (value, stamp) in self.last.items()
            if math.isfinite(value)
        ]


def number(text: str | None) -> float | None:
    """What a metric's regex caught, as a number; None if it is none."""
    try:
        return float(text or "")
    except ValueError:
        return None


@contextlib.asynccontextmanager
async def uploading(work: Work, mirrors: list[Mirror]) -> AsyncIterator[None]:
    """Uploads what appears in the folders for as long as it lasts; what is there at the end is the caller's to send.

    An upload that fails is tried again with the next look, and for good at the end, where it fails the job.
    """

    async def watch() -> None:
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), SYNC_INTERVAL)
            for mirror in mirrors:
                with contextlib.suppress(TransferError):
                    await work.blocking(mirror.sync, True)

    over = asyncio.Event()
    watcher = asyncio.create_task(watch()) if mirrors else None
    try:
        yield
    finally:
        over.set()
        if watcher:
            await watcher


def died_with_emulator() -> str:
    """FailureReason of a job that was at work when the emulator ended."""
    return "InternalServerError: The local AWS was stopped while the job ran. Please try again."


def algorithm_error(container: Container, exit_code: int, otherwise: Callable[[int], str] | None = None) -> str:
    """FailureReason of a container that failed by itself: what it wrote to `failure`, or else the end of its log.

    `otherwise`: what is told instead of the log, given how many characters there is room for.
    """
    rest = f", exit code: {exit_code}"
    room = FAILURE_REASON_LIMIT - len("AlgorithmError: ") - len(rest)
    told = otherwise(room) if otherwise else "\n".join(last_lines(container.log, 12))[-room:]
    return f"AlgorithmError: {container.failure()[:room] or told}{rest}"


def internal_error(error: Exception) -> str:
    """FailureReason of a job that failed because of us."""
    return f"InternalServerError: {error!r}. Please try again."


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


def check_uri(uri: str) -> None:
    """Refuses what AWS's pattern lets pass (https://) and nothing here can read."""
    if not uri.startswith("s3://"):
        raise NotImplementedLocally(f"The URI {uri!r}, which does not start with s3://,")


def check_local_path(path: str, below: str, member: str) -> None:
    """A container's path must be in the part of it that is a folder here."""
    parts = PurePosixPath(path).parts
    if parts[: len(PurePosixPath(below).parts)] != PurePosixPath(below).parts or ".." in parts:
        raise ValidationException(f"Invalid {member} {path!r}: it must be a path below {below}.")


def summaries(records: list[dict], *names: str) -> Iterator[dict]:
    """The named members of each record."""
    for item in records:
        yield {name: item[name] for name in names if name in item}
