"""Script mode as AWS's sagemaker-training toolkit does it: hyperparameters become arguments, and `SM_*` variables.

Held to a record of what the toolkit itself gives a script (tests/unit/local_sagemaker/toolkit.json). It differs on
purpose in a few things: paths are of the job's folder, also within hyperparameters; the network interface is the
loopback one, and NCCL_* and MASTER_* are not set; SIGTERM reaches the script, which the toolkit keeps from it; and
nothing is installed, because the virtual environment that runs Houndloop holds what a requirements.txt would ask for.
What it does not hold is named in the job's log.
"""

from __future__ import annotations

import builtins
import json
import os
import re
import shlex
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from .container import Container, resource_config

PROGRAM = "sagemaker_program"
SUBMIT_DIRECTORY = "sagemaker_submit_directory"
# Hyperparameters that the toolkit keeps to itself; others that start with sagemaker_ are the framework's.
RESERVED = {
    PROGRAM,
    SUBMIT_DIRECTORY,
    "sagemaker_enable_cloudwatch_metrics",
    "sagemaker_region",
    "sagemaker_container_log_level",
    "sagemaker_job_name",
    "default_user_module_name",
    "_tuning_objective_metric",
    "sagemaker_s3_output",
}
FRAMEWORK = "sagemaker_pytorch_container.training:main"  # of AWS's PyTorch images
# A failed script is reported from the first line of its log on that has one of these words.
ERROR_NAMES = tuple(
    name
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException) and name.endswith(("Error", "Exception"))
)
ENTRY_POINT = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._+-]*(/[A-Za-z0-9._+-]+)*")
# Members of SM_TRAINING_ENV that have no variable of their own, or one of another name.
WITHOUT_VARIABLE = {
    "additional_framework_parameters",
    "channel_input_dirs",
    "distribution_hosts",
    "hyperparameters",
    "is_master",
    "is_modelparallel_enabled",
    "is_smddpmprun_installed",
    "is_smddprun_installed",
    "job_name",
    "master_hostname",
    "topology",
}


class EntryPointError(Exception):
    """The toolkit would not run the script; the text is the reason."""


def is_script_mode(hyperparameters: dict[str, str]) -> bool:
    """Whether the job names a script of its own."""
    return PROGRAM in hyperparameters


def decoded(hyperparameters: dict[str, str]) -> dict[str, Any]:
    """Values as the toolkit reads them: JSON where they are JSON (`"0.1"` in quotes, 3, true), else the text."""
    values: dict[str, Any] = {}
    for name, text in hyperparameters.items():
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def user_hyperparameters(hyperparameters: dict[str, str]) -> dict[str, Any]:
    """Those meant for the script: without the toolkit's own and without the tuner's."""
    return {
        name: value
        for name, value in decoded(hyperparameters).items()
        if not name.startswith("sagemaker_") and name not in RESERVED
    }


def arguments(values: dict[str, Any]) -> list[str]:
    """`--name value` for each, in order of name; `-x value` for a name of one letter.

    >>> arguments({"lr": 0.1, "e": 3, "warmup": None})
    ['-e', '3', '--lr', '0.1', '--warmup', '']
    """
    words: list[str] = []
    for name in sorted(values):
        value = values[name]
        if isinstance(value, dict):
            value = ",".join(f"{key}={item}" for key, item in sorted(value.items()))
        words += [f"--{name}" if len(name) > 1 else f"-{name}", "" if value is None else str(value)]
    return words


def command(container: Container, program: str, words: list[str], python: str) -> list[str]:
    """The command line for the entry point, to be run in the source's folder: a Python script, or any executable.

    Raises EntryPointError for a name that is not a plain path inside the source.
    """
    if not ENTRY_POINT.fullmatch(program) or {".", ".."} & set(program.split("/")):
        raise EntryPointError(
            f"The training entry point {program!r} cannot be used: it must be a path inside the source directory, such "
            "as 'train.py' or 'bin/train.sh', of letters, digits, '.', '_', '+', '-' and '/', without '.' or '..' as a "
            "segment. Correct the hyperparameter sagemaker_program."
        )
    if program.endswith(".py"):
        return [python, "--", program, *words]
    if (path := container.code / program).is_file():
        path.chmod(0o755)
    return ["/bin/sh", "-c", shlex.join([f"./{program}", *words])]


def failure(lines: list[str], argv: list[str], code: int, room: int) -> str:
    """What the toolkit writes to `output/failure`, at most `room` characters, for a script that ended with `code`.

    `lines`: the end of the log. Where none of them names an error the toolkit tells nothing; this tells the last ones.
    """
    first = next((number for number, line in enumerate(lines) if any(name in line for name in ERROR_NAMES)), None)
    told = lines[-12:] if first is None else dict.fromkeys(line.strip(" :\n") for line in lines[first:])
    head = f'ExecuteUserScriptError:\nExitCode {code}\nErrorMessage "'
    tail = f'"\nCommand "{" ".join(argv)[:200]}"'
    return head + "\n ".join(told).strip()[-(room - len(head) - len(tail)) :] + tail


