"""Reads label files: output manifests of SageMaker Ground Truth, and exports of Label Studio (JSON, JSON-MIN).

Pure functions. What a person labelled with one class becomes a Line with its picture and its class; everything else
becomes a Line with the reason why it is no label. Formats: docs/labels.md.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from common.names import BadLabel, class_name

Thing = dict[str, Any]

GROUND_TRUTH, LABEL_STUDIO = "Ground Truth", "Label Studio"
CLASSIFICATION = "groundtruth/image-classification"
# Fields that JSON-MIN adds to a task's data beside the answers.
_BESIDE_ANSWERS = {"id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement"}
_S3_HOST = re.compile(r"(?:(?P<bucket>.+)\.)?s3(?:[.-](?:dualstack\.)?[a-z0-9-]+)?\.amazonaws\.com(?:\.cn)?")


class NoLabels(ValueError):
    """A file from which no line can be read; the text says why."""


class Line(NamedTuple):
    """One line of a manifest, or one task of an export, counted from 1: a label, or the reason why it is none."""

    number: int
    key: str = ""
    class_name: str = ""
    reason: str = ""


class _Refused(ValueError):
    """A line that is no label; the text says why."""


class File(NamedTuple):
    format: str
    lines: list[Line]


def read(data: bytes, bucket: str) -> File:
    """All lines of a label file. Pictures have to lie in `bucket`. NoLabels when it is no such file."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NoLabels(f"it is not UTF-8 text (at byte {error.start:,})") from None
    at = _past_space(text, 0)
    start = text[at : at + 1]
    if start == "[":
        things: Iterator[Any] = _elements(text)
        found = File(LABEL_STUDIO, [_line(n, thing, _label_studio, bucket) for n, thing in enumerate(things, 1)])
    elif start == "{":
        if not any(map(_is_object, text[at:].split("\n", 10)[:10])):  # else each line would become a reason
            raise NoLabels("none of its first lines is a JSON object: a manifest of Ground Truth has one a line")
        numbered = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
        found = File(GROUND_TRUTH, [_line(n, line, _ground_truth, bucket) for n, line in numbered])
    else:
        raise NoLabels(
            "it is neither an output manifest of Ground Truth, with a JSON object a line, "
            "nor a JSON export of Label Studio"
        )
    if not found.lines:
        raise NoLabels("it has no tasks")
    return found


def _line(number: int, thing: Any, read: Any, bucket: str) -> Line:
    try:
        uri, name = read(thing)
        return Line(number, _key(uri, bucket), class_name(name))
    except (_Refused, BadLabel) as reason:
        task = f"task {thing['id']}: " if isinstance(thing, dict) and "id" in thing else ""
        return Line(number, reason=f"{task}{reason}"[:500].encode(errors="replace").decode())


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


# --- Ground Truth ----------------------------------------------------------------------------------------------------


def _ground_truth(line: str) -> tuple[str, str]:
    """Picture and class of a line of an output manifest (or of an augmented manifest in its form)."""
    try:
        thing = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _Refused(f"it is not JSON: {error}") from None
    if not isinstance(thing, dict) or not isinstance(thing.get("source-ref"), str):
        raise _Refused("it has no source-ref")
    suffix = "-metadata"
    metadata = {k.removesuffix(suffix): v for k, v in thing.items() if k.endswith(suffix) and isinstance(v, dict)}
    if failed := [m["failure-reason"] for m in metadata.values() if "failure-reason" in m]:
        raise _Refused(f"Ground Truth could not label it: {str(failed[0])[:200]}")
    kinds = {name: m.get("type") for name, m in metadata.items()}
    names = {name: m.get("class-name") for name, m in metadata.items() if kinds[name] == CLASSIFICATION}
    if not names:
        other = sorted({str(kind) for kind in kinds.values()})
        raise _Refused(
            f"its labels are of type {', '.join(other)}, not {CLASSIFICATION}" if other else "it has no label"
        )
    if not all(isinstance(name, str) and name for name in names.values()):
        raise _Refused(f"its label {' and '.join(names)} has no class-name")
    if len(set(names.values())) > 1:
        said = ", ".join(f"{label} says {name!r}" for label, name in names.items())
        raise _Refused(f"it has several labels that differ ({said}): leave one in the file")
    return thing["source-ref"], str(next(iter(names.values())))


# --- Label Studio ----------------------------------------------------------------------------------------------------


