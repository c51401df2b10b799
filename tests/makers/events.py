"""Event documents: real ones kept as files, and variations on them."""

import json
from pathlib import Path
from typing import Any

EVENTS = Path(__file__).resolve().parents[1] / "events"


def document(name: str) -> dict[str, Any]:
    return json.loads((EVENTS / f"{name}.json").read_text())


def object_created(
    bucket: str, key: str, *, sequencer: str = "0062E99A88DC407460", size: int = 1000, version: str = ""
) -> str:
    """The body of an SQS message about one object."""
    event = document("s3_object_created")
    event["detail"]["bucket"]["name"] = bucket
    event["detail"]["object"] |= {"key": key, "size": size, "sequencer": sequencer}
    event["detail"]["object"].pop("version-id")
    if version:
        event["detail"]["object"]["version-id"] = version
    return json.dumps(event)


def object_deleted(bucket: str, key: str, *, sequencer: str, erased: str = "") -> str:
    """Hidden by a delete marker, or with `erased` the version of that id deleted for good."""
    event = json.loads(object_created(bucket, key, sequencer=sequencer, version=erased))
    event["detail-type"] = "Object Deleted"
    event["detail"]["deletion-type"] = "Permanently Deleted" if erased else "Delete Marker Created"
    return json.dumps(event)


def sqs_batch(*bodies: str, receives: int = 1) -> dict[str, Any]:
    """What Lambda gets from SQS."""
    record = document("sqs_record")
    return {
        "Records": [
            record
            | {"messageId": f"message-{i}", "body": body}
            | {"attributes": record["attributes"] | {"ApproximateReceiveCount": str(receives)}}
            for i, body in enumerate(bodies)
        ]
    }
