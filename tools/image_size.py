"""Adds up what the serving image holds, for want of a container engine.

    python tools/image_size.py

What inference/Dockerfile installs is installed here, in a temporary folder and for the image's platform, and thinned by
the Dockerfile's own command. The base image is not at hand: its size is the largest that is published for it.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

INFERENCE = Path(__file__).resolve().parents[1] / "inference"
LIMIT = 400  # MB, as SageMaker would unpack it
# Published sizes of python:3.12-slim, unpacked, are from 119 to 150 MB; compressed it is a third of that.
BASE = 150
PLATFORM = ("manylinux2014_x86_64", "manylinux_2_28_x86_64")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="install there, and leave it; it must be empty")
    arguments = parser.parse_args()
    dockerfile = (INFERENCE / "Dockerfile").read_text()
    with tempfile.TemporaryDirectory() as folder:
        target = arguments.keep or Path(folder)
        install(target, python_of(dockerfile))
        before = size(target)
        thin(target / "openvino", removal_of(dockerfile))
        sizes = {base_of(dockerfile): float(BASE), "inference/*.py": sum(size(file) for file in INFERENCE.glob("*.py"))}
        sizes |= sorted(packages(target).items(), key=lambda item: -item[1])
        print(f"{before - size(target):7.1f} MB removed from what was installed")
    for name, megabytes in sizes.items():
        print(f"{megabytes:7.1f} MB {name}")
    total = sum(sizes.values())
    print(f"{total:7.1f} MB in all; the limit is {LIMIT} MB")
    return 0 if total < LIMIT else 1


def base_of(dockerfile: str) -> str:
    """The base image, without its digest."""
    return re.findall(r"^FROM ([^@\s]+)", dockerfile, re.MULTILINE)[0]


def python_of(dockerfile: str) -> str:
    """The version of Python in the base image, as pip wants it: 3.12."""
    return re.findall(r"/python:(\d+\.\d+)", base_of(dockerfile))[0]


def removal_of(dockerfile: str) -> str:
    """The command that thins OpenVINO; it runs in that package's folder."""
    return re.findall(r"&& (rm -r .*?) \\\n\s*&&", dockerfile, re.DOTALL)[0].replace("\\\n", " ")


def install(target: Path, python: str) -> None:
    """What the image installs, with the bytecode that pip makes."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--target", str(target), "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    command += [argument for platform in PLATFORM for argument in ("--platform", platform)]
    subprocess.run([*command, "-r", str(INFERENCE / "requirements.txt")], check=True)


def thin(folder: Path, command: str) -> None:
    """Run the Dockerfile's command in a package's folder. It fails where it names what is not there, as in a build."""
    subprocess.run(["bash", "-ec", command], cwd=folder, check=True)


def packages(folder: Path) -> dict[str, float]:
    """MB of each package, with the libraries that its wheel carries along."""
    found: dict[str, float] = {}
    for entry in folder.iterdir():
        name = re.split(r"[-.]", entry.name.lstrip("_"))[0]
        found[name] = found.get(name, 0) + size(entry)
    return found


def size(path: Path) -> float:
    """MB on disk of a file, or of all files below a folder, in whole blocks of 4 KiB."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in files) / 1e6


if __name__ == "__main__":
    sys.exit(main())
