"""One self-contained HTML page about a training: findings first, then what they rest on. Works offline and in print."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from PIL import Image

from rules import Finding
from sampler import Sampler

WORST = 12  # pictures shown that the model was most wrong about
TRAIN, VALIDATION, THIRD = "#3566a8", "#c8553d", "#6a994e"

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 1060px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.lead { color: #5b6775; margin-top: 0; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: #5b6775; font-weight: 600; }
th, td { border-bottom: 1px solid #e3e8ee; padding: .35rem .5rem; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } code { font-size: 13px; }
.NoIssuesFound { color: #3c7a3c; } .IssuesFound { color: #b26a00; font-weight: 600; }
.Error, .blocking { color: #b3261e; font-weight: 600; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.card { border: 1px solid #e3e8ee; border-radius: 8px; padding: .5rem .9rem; min-width: 8rem; }
.card b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; } .card span { color: #5b6775; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; } .wide { grid-column: 1 / -1; }
.worst { display: flex; flex-wrap: wrap; gap: .8rem; } .worst figure { margin: 0; width: 148px; font-size: 12px; }
.worst img { width: 148px; height: 148px; object-fit: cover; border-radius: 6px; }
@media print { body { max-width: none; margin: 0; font-size: 12px; } .plots > div, tr, figure { break-inside: avoid; } }
@media (max-width: 720px) { .plots { grid-template-columns: 1fr; } }
"""


@dataclass
class Report:
    """Everything the page shows; see profiling.Profile.report for where it comes from."""

    findings: list[Finding]
    summary: dict[str, Any]
    history: list[dict[str, float]]
    gradients: dict[str, list[tuple[int, dict[str, float]]]]
    sampler: Sampler
    confusion: list[list[int]]
    classes: list[str]
    held_out: Any  # data.Split
    probabilities: np.ndarray  # [N, classes]
    trials: list[dict]


def write_report(report: Report, path: Path) -> Path:
    """Writes the page to `path`."""
    version = report.summary.get("model_version") or "not named"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Training of model {html.escape(version)}</title><style>{STYLE}</style>",
        f"<h1>Training of model {html.escape(version)}</h1>",
        f"<p class=lead>ResNet-18, data set {html.escape(str(report.summary['dataset_hash'])[:12] or 'not named')}, "
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC</p>",
        cards(report),
        "<h2>Findings</h2>",
        findings_table(report.findings),
        skipped_table(report.summary["skipped"]),
        "<h2>Learning</h2>",
        *plots(learning_figures(report)),
        "<h2>The machine</h2>",
        system_table(report),
        *plots(system_figures(report)),
        "<h2>Classes</h2>",
        *plots(class_figures(report)),
        class_table(report.summary["per_class"]),
        worst_pictures(report),
    ]
    if report.trials:
        parts += ["<h2>Tuning trials</h2>", *plots(trial_figures(report.trials)), trial_table(report.trials)]
    settings = html.escape(json.dumps(report.summary["hyperparameters"], indent=1))
    parts.append(f"<h2>Hyperparameters</h2><pre><code>{settings}</code></pre></html>")
    page = "\n".join(parts)
    # plotly's own script goes in once, before the first figure
    from plotly.offline import get_plotlyjs

    path.write_text(page.replace("<h1>", f"<script>{get_plotlyjs()}</script><h1>", 1), encoding="utf-8")
    return path


def plots(figures: list[go.Figure]) -> list[str]:
    drawn = []
    for figure in figures:
        figure.update_layout(
            template="plotly_white", height=figure.layout.height or 320, margin={"l": 50, "r": 20, "t": 40, "b": 40},
            legend={"orientation": "h", "y": -0.2}, font={"size": 12},
        )  # fmt: skip
        wide = " class=wide" if figure.layout.meta == "wide" else ""
        config = {"displayModeBar": False, "responsive": True}
        body = figure.to_html(full_html=False, include_plotlyjs=False, config=config)
        drawn.append(f"<div{wide}>{body}</div>")
    return ["<div class=plots>", *drawn, "</div>"]


def cards(report: Report) -> str:
    metrics, pictures = report.summary["metrics"], report.summary["pictures"]
    issues = sum(finding.status != "NoIssuesFound" for finding in report.findings)
    values = [
        ("validation accuracy", _percent(metrics.get("validation_accuracy"))),
        ("test accuracy", _percent(metrics.get("test_accuracy"))),
        ("best epoch", f"{metrics.get('epoch', 0):g} of {report.summary['epochs']}"),
        ("pictures trained on", f"{pictures['train']:,}"),
        ("classes", str(len(report.classes))),
        ("rules with issues", f"{issues} of {len(report.findings)}"),
    ]
    drawn = (f"<div class=card><b>{value}</b><span>{name}</span></div>" for name, value in values)
    return "<div class=cards>" + "".join(drawn) + "</div>"


