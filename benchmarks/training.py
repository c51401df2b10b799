"""Training beside the script that is mostly written first, and beside timm: same pictures, weights, cores, one run.

    pip install -r benchmarks/requirements.txt   # timm
    python -m benchmarks.training
    python -m benchmarks.training --data pictures --rounds 3
    python -m benchmarks.training --quick

Draws photographs (or takes --data, a folder of pictures for each class), every fifth for validation, and random weights
for ResNet-18, because its time does not depend on their values. In each round every contestant has its turn, so that a
busy moment of the machine meets all of them:

- Houndloop: prepare.py and train.py as the jobs run them, each a fresh process. Times are of whole processes, from
  start-up to the exported float32 model (not quantised), and prepare.py's time is counted with each training.
- classic: benchmarks/classic.py, and timm: benchmarks/timm_script.py. Their epochs are dealt out to the rounds; their
  time is one start-up and as many times the median epoch as were asked for. All epochs are really run unless
  --peer-epochs says fewer; then the table says so.
- a tuning job in the local SageMaker: eight trials of train.py with a frozen backbone, two at a time, timed from the
  request to its end, against two epochs of the classic script without its start-up.

Where CUDA is at hand, the fine-tuning is run once more with its profiler: images per second, utilisation of the GPU,
and the share of its time that it waits for the loader. Ends with 1 when a bound does not hold (BOUNDS; not judged with
--quick, where start-up is most of the time). The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import folders
from local.emulator import CHECKOUT, Emulator

TRAINING, INFERENCE = CHECKOUT / "training", CHECKOUT / "inference"
IMAGE_SIZE = 224
BATCH_SIZE = 32  # everybody's
TRIALS, PARALLEL = 8, 2  # the template's defaults
BUCKET = "training-benchmark"
PATIENCE = 1800.0  # seconds for a tuning job
MAX_WAIT_PERCENT = 5.0  # of a fine-tuning's time on a GPU, for its loader
LOOP_EPOCHS = 10  # of the fine-tuning that is watched on a GPU, at least
# How many times as fast as the classic script it must be, at least.
BOUNDS = {"head, classic": 20.0, "fine, classic": 2.5, "tuning": 1.0}


@dataclass(frozen=True)
class Run:
    """A process: its seconds by the clock and of the processor, and those of its epochs, if it tells them."""

    whole: float
    processor: float
    epochs: list[float]


def whole(runs: list[Run], epochs: int) -> float:
    """Seconds of a run of so many epochs: the median, or for those that tell their epochs put together from medians."""
    median_epoch = statistics.median(seconds) if (seconds := [each for run in runs for each in run.epochs]) else 0.0
    return statistics.median(run.whole - sum(run.epochs) for run in runs) + (epochs * median_epoch if seconds else 0.0)


class Workplace:
    """The pictures and weights in a folder, and the commands that work on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures, self.weights = folder / "pictures", folder / "weights" / "resnet18.pth"
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (CHECKOUT, TRAINING, INFERENCE)))}

    def fill(self, data: Path | None, count: int) -> dict[str, int]:
        """Pictures, snapshot and weights. Returns the number of pictures of each split."""
        if data:
            folders.copied(data, self.pictures)
        else:
            folders.drawn(self.pictures, count)
        folders.snapshot(self.pictures, self.folder)
        self.weights.parent.mkdir()
        program = "import model, sys, torch; torch.save(model._import_resnet18()().state_dict(), sys.argv[1])"
        self.run("-c", program, str(self.weights))
        return {split: len(list((self.pictures / split).glob("*/*"))) for split in ("train", "validation")}

    def run(self, *words: str, expect: str = "") -> Run:
        """A Python command. RuntimeError, with the end of what it said, when it fails or does not say `expect`."""
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=self.environment, text=True, capture_output=True
        )
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode or expect not in done.stdout:
            raise RuntimeError(
                f"{' '.join(words[:3])} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"
            )
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"epoch"')]
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Run(seconds, processor, [row["seconds"] for row in rows])

    def prepare(self, unfreeze: str) -> Run:
        """Decodes the pictures; for a frozen backbone, extracts their features as well."""
        shutil.rmtree(self.folder / "prepared", ignore_errors=True)
        words = ["--image-size", str(IMAGE_SIZE), "--dataset", "dataset", "--images", "images", "--output", "prepared"]
        return self.run(str(TRAINING / "prepare.py"), *words, "--weights", "weights", "--unfreeze", unfreeze)

    def train(self, unfreeze: str, epochs: int, profile: bool = False) -> Run:
        with tempfile.TemporaryDirectory(dir=self.folder) as job:
            words = ["--training", "prepared", "--weights", "weights", "--unfreeze", unfreeze]
            words += ["--epochs", str(epochs), "--patience", "1000", "--batch-size", str(BATCH_SIZE)]
            words += ["--image-size", str(IMAGE_SIZE), "--lr", "0.003", "--profile", str(profile).lower()]
            words += ["--int8", "false"]  # quantising is for serving, and nobody else here exports at all
            words += ["--model-dir", f"{job}/model", "--checkpoint-dir", f"{job}/checkpoints"]
            words += ["--output-dir", str(self.folder / "output")]
            return self.run(str(TRAINING / "train.py"), *words, expect=f"epoch={epochs};")  # not ended before

    def peer(self, module: str, unfreeze: str, epochs: int) -> Run:
        words = ["pictures", "--weights", str(self.weights), "--unfreeze", unfreeze, "--epochs", str(epochs)]
        return self.run("-m", f"benchmarks.{module}", *words, "--batch-size", str(BATCH_SIZE))

    def loop(self, epochs: int) -> dict[str, float]:
        """Of a profiled fine-tuning: images per second, percent of its time waiting for data, and of the GPU in use."""
        self.train("all", epochs, profile=True)
        summary = json.loads((self.folder / "output" / "data" / "findings.json").read_text())["summary"]
        found = {
            "images_per_second": round(BATCH_SIZE / summary["steps"]["seconds_p50"], 1),
            "wait_percent": summary["steps"]["wait_percent"],
        }
        if "gpu" in summary["system"]:
            found["gpu_percent"] = summary["system"]["gpu"]["p50"]
        return found


