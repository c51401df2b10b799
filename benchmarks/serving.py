"""The serving container beside TorchServe, BentoML, LitServe and FastAPI: same weights, pictures and cores, one run.

    python -m benchmarks.serving
    python -m benchmarks.serving --only Houndloop,TorchServe --rounds 5
    python -m benchmarks.serving --quick

Every server has a virtual environment of its own, made the first time and kept under `.houndloop/`; torch alone is
lent to the peers by the environment that runs this. TorchServe needs a Java runtime (apt-get install
openjdk-17-jre-headless); without it the others are measured, and what is promised about it is not judged. All serve
one ResNet-18 of 133 classes with random weights (benchmarks/artifact.py) by one worker of one thread for each core,
take a JPEG and answer its five likeliest classes as JSON. Ours is `inference/` in f32, in bf16 where the processor has
it, and in int8. The peers (benchmarks/servers/) run torch eagerly in float32, which is how their documentation has it,
with torchvision's reference transforms; FastAPI also with a frozen TorchScript, which is shown and not judged.

First each server is asked about the same pictures: the same class must come first as in the f32 of ours, or one that
is as likely within the precision's tolerance. Then, in each round, every server has its turn: it is started, warmed up,
asked by one connection, by 8 and by 32 that each send the next picture when they have their answer, and stopped. So
there is never more than one of them on the machine, and a busy moment meets all. The load comes from a process of its
own, on the same cores, as cheap for all. Figures are medians of the rounds. Memory is that of all its processes after
its load, pages that they share counted once (PSS). The cost is their processor time for each request.

Ends with 1 when a server answered anything but 200 or another class, or when a bound is missed (BOUNDS; not judged with
--quick). The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import peers
from benchmarks.artifact import tinted
from benchmarks.ingestion import SIZES, percentile, photographs
from benchmarks.peers import Footprint, Running, Server
from local.emulator import CHECKOUT

CONNECTIONS = (1, 8, 32)
COMPARED = 24  # pictures that all are asked about
PICTURES = 24  # that are sent
# A class that the f32 of ours finds less likely than its first by this much may be another's first.
TOLERANCES = {"f32": 0.002, "bf16": 0.1, "int8": 0.4}
OURS, TORCHSERVE = "Houndloop, f32", "TorchServe"


@dataclass(frozen=True)
class Bound:
    """`ours` must be `times` as good as the best of `others` that ran."""

    what: str
    ours: str
    others: tuple[str, ...]
    times: float


PEERS = ("BentoML", "LitServe", "FastAPI")
BOUNDS = (
    Bound("requests per second, 8 connections", OURS, (TORCHSERVE,), 2.2),
    Bound("requests per second, 8 connections", OURS, PEERS, 1.8),
    Bound("requests per second, 8 connections", "Houndloop, bf16", (TORCHSERVE,), 3.5),
    Bound("requests per second, 8 connections", "Houndloop, int8", (TORCHSERVE,), 5.0),
    Bound("p50, 1 connection", OURS, (TORCHSERVE,), 1.9),
    Bound("memory", OURS, (TORCHSERVE,), 3.0),
)


@dataclass
class Measured:
    """One server's figures of every round, by connections."""

    rates: dict[int, list[float]] = field(default_factory=dict)  # requests per second
    latencies: dict[int, list[list[float]]] = field(default_factory=dict)  # ms
    costs: dict[int, list[float]] = field(default_factory=dict)  # processor ms a request
    memory: list[int] = field(default_factory=list)  # bytes
    starts: list[float] = field(default_factory=list)  # seconds to the first answer
    errors: dict[str, int] = field(default_factory=dict)  # by status
    wrong: str = ""  # what one of them said

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for connections, rates in self.rates.items():
            found[str(connections)] = {
                "rate": round(statistics.median(rates), 1),
                "p50_ms": round(statistics.median(percentile(each, 0.5) for each in self.latencies[connections]), 1),
                "p99_ms": round(statistics.median(percentile(each, 0.99) for each in self.latencies[connections]), 1),
                "cpu_ms": round(statistics.median(self.costs[connections]), 1),
            }
        memory, start = statistics.median(self.memory), statistics.median(self.starts)
        return found | {"memory_mb": round(memory / 1e6), "start_seconds": round(start, 1), "errors": self.errors}


def value(figures: dict[str, Any], what: str) -> float:
    """A figure as a bound names it; the larger, the better."""
    if what == "memory":
        return 1 / figures["memory_mb"]
    if what == "p50, 1 connection":
        return 1 / figures["1"]["p50_ms"]
    return float(figures["8"]["rate"])


