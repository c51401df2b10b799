"""Becoming somebody who may do little."""

from __future__ import annotations

import os
import pwd


def drop_privileges(user: str) -> None:
    """From root to `user`, for good. Called with the model in memory and before any request.

    SageMaker wants containers that start as root: what it mounts under /opt/ml belongs to root.
    """
    if user and os.geteuid() == 0:
        account = pwd.getpwnam(user)
        os.setgroups([])
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)
