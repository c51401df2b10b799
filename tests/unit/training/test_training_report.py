"""The report: whole, in itself complete, and true to the training that it is about."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import report as reports
from profiling import verdict
from report import Report, write_report
from rules import Finding
from tests.unit.training.jobs import PATTERNS, ROOT, job_environment, run

HEADINGS = ["Findings", "Run summary", "Learning", "The machine", "Steps", "Classes", "Most wrong about"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What a page is made of: headings, tables as rows of cells, pictures, and what its scripts draw."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.headings: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.words = ""
        self.tag, self.cell = "", False
        self.feed(self.text)
        decoder, self.figures = json.JSONDecoder(), []
        for start in re.finditer(r'Plotly\.newPlot\(\s*"[\w-]+",\s*', self.text):
            traces, end = decoder.raw_decode(self.text, start.end())
            layout, _ = decoder.raw_decode(self.text, re.compile(r",\s*").match(self.text, end).end())
            self.figures.append((traces, layout))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.tag = tag
        self.links += [value for name in ("src", "href") if (value := given.get(name))]
        if tag == "img":
            self.pictures.append(given["src"] or "")
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = True

    def handle_data(self, data: str) -> None:
        if self.tag in ("script", "style"):
            return
        self.words += data
        if self.tag == "h2" and data.strip():
            self.headings.append(data)
        elif self.cell:
            self.tables[-1][-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.tag, self.cell = "", self.cell and tag != "table"

    def figure(self, title: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        (found,) = (figure for figure in self.figures if figure[1].get("title", {}).get("text") == title)
        return found

    def table(self, head: str) -> dict[str, list[str]]:
        """The rows of the table whose first column is called so, by their first cell."""
        (found,) = (table for table in self.tables if table[0][0] == head)
        return {row[0].strip(): [cell.strip() for cell in row] for row in found[1:]}


@pytest.fixture(scope="module")
def job(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a tiny training wrote its findings and its report."""
    opt_ml = tmp_path_factory.mktemp("job")
    run("train.py", "--training", prepared, "--batch-size", 8, "--epochs", 3, "--image-size", 32, "--profile", "true",
        "--model-version", "261122160000", "--dataset-hash", "abc", opt_ml=opt_ml)  # fmt: skip
    return opt_ml / "output" / "data"


@pytest.fixture(scope="module")
def page(job: Path) -> Page:
    return Page(job / "report.html")


@pytest.fixture(scope="module")
def findings(job: Path) -> dict[str, Any]:
    return json.loads((job / "findings.json").read_text())


def test_findings_come_first_and_every_part_is_there(page: Page):
    assert [heading for heading in page.headings if heading in HEADINGS] == HEADINGS
    assert "Training of model 261122160000" in page.words


def test_it_needs_nothing_from_elsewhere(page: Page):
    assert all(link.startswith("data:") for link in page.links)
    assert "@import" not in page.text.partition("</style>")[0] and "url(" not in page.text.partition("</style>")[0]


def test_every_rule_is_named(page: Page, findings: dict[str, Any]):
    shown = page.table("Rule") if any(rule["status"] != "NoIssuesFound" for rule in findings["rules"]) else {}
    for rule in findings["rules"]:
        if rule["status"] == "NoIssuesFound":
            assert rule["rule"] in page.words and rule["rule"] not in shown
        else:
            assert shown[rule["rule"]][1].startswith(rule["status"])


def test_pictures_that_were_left_out_are_named(page: Page, findings: dict[str, Any]):
    (skipped,) = findings["summary"]["skipped"]
    assert page.table("Picture")[skipped["origin"]][1] == skipped["reason"]


@pytest.mark.parametrize("title", ["Loss", "Accuracy"])
def test_curves_of_both_splits_go_through_every_epoch(page: Page, findings: dict[str, Any], title: str):
    traces, _ = page.figure(title)
    assert {trace["name"]: trace["x"] for trace in traces} == dict.fromkeys(("train", "validation"), [1, 2, 3])
    metrics = findings["summary"]["metrics"]
    for trace in traces:
        assert trace["y"][metrics["epoch"] - 1] == pytest.approx(metrics[f"{trace['name']}_{title.lower()}"], abs=1e-6)


