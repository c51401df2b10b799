"""The gate: whether the challenger goes live, from figures alone. docs/gate.md has the reasons for its rules."""

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from judge_challenger import chance

NAMED = 5  # classes that a sentence names; the document has them all
LISTED = 200  # pictures of each kind that the document lists
STRIKING = 0.001  # probability of what is told as a doubt about labels
COMMON = "of the classes both know"
SETTLED = "that were in the champion's own test, too"


@dataclass(frozen=True)
class Thresholds:
    """What the challenger must reach; shares of pictures, 0 to 1, where nothing else is said."""

    accuracy_floor: float
    """Of all test pictures."""
    margin: float
    """How much worse than the champion it may be on the classes that both know."""
    max_drop: float
    """How much worse than that it might be after all: what the test must be able to exclude."""
    confidence: float
    """With which worse is worse, not chance; one-sided."""
    min_test_pictures: int
    """Of the classes that both know; of all, where there is no champion to compare with."""
    class_floor: float
    """Of the test pictures of a class: of each that the champion does not know, and of those that got worse."""
    max_latency_ratio: float
    """Times the champion's time for a picture."""


@dataclass(frozen=True)
class Check:
    """One rule: what was found, what was asked for, and what to tell people about it."""

    name: str
    passed: bool
    value: str
    limit: str
    says: str


def judge(
    evaluation: dict[str, Any] | None, findings: dict[str, Any], thresholds: Thresholds, left_out: dict[str, str]
) -> dict[str, Any]:
    """The verdict: `promote`, the `sentence` why, and the figures it rests on. Every reason against it is named.

    `evaluation`: what the evaluation job wrote; None where findings kept the model from being evaluated.
    `left_out`: why classes that are labelled take no part, by name.
    """
    checks = [_findings(findings)]
    if evaluation is None:
        return {
            "promote": False,
            "sentence": _sentence([checks[0].says]),
            "checks": [asdict(check) for check in checks],
            "thresholds": asdict(thresholds),
        }
    pairs = _pairs(evaluation)
    common = evaluation.get("common")
    comparison = compare(common, thresholds) if common and common["n"] else None
    settled = _settled(common, thresholds) if common else None
    classes = _classes(evaluation, thresholds)
    latency = _latency(evaluation, pairs, thresholds)
    checks += [_enough(evaluation, comparison, thresholds), _accuracy(evaluation, thresholds)]
    if comparison:
        checks.append(not_worse(comparison, thresholds))
        if checks[-1].passed and comparison["n"] >= thresholds.min_test_pictures:  # else it is said already
            checks.append(no_large_drop(comparison, thresholds))
        if settled:
            checks.append(not_worse(settled, thresholds, SETTLED))
        checks.append(_no_collapse(classes, thresholds))
        if latency["pictures"]:
            checks.append(_no_slower(latency, thresholds))
    if missing := evaluation["missing_classes"]:
        checks.append(_still_there(missing, left_out))
    if evaluation.get("champion") and evaluation["new_classes"]:
        checks.append(_learnt(evaluation["new_classes"], classes, thresholds))
    against = [check.says for check in checks if not check.passed]
    doubts = _doubts(comparison, settled)
    precision = evaluation["precision"]
    challenger = evaluation["challenger"]
    return {
        "promote": not against,
        "sentence": _sentence([*(against or [_why_promoted(evaluation, comparison), precision["reason"]]), *doubts]),
        "checks": [asdict(check) for check in checks],
        "accuracy": challenger["accuracy"],
        "precision": precision["chosen"],
        "champion_accuracy": (evaluation.get("champion") or {}).get("accuracy"),
        "change_on_common_classes": comparison["change"] if comparison else None,
        "comparison": comparison,
        "settled": settled,
        "doubts": doubts,
        "latency": latency,
        "per_class": classes,
        "new_classes": evaluation["new_classes"],
        "only_champion": _listed(pairs, "champion"),
        "only_challenger": _listed(pairs, "challenger"),
        "preprocess": challenger["preprocess"],
        "thresholds": asdict(thresholds),
    }


# --- What was found ---


