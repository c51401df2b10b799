"""Every task of the workflow fails, in every way that it can: what is then live, locked, recorded and told.

The cases come from the definition, so that a new task is among them, and fails here until a scenario reaches it. The
local Step Functions runs the definition with its own retries and catches; tables and topic are real, jobs and functions
answered (see `Workflow`), and the endpoint is an item that changes as SageMaker's would. When an execution has ended
badly, end_run's handler gets the event, as EventBridge would deliver it, and what it starts runs to its end, too.
"""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from common import aws as functions_aws
from end_run import app as end_run
from local.emulator import Emulator
from tests.integration import test_workflow as workflow_tests
from tests.integration.test_workflow import ANSWERS, ARTIFACTS, KEYS, SCALING, Workflow, findings, found, with_answers
from tests.makers.waiting import wait_for

STATES: dict[str, dict[str, Any]] = json.loads(workflow_tests.DEFINITION)["States"]
TASKS = [name for name, state in STATES.items() if state["Type"] == "Task"]
CONTEXT = SimpleNamespace(
    function_name="f", memory_limit_in_mb=128, invoked_function_arn="arn:aws:lambda:us-east-1:1:function:f",
    aws_request_id="r",
)  # fmt: skip
FIRST = "first"  # the name of the execution in which something fails; what end_run starts is whole

# --- The endpoint: an item that a few looks later is where the last change leads -------------------------------------

ROW = {"pk": {"S": "endpoint"}, "sk": {"S": "endpoint"}}
NOW = "$states.result.Item"
LIVE = f"($number({NOW}.looks.N) >= 2 and {NOW}.wanted.S != {NOW}.broken.S ? {NOW}.wanted.S : {NOW}.former.S)"
STATUS = (
    f"($number({NOW}.looks.N) < 2 ? ({NOW}.former.S = '' ? 'Creating' : 'Updating') "
    f": {LIVE} = '' ? 'Failed' : 'InService')"
)
LISTED = f"{{'Endpoints': $exists({NOW}) ? [{{'EndpointName': 'loop', 'EndpointStatus': {STATUS}}}] : []}}"
DESCRIBED = (
    f"{{'EndpointStatus': {STATUS}, 'EndpointConfigName': {LIVE}, 'ProductionVariants': "
    "[{'VariantName': 'AllTraffic', 'DesiredInstanceCount': 3}]}"
)
CONFIG = "{% '${Name}-' & $runId %}"
TABLE = {"TableName": "${LoopStateTable}"}
TIME_PASSES = (
    "updateItem",
    TABLE
    | {
        "Key": ROW,
        "UpdateExpression": "ADD looks :one",
        "ConditionExpression": "attribute_exists(pk)",
        "ExpressionAttributeValues": {":one": {"N": "1"}},
    },
    "{}",
)
DELETE = ("deleteItem", TABLE | {"Key": ROW}, "{}")
LOCK = {"pk": {"S": "lock"}, "sk": {"S": "lock"}}
# Of a run that has ended.
DEAD = LOCK | {
    "holder": {"S": "arn:aws:states:us-east-1:000000000000:execution:loop-retrain:dead"}, "run": {"S": "2"},
    "since": {"S": "2026-01-01T00:00:00.000Z"},
}  # fmt: skip
MEETING_ANOTHER = {"TakeLock", "ReadLock", "DescribeHolder", "EndHolder"}  # who fails there never had the lock
# Each task of the endpoint as one on that item: the call, its arguments, and SageMaker's answer made of the item.
ENDPOINT = {
    "FindEndpoint": ("getItem", TABLE | {"Key": ROW}, LISTED),
    "FindLive": ("getItem", TABLE | {"Key": ROW}, LISTED),
    "ReadLive": ("getItem", TABLE | {"Key": ROW}, DESCRIBED),
    "ReadEndpoint": ("getItem", TABLE | {"Key": ROW}, DESCRIBED),
    "DescribeEndpoint": ("getItem", TABLE | {"Key": ROW}, DESCRIBED),
    "EndHolder": ("deleteItem", TABLE | {"Key": LOCK}, "{}"),
    "DeleteHalfMade": DELETE,
    "DeleteFailedEndpoint": DELETE,
    "ProbeEndpoint": TIME_PASSES,
    "CreateModel": ("putItem", TABLE | {"Item": {"pk": {"S": "model"}, "sk": {"S": CONFIG}}}, "{}"),
    "CreateEndpoint": (
        "putItem",
        TABLE
        | {"Item": ROW | {"former": {"S": ""}, "wanted": {"S": CONFIG}, "broken": {"S": "-"}, "looks": {"N": "0"}}},
        "{}",
    ),
    "UpdateEndpoint": (
        "updateItem",
        TABLE
        | {
            "Key": ROW,
            "UpdateExpression": "SET former = wanted, wanted = :new, looks = :zero, broken = :broken",
            "ExpressionAttributeValues": {
                ":new": {"S": CONFIG},
                ":zero": {"N": "0"},
                ":broken": {"S": "{% '${Breaks}' = 'yes' and $recover = null ? '${Name}-' & $runId : '-' %}"},
            },
        },
        "{}",
    ),
}


