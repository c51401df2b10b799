"""What a Task's resource means: names, values, errors and jobs, with botocore's stubber for the services."""

from datetime import UTC, datetime

import botocore.session
import pytest
from botocore.stub import Stubber
from hypothesis import given
from hypothesis import strategies as some

from local.seams.integrations import (
    Integration,
    TaskError,
    call,
    error_name,
    from_response,
    java_name,
    parse,
    run_job,
    to_request,
)

SESSION = botocore.session.Session()


def client(service):
    return SESSION.create_client(
        service, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
    )


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "resource, expected",
    [
        ("arn:aws:states:::aws-sdk:sagemaker:describeEndpoint", Integration("sagemaker", "describeEndpoint", False)),
        (
            "arn:aws:states:::sagemaker:createTrainingJob.sync",
            Integration("sagemaker", "createTrainingJob", True, "sync"),
        ),
        ("arn:aws:states:::states:startExecution.sync:2", Integration("states", "startExecution", True, "sync:2")),
        ("arn:aws:states:::sqs:sendMessage.waitForTaskToken", Integration("sqs", "sendMessage", True)),
        ("arn:aws-cn:states:::dynamodb:putItem", Integration("dynamodb", "putItem", True)),
    ],
)
def test_resources(resource, expected):
    assert parse(resource) == expected


@pytest.mark.parametrize("resource", ["arn:aws:s3:::bucket", "arn:${AWS::Partition}:states:::sqs:sendMessage", ""])
def test_what_is_no_integration_fails_the_task(resource):
    with pytest.raises(TaskError) as failed:
        parse(resource)
    assert failed.value.error == "States.Runtime"


@pytest.mark.parametrize(
    "service, name",
    [
        ("sfn", "stepfunctions"),
        ("cloudwatchlogs", "logs"),
        ("eventbridge", "events"),
        ("sagemakerruntime", "sagemaker-runtime"),
        ("applicationautoscaling", "application-autoscaling"),
        ("s3", "s3"),
    ],
)
def test_services_by_the_names_of_the_sdk_for_java(service, name):
    assert Integration(service, "x", optimized=False).botocore_service == name


@pytest.mark.parametrize(
    "resource",
    [
        "applicationautoscaling:registerScalableTarget",
        "applicationautoscaling:putScalingPolicy",
        "codebuild:startBuild",
        "codebuild:batchGetBuilds",
        "scheduler:createSchedule",
        "sagemakerruntime:invokeEndpoint",
        "s3:getObject",
        "s3:headObject",
        "lambda:updateEventSourceMapping",
        "cloudwatch:putMetricAlarm",
    ],
)
def test_every_action_of_every_service_can_be_named(resource):
    integration = parse(f"arn:aws:states:::aws-sdk:{resource}")
    assert integration.operation in SESSION.get_service_model(integration.botocore_service).operation_names


@pytest.mark.parametrize(
    "service_id, name",
    [
        ("DynamoDB", "DynamoDb"),
        ("SQS", "Sqs"),
        ("S3", "S3"),
        ("SageMaker", "SageMaker"),
        ("SFN", "Sfn"),
        ("CloudWatch Logs", "CloudWatchLogs"),
        ("EventBridge", "EventBridge"),
        ("CodeBuild", "CodeBuild"),
    ],
)
def test_error_prefixes(service_id, name):
    assert java_name(service_id) == name


@pytest.mark.parametrize(
    "resource, code, name",
    [
        ("arn:aws:states:::aws-sdk:s3:getObject", "NoSuchKey", "S3.NoSuchKeyException"),
        ("arn:aws:states:::aws-sdk:s3:headObject", "404", "S3.NoSuchKeyException"),
        ("arn:aws:states:::aws-sdk:s3:getObject", "SlowDown", "S3.S3Exception"),
        (
            "arn:aws:states:::aws-sdk:sagemaker:describeTrainingJob",
            "ResourceNotFound",
            "SageMaker.ResourceNotFoundException",
        ),
        ("arn:aws:states:::aws-sdk:sagemaker:describeEndpoint", "ValidationException", "SageMaker.SageMakerException"),
        (
            "arn:aws:states:::sagemaker:createTrainingJob.sync",
            "ValidationException",
            "SageMaker.AmazonSageMakerException",
        ),
        (
            "arn:aws:states:::sagemaker:createTrainingJob.sync",
            "ResourceLimitExceeded",
            "SageMaker.ResourceLimitExceededException",
        ),
        (
            "arn:aws:states:::aws-sdk:dynamodb:putItem",
            "ConditionalCheckFailedException",
            "DynamoDb.ConditionalCheckFailedException",
        ),
        (
            "arn:aws:states:::dynamodb:putItem",
            "ConditionalCheckFailedException",
            "DynamoDB.ConditionalCheckFailedException",
        ),
        ("arn:aws:states:::dynamodb:putItem", "AccessDeniedException", "DynamoDB.AmazonDynamoDBException"),
        ("arn:aws:states:::lambda:invoke", "TooManyRequestsException", "Lambda.TooManyRequestsException"),
        ("arn:aws:states:::lambda:invoke", "AccessDeniedException", "Lambda.AWSLambdaException"),
    ],
)
def test_error_names(resource, code, name):
    integration = parse(resource)
    assert error_name(integration, client(integration.botocore_service), code) == name


