"""The hands of the demo: everything it does to AWS and reads back from it, with nothing but boto3.

Nothing here knows that AWS is on this machine, so these are also the calls that a user of the real stack would make.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from local.demo.data import Picture
from local.demo.progress import cause_in_words, duration

SERVICES = ("s3", "dynamodb", "stepfunctions", "sagemaker", "logs", "cloudwatch", "sqs", "lambda")
BATCH_GET_LIMIT = 100  # keys of one BatchGetItem
RUN_ID = "%y%m%d%H%M%S"  # the start of an execution, as the workflow's Begin makes it
SETTLED = {"CLASSIFIED", "REJECTED"}

Row = dict[str, Any]


@dataclass
class Run:
    """What one execution of the workflow came to, read from AWS after it ended."""

    run_id: str
    status: str
    seconds: float
    cause: str = ""
    states: dict[str, float] = field(default_factory=dict)  # seconds in each state
    trials: list[dict[str, Any]] = field(default_factory=list)
    findings: dict[str, Any] | None = None
    verdict: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    deployment: dict[str, Any] | None = None  # the champion's row, if this run's model is the champion
    outcome: str = ""  # in the workflow's words: PROMOTED, REJECTED, ROLLED_BACK, FAILED …
    message: str = ""
    report: bytes | None = None

    @property
    def promoted(self) -> bool:
        return self.status == "SUCCEEDED" and self.deployment is not None

    def why_not(self) -> str:
        """One sentence on why this run's model is not live."""
        reason = self.message or self.cause or (self.verdict or {}).get("sentence") or "no reason was written"
        failed = {trial["failure"] for trial in self.trials if trial["failure"]}
        also = f" (trials failed: {'; '.join(sorted(failed))})" if failed else ""
        return f"run {self.run_id} ended {self.outcome or self.status}: {cause_in_words(reason)}{also}"


