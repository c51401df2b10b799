"""Real trainings of tiny models under smdebug's hook: what is saved, what it may cost, what each rule says of it."""

import json
import math
import time

import pytest
import torch
from torch import nn

import debugging
import smdebug_library
from debugging import Allowance, Hook, activity, tensors_folder
from rules import CLASS_IMBALANCE, TENSOR_RULES, Observations
from watcher import Judge

torch.set_num_threads(1)  # threads that wait for each other are slow on a busy machine
FREE = dict.fromkeys(debugging.SHARES, math.inf)  # as if saving cost nothing: what is seen does not depend on the clock


def network(relus=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU() if relus else nn.Identity(), nn.Linear(16, 2))


def train(
    folder,
    lr=0.3,
    scale=1.0,
    epochs=4,
    steps=12,
    model=None,
    labels=None,
    shares=FREE,
    momentum=0.0,
    gradient_scale=1.0,
):
    """Trains a small network on a task it can learn, under the hook, as train.py does; the hook, closed."""
    model = model or network()
    criterion = nn.CrossEntropyLoss()
    hook = Hook(folder, model, criterion, epochs * steps, shares=shares)
    hook.gradient_scale = gradient_scale
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    inputs, others = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(1))
    truth, other_truth = (inputs[:, 0] > 0).long(), (others[:, 0] > 0).long()
    labels = truth if labels is None else labels
    for _ in range(epochs):
        total = 0.0
        for _ in range(steps):
            hook.before_step()
            loss = criterion(model(inputs) * scale, labels)
            optimizer.zero_grad()
            (loss * gradient_scale).backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= gradient_scale
            optimizer.step()
            total += float(loss.detach())
        hook.pause()
        with torch.no_grad():
            validation = criterion(model(others) * scale, other_truth)
        hook.epoch(total / steps, float(validation))
    hook.close()
    assert hook.error == ""
    return hook


def judged(folder, **checks) -> tuple[dict, Observations]:
    with smdebug_library.smdebug():
        judge = Judge(folder, {name: checks.get(name, {}) for name in TENSOR_RULES})
        judge.look()
    return {finding.rule: finding for finding in judge.findings()}, judge.seen


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("healthy") / "tensors"
    train(folder)
    return judged(folder)


def test_a_healthy_training_passes_every_rule(healthy):
    found, _ = healthy
    assert {name: finding.status for name, finding in found.items()} == dict.fromkeys(TENSOR_RULES, "NoIssuesFound")


def test_gradients_weights_relus_and_losses_of_both_modes_are_saved(healthy):
    _, seen = healthy
    assert {name.split("_")[-1] for name in seen.gradients} == {"0.weight", "2.weight"}
    assert len(seen.weights) == 2
    assert set(next(iter(seen.gradients.values()))[0][1]) == {"mean", "abs_max", "std", "abs_mean", "l2_norm"}
    (units,) = {len(units) for saved in seen.activity.values() for _, units in saved}
    assert units == 16 and list(seen.activity) == ["1.relu_output_0"]
    assert len(seen.losses) == 48 and seen.losses[-1][1] < seen.losses[0][1]
    assert len(seen.epochs) == 4
    for number, (_, mean, _) in enumerate(seen.epochs):
        of_epoch = [loss for _, loss in seen.losses[12 * number : 12 * number + 12]]
        assert mean == pytest.approx(sum(of_epoch) / 12, rel=1e-5)


def dead_network():
    model = network()
    with torch.no_grad():
        model[0].bias.fill_(-50)
    return model


def zero_network():
    """All units are the same and learn the same: no gradient tells them apart."""
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def random_labels():
    return torch.randint(2, (64,), generator=torch.Generator().manual_seed(2))


TROUBLE = {
    "VanishingGradient": {"scale": 1e-9},
    "ExplodingTensor": {"lr": 1e30, "scale": 1e6},
    "LossNotDecreasing": {"lr": 1e-9},
    "DeadRelu": {"model": dead_network},
    # labels that mean nothing can be learnt by heart, and that is all
    "Overfit": {"labels": random_labels, "lr": 0.5, "momentum": 0.9, "epochs": 8},
    "Overtraining": {"epochs": 24, "lr": 1.0, "momentum": 0.9},
    "PoorWeightInitialization": {"model": zero_network, "lr": 1e-12},
}


@pytest.mark.parametrize("rule", TROUBLE)
def test_trouble_in_a_real_training_is_found(tmp_path, rule):
    settings = {name: value() if callable(value) else value for name, value in TROUBLE[rule].items()}
    train(tmp_path / "tensors", **settings)
    found, _ = judged(tmp_path / "tensors")
    assert found[rule].status == "IssuesFound", found[rule]
    assert found[rule].blocking == (rule in {"VanishingGradient", "ExplodingTensor", "LossNotDecreasing"})
    assert {"step", "tensor", "value"} <= found[rule].evidence.keys() and found[rule].advice


def test_every_tensor_rule_has_a_run_that_triggers_it():
    assert set(TROUBLE) == set(TENSOR_RULES)


