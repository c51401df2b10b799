"""SQS: metrics, and IAM for batches: whoever may do a thing to one message may do it to a batch.

ministack publishes no metrics of queues. Counts are recorded as things happen. The levels of an active queue are
sampled each minute, as on AWS, and within a second of a change.

For ministack's authors: `mark_sent` and the sampler; the names of the actions for batches.
https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-available-cloudwatch-metrics.html
"""

from __future__ import annotations

import contextlib
import threading
import time

from ministack.core import iam_actions, responses
from ministack.services import sqs

from . import expect, metrics

BATCH = "Batch"
SAMPLE_SECONDS = 60
ACTIVE_SECONDS = 6 * 60 * 60  # how long a queue counts as active after its last use, if it is empty
STUCK_RECEIVES = 3  # a message received so often goes to the back of a standard queue, and its age no longer counts
COUNTED, ARRIVED = "houndloop_counted", "houndloop_arrived"  # marks on ministack's messages

_used: dict[str, float] = {}  # when each queue was last used, by its ARN
_sampled: dict[
    str, tuple[float, list[float]]
] = {}  # when its levels were last recorded, and those that can be compared
_lock = threading.Lock()


def measure(queue: dict, name: str, value: float, moment: float | None = None) -> None:
    """Record one metric of a queue."""
    metrics.record("AWS/SQS", name, value, {"QueueName": queue["name"]}, moment)


def size(message: dict) -> int:
    """A message's size in bytes, as SQS counts it: body, and attributes with their names and types."""
    attributes = message.get("message_attributes") or {}
    return len(str(message.get("body") or "").encode()) + sum(
        len(name.encode()) + len(str(value.get("DataType", ""))) + len(str(value.get("StringValue") or "").encode())
        for name, value in attributes.items()
        if isinstance(value, dict)
    )


def mark_sent(queue: dict, now: float) -> None:
    """Count the messages that are new in a queue, whoever put them there: users, rules, topics, buckets.

    Those that a redrive policy moved here carry the mark of their first queue: on AWS too they do not count as sent.
    """
    with _lock:
        new = [message for message in list(queue["messages"]) if COUNTED not in message]
        for message in new:
            message[COUNTED] = True
    for message in new:
        sent = min(message.get("sent_at", now), now)
        measure(queue, "NumberOfMessagesSent", 1, sent)
        measure(queue, "SentMessageSize", size(message), sent)


def levels(queue: dict, now: float) -> dict[str, float]:
    """What a queue holds now, by the names of the metrics."""
    visible = hidden = delayed = 0
    oldest = now
    retention = float(queue["attributes"].get("MessageRetentionPeriod", 345600))
    for message in list(queue["messages"]):
        if message.get("sys", {}).get("DeadLetterQueueSourceArn"):
            arrived = message.setdefault(ARRIVED, now)  # the age begins anew in a dead-letter queue
        else:
            arrived = message.get("enqueued_at", message.get("sent_at", now))
        if message.get("sent_at", now) <= now - retention:
            continue  # ministack removes it when the queue is next used
        if message.get("visible_at", 0) <= now:
            visible += 1
        elif message.get("receive_count"):
            hidden += 1
        else:
            delayed += 1
        if queue.get("is_fifo") or message.get("receive_count", 0) < STUCK_RECEIVES:
            oldest = min(oldest, arrived)
    return {
        "ApproximateNumberOfMessagesVisible": visible,
        "ApproximateNumberOfMessagesNotVisible": hidden,
        "ApproximateNumberOfMessagesDelayed": delayed,
        "ApproximateAgeOfOldestMessage": int(now - oldest),
    }


def sample(now: float) -> None:
    """Record the levels of every active queue of every account and region that are due."""
    for (account, region, _), queue in list(sqs._queues._data.items()):
        arn = queue["attributes"]["QueueArn"]
        with responses.request_scope(account, region):
            mark_sent(queue, now)
            if not queue["messages"] and now - _used.get(arn, 0) > ACTIVE_SECONDS:
                continue
            found = levels(queue, now)
            counts = [value for name, value in found.items() if name != "ApproximateAgeOfOldestMessage"]
            last, before = _sampled.get(arn, (0.0, []))
            if counts != before or now - last >= SAMPLE_SECONDS:
                _sampled[arn] = now, counts
                for name, value in found.items():
                    measure(queue, name, value, now)


def measure_action(action: str, url: str, result: dict) -> None:
    """Note the use of a queue, and record what an API call did to it."""
    try:
        queue = sqs._get_q(url)
    except sqs._Err:  # deleted, or none at all
        return
    _used[queue["attributes"]["QueueArn"]] = time.time()
    if action == "ReceiveMessage" and not result.get("Messages"):
        measure(queue, "NumberOfEmptyReceives", 1)
    elif action == "DeleteMessage":
        measure(queue, "NumberOfMessagesDeleted", 1)
    elif action == "DeleteMessageBatch" and result.get("Successful"):
        measure(queue, "NumberOfMessagesDeleted", len(result["Successful"]))


def install() -> None:
    """Record metrics, and ask IAM about `sqs:SendMessage` where the request is SendMessageBatch, and so on."""
    known = expect("queues", iam_actions, "extract_iam_action", "service", "method", "path", "headers", "body")
    expect("queues", sqs, "_queues", kind=responses.AccountRegionScopedDict)
    expect("queues", sqs, "_get_q", "url")
    expect("queues", sqs, "_Err")
    dispatch = expect("queues", sqs, "_dispatch", "action", "data", "qurl")
    collect = expect("queues", sqs, "_collect_msgs", "q", "max_n", "vis_timeout")
    receive = expect("queues", sqs, "_receive_messages_for_esm", "queue_url", "max_number")
    delete = expect("queues", sqs, "_delete_messages_for_esm", "queue_url", "receipt_handles")

    def extract_iam_action(
        service: str, method: str, path: str, headers: dict, body: bytes, query_params: dict
    ) -> str | None:
        action = known(service, method, path, headers, body, query_params)
        return action.removesuffix(BATCH) if action and service == "sqs" else action

    async def dispatch_and_measure(action: str, data: dict, qurl: str) -> dict:
        result = await dispatch(action, data, qurl)
        measure_action(action, data.get("QueueUrl") or result.get("QueueUrl") or qurl, result)
        return result

    def collect_and_measure(q: dict, max_n: int, vis_timeout: int) -> list:
        mark_sent(q, time.time())
        found = collect(q, max_n, vis_timeout)
        if found:
            measure(q, "NumberOfMessagesReceived", len(found))
        return found

    def receive_and_measure(queue_url: str, max_number: int) -> list[dict]:
        found = receive(queue_url, max_number)
        queue = sqs._get_q(queue_url)
        _used[queue["attributes"]["QueueArn"]] = time.time()
        if not found:
            measure(queue, "NumberOfEmptyReceives", 1)
        return found

    def delete_and_measure(queue_url: str, receipt_handles: set[str]) -> None:
        delete(queue_url, receipt_handles)
        with contextlib.suppress(sqs._Err):
            measure(sqs._get_q(queue_url), "NumberOfMessagesDeleted", len(receipt_handles))

    iam_actions.extract_iam_action = extract_iam_action
    sqs._dispatch = dispatch_and_measure
    sqs._collect_msgs = collect_and_measure
    sqs._receive_messages_for_esm = receive_and_measure
    sqs._delete_messages_for_esm = delete_and_measure
    metrics.samplers.append(sample)
