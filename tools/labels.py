"""Says what a run would learn from and what is left out, and turns predictions into labels.

    python tools/labels.py show
    python tools/labels.py show --all
    python tools/labels.py confirm dog.jpg
    python tools/labels.py correct "my dogs/rex.jpg" "great dane"

A picture is named by its key, with or without inbox/. Works on whatever account or emulator boto3 is pointed at;
docs/labels.md says what counts as a label.
"""

import argparse
import json
import os
import sys
from collections import Counter, defaultdict
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from boto3.dynamodb.conditions import Attr
from botocore.exceptions import ClientError

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "functions")]  # as a script, it finds its siblings so, and what decides

from common import clock, dataset, ledger  # noqa: E402
from common.names import BadLabel, class_name, fold  # noqa: E402
from start_retraining import worth  # noqa: E402
from tools import stack  # noqa: E402
from tools.stack import ToolError, cell, client  # noqa: E402

SHOWN = 20  # of what is left out, without --all
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", default="houndloop", help="name of the CloudFormation stack (houndloop)")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("show", help="classes, what is left out and why, whether a run would learn something")
    command.add_argument("--all", action="store_true", help=f"all that is left out, not {SHOWN} of a kind")
    command = commands.add_parser("confirm", help="the picture is what it was classified as")
    command.add_argument("picture")
    command = commands.add_parser("correct", help="the picture is of another class")
    command.add_argument("picture")
    command.add_argument("class_", metavar="class")
    arguments = parser.parse_args()
    return stack.run(lambda: work(arguments))


def work(arguments: argparse.Namespace) -> int:
    outputs = stack.outputs(arguments.stack)
    os.environ["LABELS_TABLE"] = outputs["LabelsTableName"]
    if arguments.command == "show":
        os.environ |= environment(arguments.stack, outputs)
        return show(None if arguments.all else SHOWN)
    return review(outputs, arguments.picture, arguments.class_ if arguments.command == "correct" else None)


def environment(name: str, outputs: dict[str, str]) -> dict[str, str]:
    """What the functions that decide read, as the template gives it to them."""
    found = client("cloudformation").describe_stacks(StackName=name)["Stacks"][0]["Parameters"]
    parameters = {each["ParameterKey"]: each["ParameterValue"] for each in found}
    return {
        "LABELS_TABLE": outputs["LabelsTableName"],
        "LOOP_STATE_TABLE": outputs["LoopStateTableName"],
        "ARTIFACT_BUCKET": outputs["ArtifactBucketName"],
        "MIN_PICTURES_PER_CLASS": parameters["MinPicturesPerClass"],
        "MIN_NEW_PICTURES": parameters["MinNewPictures"],
        "GATE_MIN_TEST_PICTURES": parameters["GateMinTestPictures"],
    }


# --- Reviewing -------------------------------------------------------------------------------------------------------


def review(outputs: dict[str, str], picture: str, corrected: str | None) -> int:
    """Make a label of the very version of a picture that its row speaks of, in place of what an earlier review said.

    Each step may be repeated: a review that broke off is mended by doing it again.
    """
    bucket = outputs["DataBucketName"]
    key = f"inbox/{picture.removeprefix('inbox/')}"
    table = stack.table(outputs["PredictionsTableName"])
    row = table.get_item(Key={"image": f"{bucket}/{key}", "version": "current"}, ConsistentRead=True).get("Item")
    if row is None:
        raise ToolError(f"There is no row of {key}; `python tools/query.py day` lists pictures.")
    name = chosen(outputs, row, corrected)
    kept = f"reviewed/{name_of(row)}"
    place(row, f"{ledger.LABELLED}{name}/{kept}")
    for other in class_folders(bucket):
        if other != f"{ledger.LABELLED}{name}/" and exists(bucket, f"{other}{kept}"):
            client("s3").delete_object(Bucket=bucket, Key=f"{other}{kept}")
    try:
        table.update_item(
            Key={"image": row["image"], "version": "current"},
            UpdateExpression="SET reviewed_as = :name, reviewed_at = :now REMOVE review",
            ConditionExpression="version_id = :version",
            ExpressionAttributeValues={
                ":name": name,
                ":now": clock.iso(clock.now()),
                ":version": row["version_id"],
            },
        )
    except ClientError as error:
        if error.response["Error"]["Code"] != "ConditionalCheckFailedException":
            raise
        raise ToolError(
            f"The version that was shown is labelled {name}; {key} was replaced meanwhile: look at it again."
        ) from None
    print(f"{key} is labelled {name}; the next run learns from it.")
    return 0


def chosen(outputs: dict[str, str], row: Row, corrected: str | None) -> str:
    """The class that the picture gets; raises ToolError where it can get none."""
    if corrected is None:
        if row["status"] != "CLASSIFIED":
            raise ToolError(f"{row['key']} is {row['status']}: there is no class to confirm; use correct.")
        return row["label"]
    if row["status"] == "REJECTED":
        raise ToolError(f"{row['key']} was rejected: {row['reason']}")
    try:
        name = class_name(corrected)
    except BadLabel as error:
        raise ToolError(str(error)) from None
    for known in known_classes(outputs, name):
        if known != name and fold(known) == fold(name):
            raise ToolError(f"There is a class {known!r}, of which {name!r} is another spelling: write it so.")
    return name


