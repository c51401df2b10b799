"""Script mode as AWS's sagemaker-training toolkit does it: hyperparameters become arguments, and `SM_*` variables.

Nothing is installed: the virtual environment that runs Houndloop holds what a requirements.txt would ask for.
"""

from __future__ import annotations

import json
import os
from typing import Any

from .container import Container, resource_config

PROGRAM = "sagemaker_program"
SUBMIT_DIRECTORY = "sagemaker_submit_directory"


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
        if not name.startswith("sagemaker_") and name != "_tuning_objective_metric"
    }


def arguments(values: dict[str, Any]) -> list[str]:
    """`--name value` for each, in order of name; `-x value` for a name of one letter.

    >>> arguments({"lr": 0.1, "e": 3})
    ['-e', '3', '--lr', '0.1']
    """
    words: list[str] = []
    for name in sorted(values):
        value = values[name]
        if isinstance(value, dict):
            value = ",".join(f"{key}={item}" for key, item in sorted(value.items()))
        words += [f"--{name}" if len(name) > 1 else f"-{name}", str(value)]
    return words


def command(container: Container, program: str, words: list[str], python: str) -> list[str]:
    """The command line for the entry point: a Python script or a shell script of the source."""
    interpreter = "/bin/sh" if program.endswith(".sh") else python
    return [interpreter, str(container.code / program), *words]


def environment(container: Container, record: dict, channels: list[str], words: list[str]) -> dict[str, str]:
    """The `SM_*` variables of a training job; paths are of the job's folder."""
    instance_type = record["ResourceConfig"].get("InstanceType", "ml.m5.xlarge")
    resources = resource_config(instance_type)
    hyperparameters = decoded(record.get("HyperParameters", {}))
    own = user_hyperparameters(record.get("HyperParameters", {}))
    program = str(hyperparameters.get(PROGRAM, ""))
    folders = {
        "SM_INPUT_DIR": container.opt_ml / "input",
        "SM_INPUT_CONFIG_DIR": container.config,
        "SM_MODEL_DIR": container.model,
        "SM_OUTPUT_DIR": container.output,
        "SM_OUTPUT_DATA_DIR": container.output_data,
        "SM_OUTPUT_INTERMEDIATE_DIR": container.output / "intermediate",
    }
    variables: dict[str, Any] = {name: str(path) for name, path in folders.items()} | {
        "SM_HOSTS": resources["hosts"],
        "SM_CURRENT_HOST": resources["current_host"],
        "SM_CURRENT_INSTANCE_TYPE": instance_type,
        "SM_CURRENT_INSTANCE_GROUP": resources["current_group_name"],
        "SM_RESOURCE_CONFIG": resources,
        "SM_NETWORK_INTERFACE_NAME": resources["network_interface_name"],
        "SM_INPUT_DATA_CONFIG": json.loads((container.config / "inputdataconfig.json").read_text()),
        "SM_CHANNELS": sorted(channels),
        "SM_HPS": own,
        "SM_USER_ARGS": words,
        "SM_USER_ENTRY_POINT": program,
        "SM_MODULE_NAME": program.removesuffix(".py"),
        "SM_MODULE_DIR": str(hyperparameters.get(SUBMIT_DIRECTORY, "")),
        "SM_LOG_LEVEL": hyperparameters.get("sagemaker_container_log_level", 20),
        "SM_FRAMEWORK_PARAMS": {
            name: value for name, value in hyperparameters.items() if name.startswith("sagemaker_")
        },
        "SM_NUM_CPUS": container.settings.threads_per_job,
        "SM_NUM_GPUS": _gpus(),
        "SM_NUM_NEURONS": 0,
    }
    variables |= {f"SM_CHANNEL_{name.upper()}": str(container.opt_ml / "input" / "data" / name) for name in channels}
    variables |= {f"SM_HP_{name.upper()}": value for name, value in own.items()}
    variables["SM_TRAINING_ENV"] = {
        "channel_input_dirs": {name: str(container.opt_ml / "input" / "data" / name) for name in channels},
        "current_host": resources["current_host"],
        "hosts": resources["hosts"],
        "hyperparameters": own,
        "input_data_config": variables["SM_INPUT_DATA_CONFIG"],
        "input_dir": variables["SM_INPUT_DIR"],
        "job_name": record["TrainingJobName"],
        "log_level": variables["SM_LOG_LEVEL"],
        "model_dir": variables["SM_MODEL_DIR"],
        "module_dir": variables["SM_MODULE_DIR"],
        "module_name": variables["SM_MODULE_NAME"],
        "num_cpus": variables["SM_NUM_CPUS"],
        "num_gpus": variables["SM_NUM_GPUS"],
        "output_data_dir": variables["SM_OUTPUT_DATA_DIR"],
        "output_dir": variables["SM_OUTPUT_DIR"],
        "resource_config": resources,
        "user_entry_point": program,
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in variables.items()}


def _gpus() -> int:
    """Devices that the machine shows; a job may use them all."""
    return sum(name.startswith("nvidia") and name[6:].isdigit() for name in os.listdir("/dev"))
