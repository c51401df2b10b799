"""The protocol: what is read from a body, and what an answer holds."""

import datetime
import json

import pytest
from botocore import xform_name
from botocore.exceptions import ClientError
from botocore.model import ListShape, MapShape, StructureShape

ABSENT = {"ModelPackageName"}  # required in the service model, but AWS leaves it out for versions in a group
NULLS = {"MaxResults": None, "SortBy": None, "NameContains": "nothing-has-this-name"}


def send(world, body, target="SageMaker.AddTags"):
    """Sends a body that boto3 would not make; returns the answer, or the error's code, HTTP status and message."""

    def replace(params, **_):
        params["body"] = body if isinstance(body, bytes) else json.dumps(body).encode()
        params["headers"]["X-Amz-Target"] = target

    client = world.client("sagemaker")
    client.meta.events.register("before-call.sagemaker", replace)
    try:
        return client.list_models()
    except ClientError as error:
        answer = error.response
        details = answer["Error"]
        return details["Code"], answer["ResponseMetadata"]["HTTPStatusCode"], details.get("Message") or ""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", ""),
        (b"", ""),
        (b"null", ""),
        (b'"text"', ""),
        (b'{"Tags": [], }', ""),
        (b'{"Tags": NaN}', ""),
        ([], "Start of list found where not expected"),
        ({"ResourceArn": 5}, "NUMBER_VALUE can not be converted to a String"),
        ({"ResourceArn": 1.5}, "NUMBER_VALUE can not be converted to a String"),
        ({"ResourceArn": True}, "TRUE_VALUE can not be converted to a String"),
        ({"ResourceArn": ["a"]}, "Start of list found where not expected"),
        ({"ResourceArn": {"a": "b"}}, "Start of structure or map found where not expected."),
        ({"Tags": "a"}, "Expected list or null"),
        ({"Tags": 1}, "Expected list or null"),
        ({"Tags": {"Key": "a"}}, "Start of structure or map found where not expected."),
        ({"Tags": ["a"]}, "Expected null"),
        ({"Tags": [["a"]]}, "Start of list found where not expected"),
        # The type is looked at before any constraint is.
        (
            {"ResourceArn": "not an ARN", "Tags": [{"Key": "k", "Value": 1}]},
            "NUMBER_VALUE can not be converted to a String",
        ),
    ],
)
def test_a_body_of_the_wrong_type_is_not_read(world, body, message):
    assert send(world, body) == ("SerializationException", 400, message)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"MaxResults": "5"}, "STRING_VALUE can not be converted to an Integer"),
        (b'{"MaxResults": 1e999}', "NUMBER_VALUE can not be converted to an Integer"),
        ({"MaxResults": False}, "FALSE_VALUE can not be converted to an Integer"),
        ({"CreationTimeAfter": "yesterday"}, "STRING_VALUE can not be converted to milliseconds since epoch"),
    ],
)
def test_numbers_and_times_are_numbers(world, request_, message):
    assert send(world, request_, "SageMaker.ListModels") == ("SerializationException", 400, message)


def test_null_is_nothing_and_a_fraction_of_a_count_is_cut_off(world):
    assert send(world, NULLS, "SageMaker.ListModels")["Models"] == []
    assert send(world, NULLS | {"MaxResults": 1.9}, "SageMaker.ListModels")["Models"] == []
    tags = {"ResourceArn": None, "Tags": [None]}
    code, status, message = send(world, tags)
    assert (code, status) == ("ValidationException", 400)
    assert message.startswith("1 validation error detected: Value null at 'resourceArn'")


def test_a_field_that_nobody_knows_is_refused_by_name(world):
    message = "AddTags.Surprise is not implemented by the local SageMaker."
    request = {"ResourceArn": "arn:aws:sagemaker:us-east-1:000000000000:model/m", "Tags": [], "Surprise": 0}
    assert send(world, request) == ("NotImplemented", 501, message)


@pytest.mark.parametrize("target", ["SageMaker.CreateNonsense", "SageMaker.addTags", "SageMaker."])
def test_actions_that_sagemaker_does_not_have(world, target):
    code, status, message = send(world, {}, target)
    assert (code, status) == ("UnknownOperationException", 400)


def test_every_other_action_of_sagemaker_is_refused_by_name(world):
    from local.sagemaker.support import ACTIONS

    client = world.client("sagemaker")
    missing = [name for name in client.meta.service_model.operation_names if name not in ACTIONS]
    assert "CreateTransformJob" in missing and len(missing) > 300
    for action in missing:
        with pytest.raises(ClientError) as caught:
            getattr(client, xform_name(action))()
        answer = caught.value.response
        assert answer["ResponseMetadata"]["HTTPStatusCode"] == 501
        assert answer["Error"] == {
            "Code": "NotImplemented",
            "Message": f"The action {action} is not implemented by the local SageMaker.",
        }


