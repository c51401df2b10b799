"""The HTTP server of one worker: GET /ping and POST /invocations, as SageMaker asks for them.

A bare ASGI application. The event loop only moves bytes; one thread decodes and infers, so that /ping answers at
once under any load. What is too much is turned away with 429 and never with a 5XX, which would trip the alarms that
roll a deployment back.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from predictor import Predictor
from preprocessing import BrokenImage, prepare

CROPS = "application/x-rgb-crops"

log = logging.getLogger("inference")


@dataclass(frozen=True)
class Settings:
    """The container's environment. Limits are those of one worker."""

    model_version: str = ""  # "": as the artifact says
    deployment: int = 0  # counts up with each deployment; echoed in every answer
    queue_size: int = 32  # requests at work or waiting; one more is answered 429
    timeout: float = 20.0  # seconds from a request's head to its answer; SageMaker gives up after 60
    max_payload: int = 25 * 1024 * 1024  # bytes of a request; SageMaker's limit for real-time endpoints

    @classmethod
    def from_environment(cls) -> Settings:
        """ValueError, naming the variable, where one is no number."""
        return cls(
            model_version=os.environ.get("MODEL_VERSION", cls.model_version),
            deployment=int(number("DEPLOYMENT", cls.deployment, least=0)),
            queue_size=int(number("QUEUE_SIZE", cls.queue_size)),
            timeout=number("REQUEST_TIMEOUT", cls.timeout, least=0.1),
            max_payload=int(number("MAX_PAYLOAD_BYTES", cls.max_payload)),
        )


def number(variable: str, default: float, least: float = 1) -> float:
    """The environment's `variable`. ValueError when it is no number or too small."""
    text = os.environ.get(variable) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not value >= least:
        raise ValueError(f"{variable} is {text!r}; it must be a number of at least {least:g}")
    return value


class Refused(Exception):
    """Ends a request with `status` and {"error": {"code", "message"}}."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Disconnected(Exception):
    """The client went away before its request was complete: there is nobody to answer."""


@dataclass
class Server:
    """The ASGI application around one predictor."""

    predictor: Predictor
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        self.model_version = self.settings.model_version or self.predictor.model_version
        size = self.predictor.preprocess.size
        self._crop_shape = (size, size, 3)
        self._crop_bytes = size * size * 3
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")
        self._requests = 0  # accepted and not answered
        self._busy_since: float | None = None  # when the thread began what it is at

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        try:
            status, answer = await self._route(scope, receive)
        except Refused as refused:
            status, answer = refused.status, {"error": {"code": refused.code, "message": str(refused)}}
        except Disconnected:
            return
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            message = "the request failed for a reason that is in the endpoint's log"
            status, answer = 500, {"error": {"code": "InternalError", "message": message}}
        body = json.dumps(answer).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _route(self, scope: dict[str, Any], receive: Callable) -> tuple[int, dict[str, Any]]:
        allowed: dict[str, tuple[str, Callable[[], Awaitable[dict[str, Any]]]]] = {
            "/ping": ("GET", self._ping),
            "/invocations": ("POST", lambda: self._invoke(dict(scope["headers"]), receive)),
        }
        if scope["path"] not in allowed:
            raise Refused(404, "NotFound", f"no {scope['path']} here; there are {' and '.join(allowed)}")
        method, handler = allowed[scope["path"]]
        if scope["method"] != method:
            raise Refused(405, "MethodNotAllowed", f"{scope['path']} takes {method}, not {scope['method']}")
        return 200, await handler()

    async def _ping(self) -> dict[str, Any]:
        """Unhealthy while the thread has been at one request for longer than any may take."""
        if self._busy_since is not None and time.monotonic() - self._busy_since > 2 * self.settings.timeout:
            raise Refused(503, "Stuck", f"one request has been at work for over {2 * self.settings.timeout:g} s")
        return {"model_version": self.model_version, "deployment": self.settings.deployment}

    async def _invoke(self, headers: dict[bytes, bytes], receive: Callable) -> dict[str, Any]:
        content_type = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        if content_type != CROPS and not content_type.startswith("image/"):
            raise Refused(415, "UnsupportedMediaType", f"{content_type!r} is not image/… (one picture) or {CROPS}")
        if self._requests >= self.settings.queue_size:
            raise Refused(429, "QueueFull", f"{self._requests} requests are waiting, as many as may; try again")
        self._requests += 1
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.timeout
        try:
            async with asyncio.timeout_at(deadline):
                body = await self._body(headers, receive)
        except TimeoutError:
            self._requests -= 1
            message = f"the body was not complete after {self.settings.timeout:g} s"
            raise Refused(400, "IncompleteBody", message) from None
        except BaseException:
            self._requests -= 1
            raise
        work = self._thread.submit(self._answer, content_type, body)
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(self._release))
        try:
            async with asyncio.timeout_at(deadline):
                return {
                    "model_version": self.model_version,
                    "deployment": self.settings.deployment,
                    "predictions": await asyncio.wrap_future(work),
                }
        except TimeoutError:  # it leaves the queue; what is at work runs to its end, unheard
            message = f"no answer within {self.settings.timeout:g} s; try again"
            raise Refused(429, "DeadlineExceeded", message) from None

    def _release(self) -> None:
        self._requests -= 1

    async def _body(self, headers: dict[bytes, bytes], receive: Callable) -> bytes:
        limit = self.settings.max_payload
        too_large = Refused(413, "PayloadTooLarge", f"the request is larger than {limit:,} bytes")
        if int(headers.get(b"content-length", b"0")) > limit:
            raise too_large
        chunks: list[bytes] = []
        length = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            chunks.append(message.get("body", b""))
            length += len(chunks[-1])
            if length > limit:
                raise too_large
            if not message.get("more_body"):
                return b"".join(chunks)

    def _answer(self, content_type: str, body: bytes) -> list[dict[str, Any]]:
        """In the inference thread."""
        self._busy_since = time.monotonic()
        try:
            images = self._crops(body) if content_type == CROPS else self._picture(body)
            return [{"classes": classes} for classes in self.predictor.top(self.predictor.predict(images))]
        finally:
            self._busy_since = None

    def _crops(self, body: bytes) -> np.ndarray:
        if not body or len(body) % self._crop_bytes:
            shape = "*".join(map(str, self._crop_shape))
            message = f"{len(body):,} bytes are no whole number of crops of {shape} = {self._crop_bytes:,} bytes"
            raise Refused(400, "WrongCropSize", message)
        return np.frombuffer(body, np.uint8).reshape(-1, *self._crop_shape)

    def _picture(self, body: bytes) -> np.ndarray:
        try:
            crop = prepare(body, self.predictor.preprocess)
        except BrokenImage as broken:
            raise Refused(400, "BrokenImage", str(broken)) from None
        return np.frombuffer(crop.pixels, np.uint8).reshape(1, *self._crop_shape)
