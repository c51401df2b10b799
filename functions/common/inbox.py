"""The inbox queue, for the functions that put pictures into it themselves; and sending many messages to any queue."""

import os

from common import aws

FOLDER = "inbox/"
MAX_BATCH = 10  # the most messages of one request to SQS
MAX_BACKLOG = 5000  # messages beyond which nothing lost or old is added: a minute or two of work for fresh pictures
MAX_DELAY_SECONDS = 900  # the longest DelaySeconds of SQS
LEVELS = (  # waiting, in the works, put back
    "ApproximateNumberOfMessages",
    "ApproximateNumberOfMessagesNotVisible",
    "ApproximateNumberOfMessagesDelayed",
)


class SendFailed(RuntimeError):
    """SQS refused some of the messages for now."""


def queue_url() -> str:
    return os.environ["INBOX_QUEUE_URL"]


def send(queue: str, bodies: list[str]) -> None:
    """Enqueue messages in this order; raises SendFailed, and all may be sent again. `queue` is its URL.

    Ten of them may have 256 kB together (SendMessageBatch).
    """
    for start in range(0, len(bodies), MAX_BATCH):
        entries = [{"Id": str(i), "MessageBody": body} for i, body in enumerate(bodies[start : start + MAX_BATCH])]
        answer = aws.client("sqs").send_message_batch(QueueUrl=queue, Entries=entries)
        if answer.get("Failed"):
            raise SendFailed(f"{len(answer['Failed'])} messages: {answer['Failed'][0].get('Message', '')}")


def backlog() -> int:
    """How many messages the queue holds, those in the works and put back included; some seconds old."""
    answer = aws.client("sqs").get_queue_attributes(QueueUrl=queue_url(), AttributeNames=list(LEVELS))
    return sum(int(answer["Attributes"][level]) for level in LEVELS)
