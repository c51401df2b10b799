"""The seams at work: a small application deployed with the real sam into the local AWS, with IAM enforced."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import boto3
import psutil
import pytest
from botocore.exceptions import ClientError

from local.emulator import CHECKOUT, Emulator, EmulatorError
from local.stack import Stack, runtime
from tests.makers.waiting import wait_for

SMALL = Path(__file__).parent / "small"
DONE = ("SUCCEEDED", "FAILED", "TIMED_OUT", "ABORTED")
WAIT = {"Wait": {"Type": "Wait", "Seconds": 60, "End": True}}


class Application:
    """The deployed small application, with clients of its account."""

    def __init__(self, aws, outputs):
        self.aws, self.outputs = aws, outputs

    def client(self, service, **credentials):
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", **credentials}
        return boto3.client(service, endpoint_url=self.aws.endpoint_url, region_name="us-east-1", **keys)

    def machine(self, states, role=None, logging=None, **top):
        """Create a state machine with the application's role."""
        definition = {"QueryLanguage": "JSONata", "StartAt": next(iter(states)), "States": states, **top}
        created = self.client("stepfunctions").create_state_machine(
            name=f"m{time.monotonic_ns()}",
            definition=json.dumps(definition),
            roleArn=role or self.outputs["MachineRole"],
            **({"loggingConfiguration": logging} if logging else {}),
        )
        return created["stateMachineArn"]

    def start(self, machine, **given):
        return self.client("stepfunctions").start_execution(stateMachineArn=machine, input=json.dumps(given))[
            "executionArn"
        ]

    def result(self, execution, timeout=30.0):
        """The description of an execution that has ended."""
        states = self.client("stepfunctions")

        def ended():
            described = states.describe_execution(executionArn=execution)
            return described if described["status"] in DONE else None

        return wait_for(ended, timeout)

    def run(self, states, **top):
        return self.result(self.start(self.machine(states, **top)))

    def messages(self):
        """What is in the queue, and take it out."""
        queue = self.client("sqs")
        found = []
        while True:
            batch = queue.receive_message(QueueUrl=self.outputs["Queue"], MaxNumberOfMessages=10).get("Messages", [])
            if not batch:
                return found
            for message in batch:
                queue.delete_message(QueueUrl=self.outputs["Queue"], ReceiptHandle=message["ReceiptHandle"])
                found.append(json.loads(message["Body"]))


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with Emulator(state=tmp_path_factory.mktemp("aws")) as aws:
        yield Application(aws, Stack(aws, root=SMALL).deploy())


def test_the_stack_deletes_with_everything_in_it(tmp_path):
    with Emulator(state=tmp_path) as aws:
        stack = Stack(aws, root=SMALL)
        app = Application(aws, stack.deploy())
        cloudformation = app.client("cloudformation")
        cloudformation.delete_stack(StackName=stack.name)
        cloudformation.get_waiter("stack_delete_complete").wait(StackName=stack.name, WaiterConfig={"Delay": 1})
        assert not app.client("lambda").list_functions()["Functions"]
        assert not app.client("sagemaker").list_model_package_groups()["ModelPackageGroupSummaryList"]
        with pytest.raises(ClientError, match="does not exist"):
            stack.outputs()


def task(resource, arguments, **more):
    return {"Type": "Task", "Resource": resource, "Arguments": arguments, "End": True, **more}


# --- Deployment ---


def test_the_deployed_workflow_runs_with_its_layer_parameters_and_tables(app):
    execution = app.start(app.outputs["Machine"], item="one")

    first = app.result(execution)
    assert first["status"] == "SUCCEEDED", first
    assert json.loads(first["output"]) == {"greeting": "HELLO", "item": {"pk": {"S": "one"}, "n": {"N": "5"}}}

    again = app.result(app.start(app.outputs["Machine"], item="one"))
    assert again["status"] == "SUCCEEDED", "the failed condition is caught by its name"


def test_table_settings_of_the_template_are_on(app):
    dynamodb = app.client("dynamodb")
    table = {"TableName": app.outputs["Table"]}
    assert dynamodb.describe_time_to_live(**table)["TimeToLiveDescription"] == {
        "TimeToLiveStatus": "ENABLED",
        "AttributeName": "expires",
    }
    backups = dynamodb.describe_continuous_backups(**table)["ContinuousBackupsDescription"]
    assert backups["PointInTimeRecoveryDescription"]["PointInTimeRecoveryStatus"] == "ENABLED"


