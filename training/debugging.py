"""smdebug in the training: the hook that saves tensors' statistics, and the rules run over what it saved.

SageMaker Debugger's service is closed to new accounts, its library still works. It needs three helping hands: a new
protobuf must run in pure Python, one call to a method that NumPy removed, and, in AWS's training container, to be
installed from the wheel in the source archive without its pinned dependencies.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import rules
from rules import Finding, Observations

# A save costs a few milliseconds for each layer, so few steps are saved in full: the first two, where a bad start
# shows, and some spread over the run.
FULL_SAVES = 7
LOSS_SAVES = 200  # a loss is one number; still a file each


def load_smdebug() -> Any:
    """The module smdebug.pytorch, ready for this container. ImportError when it cannot be had."""
    if _new_protobuf():
        os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
    os.environ.setdefault("SMDEBUG_LOG_LEVEL", "warning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import smdebug.pytorch as smd
        except ImportError:
            _install_wheel()
            import smdebug.pytorch as smd
    _repair_tostring()
    return smd


def _new_protobuf() -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return int(version("protobuf").split(".")[0]) >= 4
    except PackageNotFoundError:
        return False


def _install_wheel() -> None:
    """Installs the smdebug wheel that lies beside this file, without the old dependencies that it pins."""
    wheels = sorted(Path(__file__).parent.glob("smdebug-*.whl"))
    if not wheels:
        raise ImportError("smdebug is not installed and no smdebug-*.whl lies beside train.py: "
                          "pip install --no-deps smdebug==1.0.34, or profile=false")  # fmt: skip
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", str(wheels[-1])]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise ImportError(f"{wheels[-1].name} could not be installed: {done.stderr.strip()[-500:]}")
    import importlib

    importlib.invalidate_caches()


def _repair_tostring() -> None:
    """smdebug calls `ndarray.tostring`, which NumPy 2.3 removed: its module gets a make_tensor_proto that does not."""
    import numpy as np

    if hasattr(np.ndarray, "tostring"):
        return
    from smdebug.core.tfevent import util

    class Array(np.ndarray):
        def tostring(self) -> bytes:
            return self.tobytes()

    original = util.make_tensor_proto
    if getattr(original, "repaired", False):
        return

    def make_tensor_proto(nparray_data, tag):
        return original(np.asarray(nparray_data).view(Array), tag)

    make_tensor_proto.repaired = True  # type: ignore[attr-defined]
    for name, module in list(sys.modules.items()):
        if name.startswith("smdebug") and getattr(module, "make_tensor_proto", None) is original:
            module.make_tensor_proto = make_tensor_proto  # type: ignore[attr-defined]


def full_save_steps(total_steps: int) -> list[int]:
    """The steps at which statistics of all layers are saved: the first two, the last, and some evenly between."""
    spread = max(1, total_steps // (FULL_SAVES - 3))
    return sorted({0, 1, *range(0, total_steps, spread), total_steps - 1} & set(range(total_steps)))


def loss_interval(train_steps: int) -> int:
    """Every how many steps a loss is saved."""
    return max(1, train_steps // LOSS_SAVES)


def make_hook(smd: Any, folder: Path, model: Any, criterion: Any, train_steps: int) -> Any:
    """A hook on `model` and `criterion` that writes to `folder`, which must not exist yet.

    At few steps of training: of gradients mean, standard deviation, norm, and mean and maximum of the absolute values;
    of weights mean and absolute maximum. Losses: both modes. Call `set_mode` at the start of each phase and
    `close` at the end.
    """
    from smdebug.core.modes import ModeKeys

    some = smd.SaveConfigMode(save_steps=full_save_steps(train_steps))
    never = smd.SaveConfigMode(start_step=2**31)
    full = smd.SaveConfig({ModeKeys.TRAIN: some, ModeKeys.EVAL: never})
    losses = smd.SaveConfig({ModeKeys.TRAIN: smd.SaveConfigMode(save_interval=loss_interval(train_steps)),
                             ModeKeys.EVAL: smd.SaveConfigMode(save_interval=1)})  # fmt: skip
    statistics = smd.ReductionConfig(reductions=["mean", "std"], abs_reductions=["mean", "max"], norms=["l2"])
    hook = smd.Hook(
        out_dir=str(folder),
        save_config=full,
        reduction_config=statistics,
        include_collections=["gradients", "weights", "losses"],
    )
    # Kernels and matrices only: BatchNorm's parameters are two thirds of the tensors, and no rule looks at them.
    prefix = re.escape(model._get_name() + "_")
    matrices = "|".join(re.escape(name) for name, parameter in model.named_parameters() if parameter.ndim > 1)
    hook.get_collection("gradients").include_regex = [f"^gradient/{prefix}({matrices})$"]
    hook.get_collection("weights").include_regex = [f"^{prefix}({matrices})$"]
    hook.get_collection("losses").save_config = losses
    hook.get_collection("losses").reduction_config = smd.ReductionConfig(save_raw_tensor=True)
    few = smd.ReductionConfig(reductions=["mean"], abs_reductions=["max"])
    hook.get_collection("weights").reduction_config = few
    hook.register_module(model)
    hook.register_loss(criterion)
    return hook


def set_mode(hook: Any, split: str) -> None:
    """The steps from now on belong to `train` or `validation`."""
    from smdebug.core.modes import ModeKeys

    hook.set_mode(ModeKeys.TRAIN if split == "train" else ModeKeys.EVAL)


def run_rules(folder: Path, checks: dict[str, dict]) -> tuple[list[Finding], Observations]:
    """Runs each rule in `checks` (name: parameters) over the trial that a hook wrote to `folder`.

    A rule that cannot be run is an `Error` with the reason, never a silent pass.
    """
    load_smdebug()
    from smdebug.rules.rule import Rule
    from smdebug.rules.rule_invoker import invoke_rule
    from smdebug.trials import create_trial

    trial = create_trial(str(folder))
    steps = trial.steps()
    reader = TrialReader(trial)

    class Adapter(Rule):
        """One of ours as one of smdebug's: at every saved step, what was seen until then is judged."""

        def __init__(self, check: Callable[..., dict | None], parameters: dict) -> None:
            super().__init__(trial, action_str="")
            self.check, self.parameters = check, parameters
            self.seen = Observations()
            self.evidence: dict | None = None

        def invoke_at_step(self, step: int) -> bool:
            if self.evidence is None:
                reader.read(step, self.seen)
                self.evidence = self.check(self.seen, **self.parameters)
            return self.evidence is not None

    findings, last = [], Observations()
    for name, given in checks.items():
        rule = rules.TENSOR_RULES[name]
        parameters = {**rule.defaults, **given}
        try:
            adapter = Adapter(rule.check, parameters)
            for step in steps:  # only what was saved: invoke_rule would ask for every step between
                invoke_rule(adapter, start_step=step, end_step=step + 1)
            findings.append(rule.finding(adapter.evidence, parameters))
        except Exception as error:  # a rule's own fault must not take the training's result with it
            findings.append(rule.error(error, parameters))
    for step in steps:
        with suppress(Exception):  # what cannot be read is an Error of the rules above already
            reader.read(step, last)
    return findings, last


