"""The demo itself: starts AWS on this machine, runs the whole loop once, and reports what came of it.

Every figure is read back from AWS (rows of DynamoDB, jobs and endpoint of SageMaker, metrics of CloudWatch) or measured
here. If the loop did not complete, the demo says why and ends with status 1.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from botocore.exceptions import EndpointConnectionError
from rich.box import SIMPLE
from rich.table import Table

from local.demo import page
from local.demo.data import Collection, Picture, broken_files, collect
from local.demo.keep import KeptEmulator
from local.demo.loop import SETTLED, InboxStream, Loop, Row, Run
from local.demo.progress import Display, RunWatcher, duration
from local.demo.settings import WEIGHTS_FILE, DemoError, Settings, Weights, find_weights, parse
from local.emulator import Emulator, EmulatorError, check_port
from local.stack import ENVIRONMENT, Stack, StackError, write_environment

RUN_SECONDS = 900.0  # the longest that one retraining run may take
ROWS_SECONDS = 90.0
START_SECONDS = 120.0  # from the last label to the start of a run
SAM_NEWS = re.compile(r"^Building|^Build |_FAILED|^Error|^Waiting|^Successfully")
PRETRAINED = {
    "PretrainedWeights": "imagenet",
    "Unfreeze": "layer4",
    "ImageSize": "224",
    "EpochsMin": "3",
    "EpochsMax": "5",
    "LearningRateMin": "0.0002",
}
FROM_SCRATCH = {
    "PretrainedWeights": "none",
    "Unfreeze": "all",
    "ImageSize": "64",
    "EpochsMin": "7",
    "EpochsMax": "10",
    "LearningRateMin": "0.0007",
    # Trained from nothing in a minute, a model gives up some of the old classes for a new one.
    "GateMargin": "0.1",
}


@dataclass
class Answer:
    """What the system said about one picture whose class is known."""

    picture: Picture
    key: str
    row: Row | None

    @property
    def label(self) -> str | None:
        return self.row.get("label") if self.row else None

    @property
    def right(self) -> bool:
        return self.label is not None and self.label == self.picture.truth


@dataclass
class Result:
    """Everything that the demo did, for the terminal and the page."""

    collection: Collection
    weights: Weights
    image_size: int
    began: datetime
    runs: list[Run] = field(default_factory=list)
    before: list[Answer] = field(default_factory=list)
    after: list[Answer] = field(default_factory=list)
    broken: list[Answer] = field(default_factory=list)
    stream: list[Answer] = field(default_factory=list)
    during_update: int = 0
    caution: str = ""
    requests: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


BIN = Path(sys.executable).parent  # where the aws command line is


FEW = 20  # labelled pictures of a class, below which their test split is too small to judge by
LEAST_TESTED = 25  # test pictures of the first classes, below which the gate would ask for more


def share(answers: Iterable[Answer]) -> tuple[int, int]:
    """(right, all) of the answers."""
    answers = list(answers)
    return sum(answer.right for answer in answers), len(answers)


def parameters(collection: Collection, weights: Weights) -> dict[str, str]:
    """The template's parameters for this demo: the local ones of samconfig.toml, and what follows from the pictures."""
    chosen = {
        "TuningJobs": "4",
        "LearningRateMax": "0.002",
        "BatchSizes": "16,32",
    } | (PRETRAINED if weights.path else FROM_SCRATCH)
    if collection.fewest < FEW:
        # Eight photographs of a class leave one or two to test with: the gate's thresholds for shares of them would
        # judge chance, and end a demo in three.
        chosen |= {
            "MinPicturesPerClass": str(collection.fewest),
            "MinNewPictures": "1",
            "AccuracyFloor": "0",
            "NewClassFloor": "0",
        }
    if tested(collection) < LEAST_TESTED:
        chosen |= {"GateMinTestPictures": "1", "GateMaxDrop": "1"}
    return chosen


