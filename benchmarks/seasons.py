"""A long life of the system, by itself: from three classes to eight, with what goes wrong in between.

    python -m benchmarks.seasons
    python -m benchmarks.seasons --labelled 200 --seed 3 --output /tmp/seasons.html

Deploys the stack into the local AWS and lets it live, round by round. Pictures of dogs are drawn (the class is
the pattern of the coat), labelled, dropped into the inbox; every training is a real one, from random weights. Between
the new classes: labels of a sync that shifted the folders by one, their repair, a run that is killed in mid-training
and one that is killed in mid-deployment, a release of the serving image that answers half of its requests with 500,
labels moved and deleted, a camera that was moved into the dark (drift), and a return to an earlier model by hand.

Whether a decision was right is judged by pictures that the system never sees: 40 of each class, answered here by the
models' own files. A promotion was right when the challenger is not worse than the champion by more than GateMargin on
the classes that both know, or has no champion before it; a rejection when it is worse; a rollback when the release was
broken; a run that did not start when there was nothing to learn; drift when the pictures did change. The inbox gets
pictures all the while, and no picture may end without a true answer.

Prints round by round what was decided, draws it into a page, and ends with 1 if a decision was wrong, was another than
the story's, or a picture was lost. The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from botocore.exceptions import ClientError
from PIL import Image, ImageEnhance, ImageFilter
from rich.console import Console
from rich.table import Table

from local.demo.data import Picture
from local.demo.loop import SETTLED, InboxStream, Loop
from local.demo.pictures import jpeg, pictures
from local.demo.progress import Display, RunWatcher
from local.emulator import CHECKOUT, Emulator
from local.stack import Stack

# Those that are hardest to tell apart come first: a class that looks like an older one takes some of its pictures, and
# whether the gate's margin holds would then be chance.
FIRST = ("saddle", "solid", "spotted")
LATER = ("brindle", "belted", "merle", "tuxedo", "piebald")
LABELLED, HELD_OUT, INBOX = 120, 40, 120
MARGIN = 0.05
PARAMETERS = {
    "PretrainedWeights": "none",
    "Unfreeze": "all",
    "ImageSize": "64",
    "TuningJobs": "2",
    "EpochsMin": "10",
    "EpochsMax": "12",
    "LearningRateMin": "0.0007",
    "LearningRateMax": "0.002",
    "BatchSizes": "16",
    "QuietPeriodSeconds": "4",
    "MinNewPictures": "10",
    "GateMargin": str(MARGIN),
    "DriftMinPictures": "100",
    "EndpointInstanceCount": "2",
    "EndpointTargetInvocations": "100000",
}
RUN_SECONDS, START_SECONDS, SETTLE_SECONDS = 1200.0, 120.0, 240.0
BAD_RELEASE = """

_answer, _count = Server.__call__, 0


async def _half(self, scope, receive, send):
    global _count
    _count += scope["path"] == "/invocations"
    if scope["path"] != "/invocations" or _count % 2:
        return await _answer(self, scope, receive, send)
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 500, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


Server.__call__ = _half
"""


@dataclass
class Round:
    """What happened in one round, and what came of it. Accuracies are shares of held-out pictures."""

    number: int
    title: str
    expected: str
    decided: str = ""
    why: str = ""
    classes: int = 0
    champion: float | None = None  # before the round, on the classes that it and the challenger know
    challenger: float | None = None  # on the same
    served: float | None = None  # of the champion after the round, on all classes labelled so far
    right: bool = False
    problem: str = ""
    seconds: float = 0.0


class Judge:
    """Answers held-out pictures with the models' own files, in this process."""

    def __init__(self, loop: Loop, scratch: Path, held_out: dict[str, list[Picture]]) -> None:
        sys.path[:0] = [str(CHECKOUT / "inference"), str(CHECKOUT / "training")]
        self.loop, self.scratch, self.held_out = loop, scratch, held_out
        self._answers: dict[str, dict[str, list[str]]] = {}

    def answers(self, artifact: str) -> dict[str, list[str]]:
        """What the model of an artifact (s3://…/model.tar.gz) says to the held-out pictures of each class."""
        if artifact not in self._answers:
            from artifact import extract
            from predictor import Predictor
            from preprocessing import prepare

            bucket, key = artifact.removeprefix("s3://").split("/", 1)
            archive = self.scratch / "model.tar.gz"
            self.loop.clients["s3"].download_file(bucket, key, str(archive))
            folder = extract(archive, Path(tempfile.mkdtemp(dir=self.scratch)))
            predictor = Predictor(folder)
            size = predictor.preprocess.size
            said: dict[str, list[str]] = {}
            for name, held_out in self.held_out.items():
                crops = [prepare(picture.data, predictor.preprocess).pixels for picture in held_out]
                images = np.frombuffer(b"".join(crops), np.uint8).reshape(-1, size, size, 3)
                said[name] = [predictor.classes[best] for best in predictor.predict(images).argmax(1)]
            self._answers[artifact] = said
            shutil.rmtree(folder)
        return self._answers[artifact]

    def accuracy(self, artifact: str, classes: Iterable[str]) -> float:
        """Share of the held-out pictures of these classes that are classified right."""
        said = self.answers(artifact)
        right = [answer == name for name in classes for answer in said[name]]
        return sum(right) / len(right)


