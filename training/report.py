"""One self-contained HTML page about a training: findings first, then what they rest on. Works offline and in print."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from PIL import Image
from plotly.colors import sample_colorscale
from plotly.offline import get_plotlyjs

from rules import Finding
from sampler import Sampler

WORST = 12  # pictures shown that the model was most wrong about
POINTS = 400  # of a plot of steps or samples; of a longer run each is a mean
TRAIN, VALIDATION, THIRD, FOURTH, BEST = "#3566a8", "#c8553d", "#6a994e", "#b9c2cc", "#e08a00"

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 1060px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.lead { color: #5b6775; margin-top: 0; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: #5b6775; font-weight: 600; }
th, td { border-bottom: 1px solid #e3e8ee; padding: .35rem .5rem; vertical-align: top; }
td.path, code { overflow-wrap: anywhere; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } code { font-size: 13px; }
.NoIssuesFound { color: #3c7a3c; } .IssuesFound { color: #b26a00; font-weight: 600; }
.Error, .blocking { color: #b3261e; font-weight: 600; }
.verdict { border-left: 4px solid #b3261e; background: #fbeeed; padding: .6rem .9rem; }
.advice { border-left: 4px solid #3566a8; background: #eef3fa; padding: .6rem .9rem; }
tr.best td { background: #fdf3e1; font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .8rem; margin: 1rem 0; }
.card { border: 1px solid #e3e8ee; border-radius: 8px; padding: .5rem .9rem; }
.card b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; } .card span { color: #5b6775; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; } .wide { grid-column: 1 / -1; }
.worst { display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); gap: .8rem; }
.worst figure { margin: 0; font-size: 12px; } .worst img { width: 100%; aspect-ratio: 1; object-fit: cover;
border-radius: 6px; } .columns { columns: 2; } .columns p { margin: 0; }
details summary { cursor: pointer; color: #5b6775; margin: .6rem 0; }
@media (max-width: 720px) { .plots { grid-template-columns: 1fr; } }
@page { size: A4; margin: 15mm; }
@media print {
  body { width: 680px; margin: 0; padding: 0; font-size: 12px; } table { font-size: 11px; } code { font-size: 10px; }
  h2 { break-after: avoid; } .plots > div, tr, figure, .cards, .verdict, table.short { break-inside: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
# A plot has the width that it had on the screen: paper gets it again, and the screen afterwards.
SCRIPT = """
const fit = width => { document.body.style.width = width;
  document.querySelectorAll('.js-plotly-plot').forEach(plot => Plotly.relayout(plot, {autosize: true})); };
addEventListener('beforeprint', () => { document.querySelectorAll('details').forEach(part => part.open = true);
  fit('680px'); });
addEventListener('afterprint', () => fit(''));
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
    verdict: dict[str, Any] = field(default_factory=dict)  # as findings.json has it
    recommendation: dict[str, Any] = field(default_factory=dict)


def write_report(report: Report, path: Path) -> Path:
    """Writes the page to `path`."""
    title = f"Training of model {html.escape(report.summary.get('model_version') or 'not named')}"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{title}</title><style>{STYLE}</style><script>{get_plotlyjs()}</script><script>{SCRIPT}</script>",
        f"<h1>{title}</h1>",
        f"<p class=lead>ResNet-18, data set {html.escape(str(report.summary['dataset_hash'])[:12] or 'not named')}, "
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC</p>",
        "<h2>Findings</h2>",
        verdict(report),
        findings_table(report.findings),
        skipped_table(report.summary["skipped"]),
        "<h2>Run summary</h2>",
        cards(report),
        settings(report.summary["hyperparameters"]),
        "<h2>Learning</h2>",
        *plots(learning_figures(report)),
        "<h2>The machine</h2>",
        *plots(system_figures(report)),
        system_table(report),
        "<h2>Steps</h2>",
        *steps(report),
        "<h2>Classes</h2>",
        *plots(class_figures(report)),
        class_table(report.summary["per_class"]),
        "<h2>Most wrong about</h2>",
        worst_pictures(report),
    ]
    if report.trials:
        parts += ["<h2>Tuning trials</h2>", *plots(trial_figures(report.trials)), trial_table(report.trials)]
    path.write_text("\n".join([*parts, "</html>"]), encoding="utf-8")
    return path


