"""When a run starts, and when not: each rule by itself, then all of them over simulated days."""

import heapq
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from common import aws as aws_module
from common import clock, dataset, ledger, quiet, runs, state
from common.events import ObjectEvent
from start_retraining import app as start
from start_retraining import decide, worth
from tests.makers import events

MACHINE = "arn:aws:states:us-east-1:1:stateMachine:loop-retrain"
EXECUTION = MACHINE.replace(":stateMachine:", ":execution:")
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


# --- What is worth a run: pure functions ---


def label(name: str, sha256: str) -> dict[str, Any]:
    return {"class": name, "sha256": sha256}


def found(*labels: dict[str, Any]) -> Any:
    """The dataset in which all the labels take part."""
    unique = {(one["sha256"], one["class"]) for one in labels}
    return dataset.Dataset([dataset.Picture(sha256, name, "train", "s3://b/k") for sha256, name in sorted(unique)])


OLD = [label("beagle", "a"), label("boxer", "b")]
LAST = found(*OLD)


def news(*more: dict[str, Any], last: dataset.Dataset | None = LAST) -> decide.News:
    return decide.news(found(*OLD, *more), last)


def test_new_classes_and_new_pictures_are_counted_apart():
    counted = news(label("pug", "c"), label("pug", "d"), label("beagle", "e"))
    assert counted.new_classes == {"pug": 2} and counted.new_pictures == 1 and counted.pictures == 5


def test_a_new_class_is_reason_enough():
    assert decide.reason(news(label("pug", "c")), 10) == (True, "1 new class: pug (1)")
    both = news(label("pug", "c"), label("husky", "d"), label("boxer", "e"))
    assert decide.reason(both, 10) == (True, "2 new classes: husky (1), pug (1); 1 new picture of known classes")


def test_pictures_of_known_classes_must_be_enough():
    two = news(label("boxer", "c"), label("beagle", "d"))
    assert decide.reason(two, 2) == (True, "2 new pictures of known classes, and 2 are enough")
    learns, why = decide.reason(two, 5)
    assert not learns and why.startswith("2 new pictures of known classes, of the 5 that a run needs: 3 missing")


def test_the_first_run_needs_neither():
    assert decide.reason(news(last=None), 100) == (True, "the first run, on 2 pictures of 2 classes")


def test_what_the_gate_could_only_reject_is_no_reason_for_a_run():
    pictures = [dataset.Picture(f"{n}", "x", "test" if n % 5 == 0 else "train", "o") for n in range(50)]
    assert decide.why_not_to_be_judged(dataset.Dataset(pictures), [], 10) is None
    why = decide.why_not_to_be_judged(dataset.Dataset(pictures), [], 12)
    assert why and why.startswith(
        "10 test pictures of the 12 that the gate needs to judge a model: label about 10 more"
    )


def test_only_pictures_count_with_which_a_model_could_be_judged():
    """A hundred test pictures of new classes help nobody where the champion is compared on the old ones."""
    pictures = [dataset.Picture(f"{n}", "new" if n % 2 else "old", "test", "o") for n in range(20)]
    why = decide.why_not_to_be_judged(dataset.Dataset(pictures), ["old", "older"], 12)
    assert why and why.startswith("10 test pictures of classes that the live model knows of the 12 that the gate needs")
    assert decide.why_not_to_be_judged(dataset.Dataset(pictures), ["old"], 10) is None
    assert decide.why_not_to_be_judged(dataset.Dataset(pictures), ["older"], 12) is None, "nothing to compare"


def test_what_is_labelled_again_is_not_new_and_what_is_moved_is():
    assert news(label("beagle", "a")).new_pictures == 0, "a copy, in the same class"
    moved = found(label("beagle", "a"), label("boxer", "x"))  # x was a beagle until then
    last = found(label("beagle", "a"), label("beagle", "x"), label("boxer", "b"))
    assert decide.news(moved, last).new_pictures == 1
    assert decide.news(last, moved).new_pictures == 2, "and back again; b is new to it, whenever it was labelled"


