"""What the benchmarks of serving conclude from what they measured."""

from __future__ import annotations

import pytest

from benchmarks import serving, soak
from benchmarks.model import layers
from benchmarks.serving import compare, judged
from benchmarks.soak import Sample, judge, slope


def figures(rate: float, p50: float = 10.0, memory: float = 300.0) -> dict:
    return {"1": {"p50_ms": p50}, "8": {"rate": rate}, "memory_mb": memory}


def test_bounds_are_judged_against_the_best_of_those_that_ran():
    found = {
        "Houndloop, f32": figures(100, p50=20, memory=300),
        "TorchServe": figures(40, p50=39, memory=900),
        "BentoML": figures(45),
        "FastAPI": figures(56),
        "FastAPI, frozen": figures(90),
    }
    results = {result["what"]: (result["times"], result["ok"]) for result in judged(found)}
    assert results == {
        "requests per second, 8 connections: Houndloop, f32 against TorchServe": (2.5, True),
        "requests per second, 8 connections: Houndloop, f32 against FastAPI": (1.79, False),
        "p50, 1 connection: Houndloop, f32 against TorchServe": (1.95, True),
        "memory: Houndloop, f32 against TorchServe": (3.0, True),
    }
    del found["TorchServe"]
    assert [result["what"].rpartition(" ")[2] for result in judged(found)] == ["FastAPI"]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ([("a", 0.5), ("b", 0.3)], ""),
        ([("b", 0.401), ("a", 0.399)], "picture 0 is a b"),
        ([("a", 0.45), ("b", 0.3)], "picture 0: a has 0.4500"),
        ([("c", 0.5), ("b", 0.3)], "picture 0 is a c"),
        ([("a", 0.5)], "picture 0 has 1 classes"),
    ],
)
def test_answers_are_compared_within_a_tolerance(answer, problem):
    found = compare([[("a", 0.5), ("b", 0.3)]], [answer], tolerance=0.01)
    assert [each.startswith(problem) for each in found] == ([True] if problem else [])


def test_answers_as_likely_as_each_other_may_change_places():
    assert compare([[("a", 0.401), ("b", 0.4)]], [[("b", 0.401), ("a", 0.4)]], tolerance=0.01) == []


def test_the_layers_are_those_of_resnet18():
    """torchvision says 1.81 G multiply-accumulates for 1,000 classes."""
    operations = sum(layer.count * layer.operations for layer in layers(1000))
    assert operations / 2e9 == pytest.approx(1.814, abs=0.001)
    assert sum(layer.count for layer in layers(1000)) == 21


def test_a_line_through_samples_ignores_outliers():
    points = [(float(x), 5.0 + 2.0 * x) for x in range(40)]
    points[7] = (7.0, 900.0)
    assert slope(points) == pytest.approx(2.0)
    assert slope([(1.0, 1.0)]) == 0.0


def test_memory_that_fills_up_once_is_flat_and_memory_that_leaks_is_not():
    filling = [Sample(requests, min(300, 200 + requests // 10) * 10**6, 4, 30) for requests in range(0, 4001, 100)]
    assert judge(filling)["rise_percent"] == 0.0
    leaking = [Sample(requests, 300 * 10**6 + requests * 1000, 4, 30) for requests in range(0, 4001, 100)]
    found = judge(leaking)
    assert found["rise_mb"] == 100.0 and found["rise_percent"] > 100 * soak.MAX_RISE


def test_every_bound_is_about_servers_that_there_are(tmp_path):
    names = {server.name for server in serving.chosen(tmp_path, "")}
    assert {bound.ours for bound in serving.BOUNDS} <= names
    assert {name for bound in serving.BOUNDS for name in bound.others} <= names