def test_what_has_been_built_is_not_built_again(app):
    stack = Stack(app.aws, root=SMALL)
    assert stack.build() is False


@pytest.mark.parametrize("how", ["put", "copy"])
def test_an_object_reaches_the_queue_through_eventbridge_however_it_arrives(app, how):
    s3, bucket = app.client("s3"), app.outputs["Bucket"]
    app.messages()
    key = f"in/ä b+c%20 {how}.jpg"
    if how == "put":
        s3.put_object(Bucket=bucket, Key=key, Body=b"x")
    else:
        s3.put_object(Bucket=bucket, Key="elsewhere", Body=b"x")
        s3.copy_object(Bucket=bucket, Key=key, CopySource={"Bucket": bucket, "Key": "elsewhere"})

    event = wait_for(app.messages)[0]
    assert event["detail"]["object"]["key"] == key


# --- Step Functions: history and logs ---


def log_of(app, group, execution):
    """The log events of one execution, in order."""
    pages = app.client("logs").get_paginator("filter_log_events").paginate(logGroupName=group)
    events = [
        (event["logStreamName"], json.loads(event["message"]))
        for page in pages
        for event in page["events"]
        if event["message"].startswith("{")
    ]
    return [(stream, event) for stream, event in events if event["execution_arn"] == execution]


def test_the_log_of_the_templates_state_machine_holds_the_execution(app):
    execution = app.start(app.outputs["Machine"], item="logged")
    assert app.result(execution)["status"] == "SUCCEEDED"

    logged = log_of(app, app.outputs["MachineLogs"], execution)
    machine = app.outputs["Machine"].rsplit(":", 1)[-1]
    stream, first = logged[0]
    assert re.fullmatch(rf"states/{machine}/\d{{4}}-\d\d-\d\d-\d\d/0{{8}}", stream)
    assert first.pop("event_timestamp").isdigit()
    assert first == {
        "id": "1",
        "type": "ExecutionStarted",
        "details": {
            "input": '{"item": "logged"}',
            "inputDetails": {"truncated": False},
            "roleArn": app.outputs["MachineRole"],
        },
        "previous_event_id": "0",
        "redrive_count": "0",
        "execution_arn": execution,
    }
    events = [event for _, event in logged]
    assert [event["type"] for event in events[:6]] == [
        "ExecutionStarted",
        "TaskStateEntered",
        "TaskScheduled",
        "TaskStarted",
        "TaskSucceeded",
        "TaskStateExited",
    ]
    scheduled = events[2]["details"]
    assert (scheduled["resourceType"], scheduled["resource"], scheduled["region"]) == ("lambda", "invoke", "us-east-1")
    assert json.loads(scheduled["parameters"])["FunctionName"] == app.outputs["Function"]
    assert events[-1]["type"] == "ExecutionSucceeded"
    assert [event["previous_event_id"] for event in events[1:]] == ["0", *(event["id"] for event in events[1:-1])]

    history = app.client("stepfunctions").get_execution_history(executionArn=execution)["events"]
    assert [(str(event["id"]), event["type"]) for event in history] == [(e["id"], e["type"]) for e in events]


@pytest.mark.parametrize(
    "level, types",
    [("ERROR", ["TaskFailed", "FailStateEntered", "ExecutionFailed"]), ("FATAL", ["ExecutionFailed"]), ("OFF", [])],
)
def test_a_log_has_what_its_level_asks_for_and_no_data_unless_asked(app, level, types):
    group = f"/aws/vendedlogs/states/{level}"
    logs = app.client("logs")
    logs.create_log_group(logGroupName=group)
    arn = logs.describe_log_groups(logGroupNamePrefix=group)["logGroups"][0]["arn"]
    machine = app.machine(
        {
            "Fail": task(
                "arn:aws:states:::lambda:invoke",
                {"FunctionName": app.outputs["Function"], "Payload": {"fail": True}},
                Catch=[{"ErrorEquals": ["PictureIsBroken"], "Next": "Give up"}],
            ),
            "Give up": {"Type": "Fail", "Error": "Enough", "Cause": "by design"},
        },
        logging={"level": level, "destinations": [{"cloudWatchLogsLogGroup": {"logGroupArn": arn}}]},
    )
    execution = app.start(machine)
    assert app.result(execution)["error"] == "Enough"
    events = [event for _, event in log_of(app, group, execution)]
    assert [event["type"] for event in events] == types
    assert not any(name in event["details"] for event in events for name in ("input", "output", "parameters"))
    if types:
        assert events[-1]["details"] == {"error": "Enough", "cause": "by design"}


