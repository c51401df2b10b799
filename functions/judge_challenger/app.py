"""Decides from the evaluation whether the challenger goes live, and writes down why."""

import json
import os
from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.typing import LambdaContext

from common import aws
from common.tracing import tracer
from judge_challenger import document
from judge_challenger.gate import Thresholds, judge

logger = Logger()


@logger.inject_lambda_context
@tracer.capture_lambda_handler(capture_response=False)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """What the workflow needs of the verdict; the whole of it lands beside `verdict` as .json and .html.

    `event`: `{"bucket", "run", "dataset", "champion": model version | null, "findings",
    "evaluation": key | null where the model was not evaluated, "verdict": key of the .json}`
    """
    s3, bucket = aws.client("s3"), event["bucket"]
    evaluation = None
    if event["evaluation"]:
        evaluation = json.loads(s3.get_object(Bucket=bucket, Key=event["evaluation"])["Body"].read())
    about = {name: event[name] for name in ("run", "dataset", "champion")}
    left_out = json.loads(s3.get_object(Bucket=bucket, Key=f"datasets/{event['dataset']}/left_out.json")["Body"].read())
    verdict = about | judge(evaluation, event["findings"], thresholds(), left_out["classes"])
    page = event["verdict"].removesuffix(".json") + ".html"
    for key, text, kind in (
        (event["verdict"], json.dumps(verdict, indent=1), "application/json"),
        (page, document.page(verdict), "text/html; charset=utf-8"),
    ):
        s3.put_object(Bucket=bucket, Key=key, Body=text.encode(), ContentType=kind)
    logger.info(verdict["sentence"])
    uris = {"verdict": f"s3://{bucket}/{event['verdict']}", "document": f"s3://{bucket}/{page}"}
    if evaluation:
        uris["evaluation"] = f"s3://{bucket}/{event['evaluation']}"
        uris["modelCard"] = f"s3://{bucket}/{event['evaluation'].rpartition('/')[0]}/model_card.json"
    return answer(verdict) | uris | {"metadata": metadata(verdict) | uris}


def thresholds() -> Thresholds:
    """The parameters of the stack."""
    return Thresholds(
        accuracy_floor=float(os.environ["ACCURACY_FLOOR"]),
        margin=float(os.environ["GATE_MARGIN"]),
        max_drop=float(os.environ["GATE_MAX_DROP"]),
        confidence=float(os.environ["GATE_CONFIDENCE"]),
        min_test_pictures=int(os.environ["GATE_MIN_TEST_PICTURES"]),
        class_floor=float(os.environ["NEW_CLASS_FLOOR"]),
        max_latency_ratio=float(os.environ["MAX_LATENCY_RATIO"]),
    )


def answer(verdict: dict[str, Any]) -> dict[str, Any]:
    """What goes into the execution's state, which holds 256 KB: nothing that grows with classes or pictures."""
    names = ("promote", "sentence", "accuracy", "champion_accuracy", "change_on_common_classes", "precision")
    return {name: verdict.get(name) for name in names} | {"preprocess": json.dumps(verdict.get("preprocess"))}


def metadata(verdict: dict[str, Any]) -> dict[str, str]:
    """The figures as properties of the model package.

    A value has 1 to 256 characters, of letters, digits, spaces and `_.:/=+-@` (SageMaker's CustomerMetadataValue).
    """
    comparison, latency = verdict.get("comparison") or {}, verdict.get("latency", {})
    found = {
        "precision": verdict.get("precision"),
        "accuracy": verdict.get("accuracy"),
        "championCompared": verdict["champion"] if comparison else None,
        "championAccuracy": verdict.get("champion_accuracy"),
        "comparedPictures": comparison.get("n"),
        "change": comparison.get("change"),
        "changeAtWorst": comparison.get("low"),
        "pWorse": comparison.get("p_worse"),
        "latencyMs": latency.get("challenger_ms_p50"),
        "latencyRatio": latency.get("ratio"),
    }
    given = {name: value for name, value in found.items() if value is not None}
    return {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in given.items()}
