"""Lambda: errors under their types, metrics, logs, code unpacked once, traces sampled, workers that end in time.

ministack reports every exception of a function as `Runtime.HandlerError`, so a state machine's Catch for a named error
would never match here. Its worker, busy in a handler, also outlives an emulator that was killed. And it counts API
calls rather than invocations: nothing that an event source, a rule or a topic starts, a throttled call twice. Every
invocation gets a log stream of its own, where AWS has one for each execution environment, and all are kept. It unpacks
function and layers anew for every execution environment, which costs more than a hundred pictures. And it has every
invocation traced, where Lambda samples.

For ministack's authors: the worker's error type; metrics at `_execute_function_dispatch`, where every invocation
passes; metrics of the embedded metric format in `_emit_lambda_logs`; a worker's log stream; code unpacked once; the
sampling of traces.
"""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
import threading
import time
import zipfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from ministack.core import lambda_runtime, responses
from ministack.services import cloudwatch, lambda_svc

from . import TESTED_MINISTACK, SeamMovedError, expect, logs, metrics

# In ministack's worker: what it answers when the handler raises, and where the type is added.
ANSWER = '"trace": traceback.format_exc()}'
ANSWER_WITH_TYPE = (
    '"trace": traceback.format_exc(), "error_type": type(e).__name__, "stack": traceback.format_tb(e.__traceback__)}'
)
WATCH = """
import os as _os, threading as _threading, time as _time
def _end_with_parent(parent=_os.getppid()):
    while _os.getppid() == parent:
        _time.sleep(1)
    _os._exit(1)
_threading.Thread(target=_end_with_parent, daemon=True).start()
"""

# Of the invocation that a thread executes: the worker's last answer, its execution environment, and the id that the
# next new log stream gets.
_invocation = threading.local()


# Of the invocations of a function that are traced, one each second and these of the others are sampled.
# https://docs.aws.amazon.com/lambda/latest/dg/services-xray.html
SAMPLED_SHARE = 0.05

_unpacking = threading.Lock()


class Unpacked(zipfile.ZipFile):
    """An archive whose files are unpacked once, and stand as links wherever else they are wanted.

    Functions may not write to their code on AWS, so nobody notices. What Python compiles stays for the next one.
    """

    def namelist(self) -> list[str]:
        """What `extractall` makes: a link for each name at the top."""
        return sorted({name.split("/")[0] for name in super().namelist()})

    def extractall(self, path: Any = None, *_: Any) -> None:
        """Link to the files, which lie below the folder for temporary files, under the hash of the archive."""
        home = (
            Path(tempfile.gettempdir()) / "unpacked" / hashlib.sha256(Path(str(self.filename)).read_bytes()).hexdigest()
        )
        with _unpacking:
            if not home.exists():
                home.parent.mkdir(exist_ok=True)
                new = Path(tempfile.mkdtemp(dir=home.parent))
                super().extractall(new, super().namelist())
                os.rename(new, home)
        for name in os.listdir(home):
            os.symlink(home / name, Path(path) / name)


class Sampling:
    """Which invocations' traces are kept: the first of a second, and a share of the others, by function."""

    def __init__(self) -> None:
        self._seconds: dict[str, int] = {}

    def takes(self, function: str) -> bool:
        now, before = int(time.time()), self._seconds.get(function)
        self._seconds[function] = now
        return now != before or random.random() < SAMPLED_SHARE


def measure(function: str, moment: float | None = None, **values: float) -> None:
    """Record metrics of one function, and of all functions of the account and region."""
    for name, value in values.items():
        metrics.record("AWS/Lambda", name, value, {"FunctionName": function}, moment)
        metrics.record("AWS/Lambda", name, value, {}, moment)


def measure_invocation(function: str, started: float, result: dict) -> None:
    """Record how an invocation went, at the time that it began. A throttled one is none."""
    if result.get("throttle"):
        measure(function, started, Throttles=1)
        return
    took = (time.time() - started) * 1000
    measure(function, started, Invocations=1, Errors=int(bool(result.get("error"))), Throttles=0, Duration=took)


def measure_concurrency(function: str) -> None:
    """Record how many invocations run now, this one included."""
    _, running = lambda_svc.executions_in_flight()
    here = f"{responses.get_account_id()}:{responses.get_region()}:"
    metrics.record("AWS/Lambda", "ConcurrentExecutions", running.get(here + function, 0), {"FunctionName": function})
    everywhere = sum(count for key, count in running.items() if key.startswith(here))
    metrics.record("AWS/Lambda", "ConcurrentExecutions", everywhere, {})


