"""Looks up what became of pictures, as a table, CSV or JSON; docs/querying.md says which query each of these is.

    python tools/query.py picture dog.jpg --history
    python tools/query.py class beagle --from 2026-11-01 --to 2026-11-22
    python tools/query.py day 2026-11-22
    python tools/query.py review --limit 50
    python tools/query.py status REJECTED

Days are UTC, today without --from. Works on whatever account or emulator boto3 is pointed at.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from boto3.dynamodb.conditions import Key

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, it finds its siblings so

from tools import stack

STATUSES = ("CLASSIFIED", "WAITING", "REJECTED", "FAILED")
COLUMNS = ("updated_at", "status", "label", "confidence", "model_version", "key", "reason")

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", default="houndloop", help="name of the CloudFormation stack (houndloop)")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("picture", help="a picture's newest answer")
    command.add_argument("key", help="its key, with or without inbox/")
    command.add_argument("--history", action="store_true", help="all that it was ever told, by every model")
    command = commands.add_parser("class", help="what was classified as this, newest first")
    command.add_argument("name")
    _days(command)
    command = commands.add_parser("status", help="what waits, was rejected or failed, and why; or was classified")
    command.add_argument("name", choices=STATUSES)
    _days(command)
    command = commands.add_parser("day", help="everything of a day, newest first within each status")
    command.add_argument("first", nargs="?", type=date.fromisoformat, help="the day (today)")
    commands.add_parser("review", help="what awaits review, least confident first")
    for command in commands.choices.values():
        command.add_argument("--limit", type=int, default=100, help="rows at most (100); 0 for all")
        command.add_argument("--format", choices=("table", "csv", "json"), default="table")
    arguments = parser.parse_args()
    return stack.run(lambda: show(arguments))


def _days(command: argparse.ArgumentParser) -> None:
    command.add_argument("--from", dest="first", type=date.fromisoformat, metavar="DAY", help="first day (today)")
    command.add_argument("--to", dest="last", type=date.fromisoformat, metavar="DAY", help="last day (today)")


def show(arguments: argparse.Namespace) -> int:
    outputs = stack.outputs(arguments.stack)
    rows = select(stack.table(outputs["PredictionsTableName"]), outputs["DataBucketName"], arguments)
    limit = arguments.limit or None
    found = list(islice(rows, limit))
    write(found, arguments.format)
    if limit and len(found) == limit and next(rows, None):
        print(f"There are more than {limit}; --limit 0 shows all.", file=sys.stderr)
    return 0


def select(table: Any, bucket: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """The rows that are asked for. One query each, or one for each day asked for."""
    if arguments.command == "picture":
        image = f"{bucket}/inbox/{arguments.key.removeprefix('inbox/')}"
        if arguments.history:
            return pages(table, KeyConditionExpression=Key("image").eq(image), ScanIndexForward=False)
        row = table.get_item(Key={"image": image, "version": "current"}).get("Item")
        return iter([row] if row else [])
    if arguments.command == "review":
        return pages(table, IndexName="for-review", KeyConditionExpression=Key("review").eq("review"))
    today = datetime.now(UTC).date()
    if arguments.command == "day":
        return by_day(table, "by-status", "status_day", STATUSES, arguments.first or today, arguments.first or today)
    index, attribute = ("by-class", "class_day") if arguments.command == "class" else ("by-status", "status_day")
    return by_day(table, index, attribute, (arguments.name,), arguments.first or today, arguments.last or today)


def by_day(table: Any, index: str, attribute: str, names: tuple[str, ...], first: date, last: date) -> Iterator[Row]:
    """The rows of a class, or of statuses, newest day first."""
    for back in range((last - first).days + 1):
        day = (last - timedelta(days=back)).isoformat()
        for name in names:
            yield from pages(
                table,
                IndexName=index,
                KeyConditionExpression=Key(attribute).eq(f"{name}#{day}"),
                ScanIndexForward=False,
            )


def pages(table: Any, **query: Any) -> Iterator[Row]:
    """The rows of a query, page after page as they are wanted."""
    while True:
        answer = table.query(**query)
        yield from answer["Items"]
        if "LastEvaluatedKey" not in answer:
            return
        query["ExclusiveStartKey"] = answer["LastEvaluatedKey"]


def write(rows: list[Row], format: str) -> None:
    if format == "json":
        json.dump(rows, sys.stdout, indent=2, ensure_ascii=False, default=float)
        print()
    elif format == "csv":
        writer = csv.DictWriter(sys.stdout, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    elif not rows:
        print("Nothing.")
    else:
        stack.print_table(COLUMNS, ([row.get(column, "") for column in COLUMNS] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
