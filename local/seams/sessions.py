"""Sessions of roles: credentials with which something acts as a role against this emulator, and IAM binds it.

Executions run in threads and register sessions at the same time, while ministack walks through them for expired ones:
one at a time, or an execution fails of another's session.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from typing import Any

from ministack.services import sts

from . import expect

_lock = threading.Lock()


def install() -> None:
    """Register one session at a time."""
    register = expect("sessions", sts, "register_session", "access_key", "session")

    def register_session(access_key: str, session: dict[str, Any]) -> None:
        with _lock:
            register(access_key, session)

    sts.register_session = register_session


@dataclass(frozen=True)
class Credentials:
    """Temporary credentials of a role."""

    access_key: str
    secret_key: str
    session_token: str

    def for_botocore(self) -> dict[str, Any]:
        """As the arguments of a client."""
        return {
            "aws_access_key_id": self.access_key,
            "aws_secret_access_key": self.secret_key,
            "aws_session_token": self.session_token,
        }

    def for_environment(self) -> dict[str, str]:
        """As environment variables."""
        return {name.upper(): str(value) for name, value in self.for_botocore().items()}


def of_role(role_arn: str, name: str, purpose: str = "") -> Credentials:
    """The session `name` of a role, registered with the emulator's STS as ministack does for functions.

    The keys are a digest, so that asking again for the same purpose gives the same ones, which stay valid.
    """
    digest = hashlib.sha256(f"{name}:{role_arn}:{purpose}".encode()).hexdigest()
    credentials = Credentials(
        access_key=f"ASIA{digest[:16].upper()}",
        secret_key=hashlib.sha256(f"secret:{digest}".encode()).hexdigest(),
        session_token=hashlib.sha256(f"token:{digest}".encode()).hexdigest(),
    )
    account, role = role_arn.split(":")[4], role_arn.rsplit("/", 1)[-1]
    sts.register_session(
        credentials.access_key,
        {
            "Arn": f"arn:aws:sts::{account}:assumed-role/{role}/{name}",
            "UserId": f"{role}:{name}",
            "SecretAccessKey": credentials.secret_key,
            "SessionToken": credentials.session_token,
        },
    )
    return credentials
