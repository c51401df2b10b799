"""What the serving image is built from, checked without a container engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions, version
from pathlib import Path

import yaml

import predictor
from tests.makers.models import make_artifact
from tools import image_size

INFERENCE = Path(predictor.__file__).parent
DOCKERFILE = (INFERENCE / "Dockerfile").read_text()
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (INFERENCE / "requirements.txt").read_text(), re.MULTILINE))


def test_the_image_has_the_versions_that_the_tests_ran_with():
    """The same Pillow above all: another one may decode to other pixels."""
    assert {name: version(name) for name in PINS} == PINS


def test_the_server_and_the_evaluation_run_with_nothing_but_what_the_image_installs(tmp_path):
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
import pool, server, worker
sys.path.insert(0, sys.argv[2])
import evaluate  # the evaluation job's script, which comes to the image as an input
print(worker.Predictor(sys.argv[1]).model_version)
"""
    command = [sys.executable, "-c", code, str(make_artifact(tmp_path)), str(INFERENCE.parent / "training")]
    done = subprocess.run(command, cwd=INFERENCE, capture_output=True, text=True)
    assert done.stdout.strip() == "260101000000", done.stderr


def test_the_base_image_cannot_change_unseen():
    (base,) = re.findall(r"^FROM (.+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"public\.ecr\.aws/docker/library/python:3\.12\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)


def test_sagemaker_starts_it_as_root_with_serve_and_can_stop_it():
    """An entry point in exec form is the container's first process, which gets SIGTERM."""
    assert not re.search("^USER", DOCKERFILE, re.MULTILINE)
    entry = json.loads(re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.MULTILINE)[0])
    assert entry == ["python3", "/opt/inference"] and re.search(r"RUN_AS=inference", DOCKERFILE)


def test_what_the_image_does_without_is_there_and_is_not_what_serving_needs(tmp_path):
    """The Dockerfile's own command on files named like those of the same OpenVINO: `rm` fails where it finds none."""
    for path in distribution("openvino").files or []:
        if path.parts[0] == "openvino":
            copy = tmp_path.joinpath(*path.parts[1:])
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.touch()
    before = {path.name for path in tmp_path.rglob("*.so*")}
    image_size.thin(tmp_path, image_size.removal_of(DOCKERFILE))
    left = {path.name for path in tmp_path.rglob("*.so*")}
    assert left < before and "libopenvino_intel_cpu_plugin.so" in left
    assert any(name.startswith("libopenvino_ir_frontend.so") for name in left)
    assert not any(name.startswith(("libopenvino_onnx", "libopenvino_intel_gpu")) for name in left)


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
    assert "manylinux_2_28" not in recipe(PYTHON_VERSION="3.11"), "its C library is too old for that"
    assert "--platform" not in recipe(PIP_PLATFORM="")


def test_the_buildspec_is_a_list_of_commands():
    phases = yaml.safe_load((INFERENCE / "buildspec.yml").read_text())["phases"]
    commands = [command for phase in phases.values() for command in phase["commands"]]
    assert all(isinstance(command, str) for command in commands)
    build = next(command for command in commands if command.startswith("docker build"))
    assert "--output type=docker" in build, "SageMaker takes no image in the OCI's format"
    assert commands[-1] == 'docker push "$REPOSITORY_URI:$IMAGE_TAG"'
