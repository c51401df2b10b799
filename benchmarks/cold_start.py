"""What a cold start of `classify_images` imports, and how large its zips are.

    python -m benchmarks.cold_start
    python -m benchmarks.cold_start --runs 5

Builds the stack with `sam build`, then imports the handler in fresh interpreters with exactly what is deployed on the
path: the function's folder, its layers, and of all else that is installed only what Lambda's runtime brings along
(boto3 and what it needs). No bytecode is written beside that of the build, as Lambda could write none. Ends with 1 if
the median import takes 400 ms or more, or the zips of the function and its layers hold 30 MB or more. The last line is
the result as JSON. On a busy machine the processor's time says more than the clock's.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from local.emulator import Emulator
from local.stack import Stack

FUNCTION = "ClassifyImages"
RUNS = 15
MAX_IMPORT_SECONDS = 0.4
MAX_ZIP_BYTES = 30_000_000
RUNTIME = ("boto3", "botocore", "s3transfer", "jmespath", "urllib3", "dateutil", "six")
# Of the function's environment, what its imports read.
ENVIRONMENT = {
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_LAMBDA_FUNCTION_NAME": FUNCTION,
    "AWS_XRAY_SDK_ENABLED": "true",
    "POWERTOOLS_SERVICE_NAME": "houndloop",
    "POWERTOOLS_METRICS_NAMESPACE": "Houndloop",
}
# Prints the seconds that an import took, by the clock and of the processor, and the modules that it brought.
PROGRAM = """
import sys, time
sys.path[:0] = {paths!r}
before = set(sys.modules)
began, used = time.perf_counter(), time.process_time()
{statement}
print(time.perf_counter() - began, time.process_time() - used, len(set(sys.modules) - before))
"""


def deployed(build: Path) -> tuple[Path, dict[str, Path], str]:
    """Of a build: the function's folder, its layers' folders by name, and the handler's module."""
    template = yaml.safe_load((build / "template.yaml").read_text())
    resources = template["Resources"]
    properties = resources[FUNCTION]["Properties"]
    layers = template["Globals"]["Function"].get("Layers", []) + properties.get("Layers", [])
    folders = {layer["Ref"]: build / resources[layer["Ref"]]["Properties"]["ContentUri"] for layer in layers}
    return build / properties["CodeUri"], folders, properties["Handler"].rpartition(".")[0]


def zip_size(folder: Path) -> int:
    """Bytes of a folder as a zip, as `sam deploy` makes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return buffer.tell()


def runtime(folder: Path) -> None:
    """Fills a folder with links to the packages of Lambda's runtime, as they are installed here."""
    for name in RUNTIME:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{name} is not installed here, and is part of Lambda's runtime")
        path = Path(spec.origin)
        path = path.parent if path.name == "__init__.py" else path
        (folder / path.name).symlink_to(path)


def imported(statement: str, paths: list[str]) -> tuple[float, float, int]:
    """Of an import in a fresh interpreter: seconds by the clock and of the processor, and modules.

    CalledProcessError, with its error, when it fails.
    """
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PYTHON", "POWERTOOLS_"))}
    program = PROGRAM.format(paths=paths, statement=statement)
    # -P: not the folder that this runs in; -S: nothing that is installed; -B: leave no bytecode in the build.
    line = [sys.executable, "-P", "-S", "-B", "-c", program]
    done = subprocess.run(line, env=keep | ENVIRONMENT, check=True, capture_output=True, text=True)
    seconds, used, modules = done.stdout.split()[-3:]
    return float(seconds), float(used), int(modules)


def main() -> int:
    """The command."""
    command = argparse.ArgumentParser(
        prog="python -m benchmarks.cold_start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--runs", type=int, default=RUNS, help=f"fresh interpreters for each import ({RUNS})")
    arguments = command.parse_args()
    if arguments.runs < 1:
        command.error("--runs must be at least 1")
    console = Console(stderr=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 160)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(prefix="cold-start-") as folder, Progress(*columns, console=console) as progress:
        task = progress.add_task("sam build", total=arguments.runs)
        stack = Stack(Emulator(state=Path(folder)))
        stack.build()
        code, layers, module = deployed(stack.build_dir)
        sizes = {path.name: zip_size(path) for path in (code, *layers.values())}
        # The order of Lambda's path: the function, then its layers, then what the runtime has.
        installed = Path(folder, "runtime")
        installed.mkdir()
        runtime(installed)
        paths = [str(code), *(str(path / "python") for path in layers.values()), str(installed)]
        what = {"nothing": "pass", "boto3": "import boto3", module: f"import {module}"}
        times: dict[str, list[float]] = {name: [] for name in what}
        used: dict[str, list[float]] = {name: [] for name in what}
        modules = {}
        for name, statement in what.items():  # once for the disk's cache
            modules[name] = imported(statement, paths)[2]
        progress.update(task, description="imports")
        for _ in range(arguments.runs):  # in turns, so that a busy moment of the machine meets all of them
            for name, statement in what.items():
                seconds, processor, _ = imported(statement, paths)
                times[name].append(seconds)
                used[name].append(processor)
            progress.advance(task)
    table = Table(
        "import", "median ms", "fastest ms", "of the processor", "modules", title=f"Python {sys.version.split()[0]}"
    )
    for name, taken in times.items():
        figures = (1e3 * value for value in (statistics.median(taken), min(taken), statistics.median(used[name])))
        table.add_row(name, *(f"{value:.0f}" for value in figures), str(modules[name]))
    console.print(table)
    table = Table("zip", "MB")
    for name, size in sizes.items():
        table.add_row(name, f"{size / 1e6:.2f}")
    table.add_section()
    table.add_row("all", f"{sum(sizes.values()) / 1e6:.2f}")
    console.print(table)
    median = statistics.median(times[module])
    broken = []
    if median >= MAX_IMPORT_SECONDS:
        broken.append(f"the import takes {1e3 * median:.0f} ms; the limit is {1e3 * MAX_IMPORT_SECONDS:.0f} ms")
    if sum(sizes.values()) >= MAX_ZIP_BYTES:
        broken.append(f"the zips hold {sum(sizes.values()) / 1e6:.1f} MB; the limit is {MAX_ZIP_BYTES / 1e6:.0f} MB")
    for problem in broken:
        console.print(f"[red]{problem}")
    result = {
        "benchmark": "cold_start",
        "import_ms": {name: round(1e3 * statistics.median(taken), 1) for name, taken in times.items()},
        "processor_ms": {name: round(1e3 * statistics.median(some), 1) for name, some in used.items()},
        "zip_bytes": sizes,
        "load": round(os.getloadavg()[0], 1),
        "ok": not broken,
    }
    print(json.dumps(result))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