class Life:
    """The stack, and everything that is done to it."""

    def __init__(self, stack: Stack, loop: Loop, judge: Judge, display: Display, labelled: int, seed: int) -> None:
        self.stack, self.loop, self.judge, self.display = stack, loop, judge, display
        self.labelled, self.seed = labelled, seed
        self.truth: set[str] = set()  # classes that were labelled so far
        self.rounds: list[Round] = []
        self.dropped: dict[str, Picture] = {}
        self.failed_by_release = 0
        self._known: set[str] = set()  # executions there were before something that may start one
        self.drawn = 0

    # --- the hands ---

    def draw(self, name: str, count: int) -> list[Picture]:
        """New pictures of a class, which nobody has seen."""
        self.drawn += 1
        seed = self.seed * 1000 + self.drawn
        drawn = enumerate(pictures(name, count, seed, 128), 1)
        return [Picture(f"{name}-{self.drawn:03}-{number:03}.jpg", data, name) for number, data in drawn]

    def label(self, *names: str) -> None:
        """Pictures of classes, under their names."""
        for name in names:
            self.loop.label(name, self.draw(name, self.labelled))
            self.truth.add(name)

    def champion(self) -> dict[str, Any] | None:
        """The LoopState item."""
        return self.state("champion", "champion")

    def state(self, pk: str, sk: str) -> dict[str, Any] | None:
        """An item of LoopState."""
        return self.loop.loop_state.get_item(Key={"pk": pk, "sk": sk}, ConsistentRead=True).get("Item")

    def start(self, **given: Any) -> str:
        """A run by hand; returns its ARN."""
        machine = self.loop.outputs["RetrainStateMachineArn"]
        answer = self.loop.clients["stepfunctions"].start_execution(stateMachineArn=machine, input=json.dumps(given))
        return answer["executionArn"]

    def wait(self, what: str, condition: Callable[[], Any], seconds: float) -> Any:
        """What the condition returns once it is true. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:.0f} s: {what}")
            time.sleep(0.3)
        return found

    def settled(self) -> bool:
        """Nobody holds the lock, and the endpoint is in service with the champion's configuration."""
        champion = self.champion()
        if self.state("lock", "lock") or not champion:
            return False
        live = self.loop.clients["sagemaker"].describe_endpoint(EndpointName=self.loop.outputs["EndpointName"])
        return bool((live["EndpointStatus"], live["EndpointConfigName"]) == ("InService", champion["endpoint_config"]))

    # --- the rounds ---

    def live(self, title: str, expected: str, act: Callable[[Round], str | None]) -> Round:
        """One round: `act` does what happens in it, and returns the ARN of the execution that came of it, if any."""
        before = self.champion()
        now = Round(len(self.rounds) + 1, title, expected)
        self.rounds.append(now)
        began = time.monotonic()
        with self.display.step(f"Round {now.number}: {title}") as step:
            arn = act(now)
            if arn:
                self._follow(now, arn, before)
            self.wait("the loop is at rest", self.settled, SETTLE_SECONDS)
            after = self.champion()
            assert after is not None
            now.classes = len(self.truth)
            now.served = self.judge.accuracy(after["artifact"], sorted(self.truth))
            self._judge(now, before, after)
            step.failed = not now.right
        now.seconds = time.monotonic() - began
        self.display.say(f"    {now.decided}: {now.why}" + (f"  [red]{now.problem}[/red]" if now.problem else ""))
        return now

    def _follow(self, now: Round, arn: str, before: dict[str, Any] | None) -> None:
        described = RunWatcher(arn, self.loop.clients, self.display).wait(RUN_SECONDS)
        run_id = f"{described['startDate'].astimezone(UTC):%y%m%d%H%M%S}"
        item = self.wait("the run is recorded", lambda: self.state("run", run_id), 60)
        now.decided, now.why = now.decided or item["outcome"], now.why or item["message"]
        packages = self.loop.clients["sagemaker"].list_model_packages(
            ModelPackageGroupName=self.loop.outputs["EndpointName"], MaxResults=100
        )["ModelPackageSummaryList"]
        for package in packages:
            described = self.loop.clients["sagemaker"].describe_model_package(
                ModelPackageName=package["ModelPackageArn"]
            )
            if described["CustomerMetadataProperties"].get("run") != run_id:
                continue
            artifact = described["InferenceSpecification"]["Containers"][0]["ModelDataUrl"]
            shared = sorted(set(json.loads(before["classes"])) & self.truth) if before else sorted(self.truth)
            now.challenger = self.judge.accuracy(artifact, shared)
            now.champion = self.judge.accuracy(before["artifact"], shared) if before else None

    def _judge(self, now: Round, before: dict[str, Any] | None, after: dict[str, Any]) -> None:
        """Whether what was decided was right."""
        unchanged = before is not None and after["model_version"] == before["model_version"]
        change = now.challenger - now.champion if now.challenger is not None and now.champion is not None else None
        if now.decided != now.expected:
            now.problem = f"decided {now.decided}, expected {now.expected}"
        elif now.decided == "PROMOTED" and now.title != BACK and change is not None and change < -MARGIN:
            now.problem = f"promoted, but {-change:.1%} worse than the champion"
        elif now.decided == "REJECTED" and (change is None or change >= -MARGIN):
            now.problem = "rejected, but not worse than the champion"
        elif now.decided != "PROMOTED" and not unchanged:
            now.problem = "the champion changed"
        now.right = not now.problem

    def run_of_labels(self, now: Round) -> str:
        """The run that the labels start."""

        def started() -> str | None:
            return next((arn for arn in self.loop.executions() if arn not in self._known), None)

        return str(self.wait("a run starts", started, START_SECONDS))

    def learn(self, *names: str) -> Callable[[Round], str]:
        """Labels classes, and waits for the run."""

        def act(now: Round) -> str:
            self._known = set(self.loop.executions())
            self.label(*names)
            return self.run_of_labels(now)

        return act

    def shift_labels(self, now: Round) -> str:
        """A sync that shifted the folders: pictures of each class under the name of the next."""
        self._known = set(self.loop.executions())
        names = sorted(self.truth)
        for name, wrong in zip(names, names[1:] + names[:1], strict=True):
            for picture in self.draw(name, self.labelled):
                self.loop.put(f"labelled/{wrong}/sync-{picture.name}", picture)
        return self.run_of_labels(now)

    def repair_labels(self, now: Round) -> None:
        """The wrong labels are deleted: what is left was learnt before."""
        self._known = set(self.loop.executions())
        pages = (
            self.loop.clients["s3"]
            .get_paginator("list_objects_v2")
            .paginate(Bucket=self.loop.bucket, Prefix="labelled/")
        )
        wrong = [entry["Key"] for page in pages for entry in page["Contents"] if "/sync-" in entry["Key"]]
        for key in wrong:
            self.loop.clients["s3"].delete_object(Bucket=self.loop.bucket, Key=key)
        self.idle(now)

    def idle(self, now: Round) -> None:
        """Nothing starts, and the system says why."""

        def decided() -> dict[str, Any] | None:
            """The decision about the labels as they are now, once they are quiet."""
            ledger = self.loop.labels.get_item(Key={"pk": "ledger"}, ConsistentRead=True)["Item"]
            item = self.state("decision", "last")
            now = item and item["revision"] == ledger["revision"] and item["decision"] != "WAITS"
            return item if now else None

        decision = self.wait("start_retraining has decided", decided, START_SECONDS)
        started = [arn for arn in self.loop.executions() if arn not in self._known]
        now.decided, now.why = ("STARTED" if started else "NO RUN"), decision["why"]

    def move_labels(self, now: Round) -> str:
        """People put right what they find: some labels move to another class and back, some are deleted."""
        self._known = set(self.loop.executions())
        s3, bucket = self.loop.clients["s3"], self.loop.bucket
        for name in sorted(self.truth):
            found = s3.list_objects_v2(Bucket=bucket, Prefix=f"labelled/{name}/", MaxKeys=6)["Contents"]
            gone, *moved = [entry["Key"] for entry in found]
            s3.delete_object(Bucket=bucket, Key=gone)
            for key in moved:
                source = {"Bucket": bucket, "Key": key}
                other = f"labelled/{next(other for other in sorted(self.truth) if other != name)}/{key.split('/')[-1]}"
                s3.copy_object(Bucket=bucket, Key=other, CopySource=source)
                s3.delete_object(Bucket=bucket, Key=key)
                s3.copy_object(Bucket=bucket, Key=key, CopySource=source | {"Key": other})
                s3.delete_object(Bucket=bucket, Key=other)
            self.loop.label(name, self.draw(name, 10))
        return self.run_of_labels(now)

    def kill(self, when: Callable[[], Any], start: Callable[[Round], str]) -> Callable[[Round], None]:
        """A run that is stopped in the middle."""

        def act(now: Round) -> None:
            arn = start(now)
            self.wait("the moment has come", when, RUN_SECONDS)
            self.loop.clients["stepfunctions"].stop_execution(executionArn=arn, cause="killed by the benchmark")
            self.wait("the loop is at rest", self.settled, SETTLE_SECONDS)
            run_id = self._run_id(arn)
            item = self.wait("the run is recorded", lambda: self.state("run", run_id), 60)
            now.decided, now.why = item["outcome"], item["message"]
            jobs = self.loop.clients["sagemaker"].list_training_jobs(StatusEquals="InProgress")["TrainingJobSummaries"]
            if jobs:
                now.problem = f"{len(jobs)} jobs of it still run"

        return act

    def _run_id(self, arn: str) -> str:
        described = self.loop.clients["stepfunctions"].describe_execution(executionArn=arn)
        return f"{described['startDate'].astimezone(UTC):%y%m%d%H%M%S}"

    def training(self) -> bool:
        """A training job runs."""
        return bool(
            self.loop.clients["sagemaker"].list_training_jobs(StatusEquals="InProgress")["TrainingJobSummaries"]
        )

    def updating(self) -> bool:
        """The endpoint is being updated."""
        return self.loop.endpoint_status() == "Updating"

    def release(self, image: str) -> None:
        """Deploys the stack with another serving image."""
        self.loop.outputs = self.stack.deploy(PARAMETERS | {"ServingImageUri": f"local/{image}:latest"})

    def broken_release(self, now: Round) -> str:
        """A serving image that fails half of its requests, and the next run that deploys it."""
        self.release("faulty")
        return self.learn(LATER[3])(now)

    def drift(self, name: str, change: Callable[[Picture], Picture], classes: Iterable[str]) -> Callable[[Round], None]:
        """Pictures arrive; then the watch for drift looks at them."""

        def act(now: Round) -> None:
            classes_ = sorted(classes)
            each = INBOX // len(classes_) + 1
            coming = [change(picture) for one in classes_ for picture in self.draw(one, each)]
            keys = self.drop(f"{name}-{now.number}", coming)
            self.loop.wait_for_rows(keys, SETTLED, SETTLE_SECONDS, lambda text: self.display.detail([text]))
            functions = self.loop.clients["lambda"].list_functions()["Functions"]
            watch = next(one["FunctionName"] for one in functions if "WatchDrift" in one["FunctionName"])
            answer = self.loop.clients["lambda"].invoke(FunctionName=watch, Payload=b"{}")
            said = json.loads(answer["Payload"].read())
            if "FunctionError" in answer:
                raise RuntimeError(f"{watch}: {said}")
            item = self.state("drift", "last") or {}
            now.decided, now.why = ("DRIFT" if item.get("drifted") else "NO DRIFT"), item.get("sentence", "")

        return act

    def drop(self, folder: str, some: list[Picture]) -> dict[str, Picture]:
        """Into the inbox."""
        dropped = self.loop.drop(folder, some)
        self.dropped |= dropped
        return dropped

    def back(self, now: Round) -> str:
        """Back to the model before this one."""
        champion = self.champion()
        assert champion is not None
        number = int(champion["deployment"])
        while number := number - 1:
            item = self.state("deployment", f"{number:06}")
            if item and item["outcome"] == "PROMOTED" and item["model_version"] != champion["model_version"]:
                return self.start(deploy=number, why="the benchmark goes back")
        raise RuntimeError("there is no earlier model")


