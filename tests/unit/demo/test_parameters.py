"""With few pictures the demo lowers what the gate asks for, and says so; with enough it takes the defaults."""

from pathlib import Path

import pytest

from local.demo import run
from local.demo.data import Collection, Picture
from local.demo.settings import Weights

WEIGHTS = Weights(Path("resnet18-f37072fd.pth"), "found")


def collection(count: int) -> Collection:
    labelled = {name: [Picture(f"{n}.jpg", b"", name) for n in range(count)] for name in ("a", "b", "c")}
    return Collection("drawn", ["a", "b"], "c", labelled, [], [])


@pytest.mark.parametrize(
    ("count", "lowered"),
    [
        (65, set()),
        (40, {"GateMinTestPictures", "GateMaxDrop"}),
        (12, {"GateMinTestPictures", "GateMaxDrop", "AccuracyFloor", "NewClassFloor"}),
    ],
)
def test_the_gate_is_lowered_as_far_as_there_is_nothing_to_measure_by(count: int, lowered: set[str]):
    given = collection(count)
    chosen = run.parameters(given, WEIGHTS)
    assert {name for name in chosen if name.startswith("Gate") or name.endswith("Floor")} == lowered
    assert bool(run.caution(given, WEIGHTS)) == bool(lowered)
