"""Drift: what the index makes of samples, how often chance raises an alarm, and what the function reads and says."""

import json
import math
import re
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common import aws as aws_module
from common import clock, predictions, state
from common.events import ObjectEvent
from tests.makers import events, template
from watch_drift import app as drift
from watch_drift import psi

THRESHOLD = 0.25
NAMES = [f"class{number:03}" for number in range(400)]


# --- The index ---


@pytest.mark.parametrize("degrees", [1, 2, 5, 9, 19])
def test_the_quantile_of_chi_square_is_close_and_never_too_low(degrees: int):
    exact = stats.chi2.isf(psi.CHANCE, degrees)
    assert exact <= psi.chi_square(degrees, psi.CHANCE) <= 1.035 * exact


def test_the_index_is_what_the_definition_says():
    old, new = ["a"] * 600 + ["b"] * 400, ["a"] * 300 + ["b"] * 700
    shift = psi.of_classes(old, new)
    exact = (0.3 - 0.6) * math.log(0.3 / 0.6) + (0.7 - 0.4) * math.log(0.7 / 0.4)
    assert shift.psi == pytest.approx(exact, abs=0.002) and shift.largest.name == "a"
    assert shift.exceeds(0.25) and not shift.exceeds(0.5)


def test_equal_samples_have_not_shifted():
    names, values = ["a"] * 30 + ["b"] * 20, list(np.linspace(0.3, 1, 50))
    assert psi.of_classes(names, names).psi == psi.of_confidence(values, values).psi == 0


def test_rare_classes_share_bins_and_none_is_left_out():
    old = [name for name in NAMES[:100] for _ in range(3)] + ["common"] * 100
    shift = psi.of_classes(old, ["common"] * 50 + ["never seen"] * 50)
    assert len(shift.bins) <= psi.MOST_BINS and shift.bins[0].name == "common"
    assert sum(b.expected for b in shift.bins) == pytest.approx(1) == sum(b.actual for b in shift.bins)
    assert all(b.expected * len(old) >= psi.LEAST_EXPECTED for b in shift.bins) and shift.exceeds(THRESHOLD)


@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=80),
    st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=80),
    st.lists(st.floats(0, 1), min_size=1, max_size=80),
    st.lists(st.floats(0, 1), min_size=1, max_size=80),
)
def test_any_two_samples_can_be_compared(old, new, low, high):
    for shift in (psi.of_classes(old, new), psi.of_confidence(low, high)):
        assert math.isfinite(shift.psi) and shift.psi >= 0 and shift.chance >= 0
        assert sum(b.actual for b in shift.bins) == pytest.approx(1) == sum(b.expected for b in shift.bins)


def test_float32s_last_digits_are_no_drift():
    """A batch of one gives 1.0 where a batch of ten gives 0.9999999."""
    assert psi.of_confidence([1.0] * 300 + [0.9] * 100, [0.9999999] * 300 + [0.9000001] * 100).psi < 0.001


def mix(classes: int, skew: float) -> np.ndarray:
    """Shares of the classes, all alike or falling as those of words do."""
    shares = 1 / np.arange(1, classes + 1) ** skew
    return shares / shares.sum()


@pytest.mark.parametrize("skew", [0, 1])
@pytest.mark.parametrize("classes", [2, 8, 133])
@pytest.mark.parametrize("tested", [20, 300])
def test_chance_alone_raises_hardly_an_alarm(tested: int, classes: int, skew: float):
    """The same classes and confidences as in the test pictures, in the fewest answers that are compared."""
    random = np.random.default_rng(7)
    shares, alarms, looks = mix(classes, skew), 0, 300
    for _ in range(looks):
        names = [[NAMES[at] for at in random.choice(classes, size, p=shares)] for size in (tested, 200)]
        values = [random.beta(6, 1, size).tolist() for size in (tested, 200)]
        alarms += psi.of_classes(*names).exceeds(THRESHOLD) or psi.of_confidence(*values).exceeds(THRESHOLD)
    assert alarms <= 2, f"{alarms} of {looks}"


def test_small_samples_would_raise_alarms_without_the_bound():
    random = np.random.default_rng(7)
    looks = [psi.of_confidence(random.beta(6, 1, 60).tolist(), random.beta(6, 1, 60).tolist()) for _ in range(200)]
    assert sum(look.psi > THRESHOLD for look in looks) > 40 and sum(look.exceeds(THRESHOLD) for look in looks) <= 2


