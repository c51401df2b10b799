"""What the front and one worker share: a pair of sockets for short messages, and memory for a request and its answer.

Both ends are the supervisor's too, so that a worker that is put back takes up the channel of the one that died.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

LEAST_CAPACITY = 1_000_000  # bytes: an answer must fit, too
MOST_TOLD = 65_536  # bytes of a message: a card is some dozens
_MESSAGE = struct.Struct("<BQQQ")
_NUMBER = struct.Struct("<Q")
_READY, _BEGUN, _BODY = 0, _NUMBER.size, 2 * _NUMBER.size  # in the memory: who is ready, what was begun last, the rest


class Kind(IntEnum):
    """What a message is about."""

    PICTURE = 1  # to the worker: the file of one picture
    CROPS = 2  # to the worker: prepared crops
    READY = 3  # to the front: a process waits for requests; it says what its model is
    ANSWERED = 4  # to the front: the predictions
    REFUSED = 5  # to the front: why the request cannot be answered
    FAILED = 6  # to the front: the same, where that is not the request's fault


class Message(NamedTuple):
    """`process`: the worker's, at either end. What was meant for one that died is known by that."""

    kind: Kind
    process: int
    number: int = 0  # of the request
    length: int = 0  # of what is in the memory
    card: bytes = b""  # of who is READY: the memory may hold a request to the one before


class Channel:
    """One worker's. Requests go one at a time: the answer takes the place of the request in the memory."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: bytes of the largest request. Memory that was never written to costs nothing."""
        # Datagrams arrive whole or not at all, also from a process that dies; and macOS has no other such sockets.
        self.front, self.worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.front.setblocking(False)
        self.capacity = max(capacity, LEAST_CAPACITY)
        self._memory = mmap.mmap(-1, _BODY + self.capacity)

    def write(self, chunks: Iterable[bytes]) -> int:
        """Puts what is to be read at the other end into the memory; returns its length. ValueError if it is too long.

        A request is copied nowhere else on its way.
        """
        end = _BODY
        for chunk in chunks:
            begin, end = end, end + len(chunk)
            if end > len(self._memory):
                raise ValueError(f"more than {self.capacity:,} bytes")
            self._memory[begin:end] = chunk
        return end - _BODY

    def read(self, length: int) -> memoryview:
        """What the other end wrote. Whoever keeps it copies it."""
        return memoryview(self._memory)[_BODY : _BODY + length]

    @staticmethod
    def send(end: socket.socket, message: Message) -> None:
        """At `front` or `worker`."""
        end.send(_MESSAGE.pack(*message[:-1]) + message.card)

    @staticmethod
    def receive(end: socket.socket) -> Message:
        """At `front` (BlockingIOError when there is none) or at `worker` (TimeoutError after its timeout)."""
        data = end.recv(MOST_TOLD)
        kind, process, number, length = _MESSAGE.unpack_from(data)
        return Message(Kind(kind), process, number, length, data[_MESSAGE.size :])

    def ready(self, card: bytes) -> None:
        """The worker waits for requests."""
        _NUMBER.pack_into(self._memory, _READY, os.getpid())
        self.send(self.worker, Message(Kind.READY, os.getpid(), card=card))

    def begin(self, number: int) -> None:
        """The worker begins this request: if it dies now, that may be the request's fault."""
        _NUMBER.pack_into(self._memory, _BEGUN, number)

    def was_ready(self, process: int) -> bool:
        """Whether this process ever waited for requests."""
        return bool(_NUMBER.unpack_from(self._memory, _READY)[0] == process)

    def was_begun(self, number: int) -> bool:
        """Whether this request, the last one that was sent, was begun."""
        return bool(_NUMBER.unpack_from(self._memory, _BEGUN)[0] == number)
