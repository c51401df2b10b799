"""The quiet period: a run starts when no label has changed for a while, kept by delayed messages, not by a clock."""

import json
import os

from common import aws

MAX_DELAY_SECONDS = 900  # the longest DelaySeconds of SQS; a longer quiet period chains messages


def period_seconds() -> int:
    return int(os.environ["QUIET_PERIOD_SECONDS"])


def ask_again(revision: int, delay_seconds: float) -> None:
    """Have start_retraining look at the ledger again in `delay_seconds`, if it still stands at `revision` then."""
    aws.client("sqs").send_message(
        QueueUrl=os.environ["RETRAIN_QUEUE_URL"],
        MessageBody=json.dumps({"revision": revision}),
        DelaySeconds=max(0, min(MAX_DELAY_SECONDS, round(delay_seconds))),
    )