@given(st.integers(0, 9000), st.integers(0, 9000), st.integers(1, 4000), st.integers(1, 4000))
def test_labels_wait_until_they_are_quiet_and_never_longer_than_the_longest_wait(changed, more, period, longest):
    """`changed` seconds ago the last label came, `more` before that the first that waits."""
    at = lambda ago: clock.iso(NOON - timedelta(seconds=ago))  # noqa: E731
    entry = ledger.Ledger(7, at(changed), at(changed + more))
    left = decide.seconds_to_wait(entry, NOON, period, longest)
    assert (left <= 0) == (changed >= period or changed + more >= longest)
    assert left <= period and left <= longest


# --- The ledger's wait, and its end, in the table ---


def event(key: str, sequencer: str = "01") -> ObjectEvent:
    return ObjectEvent.from_body(events.object_created("b", key, sequencer=sequencer))


def change(number: int) -> ledger.Ledger:
    ledger.record(event(f"labelled/x/{number}.png"), status="DELETED")
    entry = ledger.read()
    assert entry
    return entry


def test_labels_wait_since_the_first_that_no_snapshot_has(aws):
    first = change(1)
    second = change(2)
    assert first.waiting_since == second.waiting_since == first.changed_at
    ledger.settle(second.revision, clock.iso(clock.now()))
    settled = ledger.read()
    assert settled and settled.waiting_since is None and settled.revision == second.revision
    assert change(3).waiting_since


def test_a_label_that_comes_while_the_snapshot_is_taken_waits_on(aws):
    entry, taken_at = change(1), clock.iso(clock.now() - timedelta(minutes=5))
    newest = change(2)
    ledger.settle(entry.revision, taken_at)
    after = ledger.read()
    assert after and after.waiting_since == taken_at <= newest.changed_at, "never later than it came"


# --- The lock, as start_retraining sees it, and the runs of a day ---


@dataclass
class StepFunctions:
    """Executions by name, with their status; names are taken for ever, as in the emulator. And the calls of end_run."""

    statuses: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)

    def start_execution(self, stateMachineArn: str, name: str, input: str) -> None:
        assert stateMachineArn == MACHINE and len(name) <= 80
        if name in self.statuses:
            raise ClientError({"Error": {"Code": "ExecutionAlreadyExists"}}, "StartExecution")
        self.statuses[name], self.inputs[name] = "RUNNING", json.loads(input)

    def describe_execution(self, executionArn: str) -> dict[str, str]:
        assert executionArn.startswith(f"{EXECUTION}:")
        name = executionArn.rpartition(":")[2]
        if name not in self.statuses:
            raise ClientError({"Error": {"Code": "ExecutionDoesNotExist"}}, "DescribeExecution")
        return {"status": self.statuses[name]}

    def invoke(self, FunctionName: str, InvocationType: str, Payload: str) -> None:
        assert (FunctionName, InvocationType) == ("end_run", "Event")
        self.ended.append(json.loads(Payload)["detail"]["executionArn"])


@pytest.fixture
def sfn(monkeypatch: pytest.MonkeyPatch) -> StepFunctions:
    fake, client = StepFunctions(), aws_module.client
    monkeypatch.setenv("RETRAIN_STATE_MACHINE", MACHINE)
    monkeypatch.setattr(
        aws_module, "client", lambda name: fake if name in ("stepfunctions", "lambda") else client(name)
    )
    return fake


def lock(holder: str, since: datetime | None = None) -> None:
    at = clock.iso(since or clock.now())
    state.put("lock", "lock", {"holder": f"{EXECUTION}:{holder}", "run": "1", "since": at})


def run_item(began: datetime, outcome: str = "PROMOTED", **more: str) -> None:
    state.put("run", began.strftime(runs.RUN_ID), {"outcome": outcome, **more})