def _elements(text: str) -> Iterator[Any]:
    """The elements of a JSON array one by one: all at once would take several times the memory of the text."""
    decoder = json.JSONDecoder()
    at = _past_space(text, text.index("[") + 1)
    try:
        while text[at : at + 1] != "]":
            thing, at = decoder.raw_decode(text, at)
            yield thing
            at = _past_space(text, at)
            if text[at : at + 1] == ",":
                at = _past_space(text, at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    except (ValueError, RecursionError) as error:
        raise NoLabels(f"it is not JSON, or was cut off: {error}") from None


def _past_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def _label_studio(task: Any) -> tuple[str, str]:
    """Picture and class of a task of a JSON export, or of a record of a JSON-MIN export."""
    if not isinstance(task, dict):
        raise _Refused("it is no task")
    if "annotations" in task or "completions" in task:  # the name before 2021
        data = task.get("data")
        picture = _picture(data if isinstance(data, dict) else {})[1]
        return picture, _agreed(task.get("annotations") or task.get("completions") or [])
    field, picture = _picture(task)
    return picture, _answer({name: value for name, value in task.items() if name != field})


def _picture(data: Thing) -> tuple[str, str]:
    """The field of a task's data that names its picture, and the name."""
    found = {name: v for name, v in data.items() if isinstance(v, str) and re.match(r"(\w+:/)?/", v)}
    if len(found) > 1:
        found = {name: value for name, value in found.items() if name in ("image", "img", "picture")} or found
    if len(found) != 1:
        raise _Refused(
            f"several of its fields could be the picture: {', '.join(found)}" if found else "it names no picture"
        )
    return next(iter(found.items()))


def _agreed(annotations: list[Any]) -> str:
    """The one class that all annotators chose; what is marked as ground truth counts alone."""
    made = [each for each in annotations if isinstance(each, dict)]
    kept = [each for each in made if not each.get("was_cancelled") and not each.get("skipped")]
    if not kept:
        raise _Refused("whoever annotated it skipped it" if made else "it was not annotated")
    kept = [each for each in kept if each.get("ground_truth")] or kept
    votes = Counter(_chosen(each.get("result") or []) for each in kept)
    if len(votes) > 1:
        raise _Refused(f"its annotators disagree: {', '.join(f'{name!r} ({n})' for name, n in votes.most_common())}")
    return next(iter(votes))


def _chosen(result: list[Any]) -> str:
    """The one choice of an annotation."""
    chosen = [each for each in result if isinstance(each, dict) and each.get("type") == "choices"]
    return _one({name for each in chosen for name in _choices(each.get("value"))})


def _answer(record: Thing) -> str:
    """The choice of a record of JSON-MIN, in which answers stand among the task's own fields, behind its id."""
    answers = {name: v for name, v in record.items() if name not in _BESIDE_ANSWERS and _choices(v)}
    if len(answers) > 1:
        names = list(record)
        behind = names[names.index("id") :] if "id" in record else names
        answers = {name: value for name, value in answers.items() if name in behind} or answers
    if len(answers) > 1:
        raise _Refused(f"several of its fields could be the class ({', '.join(answers)}): export as JSON, not JSON-MIN")
    return _one({name for value in answers.values() for name in _choices(value)})


def _choices(value: Any) -> list[str]:
    """The choices in a value: a name, `{"choices": […]}`, or a list of such."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return _choices(value.get("choices"))
    return [name for each in value for name in _choices(each)] if isinstance(value, list) else []


def _one(names: set[str]) -> str:
    if len(names) != 1:
        said = ", ".join(map(repr, sorted(names)))
        raise _Refused(f"it has several classes: {said}" if names else "it has no choice")
    return next(iter(names))


# --- Where pictures are ----------------------------------------------------------------------------------------------


def _key(uri: str, bucket: str) -> str:
    """The key of a picture in `bucket`; _Refused with what to do when it is somewhere else."""
    found = _place(uri)
    if found is None:
        raise _Refused(f"{uri[:200]} is not in S3: put the picture into s3://{bucket} and name it by its s3:// address")
    place, key = found
    if place != bucket:
        raise _Refused(f"{uri[:200]} is in another bucket: copy the picture into s3://{bucket}, and name it there")
    if not 0 < len(key.encode(errors="replace")) <= 1024 or any("\ud800" <= c <= "\udfff" for c in key):
        raise _Refused(f"{uri[:200]} names no object")
    return key


def _place(uri: str) -> tuple[str, str] | None:
    """Bucket and key of an s3:// address, in which keys stand as they are, or of an https:// one, presigned or not."""
    if uri.startswith("s3://"):
        place, _, key = uri.removeprefix("s3://").partition("/")
        return place, key
    try:
        parts = urlsplit(uri)
        host = _S3_HOST.fullmatch(parts.hostname or "") if parts.scheme == "https" else None
    except ValueError:
        return None
    if not host:
        return None
    path = unquote(parts.path.removeprefix("/"))
    if host["bucket"]:
        return host["bucket"], path
    place, _, key = path.partition("/")
    return place, key
