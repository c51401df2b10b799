"""InvokeEndpoint: what reaches the container, what comes back, what is refused, and what is counted."""

import json
import time

import pytest
from botocore.exceptions import ClientError

from tests.makers.sagemaker import until


@pytest.fixture(scope="module")
def endpoint(world):
    world.model("runtime", "one")
    world.sagemaker.create_endpoint(EndpointName="runtime", EndpointConfigName="runtime")
    found = world.endpoint("runtime")
    assert found["EndpointStatus"] == "InService", found
    return "runtime"


def metric(world, endpoint: str, name: str, **dimensions: str) -> dict:
    """Sum and SampleCount of a metric in this hour and the next, over the dimensions that AWS documents."""
    dimensions = {"EndpointName": endpoint, "VariantName": "AllTraffic"} | dimensions
    points = world.cloudwatch.get_metric_statistics(
        Namespace="AWS/SageMaker",
        MetricName=name,
        Period=3600,
        Statistics=["Sum", "SampleCount", "Average"],
        Dimensions=[{"Name": key, "Value": value} for key, value in dimensions.items()],
        StartTime=time.time() - 3600,
        EndTime=time.time() + 3600,
    )["Datapoints"]
    return {key: sum(point[key] for point in points) for key in ("Sum", "SampleCount", "Average")}


def test_headers_go_to_the_container_and_back(world, endpoint):
    answer = world.runtime.invoke_endpoint(
        EndpointName=endpoint,
        Body=b"hello",
        ContentType="text/x-own",
        Accept="application/json;own=1",
        CustomAttributes="trace=7",
        InferenceId="inference-1",
        TargetVariant="AllTraffic",
    )
    seen = {key.lower(): value for key, value in json.loads(answer["Body"].read())["headers"].items()}
    assert seen["content-type"] == "text/x-own" and seen["accept"] == "application/json;own=1"
    assert seen["x-amzn-sagemaker-custom-attributes"] == "trace=7"
    assert seen["x-amzn-sagemaker-inference-id"] == "inference-1"
    assert "authorization" not in seen and "x-amzn-sagemaker-target-variant" not in seen
    assert answer["CustomAttributes"] == "trace=7" and answer["InvokedProductionVariant"] == "AllTraffic"
    assert answer["ContentType"] == "application/json"


def test_requests_go_round_the_instances(world, endpoint):
    assert len({world.invoke(endpoint)["pid"] for _ in range(6)}) == 2


def test_an_error_of_the_model(world, endpoint):
    with pytest.raises(ClientError) as caught:
        world.invoke(endpoint, b"status 429")
    error = caught.value.response
    assert error["Error"]["Code"] == "ModelError" and error["ResponseMetadata"]["HTTPStatusCode"] == 424
    assert error["OriginalStatusCode"] == 429 and error["OriginalMessage"] == '{"error": "asked for"}'
    assert error["Error"]["Message"].startswith(
        'Received client error (429) from primary with message "{"error": "asked for"}". See https://us-east-1.console'
    )
    assert error["LogStreamArn"].endswith(":log-group:/aws/sagemaker/Endpoints/runtime")


def test_what_the_runtime_refuses(world, endpoint):
    with pytest.raises(ClientError) as caught:
        world.invoke("nobody")
    assert caught.value.response["Error"]["Code"] == "ValidationError"
    assert caught.value.response["Error"]["Message"] == "Endpoint nobody of account 000000000000 not found."
    with pytest.raises(ClientError, match="ValidationError.*Variant other"):
        world.runtime.invoke_endpoint(EndpointName=endpoint, Body=b"x", TargetVariant="other")
    limit = 6 * 1024 * 1024
    assert world.invoke(endpoint, bytes(limit))["length"] == limit
    with pytest.raises(ClientError, match=f"HTTP content length exceeded {limit} bytes") as caught:
        world.invoke(endpoint, bytes(limit + 1))
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 413
    with pytest.raises(ClientError, match="ModelError.*larger than"):
        world.invoke(endpoint, f"large {limit + 1}".encode())