def plots(figures: list[go.Figure]) -> list[str]:
    drawn = []
    for figure in figures:
        figure.update_layout(template="plotly_white", height=figure.layout.height or 320, font={"size": 12})
        wide = " class=wide" if figure.layout.meta == "wide" else ""
        config = {"displayModeBar": False, "responsive": True}
        body = figure.to_html(full_html=False, include_plotlyjs=False, config=config)
        drawn.append(f"<div{wide}>{body}</div>")
    return ["<div class=plots>", *drawn, "</div>"] if drawn else []


def chart(title: str, x: str, y: str = "", wide: bool = False, **layout: Any) -> go.Figure:
    """An empty figure with its legend below the axis."""
    below = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0}
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}, "automargin": True}}
    margin = {"l": 50, "r": 20, "t": 40, "b": 80}
    name = {"text": title, "x": 0, "xref": "paper"}
    return go.Figure(layout={"title": name, "legend": below, "margin": margin, "meta": "wide" if wide else None}
                     | axes).update_layout(**layout)  # fmt: skip


# Findings and summary -------------------------------------------------------------------------------------------------


def verdict(report: Report) -> str:
    """What the findings mean for this run and the next, in sentences."""
    found = ""
    blocking = [finding.rule for finding in report.findings if finding.blocking]
    if report.verdict.get("status") == "EndedEarly":
        found += f"<p class=verdict><b>Ended early:</b> {html.escape(str(report.verdict['reason']))}.</p>"
    if blocking:
        found += f"<p class=verdict>This model must not be promoted: {html.escape(', '.join(blocking))}.</p>"
    if report.recommendation:
        values = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.recommendation.items())
        found += f"<p class=advice><b>Recommended for the next run:</b> {html.escape(values)}.</p>"
    return found


def findings_table(findings: list[Finding]) -> str:
    """Those with issues in full; those without in a list."""
    order = {"Error": 1, "IssuesFound": 0}
    rows = []
    for finding in sorted(findings, key=lambda f: (not f.blocking, order.get(f.status, 2))):
        if finding.status == "NoIssuesFound":
            continue
        blocking = " <span class=blocking>blocks promotion</span>" if finding.blocking else ""
        rows.append(
            f"<tr><td>{finding.rule}<td class={finding.status}>{finding.status}{blocking}"
            f"<td>{html.escape(evidence_text(finding.evidence or {}))}<td>{html.escape(finding.advice)}"
            f"<td>{parameters(finding)}"
        )
    head = "<table><tr><th>Rule<th>Status<th>Evidence<th>What to do<th>Parameters"
    passed = [finding for finding in findings if finding.status == "NoIssuesFound"]
    listed = "".join(f"<p><span class=NoIssuesFound>✓</span> {f.rule} {parameters(f)}</p>" for f in passed)
    rest = f"<details><summary>{len(passed)} rules found no issues</summary><div class=columns>{listed}</div></details>"
    return (head + "".join(rows) + "</table>" if rows else "<p>No rule found an issue.</p>") + rest


def parameters(finding: Finding) -> str:
    return f"<code>{html.escape(', '.join(f'{key}={value}' for key, value in finding.parameters.items()))}</code>"


def evidence_text(evidence: dict[str, Any]) -> str:
    """`tensor: value`, then where and what else."""
    more = {key: value for key, value in evidence.items() if key not in ("tensor", "value") and value is not None}
    subject = ": ".join(str(evidence[key]) for key in ("tensor", "value") if evidence.get(key) is not None)
    return ", ".join(filter(None, [subject, *(f"{key} {value}" for key, value in more.items())]))


def skipped_table(skipped: list[dict]) -> str:
    if not skipped:
        return ""
    rows = "".join(
        f"<tr><td class=path>{html.escape(row['origin'] or row['sha256'])}<td>{html.escape(row['reason'])}"
        for row in skipped
    )
    return f"<h2>Pictures that could not be read, and were left out</h2><table><tr><th>Picture<th>Reason{rows}</table>"


