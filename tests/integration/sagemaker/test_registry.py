"""Models, packages, tags and lists."""

import pytest
from botocore.exceptions import ClientError

from tests.makers.sagemaker import BUCKET


def test_packages_tags_and_lists(world):
    client = world.sagemaker
    client.create_model_package_group(ModelPackageGroupName="dogs", Tags=[{"Key": "a", "Value": "1"}])
    specification = {
        "Containers": [{"Image": "local/server:1", "ModelDataUrl": f"s3://{BUCKET}/m.tar.gz"}],
        "SupportedContentTypes": ["image/jpeg"],
        "SupportedResponseMIMETypes": ["application/json"],
    }
    arns = [
        client.create_model_package(ModelPackageGroupName="dogs", InferenceSpecification=specification)[
            "ModelPackageArn"
        ]
        for _ in range(3)
    ]
    assert [arn.rsplit("/", 1)[1] for arn in arns] == ["1", "2", "3"]
    client.update_model_package(ModelPackageArn=arns[1], ModelApprovalStatus="Approved")
    assert client.describe_model_package(ModelPackageName=arns[1])["ModelApprovalStatus"] == "Approved"
    pages = list(
        client.get_paginator("list_model_packages").paginate(
            ModelPackageGroupName="dogs", PaginationConfig={"PageSize": 2}
        )
    )
    assert [len(page["ModelPackageSummaryList"]) for page in pages] == [2, 1]
    with pytest.raises(ClientError, match="ConflictException"):
        client.delete_model_package_group(ModelPackageGroupName="dogs")
    for arn in arns:
        client.delete_model_package(ModelPackageName=arn)
    group = client.describe_model_package_group(ModelPackageGroupName="dogs")["ModelPackageGroupArn"]
    client.add_tags(ResourceArn=group, Tags=[{"Key": "a", "Value": "2"}, {"Key": "b", "Value": "3"}])
    client.delete_tags(ResourceArn=group, TagKeys=["b"])
    assert client.list_tags(ResourceArn=group)["Tags"] == [{"Key": "a", "Value": "2"}]
    client.delete_model_package_group(ModelPackageGroupName="dogs")
    with pytest.raises(ClientError, match="does not exist"):
        client.describe_model_package_group(ModelPackageGroupName="dogs")
