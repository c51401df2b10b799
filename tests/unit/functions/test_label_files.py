"""Files of labels under labels/; and the ledger against a model, whatever happens and in whatever order events come."""

import io
import itertools
import json
import random
from collections import defaultdict
from functools import cache
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from aws_lambda_powertools.utilities.data_classes.sqs_event import SQSRecord
from botocore.exceptions import ClientError
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from common import ledger
from common.errors import OutOfTime
from register_labels import app as register
from register_labels import files, formats, pictures
from tests.makers import events
from tests.makers.labels import manifest

sequencers = (f"{n:06X}" for n in itertools.count(1))


@cache
def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((72, 72), Image.Resampling.NEAREST).save(out, "PNG")
    return out.getvalue()


class Bucket:
    """The data bucket: what is done to it, what events tell of that, and messages that are not delivered yet."""

    def __init__(self, aws: SimpleNamespace) -> None:
        self.aws, self.name = aws, aws.bucket
        self.messages: list[str] = []
        self.versions: dict[str, list[str]] = defaultdict(list)
        """Ids of all versions of a key that were not erased, delete markers included, the oldest first."""

    def put(self, key: str, data: bytes) -> str:
        version = self.aws.s3.put_object(Bucket=self.name, Key=key, Body=data)["VersionId"]
        self.versions[key].append(version)
        self.messages.append(
            events.object_created(self.name, key, sequencer=next(sequencers), size=len(data), version=version)
        )
        return version

    def delete(self, key: str) -> None:
        self.versions[key].append(self.aws.s3.delete_object(Bucket=self.name, Key=key)["VersionId"])
        self.messages.append(events.object_deleted(self.name, key, sequencer=next(sequencers)))

    def erase(self, key: str, version: str) -> None:
        self.aws.s3.delete_object(Bucket=self.name, Key=key, VersionId=version)
        self.versions[key].remove(version)
        self.messages.append(events.object_deleted(self.name, key, sequencer=next(sequencers), erased=version))

    def shows(self, key: str) -> bytes | None:
        try:
            return self.aws.s3.get_object(Bucket=self.name, Key=key)["Body"].read()
        except self.aws.s3.exceptions.ClientError:
            return None

    def deliver(self, number: int, *, keep: bool = False, ends: float = float("inf")) -> None:
        """One message, with `keep` to come again; what the function sends itself is delivered later."""
        body = self.messages[number] if keep else self.messages.pop(number)
        register._take(SQSRecord(events.sqs_batch(body)["Records"][0]), ends)
        while True:
            found = self.aws.sqs.receive_message(QueueUrl=self.aws.queues["labels"], MaxNumberOfMessages=10)
            if "Messages" not in found:
                return
            for message in found["Messages"]:
                self.messages.append(message["Body"])
                self.aws.sqs.delete_message(QueueUrl=self.aws.queues["labels"], ReceiptHandle=message["ReceiptHandle"])

    def deliver_all(self) -> None:
        while self.messages:
            self.deliver(0)

    def forget(self) -> None:
        """Begin anew, with an empty ledger."""
        self.messages.clear()
        for row in self.aws.labels.scan()["Items"]:
            self.aws.labels.delete_item(Key={"pk": row["pk"]})

    def report(self, key: str) -> dict[str, Any]:
        return json.loads(self.shows(files.report_key(key)) or b"{}")

    def source(self, key: str) -> dict[str, Any]:
        return self.aws.labels.get_item(Key={"pk": f"source#{self.name}/{key}"}).get("Item", {})


@pytest.fixture
def bucket(aws: SimpleNamespace) -> Bucket:
    return Bucket(aws)


def found(prefix: str = "") -> list[tuple[str, str]]:
    return sorted((each["key"], each["class"]) for each in ledger.contents().labels if each["key"].startswith(prefix))


# --- The model -------------------------------------------------------------------------------------------------------

KEYS = ("labelled/beagle/{}.png", "labelled/boxer/{}.png", "labels/{}.manifest")
examples = itertools.count()


