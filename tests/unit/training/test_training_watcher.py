"""The rules' process: it finds trouble while a training runs, ends with it, and harms it by nothing."""

import json
import math
import os
import signal
import time

import psutil
import pytest
import torch
from torch import nn

from debugging import SHARES, Hook
from rules import TENSOR_RULES
from tests.unit.training.jobs import start
from watcher import RulesProcess

CHECKS = {name: {} for name in TENSOR_RULES}
FREE = dict.fromkeys(SHARES, math.inf)
torch.set_num_threads(1)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


class Training:
    """A training, step by step, whose loss can be spoilt."""

    def __init__(self, folder):
        self.model, self.criterion = nn.Linear(4, 2), nn.CrossEntropyLoss()
        self.hook = Hook(folder, self.model, self.criterion, 100, shares=FREE)

    def step(self, factor=1.0):
        self.hook.before_step()
        loss = self.criterion(self.model(torch.ones(4, 4)) * factor, torch.zeros(4, dtype=torch.int64))
        loss.backward()
        self.hook.pause()
        self.hook.epoch(float(loss.detach()), float(loss.detach()))


def test_trouble_is_told_while_the_training_runs_and_the_rest_at_its_end(tmp_path):
    training = Training(tmp_path / "tensors")
    process = RulesProcess(tmp_path / "tensors", CHECKS)
    training.step()
    assert process.decided is None
    training.step(factor=math.nan)
    until(lambda: process.decided)
    assert process.decided.rule == "ExplodingTensor" and process.decided.blocking
    training.hook.close()
    found, seen = process.findings()
    statuses = {finding.rule: finding.status for finding in found}
    assert set(statuses) == set(TENSOR_RULES) and statuses["ExplodingTensor"] == "IssuesFound"
    assert statuses["DeadRelu"] == "NoIssuesFound"
    assert len(seen.epochs) == 2 and list(seen.gradients) == ["gradient/Linear_weight"]


@pytest.mark.parametrize("ended", [True, False])
def test_what_was_decided_stands_only_if_it_ended_the_training(tmp_path, ended):
    training = Training(tmp_path / "tensors")
    process = RulesProcess(tmp_path / "tensors", CHECKS)
    training.step()
    training.hook.close()
    process.decided = TENSOR_RULES["LossNotDecreasing"].finding({"step": 1, "tensor": "train loss", "value": 2.0}, {})
    found = {finding.rule: finding for finding in process.findings(ended)[0]}
    assert found["LossNotDecreasing"].blocking == ended and found["Overfit"].status == "NoIssuesFound"


def test_a_process_that_dies_makes_errors_and_no_harm(tmp_path):
    training = Training(tmp_path / "tensors")
    process = RulesProcess(tmp_path / "tensors", CHECKS)
    os.kill(process._process.pid, signal.SIGKILL)
    training.step()
    training.hook.close()
    found, _ = process.findings()
    assert {finding.status for finding in found} == {"Error"} and len(found) == len(TENSOR_RULES)
    assert not any(finding.blocking for finding in found)
    assert "ended with code -9" in found[0].evidence["value"]


def test_a_process_that_hangs_is_not_waited_for(tmp_path):
    process = RulesProcess(tmp_path / "tensors", CHECKS)
    os.kill(process._process.pid, signal.SIGSTOP)
    found, _ = process.findings(patience=0.2)
    assert "no answer" in found[0].evidence["value"] and process._process.poll() is not None


def test_nothing_saved_is_an_error_not_a_pass(tmp_path):
    found, _ = RulesProcess(tmp_path / "tensors", CHECKS).findings()
    assert {finding.status for finding in found} == {"Error"} and "saved nothing" in found[0].evidence["value"]


def children(process, name="watcher.py"):
    try:
        inside = psutil.Process(process.pid).children()
        return [child for child in inside if any(name in word for word in child.cmdline())]
    except psutil.Error:
        return []


def test_it_runs_beside_a_job_nicely_and_ends_when_the_job_is_killed(prepared, tmp_path):
    job = start("train.py", "--training", prepared, "--image-size", 32, "--epochs", 1000, "--patience", 1000,
                "--profile", "true", opt_ml=tmp_path)  # fmt: skip
    try:
        until(lambda: children(job))
        (child,) = children(job)
        until(lambda: child.nice() > 0)
    finally:
        job.kill()
        job.communicate()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("deadly", [True, False])
def test_a_job_with_an_absurd_learning_rate_ends_early_with_a_verdict(prepared, tmp_path, deadly):
    """Unless its rules were killed: then it goes on to its end, and says so."""
    epochs = 60 if deadly else 2
    job = start("train.py", "--training", prepared, "--image-size", 32, "--batch-size", 16, "--lr", 1.0,
                "--warm-up", 0, "--epochs", epochs, "--patience", 1000, "--export", "false",
                "--profile", "true", opt_ml=tmp_path)  # fmt: skip
    if not deadly:
        until(lambda: children(job))
        children(job)[0].kill()
    log, _ = job.communicate(timeout=240)
    assert job.returncode == 0, log
    findings = json.loads((tmp_path / "output" / "data" / "findings.json").read_text())
    named = {rule["rule"]: rule for rule in findings["rules"]}
    if deadly:
        assert findings["blocking"] and findings["verdict"]["status"] == "EndedEarly"
        assert findings["verdict"]["epoch"] < epochs and named[findings["verdict"]["rule"]]["blocking"]
        assert findings["verdict"]["reason"].startswith(findings["verdict"]["rule"])
    else:
        assert findings["verdict"]["status"] == "Completed" and not findings["blocking"]
        assert all(named[name]["status"] == "Error" for name in TENSOR_RULES)
    assert (tmp_path / "output" / "data" / "report.html").is_file()