def findings_table(findings: list[Finding]) -> str:
    order = {"Error": 1, "IssuesFound": 0, "NoIssuesFound": 2}
    rows = []
    for finding in sorted(findings, key=lambda f: (not f.blocking, order[f.status])):
        blocking = " <span class=blocking>blocks promotion</span>" if finding.blocking else ""
        evidence = evidence_text(finding.evidence or {})
        parameters = ", ".join(f"{key}={value}" for key, value in finding.parameters.items())
        rows.append(
            f"<tr><td>{finding.rule}<td class={finding.status}>{finding.status}{blocking}<td>{html.escape(evidence)}"
            f"<td>{html.escape(finding.advice)}<td><code>{html.escape(parameters)}</code>"
        )
    return "<table><tr><th>Rule<th>Status<th>Evidence<th>What to do<th>Parameters" + "".join(rows) + "</table>"


def evidence_text(evidence: dict[str, Any]) -> str:
    """`tensor: value`, then where and what else."""
    more = {key: value for key, value in evidence.items() if key not in ("tensor", "value") and value is not None}
    subject = ": ".join(str(evidence[key]) for key in ("tensor", "value") if evidence.get(key) is not None)
    return ", ".join(filter(None, [subject, *(f"{key} {value}" for key, value in more.items())]))


def skipped_table(skipped: list[dict]) -> str:
    if not skipped:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(row['origin'] or row['sha256'])}<td>{html.escape(row['reason'])}" for row in skipped
    )
    return f"<h2>Pictures that could not be read, and were left out</h2><table><tr><th>Picture<th>Reason{rows}</table>"


def learning_figures(report: Report) -> list[go.Figure]:
    epochs = [row["epoch"] for row in report.history]
    best = report.summary["metrics"].get("epoch")
    figures = []
    for name, title in (("loss", "Loss"), ("accuracy", "Accuracy")):
        figure = go.Figure(layout={"title": title, "xaxis": {"title": "epoch"}})
        for split, colour in (("train", TRAIN), ("validation", VALIDATION)):
            values = [_finite(row[f"{split}_{name}"]) for row in report.history]
            figure.add_scatter(x=epochs, y=values, name=split, mode="lines+markers", line={"color": colour})
        if best:
            side = "top left" if best > len(epochs) / 2 else "top right"
            mark = {"color": "#8a94a0", "dash": "dot"}
            figure.add_vline(x=best, line=mark, annotation_text="kept", annotation_position=side)
        figures.append(figure)
    rate = go.Figure(layout={"title": "Learning rate at the start of each epoch", "xaxis": {"title": "epoch"},
                             "yaxis": {"tickformat": "~g"}})  # fmt: skip
    rate.add_scatter(x=epochs, y=[row["lr"] for row in report.history], mode="lines+markers", line={"color": THIRD})
    norms = go.Figure(layout={"title": "Gradient norms by layer (l2)", "xaxis": {"title": "step"}, "showlegend": False,
                              "yaxis": {"type": "log", "dtick": 1, "exponentformat": "power"}})  # fmt: skip
    layers = {name: rows for name, rows in report.gradients.items() if name.endswith("weight")}
    for number, (name, rows) in enumerate(layers.items()):
        shade = f"hsl({210 + 140 * number / max(1, len(layers) - 1):.0f}, 55%, 45%)"
        label = name.removeprefix("gradient/").split("_", 1)[-1]
        norm = [_finite(values["l2_norm"]) for _, values in rows]
        line = {"color": shade, "width": 1}
        norms.add_scatter(x=[step for step, _ in rows], y=norm, name=label, mode="lines", line=line)
    return [*figures, rate, norms]


