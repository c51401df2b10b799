"""From a JPEG's bytes to what the model takes: `inference/preprocessing.py` beside torchvision's reference transforms.

    python -m benchmarks.preprocessing
    python -m benchmarks.preprocessing --quick

The reference: Pillow decodes the whole picture, converts it to RGB, and torchvision's transforms make the model's input
of it: Resize(256), CenterCrop(224), to float, Normalize. Judged is the preset that comes with torchvision's weights;
v1 and v2 composed by hand are shown. Ours ends with a crop of bytes, because the exported model normalises by itself.
So both are measured to the same point, the normalised floats: what the model's first step takes alone, compiled by
OpenVINO, counts with ours. The rows also show both without normalising, from the file to the crop of bytes.

Pictures are drawn: 500x375 and 375x500 of 76 kB, and 4000x3000 of 3.5 MB. The large ones are drawn at half the size
and enlarged, because a camera's colour filter and lens leave no detail of single pixels either, and `prepare` decodes
them at a quarter of their size. `noise` are large ones with full detail in every single pixel, harder than a
photograph: they are shown and not judged.

Everything runs on one thread and takes turns, round by round; times are medians of processor time. Deviations are
those of the crop of bytes from the reference's, in levels of 255, of all pixels of all pictures.

Ends with 1 when ours is less than 1.4 times as fast for small pictures or 3 times for large ones, when a single pixel
of a small one differs, or when large ones differ by more than 0.25 on average (not judged with --quick, but for the
deviations). The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.ingestion import encode, photographs, scene
from benchmarks.serving import processor
from local.emulator import CHECKOUT

SMALL, LARGE = 8, 2  # pictures of each kind
FASTER = {"small": 1.4, "portrait": 1.4, "large": 3.0}
DEVIATION = {"small": 0.0, "portrait": 0.0, "large": 0.25}  # levels, on average
LARGE_BYTES = 3_500_000
PRESET = "torchvision's preset"


def smooth(width: int, height: int, target: int, count: int) -> Iterator[bytes]:
    """JPEGs of about `target` bytes whose detail ends at two pixels."""
    for seed in range(count):
        image = scene(width // 2, height // 2, seed).resize((width, height), Image.Resampling.BICUBIC)
        low, high = 50, 100
        while low < high:
            quality = (low + high) // 2
            low, high = (low, quality) if len(encode(image, quality)) >= target else (quality + 1, high)
        yield encode(image, low)


def pictures() -> dict[str, list[bytes]]:
    return {
        "small": list(photographs(500, 375, 76_000, SMALL, seed=0)),
        "portrait": list(photographs(375, 500, 76_000, SMALL, seed=1)),
        "large": list(smooth(4000, 3000, LARGE_BYTES, LARGE)),
        "noise": list(photographs(4000, 3000, LARGE_BYTES, 1, seed=0)),
    }


def normalised_by_openvino(spec: Any) -> Callable[[bytes], Any]:
    """The first step of the exported model, compiled by itself: bytes of a crop to float32 [1, size, size, 3]."""
    import openvino as ov
    import torch

    from convert import core, to_openvino
    from data import Normalise

    class First(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normalise = Normalise(spec, torch.device("cpu"))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.normalise(images).permute(0, 2, 3, 1)  # as it lies in memory, which is how convolutions take it

    shape = [1, spec.size, spec.size, 3]
    model = to_openvino(First().eval(), (torch.zeros(*shape, dtype=torch.uint8),), ("images", shape, ov.Type.u8))
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core().compile_model(model, "CPU", settings).create_infer_request()

    def normalise(pixels: bytes) -> Any:
        request.infer([np.frombuffer(pixels, np.uint8).reshape(shape)], share_inputs=True)
        return request.get_output_tensor().data

    return normalise


def contestants() -> tuple[dict[str, Callable[[bytes], Any]], dict[str, Callable[[bytes], Any]]]:
    """Ways to the crop of bytes, and ways to the model's input."""
    sys.path[:0] = [str(CHECKOUT / "training"), str(CHECKOUT / "inference")]
    import torch

    import model
    from preprocessing import Preprocess, prepare

    model.build(classes=2)  # which makes torchvision importable where its wheel was built for CUDA
    torch.set_num_threads(1)
    from torchvision import transforms as v1
    from torchvision.transforms import v2
    from torchvision.transforms._presets import ImageClassification

    spec = Preprocess.default()
    cropped = v1.Compose([v1.Resize(spec.resize), v1.CenterCrop(spec.size)])
    cropped2 = v2.Compose([v2.Resize(spec.resize), v2.CenterCrop(spec.size)])
    normal = (spec.mean, spec.std)
    first = v1.Compose([cropped, v1.ToTensor(), v1.Normalize(*normal)])
    second = v2.Compose(
        [cropped2, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*normal)]
    )  # fmt: skip
    preset = ImageClassification(crop_size=spec.size, resize_size=spec.resize)
    normalise = normalised_by_openvino(spec)

    def picture(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    to_bytes: dict[str, Callable[[bytes], Any]] = {
        "Houndloop": lambda data: prepare(data, spec).pixels,
        "torchvision v1": lambda data: np.asarray(cropped(picture(data))),
        "torchvision v2": lambda data: np.asarray(cropped2(picture(data))),
    }
    to_input: dict[str, Callable[[bytes], Any]] = {
        "Houndloop, normalised by OpenVINO": lambda data: normalise(prepare(data, spec).pixels),
        "torchvision v1": lambda data: first(picture(data)),
        "torchvision v2": lambda data: second(picture(data)),
        PRESET: lambda data: preset(picture(data)),
    }
    return to_bytes, to_input


def deviation(ours: Callable[[bytes], Any], reference: Callable[[bytes], Any], some: list[bytes]) -> tuple[float, int]:
    """Of the crops of some pictures: on average, and the largest."""
    found = []
    for data in some:
        expected = np.asarray(reference(data), int)
        found.append(np.abs(np.frombuffer(ours(data), np.uint8).reshape(expected.shape) - expected))
    return float(np.mean(found)), int(np.max(found))


def command() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preprocessing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=15, help="turns that everything has (15)")
    parser.add_argument("--quick", action="store_true", help="two rounds; times are not judged")
    return parser