def test_learning_rate_and_gradient_norms(page: Page):
    ((rate,), _) = page.figure("Learning rate")
    assert len(rate["y"]) == 3 and all(value > 0 for value in rate["y"])
    layers, layout = page.figure("Gradient norms by layer (l2)")
    assert {"conv1.weight", "layer4.1.conv2.weight", "fc.weight"} <= {layer["name"] for layer in layers}
    assert layout["yaxis"]["type"] == "log" and all(value > 0 for layer in layers for value in layer["y"])


def test_the_time_of_a_step_is_broken_down_to_the_whole(page: Page, findings: dict[str, Any]):
    traces, layout = page.figure("Milliseconds of each step")
    assert [trace["name"] for trace in traces] == ["data wait", "forward", "backward", "rest"]
    assert layout["barmode"] == "stack" and all(value >= 0 for trace in traces for value in trace["y"])
    assert {len(trace["y"]) for trace in traces} == {findings["summary"]["steps"]["count"]}
    rows = page.table("Part")
    shares = [float(rows[trace["name"]][1].removesuffix(" %")) for trace in traces]
    assert sum(shares) == pytest.approx(100, abs=0.3) and rows["whole step"][1] == "100.0 %"
    assert shares[1] + shares[2] > 10, "a network is trained"


def test_classes_as_the_findings_have_them(page: Page, findings: dict[str, Any]):
    ((matrix,), _) = page.figure("Confusion matrix")
    assert matrix["x"] == matrix["y"] == sorted(PATTERNS)
    per_class = findings["summary"]["per_class"]
    rows = page.table("Class")
    assert rows.keys() == per_class.keys()
    for name, row in per_class.items():
        shown = ["–" if row[key] is None else f"{100 * row[key]:.1f} %" for key in ("precision", "recall")]
        assert rows[name] == [name, str(row["n"]), *shown]


def test_without_trials_there_is_no_part_about_them(page: Page):
    assert "Tuning trials" not in page.headings


# Made up, for what a tiny training does not show ----------------------------------------------------------------------


def trial(number: int, objective: float | None, lr: float = 0.001, batch_size: int = 16) -> dict[str, Any]:
    status = "Stopped" if objective is None else "Completed"
    return {
        "name": f"t{number}",
        "status": status,
        "objective": objective,
        "lr": str(lr),
        "batch-size": str(batch_size),
    }


@pytest.fixture
def made() -> Report:
    """A report of two classes, one picture of each of which is taken for the other; nothing was sampled."""
    seen = SimpleNamespace(step_seconds=[], wait_seconds=[], forward_seconds=[], backward_seconds=[])
    images = np.zeros((4, 8, 8, 3), np.uint8)
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
    return Report(
        findings=[Finding("ExplodingTensor", "IssuesFound", True, {}, {"step": 12, "value": "nan"}, "Lower lr.")],
        summary={
            "model_version": "1", "dataset_hash": "d", "hyperparameters": {"lr": 0.1}, "epochs": 1, "skipped": [],
            "metrics": {"epoch": 1}, "pictures": {"train": 4}, "per_class": {}, "system": {}, "steps": {},
        },
        history=[{"epoch": 1, "lr": 0.1, "seconds": 1.0, "train_loss": math.nan, "validation_loss": math.inf,
                  "train_accuracy": 0.5, "validation_accuracy": 0.5}],
        gradients={}, sampler=SimpleNamespace(seen=seen, times=[], io=[]), confusion=[[1, 1], [1, 1]],
        classes=["<b>cat", "dog"], trials=[], probabilities=probabilities,
        held_out=SimpleNamespace(images=images, labels=torch.tensor([0, 0, 1, 0])),
    )  # fmt: skip


