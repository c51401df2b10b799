"""`ManagedDebugger=true`: template and workflow say what sagemaker-core generates, and SageMaker's API takes it."""

import json
import re
from typing import Any

import botocore.session
import pytest
from botocore.validate import ParamValidator
from sagemaker.core import image_uris

from local.sagemaker import support
from local.sagemaker.errors import NotImplementedLocally
from tests.makers import template
from tools import managed_debugger

TEMPLATE = template.template()
REGISTRIES: dict[str, dict[str, str]] = TEMPLATE["Mappings"]["Registries"]
WITH_RULES = [region for region, accounts in REGISTRIES.items() if accounts["DebuggerRules"] != "none"]
WORKFLOW = json.loads(managed_debugger.WORKFLOW.read_text())
OUTPUT = "s3://artifacts/runs/261122160000/managed"
SUFFIXES = {"cn-": "amazonaws.com.cn", "eusc-": "amazonaws.eu"}  # AWS::URLSuffix where it is not amazonaws.com


def deployed(region: str) -> dict[str, Any]:
    """What the workflow adds to the training job when it is deployed to a region."""
    substitution = template.resources("AWS::Serverless::StateMachine")["Retrain"]["DefinitionSubstitutions"]
    image, variables = substitution["DebuggerRulesImageUri"]["Fn::Sub"]
    assert variables["Account"]["Fn::FindInMap"] == ["Registries", {"Ref": "AWS::Region"}, "DebuggerRules"]
    suffix = next((suffix for start, suffix in SUFFIXES.items() if region.startswith(start)), "amazonaws.com")
    values = {"Account": REGISTRIES[region]["DebuggerRules"], "AWS::Region": region, "AWS::URLSuffix": suffix}
    image = re.sub(r"\$\{([\w:]+)\}", lambda match: values[match[1]], image)
    text = json.dumps(WORKFLOW["States"]["ReadTuning"]["Assign"]["managedDebugger"])
    text = text.replace(managed_debugger.IMAGE, image).replace(managed_debugger.OUTPUT, OUTPUT)
    assert "${" not in text and "{%" not in text
    return json.loads(text)


@pytest.mark.parametrize("path", [managed_debugger.TEMPLATE, managed_debugger.WORKFLOW], ids=lambda path: path.name)
def test_what_is_generated_stands_where_it_belongs(path):
    assert managed_debugger.written(path) == path.read_text(), "run: python tools/managed_debugger.py --write"


@pytest.mark.parametrize("region", REGISTRIES)
def test_the_training_image_of_each_region_is_in_its_registry(region: str):
    instance = "ml.c5.xlarge"
    uri = image_uris.retrieve(
        "pytorch", region, version=managed_debugger.PYTORCH, image_scope="training", instance_type=instance
    )
    assert uri.split(".")[0] == REGISTRIES[region]["Training"]


@pytest.mark.parametrize("region", WITH_RULES)
def test_the_workflow_asks_for_what_sagemaker_core_would_ask_for(region: str):
    image = managed_debugger.rule_image(region)
    assert image.endswith("/sagemaker-debugger-rules:latest")
    assert deployed(region) == managed_debugger.configuration(image, OUTPUT)


def test_the_rules_are_those_that_are_promised():
    managed = deployed("us-east-1")
    rules = [*managed["DebugRuleConfigurations"], *managed["ProfilerRuleConfigurations"]]
    named = [rule["RuleParameters"]["rule_to_invoke"] for rule in rules]
    assert named == ["VanishingGradient", "Overfit", "LowGPUUtilization", "ProfilerReport"]


@pytest.mark.parametrize("region", WITH_RULES)
def test_sagemakers_api_takes_the_request(region: str):
    model = botocore.session.get_session().get_service_model("sagemaker")
    shape = model.operation_model("CreateTrainingJob").input_shape
    request = {
        "TrainingJobName": "job",
        "AlgorithmSpecification": {"TrainingImage": "image", "TrainingInputMode": "File"},
        "RoleArn": "arn:aws:iam::000000000000:role/jobs",
        "OutputDataConfig": {"S3OutputPath": OUTPUT},
        "ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 50},
        "StoppingCondition": {"MaxRuntimeInSeconds": 60},
    }
    report = ParamValidator().validate(request | deployed(region), shape)
    assert not report.has_errors(), report.generate_report()
    for rule in deployed(region)["DebugRuleConfigurations"]:  # limits that botocore leaves to the service
        members = shape.members["DebugRuleConfigurations"].member.members
        assert len(rule["RuleConfigurationName"]) <= members["RuleConfigurationName"].metadata["max"]
        assert re.fullmatch(members["RuleEvaluatorImage"].metadata.get("pattern", ".*"), rule["RuleEvaluatorImage"])


def test_where_there_are_no_rule_containers_the_stack_says_so():
    (assertion,) = TEMPLATE["Rules"]["ManagedDebuggerIsThere"]["Assertions"]
    regions, region = assertion["Assert"]["Fn::Contains"]
    assert (sorted(regions), region) == (sorted(WITH_RULES), {"Ref": "AWS::Region"})


def test_off_by_default_and_then_the_profiler_is_too():
    assert TEMPLATE["Parameters"]["ManagedDebugger"]["Default"] == "false"
    assert "{'DisableProfiler': true}" in WORKFLOW["States"]["Train"]["Arguments"]


@pytest.mark.parametrize("field", ["DebugRuleConfigurations", "ProfilerRuleConfigurations"])
def test_on_this_machine_the_rule_containers_are_refused_by_name(field: str):
    managed = deployed("us-east-1")
    with pytest.raises(NotImplementedLocally, match=f"CreateTrainingJob.{field}"):
        support.check("CreateTrainingJob", {field: managed[field]})
    support.check("CreateTrainingJob", {name: value for name, value in managed.items() if "Rule" not in name})
