"""Ends what a run left that could not end by itself: one that failed, was aborted or timed out.

EventBridge tells of it ('Step Functions Execution Status Change'), because Catch cannot see an execution's own end; and
whoever finds the lock held by an execution that is dead may call it with the same detail. EventBridge delivers these on
a best-effort basis, so every hour it looks at the lock by itself. It may die anywhere and be called again, because the
lock goes last: jobs are stopped, run and deployment recorded, people told, and then the lock is freed. A run that died
in the middle of a deployment leaves it to a recovery, which is an execution of the same workflow: it waits until the
endpoint is at rest and goes back to the champion, guarded as every deployment.
"""

import json
import os
import time
from datetime import UTC, datetime
from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.typing import LambdaContext
from botocore.exceptions import ClientError

from common import aws, clock, deployments, state
from common.runs import KNOWN_AFTER, RUN_ID
from common.tracing import tracer

logger = Logger()

MAX_RECOVERIES = 3  # of one run; whoever is told then has to look
APART_SECONDS = 2.0  # of two runs, with what the clocks of two services may differ by


class StillRunning(RuntimeError):
    """DescribeExecution, which is eventually consistent, does not know of the end yet: to be called again."""


@logger.inject_lambda_context
@tracer.capture_lambda_handler(capture_response=False)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    lock = state.get("lock", "lock")
    execution = event.get("detail", {}).get("executionArn")
    if execution is None:
        return look_at(lock)
    run = describe(execution)
    if run and run["status"] == "RUNNING":
        if not run.get("redriveCount"):
            raise StillRunning(f"Step Functions does not know yet that {execution} has ended")
        return {"freed": False, "why": "it runs again"}
    if lock and lock["holder"] == execution and run:
        return end(run)
    if run:
        tell_of_refusal(run)
    if lock and "recovery" in lock:  # promised the lock, and not started, or only just
        return begin_recovery(lock)
    # The lock of an execution that never was can only be freed.
    return {"freed": bool(lock) and run is None and state.free_lock(execution)}


def look_at(lock: state.Item | None) -> dict[str, Any]:
    """End the holder of a lock, if it is dead and no event told of it."""
    if lock is None or clock.now() - clock.parse(lock["since"]) < KNOWN_AFTER:
        return {"freed": False}
    run = describe(lock["holder"])
    if run:
        return {"freed": False} if run["status"] == "RUNNING" else end(run)
    return begin_recovery(lock) if "recovery" in lock else {"freed": state.free_lock(lock["holder"])}


def describe(execution: str) -> dict[str, Any] | None:
    """What Step Functions says of an execution, its input read and its RunId added; None where there is none."""
    try:
        run = dict(aws.client("stepfunctions").describe_execution(executionArn=execution))
    except ClientError as error:
        if aws.code(error) == "ExecutionDoesNotExist":
            return None
        raise
    given = json.loads(run.get("input") or "{}")
    # As the state Begin makes it: cut off, not rounded.
    started: datetime = run["startDate"].astimezone(UTC)
    return run | {"input": given, "run": started.strftime(RUN_ID)}


