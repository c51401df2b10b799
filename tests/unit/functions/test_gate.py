"""The gate: what it lets through, what it stops, and what it says about it."""

import json
from fractions import Fraction
from math import comb, exp, lgamma, log
from typing import Any

import pytest

import evaluate
from judge_challenger import app, chance, document
from judge_challenger.gate import Thresholds, compare, judge, no_large_drop, not_worse
from tests.makers.evaluations import CLEAN, evaluation

THRESHOLDS = Thresholds(
    accuracy_floor=0.5, margin=0.02, max_drop=0.2, confidence=0.95, min_test_pictures=20, class_floor=0.3,
    max_latency_ratio=4,
)  # fmt: skip


def verdict(left_out: dict[str, str] | None = None, **given: Any) -> dict[str, Any]:
    return judge(evaluation(**given), CLEAN, THRESHOLDS, left_out or {})


def failed(found: dict[str, Any]) -> list[str]:
    return [check["name"] for check in found["checks"] if not check["passed"]]


# --- Chance ---


def test_published_figures_come_out():
    """Fagerland, Lydersen and Laake: airway reactivity of 21 children (Bentur), and its p-values of both sides."""
    assert chance.tango(7, 1, 21, 0.975) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert 2 * chance.mcnemar(7, 1) == pytest.approx(0.039, abs=5e-4)
    assert chance.wilson(81, 263, 0.975) == pytest.approx((0.2553, 0.3662), abs=5e-5), "Newcombe 1998, table I"
    assert chance.fisher(1, 4, 3, 4) == pytest.approx(17 / 70), "Fisher's own tea"


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (3, 0), (0, 3), (7, 2), (150, 130)])
def test_mcnemar_is_a_binomial_tail_with_half_of_the_case(lost, won):
    n = lost + won
    tail = sum(Fraction(comb(n, k), 2**n) for k in range(lost + 1, n + 1)) + Fraction(comb(n, lost), 2 ** (n + 1))
    assert chance.mcnemar(lost, won) == float(tail)
    assert chance.mcnemar(lost, won) + chance.mcnemar(won, lost) == pytest.approx(1)


@pytest.mark.parametrize(("lost", "won", "n"), [(0, 0, 20), (3, 0, 30), (0, 3, 30), (12, 4, 100), (9, 0, 9), (0, 9, 9)])
def test_the_interval_holds_the_changes_that_do_not_contradict_the_counts(lost, won, n):
    """Against the likeliest split found by trying, not by the formula for it."""
    low, high = chance.tango(lost, won, n, 0.95)
    assert -1 <= low <= (won - lost) / n <= high <= 1
    assert chance.tango(won, lost, n, 0.95) == pytest.approx((-high, -low))

    def likelihood(q: float, change: float) -> float:
        shares = ((lost, q), (won, q + change), (n - lost - won, 1 - 2 * q - change))
        return sum(count * log(max(share, 1e-300)) for count, share in shares if count)

    for bound, sign in ((low, 1), (high, -1)):
        if abs(bound) == 1:
            continue
        least, most = max(0.0, -bound), (1 - bound) / 2
        q = max((least + (most - least) * step / 20000 for step in range(20001)), key=lambda q: likelihood(q, bound))
        score = (won - lost - n * bound) / (n * (2 * q + bound * (1 - bound))) ** 0.5
        assert score == pytest.approx(sign * chance.quantile(0.95), abs=0.01)


def test_twenty_pictures_exclude_a_large_drop_only_where_no_answer_is_lost():
    assert chance.tango(0, 0, 20, 0.95)[0] > -0.2 > chance.tango(2, 0, 20, 0.95)[0]


@pytest.mark.parametrize(("n", "differing"), [(60, 0), (100, 10), (300, 30)])
def test_the_drop_that_is_called_visible_is_blocked_four_times_out_of_five(n, differing):
    """By the exact probability of all outcomes."""
    drop = chance.visible_drop(n, differing, THRESHOLDS.confidence, THRESHOLDS.margin)
    lost = max((differing / n + drop) / 2, drop)
    assert 0.7 < blocked(n, lost, lost - drop) < 0.92


