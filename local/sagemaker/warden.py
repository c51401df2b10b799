"""The parent of every job and endpoint server: starts them, reports their ends, and leaves none behind.

    python warden.py SOCKET_FD MODULE,MODULE

It is a process of its own for two reasons. It is single-threaded, so it may fork: with the named modules imported
once (torch takes a second), a Python job starts without importing them again. And it outlives the emulator for a
moment: when the emulator goes, even by SIGKILL, the socket closes and the warden stops every group. The kernel's
parent-death signal covers the death of the warden itself, where there is one (Linux).

Messages are JSON lines. In: {"spawn": id, "argv", "env", "cwd", "log", "preload"} and {"signal": id, "number"}.
Out: {"started": id, "pid"}, {"failed": id, "reason"} and {"exited": id, "code"} (negative: the signal that ended it).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LAST_GRACE = 2.0  # seconds between SIGTERM and SIGKILL when the emulator has gone


def prctl(option: int, value: int) -> None:
    """Linux's prctl; nothing where there is none."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class Warden:
    """The loop: one socket to the emulator, one pipe that SIGCHLD and SIGTERM write to, and the running groups."""

    def __init__(self, control: socket.socket, modules: list[str]) -> None:
        self.control = control
        self.modules = modules
        self.imported = False
        self.groups: dict[int, str] = {}  # pid of the group's leader: id
        self.ending = False
        self.wake_read, self.wake_write = os.pipe()
        for end in (self.wake_read, self.wake_write):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._end)
        prctl(PR_SET_CHILD_SUBREAPER, 1)

    def _end(self, *_: object) -> None:
        self.ending = True

    def run(self) -> None:
        """Serves until the emulator closes its end, then stops everything."""
        pending = b""
        try:
            while not self.ending:
                readable, _, _ = select.select([self.control.fileno(), self.wake_read], [], [])
                if self.wake_read in readable:
                    self._drain_wakeups()
                    self.reap()
                if self.control.fileno() in readable:
                    data = self.control.recv(1 << 16)
                    if not data:
                        break
                    *lines, pending = (pending + data).split(b"\n")
                    for line in lines:
                        self.obey(json.loads(line))
        except ConnectionError:  # the emulator was killed before it had read what it was told
            pass
        finally:
            self.stop_all()

    def _drain_wakeups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self.wake_read, 512):
                pass

    def obey(self, message: dict) -> None:
        """One message from the emulator."""
        if "spawn" in message:
            self.spawn(message)
            return
        for pid, identity in self.groups.items():
            if identity == message["signal"]:
                self.kill_group(pid, message["number"])

    def report(self, **message: object) -> None:
        """Tells the emulator, if it is still there."""
        with contextlib.suppress(OSError):
            self.control.sendall(json.dumps(message).encode() + b"\n")

    def preload(self) -> None:
        """Imports what jobs will want; a module that is not there or does not import is the job's business."""
        if not self.imported:
            self.imported = True
            for module in self.modules:
                with contextlib.suppress(Exception):
                    importlib.import_module(module)

    def spawn(self, message: dict) -> None:
        """Starts one process as the leader of its own session and group."""
        if message["preload"]:
            self.preload()
        try:
            log = os.open(message["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            ready, leading = os.pipe()
            pid = os.fork()
        except OSError as error:
            self.report(failed=message["spawn"], reason=str(error))
            return
        if pid == 0:
            os.close(ready)
            become(message, log, leading, self)
        os.close(log)
        os.close(leading)
        os.read(ready, 1)  # its end: before the child leads its group, a signal to the group would be lost
        os.close(ready)
        self.groups[pid] = message["spawn"]
        self.report(started=message["spawn"], pid=pid)

    def kill_group(self, leader: int, number: int) -> None:
        """Signals a group that may be half gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, number)

    def reap(self) -> bool:
        """Reports ended leaders, and ends what they left behind in their groups or detached from them.

        Returns whether any child is left.
        """
        reaped, left = False, True
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                left = False
                break
            if pid == 0:
                break
            reaped = True
            if pid in self.groups:
                self.kill_group(pid, signal.SIGKILL)
                self.report(exited=self.groups.pop(pid), code=os.waitstatus_to_exitcode(status))
        if reaped:  # also one that was detached: what was below it has come up to here
            self.kill_detached()
        return left

    def kill_detached(self) -> None:
        """Ends processes that left their group (setsid) and were handed to this one.

        That is after the end of their job's leader: while it lives, it is the one that inherits them.
        """
        for entry in Path("/proc").glob("[0-9]*"):  # Linux only, as is the subreaper
            with contextlib.suppress(OSError, ValueError, IndexError):
                parent, group = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1:3]
                if int(parent) == os.getpid() and int(group) not in self.groups:
                    os.kill(int(entry.name), signal.SIGKILL)

    def stop_all(self) -> None:
        """SIGTERM, a moment, SIGKILL, until nothing is left."""
        for leader in self.groups:
            self.kill_group(leader, signal.SIGTERM)
        deadline = time.monotonic() + LAST_GRACE
        while self.groups and time.monotonic() < deadline:
            time.sleep(0.02)
            self.reap()
        for leader in self.groups:
            self.kill_group(leader, signal.SIGKILL)
        self.groups.clear()
        while self.reap():
            self.kill_detached()  # again and again: what a leader had detached comes up to here with its end
            time.sleep(0.01)


def become(message: dict, log: int, leading: int, warden: Warden) -> None:
    """In the forked child: turns into the job. Never returns."""
    code = 127
    try:
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        prctl(PR_SET_CHILD_SUBREAPER, 1)  # as the first process of a container inherits what is orphaned in it
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.close(leading)
        warden.control.close()
        os.close(warden.wake_read)
        os.close(warden.wake_write)
        with open(os.devnull) as null:
            os.dup2(null.fileno(), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        os.chdir(message["cwd"])
        argv = [word for number, word in enumerate(message["argv"]) if (number, word) != (1, "--")]  # python -- script
        if message["preload"] and (script := python_script(argv)):
            os.environ.clear()
            os.environ.update(message["env"])
            code = run_script(script, argv[1:])
        else:
            os.execvpe(message["argv"][0], message["argv"], message["env"])
    except BaseException as error:  # whatever it is, the child must not return into the warden's loop
        with contextlib.suppress(OSError):
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def python_script(argv: list[str]) -> Path | None:
    """The script that `python <path> …` would run, if argv is that and the Python is this one."""
    if len(argv) < 2 or argv[0] != sys.executable or argv[1].startswith("-"):
        return None
    path = Path(argv[1]).absolute()
    path = path / "__main__.py" if path.is_dir() else path
    return path if path.is_file() else None


def run_script(script: Path, argv: list[str]) -> int:
    """Runs a script as `__main__` in this forked interpreter, with the exit code that `python` would give."""
    import atexit
    import builtins
    import threading
    import traceback
    import types

    search = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:1] = [str(script.parent), *search]
    sys.argv = argv
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    reseed()
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=str(script), __builtins__=builtins)
    sys.modules["__main__"] = main
    code = 0
    try:
        exec(compile(script.read_bytes(), str(script), "exec"), main.__dict__)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            code = end.code or 0
        else:
            print(end.code, file=sys.stderr)
            code = 1
    except BaseException as error:
        # Without this function's own frame: the log shows what a plain `python script.py` would.
        traceback.print_exception(error.with_traceback(error.__traceback__.tb_next if error.__traceback__ else None))
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for non-daemon threads, as the interpreter does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    return code & 0xFF


def reseed() -> None:
    """Gives a forked child what a fresh interpreter has: numpy's own random seed, and the job's thread count."""
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules and (threads := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        sys.modules["torch"].set_num_threads(max(1, int(threads)))


if __name__ == "__main__":
    Warden(socket.socket(fileno=int(sys.argv[1])), [name for name in sys.argv[2].split(",") if name]).run()
