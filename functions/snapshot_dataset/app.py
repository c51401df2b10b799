"""Writes the immutable snapshot of the labels that one run learns from, and says what is in it."""

import json
import os
from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.typing import LambdaContext

from common import aws, clock, dataset, ledger, state
from common.tracing import tracer

logger = Logger()


class TooFewPictures(Exception):
    """The labels make no dataset that can be trained."""


@logger.inject_lambda_context
@tracer.capture_lambda_handler(capture_response=False)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    taken_at, entry = clock.iso(clock.now()), ledger.read()
    found = dataset.assemble(ledger.active_labels(), int(os.environ["MIN_PICTURES_PER_CLASS"]))
    if reason := dataset.why_too_small(found):
        raise TooFewPictures(reason)
    bucket = os.environ["ARTIFACT_BUCKET"]
    prefix = f"datasets/{found.hash}"
    for name, body in documents(found, bucket).items():
        aws.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=body.encode())
    if entry:
        ledger.settle(entry.revision, taken_at)
    logger.info("snapshot", extra={"hash": found.hash, "counts": found.counts, "left_out": found.left_out})
    return {
        "hash": found.hash,
        "uri": f"s3://{bucket}/{prefix}",
        "classes": found.classes,
        "counts": found.counts,
        "leftOut": list(found.left_out.values())[:20],
        "takenAt": taken_at,
        "trained": state.get("dataset", found.hash) is not None,
    }


def documents(found: dataset.Dataset, bucket: str) -> dict[str, str]:
    """The files of the snapshot by name."""

    def manifest_file(pictures: list[dataset.Picture]) -> str:
        # SageMaker's ManifestFile: a prefix, then what follows it.
        return json.dumps([{"prefix": f"s3://{bucket}/images/"}, *sorted(p.sha256 for p in pictures)])

    return {
        "manifest.jsonl": found.manifest(),
        "classes.json": json.dumps(found.classes),
        "images.manifest": manifest_file(found.pictures),
        "test.manifest": manifest_file([p for p in found.pictures if p.split == "test"]),
    }
