"""The gaps between ministack and AWS that Houndloop would fall into, each closed by one small module.

A seam replaces or wraps names inside ministack, so each states them first with `expect`: when a new ministack has
moved one, the emulator refuses to start and says which seam has to follow, instead of quietly behaving less like AWS.
"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import version
from types import ModuleType
from typing import Any

TESTED_MINISTACK = "1.5.33"


class SeamMovedError(RuntimeError):
    """ministack no longer has the name, or the signature, that a seam replaces."""


def expect(seam: str, module: ModuleType | type, name: str, *parameters: str, kind: type | None = None) -> Any:
    """Return `module.name`, having checked that it is what `seam` was written against.

    Functions are held to the names of their first parameters, data to its type.

    Raises:
        SeamMovedError: the name is gone, is no longer a `kind`, or takes other parameters.
    """
    where = f"{module.__name__}.{name}"
    found = getattr(module, name, None)
    problem = None
    if found is None:
        problem = f"{where} is gone"
    elif kind is not None:
        if not isinstance(found, kind):
            problem = f"{where} is a {type(found).__name__}, not a {kind.__name__}"
    elif not callable(found):
        problem = f"{where} is a {type(found).__name__}, not a function"
    else:
        actual = tuple(inspect.signature(found).parameters)[: len(parameters)]
        if actual != parameters:
            problem = f"{where} takes ({', '.join(actual)}), not ({', '.join(parameters)})"
    if problem:
        raise SeamMovedError(
            f"ministack {version('ministack')} moved what local/seams/{seam}.py hooks: {problem}. "
            f"Install ministack=={TESTED_MINISTACK}, or change that seam to follow."
        )
    return found


SEAMS = (
    "persistence",
    "transport",
    "metrics",
    "logs",
    "queues",
    "policies",
    "sessions",
    "partiql",
    "s3events",
    "functions",
    "cloudwatch",
    "cloudformation",
    "sagemaker",
    "autoscaling",
    "stepfunctions",
    "statelogs",
    "history",
    "passrole",
)


def install() -> None:
    """Install every seam into the ministack of this process, before it starts to serve."""
    for name in SEAMS:
        importlib.import_module(f"{__name__}.{name}").install()