class Tuner:
    """Tuning jobs in the local SageMaker, asked for as the workflow asks for them."""

    def __init__(self, aws: Emulator, work: Workplace) -> None:
        self.work = work
        variables = aws.environment()
        session = boto3.Session(
            variables["AWS_ACCESS_KEY_ID"], variables["AWS_SECRET_ACCESS_KEY"], region_name=variables["AWS_REGION"]
        )
        self.s3: Any = session.client("s3", endpoint_url=aws.endpoint_url)
        self.sagemaker: Any = session.client("sagemaker", endpoint_url=aws.endpoint_url)
        iam: Any = session.client("iam", endpoint_url=aws.endpoint_url)
        trust = {"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}
        policy = {"Effect": "Allow", "Action": ["s3:*", "logs:*", "cloudwatch:PutMetricData"], "Resource": "*"}
        self.role = iam.create_role(RoleName="jobs", AssumeRolePolicyDocument=document(trust))["Role"]["Arn"]
        iam.put_role_policy(RoleName="jobs", PolicyName="jobs", PolicyDocument=document(policy))
        self.s3.create_bucket(Bucket=BUCKET)
        source = io.BytesIO()
        with tarfile.open(fileobj=source, mode="w:gz") as tar:
            for path in (*TRAINING.glob("*.py"), INFERENCE / "preprocessing.py"):
                tar.add(path, path.name)
        self.s3.put_object(Bucket=BUCKET, Key="code/sourcedir.tar.gz", Body=source.getvalue())
        self.s3.upload_file(str(work.weights), BUCKET, "weights/resnet18.pth")

    def upload(self) -> None:
        """Puts the output of the prepare job where the processing job would."""
        for path in sorted((self.work.folder / "prepared").iterdir()):
            self.s3.upload_file(str(path), BUCKET, f"prepared/{path.name}")

    def run(self, name: str, epochs: int) -> float:
        """Seconds that a tuning job of TRIALS trials takes. Raises RuntimeError when not all of them complete."""
        began = time.perf_counter()
        self.sagemaker.create_hyper_parameter_tuning_job(
            HyperParameterTuningJobName=name,
            HyperParameterTuningJobConfig={
                "Strategy": "Bayesian",
                "HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": "validation:accuracy"},
                "ResourceLimits": {"MaxNumberOfTrainingJobs": TRIALS, "MaxParallelTrainingJobs": PARALLEL},
                "ParameterRanges": {
                    "ContinuousParameterRanges": [
                        {"Name": "lr", "MinValue": "0.0003", "MaxValue": "0.03", "ScalingType": "Logarithmic"}
                    ],
                    "CategoricalParameterRanges": [{"Name": "batch-size", "Values": ["16", "32", "64"]}],
                },
            },
            TrainingJobDefinition={
                "StaticHyperParameters": {
                    "sagemaker_program": "train.py",
                    "sagemaker_submit_directory": f"s3://{BUCKET}/code/sourcedir.tar.gz",
                    "image-size": str(IMAGE_SIZE),
                    "unfreeze": "none",
                    "epochs": str(epochs),
                    "patience": "1000",
                    "profile": "false",
                    "export": "false",
                },
                "AlgorithmSpecification": {
                    "TrainingImage": "local/training:latest",
                    "TrainingInputMode": "File",
                    "MetricDefinitions": [{"Name": "validation:accuracy", "Regex": r"validation:accuracy=([0-9\.]+);"}],
                },
                "InputDataConfig": [channel("training", "prepared"), channel("weights", "weights")],
                "OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/trials"},
                "ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 50},
                "StoppingCondition": {"MaxRuntimeInSeconds": int(PATIENCE)},
                "RoleArn": self.role,
            },
        )
        while True:
            found = self.sagemaker.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName=name)
            if found["HyperParameterTuningJobStatus"] not in ("InProgress", "Stopping"):
                break
            if time.perf_counter() - began > PATIENCE:
                raise RuntimeError(f"the tuning job takes more than {PATIENCE:.0f} s")
            time.sleep(0.2)
        seconds = time.perf_counter() - began
        if found["TrainingJobStatusCounters"]["Completed"] != TRIALS:
            raise RuntimeError(f"the tuning job ended with {found['TrainingJobStatusCounters']}")
        return seconds