def row(config: str, broken: str = "-") -> dict[str, Any]:
    return ROW | {"former": {"S": ""}, "wanted": {"S": config}, "broken": {"S": broken}, "looks": {"N": "2"}}


# --- Scenarios: ways through the workflow, which between them come by every task -------------------------------------

MODEL = {
    "model_version": {"S": "1"}, "artifact": {"S": f"s3://{ARTIFACTS}/runs/1/model.tar.gz"}, "image": {"S": "image"},
    "model_package": {"S": "arn:1"}, "dataset_hash": {"S": "c"}, "classes": {"S": '["b"]'}, "preprocess": {"S": "{}"},
    "accuracy": {"N": "0.8"}, "precision": {"S": "f32"}, "verdict": {"S": "better"}, "evaluation": {"S": "s3://e"},
    "endpoint": {"S": "loop"},
}  # fmt: skip


def deployed(number: int, **place: str) -> dict[str, Any]:
    """The item of a deployment of the model 1, or the champion's."""
    item = MODEL | {"deployment": {"N": str(number)}, "run": {"S": str(number)}}
    item |= {"endpoint_config": {"S": f"loop-{number}"}, "outcome": {"S": "PROMOTED"}}
    return item | {name: {"S": value} for name, value in place.items()}


CHAMPION = [
    deployed(2, pk="champion", sk="champion"),
    deployed(2, pk="deployment", sk="000002"),
    deployed(1, pk="deployment", sk="000001"),
    {"pk": {"S": "counter"}, "sk": {"S": "deployment"}, "last": {"N": "2"}},
    row("loop-2"),
]


@dataclass
class Scenario:
    items: list[dict[str, Any]]
    input: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)


NO_IMAGE = ANSWERS["PublishSources"].replace("'image': 'image'", "'image': null")
HALF = {"run": "2", "outcome": "ABORTED"}
RECOVERY = {"trigger": "recovery", "why": "it died", "recover": {"run": "2", "attempt": 1, "runs": ["2"]}}
SCENARIOS = {
    "update": Scenario(CHAMPION),
    "first": Scenario([], answers={"PublishSources": NO_IMAGE, "FindServingImage": ANSWERS["PublishSources"]}),
    "scales": Scenario(
        [
            *CHAMPION,
            {
                "pk": {"S": "training"}, "sk": {"S": "last"}, "run": {"S": "2"}, "advice": {"S": "{}"},
                "instance_type": {"S": "ml.c5.xlarge"}, "prepared": {"S": f"s3://{ARTIFACTS}/runs/2/prepared"},
            },
        ],
        answers={
            "FindScaling": "{'ScalableTargets': [{}]}",
            "ReadEndpointConfig": "{'ProductionVariants': "
            "[{'VariantName': 'AllTraffic', 'InstanceType': 'ml.m5.large'}]}",
        },
        values=SCALING,
    ),
    "failed endpoint": Scenario([row("loop-0", broken="loop-0")]),
    "breaks": Scenario(CHAMPION, values={"Breaks": "yes"}),
    "rejected": Scenario(
        CHAMPION, answers={"Judge": ANSWERS["Judge"].replace("'promote': true", "'promote': false")}
    ),
    "back": Scenario(
        CHAMPION, {"deploy": 1, "why": "it was better"}, {"ReadApproval": "{'ModelApprovalStatus': 'Approved'}"}
    ),
    "half made": Scenario(
        [row("loop-3"), deployed(3, pk="deployment", sk="000003", **HALF)], RECOVERY | {"deploy": None}
    ),
    "dead holder": Scenario([*CHAMPION, DEAD], answers={"DescribeHolder": "{'Status': 'FAILED'}"}),
}  # fmt: skip


# --- Failures --------------------------------------------------------------------------------------------------------

ABORTED, TIMED_OUT = "ABORTED", "TIMED_OUT"
LOST = "States.Timeout"  # of a call that was heeded: its answer is lost, again and again
JOB_FAILED = json.dumps({"ProcessingJobStatus": "Failed", "FailureReason": "Error", "ExitMessage": "the data is wrong"})
NO_CAPACITY = (
    "CapacityError: Unable to provision requested ML compute capacity. Please retry using a different ML instance"
)


