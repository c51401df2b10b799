"""Metrics that services publish by themselves, and alarms on them, against what AWS documents."""

import io
import json
import time
import zipfile

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from local.emulator import ACCOUNT, REGION, Emulator
from local.stack import runtime
from tests.makers.waiting import wait_for

HANDLER = """
import time
def handler(event, context):
    event = event if "Records" not in event else {}
    for line in event.get("lines", []):
        print(line)
    time.sleep(event.get("sleep", 0))
    if event.get("fail"):
        raise ValueError("as asked")
    return event
"""


class Account:
    """Clients of an emulator, with a role for everything."""

    def __init__(self, aws):
        self.aws, self.clients = aws, {}
        trusted = ["lambda.amazonaws.com", "states.amazonaws.com"]
        trust = {"Effect": "Allow", "Principal": {"Service": trusted}, "Action": "sts:AssumeRole"}
        iam = self.client("iam")
        self.role = iam.create_role(RoleName="r", AssumeRolePolicyDocument=json.dumps({"Statement": [trust]}))["Role"][
            "Arn"
        ]
        allow = {"Statement": {"Effect": "Allow", "Action": "*", "Resource": "*"}}
        iam.put_role_policy(RoleName="r", PolicyName="all", PolicyDocument=json.dumps(allow))

    def client(self, service):
        if service not in self.clients:
            keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
            once = Config(retries={"total_max_attempts": 1})  # what is throttled stays so
            self.clients[service] = boto3.client(
                service, endpoint_url=self.aws.endpoint_url, region_name=REGION, config=once, **keys
            )
        return self.clients[service]

    def function(self, name):
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as code:
            code.writestr("app.py", HANDLER)
        return self.client("lambda").create_function(
            FunctionName=name,
            Runtime=runtime(),
            Handler="app.handler",
            Role=self.role,
            Code={"ZipFile": archive.getvalue()},
        )["FunctionArn"]

    def queue(self, name, **attributes):
        """The URL and the ARN of a new queue."""
        sqs = self.client("sqs")
        url = sqs.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]
        arn = f"arn:aws:sqs:{REGION}:{ACCOUNT}:{name}"
        policy = {"Effect": "Allow", "Principal": "*", "Action": "sqs:SendMessage", "Resource": arn}
        sqs.set_queue_attributes(QueueUrl=url, Attributes={"Policy": json.dumps({"Statement": [policy]})})
        return url, arn

    def machine(self, name, **state):
        definition = {"StartAt": "S", "States": {"S": {"End": True, **state}}}
        if "TimeoutSeconds" in state:
            definition["TimeoutSeconds"] = definition["States"]["S"].pop("TimeoutSeconds")
        return self.client("stepfunctions").create_state_machine(
            name=name, definition=json.dumps(definition), roleArn=self.role
        )["stateMachineArn"]

    def statistics(self, namespace, metric, *statistics, period=3600, **dimensions):
        """The statistics over the last hours, as one period holds them; {} without data."""
        points = self.client("cloudwatch").get_metric_data(
            StartTime=time.time() - 2 * period,
            EndTime=time.time() + period,
            MetricDataQueries=[
                {
                    "Id": f"q{n}",
                    "MetricStat": {
                        "Metric": {
                            "Namespace": namespace,
                            "MetricName": metric,
                            "Dimensions": [{"Name": name, "Value": value} for name, value in dimensions.items()],
                        },
                        "Period": period,
                        "Stat": statistic,
                    },
                }
                for n, statistic in enumerate(statistics)
            ],
        )["MetricDataResults"]
        merge = {"Maximum": max, "Minimum": min}
        return {
            statistic: merge.get(statistic, sum)(found["Values"])
            for statistic, found in zip(statistics, points, strict=True)
            if found["Values"]
        }

    def total(self, namespace, metric, **dimensions):
        return self.statistics(namespace, metric, "Sum", **dimensions).get("Sum", 0)

    def alarm(self, name, **more):
        alarm = {
            "AlarmName": name,
            "Namespace": "T",
            "MetricName": name,
            "Statistic": "Sum",
            "Period": 60,
            "EvaluationPeriods": 1,
            "Threshold": 1,
            "ComparisonOperator": "GreaterThanOrEqualToThreshold",
            **more,
        }
        given = {member: value for member, value in alarm.items() if value is not None}
        self.client("cloudwatch").put_metric_alarm(**given)

    def described(self, name, kind="MetricAlarm"):
        found = self.client("cloudwatch").describe_alarms(AlarmNames=[name], AlarmTypes=[kind])
        return found[f"{kind}s"][0]

    def wait_for_state(self, name, state, kind="MetricAlarm"):
        def described():
            found = self.described(name, kind)
            return found if found["StateValue"] == state else None

        return wait_for(described)

    def put(self, metric, *values, namespace="T", age=0.0, **more):
        datum = {"MetricName": metric, "Values": values, "Timestamp": time.time() - age, **more}
        self.client("cloudwatch").put_metric_data(Namespace=namespace, MetricData=[datum])

    def taken(self, queue_url):
        """The bodies of the messages in a queue, which are taken out."""
        sqs, bodies = self.client("sqs"), []
        while messages := sqs.receive_message(QueueUrl=queue_url, MaxNumberOfMessages=10).get("Messages"):
            for message in messages:
                sqs.delete_message(QueueUrl=queue_url, ReceiptHandle=message["ReceiptHandle"])
                bodies.append(json.loads(message["Body"]))
        return bodies


