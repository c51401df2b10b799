"""What `profile=true` adds to a training: hook, timer, sampler, rules, findings.json and report.html."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rules
import system_rules
from artifact import SPLITS
from debugging import Hook, tensors_folder
from prepare import cores
from rules import Finding, Observations
from sampler import Sampler
from system_rules import Setup
from timer import CudaClock, HostClock, StepTimer
from watcher import RulesProcess

MAX_FINDINGS_BYTES = 100_000  # Step Functions reads findings.json; a state's payload ends at 256 KiB


class Profile:
    """`with Profile(…) as profile:` around the epochs; `before_step`, `pause` and `epoch` in each; then `report`.

    `timer` wants to hear of each step; `gradient_scale` is what gradients are multiplied by while the hook sees them;
    `ended` says why to stop.
    """

    def __init__(
        self, folder: Path, trained: nn.Module, criterion: nn.CrossEntropyLoss, device: torch.device, options: Any,
        steps: int, done: int = 0, history: Sequence[dict[str, float]] = (),
    ) -> None:  # fmt: skip
        """`trained`: the module whose gradients are watched; `steps`: how many the whole training has, of which an
        interrupted run has `done` some, and whole epochs as in `history`."""
        self.folder, self.options = folder, options
        tensors = tensors_folder(folder / "tensors")
        self.hook: Hook | None = None
        self.rules: RulesProcess | None = None
        self.error = ""  # why there is no hook
        self.sampler = Sampler(folder / "profiler")
        self.sampler.seen.cores = cores()
        self.sampler.seen.loader_workers = options.loader_workers
        self.timer = StepTimer(self.sampler.step, CudaClock() if device.type == "cuda" else HostClock())
        # At half time the loss must be lower than at the start: before, the learning rate has hardly left its peak.
        self.checks: dict[str, dict] = {name: {} for name in rules.TENSOR_RULES}
        assert criterion.weight is not None
        chance_loss = math.log(len(criterion.weight))  # whatever the weights and the label smoothing
        self.checks["VanishingGradient"] = {"chance_loss": chance_loss}
        self.checks["LossNotDecreasing"] = {"start_step": steps // 2, "chance_loss": chance_loss}
        self.checks["Overfit"] = {"start_step": round(options.warm_up * steps)}
        self._stack = ExitStack()
        try:
            self.hook = Hook(tensors, trained, criterion, steps, done)
            self.rules = RulesProcess(tensors, self.checks)
        except (ImportError, OSError) as error:
            self.error = str(error)
            print(f"profile: no hook or no rules: {error}", flush=True)
        for metrics in history:
            self.epoch(metrics)

    def __enter__(self) -> Profile:
        self._stack.enter_context(self.sampler)
        self._stack.callback(self.timer.close)
        if self.hook is not None:
            self._stack.callback(self.hook.close)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()  # the rules' process ends when it has told its findings, or with this one

    def before_step(self) -> None:
        """A step of training begins."""
        if self.hook is not None:
            self.hook.before_step()

    def pause(self) -> None:
        """The forward passes from now until the next step are none of training."""
        if self.hook is not None:
            self.hook.pause()

    def epoch(self, metrics: dict[str, float]) -> None:
        """An epoch has ended with these losses."""
        if self.hook is not None:
            self.hook.epoch(metrics["train_loss"], metrics["validation_loss"])

    @property
    def gradient_scale(self) -> float:
        return self.hook.gradient_scale if self.hook is not None else 1.0

    @gradient_scale.setter
    def gradient_scale(self, scale: float) -> None:
        if self.hook is not None:
            self.hook.gradient_scale = scale

    @property
    def ended(self) -> str:
        """Why there is no point in going on with the training; empty while there is."""
        decided = self.rules.decided if self.rules is not None else None
        return reason(decided) if decided is not None else ""

    def report(
        self, options: Any, prepared: Any, hyperparameters: dict, history: list[dict], metrics: dict, held_out: Any,
        probabilities: Any, early: bool, usable: bool,
    ) -> dict:  # fmt: skip
        """Runs the rules, writes findings.json and report.html, puts them to `run-uri`; returns the findings.

        `probabilities`: torch [N, classes] of the pictures in `held_out`, a data.Split; `early`: whether the training
        was ended because something was wrong with it; `usable`: whether a model came of it.
        """
        from report import Report, write_report

        confusion = confusion_matrix(held_out.labels.tolist(), probabilities.argmax(1).tolist(), len(prepared.classes))
        found, seen = self._judge(prepared, confusion, early)
        summary = {
            "model_version": options.model_version,
            "dataset_hash": options.dataset_hash,
            "hyperparameters": hyperparameters,
            "metrics": metrics,
            "epochs": len(history),
            "model": usable,
            "pictures": {split: len(getattr(prepared, split)) for split in SPLITS},
            "skipped": prepared.skipped[:50],
            "per_class": precision_recall(confusion, prepared.classes),
            "system": system_rules.overall_system_usage(self.sampler.seen),
            "framework": system_rules.overall_framework_metrics(self.sampler.seen),
            "steps": step_summary(self.sampler.seen),
        }
        findings: dict[str, Any] = {
            "blocking": any(finding.blocking for finding in found),
            "verdict": verdict(found, early, len(history)),
            "recommendation": system_rules.recommendation(found),
            "rules": [finding.as_dict() for finding in found],
            "summary": summary,
        }
        text = json.dumps(clean(findings), indent=1, allow_nan=False)
        if len(text) > MAX_FINDINGS_BYTES:  # many classes: the table is in the report
            summary["per_class"] = {}
            text = json.dumps(clean(findings), allow_nan=False)
        for finding in found:
            if finding.status != "NoIssuesFound":
                print(f"rule {finding.rule}: {finding.status} {json.dumps(clean(finding.evidence))}", flush=True)
        folder, files = self.folder, {"findings.json": "application/json"}
        (folder / "findings.json").write_text(text)
        report = Report(
            findings=found, summary=summary, history=history, gradients=seen.gradients, sampler=self.sampler,
            confusion=confusion, classes=prepared.classes, held_out=held_out, probabilities=probabilities.numpy(),
            trials=tuning_trials(options.tuning_job), verdict=findings["verdict"],
            recommendation=findings["recommendation"],
        )  # fmt: skip
        try:
            print(f"report: {write_report(report, folder / 'report.html')}", flush=True)
            files["report.html"] = "text/html"
        except Exception as error:  # a picture that cannot be drawn is no reason to lose a trained model
            print(f"report: could not be drawn: {type(error).__name__}: {error}", flush=True)
        if options.run_uri:
            upload(options.run_uri, files, folder)
        return findings

    def _judge(self, prepared: Any, confusion: list[list[int]], early: bool) -> tuple[list[Finding], Observations]:
        found: list[Finding] = []
        seen = Observations()
        if self.rules is not None:
            found, seen = self.rules.findings(ended=early)
        if fault := self.error or (self.hook.error if self.hook is not None else ""):
            # what was found stands; that nothing was found means nothing then
            found = [finding for finding in found if finding.status == "IssuesFound"]
            there = {finding.rule for finding in found}
            error = RuntimeError(f"the hook: {fault}")
            found += [rule.error(error, {}) for name, rule in rules.TENSOR_RULES.items() if name not in there]
        counts = prepared.train.labels.bincount(minlength=len(prepared.classes)).tolist()
        named = dict(zip(prepared.classes, counts, strict=True))
        found.append(rules.CLASS_IMBALANCE.judge((named, confusion)))
        options = self.options
        setup = Setup(
            batch_size=options.batch_size, pictures=len(prepared.train), loader_workers=options.loader_workers,
            cores=self.sampler.seen.cores, unfreeze=options.unfreeze,
            instance_type=os.environ.get("SM_CURRENT_INSTANCE_TYPE", ""),
        )  # fmt: skip
        found += [rule.judged(self.sampler.seen, setup) for rule in system_rules.SYSTEM_RULES.values()]
        return found, seen


def verdict(found: Sequence[Finding], early: bool, epochs: int) -> dict[str, Any]:
    """How the training ended: `EndedEarly` where it did because of a rule, and after how many epochs, or parts of one.

    `early`: whether it was ended because something was wrong."""
    spoilt = [finding for finding in found if finding.blocking]
    if not early or not spoilt or spoilt[0].evidence is None:
        return {"status": "Completed", "rule": None, "epoch": epochs, "reason": ""}
    return {"status": "EndedEarly", "rule": spoilt[0].rule, "epoch": epochs, "reason": reason(spoilt[0])}


def reason(finding: Finding) -> str:
    """A finding's evidence in a line."""
    evidence = finding.evidence or {}
    where = f" in step {evidence['step']}" if evidence.get("step") is not None else ""
    return f"{finding.rule}{where}: {evidence.get('tensor')} {evidence.get('value')}"


