"""The serving container's command: `python inference serve`.

A supervisor, which stays small, starts a front that speaks HTTP and a worker for each core, and puts back workers that
die. The model's file is memory-mapped: workers share what they read of it, and keep only what they compute with.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from channel import Channel
    from settings import Settings

DRAIN = 25  # seconds for the requests at work after SIGTERM; SageMaker kills after 30
SHORT_LIVES = 3  # deaths of each worker, one after the other, before it was ready, after which there is no hope

log = logging.getLogger("inference")


def serve(model_dir: str, host: str, port: int, workers: int) -> int:
    """Listens and serves until SIGTERM. Returns the exit status."""
    from channel import Channel
    from privileges import account
    from settings import BAD_ARTIFACT, Settings

    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        settings = Settings.from_environment(model_dir, workers)
        account(settings.run_as)  # a wrong name is told here, once
        listener.bind((host, port))
    except ValueError as error:
        log.error("cannot serve: %s", error)
        return BAD_ARTIFACT
    except OSError as error:
        log.error("cannot listen on %s:%d: %s. Is another server running there?", host, port, error.strerror)
        return 1
    channels = [Channel(settings.max_payload) for _ in range(workers)]
    return Supervisor(listener, channels, settings).run()


class Supervisor:
    """Keeps a front and the workers running. Ends with them on SIGTERM, when the front ends, and when workers cannot
    start."""

    def __init__(self, listener: socket.socket, channels: Sequence[Channel], settings: Settings) -> None:
        self.listener, self.channels, self.settings = listener, channels, settings
        self.workers: dict[int, Channel] = {}  # by process id
        self.front = 0
        self.stopping = False
        self.signals = (signal.SIGTERM, signal.SIGINT)

    def run(self) -> int:
        """Returns the exit status."""
        from settings import BAD_ARTIFACT

        supervisor = os.getpid()
        with self.unsignalled():
            for number in self.signals:
                signal.signal(number, self.stop)
            signal.signal(signal.SIGALRM, lambda *_: self.kill(self.front))
            self.front = self.start(lambda: run_front(self.listener, self.channels, self.settings, supervisor))
        self.listener.close()  # the front's alone
        preload()
        for channel in self.channels:
            self.start_worker(channel)
        short_lives = 0
        while True:
            child, wait_status = os.wait()  # as the container's first process it also collects strangers' orphans
            status = os.waitstatus_to_exitcode(wait_status)
            if child == self.front:
                self.kill(*self.workers)
                return 0 if self.stopping and status in (0, -signal.SIGTERM) else max(status, 1)
            if child not in self.workers:
                continue
            channel = self.workers.pop(child)
            short_lives = 0 if channel.was_ready(child) else short_lives + 1
            if status == BAD_ARTIFACT or short_lives > SHORT_LIVES * len(self.channels):
                self.kill(self.front, *self.workers)
                return max(status, 1)
            log.error("a worker ended with status %d; starting another", status)
            self.start_worker(channel)

    def start_worker(self, channel: Channel) -> None:
        supervisor = os.getpid()
        with self.unsignalled():
            self.workers[self.start(lambda: run_worker(channel, self.settings, supervisor))] = channel

    @contextmanager
    def unsignalled(self) -> Iterator[None]:
        """A signal between a fork and the note of it would miss the child: it waits until both are done."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)

    def start(self, program: Callable[[], int]) -> int:
        """A forked process. Forked before any library has threads, and by one that never has any."""
        if (child := os.fork()) == 0:
            for number in (*self.signals, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)
            status = 1
            try:
                status = program()
            except SystemExit as exit_:
                status = exit_.code if isinstance(exit_.code, int) else 1
            except BaseException:
                log.exception("a process failed")
            finally:
                logging.shutdown()
                os._exit(status)
        return child

    def stop(self, *_: object) -> None:
        """The front takes no more requests and ends when those at work are answered; then the workers may end."""
        self.stopping = True
        signal.alarm(DRAIN + 3)
        with suppress(ProcessLookupError):
            os.kill(self.front, signal.SIGTERM)

    @staticmethod
    def kill(*children: int) -> None:
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def run_front(listener: socket.socket, channels: Sequence[Channel], settings: Settings, supervisor: int) -> int:
    """Speaks HTTP, once a worker has loaded the model."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))  # until uvicorn takes it, and again when it has drained
    import uvicorn  # here, so that the supervisor stays small
    import uvloop

    from pool import Pool
    from privileges import drop_privileges
    from server import Server

    async def run() -> None:
        orphaned = asyncio.create_task(end_of(supervisor))
        pool = Pool(channels, settings)
        await asyncio.wait([orphaned, loaded := asyncio.create_task(pool.ready.wait())], return_when="FIRST_COMPLETED")
        if not loaded.done():
            return
        config = uvicorn.Config(
            Server(pool),
            http="httptools",
            ws="none",
            lifespan="off",
            access_log=False,
            log_level="warning",
            timeout_keep_alive=75,  # callers keep idle connections for a minute: closing first costs them a request
            timeout_graceful_shutdown=DRAIN,
        )
        config.load()
        server = uvicorn.Server(config)
        drop_privileges(settings.run_as)
        log.info("serving %s", pool.model["model_version"])
        orphaned.add_done_callback(lambda _: setattr(server, "should_exit", True))
        await server.serve(sockets=[listener])
        pool.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    return 0


def preload() -> None:
    """Loads the workers' libraries before they are forked: they share them, and one that is put back starts at once.

    None of them has threads before it works, but for OpenBLAS, which would start one for each core.
    """
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    import worker  # noqa: F401

    gc.freeze()  # collecting garbage would write to what is shared


def run_worker(channel: Channel, settings: Settings, supervisor: int) -> int:
    """Decodes and infers."""
    from worker import work  # here, so that the supervisor stays small

    return work(channel, settings, supervisor)


async def end_of(supervisor: int) -> None:
    """Waits for it. A child that lost its parent, even by SIGKILL, is handed to another."""
    while os.getppid() == supervisor:
        await asyncio.sleep(0.5)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python inference", description="Houndloop's serving container.")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "serve",
        help="serve the model of a directory over HTTP",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Defaults come from the environment: MODEL_DIR, BIND_HOST, SAGEMAKER_BIND_TO_PORT, WORKERS. "
        "Further variables: MODEL_VERSION, DEPLOYMENT, PRECISION (f32, bf16, int8), QUEUE_SIZE (requests per worker), "
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
    if not 0 <= options.port < 65536:
        parser.error(f"--port (or SAGEMAKER_BIND_TO_PORT) is {options.port}; it must be less than 65536")
    logging.basicConfig(level="INFO", format="%(asctime)s %(process)d %(levelname)s %(message)s")
    return serve(options.model_dir, options.host, options.port, options.workers)


def cores() -> int:
    """Those this process may use, not those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