def blocked(n: int, lost: float, won: float) -> float:
    """Probability of a block, where each picture is lost or won with these probabilities."""
    total = 0.0
    for a in range(n + 1):
        for b in range(n + 1 - a):
            if (a and not lost) or (b and not won):
                continue
            likely = lgamma(n + 1) - lgamma(a + 1) - lgamma(b + 1) - lgamma(n - a - b + 1)
            likely += (a * log(lost) if a else 0) + (b * log(won) if b else 0) + (n - a - b) * log(1 - lost - won)
            if likely > -16 and a - b > THRESHOLDS.margin * n and chance.mcnemar(a, b) < 0.05:
                total += exp(likely)
    return total


# --- The champion ---


def test_a_drop_that_chance_explains_does_not_block():
    found = verdict(both=85, only_champion=5, only_challenger=2, neither=8)
    assert found["promote"] and found["change_on_common_classes"] == pytest.approx(-0.03)
    assert "-3.0% against the champion on the 100 test pictures" in found["sentence"]


def test_a_drop_that_chance_does_not_explain_blocks_and_says_so():
    found = verdict(both=80, only_champion=12, only_challenger=3, neither=5)
    assert failed(found) == ["not worse than the champion"] and not found["promote"]
    assert "9.0% worse than the champion on the 100 test pictures" in found["sentence"]
    assert "12 lost, 3 won, by chance in 1.1% of cases" in found["sentence"]


def test_a_drop_within_the_margin_does_not_block_however_sure_it_is():
    assert verdict(both=2800, only_champion=60, only_challenger=10, neither=130)["promote"]
    assert not verdict(both=2800, only_champion=75, only_challenger=10, neither=115)["promote"]


def test_a_large_drop_must_be_excluded_where_few_pictures_show_nothing():
    found = verdict(both=18, only_champion=3, only_challenger=0, neither=3)
    assert found["comparison"]["p_worse"] > 0.05
    assert failed(found) == ["no large drop possible"] and "label more" in found["sentence"]
    assert verdict(both=75, only_champion=12, only_challenger=9, neither=4)["promote"]


@pytest.mark.parametrize("n", [20, 45])
def test_one_more_lost_never_saves_a_challenger_and_one_more_won_never_costs_it(n):
    def stopped(lost: int, won: int) -> bool:
        counts = {"n": n, "both": n - lost - won, "only_champion": lost, "only_challenger": won, "neither": 0}
        found = compare(counts, THRESHOLDS)
        return not (not_worse(found, THRESHOLDS).passed and no_large_drop(found, THRESHOLDS).passed)

    grid = {(a, b): stopped(a, b) for a in range(n + 1) for b in range(n + 1 - a)}
    assert not grid[0, 0] and not grid[0, n] and grid[n, 0]
    for (lost, won), blocks in grid.items():
        assert not blocks or grid.get((lost + 1, won), True)
        assert blocks or not grid.get((lost, won + 1), False)


def test_with_too_few_pictures_no_test_can_tell():
    found = verdict(both=19, only_champion=0, only_challenger=0, neither=0)
    assert failed(found) == ["test pictures"]
    assert found["sentence"].startswith("only 19 test pictures of the classes that both models know, and 20 are needed")
    assert verdict(both=20)["promote"]


def test_a_better_challenger_passes_with_few_pictures():
    found = verdict(both=12, only_champion=0, only_challenger=6, neither=2)
    assert found["promote"] and found["comparison"]["p_better"] < 0.05


def test_a_known_class_that_is_lost_blocks_although_all_others_hold():
    """Among a hundred classes, of which some would lose so many coins by chance."""
    classes = {f"class {number}": (9, 0, 0, 1) for number in range(99)} | {"pug": (0, 7, 0, 0)}
    found = judge(evaluation(classes=classes), CLEAN, THRESHOLDS, {})
    assert failed(found) == ["no known class lost"]
    assert found["sentence"] == "known classes lost: pug (7 of 7 test pictures before, 0 now)"
    assert chance.mcnemar(7, 0) > 0.05 / 100 > chance.fisher(0, 7, 7, 7)


@pytest.mark.parametrize("counts", [(0, 4, 0, 1), (2, 3, 0, 0), (4, 6, 0, 0)])
def test_a_known_class_that_is_worse_by_chance_or_over_the_floor_does_not_block(counts):
    classes = {f"class {number}": (9, 0, 0, 1) for number in range(99)} | {"pug": counts}
    assert judge(evaluation(classes=classes), CLEAN, THRESHOLDS, {})["promote"]


# --- Labels that changed since ---


