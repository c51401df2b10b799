"""PartiQL and policies are taken apart less often than ministack would, with the same result."""

import json

import pytest
from ministack.core import iam_evaluator
from ministack.services import dynamodb

from local.seams.partiql import handing_on, remembering

STRING, NUMBER = {"S": "a"}, {"N": "1"}


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("INSERT INTO \"t\" VALUE {'a': ?, 'b': ?}", [STRING, NUMBER]),
        ("INSERT INTO \"t\" VALUE {'a': ?, 'b': ?}", [STRING, NUMBER, STRING]),
        ("INSERT INTO \"t\" VALUE {'a': ?, 'b': ?}", [STRING]),
        ("INSERT INTO \"t\" VALUE {'a': ?, 'b': ?}", None),
        ("INSERT INTO t VALUE {'a': ?, 'a': ?}", [STRING, NUMBER]),
        ("INSERT INTO t VALUE {'a': ?, 'b': 5}", [STRING]),
        ("INSERT INTO t VALUE {'a': ?, 'b': '?'}", [STRING]),
        ("INSERT INTO t VALUE {'a': {'b': ?}}", [STRING]),
        ("INSERT INTO t VALUE ?", [{"M": {"a": STRING}}]),
        ("INSERT INTO t VALUE {}", []),
        ("INSERT INTO t VALUE {'a': ?} x", [STRING]),
        ("INSERT INTO t.i VALUE {'a': ?}", [STRING]),
        ("insert into t value {'a': ?};", [STRING]),
        ("SELECT * FROM t WHERE a = ?", [STRING]),
        ("SELECT * FROM t WHERE a < ?", [{"BOOL": True}]),
        ("UPDATE t SET b = ? WHERE a = ?", [NUMBER, STRING]),
        ("DELETE FROM t WHERE a = ?", [STRING]),
    ],
)
def test_a_statement_that_is_remembered_means_the_same(text, parameters):
    parse = dynamodb.parse_partiql_statement
    remembered = remembering(parse)
    remembered(text, [{"S": "before"}, {"S": "it"}][: text.count("?")]) if text.startswith('INSERT INTO "t"') else None
    for _ in range(2):
        try:
            expected = parse(text, parameters)
        except ValueError as error:
            with pytest.raises(type(error)) as refused:
                remembered(text, parameters)
            assert str(refused.value) == str(error)
        else:
            assert remembered(text, parameters) == expected


def test_the_parameters_of_one_item_are_not_those_of_the_next():
    asked = []

    def parse(text, parameters):
        asked.append(text)
        return dynamodb.parse_partiql_statement(text, parameters)

    remembered = remembering(parse)
    text = "INSERT INTO t VALUE {'a': ?, 'b': ?}"
    first = remembered(text, [STRING, NUMBER])
    second = remembered(text, [{"S": "x"}, {"N": "2"}])
    assert (first["item"], second["item"]) == ({"a": STRING, "b": NUMBER}, {"a": {"S": "x"}, "b": {"N": "2"}})
    assert len(asked) == 1


def test_what_a_batch_parsed_is_handed_on_once_and_to_the_same_statement_only():
    asked = []

    def parse(statement, parameters):
        asked.append(parameters)
        return {}

    handed = handing_on(parse)
    mine, equal = [STRING], [dict(STRING)]
    assert handed("s", mine) is handed("s", mine)
    handed("s", mine)
    handed("s", equal)
    handed("t", equal)
    assert asked == [mine, mine, equal, equal]


def test_a_policy_that_is_changed_in_place_is_read_anew():
    from local.seams import policies

    parse = iam_evaluator.parse_policy_document
    try:
        policies.install()
        document = {"Statement": [{"Effect": "Allow", "Action": "s3:GetObject", "Resource": "*"}]}
        text = json.dumps(document)
        before = iam_evaluator.parse_policy_document(text)
        assert before == parse(text) == iam_evaluator.parse_policy_document(document)
        before.clear()
        assert iam_evaluator.parse_policy_document(text) == parse(text)
        document["Statement"][0]["Effect"] = "Deny"
        assert iam_evaluator.parse_policy_document(document)[0].effect == "Deny"
        assert iam_evaluator.parse_policy_document(json.dumps(document))[0].effect == "Deny"
    finally:
        iam_evaluator.parse_policy_document = parse
