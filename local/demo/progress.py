"""What the demo shows while it works: its own steps, and what a retraining run is doing at this moment.

On a terminal the running step is a live display; anywhere else (a pipe, a CI log) every change is a plain line.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from botocore.exceptions import ClientError
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.text import Text

LOG_GROUPS = {"training": "/aws/sagemaker/TrainingJobs", "processing": "/aws/sagemaker/ProcessingJobs"}


@dataclass
class Step:
    """One step of the demo; `seconds` is None while it runs, `lines` is what happened in it."""

    title: str
    began: float
    seconds: float | None = None
    failed: bool = False
    lines: list[str] = field(default_factory=list)


class Display:
    """Shows steps as they run and remembers how long each took."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.steps: list[Step] = []
        self._details: list[str] = []
        self._live: Live | None = None
        self._spinner = Spinner("dots", style="cyan")

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Run the body as a step: timed, with a spinner on a terminal."""
        step = Step(title, time.monotonic())
        self.steps.append(step)
        self._details = []
        if self.console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self.console, transient=True, refresh_per_second=8)
            self._live.start()
        else:
            self.console.print(f"{title} …")
        try:
            yield step
        except BaseException:
            step.failed = True
            raise
        finally:
            step.seconds = time.monotonic() - step.began
            if self._live:
                self._live.stop()
                self._live = None
            mark = "[red]✗[/red]" if step.failed else "[green]✓[/green]"
            self.console.print(f"{mark} {title}  [dim]{duration(step.seconds)}[/dim]")

    def event(self, text: str) -> None:
        """Something happened in the running step: a line that stays."""
        self.steps[-1].lines.append(text)
        self.console.print(f"  [dim]{_since(self.steps[-1])}[/dim]  {text}")

    def detail(self, lines: Iterable[str]) -> None:
        """What goes on now: replaces the last details on a terminal, and prints what is new anywhere else."""
        lines = [line for line in lines if line]
        if not self.console.is_terminal:
            for line in lines:
                if line not in self._details:
                    self.console.print(f"  [dim]{_since(self.steps[-1])}[/dim]    {line}")
        self._details = lines

    def say(self, text: str = "") -> None:
        """A line outside the steps."""
        self.console.print(text)

    def _render(self) -> Group:
        step = self.steps[-1]
        self._spinner.update(text=Text.from_markup(f"{step.title}  [dim]{_since(step)}[/dim]"))
        return Group(self._spinner, *(Text.from_markup(f"    {line}") for line in self._details))


def duration(seconds: float) -> str:
    """Seconds as a person writes them: 0.4 s, 12 s, 3 min 05 s."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def _since(step: Step) -> str:
    return f"{time.monotonic() - step.began:5.0f} s"


def in_words(name: str) -> str:
    """A state's name for people: `CreateEndpointConfig` is 'create endpoint config'."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower()


def metrics(line: str) -> dict[str, float]:
    """The `name=value;` pairs of a line of a training log."""
    return {name: float(value) for name, value in re.findall(r"([\w:]+)=([0-9.]+(?:e-?\d+)?);", line)}


def cause_in_words(cause: str) -> str:
    """What of a failed task's cause is for people: of a job's description, or a function's error, the reason alone."""
    names = ("FailureReason", "ExitMessage", "errorMessage")
    found = (re.search(rf'"{name}": ?("(?:[^"\\]|\\.)*")', cause) for name in names)
    if reasons := [json.loads(reason[1]) for reason in found if reason]:
        return cause[: cause.index("{")] + ": ".join(reasons)
    return cause if len(cause) <= 300 else f"{cause[:300]} …"