def errors_of(name: str) -> list[str]:
    """What a task can meet: each error that it names, one that nobody thought of, a lost answer, an abort."""
    named = [e for part in ("Retry", "Catch") for rule in STATES[name].get(part, []) for e in rule["ErrorEquals"][:1]]
    found = {error: None for error in named if not error.startswith("States.")}
    job = ["States.TaskFailed"] if STATES[name]["Resource"].endswith(".sync") else []
    return [*found, *job, LOST, "ValueError", ABORTED]


CASES = [(name, error) for name in TASKS for error in errors_of(name)]
# Whoever times out is treated as whoever is aborted; one case for each stage of a deployment.
CASES += [(name, TIMED_OUT) for name in ("Tune", "RecordDeployment", "UpdateEndpoint", "Promote")]


def definition(values: dict[str, str], scenario: Scenario, failing: str = "", error: str = "") -> str:
    """The workflow with its jobs, functions and endpoint answered, and one task that fails in the first execution."""
    whole = json.loads(with_answers(ANSWERS | found(findings()) | scenario.answers, values, real=ENDPOINT))
    states = whole["States"]
    substituted = lambda part: json.loads(re.sub(r"\$\{(\w+)\}", lambda m: values[m[1]], json.dumps(part)))  # noqa: E731
    waits = {name: TIME_PASSES for name, state in states.items() if state["Type"] == "Wait" and "Recover" not in name}
    for name, (call, arguments, answer) in (ENDPOINT | waits).items():
        assign = json.dumps(states[name].get("Assign", {})).replace("$states.result", answer)
        task = {"Type": "Task", "Resource": f"arn:aws:states:::dynamodb:{call}", "Arguments": substituted(arguments)}
        catch = {"Catch": [{"ErrorEquals": ["States.ALL"], "Next": states[name]["Next"]}]} if name in waits else {}
        kept = {part: value for part, value in states[name].items() if part != "Seconds"}
        states[name] = kept | task | {"Assign": json.loads(assign)} | catch
    for state in states.values():
        for rule in state.get("Retry", []):
            rule |= {"IntervalSeconds": 0}
    if failing:
        works, breaks = f"{failing} works", f"{failing} breaks"
        states[works] = states[failing]
        states[breaks] = broken(states[failing], failing, error)
        here = f"{{% '${{Always}}' = 'yes' or $states.context.Execution.Name = '{FIRST}' %}}"
        here = here.replace("${Always}", values.get("Always", "no"))
        states[failing] = {"Type": "Choice", "Choices": [{"Condition": here, "Next": breaks}], "Default": works}
        states["Hang"] = {"Type": "Wait", "Seconds": 600, "Next": "Done"}
    if error == TIMED_OUT:
        whole["TimeoutSeconds"] = 12
    return json.dumps(whole)


def broken(state: dict[str, Any], name: str, error: str) -> dict[str, Any]:
    """A task that fails, with its own retries and catches; or that is heeded, and then nothing comes."""
    if error in (ABORTED, TIMED_OUT):
        return state | {"Next": "Hang"}
    cause = JOB_FAILED if error == "States.TaskFailed" else f"the {error}"
    if error == NO_CAPACITY:
        error, cause = "States.TaskFailed", json.dumps({"FailureReason": NO_CAPACITY})
    # Within the branch, too, the state has the name that the catch puts into the reason.
    fails = {"Type": "Fail", "Error": error, "Cause": cause}
    branch: dict[str, Any] = {"StartAt": name, "States": {name: fails}}
    if error == LOST and state["Type"] == "Task":
        heeded = {part: state[part] for part in ("Type", "Resource", "Arguments")}
        branch = {"StartAt": "Heeded", "States": {"Heeded": heeded | {"Next": name}, name: fails}}
    rules = {part: json.loads(json.dumps(STATES[name][part])) for part in ("Retry", "Catch")}
    for rule in rules["Retry"]:
        rule["IntervalSeconds"] = 0
    return {"Type": "Parallel", "Branches": [branch], "Next": state["Next"]} | rules


