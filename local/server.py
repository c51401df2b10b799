"""The emulator's process: `python -m local.server`, started by `local.emulator`.

Installs the seams, serves, and ends with everything it started: on SIGTERM, and when its standard input closes,
which is how it learns that whoever started it is gone, however that happened.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable

import uvicorn
from ministack import app
from ministack.core import lambda_runtime

from local import processes, seams
from local.emulator import HOST
from local.seams import autoscaling, persistence, sagemaker

logger = logging.getLogger("houndloop")

STOP_SECONDS = 8.0  # for saving state; then the process ends regardless
GRACE_SECONDS = 3  # for requests in flight, before that
KEEP_ALIVE_SECONDS = 75
PARENT_CHECK_SECONDS = 1.0


def watch_parent() -> None:
    """Stop when the parent is gone. Its end of our standard input closes with it, unless a fork of it lives on: then
    the parent's id changes."""
    pipe, parent = os.dup(0), os.getppid()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # no child of ours shall hold, or read, the pipe
    os.close(null)

    def until_closed() -> None:
        while os.read(pipe, 1):
            pass
        stop("whoever started it is gone")

    def until_orphaned() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_SECONDS)
        stop("whoever started it is gone")

    for watcher in (until_closed, until_orphaned):
        threading.Thread(target=watcher, name=watcher.__name__, daemon=True).start()


def stop(why: str) -> None:
    """Ask the server to stop as SIGTERM does."""
    logger.info("stopping: %s", why)
    end_later()
    os.kill(os.getpid(), signal.SIGTERM)


def end_later() -> None:
    """Make sure of the end: a function that still runs would keep the process for minutes."""

    def end() -> None:
        time.sleep(STOP_SECONDS)
        finish(1)

    threading.Thread(target=end, name="end", daemon=True).start()


def finish(code: int) -> None:
    """End this process and all below it, now."""
    processes.end(processes.descendants(os.getpid()), grace=0.5)
    logging.shutdown()
    os._exit(code)


def stop_services() -> None:
    """Stop what serves (jobs and endpoints of SageMaker, the workers of functions), then save, whatever failed."""
    for step in (sagemaker.shutdown, lambda_runtime.reset, persistence.finish):
        try:
            step()
        except Exception:
            logger.exception("%s.%s failed", step.__module__, step.__name__)


def settle_memory() -> None:
    """Keep what was loaded out of the garbage collector's sight: walking it stalls every request for half a second."""
    gc.collect()
    gc.freeze()


def web_server(application: Callable) -> uvicorn.Server:
    """What answers HTTP: not ministack's own web server, whose parser in Python is a third of what a request costs."""
    config = uvicorn.Config(
        application,
        host=HOST,
        port=int(app._resolve_port()),
        http="httptools",
        ws="wsproto",
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        log_config=None,
        access_log=False,
        server_header=False,  # a service that has one sets its own, and the date
        date_header=False,
        proxy_headers=False,  # whom a request comes from is what IAM's conditions ask about
        reset_contextvars=True,  # ministack keeps in them who calls: not to be known to the next request
    )
    return uvicorn.Server(config)


def main() -> None:
    """Serve until stopped."""
    watch_parent()
    seams.install()
    served = app.app

    async def serve(scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "lifespan":
            await served(scope, receive, send)
            return

        async def listen() -> dict:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await sagemaker.start()
                await autoscaling.start()
                settle_memory()
            if message["type"] == "lifespan.shutdown":
                end_later()
                stopping = threading.Thread(target=stop_services)
                stopping.start()
                while stopping.is_alive():
                    await asyncio.sleep(0.05)
            return message

        try:
            await served(scope, listen, send)
        except Exception:  # the web server would go on without what did not start: empty, where state was kept
            logger.exception("the emulator could not start")
            finish(1)

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each connection is a file
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # raised again when all is stopped
    code = 1
    try:
        web_server(serve).run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        logger.exception("the emulator failed")
    finally:
        finish(code)


if __name__ == "__main__":
    main()