@pytest.fixture(scope="module")
def account(tmp_path_factory):
    with Emulator(state=tmp_path_factory.mktemp("aws")) as aws:
        yield Account(aws)


# --- AWS/Lambda ---


def test_every_invocation_counts_once_however_it_is_started(account):
    account.function("counted")
    functions, sqs = account.client("lambda"), account.client("sqs")
    url, arn = account.queue("source")
    functions.create_event_source_mapping(FunctionName="counted", EventSourceArn=arn, BatchSize=1)

    functions.invoke(FunctionName="counted", Payload=b'{"sleep": 0.2}')
    functions.invoke(FunctionName="counted", Payload=b'{"fail": 1}')
    functions.invoke(FunctionName="counted", InvocationType="Event", Payload=b"{}")
    sqs.send_message(QueueUrl=url, MessageBody="hello")

    def seen(metric):
        return account.total("AWS/Lambda", metric, FunctionName="counted")

    wait_for(lambda: seen("Invocations") >= 4)
    assert (seen("Invocations"), seen("Errors"), seen("Throttles")) == (4, 1, 0)
    took = account.statistics("AWS/Lambda", "Duration", "SampleCount", "Maximum", FunctionName="counted")
    assert took["SampleCount"] == 4 and took["Maximum"] >= 200, "in milliseconds"
    at_once = account.statistics("AWS/Lambda", "ConcurrentExecutions", "Maximum", FunctionName="counted")
    assert at_once["Maximum"] >= 1
    assert account.total("AWS/Lambda", "Errors") >= 1, "of all functions, and of no other metric's dimensions"


def test_a_throttled_call_is_no_invocation(account):
    account.function("throttled")
    functions = account.client("lambda")
    functions.put_function_concurrency(FunctionName="throttled", ReservedConcurrentExecutions=0)
    with pytest.raises(ClientError, match="TooManyRequests"):
        functions.invoke(FunctionName="throttled")
    assert account.total("AWS/Lambda", "Throttles", FunctionName="throttled") == 1
    assert account.statistics("AWS/Lambda", "Invocations", "Sum", FunctionName="throttled") == {}


def test_what_a_function_prints_in_the_embedded_format_are_metrics(account):
    account.function("printing")
    document = {
        "_aws": {
            "Timestamp": int(time.time() * 1000),
            "CloudWatchMetrics": [
                {
                    "Namespace": "Printed",
                    "Dimensions": [["page", "language"], []],
                    "Metrics": [{"Name": "Words", "Unit": "Count"}, {"Name": "Time", "StorageResolution": 1}],
                }
            ],
        },
        "page": "one",
        "language": "en",
        "Words": [3, 4],
        "Time": 0.5,
    }
    lines = [json.dumps(document), json.dumps({**document, "Words": "many"}), "nothing"]
    payload = json.dumps({"lines": lines}).encode()
    account.client("lambda").invoke(FunctionName="printing", Payload=payload)
    for dimensions in ({"page": "one", "language": "en"}, {}):
        words = account.statistics("Printed", "Words", "Sum", "SampleCount", "Maximum", **dimensions)
        assert words == {"Sum": 7, "SampleCount": 2, "Maximum": 4}
    assert account.total("Printed", "Time") == 0.5


