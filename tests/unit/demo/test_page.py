"""The page: complete in itself, true to the result, and safe with names from outside."""

import re
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from local.demo import page
from local.demo.data import Collection, Picture
from local.demo.loop import Run
from local.demo.pictures import pictures
from local.demo.progress import Step
from local.demo.run import Answer, Result
from local.demo.settings import Weights


def answer(picture, label, deployment=1):
    row = {
        "status": "CLASSIFIED",
        "label": label,
        "confidence": Decimal("0.9"),
        "deployment": Decimal(deployment),
        "model_version": f"26112216000{deployment}",
        "classes": [{"class": label, "probability": Decimal("0.9")}],
    }
    return Answer(picture, f"inbox/{picture.name}", row)


@pytest.fixture
def result():
    held_out = [
        Picture(f"{name}.jpg", data, name) for name in ("solid", "merle") for data in pictures(name, 1, seed=1, size=64)
    ]
    collection = Collection("test pictures", ["solid", "<b>brindle"], "merle", {}, held_out, held_out)
    found = Result(collection, Weights(None, "No weights."), 64, datetime(2026, 11, 22, 16, 0, tzinfo=UTC))
    found.before = [answer(held_out[0], "solid"), answer(held_out[1], "<b>brindle")]
    found.after = [answer(held_out[0], "solid", 2), answer(held_out[1], "merle", 2)]
    lost = Answer(held_out[1], "inbox/lost", None)
    found.stream = [answer(held_out[0], "solid", 1), answer(held_out[0], "solid", 2), lost]
    empty = Picture("empty.jpg", b"", None)
    found.broken = [Answer(empty, "inbox/empty.jpg", {"status": "REJECTED", "reason": "0 bytes"})]
    found.during_update = 2
    found.requests = {"Invocations": 9, "Invocation4XXErrors": 0, "Invocation5XXErrors": 1}
    found.runs = [Run("261122160001", "SUCCEEDED", 61.0, outcome="PROMOTED", deployment={}, report=b"<html>")]
    return found


STEPS = [Step("Draw", 100.0, 1.0), Step("Train", 101.0, 3.0)]


def test_figures_are_counted_from_the_answers(result):
    view = page.view(result, STEPS)
    assert [share["right"] for share in view["accuracy"]] == [1, 2]
    assert [share["right"] for share in view["novel"]] == [0, 1]
    assert view["stream"]["failed"] == 1
    assert view["stream"]["requests_failed"] == 1
    assert [model["count"] for model in view["stream"]["by_model"]] == [1, 1]
    assert [(step["left"], step["width"]) for step in view["steps"]] == [(0.0, 25.0), (25.0, 75.0)]


def test_the_page_needs_nothing_from_outside(result):
    html = page.render(result, STEPS)
    assert re.findall(r'(?:src|href)="(?!data:image/jpeg;base64,|report-)[^"]*"', html) == []
    assert "url(" not in html and "@import" not in html
    assert html.count("data:image/jpeg;base64,") == 2


def test_names_from_outside_are_escaped(result):
    html = page.render(result, STEPS)
    assert "<b>brindle" not in html
    assert "&lt;b&gt;brindle" in html


def test_problems_are_on_top(result):
    assert "The whole loop ran" in page.render(result, STEPS)
    result.problems = ["the gate said no"]
    html = page.render(result, STEPS)
    assert "The whole loop ran" not in html
    assert "the gate said no" in html


def test_the_page_of_a_demo_that_stopped_early_renders(result):
    result.before = result.after = result.stream = []
    result.runs, result.requests, result.problems = [], {}, ["run 1 ended FAILED"]
    assert "run 1 ended FAILED" in page.render(result, STEPS)


def test_writing_replaces_the_reports_of_the_demo_before(result, tmp_path):
    (tmp_path / "report-1.html").write_text("old")
    written = page.write(tmp_path, result, STEPS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "report-261122160001.html"]
    assert 'href="report-261122160001.html"' in written.read_text()


def test_a_file_that_is_no_picture_has_no_thumbnail():
    assert page.thumbnail(b"text") == ""
