"""The rules, beside the training in a process of their own: it reads what the hook writes, while it is written.

    python watcher.py <folder of tensors> '{"Overfit": {"patience": 2}, "VanishingGradient": {}}'

It talks in lines of JSON. To the training, as soon as a rule finds what spoils the model: {"decided": {finding}}. At
the training's `end`: {"findings": […], "seen": {…}}. When its standard input is closed without that word, the training
is gone, and it goes too. Nothing that happens to it harms the training: what it cannot say becomes an `Error`.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rules
from rules import Finding, Observations
from smdebug_library import smdebug

POLL = 0.5  # seconds between looks at the folder
NICENESS = 10  # training comes first
PATIENCE = 120  # seconds that the training waits for the last word


class RulesProcess:
    """The training's end of it: `decided` as soon as there is no point in going on, `findings` at the end."""

    def __init__(self, folder: Path, checks: dict[str, dict]) -> None:
        """Starts the process on the hook's `folder`. `checks`: the rules' names, and parameters that differ."""
        self.checks = checks
        self.decided: Finding | None = None
        self._said: dict[str, Any] | None = None
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder), json.dumps(checks)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        self._listener = threading.Thread(target=self._listen, name="rules", daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                message = json.loads(line)
                if "decided" in message:
                    self.decided = Finding(**message["decided"])
                elif "findings" in message:
                    self._said = message
            except (ValueError, TypeError):  # a library printed something
                print(line, end="", file=sys.stderr)

    def findings(self, ended: bool = False, patience: float = PATIENCE) -> tuple[list[Finding], Observations]:
        """What each rule found, and what it saw. Call it after the hook was closed.

        `ended`: whether the training was ended by what was decided, which then stands. A training that was faster than
        its rules is judged as a whole: a loss that had not fallen at half time may have fallen since.
        """
        assert self._process.stdin is not None
        with suppress(OSError):  # it is dead
            self._process.stdin.write("end\n")
            self._process.stdin.flush()
        self._listener.join(patience)
        if self._said is None:
            code = self._process.poll()
            reason = f"has no answer after {patience:g} s" if code is None else f"ended with code {code}"
            error = RuntimeError(f"the rules' process {reason}")
            found = [rules.TENSOR_RULES[name].error(error, given) for name, given in self.checks.items()]
        else:
            found = [Finding(**finding) for finding in self._said["findings"]]
        self.close()
        decided = self.decided if ended or self._said is None else None
        if decided is not None:
            found = [decided if finding.rule == decided.rule else finding for finding in found]
        return found, Observations(**(self._said or {}).get("seen", {}))

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._listener.join()  # it ends with the process's output
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # unsent words to a process that is gone
                assert pipe is not None
                pipe.close()


class Judge:
    """Judges, step after step, what a hook writes to a folder."""

    def __init__(self, folder: Path, checks: dict[str, dict]) -> None:
        from smdebug.rules.rule import Rule
        from smdebug.rules.rule_invoker import invoke_rule

        class Adapter(Rule):
            """One of our rules as one of smdebug's: True at a step after which there is an issue."""

            def __init__(self, trial: Any, check: Callable[..., dict | None], parameters: dict) -> None:
                super().__init__(trial, action_str="")
                self.check, self.parameters = check, parameters
                self.evidence: dict | None = None
                self.error: Exception | None = None

            def invoke_at_step(self, step: int) -> bool:
                self.evidence = self.check(seen, **self.parameters)
                return self.evidence is not None

        self.folder, self.checks = folder, checks
        self.seen = seen = Observations()
        self.adapter, self.invoke = Adapter, invoke_rule
        self.parameters = {name: {**rules.TENSOR_RULES[name].defaults, **given} for name, given in checks.items()}
        self.adapters: dict[str, Any] = {}
        self.trial: Any = None
        self.judged = -1

    def look(self) -> None:
        """Takes in the steps that were written since the last look, and lets each rule judge after each of them."""
        from smdebug.trials import create_trial

        if self.trial is None:
            if not any((self.folder / "collections").rglob("*_collections.json")):
                return  # nothing was saved yet, and smdebug would sleep until it is
            self.trial = create_trial(str(self.folder))
            for name in self.checks:
                self.adapters[name] = self.adapter(self.trial, rules.TENSOR_RULES[name].check, self.parameters[name])
        for step in [step for step in self.trial.steps() if step > self.judged]:
            self.judged = step
            read(self.trial, step, self.seen)
            for adapter in self.adapters.values():
                if adapter.error is None:
                    try:
                        self.invoke(adapter, start_step=step, end_step=step + 1)
                    except Exception as error:  # one rule's fault is not the others'
                        adapter.error = error

    def findings(self) -> list[Finding]:
        found = []
        for name, parameters in self.parameters.items():
            rule, adapter = rules.TENSOR_RULES[name], self.adapters.get(name)
            if adapter is None:
                found.append(rule.error(RuntimeError(f"the hook saved nothing to {self.folder}"), parameters))
            elif adapter.error:
                found.append(rule.error(adapter.error, parameters))
            else:
                found.append(rule.finding(adapter.evidence, parameters))
        return found


def read(trial: Any, step: int, into: Observations) -> None:
    """Adds what was saved at the global `step` of smdebug's `trial`."""
    names = set(trial.tensor_names(step=step))

    def of(collection: str) -> list[str]:
        patterns = trial.collection(collection).include_regex
        return sorted(name for name in names if any(re.search(pattern, name) for pattern in patterns))

    losses = {name: trial.tensor(name).value(step) for name in of("losses")}
    if "TrainLoss_output_0" in losses:
        train = losses.pop("TrainLoss_output_0")
        (validation,) = losses.values()
        into.epochs += [(step, float(one), float(other)) for one, other in zip(train, validation, strict=True)]
    else:
        into.losses += [(step, float(value)) for value in losses.values()]
    for name in of("relu_output"):
        into.activity.setdefault(name, []).append((step, trial.tensor(name).value(step).tolist()))
    saved = {"mean": ("mean", False), "abs_max": ("max", True)}
    more = {"std": ("std", False), "abs_mean": ("mean", True), "l2_norm": ("l2", False)}
    for collection, target, wanted in (
        ("gradients", into.gradients, saved | more),
        ("weights", into.weights, saved),
    ):
        for name in of(collection):
            tensor = trial.tensor(name)
            statistics = {
                key: float(tensor.reduction_value(step, kind, abs=of_abs)) for key, (kind, of_abs) in wanted.items()
            }
            target.setdefault(name, []).append((step, statistics))


def main() -> int:
    """The process."""
    os.nice(NICENESS)
    # A job that is stopped writes its checkpoint first, and asks for findings or closes the pipe when it is ready.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TRAINING_END_DELAY_REFRESH"] = "0"  # seconds that smdebug would sleep at the end
    sys.modules["torch"] = None  # type: ignore[assignment]  # smdebug loads it where it can, and rules need none of it
    folder, checks = Path(sys.argv[1]), json.loads(sys.argv[2])
    with smdebug():
        judge = Judge(folder, checks)
    told = False
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], POLL)
        word = sys.stdin.readline() if ready else ""
        if ready and not word:
            return 0  # the training is gone
        judge.look()
        decided = [finding for finding in judge.findings() if finding.blocking]
        if decided and not told:
            told = True
            print(json.dumps({"decided": decided[0].as_dict()}), flush=True)
        if word:
            seen = asdict(judge.seen) | {"activity": {}}  # much, and shown nowhere
            print(json.dumps({"findings": [f.as_dict() for f in judge.findings()], "seen": seen}), flush=True)
            return 0


if __name__ == "__main__":
    sys.exit(main())