def test_an_execution_environment_has_one_log_stream(account):
    account.function("logging")
    for line in ("first", "second"):
        payload = json.dumps({"lines": [line]}).encode()
        account.client("lambda").invoke(FunctionName="logging", Payload=payload)
    logs = account.client("logs")
    stream = logs.describe_log_streams(logGroupName="/aws/lambda/logging")["logStreams"]
    assert len(stream) == 1
    events = logs.get_log_events(logGroupName="/aws/lambda/logging", logStreamName=stream[0]["logStreamName"])["events"]
    words = [event["message"].split()[0] for event in events]
    assert words == ["START", "first", "END", "REPORT", "START", "second", "END", "REPORT"]


# --- AWS/SQS ---


def test_a_queues_levels_and_counts(account):
    sqs = account.client("sqs")
    url, _ = account.queue("levels")
    sqs.receive_message(QueueUrl=url)
    attributes = {"a": {"DataType": "String", "StringValue": "bc"}}
    sqs.send_message(QueueUrl=url, MessageBody="ä", MessageAttributes=attributes)
    sqs.send_message_batch(QueueUrl=url, Entries=[{"Id": "1", "MessageBody": "x"}, {"Id": "2", "MessageBody": "y"}])
    sqs.send_message(QueueUrl=url, MessageBody="later", DelaySeconds=600)

    def largest(metric):
        return account.statistics("AWS/SQS", metric, "Maximum", QueueName="levels").get("Maximum")

    wait_for(lambda: largest("ApproximateNumberOfMessagesVisible"))
    time.sleep(1)  # until the messages have an age, which the next change shows
    handles = [
        message["ReceiptHandle"] for message in sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=2)["Messages"]
    ]
    sqs.delete_message(QueueUrl=url, ReceiptHandle=handles[0])
    wait_for(lambda: largest("ApproximateAgeOfOldestMessage"))
    for level in ("Visible", "NotVisible", "Delayed"):
        assert largest(f"ApproximateNumberOfMessages{level}") >= 1, level

    def total(metric):
        return account.total("AWS/SQS", metric, QueueName="levels")

    sent, received, deleted = (total(f"NumberOfMessages{done}") for done in ("Sent", "Received", "Deleted"))
    assert (sent, received, deleted, total("NumberOfEmptyReceives")) == (4, 2, 1, 1)
    sizes = account.statistics("AWS/SQS", "SentMessageSize", "Sum", "Maximum", "Minimum", QueueName="levels")
    assert sizes == {"Sum": 2 + 9 + 1 + 1 + 5, "Maximum": 11, "Minimum": 1}


def test_a_move_to_the_dead_letter_queue_sends_nothing_and_trips_an_alarm_on_what_is_visible(account):
    sqs = account.client("sqs")
    dead, dead_arn = account.queue("dead")
    redrive = json.dumps({"deadLetterTargetArn": dead_arn, "maxReceiveCount": 1})
    url, _ = account.queue("living", RedrivePolicy=redrive, VisibilityTimeout="0")
    account.alarm(
        "dead-letters",
        Namespace="AWS/SQS",
        MetricName="ApproximateNumberOfMessagesVisible",
        Dimensions=[{"Name": "QueueName", "Value": "dead"}],
        Statistic="Maximum",
        Period=300,
        TreatMissingData="notBreaching",
    )
    account.wait_for_state("dead-letters", "OK")
    sqs.send_message(QueueUrl=url, MessageBody="poison")
    sqs.receive_message(QueueUrl=url)
    sqs.receive_message(QueueUrl=url)
    assert account.wait_for_state("dead-letters", "ALARM")["StateReason"].startswith(
        "Threshold Crossed: 1 datapoint [1"
    )
    assert account.total("AWS/SQS", "NumberOfMessagesSent", QueueName="living") == 1
    assert account.statistics("AWS/SQS", "NumberOfMessagesSent", "Sum", QueueName="dead") == {}


def test_messages_that_rules_send_count_too(account):
    url, arn = account.queue("ruled")
    events = account.client("events")
    events.put_rule(Name="ours", EventPattern=json.dumps({"source": ["ours"]}))
    events.put_targets(Rule="ours", Targets=[{"Id": "q", "Arn": arn}])
    events.put_events(Entries=[{"Source": "ours", "DetailType": "t", "Detail": "{}"}])
    wait_for(lambda: account.taken(url))
    for done in ("Sent", "Received", "Deleted"):
        assert account.total("AWS/SQS", f"NumberOfMessages{done}", QueueName="ruled") == 1, done


# --- AWS/States ---


