"""The container's environment, and the exit status that says that starting again would not help."""

from __future__ import annotations

import math
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

BAD_ARTIFACT = 78  # sysexits.h: EX_CONFIG
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of cgroups v2 and v1


@dataclass(frozen=True)
class Settings:
    """What serving is set to."""

    model_dir: str = "/opt/ml/model"
    precision: str = "f32"
    run_as: str = ""  # the user that root becomes
    model_version: str = ""  # "": as the artifact says
    deployment: int = 0  # counts up with each deployment; echoed in every answer
    queue_size: int = 32  # requests for each worker, at work or waiting; one more is answered 429
    timeout: float = 20.0  # seconds from a request's head to its answer; SageMaker gives up after 60
    max_payload: int = 25 * 1024 * 1024  # bytes of a request; SageMaker's limit for real-time endpoints
    memory: int = sys.maxsize  # bytes that a worker may take, the model included

    @classmethod
    def from_environment(cls, model_dir: str, workers: int) -> Settings:
        """ValueError, naming the variable, where one is no number."""
        return cls(
            model_dir=model_dir,
            precision=os.environ.get("PRECISION", cls.precision),
            run_as=os.environ.get("RUN_AS", cls.run_as),
            model_version=os.environ.get("MODEL_VERSION", cls.model_version),
            deployment=int(number("DEPLOYMENT", cls.deployment, least=0)),
            queue_size=int(number("QUEUE_SIZE", cls.queue_size)),
            timeout=number("REQUEST_TIMEOUT", cls.timeout, least=0.1),
            max_payload=int(number("MAX_PAYLOAD_BYTES", cls.max_payload)),
            memory=memory() // workers,
        )


def memory() -> int:
    """Bytes that all processes together may take: the container's limit, or what the machine has."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in MEMORY_LIMITS:
        with suppress(OSError, ValueError):  # no such cgroup, or "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)


def number(variable: str, default: float, least: float = 1) -> float:
    """The environment's `variable`. ValueError when it is no number or too small."""
    text = os.environ.get(variable) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not least <= value < math.inf:
        raise ValueError(f"{variable} is {text!r}; it must be a number of at least {least:g}")
    return value
