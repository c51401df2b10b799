"""Makes a tiny dataset of pictures that differ in their pattern, and runs jobs as processes like a container."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
PATTERNS = ("dots", "plain", "stripes")


def draw(pattern: str, rng: np.random.Generator, side: int = 48) -> bytes:
    """A PNG with a pattern in two colours of any hue, with noise."""
    y, x = np.mgrid[:side, :side]
    shift = rng.uniform(0, 6)
    amount = {
        "plain": np.zeros((side, side)),
        "stripes": (np.sin((x + shift) * 0.7) > 0) * 1.0,
        "dots": ((np.sin((x + shift) * 0.5) * np.sin((y + shift) * 0.5)) > 0.5) * 1.0,
    }[pattern]
    dark, light = rng.uniform(0, 100, 3), rng.uniform(150, 255, 3)
    pixels = dark + (light - dark) * amount[..., None] + rng.normal(0, 8, (side, side, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_snapshot(folder: Path, per_class: int = 16, classes: tuple[str, ...] = PATTERNS, broken: int = 0) -> Path:
    """A dataset snapshot in `dataset/` and `images/`, as snapshot_dataset writes it; five eighths of it to train on."""
    rng = np.random.default_rng(7)
    (folder / "dataset").mkdir(parents=True)
    (folder / "images").mkdir()
    rows = []
    for name in classes:
        for number in range(per_class):
            data = draw(name, rng)
            split = "train" if number < per_class * 5 // 8 else "validation" if number % 2 else "test"
            rows.append((data, name, split))
    rows += [(b"no picture %d" % number, classes[0], "train") for number in range(broken)]
    lines = []
    for number, (data, name, split) in enumerate(rows):
        sha256 = hashlib.sha256(data).hexdigest()
        (folder / "images" / sha256).write_bytes(data)
        origin = f"s3://pictures/labelled/{name}/{number}.png"
        lines.append(json.dumps({"sha256": sha256, "class": name, "split": split, "origin": origin}))
    (folder / "dataset" / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "dataset" / "classes.json").write_text(json.dumps(sorted(classes)))
    return folder


def job_environment(opt_ml: Path) -> dict[str, str]:
    """What SageMaker sets for a training job whose /opt/ml is this folder."""
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'inference'}",
        "SM_MODEL_DIR": str(opt_ml / "model"),
        "SM_OUTPUT_DIR": str(opt_ml / "output"),
        "SM_CHANNEL_TRAINING": str(opt_ml / "input/data/training"),
        "SM_HOSTS": '["algo-1"]',
        "TRAINING_JOB_NAME": "a-training-job",
        "OMP_NUM_THREADS": "1",  # threads that wait for each other are slow on a busy machine,
    }


def start(script: str, *arguments: object, opt_ml: Path) -> subprocess.Popen:
    command = [sys.executable, "-u", str(ROOT / "training" / script), *map(str, arguments)]
    return subprocess.Popen(
        command, env=job_environment(opt_ml), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(script: str, *arguments: object, opt_ml: Path, code: int = 0) -> str:
    """Runs a job to its end; its log. Fails the test when the exit code is not `code`."""
    with start(script, *arguments, opt_ml=opt_ml) as job:
        log, _ = job.communicate(timeout=120)
    assert job.returncode == code, log
    return log


def prepare(snapshot: Path, output: Path, *arguments: object, code: int = 0) -> str:
    return run("prepare.py", "--image-size", 32, "--dataset", snapshot / "dataset", "--images", snapshot / "images",
               "--output", output, "--workers", 2, *arguments, opt_ml=output.parent, code=code)  # fmt: skip
