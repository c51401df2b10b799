"""The HTTP front: GET /ping and POST /invocations, as SageMaker asks for them.

A bare ASGI application, in a process of its own that only moves bytes: decoding and inference are the workers', so
that /ping answers at once under any load. What is too much is turned away with 429 and never with a 5XX, which would
trip the alarms that roll a deployment back.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from channel import Kind
from pool import Pool, Refused, Request

CROPS = "application/x-rgb-crops"
METHODS = {"/ping": "GET", "/invocations": "POST"}

log = logging.getLogger("inference")


class Disconnected(Exception):
    """The client went away: there is nobody to answer."""


@dataclass
class Server:
    """The ASGI application around the workers, of which one at least has loaded its model."""

    pool: Pool

    def __post_init__(self) -> None:
        self.settings = self.pool.settings
        version = self.settings.model_version or self.pool.model["model_version"]
        self._card = json.dumps({"model_version": version, "deployment": self.settings.deployment}).encode()

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        try:
            status, body = 200, await self._route(scope, receive)
        except Refused as refused:
            status, body = refused.status, json.dumps(refused.answer).encode()
        except Disconnected:
            return
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            error = Refused(500, "InternalError", "the request failed for a reason that is in the endpoint's log")
            status, body = error.status, json.dumps(error.answer).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _route(self, scope: dict[str, Any], receive: Callable) -> bytes:
        method, path = scope["method"], scope["path"]
        if path not in METHODS:
            raise Refused(404, "NotFound", f"no {path} here; there are {' and '.join(METHODS)}")
        if method != METHODS[path]:
            raise Refused(405, "MethodNotAllowed", f"{path} takes {METHODS[path]}, not {method}")
        if path == "/ping":
            return self._ping()
        return await self._invoke(dict(scope["headers"]), receive)

    def _ping(self) -> bytes:
        if not self.pool.can_answer():
            raise Refused(503, "NoWorker", "no worker is there that could answer")
        return self._card

    async def _invoke(self, headers: dict[bytes, bytes], receive: Callable) -> bytes:
        content_type = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        if content_type != CROPS and not content_type.startswith("image/"):
            raise Refused(415, "UnsupportedMediaType", f"{content_type!r} is not image/… (one picture) or {CROPS}")
        deadline = asyncio.get_running_loop().time() + self.settings.timeout
        with self.pool.accept() as body:
            await self._receive(body, headers, receive, deadline)
            request = Request(Kind.CROPS if content_type == CROPS else Kind.PICTURE, body)
            answer = await self._ask(request, receive, deadline)
        return self._card[:-1] + b', "predictions": ' + answer + b"}"

    async def _ask(self, request: Request, receive: Callable, deadline: float) -> bytes:
        """The predictions, unless there are none in time, or nobody is there any more to take them."""
        gone = asyncio.create_task(_disconnected(receive))
        try:
            self.pool.ask(request)
            patience = deadline - asyncio.get_running_loop().time()
            await asyncio.wait((request.answer, gone), timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if request.answer.done():
                return request.answer.result()
            if gone.done():
                raise Disconnected
            message = f"no answer within {self.settings.timeout:g} s; try again"
            raise Refused(429, "DeadlineExceeded", message)
        finally:
            gone.cancel()
            self.pool.forget(request)

    async def _receive(
        self, body: list[bytes], headers: dict[bytes, bytes], receive: Callable, deadline: float
    ) -> None:
        """Fills `body`, piece by piece. No worker waits for a client that is slow to send."""
        limit = self.settings.max_payload
        too_large = Refused(413, "PayloadTooLarge", f"the request is larger than {limit:,} bytes")
        if int(headers.get(b"content-length", b"0")) > limit:
            raise too_large
        length = 0
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Disconnected
                    piece = message.get("body", b"")
                    length += len(piece)
                    if length > limit:
                        raise too_large
                    self.pool.keep(body, piece)
                    if not message.get("more_body"):
                        return
        except TimeoutError:
            message = f"the body was not complete after {self.settings.timeout:g} s"
            raise Refused(400, "IncompleteBody", message) from None


async def _disconnected(receive: Callable) -> None:
    """Waits until a client whose request is complete goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