def watch_invocations() -> None:
    """Record metrics where every invocation passes, however it was started, and from what functions print."""
    execute = expect(
        "functions", lambda_svc, "_execute_function_dispatch", "func", "config", "event", "request_id", "started"
    )
    acquire = expect("functions", lambda_svc, "_acquire_execution_slot", "func", "config")
    emit_logs = expect("functions", lambda_svc, "_emit_lambda_logs", "func", "request_id", "log_text")
    expect("functions", lambda_svc, "_emit_lambda_metrics", "function_name")
    expect("functions", lambda_svc, "executions_in_flight")
    new_uuid = expect("functions", lambda_svc, "new_uuid")

    def execute_and_measure(func: dict, config: dict, event: Any, request_id: str, started: float) -> dict:
        result: dict = {"error": True}
        try:
            result = execute(func, config, event, request_id, started)
            return result
        finally:
            measure_invocation(config["FunctionName"], started, result)

    def acquire_and_measure(func: dict, config: dict) -> tuple:
        slot, limit = acquire(func, config)
        if slot is None:
            measure(config["FunctionName"], Throttles=1)
        else:
            measure_concurrency(config["FunctionName"])
        return slot, limit

    def emit_lambda_logs(func: dict, request_id: str, log_text: str, *more: Any, **named: Any) -> None:
        _invocation.stream = getattr(_invocation, "environment", None)
        try:
            emit_logs(func, request_id, log_text, *more, **named)
        finally:
            _invocation.stream = _invocation.environment = None
        config = func.get("config") or func
        logs.shorten((config.get("LoggingConfig") or {}).get("LogGroup") or f"/aws/lambda/{config['FunctionName']}")
        for line in (log_text or "").splitlines():
            for namespace, name, dimensions, moment, unit, values in metrics.embedded_metrics(line, time.time()):
                cloudwatch._store_datum(namespace, name, dimensions, moment, unit, None, values, None, None)

    lambda_svc._execute_function_dispatch = execute_and_measure
    lambda_svc._acquire_execution_slot = acquire_and_measure
    lambda_svc._emit_lambda_logs = emit_lambda_logs
    lambda_svc._emit_lambda_metrics = lambda *arguments, **named: None
    lambda_svc.new_uuid = lambda: getattr(_invocation, "stream", None) or new_uuid()


def sample_traces() -> None:
    """Let the functions know, as Lambda does, which of their traces are kept: the others cost them little."""
    trace_id = expect("functions", lambda_svc, "_xray_trace_id_for_invocation", "config")
    sampling = Sampling()

    def sampled_trace_id(config: dict, inbound: str | None = None) -> str | None:
        found = trace_id(config, inbound)
        if inbound or found is None or sampling.takes(config["FunctionArn"]):
            return found
        return found.replace("Sampled=1", "Sampled=0")

    lambda_svc._xray_trace_id_for_invocation = sampled_trace_id


def install() -> None:
    """Change the worker's program, carry the type of an error through to the answer, record metrics, sample traces."""
    script = expect("functions", lambda_runtime, "_PYTHON_WORKER_SCRIPT", kind=str)
    if script.count(ANSWER) != 1:
        raise SeamMovedError(
            f"ministack {version('ministack')} moved what local/seams/functions.py hooks: {ANSWER!r}, with which its "
            f"worker answers an exception, is {script.count(ANSWER)} times in lambda_runtime._PYTHON_WORKER_SCRIPT, "
            f"not once. Install ministack=={TESTED_MINISTACK}, or change that seam to follow."
        )
    worker = expect("functions", lambda_runtime, "Worker", "func_name", "config", "code_zip")
    execute = expect("functions", lambda_svc, "_execute_function_warm", "func", "event", "request_id")
    invoke = worker.invoke

    def invoke_and_note(self: Any, *arguments: Any, **named: Any) -> dict:
        self.houndloop_environment = getattr(self, "houndloop_environment", None) or responses.new_uuid()
        _invocation.environment = self.houndloop_environment
        _invocation.answer = invoke(self, *arguments, **named)
        return _invocation.answer

    def execute_function(func: dict, event: Any, request_id: str) -> dict:
        _invocation.answer = {}
        result = execute(func, event, request_id)
        body, answer = result.get("body"), _invocation.answer
        if result.get("error") and isinstance(body, dict) and answer.get("error_type"):
            body.update(errorType=answer["error_type"], requestId=request_id, stackTrace=answer["stack"])
        return result

    expect("functions", lambda_runtime, "zipfile", kind=ModuleType)
    lambda_runtime.zipfile = SimpleNamespace(**{**vars(zipfile), "ZipFile": Unpacked})
    lambda_runtime._PYTHON_WORKER_SCRIPT = WATCH + script.replace(ANSWER, ANSWER_WITH_TYPE)
    worker.invoke = invoke_and_note
    lambda_svc._execute_function_warm = execute_function
    watch_invocations()
    sample_traces()