def test_logging_that_could_not_work_is_refused(app):
    nowhere = "arn:aws:logs:us-east-1:000000000000:log-group:/nowhere:*"
    logs = app.client("logs").describe_log_groups(logGroupNamePrefix=app.outputs["MachineLogs"])["logGroups"][0]["arn"]

    def create(*groups, role=app.outputs["MachineRole"]):
        destinations = [{"cloudWatchLogsLogGroup": {"logGroupArn": group}} for group in groups]
        app.machine(WAIT, role=role, logging={"level": "ALL", "destinations": destinations})

    with pytest.raises(ClientError, match="InvalidLoggingConfiguration.*exactly one Log Destination"):
        create()
    with pytest.raises(ClientError, match="InvalidLoggingConfiguration.*not found"):
        create(nowhere)
    with pytest.raises(ClientError, match=r"InvalidLoggingConfiguration"):
        create(logs.removesuffix(":*"))
    with pytest.raises(ClientError, match="AccessDeniedException.*not authorized to access the Log Destination"):
        create(logs, role=app.outputs["OtherRole"])
    machine = app.machine(WAIT)
    with pytest.raises(ClientError, match="InvalidLoggingConfiguration"):
        app.client("stepfunctions").update_state_machine(
            stateMachineArn=machine, loggingConfiguration={"level": "ALL", "destinations": []}
        )


def test_nothing_is_added_to_a_history_after_its_end(app):
    execution = app.start(app.machine(WAIT))
    states = app.client("stepfunctions")

    def waits():
        events = states.get_execution_history(executionArn=execution)["events"]
        return events if events[-1]["type"] == "WaitStateEntered" else None

    wait_for(waits)
    states.stop_execution(executionArn=execution, error="Enough")
    last = states.get_execution_history(executionArn=execution, reverseOrder=True)["events"][0]
    assert (last["type"], last["previousEventId"]) == ("ExecutionAborted", 0)
    time.sleep(0.5)  # the state notices meanwhile
    assert states.get_execution_history(executionArn=execution, reverseOrder=True)["events"][0] == last


def test_a_job_that_is_waited_for_is_submitted_in_the_history(app):
    execution = app.start(app.machine({"Job": job(app, "print('hello')")}))
    app.result(execution)
    events = app.client("stepfunctions").get_execution_history(executionArn=execution)["events"]
    tasks = [event["type"] for event in events if event["type"].startswith("Task") and "State" not in event["type"]]
    assert tasks == ["TaskScheduled", "TaskStarted", "TaskSubmitted", "TaskSucceeded"]
    submitted = next(event for event in events if event["type"] == "TaskSubmitted")["taskSubmittedEventDetails"]
    assert (submitted["resourceType"], submitted["resource"]) == ("sagemaker", "createProcessingJob.sync")
    assert ":processing-job/small-" in json.loads(submitted["output"])["ProcessingJobArn"]


# --- Step Functions: the role ---


def test_tasks_have_no_more_rights_than_the_role(app):
    denied = app.run(
        {
            "Delete": task(
                "arn:aws:states:::aws-sdk:dynamodb:deleteItem",
                {"TableName": app.outputs["Table"], "Key": {"pk": {"S": "x"}}},
            )
        }
    )
    assert denied["status"] == "FAILED"
    assert denied["error"] == "DynamoDb.DynamoDbException"
    assert "not authorized to perform: dynamodb:DeleteItem" in denied["cause"]

    denied = app.run(
        {"Send": task("arn:aws:states:::sqs:sendMessage", {"QueueUrl": app.outputs["Queue"], "MessageBody": {"a": 1}})}
    )
    assert denied["error"] == "SQS.AmazonSQSException"
    assert "not authorized" in denied["cause"]


