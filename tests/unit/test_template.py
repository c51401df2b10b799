"""What must hold of the template beyond what cfn-lint sees."""

import ast
import json
import re
from typing import Any

import pytest

from preprocessing import ADMITTED, Preprocess, crop
from tests.makers import template
from tests.makers.images import encode, picture

TEMPLATE = template.template()


def test_every_parameter_says_what_it_is_and_is_used():
    used = json.dumps(TEMPLATE["Resources"]) + json.dumps(TEMPLATE["Conditions"]) + json.dumps(TEMPLATE["Globals"])
    for name, parameter in TEMPLATE["Parameters"].items():
        assert parameter["Description"] and "Default" in parameter, name
        assert f'"Ref": "{name}"' in used or f"${{{name}}}" in used, f"{name} is not used"
    groups = TEMPLATE["Metadata"]["AWS::CloudFormation::Interface"]["ParameterGroups"]
    assert sorted(parameter for group in groups for parameter in group["Parameters"]) == sorted(TEMPLATE["Parameters"])


@pytest.mark.parametrize("name", template.resources("AWS::S3::Bucket"))
def test_buckets_are_versioned_encrypted_private_and_tls_only(name: str):
    bucket = template.resources("AWS::S3::Bucket")[name]
    assert bucket["VersioningConfiguration"]["Status"] == "Enabled" and bucket["BucketEncryption"]
    assert all(bucket["PublicAccessBlockConfiguration"].values()) and bucket["LifecycleConfiguration"]["Rules"]
    policy = template.resources("AWS::S3::BucketPolicy")[f"{name}Policy"]["PolicyDocument"]["Statement"][0]
    assert policy["Effect"] == "Deny" and policy["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


@pytest.mark.parametrize("name", template.resources("AWS::DynamoDB::Table"))
def test_tables_can_be_restored_to_a_point_in_time(name: str):
    table = template.resources("AWS::DynamoDB::Table")[name]
    assert table["PointInTimeRecoverySpecification"] == {"PointInTimeRecoveryEnabled": True}
    assert table["SSESpecification"] == {"SSEEnabled": True}


def test_queues_outlast_their_functions_and_have_dead_letters():
    """AWS: visibility at least six times the function's timeout, at least five receives."""
    queues = template.resources("AWS::SQS::Queue")
    default = TEMPLATE["Globals"]["Function"]["Timeout"]
    for name, function in template.resources("AWS::Serverless::Function").items():
        for event in function.get("Events", {}).values():
            if event["Type"] != "SQS":
                continue
            queue = queues[event["Properties"]["Queue"]["Fn::GetAtt"][0]]
            assert queue["VisibilityTimeout"] >= 6 * function.get("Timeout", default), name
            assert queue["RedrivePolicy"]["maxReceiveCount"] >= 5
            assert event["Properties"]["FunctionResponseTypes"] == ["ReportBatchItemFailures"]


def test_classify_images_knows_which_try_is_the_last():
    variables = template.resources("AWS::Serverless::Function")["ClassifyImages"]["Environment"]["Variables"]
    redrive = template.resources("AWS::SQS::Queue")["InboxQueue"]["RedrivePolicy"]
    assert int(variables["MAX_RECEIVES"]) == redrive["maxReceiveCount"]


def statements() -> list[tuple[str, dict[str, Any]]]:
    found = []
    for name, function in template.resources("AWS::Serverless::Function").items():
        found += [(name, s) for policy in function["Policies"] for s in policy["Statement"]]
    for name, role in template.resources("AWS::IAM::Role").items():
        found += [(name, s) for p in role["Policies"] for s in p["PolicyDocument"]["Statement"]]
    # A statement that only one variant of the stack has stands in an If.
    return [(name, s["Fn::If"][1] if "Fn::If" in s else s) for name, s in found]


@pytest.mark.parametrize(("name", "statement"), statements())
def test_policies_name_actions_and_explain_wildcards(name: str, statement: dict[str, Any]):
    acts = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
    assert not any("*" in action for action in acts)
    if statement["Resource"] == "*":
        source = (template.ROOT / "template.yaml").read_text()
        lines = [line for line in source.splitlines() if 'Resource: "*"' in line]
        assert all("#" in line for line in lines), "a wildcard carries a comment that says why"


def test_every_handler_exists():
    for name, function in template.resources("AWS::Serverless::Function").items():
        module = function["Handler"].rpartition(".")[0].replace(".", "/")
        assert (template.ROOT / "functions" / f"{module}.py").is_file(), name


def read_and_used() -> dict[str, tuple[set[str], set[str]]]:
    """Of each function, class and constant in functions/: the variables that it reads, and the names that it uses."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    root = template.ROOT / "functions"
    for path in root.rglob("*.py"):
        module, tree = ".".join(path.relative_to(root).with_suffix("").parts), ast.parse(path.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imported = {name.asname or name.name: f"{node.module}.{name.name}" for node in imports for name in node.names}
        for node in tree.body:
            source = ast.unparse(node)
            read = set(re.findall(r"environ\[['\"](\w+)|aws\.table\(['\"](\w+)", source))
            used = {imported.get(n.id, f"{module}.{n.id}") for n in ast.walk(node) if isinstance(n, ast.Name)}
            attributes = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
            used |= {f"{imported.get(n.value.id, '')}.{n.attr}" for n in attributes if isinstance(n.value, ast.Name)}
            names: list[str] = []
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            found |= {f"{module}.{name}": ({a or b for a, b in read}, used) for name in names}
    return found


def test_what_the_limits_may_admit_as_a_label_can_be_trained_on():
    parameters = TEMPLATE["Parameters"]
    admitted = {
        "max_bytes": 1_000_000 * parameters["MaxImageMegabytes"]["MaxValue"],
        "max_pixels": 1_000_000 * parameters["MaxImageMegapixels"]["MaxValue"],
        "min_side": parameters["MinImageSide"]["MinValue"],
    }
    assert admitted == ADMITTED
    assert crop(encode(picture(30, 1)), Preprocess.default(32))


def test_functions_are_given_the_environment_that_they_read():
    everywhere = TEMPLATE["Globals"]["Function"]["Environment"]["Variables"].keys()
    defined = read_and_used()
    for name, function in template.resources("AWS::Serverless::Function").items():
        read: set[str] = set()
        seen: set[str] = set()
        edge = {function["Handler"]}
        while edge := (edge & defined.keys()) - seen:
            seen |= edge
            read |= set().union(*(defined[each][0] for each in edge))
            edge = set().union(*(defined[each][1] for each in edge))
        given = function.get("Environment", {}).get("Variables", {}).keys()
        assert given - {"MALLOC_ARENA_MAX"} == read - everywhere, name


def test_history_expires_and_current_rows_do_not():
    """A current row that was gone would be taken for a picture whose event was lost."""
    table = template.resources("AWS::DynamoDB::Table")["Predictions"]
    assert table["TimeToLiveSpecification"] == {"AttributeName": "expires_at", "Enabled": True}


def test_reconciliation_can_be_switched_off():
    rule = template.resources("AWS::Events::Rule")["ReconcileRule"]
    assert rule["State"] == {"Fn::If": ["Reconciles", "ENABLED", "DISABLED"]}
    schedule = TEMPLATE["Parameters"]["ReconcileSchedule"]
    assert all(re.fullmatch(schedule["AllowedPattern"], text) for text in ("never", "rate(1 day)", "cron(0 3 * * ? *)"))
    assert not re.fullmatch(schedule["AllowedPattern"], "daily")


def test_the_dashboard_shows_what_people_look_for():
    (dashboard,) = template.resources("AWS::CloudWatch::Dashboard").values()
    titles = [widget["properties"]["title"] for widget in json.loads(dashboard["DashboardBody"]["Fn::Sub"])["widgets"]]
    assert {"Backlog of the inbox", "Endpoint, per minute", "Dead letters"} <= set(titles)


def test_whatever_goes_to_a_dead_letter_queue_may():
    """EventBridge needs the queue's leave for each rule, those that SAM makes of a function's events included."""
    rules = set(template.resources("AWS::Events::Rule"))
    for name, function in template.resources("AWS::Serverless::Function").items():
        rules |= {f"{name}{event}" for event, e in function.get("Events", {}).items() if e["Type"] == "EventBridgeRule"}
    statement = template.resources("AWS::SQS::QueuePolicy")["QueuePolicy"]["PolicyDocument"]["Statement"][0]
    sources = statement["Condition"]["ArnEquals"]["aws:SourceArn"]
    assert {source["Fn::GetAtt"][0] for source in sources} == rules


def test_every_dead_letter_queue_has_an_alarm():
    queues = {name for name in template.resources("AWS::SQS::Queue") if name.endswith("DeadLetters")}
    watched = {
        dimension["Value"]["Fn::GetAtt"][0]
        for alarm in template.resources("AWS::CloudWatch::Alarm").values()
        for dimension in alarm["Dimensions"]
        if dimension["Name"] == "QueueName" and alarm["AlarmActions"]
    }
    assert watched == queues


def test_the_workflow_makes_the_endpoint_not_the_template():
    kinds = {resource["Type"] for resource in TEMPLATE["Resources"].values()}
    assert not kinds & {"AWS::SageMaker::Endpoint", "AWS::SageMaker::EndpointConfig", "AWS::SageMaker::Model"}


def test_alarms_look_at_the_endpoint_that_the_workflow_makes():
    for name in ("EndpointErrorsAlarm", "EndpointLatencyAlarm"):
        alarm = template.resources("AWS::CloudWatch::Alarm")[name]
        dimensions = {d["Name"]: d["Value"] for d in alarm["Dimensions"]}
        assert dimensions == {"EndpointName": {"Ref": "Name"}, "VariantName": "AllTraffic"}
        assert alarm["TreatMissingData"] == "notBreaching"


def test_no_image_that_may_serve_expires():
    """Tags are the hashes of what images are built from, so that the one that serves has one, however old it is."""
    repository = template.resources("AWS::ECR::Repository")["ServingRepository"]
    rules = json.loads(repository["LifecyclePolicy"]["LifecyclePolicyText"])["rules"]
    assert {rule["selection"]["tagStatus"] for rule in rules} == {"untagged"}
    assert repository["ImageTagMutability"] == "IMMUTABLE"
    assert repository["ImageScanningConfiguration"] == {"ScanOnPush": True}


def test_by_default_there_is_a_canary_and_room_to_scale():
    least, most = (TEMPLATE["Parameters"][name] for name in ("EndpointInstanceCount", "EndpointMaxInstanceCount"))
    assert most["Default"] > least["Default"] >= 2, "a canary needs two instances, scaling room"