def cards(report: Report) -> str:
    metrics, pictures = report.summary["metrics"], report.summary["pictures"]
    seconds = sum(row.get("seconds", 0.0) for row in report.history)
    values = [
        ("validation accuracy", _percent(metrics.get("validation_accuracy"))),
        ("test accuracy", _percent(metrics.get("test_accuracy"))),
        ("best epoch", f"{metrics.get('epoch', 0):g} of {report.summary['epochs']}"),
        ("seconds in epochs", f"{seconds:,.1f}"),
        ("classes", str(len(report.classes))),
        *((f"pictures to {use}", f"{pictures[split]:,}") for split, use in (("train", "train on"),
          ("validation", "validate on"), ("test", "test on")) if split in pictures),
    ]  # fmt: skip
    drawn = (f"<div class=card><b>{value}</b><span>{name}</span></div>" for name, value in values)
    return "<div class=cards>" + "".join(drawn) + "</div>"


def settings(hyperparameters: dict[str, Any]) -> str:
    values = ", ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in hyperparameters.items()
    )
    return f"<p>Hyperparameters: <code>{html.escape(values)}</code></p>"


# Learning -------------------------------------------------------------------------------------------------------------


def learning_figures(report: Report) -> list[go.Figure]:
    epochs = [row["epoch"] for row in report.history]
    best = report.summary["metrics"].get("epoch")
    figures = []
    for name, title in (("loss", "Loss"), ("accuracy", "Accuracy")):
        figure = chart(title, "epoch")
        for split, colour in (("train", TRAIN), ("validation", VALIDATION)):
            values = [_finite(row[f"{split}_{name}"]) for row in report.history]
            figure.add_scatter(x=epochs, y=values, name=split, mode="lines+markers", line={"color": colour})
        if best:
            side = "top left" if best > len(epochs) / 2 else "top right"
            mark = {"color": "#8a94a0", "dash": "dot"}
            figure.add_vline(x=best, line=mark, annotation_text="kept", annotation_position=side)
        figures.append(figure)
    figures[1].update_yaxes(tickformat=".0%")
    rate = chart("Learning rate", "at the start of epoch", yaxis_tickformat="~g")
    rate.add_scatter(x=epochs, y=[row["lr"] for row in report.history], mode="lines+markers", line={"color": THIRD})
    for figure in (*figures, rate):
        figure.update_xaxes(tickformat="d", **({"dtick": 1} if len(epochs) <= 12 else {}))
    names = sorted((name for name in report.gradients if name.endswith("weight")), key=lambda n: "fc." in n)
    layers = {name: report.gradients[name] for name in names}  # as the network has them, its head last
    norms = chart("Gradient norms by layer (l2)", "step", meta="wide", showlegend=True,
                  yaxis={"type": "log", "exponentformat": "power", "dtick": 1}, margin_b=50,
                  height=max(320, 100 + 21 * len(layers)),
                  legend={"orientation": "v", "x": 1.01, "y": 1, "yref": "paper", "yanchor": "top",
                          "font": {"size": 10}})  # fmt: skip
    shades = sample_colorscale("Viridis", np.linspace(0, 0.9, max(2, len(layers))).tolist())
    for shade, (name, rows) in zip(shades, layers.items(), strict=False):
        label = name.removeprefix("gradient/").split("_", 1)[-1]
        norms.add_scatter(x=[step for step, _ in rows], y=[_finite(values["l2_norm"]) for _, values in rows],
                          name=label, mode="lines+markers", line={"color": shade, "width": 1.5},
                          marker={"size": 4})  # fmt: skip
    return [*figures, rate, norms] if layers else [*figures, rate]


# The machine and its steps --------------------------------------------------------------------------------------------


def system_figures(report: Report) -> list[go.Figure]:
    seen, times = report.sampler.seen, report.sampler.times
    if not times:
        return []
    seconds = [round(at - times[0], 2) for at in binned(times)]
    usage = chart("Use of the machine", "seconds", "%", wide=True, yaxis_range=[0, 101])
    for name, values in (("CPU", seen.cpu), ("memory", seen.memory), ("waiting for I/O", seen.io_wait),
                         ("GPU", seen.gpu), ("GPU memory", seen.gpu_memory)):  # fmt: skip
        if values:
            usage.add_scatter(x=seconds, y=binned(values), name=name, mode="lines")
    rates = chart("Disk and network", "seconds", "MB/s", wide=True)
    for name in ("disk_read", "disk_write", "received", "sent"):
        megabytes = binned([row[name] / 1e6 for row in report.sampler.io])
        rates.add_scatter(x=seconds, y=megabytes, name=name.replace("_", " "), mode="lines")
    return [usage, rates]


