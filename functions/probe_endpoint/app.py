"""Sends test pictures to the endpoint while a new fleet bakes: an idle inbox gives its alarms nothing to judge.

A picture that is not answered is counted, not raised: judging it is the alarms' business.
"""

import json
import time
from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.typing import LambdaContext

from common import aws, endpoint
from common.errors import EndpointTrouble
from common.tracing import tracer
from preprocessing import Preprocess, crop

logger = Logger()

PICTURES = 4


@logger.inject_lambda_context
@tracer.capture_lambda_handler(capture_response=False)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """`{"endpoint", "bucket", "manifest": key, "preprocess", "requests", "seconds"}` to how it went."""
    spec = Preprocess.from_json(event["preprocess"])
    crops = [crop(data, spec) for data in pictures(event["bucket"], event["manifest"])]
    pause = event["seconds"] / event["requests"]
    failures: list[str] = []
    for number in range(event["requests"]):
        started = time.monotonic()
        try:
            endpoint.classify(event["endpoint"], [crops[number % len(crops)]])
        except EndpointTrouble as trouble:
            failures.append(str(trouble))
        time.sleep(max(0.0, pause - (time.monotonic() - started)))
    if failures:
        logger.warning("probes failed", extra={"failed": len(failures), "first": failures[0]})
    return {"sent": event["requests"], "failed": len(failures)}


def pictures(bucket: str, manifest: str) -> list[bytes]:
    """The first few pictures that a ManifestFile names."""
    listed = json.loads(aws.client("s3").get_object(Bucket=bucket, Key=manifest)["Body"].read())
    prefix = listed[0]["prefix"].removeprefix(f"s3://{bucket}/")
    keys = [prefix + name for name in listed[1 : 1 + PICTURES]]
    return [aws.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys]
