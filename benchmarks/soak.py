"""Does the serving container's memory stay flat? 100,000 requests of every kind, and what its processes hold meanwhile.

    python -m benchmarks.soak
    python -m benchmarks.soak --requests 5000 --quick

Starts `inference/` as the container does, with a worker for each core, and sends it, over several connections at once
and in a random order: JPEGs of many sizes, a PNG and a WebP, batches of 1 to 8 crops, broken files (truncated, empty,
no picture, a decompression bomb), other content types, bodies over the limit of size, /ping, and clients that go away:
in the middle of a body, and before the answer. Every answer must have the status that its request calls for. A
connection that the server closes after an error is opened again; one that breaks without an answer counts as wrong.

The memory of all its processes (PSS: shared pages count once) is noted 400 times along the way and drawn as a graph.
The verdict is on the second half, when all buffers have their size. The line through it (Theil's and Sen's, which a few
outliers do not move) may rise by no more than 5 % of the memory over 100,000 requests. Processes must be as many at the
end as in the middle, and open files may not rise.

Ends with 1 when a status was wrong, the server is not healthy at the end, or memory rises (not judged with --quick,
where half of the requests are not enough to fill what is filled once). The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.ingestion import photographs
from benchmarks.peers import Footprint, free_port, stop, tail, tree
from local.emulator import CHECKOUT, STATE

REQUESTS, SAMPLES = 100_000, 400
CONNECTIONS = 8
MAX_PAYLOAD = 4_000_000  # set for this server, so that being over it costs little
MAX_RISE = 0.05  # of the memory, over 100,000 requests
PATIENCE = 60.0  # seconds for the server to come up, and for one answer
CROPS, CROP_BYTES = "application/x-rgb-crops", 224 * 224 * 3
AWAY = 0  # "status" of a client that went away


@dataclass(frozen=True)
class Kind:
    """Requests of one kind: their bytes, and what is right to answer. `sent` bytes of them, if the client goes away."""

    name: str
    weight: float
    status: int
    raw: bytes
    sent: int | None = None


def request(path: str, content_type: str, body: bytes, method: str = "POST", length: int | None = None) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def kinds() -> list[Kind]:
    """The mixture."""
    rng = np.random.default_rng(0)
    found: list[Kind] = []

    def add(name: str, weight: float, status: int, content_type: str, bodies: list[bytes]) -> None:
        found.extend(Kind(name, weight / len(bodies), status, request("/invocations", content_type, body))
                     for body in bodies)  # fmt: skip

    small = list(photographs(500, 375, 76_000, 6, seed=0))
    others = [next(photographs(width, height, size, 1, seed=1))
              for width, height, size in ((64, 48, 2_000), (375, 500, 70_000), (1024, 768, 200_000),
                                          (1600, 1200, 500_000))]  # fmt: skip
    large = next(photographs(4000, 3000, 3_500_000, 1, seed=2))
    flat = Image.fromarray(rng.integers(0, 256, (120, 160, 3), np.uint8))
    add("JPEG, 500x375", 50, 200, "image/jpeg", small)
    add("JPEG, other sizes", 12, 200, "image/jpeg", others)
    add("JPEG, 12 megapixels", 0.5, 200, "image/jpeg", [large])
    add("PNG and WebP", 4, 200, "image/png", [encoded(flat, kind) for kind in ("PNG", "WEBP")])
    add("crops", 12, 200, CROPS, [rng.integers(0, 256, count * CROP_BYTES, np.uint8).tobytes() for count in (1, 2, 8)])
    add("crops, wrong size", 2, 400, CROPS, [bytes(CROP_BYTES - 1), b""])
    bomb = encoded(Image.new("1", (12_000, 12_000)), "PNG")
    broken = [small[0][:20_000], b"", b"no picture at all", large[:1_000_000], bomb]
    add("broken", 6, 400, "image/jpeg", broken)
    add("content type", 3, 415, "text/plain", [small[0], b"x"])
    add("too large", 1, 413, "image/jpeg", [bytes(MAX_PAYLOAD + 1)])
    found.append(Kind("/ping", 4, 200, b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n"))
    found.append(Kind("no such path", 0.5, 404, request("/models", "image/jpeg", b"")))
    whole = request("/invocations", "image/jpeg", small[1])
    found.append(Kind("away in the body", 2, AWAY, whole, len(whole) // 2))
    found.append(Kind("away before the answer", 2, AWAY, whole, len(whole)))
    found.append(Kind("away in the head", 1, AWAY, whole, 30))
    return found


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@dataclass
class Sample:
    """Of the server's processes after so many requests."""

    requests: int
    memory: int  # bytes
    processes: int
    files: int