def test_new_labels_that_are_wrong_cannot_speak_for_a_model_that_learnt_them():
    """Forty older test pictures, of which it loses ten; and forty new ones, of which only it gets twenty right."""
    given = evaluation(both=30, only_champion=10, only_challenger=20, neither=20, settled=(30, 10, 0, 0))
    found = judge(given, CLEAN, THRESHOLDS, {})
    assert found["change_on_common_classes"] > 0 and failed(found) == ["not worse on older pictures"]
    assert "25.0% worse than the champion on the 40 test pictures that were in the champion's own" in found["sentence"]
    assert found["sentence"].endswith(
        "are the new labels right? The champion agrees with 0 of 40 new test pictures of classes it knows, and with "
        "40 of 40 older ones"
    )


def test_new_pictures_that_the_champion_does_not_know_are_told_and_block_nothing():
    found = judge(evaluation(both=42, only_challenger=38, settled=(40, 0, 0, 0)), CLEAN, THRESHOLDS, {})
    assert found["promote"] and "The champion agrees with 2 of 40 new" in found["sentence"]


def test_a_few_new_pictures_that_it_gets_wrong_are_no_reason_to_doubt_labels():
    found = judge(evaluation(both=42, only_challenger=2, settled=(40, 0, 0, 0)), CLEAN, THRESHOLDS, {})
    assert found["promote"] and found["doubts"] == [] and found["settled"]["n"] == 40


@pytest.mark.parametrize("settled", [None, (0, 0, 0, 0), (80, 0, 0, 0)])
def test_older_pictures_are_looked_at_apart_only_where_there_are_others(settled):
    found = judge(evaluation(both=80, settled=settled), CLEAN, THRESHOLDS, {})
    assert found["settled"] is None and found["promote"]


# --- New classes, the first model, findings, latency ---


def test_the_first_model_needs_the_floor_and_enough_pictures():
    assert verdict(both=0, neither=40, only_challenger=60, champion=False)["promote"]
    found = verdict(both=0, neither=60, only_challenger=40, champion=False)
    assert failed(found) == ["accuracy"] and "under the floor of 50.0%" in found["sentence"]
    found = verdict(both=0, neither=0, only_challenger=19, champion=False)
    assert "only 19 test pictures in all" in found["sentence"] and not found["promote"]


def test_a_champion_that_knows_none_of_the_classes_is_no_champion_to_compare_with():
    found = verdict(both=0, neither=10, only_challenger=50, champion=False)
    assert found["promote"] and found["comparison"] is None and "no champion to compare with" in found["sentence"]


def test_every_new_class_must_reach_the_floor():
    assert verdict(both=90, new={"pug": (3, 10)})["promote"]
    found = verdict(both=90, new={"pug": (2, 10), "beagle": (8, 10)})
    assert failed(found) == ["new classes"]
    assert found["sentence"] == "new class pug: 2 of 10 test pictures recognised, under the floor of 30%"


def test_a_new_class_without_test_pictures_has_shown_nothing():
    given = evaluation(both=90, new={"pug": (8, 10)})
    given["new_classes"].append("boxer")
    found = judge(given, CLEAN, THRESHOLDS, {})
    assert "boxer: 0 of 0" in found["sentence"]


def test_a_sentence_names_few_of_many_classes():
    found = verdict(both=900, new={f"class {number:03}": (0, 3) for number in range(1000)})
    assert "and 995 more" in found["sentence"] and len(found["sentence"]) < 700


@pytest.mark.parametrize("champion", [True, False], ids=["compared", "none of the classes left"])
def test_a_class_that_is_still_labelled_is_not_lost_in_silence(champion):
    why = "pug has 4 of the 5 pictures a class needs: 1 missing"
    found = verdict(
        {"pug": why, "husky": "new, too few"}, only_challenger=90, missing=("boxer", "pug"), champion=champion
    )
    assert failed(found) == ["no known class left out"] and not found["promote"]
    assert found["sentence"] == f"the champion knows classes that are labelled and take no part: {why}"


@pytest.mark.parametrize("champion", [True, False], ids=["compared", "none of the classes left"])
def test_a_class_that_nobody_labels_any_more_may_go_and_is_named(champion):
    found = verdict({"husky": "new, too few"}, only_challenger=90, missing=("boxer", "pug"), champion=champion)
    assert found["promote"] and "and boxer, pug forgotten, which nobody labels any more; served" in found["sentence"]


BLOCKING = {
    "blocking": True,
    "rules": [{"rule": "ExplodingTensor", "blocking": True, "status": "IssuesFound"}],
    "verdict": {"status": "EndedEarly", "reason": "train loss nan"},
}