def judged(figures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each bound whose servers ran: what was reached, and whether that is enough."""
    found = []
    for bound in BOUNDS:
        others = [name for name in bound.others if name in figures]
        if bound.ours in figures and others:
            best = max(others, key=lambda name: value(figures[name], bound.what))
            times = value(figures[bound.ours], bound.what) / value(figures[best], bound.what)
            found.append({"what": f"{bound.what}: {bound.ours} against {best}", "times": round(times, 2),
                          "bound": bound.times, "ok": times >= bound.times})  # fmt: skip
    return found


def compare(
    expected: list[list[tuple[str, float]]], answers: list[list[tuple[str, float]]], tolerance: float
) -> list[str]:  # fmt: skip
    """What is wrong about a server's answers, each the likeliest classes of a picture with their probabilities."""
    problems = []
    for number, (ours, theirs) in enumerate(zip(expected, answers, strict=True)):
        likely, first = dict(ours), theirs[0]
        if ours[0][1] - likely.get(first[0], -math.inf) > tolerance:
            problems.append(f"picture {number} is a {first[0]} ({first[1]:.3f}), not a {ours[0][0]} ({ours[0][1]:.3f})")
        elif len(theirs) != len(ours):
            problems.append(f"picture {number} has {len(theirs)} classes, not {len(ours)}")
        elif abs(first[1] - likely[first[0]]) > tolerance:
            problems.append(f"picture {number}: {first[0]} has {first[1]:.4f}, not {likely[first[0]]:.4f}")
    return problems


class Benchmark:
    """The servers, taking turns."""

    def __init__(self, folder: Path, servers: list[Server], cores: list[int], step: Callable[[str], None]) -> None:
        self.folder, self.servers, self.cores, self.step = folder, servers, cores, step
        self.artifact = folder / "artifact"
        self.measured = {server.name: Measured() for server in servers}
        self.expected: list[list[tuple[str, float]]] = []

    def prepare(self) -> None:
        """Pictures, requests, environments."""
        self.pictures = list(tinted(COMPARED, seed=2))
        sent = list(photographs(*SIZES["small"], PICTURES, seed=0))
        for server in self.servers:
            self.step(f"{server.name}: its environment")
            server.python()
            bodies = self.folder / "bodies" / server.kind
            bodies.mkdir(parents=True, exist_ok=True)
            for number, picture in enumerate(sent):
                (bodies / f"{number:03}").write_bytes(server.body(picture))

    def turn(self, server: Server, seconds: float) -> None:
        """One round of one server."""
        self.step(server.name)
        measured, place = self.measured[server.name], self.folder / server.kind
        with peers.running(server, self.artifact, place, self.cores, self.pictures[0]) as running:
            measured.starts.append(running.start_seconds)
            answers = [running.ask(picture) for picture in self.pictures]
            self.expected = self.expected or answers
            if problems := compare(self.expected, answers, TOLERANCES[server.precision]):
                raise RuntimeError(f"{server.name} answers otherwise: {'; '.join(problems[:3])}")
            self.load(running, 8, max(2.0, seconds / 2))  # warm-up
            for connections in CONNECTIONS:
                before = Footprint.of(running.tree())
                found = self.load(running, connections, seconds)
                after = Footprint.of(running.tree())
                requests = len(found["latencies"])
                measured.rates.setdefault(connections, []).append(requests / found["seconds"])
                measured.latencies.setdefault(connections, []).append(found["latencies"] or [math.nan])
                cost = 1e3 * (after.seconds - before.seconds) / max(1, requests)
                measured.costs.setdefault(connections, []).append(cost)
                for status, count in found["statuses"].items():
                    if status != "200":
                        measured.errors[status] = measured.errors.get(status, 0) + count
                        measured.wrong = found["wrong"]
            measured.memory.append(Footprint.of(running.tree()).memory)

    def load(self, running: Running, connections: int, seconds: float) -> dict[str, Any]:
        """Asks it for so long, from a process of its own."""
        bodies = self.folder / "bodies" / running.server.kind
        words = [running.url, str(bodies), running.server.content_type, str(connections), str(seconds)]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.hammer", *words], capture_output=True, text=True, cwd=CHECKOUT
        )
        if done.returncode:
            raise RuntimeError(f"the load on {running.server.name} failed: {done.stderr[-1500:]}")
        return dict(json.loads(done.stdout))


