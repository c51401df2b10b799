"""The application in the emulator: the `sam build` and `sam deploy` of AWS, with samconfig's `local` environment.

with Emulator() as aws:
    stack = Stack(aws)
    stack.deploy({"TuningJobs": "4"})
    print(stack.outputs()["DataBucketName"])
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import boto3
import psutil
from botocore.exceptions import BotoCoreError, ClientError

from local import processes
from local.emulator import CHECKOUT, REGION, Emulator, tail

# What a build depends on; a folder stands for all files below it.
SOURCES = ("template.yaml", "samconfig.toml", "Makefile", "functions", "training", "inference", "statemachine")
IGNORED = ("__pycache__", ".aws-sam", ".pytest_cache", ".mypy_cache", ".ruff_cache")

SAM_SECONDS = 900.0  # a build that downloads its wheels takes one or two minutes; nothing takes longer than this

Progress = Callable[[str], None]


class StackError(Exception):
    """Building or deploying the stack failed; the text ends with the end of the log."""


def runtime() -> str:
    """The Lambda runtime of the Python that runs: `sam build` wants exactly that interpreter."""
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


def source_hash(root: Path, sources: Iterable[str] = SOURCES) -> str:
    """A hash of the names and contents of everything that a build reads."""
    digest = hashlib.sha256(runtime().encode())
    for source in sources:
        path = root / source
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and not any(part in IGNORED for part in file.parts):
                digest.update(str(file.relative_to(root)).encode() + b"\0")
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def parse_overrides(overrides: str | Iterable[str]) -> dict[str, str]:
    """samconfig's `parameter_overrides`, a string or a list of `Name=value`, as a dict."""
    words = shlex.split(overrides) if isinstance(overrides, str) else [str(word) for word in overrides]
    return dict(word.split("=", 1) for word in words)


ENVIRONMENT = "environment"  # the file to source, in the folder of the emulator's state
NAMES = {  # what the README's commands call the stack's outputs
    "DATA_BUCKET": "DataBucketName",
    "ARTIFACT_BUCKET": "ArtifactBucketName",
    "PREDICTIONS": "PredictionsTableName",
    "LOOP_STATE": "LoopStateTableName",
    "RETRAIN": "RetrainStateMachineArn",
}


def write_environment(aws: Emulator, outputs: dict[str, str], file: Path) -> str:
    """Writes what a shell has to export for the README's commands to work on a deployed stack; returns it."""
    variables = aws.environment() | {name: outputs[output] for name, output in NAMES.items()}
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())
    file.write_text(exports + "\n")
    return exports