BACK = "back to the model before, by hand"


def dark(picture: Picture) -> Picture:
    """As a camera sees it at night: dark, blurred, little colour."""
    image = Image.open(BytesIO(picture.data)).convert("RGB").filter(ImageFilter.GaussianBlur(2.2))
    image = ImageEnhance.Brightness(ImageEnhance.Color(image).enhance(0.2)).enhance(0.25)
    return Picture(picture.name, jpeg(image), picture.truth)


def same(picture: Picture) -> Picture:
    """Unchanged."""
    return picture


def tell(life: Life) -> None:
    """The story."""
    live = life.live
    live("three classes are labelled, and there is no model yet", "PROMOTED", life.learn(*FIRST))
    live(f"a new class: {LATER[0]}", "PROMOTED", life.learn(LATER[0]))
    live("pictures as ever: no drift", "NO DRIFT", life.drift("calm", same, [*FIRST, LATER[0]]))
    live("a sync shifts the folders by one: wrong labels", "REJECTED", life.shift_labels)
    live("the wrong labels are deleted: nothing new to learn", "NO RUN", life.repair_labels)
    live(
        f"a new class: {LATER[1]}; the run is killed in mid-training", "ABORTED",
        life.kill(life.training, life.learn(LATER[1])),
    )  # fmt: skip
    live("the same run, started by hand", "PROMOTED", lambda now: life.start())
    live(
        f"a new class: {LATER[2]}; the run is killed while it deploys", "ABORTED",
        life.kill(life.updating, life.learn(LATER[2])),
    )  # fmt: skip
    live("the same run, started by hand", "PROMOTED", lambda now: life.start())
    began = datetime.now(UTC)
    live(f"a new class: {LATER[3]}; the serving image's new release is broken", "ROLLED_BACK", life.broken_release)
    life.failed_by_release = failed_requests(life, began)
    life.release("inference")
    live("a good release; labels are moved, deleted and added", "PROMOTED", life.move_labels)
    live("the camera is moved into the dark", "DRIFT", life.drift("dark", dark, FIRST[:2]))
    live(f"a new class: {LATER[4]}", "PROMOTED", life.learn(LATER[4]))
    live(BACK, "PROMOTED", life.back)