def document(statement: dict) -> str:
    """A policy of one statement."""
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


def channel(name: str, prefix: str) -> dict:
    """An input channel: what is below a prefix of the bucket."""
    source = {
        "S3DataType": "S3Prefix",
        "S3Uri": f"s3://{BUCKET}/{prefix}/",
        "S3DataDistributionType": "FullyReplicated",
    }
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}}


def dealt(epochs: int, rounds: int, number: int) -> int:
    """How many of the epochs fall to this round, when they are dealt out evenly."""
    return epochs * (number + 1) // rounds - epochs * number // rounds


Measured = dict[tuple[str, str], list[Run]]  # by task and contestant


def measure(work: Workplace, tuner: Tuner, options: argparse.Namespace, step: Callable[[str], None]) -> Measured:
    """All rounds. `step` is told what begins."""
    found: Measured = {}

    def add(task: str, who: str, run: Run) -> None:
        found.setdefault((task, who), []).append(run)

    for number in range(options.rounds):
        for task, unfreeze, epochs in (("fine", "all", options.fine_epochs), ("head", "none", options.epochs)):
            step(f"Houndloop: {task}, prepare")
            add(f"prepare, {task}", "Houndloop", work.prepare(unfreeze))
            step(f"Houndloop: {task}, {epochs} epochs")
            add(task, "Houndloop", work.train(unfreeze, epochs))
            for who, module in (("classic", "classic"), ("timm", "timm_script")):
                share = dealt(min(epochs, options.peer_epochs), options.rounds, number)
                step(f"{who}: {task}, {share} epochs")
                if share:
                    add(task, who, work.peer(module, unfreeze, share))
        step(f"Houndloop: tuning job, {TRIALS} trials")
        tuner.upload()  # as the prepare job would have
        add("tuning", "Houndloop", Run(tuner.run(f"tune-{number}", options.epochs), 0.0, []))
    return found


STEPS = 9  # that `measure` tells of in each round


def seconds_of(found: Measured, options: argparse.Namespace) -> dict[str, float]:
    """Seconds by task and contestant; Houndloop's trainings with the preparing that they need."""
    epochs = {"head": options.epochs, "fine": options.fine_epochs}
    seconds = {f"{task}, {who}": whole(runs, epochs.get(task, 0)) for (task, who), runs in found.items()}
    for task in epochs:
        seconds[f"{task}, Houndloop"] += seconds[f"prepare, {task}, Houndloop"]
    epoch = statistics.median(each for run in found["head", "classic"] for each in run.epochs)
    return seconds | {"two epochs, classic": 2 * epoch}


def show(found: Measured, seconds: dict[str, float], options: argparse.Namespace, title: str) -> Table:
    """The table of everything."""
    table = Table("task", "who", "seconds", "each run", "median epoch", "processor, a run", "Houndloop is", title=title)
    names = {"head": f"fc alone, {options.epochs} epochs", "fine": f"all layers, {options.fine_epochs} epochs"}
    for task, epochs in (("head", options.epochs), ("fine", options.fine_epochs)):
        run = f", {options.peer_epochs} run and scaled" if options.peer_epochs < epochs else ""
        for who in ("classic", "timm"):
            table.add_row(names[task] + run, who, *row(found[task, who], seconds[f"{task}, {who}"]),
                          f"{seconds[f'{task}, {who}'] / seconds[f'{task}, Houndloop']:.2f} x")  # fmt: skip
        table.add_row(names[task], "Houndloop, in all", f"{seconds[f'{task}, Houndloop']:.1f}")
        for part in (f"prepare, {task}", task):
            name = "  prepare.py" if part.startswith("prepare") else "  train.py"
            table.add_row("", name, *row(found[part, "Houndloop"], whole(found[part, "Houndloop"], 0)))
        table.add_section()
    two, tuning = seconds["two epochs, classic"], seconds["tuning, Houndloop"]
    table.add_row("two epochs of fc alone", "classic", f"{two:.1f}", "", "", "", f"{two / tuning:.2f} x")
    jobs = " ".join(f"{run.whole:.1f}" for run in found["tuning", "Houndloop"])
    table.add_row(f"{TRIALS} trials of {options.epochs} epochs", "Houndloop, tuning job", f"{tuning:.1f}", jobs)
    both = tuning + seconds["prepare, head, Houndloop"]
    table.add_row("", "  with its prepare.py", f"{both:.1f}", "", "", "", f"{two / both:.2f} x")
    return table


