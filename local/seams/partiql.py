"""DynamoDB: IAM for PartiQL. Statements are allowed by what they do, and on the tables that they name.

ministack asks about the API's name, which is no action of IAM, and about no table. And it takes each statement of a
batch apart twice, and again when it comes with other parameters, which is half of what a written row costs.

For ministack's authors: the actions and the tables of ExecuteStatement, BatchExecuteStatement and ExecuteTransaction;
what `_batch_execute_statement` parsed, handed to `_execute_statement`; an INSERT of nothing but parameters, kept.
https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/ql-iam.html
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from ministack.core import iam_actions
from ministack.services import dynamodb

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


def remembering(parse: Callable[[str, Any], dict]) -> Callable[[str, Any], dict]:
    """`parse`, which reads a statement `INSERT ... VALUE {'name': ?, ...}` once, for whatever parameters it has."""

    @lru_cache(256)
    def outline(text: str) -> tuple[dict, list[str]] | None:
        """What is parsed of such a statement, and the names in the order of the parameters; None of any other."""
        marks = [{"S": ""} for _ in range(text.count("?"))]
        try:
            parsed = parse(text, marks)
        except ValueError:
            return None
        item = parsed["item"] if parsed.get("op") == "INSERT" else {}
        plain = item and [id(value) for value in item.values()] == [id(mark) for mark in marks]
        return (parsed, list(item)) if plain else None

    def parse_statement(text: str, parameters: Any) -> dict:
        known = outline(text)
        if known is None or len(parameters or ()) != len(known[1]) or not all(isinstance(p, dict) for p in parameters):
            return parse(text, parameters)
        return known[0] | {"item": dict(zip(known[1], parameters, strict=True))}

    return parse_statement


def handing_on(parse: Callable[[str, Any], dict]) -> Callable[[str, Any], dict]:
    """`parse`, which gives its last answer once more when it is asked about the very same statement of a request."""
    last: tuple[str, Any, dict] | None = None

    def parse_partiql(statement: str, parameters: Any) -> dict:
        nonlocal last
        before, last = last, None
        if before is not None and before[0] is statement and before[1] is parameters:
            return before[2]
        parsed = parse(statement, parameters)
        last = (statement, parameters, parsed)
        return parsed

    return parse_partiql


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

    parse = expect("partiql", dynamodb, "parse_partiql_statement", "text", "parameters")
    dynamodb.parse_partiql_statement = remembering(parse)
    dynamodb._parse_partiql = handing_on(expect("partiql", dynamodb, "_parse_partiql", "statement", "parameters"))
    iam_actions.extract_iam_action = extract_iam_action
    iam_actions.dynamodb_resource_arns = dynamodb_resource_arns
