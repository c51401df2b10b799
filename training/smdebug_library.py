"""smdebug, made to work in this container.

SageMaker Debugger's service is closed to new accounts, its library still works. It needs three helping hands: a new
protobuf must run in pure Python, one call to a method that NumPy removed, and, in AWS's training container, to be
installed from the wheel in the source archive without its pinned dependencies.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@contextmanager
def smdebug() -> Iterator[None]:
    """Within it smdebug's modules can be imported. Raises ImportError when it cannot be had."""
    if _new_protobuf():
        os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
    os.environ.setdefault("SMDEBUG_LOG_LEVEL", "warning")
    if importlib.util.find_spec("smdebug") is None:
        install_wheel(Path(__file__).parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    _repair_tostring()


def _new_protobuf() -> bool:
    try:
        return int(version("protobuf").split(".")[0]) >= 4
    except PackageNotFoundError:
        return False


def install_wheel(folder: Path) -> None:
    """Installs the smdebug wheel that lies in `folder`, without the old dependencies that it pins. ImportError."""
    wheels = sorted(folder.glob("smdebug-*.whl"))
    if not wheels:
        raise ImportError("smdebug is not installed and no smdebug-*.whl lies beside train.py: "
                          "pip install --no-deps smdebug==1.0.34, or profile=false")  # fmt: skip
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", str(wheels[-1])]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise ImportError(f"{wheels[-1].name} could not be installed: {done.stderr.strip()[-500:]}")
    importlib.invalidate_caches()


def _repair_tostring() -> None:
    """smdebug calls `ndarray.tostring`, which NumPy 2.3 removed: its module gets a make_tensor_proto that does not."""
    import numpy as np

    util = sys.modules.get("smdebug.core.tfevent.util")
    if util is None or hasattr(np.ndarray, "tostring"):
        return

    class Array(np.ndarray):
        def tostring(self) -> bytes:
            return self.tobytes()

    original = util.make_tensor_proto
    if getattr(original, "repaired", False):
        return

    def make_tensor_proto(nparray_data, tag):
        return original(np.asarray(nparray_data).view(Array), tag)

    make_tensor_proto.repaired = True  # type: ignore[attr-defined]
    for name, module in list(sys.modules.items()):
        if name.startswith("smdebug") and getattr(module, "make_tensor_proto", None) is original:
            module.make_tensor_proto = make_tensor_proto  # type: ignore[attr-defined]
