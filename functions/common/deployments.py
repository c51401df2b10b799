"""The deployments in the LoopState table, `deployment/<number>`, and what SageMaker has of them."""

from typing import Any

from boto3.dynamodb.conditions import Key
from botocore.exceptions import ClientError

from common import aws, state

# Outcomes that the workflow itself finds out. Every other is IN_PROGRESS, or the status of an execution that died.
SETTLED = ("PROMOTED", "ROLLED_BACK")


def latest(count: int) -> list[state.Item]:
    """The last deployments, newest first."""
    query = Key("pk").eq("deployment")
    answer = state.table().query(KeyConditionExpression=query, ScanIndexForward=False, Limit=count, ConsistentRead=True)
    return answer["Items"]


def end(deployment: state.Item, outcome: str, message: str, at: str) -> None:
    """Record how a deployment in progress ended; one that has ended stays as it is."""
    aws.holds(
        state.table().update_item,
        Key={"pk": "deployment", "sk": deployment["sk"]},
        UpdateExpression="SET outcome = :outcome, message = :message, ended_at = :at",
        ConditionExpression="outcome = :progress",
        ExpressionAttributeValues={":outcome": outcome, ":message": message, ":at": at, ":progress": "IN_PROGRESS"},
    )


def endpoint(name: str) -> dict[str, Any] | None:
    """What SageMaker says of the endpoint, or None where there is none."""
    try:
        return dict(aws.client("sagemaker").describe_endpoint(EndpointName=name))
    except ClientError as error:
        if is_missing(error):
            return None
        raise


def is_missing(error: ClientError) -> bool:
    """SageMaker's way of saying that there is no such endpoint, configuration or model."""
    return aws.code(error) == "ValidationException" and "could not find" in error.response["Error"]["Message"].lower()


def delete_models(names: list[str]) -> list[str]:
    """Delete models and endpoint configurations, which have the same names; says which there were."""
    client = aws.client("sagemaker")
    deleted = []
    for name in names:
        there = [
            _delete(lambda name=name: client.delete_endpoint_config(EndpointConfigName=name)),
            _delete(lambda name=name: client.delete_model(ModelName=name)),
        ]
        if any(there):
            deleted.append(name)
    return deleted


def _delete(call: Any) -> bool:
    try:
        call()
    except ClientError as error:
        if is_missing(error):
            return False
        raise
    return True
