"""smdebug's hook on a training: it saves statistics of tensors, at intervals that keep its cost small.

The steps that it does not save, it does not touch: smdebug's callbacks cost about as much as a step of a head on
features, so they are attached for a step and taken off after it. Which steps are saved depends on what saving costs
and on how long steps take, here and now.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smdebug_library import smdebug

# Shares of the steps' time that saves of each kind may take. What is left of the 5 % that are promised is for the saves
# of the first steps, which come unasked, and for counting steps.
SHARES = {"all": 0.01, "loss": 0.005, "epoch": 0.005}
MOST_SAVES = {"all": 50, "loss": 200}  # in a run, whatever they cost: each is a file
RETRY_STEPS = 16  # after which a save that was too dear is considered again
START_STEPS = 2  # saved whatever they cost: a bad start shows in them
RELU_SIDE = 14  # of a ReLU's output so many rows and columns are looked at

# Where SageMaker says what its own Debugger wants, if the job has one (DebugHookConfig of CreateTrainingJob), and where
# its rule containers then find the tensors.
SAGEMAKER_CONFIG = Path("/opt/ml/input/config/debughookconfig.json")
SAGEMAKER_FOLDER = "/opt/ml/output/tensors"


def tensors_folder(default: Path) -> Path:
    """Where the hook is to write: where SageMaker Debugger looks in a job that has it, else `default`."""
    path = Path(os.environ.get("SMDEBUG_CONFIG_FILE_PATH", SAGEMAKER_CONFIG))
    if not path.is_file():
        return default
    return Path(json.loads(path.read_text()).get("LocalPath") or SAGEMAKER_FOLDER)


class Allowance:
    """What saves of one kind may cost: a share of the time that passes beside them.

    Decides before a save from what the last one cost, so one that became dearer is paid for by a longer wait.
    """

    def __init__(self, share: float) -> None:
        self.share, self.spent, self.cost, self.begun = share, 0.0, 0.0, time.perf_counter()

    def affords(self) -> bool:
        return self.spent + self.cost <= self.share * (time.perf_counter() - self.begun)

    def pay(self, seconds: float, price: bool = False) -> None:
        """`price`: so much is the next save expected to cost."""
        self.spent += seconds
        self.cost = seconds if price else self.cost


class Hook:
    """smdebug's hook on `model` and its loss: `before_step` in training, `pause` before validation, `epoch` after it,
    `close` at the end.

    At some steps of training it saves: of gradients mean, standard deviation, norm, and mean and maximum of the
    absolute values; of weights mean and absolute maximum; of each ReLU how often its units are active, in percent.
    Losses: at more steps of training the batch's, and the means of each epoch over training and validation, perhaps
    those of several epochs at once.
    Its own faults end up in `error`, never in the training.
    """

    def __init__(
        self, folder: Path, model: nn.Module, criterion: nn.Module, steps: int, done: int = 0,
        shares: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        """`folder` is emptied; `steps` is how many the training has, `done` how many an interrupted run has taken.

        Raises ImportError without smdebug.
        """
        with smdebug():
            import smdebug.pytorch as smd
            from smdebug.core.modes import ModeKeys
        # An interrupted run left it, and smdebug refuses to write into it.
        shutil.rmtree(folder, ignore_errors=True)
        self.model, self.criterion, self.modes = model, criterion, ModeKeys
        self.error = ""
        self.gradient_scale = 1.0
        self.step = self.global_step = done - 1  # of training; and what smdebug counts: these and saves of epochs
        self.start = done
        self.allowances = {kind: Allowance(share) for kind, share in (shares or SHARES).items()}
        self.intervals = {kind: max(1, steps // most) for kind, most in MOST_SAVES.items()}
        self.next = dict.fromkeys(MOST_SAVES, 0)
        self.wake = 0  # the next step of which something may be saved
        self.epochs: list[tuple[float, float]] = []  # losses not saved yet
        self.saving: str | None = None
        self.seconds = 0.0  # that the save under way has cost until now
        self.handles: list[Any] = []
        self.gates = {kind: _gate(smd) for kind in MOST_SAVES}
        self.hook = self._smdebug_hook(smd, folder)
        for module in (model, criterion):
            module._module_name = module._get_name()  # what smdebug calls them

    def _smdebug_hook(self, smd: Any, folder: Path) -> Any:
        def saved(kind: str) -> Any:
            return smd.SaveConfig(dict.fromkeys(self.modes, self.gates[kind]))

        hook = smd.Hook(
            out_dir=str(folder),
            save_config=saved("all"),
            reduction_config=smd.ReductionConfig(
                reductions=["mean", "std"], abs_reductions=["mean", "max"], norms=["l2"]
            ),
            include_collections=["gradients", "weights", "losses", "relu_output"],
        )
        # Kernels and matrices only: BatchNorm's parameters are two thirds of the tensors, and no rule looks at them.
        prefix = re.escape(self.model._get_name() + "_")
        matrices = "|".join(re.escape(name) for name, _ in self._matrices())
        hook.get_collection("gradients").include_regex = [f"^gradient/{prefix}({matrices})$"]
        hook.get_collection("weights").include_regex = [f"^{prefix}({matrices})$"]
        hook.get_collection("weights").reduction_config = smd.ReductionConfig(
            reductions=["mean"], abs_reductions=["max"]
        )
        hook.get_collection("relu_output").include_regex = ["relu_output"]
        for name in ("losses", "relu_output"):
            hook.get_collection(name).reduction_config = smd.ReductionConfig(save_raw_tensor=True)
        hook.get_collection("losses").save_config = saved("loss")
        # now, and not with the first step, which is slow enough; the rules wait for it, too
        hook._prepare_collections()
        folder.mkdir(parents=True, exist_ok=True)
        hook.export_collections()
        hook.exported_collections = True
        return hook

    def _matrices(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained, without biases and BatchNorm."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad and p.ndim > 1]

    def _relus(self) -> Iterator[tuple[str, nn.Module]]:
        """ReLUs beside parameters that are trained."""
        for path, parent in self.model.named_modules():
            if any(p.requires_grad for p in parent.parameters()):
                for name, child in parent.named_children():
                    if isinstance(child, nn.ReLU):
                        yield ".".join(filter(None, [path, name if name.endswith("relu") else f"{name}.relu"])), child

    # What the training calls ------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """The forward passes from now until the next step are none of training."""
        self._do(self._finish)

    def before_step(self) -> None:
        """A step of training begins, in however many forward passes."""
        if self.saving:
            self._do(self._finish)
            self._settle()
        if self.error:
            return
        self.step, self.global_step = self.step + 1, self.global_step + 1
        if self.step >= self.wake and (kind := self._due()):
            self._do(self._attach, kind)

    def epoch(self, train_loss: float, validation_loss: float) -> None:
        """An epoch's mean losses, which the training loop knows exactly, are saved now or, where that costs too much
        beside short epochs, with those of a later one."""
        self._do(self._finish)
        self._settle()
        self.epochs.append((train_loss, validation_loss))
        if self.allowances["epoch"].affords():
            self._flush()

    def close(self) -> None:
        """Writes what is open or was put off."""
        self._do(self._finish)
        if self.epochs:
            self._flush()
        self._do(self.hook.close)

    # What it calls itself ---------------------------------------------------------------------------------------------

    def _do(self, work: Callable[..., None], *arguments: Any) -> None:
        """Runs a part of a save, counts its time and keeps its errors from the training: after one, nothing is saved.

        On CUDA a save waits for all kernels before it, which counts as its cost: it is then done less often.
        """
        if self.error:
            return
        begun = time.perf_counter()
        try:
            work(*arguments)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            print(f"profile: the hook gives up: {self.error}", flush=True)
            self._detach()
        self.seconds += time.perf_counter() - begun

    def _due(self) -> str | None:
        """What is saved of this step: `all`, the `loss`, or nothing."""
        if self.step < self.start + START_STEPS:
            return "all"
        due = None
        for kind in MOST_SAVES:
            if due is None and self.step >= self.next[kind]:
                due = kind if self.allowances[kind].affords() else None
                self.next[kind] = self.step + (self.intervals[kind] if due else RETRY_STEPS)
        self.wake = min(self.next.values())
        return due

    def _attach(self, kind: str) -> None:
        """Has smdebug save this step: its callbacks on the loss and, for `all`, on gradients and ReLUs."""
        self.saving = kind
        self._begin(kind, "TRAIN", self.step)
        self.handles = [self.criterion.register_forward_hook(self._part(self.hook.forward_hook))]
        if kind == "all":
            prefix = self.model._get_name() + "_"
            for name, parameter in self._matrices():
                self.handles.append(parameter.register_hook(self._part(self._save_gradient, prefix + name)))
            for name, relu in self._relus():
                self.handles.append(relu.register_forward_hook(self._part(self._save_activity, name)))

    def _part(self, callback: Callable[..., Any], *first: Any) -> Callable[..., None]:
        def called(*arguments: Any) -> None:
            self._do(callback, *first, *arguments)

        return called

    def _save_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if self.gradient_scale != 1:
            if not gradient.isfinite().all():
                return  # too large for float16 as scaled, which the scaler notices too
            gradient = gradient / self.gradient_scale
        self.hook.backward_hook(name)(gradient)

    def _save_activity(self, name: str, relu: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.hook.record_tensor_value(name, activity(output))

    def _begin(self, kind: str, mode: str, mode_step: int | None = None) -> None:
        """Opens a step in smdebug's count, which it takes one further when the forward pass is announced."""
        hook, mode = self.hook, self.modes[mode]
        hook.set_mode(mode)
        hook.step = self.global_step - 1
        if mode_step is not None:
            hook.mode_steps[mode] = mode_step - 1
        for name, gate in self.gates.items():
            gate.open = kind in (name, "all")
        hook.forward_pre_hook(self.model, None)

    def _finish(self) -> None:
        """Closes the step that is being saved, if one is: from now on the rules can read it."""
        self._detach()
        hook = self.hook
        if hook.writer is not None:
            hook._close_writers()

    def _detach(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def _settle(self) -> None:
        """Pays for the save that ended."""
        if self.saving:
            self.allowances[self.saving].pay(self.seconds, price=True)
        self.saving, self.seconds = None, 0.0

    def _flush(self) -> None:
        self.saving = "epoch"
        self._do(self._save_epochs)
        self._settle()

    def _save_epochs(self) -> None:
        self.global_step += 1
        self._begin("loss", "EVAL")
        train, validation = torch.tensor(self.epochs).T
        self.hook.record_tensor_value("TrainLoss", train)
        self.hook.record_tensor_value(self.criterion._get_name(), validation)
        self.epochs.clear()
        self._finish()


def _gate(smd: Any) -> Any:
    """A SaveConfigMode that saves while it is `open`."""

    class Gate(smd.SaveConfigMode):
        open = False

        def should_save_step(self, step_num: int) -> bool:
            return self.open

    return Gate(save_interval=1)


def activity(output: torch.Tensor) -> torch.Tensor:
    """Of a ReLU's output [N, C, …], how often each of the C units (channels) is above 0, in percent: float32 [C].

    Of pictures only some rows and columns are looked at: enough for a share, and cheap.
    """
    output = output.detach()
    if output.ndim == 4:
        strides = [max(1, side // RELU_SIDE) for side in output.shape[2:]]
        output = output[:, :, :: strides[0], :: strides[1]]
    others = [axis for axis in range(output.ndim) if axis != 1]
    return (output > 0).float().mean(others) * 100
