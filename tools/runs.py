"""Shows the retraining runs and what they decided, starts and stops them, and goes back to an earlier model.

    python tools/runs.py list
    python tools/runs.py show 261122101500
    python tools/runs.py deployments
    python tools/runs.py champion
    python tools/runs.py start --force
    python tools/runs.py stop
    python tools/runs.py back
    python tools/runs.py back 261120081500 --why "the new one takes pugs for boxers"

Works on whatever account or emulator boto3 is pointed at; `--stack` names another stack than houndloop.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from boto3.dynamodb.conditions import Key
from botocore.exceptions import ClientError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, it finds its siblings so

from tools import stack
from tools.stack import Progress, ToolError, cell, client, print_table

Item = dict[str, Any]
POLL_SECONDS = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", default="houndloop", help="name of the CloudFormation stack (houndloop)")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("list", help="the runs, newest first: how each ended, and why")
    command.add_argument("--limit", type=int, default=20, help="so many at most (20)")
    command = commands.add_parser("show", help="all about one run: verdict, findings, its way through the workflow")
    command.add_argument("run", nargs="?", help="its RunId, as the list shows it (the newest)")
    commands.add_parser("deployments", help="what was ever deployed, newest first, and how that ended")
    commands.add_parser("champion", help="the model that is live")
    command = commands.add_parser("start", help="start a run by hand")
    command.add_argument("--force", action="store_true", help="also if this very dataset was trained already")
    command.add_argument("--snapshot", metavar="HASH", help="train on this snapshot again, as it was")
    command.add_argument("--why", default="", help="your reason, for those who read it later")
    command = commands.add_parser("stop", help="stop the run that is at work; the champion stays")
    command.add_argument("--why", default="stopped by hand", help="your reason")
    command = commands.add_parser("back", help="go back to an earlier approved model, guarded as every deployment")
    command.add_argument(
        "version", nargs="?", help="model version or number of a deployment (the model before this one)"
    )
    command.add_argument("--why", default="asked for by hand", help="your reason")
    command.add_argument("--no-wait", action="store_true", help="start it, and do not wait for its end")
    arguments = parser.parse_args()
    return stack.run(lambda: work(Loop(stack.outputs(arguments.stack)), arguments))


def work(loop: "Loop", arguments: argparse.Namespace) -> int:
    if arguments.command == "list":
        return show_runs(loop, arguments.limit)
    if arguments.command == "show":
        return show_run(loop, arguments.run)
    if arguments.command == "deployments":
        return show_deployments(loop)
    if arguments.command == "champion":
        return show_champion(loop)
    if arguments.command == "start":
        given = {"trigger": "hand", "why": arguments.why, "force": arguments.force}
        return start(loop, given | ({"snapshot": arguments.snapshot} if arguments.snapshot else {}))
    if arguments.command == "stop":
        return stop(loop, arguments.why)
    return back(loop, arguments.version, arguments.why, wait=not arguments.no_wait)


class Loop:
    """A stack's runs and deployments, as the LoopState table and Step Functions know them."""

    def __init__(self, outputs: dict[str, str]) -> None:
        self.table = stack.table(outputs["LoopStateTableName"])
        self.machine, self.artifacts = outputs["RetrainStateMachineArn"], outputs["ArtifactBucketName"]
        self.states = client("stepfunctions")

    def item(self, pk: str, sk: str) -> Item | None:
        return self.table.get_item(Key={"pk": pk, "sk": sk}, ConsistentRead=True).get("Item")

    def items(self, pk: str) -> Iterator[Item]:
        """All items of a kind, the newest first: run ids and numbers of deployments sort so."""
        query: dict[str, Any] = {"KeyConditionExpression": Key("pk").eq(pk), "ScanIndexForward": False}
        while True:
            answer = self.table.query(**query, ConsistentRead=True)
            yield from answer["Items"]
            if "LastEvaluatedKey" not in answer:
                return
            query["ExclusiveStartKey"] = answer["LastEvaluatedKey"]

    def at_work(self) -> Item | None:
        """The lock of the run that is at work."""
        return self.item("lock", "lock")

    def status(self, execution: str) -> str:
        """What Step Functions says of an execution; empty where it knows none."""
        try:
            return self.states.describe_execution(executionArn=execution)["status"]
        except ClientError as error:
            if error.response["Error"]["Code"] != "ExecutionDoesNotExist":
                raise
            return ""

    def document(self, key: str) -> dict[str, Any] | None:
        """A JSON document of a run, if there is one."""
        try:
            return json.loads(client("s3").get_object(Bucket=self.artifacts, Key=key)["Body"].read())
        except ClientError as error:
            if error.response["Error"]["Code"] in ("NoSuchKey", "AccessDenied"):
                return None
            raise

    def link(self, execution: str) -> str:
        """To the console's graph of an execution."""
        if os.environ.get("AWS_ENDPOINT_URL"):  # AWS on this machine has no console
            return execution
        region = self.states.meta.region_name
        return f"https://{region}.console.aws.amazon.com/states/home?region={region}#/v2/executions/details/{execution}"


