"""Step Functions' service integrations as real API calls: what a Task's resource means, and what it answers.

Two families differ in their conventions. `arn:aws:states:::aws-sdk:<service>:<action>` is AWS's SDK for Java 2: any
service, timestamps in ISO 8601, errors `S3.NoSuchKeyException`, and `<Service>.<Service>Exception` for those that the
service's model does not name. `arn:aws:states:::<service>:<action>` is an older, optimized integration: timestamps in
milliseconds (as public outputs of `glue:startJobRun.sync` have them, where Glue itself answers in seconds), errors
`SageMaker.AmazonSageMakerException`, and `.sync` to wait for a job. Nothing here knows the emulator; `stepfunctions.py`
supplies the clients, with the credentials of the state machine's role.

https://docs.aws.amazon.com/step-functions/latest/dg/supported-services-awssdk.html
https://docs.aws.amazon.com/step-functions/latest/dg/integrate-optimized.html
"""

from __future__ import annotations

import functools
import json
import re
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from botocore.client import BaseClient
from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError
from botocore.session import Session

MAX_RESULT_BYTES = 256 * 1024  # service quota: maximum input or output of a task, as UTF-8
POLL_SECONDS = 0.5  # AWS learns of a job's end from EventBridge; here its description is read this often
MANAGED_TAG = {"Key": "MANAGED_BY_AWS", "Value": "STARTED_BY_STEP_FUNCTIONS"}

# Step Functions names services as the SDK for Java does; these are the ones that botocore calls otherwise.
BOTOCORE_NAMES = {
    "cloudwatchlogs": "logs",
    "eventbridge": "events",
    "sfn": "stepfunctions",
    "states": "stepfunctions",
}
# Prefix and base exception of the optimized integrations, which use the SDK for Java 1.
OPTIMIZED_ERRORS = {
    "codebuild": ("CodeBuild", "AWSCodeBuildException"),
    "dynamodb": ("DynamoDB", "AmazonDynamoDBException"),
    "events": ("EventBridge", "AmazonEventBridgeException"),
    "lambda": ("Lambda", "AWSLambdaException"),
    "sagemaker": ("SageMaker", "AmazonSageMakerException"),
    "sns": ("SNS", "AmazonSNSException"),
    "sqs": ("SQS", "AmazonSQSException"),
    "states": ("StepFunctions", "AWSStepFunctionsException"),
}
# The SDK for Java renames a member that is a reserved word of Step Functions' JSON.
RENAMED_MEMBERS = {("AttributeValue", "Nul"): "NULL"}
SHOWN_MEMBERS = {(shape, wire): shown for (shape, shown), wire in RENAMED_MEMBERS.items()}

ClientFactory = Callable[[str], BaseClient]


class TaskError(Exception):
    """A task failed: `error` is the name that Retry and Catch match, `cause` the text beside it."""

    def __init__(self, error: str, cause: str) -> None:
        super().__init__(f"{error}: {cause}")
        self.error, self.cause = error, cause


@functools.cache  # botocore reads a folder of four hundred services, and every look at a job asks
def botocore_names() -> dict[str, str]:
    """botocore's names of all services, by Step Functions' names."""
    return {name.replace("-", ""): name for name in Session().get_available_services()} | BOTOCORE_NAMES


@dataclass(frozen=True)
class Integration:
    """A Task's resource, taken apart."""

    service: str  # as in the ARN
    action: str  # as in the ARN: camelCase
    optimized: bool
    sync: str = ""  # "", "sync" or "sync:2"

    @property
    def botocore_service(self) -> str:
        """The name of the service's client in botocore."""
        if self.service not in botocore_names():
            raise TaskError("States.Runtime", f"The service '{self.service}' is not known to botocore.")
        return botocore_names()[self.service]

    @property
    def operation(self) -> str:
        """The name of the API operation."""
        return self.action[0].upper() + self.action[1:]


