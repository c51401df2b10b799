"""Waiting for what a test expects, without guessing how long it takes."""

import time


def wait_for(check, timeout=30.0, every=0.1):
    """The first true answer of `check`, or a failure that shows the last one."""
    deadline = time.monotonic() + timeout
    while True:
        answer = check()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"nothing after {timeout} s: {check.__name__} answered {answer!r}"
        time.sleep(every)