def row(runs: list[Run], seconds: float) -> list[str]:
    """Cells: seconds, those of each run, the median epoch, the processor's of a run."""
    epochs = [each for run in runs for each in run.epochs]
    return [
        f"{seconds:.1f}",
        " ".join(f"{run.whole:.1f}" for run in runs),
        f"{statistics.median(epochs):.2f}" if epochs else "",
        f"{statistics.median(run.processor for run in runs):.1f}",
    ]


def command() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder of pictures for each class, instead of drawn ones")
    parser.add_argument("--pictures", type=int, default=1000, help="how many are drawn (1,000)")
    parser.add_argument("--rounds", type=int, default=2, help="turns that everybody has (2)")
    parser.add_argument("--epochs", type=int, default=10, help="of fc alone, and of each trial (10)")
    parser.add_argument("--fine-epochs", type=int, default=2, help="of all layers (2)")
    parser.add_argument(
        "--peer-epochs", type=int, default=1000, help="that the peers really run; the rest is scaled (all)"
    )
    parser.add_argument("--quick", action="store_true", help="140 pictures, one round, two epochs of the peers")
    return parser


def main() -> int:
    """The command."""
    parser = command()
    options = parser.parse_args()
    if options.quick:
        options.pictures, options.rounds, options.peer_epochs = 140, 1, 2
    if min(options.rounds, options.epochs, options.fine_epochs, options.peer_epochs) < 1:
        parser.error("--rounds and the numbers of epochs must be at least 1")
    if importlib.util.find_spec("timm") is None:
        parser.error("timm is not installed: pip install -r benchmarks/requirements.txt")
    console = Console(stderr=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 160)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    load = os.getloadavg()[0]
    loop: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory(prefix="training-benchmark-") as folder,
        Progress(*columns, console=console) as bar,
    ):
        task = bar.add_task("pictures", total=1 + STEPS * options.rounds)
        work = Workplace(Path(folder, "work"))
        work.folder.mkdir()
        try:
            pictures = work.fill(options.data, options.pictures)
        except ValueError as error:
            parser.error(str(error))

        def step(name: str) -> None:
            bar.update(task, description=name, advance=1)

        with Emulator(state=Path(folder, "state")) as aws:
            found = measure(work, Tuner(aws, work), options, step)
        import torch

        if torch.cuda.is_available():
            bar.update(task, description="Houndloop: the loop on the GPU")
            loop = work.loop(max(options.fine_epochs, LOOP_EPOCHS))
        bar.update(task, description="done", advance=1)
    seconds = seconds_of(found, options)
    ratios = {
        f"{task}, {who}": seconds[f"{task}, {who}"] / seconds[f"{task}, Houndloop"]
        for task in ("head", "fine")
        for who in ("classic", "timm")
    }
    ratios["tuning"] = seconds["two epochs, classic"] / seconds["tuning, Houndloop"]
    title = f"{pictures['train']} + {pictures['validation']} pictures, rounds: {options.rounds}; seconds"
    console.print(show(found, seconds, options, title))
    broken = [
        f"{name}: {ratios[name]:.2f} times as fast; the bound is {bound:g}"
        for name, bound in BOUNDS.items()
        if ratios[name] < bound
    ]
    if loop:
        console.print(f"fine-tuning on the GPU: {loop}")
        if loop["wait_percent"] > MAX_WAIT_PERCENT:
            broken.append(f"the GPU waits {loop['wait_percent']:.1f} % of the time for the loader")
    else:
        console.print("no GPU here: its utilisation was not measured")
    for problem in broken:
        console.print(f"[red]{problem}" + (" (not judged: --quick)" if options.quick else ""))
    result = {
        "benchmark": "training",
        "pictures": pictures,
        "rounds": options.rounds,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "times_faster": {name: round(ratio, 2) for name, ratio in ratios.items()},
        "gpu": loop or None,
        "load": round(load, 1),
        "judged": not options.quick,
        "ok": not broken,
    }
    print(json.dumps(result))
    return 1 if broken and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main())
