"""Application Auto Scaling of endpoint variants, through boto3, Step Functions and CloudFormation."""

import json
import os
import signal
import textwrap
import time

import pytest
from botocore.exceptions import ClientError

from local.emulator import Emulator
from tests.makers.sagemaker import SERVER, Load, World, until

DIMENSION = "sagemaker:variant:DesiredInstanceCount"
INVOCATIONS = {"PredefinedMetricType": "SageMakerVariantInvocationsPerInstance"}
LINKED_ROLE = (
    "arn:aws:iam::000000000000:role/aws-service-role/sagemaker.application-autoscaling.amazonaws.com/"
    "AWSServiceRoleForApplicationAutoScaling_SageMakerEndpoint"
)


class Scaling:
    """A local AWS with endpoints that scale; the alarms' periods are seconds."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.api = world.client("application-autoscaling")
        world.model("model", "hello")
        self._made = 0

    def endpoint(self, instances: int = 1, instance_type: str = "ml.c5.large") -> str:
        """The name of a new endpoint in service."""
        self._made += 1
        name = f"scaled-{self._made}"
        self.config(name, instances, instance_type)
        self.world.sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=name)
        assert self.world.endpoint(name)["EndpointStatus"] == "InService"
        return name

    def config(self, name: str, instances: int = 1, instance_type: str = "ml.c5.large", variant: str = "v") -> None:
        self.world.sagemaker.create_endpoint_config(
            EndpointConfigName=name,
            ProductionVariants=[
                {
                    "VariantName": variant,
                    "ModelName": "model",
                    "InitialInstanceCount": instances,
                    "InstanceType": instance_type,
                }
            ],
        )

    def register(self, endpoint: str, least: int | None = 1, most: int | None = 4, **more) -> str:
        capacities = {"MinCapacity": least, "MaxCapacity": most}
        capacities = {name: count for name, count in capacities.items() if count is not None}
        return self.api.register_scalable_target(**key(endpoint), **capacities, **more)["ScalableTargetARN"]

    def track(self, endpoint: str, target: float = 10, name: str = "follow", **config) -> dict:
        """A target tracking policy that acts at once, unless told otherwise."""
        config = {
            "TargetValue": target,
            "PredefinedMetricSpecification": INVOCATIONS,
            "ScaleOutCooldown": 0,
            "ScaleInCooldown": 0,
        } | config
        return self.api.put_scaling_policy(
            **key(endpoint),
            PolicyName=name,
            PolicyType="TargetTrackingScaling",
            TargetTrackingScalingPolicyConfiguration={name: value for name, value in config.items() if value != {}},
        )

    def feed(self, endpoint: str, value: float) -> None:
        """Invocations per instance in every second from a little before the low alarm looks until a little later."""
        now = int(time.time())
        self.world.cloudwatch.put_metric_data(
            Namespace="AWS/SageMaker",
            MetricData=[
                {
                    "MetricName": "InvocationsPerInstance",
                    "Dimensions": [
                        {"Name": "EndpointName", "Value": endpoint},
                        {"Name": "VariantName", "Value": "v"},
                    ],
                    "Timestamp": second,
                    "Value": value,
                }
                for second in range(now - 20, now + 4)
            ],
        )

    def activities(self, endpoint: str, **more) -> list[dict]:
        """Newest first."""
        return self.api.describe_scaling_activities(**key(endpoint), **more)["ScalingActivities"]

    def reaches(self, endpoint: str, instances: int) -> dict:
        """The description of the endpoint once it has this many instances."""
        return until(
            lambda: self.world.sagemaker.describe_endpoint(EndpointName=endpoint),
            lambda found: (
                found["EndpointStatus"] == "InService"
                and found["ProductionVariants"][0]["CurrentInstanceCount"] == instances
            ),
            30,
        )

    def ended(self, endpoint: str, count: int = 1) -> list[dict]:
        """The activities, once so many have ended."""
        return until(
            lambda: self.activities(endpoint),
            lambda found: sum("EndTime" in activity for activity in found) >= count,
            30,
        )

    def instances(self, endpoint: str) -> int:
        variants = self.world.sagemaker.describe_endpoint(EndpointName=endpoint)["ProductionVariants"]
        return variants[0]["DesiredInstanceCount"]

    def alarms(self, endpoint: str) -> list[dict]:
        prefix = f"TargetTracking-endpoint/{endpoint}/"
        return self.world.cloudwatch.describe_alarms(AlarmNamePrefix=prefix)["MetricAlarms"]


def key(endpoint: str) -> dict:
    resource = f"endpoint/{endpoint}/variant/v"
    return {"ServiceNamespace": "sagemaker", "ResourceId": resource, "ScalableDimension": DIMENSION}


@pytest.fixture(scope="module")
def scaling(tmp_path_factory):
    images = tmp_path_factory.mktemp("images")
    (images / "server").mkdir()
    (images / "server" / "__main__.py").write_text(textwrap.dedent(SERVER))
    environment = {"HOUNDLOOP_IMAGES": str(images), "HOUNDLOOP_PRELOAD": "json", "HOUNDLOOP_SCALING_PERIOD": "1"}
    with Emulator(state=tmp_path_factory.mktemp("state"), auth=True, environment=environment) as emulator:
        yield Scaling(World(emulator))


@pytest.fixture(scope="module", autouse=True)
def deserted(scaling):
    """An endpoint that nobody ever calls. Made first, because its alarm takes the longest."""
    name = scaling.endpoint(2)
    scaling.register(name, 1, 2)
    scaling.track(name)
    return name


@pytest.fixture(scope="module")
def idle(scaling):
    """An endpoint whose registration tests change; nothing scales it."""
    return scaling.endpoint()


def refused(call, code: str, *words: str) -> None:
    with pytest.raises(ClientError) as caught:
        call()
    assert caught.value.response["Error"]["Code"] == code, caught.value
    for word in words:
        assert word in caught.value.response["Error"]["Message"]


# --- Registration ---


def test_a_target_is_registered_described_changed_and_deregistered(scaling, idle):
    arn = scaling.register(idle, 1, 3, Tags={"team": "hounds"})
    assert arn.startswith("arn:aws:application-autoscaling:us-east-1:000000000000:scalable-target/")
    found = scaling.api.describe_scalable_targets(
        ServiceNamespace="sagemaker", ResourceIds=[key(idle)["ResourceId"]], ScalableDimension=DIMENSION
    )["ScalableTargets"]
    assert len(found) == 1
    created = found[0].pop("CreationTime")
    assert abs(created.timestamp() - time.time()) < 60
    suspended = {
        "DynamicScalingInSuspended": False,
        "DynamicScalingOutSuspended": False,
        "ScheduledScalingSuspended": False,
    }
    assert found[0] == key(idle) | {
        "MinCapacity": 1,
        "MaxCapacity": 3,
        "RoleARN": LINKED_ROLE,
        "ScalableTargetARN": arn,
        "SuspendedState": suspended,
    }

    again = scaling.register(idle, None, 2, SuspendedState={"DynamicScalingInSuspended": True})
    changed = scaling.api.describe_scalable_targets(ServiceNamespace="sagemaker", ResourceIds=[key(idle)["ResourceId"]])
    assert again == arn
    assert changed["ScalableTargets"][0]["MinCapacity"] == 1
    assert changed["ScalableTargets"][0]["MaxCapacity"] == 2
    assert changed["ScalableTargets"][0]["SuspendedState"] == suspended | {"DynamicScalingInSuspended": True}

    assert scaling.api.list_tags_for_resource(ResourceARN=arn)["Tags"] == {"team": "hounds"}
    scaling.api.tag_resource(ResourceARN=arn, Tags={"stage": "test"})
    scaling.api.untag_resource(ResourceARN=arn, TagKeys=["team"])
    assert scaling.api.list_tags_for_resource(ResourceARN=arn)["Tags"] == {"stage": "test"}

    scaling.api.deregister_scalable_target(**key(idle))
    refused(lambda: scaling.api.list_tags_for_resource(ResourceARN=arn), "ResourceNotFoundException", arn)
    gone = scaling.api.describe_scalable_targets(ServiceNamespace="sagemaker", ResourceIds=[key(idle)["ResourceId"]])
    assert gone["ScalableTargets"] == []


def test_what_cannot_be_registered_is_refused_in_awss_words(scaling, idle):
    register = scaling.api.register_scalable_target
    refused(lambda: register(**key("nowhere"), MinCapacity=1, MaxCapacity=2), "ValidationException", "Could not find")
    other = key(idle) | {"ResourceId": f"endpoint/{idle}/variant/other"}
    refused(lambda: register(**other, MinCapacity=1, MaxCapacity=2), "ValidationException", 'variant "other"')
    refused(lambda: register(**key(idle), MaxCapacity=2), "ValidationException", "Minimum capacity must be specified")
    refused(lambda: register(**key(idle), MinCapacity=2), "ValidationException", "Maximum capacity must be specified")
    refused(
        lambda: register(**key(idle), MinCapacity=3, MaxCapacity=2),
        "ValidationException",
        "Maximum capacity cannot be less than minimum capacity",
    )
    refused(
        lambda: register(**key(idle) | {"ResourceId": idle}, MinCapacity=1, MaxCapacity=2),
        "ValidationException",
        "Unsupported service namespace, resource type or scalable dimension",
    )
    refused(
        lambda: register(**key(idle) | {"ScalableDimension": "ecs:service:DesiredCount"}),
        "ValidationException",
        "Unsupported service namespace, resource type or scalable dimension",
    )
    refused(
        lambda: register(ServiceNamespace="mongodb", ResourceId="x"),
        "ValidationException",
        "2 validation errors detected",
        "'mongodb' at 'serviceNamespace' failed to satisfy constraint: Member must satisfy enum value set: [ecs,",
        "Value null at 'scalableDimension' failed to satisfy constraint: Member must not be null",
    )


def test_a_burstable_instance_type_does_not_scale(scaling):
    name = scaling.endpoint(instance_type="ml.t2.medium")
    refused(
        lambda: scaling.register(name),
        "ValidationException",
        "You cannot register a variant with ml.t2.medium instance type as a scalable target.",
    )
    scaling.world.sagemaker.delete_endpoint(EndpointName=name)


def test_what_is_not_implemented_is_refused_by_name(scaling, idle):
    api = scaling.api
    refused(
        lambda: api.describe_scalable_targets(ServiceNamespace="ecs"), "NotImplemented", "The service namespace ecs"
    )
    concurrency = key(idle) | {"ScalableDimension": "sagemaker:variant:DesiredProvisionedConcurrency"}
    refused(lambda: api.deregister_scalable_target(**concurrency), "NotImplemented", "DesiredProvisionedConcurrency")
    refused(
        lambda: api.put_scheduled_action(**key(idle), ScheduledActionName="night"),
        "NotImplemented",
        "The action PutScheduledAction",
    )
    refused(
        lambda: api.describe_scheduled_actions(ServiceNamespace="sagemaker"),
        "NotImplemented",
        "The action DescribeScheduledActions",
    )
    scaling.register(idle)
    refused(
        lambda: api.put_scaling_policy(**key(idle), PolicyName="p", PolicyType="PredictiveScaling"),
        "NotImplemented",
        "PolicyType PredictiveScaling",
    )
    faster = {"PredefinedMetricType": "SageMakerVariantConcurrentRequestsPerModelHighResolution"}
    refused(
        lambda: scaling.track(idle, PredefinedMetricSpecification=faster),
        "NotImplemented",
        "SageMakerVariantConcurrentRequestsPerModelHighResolution",
    )
    api.deregister_scalable_target(**key(idle))


def test_objects_that_are_not_there_are_named(scaling, idle):
    where = f"service namespace: sagemaker, resource ID: endpoint/{idle}/variant/v, scalable dimension: {DIMENSION}"
    refused(lambda: scaling.track(idle), "ObjectNotFoundException", f"No scalable target registered for {where}")
    refused(
        lambda: scaling.api.deregister_scalable_target(**key(idle)),
        "ObjectNotFoundException",
        f"No scalable target found for {where}",
    )
    refused(
        lambda: scaling.api.delete_scaling_policy(**key(idle), PolicyName="none"),
        "ObjectNotFoundException",
        f"No scaling policy found for {where}, policy name: none",
    )


# --- Policies ---


def test_target_tracking_makes_two_alarms_and_a_policy_that_describes_itself(scaling, idle):
    scaling.register(idle)
    config = {"TargetValue": 70.0, "PredefinedMetricSpecification": INVOCATIONS, "ScaleInCooldown": 600}
    put = scaling.api.put_scaling_policy(
        **key(idle),
        PolicyName="follow",
        PolicyType="TargetTrackingScaling",
        TargetTrackingScalingPolicyConfiguration=config,
    )
    described = scaling.api.describe_scaling_policies(
        ServiceNamespace="sagemaker", ResourceId=key(idle)["ResourceId"], PolicyNames=["follow"]
    )
    (policy,) = described["ScalingPolicies"]
    assert policy.pop("CreationTime")
    assert policy == key(idle) | {
        "PolicyARN": put["PolicyARN"],
        "PolicyName": "follow",
        "PolicyType": "TargetTrackingScaling",
        "TargetTrackingScalingPolicyConfiguration": config,
        "Alarms": put["Alarms"],
    }
    assert put["PolicyARN"].endswith(f":resource/sagemaker/endpoint/{idle}/variant/v:policyName/follow")

    high, low = scaling.alarms(idle)
    assert {high["AlarmArn"], low["AlarmArn"]} == {alarm["AlarmARN"] for alarm in put["Alarms"]}
    assert high["AlarmName"].startswith(f"TargetTracking-endpoint/{idle}/variant/v-AlarmHigh-")
    assert low["AlarmName"].startswith(f"TargetTracking-endpoint/{idle}/variant/v-AlarmLow-")
    for alarm, threshold, periods, comparison in (
        (high, 70.0, 3, "GreaterThanThreshold"),
        (low, 63.0, 15, "LessThanThreshold"),
    ):
        assert (alarm["Namespace"], alarm["MetricName"], alarm["Statistic"]) == (
            "AWS/SageMaker",
            "InvocationsPerInstance",
            "Sum",
        )
        assert alarm["Dimensions"] == [
            {"Name": "EndpointName", "Value": idle},
            {"Name": "VariantName", "Value": "v"},
        ]
        assert (alarm["Threshold"], alarm["EvaluationPeriods"], alarm["Period"]) == (threshold, periods, 1)
        assert alarm["ComparisonOperator"] == comparison
        assert alarm["AlarmActions"][0].startswith(put["PolicyARN"])

    custom = {"MetricName": "Load", "Namespace": "Mine", "Statistic": "Average", "Unit": "Percent"}
    changed = scaling.api.put_scaling_policy(
        **key(idle),
        PolicyName="follow",
        TargetTrackingScalingPolicyConfiguration={
            "TargetValue": 50,
            "CustomizedMetricSpecification": custom,
            "DisableScaleIn": True,
        },
        PolicyType="TargetTrackingScaling",
    )
    assert changed["PolicyARN"] == put["PolicyARN"]
    (only,) = scaling.alarms(idle)
    assert "-AlarmHigh-" in only["AlarmName"]
    assert only["AlarmName"] != high["AlarmName"]
    assert {name: only[name] for name in custom} == custom

    scaling.api.delete_scaling_policy(**key(idle), PolicyName="follow")
    assert scaling.alarms(idle) == []
    scaling.track(idle)
    scaling.api.deregister_scalable_target(**key(idle))
    assert scaling.alarms(idle) == []
    left = scaling.api.describe_scaling_policies(ServiceNamespace="sagemaker", ResourceId=key(idle)["ResourceId"])
    assert left["ScalingPolicies"] == []


def test_policies_that_make_no_sense_are_refused(scaling, idle):
    scaling.register(idle)
    put = scaling.api.put_scaling_policy

    def steps(config):
        return put(**key(idle), PolicyName="s", PolicyType="StepScaling", StepScalingPolicyConfiguration=config)

    refused(
        lambda: scaling.track(idle, PredefinedMetricSpecification={"PredefinedMetricType": "ALBRequestCountPerTarget"}),
        "ValidationException",
        f"Scalable dimension {DIMENSION} only supports the following predefined metric types",
    )
    refused(lambda: scaling.track(idle, PredefinedMetricSpecification={}), "ValidationException", "Exactly one of")
    refused(lambda: put(**key(idle), PolicyName="p", PolicyType="TargetTrackingScaling"), "ValidationException")
    refused(lambda: scaling.track(idle, DisableScaleIn="yes"), "SerializationException")
    refused(lambda: steps({"AdjustmentType": "ChangeInCapacity"}), "ValidationException", "StepAdjustment")
    low, high = ({"MetricIntervalUpperBound": 5, "ScalingAdjustment": 1}, {"ScalingAdjustment": 2})
    for bound, word in ((4, "overlap"), (6, "gaps")):
        both = [low, high | {"MetricIntervalLowerBound": bound}]
        refused(
            lambda both=both: steps({"AdjustmentType": "ChangeInCapacity", "StepAdjustments": both}),
            "ValidationException",
            word,
        )
    scaling.api.deregister_scalable_target(**key(idle))


def test_descriptions_come_in_pages(scaling, idle):
    scaling.register(idle)
    for name in ("a", "b", "c"):
        scaling.track(idle, name=name)
    pages = scaling.api.get_paginator("describe_scaling_policies").paginate(
        ServiceNamespace="sagemaker", ResourceId=key(idle)["ResourceId"], PaginationConfig={"PageSize": 2}
    )
    names = [[policy["PolicyName"] for policy in page["ScalingPolicies"]] for page in pages]
    assert names == [["a", "b"], ["c"]]
    refused(
        lambda: scaling.api.describe_scalable_targets(ServiceNamespace="sagemaker", NextToken="x"),
        "InvalidNextTokenException",
    )
    scaling.api.deregister_scalable_target(**key(idle))


# --- Scaling ---


def test_requests_scale_an_endpoint_out(scaling):
    name = scaling.endpoint()
    scaling.register(name, 1, 3)
    put = scaling.track(name, target=4)
    with Load(scaling.world, name) as load:
        scaling.reaches(name, 3)
    assert not load.failures
    (activity, *_) = scaling.ended(name)
    high = put["Alarms"][0]["AlarmName"]
    assert activity["Cause"] == f"monitor alarm {high} in state ALARM triggered policy follow"
    assert activity["StatusCode"] == "Successful"
    scaling.world.sagemaker.delete_endpoint(EndpointName=name)


def test_few_requests_scale_an_endpoint_in_unless_that_is_disabled(scaling):
    name, kept = scaling.endpoint(4), scaling.endpoint(2)
    put = {}
    for endpoint, disabled in ((name, False), (kept, True)):
        scaling.register(endpoint, 1, 4)
        put[endpoint] = scaling.track(endpoint, target=10, ScaleInCooldown=600, DisableScaleIn=disabled)
        scaling.feed(endpoint, 4)
    scaling.reaches(name, 2)  # 16 in all, and no further while that cools down
    low = put[name]["Alarms"][1]["AlarmName"]
    activity = scaling.ended(name)[0]
    assert activity["Description"] == "Setting desired instance count to 2."
    assert activity["Cause"] == f"monitor alarm {low} in state ALARM triggered policy follow"
    assert activity["StatusMessage"] == (
        "Successfully set desired instance count to 2. Change successfully fulfilled by sagemaker."
    )
    assert (scaling.instances(kept), scaling.activities(kept)) == (2, [])
    for endpoint in (name, kept):
        scaling.world.sagemaker.delete_endpoint(EndpointName=endpoint)


def test_scale_out_is_proportional_and_a_cooldown_holds_the_next_one(scaling):
    name = scaling.endpoint()
    scaling.register(name, 1, 4)
    scaling.track(name, target=10, ScaleOutCooldown=600)
    scaling.feed(name, 25)
    scaling.reaches(name, 3)
    scaling.ended(name)
    scaling.feed(name, 12)  # 37 in all: 4 instances, but the scale-out of 1 to 3 still cools down
    reasons = until(
        lambda: [
            reason["Code"]
            for activity in scaling.activities(name, IncludeNotScaledActivities=True)
            for reason in activity.get("NotScaledReasons", [])
        ],
        lambda codes: "AlreadyAtDesiredCapacity" in codes,
        20,
    )
    assert reasons
    assert scaling.instances(name) == 3
    assert len(scaling.activities(name)) == 1
    scaling.world.sagemaker.delete_endpoint(EndpointName=name)


def test_a_variant_outside_its_bounds_is_brought_within_them_at_once(scaling):
    name = scaling.endpoint()
    scaling.register(name, 2, 3)
    scaling.reaches(name, 2)
    (activity,) = scaling.ended(name)
    assert activity["Cause"] == "minimum capacity was set to 2"
    assert activity["Description"] == "Setting desired instance count to 2."
    scaling.register(name, 1, 1)
    scaling.reaches(name, 1)
    assert scaling.ended(name, 2)[0]["Cause"] == "maximum capacity was set to 1"

    scaling.track(name)
    scaling.feed(name, 100)
    (capped,) = until(
        lambda: [item for item in scaling.activities(name, IncludeNotScaledActivities=True) if "EndTime" not in item],
        bool,
        20,
    )
    assert capped["NotScaledReasons"] == [{"Code": "AlreadyAtMaxCapacity", "MaxCapacity": 1}]
    assert capped["StatusCode"] == "Failed"
    scaling.world.sagemaker.delete_endpoint(EndpointName=name)


def test_suspended_scaling_waits_until_it_is_resumed(scaling):
    name = scaling.endpoint()
    scaling.register(name, 1, 2, SuspendedState={"DynamicScalingOutSuspended": True})
    put = scaling.track(name)
    high = put["Alarms"][0]["AlarmName"]
    scaling.feed(name, 100)
    until(
        lambda: scaling.world.cloudwatch.describe_alarms(AlarmNames=[high])["MetricAlarms"][0]["StateValue"],
        lambda state: state == "ALARM",
        20,
    )
    time.sleep(2.5)  # two looks at the alarm
    assert scaling.activities(name, IncludeNotScaledActivities=True) == []
    scaling.feed(name, 100)
    scaling.register(name, None, None, SuspendedState={"DynamicScalingOutSuspended": False})
    scaling.reaches(name, 2)
    scaling.world.sagemaker.delete_endpoint(EndpointName=name)


def test_an_alarm_of_ones_own_drives_a_step_scaling_policy(scaling):
    name = scaling.endpoint()
    scaling.register(name, 1, 4)
    policy = scaling.api.put_scaling_policy(
        **key(name),
        PolicyName="steps",
        PolicyType="StepScaling",
        StepScalingPolicyConfiguration={
            "AdjustmentType": "ChangeInCapacity",
            "StepAdjustments": [
                {"MetricIntervalLowerBound": 0, "MetricIntervalUpperBound": 10, "ScalingAdjustment": 1},
                {"MetricIntervalLowerBound": 10, "ScalingAdjustment": 2},
            ],
        },
    )
    assert policy["Alarms"] == []

    def alarm(alarm_name: str) -> None:
        scaling.world.cloudwatch.put_metric_alarm(
            AlarmName=alarm_name,
            Namespace="Mine",
            MetricName=alarm_name,
            Statistic="Maximum",
            Period=60,
            EvaluationPeriods=1,
            Threshold=60,
            ComparisonOperator="GreaterThanOrEqualToThreshold",
            AlarmActions=[policy["PolicyARN"]],
        )

    alarm("by-hand")
    scaling.world.cloudwatch.set_alarm_state(AlarmName="by-hand", StateValue="ALARM", StateReason="to try it")
    scaling.reaches(name, 2)
    scaling.ended(name)
    scaling.world.cloudwatch.put_metric_data(Namespace="Mine", MetricData=[{"MetricName": "waiting", "Value": 75}])
    alarm("waiting")
    scaling.reaches(name, 3)  # the two of the larger step, of which one is there while it cools down
    assert scaling.ended(name, 2)[0]["Cause"] == "monitor alarm waiting in state ALARM triggered policy steps"
    (described,) = scaling.api.describe_scaling_policies(
        ServiceNamespace="sagemaker", ResourceId=key(name)["ResourceId"]
    )["ScalingPolicies"]
    assert [alarm["AlarmName"] for alarm in described["Alarms"]] == ["by-hand", "waiting"]
    scaling.world.cloudwatch.delete_alarms(AlarmNames=["by-hand", "waiting"])
    scaling.world.sagemaker.delete_endpoint(EndpointName=name)


# --- SageMaker's side ---


def test_a_variant_that_scales_keeps_its_instance_type(scaling):
    name = scaling.endpoint()
    scaling.register(name)
    scaling.config(f"{name}-large", instance_type="ml.c5.xlarge")
    update = scaling.world.sagemaker.update_endpoint
    refused(
        lambda: update(EndpointName=name, EndpointConfigName=f"{name}-large"),
        "ValidationException",
        'The variant(s) "[v]" must be deregistered as scalable targets with AWS Auto Scaling before they can be '
        "removed or have their instance type updated.",
    )
    scaling.api.deregister_scalable_target(**key(name))
    update(EndpointName=name, EndpointConfigName=f"{name}-large")
    assert scaling.world.endpoint(name)["EndpointConfigName"] == f"{name}-large"
    scaling.world.sagemaker.delete_endpoint(EndpointName=name)


def test_an_endpoint_that_is_deleted_takes_its_target_with_it(scaling):
    name = scaling.endpoint()
    scaling.register(name)
    scaling.track(name)
    scaling.world.sagemaker.delete_endpoint(EndpointName=name)
    found = scaling.api.describe_scalable_targets(ServiceNamespace="sagemaker", ResourceIds=[key(name)["ResourceId"]])
    assert found["ScalableTargets"] == []
    assert scaling.alarms(name) == []


# --- Who may, and from where ---


def role(scaling, name: str, *allowed: str, resources: tuple[str, ...] = ("*",), **condition: dict) -> str:
    """A role for state machines that may do this on some resources, under conditions."""
    trust = {"Effect": "Allow", "Principal": {"Service": "states.amazonaws.com"}, "Action": "sts:AssumeRole"}
    iam = scaling.world.client("iam")
    made = iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps({"Statement": [trust]}))["Role"]["Arn"]
    statement = {"Effect": "Allow", "Action": allowed, "Resource": resources, "Condition": condition}
    document = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    iam.put_role_policy(RoleName=name, PolicyName="may", PolicyDocument=document)
    return made


def run(scaling, role_arn: str, endpoint: str) -> dict:
    """One execution that registers a scalable target with the role's rights."""
    states = scaling.world.client("stepfunctions")
    task = {
        "Type": "Task",
        "Resource": "arn:aws:states:::aws-sdk:applicationautoscaling:registerScalableTarget",
        "Arguments": key(endpoint) | {"MinCapacity": 1, "MaxCapacity": 2},
        "End": True,
    }
    definition = {"QueryLanguage": "JSONata", "StartAt": "Register", "States": {"Register": task}}
    machine = states.create_state_machine(
        name=role_arn.rpartition("/")[2], definition=json.dumps(definition), roleArn=role_arn
    )["stateMachineArn"]
    execution = states.start_execution(stateMachineArn=machine)["executionArn"]
    return until(
        lambda: states.describe_execution(executionArn=execution), lambda found: found["status"] != "RUNNING", 30
    )


