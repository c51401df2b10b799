"""Every candidate becomes a model package, with its verdict, its figures and where it comes from: as the workflow
registers it in the local SageMaker, from what the gate says of it.
"""

import hashlib
import json
from typing import Any

import boto3
import pytest

from judge_challenger import app, gate
from local.emulator import Emulator
from tests.integration.test_workflow import ARTIFACTS, Workflow, findings, found
from tests.makers.evaluations import evaluation

THRESHOLDS = gate.Thresholds(
    accuracy_floor=0.5, margin=0.02, max_drop=0.2, confidence=0.95, min_test_pictures=20, class_floor=0.3,
    max_latency_ratio=4,
)  # fmt: skip
GOOD = evaluation(both=80, only_champion=2, only_challenger=10, neither=8)
WORSE = evaluation(both=80, only_champion=15, only_challenger=2, neither=3)


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory):
    with Emulator(state=tmp_path_factory.mktemp("registry")) as aws:
        made = Workflow(aws)
        session: Any = boto3
        keys = {"region_name": "us-east-1", "aws_access_key_id": "test", "aws_secret_access_key": "test"}
        made.sagemaker = session.client("sagemaker", endpoint_url=aws.endpoint_url, **keys)
        made.sagemaker.create_model_package_group(ModelPackageGroupName="loop")
        yield made


def judged(given: dict[str, Any] | None, found_by_rules: dict[str, Any]) -> dict[str, str]:
    """The answer of Judge: what the function makes of this evaluation."""
    verdict = {"run": "1", "dataset": "d", "champion": "0"} | gate.judge(given, found_by_rules, THRESHOLDS, {})
    uris = {"verdict": "s3://v/verdict.json", "evaluation": "s3://v/evaluation.json"}
    payload = app.answer(verdict) | uris | {"metadata": app.metadata(verdict) | {"verdict": uris["verdict"]}}
    return {"Judge": f"{{'Payload': {json.dumps(payload)}}}"}


def register(workflow: Any, given: dict[str, Any] | None, trained: dict[str, Any]) -> dict[str, Any]:
    """The newest package after a run in which the gate was given this."""
    answers = found(trained) | judged(given, trained)
    workflow.run(answers, real=["Register"], ModelPackageGroup="loop")
    listed = workflow.sagemaker.list_model_packages(ModelPackageGroupName="loop", SortOrder="Descending")
    newest = listed["ModelPackageSummaryList"][0]["ModelPackageArn"]
    return workflow.sagemaker.describe_model_package(ModelPackageName=newest)


@pytest.mark.parametrize(("given", "status"), [(GOOD, "Approved"), (WORSE, "Rejected")], ids=["good", "worse"])
def test_a_candidate_is_registered_with_verdict_metrics_and_lineage(workflow, given, status):
    before = workflow.item("champion", "champion")
    package = register(workflow, given, findings())
    run = workflow.output["run"]
    assert package["ModelApprovalStatus"] == status
    assert package["ModelPackageDescription"] == workflow.output["why"]
    metrics = package["ModelMetrics"]["ModelQuality"]["Statistics"]
    assert metrics["S3Uri"] == f"s3://{ARTIFACTS}/runs/{run}/evaluation/evaluation.json"
    properties = package["CustomerMetadataProperties"]
    lineage = {
        "run": run, "dataset": "d", "datasetUri": "s3://d", "code": "c", "tuningJob": "tuning",
        "trainingJob": f"loop-{run}-train-0", "report": f"s3://{ARTIFACTS}/runs/{run}/report.html",
        "verdict": "s3://v/verdict.json",
    }  # fmt: skip
    assert lineage.items() <= properties.items()
    assert properties["accuracy"] == str(given["challenger"]["accuracy"])
    assert float(properties["change"]) == pytest.approx(0.08 if status == "Approved" else -0.13)
    assert properties.get("champion") == before.get("model_package"), "none before the first was promoted"
    outcome = {"Approved": "PROMOTED", "Rejected": "REJECTED"}[status]
    assert workflow.output["outcome"] == workflow.item("dataset", "last")["outcome"] == outcome
    if status == "Approved":
        assert workflow.item("champion", "champion")["model_package"] == package["ModelPackageArn"]


def test_a_training_that_findings_block_is_registered_as_rejected(workflow):
    trained = findings("LossNotDecreasing", blocking=True, reason="LossNotDecreasing in step 12")
    package = register(workflow, None, trained)
    run = workflow.output["run"]
    assert package["ModelApprovalStatus"] == "Rejected" and workflow.output["outcome"] == "REJECTED"
    assert package["ModelPackageDescription"].startswith("blocking findings: LossNotDecreasing; ended early")
    metrics = package["ModelMetrics"]["ModelQuality"]["Statistics"]
    assert metrics["S3Uri"] == f"s3://{ARTIFACTS}/runs/{run}/findings.json"
    assert package["CustomerMetadataProperties"]["trainingJob"] == f"loop-{run}-train-0"
    assert "accuracy" not in package["CustomerMetadataProperties"]


def test_where_no_model_came_of_it_the_run_says_so(workflow):
    trained = findings("ExplodingTensor", blocking=True, reason="train loss nan")
    trained["summary"]["model"] = False
    answers = found(trained) | judged(None, trained)
    output = workflow.run(answers, real=["Register"], ModelPackageGroup="loop")
    assert output["outcome"] == "REJECTED" and "Register" not in workflow.visited
    assert output["why"].endswith("; ended early: train loss nan; no model came of it, so there is none to register")


def test_a_registration_that_is_repeated_makes_one_package(workflow):
    package = register(workflow, GOOD, findings())
    token = hashlib.md5(workflow.record["execution"].encode()).hexdigest()
    again = {
        name: package[name]
        for name in ("ModelPackageGroupName", "ModelPackageDescription", "InferenceSpecification",
                     "ModelApprovalStatus", "ModelMetrics", "CustomerMetadataProperties")
    }  # fmt: skip
    repeated = workflow.sagemaker.create_model_package(**again, ClientToken=token)
    assert repeated["ModelPackageArn"] == package["ModelPackageArn"]
