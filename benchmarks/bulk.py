"""Whether thousands of files at once work as well as one, and can be watched.

    python -m benchmarks.bulk
    python -m benchmarks.bulk --pictures 2000

Writes small JPEGs, no two alike, into a folder and runs `aws s3 sync` from there into the inbox of the deployed stack.
Meanwhile it looks at the first graph of the stack's dashboard, the backlog of the inbox, through GetMetricData, as the
console does: it must rise, and fall to nothing. At the end every file must have one row, CLASSIFIED, about the version
that the bucket has.

Ends with 1 if a picture has no such row, a message is left or dead, or the graph did not show the backlog and its
drain. The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.inbox import IMAGES, Inbox
from local.emulator import CHECKOUT, Emulator

PICTURES = 20_000
DRAWN = 300  # of the pictures; the others are these with another comment inside
SIDE = 160  # pixels
FOLDERS = 40
COLOURS = ("red", "green", "blue")
LOOK_SECONDS = 1.0
PERIOD = 60  # seconds of a point of the graph
PATIENCE = 600.0  # seconds without a message less, after which what is left is given up; hidden ones come after 360


def jpegs(count: int, seed: int) -> Iterator[bytes]:
    """So many small pictures, each with content of its own."""
    from tests.makers.coloured import coloured

    each = -(-min(count, DRAWN) // len(COLOURS))
    drawn = [data for name in COLOURS for data in coloured(name, each, seed, SIDE)]
    for number, data in enumerate(islice(cycle(drawn), count)):
        comment = str(number).encode()
        yield data[:2] + b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment + data[2:]


def fill(folder: Path, count: int, seed: int) -> int:
    """Writes the pictures as `<folder>/<number>.jpg`; returns how many bytes they have."""
    size = 0
    for number in range(FOLDERS):
        (folder / f"{number:02}").mkdir(parents=True)
    for number, data in enumerate(jpegs(count, seed)):
        (folder / f"{number % FOLDERS:02}" / f"{number:06}.jpg").write_bytes(data)
        size += len(data)
    return size


class Graph(threading.Thread):
    """The dashboard's first graph, looked at again and again: waiting, in the works, put back."""

    def __init__(self, cloudwatch: Any) -> None:
        super().__init__(name="graph", daemon=True)
        self.cloudwatch = cloudwatch
        name = cloudwatch.list_dashboards()["DashboardEntries"][0]["DashboardName"]
        body = json.loads(cloudwatch.get_dashboard(DashboardName=name)["DashboardBody"])
        self.title = body["widgets"][0]["properties"]["title"]
        self.lines = _lines(body["widgets"][0]["properties"]["metrics"])
        self.began = datetime.now(UTC)
        self.shown: list[tuple[float, list[float]]] = []  # seconds since the beginning, and each line's newest point
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self.shown.append(((datetime.now(UTC) - self.began).total_seconds(), self.newest()))

    def newest(self) -> list[float]:
        """The last point of each line; 0 where there is none yet."""
        return [values[-1] if values else 0.0 for values in self.points()]

    def points(self) -> list[list[float]]:
        """Each line, oldest point first."""
        queries = [
            {"Id": f"m{number}", "MetricStat": {"Metric": metric, "Period": PERIOD, "Stat": "Maximum"}}
            for number, (metric, _) in enumerate(self.lines)
        ]
        found = self.cloudwatch.get_metric_data(
            MetricDataQueries=queries,
            StartTime=self.began - timedelta(seconds=PERIOD),
            EndTime=datetime.now(UTC) + timedelta(seconds=PERIOD),
            ScanBy="TimestampAscending",
        )["MetricDataResults"]
        by_id = {one["Id"]: [float(value) for value in one["Values"]] for one in found}
        return [by_id.get(query["Id"], []) for query in queries]

    def stop(self) -> None:
        """Ends once the thread is at rest."""
        self._over.set()
        self.join()


def _lines(metrics: list[list[Any]]) -> list[tuple[dict[str, Any], str]]:
    """The metrics of a graph with their labels; a dot in a dashboard repeats what stands above it."""
    lines = []
    above: list[str] = []
    for metric in metrics:
        label = metric[-1]["label"] if isinstance(metric[-1], dict) else metric[1]
        words = [word for word in metric if isinstance(word, str)]
        above = [above[place] if word == "." else word for place, word in enumerate(words)]
        dimensions = [{"Name": n, "Value": v} for n, v in zip(above[2::2], above[3::2], strict=True)]
        lines.append(({"Namespace": above[0], "MetricName": above[1], "Dimensions": dimensions}, label))
    return lines