def shape(service, operation):
    return SESSION.get_service_model(service).operation_model(operation).input_shape


def test_values_become_what_the_api_takes():
    request = to_request(
        {
            "TrainingJobName": "t",
            "StoppingCondition": {"MaxRuntimeInSeconds": 60.0},
            "HyperParameters": {"epochs": 3, "lr": 0.1, "profile": True, "name": "x"},
        },
        shape("sagemaker", "CreateTrainingJob"),
    )
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 60}
    assert request["HyperParameters"] == {"epochs": "3", "lr": "0.1", "profile": "true", "name": "x"}
    assert to_request({"ProjectName": "p"}, shape("codebuild", "StartBuild")) == {"projectName": "p"}
    assert to_request({"QueueUrl": "q", "MessageBody": {"a": [1]}}, shape("sqs", "SendMessage")) == {
        "QueueUrl": "q",
        "MessageBody": '{"a":[1]}',
    }


def test_a_field_that_the_api_does_not_have_is_refused_in_awss_words():
    with pytest.raises(TaskError, match='The field "Nmae" is not supported by Step Functions'):
        to_request({"Nmae": "x"}, shape("sagemaker", "DescribeEndpoint"))


@given(some.datetimes(timezones=some.just(UTC), min_value=datetime(1980, 1, 1), max_value=datetime(2100, 1, 1)))
def test_timestamps_by_family(moment):
    shown = from_response(moment, None, optimized=False)
    assert shown.endswith("Z")
    assert abs(datetime.fromisoformat(shown.replace("Z", "+00:00")) - moment).total_seconds() < 0.001
    assert from_response(moment, None, optimized=True) == int(moment.timestamp() * 1000)


def stubbed(service):
    stub = Stubber(client(service))
    stub.activate()
    return stub


DESCRIPTION = {
    "TrainingJobName": "t",
    "TrainingJobArn": "arn:aws:sagemaker:us-east-1:000000000000:training-job/t",
    "ModelArtifacts": {"S3ModelArtifacts": "s3://b/m"},
    "SecondaryStatus": "Starting",
    "StoppingCondition": {"MaxRuntimeInSeconds": 60},
    "ResourceConfig": {"VolumeSizeInGB": 1},
    "AlgorithmSpecification": {"TrainingInputMode": "File"},
    "CreationTime": datetime(2026, 1, 2, tzinfo=UTC),
}
PARAMETERS = {
    "TrainingJobName": "t",
    "AlgorithmSpecification": {"TrainingInputMode": "File"},
    "RoleArn": "arn:aws:iam::000000000000:role/r",
    "OutputDataConfig": {"S3OutputPath": "s3://b"},
    "ResourceConfig": {"VolumeSizeInGB": 1},
    "StoppingCondition": {"MaxRuntimeInSeconds": 60},
}


def training_stub(*statuses):
    stub = stubbed("sagemaker")
    tagged = {**PARAMETERS, "Tags": [{"Key": "MANAGED_BY_AWS", "Value": "STARTED_BY_STEP_FUNCTIONS"}]}
    stub.add_response("create_training_job", {"TrainingJobArn": DESCRIPTION["TrainingJobArn"]}, tagged)
    for status in statuses:
        stub.add_response("describe_training_job", {**DESCRIPTION, "TrainingJobStatus": status})
    return stub


TRAIN = parse("arn:aws:states:::sagemaker:createTrainingJob.sync")


def test_a_job_is_waited_for_and_described():
    stub, waits = training_stub("InProgress", "InProgress", "Completed"), []
    result = run_job(TRAIN, PARAMETERS, lambda service: stub.client, waits.append, Stopped)
    assert result["TrainingJobStatus"] == "Completed"
    assert result["ModelArtifacts"] == {"S3ModelArtifacts": "s3://b/m"}
    assert result["CreationTime"] == 1767312000000
    assert len(waits) == 2
    stub.assert_no_pending_responses()


def test_a_failed_job_fails_the_task_with_its_description():
    stub = training_stub("Failed")
    with pytest.raises(TaskError) as failed:
        run_job(TRAIN, PARAMETERS, lambda service: stub.client, lambda seconds: None, Stopped)
    assert failed.value.error == "States.TaskFailed"
    assert '"TrainingJobStatus": "Failed"' in failed.value.cause


def test_a_job_is_stopped_with_its_execution():
    stub = training_stub("InProgress")
    stub.add_response("stop_training_job", {}, {"TrainingJobName": "t"})

    def pause(seconds):
        raise Stopped

    with pytest.raises(Stopped):
        run_job(TRAIN, PARAMETERS, lambda service: stub.client, pause, Stopped)
    stub.assert_no_pending_responses()


def test_an_event_that_eventbridge_did_not_take_fails_the_task():
    stub = stubbed("events")
    stub.add_response("put_events", {"FailedEntryCount": 1, "Entries": [{"ErrorCode": "x"}]})
    with pytest.raises(TaskError) as failed:
        call(
            parse("arn:aws:states:::events:putEvents"), {"Entries": [{"Detail": {"a": 1}}]}, lambda service: stub.client
        )
    assert failed.value.error == "EventBridge.FailedEntry"