here = st.integers(0, 11).map("here/{}.png".format)
said = st.lists(st.tuples(here, st.sampled_from(["beagle", "boxer"])), min_size=1, max_size=12)
deeds = st.tuples(st.sampled_from(KEYS), st.sampled_from(["put", "put", "delete", "erase"]), said, st.integers(0, 9))


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # finding the shortest history would take minutes
)
@given(st.lists(deeds, max_size=8), st.integers(0, 1 << 32))
def test_when_all_events_have_come_the_ledger_says_what_the_bucket_shows(bucket: Bucket, history, seed):
    """Added, replaced, moved, deleted, undeleted, erased; events late, twice and in any order; files read in parts."""
    chance, example = random.Random(seed), next(examples)
    bucket.forget()
    for n in (0, 11):
        bucket.aws.s3.put_object(Bucket=bucket.name, Key=f"here/{n}.png", Body=picture(n))
    keys = [key.format(example) for key in KEYS]

    def deliver_some(chances: float) -> None:
        while bucket.messages and chance.random() < chances:
            bucket.deliver(chance.randrange(len(bucket.messages)), keep=chance.random() < 0.3)

    for pattern, do, labels, number in history:
        key = pattern.format(example)
        if do == "put":
            bucket.put(key, manifest(labels) if key.startswith("labels/") else picture(number))
        elif not bucket.versions[key]:
            continue
        elif do == "delete":
            bucket.delete(key)
        else:
            bucket.erase(key, bucket.versions[key][number % len(bucket.versions[key])])
        deliver_some(0.5)
    deliver_some(1)

    counted = [each for each in ledger.contents().labels if each["key"] in keys[:2]]
    assert {(each["key"], each["class"], each["sha256"]) for each in counted} == {
        (key, key.split("/")[1], sha256(bucket.shows(key)).hexdigest()) for key in keys[:2] if bucket.shows(key)
    }
    file = bucket.shows(keys[2])
    lines = formats.read(file, bucket.name).lines if file else []
    expected = [(line.key, line.class_name) for line in lines if line.key in ("here/0.png", "here/11.png")]
    assert found("here/") == sorted(expected)
    assert bucket.source(keys[2]).get("status", "DELETED") == ("READ" if file else "DELETED")
    assert bucket.report(keys[2]).get("labels", 0) == len(expected)


# --- Files -----------------------------------------------------------------------------------------------------------


def test_a_file_is_read_in_parts_and_its_errors_are_named_beside_it(bucket: Bucket):
    for n in range(25):
        bucket.aws.s3.put_object(Bucket=bucket.name, Key=f"here/{n}.png", Body=picture(n))
    bucket.aws.s3.put_object(Bucket=bucket.name, Key="here/notes.txt", Body=b"hello")
    labels = [(f"here/{n}.png", "beagle") for n in range(25)] + [
        ("here/gone.png", "boxer"),
        ("here/notes.txt", "boxer"),
    ]
    bucket.put("labels/season 1.manifest", manifest(labels) + b"not JSON\n")
    bucket.deliver(0)
    assert len(bucket.messages) == 3 and bucket.source("labels/season 1.manifest")["status"] == "READING"
    bucket.deliver_all()
    assert found() == sorted(labels[:25])
    report = bucket.report("labels/season 1.manifest")
    assert (report["status"], report["format"], report["lines"], report["labels"]) == ("READ", "Ground Truth", 28, 25)
    said = [(each["line"], each["reason"].split(":")[0]) for each in report["rejected"]]
    assert said == [(26, "there is no s3"), (27, "not an image"), (28, "it is not JSON")]
    source = bucket.source("labels/season 1.manifest")
    assert (source["status"], source["labels"], source["rejected"]) == ("READ", 25, 3)
    assert ledger.read().revision == 4, "the file, and its three parts"


def test_a_file_that_replaces_another_replaces_all_its_labels_at_once(bucket: Bucket):
    for n in range(20):
        bucket.aws.s3.put_object(Bucket=bucket.name, Key=f"here/{n}.png", Body=picture(n))
    bucket.put("labels/a.manifest", manifest([(f"here/{n}.png", "beagle") for n in range(20)]))
    bucket.deliver_all()
    bucket.put("labels/a.manifest", manifest([("here/1.png", "boxer")]))
    bucket.deliver(0)
    assert found() == []
    bucket.deliver_all()
    assert found() == [("here/1.png", "boxer")]
    bucket.delete("labels/a.manifest")
    bucket.deliver_all()
    assert found() == [] and bucket.report("labels/a.manifest")["status"] == "DELETED"


def test_when_an_old_version_of_a_file_ends_while_the_new_one_is_read_the_reading_goes_on(bucket: Bucket):
    bucket.aws.s3.put_object(Bucket=bucket.name, Key="here/0.png", Body=picture(0))
    old = bucket.put("labels/a.manifest", manifest([("here/0.png", "beagle")]))
    bucket.put("labels/a.manifest", manifest([("here/0.png", "boxer")]))
    bucket.erase("labels/a.manifest", old)
    for _ in range(3):
        bucket.deliver(0)
    assert found() == [] and len(bucket.messages) == 1
    bucket.deliver_all()
    assert found() == [("here/0.png", "boxer")] and bucket.source("labels/a.manifest")["status"] == "READ"