def parse(resource: str) -> Integration:
    """Take apart `arn:aws:states:::[aws-sdk:]<service>:<action>[.sync[:2]]` (a callback suffix is ignored).

    Raises:
        TaskError: `States.Runtime`, the ARN is not one of a service integration.
    """
    found = re.fullmatch(
        r"arn:[^:]+:states:[^:]*:[^:]*:(aws-sdk:)?([^:]+):([A-Za-z0-9]+)(?:\.(sync(?::2)?|waitForTaskToken))?", resource
    )
    if not found:
        raise TaskError("States.Runtime", f"The resource '{resource}' is not a service integration.")
    sdk, service, action, pattern = found.groups()
    return Integration(service, action, not sdk, pattern if pattern and pattern.startswith("sync") else "")


# --- Values: Step Functions' JSON to botocore's parameters, and back -------------------------------------------------


def to_request(value: Any, shape: Any) -> Any:
    """Parameters as botocore wants them: members by their API names, whole numbers as integers, JSON text for
    objects given where the API takes a string.

    Raises:
        TaskError: `States.Runtime` in AWS's words, the API has no such field.
    """
    kind = shape.type_name
    if value is None:
        return None
    if kind == "structure" and isinstance(value, dict):
        members = {name.lower(): name for name in shape.members}
        request = {}
        for name, given in value.items():
            member = RENAMED_MEMBERS.get((shape.name, name)) or members.get(name.lower())
            if member is None:
                raise TaskError("States.Runtime", f'The field "{name}" is not supported by Step Functions')
            request[member] = to_request(given, shape.members[member])
        return request
    if kind == "list" and isinstance(value, list):
        return [to_request(item, shape.member) for item in value]
    if kind == "map" and isinstance(value, dict):
        return {key: to_request(item, shape.value) for key, item in value.items()}
    if kind in ("integer", "long") and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind in ("float", "double") and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind == "string" and not isinstance(value, str):
        return json.dumps(value, separators=(",", ":"))
    if kind == "blob":
        return (value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))).encode()
    return value


def from_response(value: Any, shape: Any, optimized: bool) -> Any:
    """A response as Step Functions shows it: PascalCase members, timestamps by family, bodies as text."""
    kind = shape.type_name if shape else ""
    if isinstance(value, datetime):
        moment = value.astimezone(UTC)
        if optimized:
            return int(moment.timestamp() * 1000)
        return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"
    if kind == "structure" and isinstance(value, dict):
        return {
            SHOWN_MEMBERS.get((shape.name, name), name[0].upper() + name[1:]): from_response(
                item, shape.members.get(name), optimized
            )
            for name, item in value.items()
            if name != "ResponseMetadata"
        }
    if kind == "list":
        return [from_response(item, shape.member, optimized) for item in value]
    if kind == "map":
        return {key: from_response(item, shape.value, optimized) for key, item in value.items()}
    if hasattr(value, "read"):
        value = value.read(MAX_RESULT_BYTES + 1)  # more is refused, however much it is
    if isinstance(value, (bytes, bytearray)):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            return b64encode(value).decode()
    return value


# --- Errors ----------------------------------------------------------------------------------------------------------


def java_name(service_id: str) -> str:
    """A service id as the SDK for Java 2 spells it: DynamoDB is DynamoDb, SQS is Sqs, SageMaker stays."""
    words = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+", service_id)
    return "".join(word.capitalize() for word in words)


def error_name(integration: Integration, client: BaseClient, code: str) -> str:
    """The name of an API error in Retry and Catch. Step Functions adds the suffix Exception to names without it."""
    model: Any = client.meta.service_model
    if integration.optimized:
        prefix, unmodelled = OPTIMIZED_ERRORS.get(
            integration.service, (java_name(model.service_id), f"Amazon{model.service_id}Exception")
        )
    else:
        prefix = java_name(model.service_id)
        unmodelled = f"{prefix}Exception"
    # HEAD answers have no body: the model names the error by its status alone.
    aliases = {"404": "NoSuchKey"} if model.service_name == "s3" and integration.action == "headObject" else {}
    wanted = aliases.get(code, code)
    for shape in model.error_shapes:
        if wanted in (shape.error_code, shape.name):
            name = shape.name.removesuffix("Fault") if shape.name.endswith("Fault") else shape.name
            return f"{prefix}.{name}" + ("" if name.endswith("Exception") else "Exception")
    return f"{prefix}.{unmodelled}"


