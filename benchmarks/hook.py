"""What smdebug's hook costs a training, and with it the timer, the sampler and the rules' process.

    python -m benchmarks.hook
    python -m benchmarks.hook --unfreeze none --rounds 15
    python -m benchmarks.hook --unfreeze all --steps 20 --rounds 5

Trains ResNet-18 at its real size on random pictures, or its head on random features, with the loop of train.py: as it
is, with the hook, and with everything that `profile=true` adds, in turns, so that a busy moment of the machine meets
all three. A round is a training of ten epochs from its first step on, the saves of the first steps included; importing
smdebug is not, because it comes before. An overhead is the median over the rounds of the ratio of two times: of the
clock, or of this process's use of the processor, which says more on a busy machine. What is not this process, the
rules', shows in the clock as far as it is in the way.

Ends with 1 if the hook's overhead is above 5 % by the clock for one of `none`, `layer4` and `all`; with --processor, if
it is by the processor. The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

CHECKOUT = Path(__file__).resolve().parent.parent
MAX_OVERHEAD = 0.05
CLASSES, EPOCHS, BATCH, SIDE, FEATURES = 133, 10, 16, 224, 512
VARIANTS = ("plain", "hook", "profile")
# Steps of an epoch and rounds, by what is trained: 2,000 pictures for a head; fewer where a step takes half a second.
SIZES = {"none": (125, 15), "layer4": (8, 5), "all": (8, 5)}


class Batches:
    """Random batches that are there at once: whatever waiting there is comes from elsewhere."""

    def __init__(self, unfreeze: str, steps: int, device: torch.device) -> None:
        self.steps_per_epoch = steps
        if unfreeze == "none":
            self.inputs = torch.randn(steps, BATCH, FEATURES, device=device)
        else:
            pictures = torch.randn(BATCH, 3, SIDE, SIDE, device=device).contiguous(memory_format=torch.channels_last)
            self.inputs = pictures.expand(steps, *pictures.shape)
        self.labels = torch.randint(CLASSES, (steps, BATCH), device=device)

    def train(self, epoch: int, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for step in range(start, self.steps_per_epoch):
            yield self.inputs[step], self.labels[step]

    def evaluation(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for step in range(max(1, self.steps_per_epoch // 8)):
            yield self.inputs[step], self.labels[step]


@dataclass
class Round:
    """One training: seconds by the clock and of this process, and what its hook counts as its own."""

    clock: float
    processor: float
    counted: float = 0.0
    saves: int = 0


def train(unfreeze: str, steps: int, variant: str, folder: Path) -> Round:
    """Ten epochs, as in train.py; `variant`: one of VARIANTS."""
    import model as models
    from checkpoint import State
    from debugging import Hook
    from precision import Precision
    from profiling import Profile
    from steps import BalancedLoss, Learner, evaluate, train_one_epoch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    trained: Any = nn.Linear(FEATURES, CLASSES) if unfreeze == "none" else models.build(CLASSES)
    if unfreeze != "none":
        models.set_trainable(trained, unfreeze)
    trained = trained.to(device, memory_format=torch.channels_last)
    source, precision, state = Batches(unfreeze, steps, device), Precision(device), State()
    criterion = BalancedLoss(torch.ones(CLASSES, device=device), label_smoothing=0.1)
    optimizer = torch.optim.AdamW(models.parameter_groups(trained, 0.05), lr=1e-4, fused=True)
    total = EPOCHS * steps
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-4, total_steps=total + 1, cycle_momentum=False)
    learner = Learner(trained, criterion, optimizer, scheduler, precision)
    profile, hook = None, None
    if variant == "hook":
        hook = Hook(folder / "tensors", trained, criterion, total)
        learner.before_step = hook.before_step
    elif variant == "profile":
        options = SimpleNamespace(loader_workers=1, warm_up=0.25)
        profile = Profile(folder, trained, criterion, device, options, total)
        learner.timer, learner.before_step, hook = profile.timer, profile.before_step, profile.hook
        assert hook is not None, profile.error
    with profile or nullcontext():
        clock, processor = time.perf_counter(), time.process_time()
        for _ in range(EPOCHS):
            models.train_mode(trained)
            train_one_epoch(learner, source, state, lambda: False)
            trained.eval()
            if hook:
                hook.pause()
            loss, accuracy, _ = evaluate(trained, source.evaluation(), criterion, precision)
            metrics = state.end_epoch(loss, accuracy, 0.0)
            if hook:
                hook.epoch(metrics["train_loss"], metrics["validation_loss"])
        clock, processor = time.perf_counter() - clock, time.process_time() - processor
    if hook is None:
        return Round(clock, processor)
    if profile is None:
        hook.close()
    elif profile.rules is not None:
        profile.rules.close()
    assert not hook.error, hook.error
    saves = sum(1 for _ in (folder / "tensors" / "index").rglob("*.json"))
    return Round(clock, processor, sum(kind.spent for kind in hook.allowances.values()), saves)


def main() -> int:
    """The command."""
    command = argparse.ArgumentParser(
        prog="python -m benchmarks.hook", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("--unfreeze", nargs="+", choices=list(SIZES), default=list(SIZES))
    command.add_argument("--steps", type=int, help="of an epoch (125 for none, 8 for the others)")
    command.add_argument("--rounds", type=int, help="of three trainings each (15 for none, 5 for the others)")
    command.add_argument("--threads", type=int, default=1, help="that compute (1)")
    command.add_argument("--processor", action="store_true", help="judge by the processor's time: a busy machine")
    arguments = command.parse_args()
    if any(number is not None and number < 1 for number in (arguments.steps, arguments.rounds, arguments.threads)):
        command.error("--steps, --rounds and --threads must be at least 1")
    sys.path[:0] = [str(CHECKOUT / "training"), str(CHECKOUT / "inference")]
    torch.set_num_threads(arguments.threads)
    console = Console(stderr=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 160)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    sizes = {name: (arguments.steps or SIZES[name][0], arguments.rounds or SIZES[name][1]) for name in SIZES}
    rounds: dict[str, list[dict[str, Round]]] = {name: [] for name in arguments.unfreeze}
    with tempfile.TemporaryDirectory(prefix="hook-") as scratch, Progress(*columns, console=console) as progress:
        task = progress.add_task("trainings", total=sum(sizes[name][1] for name in rounds) * len(VARIANTS))
        for name, done in rounds.items():
            steps, count = sizes[name]
            progress.update(task, description=f"unfreeze {name}")
            train(name, 2, "hook", Path(scratch))  # imports, and the first use of every kernel
            for number in range(count):
                turn: dict[str, Round] = {}
                for variant in VARIANTS if number % 2 else reversed(VARIANTS):
                    turn[variant] = train(name, steps, variant, Path(scratch))
                    progress.advance(task)
                done.append(turn)
    title = f"{EPOCHS} epochs, batches of {BATCH}, torch {torch.__version__}"
    heads = ("step ms", "hook", "hook, processor", "hook's own count", "saves", "profile", "profile, processor")
    table = Table("unfreeze", *heads, title=title)
    overheads, result = {}, {}
    for name, done in rounds.items():
        step = 1e3 * statistics.median(turn["plain"].clock for turn in done) / (EPOCHS * sizes[name][0])
        row = {"step_ms": round(step, 3)}
        for variant in VARIANTS[1:]:
            for measure, suffix in (("clock", ""), ("processor", "_processor")):
                ratios = [getattr(turn[variant], measure) / getattr(turn["plain"], measure) for turn in done]
                row[variant + suffix] = round(statistics.median(ratios) - 1, 4)
        row["hook_count"] = round(statistics.median(turn["hook"].counted / turn["hook"].clock for turn in done), 4)
        row["saves"] = statistics.median(turn["hook"].saves for turn in done)
        percent = {key: f"{value:+.1%}" for key, value in row.items()}
        table.add_row(name, f"{step:.2f}", percent["hook"], percent["hook_processor"], percent["hook_count"],
                      f"{row['saves']:g}", percent["profile"], percent["profile_processor"])  # fmt: skip
        overheads[name] = row["hook_processor" if arguments.processor else "hook"]
        result[name] = row
    console.print(table)
    broken = [name for name, overhead in overheads.items() if overhead > MAX_OVERHEAD]
    for name in broken:
        console.print(f"[red]unfreeze {name}: the overhead is {overheads[name]:.1%}; the limit is {MAX_OVERHEAD:.0%}")
    print(json.dumps({"benchmark": "hook", **result, "load": round(os.getloadavg()[0], 1), "ok": not broken}))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
