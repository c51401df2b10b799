"""The clients and tables of a function: made at first use, kept for as long as the function is warm."""

import os
from functools import cache
from typing import Any

import boto3
from botocore.exceptions import ClientError

sdk: Any = boto3  # the type stubs know a client only by a literal name


@cache
def client(service: str) -> Any:
    return sdk.client(service)


@cache
def table(variable: str) -> Any:
    """The DynamoDB table whose name the environment variable holds."""
    return sdk.resource("dynamodb").Table(os.environ[variable])


def code(error: ClientError) -> str:
    """AWS's code of what went wrong."""
    return error.response["Error"]["Code"]


def is_conditional(error: ClientError) -> bool:
    """The condition of a conditional write did not hold."""
    return code(error) == "ConditionalCheckFailedException"
