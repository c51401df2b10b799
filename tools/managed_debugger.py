"""What `ManagedDebugger=true` adds to a training job, and each region's registries, as sagemaker-core generates them.

    python tools/managed_debugger.py           # show them
    python tools/managed_debugger.py --write   # bring template.yaml and statemachine/retrain.asl.json up to date

sagemaker-core knows AWS's rule containers, their parameters and accounts, but stays out of functions and containers: so
what it generates stands in the template and in the workflow, and a test compares.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from sagemaker.core import image_uris
from sagemaker.core.debugger import (
    DebuggerHookConfig,
    ProfilerConfig,
    ProfilerRule,
    Rule,
    get_rule_container_image_uri,
    rule_configs,
)

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "template.yaml"
WORKFLOW = ROOT / "statemachine" / "retrain.asl.json"

RULES = (rule_configs.vanishing_gradient, rule_configs.overfit)
PROFILER_RULES = (rule_configs.LowGPUUtilization, rule_configs.ProfilerReport)
INTERVAL = 500  # milliseconds between two samples of the system
# As the workflow's definition has them: a substitution of the template, and an expression over the run's own id.
IMAGE = "${DebuggerRulesImageUri}"
OUTPUT = "{% 's3://${ArtifactBucket}/runs/' & $runId & '/managed' %}"
# The newest PyTorch training image that this sagemaker-core knows; the accounts are the same for every version.
PYTORCH = "2.10.0"


def registries() -> dict[str, dict[str, str]]:
    """Of each region the accounts of AWS's training images and of Debugger's rule containers (`none`: not there)."""
    training = image_uris.config_for_framework("pytorch")["training"]["versions"][PYTORCH]["registries"]
    debugger = image_uris.config_for_framework("debugger")["versions"]["latest"]["registries"]
    return {
        region: {"Training": account, "DebuggerRules": debugger.get(region, "none")}
        for region, account in sorted(training.items())
        if "-iso" not in region  # the secret regions have another Step Functions
    }


def rule_image(region: str) -> str:
    """The image of the rule containers in a region that has them."""
    return str(get_rule_container_image_uri("", region))


def configuration(image: str, output: str) -> dict[str, Any]:
    """The fields of CreateTrainingJob. `image`: of the rule containers; `output`: an s3:// prefix."""
    rules = [Rule.sagemaker(make()) for make in RULES]
    profiler_rules = [ProfilerRule.sagemaker(make()) for make in PROFILER_RULES]
    for rule in (*rules, *profiler_rules):
        rule.image_uri = image
    collections = [collection for rule in rules for collection in rule.collection_configs]
    hook = DebuggerHookConfig(s3_output_path=output, collection_configs=collections)
    return {
        "DebugHookConfig": hook._to_request_dict(),
        "DebugRuleConfigurations": [rule.to_debugger_rule_config_dict() for rule in rules],
        "ProfilerConfig": ProfilerConfig(output, INTERVAL)._to_request_dict(),
        "ProfilerRuleConfigurations": [rule.to_profiler_rule_config_dict() for rule in profiler_rules],
    }


def template_mapping() -> str:
    """The mapping `Registries` as lines of template.yaml."""
    accounts = registries().items()
    return "  Registries:\n" + "".join(
        f'    {region}: {{Training: "{row["Training"]}", DebuggerRules: "{row["DebuggerRules"]}"}}\n'
        for region, row in accounts
    )


def workflow_fragment() -> str:
    """The variable `managedDebugger` as lines of the workflow."""
    text = json.dumps(configuration(IMAGE, OUTPUT), indent=2)
    return f'        "managedDebugger": {text}'.replace("\n", "\n        ") + "\n"


def written(path: Path) -> str:
    """The file with what is generated in its place."""
    text = path.read_text()
    if path == TEMPLATE:
        pattern, new = r"^  Registries:\n(?:    .*\n)+", template_mapping()
    else:
        pattern, new = r'^        "managedDebugger": \{\n(?:          .*\n)+        \}\n', workflow_fragment()
    changed, count = re.subn(pattern, lambda _: new, text, flags=re.MULTILINE)
    if count != 1:
        raise SystemExit(f"{path.name} has no place, or more than one, for what is generated")
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write them into the template and the workflow")
    if parser.parse_args().write:
        for path in (TEMPLATE, WORKFLOW):
            path.write_text(written(path))
    else:
        print(template_mapping(), workflow_fragment(), sep="\n", end="")


if __name__ == "__main__":
    main()