@pytest.mark.parametrize(
    "parameter",
    [
        "TargetModel",
        "TargetContainerHostname",
        "EnableExplanations",
        "InferenceComponentName",
        "SessionId",
        "PrefixAwareId",
    ],
)
def test_parameters_that_are_not_here_are_refused_by_name(world, endpoint, parameter):
    with pytest.raises(ClientError, match=rf"NotImplemented.*InvokeEndpoint\.{parameter}"):
        world.runtime.invoke_endpoint(EndpointName=endpoint, Body=b"x", **{parameter: "something"})


def test_other_ways_to_invoke_are_refused_by_name(world, endpoint):
    with pytest.raises(ClientError, match="NotImplemented.*InvokeEndpointAsync"):
        world.runtime.invoke_endpoint_async(EndpointName=endpoint, InputLocation="s3://bucket/key")
    with pytest.raises(ClientError, match="NotImplemented.*InvokeEndpointWithResponseStream"):
        world.runtime.invoke_endpoint_with_response_stream(EndpointName=endpoint, Body=b"x")


def test_invocations_are_counted(world):
    world.model("counted", "one")
    world.sagemaker.create_endpoint(EndpointName="counted", EndpointConfigName="counted")
    world.endpoint("counted", "InService")
    for body in (b"hello", b"hello", b"hello", b"sleep 0.2", b"status 404", b"status 503"):
        try:
            world.invoke("counted", body)
        except ClientError as error:
            assert "ModelError" in str(error)
    until(lambda: metric(world, "counted", "Invocations"), lambda found: found["SampleCount"] == 6, 10)
    sums = {
        name: metric(world, "counted", name)["Sum"]
        for name in (
            "Invocations",
            "InvocationsPerInstance",
            "Invocation4XXErrors",
            "Invocation5XXErrors",
            "InvocationModelErrors",
        )
    }
    assert list(sums.values()) == [6, 3, 1, 1, 2], sums
    # An average of the errors is a rate: the zeros count.
    assert metric(world, "counted", "Invocation5XXErrors")["Average"] == pytest.approx(1 / 6)
    latency, overhead = metric(world, "counted", "ModelLatency"), metric(world, "counted", "OverheadLatency")
    assert 0.25e6 < latency["Sum"] < 5e6, "microseconds: 5 requests of 10 ms, one of 210"
    assert latency["SampleCount"] == overhead["SampleCount"] == 6 and 0 < overhead["Average"] < 1e6
    # By fleet, too, so that an alarm can watch the new one alone.
    assert metric(world, "counted", "Invocations", EndpointConfigName="counted")["Sum"] == 6
    world.sagemaker.delete_endpoint(EndpointName="counted")


def test_a_request_that_kills_the_server_takes_two_instances_at_most(world):
    world.model("poison", "alive")
    world.sagemaker.create_endpoint_config(
        EndpointConfigName="poison-three",
        ProductionVariants=[
            {
                "VariantName": "AllTraffic",
                "ModelName": "poison",
                "InitialInstanceCount": 3,
                "InstanceType": "ml.c5.large",
            }
        ],
    )
    world.sagemaker.create_endpoint(EndpointName="poison", EndpointConfigName="poison-three")
    world.endpoint("poison", "InService")
    before = {world.invoke("poison")["pid"] for _ in range(6)}
    with pytest.raises(ClientError, match=r"ModelError.*server error \(502\)"):
        world.invoke("poison", b"die")
    assert {world.invoke("poison")["answer"] for _ in range(5)} == {"alive"}, "by the third instance"
    after = until(lambda: {world.invoke("poison")["pid"] for _ in range(6)}, lambda pids: len(pids) == 3, 20)
    assert len(before) == 3 and len(before & after) == 1
    world.sagemaker.delete_endpoint(EndpointName="poison")
