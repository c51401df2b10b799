"""The messages of one invocation, and what becomes of those that fail.

Work runs on threads, and is waited for no longer than the invocation lasts. Whatever fails, fails its own message: that
one becomes visible again after seconds, later with each try, and the others of the batch are done with.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.typing import LambdaContext

from common import aws, predictions
from common.errors import DecodingFailed, EndpointTrouble, OutOfTime
from common.events import MalformedEvent, ObjectEvent
from common.inbox import MAX_BATCH, queue_url

logger = Logger(child=True)
Result = TypeVar("Result")

# Kept while other things are waited for: to ask the endpoint and to write rows, and to say which messages failed.
ANSWER_SECONDS = 30.0
WRITE_SECONDS = 8.0
LAST_SECONDS = 3.0
# How long the pictures that are ready wait for the rest of their batch before they are asked about.
PATIENCE_SECONDS = 2.0
# A failed message is visible again after 15 s, 1 min, 4 min, 15 min, less up to half: five tries outlast ten minutes.
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 15, 900


@dataclass(frozen=True)
class Message:
    """One SQS message, read."""

    id: str
    event: ObjectEvent
    receives: int

    @property
    def is_last_try(self) -> bool:
        return self.receives >= max_receives()


class Batch:
    """The messages of one invocation: what is to be tried again, and until when there is time."""

    def __init__(self, records: list[dict[str, Any]], context: LambdaContext) -> None:
        self._ends = time.monotonic() + context.get_remaining_time_in_millis() / 1000
        self._records = {record["messageId"]: record for record in records}
        self._failed: dict[str, BaseException] = {}
        self.messages: list[Message] = []
        for id, record in self._records.items():
            try:
                event = ObjectEvent.from_body(record["body"])
            except MalformedEvent as error:
                # No attempt will read it, but nothing is dropped: the retries carry it to the dead-letter queue.
                logger.error(str(error))
                self._failed[id] = error
                continue
            if not event.is_folder_marker and not event.deleted:
                self.messages.append(Message(id, event, _receives(record)))

    def until(self, keep: float) -> float:
        """When (time.monotonic) something must be done that leaves `keep` seconds of the invocation."""
        return self._ends - keep

    def run(
        self, action: Callable[[Message], Result], messages: list[Message], *, keep: float, patience: float = 1e6
    ) -> Iterator[list[tuple[Message, Result]]]:
        """Run `action` on each message at once; yields what is done after `patience` seconds, and again.

        A message whose action raises, or is not done `keep` seconds before the end, fails alone.
        """
        futures: dict[Future[Result], Message] = {_threads().submit(action, message): message for message in messages}
        while futures:
            left = self.until(keep) - time.monotonic()
            done, _ = wait(futures, timeout=max(0, min(patience, left)))
            results = []
            for future in done:
                message = futures.pop(future)
                try:
                    results.append((message, future.result()))
                except Exception as error:
                    self.fail(message, error)
            if results:
                yield results
            if futures and time.monotonic() >= self.until(keep):
                _abandon_threads()
                for message in futures.values():
                    self.fail(message, OutOfTime("it was not fetched and decoded before the function's time was up"))
                return

    def ask(self, action: Callable[[], Result]) -> Result:
        """The endpoint's answer; EndpointTrouble also when there is no more time to wait for it."""
        future = _threads().submit(action)
        try:
            return future.result(timeout=max(0, self.until(WRITE_SECONDS) - time.monotonic()))
        except TimeoutError:
            _abandon_threads()
            raise EndpointTrouble("no answer before the function's time was up") from None

    def fail(self, message: Message, error: BaseException) -> None:
        """Have the message tried again."""
        shown = None if isinstance(error, DecodingFailed | OutOfTime) else error
        logger.warning(
            "this picture failed", extra={"image": message.event.image, "reason": words(error)}, exc_info=shown
        )
        self._failed[message.id] = error

    def fail_rest(self, error: BaseException) -> None:
        """Have tried again what is not done, because nothing more can be done now."""
        for message in self.messages:
            if message.id not in self._failed:
                self.fail(message, error)

    def is_failed(self, message: Message) -> bool:
        return message.id in self._failed

    def close(self) -> list[Message]:
        """Write the rows of what failed for the last time, and have the rest tried again soon; returns the former."""
        lost = [message for message in self.messages if self.is_failed(message) and message.is_last_try]
        writing = {_threads().submit(predictions.failed, m.event, words(self._failed[m.id])): m for m in lost}
        done, late = wait(writing, timeout=max(0, self.until(LAST_SECONDS) - time.monotonic()))
        for future in done:
            if error := future.exception():
                logger.error("no FAILED row", extra={"image": writing[future].event.image, "reason": str(error)})
        for future in late:
            logger.error("no FAILED row in time", extra={"image": writing[future].event.image})
        if self._failed:
            self._show_again()
        return lost

    def answer(self) -> dict[str, Any]:
        """What Lambda hears: the messages that are to be tried again."""
        return {"batchItemFailures": [{"itemIdentifier": id} for id in self._failed]}

    def _show_again(self) -> None:
        """Without this a failed message would be hidden as long as the whole batch may take, six times over."""
        entries = [
            {
                "Id": str(i),
                "ReceiptHandle": record["receiptHandle"],
                "VisibilityTimeout": retry_seconds(_receives(record)),
            }
            for i, record in enumerate(self._records[id] for id in self._failed)
        ]
        try:
            for start in range(0, len(entries), MAX_BATCH):
                aws.client("sqs").change_message_visibility_batch(
                    QueueUrl=queue_url(), Entries=entries[start : start + MAX_BATCH]
                )
        except Exception as error:
            logger.warning("failed messages are tried again later than need be", extra={"reason": str(error)})


def retry_seconds(receives: int) -> int:
    """How long after its try number `receives` a message is tried again: at once to the dead letters after the last."""
    if receives >= max_receives():
        return 0
    return round(min(LAST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 4 ** (receives - 1)) * random.uniform(0.5, 1))


def words(error: BaseException) -> str:
    """The reason of a FAILED row."""
    named = isinstance(error, DecodingFailed | OutOfTime)
    return (str(error) if named else f"{type(error).__name__}: {error}")[:500]


def max_receives() -> int:
    return int(os.environ["MAX_RECEIVES"])


def _receives(record: dict[str, Any]) -> int:
    return int(record["attributes"]["ApproximateReceiveCount"])


@cache
def _threads() -> ThreadPoolExecutor:
    """Kept from one invocation to the next."""
    return ThreadPoolExecutor(max_workers=MAX_BATCH + 2)


def _abandon_threads() -> None:
    """Some hang in a decoder or a download. They end by themselves, and nothing new waits behind them."""
    _threads().shutdown(wait=False)
    _threads.cache_clear()