class SageMaker:
    """What end_run asks of SageMaker: jobs that run, and the endpoint and models of the case's table."""

    def __init__(self, case: "Case") -> None:
        self.case, self.stopped = case, list[str]()

    def _jobs(self, key: str, name: str, made: str) -> dict[str, Any]:
        return {key: [{name: made}]}

    def list_hyper_parameter_tuning_jobs(self, NameContains: str, **_: Any) -> dict[str, Any]:
        return self._jobs("HyperParameterTuningJobSummaries", "HyperParameterTuningJobName", f"{NameContains}-0")

    def list_training_jobs(self, NameContains: str, **_: Any) -> dict[str, Any]:
        return self._jobs("TrainingJobSummaries", "TrainingJobName", f"{NameContains}-0")

    def list_processing_jobs(self, NameContains: str, **_: Any) -> dict[str, Any]:
        return self._jobs("ProcessingJobSummaries", "ProcessingJobName", f"{NameContains}-prepare-0")

    def stop_hyper_parameter_tuning_job(self, HyperParameterTuningJobName: str) -> None:
        self.stopped.append(HyperParameterTuningJobName)

    def stop_training_job(self, TrainingJobName: str) -> None:
        self.stopped.append(TrainingJobName)

    def stop_processing_job(self, ProcessingJobName: str) -> None:
        self.stopped.append(ProcessingJobName)

    def describe_endpoint(self, EndpointName: str) -> dict[str, Any]:
        status, config = self.case.endpoint()
        if not status:
            raise _missing(f'Could not find endpoint "{EndpointName}".')
        return {"EndpointStatus": status, "EndpointConfigName": config}

    def delete_endpoint_config(self, EndpointConfigName: str) -> None:
        raise _missing(f'Could not find endpoint configuration "{EndpointConfigName}".')

    def delete_model(self, ModelName: str) -> None:
        key = {"pk": {"S": "model"}, "sk": {"S": ModelName}}
        if not self.case.table.delete_item(TableName=self.case.name, Key=key, ReturnValues="ALL_OLD").get("Attributes"):
            raise _missing(f'Could not find model "{ModelName}".')


def _missing(text: str) -> ClientError:
    return ClientError({"Error": {"Code": "ValidationException", "Message": text}}, "Describe")


class Case(Workflow):
    """One failure: a table, a state machine, its executions until nothing runs, and what is there then."""

    def begin(self, scenario: Scenario, failing: str = "", error: str = "") -> None:
        self.failing, self.error, self.sagemaker = failing, error, SageMaker(self)
        for item in scenario.items:
            self.table.put_item(TableName=self.name, Item=item)
        values = self.values(**{"Breaks": "no"} | scenario.values)
        self.machine = self.states.create_state_machine(
            name=self.name, definition=definition(values, scenario, failing, error), roleArn=self.role
        )["stateMachineArn"]
        self.first = self.states.start_execution(
            stateMachineArn=self.machine, name=FIRST, input=json.dumps(scenario.input)
        )["executionArn"]
        self.pending, self.ended = [self.first], dict[str, dict[str, Any]]()

    def advance(self) -> bool:
        """See what has ended, and have end_run called as EventBridge would; says whether all has."""
        for execution in list(self.pending):
            run = self.states.describe_execution(executionArn=execution)
            if run["status"] == "RUNNING" and self.error == ABORTED and execution == self.first:
                self.stop_if_it_hangs()
            if run["status"] == "RUNNING":
                continue
            self.pending.remove(execution)
            self.ended[execution] = run
            if run["status"] != "SUCCEEDED":
                self.end(execution, run["status"])
        return not self.pending

    def stop_if_it_hangs(self) -> None:
        history = self.states.get_execution_history(executionArn=self.first, reverseOrder=True, maxResults=1)
        if history["events"][0].get("stateEnteredEventDetails", {}).get("name") == "Hang":
            self.states.stop_execution(executionArn=self.first, cause="somebody stopped it")

    def end(self, execution: str, status: str) -> dict[str, Any]:
        detail = {"executionArn": execution, "stateMachineArn": self.machine, "status": status}
        current.case = self
        answer = end_run.handler({"detail": detail}, CONTEXT)
        if recovery := answer.get("recovery"):
            self.pending.append(execution.rpartition(":")[0] + ":" + recovery)
        return answer

    def finish(self) -> None:
        wait_for(self.advance, 60)

    def visited(self, execution: str) -> list[str]:
        pages = self.states.get_paginator("get_execution_history").paginate(executionArn=execution)
        events = [event for page in pages for event in page["events"]]
        return [e["stateEnteredEventDetails"]["name"].removesuffix(" breaks") for e in events if "Entered" in e["type"]]

    def all(self, pk: str) -> list[dict[str, Any]]:
        answer = self.table.query(
            TableName=self.name, KeyConditionExpression="pk = :pk", ExpressionAttributeValues={":pk": {"S": pk}}
        )
        return [{name: next(iter(value.values())) for name, value in item.items()} for item in answer["Items"]]

    def endpoint(self) -> tuple[str, str]:
        """Status and live configuration, as SageMaker would describe them; empty where there is no endpoint."""
        if not (rows := self.all("endpoint")):
            return "", ""
        (item,) = rows
        done = int(item["looks"]) >= 2
        live = item["wanted"] if done and item["wanted"] != item["broken"] else item["former"]
        if not done:
            return "Updating" if item["former"] else "Creating", live
        return "InService" if live else "Failed", live


