"""The serving image as the benchmarks run it: `inference/`, observed, and misbehaving on command.

An image here is a folder, so `local/observed:1` is this one where HOUNDLOOP_IMAGES names `benchmarks/`. Two variables
of the model's environment: OBSERVED, a folder in which each server notes when its requests began and ended (seconds of
time.monotonic), and COMMAND, a file that says what is to happen to requests: `500 0.5` answers half of them with that
status, `slow 2` delays each by two seconds; an empty or missing file leaves them alone.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

INFERENCE = Path(__file__).resolve().parents[2] / "inference"


def command() -> tuple[str, float]:
    """What is to happen to a request now."""
    try:
        what, amount = Path(os.environ["COMMAND"]).read_text().split()
    except (KeyError, OSError, ValueError):
        return "", 0.0
    return what, float(amount)


async def refuse(status: int, receive: Callable, send: Callable) -> None:
    """Answers a request, once it is read."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def observe(server: Any) -> None:
    """Puts itself between the web server and the application of the module `server`."""
    answer = server.Server.__call__
    folder = os.environ.get("OBSERVED")
    notes = (Path(folder) / str(os.getpid())).open("a", buffering=1) if folder else None

    async def observed(self: Any, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["path"] != "/invocations":
            return await answer(self, scope, receive, send)
        began = time.monotonic()
        what, amount = command()
        if what == "slow":
            await asyncio.sleep(amount)
        if what.isdigit() and random.random() < amount:
            await refuse(int(what), receive, send)
        else:
            await answer(self, scope, receive, send)
        if notes:
            notes.write(f"{began} {time.monotonic()}\n")

    server.Server.__call__ = observed


def main() -> int:
    """Runs `inference/`, observed."""
    sys.path.insert(0, str(INFERENCE))
    spec = importlib.util.spec_from_file_location("inference_command", INFERENCE / "__main__.py")
    assert spec is not None and spec.loader is not None
    inference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(inference)
    run_front = inference.run_front

    def observed_front(*arguments: Any) -> int:
        import server  # in the front, after the fork, as `inference/` does

        observe(server)
        return int(run_front(*arguments))

    inference.run_front = observed_front  # type: ignore[attr-defined]
    return int(inference.main())


if __name__ == "__main__":
    sys.exit(main())
