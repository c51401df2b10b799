"""Works on the inbox: shows its backlog, sends failed messages again, replays pictures, finds those that were lost.

    python tools/inbox.py backlog
    python tools/inbox.py redrive [--labels]
    python tools/inbox.py reconcile
    python tools/inbox.py replay --review
    python tools/inbox.py replay --failed --from 2026-11-20
    python tools/inbox.py replay --class beagle --from 2026-11-01 --to 2026-11-22

Works on whatever account or emulator boto3 is pointed at; `--stack` names another stack than houndloop.
"""

import argparse
import json
import sys
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "functions")]  # as a script, it finds its siblings so, and what fills the queue

from common.inbox import LEVELS, MAX_BACKLOG, MAX_BATCH  # noqa: E402
from tools import stack  # noqa: E402
from tools.stack import Progress, ToolError, client  # noqa: E402

DEAD_LETTERS_KEPT = timedelta(days=14)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", default="houndloop", help="name of the CloudFormation stack (houndloop)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("backlog", help="what is queued, and what failed for good")
    command = commands.add_parser("redrive", help="send what is in the dead-letter queue back to where it came from")
    command.add_argument("--labels", action="store_true", help="of labels and runs, not of the inbox")
    command = commands.add_parser("reconcile", help="find pictures whose event was lost, and enqueue them")
    command.add_argument(
        "--min-age", type=int, default=900, metavar="SECONDS", help="leave younger pictures alone (900)"
    )
    command.add_argument("--no-wait", action="store_true", help="start it, and do not wait for its end")
    command = commands.add_parser("replay", help="classify pictures again with the model that is live")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--review", action="store_true", help="what the model was unsure of, least confident first")
    which.add_argument("--waiting", action="store_true", help="what waits for a model")
    which.add_argument("--failed", action="store_true", help="what failed (the last two weeks', without --from)")
    which.add_argument("--rejected", action="store_true", help="what was rejected, for after a limit was raised")
    which.add_argument("--classified", action="store_true", help="everything that was classified")
    which.add_argument("--class", dest="class_", metavar="CLASS", help="what was classified as this")
    which.add_argument("--resume", metavar="JSON", help="go on with a replay that was stopped, as it said")
    command.add_argument(
        "--from", dest="first", type=day, metavar="DAY", help="its rows' first day, as 2026-11-22 (UTC)"
    )
    command.add_argument("--to", dest="last", type=day, metavar="DAY", help="the last day (today)")
    arguments = parser.parse_args()
    if arguments.command == "replay" and not arguments.first:
        if arguments.failed:
            arguments.first = (datetime.now(UTC) - DEAD_LETTERS_KEPT).date().isoformat()
        elif arguments.rejected or arguments.classified or arguments.class_:
            parser.error("say from which day on, as in --from 2026-11-22")
    return stack.run(lambda: work(arguments))


def day(text: str) -> str:
    """A day as argparse's type."""
    return date.fromisoformat(text).isoformat()


def work(arguments: argparse.Namespace) -> int:
    outputs = stack.outputs(arguments.stack)
    if arguments.command == "backlog":
        return show_backlog(outputs)
    if arguments.command == "redrive":
        return redrive(outputs["LabelDeadLettersUrl" if arguments.labels else "InboxDeadLettersUrl"])
    if arguments.command == "reconcile":
        return reconcile(outputs, arguments.min_age, wait=not arguments.no_wait)
    return replay(outputs, selection(arguments))


def levels(queue: str) -> dict[str, int]:
    """How many messages a queue holds, by what they do."""
    answer = client("sqs").get_queue_attributes(QueueUrl=queue, AttributeNames=list(LEVELS))["Attributes"]
    names = ("waiting", "in the works", "put back")
    return {name: int(answer[level]) for name, level in zip(names, LEVELS, strict=True)}


def show_backlog(outputs: dict[str, str]) -> int:
    for name, count in levels(outputs["InboxQueueUrl"]).items():
        print(f"{name:<20} {count:>8}")
    print(f"{'dead letters':<20} {sum(levels(outputs['InboxDeadLettersUrl']).values()):>8}")
    print(f"{'of labels and runs':<20} {sum(levels(outputs['LabelDeadLettersUrl']).values()):>8}")
    return 0


# --- Redrive ---------------------------------------------------------------------------------------------------------


def redrive(queue: str) -> int:
    """Move every message of a dead-letter queue back to the queue, or the function, that it failed in.

    Each is sent before it is deleted: a crash in between delivers it twice, which changes nothing, and loses nothing.
    """
    sqs = client("sqs")
    progress = Progress("messages sent again", sum(levels(queue).values()))
    moved, seen, unknown = 0, set[str](), 0
    started = time.time()
    while True:
        received = sqs.receive_message(
            QueueUrl=queue,
            MaxNumberOfMessages=MAX_BATCH,
            WaitTimeSeconds=2,
            VisibilityTimeout=60,
            AttributeNames=["All"],
            MessageAttributeNames=["All"],
        ).get("Messages", [])
        # What failed again meanwhile is left for the next time, or this would never end.
        fresh = [
            message
            for message in received
            if message["MessageId"] not in seen and int(message["Attributes"]["SentTimestamp"]) / 1000 <= started + 60
        ]
        if not fresh:
            break
        for message in fresh:
            seen.add(message["MessageId"])
            if send_back(message):
                sqs.delete_message(QueueUrl=queue, ReceiptHandle=message["ReceiptHandle"])
                moved += 1
            else:
                unknown += 1
        progress.show(moved)
    progress.end()
    print(f"{moved} messages were sent again." if moved or unknown else "There are no dead letters.")
    if unknown:
        print(f"{unknown} stay in the queue: nothing in them says where they came from.", file=sys.stderr)
    return 1 if unknown else 0


