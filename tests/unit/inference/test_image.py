"""What the serving image is built from, checked without a container engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

import yaml

import predictor
from tests.makers.models import make_artifact

INFERENCE = Path(predictor.__file__).parent
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (INFERENCE / "requirements.txt").read_text(), re.MULTILINE))


def test_the_image_has_the_versions_that_the_tests_ran_with():
    """The same Pillow above all: another one may decode to other pixels."""
    assert {name: version(name) for name in PINS} == PINS


def test_the_server_runs_with_nothing_but_what_the_image_installs(tmp_path):
    """Whatever else this environment holds cannot be imported; requirements are installed without dependencies."""
    others = [
        name
        for name, owners in packages_distributions().items()
        if not {owner.lower().replace("_", "-") for owner in owners} & set(PINS)
    ]
    assert {"torch", "boto3"} <= set(others)
    code = f"""
import sys
for name in {others!r}:
    sys.modules[name] = None
import uvicorn, uvicorn.protocols.http.httptools_impl, uvicorn.loops.uvloop
from predictor import Predictor
from server import Server
print(Server(Predictor(sys.argv[1])).model_version)
"""
    command = [sys.executable, "-c", code, str(make_artifact(tmp_path))]
    done = subprocess.run(command, cwd=INFERENCE, capture_output=True, text=True)
    assert done.stdout.strip() == "260101000000", done.stderr


def test_sam_build_copies_everything_that_the_image_needs(tmp_path):
    command = ["make", "--silent", "build-ServingSource"]
    subprocess.run(command, cwd=INFERENCE, env=os.environ | {"ARTIFACTS_DIR": str(tmp_path)}, check=True)
    copied = tmp_path / "python" / "serving_source"
    names = {path.name for path in copied.iterdir()}
    assert names == {"Dockerfile", "buildspec.yml", "requirements.txt"} | {path.name for path in INFERENCE.glob("*.py")}
    done = subprocess.run([sys.executable, str(copied), "serve", "--help"], capture_output=True, text=True, check=True)
    assert "MODEL_DIR" in done.stdout


def test_the_layer_is_built_for_lambda_unless_told_otherwise():
    def recipe(**environment: str) -> str:
        command = ["make", "--dry-run", "build-Preprocessing", "ARTIFACTS_DIR=out"]
        return subprocess.run(
            command, cwd=INFERENCE, env=os.environ | environment, capture_output=True, text=True, check=True
        ).stdout

    assert "manylinux_2_28_x86_64" in recipe(PYTHON_VERSION="3.13") and "--python-version 3.13" in recipe(
        PYTHON_VERSION="3.13"
    )
    assert "--platform" not in recipe(PIP_PLATFORM="")


def test_the_buildspec_is_a_list_of_commands():
    phases = yaml.safe_load((INFERENCE / "buildspec.yml").read_text())["phases"]
    commands = [command for phase in phases.values() for command in phase["commands"]]
    assert all(isinstance(command, str) for command in commands)
    assert any(command.startswith("docker build") for command in commands)
    assert commands[-1] == 'docker push "$REPOSITORY_URI:$IMAGE_TAG"'