def sync(folder: Path, inbox: Inbox) -> None:
    """`aws s3 sync`, as people type it. Raises RuntimeError with what it says when it fails."""
    command = shutil.which("aws", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if command is None:
        raise RuntimeError("There is no aws command line: pip install awscli")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    done = subprocess.run(
        [command, "s3", "sync", str(folder), f"s3://{inbox.bucket}/inbox/bulk/", "--only-show-errors"],
        env=environment | inbox.aws.environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"aws s3 sync ended with {done.returncode}: {done.stderr[-2000:]}")


def drain(inbox: Inbox, progress: Progress) -> int:
    """Waits until no message is left, or none goes any more; returns how many are left."""
    task = progress.add_task("drain", total=None)
    least, since, empty, left = sys.maxsize, time.monotonic(), 0, 0
    while empty < 5 and time.monotonic() - since < PATIENCE:
        left = sum(inbox.depth())
        empty = empty + 1 if left == 0 else 0
        if left < least:
            least, since = left, time.monotonic()
        progress.update(task, description=f"drain: {left:,} messages")
        time.sleep(0.3)
    progress.update(task, total=1, completed=1)
    return left


def check(inbox: Inbox, count: int) -> tuple[Counter[str], list[str]]:
    """What the rows of the files say, and what is wrong, in words."""
    pages = inbox.s3.get_paginator("list_objects_v2").paginate(Bucket=inbox.bucket, Prefix="inbox/bulk/")
    keys = {entry["Key"] for page in pages for entry in page.get("Contents", [])}
    versions = {
        version["Key"]: version["VersionId"]
        for page in inbox.s3.get_paginator("list_object_versions").paginate(Bucket=inbox.bucket, Prefix="inbox/bulk/")
        for version in page.get("Versions", [])
        if version["IsLatest"]
    }
    rows = {row["key"]: row for row in inbox.rows() if row["version"] == "current" and row["key"] in keys}
    statuses = Counter(row["status"] for row in rows.values())
    wrong = [f"{len(keys):,} of {count:,} files are in the bucket"] if len(keys) != count else []
    for key in sorted(keys):
        row = rows.get(key)
        if row is None:
            wrong.append(f"{key}: no row")
        elif row["status"] != "CLASSIFIED" or row["version_id"] != versions[key]:
            wrong.append(f"{key}: {row['status']} of version {row['version_id']}: {row.get('reason', '')}")
    return statuses, wrong


def show(figures: dict[str, Any], graph: Graph, console: Console) -> None:
    """The figures for people, and the graph as it was seen."""
    table = Table(title=f"aws s3 sync of {figures['pictures']:,} files, {figures['megabytes']:,} MB", show_header=False)
    table.add_row("the sync took", f"{figures['sync_seconds']} s ({figures['synced_per_second']} files a second)")
    table.add_row("until no message was left", f"{figures['seconds']} s ({figures['pictures_per_second']} a second)")
    table.add_row("deepest backlog by the metric", f"{figures['deepest_by_metric']:,.0f} messages waiting")
    table.add_row("rows", ", ".join(f"{count:,} {status}" for status, count in figures["statuses"].items()))
    table.add_row("dead letters", f"{figures['dead_letters']:,}")
    console.print(table)
    table = Table("seconds", *(label for _, label in graph.lines), title=f"Dashboard: {graph.title}")
    step = max(1, len(graph.shown) // 20)
    for seconds, values in [*graph.shown[:-1:step], *graph.shown[-1:]]:
        table.add_row(f"{seconds:.0f}", *(f"{value:,.0f}" for value in values))
    console.print(table)


def main() -> int:
    """The command."""
    command = argparse.ArgumentParser(
        prog="python -m benchmarks.bulk", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("--pictures", type=int, default=PICTURES, help=f"files that are synced ({PICTURES:,})")
    command.add_argument("--seed", type=int, default=0, help="of the pictures (0)")
    arguments = command.parse_args()
    if arguments.pictures < 1:
        command.error("--pictures must be at least 1")
    sys.path.insert(0, str(CHECKOUT / "inference"))
    from tests.makers.models import make_artifact

    console = Console(stderr=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 160)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(prefix="bulk-") as temporary, Progress(*columns, console=console) as progress:
        folder = Path(temporary)
        task = progress.add_task("pictures, stack and endpoint", total=None)
        size = fill(folder / "pictures", arguments.pictures, arguments.seed)
        with Emulator(state=folder / "state", environment=IMAGES) as aws:
            inbox = Inbox(aws)
            inbox.serve(make_artifact(folder / "model"), deployment=1, instances=2)
            progress.update(task, total=1, completed=1)
            graph = Graph(inbox.cloudwatch)
            graph.start()
            task = progress.add_task("aws s3 sync", total=None)
            began = time.monotonic()
            sync(folder / "pictures", inbox)
            synced = time.monotonic() - began
            progress.update(task, total=1, completed=1)
            left = drain(inbox, progress)
            seconds = time.monotonic() - began
            deadline = time.monotonic() + 3 * PERIOD
            while any(graph.newest()) and time.monotonic() < deadline:  # a point is a minute's highest
                time.sleep(LOOK_SECONDS)
            graph.stop()
            end = graph.newest()
            dead = sum(inbox.depth(inbox.outputs["InboxDeadLettersUrl"]))
            statuses, wrong = check(inbox, arguments.pictures)
    deepest = max((values[0] for _, values in graph.shown), default=0.0)
    if left or dead:
        wrong.append(f"{left} messages are left, {dead} are dead")
    if not deepest or any(end):
        wrong.append(f"the graph rose to {deepest:.0f} messages and ended with {end}")
    figures = {
        "benchmark": "bulk",
        "pictures": arguments.pictures,
        "megabytes": round(size / 1e6),
        "sync_seconds": round(synced, 1),
        "synced_per_second": round(arguments.pictures / synced, 1),
        "seconds": round(seconds, 1),
        "pictures_per_second": round(arguments.pictures / seconds, 1),
        "deepest_by_metric": deepest,
        "end_by_metric": end,
        "statuses": dict(statuses),
        "dead_letters": dead,
        "messages_left": left,
        "wrong": len(wrong),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "ok": not wrong,
    }
    show(figures, graph, console)
    for problem in wrong[:10]:
        console.print(problem, style="red", markup=False)
    print(json.dumps(figures))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