def unsatisfied(requirements: str) -> list[str]:
    """What a requirements.txt asks for and the running environment does not have, each with what it has instead.

    >>> unsatisfied("pytest\\nno-such-package>=2  # why\\n--index-url https://example.org\\n")
    ['no-such-package>=2 (not installed)']
    """
    missing = []
    for line in requirements.splitlines():
        text = line.split(" #")[0].strip()
        if not text or text.startswith(("#", "-")):
            continue
        try:
            wanted = Requirement(text)
        except InvalidRequirement:  # a path or a URL: pip would know what it is, this does not
            continue
        if wanted.marker and not wanted.marker.evaluate():
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            missing.append(f"{text} (not installed)")
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            missing.append(f"{text} ({found} is installed)")
    return missing


def environment(container: Container, record: dict, words: list[str], cpus: int) -> dict[str, str]:
    """The variables that the toolkit sets for a script; paths are of the job's folder, `cpus` what the job may use."""
    given = record.get("HyperParameters", {})
    hyperparameters = decoded(given)
    own = container.localised_values(user_hyperparameters(given))
    program = str(hyperparameters.get(PROGRAM, ""))
    resources = resource_config(record["ResourceConfig"].get("InstanceType", ""))
    groups = {group["instance_group_name"]: group for group in resources["instance_groups"]}
    group, host = resources["current_group_name"], resources["current_host"]
    channels = [channel["ChannelName"] for channel in record.get("InputDataConfig", [])]
    training: dict[str, Any] = {
        "additional_framework_parameters": {
            name: value
            for name, value in hyperparameters.items()
            if name.startswith("sagemaker_") and name not in RESERVED
        },
        "channel_input_dirs": {name: str(container.channel(name)) for name in channels},
        "current_host": host,
        "current_instance_group": group,
        "current_instance_group_hosts": groups[group]["hosts"],
        "current_instance_type": resources["current_instance_type"],
        "distribution_hosts": [],
        "distribution_instance_groups": [],
        "framework_module": FRAMEWORK,
        "hosts": resources["hosts"],
        "hyperparameters": own,
        "input_config_dir": str(container.config),
        "input_data_config": json.loads((container.config / "inputdataconfig.json").read_text()),
        "input_dir": str(container.opt_ml / "input"),
        "instance_groups": list(groups),
        "instance_groups_dict": groups,
        "is_hetero": False,
        "is_master": True,
        "is_modelparallel_enabled": None,
        "is_smddpmprun_installed": False,
        "is_smddprun_installed": False,
        "job_name": record["TrainingJobName"],
        "log_level": hyperparameters.get("sagemaker_container_log_level", 20),
        "master_hostname": host,
        "model_dir": str(container.model),
        "module_dir": str(hyperparameters.get(SUBMIT_DIRECTORY, container.code)),
        "module_name": program.removesuffix(".py"),
        "network_interface_name": resources["network_interface_name"],
        "num_cpus": cpus,
        "num_gpus": _gpus(),
        "num_neurons": 0,
        "output_data_dir": str(container.output_data),
        "output_dir": str(container.output),
        "output_intermediate_dir": str(container.output / "intermediate"),
        "resource_config": resources,
        "topology": [],
        "user_entry_point": program,
    }
    variables = {f"SM_{name.upper()}": value for name, value in training.items() if name not in WITHOUT_VARIABLE}
    variables |= {
        "SM_CHANNELS": sorted(channels),
        "SM_FRAMEWORK_PARAMS": training["additional_framework_parameters"],
        "SM_HPS": own,
        "SM_USER_ARGS": words,
        "SM_TRAINING_ENV": training,
        "CURRENT_HOST": host,
        "SAGEMAKER_JOB_NAME": hyperparameters.get("sagemaker_job_name"),
        "SAGEMAKER_REGION": hyperparameters.get("sagemaker_region"),
    }
    variables |= {f"SM_CHANNEL_{name.upper()}": path for name, path in training["channel_input_dirs"].items()}
    variables |= {f"SM_HP_{name.upper()}": value for name, value in own.items()}
    return {name: _text(value) for name, value in variables.items()}


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, separators=(",", ":"))


def _gpus() -> int:
    """Devices that the machine shows; a job may use them all."""
    return sum(name.startswith("nvidia") and name[6:].isdigit() for name in os.listdir("/dev"))
