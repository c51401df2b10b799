"""Models, endpoint configurations, model packages and tags."""

import json

import pytest
from botocore.exceptions import ClientError

from tests.makers.sagemaker import BUCKET, ROLE, archive, container, variant

ARN = "arn:aws:sagemaker:us-east-1:000000000000"
SPECIFICATION = {
    "Containers": [{"Image": "local/server:1", "ModelDataUrl": f"s3://{BUCKET}/models/packaged.tar.gz"}],
    "SupportedContentTypes": ["image/jpeg"],
    "SupportedResponseMIMETypes": ["application/json"],
}


def without(answer, *names):
    return {name: value for name, value in answer.items() if name not in ("ResponseMetadata", *names)}


def test_a_model_is_described_as_aws_does(world, taken):
    client = world.sagemaker
    request = {"ModelName": "Described", "ExecutionRoleArn": ROLE, "Tags": [{"Key": "a", "Value": "b"}]}
    arn = client.create_model(PrimaryContainer=container(), **request)["ModelArn"]
    assert arn == f"{ARN}:model/described"
    found = client.describe_model(ModelName="Described")
    url = container()["ModelDataUrl"]
    assert without(found, "CreationTime") == {
        "ModelName": "Described",
        "ModelArn": arn,
        "ExecutionRoleArn": ROLE,
        "PrimaryContainer": {
            "Image": "local/server:1",
            "Mode": "SingleModel",
            "ModelDataUrl": url,
            "ModelDataSource": {
                "S3DataSource": {"S3Uri": url, "S3DataType": "S3Object", "CompressionType": "Gzip"},
            },
            "Environment": {},
        },
        "EnableNetworkIsolation": False,
        "DeploymentRecommendation": {"RecommendationStatus": "NOT_APPLICABLE", "RealTimeInferenceRecommendations": []},
    }
    client.delete_model(ModelName="Described")
    with pytest.raises(ClientError, match="Could not find model"):
        client.describe_model(ModelName="Described")


def test_an_endpoint_configuration_is_described_as_aws_does(world, taken):
    client = world.sagemaker
    variants = [variant(), variant(VariantName="other", InitialVariantWeight=0.5)]
    arn = client.create_endpoint_config(EndpointConfigName="Described", ProductionVariants=variants)[
        "EndpointConfigArn"
    ]
    found = client.describe_endpoint_config(EndpointConfigName="Described")
    assert without(found, "CreationTime") == {
        "EndpointConfigName": "Described",
        "EndpointConfigArn": arn,
        "ProductionVariants": [variants[0] | {"InitialVariantWeight": 1.0}, variants[1]],
        "EnableNetworkIsolation": False,
    }
    client.delete_endpoint_config(EndpointConfigName="Described")
    with pytest.raises(ClientError, match="Could not find endpoint configuration"):
        client.describe_endpoint_config(EndpointConfigName="Described")


def test_models_and_configurations_can_be_deleted_while_they_are_used_as_on_aws(world, taken):
    world.model("used", "used")
    world.sagemaker.create_endpoint(EndpointName="used", EndpointConfigName="used")
    assert world.endpoint("used")["EndpointStatus"] == "InService"
    world.sagemaker.delete_endpoint_config(EndpointConfigName="used")
    world.sagemaker.delete_model(ModelName="used")
    assert world.invoke("used")["answer"] == "used"
    assert world.sagemaker.describe_endpoint(EndpointName="used")["EndpointConfigName"] == "used"
    with pytest.raises(ClientError, match='Could not find endpoint configuration ".*endpoint-config/used"'):
        world.sagemaker.update_endpoint(EndpointName="used", EndpointConfigName=taken)
    world.sagemaker.delete_endpoint(EndpointName="used")