def _pairs(evaluation: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The answers of champion and challenger to the same pictures, of the classes that both know."""
    champion, common = evaluation.get("champion"), set(evaluation["common_classes"])
    theirs = {answer["sha256"]: answer for answer in champion["predictions"]} if champion else {}
    ours = [answer for answer in evaluation["challenger"]["predictions"] if answer["class"] in common]
    return [(theirs[answer["sha256"]], answer) for answer in ours if answer["sha256"] in theirs]


def compare(common: dict[str, Any], thresholds: Thresholds) -> dict[str, Any]:
    """Champion and challenger on the classes that both know, by how many test pictures both, one or none got right."""
    n, lost, won = common["n"], common["only_champion"], common["only_challenger"]
    low, high = chance.tango(lost, won, n, thresholds.confidence)
    counts = {name: common[name] for name in ("n", "both", "only_champion", "only_challenger", "neither")}
    return counts | {
        "change": (won - lost) / n,
        "low": low,
        "high": high,
        "p_worse": chance.mcnemar(lost, won),
        "p_better": chance.mcnemar(won, lost),
        "visible_drop": chance.visible_drop(n, lost + won, thresholds.confidence, thresholds.margin),
    }


def _settled(common: dict[str, Any], thresholds: Thresholds) -> dict[str, Any] | None:
    """The same on those pictures alone that were test pictures, with these labels, when the champion was made.

    None where that is not known, and where they are all the pictures or none.
    """
    settled = common.get("settled")
    return compare(settled, thresholds) if settled and 0 < settled["n"] < common["n"] else None


def _doubts(comparison: dict[str, Any] | None, settled: dict[str, Any] | None) -> list[str]:
    """Labels that the champion contradicts much more often than the older ones. They may be right: the pictures of
    today may differ from those it learnt. So they are told, and block nothing by themselves.
    """
    if not comparison or not settled:
        return []
    old, n = settled["both"] + settled["only_champion"], comparison["n"] - settled["n"]
    right = comparison["both"] + comparison["only_champion"] - old
    if right / n >= old / settled["n"] / 2 or chance.fisher(right, n, old, settled["n"]) >= STRIKING:
        return []
    return [
        f"are the new labels right? The champion agrees with {right} of {n} new test pictures of classes it knows, and "
        f"with {old} of {settled['n']} older ones"
    ]


def _classes(evaluation: dict[str, Any], thresholds: Thresholds) -> dict[str, dict[str, Any]]:
    """By name: test pictures, those right, with bounds of the share, and those of a champion that knows the class."""
    common = (evaluation.get("common") or {}).get("per_class", {})
    found = {}
    for name, result in evaluation["challenger"]["per_class"].items():
        n, correct = result["n"], result["correct"]
        low, high = chance.wilson(correct, n, thresholds.confidence)
        found[name] = {"n": n, "correct": correct, "low": low, "high": high}
        if paired := common.get(name):
            champion = paired["both"] + paired["only_champion"]
            found[name] |= {"champion_correct": champion, "only_champion": paired["only_champion"],
                            "only_challenger": paired["only_challenger"],
                            "p_worse": chance.fisher(correct, n, champion, n)}  # fmt: skip
    return found


def _latency(evaluation: dict[str, Any], pairs: list, thresholds: Thresholds) -> dict[str, Any]:
    """Milliseconds for a picture (medians); over the pictures of both, how many times the champion's it is."""
    ratios = [ours["ms"] / theirs["ms"] for theirs, ours in pairs if ours.get("ms") and theirs.get("ms")]
    return {
        "challenger_ms_p50": evaluation["challenger"].get("latency_ms_p50"),
        "champion_ms_p50": (evaluation.get("champion") or {}).get("latency_ms_p50"),
        "pictures": len(ratios),
        "ratio": median(ratios) if ratios else None,
        "over_bound": sum(ratio > thresholds.max_latency_ratio for ratio in ratios),
    }


def _listed(pairs: list, right: str) -> list[dict[str, Any]]:
    """The pictures that only `right` got right: what they are, and what each model said."""
    wrong = 0 if right == "challenger" else 1
    found = [
        {"sha256": ours["sha256"], "origin": ours.get("origin"), "class": ours["class"],
         "champion": theirs["predicted"], "challenger": ours["predicted"]}
        for theirs, ours in pairs
        if (theirs["predicted"] == ours["class"]) != (ours["predicted"] == ours["class"])
        and (theirs, ours)[wrong]["predicted"] != ours["class"]
    ]  # fmt: skip
    return sorted(found, key=lambda picture: (picture["class"], picture["sha256"]))[:LISTED]


# --- The rules ---


def _findings(findings: dict[str, Any]) -> Check:
    rules = [rule["rule"] for rule in findings["rules"] if rule.get("blocking") and rule["status"] == "IssuesFound"]
    verdict = findings.get("verdict", {})
    early = f"; ended early: {verdict['reason']}" if verdict.get("status") == "EndedEarly" else ""
    blocking = bool(findings.get("blocking"))
    return Check(
        "no blocking finding",
        not blocking,
        ", ".join(rules) if blocking else "none",
        "none",
        f"blocking findings: {', '.join(rules)}{early}" if blocking else "the training had no blocking finding",
    )


def _enough(evaluation: dict[str, Any], comparison: dict[str, Any] | None, thresholds: Thresholds) -> Check:
    if comparison:
        n, which = comparison["n"], "of the classes that both models know"
    else:
        n, which = sum(result["n"] for result in evaluation["challenger"]["per_class"].values()), "in all"
    least = thresholds.min_test_pictures
    short = f"only {_count(n, 'test picture')} {which}, and {least} are needed to tell a good model: label more"
    return Check("test pictures", n >= least, f"{n}", f"at least {least}",
                 f"{_count(n, 'test picture')} {which}" if n >= least else short)  # fmt: skip


def _accuracy(evaluation: dict[str, Any], thresholds: Thresholds) -> Check:
    accuracy, floor = evaluation["challenger"]["accuracy"], thresholds.accuracy_floor
    passed = accuracy >= floor
    return Check("accuracy", passed, f"{accuracy:.1%}", f"at least {floor:.1%}",
                 f"accuracy {accuracy:.1%} is {'not ' if passed else ''}under the floor of {floor:.1%}")  # fmt: skip


def not_worse(comparison: dict[str, Any], thresholds: Thresholds, which: str = COMMON) -> Check:
    """Is a drop over the margin shown? `comparison`: of `compare`, over the test pictures `which`."""
    n, lost, won = comparison["n"], comparison["only_champion"], comparison["only_challenger"]
    change, p, margin = comparison["change"], comparison["p_worse"], thresholds.margin
    beyond = lost - won > margin * n + 1e-9  # 0.02 * 150 is a little more or less than 3
    by_chance = p >= 1 - thresholds.confidence
    pictures = f"the champion on the {n} test pictures {which}"
    figures = f"{lost} lost, {won} won, by chance in {_percent(p)} of cases"
    says = f"{change:+.1%} against {pictures}"
    if beyond and not by_chance:
        says = f"{-change:.1%} worse than {pictures} ({figures}); {margin:.1%} is allowed"
    elif beyond:
        says += f", which may be chance ({figures})"
    return Check(
        "not worse than the champion" if which == COMMON else "not worse on older pictures",
        by_chance or not beyond,
        f"{change:+.1%}, p = {p:.3g}",
        f"at least -{margin:.1%}, or p of {1 - thresholds.confidence:.3g} or more",
        f"{says}; drops show from {comparison['visible_drop']:.1%} on" if by_chance or not beyond else says,
    )


def no_large_drop(comparison: dict[str, Any], thresholds: Thresholds) -> Check:
    """Is a large drop excluded, where none is shown?"""
    low, max_drop = comparison["low"], thresholds.max_drop
    passed = low >= -max_drop
    says = f"it is {-low:.1%} worse than the champion at worst" if low < 0 else "it is better than the champion"
    if not passed:
        says = (
            f"it may be {-low:.1%} worse than the champion, and {max_drop:.1%} must be excluded: the "
            f"{comparison['n']} test pictures {COMMON} say no more than that, label more"
        )
    return Check("no large drop possible", passed, f"{low:+.1%} at worst", f"at least -{max_drop:.1%}", says)


def _no_collapse(classes: dict[str, dict[str, Any]], thresholds: Thresholds) -> Check:
    """Of many classes some lose by chance: the level is divided by their number (Bonferroni)."""
    common = {name: result for name, result in classes.items() if "champion_correct" in result}
    level = (1 - thresholds.confidence) / max(1, len(common))
    collapsed = [
        f"{name} ({result['champion_correct']} of {result['n']} test pictures before, {result['correct']} now)"
        for name, result in common.items()
        if _is_under(result, thresholds.class_floor) and result["p_worse"] < level
    ]
    return Check(
        "no known class lost",
        not collapsed,
        f"{len(collapsed)} of {len(common)}",
        f"none under {thresholds.class_floor:.0%} with p under {level:.2g}",
        f"known classes lost: {_some(collapsed)}" if collapsed else "no class that both know was lost",
    )


def _still_there(missing: list[str], left_out: dict[str, str]) -> Check:
    """Does the challenger lack a class that the champion knows? It may, if nobody labels that any more.

    A run is of a snapshot, so a missing class has no labels at all, or is in `left_out`, which says why.
    """
    lost = [left_out[name] for name in missing if name in left_out]
    return Check(
        "no known class left out",
        not lost,
        f"{len(lost)} of {len(missing)} that it does not know",
        "none that is still labelled",
        f"the champion knows classes that are labelled and take no part: {_some(lost)}"
        if lost
        else _forgotten(missing),
    )


def _forgotten(missing: list[str]) -> str:
    return f"{_some(missing)} forgotten, which nobody labels any more"


def _learnt(new: list[str], classes: dict[str, dict[str, Any]], thresholds: Thresholds) -> Check:
    empty = {"n": 0, "correct": 0}
    results = {name: classes.get(name, empty) for name in new}
    under = [
        f"{name}: {result['correct']} of {result['n']} test pictures recognised"
        for name, result in results.items()
        if _is_under(result, thresholds.class_floor)
    ]
    lowest = min(result["correct"] / result["n"] if result["n"] else 0.0 for result in results.values())
    which = "new class" if len(under) == 1 else "new classes"
    return Check(
        "new classes",
        not under,
        f"lowest {lowest:.1%}",
        f"at least {thresholds.class_floor:.1%} of each",
        f"{which} {_some(under)}, under the floor of {thresholds.class_floor:.0%}"
        if under
        else f"{_some(new)} learnt",
    )  # fmt: skip


def _is_under(result: dict[str, Any], floor: float) -> bool:
    """Whether fewer of a class's test pictures are right than the share `floor`; without any it has shown nothing."""
    return not result["n"] or result["correct"] < floor * result["n"] - 1e-9  # 0.1 * 30 is a little more than 3


def _no_slower(latency: dict[str, Any], thresholds: Thresholds) -> Check:
    """A sign test: is the ratio over the bound for more than half of the pictures, and not by chance?"""
    bound, over = thresholds.max_latency_ratio, latency["over_bound"]
    slower = chance.mcnemar(over, latency["pictures"] - over) < 1 - thresholds.confidence
    says = f"{latency['ratio']:.1f} times the champion's time for a picture ({latency['challenger_ms_p50']:.1f} ms)"
    return Check("latency", not slower, f"{latency['ratio']:.2f} times the champion's", f"at most {bound:g} times",
                 f"{says}; {bound:g} times is allowed" if slower else says)  # fmt: skip


# --- Words ---


def _sentence(reasons: list[str]) -> str:
    """One line without control characters, which the registry refuses: some of it is what programs said."""
    text = "; ".join(reasons)
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def _why_promoted(evaluation: dict[str, Any], comparison: dict[str, Any] | None) -> str:
    accuracy = f"accuracy {evaluation['challenger']['accuracy']:.1%}"
    forgotten = f", and {_forgotten(missing)}" if (missing := evaluation["missing_classes"]) else ""
    if not comparison:
        return f"{accuracy}, and no champion to compare with{forgotten}"
    learnt = f", and {_some(evaluation['new_classes'])} learnt" if evaluation["new_classes"] else ""
    return (
        f"{accuracy}, {comparison['change']:+.1%} against the champion on the {comparison['n']} test pictures of the "
        f"classes both know ({comparison['low']:+.1%} at worst){learnt}{forgotten}"
    )


def _some(items: list[str]) -> str:
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return ", ".join(items[:NAMED]) + more


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _percent(share: float) -> str:
    return "under 0.1%" if share < 0.001 else f"{share:.1%}"