def test_when_sending_breaks_off_the_event_comes_again_also_of_a_version_that_shows_again(bucket: Bucket, monkeypatch):
    for number in (0, 1):
        bucket.aws.s3.put_object(Bucket=bucket.name, Key=f"here/{number}.png", Body=picture(number))
    bucket.put("labels/a.manifest", manifest([("here/0.png", "beagle")]))
    newer = bucket.put("labels/a.manifest", manifest([("here/1.png", "boxer")]))
    bucket.deliver_all()
    bucket.erase("labels/a.manifest", newer)
    with monkeypatch.context() as patch:
        patch.setattr(files.inbox, "send", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bucket.deliver(0, keep=True)
    assert bucket.source("labels/a.manifest")["status"] == "READING"
    bucket.deliver_all()
    assert found() == [("here/0.png", "beagle")] and bucket.source("labels/a.manifest")["status"] == "READ"


def test_a_file_that_is_exported_again_with_a_line_more_is_one_new_label(bucket: Bucket, monkeypatch):
    for n in range(3):
        bucket.aws.s3.put_object(Bucket=bucket.name, Key=f"here/{n}.png", Body=picture(n))
    lines = [("here/0.png", "beagle"), ("here/1.png", "beagle"), ("here/2.png", "boxer")]
    bucket.put("labels/a.manifest", manifest(lines[:2]))
    bucket.deliver_all()
    before = {each["key"]: each["registered_at"] for each in ledger.contents().labels}
    looked: list[str] = []
    take = pictures.take
    monkeypatch.setattr(pictures, "take", lambda event: looked.append(event.key) or take(event))
    bucket.put("labels/a.manifest", manifest(lines))
    bucket.deliver_all()
    assert looked == ["here/2.png"]
    after = {each["key"]: each["registered_at"] for each in ledger.contents().labels}
    assert before.items() <= after.items() and len(after) == 3


@pytest.mark.parametrize("code", ["InvalidObjectState", "KMS.DisabledException", "400"])
def test_a_picture_that_nobody_will_read_is_named_and_trouble_that_passes_is_tried_again(
    bucket: Bucket, monkeypatch, code: str
):
    bucket.aws.s3.put_object(Bucket=bucket.name, Key="here/0.png", Body=picture(0))
    bucket.put("labels/a.manifest", manifest([("here/0.png", "beagle")]))
    bucket.deliver(0)

    def refused(code: str) -> Any:
        def fetch(event: Any) -> None:
            raise ClientError({"Error": {"Code": code}}, "GetObject")

        return fetch

    monkeypatch.setattr(pictures, "fetch", refused("SlowDown"))
    with pytest.raises(ClientError):
        bucket.deliver(0, keep=True)
    monkeypatch.setattr(pictures, "fetch", refused(code))
    bucket.deliver_all()
    (line,) = bucket.report("labels/a.manifest")["rejected"]
    assert line == {"line": 1, "reason": f"s3://pictures/here/0.png cannot be read: {code}"}


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "it is neither"), (b"[{]", "it is not JSON"), (b"\xff", "it is not UTF-8")]
)
def test_a_file_that_cannot_be_read_is_rejected_with_the_reason(bucket: Bucket, data: bytes, reason: str):
    bucket.put("labels/a.json", data)
    bucket.deliver_all()
    assert bucket.source("labels/a.json")["status"] == bucket.report("labels/a.json")["status"] == "REJECTED"
    assert bucket.report("labels/a.json")["reason"].startswith(reason)


def test_a_file_over_the_limit_is_not_fetched(bucket: Bucket, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 10)
    monkeypatch.setattr(files, "fetch", lambda event: pytest.fail("fetched"))
    bucket.put("labels/a.json", b"[" * 11)
    bucket.deliver_all()
    assert "split it" in bucket.report("labels/a.json")["reason"]


def test_of_a_labeling_job_only_the_output_manifest_is_read(bucket: Bucket):
    bucket.aws.s3.put_object(Bucket=bucket.name, Key="here/0.png", Body=picture(0))
    lines = manifest([("here/0.png", "beagle")])
    bucket.put("labels/breed/annotations/consolidated-annotation/output/0.json", b"{}")
    bucket.put("labels/breed/annotations/intermediate/1/annotations.manifest", lines)
    bucket.put("labels/breed/manifests/output/output.manifest", lines)
    bucket.put("labels/breed/", b"")
    bucket.deliver_all()
    assert found() == [("here/0.png", "beagle")] and ledger.read().revision == 2


def test_a_part_that_runs_out_of_time_is_tried_again(bucket: Bucket):
    bucket.aws.s3.put_object(Bucket=bucket.name, Key="here/0.png", Body=picture(0))
    bucket.put("labels/a.manifest", manifest([("here/0.png", "beagle")]))
    bucket.deliver(0)
    with pytest.raises(OutOfTime):
        bucket.deliver(0, keep=True, ends=0)
    assert found() == []
    bucket.deliver_all()
    assert found() == [("here/0.png", "beagle")]


def test_parts_stay_within_what_one_batch_of_messages_may_have():
    """SendMessageBatch takes 262,144 bytes in ten messages."""
    lines = [formats.Line(100_000, "k" * 1024, "c" * 63) for _ in range(files.LINES_PER_PART)]
    event = files.ObjectEvent("b" * 63, "labels/" + "f" * 1017, "v" * 32, "0" * 64, 1)
    assert 10 * len(files._body(event, 9999, lines)) < 262_144
    assert files.Part.from_body(files._body(event, 9999, lines)).lines == lines


def test_the_report_of_a_file_with_the_longest_name_has_one_too():
    assert files.report_key("labels/a.manifest") == "label-reports/a.manifest.json"
    assert len(files.report_key("labels/" + "ü" * 508).encode()) <= 1024
