"""Whether every object ends in one true answer, whatever happens on the way.

    python -m benchmarks.chaos
    python -m benchmarks.chaos --objects 600 --seed 7

Drops objects into the deployed stack: good pictures of every kind, some twice under different keys, broken files, some
that no function has the memory to decode, odd keys, several versions of one key in a burst, objects that are deleted at
once. A part of the events is sent again, late
and shuffled. Meanwhile it kills workers of the function and of the endpoint, makes the endpoint refuse (500), throttle
(429) and dawdle, updates it to another model, and kills the whole local AWS (SIGKILL) with messages in the queue.

When the queue is empty, a reconciliation looks for what the kills lost, and then every object is compared with its row
and its history: the newest version in S3 is the truth, and the answer must be the one that this process computes from
the same bytes and the model. The model answers by the picture's mean colour, each deployment under other names. Every
row that says FAILED must have its message in the dead-letter queue, and every message there a row that says FAILED, or
one that a copy of the event or a newer version came to.

Ends with 1 if an object is lost, an answer is wrong or contradicts another, a row speaks of an old version, a failure
has no reason or no dead letter, or a dead letter no failure. The last line is the result as JSON.

Two settings differ from the template's, so that waiting takes minutes, not an hour: messages of a killed worker are
seen again after 70 seconds, not after 6 minutes, and a message has three tries, not five, of which the last comes a
quarter of an hour after the one before.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from botocore.exceptions import BotoCoreError, ClientError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.inbox import IMAGES, Inbox
from local.emulator import CHECKOUT, Emulator, free_port

OBJECTS = 10_000
BROKEN, DUPLICATES, ODD_KEYS, BURSTS, DELETED, REPEATED = 0.05, 0.05, 0.10, 0.05, 0.03, 0.20  # shares of the objects
EXHAUSTING = 0.002  # each takes a worker for some seconds, as often as it is tried
OUT_OF_TIME = ("took longer than", "did not finish")  # or this, where the machine is busy
VISIBILITY = 70  # seconds, more than the function's time limit
TRIES = 3
MAX_DELAY = 30  # seconds by which a repeated event comes late at most
FAULT_SECONDS = 6.0
STALLED_SECONDS = 30.0  # without progress, after which the next disturbance comes anyway
PATIENCE = 900.0  # seconds without a message less, after which what is left is given up
PUTTERS = 6
MAX_KEY_BYTES = 1024
RECONCILIATIONS = 3
NAMES = (("red", "green", "blue"), ("rouge", "vert", "bleu"), ("rot", "grün", "blau"))  # of the classes, by deployment
FULL = 200  # messages that a queue must have before the local AWS is killed
Answer = tuple[tuple[str, float], ...]  # the classes with their probabilities, best first


@dataclass(frozen=True)
class Content:
    """The bytes of an object, and a part of the reason for which they are rejected, or fail; "" for a good picture."""

    name: str
    data: bytes
    reason: str = ""
    fails: bool = False

    @property
    def good(self) -> bool:
        """Whether it must be classified."""
        return not self.reason

    @property
    def digest(self) -> str:
        """S3's ETag of it."""
        return hashlib.md5(self.data).hexdigest()


@dataclass(frozen=True)
class Step:
    """What is done to one key: its versions, one right after the other; None deletes it."""

    key: str
    versions: tuple[Content | None, ...]