def test_executions_and_their_tasks_are_counted_by_how_they_ended(account):
    states = account.client("stepfunctions")
    function = account.function("task")
    lazy = account.machine("lazy", Type="Wait", Seconds=60)
    fast = account.machine("fast", Type="Wait", Seconds=60, TimeoutSeconds=1)
    invoke = account.machine("invoke", Type="Task", Resource=function)
    integrate = account.machine("integrate", Type="Task", Resource="arn:aws:states:::sqs:sendMessage", Parameters={})

    stopped = states.start_execution(stateMachineArn=lazy)["executionArn"]
    states.start_execution(stateMachineArn=fast)
    states.start_execution(stateMachineArn=invoke, input='{"sleep": 0.3}')
    states.start_execution(stateMachineArn=invoke, input='{"fail": 1}')
    states.start_execution(stateMachineArn=integrate)
    wait_for(lambda: account.total("AWS/States", "ExecutionsStarted", StateMachineArn=lazy))
    states.stop_execution(executionArn=stopped)

    def ended(machine):
        ends = ("Succeeded", "Failed", "Aborted", "TimedOut")
        return {
            end: n for end in ends if (n := account.total("AWS/States", f"Executions{end}", StateMachineArn=machine))
        }

    wait_for(lambda: sum(n for machine in (lazy, fast, invoke, integrate) for n in ended(machine).values()) == 5)
    assert ended(lazy) == {"Aborted": 1}
    assert ended(fast) == {"TimedOut": 1}
    assert ended(invoke) == {"Succeeded": 1, "Failed": 1}
    assert ended(integrate) == {"Failed": 1}
    time_ = account.statistics("AWS/States", "ExecutionTime", "Minimum", "SampleCount", StateMachineArn=fast)
    assert 1000 <= time_["Minimum"] < 10_000 and time_["SampleCount"] == 1, "in milliseconds"

    by_function = {"LambdaFunctionArn": function}
    counts = [
        account.total("AWS/States", f"LambdaFunctions{n}", **by_function) for n in ("Started", "Succeeded", "Failed")
    ]
    assert counts == [2, 1, 1]
    assert account.statistics("AWS/States", "LambdaFunctionTime", "Maximum", **by_function)["Maximum"] >= 300
    integration = {"ServiceIntegrationResourceArn": "arn:aws:states:::sqs:sendMessage"}
    assert account.total("AWS/States", "ServiceIntegrationsFailed", **integration) == 1


# --- Data ---


@pytest.mark.parametrize(
    "datum, message",
    [
        ({"Value": float("nan")}, "The value NaN for parameter MetricData.member.1.Value is invalid"),
        ({"Values": [1, 2.0**361]}, "MetricData.member.1.Values is invalid"),
        ({"Values": [1, 2], "Counts": [1]}, "Values and MetricData.member.1.Counts must be of the same size"),
        (
            {"Value": 1, "Timestamp": time.time() - 15 * 86400},
            "Timestamp must specify a time within the past two weeks",
        ),
        ({"Value": 1, "Timestamp": time.time() + 3 * 3600}, "no more than two hours in the future"),
    ],
)
def test_data_that_cloudwatch_does_not_take_is_refused(account, datum, message):
    with pytest.raises(ClientError, match=f"InvalidParameterValue.*{message}"):
        account.client("cloudwatch").put_metric_data(Namespace="T", MetricData=[{"MetricName": "refused", **datum}])
    assert account.statistics("T", "refused", "SampleCount") == {}


def test_metric_data_is_newest_first_unless_asked_otherwise(account):
    for age in (180, 120, 60):
        account.put("ordered", age, age=age)

    def values(**more):
        stat = {"Metric": {"Namespace": "T", "MetricName": "ordered"}, "Period": 60, "Stat": "Sum"}
        start, end = time.time() - 600, time.time()
        found = account.client("cloudwatch").get_metric_data(
            StartTime=start, EndTime=end, MetricDataQueries=[{"Id": "q", "MetricStat": stat}], **more
        )["MetricDataResults"][0]
        assert len(found["Timestamps"]) == 3
        return found["Values"]

    assert values() == [60, 120, 180]
    assert values(ScanBy="TimestampAscending") == [180, 120, 60]


# --- Alarms ---

STATISTICS = {"SampleCount": 4, "Sum": 20, "Average": 5, "Minimum": 1, "Maximum": 9, "p50": 5, "p75": 6}
COMPARISONS = {
    "GreaterThanOrEqualToThreshold": "ALARM",
    "GreaterThanThreshold": "OK",
    "LessThanOrEqualToThreshold": "ALARM",
    "LessThanThreshold": "OK",
}


