"""SQS: whoever may do a thing to one message may do it to a batch. IAM knows no actions of their own for batches."""

from __future__ import annotations

from ministack.core import iam_actions

from . import expect

BATCH = "Batch"


def install() -> None:
    """Ask IAM about `sqs:SendMessage` where the request is SendMessageBatch, and likewise for the others."""
    known = expect("queues", iam_actions, "extract_iam_action", "service", "method", "path", "headers", "body")

    def extract_iam_action(
        service: str, method: str, path: str, headers: dict, body: bytes, query_params: dict
    ) -> str | None:
        action = known(service, method, path, headers, body, query_params)
        return action.removesuffix(BATCH) if action and service == "sqs" else action

    iam_actions.extract_iam_action = extract_iam_action