def test_sagemaker_actions_are_checked_on_the_resource_they_name(app):
    denied = app.run(
        {"Describe": task("arn:aws:states:::aws-sdk:sagemaker:describeEndpoint", {"EndpointName": "theirs"})}
    )
    assert denied["error"] == "SageMaker.SageMakerException"
    assert "not authorized to perform: sagemaker:DescribeEndpoint" in denied["cause"]

    allowed = app.run(
        {"Describe": task("arn:aws:states:::aws-sdk:sagemaker:describeEndpoint", {"EndpointName": "mine"})}
    )
    assert "not authorized" not in allowed["cause"], "allowed by its ARN, though there is no such endpoint"


def test_a_job_needs_the_right_to_the_rule_that_step_functions_manages(app):
    refused = app.run({"Train": task("arn:aws:states:::sagemaker:createTrainingJob.sync", {"TrainingJobName": "t"})})
    assert refused["status"] == "FAILED"
    assert "StepFunctionsGetEventsForSageMakerTrainingJobsRule" in refused["cause"]


# --- IAM ---


def test_a_role_is_given_to_a_service_by_who_may_pass_it_there(app):
    iam, role = app.client("iam"), app.outputs["MachineRole"]
    iam.create_user(UserName="developer")
    key = iam.create_access_key(UserName="developer")["AccessKey"]
    keys = {"aws_access_key_id": key["AccessKeyId"], "aws_secret_access_key": key["SecretAccessKey"]}
    actions = ["lambda:CreateFunction", "states:*", "events:*", "scheduler:*"]
    to_states = {"StringEquals": {"iam:PassedToService": "states.amazonaws.com"}}
    statements = [
        {"Effect": "Allow", "Action": actions, "Resource": "*"},
        {"Effect": "Allow", "Action": "iam:PassRole", "Resource": role, "Condition": to_states},
    ]
    policy = json.dumps({"Version": "2012-10-17", "Statement": statements})
    iam.put_user_policy(UserName="developer", PolicyName="p", PolicyDocument=policy)
    refusal = f"user/developer is not authorized to perform: iam:PassRole on resource: {role}"

    states = app.client("stepfunctions", **keys)
    definition = json.dumps({"StartAt": "Wait", "States": WAIT})
    machine = states.create_state_machine(name="passed", definition=definition, roleArn=role)["stateMachineArn"]
    with pytest.raises(ClientError, match=f"iam:PassRole on resource: {app.outputs['JobRole']}"):
        states.update_state_machine(stateMachineArn=machine, roleArn=app.outputs["JobRole"])
    with pytest.raises(ClientError, match=refusal):
        app.client("lambda", **keys).create_function(
            FunctionName="passed", Role=role, Runtime=runtime(), Handler="a.b", Code={"ZipFile": b"x"}
        )
    events = app.client("events", **keys)
    events.put_rule(Name="passed", EventPattern='{"source": ["nobody"]}')
    with pytest.raises(ClientError, match=refusal):
        events.put_targets(Rule="passed", Targets=[{"Id": "m", "Arn": machine, "RoleArn": role}])
    with pytest.raises(ClientError, match=refusal):
        app.client("scheduler", **keys).create_schedule(
            Name="passed",
            ScheduleExpression="rate(1 day)",
            FlexibleTimeWindow={"Mode": "OFF"},
            Target={"Arn": machine, "RoleArn": role},
        )


# --- Step Functions: jobs ---


def job(app, program, role="JobRole"):
    """A task that runs a Python program as a processing job, and waits for it."""
    return task(
        "arn:aws:states:::sagemaker:createProcessingJob.sync",
        {
            "ProcessingJobName": "{% 'small-' & $substring($states.context.Execution.Name, 0, 8) %}",
            "AppSpecification": {"ImageUri": "local/job:1", "ContainerEntrypoint": ["python3", "-c", program]},
            "ProcessingResources": {
                "ClusterConfig": {"InstanceCount": 1, "InstanceType": "ml.m5.large", "VolumeSizeInGB": 1.0}
            },
            "ProcessingOutputConfig": {
                "Outputs": [
                    {
                        "OutputName": "out",
                        "S3Output": {
                            "S3Uri": f"s3://{app.outputs['Bucket']}/out",
                            "LocalPath": "/opt/ml/processing/output/out",
                            "S3UploadMode": "EndOfJob",
                        },
                    }
                ]
            },
            "RoleArn": app.outputs[role],
        },
    )