# --- What there is ---------------------------------------------------------------------------------------------------


def show_runs(loop: Loop, limit: int) -> int:
    lock = loop.at_work()
    rows = [(lock["run"], "AT WORK", "", f"since {lock['since']}")] if lock else []
    for item in loop.items("run"):
        if len(rows) >= limit:
            break
        if not (lock and item["sk"] == lock["run"]):
            rows.append((item["sk"], item["outcome"], item.get("trigger", ""), item["message"]))
    print_table(("run", "outcome", "trigger", "why"), rows)
    return 0


def show_deployments(loop: Loop) -> int:
    champion = loop.item("champion", "champion") or {}
    rows = [
        (
            str(item["deployment"]) + (" *" if item["deployment"] == champion.get("deployment") else ""),
            item["model_version"],
            item["outcome"],
            f"{float(item['accuracy']):.1%}",
            item["precision"],
            item.get("ended_at") or item.get("began_at", ""),
            item.get("message", ""),
        )
        for item in loop.items("deployment")
    ]
    print_table(("deployment", "model", "outcome", "accuracy", "precision", "ended", "why"), rows)
    if champion:
        print("* is live")
    return 0


def show_champion(loop: Loop) -> int:
    champion = loop.item("champion", "champion")
    if champion is None:
        print("No model is live yet.")
        return 0
    for name in ("model_version", "deployment", "since", "accuracy", "precision", "verdict", "classes"):
        print(f"{name:<14} {cell(champion.get(name, ''))}")
    for name in ("endpoint_config", "model_package", "artifact", "evaluation", "dataset_hash"):
        print(f"{name:<14} {cell(champion.get(name, ''))}")
    return 0


def show_run(loop: Loop, run: str | None) -> int:
    lock = loop.at_work()
    if run is None:
        newest = lock["run"] if lock else next((item["sk"] for item in loop.items("run")), None)
        if newest is None:
            raise ToolError("There was no run yet.")
        run = newest
    item = loop.item("run", run) or {}
    execution = item.get("execution") or (lock["holder"] if lock and lock["run"] == run else "")
    if not execution:
        raise ToolError(f"There is no run {run}; `python tools/runs.py list` shows what there is.")
    print(f"run        {run}: {item.get('outcome', 'AT WORK')}")
    for name in ("message", "note", "trigger", "why", "dataset_hash", "report"):
        if item.get(name):
            print(f"{name:<10} {cell(item[name])}")
    if item.get("recommendation", "{}") != "{}":
        print(f"advice     {cell(item['recommendation'])}")
    print(f"link       {loop.link(execution)}")
    for deployment in loop.items("deployment"):
        if deployment.get("run") == run:
            print(
                f"deployment {deployment['deployment']}: {deployment['outcome']} {cell(deployment.get('message', ''))}"
            )
    if verdict := loop.document(f"runs/{run}/verdict.json"):
        print(f"verdict    {cell(verdict['sentence'])} (s3://{loop.artifacts}/runs/{run}/verdict.json)")
    if findings := loop.document(f"runs/{run}/findings.json"):
        found = [rule["rule"] for rule in findings["rules"] if rule["status"] == "IssuesFound"]
        print(f"findings   {', '.join(found) or 'none'}{'; they block' if findings['blocking'] else ''}")
    print()
    show_timeline(loop, execution)
    return 0


def show_timeline(loop: Loop, execution: str) -> None:
    """The states of an execution, with when each began and how long it took; what is repeated in a loop, once."""
    try:
        pages = loop.states.get_paginator("get_execution_history").paginate(
            executionArn=execution, includeExecutionData=False
        )
        events = [event for page in pages for event in page["events"]]
    except ClientError as error:
        if error.response["Error"]["Code"] != "ExecutionDoesNotExist":
            raise
        print("Step Functions no longer has its history.")
        return
    for name, began, seconds, times in timeline(events):
        often = f"  {times} times" if times > 1 else ""
        print(f"  {began:%H:%M:%S}  {seconds:8.1f} s  {name}{often}")


def timeline(events: list[dict[str, Any]]) -> list[tuple[str, datetime, float, int]]:
    """States in the order of their first entry: name, when, seconds in all, how often."""
    found: dict[str, tuple[datetime, float, int]] = {}
    entered = [(e["stateEnteredEventDetails"]["name"], e["timestamp"]) for e in events if "Entered" in e["type"]]
    ends = [moment for _, moment in entered[1:]] + [events[-1]["timestamp"]] if events else []
    for (name, moment), end in zip(entered, ends, strict=True):
        first, seconds, times = found.get(name, (moment, 0.0, 0))
        found[name] = first, seconds + (end - moment).total_seconds(), times + 1
    return [(name, *rest) for name, rest in found.items()]


