"""Cleans up after a run that ended without its own last states: aborted, timed out, or failed while it was failing.

EventBridge tells of it ('Step Functions Execution Status Change'): Catch cannot see an execution's own end. The lock is
freed, jobs that still run are stopped, and people are told, all only if the run still held the lock.
"""

import json
import os
from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.typing import LambdaContext
from botocore.exceptions import ClientError

from common import aws, state
from common.tracing import tracer

logger = Logger()


@logger.inject_lambda_context
@tracer.capture_lambda_handler(capture_response=False)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    detail = event["detail"]
    execution, status = detail["executionArn"], detail["status"]
    lock = state.get("lock", "lock")
    if lock is None or lock["holder"] != execution:
        return {"freed": False}
    # Jobs first: while they run, the lock keeps the next run from starting beside them.
    stopped = stop_jobs(lock["run"])
    freed = state.free_lock(execution)
    logger.warning("a run ended by itself", extra={"execution": execution, "status": status, "stopped": stopped})
    aws.client("sns").publish(
        TopicArn=os.environ["TOPIC"],
        Subject=f"Houndloop: a retraining run {status.lower().replace('_', ' ')}"[:100],
        Message=json.dumps({"execution": execution, "status": status, "stopped_jobs": stopped}, indent=2),
    )
    return {"freed": freed, "stopped": stopped}


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