def test_a_group_numbers_its_versions_and_never_gives_a_number_twice(world):
    client = world.sagemaker
    group = client.create_model_package_group(ModelPackageGroupName="Dogs", ModelPackageGroupDescription="barking")
    assert group["ModelPackageGroupArn"] == f"{ARN}:model-package-group/dogs"
    arns = [client.create_model_package(ModelPackageGroupName="Dogs")["ModelPackageArn"] for _ in range(2)]
    assert arns == [f"{ARN}:model-package/dogs/1", f"{ARN}:model-package/dogs/2"]
    client.delete_model_package(ModelPackageName=arns[1])
    by_arn = client.create_model_package(ModelPackageGroupName=group["ModelPackageGroupArn"])["ModelPackageArn"]
    assert by_arn == f"{ARN}:model-package/dogs/3"
    found = client.describe_model_package_group(ModelPackageGroupName="Dogs")
    assert without(found, "CreationTime") == {
        "ModelPackageGroupName": "Dogs",
        "ModelPackageGroupArn": group["ModelPackageGroupArn"],
        "ModelPackageGroupDescription": "barking",
        "ModelPackageGroupStatus": "Completed",
        "CreatedBy": {},
    }
    for arn in (arns[0], by_arn):
        client.delete_model_package(ModelPackageName=arn)
    client.delete_model_package_group(ModelPackageGroupName="Dogs")
    with pytest.raises(ClientError, match="does not exist"):
        client.describe_model_package_group(ModelPackageGroupName="Dogs")


def test_a_package_is_described_listed_and_approved_as_aws_does(world):
    client = world.sagemaker
    client.create_model_package_group(ModelPackageGroupName="approvals")
    arn = client.create_model_package(
        ModelPackageGroupName="approvals",
        ModelPackageDescription="first",
        InferenceSpecification=SPECIFICATION,
        CustomerMetadataProperties={"run": "1", "accuracy": "0.9"},
        ModelMetrics={"ModelQuality": {"Statistics": {"ContentType": "application/json", "S3Uri": "s3://b/k"}}},
        SkipModelValidation="All",
    )["ModelPackageArn"]
    found = client.describe_model_package(ModelPackageName=arn)
    assert found == client.describe_model_package(ModelPackageName="approvals/1") | {
        "ResponseMetadata": found["ResponseMetadata"]
    }
    assert without(found, "CreationTime") == {
        "ModelPackageGroupName": "approvals",
        "ModelPackageVersion": 1,
        "ModelPackageArn": arn,
        "ModelPackageDescription": "first",
        "InferenceSpecification": SPECIFICATION,
        "ModelPackageStatus": "Completed",
        "ModelPackageStatusDetails": {"ValidationStatuses": [], "ImageScanStatuses": []},
        "CertifyForMarketplace": False,
        "ModelApprovalStatus": "PendingManualApproval",
        "CreatedBy": {},
        "ModelMetrics": {"ModelQuality": {"Statistics": {"ContentType": "application/json", "S3Uri": "s3://b/k"}}},
        "CustomerMetadataProperties": {"run": "1", "accuracy": "0.9"},
        "SkipModelValidation": "All",
    }
    client.update_model_package(
        ModelPackageArn=arn,
        ModelApprovalStatus="Approved",
        ApprovalDescription="better than the last",
        CustomerMetadataProperties={"accuracy": "0.95", "reviewer": "me"},
        CustomerMetadataPropertiesToRemove=["run"],
    )
    approved = client.describe_model_package(ModelPackageName=arn)
    assert approved["ModelApprovalStatus"] == "Approved"
    assert approved["ApprovalDescription"] == "better than the last"
    assert approved["CustomerMetadataProperties"] == {"accuracy": "0.95", "reviewer": "me"}
    assert approved["LastModifiedTime"] >= found["CreationTime"] == approved["CreationTime"]

    client.create_model_package(ModelPackageGroupName="approvals", ModelApprovalStatus="Rejected")
    versions = {
        status: [
            item["ModelPackageVersion"]
            for item in client.list_model_packages(ModelPackageGroupName="approvals", **status_of)[
                "ModelPackageSummaryList"
            ]
        ]
        for status, status_of in {
            "any": {},
            "approved": {"ModelApprovalStatus": "Approved"},
            "pending": {"ModelApprovalStatus": "PendingManualApproval"},
            "newest": {"SortOrder": "Descending", "MaxResults": 1},
        }.items()
    }
    assert versions == {"any": [1, 2], "approved": [1], "pending": [], "newest": [2]}
    batch = client.batch_describe_model_package(ModelPackageArnList=[arn, f"{arn[:-1]}9"])
    assert batch["ModelPackageSummaries"][arn]["InferenceSpecification"] == SPECIFICATION
    assert batch["BatchDescribeModelPackageErrorMap"] == {
        f"{arn[:-1]}9": {
            "ErrorCode": "ValidationException",
            "ErrorResponse": f"ModelPackage {arn[:-1]}9 does not exist.",
        }
    }