def test_a_training_that_ended_early_says_so_first(made: Report, tmp_path: Path):
    ended = replace(
        made, verdict={"status": "EndedEarly", "reason": "train loss nan"}, recommendation={"batch_size": 8}
    )
    words = Page(write_report(ended, tmp_path / "r.html")).words
    places = [words.index(part) for part in ("Ended early: train loss nan", "must not be promoted: ExplodingTensor",
              "batch size 8", "Lower lr.", "Run summary")]  # fmt: skip
    assert places == sorted(places)


def test_the_most_confident_mistakes_come_first_and_names_are_no_markup(made: Report, tmp_path: Path):
    page = Page(write_report(made, tmp_path / "r.html"))
    assert re.findall(r"(\S+), taken for (\S+) \((\d+%)\)", page.words) == [
        ("<b>cat", "dog", "80%"), ("<b>cat", "dog", "60%"),
    ]  # fmt: skip
    assert len(page.pictures) == 2 and all(src.startswith("data:image/jpeg") for src in page.pictures)


def test_losses_that_are_no_numbers_leave_gaps(made: Report, tmp_path: Path):
    traces, _ = Page(write_report(made, tmp_path / "r.html")).figure("Loss")
    assert [trace["y"] for trace in traces] == [[None], [None]]


def test_the_best_trial_is_marked(made: Report, tmp_path: Path):
    trials = [trial(1, 0.7), trial(2, 0.9, lr=0.01, batch_size=32), trial(3, None), trial(4, 0.8)]
    page = Page(write_report(replace(made, trials=trials), tmp_path / "r.html"))
    ((lines,), _) = [figure for figure in page.figures if figure[0][0]["type"] == "parcoords"][0]
    values = {axis["label"]: axis["values"] for axis in lines["dimensions"]}
    assert values == {"lr": [-3, -3, -2], "batch-size": [16, 16, 32], "validation accuracy": [0.7, 0.8, 0.9]}
    assert lines["line"]["color"][-1] == 1 and max(lines["line"]["color"][:-1]) < 0.95
    rows = page.table("Trial")
    assert list(rows) == ["t2 ★ best", "t4", "t1", "t3"] and rows["t3"][-1] == "–"


def test_trials_of_which_none_has_a_result_are_only_listed(made: Report, tmp_path: Path):
    page = Page(write_report(replace(made, trials=[trial(1, None)]), tmp_path / "r.html"))
    assert list(page.table("Trial")) == ["t1"] and not [f for f in page.figures if f[0][0]["type"] == "parcoords"]


def test_a_report_that_cannot_be_drawn_costs_no_model(prepared: Path, tmp_path: Path):
    program = "import report, sys, train; report.write_report = None; sys.exit(train.main())"
    environment = job_environment(tmp_path)
    environment["PYTHONPATH"] += f"{os.pathsep}{ROOT / 'training'}"
    words = ["--training", prepared, "--epochs", 2, "--image-size", 32, "--profile", "true"]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)], env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0 and "report: could not be drawn: TypeError" in done.stdout
    assert (tmp_path / "model" / "model.xml").is_file() and (tmp_path / "output/data/findings.json").is_file()


def test_only_what_was_wrong_ends_a_training_early():
    blocking = Finding("ExplodingTensor", "IssuesFound", True, {}, {"step": 4, "tensor": "loss", "value": 3.0}, "")
    assert verdict([blocking], early=True, epochs=3)["status"] == "EndedEarly"
    assert verdict([blocking], early=False, epochs=3) == {
        "status": "Completed", "rule": None, "epoch": 3, "reason": ""
    }  # fmt: skip


def test_long_runs_are_drawn_as_means():
    assert reports.binned([]) == [] and reports.binned([1.0, 2.0]) == [1.0, 2.0]
    means = reports.binned(range(10 * reports.POINTS + 3))
    assert len(means) <= reports.POINTS and means[0] == 5.0
    assert means[-1] < 10 * reports.POINTS + 3


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_draws_every_figure(job: Path, page: Page, tmp_path: Path):
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
               "--virtual-time-budget=10000", "--dump-dom", f"file://{job / 'report.html'}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    drawn = done.stdout.partition("<h1>")[2]
    assert drawn.count('class="plot-container') == len(page.figures) >= 6, done.stderr[-2000:]