class Current:
    """Whose turn it is: end_run's clients are this case's."""

    case: Case


current = Current()


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    with Emulator(state=tmp_path_factory.mktemp("aws")) as emulator, pytest.MonkeyPatch.context() as patch:
        one = Case(emulator)
        clients = {"stepfunctions": one.states, "sns": one.client("sns")}
        resource: Any = boto3.resource("dynamodb", endpoint_url=emulator.endpoint_url, **KEYS)
        patch.setenv("NAME", "loop")
        patch.setenv("POWERTOOLS_TRACE_DISABLED", "true")
        patch.setenv("TOPIC", one.topic)
        patch.setattr(functions_aws, "table", lambda _: resource.Table(current.case.name))
        patch.setattr(functions_aws, "client", lambda name: clients.get(name) or current.case.sagemaker)
        yield emulator


class Told:
    """What people were told, by execution."""

    def __init__(self, case: Case) -> None:
        self.sqs = case.client("sqs")
        self.queue = self.sqs.create_queue(QueueName="told")["QueueUrl"]
        arn = self.sqs.get_queue_attributes(QueueUrl=self.queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        allow = {"Effect": "Allow", "Principal": "*", "Action": "sqs:SendMessage", "Resource": arn}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [allow]})
        self.sqs.set_queue_attributes(QueueUrl=self.queue, Attributes={"Policy": policy})
        case.client("sns").subscribe(TopicArn=case.topic, Protocol="sqs", Endpoint=arn)
        self.messages = list[dict[str, Any]]()

    def about(self, execution: str) -> list[dict[str, Any]]:
        while found := self.sqs.receive_message(QueueUrl=self.queue, MaxNumberOfMessages=10).get("Messages", []):
            for message in found:
                self.messages.append(json.loads(json.loads(message["Body"])["Message"]))
                self.sqs.delete_message(QueueUrl=self.queue, ReceiptHandle=message["ReceiptHandle"])
        return [message for message in self.messages if message["execution"] == execution]


@pytest.fixture(scope="module")
def told(aws: Emulator) -> Told:
    return Told(Case(aws))


@pytest.fixture(scope="module")
def reached(aws: Emulator, told: Told) -> dict[str, str]:
    """The first scenario that comes by each state, found by running them all, whole."""
    cases = {name: Case(aws) for name in SCENARIOS}
    for name, case in cases.items():
        case.begin(SCENARIOS[name])
    found = dict[str, str]()
    for name, case in cases.items():
        case.finish()
        ended = case.ended[case.first]
        assert ended["status"] == ("FAILED" if name == "breaks" else "SUCCEEDED"), (name, ended.get("cause"))
        for state in case.visited(case.first):
            found.setdefault(state, name)
    return found


@pytest.fixture(scope="module")
def cases(aws: Emulator, reached: dict[str, str], request: pytest.FixtureRequest) -> dict[tuple[str, str], Case]:
    """All that were asked for, side by side, until nothing runs."""
    wanted = [item.callspec.params["case"] for item in request.session.items if item.name.startswith("test_after[")]
    begun = {key: Case(aws) for key in wanted if key[0] in reached}
    for (name, error), case in begun.items():
        case.begin(SCENARIOS[reached[name]], name, error)
    pending = list(begun.values())
    deadline = time.monotonic() + 300
    while pending:
        assert time.monotonic() < deadline, [(case.failing, case.error) for case in pending]
        pending = [case for case in pending if not case.advance()]
        time.sleep(0.05)
    return begun


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_after(case: tuple[str, str], cases: dict[tuple[str, str], Case], told: Told):
    name, error = case
    assert case in cases, f"no scenario comes by {name}: add one"
    this = cases[case]
    run = this.ended[this.first]
    assert name in this.visited(this.first), f"the failure was not met: {run.get('cause')}"
    if error in (ABORTED, TIMED_OUT):
        assert run["status"] == error
    check(this)

    # People are told of it, why, and where to look; each execution is on record.
    messages = told.about(this.first)
    recorded = {item["execution"]: item for item in this.all("run")}
    if name == "Notify" and run["status"] == "SUCCEEDED":
        assert recorded[this.first]["outcome"] == "PROMOTED"
        return
    assert messages and all(this.first in message["link"] for message in messages)
    if run["status"] != "SUCCEEDED":
        assert all(message["why"] for message in messages)
        before = "RecordRun" in this.visited(this.first)  # what came after it changed nothing about the outcome
        assert name == "FreeLock" or recorded[this.first]["outcome"] in ("FAILED", error, "PROMOTED" if before else "")
    if (
        run["status"] == "FAILED"
        and error not in (LOST, ABORTED, TIMED_OUT)
        and name not in MEETING_ANOTHER | {"FreeLock"}
    ):
        assert messages[0]["why"].startswith(f"{name}: ")
        assert error != "States.TaskFailed" or messages[0]["why"] == f"{name}: Error: the data is wrong"


