"""Connections: requests on 127.0.0.1 count as encrypted, and a connection that the client has closed is let go of.

A policy that demands TLS would refuse everything here. And the web server waits out its keep-alive, 75 seconds, also
for clients that are gone: many short-lived ones would use up the process's file descriptors.
"""

from __future__ import annotations

from typing import Any

from hypercorn.asyncio.tcp_server import TCPServer
from ministack import app

from . import expect


def install() -> None:
    """Make `aws:SecureTransport` true for every request, and end the idle wait with the connection."""
    pin = expect("transport", app, "pin_request_origin", "source_ip", "secure_transport")
    app.pin_request_origin = lambda source_ip, secure_transport: pin(source_ip, True)
    read = expect("transport", TCPServer, "_read_data", "self")

    async def read_data(self: Any) -> None:
        try:
            await read(self)
        finally:
            await self.idle_task.stop()

    TCPServer._read_data = read_data  # type: ignore[method-assign]