def test_a_run_that_lives_keeps_others_from_starting(aws, sfn):
    assert runs.obstacle() is None
    sfn.statuses["one"] = "RUNNING"
    lock("one")
    obstacle = runs.obstacle()
    assert obstacle and "one is running" in obstacle.why and sfn.ended == []


@pytest.mark.parametrize("status", ["FAILED", "ABORTED", "TIMED_OUT", "SUCCEEDED"])
def test_the_lock_of_a_dead_run_is_end_runs_to_free(aws, sfn, status):
    """It may have died while an endpoint was being updated."""
    sfn.statuses["one"] = status
    lock("one")
    obstacle = runs.obstacle()
    assert obstacle and obstacle.seconds == 60 and "is cleaned up after" in obstacle.why
    assert sfn.ended == [f"{EXECUTION}:one"]
    assert state.get("lock", "lock")


def test_an_execution_that_nobody_knows_is_dead_unless_it_has_just_begun(aws, sfn):
    lock("forgotten")
    obstacle = runs.obstacle()
    assert obstacle and "is running" in obstacle.why and sfn.ended == []
    lock("forgotten", clock.now() - timedelta(minutes=16))
    obstacle = runs.obstacle()
    assert obstacle and "is cleaned up after" in obstacle.why and sfn.ended.pop() == f"{EXECUTION}:forgotten"
    state.put("lock", "lock", {"holder": f"{EXECUTION}:recover-1", "since": clock.iso(clock.now()), "recovery": "{}"})
    assert runs.obstacle() and sfn.ended, "a recovery that was never begun"


def test_only_so_many_runs_begin_within_24_hours(aws, sfn, monkeypatch):
    monkeypatch.setenv("MAX_RUNS_PER_DAY", "2")
    now = clock.now()
    run_item(now - timedelta(hours=25))
    run_item(now - timedelta(hours=3), "FAILED")
    run_item(now - timedelta(hours=2), "NOTHING_NEW")
    run_item(now - timedelta(hours=1), trigger="back")
    assert runs.obstacle() is None
    run_item(now - timedelta(minutes=30), trigger="hand")
    obstacle = runs.obstacle()
    assert obstacle and obstacle.seconds == pytest.approx(21 * 3600, abs=2)
    assert "of at most 2 runs within 24 hours 2 began" in obstacle.why


def test_a_name_is_started_once_and_then_found_running(aws, sfn):
    assert runs.start("a", {}, attempts=2) == "a" == runs.start("a", {"other": "input"}, attempts=2)
    sfn.statuses["a"] = "FAILED"
    assert runs.start("a", {}) is None
    assert runs.start("a", {}, attempts=2) == "a-1"
    sfn.statuses["a-1"] = "FAILED"
    assert runs.start("a", {}, attempts=2) is None


def test_what_somebody_stopped_is_not_started_again(aws, sfn):
    runs.start("a", {}, attempts=3)
    sfn.statuses["a"] = "ABORTED"
    assert runs.start("a", {}, attempts=3) is None and sfn.statuses.keys() == {"a"}


# --- All of it over simulated days ---


