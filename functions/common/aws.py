"""The clients and tables of a function: made at first use, kept for as long as the function is warm."""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

sdk: Any = boto3  # the type stubs know a client only by a literal name


# Patience with a service fits into a function's time. What botocore would check of a request, the service does too.
CONFIG = Config(
    connect_timeout=3,
    read_timeout=20,
    retries={"total_max_attempts": 3, "mode": "standard"},
    parameter_validation=False,
    max_pool_connections=16,
    user_agent="houndloop",  # botocore composes its own anew for every request
)


@cache
def client(service: str) -> Any:
    return sdk.client(service, config=CONFIG)


@cache
def table(variable: str) -> Any:
    """The DynamoDB table whose name the environment variable holds."""
    return sdk.resource("dynamodb", config=CONFIG).Table(os.environ[variable])


def code(error: ClientError) -> str:
    """AWS's code of what went wrong."""
    return error.response["Error"]["Code"]


def holds(write: Callable[..., Any], **request: Any) -> bool:
    """Do a conditional write; says no where its condition does not hold."""
    try:
        write(**request)
    except ClientError as error:
        if code(error) != "ConditionalCheckFailedException":
            raise
        return False
    return True