def test_what_has_drifted_is_found():
    """One of eight classes takes over half of the pictures, or the model becomes half as sure as often."""
    random, shares = np.random.default_rng(7), mix(8, 0)
    other = np.array([0.5, *[0.5 / 7] * 7])
    found = [0, 0]
    for _ in range(100):
        names = [[NAMES[at] for at in random.choice(8, size, p=p)] for size, p in ((200, shares), (200, other))]
        found[0] += psi.of_classes(*names).exceeds(THRESHOLD)
        sure = [random.beta(a, 1, 200).tolist() for a in (6, 2.5)]
        found[1] += psi.of_confidence(*sure).exceeds(THRESHOLD)
    assert min(found) >= 98


# --- The function ---

SINCE = clock.iso(clock.now() - timedelta(days=3))
ARTIFACTS, EVALUATION = "artifacts", "runs/261120120000/evaluation/evaluation.json"
CHAMPION = {
    "model_version": "261120120000",
    "deployment": 7,
    "since": SINCE,
    "evaluation": f"s3://{ARTIFACTS}/{EVALUATION}",
}


@pytest.fixture
def watch(aws, context, monkeypatch):
    """Look for drift; `RETRAIN_ON_DRIFT` and such as keywords. Executions that were started are in `watch.started`."""
    defaults = {"DRIFT_DAYS": "7", "DRIFT_MIN_PICTURES": "50", "DRIFT_THRESHOLD": "0.25", "RETRAIN_ON_DRIFT": "false"}
    client = aws_module.client

    class Watch:
        started: list[dict[str, Any]] = []

        def start_execution(self, **request: Any) -> None:
            self.started.append(request)

        def __call__(self, **settings: str) -> dict[str, Any]:
            for name, value in (defaults | settings).items():
                monkeypatch.setenv(name, value)
            answer = json.loads(json.dumps(drift.handler({}, context)))
            return answer | {"document": state.get("drift", "last")}

    found = Watch()
    found.started = []
    monkeypatch.setenv("RETRAIN_STATE_MACHINE", "arn:aws:states:us-east-1:1:stateMachine:loop-retrain")
    monkeypatch.setattr(aws_module, "client", lambda name: found if name == "stepfunctions" else client(name))
    return found


def evaluation(aws: Any, names: str, confidence: float = 0.9) -> None:
    """evaluation.json, in which the champion answered `names`, and could not read one picture."""
    rows = [{"predicted": name, "probability": confidence, "class": "a", "sha256": "0"} for name in names]
    rows.append({"predicted": None, "probability": 0.0, "class": "a", "sha256": "1"})
    body = json.dumps({"challenger": {"predictions": rows}})
    aws.s3.put_object(Bucket=ARTIFACTS, Key=EVALUATION, Body=body)


def answer(aws: Any, names: str, confidence: float = 0.9, deployment: int = 7, replayed: bool = False) -> None:
    answers = []
    for number, name in enumerate(names):
        key = f"inbox/{deployment}-{replayed}-{number}.jpg"
        event = ObjectEvent.from_body(events.object_created(aws.bucket, key, version="v"))
        event = ObjectEvent.from_body(event.to_body(replayed=replayed))
        answers.append(
            predictions.Answer(
                event, [{"class": name, "probability": confidence}], model_version="m", deployment=deployment,
                dataset_hash="d", width=9, height=9, format="PNG", latency_ms=1.0,
            )
        )  # fmt: skip
    assert not any(predictions.classified(answers))


def test_without_a_model_there_is_nothing_to_watch(watch):
    assert watch()["sentence"] == "no model is live" and watch()["document"] is None


def test_too_few_answers_are_not_compared_and_end_the_alarm(aws, watch, capsys):
    state.put("champion", "champion", CHAMPION)
    answer(aws, "a" * 49)
    looked = watch()
    assert looked["sentence"].startswith("not measured: 49 answers since ") and not looked["drifted"]
    assert json.loads(capsys.readouterr().out.splitlines()[0])["Drifted"] == [0.0]


def test_what_has_not_drifted_is_said_with_its_numbers(aws, watch, capsys):
    state.put("champion", "champion", CHAMPION)
    evaluation(aws, "ab" * 50)
    answer(aws, "ab" * 40)
    looked = watch()
    assert not looked["drifted"] and "the class mix has not drifted (PSI 0.00, 0.25 is allowed" in looked["sentence"]
    document = looked["document"]
    assert (document["pictures"], document["test_pictures"], document["deployment"]) == (80, 100, 7)
    assert [b["bin"] for b in document["class_mix"]["bins"]] == ["a", "b"]
    published = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (published["Drifted"], published["ClassMixPSI"]) == ([0.0], [0.0]) and "ConfidencePSI" in published