def failed_requests(life: Life, since: datetime) -> int:
    """Requests to the endpoint since then that were answered with an error."""
    requests = life.loop.endpoint_requests(since)
    return requests["Invocation4XXErrors"] + requests["Invocation5XXErrors"]


def table(rounds: list[Round]) -> Table:
    """The rounds, a row each."""
    found = Table(title="Accuracy on held-out pictures; champion and challenger on the classes that both know")
    for heading in ("", "what happened", "decided", "champion", "challenger", "live then", "right", "why"):
        found.add_column(heading, justify="left" if heading in ("what happened", "decided", "why") else "right")
    share = lambda value: "" if value is None else f"{value:.1%}"  # noqa: E731
    for one in rounds:
        accuracies = map(share, (one.champion, one.challenger, one.served))
        mark = "[green]✓[/green]" if one.right else f"[red]✗ {one.problem}[/red]"
        found.add_row(str(one.number), one.title, one.decided, *accuracies, mark, one.why[:160])
    return found


def plot(rounds: list[Round], path: Path) -> None:
    """What was live, and what was not let live, as a page."""
    import plotly.graph_objects as go

    colours = {"PROMOTED": "#2a9d5c", "REJECTED": "#c8553d", "ROLLED_BACK": "#e0a030", "ABORTED": "#8a8a8a"}
    at = [one.number for one in rounds]
    said = [f"{one.number}. {one.title}<br>{one.decided}: {one.why[:120]}" for one in rounds]
    figure = go.Figure()
    figure.add_scatter(
        x=at, y=[one.served for one in rounds], mode="lines+markers", name="live: all classes labelled so far",
        line={"shape": "hv", "color": "#33658a", "width": 3}, hovertext=said,
    )  # fmt: skip
    figure.add_scatter(
        x=at, y=[one.champion for one in rounds], mode="markers", name="champion, on the classes both know",
        marker={"symbol": "line-ew-open", "size": 18, "line": {"width": 3}, "color": "#33658a"}, hovertext=said,
    )  # fmt: skip
    for decision, colour in colours.items():
        these = [one for one in rounds if one.decided == decision and one.challenger is not None]
        figure.add_scatter(
            x=[one.number for one in these], y=[one.challenger for one in these], mode="markers",
            name=f"challenger: {decision.lower().replace('_', ' ')}", marker={"size": 13, "color": colour},
            hovertext=[said[one.number - 1] for one in these],
        )  # fmt: skip
    labels = [f"{one.number}. {one.title}<br><b>{one.decided}</b>" for one in rounds]
    figure.update_layout(
        title="A life of the loop: accuracy on pictures that it never sees", template="plotly_white", height=820,
        xaxis={"tickvals": at, "ticktext": labels, "tickangle": 55}, yaxis={"tickformat": ".0%", "range": [0, 1.03]},
        margin={"b": 330, "t": 130}, legend={"orientation": "h", "y": 1.05, "yanchor": "bottom"},
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs=True)


