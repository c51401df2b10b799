"""From inbox to row in the local AWS, IAM enforced: what is lost is found, what failed is sent again, and every query
of docs/querying.md finds what it says. One story, told in the order of the tests."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest

from local.emulator import Emulator
from local.stack import Stack
from preprocessing import Preprocess
from tests.makers import models, template
from tests.makers.coloured import coloured
from tests.makers.waiting import wait_for
from tools import inbox, query

PAGE = (template.ROOT / "docs" / "querying.md").read_text()
HEADINGS = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)
SECTIONS = dict(zip(HEADINGS[1::2], HEADINGS[2::2], strict=True))
SIZE = 32
ODD = "ä b+c%20'\"&🐕.jpg"


class Inbox:
    """The deployed stack, as those see it who use its inbox."""

    def __init__(self, outputs: dict[str, str]) -> None:
        session: Any = boto3
        self.client: Callable[[str], Any] = session.client
        self.outputs = outputs
        self.bucket = outputs["DataBucketName"]
        self.s3, self.sqs, self.events = self.client("s3"), self.client("sqs"), self.client("events")
        self.predictions = session.resource("dynamodb").Table(outputs["PredictionsTableName"])
        self.state = session.resource("dynamodb").Table(outputs["LoopStateTableName"])
        found = self.client("cloudformation").describe_stack_resources(StackName="houndloop")["StackResources"]
        self.names = {each["LogicalResourceId"]: each["PhysicalResourceId"] for each in found}

    def drop(self, key: str, data: bytes) -> str:
        return self.s3.put_object(Bucket=self.bucket, Key=f"inbox/{key}", Body=data)["VersionId"]

    def row(self, key: str) -> dict[str, Any]:
        wanted = {"image": f"{self.bucket}/inbox/{key}", "version": "current"}
        return self.predictions.get_item(Key=wanted, ConsistentRead=True).get("Item", {})

    def status(self, key: str) -> str | None:
        return self.row(key).get("status")

    def dead_letters(self) -> int:
        return sum(inbox.levels(self.outputs["InboxDeadLettersUrl"]).values())

    def go_live(self, folder: Path) -> None:
        """What the workflow does at the end of a run: an endpoint, and the champion's item."""
        artifact = io.BytesIO()
        with tarfile.open(fileobj=artifact, mode="w:gz") as tar:
            for path in models.make_artifact(folder, size=SIZE).iterdir():
                tar.add(path, path.name)
        bucket = self.outputs["ArtifactBucketName"]
        self.s3.put_object(Bucket=bucket, Key="runs/1/model.tar.gz", Body=artifact.getvalue())
        roles = self.client("iam").get_role(RoleName=self.names["EndpointRole"])
        sagemaker = self.client("sagemaker")
        container = {
            "Image": "local/inference:latest",
            "ModelDataUrl": f"s3://{bucket}/runs/1/model.tar.gz",
            "Environment": {"MODEL_VERSION": "260101000000", "DEPLOYMENT": "1"},
        }
        sagemaker.create_model(ModelName="m", ExecutionRoleArn=roles["Role"]["Arn"], PrimaryContainer=container)
        variant = {"ModelName": "m", "InstanceType": "ml.c7i.large", "InitialInstanceCount": 1}
        sagemaker.create_endpoint_config(
            EndpointConfigName="m", ProductionVariants=[variant | {"VariantName": "AllTraffic"}]
        )
        sagemaker.create_endpoint(EndpointName="houndloop", EndpointConfigName="m")
        sagemaker.get_waiter("endpoint_in_service").wait(EndpointName="houndloop", WaiterConfig={"Delay": 1})
        self.state.put_item(
            Item={
                "pk": "champion",
                "sk": "champion",
                "model_version": "260101000000",
                "deployment": 1,
                "endpoint": "houndloop",
                "dataset_hash": "0" * 64,
                "preprocess": Preprocess.default(SIZE).to_json(),
            }  # fmt: skip
        )


def colour(name: str, seed: int = 1) -> bytes:
    return next(coloured(name, 1, seed))


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, build: Path) -> Iterator[Inbox]:
    with pytest.MonkeyPatch.context() as patch, Emulator(state=tmp_path_factory.mktemp("aws"), auth=True) as aws:
        for name, value in aws.environment().items():
            patch.setenv(name, value)
        stack = Stack(aws)
        stack.build_dir = build
        outputs = stack.deploy({"ImageSize": str(SIZE), "HistoryDays": "30", "ReviewThreshold": "0.9999"})
        patch.setenv("PREDICTIONS", outputs["PredictionsTableName"])
        patch.setenv("DATA_BUCKET", outputs["DataBucketName"])
        yield Inbox(outputs)