# --- What can be done ------------------------------------------------------------------------------------------------


def start(loop: Loop, given: dict[str, Any]) -> int:
    refuse_while_at_work(loop)
    started = loop.states.start_execution(stateMachineArn=loop.machine, name=name_of("hand"), input=json.dumps(given))
    print(f"Started: {loop.link(started['executionArn'])}")
    return 0


def stop(loop: Loop, why: str) -> int:
    """Stop the run that holds the lock. end_run hears of it, and sees to what it leaves."""
    lock = loop.at_work()
    if lock is None:
        print("No run is at work.")
        return 0
    if loop.status(lock["holder"]) != "RUNNING":
        print(f"The run {lock['run']} has ended. It is cleaned up after within the hour, or by the next run.")
        return 1
    loop.states.stop_execution(executionArn=lock["holder"], cause=why)
    progress = Progress("its jobs are being stopped, and the endpoint is seen to")
    while (now := loop.at_work()) and now["holder"] == lock["holder"]:
        progress.show(0)
        time.sleep(POLL_SECONDS)
    progress.end()
    print(
        f"Stopped the run {lock['run']}."
        + (f" {now['holder'].rpartition(':')[2]} sees to the endpoint." if now else "")
    )
    return 0


def back(loop: Loop, version: str | None, why: str, *, wait: bool) -> int:
    """Deploy an earlier model again; 1 where that did not succeed."""
    refuse_while_at_work(loop)
    target = choose(list(loop.items("deployment")), loop.item("champion", "champion"), version)
    print(f"Going back to the model {target['model_version']} of deployment {target['deployment']}.")
    given = {"trigger": "back", "why": why, "deploy": int(target["deployment"])}
    execution = loop.states.start_execution(
        stateMachineArn=loop.machine, name=name_of("back"), input=json.dumps(given)
    )["executionArn"]  # fmt: skip
    print(loop.link(execution))
    return follow(loop, execution) if wait else 0


def choose(deployments: list[Item], champion: Item | None, version: str | None) -> Item:
    """The deployment to go back to, of those there were, newest first.

    It is the last before the champion's that made another model live; or the newest of the model, or the number, that
    is named.

    Raises:
        ToolError: there is none.
    """
    live = champion or {}
    if version is None:
        others = [
            d for d in deployments if d["outcome"] == "PROMOTED" and d["model_version"] != live.get("model_version")
        ]
        before = [d for d in others if not live or d["deployment"] < live["deployment"]]
        if not before:
            raise ToolError("There is no earlier model: `python tools/runs.py deployments` shows what there is.")
        return before[0]
    named = [d for d in deployments if version in (d["model_version"], str(d["deployment"]))]
    # What was promoted once is known to have come up; a deployment that failed is only a last resort.
    promoted = [d for d in named if d["outcome"] == "PROMOTED"] or named
    if not promoted:
        raise ToolError(f"{version} was never deployed: `python tools/runs.py deployments` shows what there is.")
    return promoted[0]


def refuse_while_at_work(loop: Loop) -> None:
    """A run that has ended with the lock is no obstacle: the next one has it cleaned up after."""
    if (lock := loop.at_work()) and loop.status(lock["holder"]) == "RUNNING":
        raise ToolError(f"The run {lock['run']} is at work: wait for it, or `python tools/runs.py stop`.")


def name_of(kind: str) -> str:
    """A name for an execution: one a second is enough for a person."""
    return f"{kind}-{datetime.now(UTC):%Y%m%d%H%M%S}"


def follow(loop: Loop, execution: str) -> int:
    """Say in which state an execution is until it ends; 0 if it ended well."""
    progress, seen = Progress("states"), ""
    while (run := loop.states.describe_execution(executionArn=execution))["status"] == "RUNNING":
        last = loop.states.get_execution_history(
            executionArn=execution, reverseOrder=True, maxResults=20, includeExecutionData=False
        )["events"]
        state = next((e["stateEnteredEventDetails"]["name"] for e in last if "Entered" in e["type"]), "")
        if state != seen:
            seen = state
            progress.show(int(last[0]["id"]), f"in {state}")
        time.sleep(POLL_SECONDS)
    progress.end()
    if run["status"] == "SUCCEEDED":
        output = json.loads(run["output"])
        print(f"{output['outcome']}: {cell(output['why'])}")
        return 0
    print(f"{run['status']}: {cell(run.get('cause') or run.get('error', ''))}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