@dataclass
class World:
    """Labels, messages, runs and a clock. The ledger and Step Functions are models; what decides is what is tested.

    Each label is one picture. Times are seconds.
    """

    quiet: int
    longest: int
    max_runs: int
    min_new: int
    now: float = 0.0
    due: list[tuple[float, int, Any]] = field(default_factory=list)
    order: Iterator[int] = field(default_factory=itertools.count)
    items: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    sfn: StepFunctions = field(default_factory=StepFunctions)
    labels: list[dict[str, Any]] = field(default_factory=list)
    revision: int = 0
    changed: float = 0.0
    waiting: str | None = None
    messages: int = 0  # in the queue
    starts: list[tuple[float, str]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    snapshots: list[tuple[float, int, str]] = field(default_factory=list)  # when, how many labels, whose
    quiet_starts: list[bool] = field(default_factory=list)
    trouble: Iterator[int] = field(default_factory=lambda: itertools.repeat(9))  # how the runs end
    inside: set[str] = field(default_factory=set)
    last: Any = None  # what was trained

    def at(self, seconds: float) -> datetime:
        return NOON + timedelta(seconds=seconds)

    def iso(self, seconds: float) -> str:
        return clock.iso(self.at(seconds))

    def later(self, seconds: float, what: Any) -> None:
        heapq.heappush(self.due, (self.now + seconds, next(self.order), what))

    def go(self, until: float = 1e12, most: int = 20_000) -> None:
        """Let time pass until nothing is due before `until`."""
        for _ in range(most):
            if not self.due or self.due[0][0] > until:
                return
            self.now, _, what = heapq.heappop(self.due)
            what()
        raise AssertionError("it goes on for ever")

    # What is there instead of AWS

    def read(self) -> ledger.Ledger | None:
        return ledger.Ledger(self.revision, self.iso(self.changed), self.waiting) if self.revision else None

    def settle(self, revision: int, at: str) -> None:
        self.waiting = None if revision == self.revision else at

    def get(self, pk: str, sk: str) -> dict[str, Any] | None:
        return self.items.get((pk, sk))

    def put(self, pk: str, sk: str, attributes: dict[str, Any]) -> None:
        self.items[pk, sk] = {"pk": pk, "sk": sk} | attributes

    def begun_since(self, since: datetime) -> list[datetime]:
        begun = [item["began"] for (pk, _), item in self.items.items() if pk == "run"]
        return [moment for moment in begun if moment >= since]

    def send_message(self, QueueUrl: str, MessageBody: str, DelaySeconds: int) -> None:
        revision = json.loads(MessageBody)["revision"]
        assert revision == self.revision, "only the newest message goes round"
        self.send(revision, DelaySeconds)

    def send(self, revision: int, delay: float) -> None:
        assert 0 <= delay <= 900
        self.messages += 1
        self.later(delay, lambda: self.deliver(revision))

    def deliver(self, revision: int) -> None:
        self.messages -= 1
        before = set(self.sfn.statuses)
        start.consider(revision)
        for name in self.sfn.statuses.keys() - before:
            entry = self.read()
            assert entry and entry.waiting_since
            self.quiet_starts.append(self.now - self.changed >= self.quiet)
            waited = (self.at(self.now) - clock.parse(entry.waiting_since)).total_seconds()
            assert self.quiet_starts[-1] or waited >= self.longest, "neither quiet nor waited for long"
            assert len(self.begun_since(self.at(self.now) - runs.DAY)) < self.max_runs
            assert ("lock", "lock") not in self.items
            self.starts.append((self.now, name))
            self.begin(name)
        while self.sfn.ended:
            self.end(self.sfn.ended.pop().rpartition(":")[2])

    # What people and runs do

    def label(self, count: int, duplicates: int = 0) -> None:
        """One batch of register_labels, whose message SQS may deliver more than once."""
        for _ in range(count):
            self.labels.append(label("x", f"{len(self.labels)}"))
            self.revision, self.changed = self.revision + 1, self.now
            self.waiting = self.waiting or self.iso(self.now)
        for _ in range(1 + duplicates):
            self.send(self.revision, min(900, self.quiet))

    def start_by_hand(self, name: str) -> None:
        self.sfn.statuses[name] = "RUNNING"
        self.begin(name)

    def begin(self, name: str) -> None:
        began, kind = self.now, next(self.trouble)

        def take() -> None:
            if ("lock", "lock") in self.items:
                self.sfn.statuses[name] = "FAILED"
                self.refused.append(name)
                return
            assert not self.inside, "two runs at once"
            self.inside.add(name)
            self.put("lock", "lock", {"holder": f"{EXECUTION}:{name}", "since": self.iso(self.now)})
            if kind == 0:  # it fails before the snapshot
                self.later(20, lambda: finish("FAILED"))
            elif kind == 1:  # somebody stops it, and the event of that is lost
                self.later(20, die)
            else:
                self.later(30, snapshot)

        def snapshot() -> None:
            seen, labels, taken_at = self.revision, len(self.labels), self.now

            def taken() -> None:
                self.settle(seen, self.iso(taken_at))
                self.snapshots.append((taken_at, labels, name))
                if kind == 2:
                    self.later(3000, die)
                else:
                    self.later(2000 + 500 * kind, lambda: finish("FAILED" if kind == 3 else "REJECTED", taken_at))

            self.later(10, taken)

        def die() -> None:
            self.sfn.statuses[name] = "ABORTED"

        def finish(outcome: str, taken_at: float | None = None) -> None:
            self.sfn.statuses[name] = "FAILED" if outcome == "FAILED" else "SUCCEEDED"
            self.put("run", f"{began}", {"began": self.at(began), "outcome": outcome})
            if outcome != "FAILED" and taken_at is not None:
                labels = next(labels for at, labels, whose in self.snapshots if (at, whose) == (taken_at, name))
                self.last = self.assemble(self.labels[:labels])
            self.end(name)

        self.later(2, take)

    def end(self, name: str) -> None:
        """What end_run and FreeLock do."""
        self.inside.discard(name)
        held = self.get("lock", "lock")
        if held and held["holder"].endswith(f":{name}"):
            del self.items["lock", "lock"]

    def assemble(self, labels: Any, *_: Any) -> Any:
        pictures = [dataset.Picture(one["sha256"], "x", "train", "o") for one in labels]
        other = dataset.Picture("y", "y", "train", "o")
        return SimpleNamespace(pictures=[*pictures, other], classes=["x", "y"], hash=f"{len(pictures)}", left_out={})


def live(world: World) -> pytest.MonkeyPatch:
    """Put the world in the place of AWS; undo it afterwards."""
    patch = pytest.MonkeyPatch()
    for name, value in {
        "QUIET_PERIOD_SECONDS": world.quiet, "LONGEST_WAIT_SECONDS": world.longest, "MIN_NEW_PICTURES": world.min_new,
        "MAX_RUNS_PER_DAY": world.max_runs, "MIN_PICTURES_PER_CLASS": 5, "GATE_MIN_TEST_PICTURES": 0,
        "RETRAIN_QUEUE_URL": "queue",
        "RETRAIN_STATE_MACHINE": MACHINE, "END_RUN_FUNCTION": "end_run",
    }.items():  # fmt: skip
        patch.setenv(name, str(value))
    clients = {"stepfunctions": world.sfn, "lambda": world.sfn, "sqs": world}
    patch.setattr(aws_module, "client", clients.__getitem__)
    patch.setattr(clock, "now", lambda: world.at(world.now))
    patch.setattr(ledger, "read", world.read)
    patch.setattr(ledger, "settle", world.settle)
    other = label("y", "y")
    patch.setattr(ledger, "contents", lambda: SimpleNamespace(labels=[*world.labels, other], splits=None))
    patch.setattr(dataset, "assemble", lambda labels, *_: world.assemble(labels[:-1]))
    patch.setattr(state, "get", world.get)
    patch.setattr(state, "put", world.put)
    patch.setattr(worth, "last_training", lambda: (world.last, ""))
    patch.setattr(runs, "_begun_since", world.begun_since)
    return patch


@st.composite
def lives(draw: st.DrawFn) -> tuple[World, list[tuple[int, int, int]], list[int], list[int]]:
    world = World(
        quiet=draw(st.sampled_from([5, 600, 2000])),
        longest=draw(st.sampled_from([1800, 7200, 86400])),
        max_runs=draw(st.integers(1, 4)),
        min_new=draw(st.sampled_from([1, 5, 20])),
    )
    gaps = st.one_of(st.integers(0, 60), st.integers(0, 3000), st.integers(0, 40_000))
    batches = draw(st.lists(st.tuples(gaps, st.integers(1, 8), st.integers(0, 1)), min_size=1, max_size=40))
    by_hand = draw(st.lists(st.integers(0, 200_000), max_size=3))
    ends = draw(st.lists(st.integers(0, 9), max_size=12))
    return world, batches, by_hand, ends


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lives())
def test_however_labels_come_and_runs_end_no_label_is_lost_and_no_run_is_one_too_many(life):
    world, batches, by_hand, ends = life
    world.trouble = itertools.chain(ends, itertools.repeat(9))
    moment = 0
    for gap, count, duplicates in batches:
        moment += gap
        world.later(moment, lambda count=count, duplicates=duplicates: world.label(count, duplicates))
    for number, seconds in enumerate(by_hand):
        world.later(seconds, lambda number=number: world.start_by_hand(f"hand-{number}"))
    patch = live(world)
    try:
        world.go()
    finally:
        patch.undo()
    # Nothing waits, nothing is in the queue, and whoever still has the lock is a dead run that nobody has met since.
    assert world.messages == 0 and world.waiting is None
    assert all(world.sfn.statuses[name] != "RUNNING" for name in world.sfn.statuses)
    # A run that labels started was refused only where somebody had started another by hand.
    assert not [name for name in world.refused if name.startswith("labels")] or by_hand
    # The last labels are in a snapshot, or there is a reason why they are in none.
    taken = max((labels for _, labels, _ in world.snapshots), default=0)
    decision = world.items.get(("decision", "last"), {})
    assert taken == len(world.labels) or decision["decision"] == "NO_RUN", decision


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.sampled_from([600, 2000]), st.sampled_from([3600, 20_000]))
def test_labels_that_never_become_quiet_start_a_run_after_the_longest_wait(every, period, longest):
    """A label every so many tenths of the quiet period, for two days; runs take 6,500 seconds."""
    every = every * period // 21
    assume(every < period)
    world = World(quiet=period, longest=longest, max_runs=100, min_new=1)
    for number in range(int(2 * 86400 / every)):
        world.later(number * every, lambda: world.label(1))
    patch = live(world)
    try:
        world.go(until=2 * 86400 - period, most=200_000)
    finally:
        patch.undo()
    assert world.starts and not any(world.quiet_starts) and not world.refused
    messages = min(900, period) + every  # the time until some message arrives
    first = world.starts[0][0]
    assert longest <= first <= longest + messages
    for (one, _), (next_one, _) in itertools.pairwise(world.starts):
        assert next_one - one <= max(longest, 6600) + messages + period