def main() -> int:
    """The command."""
    parser = command()
    options = parser.parse_args()
    if options.quick:
        options.rounds = 2
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    console = Console(stderr=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 120)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    load = os.getloadavg()[0]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("pictures", total=1 + options.rounds)
        drawn = pictures()
        progress.update(task, description="all in turns", advance=1)
        to_bytes, to_input = contestants()
        ways = {("bytes", name): way for name, way in to_bytes.items()}
        ways |= {("input", name): way for name, way in to_input.items()}
        times: dict[Any, list[float]] = {(kind, *way): [] for kind in drawn for way in ways}
        for _ in range(options.rounds):
            for kind, some in drawn.items():
                for way, run in ways.items():
                    run(some[0])  # into the cache, which another one had
                    began = time.process_time()
                    for _ in range(5 if kind in ("small", "portrait") else 1):
                        for data in some:
                            run(data)
                    repeated = len(some) * (5 if kind in ("small", "portrait") else 1)
                    times[kind, *way].append(1e3 * (time.process_time() - began) / repeated)
            progress.advance(task)
        deviations = {
            kind: deviation(to_bytes["Houndloop"], to_bytes["torchvision v1"], some) for kind, some in drawn.items()
        }
    found = {name: statistics.median(each) for name, each in times.items()}
    figures: dict[str, Any] = {}
    table = Table("ms a picture", *drawn, title="one thread")
    for end, name in ways:
        table.add_row(f"to {'bytes' if end == 'bytes' else 'the model'}: {name}",
                      *(f"{found[kind, end, name]:.2f}" for kind in drawn))  # fmt: skip
    for kind in drawn:
        ours, plain = found[kind, "input", "Houndloop, normalised by OpenVINO"], found[kind, "bytes", "Houndloop"]
        best = found[kind, "input", PRESET]
        best_plain = min(found[kind, "bytes", name] for name in to_bytes if not name.startswith("Houndloop"))
        figures[kind] = {
            "ours_ms": round(ours, 3),
            "reference_ms": round(best, 3),
            "times_faster": round(best / ours, 2),
            "to_bytes_ms": round(plain, 3),
            "reference_to_bytes_ms": round(best_plain, 3),
            "times_faster_to_bytes": round(best_plain / plain, 2),
            "mean_deviation": round(deviations[kind][0], 4),
            "largest_deviation": deviations[kind][1],
        }
    table.add_section()
    for what, label in [
        ("times_faster", "times as fast as the preset, to the model"),
        ("times_faster_to_bytes", "as the faster of v1 and v2, to bytes"),
        ("mean_deviation", "deviation of the bytes, on average (levels)"),
        ("largest_deviation", "the largest"),
    ]:
        table.add_row(label, *(str(figures[kind][what]) for kind in drawn))
    console.print(table)
    slow = [
        f"{kind}: {figures[kind]['times_faster']} times as fast; the bound is {bound:g}"
        for kind, bound in FASTER.items()
        if figures[kind]["times_faster"] < bound
    ]
    other = [
        f"{kind}: deviates by {deviations[kind][0]:.3f} levels; the bound is {bound:g}"
        for kind, bound in DEVIATION.items()
        if deviations[kind][0] > bound
    ]
    for problem in other:
        console.print(f"[red]{problem}")
    for problem in slow:
        console.print(f"[red]{problem}" + (" (not judged: --quick)" if options.quick else ""))
    result = {
        "benchmark": "preprocessing",
        **figures,
        "rounds": options.rounds,
        "processor": processor(),
        "load": round(load, 1),
        "judged": not options.quick,
        "ok": not slow and not other,
    }
    print(json.dumps(result))
    return 1 if other or (slow and not options.quick) else 0


if __name__ == "__main__":
    sys.exit(main())