class Loop:
    """The deployed stack, seen through its outputs."""

    def __init__(self, outputs: dict[str, str], endpoint_url: str, environment: dict[str, str]):
        session: Any = boto3.Session(
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
            region_name=environment.get("AWS_DEFAULT_REGION") or environment["AWS_REGION"],
        )
        config = Config(retries={"max_attempts": 3, "mode": "standard"}, connect_timeout=5, read_timeout=60)
        self.clients: dict[str, Any] = {
            name: session.client(name, endpoint_url=endpoint_url, config=config) for name in SERVICES
        }
        tables = session.resource("dynamodb", endpoint_url=endpoint_url, config=config)
        self.predictions = tables.Table(outputs["PredictionsTableName"])
        self.labels = tables.Table(outputs["LabelsTableName"])
        self.loop_state = tables.Table(outputs["LoopStateTableName"])
        self.outputs = outputs
        self.bucket = outputs["DataBucketName"]
        self.artifacts = outputs["ArtifactBucketName"]

    def package_sizes(self) -> str:
        """How large what was deployed is, zipped, in words."""
        client = self.clients["lambda"]
        functions = [function["CodeSize"] for function in client.list_functions()["Functions"]]
        layers = []
        for layer in client.list_layers()["Layers"]:
            version = layer["LatestMatchingVersion"]["Version"]
            found = client.get_layer_version(LayerName=layer["LayerName"], VersionNumber=version)
            layers.append(f"{layer['LayerName']} {found['Content']['CodeSize'] / 1e6:.1f} MB")
        return f"{len(functions)} functions of {max(functions) / 1e3:.0f} kB, and the layers {', '.join(layers)}"

    # --- pictures -------------------------------------------------------------------------------------------------

    def put(self, key: str, picture: Picture) -> None:
        self.clients["s3"].put_object(Bucket=self.bucket, Key=key, Body=picture.data, ContentType=picture.content_type)

    def drop(self, folder: str, pictures: Iterable[Picture]) -> dict[str, Picture]:
        """Drop pictures into inbox/<folder>/ under names that do not tell what they show; returns them by key."""
        dropped = {}
        for number, picture in enumerate(pictures, 1):
            suffix = picture.name.rsplit(".", 1)[-1]
            name = f"picture {number:03d}.{suffix}" if picture.truth else picture.name
            key = f"inbox/{folder}/{name}"
            self.put(key, picture)
            dropped[key] = picture
        return dropped

    def label(self, class_name: str, pictures: Iterable[Picture]) -> int:
        """Upload pictures as labelled ones of a class; returns how many."""
        count = 0
        for picture in pictures:
            self.put(f"labelled/{class_name}/{picture.name}", picture)
            count += 1
        return count

    def rows(self, keys: Iterable[str]) -> dict[str, Row]:
        """The current row of each picture that has one, by key."""
        wanted = [{"image": f"{self.bucket}/{key}", "version": "current"} for key in keys]
        found: dict[str, Row] = {}
        while wanted:
            batch, wanted = wanted[:BATCH_GET_LIMIT], wanted[BATCH_GET_LIMIT:]
            answer = self.predictions.meta.client.batch_get_item(RequestItems={self.predictions.name: {"Keys": batch}})
            found |= {row["key"]: row for row in answer["Responses"].get(self.predictions.name, [])}
            wanted += answer.get("UnprocessedKeys", {}).get(self.predictions.name, {}).get("Keys", [])
        return found

    def wait_for_rows(
        self, keys: Iterable[str], statuses: set[str], seconds: float, tell: Callable[[str], None]
    ) -> dict[str, Row]:
        """The rows once all have one of the statuses, or as they are after `seconds`: the caller counts the missing."""
        keys = list(keys)
        deadline = time.monotonic() + seconds
        while True:
            rows = self.rows(keys)
            counts = Counter(row["status"] for row in rows.values())
            by_status = [f"{count} {status}" for status, count in sorted(counts.items())]
            tell(", ".join([f"{len(rows)} of {len(keys)} rows", *by_status]))
            if sum(counts[status] for status in statuses) == len(keys) or time.monotonic() > deadline:
                return rows
            time.sleep(0.5)

    # --- labels and runs ------------------------------------------------------------------------------------------

    def registered(self) -> int:
        """How many labelled pictures the ledger holds."""
        count = 0
        start: dict[str, Any] = {}
        while True:
            page = self.labels.scan(
                Select="COUNT",
                FilterExpression="begins_with(pk, :l)",
                ExpressionAttributeValues={":l": "label#"},
                **start,
            )
            count += page["Count"]
            if "LastEvaluatedKey" not in page:
                return count
            start = {"ExclusiveStartKey": page["LastEvaluatedKey"]}

    def executions(self) -> list[str]:
        """ARNs of all runs so far."""
        pages = self.clients["stepfunctions"].get_paginator("list_executions")
        found = pages.paginate(stateMachineArn=self.outputs["RetrainStateMachineArn"])
        return [execution["executionArn"] for page in found for execution in page["executions"]]

    def wait_for_run(self, known: Iterable[str], labelled: int, seconds: float, tell: Callable[[str], None]) -> str:
        """The ARN of the run that the labels start. Raises TimeoutError if none starts in `seconds`."""
        known = set(known)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if new := [arn for arn in self.executions() if arn not in known]:
                return new[0]
            count = self.registered()
            now = ", waiting for the quiet period to end" if count >= labelled else ""
            tell(f"{count} of {labelled} labels registered{now}")
            time.sleep(1)
        decision = self.loop_state.get_item(Key={"pk": "decision", "sk": "last"}, ConsistentRead=True).get("Item", {})
        raise TimeoutError(
            f"no run started in {duration(seconds)}, with {self.registered()} of {labelled} labels registered: "
            + decision.get("why", "nobody decided whether one should; the log of start_retraining may say why")
        )

    def outcome(self, described: dict[str, Any], states: dict[str, float]) -> Run:
        """Everything that an ended execution left behind."""
        begun = described["startDate"].astimezone(UTC)
        run = Run(
            run_id=begun.strftime(RUN_ID),
            status=described["status"],
            seconds=(described.get("stopDate", datetime.now(UTC)) - described["startDate"]).total_seconds(),
            cause=": ".join(part for part in (described.get("error"), described.get("cause")) if part),
            states=states,
        )
        champion = self.loop_state.get_item(Key={"pk": "champion", "sk": "champion"}, ConsistentRead=True).get("Item")
        if champion and champion["model_version"] == run.run_id:
            run.deployment = champion
        ended = self.loop_state.get_item(Key={"pk": "run", "sk": run.run_id}, ConsistentRead=True).get("Item", {})
        run.outcome, run.message = ended.get("outcome", ""), ended.get("message", "")
        prefix = f"runs/{run.run_id}"
        report = ended.get("report", "").removeprefix(f"s3://{self.artifacts}/")  # of the training that went on
        run.findings = self._json(f"{report.removesuffix('/report.html') or prefix}/findings.json")
        run.verdict = self._json(f"{prefix}/verdict.json")
        run.evaluation = self._json(f"{prefix}/evaluation/evaluation.json")
        run.report = self._artifact(report or f"{prefix}/report.html")
        run.trials = self._trials(run.run_id)
        return run

    def _trials(self, run_id: str) -> list[dict[str, Any]]:
        """The trials of the run's tuning job, best first: objective, hyperparameters, status, failure, seconds."""
        sagemaker = self.clients["sagemaker"]
        jobs = sagemaker.list_hyper_parameter_tuning_jobs(NameContains=run_id)["HyperParameterTuningJobSummaries"]
        trials = []
        for job in jobs:
            found = sagemaker.list_training_jobs_for_hyper_parameter_tuning_job(
                HyperParameterTuningJobName=job["HyperParameterTuningJobName"], MaxResults=100
            )["TrainingJobSummaries"]
            for trial in found:
                begun, ended = trial.get("TrainingStartTime"), trial.get("TrainingEndTime")
                trials.append(
                    {
                        "objective": trial.get("FinalHyperParameterTuningJobObjectiveMetric", {}).get("Value"),
                        "hyperparameters": {k: v.strip('"') for k, v in trial.get("TunedHyperParameters", {}).items()},
                        "status": trial["TrainingJobStatus"],
                        "failure": self._failure(trial),
                        "seconds": (ended - begun).total_seconds() if begun and ended else None,
                    }
                )
        return sorted(trials, key=lambda trial: -(trial["objective"] if trial["objective"] is not None else -1.0))

    def _failure(self, trial: dict[str, Any]) -> str:
        if trial["TrainingJobStatus"] != "Failed":
            return ""
        described = self.clients["sagemaker"].describe_training_job(TrainingJobName=trial["TrainingJobName"])
        return described.get("FailureReason", "no reason given")

    def _artifact(self, key: str) -> bytes | None:
        try:
            return self.clients["s3"].get_object(Bucket=self.artifacts, Key=key)["Body"].read()
        except ClientError as error:
            if error.response["Error"]["Code"] in ("NoSuchKey", "404"):
                return None
            raise

    def _json(self, key: str) -> dict[str, Any] | None:
        body = self._artifact(key)
        return json.loads(body) if body else None

    # --- endpoint -------------------------------------------------------------------------------------------------

    def endpoint_status(self) -> str:
        """SageMaker's word for the endpoint, or an empty one while there is none."""
        try:
            found = self.clients["sagemaker"].describe_endpoint(EndpointName=self.outputs["EndpointName"])
        except ClientError as error:
            if error.response["Error"]["Code"] == "ValidationException":
                return ""
            raise
        return found["EndpointStatus"]

    def endpoint_requests(self, since: datetime) -> dict[str, int]:
        """Requests to the endpoint since then, and those that failed, by CloudWatch's AWS/SageMaker metrics."""
        totals = {}
        for metric in ("Invocations", "Invocation4XXErrors", "Invocation5XXErrors"):
            points = self.clients["cloudwatch"].get_metric_statistics(
                Namespace="AWS/SageMaker",
                MetricName=metric,
                Dimensions=[
                    {"Name": "EndpointName", "Value": self.outputs["EndpointName"]},
                    {"Name": "VariantName", "Value": "AllTraffic"},
                ],
                StartTime=since,
                EndTime=datetime.now(UTC),
                Period=60,
                Statistics=["Sum"],
            )["Datapoints"]
            totals[metric] = round(sum(point["Sum"] for point in points))
        return totals


class InboxStream(threading.Thread):
    """Drops pictures into the inbox, one after the other, faster while the endpoint is being updated."""

    CALM, BUSY = 2.0, 0.25  # seconds between pictures

    def __init__(self, loop: Loop, pictures: Iterable[Picture]):
        super().__init__(name="inbox-stream", daemon=True)
        self.loop = loop
        self.pictures = iter(pictures)
        self.sent: dict[str, Picture] = {}
        self.during_update: set[str] = set()  # keys that were dropped while the endpoint was being updated
        self.errors: list[str] = []
        self._halt = threading.Event()

    def run(self) -> None:
        for number, picture in enumerate(self.pictures, 1):
            key = f"inbox/stream/{number:05d}.{picture.name.rsplit('.', 1)[-1]}"
            updating = False
            try:
                updating = self.loop.endpoint_status() == "Updating"
                self.loop.put(key, picture)
            except (ClientError, BotoCoreError) as error:
                self.errors.append(f"{key}: {error}")
            else:
                self.sent[key] = picture
                if updating:
                    self.during_update.add(key)
            if self._halt.wait(self.BUSY if updating else self.CALM):
                return

    def stop(self) -> None:
        self._halt.set()
        self.join(timeout=30)