def send_back(message: dict[str, Any]) -> bool:
    """Send a dead letter to where it failed; says no when it does not tell where that was."""
    kind, target, body = origin(message)
    if kind == "sqs":
        sqs = client("sqs")
        sqs.send_message(QueueUrl=sqs.get_queue_url(QueueName=target)["QueueUrl"], MessageBody=body)
    elif kind == "lambda":
        client("lambda").invoke(FunctionName=target, InvocationType="Event", Payload=body.encode())
    return bool(kind)


def origin(message: dict[str, Any]) -> tuple[str, str, str]:
    """What service a dead letter failed in, the name of its queue or function, and what is to be sent there.

    SQS notes the queue from which it moved a message, EventBridge the target that it could not reach, and what Lambda
    writes about a function that failed wraps the event.
    """
    body = message["Body"]
    arn = message["Attributes"].get("DeadLetterQueueSourceArn")
    arn = arn or message.get("MessageAttributes", {}).get("TARGET_ARN", {}).get("StringValue")
    if not arn:
        try:
            record = json.loads(body)
            arn, body = record["requestContext"]["functionArn"], json.dumps(record["requestPayload"])
        except (ValueError, KeyError, TypeError):
            return "", "", body
    parts = arn.split(":")  # arn:aws:sqs:region:account:queue, arn:aws:lambda:region:account:function:name
    return (parts[2], parts[6] if parts[2] == "lambda" else parts[5], body) if len(parts) > 5 else ("", "", body)


# --- Reconciliation --------------------------------------------------------------------------------------------------


def reconcile(outputs: dict[str, str], min_age: int, *, wait: bool) -> int:
    """Start a walk through the inbox, and follow it; one that is on its way already is followed instead."""
    table = stack.table(outputs["LoopStateTableName"])
    item = lambda: table.get_item(Key={"pk": "reconcile", "sk": "walk"}, ConsistentRead=True).get("Item", {})  # noqa: E731
    before = item()
    message = json.dumps({"started_by": "command", "min_age_seconds": min_age})
    client("sqs").send_message(QueueUrl=outputs["ReconcileQueueUrl"], MessageBody=message)
    if not wait:
        print("Started; it goes on by itself.")
        return 0
    progress = Progress("pictures seen")
    running = bool(before) and "ended_at" not in before
    while True:
        walk = item()
        if running or walk.get("walk") != before.get("walk"):
            waiting = sum(levels(outputs["InboxQueueUrl"]).values())
            progress.show(int(walk["seen"]), f"{walk['enqueued']} of them were lost, {waiting} in the inbox's queue")
            if "ended_at" in walk:
                break
        time.sleep(1)
    progress.end()
    print(f"{walk['seen']} pictures were looked at; {walk['enqueued']} were lost, and are in the queue now.")
    return 0


# --- Replay ----------------------------------------------------------------------------------------------------------


def selection(arguments: argparse.Namespace) -> dict[str, Any]:
    """What replay_images takes."""
    if arguments.resume:
        return json.loads(arguments.resume)
    days = {name: value for name, value in (("from", arguments.first), ("to", arguments.last)) if value}
    if arguments.review:
        return {"review": True}
    if arguments.class_:
        return {"class": arguments.class_} | days
    status = next(name for name in ("waiting", "failed", "rejected", "classified") if getattr(arguments, name))
    return {"status": status.upper()} | days


def replay(outputs: dict[str, str], asked: dict[str, Any]) -> int:
    """Send the selected pictures through the inbox again, page by page, no faster than they are classified."""
    progress = Progress("pictures sent again")
    try:
        while True:
            while (waiting := sum(levels(outputs["InboxQueueUrl"]).values())) > MAX_BACKLOG:
                progress.show(asked.get("sent", 0), f"{waiting} in the inbox's queue: waiting")
                time.sleep(5)
            answer = client("lambda").invoke(FunctionName=outputs["ReplayImagesName"], Payload=json.dumps(asked))
            payload = json.loads(answer["Payload"].read())
            if answer.get("FunctionError"):
                raise ToolError(f"{payload.get('errorType')}: {payload.get('errorMessage')}")
            asked = payload
            progress.show(asked["sent"], f"{waiting} in the inbox's queue")
            if asked["next"] is None:
                break
    except BaseException:
        progress.end()
        if asked.get("next"):
            print(f"Go on later with: replay --resume '{json.dumps(asked)}'", file=sys.stderr)
        raise
    progress.end()
    print(f"{asked['sent']} pictures were sent again.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
