"""Classifies the pictures of one batch of inbox events, in one request to the endpoint.

Every picture ends in one row: CLASSIFIED, REJECTED (never a picture), WAITING (no model yet) or FAILED. Trouble with
one message fails that message alone; trouble with the endpoint costs no message a try: it is put back with a delay.
"""

import json
import random
import time
from functools import partial
from typing import Any
from urllib.parse import urlencode

from aws_lambda_powertools import Logger, Metrics
from aws_lambda_powertools.metrics import MetricUnit
from aws_lambda_powertools.utilities.typing import LambdaContext
from botocore.exceptions import ClientError

from classify_images import pictures
from classify_images.batch import ANSWER_SECONDS, PATIENCE_SECONDS, WRITE_SECONDS, Batch, Message
from common import aws, clock, endpoint, predictions, sequencer, state
from common.errors import EndpointTrouble
from common.events import ObjectEvent
from common.inbox import FOLDER, MAX_BATCH, MAX_DELAY_SECONDS, SendFailed, queue_url
from common.objects import GONE, newest_version, version_of
from common.tracing import tracer
from preprocessing import BrokenImage, Crop, Preprocess, extension_differs

logger = Logger()
metrics = Metrics()

QUARANTINE = "quarantine/"
MAX_KEY_BYTES = 1024  # S3's limit
MAX_TAGS = 10  # S3's limit
MAX_COPY_BYTES = 10**9  # what S3 copies in a part of the function's time; CopyObject would take 5 GB


class EndpointHealth:
    """Whether the endpoint was in trouble when this execution environment last asked.

    Then one picture is asked about first, and if that fails too the others are put back without having been fetched:
    an outage costs little, and who recovers is not run over.
    """

    in_trouble = False


@logger.inject_lambda_context
@metrics.log_metrics(capture_cold_start_metric=True)
@tracer.capture_lambda_handler(capture_response=False)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Answers SQS with the messages that are to be tried again."""
    batch = Batch(event["Records"], context)
    try:
        work(batch)
    except Exception as error:
        logger.exception("what is left of the batch is tried again")
        batch.fail_rest(error)
    if lost := batch.close():
        metrics.add_metric("Failed", MetricUnit.Count, len(lost))
    return batch.answer()


def work(batch: Batch) -> None:
    """The whole way of a batch: what is new in it, what can be classified, what the endpoint says."""
    messages = unsettled(batch)
    if not messages:
        return
    champion = state.champion()
    if champion is None:
        wait_for_model(batch, messages)
        return
    while messages and EndpointHealth.in_trouble:
        asked = classify(batch, messages[:1], champion)
        messages = messages[1:]
        if asked and EndpointHealth.in_trouble:
            put_back(batch, messages, "the endpoint is in trouble")
            return
    classify(batch, messages, champion)


def unsettled(batch: Batch) -> list[Message]:
    """The messages that have something to say: newer than the current row of their picture, or not yet answered."""
    rows = predictions.current_rows([message.event for message in batch.messages])
    messages = []
    for message in batch.messages:
        image = message.event.image
        if image not in rows:
            batch.fail(message, predictions.ReadFailed("its row could not be read"))
        elif not predictions.is_settled(message.event, rows[image]):
            messages.append(message)
    # Where the order is not certain S3 is asked, and an event about a version that is not the newest adds nothing.
    doubtful = [m for m in messages if is_doubtful(m.event, rows[m.event.image])]
    for group in batch.run(lambda m: is_newest(m.event), doubtful, keep=ANSWER_SECONDS):
        stale = {message.id for message, newest in group if not newest}
        messages = [message for message in messages if message.id not in stale]
    # A function that runs out of memory or time can say nothing, so the row says so before the last try begins.
    last = [message for message in messages if message.is_last_try and not batch.is_failed(message)]
    for _ in batch.run(began_last_try, last, keep=ANSWER_SECONDS):
        pass
    return [message for message in messages if not batch.is_failed(message)]


def is_doubtful(event: ObjectEvent, row: predictions.Row | None) -> bool:
    """Whether the row is of a version that no event told of when it was written, and another than the event's."""
    return row is not None and sequencer.is_made(row["sequencer"]) and row["version_id"] != event.version_id


def is_newest(event: ObjectEvent) -> bool:
    return newest_version(event.bucket, event.key) == event.version_id


def began_last_try(message: Message) -> None:
    predictions.failed(message.event, f"try {message.receives} began and did not finish: out of memory or time")


def classify(batch: Batch, messages: list[Message], champion: dict[str, Any]) -> bool:
    """Load, ask, record: the one path of a picture to its row; says whether there was anything to ask about."""
    asked = False
    for crops in load(batch, messages, Preprocess.from_json(champion["preprocess"])):
        for positions in endpoint.chunks([crop.pixels for _, crop in crops]):
            ask(batch, [crops[i] for i in positions], champion)
            asked = True
    return asked


def load(batch: Batch, messages: list[Message], spec: Preprocess) -> Any:
    """Yields the pictures as crops: all at once as a rule, and those that are slow after the others."""
    until = batch.until(ANSWER_SECONDS)

    def prepared(message: Message) -> Crop | None:
        try:
            crop = pictures.load(message.event, spec, isolate=message.receives > 1, until=until)
        except BrokenImage as broken:
            reject(message.event, str(broken))
            return None
        if crop is None:
            logger.info("the picture was deleted before it was read", extra={"image": message.event.image})
            if message.is_last_try:  # the row says that this try did not finish
                predictions.failed(message.event, "it was deleted before it was read")
        return crop

    for group in batch.run(prepared, messages, keep=ANSWER_SECONDS, patience=PATIENCE_SECONDS):
        yield [(message, crop) for message, crop in group if crop is not None]


