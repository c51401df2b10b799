"""The exported model alone: against torch, and against what this machine's convolutions could reach.

    python -m benchmarks.model
    python -m benchmarks.model --quick

Makes a ResNet-18 of 133 classes with random weights (benchmarks/artifact.py), and takes its time for one crop on one
thread: in torch, eagerly in float32, and through `inference/predictor.py` in f32, in bf16 where the processor has it,
and in int8.

The ceiling of a precision is the time of the convolutions and of `fc` alone, if every one ran as fast as the fastest
kernel at hand runs it by itself: for each distinct layer of the network, its shape and its stride, the fastest of
oneDNN through torch (float32 and bfloat16, weights packed beforehand) and OpenVINO with and without ReLU fused into it
(the kernel's own time by OpenVINO's counters, without the conversion of its input and output), in that precision or in
a more exact one where that is faster. The layers' times are added up as often as the network has them. The same input
again and again lies in the cache; and pooling, the shortcuts' additions, normalisation, softmax and everything between
layers count for nothing. So no runtime that uses these kernels gets there. Shown beside it: the time that all layers
would take at the best layer's operations a second.

In each round everything has its turn, so that a busy moment of the machine meets all. A time is the lower quartile of
all runs, for models and kernels alike: on a machine that does other things as well, the slower runs are about those.
Last: the time for each picture of a batch, which tells whether micro-batching would gain.

Ends with 1 when f32 reaches less than 85 % of its ceiling, or bf16 or int8 less than 75 % (not judged with --quick).
The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.ingestion import percentile
from benchmarks.serving import processor, without_bf16
from local.emulator import CHECKOUT

LEAST = {"f32": 0.85, "bf16": 0.75, "int8": 0.75}  # of the ceiling
BATCHES = (1, 2, 4, 8)
SETTINGS: dict[str, Any] = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
Timed = Callable[[], float]  # runs once, and says how many ms that took


@dataclass(frozen=True)
class Layer:
    """A convolution, or with `size` 1 and `kernel` 1 a matrix: [1, before, size, size] to `after` channels."""

    before: int
    after: int
    size: int
    kernel: int
    stride: int
    count: int  # how often ResNet-18 has it

    @property
    def name(self) -> str:
        shape = f"{self.kernel}x{self.kernel}" + (f"/{self.stride}" if self.stride > 1 else "")
        return f"{shape} {self.before} to {self.after} at {self.size}"

    @property
    def operations(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.before * self.after * self.kernel**2 * (self.size // self.stride) ** 2


def layers(classes: int) -> list[Layer]:
    """ResNet-18's, at 224 pixels."""
    found = [Layer(3, 64, 224, 7, 2, 1), Layer(64, 64, 56, 3, 1, 4)]
    for before, size in ((64, 56), (128, 28), (256, 14)):
        found += [
            Layer(before, 2 * before, size, 3, 2, 1),
            Layer(before, 2 * before, size, 1, 2, 1),
            Layer(2 * before, 2 * before, size // 2, 3, 1, 3),
        ]
    return [*found, Layer(512, classes, 1, 1, 1, 1)]


def by_torch(layer: Layer, precision: str) -> Timed:
    """oneDNN through torch, on its own layout."""
    import torch
    from torch.utils import mkldnn

    dtype = torch.float32 if precision == "f32" else torch.bfloat16
    conv = torch.nn.Conv2d(layer.before, layer.after, layer.kernel, layer.stride, layer.kernel // 2).eval()
    with torch.inference_mode():
        packed = mkldnn.to_mkldnn(conv, dtype)
        images = torch.rand(1, layer.before, layer.size, layer.size).to_mkldnn(dtype)

    def timed() -> float:
        with torch.inference_mode():
            began = time.perf_counter()
            packed(images)
            return 1e3 * (time.perf_counter() - began)

    return timed


def by_openvino(layer: Layer, precision: str, relu: bool) -> Timed:
    """OpenVINO's kernel, by its own clock."""
    import openvino as ov
    from openvino import opset13 as op

    from predictor import core

    rng = np.random.default_rng(0)
    weights: Any = op.constant(
        rng.normal(0, 0.05, (layer.after, layer.before, layer.kernel, layer.kernel)).astype(np.float32)
    )
    images = op.parameter([1, layer.before, layer.size, layer.size], np.float32)
    data: Any = images
    if precision == "int8":
        data = _quantised(data, 0.0, 1.0, 256)
        weights = _quantised(weights, -0.2, 0.2, 255)
    pad = [layer.kernel // 2] * 2
    answer = op.convolution(data, weights, [layer.stride] * 2, pad, pad, [1, 1])
    answer = op.add(answer, op.constant(rng.normal(0, 0.1, (1, layer.after, 1, 1)).astype(np.float32)))
    if relu:
        answer = op.relu(answer)
    if precision == "int8":
        answer = _quantised(answer, 0.0 if relu else -1.0, 1.0, 256)
    model = ov.Model([answer], [images], "layer")
    hint = "bf16" if precision == "bf16" else "f32"
    compiled = core().compile_model(model, "CPU", {**SETTINGS, "INFERENCE_PRECISION_HINT": hint, "PERF_COUNT": True})
    request = compiled.create_infer_request()
    given = rng.random((1, layer.before, layer.size, layer.size), np.float32)
    kinds = ("Convolution", "FullyConnected", "MatMul")

    def timed() -> float:
        request.infer([given], share_inputs=True)
        spent = [node.real_time for node in request.profiling_info if node.node_type in kinds]
        return sum(1e3 * each.total_seconds() for each in spent)

    timed()
    executed = [node.exec_type for node in request.profiling_info if node.node_type in kinds]
    if len(executed) != 1 or (precision == "int8") != ("I8" in executed[0].upper()):
        raise RuntimeError(f"OpenVINO computes {layer.name} in {precision} by {executed}")
    return timed


def _quantised(node: Any, low: float, high: float, levels: int) -> Any:
    from openvino import opset13 as op

    ends = [op.constant(np.float32(end)) for end in (low, high)]
    return op.fake_quantize(node, *ends, *ends, levels)


def kernels(layer: Layer, precision: str) -> dict[str, Timed]:
    """Whatever is at hand that computes the layer in the precision."""
    found = {
        f"OpenVINO{', ReLU' if relu else ''}": by_openvino(layer, precision, relu)
        for relu in (False, True)
    }  # fmt: skip
    if precision != "int8":
        found["oneDNN by torch"] = by_torch(layer, precision)
    return found


def models(artifact: Path, precisions: list[str]) -> dict[str, Timed]:
    """torch, and ours in each precision."""
    sys.path[:0] = [str(CHECKOUT / "inference"), str(Path(__file__).parent / "servers")]
    import torch
    from classifier import Classifier

    from predictor import Predictor

    eager, tensor = Classifier(artifact).model, torch.rand(1, 3, 224, 224)
    crop = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)

    def torch_timed() -> float:
        with torch.inference_mode():
            began = time.perf_counter()
            eager(tensor).softmax(1)
            return 1e3 * (time.perf_counter() - began)

    def timed(predictor: Predictor) -> Timed:
        def run() -> float:
            began = time.perf_counter()
            predictor.predict(crop)
            return 1e3 * (time.perf_counter() - began)

        return run

    return {"torch, eager": torch_timed} | {each: timed(Predictor(artifact, each)) for each in precisions}


def batched(artifact: Path, precision: str, batch: int) -> Timed:
    """The time for each picture of a batch, as the predictor compiles the model."""
    from predictor import core

    model = core().read_model(artifact / ("int8/model.xml" if precision == "int8" else "model.xml"))
    model.reshape([batch, 224, 224, 3])
    hint = "bf16" if precision == "bf16" else "f32"
    request = core().compile_model(
        model, "CPU", {**SETTINGS, "INFERENCE_PRECISION_HINT": hint}
    ).create_infer_request()  # fmt: skip
    crops = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), np.uint8)

    def timed() -> float:
        began = time.perf_counter()
        request.infer([crops], share_inputs=True)
        return 1e3 * (time.perf_counter() - began) / batch

    return timed