def system_table(report: Report) -> str:
    rows = ""
    for name, row in report.summary["system"].items():
        cells = "".join(f"<td class=n>{row[measure]:g}" for measure in ("min", "p50", "p95", "p99", "max"))
        rows += f"<tr><td>{name.replace('_', ' ')}{cells}"
    head = "".join(f"<th class=n>{name}" for name in ("min", "median", "p95", "p99", "max"))
    return f"<table class=short><tr><th>Percent used{head}{rows}</table>" if rows else "<p>Too short to be sampled.</p>"


def steps(report: Report) -> list[str]:
    """Where the time of each step went: data wait, forward, backward, and the rest, which the optimizer has most of."""
    seen = report.sampler.seen
    whole = np.array(seen.step_seconds, dtype=float)
    if not len(whole):
        return ["<p>No step was timed.</p>"]
    parts = {"data wait": (seen.wait_seconds, VALIDATION)}
    parts |= {
        name: (values, colour)
        for name, values, colour in (
            ("forward", getattr(seen, "forward_seconds", []), TRAIN),
            ("backward", getattr(seen, "backward_seconds", []), THIRD),
        )
        if len(values) == len(whole)
    }
    timed = {name: np.array(values, dtype=float) for name, (values, _) in parts.items()}
    timed["rest"] = np.maximum(whole - sum(timed.values()), 0)
    colours = {name: colour for name, (_, colour) in parts.items()} | {"rest": FOURTH}
    figure = chart("Milliseconds of each step", "step", "ms", wide=True, barmode="stack", bargap=0)
    at = binned(range(len(whole)))
    for name, values in timed.items():
        figure.add_bar(x=at, y=[1000 * value for value in binned(values)], name=name, marker_color=colours[name],
                       marker_line_width=0)  # fmt: skip
    if len(whole) > 20:  # the first step pays for what every process has to do once
        sums = binned(whole)
        figure.update_yaxes(range=[0, 1000 * min(max(sums), 1.5 * float(np.percentile(sums, 95)))])
    rows = ""
    for name, values in [*timed.items(), ("whole step", whole)]:
        p50, p95 = (1000 * np.percentile(values, percent) for percent in (50, 95))
        rows += (f"<tr><td>{name}<td class=n>{_percent(values.sum() / whole.sum())}<td class=n>{p50:.2f}"
                 f"<td class=n>{p95:.2f}<td class=n>{1000 * values.max():.2f}"
                 f"<td class=n>{values.sum():.2f}")  # fmt: skip
    lead = f"<p>{len(whole)} steps; the first began {seen.start_up_seconds:.1f} s after the start of the process.</p>"
    head = ("<tr><th>Part<th class=n>Share<th class=n>Median ms<th class=n>p95 ms<th class=n>Maximum ms"
            "<th class=n>Total s")  # fmt: skip
    return [lead, *plots([figure]), f"<table class=short>{head}{rows}</table>"]


def binned(values: Sequence[float] | np.ndarray) -> list[float]:
    """At most POINTS values: means of as many neighbours as that takes."""
    array = np.asarray(values, dtype=float)
    width = -(-len(array) // POINTS) or 1
    starts = np.arange(0, len(array), width)
    if not len(starts):
        return []
    return (np.add.reduceat(array, starts) / np.diff([*starts, len(array)])).tolist()


# Classes --------------------------------------------------------------------------------------------------------------


def class_figures(report: Report) -> list[go.Figure]:
    matrix = np.array(report.confusion)
    few = len(report.classes) <= 20
    figure = chart("Confusion matrix", "predicted", "true class", wide=True, margin_b=60,
                   height=max(320, min(120 + 24 * len(report.classes), 1000)))  # fmt: skip
    figure.add_heatmap(z=matrix, x=report.classes, y=report.classes, texttemplate="%{z}" if few else None,
                       colorscale="Blues", showscale=not few, xgap=1, ygap=1)  # fmt: skip
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(type="category", automargin=True)
    return [figure]


def class_table(per_class: dict[str, dict]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td class=n>{row['n']}<td class=n>{_percent(row['precision'])}"
        f"<td class=n>{_percent(row['recall'])}"
        for name, row in sorted(per_class.items(), key=lambda item: item[1]["recall"] or 0)
    )
    return f"<table><tr><th>Class<th class=n>Pictures<th class=n>Precision<th class=n>Recall{rows}</table>"


def worst_pictures(report: Report) -> str:
    """The pictures with the most confidence in a wrong class."""
    truth = report.held_out.labels.numpy()
    if not len(report.probabilities):
        return "<p>No picture was held out.</p>"
    sure, predicted = report.probabilities.max(1), report.probabilities.argmax(1)
    wrong = [n for n in np.argsort(-sure) if predicted[n] != truth[n]][:WORST]
    if not wrong:
        return "<p>Every held-out picture was recognised.</p>"
    figures = []
    for n in wrong:
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(report.held_out.images[n])).save(buffer, "JPEG", quality=85)
        encoded = base64.b64encode(buffer.getvalue()).decode()
        there, taken = (html.escape(report.classes[index]) for index in (truth[n], predicted[n]))
        figures.append(f"<figure><img alt='{there}' src='data:image/jpeg;base64,{encoded}'><figcaption>{there}, taken "
                       f"for {taken} ({sure[n]:.0%})</figcaption></figure>")  # fmt: skip
    return "<div class=worst>" + "".join(figures) + "</div>"