def test_a_job_runs_with_its_role_and_its_result_is_its_description(app):
    done = app.run({"Job": job(app, "print('hello')")})
    assert done["status"] == "SUCCEEDED", done
    output = json.loads(done["output"])
    assert output["ProcessingJobStatus"] == "Completed"
    assert isinstance(output["CreationTime"], int)


def test_a_failed_job_fails_the_task_and_says_why(app):
    failed = app.run({"Job": job(app, "import sys; sys.exit(3)")})
    assert failed["error"] == "States.TaskFailed"
    assert json.loads(failed["cause"])["ProcessingJobStatus"] == "Failed"


def test_a_role_that_may_not_be_passed_is_not(app):
    refused = app.run({"Job": job(app, "pass", role="OtherRole")})
    assert refused["error"] == "SageMaker.AmazonSageMakerException"
    assert f"iam:PassRole on resource: {app.outputs['OtherRole']}" in refused["cause"]


def test_a_stopped_execution_stops_its_job(app):
    execution = app.start(app.machine({"Job": job(app, "import time; time.sleep(300)")}))
    name = "small-" + execution.rsplit(":", 1)[-1][:8]
    sagemaker = app.client("sagemaker")

    def status():
        jobs = sagemaker.list_processing_jobs(NameContains=name)["ProcessingJobSummaries"]
        return jobs[0]["ProcessingJobStatus"] if jobs else None

    wait_for(lambda: status() == "InProgress")
    app.client("stepfunctions").stop_execution(executionArn=execution)
    wait_for(lambda: status() in ("Stopping", "Stopped"), timeout=5)
    wait_for(lambda: status() == "Stopped")


def test_the_model_package_group_of_the_template_exists(app):
    assert app.outputs["Group"].endswith(":model-package-group/small")
    assert app.outputs["GroupStatus"] == "Completed"
    group = app.client("sagemaker").describe_model_package_group(ModelPackageGroupName="small")
    assert group["ModelPackageGroupDescription"] == "none yet"


# --- Step Functions: conventions ---


def test_function_errors_keep_their_type_and_carry_json(app):
    failed = app.run(
        {
            "Fail": task(
                "arn:aws:states:::lambda:invoke", {"FunctionName": app.outputs["Function"], "Payload": {"fail": True}}
            )
        }
    )
    assert failed["error"] == "PictureIsBroken"
    assert json.loads(failed["cause"])["errorMessage"] == "no header"


def test_objects_are_read_as_text_and_missing_ones_are_named(app):
    app.client("s3").put_object(Bucket=app.outputs["Bucket"], Key="findings.json", Body=b'{"blocking": false}')
    read = "arn:aws:states:::aws-sdk:s3:getObject"
    found = app.run(
        {
            "Read": task(
                read,
                {"Bucket": app.outputs["Bucket"], "Key": "findings.json"},
                Output={"findings": "{% $parse($states.result.Body) %}", "at": "{% $states.result.LastModified %}"},
            )
        }
    )
    output = json.loads(found["output"])
    assert output["findings"] == {"blocking": False}
    assert datetime.fromisoformat(output["at"].replace("Z", "+00:00")).tzinfo == UTC

    missing = app.run({"Read": task(read, {"Bucket": app.outputs["Bucket"], "Key": "nothing"})})
    assert missing["error"] == "S3.NoSuchKeyException"


def test_results_larger_than_the_quota_fail_as_on_aws(app):
    app.client("s3").put_object(Bucket=app.outputs["Bucket"], Key="large", Body=b"x" * 300_000)
    failed = app.run(
        {"Read": task("arn:aws:states:::aws-sdk:s3:getObject", {"Bucket": app.outputs["Bucket"], "Key": "large"})}
    )
    assert failed["error"] == "States.DataLimitExceeded"


def test_unknown_parameters_are_refused(app):
    failed = app.run({"Put": task("arn:aws:states:::dynamodb:putItem", {"TableName": "t", "Itme": {}})})
    assert 'The field "Itme" is not supported by Step Functions' in failed["cause"]


# --- Step Functions: time ---


def ends_of(app, execution):
    """The status-change event of one execution."""
    found = []

    def arrived():
        found.extend(app.messages())
        return [event for event in found if event.get("detail", {}).get("executionArn") == execution]

    return wait_for(arrived)