def images(folder: Path) -> Path:
    """A place for images: the serving image, and a release of it that answers half of its requests with 500."""
    folder.mkdir()
    (folder / "inference").symlink_to(CHECKOUT / "inference")
    shutil.copytree(CHECKOUT / "inference", folder / "faulty", ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "faulty" / "server.py").open("a") as module:
        module.write(BAD_RELEASE)
    return folder


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.seasons", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labelled", type=int, default=LABELLED, help=f"pictures of each class ({LABELLED})")
    parser.add_argument("--seed", type=int, default=1, help="of the pictures (1)")
    parser.add_argument("--output", type=Path, default=CHECKOUT / ".houndloop" / "seasons.html", help="the plot")
    options = parser.parse_args()
    if options.labelled < 40:
        parser.error("--labelled must be at least 40: with fewer, chance decides")
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    display = Display(Console(stderr=not sys.stdout.isatty(), highlight=False, soft_wrap=True))
    draw = lambda name, part, count: [  # noqa: E731
        Picture(f"{name}.jpg", data, name) for data in pictures(name, count, 100_000 * options.seed + part, 128)
    ]
    with tempfile.TemporaryDirectory() as folder:
        environment = {"HOUNDLOOP_IMAGES": str(images(Path(folder, "images")))}
        with Emulator(state=Path(folder, "aws"), environment=environment) as aws:
            with display.step("Deploy the stack"):
                stack = Stack(aws)
                loop = Loop(stack.deploy(PARAMETERS), aws.endpoint_url, aws.environment())
            judge = Judge(loop, Path(folder), {name: draw(name, 1, HELD_OUT) for name in (*FIRST, *LATER)})
            life = Life(stack, loop, judge, display, options.labelled, options.seed)
            coming = [draw(name, 2, 30) for name in (*FIRST, LATER[0])]
            began = datetime.now(UTC)
            stream = InboxStream(
                loop, itertools.cycle(picture for turn in zip(*coming, strict=True) for picture in turn)
            )
            stream.start()
            try:
                tell(life)
            except (TimeoutError, RuntimeError, ClientError) as error:
                life.rounds[-1].problem = f"{type(error).__name__}: {error}"
            finally:
                stream.stop()
            with display.step("Compare every picture that was dropped with its row"):
                everything = life.dropped | stream.sent
                rows = loop.wait_for_rows(everything, SETTLED, SETTLE_SECONDS, lambda text: None)
            statuses = Counter(row["status"] for row in rows.values())
            failed = failed_requests(life, began)
    wrong = [one for one in life.rounds if not one.right]
    plot(life.rounds, options.output)
    console.print(table(life.rounds))
    lost = len(everything) - statuses["CLASSIFIED"]
    console.print(
        f"{len(everything)} pictures were dropped: {statuses['CLASSIFIED']} classified, {lost} not. Of the requests to "
        f"the endpoint {failed} failed, {life.failed_by_release} of them answered by the broken release before its "
        f"rollback. Drawn in {options.output}."
    )
    print(
        json.dumps(
            {
                "rounds": [{name: getattr(one, name) for name in Round.__dataclass_fields__} for one in life.rounds],
                "right": len(life.rounds) - len(wrong),
                "wrong": len(wrong),
                "pictures": len(everything),
                "lost": lost,
                "failed_requests": failed - life.failed_by_release,
                "failed_by_broken_release": life.failed_by_release,
            }
        )
    )
    return 1 if wrong or lost or failed > life.failed_by_release or stream.errors else 0


if __name__ == "__main__":
    sys.exit(main())
