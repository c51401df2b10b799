"""Removes what nobody goes back to, at the end of a run that holds the lock: so no other run is at work.

Models and endpoint configurations of all but the last deployments go, never those of what is live; going back to an
older deployment makes them anew. So do the objects that old runs only worked with. Artifacts, reports, evaluations
and verdicts stay.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.typing import LambdaContext

from common import aws, deployments, state
from common.tracing import tracer

logger = Logger()

WORKING_FILES = ("prepared", "trials", "checkpoints", "regularised/checkpoints")
RESERVE_MS = 20_000  # what is not done when so little time is left, the next run's cleaning does
MOST_DEPLOYMENTS = 100  # looked at; more failures in a row keep fewer models, and never the live one's


@logger.inject_lambda_context
@tracer.capture_lambda_handler(capture_response=False)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """`{"run": RunId}` of the run that asks, whose own files and models stay, to what was removed."""
    run = event["run"]
    models = deployments.delete_models(old_models(os.environ["NAME"], run))
    kept = {run, (state.get("training", "last") or {}).get("run")}  # the next run starts from its prepared pictures
    objects = 0
    for old in runs():
        if context.get_remaining_time_in_millis() < RESERVE_MS:
            break
        if old not in kept:
            objects += delete_objects([f"runs/{old}/{folder}/" for folder in WORKING_FILES])
    logger.info("cleaned up", extra={"models": models, "objects": objects})
    return {"models": len(models), "objects": objects}


def old_models(name: str, run: str) -> list[str]:
    """The names of models, and of their endpoint configurations, that are of no use any more."""
    kept = {f"{name}-{run}"} | set(live(name))
    good = [d for d in deployments.latest(MOST_DEPLOYMENTS) if d["outcome"] in (*deployments.SETTLED, "IN_PROGRESS")]
    kept |= {d["endpoint_config"] for d in good[: int(os.environ["KEEP_DEPLOYMENTS"])]}
    # Anchored, because one stack's Name may begin another's.
    mine = re.compile(rf"{re.escape(name)}-\d{{12}}")
    client = aws.client("sagemaker")
    found: set[str] = set()
    for operation, items, field in (
        ("list_endpoint_configs", "EndpointConfigs", "EndpointConfigName"),
        ("list_models", "Models", "ModelName"),
    ):
        for page in client.get_paginator(operation).paginate(NameContains=f"{name}-"):
            found |= {item[field] for item in page[items]}
    return sorted(made for made in found - kept if mine.fullmatch(made))


def live(name: str) -> Iterator[str]:
    """The configurations that the endpoint serves, or is on its way to, and the champion's."""
    endpoint = deployments.endpoint(name) or {}
    for described in (endpoint, endpoint.get("PendingDeploymentSummary", {}), state.champion() or {}):
        for field in ("EndpointConfigName", "endpoint_config"):
            if config := described.get(field):
                yield config


def runs() -> Iterator[str]:
    """Runs that left something in the bucket, newest first: what is older was cleaned up before."""
    pages = aws.client("s3").get_paginator("list_objects_v2")
    found = pages.paginate(Bucket=os.environ["ARTIFACT_BUCKET"], Prefix="runs/", Delimiter="/")
    names = [prefix["Prefix"].split("/")[1] for page in found for prefix in page.get("CommonPrefixes", [])]
    yield from sorted(names, reverse=True)


def delete_objects(prefixes: list[str]) -> int:
    """Delete what lies under these prefixes; the bucket keeps deleted versions for a while."""
    client, bucket, deleted = aws.client("s3"), os.environ["ARTIFACT_BUCKET"], 0
    for prefix in prefixes:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            if keys := [{"Key": item["Key"]} for item in page.get("Contents", [])]:
                answer = client.delete_objects(Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
                if errors := answer.get("Errors"):
                    raise RuntimeError(f"{errors[0]['Key']} cannot be deleted: {errors[0]['Message']}")
                deleted += len(keys)
    return deleted
