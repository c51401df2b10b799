"""Every rule finds what it is for, and lets a healthy training pass."""

import math

import pytest

import rules
from rules import Observations


def gradient(name="gradient/layer.weight", abs_mean=1e-3, std=1e-2, abs_max=1.0, step=0):
    return {name: [(step, {"mean": 0.0, "std": std, "abs_mean": abs_mean, "abs_max": abs_max, "l2_norm": 1.0})]}


def run_of(train, validation, steps=10):
    """Observations of epochs with these losses, `steps` training steps each and one save of the means."""
    seen, step = Observations(), 0
    for before, after in zip(train, validation, strict=True):
        for _ in range(steps):
            seen.losses.append((step, before))
            step += 1
        seen.epochs.append((step, before, after))
        step += 1
    return seen


HEALTHY = run_of([1.6, 1.2, 0.9, 0.7, 0.6], [1.5, 1.2, 0.95, 0.75, 0.65])
HEALTHY.gradients = gradient()
HEALTHY.weights = gradient("layer.weight")
HEALTHY.activity = {"relu": [(0, [50.0, 0.0, 30.0])]}


def observed(**what):
    seen = run_of([1.6, 1.2, 0.9, 0.7, 0.6], [1.5, 1.2, 0.95, 0.75, 0.65])
    for name, value in what.items():
        setattr(seen, name, value)
    return seen


def stuck():
    seen = run_of([1.6] * 5, [1.6] * 5)
    for n, std in enumerate((1e-6, 1.0)):
        statistics = gradient(std=std)["gradient/layer.weight"][0][1]
        seen.gradients[f"gradient/{n}.weight"] = [(step, statistics) for step in range(10)]
    return seen


TRIGGERS = {
    "VanishingGradient": observed(gradients=gradient(abs_mean=1e-8)),
    "ExplodingTensor": observed(losses=[(0, math.nan)]),
    "LossNotDecreasing": run_of([1.6, 1.6, 1.6, 1.6, 1.6], [1.6, 1.6, 1.6, 1.6, 1.59]),
    "Overfit": run_of([1.6, 1.2, 0.8, 0.4, 0.2], [1.6, 1.4, 1.3, 1.3, 1.4]),
    "DeadRelu": observed(activity={"relu": [(0, [50.0, 40.0, 30.0]), (9, [0.0, 0.5, 30.0])]}),
    "Overtraining": run_of([0.5] * 8, [0.6] * 8),
    "PoorWeightInitialization": stuck(),
}


def test_every_tensor_rule_has_a_case():
    assert set(TRIGGERS) == set(rules.TENSOR_RULES)


@pytest.mark.parametrize("name", TRIGGERS)
def test_tensor_rule_is_triggered(name):
    finding = rules.TENSOR_RULES[name].judge(TRIGGERS[name])
    assert finding.status == "IssuesFound"
    assert finding.evidence is not None and {"step", "tensor", "value"} <= finding.evidence.keys()
    assert finding.advice
    assert finding.blocking == (name in {"VanishingGradient", "ExplodingTensor", "LossNotDecreasing"})


@pytest.mark.parametrize("name", TRIGGERS)
def test_tensor_rule_lets_a_healthy_training_pass(name):
    assert rules.TENSOR_RULES[name].judge(HEALTHY).status == "NoIssuesFound"


def test_infinite_weight_explodes_unless_only_nan_counts():
    seen = observed(weights=gradient("layer.weight", abs_max=math.inf))
    assert rules.TENSOR_RULES["ExplodingTensor"].judge(seen).evidence["tensor"] == "layer.weight"
    assert rules.TENSOR_RULES["ExplodingTensor"].judge(seen, only_nan=True).status == "NoIssuesFound"


def test_warm_up_and_convergence_are_no_issue_and_a_late_rise_does_not_block():
    judge = rules.TENSOR_RULES["LossNotDecreasing"].judge
    same = [1.0] * 5
    assert judge(run_of([1.3, 1.5, 0.8, 0.5, 0.5], same)).status == "NoIssuesFound"
    assert judge(run_of([1.6, 0.8, 0.5, 0.5, 0.51], same)).status == "NoIssuesFound"
    rise = judge(run_of([1.6, 0.8, 0.5, 0.7, 0.9], same))
    assert rise.status == "IssuesFound" and not rise.blocking and rise.evidence["before"] == 0.5


def test_a_loss_that_rises_for_good_blocks():
    finding = rules.TENSOR_RULES["LossNotDecreasing"].judge(run_of([1.6, 2.4, 3.1, 4.0], [1.7, 2.5, 3.2, 4.1]))
    assert finding.status == "IssuesFound" and finding.blocking