def clean(value: Any) -> Any:
    """The same for JSON: numbers that are none become text."""
    if isinstance(value, dict):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def confusion_matrix(truth: list[int], predicted: list[int], classes: int) -> list[list[int]]:
    """[true class][predicted class]: how many pictures."""
    matrix = [[0] * classes for _ in range(classes)]
    for row, column in zip(truth, predicted, strict=True):
        matrix[row][column] += 1
    return matrix


def precision_recall(confusion: list[list[int]], classes: list[str]) -> dict[str, dict[str, float | int | None]]:
    """Per class its pictures, precision and recall; None where nothing was predicted or there is no picture."""
    table: dict[str, dict[str, float | int | None]] = {}
    for index, name in enumerate(classes):
        right, there = confusion[index][index], sum(confusion[index])
        predicted = sum(row[index] for row in confusion)
        table[name] = {
            "n": there,
            "precision": round(right / predicted, 4) if predicted else None,
            "recall": round(right / there, 4) if there else None,
        }
    return table


def step_summary(seen: system_rules.SystemObservations) -> dict[str, float]:
    if not seen.step_seconds:
        return {}
    return {
        "count": len(seen.step_seconds),
        "start_up_seconds": round(seen.start_up_seconds, 3),
        "seconds_p50": round(rules.percentile(seen.step_seconds, 50), 5),
        "seconds_p95": round(rules.percentile(seen.step_seconds, 95), 5),
        "wait_percent": round(100 * sum(seen.wait_seconds) / sum(seen.step_seconds), 2),
    }


