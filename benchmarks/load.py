"""HTTP load for the benchmarks: raw keep-alive requests, one after the other or at a fixed rate, all kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

SIGNATURE_SECONDS = 60.0  # a signature is used for that long; SageMaker takes it for five minutes


@dataclass(frozen=True)
class Sample:
    """One request: when it was due and how long after that its answer was complete (seconds); 0 is no answer."""

    due: float
    seconds: float
    status: int
    body: bytes


def post(url: str, body: bytes, headers: dict[str, str]) -> bytes:
    """The bytes of a POST request."""
    parts = urlsplit(url)
    lines = [f"POST {parts.path} HTTP/1.1", f"Host: {parts.netloc}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items() if name.lower() not in ("host", "content-length")]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Signed:
    """A POST request to SageMaker's runtime, signed beforehand so that signing is no part of what is measured."""

    def __init__(self, url: str, body: bytes, content_type: str, credentials: Credentials, region: str) -> None:
        self.url, self.body, self.content_type = url, body, content_type
        self.signer = SigV4Auth(credentials, "sagemaker", region)
        self._raw, self._until = b"", 0.0

    def __call__(self) -> bytes:
        """Its bytes, with a signature that holds."""
        if time.monotonic() > self._until:
            request = AWSRequest("POST", self.url, data=self.body, headers={"Content-Type": self.content_type})
            self.signer.add_auth(request)
            self._raw = post(self.url, self.body, dict(request.headers.items()))
            self._until = time.monotonic() + SIGNATURE_SECONDS
        return self._raw


class Client:
    """Keep-alive connections to one port of 127.0.0.1, as many as there are requests at once."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, raw: bytes) -> tuple[int, bytes]:
        """Sends a request: (status, body). Raises OSError or EOFError when the connection breaks."""
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(raw)
        head = await reader.readuntil(b"\r\n\r\n")
        status, *lines = head.lower().split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in lines if line)
        body = await reader.readexactly(int(headers.get(b"content-length", 0)))
        if headers.get(b"connection") == b"close":  # after a thousand requests, the emulator's server wants a new one
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(status.split(b" ", 2)[1]), body

    async def sample(self, raw: bytes, due: float) -> Sample:
        """The same, with its time; a broken connection is status 0."""
        try:
            status, body = await self.ask(raw)
        except (OSError, EOFError) as error:
            status, body = 0, repr(error).encode()
        return Sample(due, time.perf_counter() - due, status, body)


async def saturate(client: Client, request: Callable[[], bytes], connections: int, seconds: float) -> list[Sample]:
    """As many requests as `connections` get through, each sending the next when it has its answer."""
    samples: list[Sample] = []
    end = time.perf_counter() + seconds

    async def one_after_the_other() -> None:
        while (due := time.perf_counter()) < end:
            samples.append(await client.sample(request(), due))

    await asyncio.gather(*(one_after_the_other() for _ in range(connections)))
    return samples


class Load:
    """Requests at a fixed rate (1/s), whatever comes back and however late, from `async with` to its end."""

    def __init__(self, client: Client, request: Callable[[], bytes], rate: float) -> None:
        self.client, self.request, self.rate = client, request, rate
        self.samples: list[Sample] = []
        self._over = asyncio.Event()

    async def __aenter__(self) -> Load:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over.set()
        await self._task

    async def _run(self) -> None:
        began, sent = time.perf_counter(), 0
        running: set[asyncio.Task] = set()
        while not self._over.is_set():
            due = began + sent / self.rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            task = asyncio.create_task(self.client.sample(self.request(), due))
            running.add(task)
            task.add_done_callback(running.discard)
            task.add_done_callback(lambda done: self.samples.append(done.result()))
            sent += 1
        await asyncio.gather(*running)