def test_pictures_whose_event_was_lost_are_found(deployed: Inbox, capsys):
    deployed.drop("over.jpg", colour("green"))
    deployed.drop("notes.txt", b"hello")
    wait_for(lambda: deployed.status("over.jpg") == "WAITING" and deployed.status("notes.txt") == "REJECTED", 90)
    deployed.events.disable_rule(Name=deployed.names["InboxRule"])
    newest = deployed.drop("over.jpg", colour("red"))
    for key in ("dog.jpg", ODD):
        deployed.drop(key, colour("red"))
    deployed.s3.put_object(Bucket=deployed.bucket, Key="inbox/folder/", Body=b"")
    deployed.events.enable_rule(Name=deployed.names["InboxRule"])
    assert inbox.reconcile(deployed.outputs, min_age=0, wait=True) == 0
    assert "3 were lost" in capsys.readouterr().out
    wait_for(lambda: all(deployed.status(key) == "WAITING" for key in ("dog.jpg", ODD)), 60)
    wait_for(lambda: deployed.row("over.jpg")["version_id"] == newest, 60)
    assert inbox.reconcile(deployed.outputs, min_age=0, wait=True) == 0
    assert " 0 were lost" in capsys.readouterr().out, "what is known is left alone"


def test_what_waited_is_replayed_when_a_model_is_live(deployed: Inbox, tmp_path: Path):
    deployed.go_live(tmp_path / "model")
    assert inbox.replay(deployed.outputs, {"status": "WAITING"}) == 0
    keys = ("dog.jpg", ODD, "over.jpg")
    wait_for(lambda: all(deployed.status(key) == "CLASSIFIED" for key in keys), 60)
    assert {deployed.row(key)["label"] for key in keys} == {"red"}
    assert deployed.status("notes.txt") == "REJECTED"


def test_a_newer_picture_replaces_one_that_was_found_by_reconciliation(deployed: Inbox):
    newest = deployed.drop("over.jpg", colour("blue"))
    wait_for(lambda: deployed.row("over.jpg")["version_id"] == newest, 60)
    assert deployed.row("over.jpg")["label"] == "blue"


def test_the_inbox_is_searched_every_day(deployed: Inbox):
    name = deployed.names["ReconcileRule"].rpartition("/")[2]
    rule = deployed.events.describe_rule(Name=name)
    assert (rule["ScheduleExpression"], rule["State"]) == ("rate(1 day)", "ENABLED")
    deployed.events.put_rule(Name=name, ScheduleExpression="rate(1 minute)")  # the last test sees what comes of it


def test_the_redrive_sends_dead_letters_back_and_they_are_answered(deployed: Inbox, capsys):
    client = deployed.client("lambda")
    (source,) = client.list_event_source_mappings(FunctionName=deployed.names["ClassifyImages"])["EventSourceMappings"]
    client.update_event_source_mapping(UUID=source["UUID"], Enabled=False)
    wait_for(lambda: client.get_event_source_mapping(UUID=source["UUID"])["State"] == "Disabled", 60)
    time.sleep(1)  # a poll that had begun
    for number in range(12):
        deployed.drop(f"dead/{number}.jpg", colour("green", number))
    queue = deployed.outputs["InboxQueueUrl"]

    def tried_in_vain() -> bool:
        deployed.sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=10, VisibilityTimeout=0)
        return deployed.dead_letters() == 12

    wait_for(tried_in_vain, 60)
    client.update_event_source_mapping(UUID=source["UUID"], Enabled=True)
    assert inbox.redrive(deployed.outputs["InboxDeadLettersUrl"]) == 0
    assert "12 messages were sent again" in capsys.readouterr().out
    wait_for(lambda: all(deployed.status(f"dead/{n}.jpg") == "CLASSIFIED" for n in range(12)), 60)
    assert deployed.dead_letters() == 0
    assert inbox.redrive(deployed.outputs["InboxDeadLettersUrl"]) == 0
    assert "no dead letters" in capsys.readouterr().out


def test_what_the_model_was_unsure_of_and_everything_can_be_classified_again(deployed: Inbox):
    wait_for(lambda: deployed.status("dog.jpg") == "CLASSIFIED", 60)
    everything = [deployed.row(key)["updated_at"] for key in ("dog.jpg", "over.jpg", "notes.txt")]
    day = everything[0][:10]
    assert inbox.replay(deployed.outputs, {"status": "CLASSIFIED", "from": day}) == 0
    assert inbox.replay(deployed.outputs, {"review": True}) == 0
    assert inbox.replay(deployed.outputs, {"class": "blue", "from": day}) == 0
    wait_for(lambda: sum(inbox.levels(deployed.outputs["InboxQueueUrl"]).values()) == 0, 60)
    assert deployed.status("dog.jpg") == deployed.status("over.jpg") == "CLASSIFIED"