def tuning_trials(tuning_job: str) -> list[dict]:
    """The tuning job's trials: name, status, objective, hyperparameters. Empty when it cannot be asked: a training job
    may lack the permission to read tuning jobs, and its report stands without them."""
    if not tuning_job:
        return []
    try:
        import boto3

        client = boto3.client("sagemaker", region_name=os.environ.get("AWS_REGION"))
        pages = client.get_paginator("list_training_jobs_for_hyper_parameter_tuning_job").paginate(
            HyperParameterTuningJobName=tuning_job
        )
        return [
            {
                "name": job["TrainingJobName"],
                "status": job["TrainingJobStatus"],
                "objective": job.get("FinalHyperParameterTuningJobObjectiveMetric", {}).get("Value"),
                **{name: value.strip('"') for name, value in job["TunedHyperParameters"].items()},
            }
            for page in pages
            for job in page["TrainingJobSummaries"]
        ]
    except Exception as error:
        print(f"report: without tuning trials: {type(error).__name__}: {error}", flush=True)
        return []


def upload(run_uri: str, files: dict[str, str], folder: Path) -> None:
    """Puts the files (name: content type) of `folder` under `run_uri` (s3://bucket/prefix)."""
    import boto3

    bucket, _, prefix = run_uri.removeprefix("s3://").rstrip("/").partition("/")
    client = boto3.client("s3", region_name=os.environ.get("AWS_REGION"))
    for name, kind in files.items():
        client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=(folder / name).read_bytes(), ContentType=kind)
    print(f"uploaded {', '.join(files)} to {run_uri}", flush=True)
