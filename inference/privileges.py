"""Becoming somebody who may do little."""

from __future__ import annotations

import os
import pwd


def account(user: str) -> pwd.struct_passwd | None:
    """Of the user to become; None for staying who one is. ValueError when there is no such user."""
    if not user or os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(user)
    except KeyError:
        raise ValueError(f"RUN_AS is {user!r}; there is no such user here") from None


def drop_privileges(user: str) -> None:
    """From root to `user`, for good. Called with the model in memory and before any request.

    SageMaker wants containers that start as root: what it mounts under /opt/ml belongs to root.
    """
    if becomes := account(user):
        os.setgroups([])
        os.setgid(becomes.pw_gid)
        os.setuid(becomes.pw_uid)
