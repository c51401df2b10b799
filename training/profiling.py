"""What `profile=true` adds to a training: hook, sampler, rules, findings.json and report.html."""

from __future__ import annotations

import json
import math
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import debugging
import rules
from rules import Finding, Observations
from sampler import Sampler

MAX_FINDINGS_BYTES = 100_000  # Step Functions reads findings.json; a state's payload ends at 256 KiB


class Profile:
    """`with Profile(…) as profile:` around the epochs, `profile.phase(…)` at the start of each, then `report`."""

    def __init__(self, folder: Path, trained: Any, criterion: Any, steps_per_epoch: int, total_steps: int) -> None:
        """`trained`: the module whose gradients are watched."""
        self.tensors = folder / "tensors"
        self.sampler = Sampler(folder / "profiler")
        self.losses_per_epoch = math.ceil(steps_per_epoch / debugging.loss_interval(total_steps))
        self.hook: Any = None
        self.hook_error = ""
        self._stack = ExitStack()
        # An interrupted run left it, and smdebug refuses to write into it.
        shutil.rmtree(self.tensors, ignore_errors=True)
        try:
            self.hook = debugging.make_hook(debugging.load_smdebug(), self.tensors, trained, criterion, total_steps)
        except ImportError as error:
            self.hook_error = str(error)
            print(f"profile: no hook: {error}", flush=True)

    def __enter__(self) -> Profile:
        self._stack.enter_context(self.sampler)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.hook is not None:
            self.hook.close()
        self._stack.close()

    def phase(self, split: str) -> None:
        """What the steps from now on belong to: `train` or `validation`."""
        if self.hook is not None:
            debugging.set_mode(self.hook, split)

    def report(
        self, options: Any, prepared: Any, hyperparameters: dict, history: list[dict], metrics: dict, held_out: Any,
        probabilities: Any,
    ) -> dict:  # fmt: skip
        """Runs the rules, writes findings.json and report.html, puts them to `run-uri`; returns the findings.

        `probabilities`: torch [N, classes] of the pictures in `held_out`, a data.Split.
        """
        from report import Report, write_report

        confusion = confusion_matrix(held_out.labels.tolist(), probabilities.argmax(1).tolist(), len(prepared.classes))
        found, seen = self._judge(prepared, confusion)
        summary = {
            "model_version": options.model_version,
            "dataset_hash": options.dataset_hash,
            "hyperparameters": hyperparameters,
            "metrics": metrics,
            "epochs": len(history),
            "pictures": {split: len(getattr(prepared, split)) for split in ("train", "validation", "test")},
            "skipped": prepared.skipped[:50],
            "per_class": precision_recall(confusion, prepared.classes),
            "system": rules.overall_system_usage(self.sampler.seen),
            "steps": step_summary(self.sampler.seen),
        }
        findings = {
            "blocking": any(finding.blocking for finding in found),
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
        folder = self.tensors.parent
        (folder / "findings.json").write_text(text)
        html = write_report(
            Report(
                findings=found, summary=summary, history=history, gradients=seen.gradients, sampler=self.sampler,
                confusion=confusion, classes=prepared.classes, held_out=held_out, probabilities=probabilities.numpy(),
                trials=tuning_trials(options.tuning_job),
            ),
            folder / "report.html",
        )  # fmt: skip
        print(f"report: {html}", flush=True)
        if options.run_uri:
            upload(options.run_uri, {"findings.json": "application/json", "report.html": "text/html"}, folder)
        return findings

    def _judge(self, prepared: Any, confusion: list[list[int]]) -> tuple[list[Finding], Observations]:
        checks: dict[str, dict] = {name: {} for name in rules.TENSOR_RULES}
        # A window of an epoch compares the same pictures with each other: else it is a matter of luck which came.
        checks["LossNotDecreasing"] = {"num_steps": max(10, self.losses_per_epoch)}
        if self.hook is None:
            found = [rules.TENSOR_RULES[name].error(ImportError(self.hook_error), {}) for name in checks]
            seen = Observations()
        else:
            found, seen = debugging.run_rules(self.tensors, checks)
        counts = prepared.train.labels.bincount(minlength=len(prepared.classes)).tolist()
        named = dict(zip(prepared.classes, counts, strict=True))
        found.append(rules.CLASS_IMBALANCE.judge((named, confusion)))
        found += [rule.judge(self.sampler.seen) for rule in rules.SYSTEM_RULES.values()]
        return found, seen


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


def step_summary(seen: rules.SystemObservations) -> dict[str, float]:
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
