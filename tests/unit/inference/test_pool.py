"""What the front and a worker say to each other when a worker's end crosses with a request."""

from __future__ import annotations

import asyncio
import os
import subprocess

import pytest

import pool as pool_module
from channel import Channel, Kind, Message
from pool import Pool, Refused, Request
from settings import Settings

OLD, NEW = os.getpid(), os.getppid()  # any two that live


def ready(channel: Channel, process: int) -> None:
    channel.send(channel.worker, Message(Kind.READY, process, card=b'{"model_version": "1"}'))


def answer(channel: Channel, process: int) -> bool:
    """Does a worker's next step; False for a message that is not for it."""
    message = channel.receive(channel.worker)
    if message.process != process:
        return False
    channel.begin(message.number)
    said = b"answer to " + bytes(channel.read(message.length))
    channel.send(channel.worker, Message(Kind.ANSWERED, process, message.number, channel.write([said])))
    return True


def test_a_request_that_crosses_with_the_next_worker_is_answered_by_it():
    """GIVEN a worker that died idle WHEN a request comes after the next one is ready and before that is heard."""

    async def cross() -> bytes:
        channel = Channel(100)
        pool = Pool([channel], Settings())
        ready(channel, OLD)
        await pool.ready.wait()
        ready(channel, NEW)
        request = Request(Kind.CROPS, [b"that"])
        pool.ask(request)
        await asyncio.sleep(0.05)  # the front hears, and asks again
        assert not answer(channel, NEW), "the first was for the old one"
        assert answer(channel, NEW)
        try:
            return await asyncio.wait_for(request.answer, 5)
        finally:
            pool.close()

    assert asyncio.run(cross()) == b"answer to that"


def test_an_answer_that_its_worker_gave_before_it_died_counts():
    async def last_word() -> bytes:
        channel = Channel(100)
        pool = Pool([channel], Settings())
        ready(channel, OLD)
        await pool.ready.wait()
        request = Request(Kind.CROPS, [b"that"])
        pool.ask(request)
        assert answer(channel, OLD)
        ready(channel, NEW)
        try:
            return await asyncio.wait_for(request.answer, 5)
        finally:
            pool.close()

    assert asyncio.run(last_word()) == b"answer to that"


def test_a_request_that_its_worker_had_begun_is_not_given_to_another():
    async def lost() -> None:
        channel = Channel(100)
        pool = Pool([channel], Settings())
        ready(channel, OLD)
        await pool.ready.wait()
        request = Request(Kind.CROPS, [b"that"])
        pool.ask(request)
        channel.begin(channel.receive(channel.worker).number)
        ready(channel, NEW)
        try:
            await asyncio.wait_for(request.answer, 5)
        finally:
            pool.close()

    with pytest.raises(Refused, match="died"):
        asyncio.run(lost())


def test_a_request_is_not_left_to_a_worker_that_is_dead_while_another_is_idle():
    async def choose() -> bytes:
        living, dead = Channel(100), Channel(100)
        pool = Pool([living, dead], Settings())
        gone = subprocess.Popen(["true"])
        gone.wait()
        for channel, process in ((living, OLD), (dead, gone.pid)):  # the last would be the first to be asked
            ready(channel, process)
            await asyncio.sleep(0.02)
        request = Request(Kind.CROPS, [b"that"])
        pool.ask(request)
        living.worker.settimeout(5)
        assert answer(living, OLD)
        try:
            return await asyncio.wait_for(request.answer, 5)
        finally:
            pool.close()

    assert asyncio.run(choose()) == b"answer to that"


def test_only_a_worker_that_lives_can_answer():
    async def die_and_come_back() -> list[bool]:
        channel = Channel(100)
        pool = Pool([channel], Settings())
        gone = subprocess.Popen(["true"])
        gone.wait()
        found = [pool.can_answer()]
        for process in (gone.pid, NEW):
            ready(channel, process)
            await asyncio.sleep(0.05)
            found.append(pool.can_answer())
        pool.close()
        return found

    assert asyncio.run(die_and_come_back()) == [False, False, True]


def test_requests_that_grow_together_are_bounded_and_leave_nothing_behind(monkeypatch):
    """GIVEN room for 100 bytes WHEN two that were let in empty become 60 each THEN the second to grow is refused."""
    monkeypatch.setattr(pool_module, "MAX_WAITING_BYTES", 100)

    async def grow() -> None:
        pool = Pool([Channel(100)], Settings())
        with pool.accept() as first, pool.accept() as second:
            pool.keep(first, bytes(60))
            pool.keep(second, bytes(40))
            with pytest.raises(Refused, match="2 requests"):
                pool.keep(second, bytes(20))
        assert (pool.accepted, pool.bytes) == (0, 0)
        pool.close()

    asyncio.run(grow())