def test_alarms_compare_every_statistic_as_they_are_told(account):
    account.put("compared", 1, 5, 9, age=60, Counts=[1, 2, 1])
    expected = {}
    for statistic, value in STATISTICS.items():
        which = "ExtendedStatistic" if statistic.startswith("p") else "Statistic"
        for comparison, state in COMPARISONS.items():
            name = f"{statistic}-{comparison}"
            told = {"Threshold": value, "ComparisonOperator": comparison, which: statistic}
            account.alarm(name, **{"Statistic": None, **told, "MetricName": "compared"})
            expected[name] = state

    def found():
        pages = account.client("cloudwatch").get_paginator("describe_alarms").paginate()
        alarms = [alarm for page in pages for alarm in page["MetricAlarms"] if alarm["AlarmName"] in expected]
        return {alarm["AlarmName"]: alarm["StateValue"] for alarm in alarms}

    wait_for(lambda: "INSUFFICIENT_DATA" not in found().values())
    assert found() == expected


def test_an_alarm_goes_off_at_m_of_n_and_says_so(account):
    for age, value in ((180, 5), (120, 0), (60, 7)):
        account.put("mofn", value, age=age)
    account.alarm("mofn", EvaluationPeriods=3, DatapointsToAlarm=2)
    alarm = account.wait_for_state("mofn", "ALARM")
    assert alarm["StateReason"].startswith("Threshold Crossed: 2 out of the last 3 datapoints [7.0 (")
    assert alarm["StateReason"].endswith(
        "were greater than or equal to the threshold (1.0) (minimum 2 datapoints for OK -> ALARM transition)."
    )
    assert json.loads(alarm["StateReasonData"])["recentDatapoints"] == [5.0, 0.0, 7.0]


def test_without_data_an_alarm_says_how_that_was_treated(account):
    account.alarm("silent", TreatMissingData="breaching")
    assert "1 missing datapoint was treated as [Breaching]" in account.wait_for_state("silent", "ALARM")["StateReason"]
    account.alarm("quiet", TreatMissingData="notBreaching")
    assert "treated as [NonBreaching]" in account.wait_for_state("quiet", "OK")["StateReason"]


def test_a_change_of_state_is_told_to_its_topic_and_to_eventbridge(account):
    sns, events = account.client("sns"), account.client("events")
    heard, heard_arn = account.queue("heard")
    topic = sns.create_topic(Name="alarms")["TopicArn"]
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=heard_arn, Attributes={"RawMessageDelivery": "true"})
    seen, seen_arn = account.queue("seen")
    pattern = {"source": ["aws.cloudwatch"], "detail-type": ["CloudWatch Alarm State Change"]}
    pattern["detail"] = {"alarmName": ["told"], "state": {"value": ["ALARM"]}}
    events.put_rule(Name="alarms", EventPattern=json.dumps(pattern))
    events.put_targets(Rule="alarms", Targets=[{"Id": "q", "Arn": seen_arn}])

    account.alarm("told", AlarmActions=[topic], TreatMissingData="notBreaching", AlarmDescription="Something is wrong")
    account.wait_for_state("told", "OK")
    account.put("told", 3)

    message = wait_for(lambda: account.taken(heard))[0]
    assert (message["OldStateValue"], message["NewStateValue"]) == ("OK", "ALARM")
    event = wait_for(lambda: account.taken(seen))[0]
    alarm = account.described("told")
    assert event["resources"] == [alarm["AlarmArn"]]
    detail = event["detail"]
    assert (detail["previousState"]["value"], detail["state"]["value"]) == ("OK", "ALARM")
    assert detail["state"]["reason"] == alarm["StateReason"]
    assert detail["configuration"]["description"] == "Something is wrong"
    stat = detail["configuration"]["metrics"][0]["metricStat"]
    assert stat == {"metric": {"namespace": "T", "name": "told", "dimensions": {}}, "period": 60, "stat": "Sum"}