@pytest.mark.parametrize(("rare", "status"), [(2, "IssuesFound"), (30, "NoIssuesFound")])
def test_class_imbalance_of_a_trained_model(tmp_path, rare, status):
    torch.manual_seed(0)
    labels = torch.arange(64) < rare
    inputs = torch.randn(64, 8) + 3 * labels[:, None]
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(inputs), labels.long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predicted = model(inputs).argmax(1)
    confusion = [[int(((labels == t) & (predicted == p)).sum()) for p in (0, 1)] for t in (0, 1)]
    assert CLASS_IMBALANCE.judge(({"common": 64 - rare, "rare": rare}, confusion)).status == status


def test_gradients_are_saved_as_they_are_without_the_loss_scale(tmp_path, healthy):
    train(tmp_path / "tensors", gradient_scale=1024.0)
    _, seen = judged(tmp_path / "tensors")
    for name, saved in healthy[1].gradients.items():
        for (_, expected), (_, found) in zip(saved, seen.gradients[name], strict=True):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_a_dear_hook_saves_the_start_and_then_rarely(tmp_path, monkeypatch):
    """With a clock on which every save takes as long as hundreds of steps, what is not paid for is not saved."""
    now = 0.0

    def clock():
        nonlocal now
        now += 0.001
        return now

    monkeypatch.setattr(debugging.time, "perf_counter", clock)
    hook = train(tmp_path / "tensors", epochs=10, steps=60, shares=dict.fromkeys(debugging.SHARES, 0.02))
    _, seen = judged(tmp_path / "tensors")
    full = [step for step, _ in next(iter(seen.gradients.values()))]
    assert full[:2] == [0, 1] and len(full) < 10
    assert len(seen.epochs) == 10  # those put off were saved at the end
    assert all(allowance.spent > 0 for allowance in hook.allowances.values())


def test_an_allowance_is_a_share_of_the_time(monkeypatch):
    now = 0.0
    monkeypatch.setattr(debugging.time, "perf_counter", lambda: now)
    allowance = Allowance(0.05)
    allowance.pay(1.0, price=True)
    now = 39.9
    assert not allowance.affords()  # 2 s of saves in 39.9 s are more than 5 %
    now = 40.1
    assert allowance.affords()


def test_steps_that_are_not_saved_are_not_touched(tmp_path):
    model, criterion = network(), nn.CrossEntropyLoss()
    hook = Hook(tmp_path / "tensors", model, criterion, 1000, shares=dict.fromkeys(debugging.SHARES, 0.0))
    for _ in range(4):
        hook.before_step()
        criterion(model(torch.randn(4, 8)), torch.zeros(4, dtype=torch.int64)).backward()
    assert hook.handles == [] and not criterion._forward_hooks and not model[1]._forward_hooks
    hook.close()


def test_a_fault_of_the_hook_is_not_the_trainings(tmp_path, monkeypatch):
    model, criterion = network(), nn.CrossEntropyLoss()
    hook = Hook(tmp_path / "tensors", model, criterion, 10, shares=FREE)
    monkeypatch.setattr(hook, "_begin", lambda *_: 1 / 0)
    for _ in range(3):
        hook.before_step()
        criterion(model(torch.randn(4, 8)), torch.zeros(4, dtype=torch.int64)).backward()
    assert "ZeroDivisionError" in hook.error and hook.handles == []


def test_activity_is_the_share_of_positive_values_by_channel():
    output = torch.zeros(2, 3, 28, 28)
    output[:, 0] = 1
    output[0, 1] = 1
    assert activity(output).tolist() == [100, 50, 0]
    assert activity(torch.tensor([[0.0, 1.0], [0.0, 0.0]])).tolist() == [0, 50]


def test_tensors_go_where_sagemakers_debugger_looks(tmp_path, monkeypatch):
    monkeypatch.setenv("SMDEBUG_CONFIG_FILE_PATH", str(tmp_path / "config.json"))
    assert tensors_folder(tmp_path) == tmp_path
    (tmp_path / "config.json").write_text(json.dumps({"S3OutputPath": "s3://b/p"}))
    assert str(tensors_folder(tmp_path)) == "/opt/ml/output/tensors"
    (tmp_path / "config.json").write_text(json.dumps({"LocalPath": "/opt/ml/here"}))
    assert str(tensors_folder(tmp_path)) == "/opt/ml/here"


def test_without_smdebug_and_wheel_the_error_says_what_to_do(tmp_path):
    with pytest.raises(ImportError, match="no-deps smdebug"):
        smdebug_library.install_wheel(tmp_path)


def test_a_folder_that_an_interrupted_run_left_is_emptied(tmp_path):
    begun = time.time()
    (tmp_path / "tensors").mkdir()
    (tmp_path / "tensors" / "old").write_text("")
    train(tmp_path / "tensors", epochs=1)
    assert not (tmp_path / "tensors" / "old").exists()
    assert (tmp_path / "tensors" / "index").stat().st_mtime >= begun - 1