def test_packages_outside_of_groups_are_a_list_of_their_own(world, taken):
    def listed(**request):
        return world.sagemaker.list_model_packages(NameContains="taken", **request)["ModelPackageSummaryList"]

    assert listed() == listed(ModelPackageType="Unversioned") == []
    [version] = listed(ModelPackageType="Versioned")
    assert listed(ModelPackageType="Both") == [version]
    assert "ModelPackageName" not in version and version["ModelPackageArn"].endswith(":model-package/taken/1")


def test_a_model_of_an_approved_package_serves_what_it_was_made_of(world):
    client = world.sagemaker
    world.put("models/packaged.tar.gz", archive(answer_txt="packaged"))
    client.create_model_package_group(ModelPackageGroupName="packaged")
    arn = client.create_model_package(
        ModelPackageGroupName="packaged", InferenceSpecification=SPECIFICATION, ModelApprovalStatus="Approved"
    )["ModelPackageArn"]
    client.create_model(ModelName="packaged", ExecutionRoleArn=ROLE, PrimaryContainer={"ModelPackageName": arn})
    client.update_model_package(ModelPackageArn=arn, ModelApprovalStatus="Rejected")  # too late for the model
    assert client.describe_model(ModelName="packaged")["PrimaryContainer"]["ModelPackageName"] == arn
    client.create_endpoint_config(
        EndpointConfigName="packaged", ProductionVariants=[variant(ModelName="packaged", InitialInstanceCount=1)]
    )
    client.create_endpoint(EndpointName="packaged", EndpointConfigName="packaged")
    assert world.endpoint("packaged")["EndpointStatus"] == "InService"
    assert world.invoke("packaged")["answer"] == "packaged"
    client.delete_endpoint(EndpointName="packaged")


def test_tags_of_every_kind_of_resource(world, taken):
    client = world.sagemaker
    arns = [
        client.describe_training_job(TrainingJobName=taken)["TrainingJobArn"],
        client.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName=taken)["HyperParameterTuningJobArn"],
        client.describe_processing_job(ProcessingJobName=taken)["ProcessingJobArn"],
        client.describe_model(ModelName=taken)["ModelArn"],
        client.describe_endpoint_config(EndpointConfigName=taken)["EndpointConfigArn"],
        client.describe_endpoint(EndpointName=taken)["EndpointArn"],
        client.describe_model_package_group(ModelPackageGroupName=taken)["ModelPackageGroupArn"],
        client.describe_model_package(ModelPackageName=f"{taken}/1")["ModelPackageArn"],
    ]
    for arn in arns:
        answer = client.add_tags(ResourceArn=arn, Tags=[{"Key": "a", "Value": "1"}, {"Key": "b", "Value": ""}])
        assert answer["Tags"] == [{"Key": "a", "Value": "1"}, {"Key": "b", "Value": ""}]
        client.add_tags(ResourceArn=arn, Tags=[{"Key": "a", "Value": "2"}])
        client.delete_tags(ResourceArn=arn, TagKeys=["b", "never there"])
        found = client.list_tags(ResourceArn=arn, MaxResults=50)
        assert found["Tags"] == [{"Key": "a", "Value": "2"}] and "NextToken" not in found
    assert "Tags" not in json.dumps(client.describe_model(ModelName=taken), default=str)


def test_tags_given_at_creation_are_there(world):
    client = world.sagemaker
    tags = [{"Key": "team", "Value": "dogs"}]
    arn = client.create_model_package_group(ModelPackageGroupName="tagged", Tags=tags)["ModelPackageGroupArn"]
    assert client.list_tags(ResourceArn=arn)["Tags"] == tags