@dataclass
class Soak:
    """Requests over several connections, and what comes back."""

    port: int
    kinds: list[Kind]
    total: int
    seed: int = 0
    sent: int = 0
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def run(self, connections: int, tell: Any) -> None:
        """Sends them all."""
        chance = random.Random(self.seed)
        weights = [kind.weight for kind in self.kinds]
        plan = iter(chance.choices(self.kinds, weights, k=self.total))
        await asyncio.gather(*(self._connection(plan, tell) for _ in range(connections)))

    async def _connection(self, plan: Iterator[Kind], tell: Any) -> None:
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        for kind in plan:
            fresh = streams is None
            try:
                streams = streams or await asyncio.open_connection("127.0.0.1", self.port)
                status, body, streams = await asyncio.wait_for(self._ask(kind, streams), PATIENCE)
            except (OSError, EOFError, TimeoutError, ValueError) as error:
                if streams:
                    streams[1].close()
                streams, status, body = None, -1, f"{error!r}{'' if fresh else ', on a kept connection'}".encode()
            self.answers[kind.name, status] += 1
            if status != kind.status and len(self.wrong) < 20:
                self.wrong.append(
                    f"{kind.name}: {status} instead of {kind.status}: {body[:200].decode(errors='replace')}"
                )
            self.sent += 1
            tell(self.sent)
        if streams:
            streams[1].close()

    async def _ask(
        self, kind: Kind, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    ) -> tuple[int, bytes, Any]:
        """(status, body, the connection if it can be used again)."""
        reader, writer = streams
        if kind.sent is not None:
            writer.write(kind.raw[: kind.sent])
            await writer.drain()
            if kind.sent == len(kind.raw):
                await asyncio.sleep(0.002)  # it is at work by then
            writer.transport.abort()
            return AWAY, b"", None
        writer.write(kind.raw)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status, *lines = head.split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in lines if line)
        body = await reader.readexactly(int(headers.get(b"content-length", 0)))
        code = int(status.split(b" ", 2)[1])
        if headers.get(b"connection") == b"close" or kind.status == 413:  # the rest of the body is not read
            writer.transport.abort()
            return code, body, None
        return code, body, streams


def sample(pid: int, requests: int) -> Sample:
    members, files = tree(pid), 0
    for member in members:
        with contextlib.suppress(psutil.Error):
            files += member.num_fds()
    return Sample(requests, Footprint.of(members).memory, len(members), files)


def slope(points: list[tuple[float, float]]) -> float:
    """Theil and Sen's: the median of the slopes between any two points."""
    slopes = [
        (right[1] - left[1]) / (right[0] - left[0])
        for at, left in enumerate(points)
        for right in points[at + 1 :]
        if right[0] > left[0]
    ]
    return statistics.median(slopes) if slopes else 0.0


def judge(samples: list[Sample]) -> dict[str, Any]:
    """How memory, processes and files rise in the second half, over 100,000 requests; memory also as a share of it."""
    half = [each for each in samples if each.requests >= samples[-1].requests / 2]
    memory = slope([(each.requests, each.memory) for each in half]) * 100_000
    typical = statistics.median(each.memory for each in half)
    return {
        "memory_mb": round(typical / 1e6, 1),
        "first_mb": round(samples[0].memory / 1e6, 1),
        "peak_mb": round(max(each.memory for each in samples) / 1e6, 1),
        "rise_mb": round(memory / 1e6, 2),
        "rise_percent": round(100 * memory / typical, 2),
        "processes": [half[0].processes, half[-1].processes],
        "files_rise": round(slope([(each.requests, each.files) for each in half]) * 100_000, 1),
    }


def graph(samples: list[Sample], found: dict[str, Any]) -> str:
    """An HTML page with the memory along the way."""
    width, height, left, bottom = 900, 360, 70, 40
    most, last = 1.15 * max(each.memory for each in samples), max(1, samples[-1].requests)

    def at(each: Sample) -> str:
        x = left + each.requests / last * (width - left - 20)
        return f"{x:.1f},{height - bottom - each.memory / most * (height - bottom - 20):.1f}"

    lines = []
    for part in range(5):
        level = height - bottom - part / 4 * (height - bottom - 20)
        lines.append(
            f'<line x1="{left}" x2="{width - 20}" y1="{level:.0f}" y2="{level:.0f}" stroke="#ddd"/>'
            f'<text x="{left - 8}" y="{level + 4:.0f}" text-anchor="end">{most * part / 4e6:,.0f} MB</text>'
        )
    points = " ".join(map(at, samples))
    return f"""<!doctype html><meta charset="utf-8"><title>Memory of the serving container</title>
<style>body {{ font: 14px sans-serif; margin: 2em }} text {{ font-size: 12px; fill: #555 }}</style>
<h1>Memory of all processes</h1>
<p>{samples[-1].requests:,} requests. Over the second half memory rises by {found["rise_percent"]} % of
{found["memory_mb"]} MB for 100,000 requests.</p>
<svg width="{width}" height="{height}">{"".join(lines)}
<polyline points="{points}" fill="none" stroke="#06c" stroke-width="1.5"/>
<text x="{width - 20}" y="{height - 12}" text-anchor="end">{samples[-1].requests:,} requests</text></svg>
"""