def test_step_functions_registers_a_target_if_its_role_may(scaling, idle):
    api_only = role(scaling, "api-only", "application-autoscaling:RegisterScalableTarget")
    whole = role(
        scaling,
        "whole",
        "application-autoscaling:RegisterScalableTarget",
        "sagemaker:*",
        resources=(
            "arn:aws:application-autoscaling:us-east-1:000000000000:scalable-target/*",
            f"arn:aws:sagemaker:us-east-1:000000000000:endpoint/{idle}",
            f"arn:aws:sagemaker:us-east-1:000000000000:endpoint-config/{idle}",
        ),
    )
    of_tables = {"application-autoscaling:service-namespace": "dynamodb"}
    tables = role(scaling, "tables", "application-autoscaling:*", "sagemaker:*", StringEquals=of_tables)

    none = run(scaling, role(scaling, "none", "sagemaker:*"), idle)
    assert none["status"] == "FAILED"
    assert "is not authorized to perform: application-autoscaling:RegisterScalableTarget" in none["cause"]
    assert run(scaling, tables, idle)["status"] == "FAILED"
    partly = run(scaling, api_only, idle)
    assert partly["status"] == "FAILED"
    assert "User is missing the following permissions: sagemaker:DescribeEndpoint" in partly["cause"]
    done = run(scaling, whole, idle)
    assert done["status"] == "SUCCEEDED", done
    assert ":scalable-target/" in json.loads(done["output"])["ScalableTargetARN"]
    scaling.api.deregister_scalable_target(**key(idle))


