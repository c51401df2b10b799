"""What a run would learn from the labels: the news since the last training, and whether they are worth it."""

import json
import os
from typing import Any

from botocore.exceptions import ClientError

from common import aws, dataset, state
from start_retraining import decide


def worth_a_run(found: dataset.Dataset) -> tuple[bool, str, dict[str, Any]]:
    """Whether a run would learn something from `found`, why or why not, and the counts that say so."""
    if reason := dataset.why_too_small(found):
        return False, reason, {}
    last, lost = last_training()
    news = decide.news(found, last)
    facts = vars(news) | {"min_new_pictures": int(os.environ["MIN_NEW_PICTURES"]), "dataset_hash": found.hash}
    if state.get("dataset", found.hash):
        return False, "this very dataset was trained already; make retrain FORCE=1 repeats it", facts
    learns, why = decide.reason(news, facts["min_new_pictures"])
    champion = state.champion()
    known = json.loads(champion["classes"]) if champion else []
    if learns and (reason := decide.why_not_to_be_judged(found, known, int(os.environ["GATE_MIN_TEST_PICTURES"]))):
        return False, reason, facts
    return learns, f"{why}{lost}", facts


def last_training() -> tuple[dataset.Dataset | None, str]:
    """What the last training learned from, None before the first; and a remark where it is no longer kept.

    Then all is new: a run too many harms less than one that never comes.
    """
    if (last := state.get("dataset", "last")) is None:
        return None, ""
    bucket, key = os.environ["ARTIFACT_BUCKET"], f"datasets/{last['hash']}/manifest.jsonl"
    try:
        body = aws.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
    except ClientError as error:
        if aws.code(error) != "NoSuchKey":
            raise
        return None, f" (what the last one had is not known: there is no s3://{bucket}/{key})"
    return dataset.Dataset.from_manifest(body.decode()), ""
