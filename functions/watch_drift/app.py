"""Measures drift: do the live model's answers of the last days look like those to its test pictures?

Compared are the mix of classes and the confidence. Drift says that what comes in is not what was labelled, not that the
model is wrong: somebody should look at the pictures, and label some. The numbers are in LoopState, drift/last, and
in metrics; an alarm watches them, and with RetrainOnDrift a run learns from the labels that there are.
"""

import json
import os
from datetime import timedelta
from typing import Any

from aws_lambda_powertools import Logger, Metrics
from aws_lambda_powertools.metrics import MetricUnit
from aws_lambda_powertools.utilities.typing import LambdaContext
from boto3.dynamodb.conditions import Attr, Key

from common import aws, clock, predictions, runs, state
from common.tracing import tracer
from watch_drift import psi

logger = Logger()
metrics = Metrics()

MOST_A_DAY = 2000  # answers; newest first
PAGES_A_DAY = 20  # of up to 1 MB: a day on which many were replayed is not read to its beginning

Answers = list[tuple[str, float]]
"""Class and confidence of each."""


@logger.inject_lambda_context
@metrics.log_metrics
@tracer.capture_lambda_handler(capture_response=False)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    champion = state.champion()
    if champion is None:
        return {"sentence": "no model is live"}
    found = look(champion)
    if found["drifted"] and os.environ["RETRAIN_ON_DRIFT"] == "true":
        found["run"] = start_run(int(champion["deployment"]), found["sentence"])
    state.put("drift", "last", found)
    # Also where nothing could be measured: the drift of another model is over.
    metrics.add_metric("Drifted", MetricUnit.Count, int(found["drifted"]))
    for name, measured in (("ClassMixPSI", "class_mix"), ("ConfidencePSI", "confidence")):
        if measured in found:
            metrics.add_metric(name, MetricUnit.NoUnit, float(found[measured]["psi"]))
    logger.info(found["sentence"], extra={"run": found.get("run")})
    return {"drifted": found["drifted"], "sentence": found["sentence"], "run": found.get("run")}


def look(champion: dict[str, Any]) -> dict[str, Any]:
    """The document about the drift of the champion's answers."""
    days, least = int(os.environ["DRIFT_DAYS"]), int(os.environ["DRIFT_MIN_PICTURES"])
    since = max(clock.iso(clock.now() - timedelta(days=days)), champion["since"])
    actual = answers(int(champion["deployment"]), since)
    document: dict[str, Any] = {
        "at": clock.iso(clock.now()),
        "since": since,
        "model_version": champion["model_version"],
        "deployment": champion["deployment"],
        "pictures": len(actual),
        "drifted": False,
    }
    if len(actual) < least:
        why = f"{len(actual)} answers since {since}, of the {least} that a comparison needs"
        return document | {"sentence": f"not measured: {why}"}
    expected = expected_answers(champion)
    if not expected:
        return document | {"sentence": "not measured: no test picture of the live model could be read"}
    threshold = float(os.environ["DRIFT_THRESHOLD"])
    shifts = {
        "class_mix": psi.of_classes([name for name, _ in expected], [name for name, _ in actual]),
        "confidence": psi.of_confidence([value for _, value in expected], [value for _, value in actual]),
    }
    document |= {"test_pictures": len(expected), "threshold": state.number(threshold)}
    document |= {name: described(shift) for name, shift in shifts.items()}
    document["drifted"] = any(shift.exceeds(threshold) for shift in shifts.values())
    return document | {"sentence": "; ".join(told(name, shift, threshold) for name, shift in shifts.items())}


def answers(deployment: int, since: str) -> Answers:
    """What the deployment answered since then, to pictures as they came in; those sent again are no sample of that."""
    found: Answers = []
    for day in reversed(clock.days(since[:10], clock.now().date())):
        query: dict[str, Any] = {
            "IndexName": "by-status",
            "KeyConditionExpression": Key("status_day").eq(f"CLASSIFIED#{day}") & Key("updated_at").gte(since),
            "FilterExpression": Attr("deployment").eq(deployment) & Attr("replayed").not_exists(),
            "ProjectionExpression": "label, confidence",
            "ScanIndexForward": False,
        }
        of_day: Answers = []
        for _ in range(PAGES_A_DAY):
            page = predictions.table().query(**query)
            of_day += [(row["label"], float(row["confidence"])) for row in page["Items"]]
            if "LastEvaluatedKey" not in page or len(of_day) >= MOST_A_DAY:
                break
            query["ExclusiveStartKey"] = page["LastEvaluatedKey"]
        found += of_day[:MOST_A_DAY]
    return found


def expected_answers(champion: dict[str, Any]) -> Answers:
    """What the champion answered to its test pictures when it was evaluated."""
    bucket, _, key = champion["evaluation"].removeprefix("s3://").partition("/")
    evaluation = json.loads(aws.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read())
    predicted = evaluation["challenger"]["predictions"]
    return [(p["predicted"], p["probability"]) for p in predicted if p["predicted"] is not None]


def described(shift: psi.Shift) -> dict[str, Any]:
    number = state.number
    return {
        "psi": number(shift.psi),
        "chance": number(shift.chance),
        "bins": [{"bin": b.name, "expected": number(b.expected), "actual": number(b.actual)} for b in shift.bins],
    }


def told(name: str, shift: psi.Shift, threshold: float) -> str:
    """One clause about one shift, in words."""
    figures = f"PSI {shift.psi:.2f}, {threshold:.2f} is allowed, and chance explains {shift.chance:.2f}"
    what = name.replace("_", " ")
    if not shift.exceeds(threshold):
        return f"the {what} has not drifted ({figures})"
    most = shift.largest
    return (
        f"the {what} has drifted ({figures}), most at {most.name}: "
        f"{most.actual:.0%} of the answers, {most.expected:.0%} of those to the test pictures"
    )


def start_run(deployment: int, sentence: str) -> str:
    """Start the one run that the drift of a deployment may start; says what came of it.

    It is not forced: from the very dataset that was trained already the same model would come.
    """
    if obstacle := runs.obstacle():
        return f"none was started: {obstacle.why}"
    name = f"drift-of-deployment-{deployment}"
    started = runs.start(name, {"trigger": "drift", "why": sentence, "force": False})
    return f"started {started}" if started else f"{name} was started before; there is one for each deployment"
