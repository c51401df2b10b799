"""Label files under labels/: read whole once, then in parts of a few lines each, which go through the queue.

What of a file is no label is named line by line in `label-reports/<file>.json`, and stands in the ledger beside what
is one.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Any

from aws_lambda_powertools import Logger
from botocore.exceptions import ClientError

from common import aws, clock, inbox, ledger
from common.errors import OutOfTime
from common.events import SEQUENCER_WIDTH, ObjectEvent
from common.objects import GONE, fetch
from preprocessing import BrokenImage
from register_labels import formats, pictures

FOLDER, REPORTS = "labels/", "label-reports/"
# Kept in memory twice, as bytes and as text. Label Studio advises at most 100,000 tasks a project, some 1.2 kB each.
MAX_BYTES = 200_000_000
# Ten parts, as one invocation may get them, have 100 pictures; and as one batch that is sent, less than 256 kB.
LINES_PER_PART = 10
SPARE_SECONDS = 20  # for the picture that is looked at, whatever it is, and to record the part
# What Ground Truth writes beside its output manifest, if labels/ is where its jobs write.
WORKING_FOLDERS = {"activelearning", "annotations", "inference", "intermediate", "training", "temp"}

logger = Logger(child=True)


@dataclass(frozen=True)
class Part:
    """A few lines of a label file, as a message to register_labels itself."""

    bucket: str
    key: str
    reading: str
    part: int
    lines: list[formats.Line]

    @property
    def image(self) -> str:
        """The file's name in the ledger."""
        return f"{self.bucket}/{self.key}"

    @classmethod
    def from_body(cls, body: str) -> "Part | None":
        """None where the message is something else, an event for instance."""
        try:
            message = json.loads(body)
            lines = [formats.Line(*line) for line in message.pop("lines")]
            return cls(**message, lines=lines)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


def begin(event: ObjectEvent) -> None:
    """Read a label file that came, and send its parts; or withdraw what one said that went."""
    known = ledger.get_source(event)
    if WORKING_FOLDERS & set(event.key.split("/")[1:-1]):
        return
    # An event that comes again, because sending broke off, finds its file recorded, and sends all of it again: of the
    # version that was recorded, for after one was erased the event itself names what is gone.
    if known and known["reading"] == event.sequencer and known["status"] == "READING":
        event = replace(event, version_id=known["version_id"], deleted=False, erased=False)
    else:
        news = ledger.news(event, known)
        if news is None:
            return
        event = news
    if event.deleted:
        _record(event, status="DELETED")
        return
    try:
        if event.size > MAX_BYTES:
            raise formats.NoLabels(f"larger than {MAX_BYTES // 1_000_000} MB: split it into several files")
        data = fetch(event)
        if data is None:
            return
        found = formats.read(data, event.bucket)
    except formats.NoLabels as reason:
        logger.warning("not a label file", extra={"file": event.image, "reason": str(reason)})
        _record(event, status="REJECTED", reason=str(reason))
        return
    del data
    parts = [found.lines[at : at + LINES_PER_PART] for at in range(0, len(found.lines), LINES_PER_PART)]
    sizes = {"format": found.format, "lines": len(found.lines), "parts": len(parts), "parts_read": 0}
    if not ledger.record_source(event, status="READING", **sizes):
        known = ledger.get_source(event)
        if not known or known["reading"] != event.sequencer or known["status"] != "READING":
            return
    inbox.send(os.environ["LABEL_QUEUE_URL"], [_body(event, number, lines) for number, lines in enumerate(parts)])