def test_a_state_that_was_set_lasts_until_the_data_says_otherwise(account):
    sns, cloudwatch = account.client("sns"), account.client("cloudwatch")
    acted, acted_arn = account.queue("acted")
    topic = sns.create_topic(Name="set")["TopicArn"]
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=acted_arn, Attributes={"RawMessageDelivery": "true"})
    account.put("set", 0, age=60)
    account.alarm("set", AlarmActions=[topic])
    account.wait_for_state("set", "OK")
    cloudwatch.set_alarm_state(AlarmName="set", StateValue="ALARM", StateReason="a test")
    account.wait_for_state("set", "OK")
    assert [message["NewStateReason"] for message in wait_for(lambda: account.taken(acted))] == ["a test"]
    with pytest.raises(ClientError, match="ValidationError.*'FINE' at 'stateValue'"):
        cloudwatch.set_alarm_state(AlarmName="set", StateValue="FINE", StateReason="a test")

    cloudwatch.disable_alarm_actions(AlarmNames=["set"])
    account.put("set", 5)
    account.wait_for_state("set", "ALARM")
    assert account.taken(acted) == [], "its actions are disabled"

    account.alarm("unset", TreatMissingData="ignore")
    cloudwatch.set_alarm_state(AlarmName="unset", StateValue="ALARM", StateReason="a test")
    time.sleep(2.5)  # two evaluations without data
    alarm = account.described("unset")
    assert alarm["StateValue"] == "ALARM" and "StateReasonData" not in alarm


def test_a_composite_alarm_follows_its_children(account):
    for child in ("left", "right"):
        account.alarm(child, TreatMissingData="notBreaching")
        account.wait_for_state(child, "OK")
    cloudwatch = account.client("cloudwatch")
    cloudwatch.put_composite_alarm(AlarmName="both", AlarmRule="ALARM(left) AND ALARM(right)")
    account.wait_for_state("both", "OK", "CompositeAlarm")
    account.put("left", 1)
    account.wait_for_state("left", "ALARM")
    assert account.described("both", "CompositeAlarm")["StateValue"] == "OK"
    account.put("right", 1)
    account.wait_for_state("both", "ALARM", "CompositeAlarm")


MATH = [{"Id": "e", "Expression": "errors / requests", "ReturnData": True}]


@pytest.mark.parametrize(
    "more, message",
    [
        ({"Metrics": MATH}, "NotImplemented.*PutMetricAlarm with Metrics"),
        ({"ThresholdMetricId": "band"}, "NotImplemented.*ThresholdMetricId"),
        ({"EvaluateLowSampleCountPercentile": "ignore"}, "NotImplemented.*EvaluateLowSampleCountPercentile"),
        ({"ComparisonOperator": "GreaterThanUpperThreshold"}, "NotImplemented.*GreaterThanUpperThreshold"),
        ({"Statistic": "Sum", "ExtendedStatistic": "p9"}, "InvalidParameterCombination"),
        ({"Statistic": "Median"}, "ValidationError.*'Median' at 'statistic'"),
        ({"TreatMissingData": "good"}, "ValidationError.*'good' at 'treatMissingData'"),
        ({"Namespace": None}, "ValidationError.*Namespace must not be null"),
        ({"DatapointsToAlarm": 2}, "ValidationError.*DatapointsToAlarm"),
    ],
)
def test_what_could_not_be_judged_is_refused(account, more, message):
    with pytest.raises(ClientError, match=message):
        account.alarm("refused", **more)
    assert not account.client("cloudwatch").describe_alarms(AlarmNames=["refused"])["MetricAlarms"]


def test_trimmed_means_and_suppressed_composite_alarms_are_refused(account):
    with pytest.raises(ClientError, match=r"NotImplemented.*tm90"):
        account.alarm("trimmed", Statistic=None, ExtendedStatistic="tm90")
    with pytest.raises(ClientError, match=r"NotImplemented.*ActionsSuppressor"):
        account.client("cloudwatch").put_composite_alarm(
            AlarmName="suppressed", AlarmRule="TRUE", ActionsSuppressor="other"
        )


# --- What is kept ---


def test_metrics_and_alarms_outlive_a_restart(tmp_path):
    with Emulator(state=tmp_path, keep=True) as aws:
        account = Account(aws)
        account.put("kept", 1, 2, 9, age=60)
        account.alarm("kept", Threshold=12)
        account.wait_for_state("kept", "ALARM")
    with Emulator(state=tmp_path, port=aws.port, keep=True):
        assert account.described("kept")["StateValue"] == "ALARM"
        assert account.statistics("T", "kept", "Sum", "p50") == {"Sum": 12, "p50": 2}
        account.put("kept", 8, age=60)
        assert account.statistics("T", "kept", "Sum", "p50") == {"Sum": 20, "p50": 5}