def end(run: dict[str, Any]) -> dict[str, Any]:
    """Clean up after the holder of the lock, and free the lock or leave it to a recovery."""
    recovers = run["input"].get("recover") or {"run": run["run"], "attempt": 0, "runs": []}
    # A recovery may die before it has a deployment of its own: the last is then of the run or the recovery before it.
    runs = {run["run"], *recovers["runs"]}
    stopped = stop_jobs(run["run"])
    message, report = why(run)
    champion, recovery = state.champion(), None
    deployment = next((last for last in deployments.latest(1) if last["run"] in runs), None)
    if deployment is None:
        then = "The model that was live is live. The next run may start."
    elif deployment["outcome"] in deployments.SETTLED:
        then = f"Its deployment {deployment['deployment']} was {deployment['outcome']} before. The next run may start."
    else:
        deployments.end(deployment, run["status"], message, clock.iso(clock.now()))
        if is_live(champion):
            deployments.delete_models([f"{os.environ['NAME']}-{name}" for name in sorted(runs)])
            then = f"Deployment {deployment['deployment']} changed nothing that is live. The next run may start."
        elif recovers["attempt"] < MAX_RECOVERIES:
            recovery = recovery_of(recovers | {"runs": sorted(runs)}, champion, message)
            goal = f"goes back to deployment {champion['deployment']}" if champion else "deletes the endpoint"
            then = f"{name_of(recovery)} waits until the endpoint is at rest, and {goal}."
        else:
            then = f"GIVEN UP after {MAX_RECOVERIES} recoveries: the endpoint does not serve the champion. Look at it."
    tell(run, message, report, {"stopped_jobs": stopped, "then": then})
    logger.warning(
        "a run did not end by itself", extra={"execution": run["executionArn"], "why": message, "then": then}
    )
    if recovery:
        # What a run makes is named by the second in which it began: the recovery's must be another.
        age = (clock.now() - run["startDate"]).total_seconds()
        time.sleep(min(max(0.0, APART_SECONDS - age), APART_SECONDS))
        return hand_over(run["executionArn"], recovery)
    return {"freed": state.free_lock(run["executionArn"]), "stopped": stopped}


def is_live(champion: state.Item | None) -> bool:
    """The endpoint is at rest and as it was before: it serves the champion, or is not there where nothing was live."""
    endpoint = deployments.endpoint(os.environ["NAME"])
    if champion is None or endpoint is None:
        return champion is None and endpoint is None
    live = endpoint["EndpointStatus"], endpoint.get("EndpointConfigName")
    return live == ("InService", champion["endpoint_config"])


# --- Recovery --------------------------------------------------------------------------------------------------------


def recovery_of(recovers: dict[str, Any], champion: state.Item | None, message: str) -> dict[str, Any]:
    """The input of the execution that goes back to the champion, or deletes an endpoint that never served one."""
    return {
        "trigger": "recovery",
        "why": f"the run {recovers['run']} ended in the middle of a deployment: {message}"[:1000],
        "deploy": int(champion["deployment"]) if champion else None,
        "recover": recovers | {"attempt": recovers["attempt"] + 1},
    }


def name_of(recovery: dict[str, Any]) -> str:
    return f"recover-{recovery['recover']['run']}-{recovery['recover']['attempt']}"


def hand_over(execution: str, recovery: dict[str, Any]) -> dict[str, Any]:
    """Give the lock to a recovery, then start it. Nobody comes between, and a crash leaves what is to be started."""
    holder = f"{execution.rpartition(':')[0]}:{name_of(recovery)}"
    mine = aws.holds(
        state.table().update_item,
        Key={"pk": "lock", "sk": "lock"},
        UpdateExpression="SET holder = :recovery, recovery = :input",
        ConditionExpression="holder = :execution",
        ExpressionAttributeValues={":recovery": holder, ":input": json.dumps(recovery), ":execution": execution},
    )
    if not mine:  # another invocation came first
        return {"freed": False}
    return begin_recovery({"holder": holder, "recovery": json.dumps(recovery)})


def begin_recovery(lock: state.Item) -> dict[str, Any]:
    """Start the execution that holds the lock already; one that was started is not started twice."""
    prefix, _, name = lock["holder"].rpartition(":")
    try:
        aws.client("stepfunctions").start_execution(
            stateMachineArn=prefix.replace(":execution:", ":stateMachine:"), name=name, input=lock["recovery"]
        )
    except ClientError as error:
        if aws.code(error) != "ExecutionAlreadyExists":
            raise
    return {"freed": False, "recovery": name}


# --- What people read ------------------------------------------------------------------------------------------------