def _api_error(integration: Integration, client: BaseClient, error: ClientError) -> TaskError:
    details = error.response.get("Error", {})
    metadata = error.response.get("ResponseMetadata", {})
    code, message = details.get("Code", "Unknown"), details.get("Message", "")
    status, request = metadata.get("HTTPStatusCode", 0), metadata.get("RequestId", "")
    name = error_name(integration, client, code)
    if integration.optimized:
        service = name.split(".")[0]
        cause = (
            f"{message} (Service: {service}; Status Code: {status}; Error Code: {code}; "
            f"Request ID: {request}; Proxy: null)"
        )
    else:
        cause = f"{message} (Service: {name.split('.')[0]}, Status Code: {status}, Request ID: {request})"
    return TaskError(name, cause)


# --- Calls -----------------------------------------------------------------------------------------------------------


def call(integration: Integration, parameters: Any, clients: ClientFactory) -> dict:
    """Make one API call and return its answer as Step Functions shows it.

    Raises:
        TaskError: with the error name of the integration's family.
    """
    client = clients(integration.botocore_service)
    model = client.meta.service_model
    if integration.operation not in model.operation_names:
        raise TaskError(
            "States.Runtime", f"The resource action '{integration.service}:{integration.action}' is not recognized."
        )
    operation = model.operation_model(integration.operation)
    request = to_request(parameters or {}, operation.input_shape) if operation.input_shape else {}
    method = next(name for name, api in client.meta.method_to_api_mapping.items() if api == integration.operation)
    try:
        response = getattr(client, method)(**request)
        result = from_response(response, operation.output_shape, integration.optimized) or {}
    except ParamValidationError as error:
        raise TaskError("States.Runtime", f"{error} (in {integration.service}:{integration.action})") from None
    except ClientError as error:
        raise _api_error(integration, client, error) from None
    except BotoCoreError as error:
        prefix = java_name(model.service_id)
        raise TaskError(f"{prefix}.SdkClientException", str(error)) from None
    result.pop("ResponseMetadata", None)
    if integration.optimized:
        metadata = response.get("ResponseMetadata", {})
        result["SdkHttpMetadata"] = {"HttpStatusCode": metadata.get("HTTPStatusCode")}
        result["SdkResponseMetadata"] = {"RequestId": metadata.get("RequestId")}
        if integration.service == "events" and result.get("FailedEntryCount"):
            raise TaskError("EventBridge.FailedEntry", json.dumps(result))
    return result


def invoke_lambda(function: str, payload: Any, clients: ClientFactory, parameters: dict | None = None) -> dict:
    """Invoke a function by the optimized integration; the answer's `Payload` is parsed.

    Raises:
        TaskError: with the error type that the function raised, and the whole error as JSON in the cause.
    """
    request = {**(parameters or {}), "FunctionName": function, "Payload": {} if payload is None else payload}
    # A payload that is a JSON string stays one: it is quoted here, because a blob's text is sent as it is.
    if isinstance(request["Payload"], str):
        request["Payload"] = json.dumps(request["Payload"])
    result = call(Integration("lambda", "invoke", optimized=True), request, clients)
    text = result.get("Payload") or ""
    try:
        result["Payload"] = json.loads(text) if text else None
    except ValueError:
        result["Payload"] = text
    if result.pop("FunctionError", None):
        details = result["Payload"]
        name = details.get("errorType") if isinstance(details, dict) else None
        raise TaskError(name or "Lambda.Unknown", text)
    return result


# --- Jobs (.sync) ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A job that `.sync` waits for: how to describe it, how to stop it, and when it has succeeded or failed."""

    describe: Callable[[], dict]  # the job's description, as the task's result
    stop: Callable[[], None]
    status: Callable[[dict], str]
    succeeded: frozenset[str]
    failed: frozenset[str]