def system_figures(report: Report) -> list[go.Figure]:
    seen, times = report.sampler.seen, report.sampler.times
    timeline = go.Figure(layout={"title": "Use of the machine", "meta": "wide", "xaxis": {"title": "seconds"},
                                 "yaxis": {"title": "%", "range": [0, 101]}})  # fmt: skip
    seconds = [round(at - times[0], 2) for at in times]
    for name, values in (("CPU", seen.cpu), ("memory", seen.memory), ("waiting for I/O", seen.io_wait),
                         ("GPU", seen.gpu), ("GPU memory", seen.gpu_memory)):  # fmt: skip
        if values:
            timeline.add_scatter(x=seconds, y=values, name=name, mode="lines")
    steps = go.Figure(layout={"title": "Seconds of each step", "xaxis": {"title": "step"}, "barmode": "stack",
                              "bargap": 0})  # fmt: skip
    stride = max(1, len(seen.step_seconds) // 1000)
    waits, whole = seen.wait_seconds[::stride], seen.step_seconds[::stride]
    at = list(range(0, len(seen.step_seconds), stride))
    steps.add_bar(x=at, y=[w - v for w, v in zip(whole, waits, strict=True)], name="computing", marker_color=TRAIN)
    steps.add_bar(x=at, y=waits, name="waiting for the batch", marker_color=VALIDATION)
    rates = go.Figure(layout={"title": "Disk and network", "xaxis": {"title": "seconds"}, "yaxis": {"title": "MB/s"}})
    for name in ("disk_read", "disk_write", "received", "sent"):
        megabytes = [row[name] / 1e6 for row in report.sampler.io]
        rates.add_scatter(x=seconds, y=megabytes, name=name.replace("_", " "), mode="lines")
    return [timeline, steps, rates]


def class_figures(report: Report) -> list[go.Figure]:
    matrix = np.array(report.confusion)
    figure = go.Figure(layout={"title": "Confusion matrix", "meta": "wide", "xaxis": {"title": "predicted"},
                               "yaxis": {"title": "true class", "autorange": "reversed"}})  # fmt: skip
    figure.update_layout(height=max(320, min(60 + 24 * len(report.classes), 1000)))
    counts = "%{z}" if len(report.classes) <= 20 else None
    figure.add_heatmap(
        z=matrix, x=report.classes, y=report.classes, texttemplate=counts, colorscale="Blues", showscale=False
    )
    return [figure]


def class_table(per_class: dict[str, dict]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td class=n>{row['n']}<td class=n>{_percent(row['precision'])}"
        f"<td class=n>{_percent(row['recall'])}"
        for name, row in per_class.items()
    )
    return f"<table><tr><th>Class<th class=n>Pictures<th class=n>Precision<th class=n>Recall{rows}</table>"


def system_table(report: Report) -> str:
    steps = report.summary["steps"]
    lead = ""
    if steps:
        lead = (f"<p>{steps['count']} steps; half of them took less than {steps['seconds_p50'] * 1000:.1f} ms; "
                f"{steps['wait_percent']:g} % of their time was spent waiting for batches; the first began "
                f"{steps['start_up_seconds']:.1f} s after the start of the process.</p>")  # fmt: skip
    rows = ""
    for name, row in report.summary["system"].items():
        cells = "".join(f"<td class=n>{row[measure]:g}" for measure in ("min", "p50", "p95", "p99", "max"))
        rows += f"<tr><td>{name.replace('_', ' ')}{cells}"
    head = "".join(f"<th class=n>{name}" for name in ("min", "median", "p95", "p99", "max"))
    return lead + (f"<table><tr><th>Percent used{head}{rows}</table>" if rows else "<p>Too short to be sampled.</p>")


def worst_pictures(report: Report) -> str:
    """The pictures with the most confidence in a wrong class."""
    truth, sure = report.held_out.labels.numpy(), report.probabilities.max(1)
    predicted = report.probabilities.argmax(1)
    wrong = [n for n in np.argsort(-sure) if predicted[n] != truth[n]][:WORST]
    if not wrong:
        return "<p>Every held-out picture was recognised.</p>"
    figures = []
    for n in wrong:
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(report.held_out.images[n])).save(buffer, "JPEG", quality=85)
        encoded = base64.b64encode(buffer.getvalue()).decode()
        there, taken = (html.escape(report.classes[index]) for index in (truth[n], predicted[n]))
        figures.append(f"<figure><img alt='' src='data:image/jpeg;base64,{encoded}'><figcaption>{there}, taken for "
                       f"{taken} ({sure[n]:.0%})</figcaption></figure>")  # fmt: skip
    return "<h2>Most wrong about</h2><div class=worst>" + "".join(figures) + "</div>"


def trial_figures(trials: list[dict]) -> list[go.Figure]:
    done = [trial for trial in trials if trial["objective"] is not None]
    if not done:
        return []
    names = [name for name in done[0] if name not in ("name", "status", "objective")]
    dimensions = []
    for name in names:
        values = [float(trial[name]) for trial in done]
        if name == "lr":
            dimensions.append({"label": "lr (log10)", "values": [round(math.log10(value), 2) for value in values]})
        else:
            dimensions.append({"label": name, "values": values})
    objective = [trial["objective"] for trial in done]
    dimensions.append({"label": "validation accuracy", "values": objective})
    figure = go.Figure(layout={"meta": "wide"})
    figure.add_parcoords(
        dimensions=dimensions,
        domain={"y": [0, 0.9]},
        line={"color": objective, "colorscale": [[0, "#b9cfe8"], [1, "#0b3a78"]], "showscale": True},
    )
    return [figure]


def trial_table(trials: list[dict]) -> str:
    best = max((trial["objective"] for trial in trials if trial["objective"] is not None), default=None)
    names = [name for name in trials[0] if name not in ("name", "status", "objective")]
    rows = []
    for trial in sorted(trials, key=lambda t: -(t["objective"] if t["objective"] is not None else -1)):
        mark = " ★" if trial["objective"] is not None and trial["objective"] == best else ""
        cells = "".join(f"<td class=n>{float(trial[name]):.4g}" for name in names)
        rows.append(f"<tr><td>{html.escape(trial['name'])}{mark}<td>{trial['status']}{cells}"
                    f"<td class=n>{_percent(trial['objective'])}")  # fmt: skip
    head = "".join(f"<th class=n>{html.escape(name)}" for name in names)
    return f"<table><tr><th>Trial<th>Status{head}<th class=n>Accuracy{''.join(rows)}</table>"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