def test_a_callback_whose_heartbeats_end_is_given_up(app):
    states = app.client("stepfunctions")
    arguments = {
        "FunctionName": app.outputs["Function"],
        "Payload": {"sleep": 0, "token": "{% $states.context.Task.Token %}"},
    }
    ask = task("arn:aws:states:::lambda:invoke.waitForTaskToken", arguments, HeartbeatSeconds=2)
    execution = app.start(app.machine({"Ask": ask}))

    def submitted():
        events = states.get_execution_history(executionArn=execution)["events"]
        return events if events[-1]["type"] == "TaskSubmitted" else None

    scheduled = next(event for event in wait_for(submitted) if event["type"] == "TaskScheduled")
    token = json.loads(scheduled["taskScheduledEventDetails"]["parameters"])["Payload"]["token"]
    for _ in range(3):
        time.sleep(1)
        states.send_task_heartbeat(taskToken=token)
    assert states.describe_execution(executionArn=execution)["status"] == "RUNNING"
    assert app.result(execution)["error"] == "States.HeartbeatTimeout"


def test_an_execution_times_out_as_a_whole_and_says_so(app):
    app.messages()
    states = app.client("stepfunctions")
    definition = {
        "StartAt": "Wait",
        "TimeoutSeconds": 1,
        "States": {"Wait": {"Type": "Wait", "Seconds": 60, "End": True}},
    }
    machine = app.outputs["Machine"]
    original = states.describe_state_machine(stateMachineArn=machine)["definition"]
    states.update_state_machine(stateMachineArn=machine, definition=json.dumps(definition))
    try:
        execution = app.start(machine)
        ended = app.result(execution, timeout=5)
    finally:
        states.update_state_machine(stateMachineArn=machine, definition=original)
    assert ended["status"] == "TIMED_OUT"
    assert ends_of(app, execution)[0]["detail"]["status"] == "TIMED_OUT"


def test_a_stopped_execution_starts_nothing_more(app):
    machine = app.machine(
        {
            "Slow": task(
                "arn:aws:states:::lambda:invoke",
                {"FunctionName": app.outputs["Function"], "Payload": {"sleep": 2}},
                Catch=[{"ErrorEquals": ["States.ALL"], "Next": "Put"}],
                End=False,
                Next="Put",
            ),
            "Put": task(
                "arn:aws:states:::dynamodb:putItem",
                {"TableName": app.outputs["Table"], "Item": {"pk": {"S": "after the stop"}}},
            ),
        }
    )
    execution = app.start(machine)
    time.sleep(0.7)
    app.client("stepfunctions").stop_execution(executionArn=execution, error="Enough", cause="by hand")

    assert app.result(execution, timeout=2)["status"] == "ABORTED"
    time.sleep(2.5)  # the function has returned by now
    assert app.result(execution)["status"] == "ABORTED", "the end of an execution is final"
    row = app.client("dynamodb").get_item(TableName=app.outputs["Table"], Key={"pk": {"S": "after the stop"}})
    assert "Item" not in row


def test_a_task_times_out_and_can_be_caught(app):
    caught = app.run(
        {
            "Slow": task(
                "arn:aws:states:::lambda:invoke",
                {"FunctionName": app.outputs["Function"], "Payload": {"sleep": 5}},
                TimeoutSeconds=1,
                Catch=[{"ErrorEquals": ["States.Timeout"], "Next": "Caught"}],
            ),
            "Caught": {"Type": "Pass", "Output": "caught", "End": True},
        }
    )
    assert (caught["status"], json.loads(caught["output"])) == ("SUCCEEDED", "caught")


# --- CloudWatch ---


def test_an_alarm_hears_only_its_own_dimensions_and_recovers_by_itself(app):
    cloudwatch = app.client("cloudwatch")
    made = cloudwatch.describe_alarms(AlarmNames=[app.outputs["Alarm"]])["MetricAlarms"][0]
    assert made["Dimensions"] == [{"Name": "Endpoint", "Value": "mine"}]
    alarm = {
        key: made[key]
        for key in (
            "Namespace",
            "MetricName",
            "Dimensions",
            "Statistic",
            "EvaluationPeriods",
            "Threshold",
            "ComparisonOperator",
            "TreatMissingData",
        )
    }
    cloudwatch.put_metric_alarm(AlarmName="quick", Period=2, **alarm)  # AWS knows no period so short

    def state():
        return cloudwatch.describe_alarms(AlarmNames=["quick"])["MetricAlarms"][0]["StateValue"]

    def put(endpoint):
        cloudwatch.put_metric_data(
            Namespace="Test",
            MetricData=[
                {
                    "MetricName": "Errors",
                    "Value": 5,
                    "Unit": "Count",
                    "Dimensions": [{"Name": "Endpoint", "Value": endpoint}],
                }
            ],
        )

    wait_for(lambda: state() == "OK")  # no data is no error: TreatMissingData notBreaching
    put("theirs")
    time.sleep(2.5)
    assert state() == "OK"
    put("mine")
    wait_for(lambda: state() == "ALARM", timeout=5)
    wait_for(lambda: state() == "OK", timeout=20, every=0.5)


def test_log_events_are_found_by_the_prefix_of_their_stream_and_page_by_page(app):
    logs = app.client("logs")
    logs.create_log_group(logGroupName="filtered")
    now = int(time.time() * 1000)
    for stream in ("a/1", "a/2", "b/1"):
        logs.create_log_stream(logGroupName="filtered", logStreamName=stream)
        events = [{"timestamp": now + n // 3, "message": f"{stream} {n}"} for n in range(5)]
        logs.put_log_events(logGroupName="filtered", logStreamName=stream, logEvents=events)

    def found(**wanted):
        pages = logs.get_paginator("filter_log_events").paginate(
            logGroupName="filtered", PaginationConfig={"PageSize": 2}, **wanted
        )
        return [event["message"] for page in pages for event in page["events"]]

    assert sorted(found(logStreamNamePrefix="a/")) == sorted(f"a/{n} {m}" for n in (1, 2) for m in range(5))
    assert len(found()) == len(set(found())) == 15
    assert found(logStreamNamePrefix="c") == []
    with pytest.raises(ClientError, match="InvalidParameterException"):
        found(logStreamNamePrefix="a", logStreamNames=["b/1"])


# --- Processes ---


PARENT = """
import sys, time
from pathlib import Path
from local.emulator import Emulator
with Emulator(state=Path(sys.argv[1])) as aws:
    print(aws.pid, aws.port, flush=True)
    time.sleep(600)
"""


def running(processes):
    """Those that still run; one that ended but was not collected by init yet does not."""
    left = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
    return left


def busy(aws_pid, port):
    """Start a function and a job that sleep; returns the emulator's processes once both are there."""
    keys = {
        "endpoint_url": f"http://127.0.0.1:{port}",
        "region_name": "us-east-1",
        "aws_access_key_id": "test",
        "aws_secret_access_key": "test",
    }
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as code:
        code.writestr("app.py", "import time\ndef handler(event, context):\n    time.sleep(300)\n")
    trust = {
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": {"Service": ["lambda.amazonaws.com", "sagemaker.amazonaws.com"]},
                "Action": "sts:AssumeRole",
            }
        ]
    }
    role = boto3.client("iam", **keys).create_role(RoleName="f", AssumeRolePolicyDocument=json.dumps(trust))
    functions = boto3.client("lambda", **keys)
    functions.create_function(
        FunctionName="f",
        Runtime=runtime(),
        Handler="app.handler",
        Timeout=600,
        Role=role["Role"]["Arn"],
        Code={"ZipFile": archive.getvalue()},
    )
    functions.invoke(FunctionName="f", InvocationType="Event")
    boto3.client("sagemaker", **keys).create_processing_job(
        ProcessingJobName="j",
        RoleArn=role["Role"]["Arn"],
        AppSpecification={
            "ImageUri": "local/job:1",
            "ContainerEntrypoint": ["python3", "-c", "import time; time.sleep(300)  # a busy job"],
        },
        ProcessingResources={"ClusterConfig": {"InstanceCount": 1, "InstanceType": "ml.m5.large", "VolumeSizeInGB": 1}},
    )

    def both():
        below = psutil.Process(aws_pid).children(recursive=True)
        lines = [" ".join(process.cmdline()) for process in below]
        ready = any("_worker.py" in line for line in lines) and any("a busy job" in line for line in lines)
        return below if ready else None

    return wait_for(both)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_however_the_parent_ends(tmp_path, end):
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(tmp_path)],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    ) as parent:
        pid, port = map(int, parent.stdout.readline().split())
        below = busy(pid, port)
        emulator = psutil.Process(pid)
        parent.send_signal(end)
        parent.wait(20)
        wait_for(lambda: not running([emulator, *below]))