def tested(collection: Collection) -> int:
    """About how many pictures of the first classes are in the test split: a fifth of each."""
    return sum(len(collection.labelled[name]) // 5 for name in collection.first)


def caution(collection: Collection, weights: Weights) -> str:
    """What to expect of few pictures, before the figures disappoint; empty where there is no need."""
    if collection.fewest >= FEW:
        few = f"Only some {tested(collection)} pictures are left to test with: the gate compares models by these few."
        return few if tested(collection) < LEAST_TESTED else ""
    scratch = "" if weights.path else ", and from random weights so few teach hardly more than chance"
    return (
        f"Only {collection.fewest} pictures of a class are labelled{scratch}: the gate lets nearly any model through, "
        "so that the loop can be seen; its verdicts mean little."
    )


class Demo:
    """One run of the demo against an emulator that is up."""

    def __init__(self, settings: Settings, collection: Collection, weights: Weights, display: Display):
        self.settings = settings
        self.collection = collection
        self.weights = weights
        self.display = display
        self.parameters = parameters(collection, weights)
        self.result = Result(collection, weights, int(self.parameters["ImageSize"]), datetime.now(UTC))
        self.result.caution = caution(collection, weights)

    def run(self, aws: Emulator) -> Result:
        """The story, step by step. Stops early when the first model does not go live: the rest needs it."""
        self.loop = self._deploy(aws)
        good, bad = self._drop_unlabelled()
        if self._first_run():
            self._replayed(good, bad)
            if self._second_run():
                self._measure_again()
        return self.result

    def _deploy(self, aws: Emulator) -> Loop:
        with self.display.step("Deploy template.yaml with sam build and sam deploy"):
            stack = Stack(aws, progress=self._sam_says)
            outputs = stack.deploy(self.parameters)
        loop = Loop(outputs, aws.endpoint_url, aws.environment())
        self.display.say(f"  deployed {loop.package_sizes()}")
        if self.weights.path:
            with self.display.step("Put the pretrained weights into the artifact bucket"):
                key = f"weights/{WEIGHTS_FILE}"
                loop.clients["s3"].upload_file(str(self.weights.path), loop.artifacts, key)
        return loop

    def _sam_says(self, line: str) -> None:
        """Show the lines of sam's output that tell something; each resource only where the next line replaces it."""
        if "CREATE_COMPLETE" in line and self.display.console.is_terminal or SAM_NEWS.search(line):
            self.display.detail([_escaped(" ".join(line.split()))[:120]])

    def _drop_unlabelled(self) -> tuple[dict[str, Picture], dict[str, Picture]]:
        """Returns the pictures and the broken files, by key."""
        held_out = self.collection.held_out
        with self.display.step(f"Drop {len(held_out)} unlabelled pictures and 3 broken files into inbox/"):
            good = self.loop.drop("before", held_out)
            bad = self.loop.drop("before", broken_files(held_out[0]))
            rows = self._rows([*good, *bad], {"WAITING"} | SETTLED)
        early = [key for key in good if rows.get(key, {}).get("status") != "WAITING"]
        if early:
            self.result.problems.append(f"{len(early)} of {len(good)} pictures got no WAITING row: {early[0]}")
        return good, bad

    def _first_run(self) -> bool:
        classes = self.collection.first
        count = sum(len(self.collection.labelled[name]) for name in classes)
        with self.display.step(f"Label {count} pictures of {_listed(classes)}"):
            known = self.loop.executions()
            for name in classes:
                self.loop.label(name, self.collection.labelled[name])
            arn = self._started(known, count)
        return self._follow("Tune, train, evaluate and deploy the first model", arn)

    def _replayed(self, good: dict[str, Picture], bad: dict[str, Picture]) -> None:
        with self.display.step("The pictures that waited are classified, the broken files rejected"):
            rows = self._rows([*good, *bad], SETTLED)
        self.result.before = self._answers("waiting pictures", good, rows)
        self.result.broken = [Answer(picture, key, rows.get(key)) for key, picture in bad.items()]
        for answer in self.result.broken:
            status = answer.row["status"] if answer.row else "no row"
            self.display.say(f"    {answer.picture.name}: {status}: {_escaped((answer.row or {}).get('reason', ''))}")
            if status != "REJECTED":
                self.result.problems.append(f"{answer.picture.name} should have been rejected, but is: {status}")

    def _second_run(self) -> bool:
        new = self.collection.new
        pictures = self.collection.labelled[new]
        since = datetime.now(UTC)
        stream = InboxStream(self.loop, self.collection.endless_stream())
        stream.start()
        try:
            with self.display.step(f"Label {len(pictures)} pictures of a new class: {new}"):
                known = self.loop.executions()
                self.loop.label(new, pictures)
                arn = self._started(known, sum(len(found) for found in self.collection.labelled.values()))
            promoted = self._follow("Retrain, and update the endpoint blue/green while pictures keep arriving", arn)
        finally:
            stream.stop()
        with self.display.step(f"Count what became of the {len(stream.sent)} pictures that arrived meanwhile"):
            rows = self._rows(stream.sent, SETTLED)
            self.result.requests = self.loop.endpoint_requests(since)
        self.result.stream = self._answers("pictures that arrived during the update", stream.sent, rows)
        self.result.during_update = len(stream.during_update)
        self.result.problems += [f"a picture could not be dropped: {error}" for error in stream.errors]
        failed = self.result.requests["Invocation4XXErrors"] + self.result.requests["Invocation5XXErrors"]
        if failed:
            requests = self.result.requests["Invocations"]
            self.result.problems.append(f"{failed} of {requests} requests to the endpoint failed")
        if promoted and not stream.during_update:
            self.result.problems.append("no picture arrived while the endpoint was being updated")
        return promoted

    def _measure_again(self) -> None:
        with self.display.step(f"Drop the {len(self.collection.held_out)} held-out pictures again, for the new model"):
            dropped = self.loop.drop("after", self.collection.held_out)
            rows = self._rows(dropped, SETTLED)
        self.result.after = self._answers("held-out pictures", dropped, rows)

    def _started(self, known: list[str], labelled: int) -> str:
        return self.loop.wait_for_run(known, labelled, START_SECONDS, lambda text: self.display.detail([text]))

    def _follow(self, title: str, arn: str) -> bool:
        with self.display.step(title) as step:
            watcher = RunWatcher(arn, self.loop.clients, self.display)
            described = watcher.wait(RUN_SECONDS)
            run = self.loop.outcome(described, watcher.states)
            step.failed = not run.promoted
        self.result.runs.append(run)
        if not run.promoted:
            self.result.problems.append(run.why_not())
        return run.promoted

    def _rows(self, keys: Iterable[str], statuses: set[str]) -> dict[str, Row]:
        return self.loop.wait_for_rows(keys, statuses, ROWS_SECONDS, lambda text: self.display.detail([text]))

    def _answers(self, what: str, pictures: dict[str, Picture], rows: dict[str, Row]) -> list[Answer]:
        """Pairs pictures and rows, and reports those that were not classified."""
        lost = [key for key in pictures if rows.get(key, {}).get("status") != "CLASSIFIED"]
        if lost:
            row = rows.get(lost[0])
            found = f"{row['status']}: {row.get('reason', 'no reason given')}" if row else "no row"
            self.result.problems.append(
                f"{len(lost)} of {len(pictures)} {what} were not classified; the first, {lost[0]}: {found}"
            )
        return [Answer(picture, key, rows.get(key)) for key, picture in pictures.items()]


# --- what the terminal shows at the end ---------------------------------------------------------------------------


def summarise(result: Result, display: Display) -> None:
    """Predictions, accuracy before and after, durations."""
    display.say()
    if result.before:
        display.console.print(_predictions(result))
        new = result.collection.new
        table = Table(title="Accuracy on held-out pictures, never labelled", title_justify="left", box=SIMPLE)
        for heading in ("", "before", "after"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name, keep in (
            ("all classes", lambda answer: True),
            ("first classes", lambda answer: answer.picture.truth != new),
            (f"new class: {new}", lambda answer: answer.picture.truth == new),
        ):
            table.add_row(name, *(_share_in_words(filter(keep, answers)) for answers in (result.before, result.after)))
        display.console.print(table)
    if result.stream:
        classified = [answer for answer in result.stream if answer.label]
        display.say(
            f"{len(result.stream)} pictures arrived during the second run, {result.during_update} of them while the "
            f"endpoint was being updated: {len(classified)} classified, {len(result.stream) - len(classified)} not."
        )
        requests = result.requests
        display.say(
            f"The endpoint answered {requests['Invocations']} requests in that time; "
            f"{requests['Invocation4XXErrors'] + requests['Invocation5XXErrors']} failed."
        )
    table = Table(title="How long it took", title_justify="left", show_header=False, box=SIMPLE)
    table.add_column()
    table.add_column(justify="right")
    for step in display.steps:
        table.add_row(step.title, duration(step.seconds or 0.0))
    table.add_row("in all", duration(result.seconds), style="bold")
    display.console.print(table)


def _predictions(result: Result) -> Table:
    table = Table(title="Predictions table (DynamoDB): held-out pictures", title_justify="left", box=SIMPLE)
    for heading, least in (("picture", 12), ("is", 8), ("before", 14), ("after", 14)):  # long class names are cut
        table.add_column(heading, no_wrap=True, overflow="ellipsis", min_width=least)
    after = {id(answer.picture): answer for answer in result.after}
    for answer in result.before:
        later = after.get(id(answer.picture))
        name = answer.key.removeprefix("inbox/before/picture ")
        table.add_row(name, answer.picture.truth, _said(answer), _said(later) if later else "")
    return table


def _said(answer: Answer) -> str:
    if not answer.row or not answer.label:
        return answer.row["status"] if answer.row else "no row"
    colour, mark = ("green", "✓") if answer.right else ("red", "✗")
    return f"[{colour}]{mark} {_escaped(answer.label)}[/{colour}] {float(answer.row['confidence']):.0%}"


def _share_in_words(answers: Iterable[Answer]) -> str:
    right, total = share(answers)
    return f"{right / total:.1%} ({right} of {total})" if total else "–"


def _listed(names: list[str]) -> str:
    if len(names) > 6:
        return f"{len(names)} classes"
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def how_to_use(loop: Loop, aws: Emulator) -> str:
    """The environment in which the README's commands work on what KEEP=1 left up, and a few of them."""
    exports = write_environment(aws, loop.outputs, aws.state / ENVIRONMENT)
    review = '{":r": {"S": "review"}}'
    return f"""
The stack stays up at {aws.endpoint_url} until 'make down'. In any shell, with the aws command line of {BIN}:

{exports}

(or: source {aws.state / ENVIRONMENT}), and then the README's commands, such as

  aws s3 cp dog.jpg s3://$DATA_BUCKET/inbox/
  aws dynamodb query --table-name $PREDICTIONS --index-name for-review \\
      --key-condition-expression 'review = :r' --expression-attribute-values '{review}'
  aws s3 cp my-dogs/ s3://$DATA_BUCKET/labelled/my-dogs/ --recursive
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit status: 0 if the whole loop completed, 1 if not, 130 if interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM):  # both clean up, also where a shell has SIGINT ignored in background
        signal.signal(number, signal.default_int_handler)
    try:
        return _main(parse(arguments))
    except DemoError as error:
        print(error, file=sys.stderr)
    except (EmulatorError, StackError, TimeoutError) as error:
        print(f"The demo stopped: {error}", file=sys.stderr)
    except EndpointConnectionError as error:
        print(f"The demo stopped, because AWS on this machine was ended: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nInterrupted: everything that the demo started has been stopped.", file=sys.stderr)
        return 130
    return 1


def _main(settings: Settings) -> int:
    check_port(settings.port)
    display = Display()
    began = time.monotonic()
    with display.step("Read the pictures" if settings.data else "Draw the pictures"):
        collection = collect(settings)
    display.say(f"  {collection.source}: {_listed(collection.first)}; {collection.new} comes later")
    weights = find_weights(settings.weights)
    display.say(f"  {weights.line}")

    demo = Demo(settings, collection, weights, display)
    if demo.result.caution:
        display.say(f"  {demo.result.caution}")
    aws: Emulator = KeptEmulator(settings.port) if settings.keep else Emulator(port=settings.port, state=settings.state)
    with display.step("Start AWS on this machine"):
        aws.start()
    try:
        result = demo.run(aws)
        results = settings.state / "demo"
        result.seconds = time.monotonic() - began
        summarise(result, display)
        written = page.write(results, result, display.steps)
        for run in result.runs:
            if run.report:
                display.say(f"Report of run {run.run_id}: {results / f'report-{run.run_id}.html'}")
        display.say(f"Page of this demo: {written}")
        if settings.keep:
            assert isinstance(aws, KeptEmulator)
            display.say(_escaped(how_to_use(demo.loop, aws)))
            aws.release()
    finally:
        aws.stop()
    for problem in result.problems:
        print(f"PROBLEM: {problem}", file=sys.stderr)
    return 1 if result.problems else 0
