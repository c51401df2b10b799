"""Step Functions: tasks run with the state machine's role, executions time out, and a stop is heeded at once.

ministack calls the services of a task in process, with everybody's rights, and covers only some of them. Here every
task is an API call to the emulator itself, signed with a session of the role, so that IAM decides as on AWS.

For ministack's authors: `integrations`, which knows nothing of them, in place of the table of services; executions
that time out; a stop that is heeded while a state runs; HeartbeatSeconds of a callback; retries after more than a
minute, MaxDelaySeconds and JitterStrategy; the end of what ran when the emulator died.
"""

from __future__ import annotations

import contextvars
import json
import math
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import botocore.config
import botocore.session
from botocore.client import BaseClient
from ministack import app
from ministack.core import iam_evaluator
from ministack.core.responses import get_account_id, get_region, now_iso, request_scope
from ministack.services import stepfunctions as states
from ministack.services import sts

from . import expect, integrations, sessions
from .history import ENDED

SESSION = "StepFunctions"  # what the sessions of the roles are called
HEARTBEAT_SECONDS = 0.2  # how soon a waiting execution notices that it was stopped
RESTARTED = "States.ServiceRestart"  # ministack's error of an execution that ran when the emulator died
LONGEST_RETRY = 60  # seconds that ministack waits before a retry, however long it should

_execution: contextvars.ContextVar[dict | None] = contextvars.ContextVar("execution", default=None)
_deadline: contextvars.ContextVar[float | None] = contextvars.ContextVar("deadline", default=None)
_lock = threading.RLock()


class ExecutionEnded(states._ExecutionError):
    """The execution was stopped or timed out while one of its states ran."""

    def __init__(self) -> None:
        super().__init__(ENDED, "The execution has ended.")


# --- Credentials -----------------------------------------------------------------------------------------------------

_botocore = botocore.session.Session()
_clients: dict[tuple[str, str, str], BaseClient] = {}


def clients_of(role_arn: str) -> integrations.ClientFactory:
    """Clients of this emulator that act as the role."""

    def client(service: str) -> BaseClient:
        region = get_region()
        credentials = sessions.of_role(role_arn, SESSION)  # anew each time: a reset forgets them
        with _lock:
            key = (service, role_arn, region)
            if key not in _clients:
                _clients[key] = _botocore.create_client(
                    service,
                    region_name=region,
                    endpoint_url=f"http://127.0.0.1:{app._resolve_port()}",
                    config=botocore.config.Config(
                        read_timeout=930,  # a function may run for 15 minutes
                        retries={"total_max_attempts": 1},  # the state's Retry decides
                        max_pool_connections=50,
                        inject_host_prefix=False,
                        s3={"addressing_style": "path"},
                    ),
                    **credentials.for_botocore(),
                )
            return _clients[key]

    return client


def check_managed_rule(role_arn: str, service: str, action: str) -> None:
    """`.sync` for SageMaker needs a rule that Step Functions manages: without the rights to it, AWS refuses.

    Raises:
        _ExecutionError: the role may not manage the rule.
    """
    rules = {
        "createTrainingJob": "StepFunctionsGetEventsForSageMakerTrainingJobsRule",
        "createHyperParameterTuningJob": "StepFunctionsGetEventsForSageMakerTuningJobsRule",
        "createProcessingJob": "StepFunctionsGetEventsForSageMakerProcessingJobsRule",
        "createTransformJob": "StepFunctionsGetEventsForSageMakerTransformJobsRule",
        "startBuild": "StepFunctionsGetEventForCodeBuildStartBuildRule",
    }
    if not app.AUTH or service not in ("sagemaker", "codebuild") or action not in rules:
        return
    rule = f"arn:aws:events:{get_region()}:{get_account_id()}:rule/{rules[action]}"
    access_key = sessions.of_role(role_arn, SESSION).access_key
    for needed in ("events:PutTargets", "events:PutRule", "events:DescribeRule"):
        if iam_evaluator.enforce(access_key, needed, "events", get_region(), resource_arn=rule) is not None:
            raise states._ExecutionError(
                "States.Runtime", f"'{role_arn}' is not authorized to create managed-rule. It needs {needed} on {rule}."
            )


# --- Tasks -----------------------------------------------------------------------------------------------------------


def pause(seconds: float) -> None:
    """Sleep as a state of this execution does: no longer than it runs, nor than its task may.

    Raises:
        ExecutionEnded: the execution was stopped or timed out.
        _ExecutionError: `States.Timeout`, the task's TimeoutSeconds have passed.
    """
    execution, deadline = _execution.get(), _deadline.get()
    end = time.monotonic() + seconds
    while True:
        if execution is not None and execution["status"] != "RUNNING":
            raise ExecutionEnded
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            raise states._ExecutionError("States.Timeout", "The task timed out.")
        if now >= end:
            return
        time.sleep(min(HEARTBEAT_SECONDS, end - now))