def test_a_template_registers_and_removes_a_target_with_its_policy(scaling, idle):
    formation = scaling.world.client("cloudformation")

    def template(target: float) -> str:
        resources = {
            "Target": {
                "Type": "AWS::ApplicationAutoScaling::ScalableTarget",
                "Properties": key(idle) | {"MinCapacity": 1, "MaxCapacity": {"Ref": "Most"}},
            },
            "Policy": {
                "Type": "AWS::ApplicationAutoScaling::ScalingPolicy",
                "Properties": {
                    "PolicyName": "templated",
                    "PolicyType": "TargetTrackingScaling",
                    "ScalingTargetId": {"Ref": "Target"},
                    "TargetTrackingScalingPolicyConfiguration": {
                        "TargetValue": target,
                        "PredefinedMetricSpecification": INVOCATIONS,
                    },
                },
            },
        }
        outputs = {"Target": {"Value": {"Ref": "Target"}}, "Policy": {"Value": {"Ref": "Policy"}}}
        most = {"Most": {"Type": "Number", "Default": 3}}
        return json.dumps({"Parameters": most, "Resources": resources, "Outputs": outputs})

    def settled(*statuses: str) -> dict:
        return until(
            lambda: formation.describe_stacks(StackName="scaled")["Stacks"][0],
            lambda stack: not stack["StackStatus"].endswith("IN_PROGRESS"),
            30,
        )

    formation.create_stack(StackName="scaled", TemplateBody=template(20))
    stack = settled()
    assert stack["StackStatus"] == "CREATE_COMPLETE"
    outputs = {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}
    assert outputs["Target"] == f"endpoint/{idle}/variant/v|{DIMENSION}|sagemaker"
    (target,) = scaling.api.describe_scalable_targets(
        ServiceNamespace="sagemaker", ResourceIds=[key(idle)["ResourceId"]]
    )["ScalableTargets"]
    assert target["MaxCapacity"] == 3

    formation.update_stack(StackName="scaled", TemplateBody=template(30))
    assert settled()["StackStatus"] == "UPDATE_COMPLETE"
    (policy,) = scaling.api.describe_scaling_policies(ServiceNamespace="sagemaker", PolicyNames=["templated"])[
        "ScalingPolicies"
    ]
    assert policy["PolicyARN"] == outputs["Policy"]
    assert policy["TargetTrackingScalingPolicyConfiguration"]["TargetValue"] == 30

    formation.delete_stack(StackName="scaled")
    until(
        lambda: scaling.api.describe_scalable_targets(
            ServiceNamespace="sagemaker", ResourceIds=[key(idle)["ResourceId"]]
        )["ScalableTargets"],
        lambda found: not found,
        30,
    )
    assert scaling.alarms(idle) == []


