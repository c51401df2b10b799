"""Requests against the service model that ships in botocore, refused in AWS's words.

botocore checks some of this on the client's side; Step Functions, other SDKs and plain HTTP do not.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import botocore.session
from botocore.model import ListShape, MapShape, OperationModel, ServiceModel, Shape, StructureShape

from .errors import UnknownOperation, ValidationException

# Java's character classes in the model's patterns, as near as Python's re can say them inside brackets.
_JAVA_CLASSES = {r"\p{Alnum}": "a-zA-Z0-9", r"\p{L}": r"\w", r"\p{N}": r"\d", r"\p{Z}": r"\s"}


@functools.cache
def service_model() -> ServiceModel:
    """SageMaker's service model."""
    return botocore.session.get_session().get_service_model("sagemaker")


def operation(action: str) -> OperationModel:
    """The model of an action; raises UnknownOperation."""
    if action not in service_model().operation_names:
        raise UnknownOperation(f"SageMaker has no action {action!r}.")
    return service_model().operation_model(action)


def validate(action: str, request: Any) -> None:
    """Raises ValidationException naming every constraint that the request breaks."""
    shape = operation(action).input_shape
    if not isinstance(request, dict):
        raise ValidationException("The request body must be a JSON object.")
    failures = _failures(shape, request, "") if shape else []
    if failures:
        plural = "errors" if len(failures) > 1 else "error"
        raise ValidationException(f"{len(failures)} validation {plural} detected: " + "; ".join(failures))


def _failures(shape: Shape, value: Any, path: str) -> list[str]:
    if isinstance(shape, StructureShape):
        if not isinstance(value, dict):
            return [_failure(value, path, "Member must be a structure")]
        found = [
            _failure(None, _member(path, name), "Member must not be null")
            for name in shape.required_members
            if value.get(name) is None
        ]
        for name, member in shape.members.items():
            if value.get(name) is not None:
                found += _failures(member, value[name], _member(path, name))
        return found
    if isinstance(shape, ListShape):
        if not isinstance(value, list):
            return [_failure(value, path, "Member must be a list")]
        found = _sizes(shape, value, path, "length")
        for number, item in enumerate(value, start=1):
            found += _failures(shape.member, item, f"{path}.{number}.member")
        return found
    if isinstance(shape, MapShape):
        if not isinstance(value, dict):
            return [_failure(value, path, "Member must be a map")]
        found = _sizes(shape, value, path, "length")
        for key, item in value.items():
            found += [
                _failure(value, path, f"Map keys must satisfy constraint: [{reason}]")
                for reason in _scalar_reasons(shape.key, key)
            ]
            found += [
                _failure(value, path, f"Map value must satisfy constraint: [{reason}]")
                for reason in _scalar_reasons(shape.value, item)
            ]
        return found
    return [_failure(value, path, reason) for reason in _scalar_reasons(shape, value)]


def _scalar_reasons(shape: Shape, value: Any) -> list[str]:
    kind = shape.type_name
    if kind == "string":
        if not isinstance(value, str):
            return ["Member must be a string"]
        reasons = _size_reasons(shape, len(value), "length")
        enum = shape.metadata.get("enum")
        if enum and value not in enum:
            reasons.append(f"Member must satisfy enum value set: [{', '.join(enum)}]")
        pattern = shape.metadata.get("pattern")
        if pattern and (compiled := _compiled(pattern)) and not compiled.fullmatch(value):
            reasons.append(f"Member must satisfy regular expression pattern: {pattern}")
        return reasons
    if kind in ("integer", "long", "float", "double"):
        whole = kind in ("integer", "long")
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            return [f"Member must be {'an integer' if whole else 'a number'}"]
        return _size_reasons(shape, value, "value")
    if kind == "boolean" and not isinstance(value, bool):
        return ["Member must be a boolean"]
    if kind == "timestamp" and (isinstance(value, bool) or not isinstance(value, int | float | str)):
        return ["Member must be a timestamp"]
    return []


def _sizes(shape: Shape, value: Any, path: str, what: str) -> list[str]:
    return [_failure(value, path, reason) for reason in _size_reasons(shape, len(value), what)]


def _size_reasons(shape: Shape, size: float, what: str) -> list[str]:
    low, high = shape.metadata.get("min"), shape.metadata.get("max")
    reasons = []
    if low is not None and size < low:
        reasons.append(f"Member must have {what} greater than or equal to {low}")
    if high is not None and size > high:
        reasons.append(f"Member must have {what} less than or equal to {high}")
    return reasons


@functools.cache
def _compiled(pattern: str) -> re.Pattern | None:
    """The pattern for Python, or None where Python's re cannot say it: then it is not checked."""
    for java, python in _JAVA_CLASSES.items():
        pattern = pattern.replace(java, python)
    try:
        return re.compile(pattern)
    except re.error:
        return None


def _member(path: str, name: str) -> str:
    member = name[:1].lower() + name[1:]
    return f"{path}.{member}" if path else member


def _failure(value: Any, path: str, constraint: str) -> str:
    shown = "null" if value is None else f"'{value}'"
    return f"Value {shown} at '{path}' failed to satisfy constraint: {constraint}"