def command() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=REQUESTS, help=f"how many ({REQUESTS:,})")
    parser.add_argument("--connections", type=int, default=CONNECTIONS, help=f"at once ({CONNECTIONS})")
    parser.add_argument("--precision", default="int8", help="f32, bf16 or int8 (int8, which is through soonest)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (0)")
    parser.add_argument("--graph", type=Path, default=STATE / "soak.html", help="its file (.houndloop/soak.html)")
    parser.add_argument(
        "--quick", action="store_true", help="2,000 requests, unless said otherwise; memory is not judged"
    )
    return parser


def up(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until /ping is answered. Raises RuntimeError when the server ends, or does not come up."""
    began = time.monotonic()
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/ping")
            if connection.getresponse().status == 200:
                return
        if process.poll() is not None or time.monotonic() - began > PATIENCE:
            raise RuntimeError(f"the server does not answer /ping: {tail(log)}")
        time.sleep(0.1)


def main() -> int:
    """The command."""
    parser = command()
    options = parser.parse_args()
    if options.quick and options.requests == REQUESTS:
        options.requests = 2000
    if min(options.requests, options.connections) < 1:
        parser.error("--requests and --connections must be at least 1")
    console = Console(stderr=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 120)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    load, workers = os.getloadavg()[0], len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, Progress(*columns, console=console) as progress:
        task = progress.add_task("a ResNet-18", total=options.requests)
        artifact, log, port = Path(folder, "artifact"), Path(folder, "log"), free_port()
        made = subprocess.run(
            [sys.executable, "-m", "benchmarks.artifact", str(artifact)], cwd=CHECKOUT, capture_output=True, text=True
        )
        if made.returncode:
            raise RuntimeError(f"the model could not be made: {made.stderr[-1500:]}")
        words = [sys.executable, str(CHECKOUT / "inference"), "serve", "--model-dir", str(artifact)]
        words += ["--port", str(port), "--workers", str(workers)]
        variables = {"PRECISION": options.precision, "MAX_PAYLOAD_BYTES": str(MAX_PAYLOAD)}
        with log.open("wb") as output:
            process = subprocess.Popen(
                words, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            up(port, process, log)
            progress.update(task, description="requests")
            soak = Soak(port, kinds(), options.requests, options.seed)
            samples, every = [sample(process.pid, 0)], max(1, options.requests // SAMPLES)

            def tell(sent: int) -> None:
                progress.update(task, completed=sent)
                if sent % every == 0:
                    samples.append(sample(process.pid, sent))

            began = time.monotonic()
            asyncio.run(soak.run(options.connections, tell))
            seconds = time.monotonic() - began
            up(port, process, log)
            log_errors = [line for line in log.read_text(errors="replace").splitlines() if " ERROR " in line]
        finally:
            stop(process)
    found = judge(samples)
    options.graph.parent.mkdir(parents=True, exist_ok=True)
    options.graph.write_text(graph(samples, found))
    table = Table("request", "answered", "how often", title=f"{options.requests:,} requests in {seconds:.0f} s")
    for (name, status), count in sorted(soak.answers.items()):
        answered = {AWAY: "went away", -1: "broke"}.get(status, str(status))
        table.add_row(name, answered, f"{count:,}")
    console.print(table)
    console.print(
        f"memory: {found['first_mb']} MB at first, {found['memory_mb']} MB in the second half, where it rises by "
        f"{found['rise_percent']} % for 100,000 requests; graph: {options.graph}"
    )
    expected = {kind.name: kind.status for kind in soak.kinds}
    unexpected = sum(count for (name, status), count in soak.answers.items() if status != expected[name])
    broken = [f"{unexpected} answers have another status than expected: {soak.wrong[:5]}"] if unexpected else []
    broken += [f"the server's log has {len(log_errors)} errors: {log_errors[0]}"] if log_errors else []
    rising = []
    if found["rise_percent"] > 100 * MAX_RISE:
        rising.append(f"memory rises by {found['rise_percent']} %; the bound is {100 * MAX_RISE:g} %")
    if found["processes"][0] != found["processes"][1]:
        rising.append(f"there were {found['processes'][0]} processes, and then {found['processes'][1]}")
    if found["files_rise"] > 10 * workers:
        rising.append(f"open files rise by {found['files_rise']}")
    for problem in broken:
        console.print(f"[red]{problem}")
    for problem in rising:
        console.print(f"[red]{problem}" + (" (not judged: --quick)" if options.quick else ""))
    result = {
        "benchmark": "soak",
        "requests": options.requests,
        "seconds": round(seconds, 1),
        "precision": options.precision,
        **found,
        "unexpected": unexpected,
        "log_errors": len(log_errors),
        "workers": workers,
        "load": round(load, 1),
        "judged": not options.quick,
        "ok": not broken and not rising,
    }
    print(json.dumps(result))
    return 1 if broken or (rising and not options.quick) else 0


if __name__ == "__main__":
    sys.exit(main())
