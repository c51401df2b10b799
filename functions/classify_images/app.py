"""Classifies the pictures of one batch of inbox events, in one request to the endpoint.

Every picture ends in one row: CLASSIFIED, REJECTED (never a picture), WAITING (no model yet) or FAILED. Trouble with
one message fails that message alone; trouble with the endpoint costs no message a try: it is put back with a delay.
"""

import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlencode

from aws_lambda_powertools import Logger, Metrics, Tracer
from aws_lambda_powertools.metrics import MetricUnit
from aws_lambda_powertools.utilities.typing import LambdaContext
from botocore.exceptions import ClientError

from common import aws, clock, endpoint, predictions, state
from common.errors import EndpointTrouble
from common.events import MalformedEvent, ObjectEvent
from common.objects import GONE, fetch, version_of
from preprocessing import BrokenImage, Crop, Preprocess, prepare

logger = Logger()
metrics = Metrics()
tracer = Tracer()

INBOX = "inbox/"
QUARANTINE = "quarantine/"
MAX_KEY_BYTES = 1024  # S3's limit
MAX_COPY_BYTES = 5 * 1024**3  # CopyObject's limit


@dataclass(frozen=True)
class Message:
    """One SQS message, read."""

    id: str
    event: ObjectEvent
    receives: int


class Answered(NamedTuple):
    """A picture, and the classes that the endpoint gave it: the top 5, best first."""

    message: Message
    crop: Crop
    classes: list[dict[str, Any]]


@logger.inject_lambda_context
@metrics.log_metrics(capture_cold_start_metric=True)
@tracer.capture_lambda_handler(capture_response=False)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Answers SQS with the messages that are to be tried again."""
    batch = Batch()
    messages = batch.read(event["Records"])
    champion = state.champion()
    if champion is None:
        batch.each(wait_for_model, [m for m, ok in zip(messages, batch.each(is_picture, messages), strict=True) if ok])
    else:
        classify(batch, messages, champion)
    return {"batchItemFailures": [{"itemIdentifier": id} for id in batch.failures]}


def classify(batch: "Batch", messages: list[Message], champion: dict[str, Any]) -> None:
    """Load, ask, record: the one path of a picture to its row."""
    spec = Preprocess.from_json(champion["preprocess"])
    crops: list[tuple[Message, Crop]] = []
    for message, crop in zip(messages, batch.each(lambda m: load(m.event, spec), messages), strict=True):
        if crop is not None:
            crops.append((message, crop))
    for positions in endpoint.chunks([crop.pixels for _, crop in crops]):
        asked = [crops[i] for i in positions]
        started = time.perf_counter()
        try:
            answer = endpoint.classify(champion["endpoint"], [crop.pixels for _, crop in asked])
        except EndpointTrouble as trouble:
            logger.warning("the endpoint is in trouble; the pictures are put back", extra={"reason": str(trouble)})
            batch.each(put_back, [message for message, _ in asked])
            continue
        latency_ms = (time.perf_counter() - started) * 1000
        answered = [
            Answered(message, crop, prediction["classes"])
            for (message, crop), prediction in zip(asked, answer["predictions"], strict=True)
        ]
        write = partial(record, answer=answer, champion=champion, latency_ms=latency_ms)
        batch.each(write, answered, key=lambda one: one.message)
        metrics.add_metric("EndpointLatency", MetricUnit.Milliseconds, latency_ms)


def load(event: ObjectEvent, spec: Preprocess) -> Crop | None:
    """Fetch and prepare the picture; None when there is nothing to classify: rejected, or deleted meanwhile."""
    try:
        if event.size > max_image_bytes():
            raise BrokenImage(f"larger than {max_image_bytes() // 1_000_000} MB: {event.size / 1e6:.1f} MB")
        data = fetch(event)
        if data is not None:
            return prepare(data, spec)
        logger.info("the picture was deleted before it was read", extra={"image": event.image})
    except BrokenImage as broken:
        reject(event, str(broken))
    return None


def record(one: Answered, *, answer: dict[str, Any], champion: dict[str, Any], latency_ms: float) -> None:
    """Write the row; `answer` is the endpoint's about the whole request, `latency_ms` how long that took."""
    predictions.classified(
        one.message.event,
        one.classes,
        model_version=answer["model_version"],
        deployment=int(answer["deployment"]),
        # In the middle of a deployment the new model answers before it is champion; its dataset is then not known here.
        dataset_hash=champion["dataset_hash"] if answer["model_version"] == champion["model_version"] else "",
        size=(one.crop.width, one.crop.height),
        image_format=one.crop.format,
        latency_ms=latency_ms,
    )
    metrics.add_metric("Classified", MetricUnit.Count, 1)


