"""The hook writes what the rules read, through smdebug itself, and the sampler what smdebug's reader reads."""

import time

import pytest
import torch

import debugging
from rules import TENSOR_RULES
from sampler import Sampler


def train(folder, lr, scale=1.0, epochs=4, steps=12):
    """A small network on a task it can learn, under the hook: the folder that the hook wrote."""
    smd = debugging.load_smdebug()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    criterion = torch.nn.CrossEntropyLoss()
    hook = debugging.make_hook(smd, folder, model, criterion, epochs * steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    inputs = torch.randn(64, 8)
    labels = (inputs[:, 0] > 0).long()
    for _ in range(epochs):
        debugging.set_mode(hook, "train")
        for _ in range(steps):
            loss = criterion(model(inputs) * scale, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        debugging.set_mode(hook, "validation")
        with torch.no_grad():
            criterion(model(inputs) * scale, labels)
    hook.close()
    return folder


def statuses(folder):
    findings, seen = debugging.run_rules(folder, {name: {} for name in TENSOR_RULES})
    return {finding.rule: finding for finding in findings}, seen


def test_healthy_training_is_seen_whole_and_passes(tmp_path):
    found, seen = statuses(train(tmp_path / "tensors", lr=0.3))
    assert {name: finding.status for name, finding in found.items()} == dict.fromkeys(TENSOR_RULES, "NoIssuesFound")
    assert {name.split("_")[-1] for name in seen.gradients} == {"0.weight", "2.weight"}
    assert len(seen.gradients) == len(seen.weights) == 2
    assert len(seen.split_losses("train")) == 48 and len(seen.split_losses("validation")) == 4
    first = [loss for _, loss in seen.split_losses("train")]
    assert first[-1] < first[0]


@pytest.mark.parametrize(("rule", "lr", "scale"), [("VanishingGradient", 0.3, 1e-9), ("ExplodingTensor", 1e30, 1e6)])
def test_trouble_in_a_real_training_is_found(tmp_path, rule, lr, scale):
    found, _ = statuses(train(tmp_path / "tensors", lr=lr, scale=scale))
    assert found[rule].status == "IssuesFound" and found[rule].blocking


def test_a_training_that_cannot_learn_is_blocked(tmp_path):
    found, _ = statuses(train(tmp_path / "tensors", lr=1e-9))
    assert found["LossNotDecreasing"].status == "IssuesFound" and found["LossNotDecreasing"].blocking


@pytest.mark.parametrize("total", [1, 2, 7, 150, 100_000])
def test_few_steps_are_saved_however_long_the_run(total):
    steps = debugging.full_save_steps(total)
    assert steps[0] == 0 and steps[-1] == total - 1
    assert len(steps) <= debugging.FULL_SAVES + 2


def test_without_smdebug_and_wheel_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(debugging, "__file__", "/nowhere/debugging.py")
    with pytest.raises(ImportError, match="no-deps smdebug"):
        debugging._install_wheel()


def test_sampler_writes_what_smdebug_reads(tmp_path):
    begun = time.time()
    with Sampler(tmp_path / "profiler", interval=0.05) as sampler:
        sampler.step(0.02, 0.01)
        time.sleep(0.4)
    assert len(sampler.seen.cpu) >= 3 and all(0 <= value <= 100 for value in sampler.seen.cpu)
    assert sampler.seen.step_seconds == [0.02]
    debugging.load_smdebug()
    from smdebug.profiler.system_metrics_reader import LocalSystemMetricsReader
    from smdebug.profiler.utils import TimeUnits

    reader = LocalSystemMetricsReader(str(tmp_path / "profiler"))
    events = reader.get_events(begun - 60, time.time() + 60, unit=TimeUnits.SECONDS)
    assert {"CPUUtilization", "MemoryUsedPercent", "IOWait"} <= {event.dimension for event in events}
    assert {event.node_id for event in events} == {"algo-1"}