def test_many_labels_make_one_run():
    world = World(quiet=600, longest=86400, max_runs=9, min_new=1)
    for number in range(500):
        world.later(number * 11, lambda: world.label(10))
    patch = live(world)
    try:
        world.go()
    finally:
        patch.undo()
    ((began, name),) = world.starts
    assert began == pytest.approx(499 * 11 + 600, abs=2) and world.snapshots[0][1] == 5000
    assert world.sfn.inputs[name]["trigger"] == "labels"
    assert world.sfn.inputs[name]["why"] == "the first run, on 5001 pictures of 2 classes"


def test_labels_that_come_during_a_run_wait_and_make_the_next_one():
    world = World(quiet=600, longest=86400, max_runs=9, min_new=1)
    world.later(0, lambda: world.label(10))
    world.later(3000, lambda: world.label(10))
    patch = live(world)
    try:
        world.go(until=5000)
        assert world.items["decision", "last"]["decision"] == "WAITS"
        assert "is running; the labels wait" in world.items["decision", "last"]["why"]
        world.go()
    finally:
        patch.undo()
    assert [labels for _, labels, _ in world.snapshots] == [10, 20]
    ended = world.starts[0][0] + 2 + 30 + 10 + 6500
    assert ended <= world.starts[1][0] <= ended + 600


