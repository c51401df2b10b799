"""Lambda: errors under the type that the function raised, and workers that end with the emulator.

ministack reports every exception of a function as `Runtime.HandlerError`, so a state machine's Catch for a named error
would never match here. Its worker, busy in a handler, also outlives an emulator that was killed.
"""

from __future__ import annotations

import threading
from importlib.metadata import version
from typing import Any

from ministack.core import lambda_runtime
from ministack.services import lambda_svc

from . import TESTED_MINISTACK, SeamMovedError, expect

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


def install() -> None:
    """Change the worker's program, and carry the type of an error through to the answer."""
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
    answer = threading.local()  # a worker is invoked in the thread that executes the function

    def invoke_and_note(self: Any, *arguments: Any, **named: Any) -> dict:
        answer.last = invoke(self, *arguments, **named)
        return answer.last

    def execute_function(func: dict, event: Any, request_id: str) -> dict:
        answer.last = {}
        result = execute(func, event, request_id)
        body = result.get("body")
        if result.get("error") and isinstance(body, dict) and answer.last.get("error_type"):
            body.update(errorType=answer.last["error_type"], requestId=request_id, stackTrace=answer.last["stack"])
        return result

    lambda_runtime._PYTHON_WORKER_SCRIPT = WATCH + script.replace(ANSWER, ANSWER_WITH_TYPE)
    worker.invoke = invoke_and_note
    lambda_svc._execute_function_warm = execute_function