class Stack:
    """One deployment of a SAM application into an emulator.

    Args:
        aws: a running emulator.
        root: the folder with `template.yaml` and `samconfig.toml`.
        config_env: the environment of samconfig.toml.
        progress: called with each line that sam prints, for whoever wants to show them; they all go to `deploy.log`.
    """

    def __init__(
        self, aws: Emulator, root: Path = CHECKOUT, config_env: str = "local", progress: Progress | None = None
    ) -> None:
        self.aws = aws
        self.root = Path(root).resolve()
        self.config_env = config_env
        self.progress = progress or (lambda line: None)
        self.log = aws.state / "deploy.log"
        self.build_dir = aws.state / "build"
        config = tomllib.loads((self.root / "samconfig.toml").read_text()).get(config_env)
        if config is None:
            raise StackError(f"{self.root / 'samconfig.toml'} has no environment [{config_env}].")
        self._settings: dict[str, Any] = {
            **config.get("global", {}).get("parameters", {}),
            **config.get("deploy", {}).get("parameters", {}),
        }

    @property
    def name(self) -> str:
        """The stack's name, from samconfig.toml."""
        return str(self._settings["stack_name"])

    def build(self) -> bool:
        """Run `sam build`; returns whether it was needed. What has been built from the same sources is kept.

        Raises:
            StackError: sam failed.
        """
        mark = self.build_dir / "source-hash"
        wanted = source_hash(self.root)
        if mark.exists() and mark.read_text() == wanted and (self.build_dir / "template.yaml").exists():
            return False
        mark.unlink(missing_ok=True)
        self._sam(
            "build",
            "--build-dir",
            str(self.build_dir),
            "--cache-dir",
            str(self.aws.state / "build-cache"),
            "--cached",
            "--parallel",
            "--parameter-overrides",
            f"PythonRuntime={runtime()}",
        )
        mark.write_text(wanted)
        return True

    def deploy(self, parameters: Mapping[str, str] | None = None) -> dict[str, str]:
        """Build if needed, run `sam deploy`, and return the stack's outputs.

        Args:
            parameters: template parameters, over those of samconfig.toml.

        Raises:
            StackError: sam failed.
        """
        self.log.unlink(missing_ok=True)
        self.build()
        values = {
            **parse_overrides(self._settings.get("parameter_overrides", "")),
            "PythonRuntime": runtime(),
            **(parameters or {}),
        }
        try:
            self._sam(
                "deploy",
                "--template-file",
                str(self.build_dir / "template.yaml"),
                "--no-confirm-changeset",
                "--no-fail-on-empty-changeset",
                "--no-progressbar",
                "--parameter-overrides",
                *(f"{name}={value}" for name, value in values.items()),
            )
        except StackError as error:
            raise StackError("\n".join([*self._failures(), str(error)])) from None
        return self.outputs()

    def outputs(self) -> dict[str, str]:
        """The outputs of the deployed stack."""
        described = self._client("cloudformation").describe_stacks(StackName=self.name)["Stacks"][0]
        return {output["OutputKey"]: output["OutputValue"] for output in described.get("Outputs", [])}

    def _failures(self) -> list[str]:
        """CloudFormation's reasons, oldest first."""
        try:
            events = self._client("cloudformation").describe_stack_events(StackName=self.name)["StackEvents"]
        except (BotoCoreError, ClientError):  # there is no stack yet, or no emulator any more
            return []
        return [
            f"{event['LogicalResourceId']} ({event['ResourceType']}): {event.get('ResourceStatusReason', 'no reason')}"
            for event in reversed(events)
            if event["ResourceStatus"] in ("CREATE_FAILED", "UPDATE_FAILED")
        ]

    def _client(self, service: str) -> Any:
        session: Any = boto3  # the stubs know clients only by literal names
        return session.client(
            service,
            endpoint_url=self.aws.endpoint_url,
            region_name=REGION,
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    def _sam(self, command: str, *arguments: str) -> None:
        scripts = Path(sys.executable).parent
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        environment.update(self.aws.environment())
        environment.update(
            {
                "PATH": os.pathsep.join([str(scripts), os.environ.get("PATH", "")]),
                "SAM_CLI_POLL_DELAY": "0.5",
                "SAM_CLI_CHECK_CFN_TEMPLATE": "0",
                "PIP_PLATFORM": "",  # layers are built for this machine, not for Lambda's
                "PIP_DISABLE_PIP_VERSION_CHECK": "1",
                "PYTHONUNBUFFERED": "1",
            }
        )
        sam = scripts / "sam"
        line = [
            str(sam) if sam.exists() else "sam",
            command,
            "--config-env",
            self.config_env,
            "--config-file",
            str(self.root / "samconfig.toml"),
            *arguments,
        ]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            log.write(f"$ sam {shlex.join(line[1:])}\n")
            process = subprocess.Popen(
                line,
                cwd=self.root,
                env=environment,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            overdue = threading.Timer(
                SAM_SECONDS, lambda: processes.end([psutil.Process(process.pid), *processes.descendants(process.pid)])
            )
            overdue.start()
            try:
                assert process.stdout is not None
                for printed in process.stdout:
                    log.write(printed)
                    if printed.strip():
                        self.progress(printed.rstrip())
                status = process.wait()
            except BaseException:
                # A build runs pip below sam, and a signal to this process alone does not reach either.
                processes.end([psutil.Process(process.pid), *processes.descendants(process.pid)])
                raise
            finally:
                overdue.cancel()
        if status:
            raise StackError(f"sam {command} failed:\n{tail(self.log, 40)}")
