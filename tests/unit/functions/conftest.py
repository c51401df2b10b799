"""The functions' AWS, faked by moto, with the tables as the template defines them."""

import os
import re
from collections.abc import Iterator
from threading import RLock
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from moto import mock_aws
from moto.dynamodb.exceptions import ConditionalCheckFailed
from moto.dynamodb.models import DynamoDBBackend

from tests.makers import template

# Powertools reads these when a handler is imported, as it may: Lambda sets them before.
os.environ |= {
    "POWERTOOLS_METRICS_NAMESPACE": "Houndloop",
    "POWERTOOLS_SERVICE_NAME": "test",
    "POWERTOOLS_TRACE_DISABLED": "true",
}

TABLE_PROPERTIES = {"BillingMode", "AttributeDefinitions", "KeySchema", "GlobalSecondaryIndexes"}
BUCKET, ARTIFACTS = "pictures", "artifacts"


def insert_each(self: DynamoDBBackend, statements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """BatchExecuteStatement of INSERTs as DynamoDB does it; moto's own overwrites, and reads no nested parameters."""
    answers = []
    for statement in statements:
        found = re.fullmatch(r'INSERT INTO "(\w+)" VALUE \{(.*)\}', statement["Statement"])
        assert found, statement
        names = re.findall(r"'(\w+)': \?", found[2])
        item = dict(zip(names, statement["Parameters"], strict=True))
        try:
            self.put_item(found[1], item, condition_expression="attribute_not_exists(image)")
            answers.append({"TableName": found[1]})
        except ConditionalCheckFailed:
            answers.append({"Error": {"Code": "DuplicateItem", "Message": "Duplicate primary key exists in table"}})
    return answers


_put_item, _one_write = DynamoDBBackend.put_item, RLock()


def put_item(self: DynamoDBBackend, *arguments: Any, **named: Any) -> Any:
    """A conditional write is one step; moto's own looks first and writes then, whatever other threads do meanwhile."""
    with _one_write:
        return _put_item(self, *arguments, **named)


@pytest.fixture
def context() -> SimpleNamespace:
    """What Lambda passes as context, as far as Powertools reads it."""
    return SimpleNamespace(
        function_name="f", memory_limit_in_mb=128, invoked_function_arn="arn:aws:lambda:us-east-1:1:function:f",
        aws_request_id="r", get_remaining_time_in_millis=lambda: 60_000,
    )  # fmt: skip


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Buckets, tables and queues, their names in the environment as the template puts them there."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setattr(DynamoDBBackend, "put_item", put_item)
    monkeypatch.setattr(DynamoDBBackend, "batch_execute_statement", insert_each)
    monkeypatch.setattr("common.objects._quickly", lambda event: None)  # moto sees what goes through the SDK only
    with mock_aws():
        s3, sqs, dynamodb = boto3.client("s3"), boto3.client("sqs"), boto3.client("dynamodb")
        for bucket in (BUCKET, ARTIFACTS):
            s3.create_bucket(Bucket=bucket)
            s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        for name, properties in template.resources("AWS::DynamoDB::Table").items():
            dynamodb.create_table(TableName=name, **{k: v for k, v in properties.items() if k in TABLE_PROPERTIES})
        queues = {name: sqs.create_queue(QueueName=name)["QueueUrl"] for name in ("inbox", "retrain", "labels")}
        topic = boto3.client("sns").create_topic(Name="topic")["TopicArn"]
        for name, value in {
            "PREDICTIONS_TABLE": "Predictions", "LABELS_TABLE": "Labels", "LOOP_STATE_TABLE": "LoopState",
            "INBOX_QUEUE_URL": queues["inbox"], "RETRAIN_QUEUE_URL": queues["retrain"], "ARTIFACT_BUCKET": ARTIFACTS,
            "LABEL_QUEUE_URL": queues["labels"],
            "HISTORY_DAYS": "0",
            "MAX_RECEIVES": "5", "MAX_IMAGE_BYTES": "1000000", "REVIEW_THRESHOLD": "0.6", "QUIET_PERIOD_SECONDS": "0",
            "LONGEST_WAIT_SECONDS": "86400", "MAX_RUNS_PER_DAY": "6", "END_RUN_FUNCTION": "end_run",
            "MIN_PICTURES_PER_CLASS": "5", "MIN_NEW_PICTURES": "1", "GATE_MIN_TEST_PICTURES": "1",
            "TOPIC": topic, "NAME": "houndloop",
            "DECODE_SECONDS": "20", "MAX_IMAGE_PIXELS": "120000000", "MIN_IMAGE_SIDE": "8",
            "PRETRAINED_WEIGHTS": "none", "SERVING_IMAGE_URI": "local/inference:latest",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        _forget_clients()
        table: Any = boto3.resource("dynamodb").Table
        yield SimpleNamespace(
            s3=s3, sqs=sqs, queues=queues, bucket=BUCKET, artifacts=ARTIFACTS,
            predictions=table("Predictions"), labels=table("Labels"), state=table("LoopState"),
        )  # fmt: skip
        _forget_clients()


def _forget_clients() -> None:
    """The functions keep their clients for the life of the process; here each test has its own AWS."""
    import sys

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("common", *_FUNCTIONS):
            for attribute in vars(module).values():
                if hasattr(attribute, "cache_clear"):
                    attribute.cache_clear()


_FUNCTIONS = (
    "classify_images", "register_labels", "start_retraining", "publish_sources", "snapshot_dataset", "judge_challenger",
    "probe_endpoint", "replay_images", "end_run", "clean_up", "watch_drift",
)  # fmt: skip