def role_of(execution: dict) -> str:
    """The role that an execution's tasks run with."""
    return states._state_machines[execution["stateMachineArn"]]["roleArn"]


def _submission(resource: str, answer: Any) -> dict:
    return {"taskSubmittedEventDetails": {"resource": resource, "output": json.dumps(answer)}}


def invoke_as_role(resource: str, input_data: Any) -> Any:
    """Run a task's resource with the rights of the current execution's role."""
    execution = _execution.get()
    if execution is None:
        raise states._ExecutionError("States.Runtime", "A task ran outside an execution.")
    pause(0)
    role = role_of(execution)

    def submitted(answer: dict) -> None:
        states._add_event(execution, "TaskSubmitted", _submission(resource, answer))

    try:
        if ".sync" in resource:
            integration = integrations.parse(resource)
            check_managed_rule(role, integration.service, integration.action)
        return integrations.invoke(resource, input_data, clients_of(role), pause, states._ExecutionError, submitted)
    except integrations.TaskError as error:
        raise states._ExecutionError(error.error, error.cause) from None


def invoke_with_callback(resource: str, input_data: Any, token: str, state_def: dict) -> Any:
    """Run a `.waitForTaskToken` task: make the call, then wait until somebody returns the token."""
    answered = threading.Event()
    states._task_tokens[token] = {"event": answered, "result": None, "error": None, "heartbeat": None}
    try:
        answer = invoke_as_role(resource.replace(".waitForTaskToken", ""), input_data)
        if execution := _execution.get():
            states._add_event(execution, "TaskSubmitted", _submission(resource, answer))
        began = beat = time.monotonic()
        last_beat = None
        while not answered.is_set():
            now = time.monotonic()
            if now - began > state_def.get("TimeoutSeconds", math.inf):
                raise states._ExecutionError("States.Timeout", "The task timed out waiting for its token.")
            if states._task_tokens[token]["heartbeat"] != last_beat:
                beat, last_beat = now, states._task_tokens[token]["heartbeat"]
            if now - beat > state_def.get("HeartbeatSeconds", math.inf):
                raise states._ExecutionError("States.HeartbeatTimeout", "The task sent no heartbeat in time.")
            pause(HEARTBEAT_SECONDS)
        answer = states._task_tokens[token]
    finally:
        states._task_tokens.pop(token, None)
    failure = answer["error"]
    if failure:
        raise states._ExecutionError(failure.get("Error", "States.TaskFailed"), failure.get("Cause", ""))
    return json.loads(answer["result"] or "{}") if isinstance(answer["result"], str) else answer["result"]


# --- Executions ------------------------------------------------------------------------------------------------------


def end_execution(execution: dict, status: str, event: str, error: str, cause: str) -> None:
    """End an execution that still runs, and tell EventBridge."""
    with _lock:
        if execution["status"] != "RUNNING":
            return
        execution.update(status=status, error=error, cause=cause, stopDate=now_iso())
        states._add_event(
            execution, event, {f"{event[0].lower()}{event[1:]}EventDetails": {"error": error, "cause": cause}}
        )
    states._emit_execution_status_event(execution)


def _loading(original: Callable[[], None]) -> Callable[[], None]:
    def load_persisted_state() -> None:
        original()
        end_interrupted()

    return load_persisted_state


def end_interrupted() -> None:
    """End the executions that ran when the last emulator died: ministack marks them as failed, and tells nobody."""
    for (account, region, _), execution in states._executions.all_items():
        last = [event["type"] for event in execution["events"][-1:]]
        if execution.get("error") == RESTARTED and last != ["ExecutionFailed"]:
            details = {"error": RESTARTED, "cause": execution["cause"]}
            with request_scope(account, region):
                states._add_event(execution, "ExecutionFailed", {"executionFailedEventDetails": details})
                states._emit_execution_status_event(execution)


def _timeout_of(execution: dict) -> float | None:
    try:
        seconds = json.loads(states._state_machines[execution["stateMachineArn"]]["definition"]).get("TimeoutSeconds")
    except (KeyError, ValueError, AttributeError):  # the original reports a missing or broken definition
        return None
    return float(seconds) if seconds else None


