"""The container contract without a container: the `/opt/ml` tree as a folder, and the command that an image means.

An image `local/<folder>:<tag>` is `python <checkout>/<folder> …`; any other is a training image and means the Python
that runs the emulator. `/opt/ml` at the start of a word, or after its `=`, is the job's own folder.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from .settings import LOCAL_IMAGE, Settings

_OPT_ML = re.compile(r"(^|=)/opt/ml(?=/|$)")
TOLD_LIMIT = 4096  # bytes; AWS shows the first 1,024 characters
_PYTHON = re.compile(r"^(/usr(/local)?/bin/)?python[0-9.]*$")


class Container:
    """A job's folder with its `/opt/ml`, its log and its environment."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.settings = settings
        self.opt_ml = folder / "opt" / "ml"
        self.log = folder / "logs" / "algo-1.log"
        self.config = self.opt_ml / "input" / "config"
        self.model = self.opt_ml / "model"
        self.output = self.opt_ml / "output"
        self.output_data = self.output / "data"
        self.code = self.opt_ml / "code"
        for path in (self.config, self.opt_ml / "input" / "data", self.model, self.output_data, self.log.parent):
            path.mkdir(parents=True, exist_ok=True)

    def localised(self, text: str) -> str:
        """A word with its `/opt/ml` turned into this job's folder."""
        return _OPT_ML.sub(lambda match: f"{match[1]}{self.opt_ml}", text)

    def localised_values(self, values: dict[str, Any]) -> dict[str, Any]:
        """The same for those values that are texts."""
        return {name: self.localised(value) if isinstance(value, str) else value for name, value in values.items()}

    def path(self, text: str) -> Path:
        """A container's path as one of this machine."""
        return Path(self.localised(text))

    def command(self, image: str, entrypoint: list[str], arguments: list[str]) -> tuple[list[str], dict[str, str]]:
        """The command line that the image would run, and what its image adds to the environment."""
        words = [self.localised(word) for word in (*entrypoint, *arguments)]
        local = LOCAL_IMAGE.match(image)
        folder = self.settings.checkout / local["folder"] if local else None
        if not entrypoint:
            words = [sys.executable, *([str(folder)] if folder else []), *words]
        elif _PYTHON.match(words[0]):
            words[0] = sys.executable
        return words, {"PYTHONPATH": str(folder)} if folder else {}

    def channel(self, name: str) -> Path:
        """`/opt/ml/input/data/<channel>`."""
        return self.opt_ml / "input" / "data" / name

    def write_config(self, name: str, content: object) -> Path:
        """`/opt/ml/input/config/<name>.json`."""
        path = self.config / f"{name}.json"
        path.write_text(json.dumps(content, indent=2))
        return path

    def note(self, text: str) -> None:
        """A line of ours in the job's log."""
        with self.log.open("a") as log:
            log.write(text + "\n")

    def failure(self) -> str:
        """What the job wrote to `/opt/ml/output/failure`, or the empty string."""
        return self.written("failure").decode(errors="replace").strip()

    def written(self, name: str) -> bytes:
        """The beginning of a file that the job left in `/opt/ml/output` to be told on; empty if it did not."""
        path = self.output / name
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            return file.read(TOLD_LIMIT)


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a log, for a failure's reason."""
    if not path.is_file():
        return []
    with path.open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
        return log.read().decode(errors="replace").splitlines()[-count:]


def resource_config(instance_type: str) -> dict:
    """`resourceconfig.json` of a job on one instance."""
    return {
        "current_host": "algo-1",
        "current_instance_type": instance_type,
        "current_group_name": "homogeneousCluster",
        "hosts": ["algo-1"],
        "instance_groups": [
            {"instance_group_name": "homogeneousCluster", "instance_type": instance_type, "hosts": ["algo-1"]}
        ],
        "network_interface_name": "lo",
    }
