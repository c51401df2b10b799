"""What the demo shows while it works."""

import io

import pytest
from rich.console import Console

from local.demo.progress import Display, cause_in_words, duration, in_words, metrics


@pytest.fixture
def display():
    return Display(Console(file=io.StringIO(), width=120, highlight=False))


def shown(display):
    return display.console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.44, "0.4 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s")]
)
def test_durations_read_well(seconds, words):
    assert duration(seconds) == words


def test_a_state_is_named_in_words():
    assert in_words("CreateEndpointConfig") == "create endpoint config"


def test_metrics_of_a_line_of_the_training_log():
    line = "validation:accuracy=0.9132; validation:loss=2.5e-05; train:loss=0.3; epoch=3;"
    assert metrics(line) == {"validation:accuracy": 0.9132, "validation:loss": 2.5e-05, "train:loss": 0.3, "epoch": 3.0}


def test_of_a_failed_job_the_reason_is_shown_and_not_its_whole_description():
    described = '{"TrainingJobName": "t", "FailureReason": "AlgorithmError: \\"lr\\" is missing", "RoleArn": "r"}'
    assert cause_in_words(f"Tune: Failed: {described}") == 'Tune: Failed: AlgorithmError: "lr" is missing'
    described = '{"ExitMessage": "no pictures", "FailureReason": "AlgorithmError: See job logs", "RoleArn": "r"}'
    assert cause_in_words(f"Prepare: {described}") == "Prepare: AlgorithmError: See job logs: no pictures"
    assert cause_in_words("x" * 500) == "x" * 300 + " …"


def test_a_step_that_fails_is_marked_and_timed(display):
    with pytest.raises(ValueError, match="no"), display.step("Deploy"):
        raise ValueError("no")
    assert display.steps[0].failed
    assert display.steps[0].seconds is not None
    assert "✗ Deploy" in shown(display)


def test_without_a_terminal_only_what_is_new_is_printed(display):
    with display.step("Train"):
        display.detail(["state: tune", "epoch 1 of 8"])
        display.detail(["state: tune", "epoch 2 of 8"])
    text = shown(display)
    assert text.count("state: tune") == 1
    assert "epoch 2 of 8" in text