class TrialReader:
    """Reads a trial's steps into Observations, each step from disk once."""

    def __init__(self, trial: Any) -> None:
        self.trial = trial
        self.cache: dict[int, Observations] = {}

    def read(self, step: int, into: Observations) -> None:
        """Appends what was saved at global `step`."""
        if step not in self.cache:
            self.cache[step] = self._read(step)
        into.extend(self.cache[step])

    def _read(self, step: int) -> Observations:
        from smdebug.core.modes import ModeKeys

        trial, found = self.trial, Observations()
        names = set(trial.tensor_names(step=step))
        for name in sorted(names & set(trial.tensor_names(collection="losses"))):
            split = "validation" if trial.mode(step) == ModeKeys.EVAL else "train"
            found.losses.append((step, split, float(trial.tensor(name).value(step))))
        saved = {"mean": ("mean", False), "abs_max": ("max", True)}
        more = {"std": ("std", False), "abs_mean": ("mean", True), "l2_norm": ("l2", False)}
        gradients, weights = ("gradients", found.gradients, saved | more), ("weights", found.weights, saved)
        for collection, target, wanted in (gradients, weights):
            for name in sorted(names & set(trial.tensor_names(collection=collection))):
                tensor = trial.tensor(name)
                statistics = {
                    key: float(tensor.reduction_value(step, kind, abs=of_abs)) for key, (kind, of_abs) in wanted.items()
                }
                target.setdefault(name, []).append((step, statistics))
        return found
