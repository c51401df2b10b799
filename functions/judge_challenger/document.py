"""The verdict as a page for people: one HTML file without scripts, which opens from a bucket or a disk."""

from collections.abc import Iterable
from html import escape
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733; }
.verdict { border-left: 4px solid #1d7a46; background: #eef7f1; padding: .6rem .9rem; }
.verdict.rejected { border-color: #b3261e; background: #fbeeed; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #dfe5ea; vertical-align: top; }
.numbers td + td, .numbers th + th { text-align: right; font-variant-numeric: tabular-nums; }
.no { color: #b3261e; font-weight: 600; } .yes { color: #1d7a46; } .small { color: #5b6775; font-size: 13px; }
svg { width: 100%; height: 90px; } svg text { font-size: 12px; fill: #5b6775; }
"""
WIDTH, SIDE = 800, 40  # of the drawing, and of its margins


def page(verdict: dict[str, Any]) -> str:
    """HTML of what `gate.judge` returned, with `run`, `dataset` and `champion` (a model version, or None)."""
    outcome = "promoted" if verdict["promote"] else "rejected"
    title = f"Model {escape(verdict['run'])}: {outcome}"
    against = f"compared with {escape(verdict['champion'])}" if verdict["champion"] else "no champion"
    parts = [
        f"<h1>{title}</h1>",
        f"<p class=small>data set {escape(verdict['dataset'][:12])}, {against}</p>",
        f"<p class='verdict {outcome}'>{escape(verdict['sentence'])}.</p>",
        "<h2>Checks</h2>",
        _table(("Check", "Found", "Asked for", "Passed"), map(_check, verdict["checks"])),
    ]
    if comparison := verdict.get("comparison"):
        parts.append("<h2>On the test pictures of the classes that both know</h2>")
        parts.append(_comparison(comparison, verdict["thresholds"]))
        if verdict["settled"]:
            parts.append("<h2>On those of them that were in the champion's own test, too</h2>")
            parts.append(_comparison(verdict["settled"], verdict["thresholds"] | {"max_drop": 1}))
        parts.append(_pictures(verdict))
    if classes := verdict.get("per_class"):
        parts += ["<h2>Classes</h2>", _classes(classes, set(verdict["new_classes"]), verdict["thresholds"])]
    head = f"<meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en>{head}{''.join(parts)}"


def _check(check: dict[str, Any]) -> tuple[str, ...]:
    passed = "<span class=yes>yes</span>" if check["passed"] else "<span class=no>no</span>"
    return f"{escape(check['name'])}<br><span class=small>{escape(check['says'])}</span>", *(
        escape(check[name]) for name in ("value", "limit")
    ), passed  # fmt: skip


def _comparison(found: dict[str, Any], thresholds: dict[str, Any]) -> str:
    level = f"{thresholds['confidence']:.0%}"
    rows = [
        ("champion right", str(found["both"]), str(found["only_champion"])),
        ("champion wrong", str(found["only_challenger"]), str(found["neither"])),
    ]
    return (
        _table((f"{found['n']} pictures", "challenger right", "challenger wrong"), rows, numbers=True)
        + _interval(found, thresholds)
        + f"<p>Change {found['change']:+.1%}; not under {found['low']:+.1%} and not over {found['high']:+.1%}, each "
        f"with {level} confidence (Tango's score interval). Two equally good models differ like this, or more, in "
        f"{found['p_worse']:.1%} of cases to the challenger's disadvantage and in {found['p_better']:.1%} to its "
        f"advantage (McNemar's test, mid-p). A drop that these pictures show four times out of five: "
        f"{found['visible_drop']:.1%}.</p>"
    )


def _interval(found: dict[str, Any], thresholds: dict[str, Any]) -> str:
    """The change with its bounds, between what is allowed and none, as a drawing."""
    marks = [(0.0, "0", "#5b6775", 84), (-thresholds["margin"], "margin", "#c77700", 14)]
    if thresholds["max_drop"] < 1:
        marks.append((-thresholds["max_drop"], "largest drop", "#b3261e", 84))
    reach = 1.1 * max(abs(found["low"]), abs(found["high"]), *(abs(mark[0]) for mark in marks))

    def x(share: float) -> float:
        return round(WIDTH / 2 + share / reach * (WIDTH / 2 - SIDE), 1)

    lines = "".join(
        f"<line x1={x(at)} x2={x(at)} y1=20 y2=70 stroke={colour} stroke-dasharray=3 />"
        f"<text x={x(at)} y={y} text-anchor=middle>{name}</text>"
        for at, name, colour, y in marks
    )
    low, high, change = x(found["low"]), x(found["high"]), x(found["change"])
    return (
        f"<svg viewBox='0 0 {WIDTH} 90' role=img aria-label='change against the champion'>{lines}"
        f"<line x1={low} x2={high} y1=45 y2=45 stroke=#1c2733 stroke-width=3 /><circle cx={change} cy=45 r=6 /></svg>"
    )


def _pictures(verdict: dict[str, Any]) -> str:
    parts = []
    for who in ("champion", "challenger"):
        count, pictures = verdict["comparison"][f"only_{who}"], verdict[f"only_{who}"]
        if not count:
            continue
        rows = (
            (escape(found["origin"] or found["sha256"]), *(escape(found[name] or "–") for name in
             ("class", "champion", "challenger"))) for found in pictures
        )  # fmt: skip
        more = f" (the first {len(pictures)})" if len(pictures) < count else ""
        heads = ("Picture", "Class", "Champion", "Challenger")
        parts.append(f"<h2>Only the {who} got {count} right{more}</h2>{_table(heads, rows)}")
    return "".join(parts)


def _classes(classes: dict[str, dict[str, Any]], new: set[str], thresholds: dict[str, Any]) -> str:
    """Those that changed for the worse first."""

    def change(name: str) -> int:
        found = classes[name]
        return found["correct"] - found.get("champion_correct", found["correct"])

    rows = []
    for name in sorted(classes, key=lambda name: (change(name), name)):
        found = classes[name]
        n, champion = found["n"], found.get("champion_correct")
        rows.append((
            escape(name) + (" (new)" if name in new else ""),
            str(n),
            "–" if champion is None else f"{champion} ({champion / n:.0%})",
            f"{found['correct']} ({found['correct'] / n:.0%})",
            f"{found['low']:.0%} to {found['high']:.0%}",
            "–" if champion is None else f"{change(name):+d} (lost {found['only_champion']}, "
            f"won {found['only_challenger']})",
        ))  # fmt: skip
    heads = ("Class", "Test pictures", "Champion right", "Challenger right",
             f"Wilson's bounds, {thresholds['confidence']:.0%} each", "Change")  # fmt: skip
    return _table(heads, rows, numbers=True)


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]], numbers: bool = False) -> str:
    """`rows`: HTML, escaped. `numbers`: what is not in the first column is one."""

    def line(tag: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    kind = " class=numbers" if numbers else ""
    return f"<table{kind}>{line('th', heads)}{''.join(line('td', row) for row in rows)}</table>"