def run_job(
    integration: Integration,
    parameters: dict,
    clients: ClientFactory,
    pause: Callable[[float], None],
    interrupted: type[BaseException] | tuple[type[BaseException], ...],
    submitted: Callable[[dict], None] = lambda answer: None,
) -> dict:
    """Start a job, wait for its end, and return its description.

    `pause(seconds)` is the wait between two looks, and raises one of `interrupted` when the execution has been
    stopped or the task has timed out; the job is then stopped too, as AWS does. `submitted` is told the answer to the
    call that started the job.

    Raises:
        TaskError: `States.TaskFailed`, the job failed or was stopped; the cause is its description as JSON.
    """
    if integration.service == "sagemaker":
        parameters = {**parameters, "Tags": [*(parameters.get("Tags") or []), MANAGED_TAG]}
    started = call(Integration(integration.service, integration.action, optimized=True), parameters, clients)
    submitted(started)
    job = _job(integration, parameters, started, clients)
    try:
        while True:
            description = job.describe()
            status = job.status(description)
            if status in job.succeeded:
                return description
            if status in job.failed:
                raise TaskError("States.TaskFailed", json.dumps(description))
            pause(POLL_SECONDS)
    except interrupted:
        job.stop()
        raise
    except TaskError as error:
        if error.error != "States.TaskFailed":  # it could not be looked at: the retry that follows starts another
            job.stop()
        raise


def _job(integration: Integration, parameters: dict, started: dict, clients: ClientFactory) -> Job:
    service = integration.service

    def api(action: str, **request: Any) -> dict:
        return call(Integration(service, action, optimized=True), request, clients)

    def stop_quietly(action: str, **request: Any) -> None:
        with suppress(TaskError):  # it ended by itself meanwhile
            api(action, **request)

    if service == "sagemaker":
        kind = integration.operation.removeprefix("Create")  # TrainingJob, ProcessingJob, HyperParameterTuningJob, …
        name = {f"{kind}Name": parameters[f"{kind}Name"]}
        return Job(
            describe=lambda: api(f"describe{kind}", **name),
            stop=lambda: stop_quietly(f"stop{kind}", **name),
            status=lambda job: job[f"{kind}Status"],
            succeeded=frozenset({"Completed"}),
            failed=frozenset({"Failed", "Stopped"}),
        )
    if service == "codebuild":
        build = started["Build"]["Id"]
        return Job(
            describe=lambda: {"Build": api("batchGetBuilds", Ids=[build])["Builds"][0]},
            stop=lambda: stop_quietly("stopBuild", Id=build),
            status=lambda answer: answer["Build"]["BuildStatus"],
            succeeded=frozenset({"SUCCEEDED"}),
            failed=frozenset({"FAILED", "FAULT", "STOPPED", "TIMED_OUT"}),
        )
    if service == "states":
        execution = started["ExecutionArn"]

        def describe() -> dict:
            answer = api("describeExecution", ExecutionArn=execution)
            if integration.sync == "sync:2" and answer.get("Output"):
                answer["Output"] = json.loads(answer["Output"])
            return answer

        return Job(
            describe=describe,
            stop=lambda: stop_quietly("stopExecution", ExecutionArn=execution),
            status=lambda answer: answer["Status"],
            succeeded=frozenset({"SUCCEEDED"}),
            failed=frozenset({"FAILED", "TIMED_OUT", "ABORTED"}),
        )
    raise TaskError("States.Runtime", f"The service '{service}' has no .sync integration here.")


def invoke(
    resource: str,
    parameters: Any,
    clients: ClientFactory,
    pause: Callable[[float], None],
    interrupted: type[BaseException] | tuple[type[BaseException], ...],
    submitted: Callable[[dict], None] = lambda answer: None,
) -> Any:
    """Run one Task resource: a function's ARN, or a service integration (see `run_job` for the last three).

    Raises:
        TaskError: the task failed. Whatever `pause` raises is passed on.
    """
    if re.match(r"arn:[^:]+:lambda:", resource):
        result = invoke_lambda(resource, parameters, clients)["Payload"]
    else:
        integration = parse(resource)
        if not isinstance(parameters or {}, dict):
            raise TaskError("States.Runtime", f"The arguments of '{resource}' must be a JSON object.")
        if integration.optimized and integration.service == "lambda" and integration.action == "invoke":
            given = dict(parameters or {})
            result = invoke_lambda(given.pop("FunctionName", ""), given.pop("Payload", None), clients, given)
        elif integration.sync:
            result = run_job(integration, dict(parameters or {}), clients, pause, interrupted, submitted)
        else:
            result = call(integration, parameters, clients)
    if len(json.dumps(result, ensure_ascii=False).encode()) > MAX_RESULT_BYTES:
        raise TaskError(
            "States.DataLimitExceeded",
            f"The task '{resource}' returned a result with a size exceeding the maximum number of bytes service limit.",
        )
    return result