# Trials ---------------------------------------------------------------------------------------------------------------


def best_trial(trials: list[dict]) -> dict | None:
    done = [trial for trial in trials if trial["objective"] is not None]
    return max(done, key=lambda trial: trial["objective"], default=None)


def tuned(trials: list[dict]) -> list[str]:
    return [name for name in trials[0] if name not in ("name", "status", "objective")]


def trial_figures(trials: list[dict]) -> list[go.Figure]:
    """Parallel coordinates: a line a trial, darker where it is better, the best in a colour of its own."""
    best = best_trial(trials)
    if best is None:
        return []
    done = sorted((t for t in trials if t["objective"] is not None), key=lambda t: (t is best, t["objective"]))
    dimensions: list[dict[str, Any]] = []
    for name in tuned(done):
        values = [float(trial[name]) for trial in done]
        dimension: dict[str, Any] = {"label": name, "values": values}
        if name == "lr":
            ticks = [m * 10.0**e for e in range(-7, 1) for m in (1, 2, 5) if min(values) <= m * 10.0**e <= max(values)]
            ticks = sorted({min(values), max(values), *ticks})
            dimension = {"label": name, "values": [math.log10(value) for value in values],
                         "tickvals": [math.log10(tick) for tick in ticks],
                         "ticktext": [f"{tick:.2g}" for tick in ticks]}  # fmt: skip
        elif len(set(values)) <= 12:
            dimension |= {"tickvals": sorted(set(values)), "ticktext": [f"{value:g}" for value in sorted(set(values))]}
        dimensions.append(dimension)
    objective = [trial["objective"] for trial in done]
    dimensions.append({"label": "validation accuracy", "values": objective, "tickformat": ".1%"})
    for dimension in dimensions:  # an axis of one value has no length
        if len(set(dimension["values"])) == 1:
            middle = dimension["values"][0]
            dimension["range"] = [middle - 0.5, middle + 0.5]
    low, high = min(objective), max(objective)
    shades = [0.9 * (value - low) / (high - low or 1) for value in objective[:-1]] + [1.0]
    scale = [[0, "#c3d3e6"], [0.9, "#0b3a78"], [0.95, BEST], [1, BEST]]
    figure = go.Figure(layout={"meta": "wide", "height": 360, "margin": {"l": 70, "r": 70, "t": 50, "b": 30}})
    line = {"color": shades, "colorscale": scale, "cmin": 0, "cmax": 1, "showscale": False}
    figure.add_parcoords(dimensions=dimensions, line=line)
    return [figure]


def trial_table(trials: list[dict]) -> str:
    best, names = best_trial(trials), tuned(trials)
    rows = []
    for trial in sorted(trials, key=lambda t: -(t["objective"] if t["objective"] is not None else -1)):
        mark, kind = (" ★ best", " class=best") if trial is best else ("", "")
        cells = "".join(f"<td class=n>{float(trial[name]):.4g}" for name in names)
        rows.append(f"<tr{kind}><td class=path>{html.escape(trial['name'])}{mark}<td>{trial['status']}{cells}"
                    f"<td class=n>{_percent(trial['objective'])}")  # fmt: skip
    head = "".join(f"<th class=n>{html.escape(name)}" for name in names)
    return f"<table><tr><th>Trial<th>Status{head}<th class=n>Accuracy{''.join(rows)}</table>"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
