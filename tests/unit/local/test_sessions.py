"""Sessions of roles, registered from many threads at once."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from local.seams import sessions


@pytest.fixture
def switching():
    """Threads take turns after as few steps as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_many_executions_may_begin_at_once(switching, monkeypatch: pytest.MonkeyPatch):
    from ministack.services import sts

    monkeypatch.setattr(sts, "_sessions", {})
    monkeypatch.setattr(sts, "register_session", sts.register_session)  # put back at the end
    sessions.install()
    roles = [f"arn:aws:iam::000000000000:role/r{number}" for number in range(1500)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda role: sessions.of_role(role, "run"), roles))
    assert len({credentials.access_key for credentials in found}) == len(sts._sessions) == len(roles)