def examples(heading: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", SECTIONS[heading], re.DOTALL)


def ask(command: str) -> list[dict[str, Any]]:
    """Run a command of the page; the items of all its answers."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    answers, text = [], done.stdout.strip()
    while text:
        answer, end = json.JSONDecoder().raw_decode(text)
        answers += answer.get("Items", [answer["Item"]] if "Item" in answer else [])
        text = text[end:].strip()
    return answers


def test_every_command_of_the_page_finds_what_it_says(deployed: Inbox):
    deployed.drop("unsure.jpg", colour("green", 50))
    wait_for(lambda: deployed.status("unsure.jpg") == "CLASSIFIED", 60)
    wait_for(lambda: len(query_rows("review")) > 1, 60)
    commands = [(heading, command) for heading in SECTIONS for command in examples(heading, "bash")]
    reviewed = [each for each in commands if "REMOVE review" in each[1]]
    with ThreadPoolExecutor(max_workers=3) as pool:
        answers = list(pool.map(lambda each: (each[0], ask(each[1])), [c for c in commands if c not in reviewed]))
    found: dict[str, list[list[dict[str, Any]]]] = {heading: [] for heading in SECTIONS}
    for heading, items in answers:
        found[heading].append(items)
    names = lambda items: {item["key"]["S"].removeprefix("inbox/") for item in items}  # noqa: E731
    ((newest,),) = found["A picture's newest answer"]
    assert newest["status"]["S"] == "CLASSIFIED" and newest["label"]["S"] == "red"
    (history,) = found["Its history"]
    assert history[0]["version"]["S"] == "current" and len(history) >= 2
    assert all("expires_at" in item for item in history[1:]) and "expires_at" not in history[0]
    red = {"dog.jpg", ODD}
    assert [names(items) for items in found["A class on a day"]] == [red, red]
    assert [names(items) for items in found["A class over a range of days"]] == [red]
    (everything,) = found["Everything of a day"]
    assert names(everything) >= red | {"over.jpg", "notes.txt", "unsure.jpg", "dead/11.jpg"}
    (unsure,) = found["What awaits review"]
    confidences = [float(item["confidence"]["N"]) for item in unsure]
    assert confidences == sorted(confidences) and 1 < len(confidences) <= 20 and "unsure.jpg" in names(unsure)
    (rejected,) = found["What waits, was rejected or failed, and why"]
    assert names(rejected) == {"notes.txt"} and "not an image" in rejected[0]["reason"]["S"]
    ask(reviewed[0][1])
    wait_for(lambda: "inbox/unsure.jpg" not in query_rows("review"), 60)


def query_rows(*arguments: str) -> set[str]:
    """The keys that tools/query.py shows."""
    with pytest.MonkeyPatch.context() as patch:
        out = io.StringIO()
        patch.setattr(sys, "argv", ["query.py", *arguments, "--limit", "0", "--format", "json"])
        patch.setattr(sys, "stdout", out)
        assert query.main() == 0
    return {row["key"] for row in json.loads(out.getvalue())}


def test_every_line_of_python_of_the_page_finds_what_it_says(deployed: Inbox):
    found: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, found)
    assert found["newest"]["label"] == "red" and len(found["history"]) >= 2
    assert (
        {row["key"] for row in found["reds"]}
        == {row["key"] for row in found["week"]}
        == {"inbox/dog.jpg", f"inbox/{ODD}"}
    )
    assert {"inbox/over.jpg", "inbox/notes.txt"} <= {row["key"] for row in found["of_the_day"]}
    assert found["unsure"] and "not an image" in found["why"]["inbox/notes.txt"]


def test_the_tool_shows_the_same(deployed: Inbox, capsys, monkeypatch):
    assert query_rows("class", "red") == {"inbox/dog.jpg", f"inbox/{ODD}"}
    assert query_rows("picture", "dog.jpg", "--history") == {"inbox/dog.jpg"}
    assert query_rows("status", "REJECTED") == {"inbox/notes.txt"}
    assert query_rows("day") >= {"inbox/over.jpg", "inbox/notes.txt"}
    monkeypatch.setattr(sys, "argv", ["query.py", "status", "REJECTED"])
    assert query.main() == 0 and "not an image" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["query.py", "--stack", "other", "day"])
    assert query.main() == 1 and "There is no stack other" in capsys.readouterr().err


def test_a_refusal_of_the_endpoint_reaches_boto3_as_its_page_says(deployed: Inbox):
    """The Python of docs/serving.md; tests/e2e runs the README's, which asks about a picture."""
    found: dict[str, Any] = {}
    (code,) = re.findall(r"```python\n(.*?)```", (template.ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    exec(code, found)
    assert found["refusal"][0] == 400 and found["refusal"][1]["code"] == "BrokenImage"


def test_the_schedule_starts_a_search_of_the_inbox(deployed: Inbox):
    key = {"pk": "reconcile", "sk": "walk"}
    wait_for(lambda: deployed.state.get_item(Key=key).get("Item", {}).get("started_by") == "schedule", 150)