def known_classes(outputs: dict[str, str], name: str) -> list[str]:
    """The classes of the live model, or how `name` was first spelled in the labels."""
    state = stack.table(outputs["LoopStateTableName"])
    champion = state.get_item(Key={"pk": "champion", "sk": "champion"}, ConsistentRead=True).get("Item")
    known = json.loads(champion["classes"]) if champion else []
    if any(fold(each) == fold(name) for each in known):
        return known
    item = stack.table(outputs["LabelsTableName"]).get_item(Key={"pk": f"spelling#{fold(name)}"}).get("Item")
    return [item["spelling"]] if item else []


def name_of(row: Row) -> str:
    """What the label's object is called: the same for the same version of the same picture, and no other's."""
    digest = sha256(f"{row['image']}\n{row['version_id']}".encode()).hexdigest()
    return f"{digest[:16]}-{PurePosixPath(row['key']).name[-80:]}"


def place(row: Row, key: str) -> None:
    """Copy the version of the picture that the row speaks of to `key`, unless it is there."""
    if exists(row["bucket"], key):
        return
    source = {"Bucket": row["bucket"], "Key": row["key"]}
    if row["version_id"]:
        source["VersionId"] = row["version_id"]
    try:
        client("s3").copy_object(Bucket=row["bucket"], Key=key, CopySource=source)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("NoSuchKey", "NoSuchVersion"):
            raise
        raise ToolError(f"{row['key']} was deleted, and the version that was classified is no longer kept.") from None


def class_folders(bucket: str) -> list[str]:
    pages = client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=ledger.LABELLED, Delimiter="/")
    return [each["Prefix"] for page in pages for each in page.get("CommonPrefixes", [])]


def exists(bucket: str, key: str) -> bool:
    try:
        client("s3").head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchKey"):
            raise
        return False
    return True


# --- Showing ---------------------------------------------------------------------------------------------------------


def show(limit: int | None) -> int:
    """Print what the labels amount to, as start_retraining would see them now; nothing is decided or written here."""
    contents = ledger.contents()
    found = dataset.assemble(contents.labels, contents.splits, int(os.environ["MIN_PICTURES_PER_CLASS"]))
    last, _ = worth.last_training()
    print_classes(found, contents.labels, last)
    tell("Label files", [describe(each) for each in sources()], None)
    tell("Rejected", [f"{each['key']}: {each['reason']}" for each in rejected()], limit)
    tell("Left out", [f"{', '.join(each.origins)}: {each.reason}" for each in found.left_out_pictures], limit)
    learns, why, facts = worth.worth_a_run(found)
    if facts:
        print(
            f"\nA run would learn from {facts['pictures']} pictures of {facts['classes']} classes ({found.hash[:12]})."
        )
    print(f"{'The labels are reason for a run' if learns else 'The labels start no run'}: {why}.")
    return 0


def print_classes(found: dataset.Dataset, labels: list[ledger.Item], last: dataset.Dataset | None) -> None:
    """`new` are the pictures that the last training did not have with this class."""
    had = {(picture.class_name, picture.sha256) for picture in last.pictures} if last else set()
    contents: dict[str, set[str]] = defaultdict(set)
    for label in labels:
        contents[label["class"]].add(label["sha256"])
    splits = Counter((picture.class_name, picture.split) for picture in found.pictures)
    print(f"{'class':<24}{'pictures':>9}{'new':>7}{'train':>8}{'validation':>12}{'test':>7}")
    for name, pictures in sorted(contents.items()):
        line = f"{name:<24}{len(pictures):>9}{sum((name, sha256) not in had for sha256 in pictures):>7}"
        line += "".join(
            f"{splits[name, split]:>{width}}" for split, width in zip(dataset.SPLITS, (8, 12, 7), strict=True)
        )
        print(f"{line}  {found.left_out.get(name, '')}".rstrip())


def sources() -> list[Row]:
    """The label files that are there."""
    there = Attr("pk").begins_with("source#") & Attr("status").ne("DELETED")
    return sorted(scan(FilterExpression=there), key=lambda row: row["key"])


def rejected() -> list[Row]:
    """What lies under labelled/ and is no label."""
    no_label = Attr("pk").begins_with("label#") & Attr("status").eq("REJECTED")
    return sorted(scan(FilterExpression=no_label), key=lambda row: row["key"])


def scan(**request: Any) -> list[Row]:
    pages = ledger.table().meta.client.get_paginator("scan").paginate(TableName=ledger.table().name, **request)
    return [row for page in pages for row in page["Items"]]


def describe(source: Row) -> str:
    if source["status"] == "REJECTED":
        return f"{source['key']}: {source['reason']}"
    if source["status"] == "READING":
        return f"{source['key']}: read to {source['parts_read']} of {source['parts']} parts"
    told = f", {source['rejected']} lines are none (label-reports/ says why)" if source["rejected"] else ""
    return f"{source['key']}: {source['labels']} labels{told}"


def tell(title: str, lines: list[str], limit: int | None) -> None:
    if not lines:
        return
    print(f"\n{title} ({len(lines)})")
    for line in lines[:limit]:
        print(f"  {cell(line)}")
    if limit and len(lines) > limit:
        print(f"  … and {len(lines) - limit} more; --all lists them")


if __name__ == "__main__":
    sys.exit(main())
