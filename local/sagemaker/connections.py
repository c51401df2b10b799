"""One keep-alive HTTP/1.1 connection to a serving process, and how a request over it can fail."""

from __future__ import annotations

import asyncio
import time

IDLE_LIMIT = 1.0  # seconds a connection may lie idle: servers keep one for 2 (gunicorn) or more


class NotReached(Exception):
    """No connection to the server could be made: it has seen nothing of the request."""


class BrokenAnswer(Exception):
    """The connection broke after the request was sent: the server may have acted on it.

    `began` says whether a part of the answer had arrived.
    """

    def __init__(self, message: str, began: bool) -> None:
        super().__init__(message)
        self.began = began


class Connection:
    """One keep-alive connection to a server on 127.0.0.1."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.idle_since = time.monotonic()
        self._answered = False  # whether the head of an answer to the running request has arrived

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
    ) -> tuple[int, dict[str, str], bytes, bool]:
        """One exchange: (status, headers in lower case, body, whether the connection may be kept).

        Raises BrokenAnswer.
        """
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._answered = False
        try:
            self.writer.writelines(("\r\n".join(lines).encode("latin-1", "replace"), b"\r\n\r\n", body))
            await self.writer.drain()
            return await self._answer()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
            began = self._answered or bool(getattr(error, "partial", b""))
            raise BrokenAnswer(f"{type(error).__name__}: {error}", began) from error

    async def _answer(self) -> tuple[int, dict[str, str], bytes, bool]:
        status = 100
        while 100 <= status < 200:
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *rest = head.rstrip("\r\n").split("\r\n")
            version, code, *_ = first.split(" ", 2)
            status = int(code)
        self._answered = True
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
        keep = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        if "chunked" in headers.get("transfer-encoding", "").lower():
            body = await self._chunks()
        elif "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        elif status in (204, 304):
            body = b""
        else:
            body, keep = await self.reader.read(), False
        self.idle_since = time.monotonic()
        return status, headers, body, keep

    async def _chunks(self) -> bytes:
        body = bytearray()
        while size := int((await self.reader.readline()).split(b";")[0], 16):
            body += await self.reader.readexactly(size)
            await self.reader.readexactly(2)
        while (await self.reader.readline()).strip():
            pass
        return bytes(body)

    def close(self) -> None:
        """Closes without waiting."""
        self.writer.close()