def check(case: Case) -> None:
    """What holds after whatever happened: the lock is free, the champion serves, the records are true."""
    locks = [lock["holder"] for lock in case.all("lock")]
    assert locks == [] or case.failing in MEETING_ANOTHER and locks == [DEAD["holder"]["S"]]
    champion = (case.all("champion") or [None])[0]
    status, live = case.endpoint()
    if champion is None:
        assert not status or status == "Failed", "what was half made is gone"
    else:
        assert (status, live) == ("InService", champion["endpoint_config"])
    deployments = {item["endpoint_config"]: item for item in case.all("deployment")}
    assert "IN_PROGRESS" not in {item["outcome"] for item in deployments.values()}
    assert champion is None or deployments[champion["endpoint_config"]]["outcome"] == "PROMOTED"
    assert all(item["model_package"] for item in deployments.values())
    # Jobs were stopped of each run that ended with the lock in its hands, and its model is not left behind.
    recovered = len(case.ended) > 1
    assert len({int(run["startDate"].timestamp()) for run in case.ended.values()}) == len(case.ended), "named alike"
    for execution, run in case.ended.items():
        identity = run["startDate"].astimezone(UTC).strftime("%y%m%d%H%M%S")
        outcomes = {item["outcome"] for item in deployments.values() if item["run"] == identity}
        visited = case.visited(execution)
        if run["status"] == "SUCCEEDED" or outcomes & {"PROMOTED", "ROLLED_BACK"} or "FreeLock" in visited:
            continue
        assert case.failing in MEETING_ANOTHER or any(identity in job for job in case.sagemaker.stopped)
        assert recovered or {"sk": f"loop-{identity}", "pk": "model"} not in case.all("model")


# --- After the failure -----------------------------------------------------------------------------------------------


def test_a_recovery_that_cannot_succeed_is_given_up(aws: Emulator, told: Told):
    """Three times, then a person is asked; the lock is free, because the next model may be what helps."""
    case = Case(aws)
    scenario = Scenario(CHAMPION, values={"Always": "yes"})
    case.begin(scenario, "DescribeEndpoint", "ValueError")
    case.finish()
    names = [execution.rpartition(":")[2] for execution in case.ended]
    run = case.ended[case.first]["startDate"].astimezone(UTC).strftime("%y%m%d%H%M%S")
    assert names == [FIRST, *(f"recover-{run}-{attempt}" for attempt in (1, 2, 3))]
    assert case.all("lock") == [] and case.all("champion")[0]["endpoint_config"] == "loop-2"
    assert {item["outcome"] for item in case.all("deployment")[2:]} == {"FAILED"}
    then = [told.about(execution)[0]["then"] for execution in case.ended]
    assert "goes back to deployment 2" in then[0] and then[-1].startswith("GIVEN UP after 3 recoveries")


def without(*places: tuple[str, str | None]) -> list[dict[str, Any]]:
    """The champion's items but those with these keys."""
    keys = [(item["pk"]["S"], item["sk"]["S"]) for item in CHAMPION]
    return [
        item
        for item, (pk, sk) in zip(CHAMPION, keys, strict=True)
        if not any(pk == gone and sk in (which, which or sk) for gone, which in places)
    ]


def test_a_recovery_that_dies_before_its_own_deployment_leaves_the_next_one_to_the_next(aws: Emulator, told: Told):
    """The last deployment is then of the recovery before it, and what is live is nobody's model."""
    case = Case(aws)
    items = [*without(("endpoint", None), ("counter", "deployment")), row("loop-3")]
    items.append({"pk": {"S": "counter"}, "sk": {"S": "deployment"}, "last": {"N": "4"}})
    items.append(deployed(3, pk="deployment", sk="000003", run="3", outcome="ABORTED"))
    items.append(deployed(4, pk="deployment", sk="000004", run="4", outcome="FAILED"))
    recovers = {"run": "3", "attempt": 2, "runs": ["3", "4"]}
    case.begin(Scenario(items, {"trigger": "recovery", "deploy": 2, "recover": recovers}), "FindLive", "ValueError")
    case.finish()
    assert "recover-3-3" in told.about(case.first)[0]["then"]
    check(case)
    last = case.all("deployment")[-1]
    assert (last["deployment"], last["model_version"], last["outcome"]) == ("5", "1", "PROMOTED")