def test_a_blocking_finding_blocks_whatever_the_figures():
    found = judge(evaluation(both=100), BLOCKING, THRESHOLDS, {})
    assert not found["promote"] and "ExplodingTensor" in found["sentence"]


def test_a_training_that_was_not_evaluated_has_a_verdict_too():
    found = judge(None, BLOCKING, THRESHOLDS, {})
    assert found["sentence"] == "blocking findings: ExplodingTensor; ended early: train loss nan"
    assert failed(found) == ["no blocking finding"]


@pytest.mark.parametrize(("milliseconds", "expected"), [((30.0, 10.0), True), ((45.0, 10.0), False)])
def test_a_slower_model_is_stopped_at_the_bound(milliseconds, expected):
    found = verdict(both=100, milliseconds=milliseconds)
    assert found["promote"] == expected and found["latency"]["ratio"] == milliseconds[0] / milliseconds[1]
    assert expected or "4.5 times the champion's time for a picture" in found["sentence"]


def test_a_few_slow_pictures_are_no_slow_model():
    given = evaluation(both=100, milliseconds=(10.0, 10.0))
    for answer in given["challenger"]["predictions"][:45]:
        answer["ms"] = 100.0
    assert judge(given, CLEAN, THRESHOLDS, {})["promote"]


def test_pictures_that_could_not_be_read_have_no_time():
    given = evaluation(both=30)
    for model in ("challenger", "champion"):
        given[model]["predictions"][0] |= {"predicted": None, "ms": None}
    assert judge(given, CLEAN, THRESHOLDS, {})["latency"]["pictures"] == 29


def test_the_precision_is_told_where_the_model_is_to_be_served():
    found = verdict(both=90)
    assert found["precision"] == "int8" and found["sentence"].endswith("; served in int8; 2.9 times as fast as f32")
    assert "int8" not in verdict(both=10, neither=90)["sentence"]


def test_the_sentence_is_one_line_whatever_programs_say():
    given = evaluation(both=90)
    given["precision"]["reason"] = "served in f32; no bf16: Exception from core.cpp:1:\n\tnot\x07 supported"
    assert judge(given, CLEAN, THRESHOLDS, {})["sentence"].endswith("no bf16: Exception from core.cpp:1: not supported")


# --- The document ---


def test_it_lists_the_pictures_that_only_one_got_right():
    found = verdict(both=80, only_champion=12, only_challenger=3, neither=5)
    assert len(found["only_champion"]) == 12 and len(found["only_challenger"]) == 3
    picture = found["only_champion"][0]
    assert picture["origin"].startswith("s3://") and picture["champion"] == picture["class"] != picture["challenger"]
    page = document.page(found | {"run": "1", "dataset": "d", "champion": "0"})
    assert page.count(picture["origin"]) == 1 and "Only the champion got 12 right" in page
    assert "9.0% worse than the champion" in page and "class='verdict rejected'" in page and "<svg" in page


@pytest.mark.parametrize(
    "given",
    [
        {"both": 90, "new": {"<b>pug": (8, 10)}, "settled": (60, 0, 0, 0)},
        {"both": 0, "only_challenger": 50, "champion": False},
        None,
    ],
    ids=["with a champion", "the first model", "not evaluated"],
)
def test_every_verdict_makes_a_page(given):
    found = judge(evaluation(**given) if given else None, CLEAN if given else BLOCKING, THRESHOLDS, {})
    page = document.page(found | {"run": "1", "dataset": "d" * 64, "champion": "0" if given else None})
    assert ("champion&#x27;s own test" in page or "champion's own test" in page) == bool(found.get("settled"))
    for check in found["checks"]:
        assert check["name"] in page
    assert "<script" not in page and "<b>" not in page
    if given and "new" in given:
        assert "&lt;b&gt;pug (new)" in page
    json.dumps(found, allow_nan=False)


def test_the_counts_of_the_evaluation_are_those_of_its_answers():
    """The maker of these tests' evaluations counts for itself; the job must count alike."""
    given = evaluation(
        both=80, only_champion=12, only_challenger=3, neither=5, new={"pug": (8, 10)}, settled=(80, 5, 0, 0)
    )
    settled = {(answer["sha256"], answer["class"]) for answer in given["challenger"]["predictions"][:85]}
    settled |= {(answer["sha256"], "of another class") for answer in given["challenger"]["predictions"]}
    predictions = (given[model]["predictions"] for model in ("challenger", "champion"))
    counted = evaluate.pair(*predictions, {"beagle"}, settled)
    assert counted == given["common"]


