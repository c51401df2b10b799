"""What the demo is asked to do: options and the environment that `make` passes on; and where its weights come from."""

from __future__ import annotations

import argparse
import hashlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
DEFAULT_PORT = 4566

WEIGHTS_SHA256 = "f37072fd"  # how it starts; torchvision puts it into the file's name
WEIGHTS_FILE = f"resnet18-{WEIGHTS_SHA256}.pth"
WEIGHTS_URL = f"https://download.pytorch.org/models/{WEIGHTS_FILE}"
CONNECT_SECONDS = 3


class DemoError(Exception):
    """The demo cannot begin or go on; the message is one sentence for whoever typed the command."""


@dataclass(frozen=True)
class Settings:
    """The choices of one run of the demo."""

    data: Path | None  # a folder of one subfolder per class, or None: drawn pictures
    weights: Path | None  # a file that must be used, or None: look for one
    keep: bool
    port: int
    seed: int
    labelled: int  # drawn pictures to label per class
    state: Path = CHECKOUT / ".houndloop"  # where everything is written


def parse(arguments: list[str] | None = None) -> Settings:
    """Options, each with the environment variable of the same name as its default."""
    parser = argparse.ArgumentParser(prog="python -m local.demo", description="Run the whole loop on this machine.")
    parser.add_argument("--data", default=os.environ.get("DATA"), help="folder with one subfolder of pictures a class")
    parser.add_argument("--weights", default=os.environ.get("WEIGHTS"), help=f"{WEIGHTS_FILE}, from torchvision")
    parser.add_argument("--keep", default=os.environ.get("KEEP", ""), nargs="?", const="1", help="leave the stack up")
    parser.add_argument("--port", default=os.environ.get("PORT") or DEFAULT_PORT, help="of AWS on this machine")
    parser.add_argument("--seed", type=int, default=7, help="of the drawn pictures")
    parser.add_argument("--labelled", type=int, default=70, help="drawn pictures to label per class")
    parser.add_argument("--state", default=CHECKOUT / ".houndloop", help="folder for everything that it writes")
    given = parser.parse_args(arguments)
    if not str(given.port).isdigit() or not 1024 <= int(given.port) <= 65535:
        raise DemoError(f"PORT must be a number from 1024 to 65535, not {given.port!r}.")
    return Settings(
        data=Path(given.data).expanduser() if given.data else None,
        weights=Path(given.weights).expanduser() if given.weights else None,
        keep=given.keep not in ("", "0", "no", "false"),
        port=int(given.port),
        seed=given.seed,
        labelled=given.labelled,
        state=Path(given.state).expanduser().resolve(),
    )


@dataclass(frozen=True)
class Weights:
    """Pretrained weights that were found, or why there are none: `line` says it in one line."""

    path: Path | None
    line: str


def find_weights(named: Path | None, cache: Path | None = None, url: str = WEIGHTS_URL) -> Weights:
    """ImageNet weights of ResNet-18 from the file that was named, torch hub's cache, or the network, in this order.

    Raises DemoError if the file that was named is missing or is another one: what was asked for is never replaced.
    """
    if named:
        if not named.is_file():
            raise DemoError(f"WEIGHTS={named}: there is no such file.")
        if not _is_genuine(named):
            raise DemoError(
                f"WEIGHTS={named} is not torchvision's {WEIGHTS_FILE}: its sha256 starts with {_sha256(named)[:8]}, "
                f"not with {WEIGHTS_SHA256}."
            )
        return Weights(named, f"Starts from ImageNet weights: {named}.")

    cached = (cache or hub_cache()) / WEIGHTS_FILE
    if cached.is_file() and _is_genuine(cached):
        return Weights(cached, f"Starts from ImageNet weights: {cached} (torch hub's cache).")
    broken = f"{cached} is damaged, and " if cached.is_file() else ""
    try:
        _download(url, cached)
    except (OSError, urllib.error.URLError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Weights(
            None,
            f"No ImageNet weights ({broken}{url.split('/')[2]} did not give them: {reason}): "
            "all layers are trained from random weights, on smaller pictures; WEIGHTS=file would use yours.",
        )
    return Weights(cached, f"Starts from ImageNet weights, downloaded from {url} and kept in torch hub's cache.")


def hub_cache() -> Path:
    """Where torch hub keeps weights, by torch's own rules."""
    home = os.environ.get("TORCH_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "torch")
    return Path(home).expanduser() / "hub" / "checkpoints"


def _download(url: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as answer, part.open("wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
        if not _is_genuine(part):
            raise ValueError(f"its sha256 starts with {_sha256(part)[:8]}, not with {WEIGHTS_SHA256}")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _is_genuine(path: Path) -> bool:
    return _sha256(path).startswith(WEIGHTS_SHA256)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
