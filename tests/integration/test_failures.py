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
from tests.integration.test_workflow import ANSWERS, ARTIFACTS, SCALING, Workflow, findings, found, with_answers
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
# Each task of the endpoint as one on that item: the call, its arguments, and SageMaker's answer made of the item.
ENDPOINT = {
    "FindEndpoint": ("getItem", TABLE | {"Key": ROW}, LISTED),
    "FindLive": ("getItem", TABLE | {"Key": ROW}, LISTED),
    "ReadLive": ("getItem", TABLE | {"Key": ROW}, DESCRIBED),
    "ReadEndpoint": ("getItem", TABLE | {"Key": ROW}, DESCRIBED),
    "DescribeEndpoint": ("getItem", TABLE | {"Key": ROW}, DESCRIBED),
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
RECOVERY = {"trigger": "recovery", "why": "it died", "recover": {"run": "2", "attempt": 1}}
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
    "half made": Scenario([row("loop-3")], RECOVERY | {"deploy": None}),
}  # fmt: skip


# --- Failures --------------------------------------------------------------------------------------------------------

ABORTED, TIMED_OUT = "ABORTED", "TIMED_OUT"
LOST = "States.Timeout"  # of a call that was heeded: its answer is lost, again and again
JOB_FAILED = json.dumps({"ProcessingJobStatus": "Failed", "FailureReason": "the data is wrong"})


def errors_of(name: str) -> list[str]:
    """What a task can meet: each error that it names, one that nobody thought of, a lost answer, an abort."""
    named = [e for part in ("Retry", "Catch") for rule in STATES[name].get(part, []) for e in rule["ErrorEquals"][:1]]
    found = {error: None for error in named if not error.startswith("States.")}
    return [*found, "States.TaskFailed", LOST, "ValueError", ABORTED]


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
        here = f"{{% $states.context.Execution.Name = '{FIRST}' %}}"
        states[failing] = {"Type": "Choice", "Choices": [{"Condition": here, "Next": breaks}], "Default": works}
        states["Hang"] = {"Type": "Wait", "Seconds": 600, "Next": "Done"}
    if error == TIMED_OUT:
        whole["TimeoutSeconds"] = 12
    return json.dumps(whole)


def broken(state: dict[str, Any], name: str, error: str) -> dict[str, Any]:
    """A task that fails, with its own retries and catches; or that is heeded, and then nothing comes."""
    if error in (ABORTED, TIMED_OUT):
        return state | {"Next": "Hang"}
    of_job = error == "States.TaskFailed" and STATES[name]["Resource"].endswith(".sync")
    cause = JOB_FAILED if of_job else f"the {error}"
    fails = {"Type": "Fail", "Error": error, "Cause": cause}
    branch: dict[str, Any] = {"StartAt": "Fails", "States": {"Fails": fails}}
    if error == LOST and state["Type"] == "Task":
        heeded = {part: state[part] for part in ("Type", "Resource", "Arguments")}
        branch = {"StartAt": "Heeded", "States": {"Heeded": heeded | {"Next": "Fails"}, "Fails": fails}}
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
                (last,) = self.states.get_execution_history(
                    executionArn=execution, reverseOrder=True, maxResults=1
                )["events"]  # fmt: skip
                if last.get("stateEnteredEventDetails", {}).get("name") == "Hang":
                    self.states.stop_execution(executionArn=execution, cause="somebody stopped it")
            # A recovery that began in the same second would have the same RunId; on AWS no deployment is so quick.
            if run["status"] == "RUNNING" or time.time() < int(run["startDate"].timestamp()) + 1.1:
                continue
            self.pending.remove(execution)
            self.ended[execution] = run
            if run["status"] != "SUCCEEDED":
                self.end(execution, run["status"])
        return not self.pending

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
        resource: Any = boto3.resource("dynamodb", endpoint_url=emulator.endpoint_url, **one.keys)
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
    assert name in this.visited(this.first), "the failure was not met"
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
        assert name == "FreeLock" or recorded[this.first]["outcome"] in ("FAILED", error)
    if error in ("ValueError", "States.TaskFailed") and run["status"] == "FAILED" and name != "FreeLock":
        assert name in messages[0]["why"] or name == "TakeLock"
        if STATES[name]["Resource"].endswith(".sync") and error == "States.TaskFailed":
            assert messages[0]["why"] == f"{name}: the data is wrong"


def check(case: Case) -> None:
    """What holds after whatever happened: the lock is free, the champion serves, the records are true."""
    assert case.all("lock") == []
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
    for execution, run in case.ended.items():
        identity = run["startDate"].astimezone(UTC).strftime("%y%m%d%H%M%S")
        outcomes = {item["outcome"] for item in deployments.values() if item["run"] == identity}
        visited = case.visited(execution)
        if run["status"] == "SUCCEEDED" or outcomes & {"PROMOTED", "ROLLED_BACK"} or "FreeLock" in visited:
            continue
        assert case.failing == "TakeLock" or any(identity in job for job in case.sagemaker.stopped)
        assert recovered or {"sk": f"loop-{identity}", "pk": "model"} not in case.all("model")