def test_going_back_to_what_is_live_and_is_no_champion_makes_it_one(aws: Emulator):
    case = Case(aws)
    items = [*without(("endpoint", None)), row("loop-3")]
    items.append(deployed(3, pk="deployment", sk="000003", run="3", outcome="FAILED"))
    case.begin(Scenario(items, {"deploy": 3}, SCENARIOS["back"].answers))
    case.finish()
    assert case.endpoint()[1] == case.all("champion")[0]["endpoint_config"] != "loop-3"


def test_the_champion_scales_on_after_an_update_that_was_refused(aws: Emulator):
    case = Case(aws)
    case.begin(SCENARIOS["scales"], "UpdateEndpoint", "ValueError")
    case.finish()
    visited = case.visited(case.first)
    assert visited.index("StopScaling") < visited.index("RegisterScaling")


@pytest.fixture
def aborted(aws: Emulator) -> Case:
    """A run that was aborted when the endpoint had begun to change, before anybody has heard of it."""
    case = Case(aws)
    case.begin(SCENARIOS["update"], "UpdateEndpoint", ABORTED)

    def ended() -> bool:
        run = case.states.describe_execution(executionArn=case.first)
        if run["status"] == "RUNNING":
            case.stop_if_it_hangs()
        return run["status"] == ABORTED

    wait_for(ended, 60)
    case.pending.clear()
    return case


def test_end_run_may_be_called_again_at_any_time(aborted: Case, told: Told):
    first, second = aborted.end(aborted.first, ABORTED), aborted.end(aborted.first, ABORTED)
    assert first["recovery"] and second.get("recovery") in (first["recovery"], None)
    aborted.pending = aborted.pending[:1]
    aborted.finish()
    assert aborted.end(aborted.first, ABORTED) == {"freed": False}
    assert len(told.about(aborted.first)) == 1 and len(aborted.ended) == 1
    check_live(aborted, "loop-2", ABORTED)


@pytest.mark.parametrize("called_for", ["the run", "the holder"])
def test_a_recovery_that_was_promised_the_lock_is_started_by_whoever_comes_next(
    aborted: Case, monkeypatch: pytest.MonkeyPatch, called_for: str
):
    """end_run may die between the two."""
    with monkeypatch.context() as patch:
        patch.setattr(end_run, "begin_recovery", lambda lock: {"freed": False})
        aborted.end(aborted.first, ABORTED)
    (lock,) = aborted.all("lock")
    assert lock["holder"] != aborted.first and json.loads(lock["recovery"])["deploy"] == 2
    aborted.end(aborted.first if called_for == "the run" else lock["holder"], ABORTED)
    assert aborted.pending == [lock["holder"]]
    aborted.finish()
    check_live(aborted, "loop-2", ABORTED)


def check_live(case: Case, config: str, outcome: str) -> None:
    """The champion serves again under a new number; the deployment that was interrupted is on record as that."""
    check(case)
    before, after = case.all("deployment")[-2:]
    assert before["outcome"] == outcome and after["outcome"] == "PROMOTED"
    assert after["model_version"] == "1" and case.all("champion")[0]["deployment"] == after["deployment"] == "4"
    assert "deployment 2" in after["message"] and config != after["endpoint_config"]


def test_a_recovery_leaves_alone_what_is_live_again_by_itself(aws: Emulator, told: Told):
    """As after an update that its alarms rolled back when nobody watched any more."""
    case = Case(aws)
    case.begin(Scenario(CHAMPION, values={"Breaks": "yes"}), "UpdateEndpoint", ABORTED)
    case.finish()
    _, recovery = case.ended
    assert json.loads(case.ended[recovery]["output"])["outcome"] == "RECOVERED"
    assert case.all("champion")[0]["deployment"] == "2" and len(case.all("deployment")) == 3
    check(case)


# --- Going back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "approval", "why"),
    [
        (1, "Rejected", "ReadApproval: NotApproved: the model package arn:1 is Rejected in the registry"),
        (9, "Approved", "ReadDeployment: NoSuchDeployment: there is no deployment 9"),
    ],
)
def test_only_approved_models_are_gone_back_to(aws: Emulator, told: Told, number: int, approval: str, why: str):
    case = Case(aws)
    case.begin(Scenario(CHAMPION, {"deploy": number}, {"ReadApproval": f"{{'ModelApprovalStatus': '{approval}'}}"}))
    case.finish()
    assert case.ended[case.first]["status"] == "FAILED" and told.about(case.first)[0]["why"] == why
    assert len(case.all("deployment")) == 2
    check(case)


