"""The quiet period: a run starts when no label has changed for a while, kept by delayed messages, not by a clock."""

import json
import math
import os

from common import aws
from common.inbox import MAX_DELAY_SECONDS


def period_seconds() -> int:
    return int(os.environ["QUIET_PERIOD_SECONDS"])


def longest_wait_seconds() -> int:
    """After which labels that never become quiet start a run anyway."""
    return int(os.environ["LONGEST_WAIT_SECONDS"])


def ask_again(revision: int, delay_seconds: float) -> None:
    """Have start_retraining look at the ledger in `delay_seconds`, or sooner, and then again if need be.

    A quiet period longer than SQS's longest delay chains messages.
    """
    aws.client("sqs").send_message(
        QueueUrl=os.environ["RETRAIN_QUEUE_URL"],
        MessageBody=json.dumps({"revision": revision}),
        DelaySeconds=max(0, min(MAX_DELAY_SECONDS, math.ceil(delay_seconds))),
    )