def show(figures: dict[str, dict[str, Any]], console: Console) -> None:
    """The figures for people."""
    table = Table("server", title="ResNet-18, JPEGs of 500x375 and 76 kB")
    for connections in CONNECTIONS:
        for column in (f"{connections} conn.: req/s", "p50 ms", "p99 ms", "CPU ms/req"):
            table.add_column(column, justify="right")
    table.add_column("memory MB", justify="right")
    table.add_column("up after s", justify="right")
    for name, found in figures.items():
        cells = [
            str(found[str(count)][what]) for count in CONNECTIONS for what in ("rate", "p50_ms", "p99_ms", "cpu_ms")
        ]
        table.add_row(name, *cells, str(found["memory_mb"]), str(found["start_seconds"]))
    console.print(table)


def chosen(folder: Path, only: str) -> list[Server]:
    """The servers whose names contain one of the words of `only`; all that can run here when it is empty."""
    artifact = folder / "artifact"
    servers = [peers.ours("f32", artifact), peers.ours("bf16", artifact), peers.ours("int8", artifact)]
    servers += [peers.torchserve(), peers.bentoml(), peers.litserve(), peers.fastapi(), peers.fastapi("frozen")]
    words = [word.strip().lower() for word in only.split(",") if word.strip()]
    return [server for server in servers if not words or any(word in server.name.lower() for word in words)]


def without_bf16() -> bool:
    """Whether this processor would compute bf16 no faster than float32."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return not {"avx512_bf16", "amx_bf16"} & set(flags.split())


def command() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns that every server has (3)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement (6)")
    parser.add_argument("--only", default="", help="words of servers' names, comma-separated, instead of all")
    available = len(os.sched_getaffinity(0))
    parser.add_argument("--cores", type=int, default=available, help=f"for the servers, a worker each ({available})")
    parser.add_argument("--quick", action="store_true", help="one round of 2 seconds each; bounds are not judged")
    return parser


def main() -> int:
    """The command."""
    parser = command()
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 1, 2.0
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    if min(options.rounds, options.cores) < 1 or options.seconds <= 0:
        parser.error("--rounds and --cores must be at least 1, --seconds positive")
    console = Console(stderr=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 180)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    load, notes = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory(prefix="serving-") as folder, Progress(*columns, console=console) as progress:
        servers = chosen(Path(folder), options.only)
        if (reason := peers.missing_java()) and any(server.name == TORCHSERVE for server in servers):
            notes.append(f"{reason}. What is promised about it is not judged")
            servers = [server for server in servers if server.name != TORCHSERVE]
        if without_bf16() and any(server.precision == "bf16" for server in servers):
            notes.append("this processor has no bf16")
            servers = [server for server in servers if server.precision != "bf16"]
        if not servers:
            parser.error(f"--only {options.only!r} names none that can run here")
        if servers[0].name != OURS:
            parser.error("--only must leave Houndloop in: its f32 is what the others' answers are compared with")
        task = progress.add_task("a ResNet-18", total=1 + len(servers) * (1 + options.rounds))

        def step(name: str) -> None:
            progress.update(task, description=name, advance=1)

        benchmark = Benchmark(Path(folder), servers, cores, step)
        made = subprocess.run(
            [sys.executable, "-m", "benchmarks.artifact", str(benchmark.artifact)],
            cwd=CHECKOUT, capture_output=True, text=True,
        )  # fmt: skip
        if made.returncode:
            raise RuntimeError(f"the model could not be made: {made.stderr[-1500:]}")
        benchmark.prepare()
        for _ in range(options.rounds):
            for server in servers:
                benchmark.turn(server, options.seconds)
        progress.update(task, description="done", advance=1)
    figures = {name: measured.summary() for name, measured in benchmark.measured.items()}
    show(figures, console)
    results = judged(figures)
    for result in results:
        colour = "green" if result["ok"] else "red"
        console.print(f"[{colour}]{result['what']}: {result['times']} times as good; the bound is {result['bound']}")
    broken = [f"{name}: answers that are not 200: {measured.errors} ({measured.wrong})"
              for name, measured in benchmark.measured.items() if measured.errors]  # fmt: skip
    for note in (*notes, *broken):
        console.print(f"[red]{note}")
    missed = [result["what"] for result in results if not result["ok"]]
    if missed and options.quick:
        console.print("bounds are not judged: --quick")
    ok = not broken and not missed
    result = {
        "benchmark": "serving",
        "servers": figures,
        "bounds": results,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "cores": len(cores),
        "processor": processor(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "load": round(load, 1),
        "judged": not options.quick,
        "ok": ok,
    }
    print(json.dumps(result))
    return 1 if broken or (missed and not options.quick) else 0


def processor() -> str:
    """What Linux calls it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return ""


if __name__ == "__main__":
    sys.exit(main())