def test_more_runs_than_a_day_may_have_wait_for_the_next():
    world = World(quiet=5, longest=86400, max_runs=2, min_new=1)
    for number in range(5):
        world.later(number * 10_000, lambda: world.label(10))
    patch = live(world)
    try:
        world.go()
    finally:
        patch.undo()
    starts = [moment for moment, _ in world.starts]
    assert starts[:2] == pytest.approx([5, 10_005], abs=5)
    assert starts[2] == pytest.approx(starts[0] + 86400, abs=905) and len(starts) == 3
    assert world.snapshots[-1][1] == 50


def trained(aws: Any, what: dataset.Dataset) -> None:
    aws.s3.put_object(Bucket=aws.artifacts, Key=f"datasets/{what.hash}/manifest.jsonl", Body=what.manifest().encode())
    state.put("dataset", "last", {"hash": what.hash})


def test_a_manifest_that_somebody_deleted_keeps_no_run_from_starting(aws, monkeypatch):
    monkeypatch.setenv("GATE_MIN_TEST_PICTURES", "0")
    trained(aws, LAST)
    assert worth.last_training() == (LAST, "")
    state.put("dataset", "last", {"hash": "gone"})
    learns, why, facts = worth.worth_a_run(found(*OLD))
    assert learns and facts["first"]
    assert why.endswith("is not known: there is no s3://artifacts/datasets/gone/manifest.jsonl)")


