"""Writes the immutable snapshot of the labels that one run learns from, or finds an earlier one; says what is in it.

It runs while its run holds the lock, and is the only one to deal pictures to splits.
"""

import json
import os
from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.typing import LambdaContext
from botocore.exceptions import ClientError

from common import aws, clock, dataset, ledger, state
from common.objects import put_if_absent
from common.tracing import tracer

logger = Logger()


class TooFewPictures(Exception):
    """The labels make no dataset that can be trained."""


class NoSuchSnapshot(Exception):
    """A run was to repeat a snapshot that is not there, or no longer whole."""


@logger.inject_lambda_context
@tracer.capture_lambda_handler(capture_response=False)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """`snapshot` in the event is the hash of an earlier one, which is trained again as it is; else one is taken."""
    if event.get("snapshot"):
        found, taken_at = read(event["snapshot"])
    else:
        found, taken_at = take()
    logger.info("snapshot", extra={"hash": found.hash, "counts": found.counts, "left_out": found.reasons})
    return {
        "hash": found.hash,
        "uri": f"s3://{os.environ['ARTIFACT_BUCKET']}/datasets/{found.hash}",
        "classes": found.classes,
        "counts": found.counts,
        "leftOut": found.reasons,
        "takenAt": taken_at,
        "trained": state.get("dataset", found.hash) is not None,
    }


def take() -> tuple[dataset.Dataset, str]:
    """Write a snapshot of the labels as they are, and when they were read."""
    taken_at, entry = clock.iso(clock.now()), ledger.read()
    contents = ledger.contents()
    found = dataset.assemble(contents.labels, contents.splits, int(os.environ["MIN_PICTURES_PER_CLASS"]))
    if reason := dataset.why_too_small(found):
        raise TooFewPictures(reason)
    ledger.save_splits(found.new_splits, after=contents.split_items)
    bucket = os.environ["ARTIFACT_BUCKET"]
    for name, body in documents(found, bucket).items():
        put_if_absent(bucket, f"datasets/{found.hash}/{name}", body.encode())
    # Not part of the identity: labels that are left out may change, and the dataset stay the same.
    aws.client("s3").put_object(
        Bucket=bucket, Key=f"datasets/{found.hash}/left_out.json", Body=left_out(found, taken_at).encode()
    )
    if entry:
        ledger.settle(entry.revision, taken_at)
    return found, taken_at


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


def left_out(found: dataset.Dataset, taken_at: str) -> str:
    """What was labelled when the snapshot was last taken, takes no part, and why."""
    pictures = [{"sha256": p.sha256, "reason": p.reason, "origins": p.origins} for p in found.left_out_pictures]
    told = {"taken_at": taken_at, "classes": found.left_out, "pictures": pictures}
    return json.dumps(told, indent=1, ensure_ascii=False)


def read(hash: str) -> tuple[dataset.Dataset, str]:
    """A snapshot that was taken earlier, and when it was last; NoSuchSnapshot where a part of it is missing."""
    s3, bucket = aws.client("s3"), os.environ["ARTIFACT_BUCKET"]
    prefix = f"datasets/{hash}"
    try:
        manifest = s3.get_object(Bucket=bucket, Key=f"{prefix}/manifest.jsonl")["Body"].read().decode()
        told = json.loads(s3.get_object(Bucket=bucket, Key=f"{prefix}/left_out.json")["Body"].read())
        found = dataset.Dataset.from_manifest(manifest)
    except ClientError as error:
        if aws.code(error) != "NoSuchKey":
            raise
        raise NoSuchSnapshot(f"there is no snapshot {hash}: s3://{bucket}/{prefix}/ is not whole") from error
    except (ValueError, KeyError) as error:
        raise NoSuchSnapshot(f"s3://{bucket}/{prefix}/manifest.jsonl cannot be read: {error!r}") from error
    if found.hash != hash:
        raise NoSuchSnapshot(f"s3://{bucket}/{prefix}/manifest.jsonl is not what was trained: its hash is {found.hash}")
    there: set[str] = set()
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix="images/"):
        there |= {each["Key"].removeprefix("images/") for each in page.get("Contents", [])}
    if missing := [p.sha256 for p in found.pictures if p.sha256 not in there]:
        raise NoSuchSnapshot(f"{len(missing)} of {len(found.pictures)} pictures of snapshot {hash} are no longer kept")
    for name, body in documents(found, bucket).items():
        put_if_absent(bucket, f"{prefix}/{name}", body.encode())
    return found, told["taken_at"]
