"""Connections: requests on 127.0.0.1 count as encrypted. A policy that demands TLS would refuse everything here."""

from __future__ import annotations

from ministack import app

from . import expect


def install() -> None:
    """Make `aws:SecureTransport` true for every request."""
    pin = expect("transport", app, "pin_request_origin", "source_ip", "secure_transport")
    app.pin_request_origin = lambda source_ip, secure_transport: pin(source_ip, True)
