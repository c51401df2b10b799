"""What the local SageMaker takes from its environment, read once when it starts."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
LOCAL_IMAGE = re.compile(r"^local/(?P<folder>[A-Za-z0-9_-][A-Za-z0-9._-]*)(:[A-Za-z0-9._-]+)?$")
REAL_TIME_BODY_LIMIT = 6 * 1024 * 1024  # InvokeEndpoint on a real-time endpoint, bytes (AWS's documented 6 MB)
SERVERLESS_BODY_LIMIT = 4 * 1024 * 1024  # InvokeEndpoint on a serverless endpoint, bytes
INVOCATION_TIMEOUT = 60.0  # seconds a container has to answer, AWS's limit for InvokeEndpoint


def _state_dir() -> Path:
    return Path(os.environ.get("HOUNDLOOP_STATE_DIR") or CHECKOUT / ".houndloop").resolve()


def _number(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        return float(text) if text else default
    except ValueError:
        raise SystemExit(f"{name} must be a number, found {text!r}: correct or unset it.") from None


PRELOAD = "torch,torch._dynamo,numpy,PIL.Image,boto3"  # every optimizer of torch imports torch._dynamo


@dataclass(frozen=True)
class Settings:
    """Folders and limits. Times are seconds. `checkout` is where the folders that images name stand."""

    state_dir: Path = field(default_factory=lambda: _state_dir() / "sagemaker")
    checkout: Path = field(default_factory=lambda: Path(os.environ.get("HOUNDLOOP_IMAGES") or CHECKOUT).resolve())
    max_jobs: int = field(default_factory=lambda: max(1, int(_number("HOUNDLOOP_MAX_JOBS", os.cpu_count() or 1))))
    stop_grace: float = field(default_factory=lambda: _number("HOUNDLOOP_STOP_GRACE", 120))  # AWS waits 120 s
    health_timeout: float = field(default_factory=lambda: _number("HOUNDLOOP_HEALTH_TIMEOUT", 240))
    drain_timeout: float = INVOCATION_TIMEOUT
    preload: tuple[str, ...] = field(
        default_factory=lambda: tuple(name for name in os.environ.get("HOUNDLOOP_PRELOAD", PRELOAD).split(",") if name)
    )  # imported once by the warden, so that a job starts without paying for them

    @property
    def threads_per_job(self) -> int:
        """The threads of a job that runs beside as many others as there may be."""
        return max(1, (os.cpu_count() or 1) // self.max_jobs)
