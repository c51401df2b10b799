"""The deployed stack as the benchmarks of the inbox use it: an endpoint without a training, pictures in, rows out."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from local.emulator import CHECKOUT, Emulator
from local.stack import Stack

PATIENCE = 120.0  # seconds for an endpoint to come into service
IMAGES = {"HOUNDLOOP_IMAGES": str(CHECKOUT / "benchmarks"), "HOUNDLOOP_PRELOAD": "json"}
IMAGE = "local/observed:1"  # benchmarks/observed
COUNTS = ("ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible", "ApproximateNumberOfMessagesDelayed")


class Inbox:
    """A stack that is deployed into an emulator, and clients for it as the account's root."""

    def __init__(self, aws: Emulator, parameters: dict[str, str] | None = None) -> None:
        """Deploys; the endpoint comes with `serve`."""
        self.aws, self.stack = aws, Stack(aws)
        self.outputs = self.stack.deploy(parameters)
        self.connect(aws)
        self.bucket, self.queue_url = self.outputs["DataBucketName"], self.outputs["InboxQueueUrl"]
        self.endpoint = self.outputs["EndpointName"]

    def connect(self, aws: Emulator) -> None:
        """Clients of an emulator that has this stack: the first one, or another on the same state."""
        self.aws = aws
        variables = aws.environment()
        session: Any = boto3.Session(
            variables["AWS_ACCESS_KEY_ID"], variables["AWS_SECRET_ACCESS_KEY"], region_name=variables["AWS_REGION"]
        )
        config = Config(max_pool_connections=64, read_timeout=60, retries={"mode": "standard", "total_max_attempts": 3})

        def client(service: str) -> Any:
            return session.client(service, endpoint_url=aws.endpoint_url, config=config)

        self.s3, self.sqs, self.sagemaker, self.functions, self.events = map(
            client, ("s3", "sqs", "sagemaker", "lambda", "events")
        )
        self.iam, self.cloudformation, self.cloudwatch = map(client, ("iam", "cloudformation", "cloudwatch"))
        self.runtime = client("sagemaker-runtime")
        resource = session.resource("dynamodb", endpoint_url=aws.endpoint_url, config=config)
        self.predictions = resource.Table(self.outputs["PredictionsTableName"])
        self.state = resource.Table(self.outputs["LoopStateTableName"])

    def physical(self, logical: str) -> str | None:
        """The physical id of one of the stack's resources; None if the template has no such resource."""
        for resource in self.cloudformation.describe_stack_resources(StackName=self.stack.name)["StackResources"]:
            if resource["LogicalResourceId"] == logical:
                return str(resource["PhysicalResourceId"])
        return None

    def serve(self, artifact: Path, deployment: int, instances: int = 1, **environment: str) -> None:
        """Makes an unpacked model artifact live, as the workflow would: model, endpoint, champion.

        Raises RuntimeError when the endpoint does not come into service with it.
        """
        card = json.loads((artifact / "model_card.json").read_text())
        version, bucket = card["model_version"], self.outputs["ArtifactBucketName"]
        name, key = f"{self.endpoint}-{version}", f"runs/{version}/model.tar.gz"
        self.s3.put_object(Bucket=bucket, Key=key, Body=archive(artifact))
        role = self.iam.get_role(RoleName=self.physical("EndpointRole"))["Role"]["Arn"]
        variables = {"MODEL_VERSION": version, "DEPLOYMENT": str(deployment)} | environment
        container = {"Image": IMAGE, "ModelDataUrl": f"s3://{bucket}/{key}", "Environment": variables}
        self.sagemaker.create_model(ModelName=name, ExecutionRoleArn=role, PrimaryContainer=container)
        variant = {"VariantName": "AllTraffic", "ModelName": name, "InstanceType": "ml.c5.large"}
        self.sagemaker.create_endpoint_config(
            EndpointConfigName=name, ProductionVariants=[variant | {"InitialInstanceCount": instances}]
        )
        target = {"EndpointName": self.endpoint, "EndpointConfigName": name}
        if deployment == 1:
            self.sagemaker.create_endpoint(**target)
        else:
            self.sagemaker.update_endpoint(**target)
        found = self.in_service()
        if found["EndpointConfigName"] != name:
            raise RuntimeError(f"{found['EndpointConfigName']} is live, not {name}: {found.get('FailureReason', '')}")
        self.promote(artifact, deployment, f"s3://{bucket}/{key}")

    def in_service(self) -> dict[str, Any]:
        """The endpoint, once it is in service. Raises RuntimeError when it fails, or is not in time."""
        deadline = time.monotonic() + PATIENCE
        while (found := self.sagemaker.describe_endpoint(EndpointName=self.endpoint))["EndpointStatus"] != "InService":
            if found["EndpointStatus"] == "Failed" or time.monotonic() > deadline:
                raise RuntimeError(f"The endpoint is {found['EndpointStatus']}: {found.get('FailureReason', '')}")
            time.sleep(0.1)
        return dict(found)

    def promote(self, artifact: Path, deployment: int, uri: str) -> None:
        """Writes the champion, as the workflow's last step does."""
        card = json.loads((artifact / "model_card.json").read_text())
        version = card["model_version"]
        item = {
            "model_version": version,
            "deployment": deployment,
            "endpoint": self.endpoint,
            "endpoint_config": f"{self.endpoint}-{version}",
            "artifact": uri,
            "dataset_hash": card["dataset_hash"],
            "classes": (artifact / "classes.json").read_text(),
            "preprocess": (artifact / "preprocess.json").read_text(),
            "accuracy": Decimal(1),
            "since": datetime.now(UTC).isoformat(),
        }
        self.state.put_item(Item={"pk": "deployment", "sk": f"{deployment:06d}", "outcome": "PROMOTED"} | item)
        self.state.put_item(Item={"pk": "champion", "sk": "champion"} | item)

    def put(self, key: str, data: bytes) -> str:
        """Drops a picture under inbox/; returns its version id."""
        return str(self.s3.put_object(Bucket=self.bucket, Key=f"inbox/{key}", Body=data)["VersionId"])

    def row(self, key: str) -> dict[str, Any]:
        """The current row of a picture, or an empty one."""
        wanted = {"image": f"{self.bucket}/inbox/{key}", "version": "current"}
        return dict(self.predictions.get_item(Key=wanted, ConsistentRead=True).get("Item", {}))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row of the table, current ones and history: a benchmark may scan."""
        start: dict[str, Any] = {}
        while True:
            page = self.predictions.scan(ConsistentRead=True, **start)
            yield from page["Items"]
            if "LastEvaluatedKey" not in page:
                return
            start = {"ExclusiveStartKey": page["LastEvaluatedKey"]}

    def depth(self, url: str = "") -> tuple[int, int, int]:
        """Messages of a queue, the inbox's by default: visible, in flight, delayed."""
        found = self.sqs.get_queue_attributes(QueueUrl=url or self.queue_url, AttributeNames=list(COUNTS))["Attributes"]
        visible, in_flight, delayed = (int(found[name]) for name in COUNTS)
        return visible, in_flight, delayed


def archive(folder: Path) -> bytes:
    """A folder's files as model.tar.gz."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    return buffer.getvalue()