def missing_members(shape, value, path=""):
    """The members that the service model says AWS always sends, and that are not there."""
    if isinstance(shape, StructureShape):
        for name in shape.required_members:
            if name not in value and name not in ABSENT:
                yield f"{path}.{name}"
        for name, item in value.items():
            if name in shape.members:
                yield from missing_members(shape.members[name], item, f"{path}.{name}")
    elif isinstance(shape, ListShape):
        for item in value:
            yield from missing_members(shape.member, item, f"{path}[]")
    elif isinstance(shape, MapShape):
        for item in value.values():
            yield from missing_members(shape.value, item, f"{path}{{}}")


@pytest.mark.parametrize(
    ("action", "request_", "sent"),
    [
        (
            "DescribeTrainingJob",
            {"TrainingJobName": "taken"},
            "TrainingJobArn HyperParameters RoleArn OutputDataConfig StoppingCondition CreationTime LastModifiedTime "
            "SecondaryStatusTransitions ResourceConfig AlgorithmSpecification EnableNetworkIsolation "
            "EnableInterContainerTrafficEncryption EnableManagedSpotTraining ModelArtifacts",
        ),
        (
            "DescribeHyperParameterTuningJob",
            {"HyperParameterTuningJobName": "taken"},
            "HyperParameterTuningJobArn TrainingJobDefinition LastModifiedTime",
        ),
        (
            "DescribeProcessingJob",
            {"ProcessingJobName": "taken"},
            "ProcessingResources AppSpecification RoleArn StoppingCondition LastModifiedTime",
        ),
        (
            "DescribeModel",
            {"ModelName": "taken"},
            "PrimaryContainer ExecutionRoleArn EnableNetworkIsolation DeploymentRecommendation",
        ),
        ("DescribeEndpointConfig", {"EndpointConfigName": "taken"}, "EnableNetworkIsolation"),
        ("DescribeEndpoint", {"EndpointName": "taken"}, "EndpointConfigName ProductionVariants"),
        ("DescribeModelPackageGroup", {"ModelPackageGroupName": "taken"}, "CreatedBy"),
        (
            "DescribeModelPackage",
            {"ModelPackageName": "taken/1"},
            "ModelPackageGroupName ModelPackageVersion InferenceSpecification CertifyForMarketplace "
            "ModelApprovalStatus CreatedBy",
        ),
        ("ListTrainingJobs", {"NameContains": "taken"}, ""),
        ("ListTrainingJobsForHyperParameterTuningJob", {"HyperParameterTuningJobName": "taken"}, ""),
        ("ListHyperParameterTuningJobs", {"NameContains": "taken"}, ""),
        ("ListProcessingJobs", {"NameContains": "taken"}, ""),
        ("ListModels", {"NameContains": "taken"}, ""),
        ("ListEndpointConfigs", {"NameContains": "taken"}, ""),
        ("ListEndpoints", {"NameContains": "taken"}, ""),
        ("ListModelPackageGroups", {"NameContains": "taken"}, ""),
        ("ListModelPackages", {"ModelPackageGroupName": "taken"}, ""),
        (
            "BatchDescribeModelPackage",
            {"ModelPackageArnList": ["arn:aws:sagemaker:us-east-1:000000000000:model-package/taken/1"]},
            "ModelPackageSummaries",
        ),
    ],
)
def test_answers_hold_what_aws_always_sends(world, taken, action, request_, sent):
    client = world.sagemaker
    answer = getattr(client, xform_name(action))(**request_)
    shape = client.meta.service_model.operation_model(action).output_shape
    assert list(missing_members(shape, answer)) == []
    assert set(sent.split()) <= answer.keys()
    assert answer["ResponseMetadata"]["RequestId"]
    if action.startswith("List"):
        [items] = [value for value in answer.values() if isinstance(value, list)]
        assert items, "a list of nothing shows nothing"


def test_times_are_times_and_have_milliseconds(world, taken):
    before = datetime.datetime.now(datetime.UTC)
    world.sagemaker.create_model_package_group(ModelPackageGroupName="moment")
    found = world.sagemaker.describe_model_package_group(ModelPackageGroupName="moment")["CreationTime"]
    after = datetime.datetime.now(datetime.UTC)
    tick = datetime.timedelta(milliseconds=1)  # to which AWS and this round
    assert before - tick <= found <= after + tick


def test_actions_without_an_answer_send_an_empty_body(world):
    world.sagemaker.create_model_package_group(ModelPackageGroupName="empty")
    answer = world.sagemaker.delete_model_package_group(ModelPackageGroupName="empty")
    assert answer.keys() == {"ResponseMetadata"} and answer["ResponseMetadata"]["HTTPStatusCode"] == 200
    assert answer["ResponseMetadata"]["HTTPHeaders"]["content-length"] == "0"
