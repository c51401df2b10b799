"""Parts of the service that need no emulator."""

import asyncio
import json
import signal
import sys

import pytest

from local.sagemaker import host
from local.sagemaker.errors import ValidationException
from local.sagemaker.jobs import CHUNK, LogFollower, MetricReader, check_metric_definitions
from local.sagemaker.processes import Processes
from local.sagemaker.store import page


def test_pages_of_records_that_were_made_in_one_moment_hold_each_once():
    records = [{"CreationTime": 100.0, "Name": f"t{number}"} for number in (3, 1, 4, 0, 2)]
    for order in ("Ascending", "Descending"):
        request, found = {"MaxResults": 2, "SortOrder": order}, []
        while True:
            shown, token = page(records, request, "Name")
            found += [item["Name"] for item in shown]
            if not token:
                break
            request["NextToken"] = token
        assert found == sorted(found, reverse=order == "Descending") and len(found) == 5
    with pytest.raises(ValidationException, match="Invalid pagination token"):
        page(records, request | {"SortOrder": "Ascending"}, "Name")


def test_metrics_are_read_from_the_log_and_the_last_value_stays():
    reader = MetricReader([{"Name": "acc", "Regex": r"acc=([0-9\.]+);"}], "Test", {})
    for lines in (["acc=0.5; loss=1", "nothing"], ["acc=...; broken", "acc=0.75;"], ["nothing"]):
        reader(lines)
    assert [(item["MetricName"], item["Value"]) for item in reader.final()] == [("acc", 0.75)]
    with pytest.raises(ValidationException, match="no capturing group"):
        check_metric_definitions([{"Name": "a", "Regex": "a"}])


@pytest.mark.parametrize(
    ("principal", "trusted"),
    [
        ({"Service": "sagemaker.amazonaws.com"}, True),
        ({"Service": ["states.amazonaws.com", "sagemaker.amazonaws.com"]}, True),
        ({"Service": "lambda.amazonaws.com"}, False),
        ({"AWS": "arn:aws:iam::000000000000:root"}, False),
        ("*", False),
    ],
)
def test_a_job_needs_a_role_that_trusts_sagemaker(principal, trusted):
    statement = {"Effect": "Allow", "Principal": principal, "Action": "sts:AssumeRole"}
    assert host.trusts({"Statement": statement}, "sagemaker.amazonaws.com") is trusted
    assert host.trusts(json.dumps({"Statement": [statement]}), "sagemaker.amazonaws.com") is trusted


def test_a_flood_in_a_log_arrives_whole_and_lets_others_work(tmp_path, monkeypatch):
    log = tmp_path / "log"
    lines = [f"{number:07d}" for number in range(3 * CHUNK // 8)]
    log.write_text("\n".join(lines) + "\n" + "=" * 2 * CHUNK + "\nno newline at the end")
    seen, turns, sent = [], [], []

    async def put(group, stream, texts):
        sent.append(len(turns))

    async def nothing(*_):
        pass

    async def other():
        while True:
            turns.append(None)
            await asyncio.sleep(0)

    async def follow():
        work = asyncio.create_task(other())
        async with LogFollower(log, "group", "stream", seen.extend):
            pass
        work.cancel()

    monkeypatch.setattr(host, "put_log_lines", put)
    monkeypatch.setattr(host, "open_log_stream", nothing)
    asyncio.run(follow())
    assert seen[: len(lines)] == lines and seen[-1] == "no newline at the end"
    assert "".join(seen[len(lines) : -1]) == "=" * 2 * CHUNK
    assert len(set(sent)) > 3


def test_a_process_whose_start_was_given_up_is_ended(settings, tmp_path):
    async def give_up() -> int:
        processes = Processes(settings)
        sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
        try:
            start = asyncio.create_task(processes.spawn(sleeper, {}, tmp_path, tmp_path / "log"))
            while not processes._known:
                await asyncio.sleep(0.001)
            [process] = processes._known.values()
            start.cancel()
            return await asyncio.wait_for(process.wait(), 10)
        finally:
            processes.close()

    assert asyncio.run(give_up()) == -signal.SIGKILL