def reject(event: ObjectEvent, reason: str) -> None:
    """Say for ever that this is no picture: row, tag on the object, and a copy in quarantine beside the reason."""
    logger.info("rejected", extra={"image": event.image, "reason": reason})
    version = version_of(event)
    tags = {"houndloop": "rejected"}
    try:
        aws.client("s3").put_object_tagging(
            Bucket=event.bucket,
            Key=event.key,
            Tagging={"TagSet": [{"Key": k, "Value": v} for k, v in tags.items()]},
            **version,
        )
        target = quarantine_key(event.key)
        if event.size <= MAX_COPY_BYTES:
            aws.client("s3").copy_object(
                Bucket=event.bucket,
                Key=target,
                CopySource={"Bucket": event.bucket, "Key": event.key, **version},
                TaggingDirective="REPLACE",
                Tagging=urlencode(tags),
            )
        note = {"key": event.key, "version_id": event.version_id, "reason": reason, "at": clock.iso(clock.now())}
        aws.client("s3").put_object(
            Bucket=event.bucket,
            Key=f"{target}.json",
            Body=json.dumps(note, ensure_ascii=False).encode(),
            ContentType="application/json",
        )
    except ClientError as error:
        if aws.code(error) not in GONE:
            raise
    # The row comes last: once it stands, a repeated event changes nothing, so all else must have been done.
    if predictions.rejected(event, reason):
        metrics.add_metric("Rejected", MetricUnit.Count, 1)


def quarantine_key(key: str) -> str:
    """Where the copy of a rejected object goes; the tail is cut where the longer prefix would pass S3's limit."""
    target = (QUARANTINE + key.removeprefix(INBOX)).encode()
    return target[: MAX_KEY_BYTES - len(".json")].decode(errors="ignore")


def is_picture(message: Message) -> bool:
    """Whether the file can be classified once there is a model; what never can is rejected already."""
    return load(message.event, Preprocess.default()) is not None


def wait_for_model(message: Message) -> None:
    """Record that the picture waits. Should a model have gone live meanwhile, its replay may have missed the row."""
    predictions.waiting(message.event)
    metrics.add_metric("Waiting", MetricUnit.Count, 1)
    if state.champion() is not None:
        aws.client("sqs").send_message(QueueUrl=queue_url(), MessageBody=message.event.to_body())


def put_back(message: Message) -> None:
    """Send the message again, later and later, as a new one: an outage of hours uses up nobody's tries."""
    times = message.event.postponed
    delay = min(900.0, 5 * 2 ** min(times, 10)) * random.uniform(0.5, 1)
    body = message.event.to_body(postponed=times + 1)
    aws.client("sqs").send_message(QueueUrl=queue_url(), MessageBody=body, DelaySeconds=round(delay))
    metrics.add_metric("PutBack", MetricUnit.Count, 1)


class Batch:
    """The messages of one invocation, and which of them are to be tried again."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def read(self, records: list[dict[str, Any]]) -> list[Message]:
        """The messages that have something to say: readable, and newer than the current row of their picture."""
        messages = []
        for record in records:
            try:
                event = ObjectEvent.from_body(record["body"])
            except MalformedEvent as error:
                # No attempt will read it, but nothing is dropped: the retries carry it to the dead-letter queue.
                logger.error(str(error))
                self.failures.append(record["messageId"])
                continue
            if event.is_folder_marker or event.deleted:
                continue
            messages.append(Message(record["messageId"], event, int(record["attributes"]["ApproximateReceiveCount"])))
        rows = predictions.current_rows([message.event for message in messages])
        messages = [m for m in messages if not predictions.is_settled(m.event, rows.get(m.event.image))]
        # A function that runs out of memory or time can say nothing, so the row says so before the last try begins.
        last = [message for message in messages if message.receives >= max_receives()]
        self.each(lambda m: predictions.failed(m.event, f"try {m.receives} began and did not finish"), last)
        failed = set(self.failures)
        return [message for message in messages if message.id not in failed]

    def each(self, action: Any, items: list[Any], key: Any = lambda item: item) -> list[Any]:
        """Run `action` on each item at once; one that raises fails its own message only, and yields None."""

        def guarded(item: Any) -> Any:
            message: Message = key(item)
            try:
                return action(item)
            except Exception as error:
                logger.exception("this picture failed", extra={"image": message.event.image})
                self.failures.append(message.id)
                if message.receives >= max_receives():
                    predictions.failed(message.event, f"{type(error).__name__}: {error}"[:500])
                    metrics.add_metric("Failed", MetricUnit.Count, 1)
                return None

        with ThreadPoolExecutor(max_workers=10) as pool:
            return list(pool.map(guarded, items))


def max_receives() -> int:
    return int(os.environ["MAX_RECEIVES"])


def max_image_bytes() -> int:
    return int(os.environ["MAX_IMAGE_BYTES"])


def queue_url() -> str:
    return os.environ["INBOX_QUEUE_URL"]
