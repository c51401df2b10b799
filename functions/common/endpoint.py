"""Asking the endpoint about prepared crops."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from common import aws
from common.errors import EndpointTrouble

CROPS = "application/x-rgb-crops"
# A serverless endpoint takes 4 MB a request, a real-time one more: one bound fits both.
MAX_PAYLOAD_BYTES = 4_000_000


@cache
def runtime() -> Any:
    # One quick second try hides a dropped connection; anything longer is for the queue, which costs nothing.
    patience = Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 2, "mode": "standard"})
    return aws.sdk.client("sagemaker-runtime", config=aws.CONFIG.merge(patience))


def chunks(crops: list[bytes]) -> Iterator[range]:
    """Positions in `crops` that go into one request each."""
    if not crops:
        return
    per_request = max(1, MAX_PAYLOAD_BYTES // len(crops[0]))
    for start in range(0, len(crops), per_request):
        yield range(start, min(start + per_request, len(crops)))


def classify(endpoint_name: str, crops: list[bytes]) -> dict[str, Any]:
    """Ask about `crops` (size*size*3 bytes of RGB each) in one request; returns the answer of the protocol.

    Raises EndpointTrouble for whatever a later attempt may cure. A 400 is trouble too: the pictures were decoded here,
    so the endpoint can only disagree about their size, in the middle of a deployment that changes it.
    """
    try:
        response = runtime().invoke_endpoint(
            EndpointName=endpoint_name, ContentType=CROPS, Accept="application/json", Body=b"".join(crops)
        )
        answer = json.loads(response["Body"].read())
    except ClientError as error:
        code = aws.code(error)
        original = error.response.get("OriginalStatusCode")
        raise EndpointTrouble(f"{code} {original or ''}: {error.response['Error'].get('Message', '')}"[:500]) from error
    except (BotoCoreError, ValueError) as error:
        raise EndpointTrouble(f"{type(error).__name__}: {error}"[:500]) from error
    try:
        int(answer["deployment"]), str(answer["model_version"])
        answered = sum(1 for one in answer["predictions"] if one["classes"][0]["class"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise EndpointTrouble(f"an answer that is none of the protocol ({error!r}): {str(answer)[:200]}") from error
    if answered != len(crops):
        raise EndpointTrouble(f"asked about {len(crops)} pictures, answered about {answered}")
    return answer