def odd_key(number: int, chance: random.Random) -> str:
    """A key that something on the way might not like; no two are the same."""
    kinds = (
        "two  spaces {n} .jpg",
        "plus+and+{n}.jpg",
        "100%25 {n}%.jpg",
        "\"quoted\" 'twice' {n}.jpg",
        "brackets [{n}] {{x}} (y) <z>&amp;.jpg",
        "новый снимок {n} 🐕‍🦺.jpg",
        "#{n}?x=1&y=2;z=3.jpg",
        "back\\slash {n}.jpg",
        "folder/../{n}/./dots..jpg",
        "line\nbreak {n}.jpg",
    )
    if chance.random() < 0.1:
        tail = f"{number}.jpg"
        return "é" * ((MAX_KEY_BYTES - len("inbox/") - len(tail)) // 2) + tail
    return chance.choice(kinds).format(n=number)


def contents(seed: int, count: int) -> tuple[Iterator[Content], list[Content], list[Content]]:
    """Good pictures, without end, broken files, and those that fail."""
    sys.path.insert(0, str(CHECKOUT / "inference"))
    from tests.makers import corpus
    from tests.makers.coloured import COLOURS, coloured

    whole = [Content(name, data) for name, data, _ in corpus.good(seed)]
    broken = [Content(name, data, reason) for name, data, reason in corpus.broken(seed)]
    exhausting = [Content(name, data, reason, fails=True) for name, data, reason in corpus.exhausting()]
    colours = sorted(COLOURS)
    each = count // len(colours) + 1
    plain = (
        Content(f"{colour} {number}", data)
        for number, some in enumerate(zip(*(coloured(colour, each, seed) for colour in colours), strict=True))
        for colour, data in zip(colours, some, strict=True)
    )
    return itertools.cycle(itertools.chain(whole, plain)), broken, exhausting


def plan(objects: int, seed: int) -> list[Step]:
    """What is dropped, in order."""
    chance = random.Random(seed)
    good, broken, exhausting = contents(seed, 2 * objects)
    failing = set(chance.sample(range(objects), math.ceil(EXHAUSTING * objects)))
    seen: list[Content] = []
    steps = []

    def content() -> Content:
        dice = chance.random()
        if dice < BROKEN:
            return chance.choice(broken)
        if dice < BROKEN + DUPLICATES and seen:
            return chance.choice(seen)
        seen.append(next(good))
        return seen[-1]

    for number in range(objects):
        key = odd_key(number, chance) if chance.random() < ODD_KEYS else f"{number % 50:02}/{number:06}.jpg"
        versions: list[Content | None] = [chance.choice(exhausting) if number in failing else content()]
        dice = chance.random()
        if dice < BURSTS:
            versions += [content() for _ in range(chance.randint(1, 3))]
        elif dice < BURSTS + DELETED:
            versions += chance.choice(([None], [None, content()], [content(), None]))
        steps.append(Step(key, tuple(versions)))
    chance.shuffle(steps)
    return steps


class Repeater(threading.Thread):
    """Reads every event from a queue of its own, and sends some of them to the inbox again, late and shuffled."""

    def __init__(self, inbox: Inbox, seed: int) -> None:
        super().__init__(name="repeater", daemon=True)
        self.inbox, self.chance, self.repeated = inbox, random.Random(f"repeat {seed}"), 0
        self._over = threading.Event()
        self.url = str(inbox.sqs.create_queue(QueueName="chaos-events")["QueueUrl"])
        arn = inbox.sqs.get_queue_attributes(QueueUrl=self.url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        allowed = {"Effect": "Allow", "Principal": "*", "Action": "sqs:SendMessage", "Resource": arn}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
        inbox.sqs.set_queue_attributes(QueueUrl=self.url, Attributes={"Policy": policy})
        pattern = {"source": ["aws.s3"], "detail": {"object": {"key": [{"prefix": "inbox/"}]}}}
        inbox.events.put_rule(Name="chaos-events", EventPattern=json.dumps(pattern))
        inbox.events.put_targets(Rule="chaos-events", Targets=[{"Id": "queue", "Arn": arn}])

    def run(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(BotoCoreError, ClientError):  # the local AWS was killed
                found = self.inbox.sqs.receive_message(QueueUrl=self.url, MaxNumberOfMessages=10, WaitTimeSeconds=1)
                messages = found.get("Messages", [])
                if not messages:
                    continue
                chosen = [one["Body"] for one in messages if self.chance.random() < REPEATED]
                bodies = [body for body in chosen for _ in range(self.chance.choice((1, 1, 2)))]
                self.chance.shuffle(bodies)
                for start in range(0, len(bodies), 10):
                    entries = [
                        {"Id": str(i), "MessageBody": body, "DelaySeconds": self.chance.randint(0, MAX_DELAY)}
                        for i, body in enumerate(bodies[start : start + 10])
                    ]
                    self.inbox.sqs.send_message_batch(QueueUrl=self.inbox.queue_url, Entries=entries)
                    self.repeated += len(entries)
                done = [{"Id": str(i), "ReceiptHandle": one["ReceiptHandle"]} for i, one in enumerate(messages)]
                self.inbox.sqs.delete_message_batch(QueueUrl=self.url, Entries=done)

    def stop(self) -> None:
        """Ends once the thread is at rest."""
        self._over.set()
        self.join()


@dataclass
class Truth:
    """Of one key: what S3 has. `newest` is the newest version that holds data."""

    newest: str
    deleted: bool  # hidden by a marker


@dataclass
class Outcome:
    """Every object beside its row. Each list holds what is wrong, in words."""

    statuses: Counter[str] = field(default_factory=Counter)
    deleted: int = 0
    lost: list[str] = field(default_factory=list)
    old: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    without_reason: list[str] = field(default_factory=list)
    without_letter: list[str] = field(default_factory=list)
    letters: list[str] = field(default_factory=list)
    not_quarantined: list[str] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    by_deployment: Counter[int] = field(default_factory=Counter)

    @property
    def unfinished(self) -> int:
        """What a reconciliation might mend."""
        return len(self.lost) + len(self.old)

    def problems(self, killed: bool) -> dict[str, list[str]]:
        """What was promised and not kept.

        If the local AWS was killed, it may have lost a message on its last try, or on its way to the dead letters.
        """
        return {
            "lost": self.lost,
            "rows that speak of an old version": self.old,
            "answered twice with different results": self.different,
            "wrong answers": self.wrong,
            "failed or rejected without a reason": self.without_reason,
            "failed without a dead letter": [] if killed else self.without_letter,
            "dead letters without a failure": self.letters,
            "rejected and not in quarantine": self.not_quarantined,
        }


class Judge:
    """Knows what each object must have become."""

    def __init__(self, steps: list[Step], models: list[Path]) -> None:
        from predictor import Predictor  # of inference/, which `contents` put on the path

        self.contents = {one.digest: one for step in steps for one in step.versions if one is not None}
        self.predictors = {one.model_version: one for one in map(Predictor, models)}
        self._answers: dict[tuple[str, str], Answer] = {}

    def answer(self, content: Content, model_version: str) -> Answer:
        """What a model says about the bytes, computed here."""
        import numpy as np

        from preprocessing import prepare

        known = (content.digest, model_version)
        if known not in self._answers:
            predictor = self.predictors[model_version]
            size = predictor.preprocess.size
            with warnings.catch_warnings():  # Pillow's, about the odd ones
                warnings.simplefilter("ignore")
                crop = np.frombuffer(prepare(content.data, predictor.preprocess).pixels, np.uint8)
            (top,) = predictor.top(predictor.predict(crop.reshape(1, size, size, 3)))
            self._answers[known] = tuple((one["class"], one["probability"]) for one in top)
        return self._answers[known]

    def compare(self, inbox: Inbox, letters: list[str]) -> Outcome:
        """Everything in the bucket beside everything in the table and in the dead-letter queue."""
        outcome = Outcome()
        order: dict[str, list[str]] = defaultdict(list)  # the versions of a key, newest first
        truths: dict[str, Truth] = {}
        etags: dict[tuple[str, str], str] = {}
        pages = inbox.s3.get_paginator("list_object_versions").paginate(Bucket=inbox.bucket, Prefix="inbox/")
        for page in pages:
            for version in page.get("Versions", []):
                key = version["Key"]
                etags[key, version["VersionId"]] = version["ETag"].strip('"')
                order[key].append(version["VersionId"])
                truth = truths.setdefault(key, Truth("", deleted=True))
                if not truth.newest:  # newest first
                    truth.newest = version["VersionId"]
                truth.deleted = truth.deleted and not version["IsLatest"]
        kept = {
            entry["Key"]
            for page in inbox.s3.get_paginator("list_objects_v2").paginate(Bucket=inbox.bucket, Prefix="quarantine/")
            for entry in page.get("Contents", [])
        }
        rows: dict[str, dict[str, Any]] = {}
        answers: dict[tuple[str, str, str], set[Answer]] = defaultdict(set)
        for row in inbox.rows():
            if row["version"] == "current":
                rows[row["key"]] = row
            if row["status"] == "CLASSIFIED":
                self._judge_answer(row, etags, answers, outcome)
        for (key, version, _), given in answers.items():
            if len(given) > 1:
                outcome.different.append(f"{key!r}, version {version}: {sorted(given)}")
        for key, truth in truths.items():
            self._judge_row(key, truth, rows.get(key), etags, kept, outcome)
        self._judge_letters(letters, rows, order, outcome)
        return outcome

    def _judge_letters(
        self, letters: list[str], rows: dict[str, dict[str, Any]], order: dict[str, list[str]], outcome: Outcome
    ) -> None:
        dead = set()
        for letter in letters:
            try:
                thing = json.loads(letter)["detail"]["object"]
                key, version = thing["key"], thing["version-id"]
            except (ValueError, KeyError, TypeError):
                outcome.letters.append(f"no event: {letter[:200]}")
                continue
            dead.add((key, version))
            row = rows.get(key)
            newer = order[key][: order[key].index(version) + 1] if version in order[key] else []
            if row is None or row["status"] == "WAITING" or row["version_id"] not in newer:
                outcome.letters.append(f"{key!r}, version {version}: its row is {row and row['status']}")
        for key, row in rows.items():
            if row["status"] == "FAILED" and (key, row["version_id"]) not in dead:
                outcome.without_letter.append(f"{key!r}, version {row['version_id']}: {row.get('reason')}")

    def _judge_answer(self, row: dict[str, Any], etags: dict, answers: dict, outcome: Outcome) -> None:
        given = tuple((one["class"], float(one["probability"])) for one in row["classes"])
        answers[row["key"], row["version_id"], row["model_version"]].add(given)
        content = self.contents.get(etags.get((row["key"], row["version_id"]), ""))
        if content is None:
            outcome.wrong.append(f"{row['key']!r}: an answer about version {row['version_id']!r}, which there is not")
        elif not content.good:
            outcome.wrong.append(f"{row['key']!r}: {content.name!r} was classified")
        elif (expected := self.answer(content, row["model_version"])) != given:
            outcome.wrong.append(f"{row['key']!r}: {content.name!r} is {given}, not {expected}")

    def _judge_row(
        self, key: str, truth: Truth, row: dict[str, Any] | None, etags: dict, kept: set[str], outcome: Outcome
    ) -> None:
        if truth.deleted:  # read before it was deleted, or not: both are true
            outcome.deleted += 1
            if row is not None and row["version_id"] != truth.newest:
                outcome.old.append(f"{key!r}, deleted: {row['status']} of {row['version_id']!r}, not {truth.newest!r}")
            return
        if row is None:
            outcome.lost.append(f"{key!r} has no row")
            return
        if row["version_id"] != truth.newest:
            outcome.old.append(f"{key!r}: {row['status']} of {row['version_id']!r}, not {truth.newest!r}")
            return
        status, content = row["status"], self.contents[etags[key, truth.newest]]
        outcome.statuses[status] += 1
        if status == "WAITING":
            outcome.lost.append(f"{key!r} waits, though a model is live: {row.get('reason')}")
        elif status == "CLASSIFIED":
            outcome.by_deployment[int(row["deployment"])] += 1
        elif not row.get("reason"):
            outcome.without_reason.append(f"{key!r} is {status}")
        elif status == "FAILED":
            outcome.failures[row["reason"][:100]] += 1
            if content.fails and not any(part in row["reason"] for part in (content.reason, *OUT_OF_TIME)):
                outcome.wrong.append(f"{key!r}: {content.name!r} failed: {row['reason']}, not {content.reason!r}")
        elif content.good or content.reason not in row["reason"]:
            outcome.wrong.append(f"{key!r}: {content.name!r} was rejected: {row['reason']}, not {content.reason!r}")
        if status == "REJECTED":
            tail = key.removeprefix("inbox/").encode()[:900].decode(errors="ignore")  # a long key is cut
            if not any(name.startswith(f"quarantine/{tail}") and name.endswith(".json") for name in _near(kept, tail)):
                outcome.not_quarantined.append(f"{key!r}")


def _near(kept: set[str], tail: str) -> Iterator[str]:
    """Names in quarantine that may be those of a key: found at once where the key was not cut."""
    whole = f"quarantine/{tail}.json"
    return iter([whole]) if whole in kept else (name for name in kept if name.startswith(f"quarantine/{tail}"))


class Chaos:
    """One run: the stack, what is dropped, what disturbs it."""

    def __init__(self, folder: Path, steps: list[Step], seed: int, restarts: int, progress: Progress) -> None:
        self.folder, self.steps, self.progress = folder, steps, progress
        self.chance = random.Random(f"chaos {seed}")
        self.restarts = restarts
        self.port = free_port()
        self.command = folder / "command"
        self.models = self._models()
        self.deployment = 0
        self.done: Counter[str] = Counter()
        self.notes: list[str] = []
        self.letters: dict[str, str] = {}  # the dead letters' bodies, by message
        self.versions = sum(len(step.versions) for step in steps)
        self.put = 0
        self.aws = self._start()

    def _models(self) -> list[Path]:
        from tests.makers.models import make_artifact

        return [
            make_artifact(self.folder / f"model-{number}", names, model_version=f"26010100000{number}")
            for number, names in enumerate(NAMES, 1)
        ]

    def _start(self) -> Emulator:
        environment = IMAGES
        return Emulator(port=self.port, state=self.folder / "state", keep=True, environment=environment).start()

    def deploy(self) -> None:
        """The stack with its first endpoint."""
        self.inbox = Inbox(self.aws)
        sqs, functions, url = self.inbox.sqs, self.inbox.functions, self.inbox.queue_url
        policy = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["RedrivePolicy"])["Attributes"]["RedrivePolicy"]
        policy = json.dumps(json.loads(policy) | {"maxReceiveCount": TRIES})
        sqs.set_queue_attributes(
            QueueUrl=url, Attributes={"VisibilityTimeout": str(VISIBILITY), "RedrivePolicy": policy}
        )
        name = self.inbox.physical("ClassifyImages")
        variables = functions.get_function_configuration(FunctionName=name)["Environment"]["Variables"]
        variables["MAX_RECEIVES"] = str(TRIES)
        functions.update_function_configuration(FunctionName=name, Environment={"Variables": variables})
        self.update()

    def drop_all(self) -> None:
        """Every step, by several threads, each write again until it is acknowledged."""
        task = self.progress.add_task("put", total=self.versions)

        def drop(step: Step) -> None:
            for content in step.versions:
                self._insist(step.key, content)
                self.put += 1
                self.progress.advance(task)

        with ThreadPoolExecutor(PUTTERS) as pool:
            list(pool.map(drop, self.steps))

    def _insist(self, key: str, content: Content | None) -> None:
        for attempt in itertools.count():
            try:
                if content is None:
                    self.inbox.s3.delete_object(Bucket=self.inbox.bucket, Key=f"inbox/{key}")
                else:
                    self.inbox.put(key, content.data)
                return
            except (BotoCoreError, ClientError):
                if attempt > 300:
                    raise
                time.sleep(0.2)

    def disturb(self) -> None:
        """The disturbances, spread over the puts and the work on what they leave behind."""
        scale = max(1, len(self.steps) // 2000)
        some: list[Callable[[], None]] = [self.kill_worker] * (3 * scale) + [self.kill_server] * (2 * scale)
        some += [lambda: self.fault("500 1"), lambda: self.fault("500 0.5"), lambda: self.fault("429 1")] * scale
        some += [lambda: self.fault("429 0.5"), lambda: self.fault("slow 3")] * scale
        some += [self.update] * (len(self.models) - 1) + [self.restart] * self.restarts
        self.chance.shuffle(some)
        task = self.progress.add_task("disturbances", total=len(some))
        for number, disturbance in enumerate(some, 1):
            self._wait_for(0.85 * number / len(some))
            disturbance()
            self.progress.advance(task)
        self.command.unlink(missing_ok=True)

    def _wait_for(self, share: float) -> None:
        """Until so much has been put and worked off, or nothing moves."""
        best, since = -1.0, time.monotonic()
        while time.monotonic() - since < STALLED_SECONDS:
            reached = (2 * self.put - self.left()) / (2 * self.versions)
            if reached >= share:
                return
            if reached > best:
                best, since = reached, time.monotonic()
            time.sleep(0.3)

    def left(self) -> int:
        """Messages in the inbox's queue, however hidden."""
        return sum(self.inbox.depth())

    def kill_worker(self) -> None:
        """SIGKILL for one or two execution environments of the function while they are at work."""
        deadline = time.monotonic() + 10
        while not self.inbox.depth()[1] and time.monotonic() < deadline:
            time.sleep(0.05)
        self._kill("worker", self._below(lambda one: "ClassifyImages" in one.environ()["AWS_LAMBDA_FUNCTION_NAME"]))

    def kill_server(self) -> None:
        """SIGKILL for a serving process."""
        self._kill("server", self._below(lambda one: "serve" in one.cmdline()))

    def _below(self, chosen: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.aws.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error, KeyError, OSError):
                if chosen(process):
                    found.append(process)
        return found

    def _kill(self, what: str, processes: list[psutil.Process]) -> None:
        for process in self.chance.sample(processes, min(len(processes), self.chance.choice((1, 1, 2)))):
            with contextlib.suppress(psutil.Error):
                process.kill()
                self.done[f"{what} killed"] += 1

    def fault(self, what: str) -> None:
        """The endpoint misbehaves for some seconds."""
        self.command.write_text(what)
        time.sleep(FAULT_SECONDS)
        self.command.unlink()
        self.done[f"endpoint: {what}"] += 1

    def update(self) -> None:
        """The next model goes live."""
        self.deployment += 1
        model = self.models[self.deployment - 1]
        self.inbox.serve(model, self.deployment, instances=2, COMMAND=str(self.command), WORKERS="1")
        if self.deployment > 1:
            self.done["endpoint updated"] += 1

    def restart(self) -> None:
        """SIGKILL for the whole local AWS while messages wait, and another one on the same state."""
        deadline = time.monotonic() + STALLED_SECONDS
        while self.left() < min(FULL, len(self.steps) // 10) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = self.left()
        self.keep_log()
        os.kill(self.aws.pid, signal.SIGKILL)
        self.aws.stop()
        self.aws = self._start()
        self.inbox.connect(self.aws)
        self.inbox.in_service()
        self.done["local AWS killed"] += 1
        self.notes.append(f"killed with {left:,} messages, {self.left():,} afterwards")

    def keep_log(self) -> None:
        """Counts what the emulator said of batches that died; a restart begins its log anew."""
        log = self.aws.log.read_text(errors="replace")
        self.done["batches that died with their worker"] += log.count("errorMessage=Worker process died")

    def drain(self, name: str) -> int:
        """Waits until no message is left, or none goes any more; returns how many are left."""
        task = self.progress.add_task(name, total=None)
        least, since, empty, left = sys.maxsize, time.monotonic(), 0, 0
        while empty < 5 and time.monotonic() - since < PATIENCE:
            left = self.left()
            empty = empty + 1 if left == 0 else 0
            if left < least:
                least, since = left, time.monotonic()
            self.progress.update(task, description=f"{name}: {left:,} messages")
            time.sleep(0.5)
        self.progress.update(task, total=1, completed=1)
        return left

    def reconcile(self) -> None:
        """A walk through the inbox, by the message with which a person starts one."""
        url = self.inbox.physical("ReconcileQueue")
        if url is None:
            raise RuntimeError("the template has no ReconcileQueue")
        self.inbox.sqs.send_message(QueueUrl=url, MessageBody=json.dumps({"min_age_seconds": 0}))
        deadline = time.monotonic() + PATIENCE
        while sum(self.inbox.depth(url)) and time.monotonic() < deadline:
            time.sleep(0.3)
        self.done["reconciliations"] += 1

    def compare(self, judge: Judge) -> Outcome:
        """What became of every object; a dead letter that has been read is hidden, and remembered."""
        url = self.inbox.outputs["InboxDeadLettersUrl"]
        while found := self.inbox.sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, VisibilityTimeout=3600).get(
            "Messages"
        ):
            self.letters |= {message["MessageId"]: message["Body"] for message in found}
        return judge.compare(self.inbox, list(self.letters.values()))

    def run(self) -> tuple[Outcome, Outcome, int]:
        """All of it: what there is before a reconciliation and after, and how many messages are left."""
        task = self.progress.add_task("the stack", total=None)
        self.deploy()
        self.progress.update(task, total=1, completed=1)
        repeater = Repeater(self.inbox, self.chance.randrange(2**32))
        repeater.start()
        with ThreadPoolExecutor(1) as pool:
            disturbing = pool.submit(self.disturb)
            self.drop_all()
            disturbing.result()
        while sum(self.inbox.depth(repeater.url)):
            time.sleep(0.3)
        repeater.stop()
        left = self.drain("drain")
        self.done["events sent again"] = repeater.repeated
        judge = Judge(self.steps, self.models)
        before = after = self.compare(judge)
        for _ in range(RECONCILIATIONS):
            if not after.unfinished and self.done["reconciliations"]:
                break
            self.reconcile()
            left = self.drain("reconciled")
            after = self.compare(judge)
        self.keep_log()
        return before, after, left

    def close(self) -> None:
        """Stops the local AWS."""
        self.aws.stop()


def show(chaos: Chaos, before: Outcome, after: Outcome, console: Console) -> None:
    """The outcome for people."""
    table = Table("disturbance", "times", title=f"{len(chaos.steps):,} objects, {chaos.versions:,} writes")
    for what, times in sorted(chaos.done.items()):
        table.add_row(what, f"{times:,}")
    for note in chaos.notes:
        table.add_row("", note)
    console.print(table)
    table = Table("objects", "before reconciliation", "after")
    for status in sorted(before.statuses.keys() | after.statuses.keys()):
        table.add_row(status.lower(), f"{before.statuses[status]:,}", f"{after.statuses[status]:,}")
    table.add_row("deleted", f"{before.deleted:,}", f"{after.deleted:,}")
    table.add_row("dead letters", "", f"{len(chaos.letters):,}")
    killed = bool(chaos.restarts)
    if killed:
        table.add_row("failed, and the kill took the dead letter", "", f"{len(after.without_letter):,}")
    table.add_section()
    earlier = before.problems(killed)
    for name, found in after.problems(killed).items():
        table.add_row(name, f"{len(earlier[name]):,}", f"{len(found):,}", style="red" if found else "green")
    console.print(table)
    for reason, count in after.failures.most_common(5):
        console.print(f"failed, {count}: {reason}", markup=False)
    for name, found in after.problems(killed).items():
        for example in found[:5]:
            console.print(f"{name}: {example}", style="red", markup=False)


def main() -> int:
    """The command."""
    command = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--objects", type=int, default=OBJECTS, help=f"keys that are written ({OBJECTS:,})")
    command.add_argument("--restarts", type=int, default=2, help="how often the whole local AWS is killed (2)")
    command.add_argument("--seed", type=int, default=0, help="of the objects and the disturbances (0)")
    command.add_argument("--folder", type=Path, help="where state and logs are kept (a temporary folder)")
    arguments = command.parse_args()
    if arguments.objects < 20:
        command.error("--objects must be at least 20")
    console = Console(stderr=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 160)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary, Progress(*columns, console=console) as progress:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        steps = plan(arguments.objects, arguments.seed)
        chaos = Chaos(folder, steps, arguments.seed, arguments.restarts, progress)
        try:
            before, after, left = chaos.run()
        finally:
            chaos.close()
    show(chaos, before, after, console)
    killed = bool(chaos.restarts)
    problems = {name: len(found) for name, found in after.problems(killed).items()}
    if left:
        console.print(f"[red]{left} messages are left in the queue")
    result = {
        "benchmark": "chaos",
        "objects": len(steps),
        "writes": chaos.versions,
        "disturbances": dict(chaos.done),
        "statuses": {status.lower(): count for status, count in after.statuses.items()},
        "deleted": after.deleted,
        "dead_letters": len(chaos.letters),
        "failed_and_dead_letter_lost_with_a_kill": len(after.without_letter) if killed else 0,
        "by_deployment": dict(after.by_deployment),
        "before_reconciliation": {name: len(found) for name, found in before.problems(killed).items()},
        **problems,
        "messages_left": left,
        "seconds": round(time.monotonic() - began),
        "seed": arguments.seed,
        "ok": not left and not any(problems.values()),
    }
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
