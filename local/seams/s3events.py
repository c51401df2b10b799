"""S3: events that EventBridge delivers name the version of the object, as AWS does for versioned buckets.

ministack puts the version's id into notifications, but not into what it sends to EventBridge: two versions of a key
could not be told apart by their events.

For ministack's authors: `version-id` in the object of the detail in `s3._fire_s3_event`.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/ev-events.html
"""

from __future__ import annotations

import json
import threading
from typing import Any

from ministack.services import eventbridge, s3

from . import expect

_event = threading.local()  # of the thread that delivers an event: the version it is about


def install() -> None:
    """Add the version to the event between S3, which knows it, and EventBridge."""
    fire = expect("s3events", s3, "_fire_s3_event", "bucket_name", "key", "event_name")
    dispatch = expect("s3events", eventbridge, "_dispatch_event", "event")

    def fire_with_version(*arguments: Any, version_id: str | None = None, **named: Any) -> None:
        _event.version = version_id
        try:
            fire(*arguments, version_id=version_id, **named)
        finally:
            _event.version = None

    def dispatch_with_version(event: dict, *arguments: Any, **named: Any) -> Any:
        version = getattr(_event, "version", None)
        if version and event.get("Source") == "aws.s3":
            detail = json.loads(event["Detail"])
            detail["object"]["version-id"] = version
            event = event | {"Detail": json.dumps(detail)}
        return dispatch(event, *arguments, **named)

    s3._fire_s3_event = fire_with_version
    eventbridge._dispatch_event = dispatch_with_version
