"""How often the gate is wrong: the figures in docs/gate.md are what its own rules give."""

import re

import pytest

from benchmarks.gate import CHANGES, TWICE, blocked, outcomes
from judge_challenger.gate import Thresholds
from tests.makers import template

THRESHOLDS = Thresholds(
    accuracy_floor=0, margin=0.02, max_drop=0.2, confidence=0.95, min_test_pictures=1, class_floor=0,
    max_latency_ratio=1,
)  # fmt: skip
PAGE = (template.ROOT / "docs" / "gate.md").read_text()


@pytest.mark.parametrize(("lost", "won"), [(0.0, 0.0), (0.1, 0.0), (0.05, 0.05), (0.5, 0.5)])
def test_the_probabilities_of_all_outcomes_add_up(lost: float, won: float):
    assert sum(probability for _, _, probability in outcomes(50, lost, won)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("row", "n", "rule"), [("20", 20, TWICE), ("60", 60, TWICE), ("100", 100, TWICE),
                                                ("the margin alone, 30", 30, "margin")])  # fmt: skip
def test_the_page_says_what_the_benchmark_computes(row: str, n: int, rule: str):
    line = re.search(rf"^\| {row} \| (.+) \|$", PAGE, re.MULTILINE)
    assert line
    shares = [blocked(n, 0.1, change, 0.7, THRESHOLDS)[rule] for change in CHANGES]
    assert line[1].split(" | ") == [f"{share:.1%}".replace("%", " %") for share in shares]


def test_the_defaults_are_those_of_the_template():
    parameters = template.template()["Parameters"]
    found = [parameters[name]["Default"] for name in ("GateMargin", "GateMaxDrop", "GateConfidence")]
    assert found == [THRESHOLDS.margin, THRESHOLDS.max_drop, THRESHOLDS.confidence]
    for name in ("AccuracyFloor", "GateMargin", "GateMaxDrop", "GateConfidence", "GateMinTestPictures", "NewClassFloor",
                 "MaxLatencyRatio"):  # fmt: skip
        assert re.search(rf"`{name}` \({parameters[name]['Default']}\)", PAGE), name
