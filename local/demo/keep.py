"""`KEEP=1`: AWS on this machine in a process of its own that outlives the demo, and `make down`, which ends it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from local.demo.settings import DemoError
from local.emulator import CHECKOUT, START_SECONDS, STATE, Emulator, tail
from local.stack import ENVIRONMENT

PID_FILE = STATE / "pid"
STOP_SECONDS = 20.0


class KeptEmulator(Emulator):
    """An emulator whose parent is a detached process; until `release()` it ends with the demo like any other."""

    def __init__(self, port: int):
        super().__init__(port=port)
        self.keeper: subprocess.Popen[bytes] | None = None
        self.released = False

    def start(self) -> KeptEmulator:
        """Start the detached process and wait until AWS answers. Raises DemoError if it does not."""
        self.state.mkdir(parents=True, exist_ok=True)
        log = self.state / "keep.log"
        with log.open("wb") as output:
            self.keeper = subprocess.Popen(
                [sys.executable, "-m", "local", "up", "--no-deploy", "--port", str(self.port)],
                cwd=CHECKOUT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        PID_FILE.write_text(str(self.keeper.pid))
        try:
            deadline = time.monotonic() + START_SECONDS
            while not self._answers():
                if self.keeper.poll() is not None or time.monotonic() > deadline:
                    raise DemoError(f"AWS on this machine did not start:\n{tail(log)}")
                time.sleep(0.2)
        except BaseException:
            self.stop()
            raise
        return self

    def release(self) -> None:
        """From now on it stays up until `make down`."""
        self.released = True

    def stop(self) -> None:
        if self.keeper and not self.released:
            down()
            self.keeper.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint_url}/_ministack/health", timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            return False


def down(pid_file: Path = PID_FILE) -> bool:
    """End the stack that KEEP=1 left up; returns whether there was one."""
    if not pid_file.exists():
        return False  # what to source may be of a `make up`
    try:
        process = psutil.Process(int(pid_file.read_text()))
        # The id may belong to another program by now.
        ours = process.is_running() and process.cmdline()[1:4] == ["-m", "local", "up"]
    except (OSError, ValueError, psutil.Error):
        ours = False
    pid_file.unlink(missing_ok=True)
    (pid_file.parent / ENVIRONMENT).unlink(missing_ok=True)
    if not ours:
        return False
    below = process.children(recursive=True)
    process.terminate()
    _, alive = psutil.wait_procs([process, *below], timeout=STOP_SECONDS)
    for left in alive:
        with contextlib.suppress(psutil.Error):
            left.kill()
    return True
