"""Ctrl-C in the middle of the demo: it ends at once, says so, and leaves no process behind."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from local.emulator import free_port
from tests.makers import template


def test_ctrl_c_in_the_middle_of_tuning_leaves_no_process(tmp_path: Path):
    log = tmp_path / "log"
    command = [sys.executable, "-m", "local.demo", "--port", str(free_port()), "--labelled", "20"]
    with log.open("w") as output:
        demo = subprocess.Popen(
            [*command, "--state", str(tmp_path / "state")], cwd=template.ROOT, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 240
        while "epoch 1" not in log.read_text():  # a trial is training
            assert demo.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)
        below = psutil.Process(demo.pid).children(recursive=True)
        commands = " ".join(word for process in below for word in _command(process))
        assert "local.server" in commands and len(below) > 3
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 130
    finally:
        demo.kill()
    assert "Interrupted" in log.read_text()
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive, [_command(process) for process in alive]
    left = [p.pid for p in psutil.process_iter() if any(str(tmp_path) in word for word in _command(p))]
    assert not left


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []
