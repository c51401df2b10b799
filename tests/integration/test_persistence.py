"""What outlives the emulator when its state is kept: everything after a clean stop, all but a second after a kill."""

import contextlib
import io
import json
import os
import signal
import sqlite3
import textwrap
import threading
import time
import zipfile

import boto3
import psutil
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from local.emulator import Emulator
from local.stack import runtime
from tests.makers.sagemaker import SERVER, archive, until

ROLE = "arn:aws:iam::000000000000:role/any"
TRUST = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": "lambda.amazonaws.com"}, "Action": "sts:AssumeRole"}],
}
SLEEP = """
    import time
    print("sleeping", flush=True)
    time.sleep(300)
"""
FUNCTION = """
    import os, pathlib, time

    def handler(event, context):
        folder = pathlib.Path(os.environ["FOLDER"])
        (folder / "started").write_text(str(os.getpid()))
        while not (folder / "go").exists():
            time.sleep(0.05)
        for record in event["Records"]:
            (folder / record["body"]).touch()
"""


def clients(aws):
    def client(service):
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        settings = Config(retries={"max_attempts": 0}, read_timeout=20)
        return boto3.client(service, endpoint_url=aws.endpoint_url, config=settings, **keys)

    return client


def end(aws, how):
    """Stop the emulator, or kill it as if by accident, when its last writes are a good second old."""
    if how == "stop":
        aws.stop()
    else:
        time.sleep(1.5)
        os.kill(aws.pid, signal.SIGKILL)


def intact(state):
    assert not list(state.rglob("*unreadable*"))
    with contextlib.closing(sqlite3.connect(state / "state" / "state.sqlite")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.fixture
def aws(tmp_path):
    """Start emulators on one state, any number of them one after the other."""
    server = tmp_path / "images" / "server"
    server.mkdir(parents=True)
    (server / "__main__.py").write_text(textwrap.dedent(SERVER))
    environment = {"HOUNDLOOP_IMAGES": str(tmp_path / "images"), "HOUNDLOOP_PRELOAD": "json"}
    started = []

    def start():
        started.append(Emulator(state=tmp_path / "state", auth=False, keep=True, environment=environment).start())
        return started[-1]

    yield start
    for emulator in reversed(started):
        emulator.stop()


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_the_state_of_every_service_survives(aws, how):
    first = aws()
    client = clients(first)
    s3, dynamodb, sqs, cloudwatch = client("s3"), client("dynamodb"), client("sqs"), client("cloudwatch")
    s3.create_bucket(Bucket="things")
    s3.put_bucket_versioning(Bucket="things", VersioningConfiguration={"Status": "Enabled"})
    for body in (b"old", b"new"):
        s3.put_object(Bucket="things", Key="a b/ü.tmp", Body=body, Metadata={"of": body.decode()}, Tagging="x=y")
    s3.put_object(Bucket="things", Key="deleted", Body=b"x")
    s3.delete_object(Bucket="things", Key="deleted")
    upload = {"Bucket": "things", "Key": "large", "UploadId": ""}
    upload["UploadId"] = s3.create_multipart_upload(Bucket="things", Key="large")["UploadId"]
    part = s3.upload_part(**upload, PartNumber=1, Body=b"p" * 5000)["ETag"]
    keys = [("pk", "HASH", "S"), ("sk", "RANGE", "N")]
    dynamodb.create_table(
        TableName="rows",
        KeySchema=[{"AttributeName": name, "KeyType": kind} for name, kind, _ in keys],
        AttributeDefinitions=[{"AttributeName": name, "AttributeType": type_} for name, _, type_ in keys],
        BillingMode="PAY_PER_REQUEST",
    )
    for number in range(30):
        key = {"pk": {"S": f"p{number % 3}"}, "sk": {"N": str(number)}}
        dynamodb.put_item(TableName="rows", Item={**key, "b": {"B": b"\x00\xff"}, "n": {"N": "1"}})
    time.sleep(0.5)  # saved once: what follows are changes
    dynamodb.delete_item(TableName="rows", Key={"pk": {"S": "p0"}, "sk": {"N": "0"}})
    dynamodb.update_item(
        TableName="rows",
        Key={"pk": {"S": "p1"}, "sk": {"N": "1"}},
        UpdateExpression="SET n = n + :one",
        ExpressionAttributeValues={":one": {"N": "1"}},
    )
    queue = sqs.create_queue(QueueName="standard", Attributes={"VisibilityTimeout": "4"})["QueueUrl"]
    ordered = sqs.create_queue(QueueName="ordered.fifo", Attributes={"FifoQueue": "true"})["QueueUrl"]
    for name in ("handled", "in flight", "waiting"):
        sqs.send_message(QueueUrl=queue, MessageBody=name)
    for number in range(5):
        sqs.send_message(
            QueueUrl=ordered, MessageBody=str(number), MessageGroupId="g", MessageDeduplicationId=str(number)
        )
    sqs.send_message(QueueUrl=queue, MessageBody="delayed", DelaySeconds=6)
    sent = time.monotonic()
    for delete in (True, False):
        (message,) = sqs.receive_message(QueueUrl=queue)["Messages"]
        if delete:
            sqs.delete_message(QueueUrl=queue, ReceiptHandle=message["ReceiptHandle"])
    cloudwatch.put_metric_alarm(
        AlarmName="alarm",
        Namespace="Test",
        MetricName="other",
        Statistic="Sum",
        Period=60,
        EvaluationPeriods=1,
        Threshold=1,
        TreatMissingData="ignore",
        ComparisonOperator="GreaterThanThreshold",
    )
    cloudwatch.set_alarm_state(AlarmName="alarm", StateValue="ALARM", StateReason="test")
    minute = int(time.time()) // 60 * 60 - 120
    values = [{"MetricName": "metric", "Value": value, "Timestamp": minute} for value in (1.0, 2.0)]
    cloudwatch.put_metric_data(Namespace="Test", MetricData=values)
    logs = client("logs")
    stream = {"logGroupName": "group", "logStreamName": "stream"}
    logs.create_log_group(logGroupName="group")
    logs.create_log_stream(**stream)
    for batch in range(3):
        events = [{"timestamp": int(time.time() * 1000), "message": f"{batch}/{line}"} for line in range(100)]
        logs.put_log_events(**stream, logEvents=events)
    client("iam").create_role(RoleName="role", AssumeRolePolicyDocument=json.dumps(TRUST))
    client("events").put_rule(Name="rule", EventPattern='{"source": ["test"]}')
    client("events").put_targets(
        Rule="rule", Targets=[{"Id": "1", "Arn": "arn:aws:sqs:us-east-1:000000000000:standard"}]
    )
    states = client("stepfunctions")
    definition = {"StartAt": "A", "States": {"A": {"Type": "Pass", "Result": "done", "End": True}}}
    machine = states.create_state_machine(name="m", definition=json.dumps(definition), roleArn=ROLE)["stateMachineArn"]
    run = states.start_execution(stateMachineArn=machine)["executionArn"]
    until(lambda: states.describe_execution(executionArn=run), lambda seen: seen["status"] == "SUCCEEDED", 20)

    end(first, how)
    second = aws()
    client = clients(second)
    s3, dynamodb, sqs, cloudwatch = client("s3"), client("dynamodb"), client("sqs"), client("cloudwatch")

    found = s3.get_object(Bucket="things", Key="a b/ü.tmp")
    assert (found["Body"].read(), found["Metadata"]) == (b"new", {"of": "new"})
    versions = s3.list_object_versions(Bucket="things")
    assert [v["Key"] for v in versions["Versions"]] == ["a b/ü.tmp", "a b/ü.tmp", "deleted"]
    old = [v["VersionId"] for v in versions["Versions"] if not v["IsLatest"]][0]
    assert s3.get_object(Bucket="things", Key="a b/ü.tmp", VersionId=old)["Body"].read() == b"old"
    assert s3.get_object_tagging(Bucket="things", Key="a b/ü.tmp")["TagSet"] == [{"Key": "x", "Value": "y"}]
    assert [m["Key"] for m in versions["DeleteMarkers"]] == ["deleted"]
    s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part}]})
    assert s3.get_object(Bucket="things", Key="large")["Body"].read() == b"p" * 5000

    items = {int(item["sk"]["N"]): item for item in dynamodb.scan(TableName="rows")["Items"]}
    assert sorted(items) == list(range(1, 30))
    assert items[1] == {"pk": {"S": "p1"}, "sk": {"N": "1"}, "b": {"B": b"\x00\xff"}, "n": {"N": "2"}}
    queried = dynamodb.query(
        TableName="rows", KeyConditionExpression="pk = :p", ExpressionAttributeValues={":p": {"S": "p2"}}
    )
    assert [item["sk"]["N"] for item in queried["Items"]] == [str(number) for number in range(2, 30, 3)]

    queue, ordered = (sqs.get_queue_url(QueueName=name)["QueueUrl"] for name in ("standard", "ordered.fifo"))
    numbers = sqs.receive_message(QueueUrl=ordered, MaxNumberOfMessages=1)["Messages"]
    assert [message["Body"] for message in numbers] == ["0"]
    again = sqs.send_message(QueueUrl=ordered, MessageBody="0", MessageGroupId="g", MessageDeduplicationId="0")
    assert again["MessageId"] == numbers[0]["MessageId"], "still a duplicate"
    arrived = {}
    until(lambda: receive(sqs, queue, arrived), lambda bodies: len(bodies) == 3, 20)
    assert set(arrived) == {"in flight", "waiting", "delayed"}
    assert arrived["delayed"] - sent >= 6

    (alarm,) = cloudwatch.describe_alarms()["MetricAlarms"]
    assert alarm["StateValue"] == "ALARM"
    counted = cloudwatch.get_metric_statistics(
        Namespace="Test", MetricName="metric", StartTime=minute, EndTime=minute + 60, Period=60, Statistics=["Sum"]
    )
    assert [point["Sum"] for point in counted["Datapoints"]] == [3.0]
    events = client("logs").get_log_events(**stream, startFromHead=True)["events"]
    assert [event["message"] for event in events] == [f"{batch}/{line}" for batch in range(3) for line in range(100)]
    assert client("iam").get_role(RoleName="role")["Role"]["RoleName"] == "role"
    assert len(client("events").list_targets_by_rule(Rule="rule")["Targets"]) == 1
    states = client("stepfunctions")
    assert states.describe_execution(executionArn=run)["output"] == '"done"'
    history = states.get_execution_history(executionArn=run)["events"]
    assert [event["type"] for event in history][-1] == "ExecutionSucceeded"
    intact(second.state)


def receive(sqs, queue, arrived):
    for message in sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=10, WaitTimeSeconds=1).get("Messages", []):
        sqs.delete_message(QueueUrl=queue, ReceiptHandle=message["ReceiptHandle"])
        arrived[message["Body"]] = time.monotonic()
    return list(arrived)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_endpoints_and_functions_work_again_and_jobs_have_failed(aws, how, tmp_path):
    first = aws()
    client = clients(first)
    s3, sagemaker, sqs = client("s3"), client("sagemaker"), client("sqs")
    s3.create_bucket(Bucket="jobs")
    s3.put_object(Bucket="jobs", Key="code.tar.gz", Body=archive(train_py=SLEEP))
    s3.put_object(Bucket="jobs", Key="model.tar.gz", Body=archive(answer_txt="here"))
    container = {"Image": "local/server:1", "ModelDataUrl": "s3://jobs/model.tar.gz"}
    sagemaker.create_model(ModelName="model", ExecutionRoleArn=ROLE, PrimaryContainer=container)
    variant = {"VariantName": "one", "ModelName": "model", "InitialInstanceCount": 1, "InstanceType": "ml.c5.large"}
    sagemaker.create_endpoint_config(EndpointConfigName="config", ProductionVariants=[variant])
    sagemaker.create_endpoint(EndpointName="endpoint", EndpointConfigName="config")
    sagemaker.create_training_job(
        TrainingJobName="job",
        RoleArn=ROLE,
        AlgorithmSpecification={
            "TrainingImage": "000000000000.dkr.ecr.us-east-1.amazonaws.com/training:1",
            "TrainingInputMode": "File",
        },
        HyperParameters={"sagemaker_program": "train.py", "sagemaker_submit_directory": "s3://jobs/code.tar.gz"},
        OutputDataConfig={"S3OutputPath": "s3://jobs/out"},
        ResourceConfig={"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 1},
        StoppingCondition={"MaxRuntimeInSeconds": 600},
    )
    folder = tmp_path / "function"
    folder.mkdir()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as code:
        code.writestr("index.py", textwrap.dedent(FUNCTION))
    client("lambda").create_function(
        FunctionName="function",
        Runtime=runtime(),
        Role=ROLE,
        Handler="index.handler",
        Code={"ZipFile": buffer.getvalue()},
        Environment={"Variables": {"FOLDER": str(folder)}},
        Timeout=120,
    )
    queue = sqs.create_queue(QueueName="work", Attributes={"VisibilityTimeout": "720"})["QueueUrl"]
    arn = "arn:aws:sqs:us-east-1:000000000000:work"
    client("lambda").create_event_source_mapping(EventSourceArn=arn, FunctionName="function", BatchSize=1)
    sqs.send_message(QueueUrl=queue, MessageBody="handled")
    pid = int(until(lambda: (folder / "started").exists() and (folder / "started").read_text(), bool, 30))
    sagemaker.get_waiter("endpoint_in_service").wait(EndpointName="endpoint", WaiterConfig={"Delay": 1})
    until(
        lambda: sagemaker.describe_training_job(TrainingJobName="job"),
        lambda job: job["SecondaryStatus"] == "Training",
        30,
    )

    end(first, how)
    until(lambda: psutil.pid_exists(pid), lambda there: not there, 10)
    (folder / "go").touch()  # for the function that is started again
    client = clients(aws())

    until(lambda: (folder / "handled").exists(), bool, 30)
    job = client("sagemaker").describe_training_job(TrainingJobName="job")
    assert job["TrainingJobStatus"] == "Failed" and job["FailureReason"]
    client("sagemaker").get_waiter("endpoint_in_service").wait(EndpointName="endpoint", WaiterConfig={"Delay": 1})
    answer = client("sagemaker-runtime").invoke_endpoint(EndpointName="endpoint", ContentType="text/plain", Body=b"x")
    assert json.loads(answer["Body"].read())["answer"] == "here"


def test_a_kill_in_the_midst_of_writes_costs_the_last_ones_only(aws):
    first = aws()
    client = clients(first)
    client("s3").create_bucket(Bucket="things")
    dynamodb, s3, sqs = client("dynamodb"), client("s3"), client("sqs")
    dynamodb.create_table(
        TableName="rows",
        KeySchema=[{"AttributeName": "pk", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "pk", "AttributeType": "S"}],
        BillingMode="PAY_PER_REQUEST",
    )
    queue = sqs.create_queue(QueueName="queue")["QueueUrl"]
    acknowledged = []

    def work():
        with contextlib.suppress(BotoCoreError, ClientError, OSError):
            for number in range(100_000):
                both = [
                    {"Put": {"TableName": "rows", "Item": {"pk": {"S": f"{side}/{number}"}}}}
                    for side in ("left", "right")
                ]
                dynamodb.transact_write_items(TransactItems=both)
                body = os.urandom(1 + number % 50_000)
                s3.put_object(
                    Bucket="things", Key="same", Body=body, Metadata={"n": str(number), "size": str(len(body))}
                )
                sqs.send_message(QueueUrl=queue, MessageBody=str(number))
                acknowledged.append(number)

    worker = threading.Thread(target=work)
    worker.start()
    until(lambda: len(acknowledged), lambda count: count >= 30, 60)
    must = set(acknowledged)
    time.sleep(2.5)  # the promise is a second; the machine may be busy
    os.kill(first.pid, signal.SIGKILL)
    worker.join()

    second = aws()
    client = clients(second)
    pages = client("dynamodb").get_paginator("scan").paginate(TableName="rows")
    rows = {item["pk"]["S"] for page in pages for item in page["Items"]}
    left, right = ({int(row.split("/")[1]) for row in rows if row.startswith(side)} for side in ("left", "right"))
    assert left == right, "a transaction is there whole or not at all"
    assert must <= left
    found = client("s3").get_object(Bucket="things", Key="same")
    body = found["Body"].read()
    assert int(found["Metadata"]["n"]) >= max(acknowledged), "objects are there at once"
    assert len(body) == found["ContentLength"] == int(found["Metadata"]["size"])
    arrived = {}
    until(lambda: receive(client("sqs"), queue, arrived), lambda bodies: must <= {int(one) for one in bodies}, 30)
    intact(second.state)
