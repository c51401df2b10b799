"""The rules of order and repetition, over generated histories: what happens to keys, how events travel, what breaks.

S3 and DynamoDB are moto's. The queue is the test's own, so that hypothesis chooses what arrives when, how often, beside
what, what is lost and then looked for, and at which of the function's calls to AWS one fails, or the function dies, or
another one works beside it.
"""

import io
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from classify_images import app, batch, pictures
from common import aws as functions_aws
from common import endpoint, inbox
from common.events import SEQUENCER_WIDTH, ObjectEvent
from preprocessing import prepare
from reconcile_inbox import app as reconcile
from tests.makers import events

SPEC = {"size": 8, "resize": 9, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
MAX_RECEIVES = 5
KEYS = ("a", "b")
_examples = itertools.count()


class Died(BaseException):
    """The function's process is gone: nothing in it catches this."""


@dataclass
class Fault:
    """The function's call number `at` fails, before or after it had its effect; after a deadly one all others do."""

    at: int
    after: bool
    deadly: bool


@dataclass
class Meanwhile:
    """Before the function's call number `at`, another one gets the messages at these places, and finishes."""

    at: int
    picks: list[int]


@dataclass
class Version:
    id: str
    sequencer: str
    shade: int | None  # of the picture; None for a file that is none
    erased: bool = False


@dataclass
class World:
    """One bucket, its queue, its endpoint, and what is known of what was done to them."""

    aws: Any
    context: Any
    prefix: str
    sequencers: list[str]
    versions: dict[str, list[Version]] = field(default_factory=lambda: {key: [] for key in KEYS})
    hidden: set[str] = field(default_factory=set)
    queue: list[tuple[str, int]] = field(default_factory=list)  # body, receives
    dead: list[str] = field(default_factory=list)
    history: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    newest_seen: dict[str, str] = field(default_factory=dict)
    answered: dict[str, tuple[str, int]] = field(default_factory=dict)  # the sequencer and deployment of each row
    deployment: int = 0
    endpoint_is_down: bool = False
    lag: int = 0  # in the middle of a rollout the former deployment answers too
    asked: int = 0
    told: bool = True  # every event comes to the function, and nothing else does
    fault: Fault | Meanwhile | None = None
    calls: int = 0
    is_dead: bool = False

    # ------------------------------------------------------------ what users and the workflow do

    def name(self, key: str) -> str:
        return f"inbox/{self.prefix}/{key}"

    def put(self, key: str, shade: int | None, copies: int, tries: int) -> None:
        if not self.sequencers:
            return
        data = b"no picture"
        if shade is not None:
            out = io.BytesIO()
            Image.new("RGB", (16, 16), (shade,) * 3).save(out, "PNG")
            data = out.getvalue()
        stored = self.aws.s3.put_object(Bucket=self.aws.bucket, Key=self.name(key), Body=data)
        version = Version(stored["VersionId"], self.sequencers.pop(0), shade)
        self.versions[key].append(version)
        self.hidden.discard(key)
        body = events.object_created(
            self.aws.bucket, self.name(key), sequencer=version.sequencer, size=len(data), version=version.id
        )
        self.queue += [(body, tries)] * copies

    def hide(self, key: str) -> None:
        """A delete marker, and its event, should a rule let it through."""
        if not self.sequencers:
            return
        self.aws.s3.delete_object(Bucket=self.aws.bucket, Key=self.name(key))
        self.hidden.add(key)
        body = events.object_deleted(self.aws.bucket, self.name(key), sequencer=self.sequencers.pop(0))
        self.queue.append((body, 0))

    def erase(self, key: str, which: int) -> None:
        """Delete one version for good."""
        if self.versions[key]:
            version = self.versions[key][which % len(self.versions[key])]
            self.aws.s3.delete_object(Bucket=self.aws.bucket, Key=self.name(key), VersionId=version.id)
            version.erased = True

    def promote(self) -> None:
        """A new model goes live; what waited is replayed."""
        self.deployment += 1
        self.aws.state.put_item(
            Item={
                "pk": "champion", "sk": "champion", "model_version": f"m{self.deployment}",
                "deployment": self.deployment, "endpoint": "houndloop", "dataset_hash": "d",
                "preprocess": json.dumps(SPEC),
            }
        )  # fmt: skip
        for key in KEYS:
            self.replay(key, status="WAITING")

    def replay(self, key: str, tries: int = 0, status: str = "") -> None:
        row = self.row(key)
        if row and status in ("", row["status"]):
            event = ObjectEvent(row["bucket"], row["key"], row["version_id"], row["sequencer"], int(row["size"]))
            self.queue.append((event.to_body(replayed=True), tries))

    def lose(self, which: int) -> None:
        """A message that no function has had is gone for good: its event never came."""
        self.told = False
        unread = [place for place, (_, receives) in enumerate(self.queue) if not receives]
        if unread:
            self.queue.pop(unread[which % len(unread)])

    def reconcile(self) -> int:
        """A walk through the inbox; how many pictures it took for lost."""
        self.told = False
        before = len(self.queue)
        reconcile.handler(events.sqs_batch(json.dumps({"min_age_seconds": -60})), self.context)
        return len(self.queue) - before

    # ------------------------------------------------------------ what SQS, the endpoint and Lambda do

    def deliver(self, picks: list[int], fault: Fault | Meanwhile | None = None) -> None:
        """One batch: the messages at these places of the queue."""
        self.fault, self.calls, self.is_dead = fault, 0, False
        self.handle(picks)
        batch._threads().shutdown(wait=True)
        batch._threads.cache_clear()
        self.fault, self.is_dead = None, False
        self.check_history()

    def handle(self, picks: list[int]) -> None:
        taken = sorted({pick % len(self.queue) for pick in picks}, reverse=True) if self.queue else []
        records, messages = [], {}
        for number, place in enumerate(taken):
            body, receives = self.queue.pop(place)
            if receives >= MAX_RECEIVES:
                self.dead.append(body)
                continue
            record = events.sqs_batch(body, receives=receives + 1)["Records"][0] | {"messageId": str(number)}
            records.append(record)
            messages[str(number)] = (body, receives + 1)
        if not records:
            return
        try:
            answer = app.handler({"Records": records}, self.context)
            again = [failure["itemIdentifier"] for failure in answer["batchItemFailures"]]
        except Died:
            again = list(messages)
            app.EndpointHealth.in_trouble = False  # a new process
        self.queue += [messages[id] for id in again]

    def call(self, real: Callable[..., Any], client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        """Every call of the function to AWS comes through here."""
        if self.is_dead:
            raise Died
        fault, self.calls = self.fault, self.calls + 1
        if fault is None or fault.at != self.calls:
            return real(client, operation, arguments)
        if isinstance(fault, Meanwhile):
            self.handle(fault.picks)
            return real(client, operation, arguments)
        if fault.after:
            real(client, operation, arguments)
        if fault.deadly:
            self.is_dead = True
            raise Died
        raise ClientError({"Error": {"Code": "ThrottlingException", "Message": "slow down"}}, operation)

    def send_message_batch(self, *, QueueUrl: str, Entries: list[dict[str, Any]]) -> dict[str, Any]:
        def send(*_: Any) -> dict[str, Any]:
            self.queue += [(entry["MessageBody"], 0) for entry in Entries]
            return {"Successful": [{"Id": entry["Id"]} for entry in Entries]}

        return self.call(send, None, "SendMessageBatch", {})

    def get_queue_attributes(self, **_: Any) -> dict[str, Any]:
        return {"Attributes": dict.fromkeys(inbox.LEVELS, "0")}

    def change_message_visibility_batch(self, *, QueueUrl: str, Entries: list[dict[str, Any]]) -> dict[str, Any]:
        assert all(0 <= entry["VisibilityTimeout"] <= 900 for entry in Entries)
        return self.call(lambda *_: {}, None, "ChangeMessageVisibilityBatch", {})

    def invoke_endpoint(self, *, Body: bytes, **_: Any) -> dict[str, Any]:
        """Never says the same thing twice: only what was written first may last."""
        if self.endpoint_is_down:
            raise ClientError({"Error": {"Code": "ThrottlingException", "Message": "busy"}}, "InvokeEndpoint")
        said = []
        for start in range(0, len(Body), 8 * 8 * 3):
            self.asked += 1
            said.append({"classes": [{"class": f"shade {Body[start]}", "probability": 0.5 + self.asked / 1e5}]})
        who = max(1, self.deployment - self.lag)
        answer = {"model_version": f"m{who}", "deployment": who, "predictions": said}
        return {"Body": io.BytesIO(json.dumps(answer).encode())}

    # ------------------------------------------------------------ what must hold

    def row(self, key: str) -> dict[str, Any] | None:
        image = f"{self.aws.bucket}/{self.name(key)}"
        return self.aws.predictions.get_item(Key={"image": image, "version": "current"}).get("Item")

    def check_history(self) -> None:
        """At every moment: history stays as written, and no row goes back to an older version or answer."""
        from boto3.dynamodb.conditions import Key

        for key in KEYS:
            image = f"{self.aws.bucket}/{self.name(key)}"
            items = self.aws.predictions.query(KeyConditionExpression=Key("image").eq(image))["Items"]
            for item in items:
                if item["version"] != "current":
                    assert self.history.setdefault((key, item["version"]), item) == item, "history was overwritten"
            row = self.row(key)
            if row:
                assert row["sequencer"] >= self.newest_seen.get(key, ""), "the row went back to an older version"
                self.newest_seen[key] = row["sequencer"]
                rank = (row["sequencer"], int(row.get("deployment", 0)))
                assert rank >= self.answered.get(key, ("", 0)), "an answer was hidden, or gave way to an earlier one"
                self.answered[key] = rank

    def settle(self) -> None:
        """Everything works again, the dead letters are redriven, what was lost is found, and the queue runs empty."""
        self.endpoint_is_down, self.lag = False, 0
        if not self.deployment:
            self.promote()
        for _ in range(4):
            for _ in range(40):
                if not self.queue:
                    break
                self.deliver(list(range(10)))
            assert not self.queue, "messages go round for ever"
            self.queue, self.dead = [(body, 0) for body in self.dead], []
        if self.told:
            self.check_rows(erased=True)
        for _ in range(3):
            if not self.reconcile():
                return
            while self.queue:
                self.deliver(list(range(10)))
        raise AssertionError("there is always something that was lost")

    def check_rows(self, *, erased: bool) -> None:
        """Rows speak of the newest version: `erased` or not, as events tell; of what is left, once a walk has been."""
        for key, versions in self.versions.items():
            row = self.row(key)
            there = [version for version in versions if erased or not version.erased]
            if not there or (there[-1].erased and (row is None or row["version_id"] != there[-1].id)):
                continue
            if not self.told and key in self.hidden and row is None:
                continue  # it was deleted, and its event lost
            assert row and row["version_id"] == there[-1].id, f"the row does not speak of the newest version: {row}"
            if there[-1].erased:
                pass  # read before it was erased, or not: both are true
            elif there[-1].shade is None:
                assert (row["status"], row["reason"][:12]) == ("REJECTED", "not an image")
            else:
                assert (row["status"], row["label"]) == ("CLASSIFIED", f"shade {there[-1].shade}")
            if row["status"] == "CLASSIFIED":
                mine = {v: item for (k, v), item in self.history.items() if k == key and v.startswith(row["sequencer"])}
                same = mine[f"{row['sequencer']}#{int(row['deployment']):06d}#{row['model_version']}"]
                assert (row["label"], row["confidence"]) == (same["label"], same["confidence"])
                assert row["deployment"] == max(item["deployment"] for item in mine.values())

    def check_answers(self) -> None:
        for (key, _), item in self.history.items():
            shades = {version.id: version.shade for version in self.versions[key]}
            assert item["label"] == f"shade {shades[item['version_id']]}", "an answer about another version's picture"


places = st.lists(st.integers(0, 20), min_size=1, max_size=6)
faults = (
    st.none()
    | st.builds(Fault, at=st.integers(1, 12), after=st.booleans(), deadly=st.booleans())
    | st.builds(Meanwhile, at=st.integers(1, 12), picks=places)
)
keys = st.sampled_from(KEYS)
tries = st.sampled_from((0, 0, MAX_RECEIVES - 1))
steps = st.one_of(
    st.tuples(st.just("put"), keys, st.none() | st.integers(0, 255), st.integers(1, 3), tries),
    st.tuples(st.just("put"), keys, st.integers(0, 255), st.integers(1, 2), tries),
    st.tuples(st.just("hide"), keys),
    st.tuples(st.just("erase"), keys, st.integers(0, 5)),
    st.tuples(st.just("promote")),
    st.tuples(st.just("replay"), keys, tries),
    st.tuples(st.just("deliver"), places, faults),
    st.tuples(st.just("deliver"), places, faults),
    st.tuples(st.just("deliver"), places, faults),
    st.tuples(st.just("endpoint"), st.booleans()),
    st.tuples(st.just("lag"), st.integers(0, 1)),
    st.tuples(st.just("lose"), st.integers(0, 20)),
    st.tuples(st.just("reconcile")),
)
hexadecimal = st.text("0123456789ABCDEF", min_size=1, max_size=20)
sequencers = st.lists(hexadecimal, min_size=4, max_size=8, unique_by=lambda s: s.ljust(SEQUENCER_WIDTH, "0")).map(
    lambda found: sorted(found, key=lambda s: s.ljust(SEQUENCER_WIDTH, "0"))
)


@pytest.fixture
def world(aws, context, monkeypatch) -> Callable[[list[str]], World]:
    """Makes worlds in one AWS: each example has keys of its own."""
    now: list[World] = []
    real = BaseClient._make_api_call
    client = functions_aws.client
    monkeypatch.setattr(functions_aws, "client", lambda name: now[-1] if name == "sqs" else client(name))
    monkeypatch.setattr(endpoint, "runtime", lambda: now[-1])
    monkeypatch.setattr(pictures, "in_isolation", lambda data, spec, until: prepare(data, spec))
    monkeypatch.setenv("POWERTOOLS_LOG_LEVEL", "CRITICAL")

    def call(self: Any, operation: str, arguments: dict[str, Any]) -> Any:
        busy = now and now[-1].fault is not None
        return now[-1].call(real, self, operation, arguments) if busy else real(self, operation, arguments)

    monkeypatch.setattr(BaseClient, "_make_api_call", call)
    monkeypatch.setattr(app.EndpointHealth, "in_trouble", False)
    monkeypatch.setattr(reconcile, "PAGE", 2)  # pages end among a key's versions
    monkeypatch.setenv("DATA_BUCKET", aws.bucket)

    def make(order: list[str]) -> World:
        aws.state.delete_item(Key={"pk": "champion", "sk": "champion"})
        aws.state.delete_item(Key={"pk": "reconcile", "sk": "walk"})
        app.EndpointHealth.in_trouble = False
        now.append(World(aws, context, str(next(_examples)), list(order)))
        monkeypatch.setattr(inbox, "FOLDER", now[-1].name(""))
        return now[-1]

    return make


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(order=sequencers, history=st.lists(steps, min_size=4, max_size=24))
def test_whatever_happens_the_row_speaks_of_the_newest_version_and_history_stays(world, order, history):
    one = world(order)
    for name, *arguments in history:
        if name == "endpoint":
            one.endpoint_is_down = arguments[0]
        elif name == "lag":
            one.lag = arguments[0]
        else:
            getattr(one, name)(*arguments)
    one.settle()
    one.check_rows(erased=False)
    one.check_answers()