def test_stop_leaves_no_process_and_no_unpacked_code(tmp_path):
    aws = Emulator(state=tmp_path).start()
    below = busy(aws.pid, aws.port)
    emulator = psutil.Process(aws.pid)
    aws.stop()
    assert not running([emulator, *below])
    assert not (tmp_path / "tmp").exists()
    aws.stop()  # twice does no harm


def test_two_emulators_do_not_share_a_state_folder(tmp_path):
    taken = f"Another emulator runs with its state in {tmp_path}"
    with Emulator(state=tmp_path), pytest.raises(EmulatorError, match=taken):
        Emulator(state=tmp_path).start()
    with Emulator(state=tmp_path) as second:
        assert second.running()


def test_the_server_killed_outright_is_cleaned_up_by_whoever_started_it(tmp_path):
    aws = Emulator(state=tmp_path).start()
    below = busy(aws.pid, aws.port)
    os.kill(aws.pid, signal.SIGKILL)
    aws.stop()
    assert not running(below)


def test_state_is_kept_when_asked(tmp_path):
    with Emulator(state=tmp_path, keep=True) as aws:
        s3 = boto3.client(
            "s3",
            endpoint_url=aws.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        s3.create_bucket(Bucket="kept")
        s3.put_object(Bucket="kept", Key="k", Body=b"v")
    with Emulator(state=tmp_path, port=aws.port, keep=True):
        assert s3.get_object(Bucket="kept", Key="k")["Body"].read() == b"v"
    with Emulator(state=tmp_path, port=aws.port):
        assert not s3.list_buckets()["Buckets"]


def test_an_execution_that_ran_when_the_emulator_was_killed_has_an_end(tmp_path):
    keys = {"region_name": "us-east-1", "aws_access_key_id": "test", "aws_secret_access_key": "test"}
    with Emulator(state=tmp_path, keep=True) as aws:
        keys["endpoint_url"] = aws.endpoint_url
        states, events, sqs = (boto3.client(service, **keys) for service in ("stepfunctions", "events", "sqs"))
        queue = sqs.create_queue(QueueName="ends")["QueueUrl"]
        events.put_rule(Name="ends", EventPattern=json.dumps({"source": ["aws.states"]}))
        events.put_targets(Rule="ends", Targets=[{"Id": "q", "Arn": "arn:aws:sqs:us-east-1:000000000000:ends"}])
        trust = {"Effect": "Allow", "Principal": {"Service": "states.amazonaws.com"}, "Action": "sts:AssumeRole"}
        role = boto3.client("iam", **keys).create_role(
            RoleName="r", AssumeRolePolicyDocument=json.dumps({"Statement": [trust]})
        )["Role"]["Arn"]
        definition = json.dumps({"StartAt": "Wait", "States": WAIT})
        machine = states.create_state_machine(name="m", definition=definition, roleArn=role)["stateMachineArn"]
        execution = states.start_execution(stateMachineArn=machine)["executionArn"]
        wait_for(lambda: len(states.get_execution_history(executionArn=execution)["events"]) > 1)
        time.sleep(1.5)  # what is older than a second is kept
        os.kill(aws.pid, signal.SIGKILL)
    with Emulator(state=tmp_path, keep=True, port=aws.port):
        assert states.describe_execution(executionArn=execution)["status"] == "FAILED"
        history = states.get_execution_history(executionArn=execution)["events"]
        assert [event["type"] for event in history] == ["ExecutionStarted", "WaitStateEntered", "ExecutionFailed"]
        statuses = []
        while messages := sqs.receive_message(QueueUrl=queue, WaitTimeSeconds=1).get("Messages"):
            statuses += [json.loads(message["Body"])["detail"]["status"] for message in messages]
        assert sorted(statuses) == ["FAILED", "RUNNING"]


def test_the_aws_command_line_works_with_the_printed_environment(app):
    aws = shutil.which("aws", path=str(Path(sys.executable).parent)) or shutil.which("aws")
    if aws is None:
        pytest.skip("the aws command line is not installed")
    environment = {**os.environ, **app.aws.environment()}
    listed = subprocess.run([aws, "s3", "ls"], env=environment, capture_output=True, text=True, timeout=60)
    assert app.outputs["Bucket"] in listed.stdout, listed.stderr