def read_part(part: Part, ends: float) -> tuple[list[ledger.Item], list[ledger.Item]]:
    """Look at the pictures of a part and record what it says: its labels, and the lines that are none with the reason.

    Both are empty where that is recorded already, or another version of the file came meanwhile. OutOfTime close to
    `ends` (time.monotonic).
    """
    source = ledger.get_source(_event(part))
    if not source or source["reading"] != part.reading:
        return [], []
    before = ledger.get_part(part.image, part.part)
    labels: list[ledger.Item] = []
    rejected: list[ledger.Item] = []
    if not before or before["sequencer"] < part.reading:
        # A file that is exported again says mostly what it said: the same version of a picture is not looked at twice,
        # and is no news.
        seen = {(label["key"], label["version_id"]): label for label in before["labels"]} if before else {}
        for line in part.lines:
            if time.monotonic() > ends - SPARE_SECONDS:
                raise OutOfTime(f"part {part.part} of {part.image} is read again")
            found = _label(part.bucket, line, seen)
            if isinstance(found, str):
                rejected.append({"line": line.number, "reason": found})
            else:
                labels.append({"line": line.number} | found)
        if not ledger.record_part(part.image, part.reading, part.part, labels, rejected):
            labels, rejected = [], []
    source = ledger.get_source(_event(part))
    if source and source["reading"] == part.reading and source["parts_read"] == source["parts"]:
        _end(source)
    return labels, rejected


def _label(bucket: str, line: formats.Line, seen: dict[tuple[str, str], ledger.Item]) -> ledger.Item | str:
    """The label of a line, or why it is none."""
    if line.reason:
        return line.reason
    try:
        head = aws.client("s3").head_object(Bucket=bucket, Key=line.key)
        version = head.get("VersionId", "")
        label = {"key": line.key, "version_id": version, "class": line.class_name}
        if known := seen.get((line.key, version)):
            same = known["class"] == line.class_name
            label |= {field: known[field] for field in ("sha256", "phash")}
            return label | {"registered_at": known["registered_at"] if same else clock.iso(clock.now())}
        event = ObjectEvent(bucket, line.key, version, "0" * SEQUENCER_WIDTH, head["ContentLength"])
        taken = pictures.take(event)
    except BrokenImage as reason:
        return str(reason)
    except ClientError as error:
        # Files may name what is not ours to read, or encrypted with a key that S3 has not, or may not use.
        if (code := aws.code(error)) in (pictures.ARCHIVED, "AccessDenied", "403", "400") or code.startswith("KMS."):
            return pictures.unreadable(bucket, line.key, error)
        if aws.code(error) not in GONE:
            raise
        taken = None
    if taken is None:
        return f"there is no s3://{bucket}/{line.key}"
    sha, phash = taken
    return label | {"sha256": sha, "phash": phash, "registered_at": clock.iso(clock.now())}


def _end(source: ledger.Item) -> None:
    """Write the report on a file that was read to its end, and note that it was."""
    parts = sorted(ledger.parts(source), key=lambda part: part["pk"])
    rejected = [each for part in parts for each in part["rejected"]]
    counts = {"labels": sum(len(part["labels"]) for part in parts), "rejected": len(rejected)}
    _report(source | counts | {"status": "READ"}, [{"line": int(r["line"]), "reason": r["reason"]} for r in rejected])
    ledger.end_source(source, **counts)


def _record(event: ObjectEvent, **attributes: Any) -> None:
    if ledger.record_source(event, **attributes):
        _report(asdict(event) | attributes, [])


def _report(file: dict[str, Any], rejected: list[dict[str, Any]]) -> None:
    """Write what became of a file beside it, outside the folder whose events are read."""
    told = {"file": f"s3://{file['bucket']}/{file['key']}", "version_id": file["version_id"], "status": file["status"]}
    told |= {name: file[name] for name in ("reason", "format") if name in file}
    told |= {name: int(file[name]) for name in ("lines", "labels") if name in file}
    body = json.dumps(told | {"rejected": rejected}, indent=1, ensure_ascii=False)
    aws.client("s3").put_object(
        Bucket=file["bucket"], Key=report_key(file["key"]), Body=body.encode(), ContentType="application/json"
    )


def report_key(key: str) -> str:
    """Where the report on a label file is; under a hash, if S3's 1,024 bytes are too few for its name."""
    name = f"{REPORTS}{key.removeprefix(FOLDER)}.json"
    return name if len(name.encode()) <= 1024 else f"{REPORTS}{sha256(key.encode()).hexdigest()}.json"


def _event(part: Part) -> ObjectEvent:
    return ObjectEvent(part.bucket, part.key, "", part.reading, 0)


def _body(event: ObjectEvent, number: int, lines: list[formats.Line]) -> str:
    return json.dumps(asdict(Part(event.bucket, event.key, event.sequencer, number, lines)))
