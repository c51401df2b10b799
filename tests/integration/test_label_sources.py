"""Labels in the local AWS, IAM enforced: pictures in class folders, files of labels, predictions that are corrected."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from local.emulator import Emulator
from local.stack import Stack
from tests.makers.coloured import coloured
from tests.makers.labels import manifest
from tests.makers.waiting import wait_for
from tools import labels


class Labels:
    """The deployed stack, as those see it who label."""

    def __init__(self, outputs: dict[str, str]) -> None:
        session: Any = boto3
        self.outputs = outputs
        self.bucket, self.s3 = outputs["DataBucketName"], session.client("s3")
        self.table = session.resource("dynamodb").Table(outputs["LabelsTableName"])
        self.predictions = session.resource("dynamodb").Table(outputs["PredictionsTableName"])
        self.functions, self.names = session.client("lambda"), session.client("cloudformation")

    def put(self, key: str, data: bytes) -> None:
        self.s3.put_object(Bucket=self.bucket, Key=key, Body=data)

    def item(self, pk: str) -> dict[str, Any]:
        return self.table.get_item(Key={"pk": pk}, ConsistentRead=True).get("Item", {})

    def source(self, key: str) -> dict[str, Any]:
        return self.item(f"source#{self.bucket}/{key}")

    def report(self, key: str) -> dict[str, Any]:
        return json.loads(self.s3.get_object(Bucket=self.bucket, Key=f"label-reports/{key}.json")["Body"].read())

    def snapshot(self, **event: Any) -> dict[str, Any]:
        """What SnapshotDataset answers, called as the workflow calls it."""
        name = self.names.describe_stack_resource(StackName="houndloop", LogicalResourceId="SnapshotDataset")
        answer = self.functions.invoke(
            FunctionName=name["StackResourceDetail"]["PhysicalResourceId"], Payload=json.dumps(event).encode()
        )
        assert "FunctionError" not in answer, answer["Payload"].read()
        return json.loads(answer["Payload"].read())


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, build: Path) -> Iterator[Labels]:
    with pytest.MonkeyPatch.context() as patch, Emulator(state=tmp_path_factory.mktemp("aws"), auth=True) as aws:
        for name, value in aws.environment().items():
            patch.setenv(name, value)
        stack = Stack(aws)
        stack.build_dir = build
        outputs = stack.deploy({"MinPicturesPerClass": "5", "QuietPeriodSeconds": "3600"})
        for name, value in labels.environment("houndloop", outputs).items():
            patch.setenv(name, value)
        yield Labels(outputs)


def test_a_manifest_is_read_and_what_is_wrong_with_it_is_told(deployed: Labels):
    lines = []
    for name in ("red", "green"):
        for number, data in enumerate(coloured(name, 12, seed=1)):
            deployed.put(f"unlabelled/ü {name}+{number}.jpg", data)
            lines.append((f"unlabelled/ü {name}+{number}.jpg", name))
    data = manifest([*lines, ("unlabelled/gone.jpg", "red")], deployed.bucket)
    deployed.put("labels/breed/manifests/output/output.manifest", data)
    wait_for(lambda: deployed.source("labels/breed/manifests/output/output.manifest").get("status") == "READ", 60)
    report = deployed.report("breed/manifests/output/output.manifest")
    assert report["labels"] == 24 and [each["line"] for each in report["rejected"]] == [25]
    assert "there is no s3://" in report["rejected"][0]["reason"]


def test_the_snapshot_deals_its_pictures_and_can_be_repeated_without_any_label(deployed: Labels):
    taken = deployed.snapshot()
    assert taken["counts"] == {"red": 12, "green": 12} and not taken["trained"]
    assert len(deployed.item("splits#000000")["splits"]) == 24
    deployed.s3.delete_object(Bucket=deployed.bucket, Key="labels/breed/manifests/output/output.manifest")
    wait_for(lambda: deployed.source("labels/breed/manifests/output/output.manifest")["status"] == "DELETED", 60)
    assert deployed.snapshot(snapshot=taken["hash"]) == taken


def test_a_prediction_that_is_corrected_becomes_a_label_of_that_picture(deployed: Labels, capsys):
    deployed.put("inbox/my dog.jpg", next(coloured("blue", 1, seed=1)))
    row = {"image": f"{deployed.bucket}/inbox/my dog.jpg", "version": "current"}
    wait_for(lambda: "Item" in deployed.predictions.get_item(Key=row), 60)
    for name in ("blue", "violet"):
        assert labels.review(deployed.outputs, "my dog.jpg", name) == 0
    assert deployed.predictions.get_item(Key=row)["Item"]["reviewed_as"] == "violet"

    def counted() -> list[str]:
        return [each["class"] for each in labels.ledger.contents().labels]

    wait_for(lambda: counted() == ["violet"], 60)
    assert labels.show(None) == 0
    assert "violet has 1 of the 5 pictures" in capsys.readouterr().out
