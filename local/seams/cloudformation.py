"""CloudFormation: the SageMaker resource of the template, and table settings that ministack drops at creation."""

from __future__ import annotations

import functools
import json
from typing import Any

from ministack import app
from ministack.core.responses import get_account_id, get_region
from ministack.services import dynamodb
from ministack.services.cloudformation import provisioners

from . import expect


def call(service: str, target_prefix: str, action: str, request: dict) -> dict:
    """Call an API of this process, as CloudFormation itself.

    Raises:
        ValueError: it refused; CloudFormation shows the text as the resource's status reason.
    """
    # The emulator's root key: CloudFormation's own rights are those of whoever deploys, checked before.
    scope = f"{get_account_id()}/20260101/{get_region()}/{service}/aws4_request"
    headers = {
        "x-amz-target": f"{target_prefix}.{action}",
        "content-type": "application/x-amz-json-1.1",
        "authorization": f"AWS4-HMAC-SHA256 Credential={scope}",
    }
    # ministack provisions on its event loop, where nothing may be waited for; these actions answer at once.
    answering = app.SERVICE_HANDLERS[service]("POST", "/", headers, json.dumps(request).encode(), {})
    try:
        answering.send(None)
    except StopIteration as answered:
        status, _, body = answered.value
    else:
        answering.close()
        raise ValueError(f"{action} does not answer at once, so CloudFormation cannot use it here.")
    answer = json.loads(body) if body else {}
    if status >= 300:
        raise ValueError(answer.get("message") or answer.get("Message") or f"{action}: HTTP {status}")
    return answer


sagemaker = functools.partial(call, "sagemaker", "SageMaker")


def create_group(logical_id: str, props: dict, stack_name: str) -> tuple[str, dict]:
    """`AWS::SageMaker::ModelPackageGroup`: `Ref` is its ARN."""
    answer = sagemaker("CreateModelPackageGroup", props)
    arn = answer["ModelPackageGroupArn"]
    return arn, {"ModelPackageGroupArn": arn, "ModelPackageGroupStatus": "Completed"}


def update_group(physical_id: str, old_props: dict, new_props: dict, stack_name: str) -> tuple[str, dict]:
    """Tags change in place. Whatever else changes wants a new group, which must have another name."""
    if {**old_props, "Tags": []} != {**new_props, "Tags": []}:
        return create_group("", new_props, stack_name)
    before, after = ({tag["Key"] for tag in props.get("Tags", [])} for props in (old_props, new_props))
    if before - after:
        sagemaker("DeleteTags", {"ResourceArn": physical_id, "TagKeys": sorted(before - after)})
    if after:
        sagemaker("AddTags", {"ResourceArn": physical_id, "Tags": new_props["Tags"]})
    return physical_id, {"ModelPackageGroupArn": physical_id, "ModelPackageGroupStatus": "Completed"}


def delete_group(physical_id: str, props: dict) -> None:
    """Delete the group. As on AWS, it must hold no model package any more."""
    sagemaker("DeleteModelPackageGroup", {"ModelPackageGroupName": physical_id.rsplit("/", 1)[-1]})


def table_settings(name: str, props: dict) -> None:
    """Switch on what CreateTable does not take: time to live and point-in-time recovery."""
    if (props.get("TimeToLiveSpecification") or {}).get("Enabled") in (True, "true"):
        specification = {**props["TimeToLiveSpecification"], "Enabled": True}
        dynamodb._update_ttl({"TableName": name, "TimeToLiveSpecification": specification})
    recovery = props.get("PointInTimeRecoverySpecification") or {}
    if recovery.get("PointInTimeRecoveryEnabled") in (True, "true"):
        dynamodb._update_continuous_backups(
            {"TableName": name, "PointInTimeRecoverySpecification": {**recovery, "PointInTimeRecoveryEnabled": True}}
        )


def scaling_as_number(props: dict) -> dict:
    """An event source's MaximumConcurrency as a number: a parameter's value arrives as text, which AWS converts."""
    scaling = props.get("ScalingConfig")
    if not scaling or "MaximumConcurrency" not in scaling:
        return props
    return props | {"ScalingConfig": scaling | {"MaximumConcurrency": int(scaling["MaximumConcurrency"])}}


def install() -> None:
    """Add the resource type, and complete the creation of tables."""
    handlers = expect("cloudformation", provisioners, "_RESOURCE_HANDLERS", kind=dict)
    expect("cloudformation", app, "SERVICE_HANDLERS", kind=dict)
    expect("cloudformation", dynamodb, "_update_ttl", "data")
    expect("cloudformation", dynamodb, "_update_continuous_backups", "data")
    create_table = expect("cloudformation", provisioners, "_ddb_create", "logical_id", "props", "stack_name")

    def create(logical_id: str, props: dict, stack_name: str) -> tuple[str, dict[str, Any]]:
        name, attributes = create_table(logical_id, props, stack_name)
        table_settings(name, props)
        return name, attributes

    create_source = expect("cloudformation", provisioners, "_lambda_esm_create", "logical_id", "props", "stack_name")
    update_source = expect(
        "cloudformation", provisioners, "_lambda_esm_update", "physical_id", "old_props", "new_props"
    )
    source = handlers["AWS::Lambda::EventSourceMapping"]
    source["create"] = lambda name, props, stack: create_source(name, scaling_as_number(props), stack)
    source["update"] = lambda id, old, new, *rest: update_source(id, old, scaling_as_number(new), *rest)
    handlers["AWS::DynamoDB::Table"]["create"] = create
    handlers["AWS::SageMaker::ModelPackageGroup"] = {
        "create": create_group,
        "update": update_group,
        "delete": delete_group,
    }