def test_a_training_that_has_not_come_below_guessing_by_half_time_blocks():
    """The first epoch may have been so bad that anything is lower."""
    exploded = run_of([13.2, 12.2, 2.1, 3.8], [1.0] * 4)
    judge = rules.TENSOR_RULES["LossNotDecreasing"].judge
    finding = judge(exploded, chance_loss=math.log(3), start_step=43)
    assert finding.blocking and finding.evidence["before"] == pytest.approx(1.0986, abs=1e-4)
    assert judge(exploded, chance_loss=math.log(3), start_step=44).status == "NoIssuesFound"  # too early to say
    assert not judge(exploded).blocking


@pytest.mark.parametrize(("losses", "blocks"), [([0.30, 0.31, 0.30], False), ([1.6, 1.1, 1.1], True)])
def test_a_training_from_a_good_model_need_not_get_better(losses, blocks):
    judge = rules.TENSOR_RULES["LossNotDecreasing"].judge
    assert judge(run_of(losses, [1.0] * 3), chance_loss=math.log(3)).blocking == blocks


def test_a_training_that_ends_worse_than_guessing_does_not_block_where_an_epoch_before_was_better():
    judge = rules.TENSOR_RULES["LossNotDecreasing"].judge
    finding = judge(run_of([0.35, 0.71, 0.70], [1.0] * 3), chance_loss=math.log(2))
    assert finding.status == "IssuesFound" and not finding.blocking and finding.evidence["before"] == 0.35


def test_a_training_of_a_few_steps_is_not_judged_by_its_loss():
    judge = rules.TENSOR_RULES["LossNotDecreasing"].judge
    assert judge(run_of([1.11, 1.14], [1.0] * 2, steps=4), chance_loss=math.log(3)).status == "NoIssuesFound"
    assert judge(run_of([1.11, 1.14], [1.0] * 2, steps=10), chance_loss=math.log(3)).blocking


def test_small_gradients_spoil_only_a_model_that_has_learnt_nothing():
    judge = rules.TENSOR_RULES["VanishingGradient"].judge
    small = gradient(abs_mean=1e-8, step=7)
    for loss, chance, blocks in ((0.3, math.log(2), False), (0.7, math.log(2), True), (0.3, math.inf, True)):
        finding = judge(observed(losses=[(7, loss)], gradients=small), chance_loss=chance)
        assert finding.status == "IssuesFound" and finding.blocking == blocks
    both = {name: saved + gradient(abs_mean=1e-9, step=8)[name] for name, saved in small.items()}
    finding = judge(observed(losses=[(7, 0.3), (8, 0.8)], gradients=both), chance_loss=math.log(2))
    assert finding.blocking and finding.evidence["step"] == 8


def test_a_long_first_epoch_is_judged_by_its_steps():
    seen = Observations(losses=[(step, 1.0) for step in range(40)])
    judge = rules.TENSOR_RULES["LossNotDecreasing"].judge
    assert judge(seen).blocking
    assert judge(Observations(losses=[(step, 1.0 - step / 100) for step in range(40)])).status == "NoIssuesFound"


def test_overfit_waits_for_its_patience_and_passes_when_the_excess_is_gone():
    judge = rules.TENSOR_RULES["Overfit"].judge
    assert judge(run_of([1.6, 1.0, 0.9, 0.8], [1.6, 1.0, 0.9, 1.3])).status == "NoIssuesFound"
    assert judge(run_of([1.6, 1.0, 0.9, 0.8], [2.6, 2.0, 1.9, 0.8])).status == "NoIssuesFound"
    assert judge(run_of([1.6, 1.0, 0.9, 0.8], [1.6, 1.0, 1.9, 1.8])).status == "IssuesFound"
    late = judge(run_of([1.6, 1.0, 0.9, 0.8], [1.6, 1.0, 1.9, 1.8]), start_step=40)
    assert late.status == "NoIssuesFound"


def test_class_imbalance_by_count_and_by_misprediction():
    even, poor = [[9, 1], [1, 9]], [[9, 1], [8, 2]]
    judge = rules.CLASS_IMBALANCE.judge
    assert judge(({"a": 50, "b": 50}, even)).status == "NoIssuesFound"
    assert judge(({"a": 500, "b": 20}, even)).evidence["tensor"] == "b"
    assert judge(({"a": 50, "b": 30}, poor)).evidence["tensor"] == "b"
    assert judge(({"a": 50, "b": 49}, poor)).status == "NoIssuesFound", "a picture less explains nothing"


def test_a_rule_that_cannot_run_is_an_error_not_a_pass():
    finding = rules.TENSOR_RULES["Overfit"].judge(None)
    assert finding.status == "Error" and "AttributeError" in finding.evidence["value"]