def why(run: dict[str, Any]) -> tuple[str, str]:
    """The reason for a run's end, in words, and where its report is."""
    recorded = state.get("run", run["run"]) or {}
    if recorded.get("execution") == run["executionArn"] and run["status"] == "FAILED":
        return recorded["message"], recorded["report"]
    what = {"FAILED": "failed", "ABORTED": "was aborted", "TIMED_OUT": "timed out"}.get(run["status"], run["status"])
    reason = ": ".join(text for text in (run.get("error"), run.get("cause")) if text)
    place = last_state(run["executionArn"])
    return f"it {what}{f' in {place}' if place else ''}{f': {reason}' if reason else ''}", recorded.get("report", "")


def last_state(execution: str) -> str:
    """The state that an execution was in at its end."""
    history = aws.client("stepfunctions").get_execution_history(
        executionArn=execution, reverseOrder=True, maxResults=50, includeExecutionData=False
    )
    entered = (
        event["stateEnteredEventDetails"]["name"] for event in history["events"] if "StateEntered" in event["type"]
    )
    return next(entered, "")


def tell_of_refusal(run: dict[str, Any]) -> None:
    """Tell of a run that ended before it held the lock; the others have told about themselves."""
    recorded = state.get("run", run["run"])
    if run["status"] == "SUCCEEDED" or (recorded and recorded["execution"] == run["executionArn"]):
        return
    tell(run, why(run)[0], "", {})


def tell(run: dict[str, Any], message: str, report: str, more: dict[str, Any]) -> None:
    """Record the run, unless it did that itself, and tell people."""
    execution, given = run["executionArn"], run["input"]
    topic = aws.client("sns")
    region = topic.meta.region_name
    link = f"https://{region}.console.aws.amazon.com/states/home?region={region}#/v2/executions/details/{execution}"
    told = {"outcome": run["status"], "why": message, "run": run["run"], "report": report, "execution": execution}
    topic.publish(
        TopicArn=os.environ["TOPIC"],
        Subject=f"Houndloop run {run['run']}: {run['status']}"[:100],
        Message=json.dumps(told | {"link": link} | more, indent=2),
    )
    item = {
        "pk": "run", "sk": run["run"], "execution": execution, "outcome": run["status"], "message": message,
        "trigger": given.get("trigger", "hand"), "why": given.get("why", ""), "note": "", "recommendation": "{}",
        "report": report, "dataset_hash": "", "ended_at": clock.iso(clock.now()),
    }  # fmt: skip
    aws.holds(state.table().put_item, Item=item, ConditionExpression="attribute_not_exists(pk)")


# --- Jobs ------------------------------------------------------------------------------------------------------------


def stop_jobs(run: str) -> list[str]:
    """Stop what still runs of `run`; on AWS the trials of a tuning job stop with it."""
    prefix = f"{os.environ['NAME']}-{run}"
    client = aws.client("sagemaker")
    stopped: list[str] = []
    tuning = client.list_hyper_parameter_tuning_jobs(NameContains=prefix, StatusEquals="InProgress")
    for job in tuning["HyperParameterTuningJobSummaries"]:
        name = job["HyperParameterTuningJobName"]
        _stop(lambda name=name: client.stop_hyper_parameter_tuning_job(HyperParameterTuningJobName=name))
        stopped.append(name)
    training = client.list_training_jobs(NameContains=f"{prefix}-train", StatusEquals="InProgress")
    for job in training["TrainingJobSummaries"]:
        name = job["TrainingJobName"]
        _stop(lambda name=name: client.stop_training_job(TrainingJobName=name))
        stopped.append(name)
    processing = client.list_processing_jobs(NameContains=prefix, StatusEquals="InProgress")
    for job in processing["ProcessingJobSummaries"]:
        name = job["ProcessingJobName"]
        _stop(lambda name=name: client.stop_processing_job(ProcessingJobName=name))
        stopped.append(name)
    return stopped


def _stop(call: Any) -> None:
    try:
        call()
    except ClientError as error:
        # It ended between the list and the stop.
        if aws.code(error) not in ("ValidationException", "ResourceNotFound"):
            raise
