"""A virtual environment for each server that is compared, made once and kept under `.houndloop/`."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

from local.emulator import STATE

ENVIRONMENTS = STATE / "benchmark-environments"
LINKED = ("torch", "torchgen", "functorch")  # what torch's distribution consists of


def environment(name: str, requirements: str, torch: bool) -> Path:
    """The python of an environment with these requirements (a pip requirements file's text).

    `torch`: the environment that runs the benchmark lends its torch, so that all use the same binary and it lies on the
    disk once. A folder with links to it is added to the path, where pip finds it and leaves it alone; what torch needs
    is installed. Without it, `requirements` is the whole of what is installed. Raises RuntimeError with what pip said.
    """
    text = requirements
    if torch:
        version = distribution("torch").version.partition("+")[0]
        text += f"\ntorch=={version}\n"
    digest = hashlib.sha256(f"{text}{sys.version}{sys.prefix}".encode()).hexdigest()[:12]
    folder = ENVIRONMENTS / f"{name}-{digest}"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    for old in ENVIRONMENTS.glob(f"{name}-*"):  # of other requirements
        shutil.rmtree(old)
    venv.create(folder, with_pip=True)
    if torch:
        packages = next(folder.glob("lib/python*/site-packages"))
        (packages / "torch.pth").write_text(f"{_lent()}\n")
    (folder / "requirements.txt").write_text(text)
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if not torch:
        command.append("--no-deps")
    done = subprocess.run([*command, "-r", str(folder / "requirements.txt")], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the environment for {name} could not be made: {done.stderr[-1500:]}")
    (folder / "complete").touch()
    return python


def _lent() -> Path:
    """A folder with this environment's torch and nothing else."""
    found = distribution("torch")
    site = Path(str(found.locate_file("")))
    digest = hashlib.sha256(f"{site}{found.version}".encode()).hexdigest()[:12]
    folder = ENVIRONMENTS / f"lent-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    names = [*LINKED, f"torch-{found.version}.dist-info"]
    for name in names:
        if (site / name).exists() and not (folder / name).exists():
            (folder / name).symlink_to(site / name)
    return folder
