"""The page that the demo leaves behind: one HTML file with everything in it, pictures included."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from PIL import Image, ImageOps, UnidentifiedImageError

from local.demo.progress import Step, cause_in_words, duration, in_words

if TYPE_CHECKING:
    from local.demo.run import Answer, Result

THUMBNAIL = 176  # pixels of the longer side: sharp at the 88 that the page shows on a phone, and at 160 on a desk
CLASSES_SHOWN = 3  # bars of one answer


def write(folder: Path, result: Result, steps: Sequence[Step]) -> Path:
    """Write index.html and the runs' reports into the folder; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("report-*.html"):
        old.unlink()
    for run in result.runs:
        if run.report:
            (folder / f"report-{run.run_id}.html").write_bytes(run.report)
    page = folder / "index.html"
    page.write_text(render(result, steps), encoding="utf-8")
    return page


def render(result: Result, steps: Sequence[Step]) -> str:
    """The page as text. Whatever came from files or models is escaped by the template engine."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "duration": duration, "in_words": in_words}
    return environment.get_template("page.html.j2").render(**view(result, steps))


def view(result: Result, steps: Sequence[Step]) -> dict[str, Any]:
    """What the template shows, computed from what the demo did."""
    new = result.collection.new
    failed = sum(answer.label is None for answer in result.stream)
    return {
        "source": result.collection.source,
        "began": result.began,
        "weights": " ".join(filter(None, [result.weights.line, result.caution])),
        "image_size": result.image_size,
        "seconds": result.seconds,
        "problems": result.problems,
        "new": new,
        "accuracy": [_share(result.before), _share(result.after)],
        "known": [_share(a for a in answers if a.picture.truth != new) for answers in (result.before, result.after)],
        "novel": [_share(a for a in answers if a.picture.truth == new) for answers in (result.before, result.after)],
        "per_class": _per_class(result),
        "stream": {
            "sent": len(result.stream),
            "during": result.during_update,
            "failed": failed,
            "by_model": _by_model(result.stream),
            **_requests(result),
        },
        "runs": [_run(run) for run in result.runs],
        "pictures": _pictures(result),
        "broken": [
            {
                "name": a.picture.name,
                "bytes": len(a.picture.data),
                "status": a.row["status"] if a.row else "no row",
                "reason": (a.row or {}).get("reason", ""),
            }
            for a in result.broken
        ],
        "steps": _timeline(steps),
    }


def percent(value: float | None) -> str:
    """A share as a whole percentage, a dash for none."""
    return "–" if value is None else f"{value:.0%}"


def thumbnail(data: bytes) -> str:
    """A small JPEG of the picture as a data URI; an empty text for what is no picture."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
            small = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
        return ""
    small = ImageOps.fit(small, (THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _share(answers: Any) -> dict[str, Any]:
    answers = list(answers)
    right = sum(answer.right for answer in answers)
    return {"right": right, "all": len(answers), "share": right / len(answers) if answers else None}


def _per_class(result: Result) -> list[dict[str, Any]]:
    names = [*result.collection.first, result.collection.new]
    return [
        {
            "name": name,
            "is_new": name == result.collection.new,
            "before": _share(a for a in result.before if a.picture.truth == name),
            "after": _share(a for a in result.after if a.picture.truth == name),
        }
        for name in names
    ]


def _by_model(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """How many pictures each model answered, in the order of deployment."""
    counts: dict[tuple[int, str], int] = {}
    for answer in answers:
        if answer.row and answer.label:
            model = int(answer.row["deployment"]), answer.row["model_version"]
            counts[model] = counts.get(model, 0) + 1
    return [{"deployment": d, "version": version, "count": n} for (d, version), n in sorted(counts.items())]


def _requests(result: Result) -> dict[str, int]:
    requests = result.requests
    return {
        "requests": requests.get("Invocations", 0),
        "requests_failed": requests.get("Invocation4XXErrors", 0) + requests.get("Invocation5XXErrors", 0),
    }


def _run(run: Any) -> dict[str, Any]:
    verdict = run.verdict or {}
    return {
        "id": run.run_id,
        "promoted": run.promoted,
        "outcome": run.outcome or run.status,
        "sentence": cause_in_words(run.message or verdict.get("sentence") or run.cause),
        "seconds": run.seconds,
        "trials": run.trials,
        "rules": (run.findings or {}).get("rules", []),
        "states": sorted(run.states.items(), key=lambda item: -item[1])[:8],
        "report": f"report-{run.run_id}.html" if run.report else "",
        "test_accuracy": ((run.evaluation or {}).get("challenger") or {}).get("accuracy"),
    }


def _pictures(result: Result) -> list[dict[str, Any]]:
    """The held-out pictures by class, each with what the models said of it, first model first."""
    after = {(a.picture.truth, a.picture.name): a for a in result.after}
    shown = []
    for name in [*result.collection.first, result.collection.new]:
        cards = []
        for first in (a for a in result.before if a.picture.truth == name):
            second = after.get((first.picture.truth, first.picture.name))
            last = second or first
            cards.append(
                {
                    "thumbnail": thumbnail(first.picture.data),
                    "key": last.key,
                    "right": last.right,
                    "answers": [_answer("before", first), *([_answer("after", second)] if second else [])],
                }
            )
        if cards:
            shown.append({"name": name, "is_new": name == result.collection.new, "cards": cards})
    return shown


def _answer(when: str, answer: Answer) -> dict[str, Any]:
    row = answer.row or {}
    return {
        "when": when,
        "right": answer.right,
        "label": answer.label or row.get("status", "no row"),
        "truth": answer.picture.truth,
        "classes": [
            {"name": c["class"], "share": float(c["probability"])} for c in row.get("classes", [])[:CLASSES_SHOWN]
        ],
    }


def _timeline(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """The steps as bars: start and width in percent of the whole."""
    if not steps:
        return []
    start = steps[0].began
    whole = max((step.began + (step.seconds or 0.0) for step in steps), default=start) - start or 1.0
    return [
        {
            "title": step.title,
            "seconds": step.seconds or 0.0,
            "failed": step.failed,
            "left": round(100 * (step.began - start) / whole, 2),
            "width": round(100 * (step.seconds or 0.0) / whole, 2),
        }
        for step in steps
    ]