def ask(batch: Batch, crops: list[tuple[Message, Crop]], champion: dict[str, Any]) -> None:
    """One request about all of them, and their rows."""
    started = time.perf_counter()
    try:
        answer = batch.ask(partial(endpoint.classify, champion["endpoint"], [crop.pixels for _, crop in crops]))
    except EndpointTrouble as trouble:
        EndpointHealth.in_trouble = True
        logger.warning("the endpoint is in trouble; the pictures are put back", extra={"reason": str(trouble)})
        put_back(batch, [message for message, _ in crops], f"the endpoint is in trouble: {trouble}")
        return
    EndpointHealth.in_trouble = False
    latency_ms = (time.perf_counter() - started) * 1000
    metrics.add_metric("EndpointLatency", MetricUnit.Milliseconds, latency_ms)
    # In the middle of a deployment the new model answers before it is champion; its dataset is then not known here.
    dataset_hash = champion["dataset_hash"] if answer["model_version"] == champion["model_version"] else ""
    answers = [
        predictions.Answer(
            event=message.event,
            classes=prediction["classes"],
            model_version=answer["model_version"],
            deployment=int(answer["deployment"]),
            dataset_hash=dataset_hash,
            width=crop.width,
            height=crop.height,
            format=crop.format,
            latency_ms=latency_ms,
            note=extension_differs(message.event.key, crop.format),
            by_champion=int(answer["deployment"]) == int(champion["deployment"]),
        )
        for (message, crop), prediction in zip(crops, answer["predictions"], strict=True)
    ]
    errors = predictions.classified(answers)
    for (message, _), error in zip(crops, errors, strict=True):
        if error is not None:
            batch.fail(message, error)
    if written := errors.count(None):
        metrics.add_metric("Classified", MetricUnit.Count, written)


def reject(event: ObjectEvent, reason: str) -> None:
    """Say for ever that this is no picture: row, tag on the object, and a copy in quarantine beside the reason."""
    logger.info("rejected", extra={"image": event.image, "reason": reason})
    s3, version = aws.client("s3"), version_of(event)
    source = {"Bucket": event.bucket, "Key": event.key, **version}
    try:
        theirs = s3.get_object_tagging(**source)["TagSet"]
        tags = [tag for tag in theirs if tag["Key"] != "houndloop"] + [{"Key": "houndloop", "Value": "rejected"}]
        if len(tags) <= MAX_TAGS:  # nobody's own tag is dropped
            s3.put_object_tagging(**source, Tagging={"TagSet": tags})
        target = quarantine_key(event.key)
        if event.size <= MAX_COPY_BYTES:
            s3.copy_object(
                Bucket=event.bucket,
                Key=target,
                CopySource=source,
                TaggingDirective="REPLACE",
                Tagging=urlencode({"houndloop": "rejected"}),
            )
        note = {"key": event.key, "version_id": event.version_id, "reason": reason, "at": clock.iso(clock.now())}
        s3.put_object(
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
    target = (QUARANTINE + key.removeprefix(FOLDER)).encode()
    return target[: MAX_KEY_BYTES - len(".json")].decode(errors="ignore")


def wait_for_model(batch: Batch, messages: list[Message]) -> None:
    """Record that the pictures wait; what can never be classified is rejected already."""
    waiting = []
    for crops in load(batch, messages, Preprocess.default()):
        for group in batch.run(lambda m: predictions.waiting(m.event), [m for m, _ in crops], keep=WRITE_SECONDS):
            waiting += [message for message, _ in group]
    metrics.add_metric("Waiting", MetricUnit.Count, len(waiting))
    # Should a model have gone live meanwhile, its replay may have missed the rows.
    if waiting and state.champion() is not None:
        send(batch, waiting, lambda event: {"MessageBody": event.to_body()})


def put_back(batch: Batch, messages: list[Message], reason: str) -> None:
    """Send the messages again, later and later, as new ones: an outage of hours uses up nobody's tries."""
    # The row of a last try says FAILED already; that is not so now.
    last = [message for message in messages if message.is_last_try]
    for _ in batch.run(lambda m: predictions.waiting(m.event, reason[:500]), last, keep=WRITE_SECONDS):
        pass

    def later(event: ObjectEvent) -> dict[str, Any]:
        delay = min(MAX_DELAY_SECONDS, 5 * 2 ** min(event.postponed, 10)) * random.uniform(0.5, 1)
        return {"MessageBody": event.to_body(postponed=event.postponed + 1), "DelaySeconds": round(delay)}

    send(batch, [message for message in messages if not batch.is_failed(message)], later)
    metrics.add_metric("PutBack", MetricUnit.Count, len(messages))


def send(batch: Batch, messages: list[Message], entry: Any) -> None:
    """Send each message's event again, as `entry` says; what SQS does not take fails alone."""
    for start in range(0, len(messages), MAX_BATCH):
        part = messages[start : start + MAX_BATCH]
        entries = [{"Id": str(i), **entry(message.event)} for i, message in enumerate(part)]
        try:
            answer = aws.client("sqs").send_message_batch(QueueUrl=queue_url(), Entries=entries)
        except Exception as error:
            for message in part:
                batch.fail(message, error)
            continue
        for refused in answer.get("Failed", []):
            batch.fail(part[int(refused["Id"])], SendFailed(refused.get("Message", refused.get("Code", ""))))