def measure(timed: dict[Any, Timed], rounds: int, runs: int, step: Callable[[], None]) -> dict[Any, float]:
    """The lower quartile of each, all taking turns."""
    times: dict[Any, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, run in timed.items():
            run(), run()  # into the cache, which another one had
            times[name] += [run() for _ in range(runs)]
        step()
    return {name: percentile(found, 0.25) for name, found in times.items()}


def command() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="turns that everything has (10)")
    parser.add_argument("--runs", type=int, default=20, help="in each turn (20)")
    parser.add_argument("--quick", action="store_true", help="two rounds; bounds are not judged")
    return parser


def main() -> int:
    """The command."""
    parser = command()
    options = parser.parse_args()
    if options.quick:
        options.rounds = 2
    if min(options.rounds, options.runs) < 1:
        parser.error("--rounds and --runs must be at least 1")
    console = Console(stderr=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 120)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="model-") as folder, Progress(*columns, console=console) as progress:
        task = progress.add_task("a ResNet-18", total=1 + options.rounds)
        artifact = Path(folder, "artifact")
        made = subprocess.run(
            [sys.executable, "-m", "benchmarks.artifact", str(artifact)], cwd=CHECKOUT, capture_output=True, text=True
        )
        if made.returncode:
            raise RuntimeError(f"the model could not be made: {made.stderr[-1500:]}")
        precisions = [each for each in LEAST if each != "bf16" or not without_bf16()]
        timed: dict[Any, Timed] = models(artifact, precisions)
        shapes = layers(len(json.loads((artifact / "classes.json").read_text())))
        for precision in precisions:
            for batch in BATCHES:
                timed["batch", precision, batch] = batched(artifact, precision, batch)
            for layer in shapes:
                for kernel, run in kernels(layer, precision).items():
                    timed["layer", precision, layer, kernel] = run
        progress.update(task, description="all in turns", advance=1)
        found = measure(timed, options.rounds, options.runs, lambda: progress.advance(task))
    figures: dict[str, Any] = {"torch_ms": round(found["torch, eager"], 2)}
    table = Table("layer", "times", *precisions, title="ms of the fastest kernel by itself")
    fastest = {
        (precision, layer): min(
            (time_, f"{name[1]} {name[3]}")
            for name, time_ in found.items()
            if name[0] == "layer" and name[2] == layer and name[1] in precisions[: precisions.index(precision) + 1]
        )
        for precision in precisions
        for layer in shapes
    }
    for layer in shapes:
        cells = [f"{time_:.3f} {kernel}" for time_, kernel in (fastest[each, layer] for each in precisions)]
        table.add_row(layer.name, str(layer.count), *cells)
    console.print(table)
    table = Table(
        "", "ms", "ceiling ms", "of it", "at the best layer's speed", "times torch", *(f"batch of {n}" for n in BATCHES)
    )
    table.add_row("torch, eager", f"{found['torch, eager']:.2f}", "", "", "", "1")
    missed = []
    for precision in precisions:
        ceiling = sum(layer.count * fastest[precision, layer][0] for layer in shapes)
        best = max(layer.operations / fastest[precision, layer][0] for layer in shapes if layer.size > 1)
        ideal = sum(layer.count * layer.operations for layer in shapes) / best
        reached, per_picture = ceiling / found[precision], [found["batch", precision, n] for n in BATCHES]
        figures[precision] = {
            "ms": round(found[precision], 2),
            "ceiling_ms": round(ceiling, 2),
            "reached": round(reached, 3),
            "best_layer_gflops": round(best / 1e6),
            "at_best_layer_ms": round(ideal, 2),
            "times_torch": round(found["torch, eager"] / found[precision], 2),
            "ms_per_picture_of_batch": {n: round(time_, 2) for n, time_ in zip(BATCHES, per_picture, strict=True)},
        }
        table.add_row(
            f"Houndloop, {precision}", f"{found[precision]:.2f}", f"{ceiling:.2f}", f"{reached:.0%}",
            f"{ideal:.2f} ({best / 1e6:,.0f} GFLOP/s)", f"{found['torch, eager'] / found[precision]:.2f}",
            *(f"{time_:.2f}" for time_ in per_picture),
        )  # fmt: skip
        if reached < LEAST[precision]:
            missed.append(f"{precision} reaches {reached:.1%} of its ceiling; the bound is {LEAST[precision]:.0%}")
    console.print(table)
    for problem in missed:
        console.print(f"[red]{problem}" + (" (not judged: --quick)" if options.quick else ""))
    result = {
        "benchmark": "model",
        **figures,
        "rounds": options.rounds,
        "processor": processor(),
        "load": round(load, 1),
        "judged": not options.quick,
        "ok": not missed,
    }
    print(json.dumps(result))
    return 1 if missed and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main())