def test_what_is_live_already_is_not_deployed_again(aws: Emulator):
    case = Case(aws)
    case.begin(Scenario(CHAMPION, {"deploy": 2}, SCENARIOS["back"].answers))
    case.finish()
    output = json.loads(case.ended[case.first]["output"])
    assert (output["outcome"], output["why"]) == ("NOTHING_NEW", "deployment 2 is live already")


def test_going_back_is_a_deployment_like_any_other(aws: Emulator):
    """With a number, a model and a configuration of its own; what was trained last stays what it was."""
    case = Case(aws)
    case.begin(SCENARIOS["back"])
    case.finish()
    visited = case.visited(case.first)
    assert {"CreateModel", "UpdateEndpoint", "ProbeEndpoint", "Promote", "Replay"} <= set(visited)
    (champion,) = case.all("champion")
    run = json.loads(case.ended[case.first]["output"])["run"]
    assert (champion["model_version"], champion["deployment"]) == ("1", "3")
    assert champion["endpoint_config"] == f"loop-{run}" and champion["artifact"] == MODEL["artifact"]["S"]
    assert case.all("deployment")[-1]["message"] == "back to the model 1 of deployment 1: it was better"
    assert case.all("dataset") == []


@pytest.mark.parametrize(("given", "guarded"), [('{"deploy": 1}', False), ("{}", True)])
def test_alarms_that_ring_already_cannot_judge_a_model_that_was_live(aws: Emulator, given: str, guarded: bool):
    """They ring because of the model that one wants to get away from, and the update would be undone at once."""
    this = Workflow(aws)
    for item in CHAMPION:
        this.table.put_item(TableName=this.name, Item=item)
    cloudwatch = this.client("cloudwatch")
    cloudwatch.put_metric_alarm(
        AlarmName="EndpointErrorsAlarm", Namespace="n", MetricName="m", Period=60, EvaluationPeriods=1, Threshold=1,
        ComparisonOperator="GreaterThanThreshold", Statistic="Sum", TreatMissingData="ignore",
    )  # fmt: skip
    endpoint = "{'Endpoints': [{'EndpointName': 'loop', 'EndpointStatus': 'InService'}]}"
    answers = found(findings()) | SCENARIOS["back"].answers
    answers |= {"FindLive": endpoint, "FindEndpoint": endpoint, "ReadLive": "{'EndpointConfigName': 'loop-2'}"}
    for state, expected in (("OK", True), ("ALARM", guarded)):
        cloudwatch.set_alarm_state(AlarmName="EndpointErrorsAlarm", StateValue=state, StateReason="a test")
        this.run(answers, given=given)
        assert ("AutoRollbackConfiguration" in this.arguments("UpdateEndpoint")["DeploymentConfig"]) is expected
    cloudwatch.delete_alarms(AlarmNames=["EndpointErrorsAlarm"])


# --- No capacity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Prepare", "Evaluate"])
def test_what_sagemaker_lacks_is_asked_for_again_later(aws: Emulator, told: Told, name: str):
    case = Case(aws)
    case.begin(SCENARIOS["update"], name, NO_CAPACITY)
    case.finish()
    visited = case.visited(case.first)
    assert visited.count("WaitForCapacity") == 2 and visited.count(name) == 6, "three times, each as choice and as task"
    assert told.about(case.first)[0]["why"] == f"{name}: {NO_CAPACITY}"
    check(case)


FAILS = "{'TrainingJobStatus': 'Failed', 'FailureReason': 'REASON'}"


@pytest.mark.parametrize(
    ("reason", "times"), [("InternalServerError: try again", 3), ("AlgorithmError: a class without pictures", 1)]
)
def test_a_training_is_repeated_for_lack_of_machines_and_not_for_bad_data(aws: Emulator, reason: str, times: int):
    this = Workflow(aws)
    answers = found(findings()) | {"DescribeTraining": FAILS.replace("REASON", reason)}
    why = this.run(answers, status="FAILED")["why"]
    jobs = [request["TrainingJobName"].rpartition("-")[2] for request in this.requests]
    assert jobs == ["0", "4", "8"][:times] and reason in why


def test_a_job_that_succeeds_in_the_end_has_lost_nothing_but_time(aws: Emulator):
    this = Workflow(aws)
    fails = FAILS.replace("REASON", NO_CAPACITY)
    once = f"$again = 0 ? {fails} : {ANSWERS['DescribeTraining']}"
    assert this.run(found(findings()) | {"DescribeTraining": once})["outcome"] == "PROMOTED"
    assert len(this.requests) == 2 and this.visited.count("WaitForCapacity") == 1
