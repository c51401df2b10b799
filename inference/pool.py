"""The workers as the front sees them: one bounded queue for all of them, and a request to each at a time.

A worker that dies, or that has to be killed because it hangs, costs the request that it was at and no other.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from channel import Channel, Kind, Message
from settings import Settings

WATCH_SECONDS = 0.25  # between looks for workers that hang
MAX_WAITING_BYTES = 256 * 1024 * 1024  # of all requests that are accepted: many large ones could fill an instance

log = logging.getLogger("inference")


class Refused(Exception):
    """Ends a request with `status` and {"error": {"code", "message"}}."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    @property
    def answer(self) -> dict[str, Any]:
        return {"error": {"code": self.code, "message": str(self)}}


def lives(process: int) -> bool:
    """Whether there is a process of this id; 0 is none."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process > 0


@dataclass(eq=False, repr=False)
class Request:
    """`body` is kept until it is answered, for another worker than the one it was given to first."""

    kind: Kind
    body: Sequence[bytes]
    answer: asyncio.Future[bytes] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """The predictions as JSON, or Refused."""


@dataclass(eq=False, repr=False)
class Worker:
    """One worker, whichever process it is at the moment."""

    channel: Channel
    process: int = 0  # 0: there is none that is ready
    number: int = 0  # of the request that was given to it last
    request: Request | None = None  # that it is at
    since: float = 0.0  # when it was given that
    killed: bool = False


@dataclass
class Pool:
    """Hands requests to workers. `ready` is set once one of them has loaded the model, which `model` then describes."""

    channels: Sequence[Channel]
    settings: Settings
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ready = asyncio.Event()
        self.accepted = self.bytes = 0  # of requests, also of those that are not complete
        self._limit = self.settings.queue_size * len(self.channels)
        self._queue: deque[Request] = deque()
        self._idle: list[Worker] = []  # the one that worked last is taken first: its memory is in the caches
        self._loop = asyncio.get_running_loop()
        self._workers = [Worker(channel) for channel in self.channels]
        for worker in self._workers:
            self._loop.add_reader(worker.channel.front.fileno(), self._hear, worker)
        self._watcher = self._loop.create_task(self._watch())

    def close(self) -> None:
        self._watcher.cancel()
        for worker in self._workers:
            self._loop.remove_reader(worker.channel.front.fileno())

    @contextmanager
    def accept(self) -> Iterator[list[bytes]]:
        """Room for a request and the pieces of its body, until it is answered. Refused when there are enough."""
        if self.accepted >= self._limit or self.bytes >= MAX_WAITING_BYTES:
            raise self._full()
        body: list[bytes] = []
        self.accepted += 1
        try:
            yield body
        finally:
            self.accepted -= 1
            self.bytes -= sum(map(len, body))

    def keep(self, body: list[bytes], piece: bytes) -> None:
        """Another piece of an accepted request. Refused when all together become too large: nobody said how large."""
        if self.bytes + len(piece) > MAX_WAITING_BYTES:
            raise self._full()
        body.append(piece)
        self.bytes += len(piece)

    def _full(self) -> Refused:
        size = f"{self.accepted} requests of {self.bytes / 1e6:.0f} MB"
        return Refused(429, "QueueFull", f"{size} are waiting, as many as may; try again")

    def ask(self, request: Request) -> None:
        """Puts it into the queue."""
        self._queue.append(request)
        self._dispatch()

    def forget(self, request: Request) -> None:
        """Nobody waits for its answer any more. A worker that is at it finishes it."""
        request.answer.cancel()
        if request in self._queue:
            self._queue.remove(request)

    def can_answer(self) -> bool:
        """Whether any worker lives and has not been at one request for longer than a request may take."""
        late = self._loop.time() - self.settings.timeout
        return any(lives(worker.process) and not (worker.request and worker.since < late) for worker in self._workers)

    def _dispatch(self) -> None:
        while self._queue and self._idle:
            worker = self._idle.pop()
            if not lives(worker.process):
                continue  # the one that takes its place will say when it is ready
            request = self._queue.popleft()
            worker.number += 1
            worker.request, worker.since = request, self._loop.time()
            length = worker.channel.write(request.body)
            message = Message(request.kind, worker.process, worker.number, length)
            worker.channel.send(worker.channel.front, message)

    def _hear(self, worker: Worker) -> None:
        """Takes what a worker says."""
        try:
            message = worker.channel.receive(worker.channel.front)
        except BlockingIOError:
            return
        if message.kind is Kind.READY:
            self._begins(worker, message)
        elif worker.request:
            self._finish(worker.request, message.kind, bytes(worker.channel.read(message.length)))
        worker.request = None
        self._idle.append(worker)
        self._dispatch()

    def _begins(self, worker: Worker, ready: Message) -> None:
        """A new process: whatever the one before it was at is lost, or was not begun."""
        if (request := worker.request) and not request.answer.done():
            if worker.channel.was_begun(worker.number):
                died = Refused(500, "WorkerDied", "the process that worked at this request died")
                request.answer.set_exception(died)
            else:
                self._queue.appendleft(request)
        if worker in self._idle:
            self._idle.remove(worker)
        worker.process, worker.killed, self.model = ready.process, False, json.loads(ready.card)
        self.ready.set()

    @staticmethod
    def _finish(request: Request, kind: Kind, told: bytes) -> None:
        if request.answer.done():
            return  # nobody waits for it any more
        if kind is Kind.ANSWERED:
            request.answer.set_result(told)
        else:
            error = json.loads(told)
            status = 400 if kind is Kind.REFUSED else 500
            request.answer.set_exception(Refused(status, error["code"], error["message"]))

    async def _watch(self) -> None:
        """Kills workers that hang: the supervisor puts others in their place."""
        while True:
            await asyncio.sleep(min(WATCH_SECONDS, self.settings.timeout / 4))
            late = self._loop.time() - 2 * self.settings.timeout
            for worker in self._workers:
                if worker.request and worker.since < late and not worker.killed:
                    log.error("worker %d was at one request for too long and is killed", worker.process)
                    worker.killed = True
                    with suppress(OSError):  # it is gone, or its number is another's
                        os.kill(worker.process, signal.SIGKILL)