def test_every_decision_is_kept_with_its_counts_and_reason(aws, sfn, monkeypatch):
    labels = [label("beagle", "a"), label("boxer", "b"), label("pug", "c")]
    trained(aws, LAST)
    monkeypatch.setattr(ledger, "contents", lambda: SimpleNamespace(labels=labels, splits=None))
    monkeypatch.setattr(dataset, "assemble", lambda *_: found(*labels))
    monkeypatch.setenv("GATE_MIN_TEST_PICTURES", "1")
    entry = change(1)
    assert start.consider(entry.revision).startswith("no run: 0 test pictures of the 1 that the gate needs")
    monkeypatch.setenv("GATE_MIN_TEST_PICTURES", "0")
    entry = change(2)
    assert start.consider(entry.revision).startswith("started labels-2")
    kept = state.get("decision", "last")
    assert kept and kept["decision"] == "STARTED" and kept["why"].endswith("1 new class: pug (1)")
    assert kept["new_classes"] == {"pug": 1} and kept["new_pictures"] == 0 and kept["revision"] == 2
    assert sfn.inputs[kept["execution"]] == {
        "trigger": "labels", "why": "1 new class: pug (1)", "revision": 2, "force": False
    }  # fmt: skip
    lock(kept["execution"])
    assert "about to take these labels" in start.consider(2)
    assert state.get("decision", "last") == kept, "its own run is no reason to wait"
    state.table().delete_item(Key={"pk": "lock", "sk": "lock"})
    ledger.settle(2, clock.iso(clock.now()))
    assert start.consider(2) == "no labels wait"

    trained(aws, dataset.Dataset([*found(*labels).pictures, dataset.Picture("d", "pug", "test", "o")]))
    entry = change(3)
    assert start.consider(entry.revision).startswith("no run: 0 new pictures")
    kept = state.get("decision", "last")
    assert kept and kept["decision"] == "NO_RUN" and "0 new pictures of known classes, of the 1" in kept["why"]
    after = ledger.read()
    assert after and after.waiting_since is None


def test_a_delay_is_as_long_as_sqs_allows(aws, monkeypatch):
    sent: list[int] = []
    sqs = SimpleNamespace(send_message=lambda **request: sent.append(request["DelaySeconds"]))
    monkeypatch.setattr(aws_module, "client", lambda name: sqs)
    for seconds in (-3, 0.2, 899.1, 4000):
        quiet.ask_again(1, seconds)
    assert sent == [0, 1, 900, 900]
