"""The step: what micro-batches, precision and memory change, and what they must not."""

import copy
import math

import pytest
import torch
from torch import nn

import model as models
import precision
from arguments import TrainingError
from checkpoint import State
from precision import Precision, half
from steps import (
    BalancedLoss,
    Learner,
    better,
    class_weights,
    diverged,
    evaluate,
    past_its_best,
    renew_statistics,
    train_one_epoch,
)

CPU = torch.device("cpu")


class Crowded(nn.Module):
    """A network on a GPU that has room for so many inputs at once."""

    def __init__(self, room: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.room, self.fc = room, nn.Linear(6, 3)

    def forward(self, inputs):
        if len(inputs) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.fc(inputs)


def learner(model, lr=0.1, parts=1):
    criterion = BalancedLoss(class_weights(torch.tensor([0, 0, 0, 1, 2, 2]), 3), label_smoothing=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return Learner(model, criterion, optimizer, schedule, Precision(CPU, "float32"), parts)


def batch(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randint(3, (count,), generator=generator)


@pytest.mark.parametrize("common", [1, 9, 200])
def test_the_loss_of_guessing_is_the_same_however_rare_a_class_is_and_a_right_answer_is_best(common):
    labels = torch.tensor([0] * common + [1])
    criterion = BalancedLoss(class_weights(labels, 2), label_smoothing=0.1)
    logits = torch.zeros(2, 2, requires_grad=True)  # the answers to pictures of either class
    loss = criterion(logits[labels], labels)
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    right = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    torch.testing.assert_close(logits.grad, 0.225 * right, msg="both classes count alike")
    optimum = math.log(0.95 / 0.05) / 2 * -right
    assert float(criterion(optimum[labels], labels)) == pytest.approx(-0.95 * math.log(0.95) - 0.05 * math.log(0.05))


@pytest.mark.parametrize("weighted", [True, False])
def test_a_splits_loss_does_not_depend_on_how_it_is_cut(weighted):
    labels = torch.tensor([0] * 20 + [1] * 4 + [2])  # by class, as the manifest of a snapshot is
    logits = torch.tensor([3.0, 0.0, 1.0]).repeat(len(labels), 1)
    criterion = BalancedLoss(class_weights(labels, 3)) if weighted else nn.CrossEntropyLoss()
    for size in (25, 8, 1):
        parts = zip(logits.split(size), labels.split(size), strict=True)
        loss, accuracy, _ = evaluate(nn.Identity(), parts, criterion, Precision(CPU, "float32"))
        assert loss == pytest.approx(float(criterion(logits, labels)), rel=1e-5) and accuracy == 0.8


@pytest.mark.parametrize("count", [8, 11])
def test_gradients_of_micro_batches_are_those_of_the_batch(count):
    inputs, labels = batch(count)
    whole, parted = learner(Crowded(100)), learner(Crowded(100), parts=4)
    expected, right = whole.accumulate(inputs, labels)
    found, also = parted.accumulate(inputs, labels)
    assert right == also and torch.allclose(expected, found, atol=1e-6)
    assert torch.allclose(whole.trained.fc.weight.grad, parted.trained.fc.weight.grad, atol=1e-6)


def test_a_batch_that_does_not_fit_is_computed_in_parts_to_the_same_step(capsys):
    inputs, labels = batch(16)
    roomy, crowded = learner(Crowded(100)), learner(Crowded(5))
    steps = []
    crowded.before_step = lambda: steps.append(1)
    for _ in range(2):
        losses = roomy.step(inputs, labels)[0], crowded.step(inputs, labels)[0]
        assert torch.allclose(*losses, atol=1e-6)
    assert torch.allclose(roomy.trained.fc.weight, crowded.trained.fc.weight, atol=1e-6)
    assert crowded.parts == 4 and "in 4 parts from now on" in capsys.readouterr().out
    crowded.step(*batch(3))  # the last batch of an epoch is smaller
    assert len(steps) == 3, "a step is one, in however many parts, also when it is tried again"


def test_a_batch_of_which_not_even_two_fit_ends_the_job_with_the_reason():
    with pytest.raises(TrainingError, match="a batch of 16 does not fit into the GPU's memory, not even in 8 parts"):
        learner(Crowded(1)).step(*batch(16))


@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), torch.bfloat16), ((7, 5), torch.float16), ((6, 1), None)]
)
def test_sixteen_bits_are_those_that_the_gpu_was_built_for(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert half(torch.device("cuda")) == expected
    assert half(torch.device("cuda"), "float32") is None


@pytest.mark.parametrize(("named", "expected"), [("avx512_bf16", torch.bfloat16), ("avx2", None)])
def test_a_cpu_without_bfloat16_computes_in_float32(monkeypatch, named, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {named: True})
    assert half(CPU) == expected


def test_float16_scales_the_loss_and_leaves_out_a_step_that_overflows(monkeypatch):
    monkeypatch.setattr(precision, "half", lambda device, wanted: torch.float16)
    scaled, plain = learner(Crowded(9)), learner(Crowded(9))
    scaled.precision = Precision(CPU)
    monkeypatch.setattr(scaled.precision, "dtype", None)  # the scale alone: float32 tells what it changes
    assert scaled.precision.scaler.get_scale() == 1024
    inputs, labels = batch(8)
    scaled.step(inputs, labels)
    plain.step(inputs, labels)
    assert torch.allclose(scaled.trained.fc.weight, plain.trained.fc.weight, atol=1e-6)
    before = copy.deepcopy(scaled.trained.state_dict())
    scaled.step(inputs * float("inf"), labels)
    assert all(torch.equal(value, before[name]) for name, value in scaled.trained.state_dict().items())
    assert scaled.precision.scaler.get_scale() == 512


class Batches:
    steps_per_epoch = 5

    def train(self, epoch, start):
        return (batch(4, seed=100 * epoch + step) for step in range(start, self.steps_per_epoch))


def test_an_epoch_goes_on_in_its_middle_to_the_same_sums_and_weights():
    whole, cut = learner(Crowded(9)), learner(Crowded(9))
    expected, state = State(), State()
    assert train_one_epoch(whole, Batches(), expected, lambda: False)
    assert not train_one_epoch(cut, Batches(), state, lambda: state.step == 2) and state.step == 2
    assert train_one_epoch(cut, Batches(), state, lambda: False)
    assert (state.step, state.seen, state.correct) == (5, 20, expected.correct)
    assert state.loss == pytest.approx(expected.loss) and state.lr == expected.lr == 0.1
    assert torch.equal(whole.trained.fc.weight, cut.trained.fc.weight)


def test_the_loss_of_an_epoch_is_that_which_evaluation_finds_with_the_same_weights():
    still, state = learner(Crowded(9), lr=0.0), State()
    train_one_epoch(still, Batches(), state, lambda: False)
    found = evaluate(still.trained, Batches().train(0, 0), still.criterion, still.precision)
    assert state.end_epoch(*found[:2], 0.0)["train_loss"] == pytest.approx(found[0])


def epoch(number, accuracy, loss=1.0):
    return {"epoch": number, "train_loss": 1.0, "validation_accuracy": accuracy, "validation_loss": loss}


def test_the_best_epoch_is_kept_and_patience_ends_the_training():
    state = State()
    for number, accuracy in enumerate((0.5, 0.8, 0.7, 0.8), 1):
        assert past_its_best(State(history=[epoch(number, accuracy)], best=state.best), patience=3) == ""
        metrics = epoch(number, accuracy, loss=number)
        state.best = metrics if better(metrics, state.best) else state.best
    assert state.best["epoch"] == 2, "with equally many right, the smaller loss"
    assert not better(epoch(9, 1.0, float("nan")), state.best)
    assert past_its_best(State(history=[epoch(5, 0.8)], best=state.best), 3) == "no better epoch than 2 for 3 epochs"
    assert "no finite number" in diverged(State(history=[epoch(3, 0.8, float("inf"))]))
    assert diverged(State(history=[epoch(3, 0.8)])) == ""


def test_statistics_are_those_of_the_sample_and_frozen_layers_keep_theirs():
    torch.manual_seed(0)
    trained = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    stale, frozen, _ = trained
    for layer in (stale, frozen):  # as an epoch on other pictures leaves them
        layer.running_mean.fill_(9.0)
    trained.train()
    frozen.eval()
    inputs = 4 * torch.randn(6, 3, 5, 5) + 2
    renew_statistics(trained, iter(inputs.split(3)), Precision(CPU, "float32"))
    torch.testing.assert_close(stale.running_mean, inputs.mean((0, 2, 3)))
    of_batches = [part.var((0, 2, 3)) for part in inputs.split(3)]
    torch.testing.assert_close(stale.running_var, sum(of_batches) / 2)
    assert (frozen.running_mean == 9).all() and stale.momentum == 0.1
    assert all(parameter.grad is None for parameter in trained.parameters())


def test_folded_batchnorm_changes_no_answer():
    torch.manual_seed(0)
    model = models.build(2).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = models.features(model, images)
        models.fold_batchnorm(model)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        torch.testing.assert_close(models.features(model, images), expected, rtol=1e-4, atol=1e-5)
