"""EventBridge events: what a rule sees of jobs, endpoints and models as their states change."""

import json
import time

import pytest
from botocore.exceptions import ClientError

from tests.makers.sagemaker import container, deployment, processing, tuning, until

STATE_CHANGES = {"source": ["aws.sagemaker"]}


class Inbox:
    """A queue that a rule on the default bus fills."""

    def __init__(self, world) -> None:
        self.sqs = world.client("sqs")
        self.url = self.sqs.create_queue(QueueName="sagemaker-events")["QueueUrl"]
        queue = self.sqs.get_queue_attributes(QueueUrl=self.url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        rules = world.client("events")
        rules.put_rule(Name="sagemaker-events", EventPattern=json.dumps(STATE_CHANGES))
        rules.put_targets(Rule="sagemaker-events", Targets=[{"Id": "queue", "Arn": queue}])
        self.events: list[dict] = []

    def look(self) -> list[dict]:
        while messages := self.sqs.receive_message(QueueUrl=self.url, MaxNumberOfMessages=10).get("Messages", []):
            for message in messages:
                self.events.append(json.loads(message["Body"]))
                self.sqs.delete_message(QueueUrl=self.url, ReceiptHandle=message["ReceiptHandle"])
        return self.events

    def of(self, kind: str, arn: str) -> list[dict]:
        """The events of this kind about one resource, in their order."""
        return [
            event
            for event in self.look()
            if event["detail-type"] == f"SageMaker {kind} State Change" and event["resources"] == [arn]
        ]

    def details(self, kind: str, arn: str, member: str) -> list:
        return [event["detail"][member] for event in self.of(kind, arn)]


@pytest.fixture(scope="module")
def inbox(world):
    return Inbox(world)


def prefix(kind: str) -> str:
    return f"arn:aws:sagemaker:us-east-1:000000000000:{kind}/"


def test_a_training_job_tells_every_step(world, inbox):
    world.train("told", Tags=[{"Key": "team", "Value": "dogs"}], hyperparameters={"x": "1"})
    world.train("told-failure", hyperparameters={"mode": "fail"})
    described = world.trained("told")
    world.trained("told-failure")
    arn = prefix("training-job") + "told"
    until(lambda: inbox.details("Training Job", arn, "SecondaryStatus"), lambda found: "Completed" in found, 10)
    events = inbox.of("Training Job", arn)
    assert [(event["detail"]["TrainingJobStatus"], event["detail"]["SecondaryStatus"]) for event in events] == [
        ("InProgress", "Starting"),
        ("InProgress", "Downloading"),
        ("InProgress", "Training"),
        ("InProgress", "Uploading"),
        ("Completed", "Completed"),
    ]
    last = events[-1]
    assert (last["source"], last["account"], last["region"]) == ("aws.sagemaker", "000000000000", "us-east-1")
    detail = last["detail"]
    assert detail["Tags"] == {"team": "dogs"} and detail["TrainingJobName"] == "told"
    # Both are rounded, from other digits: a moment in the middle of two milliseconds may become either.
    assert detail["CreationTime"] == pytest.approx(described["CreationTime"].timestamp() * 1000, abs=1)
    assert detail["TrainingEndTime"] <= time.time() * 1000
    assert detail["SecondaryStatusTransitions"][0]["StartTime"] == detail["CreationTime"]
    assert detail["HyperParameters"]["x"] == "1" and not [name for name in detail if name.startswith("_")]
    failure = inbox.of("Training Job", prefix("training-job") + "told-failure")[-1]["detail"]
    assert failure["TrainingJobStatus"] == "Failed" and "the data is wrong" in failure["FailureReason"]


def test_processing_and_tuning_jobs_tell_their_state(world, inbox):
    world.sagemaker.create_processing_job(**processing("told"))
    world.sagemaker.create_hyper_parameter_tuning_job(**tuning("told"))
    arn = prefix("processing-job") + "told"
    wanted = ["InProgress", "Completed"]
    until(lambda: inbox.details("Processing Job", arn, "ProcessingJobStatus"), lambda found: found == wanted, 30)
    assert inbox.of("Processing Job", arn)[-1]["detail"]["AppSpecification"]["ImageUri"] == "local/server:1"
    arn = prefix("hyper-parameter-tuning-job") + "told"
    kind, member = "HyperParameter Tuning Job", "HyperParameterTuningJobStatus"
    until(lambda: inbox.details(kind, arn, member), lambda found: found == wanted, 30)
    assert inbox.of(kind, arn)[-1]["detail"]["TrainingJobStatusCounters"]["Completed"] == 1


def test_an_endpoint_and_its_deployment_tell_their_state(world, inbox):
    for name in ("told-one", "told-two"):
        world.model(name, name)
        arn = prefix("model") + name
        assert inbox.of("Model", arn)[0]["detail"]["ModelName"] == name
        assert len(inbox.of("Endpoint Config", prefix("endpoint-config") + name)) == 1
    world.sagemaker.create_endpoint(EndpointName="told", EndpointConfigName="told-one")
    world.endpoint("told", "InService")
    world.sagemaker.update_endpoint(
        EndpointName="told", EndpointConfigName="told-two", DeploymentConfig=deployment("ALL_AT_ONCE", wait=0)
    )
    world.endpoint("told", "InService")
    arn = prefix("endpoint") + "told"
    wanted = ["CREATING", "IN_SERVICE", "UPDATING", "IN_SERVICE"]
    until(lambda: inbox.details("Endpoint", arn, "EndpointStatus"), lambda found: found == wanted, 30)
    assert inbox.details("Endpoint", arn, "EndpointConfigName")[-1] == "told-two"
    stages = [
        variant["VariantStatus"][0]["Status"]
        for event in inbox.of("Endpoint Deployment", arn)
        for variant in event["detail"].get("PendingDeploymentSummary", {}).get("ProductionVariants", [])
    ]
    assert stages[0] == "Creating" and "Baking" in stages
    world.sagemaker.delete_endpoint(EndpointName="told")
    until(lambda: inbox.details("Endpoint", arn, "EndpointStatus"), lambda found: found[-1] == "DELETING", 10)
    world.sagemaker.delete_model(ModelName="told-one")
    assert len(inbox.of("Model", prefix("model") + "told-one")) == 2


def test_a_model_package_tells_its_approval(world, inbox):
    world.model("told-package", "told")
    world.sagemaker.create_model_package_group(ModelPackageGroupName="told")
    arn = world.sagemaker.create_model_package(
        ModelPackageGroupName="told",
        InferenceSpecification={"Containers": [container(ModelDataUrl="s3://jobs-bucket/models/told-package.tar.gz")]},
        ModelApprovalStatus="PendingManualApproval",
    )["ModelPackageArn"]
    world.sagemaker.update_model_package(ModelPackageArn=arn, ModelApprovalStatus="Approved")
    wanted = ["PendingManualApproval", "Approved"]
    until(lambda: inbox.details("Model Package", arn, "ModelApprovalStatus"), lambda found: found == wanted, 10)
    detail = inbox.of("Model Package", arn)[-1]["detail"]
    assert (detail["ModelPackageGroupName"], detail["ModelPackageVersion"]) == ("told", 1)
    assert detail["CreationTime"].endswith("Z") and "Tags" not in detail


def test_what_is_refused_tells_nothing(world, inbox):
    with pytest.raises(ClientError):
        world.train("told-never", RoleArn="arn:aws:iam::000000000000:role/nobody")
    assert not inbox.of("Training Job", prefix("training-job") + "told-never")
