"""DynamoDB: IAM for PartiQL. Statements are allowed by what they do, and on the tables that they name.

ministack asks about the API's name, which is no action of IAM, and about no table. And it takes the same statement with
other parameters apart again each time, which is a third of what a written row costs.

For ministack's authors: the actions and the tables of ExecuteStatement, BatchExecuteStatement and ExecuteTransaction.
https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/ql-iam.html
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import lru_cache

from ministack.core import iam_actions
from ministack.services import _dynamodb_keywords

from . import expect

ACTIONS = {"dynamodb:ExecuteStatement", "dynamodb:BatchExecuteStatement", "dynamodb:ExecuteTransaction"}
VERBS = {"SELECT": "PartiQLSelect", "INSERT": "PartiQLInsert", "UPDATE": "PartiQLUpdate", "DELETE": "PartiQLDelete"}
TABLE = re.compile(r'\b(?:FROM|INTO|UPDATE)\s+"?([\w.-]+)"?(?:\."?([\w.-]+)"?)?', re.IGNORECASE)


@lru_cache(8)  # a request is asked about twice, and to take it apart is much of what it costs
def statements(body: bytes) -> tuple[str, ...]:
    """The text of every statement of a request, however it carries them; none where it is no such request."""
    try:
        request = json.loads(body or b"{}")
        listed = request.get("Statements") or request.get("TransactStatements") or [request]
        return tuple(one["Statement"].strip() for one in listed if "Statement" in one)
    except (ValueError, AttributeError, TypeError, KeyError):
        return ()


def action_of(texts: Iterable[str]) -> str | None:
    """The action of a request. ministack can ask about one only: where a batch writes in several ways, the first."""
    verbs = sorted({text.split(None, 1)[0].upper() for text in texts if text})
    return f"dynamodb:{VERBS[verbs[0]]}" if verbs and verbs[0] in VERBS else None


def install() -> None:
    """Ask IAM about `dynamodb:PartiQLInsert` and the table, where ministack asks about the name of the API."""
    known = expect("partiql", iam_actions, "extract_iam_action", "service", "method", "path", "headers", "body")
    tables = expect("partiql", iam_actions, "dynamodb_resource_arns", "body", "region", "account_id")

    def extract_iam_action(
        service: str, method: str, path: str, headers: dict, body: bytes, query_params: dict
    ) -> str | None:
        action = known(service, method, path, headers, body, query_params)
        return (action_of(statements(body)) or action) if action in ACTIONS else action

    def dynamodb_resource_arns(body: bytes, region: str, account_id: str) -> list[str]:
        found = tables(body, region, account_id)
        if found or b'"Statement"' not in (body or b""):
            return found
        named = {match.groups() for text in statements(body) if (match := TABLE.search(text))}
        return [
            iam_actions._dynamodb_table_arn(table, region, account_id) + (f"/index/{index}" if index else "")
            for table, index in sorted(named, key=str)
        ]

    tokenize = expect("partiql", _dynamodb_keywords, "_tokenize", "text")
    _dynamodb_keywords._tokenize = lru_cache(256)(tokenize)  # its tokens are read, never changed
    iam_actions.extract_iam_action = extract_iam_action
    iam_actions.dynamodb_resource_arns = dynamodb_resource_arns