class RunWatcher:
    """Follows one execution of the retraining workflow from outside, as the console would: history, jobs, logs."""

    def __init__(self, execution: str, clients: dict[str, Any], display: Display):
        self.execution = execution
        self.aws = clients
        self.display = display
        self.states: dict[str, float] = {}  # seconds in each state, in the order they were entered
        self._seen = 0
        self._entered: tuple[str, datetime] | None = None
        self._jobs: dict[str, str] = {}  # finished trials and jobs: name to what came of them
        self._logs: dict[str, str] = {}  # streams
        self._epochs: dict[str, int] = {}  # the highest that a job has reached

    def wait(self, seconds: float) -> dict[str, Any]:
        """Follow until the execution ends; returns its description. Raises TimeoutError after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            described = self.aws["stepfunctions"].describe_execution(executionArn=self.execution)
            self._read_history()
            if described["status"] != "RUNNING":
                return described
            state = f"state: {in_words(self._entered[0])}" if self._entered else "starting"
            self.display.detail([state, *self._running(described["startDate"])])
            if time.monotonic() > deadline:
                raise TimeoutError(f"the workflow did not end in {duration(seconds)}")
            time.sleep(1)

    def _read_history(self) -> None:
        pages = self.aws["stepfunctions"].get_paginator("get_execution_history")
        for page in pages.paginate(executionArn=self.execution, PaginationConfig={"PageSize": 1000}):
            for event in page["events"]:
                if event["id"] <= self._seen:
                    continue
                self._seen = event["id"]
                if details := event.get("stateEnteredEventDetails"):
                    if details["name"] not in self.states and event["type"].startswith(("Task", "Map", "Parallel")):
                        self.display.event(in_words(details["name"]))
                    self._entered = details["name"], event["timestamp"]
                elif (details := event.get("stateExitedEventDetails")) and self._entered:
                    took = (event["timestamp"] - self._entered[1]).total_seconds()
                    self.states[details["name"]] = self.states.get(details["name"], 0.0) + max(0.0, took)
                elif details := event.get("taskFailedEventDetails"):
                    cause = escape(cause_in_words(details.get("cause", "")))
                    self.display.event(f"[red]{details.get('error')}[/red]: {cause}")

    def _running(self, since: datetime) -> list[str]:
        """What the jobs that were created since then do now, a line each; each trial that ended is told of once."""
        sagemaker = self.aws["sagemaker"]
        lines = []
        tuning_jobs = sagemaker.list_hyper_parameter_tuning_jobs(CreationTimeAfter=since)
        for job in tuning_jobs["HyperParameterTuningJobSummaries"]:
            name = job["HyperParameterTuningJobName"]
            tuning = sagemaker.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName=name)
            total = tuning["HyperParameterTuningJobConfig"]["ResourceLimits"]["MaxNumberOfTrainingJobs"]
            trials = sagemaker.list_training_jobs_for_hyper_parameter_tuning_job(
                HyperParameterTuningJobName=name, SortBy="CreationTime", SortOrder="Ascending", MaxResults=100
            )["TrainingJobSummaries"]
            for number, trial in enumerate(trials, 1):
                lines += self._trial(f"trial {number} of {total}", trial)
        for job in sagemaker.list_training_jobs(StatusEquals="InProgress")["TrainingJobSummaries"]:
            described = sagemaker.describe_training_job(TrainingJobName=job["TrainingJobName"])
            if "TuningJobArn" not in described:
                lines.append(f"training: {self._epoch(job['TrainingJobName'], described.get('HyperParameters', {}))}")
        for job in sagemaker.list_processing_jobs(StatusEquals="InProgress")["ProcessingJobSummaries"]:
            name = job["ProcessingJobName"]
            lines.append(f"job {name}: {self._last_line('processing', name) or 'starting'}")
        return lines

    def _trial(self, title: str, trial: dict[str, Any]) -> list[str]:
        name, status = trial["TrainingJobName"], trial["TrainingJobStatus"]
        settings = trial.get("TunedHyperParameters", {})
        title += f" ({', '.join(f'{k} {_short(v)}' for k, v in sorted(settings.items()))})"
        if status == "InProgress":
            return [f"{title}: {self._epoch(name, settings)}"]
        if name not in self._jobs:
            objective = trial.get("FinalHyperParameterTuningJobObjectiveMetric", {}).get("Value")
            self._jobs[name] = f"validation accuracy {objective:.1%}" if objective is not None else status.lower()
            if status == "Failed":
                described = self.aws["sagemaker"].describe_training_job(TrainingJobName=name)
                self._jobs[name] = f"[red]failed[/red]: {escape(described.get('FailureReason', 'no reason given'))}"
            self.display.event(f"{title}: {self._jobs[name]}")
        return []

    def _epoch(self, job: str, hyperparameters: dict[str, str]) -> str:
        found = metrics(self._last_line("training", job, "epoch="))
        if "epoch" not in found:
            return "starting"
        epoch, before = int(found["epoch"]), self._epochs.get(job, 0)
        self._epochs[job] = max(epoch, before)
        if epoch < before:
            return "finishing"  # the last line repeats the best epoch's
        total = _short(hyperparameters.get("epochs", ""))
        accuracy = found.get("validation:accuracy")
        return f"epoch {epoch}{f' of {total}' if total else ''}" + (
            f", validation accuracy {accuracy:.1%}" if accuracy is not None else ""
        )

    def _last_line(self, kind: str, job: str, having: str = "") -> str:
        """The last line of a job's log, of those that contain `having`; empty while there is none."""
        try:
            if job not in self._logs:
                streams = self.aws["logs"].describe_log_streams(
                    logGroupName=LOG_GROUPS[kind], logStreamNamePrefix=f"{job}/"
                )["logStreams"]
                if not streams:
                    return ""
                self._logs[job] = streams[0]["logStreamName"]
            events = self.aws["logs"].get_log_events(
                logGroupName=LOG_GROUPS[kind], logStreamName=self._logs[job], startFromHead=False, limit=50
            )["events"]
        except ClientError as error:
            if error.response["Error"]["Code"] == "ResourceNotFoundException":
                return ""  # the job has not written a line yet
            raise
        lines = [event["message"].strip() for event in events if having in event["message"]]
        return escape(lines[-1][:160]) if lines else ""


def _short(value: str) -> str:
    """A hyperparameter without quotes and superfluous digits."""
    value = value.strip('"')
    try:
        number = float(value)
    except ValueError:
        return value
    return f"{number:g}" if number == int(number) else f"{number:.3g}"
