"""The serving container's command: `python inference serve`.

One process per core, each with the whole server and a model that is memory-mapped and so shared. They accept from one
listening socket; a supervisor puts back the ones that die. With one worker there is no supervisor.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import pwd
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import uvicorn

BAD_ARTIFACT = 78  # exit status (sysexits.h: EX_CONFIG): starting again would not help
DRAIN = 25  # seconds for the requests at work after SIGTERM; SageMaker kills after 30

log = logging.getLogger("inference")


def serve(model_dir: str, host: str, port: int, workers: int) -> int:
    """Listens and serves until SIGTERM. Returns the exit status."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        log.error("cannot listen on %s:%d: %s. Is another server running there?", host, port, error.strerror)
        return 1
    if workers == 1:
        return work(listener, model_dir)
    supervisor = os.getpid()
    return supervise(lambda: work(listener, model_dir, supervisor), workers)


def work(listener: socket.socket, model_dir: str, supervisor: int | None = None) -> int:
    """One worker: loads the model, and only then accepts connections."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))  # until uvicorn takes it, and again when it has drained
    started = time.perf_counter()

    import uvicorn  # here, so that the supervisor stays small and forks before any library has threads

    from predictor import BadArtifact, Predictor
    from server import Server, Settings

    try:
        settings = Settings.from_environment()
        predictor = Predictor(model_dir, os.environ.get("PRECISION", "f32"))
        if settings.model_version not in ("", predictor.model_version):
            found = f"MODEL_VERSION is {settings.model_version}, the artifact's model_version {predictor.model_version}"
            raise BadArtifact(f"{found}: the endpoint's model points to another artifact")
    except (BadArtifact, ValueError) as error:
        log.error("cannot serve: %s", error)
        return BAD_ARTIFACT
    drop_privileges(os.environ.get("RUN_AS", ""))
    config = uvicorn.Config(
        Server(predictor, settings),
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        timeout_keep_alive=75,  # callers keep idle connections for a minute: closing first would cost them a request
        timeout_graceful_shutdown=DRAIN,
    )
    server = uvicorn.Server(config)

    async def run() -> None:
        log.info("serving %s after %.2f s", predictor.model_version, time.perf_counter() - started)
        watcher = asyncio.create_task(stop_without(supervisor, server)) if supervisor else None
        await server.serve(sockets=[listener])
        if watcher:
            watcher.cancel()

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(run())
    return 0


def drop_privileges(user: str) -> None:
    """From root to `user`, for good. Called with the model in memory and before any request.

    SageMaker wants containers that start as root: what it mounts under /opt/ml belongs to root.
    """
    if user and os.geteuid() == 0:
        account = pwd.getpwnam(user)
        os.setgroups([])
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)


async def stop_without(supervisor: int, server: uvicorn.Server) -> None:
    """A child that lost its parent, even by SIGKILL, is handed to another."""
    while os.getppid() == supervisor:
        await asyncio.sleep(0.5)
    server.should_exit = True


def supervise(worker: Callable[[], int], count: int) -> int:
    """Keeps `count` forked processes at `worker`. Ends with them on SIGTERM, and when they cannot start."""
    children: dict[int, float] = {}  # process id: when it started
    stopping = False

    def start() -> None:
        # Blocked, because a signal between the fork and the note of it would miss the child.
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        if stopping:
            return
        if (child := os.fork()) == 0:
            for number in (*signals, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            status = 1
            try:
                status = worker()
            except SystemExit as exit_:
                status = exit_.code if isinstance(exit_.code, int) else 1
            except BaseException:
                log.exception("worker failed")
            finally:
                logging.shutdown()
                os._exit(status)
        children[child] = time.monotonic()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)

    def stop(*_) -> None:
        nonlocal stopping
        stopping = True
        signal.alarm(DRAIN + 3)
        send(signal.SIGTERM)

    def send(number: int) -> None:
        for child in list(children):
            with suppress(ProcessLookupError):
                os.kill(child, number)

    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        signal.signal(number, stop)
    signal.signal(signal.SIGALRM, lambda *_: send(signal.SIGKILL))
    for _ in range(count):
        start()
    outcome = short_lives = 0
    while children:
        child, wait_status = os.wait()  # as the container's first process it also collects strangers' orphans
        began = children.pop(child, None)
        if began is None or stopping:
            continue
        status = os.waitstatus_to_exitcode(wait_status)
        short_lives = short_lives + 1 if time.monotonic() - began < 5 else 0
        if status == BAD_ARTIFACT or short_lives > 3 * count:
            outcome = status if status > 0 else 1
            stop()
            continue
        log.error("a worker ended with status %d; starting another", status)
        start()
    return outcome


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python inference", description="Houndloop's serving container.")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "serve",
        help="serve the model of a directory over HTTP",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Defaults come from the environment: MODEL_DIR, BIND_HOST, SAGEMAKER_BIND_TO_PORT, WORKERS. "
        "Further variables: MODEL_VERSION, DEPLOYMENT, PRECISION (f32, bf16), QUEUE_SIZE (requests per worker), "
        "REQUEST_TIMEOUT (seconds), MAX_PAYLOAD_BYTES, RUN_AS (the user that root becomes).",
    )
    environment = os.environ.get
    command.add_argument("--model-dir", default=environment("MODEL_DIR", "/opt/ml/model"), help="unpacked model.tar.gz")
    command.add_argument("--host", default=environment("BIND_HOST", "127.0.0.1"), help="address to listen on")
    command.add_argument("--port", type=int, default=environment("SAGEMAKER_BIND_TO_PORT", "8080"), help="port")
    command.add_argument("--workers", type=int, default=environment("WORKERS", str(cores())), help="processes")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers (or WORKERS) is {options.workers}; it must be at least 1")
    logging.basicConfig(level="INFO", format="%(asctime)s %(process)d %(levelname)s %(message)s")
    return serve(options.model_dir, options.host, options.port, options.workers)


def cores() -> int:
    """Those this process may use, not those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