def _running(original: Callable[[str], None]) -> Callable[[str], None]:
    def run_execution(exec_arn: str) -> None:
        execution = states._executions.get(exec_arn)
        if execution is None:
            return
        current = _execution.set(execution)
        timer, seconds = None, _timeout_of(execution)
        if seconds:
            timer = threading.Timer(
                seconds,
                contextvars.copy_context().run,
                (
                    end_execution,
                    execution,
                    "TIMED_OUT",
                    "ExecutionTimedOut",
                    "States.Timeout",
                    f"The execution timed out after {seconds:g} seconds.",
                ),
            )
            timer.daemon = True
            timer.start()
        try:
            original(exec_arn)
        finally:
            _execution.reset(current)
            if timer:
                timer.cancel()

    return run_execution


def _failing(original: Callable[[dict, str, str], None]) -> Callable[[dict, str, str], None]:
    def fail_execution(execution: dict, error: str, cause: str) -> None:
        with _lock:
            running = execution["status"] == "RUNNING"
        if running:  # what fails after a stop or a timeout must not change how the execution ended
            original(execution, error, cause)

    return fail_execution


def _timing(original: Callable[[str, Any, float], Any]) -> Callable[[str, Any, float], Any]:
    def invoke_resource_with_timeout(resource: str, input_data: Any, timeout: float) -> Any:
        current = _deadline.set(time.monotonic() + timeout)
        try:
            return original(resource, input_data, timeout)
        finally:
            _deadline.reset(current)

    return invoke_resource_with_timeout


def _matching(original: Callable[[list, str], bool]) -> Callable[[list, str], bool]:
    def error_matches(error_equals: list, error: str) -> bool:
        return error != ENDED and original(error_equals, error)

    return error_matches


def _retrying(original: Callable[..., tuple]) -> Callable[..., tuple]:
    def find_matching_retrier(retriers: list, error: str, retry_counts: dict) -> tuple:
        """As the original, with MaxDelaySeconds and JitterStrategy worked into the interval."""
        retrier, index = original(retriers, error, retry_counts)
        if retrier is None:
            return retrier, index
        delay = retrier.get("IntervalSeconds", 1) * retrier.get("BackoffRate", 2.0) ** retry_counts.get(index, 0)
        delay = min(delay, retrier.get("MaxDelaySeconds", delay))
        if retrier.get("JitterStrategy") == "FULL":
            delay = random.uniform(0, delay)
        if delay > LONGEST_RETRY and _execution.get() is not None:  # TestState asks too, and does not wait
            states._scaled_sleep(delay - LONGEST_RETRY)
        return {**retrier, "IntervalSeconds": delay, "BackoffRate": 1.0}, index

    return find_matching_retrier


def install() -> None:
    """Replace how ministack runs tasks, waits, and ends executions."""

    def here(name: str, *parameters: str) -> Any:
        return expect("stepfunctions", states, name, *parameters)

    for name, parameters in {
        "_invoke_resource": ("resource", "input_data"),
        "_invoke_with_callback": ("resource", "input_data", "token", "state_def"),
        "_invoke_activity": ("resource", "input_data"),
        "_execute_task": ("state_def", "raw_input", "execution", "ctx"),
        "_scaled_sleep": ("seconds",),
        "_add_event": ("execution", "event_type", "details"),
        "_emit_execution_status_event": ("execution",),
        "_run_sub_machine": ("states", "start_at", "input_data", "execution", "ctx"),
    }.items():
        here(name, *parameters)
    expect("stepfunctions", sts, "register_session", "access_key", "session")
    expect("stepfunctions", app, "_resolve_port")
    scale = expect("stepfunctions", states, "_SFN_WAIT_SCALE", kind=float)
    original_resource = states._invoke_resource

    def invoke_resource(resource: str, input_data: Any) -> Any:
        # Activities are a queue inside Step Functions; TestState has no execution, and so no state machine's role.
        if ":activity:" in resource or _execution.get() is None:
            return original_resource(resource, input_data)
        return invoke_as_role(resource, input_data)

    app._load_persisted_state = _loading(expect("stepfunctions", app, "_load_persisted_state"))
    states._invoke_resource = invoke_resource
    states._invoke_with_callback = invoke_with_callback
    states._scaled_sleep = lambda seconds: pause(seconds * scale)
    states._run_execution = _running(here("_run_execution", "exec_arn"))
    states._fail_execution = _failing(here("_fail_execution", "execution", "error", "cause"))
    states._invoke_resource_with_timeout = _timing(
        here("_invoke_resource_with_timeout", "resource", "input_data", "timeout")
    )
    states._error_matches = _matching(here("_error_matches", "error_equals", "error"))
    states._find_matching_retrier = _retrying(here("_find_matching_retrier", "retriers", "error", "retry_counts"))
