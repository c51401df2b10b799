"""Requests read and held to the service model that ships in botocore, refused in AWS's words.

Two steps, as on AWS: first the JSON 1.1 protocol turns the body into the members that the model knows, and what has the
wrong type ends there (SerializationException); then every constraint of the model is checked, and all that are broken
are named in one ValidationException. botocore checks some of this on the client's side; Step Functions, other SDKs and
plain HTTP do not.
"""

from __future__ import annotations

import functools
import json
import math
import re
import unicodedata
from itertools import groupby
from typing import Any

import botocore.session
from botocore.model import ListShape, MapShape, OperationModel, ServiceModel, Shape, StructureShape

from .errors import SerializationException, UnknownOperation, ValidationException

# What AWS's protocol layer says about a value of the wrong type (as DynamoDB, Athena and SQS answer it).
LIST_FOUND = "Start of list found where not expected"
STRUCTURE_FOUND = "Start of structure or map found where not expected."
JAVA_TYPES = {
    "string": "a String",
    "integer": "an Integer",
    "long": "a Long",
    "float": "a Float",
    "double": "a Double",
    "boolean": "a Boolean",
    "timestamp": "milliseconds since epoch",
}
LAST_LETTER = 0x323B0  # no assigned character above it but tags and selectors, which no name has


@functools.cache
def service_model() -> ServiceModel:
    """SageMaker's service model."""
    return botocore.session.get_session().get_service_model("sagemaker")


def operation(action: str) -> OperationModel:
    """The model of an action; raises UnknownOperation."""
    if action not in service_model().operation_names:
        raise UnknownOperation
    return service_model().operation_model(action)


def parse(action: str, body: bytes) -> dict:
    """The request in a body. Members that are null are left out; those that the model does not know stay.

    Raises:
        SerializationException: it is no JSON object, or a value has another type than the model's.
    """
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise SerializationException from None
    if isinstance(value, list):
        raise SerializationException(LIST_FOUND)
    if not isinstance(value, dict):
        raise SerializationException
    shape = operation(action).input_shape
    return _read(shape, value) if shape else value


def validate(action: str, request: dict) -> None:
    """Raises ValidationException naming every constraint that a parsed request breaks."""
    _check(operation(action).input_shape, request)


def validate_shape(shape: Shape | None, request: Any) -> dict:
    """Both steps, for the input shape of any service's action and a request that was parsed as plain JSON.

    Returns the request as `parse` does.

    Raises:
        SerializationException, ValidationException
    """
    request = _read(shape, request) if shape else request
    _check(shape, request)
    return request


def _check(shape: Shape | None, request: dict) -> None:
    failures = _failures(shape, request, "") if shape else []
    if failures:
        plural = "errors" if len(failures) > 1 else "error"
        raise ValidationException(f"{len(failures)} validation {plural} detected: " + "; ".join(failures))


def _no_constant(name: str) -> None:
    """Python's JSON knows NaN and Infinity; the protocol's does not."""
    raise ValueError(name)


# --- Types -----------------------------------------------------------------------------------------------------------


def _read(shape: Shape, value: Any) -> Any:
    """A value of the model's type; a null in it is as if it were not there."""
    if isinstance(shape, StructureShape | MapShape):
        if not isinstance(value, dict):
            raise SerializationException(LIST_FOUND if isinstance(value, list) else "Expected null")
        given = {name: item for name, item in value.items() if item is not None}
        if isinstance(shape, MapShape):
            return {name: _read(shape.value, item) for name, item in given.items()}
        return {
            name: _read(shape.members[name], item) if name in shape.members else item for name, item in given.items()
        }
    if isinstance(shape, ListShape):
        if not isinstance(value, list):
            raise SerializationException(STRUCTURE_FOUND if isinstance(value, dict) else "Expected list or null")
        return [_read(shape.member, item) for item in value if item is not None]
    return _scalar(shape.type_name, value)


def _scalar(kind: str, value: Any) -> Any:
    if isinstance(value, list):
        raise SerializationException(LIST_FOUND)
    if isinstance(value, dict):
        raise SerializationException(STRUCTURE_FOUND)
    if isinstance(value, bool):
        found, fits = f"{str(value).upper()}_VALUE", kind == "boolean"
    elif isinstance(value, str):
        found, fits = "STRING_VALUE", kind == "string"
    else:
        found, fits = "NUMBER_VALUE", kind not in ("string", "boolean")
    if not fits or value in (math.inf, -math.inf):  # 1e999; Python's JSON reads it as infinity
        raise SerializationException(f"{found} can not be converted to {JAVA_TYPES[kind]}")
    return int(value) if kind in ("integer", "long") else value  # AWS cuts a fraction off