def test_an_endpoint_without_requests_scales_in_to_its_minimum(scaling, deserted):
    scaling.reaches(deserted, 1)
    alarm = scaling.alarms(deserted)[1]["AlarmName"]
    assert scaling.ended(deserted)[0]["Cause"] == f"monitor alarm {alarm} in state ALARM triggered policy follow"


def test_targets_and_policies_survive_a_kill_and_go_on(tmp_path):
    images = tmp_path / "images"
    (images / "server").mkdir(parents=True)
    (images / "server" / "__main__.py").write_text(textwrap.dedent(SERVER))
    environment = {"HOUNDLOOP_IMAGES": str(images), "HOUNDLOOP_PRELOAD": "json", "HOUNDLOOP_SCALING_PERIOD": "1"}
    state = tmp_path / "state"
    with Emulator(state=state, keep=True, environment=environment) as emulator:
        scaling = Scaling(World(emulator))
        name = scaling.endpoint()
        time.sleep(2)  # whatever is not SageMaker's is saved within about a second
        arn = scaling.register(name, 1, 2)
        put = scaling.track(name)
        os.kill(emulator.pid, signal.SIGKILL)
    with Emulator(port=emulator.port, state=state, keep=True, environment=environment):
        (target,) = scaling.api.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
        (policy,) = scaling.api.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
        assert target["ScalableTargetARN"] == arn
        assert (policy["PolicyARN"], policy["Alarms"]) == (put["PolicyARN"], put["Alarms"])
        scaling.world.endpoint(name, "InService")
        scaling.feed(name, 100)
        scaling.reaches(name, 2)
