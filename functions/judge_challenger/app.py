"""The gate: decides from the evaluation whether the challenger goes live, and writes down why."""

import json
import os
from dataclasses import dataclass
from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.typing import LambdaContext

from common import aws
from common.tracing import tracer

logger = Logger()


@dataclass(frozen=True)
class Thresholds:
    """What the challenger must reach; all are shares of pictures, 0 to 1."""

    accuracy_floor: float
    """Of all test pictures."""
    margin: float
    """How much worse than the champion it may be on the classes that both know."""
    new_class_floor: float
    """Of the test pictures of every class that the champion does not know."""


@logger.inject_lambda_context
@tracer.capture_lambda_handler(capture_response=False)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """`{"bucket", "evaluation": key, "verdict": key, "findings"}` to the verdict, which also lands in the bucket."""
    body = aws.client("s3").get_object(Bucket=event["bucket"], Key=event["evaluation"])["Body"].read()
    verdict = judge(
        json.loads(body),
        event["findings"],
        Thresholds(
            accuracy_floor=float(os.environ["ACCURACY_FLOOR"]),
            margin=float(os.environ["GATE_MARGIN"]),
            new_class_floor=float(os.environ["NEW_CLASS_FLOOR"]),
        ),
    )
    aws.client("s3").put_object(
        Bucket=event["bucket"],
        Key=event["verdict"],
        Body=json.dumps(verdict, indent=2).encode(),
        ContentType="application/json",
    )
    logger.info(verdict["sentence"])
    return verdict


def judge(evaluation: dict[str, Any], findings: dict[str, Any], thresholds: Thresholds) -> dict[str, Any]:
    """The verdict: `promote`, the `sentence` why, and the figures it rests on. Every reason against it is named."""
    challenger = evaluation["challenger"]
    common = evaluation.get("common")
    against: list[str] = []
    if findings.get("blocking"):
        rules = [rule["rule"] for rule in findings["rules"] if rule.get("blocking") and rule["status"] == "IssuesFound"]
        against.append(f"blocking findings: {', '.join(rules)}")
    if challenger["accuracy"] < thresholds.accuracy_floor:
        against.append(f"accuracy {challenger['accuracy']:.1%} is under the floor of {thresholds.accuracy_floor:.1%}")
    change = None
    if common and common["n"]:
        change = (common["challenger_correct"] - common["champion_correct"]) / common["n"]
        if change < -thresholds.margin:
            against.append(
                f"{-change:.1%} worse than the champion on the {common['n']} test pictures of the classes both know; "
                f"{thresholds.margin:.1%} is allowed"
            )
    if evaluation.get("champion"):
        for name in evaluation["new_classes"]:
            result = challenger["per_class"][name]
            recall = result["correct"] / result["n"] if result["n"] else 0.0
            if recall < thresholds.new_class_floor:
                against.append(
                    f"new class {name}: {result['correct']} of {result['n']} test pictures recognised, "
                    f"under the floor of {thresholds.new_class_floor:.0%}"
                )
    promote = not against
    precision = evaluation["precision"]
    return {
        "promote": promote,
        "sentence": "; ".join(against or [_why_promoted(challenger, change, evaluation), precision["reason"]]),
        "accuracy": challenger["accuracy"],
        "precision": precision["chosen"],
        "champion_accuracy": (evaluation.get("champion") or {}).get("accuracy"),
        "change_on_common_classes": change,
        "per_class": challenger["per_class"],
        "new_classes": evaluation.get("new_classes", []),
        "preprocess": json.dumps(challenger["preprocess"]),
        "thresholds": vars(thresholds),
    }


def _why_promoted(challenger: dict[str, Any], change: float | None, evaluation: dict[str, Any]) -> str:
    if change is None:
        return f"accuracy {challenger['accuracy']:.1%}, and no champion to compare with"
    return f"accuracy {challenger['accuracy']:.1%}, {change:+.1%} against the champion on the classes both know" + (
        f", and {', '.join(evaluation['new_classes'])} learnt" if evaluation["new_classes"] else ""
    )