# --- Constraints -----------------------------------------------------------------------------------------------------


def _failures(shape: Shape, value: Any, path: str) -> list[str]:
    if isinstance(shape, StructureShape):
        found = [
            _failure(None, _member(path, name), "Member must not be null")
            for name in shape.required_members
            if name not in value
        ]
        for name, member in shape.members.items():
            if name in value:
                found += _failures(member, value[name], _member(path, name))
        return found
    reasons = _broken(shape, value)
    if isinstance(shape, ListShape):
        if isinstance(shape.member, StructureShape | ListShape | MapShape):
            found = [_failure(value, path, reason) for reason in reasons]
            for number, item in enumerate(value, start=1):
                found += _failures(shape.member, item, f"{path}.{number}.member")
            return found
        if any(_broken(shape.member, item) for item in value):
            reasons.append(f"Member must satisfy constraint: [{', '.join(_constraints(shape.member))}]")
    if isinstance(shape, MapShape):
        # Broken entries are told by what all entries must satisfy, keys first, each once.
        if any(_broken(shape.key, key) for key in value):
            reasons.append(f"Map keys must satisfy constraint: [{', '.join(_constraints(shape.key))}]")
        if any(_broken(shape.value, item) for item in value.values()):
            reasons.append(f"Map value must satisfy constraint: [{', '.join(_constraints(shape.value))}]")
    return [_failure(value, path, reason) for reason in reasons]


def _constraints(shape: Shape) -> dict[str, Any]:
    """What the model asks of a value, in AWS's words and order: {constraint: whether a value breaks it}."""
    what = "value" if shape.type_name in ("integer", "long", "float", "double") else "length"
    size = (lambda value: value) if what == "value" else len
    low, high = shape.metadata.get("min"), shape.metadata.get("max")
    enum, pattern = shape.metadata.get("enum"), shape.metadata.get("pattern")
    found: dict[str, Any] = {}
    if high is not None:
        found[f"Member must have {what} less than or equal to {high}"] = lambda value: size(value) > high
    if low is not None:
        found[f"Member must have {what} greater than or equal to {low}"] = lambda value: size(value) < low
    if enum:
        found[f"Member must satisfy enum value set: [{', '.join(enum)}]"] = lambda value: value not in enum
    if pattern and (compiled := _compiled(pattern)):
        found[f"Member must satisfy regular expression pattern: {pattern}"] = lambda value: (
            not compiled.fullmatch(value)
        )
    return found


def _broken(shape: Shape, value: Any) -> list[str]:
    return [constraint for constraint, breaks in _constraints(shape).items() if breaks(value)]


@functools.cache
def _compiled(pattern: str) -> re.Pattern | None:
    """A pattern of the model, which is Java's, for Python; None where `re` cannot say it: then it is not checked."""
    pattern = pattern.replace(r"\p{Alnum}", "a-zA-Z0-9")
    pattern = re.sub(r"\\p\{([A-Z])\}", lambda found: _characters()[found[1]], pattern)
    pattern = re.sub(r"\$\{\d+,\d+\}", "$", pattern)  # the end of the text, several times over
    try:
        return re.compile(pattern)
    except re.error:
        return None


@functools.cache
def _characters() -> dict[str, str]:
    """Unicode's general categories by their first letter (`L`, `N`, …), as ranges for a bracket expression."""
    ranges: dict[str, list[str]] = {}
    codes = range(LAST_LETTER)
    for category, run in groupby(codes, key=lambda code: unicodedata.category(chr(code))[0]):
        members = list(run)
        ranges.setdefault(category, []).append(f"\\U{members[0]:08x}-\\U{members[-1]:08x}")
    return {category: "".join(found) for category, found in ranges.items()}


def _member(path: str, name: str) -> str:
    member = name[:1].lower() + name[1:]
    return f"{path}.{member}" if path else member


def _failure(value: Any, path: str, constraint: str) -> str:
    shown = "null" if value is None else f"'{_shown(value)}'"
    return f"Value {shown} at '{path}' failed to satisfy constraint: {constraint}"


def _shown(value: Any) -> str:
    """A value as Java prints it: texts bare, lists as `[a, b]`, maps as `{k=v}`."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}={_shown(item)}' for key, item in value.items())}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)