# --- The function ---


@pytest.fixture
def stack(monkeypatch):
    values = {"ACCURACY_FLOOR": "0.5", "GATE_MARGIN": "0.02", "GATE_MAX_DROP": "0.2", "GATE_CONFIDENCE": "0.95",
              "GATE_MIN_TEST_PICTURES": "20", "NEW_CLASS_FLOOR": "0.3", "MAX_LATENCY_RATIO": "4"}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert app.thresholds() == THRESHOLDS


def ask(aws, context, given: dict[str, Any] | None, findings: dict[str, Any] = CLEAN) -> dict[str, Any]:
    if given:
        aws.s3.put_object(Bucket=aws.artifacts, Key="runs/1/evaluation/evaluation.json", Body=json.dumps(given))
    left_out = {"classes": {"pug": "pug has 4 of the 5 pictures a class needs: 1 missing"}}
    aws.s3.put_object(Bucket=aws.artifacts, Key=f"datasets/{'d' * 64}/left_out.json", Body=json.dumps(left_out))
    request = {
        "bucket": aws.artifacts, "run": "1", "dataset": "d" * 64, "champion": "0", "findings": findings,
        "evaluation": "runs/1/evaluation/evaluation.json" if given else None, "verdict": "runs/1/verdict.json",
    }  # fmt: skip
    return app.handler(request, context)


def test_the_verdict_is_written_where_people_find_it(aws, context, stack):
    given = evaluation(both=80, only_challenger=10, neither=10)
    answer = ask(aws, context, given)
    read = lambda name: aws.s3.get_object(Bucket=aws.artifacts, Key=f"runs/1/{name}")  # noqa: E731
    written = json.loads(read("verdict.json")["Body"].read())
    assert {name: written[name] for name in ("promote", "sentence", "accuracy", "precision", "champion_accuracy")} == {
        "promote": True, "sentence": answer["sentence"], "accuracy": 0.9, "precision": "int8", "champion_accuracy": 0.8,
    }  # fmt: skip
    assert json.loads(answer["preprocess"]) == given["challenger"]["preprocess"] == written["preprocess"]
    page = read("verdict.html")
    assert page["ContentType"].startswith("text/html") and b"promoted" in page["Body"].read()
    assert answer["document"] == f"s3://{aws.artifacts}/runs/1/verdict.html"


def test_what_is_left_out_is_that_of_the_snapshot(aws, context, stack):
    answer = ask(aws, context, evaluation(both=90, missing=("pug",)))
    assert not answer["promote"] and "take no part: pug has 4 of the 5 pictures" in answer["sentence"]


def test_a_training_that_was_not_evaluated_is_judged_by_its_findings(aws, context, stack):
    answer = ask(aws, context, None, BLOCKING)
    assert not answer["promote"] and answer["accuracy"] is None and "evaluation" not in answer
    assert answer["metadata"].keys() == {"verdict", "document"}
    assert b"ExplodingTensor" in aws.s3.get_object(Bucket=aws.artifacts, Key="runs/1/verdict.html")["Body"].read()


def test_the_answer_stays_small_with_a_thousand_classes(aws, context, stack):
    """The state of an execution holds 256 KB, and findings may take 100 of them."""
    new = {f"a class with a name that is as long as they get {number:013}": (2, 3) for number in range(1000)}
    answer = ask(aws, context, evaluation(both=900, new=new))
    assert len(json.dumps(answer)) < 4000
    written = json.loads(aws.s3.get_object(Bucket=aws.artifacts, Key="runs/1/verdict.json")["Body"].read())
    assert len(written["per_class"]) == 1001


def test_metadata_are_what_a_model_package_takes(aws, context, stack):
    """Against the service's own model, as the local SageMaker reads it."""
    from local.sagemaker import validation

    answer = ask(aws, context, evaluation(both=80, only_champion=2, only_challenger=10, neither=8))
    assert {"accuracy", "change", "changeAtWorst", "pWorse", "latencyRatio", "verdict", "evaluation", "modelCard",
            "championCompared", "precision"} <= answer["metadata"].keys()  # fmt: skip
    request = {"ModelPackageGroupName": "g", "ModelPackageDescription": answer["sentence"],
               "CustomerMetadataProperties": answer["metadata"]}  # fmt: skip
    validation.validate("CreateModelPackage", request)
    assert len(answer["metadata"]) < 30, "of 50, to which the workflow adds lineage"
