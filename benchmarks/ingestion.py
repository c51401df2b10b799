"""How fast the inbox is worked off, what that costs, and whether the endpoint ever waits for it.

    python -m benchmarks.ingestion
    python -m benchmarks.ingestion --small 300 --large 30

Drops pictures of 500x375 (76 kB) and of 4000x3000 (3.5 MB) into the deployed stack as fast as the machine takes them,
in one random order: first with a handler that only returns, then, in a fresh account, with the real one and an endpoint
of `inference/` that serves a ResNet-18 of random weights. An image's own cost is the processor time of all processes,
less the endpoint's, less that of the empty handler's flow. It stands beside decoding and cropping alone, on as many
processes at once as the machine has cores and, as in the flow, with an endpoint at work. It holds what the emulator
spends on the handler's calls of S3, DynamoDB and SageMaker, so the functions' processes, which are what runs on AWS
too, are shown alone as well. Then pictures are dropped one at a time: how long until the row?

Ends with 1 if the own cost is above 1.5 times decoding and cropping, if the endpoint had nothing to do for 10 % or more
of the time in which messages waited, if the median from put to row is a second or more, if a function's memory passed
its configured size, or if a picture was not classified. The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import random
import statistics
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.inbox import IMAGES, Inbox
from benchmarks.usage import EMULATOR, ENDPOINT, Meter, Usage, overlap, union
from local.emulator import CHECKOUT, Emulator

SMALL, LARGE = 2000, 200
SIZES = {"small": (500, 375, 76_000), "large": (4000, 3000, 3_500_000)}  # pixels, and bytes of the JPEG
DISTINCT = {"small": 24, "large": 6}
IDLE = 20  # pictures that are dropped one at a time
PUTTERS = 8  # threads that drop pictures
ASKERS = 4  # callers of the endpoint at once while decoding is measured: as many as classify in the flow
CROPS, BATCH_BYTES = "application/x-rgb-crops", 10 * 224 * 224 * 3  # a batch of ten messages
WARM_UP = 400  # pictures before the clock starts, so that all workers run
MAX_RATIO, MAX_IDLE_SHARE, MAX_LATENCY = 1.5, 0.10, 1.0
QUIET_SECONDS = 240.0  # without a message less, after which the flow is given up
EMPTY = 'def handler(event, context):\n    return {"batchItemFailures": []}\n'
CLASSES = [f"class-{number:03}" for number in range(120)]


def scene(width: int, height: int, seed: int) -> Image.Image:
    """What a JPEG finds as hard as a photograph: detail at every scale, mostly of brightness."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128, np.float32)
    for octave in range(1, int(math.log2(width)) + 1):
        cells = (max(2, height * 2**octave // width), 2**octave)
        layers = [
            np.asarray(Image.fromarray(noise.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
            for noise in rng.normal(0, 60 / octave**0.6, (2, *cells))
        ]
        pixels += layers[0][..., None] + layers[1][..., None] * np.array([0.5, 0.0, -0.5], np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encode(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def photographs(width: int, height: int, target: int, count: int, seed: int) -> Iterator[bytes]:
    """JPEGs of one size in pixels, and of about `target` bytes: at the quality that the first needs for them."""
    first = scene(width, height, seed)
    low, high = 5, 96
    while low < high:
        quality = (low + high) // 2
        low, high = (low, quality) if len(encode(first, quality)) >= target else (quality + 1, high)
    chance = random.Random(seed)
    for _ in range(count):  # moved: every block of the JPEG is another, and it costs a fraction of a new one
        moved = ImageChops.offset(first, chance.randrange(width), chance.randrange(height))
        yield encode(moved, low)


def resnet(folder: Path) -> Path:
    """An artifact as a training job leaves it, by the project's own exporter; its weights are random."""
    sys.path[:0] = [str(CHECKOUT / "training"), str(CHECKOUT / "inference")]
    from export import export
    from model import build
    from preprocessing import Preprocess

    folder.mkdir()
    spec = Preprocess.default()
    crops = np.random.default_rng(0).integers(0, 256, (4, spec.size, spec.size, 3), np.uint8)
    export(build(len(CLASSES)), spec, crops, folder)
    card = {"model_version": "260101000000", "dataset_hash": "0" * 64, "hyperparameters": {}, "metrics": {}}
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    (folder / "preprocess.json").write_text(spec.to_json())
    (folder / "model_card.json").write_text(json.dumps(card | {"findings": {}, "versions": {}}))
    return folder


def decoding(pictures: dict[str, list[bytes]]) -> dict[str, float]:
    """Processor seconds of one picture's decoding and cropping, by size: in this process, and nothing else."""
    sys.path.insert(0, str(CHECKOUT / "inference"))
    from preprocessing import Preprocess, prepare

    spec, seconds = Preprocess.default(), {}
    for size, some in pictures.items():
        times = []
        for _ in range(3 if size == "large" else 5):
            began = time.process_time()
            for data in some:
                prepare(data, spec)
            times.append((time.process_time() - began) / len(some))
        seconds[size] = statistics.median(times)
    return seconds


def decoding_on_all_cores(pictures: dict[str, list[bytes]]) -> dict[str, float]:
    """The same on every core at once: cores that share their units are slower together."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ProcessPoolExecutor(cores) as pool:
        found = list(pool.map(decoding, [pictures] * cores))
    return {size: statistics.mean(one[size] for one in found) for size in pictures}


@contextlib.contextmanager
def asked(inbox: Inbox) -> Iterator[None]:
    """The endpoint is asked about batches of crops, again and again."""
    crops = np.random.default_rng(0).integers(0, 256, BATCH_BYTES, np.uint8).tobytes()
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            inbox.runtime.invoke_endpoint(EndpointName=inbox.endpoint, ContentType=CROPS, Body=crops)

    with ThreadPoolExecutor(ASKERS) as pool:
        asking = [pool.submit(ask) for _ in range(ASKERS)]
        try:
            yield
        finally:
            over.set()
    for one in asking:
        one.result()


@dataclass
class Flow:
    """What a drop of all pictures came to. Moments are of time.monotonic, `first_put` and `last_row` of the clock."""

    usage: Usage
    first_put: float
    put_seconds: float
    drained_seconds: float
    backlog: list[tuple[float, float]] = field(default_factory=list)
    deepest: int = 0
    last_row: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    idle_share: float = 0.0
    latencies: list[float] = field(default_factory=list)
    configured: dict[str, float] = field(default_factory=dict)  # MB of the functions that ran
    alone: dict[str, float] = field(default_factory=dict)  # seconds that decoding and cropping cost, by size


class Backlog:
    """Looks at the queue while it is entered: when messages waited, and how many."""

    def __init__(self, inbox: Inbox) -> None:
        self.inbox = inbox
        self.intervals: list[tuple[float, float]] = []
        self.deepest = 0
        self.left = 0  # messages that are not done with
        self._over = threading.Event()

    def __enter__(self) -> Backlog:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        waited, before = False, time.monotonic()
        while not self._over.wait(0.2):
            visible, in_flight, delayed = self.inbox.depth()
            now = time.monotonic()
            if visible and waited:  # at both ends of the stretch
                self.intervals.append((before, now))
            waited, before = bool(visible), now
            self.left = visible + in_flight + delayed
            self.deepest = max(self.deepest, self.left)


class Benchmark:
    """The flows, each in an account of its own."""

    def __init__(
        self,
        folder: Path,
        pictures: dict[str, list[bytes]],
        order: list[tuple[str, bytes]],
        progress: Progress,
        parameters: dict[str, str],
    ) -> None:
        self.folder, self.pictures, self.order = folder, pictures, order
        self.progress, self.parameters = progress, parameters

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """Shows what is being done while it lasts."""
        task = self.progress.add_task(name, total=None)
        result = work()
        self.progress.update(task, total=1, completed=1)
        return result

    @contextlib.contextmanager
    def deployed(self, name: str) -> Iterator[Inbox]:
        """The stack in an account of its own."""
        with Emulator(state=self.folder / "state", environment=IMAGES) as aws:
            yield self.step(name, lambda: Inbox(aws, self.parameters))

    def empty(self) -> Flow:
        """The flow with a handler that only returns."""
        with self.deployed("the stack, with an empty handler") as inbox:
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr("classify_images/app.py", EMPTY)
            name = inbox.physical("ClassifyImages")
            inbox.functions.update_function_code(FunctionName=name, ZipFile=buffer.getvalue())
            return self.drop(inbox, "empty handler")

    def real(self, idle: int) -> Flow:
        """The flow as it is, and then single pictures."""
        observed = self.folder / "observed"
        observed.mkdir()
        model = self.step("a ResNet-18, exported", lambda: resnet(self.folder / "model"))
        with self.deployed("the stack") as inbox:
            self.step("an endpoint", lambda: inbox.serve(model, deployment=1, OBSERVED=str(observed)))
            flow = self.drop(inbox, "classify_images")
            requests = [
                (float(began), float(ended))
                for file in observed.iterdir()
                for began, ended in (line.split() for line in file.read_text().splitlines())
            ]
            waiting = sum(ended - began for began, ended in flow.backlog)
            flow.idle_share = 1 - overlap(union(flow.backlog), union(requests)) / waiting if waiting else math.nan
            rows = [row for row in inbox.rows() if row["version"] == "current" and "/drop/" in row["key"]]
            flow.statuses = Counter(row["status"] for row in rows)
            flow.last_row = max(datetime.fromisoformat(row["updated_at"]).timestamp() for row in rows)
            flow.latencies = self.latencies(inbox, idle)
            with asked(inbox):
                flow.alone = self.step("decoding and cropping alone", lambda: decoding_on_all_cores(self.pictures))
            for name in flow.usage.peak.keys() - {EMULATOR, ENDPOINT}:
                found = inbox.functions.get_function_configuration(FunctionName=name)
                flow.configured[name] = found["MemorySize"] * 2**20 / 1e6
            return flow

    def drop(self, inbox: Inbox, name: str) -> Flow:
        """Puts every picture, and waits until no message is left."""
        for number in range(WARM_UP):
            inbox.put(f"warm-up/{number}.jpg", self.order[0][1])
        self.drained(inbox)
        task = self.progress.add_task(f"{name}: put", total=len(self.order))

        def put(one: tuple[str, bytes]) -> None:
            inbox.put(f"drop/{one[0]}", one[1])
            self.progress.advance(task)

        with Meter(inbox.aws.pid) as meter, Backlog(inbox) as backlog:
            first, began = time.time(), time.monotonic()
            with ThreadPoolExecutor(PUTTERS) as pool:
                list(pool.map(put, self.order))
            put_seconds = time.monotonic() - began
            task = self.progress.add_task(f"{name}: drain", total=len(self.order))
            self.drained(inbox, lambda left: self.progress.update(task, completed=len(self.order) - left))
            drained = time.monotonic() - began
        return Flow(meter.usage, first, put_seconds, drained, backlog.intervals, backlog.deepest)

    def drained(self, inbox: Inbox, tell: Callable[[int], None] = lambda left: None) -> None:
        """Waits until no message is left. RuntimeError when none goes any more."""
        least, seen, empty = math.inf, time.monotonic(), 0
        while empty < 3:  # an event may be on its way from the bucket to the queue
            left = sum(inbox.depth())
            tell(left)
            empty = empty + 1 if left == 0 else 0
            if left < least:
                least, seen = left, time.monotonic()
            if time.monotonic() - seen > QUIET_SECONDS:
                raise RuntimeError(f"{left} messages are left and none goes: see {inbox.aws.log}")
            time.sleep(0.2)

    def latencies(self, inbox: Inbox, count: int) -> list[float]:
        """Seconds from a put to its row, one picture at a time."""
        taken = []
        task = self.progress.add_task("one at a time", total=count)
        small = [data for name, data in self.order if name.startswith("small")] or [self.order[0][1]]
        for number in range(count):
            time.sleep(0.5 + random.random())
            began = time.monotonic()
            inbox.put(f"idle/{number}.jpg", small[number % len(small)])
            while not inbox.row(f"idle/{number}.jpg"):
                if time.monotonic() - began > QUIET_SECONDS:
                    raise RuntimeError(f"a picture had no row after {QUIET_SECONDS:.0f} s: see {inbox.aws.log}")
                time.sleep(0.01)
            taken.append(time.monotonic() - began)
            self.progress.advance(task)
        return taken


def percentile(values: list[float], share: float) -> float:
    """The smallest of the values that is not below this share of them."""
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)] if values else math.nan


def cost(flow: Flow, images: int) -> dict[str, float]:
    """Processor seconds per image, by role, without the endpoint's."""
    return {role: seconds / images for role, seconds in flow.usage.seconds.items() if role != ENDPOINT}


def summary(empty: Flow, real: Flow, order: list[tuple[str, bytes]]) -> dict[str, Any]:
    """The figures."""
    images, alone = len(order), real.alone
    mixed = statistics.mean(alone[name.partition("-")[0]] for name, _ in order)
    own = sum(cost(real, images).values()) - sum(cost(empty, images).values())
    functions = own - cost(real, images)[EMULATOR] + cost(empty, images)[EMULATOR]
    seconds = real.last_row - real.first_put
    return {
        "benchmark": "ingestion",
        "images": images,
        "megabytes": round(sum(len(data) for _, data in order) / 1e6),
        "images_per_second": round(images / seconds, 1),
        "seconds": round(seconds, 1),
        "put_seconds": round(real.put_seconds, 1),
        "empty_images_per_second": round(images / empty.drained_seconds, 1),
        "deepest_backlog": real.deepest,
        "own_ms": round(1e3 * own, 2),
        "decoding_ms": round(1e3 * mixed, 2),
        "decoding_ms_by_size": {size: round(1e3 * seconds, 2) for size, seconds in alone.items()},
        "ratio": round(own / mixed, 2),
        "ratio_of_functions": round(functions / mixed, 2),
        "empty_ms_by_process": {role: round(1e3 * value, 2) for role, value in cost(empty, images).items()},
        "real_ms_by_process": {role: round(1e3 * value, 2) for role, value in cost(real, images).items()},
        "endpoint_ms": round(1e3 * real.usage.seconds.get(ENDPOINT, 0.0) / images, 2),
        "endpoint_idle_share": round(real.idle_share, 3),
        "backlog_seconds": round(sum(ended - began for began, ended in real.backlog), 1),
        "latency_p50_seconds": round(percentile(real.latencies, 0.5), 3),
        "latency_p95_seconds": round(percentile(real.latencies, 0.95), 3),
        "memory_mb": {role: round(peak / 1e6) for role, peak in real.usage.peak.items()},
        "configured_mb": real.configured,
        "statuses": dict(real.statuses),
        "cores": os.cpu_count(),
    }


def problems(figures: dict[str, Any]) -> list[str]:
    """What was promised and not kept."""
    broken = []
    if figures["statuses"] != {"CLASSIFIED": figures["images"]}:
        broken.append(f"of {figures['images']} pictures, the rows are {figures['statuses']}")
    if not figures["ratio"] <= MAX_RATIO:
        times = figures["ratio"]
        broken.append(f"the own cost is {times} times decoding and cropping; the limit is {MAX_RATIO}")
    if not figures["endpoint_idle_share"] < MAX_IDLE_SHARE:
        idle = figures["endpoint_idle_share"]
        broken.append(f"the endpoint was idle for {idle:.1%} of the backlog; the limit is {MAX_IDLE_SHARE:.0%}")
    if not figures["latency_p50_seconds"] < MAX_LATENCY:
        broken.append(f"a row takes {figures['latency_p50_seconds']} s; the limit is {MAX_LATENCY} s")
    for name, size in figures["configured_mb"].items():
        if figures["memory_mb"].get(name, 0) >= size:
            broken.append(f"{name} had {figures['memory_mb'][name]} MB; {size:.0f} MB are configured")
    return broken


def show(figures: dict[str, Any], console: Console) -> None:
    """The figures for people."""
    before, after = figures["empty_ms_by_process"], figures["real_ms_by_process"]
    table = Table("core-ms per image", "empty handler", "classify_images", "own", title=f"{figures['images']:,} images")
    for role in sorted(before.keys() | after.keys()):
        one, other = before.get(role, 0.0), after.get(role, 0.0)
        table.add_row(role, f"{one:.2f}", f"{other:.2f}", f"{other - one:.2f}")
    table.add_section()
    table.add_row("all", f"{sum(before.values()):.2f}", f"{sum(after.values()):.2f}", f"{figures['own_ms']:.2f}")
    table.add_row("decoding and cropping alone", "", "", f"{figures['decoding_ms']:.2f}")
    table.add_row("times as much", "", "", f"{figures['ratio']:.2f}")
    table.add_row("times as much, functions alone", "", "", f"{figures['ratio_of_functions']:.2f}")
    table.add_row("(the endpoint)", "", f"{figures['endpoint_ms']:.2f}", "")
    console.print(table)
    rows = {
        "images per second, first put to last row": f"{figures['images_per_second']} ({figures['seconds']} s)",
        "with the empty handler": f"{figures['empty_images_per_second']}",
        "puts took": f"{figures['put_seconds']} s for {figures['megabytes']:,} MB",
        "deepest backlog": f"{figures['deepest_backlog']:,} messages, waiting for {figures['backlog_seconds']} s",
        "endpoint with nothing to do, of that": f"{figures['endpoint_idle_share']:.1%}",
        "decoding and cropping, by size": ", ".join(
            f"{size} {value:.1f} ms" for size, value in figures["decoding_ms_by_size"].items()
        ),
        "idle, put to row": f"{figures['latency_p50_seconds']} s median, {figures['latency_p95_seconds']} s p95",
        "most memory of a process": ", ".join(
            f"{role} {size} MB"
            + (f" of {figures['configured_mb'][role]:.0f}" if role in figures["configured_mb"] else "")
            for role, size in sorted(figures["memory_mb"].items())
        ),
        "rows": ", ".join(f"{count:,} {status}" for status, count in figures["statuses"].items()),
    }
    table = Table(show_header=False)
    for what, value in rows.items():
        table.add_row(what, value)
    console.print(table)


def main() -> int:
    """The command."""
    command = argparse.ArgumentParser(
        prog="python -m benchmarks.ingestion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--small", type=int, default=SMALL, help=f"pictures of 500x375 ({SMALL})")
    command.add_argument("--large", type=int, default=LARGE, help=f"pictures of 4000x3000 ({LARGE})")
    command.add_argument("--idle", type=int, default=IDLE, help=f"pictures that are dropped one at a time ({IDLE})")
    command.add_argument("--concurrency", type=int, help="the template's InboxConcurrency, if not its default")
    command.add_argument("--seed", type=int, default=0, help="of the pictures and their order (0)")
    arguments = command.parse_args()
    if min(arguments.small, arguments.large) < 0 or arguments.small + arguments.large < 1 or arguments.idle < 1:
        command.error("at least one picture is needed, of either size, and one for --idle")
    console = Console(stderr=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 160)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    parameters = {"InboxConcurrency": str(arguments.concurrency)} if arguments.concurrency else {}
    counts = {size: count for size, count in (("small", arguments.small), ("large", arguments.large)) if count}
    with tempfile.TemporaryDirectory(prefix="ingestion-") as folder, Progress(*columns, console=console) as progress:
        task = progress.add_task("pictures", total=sum(min(counts[size], DISTINCT[size]) for size in counts))
        pictures: dict[str, list[bytes]] = {size: [] for size in counts}
        for size in counts:
            for data in photographs(*SIZES[size], min(counts[size], DISTINCT[size]), 1000 * arguments.seed):
                pictures[size].append(data)
                progress.advance(task)
        order = [
            (f"{size}-{number:05}.jpg", pictures[size][number % len(pictures[size])])
            for size, count in counts.items()
            for number in range(count)
        ]
        random.Random(arguments.seed).shuffle(order)
        benchmark = Benchmark(Path(folder), pictures, order, progress, parameters)
        empty, real = benchmark.empty(), benchmark.real(arguments.idle)
    figures = summary(empty, real, order)
    show(figures, console)
    broken = problems(figures)
    for problem in broken:
        console.print(f"[red]{problem}")
    print(json.dumps({**figures, "load": round(os.getloadavg()[0], 1), "ok": not broken}))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