def test_drift_is_measured_on_this_deployments_answers_to_new_pictures(aws, watch):
    """Not on another's, and not on what was sent again because it was hard."""
    state.put("champion", "champion", CHAMPION)
    evaluation(aws, "ab" * 50)
    answer(aws, "ab" * 40)
    answer(aws, "b" * 60, deployment=6)
    answer(aws, "b" * 60, confidence=0.4, replayed=True)
    looked = watch()
    assert looked["document"]["pictures"] == 80 and not looked["drifted"]


def test_answers_before_the_window_do_not_count(aws, watch):
    state.put("champion", "champion", CHAMPION | {"since": clock.iso(clock.now() + timedelta(seconds=1))})
    answer(aws, "a" * 60)
    assert watch()["document"]["pictures"] == 0


def test_a_day_is_read_newest_first_and_not_without_end(aws, watch, monkeypatch):
    monkeypatch.setattr(drift, "MOST_A_DAY", 60)
    state.put("champion", "champion", CHAMPION)
    evaluation(aws, "ab" * 50)
    answer(aws, "ab" * 40)
    assert watch()["document"]["pictures"] == 60


def test_drift_is_told_in_words_and_starts_a_run_only_if_wanted(aws, watch):
    evaluation(aws, "ab" * 50)
    state.put("champion", "champion", CHAMPION)
    answer(aws, "b" * 80)
    looked = watch()
    assert looked["drifted"] and watch.started == [] and looked["run"] is None
    assert (
        "the class mix has drifted (PSI" in looked["sentence"] and "most at a: 1% of the answers" in looked["sentence"]
    )
    assert "the confidence has not" in looked["sentence"]
    looked = watch(RETRAIN_ON_DRIFT="true")
    (started,) = watch.started
    assert looked["run"] == f"started {started['name']}" and started["name"] == "drift-of-deployment-7"
    document = json.loads(started["input"])
    assert document["trigger"] == "drift" and document["why"] == looked["sentence"]
    assert not document["force"], "from what was trained already the same model would come"


def test_less_sure_answers_are_drift(aws, watch):
    state.put("champion", "champion", CHAMPION)
    rows = [{"predicted": "ab"[n % 2], "probability": 0.8 + n / 1000, "class": "a"} for n in range(200)]
    body = json.dumps({"challenger": {"predictions": rows}})
    aws.s3.put_object(Bucket=ARTIFACTS, Key=EVALUATION, Body=body)
    answer(aws, "ab" * 40, confidence=0.5)
    looked = watch()
    assert looked["drifted"] and "the class mix has not drifted" in looked["sentence"]
    assert "the confidence has drifted" in looked["sentence"] and "most at 0.000 to 0.8" in looked["sentence"]


def test_drift_waits_for_a_run_that_goes_on_and_for_the_next_day(aws, watch, monkeypatch):
    monkeypatch.setenv("MAX_RUNS_PER_DAY", "1")
    state.put("champion", "champion", CHAMPION)
    evaluation(aws, "ab" * 50)
    answer(aws, "b" * 80)
    began = clock.now() - timedelta(hours=1)
    state.put("run", began.strftime("%y%m%d%H%M%S"), {"outcome": "PROMOTED"})
    looked = watch(RETRAIN_ON_DRIFT="true")
    assert (
        looked["run"].startswith("none was started: of at most 1 runs within 24 hours 1 began") and watch.started == []
    )


# --- The template ---


def test_the_alarm_watches_what_is_published_until_it_is_measured_again():
    alarm = template.resources("AWS::CloudWatch::Alarm")["DriftAlarm"]
    assert (alarm["Namespace"], alarm["MetricName"], alarm["TreatMissingData"]) == ("Houndloop", "Drifted", "ignore")
    assert alarm["Dimensions"] == [{"Name": "service", "Value": {"Ref": "Name"}}] and alarm["AlarmActions"]


def test_watching_can_be_switched_off():
    look = template.resources("AWS::Serverless::Function")["WatchDrift"]["Events"]["Look"]["Properties"]
    assert look["State"] == {"Fn::If": ["WatchesDrift", "ENABLED", "DISABLED"]}
    pattern = template.template()["Parameters"]["DriftSchedule"]["AllowedPattern"]
    assert all(re.fullmatch(pattern, text) for text in ("never", "rate(1 day)", "cron(0 3 * * ? *)"))
    assert not re.fullmatch(pattern, "daily")
