"""What the evaluation measures of each precision, and which it chooses."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import artifact
import evaluate
import preprocessing
from evaluate import GAIN, Answers, EvaluationError, choose, choose_precision, open_all
from predictor import PRECISIONS, BadArtifact, Predictor
from tests.makers.models import COLOURS, make_artifact
from tests.unit.training.jobs import PATTERNS


def figures(**models: tuple[int, float]) -> dict[str, dict[str, float]]:
    """By precision how many pictures are right, and the milliseconds of one."""
    return {name: {"correct": correct, "latency_ms_p50": ms} for name, (correct, ms) in models.items()}


@pytest.mark.parametrize(
    ("measured", "pictures", "chosen"),
    [
        (figures(f32=(900, 17.0), bf16=(900, 9.0), int8=(900, 5.0)), 1000, "int8"),
        (figures(f32=(900, 17.0), bf16=(900, 9.0), int8=(895, 5.0)), 1000, "int8"),
        (figures(f32=(900, 17.0), bf16=(895, 9.0), int8=(894, 5.0)), 1000, "bf16"),
        (figures(f32=(900, 17.0), bf16=(894, 9.0), int8=(894, 5.0)), 1000, "f32"),
        (figures(f32=(900, 17.0), bf16=(880, 9.0), int8=(910, 5.0)), 1000, "int8"),
        (figures(f32=(900, 17.0), int8=(900, 5.0)), 1000, "int8"),
        (figures(f32=(900, 17.0), bf16=(900, 9.0)), 1000, "bf16"),
        (figures(f32=(900, 17.0)), 1000, "f32"),
        (figures(f32=(900, 17.0), bf16=(900, 30.0), int8=(900, 16.9)), 1000, "f32"),
        (figures(f32=(900, 17.0), bf16=(900, 9.0), int8=(900, 8.9)), 1000, "bf16"),
        (figures(f32=(38, 17.0), int8=(37, 5.0)), 40, "f32"),
        (figures(f32=(38, 17.0), int8=(38, 5.0)), 40, "int8"),
        (figures(f32=(190, 17.0), int8=(189, 5.0)), 200, "int8"),
        (figures(f32=(190, 17.0), int8=(189, 5.0)), 199, "f32"),
    ],
)
def test_the_fastest_that_loses_too_little_to_matter_is_chosen(measured, pictures, chosen):
    correct = measured["f32"]["correct"]
    assert choose(measured, correct, pictures, 0.005) == chosen


measurements = st.integers(1, 2000).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.integers(0, n),
        st.fixed_dictionaries(
            {"f32": st.tuples(st.integers(0, n), st.floats(0.01, 100))},
            optional={name: st.tuples(st.integers(0, n), st.floats(0.01, 100)) for name in PRECISIONS[1:]},
        ),
        st.floats(0, 1),
    )
)


@given(measurements)
def test_what_is_chosen_is_measured_loses_little_and_is_faster_than_what_is_more_exact(measurement):
    pictures, correct, models, max_drop = measurement
    measured = figures(**{name: models[name] for name in PRECISIONS if name in models})
    chosen = choose(measured, correct, pictures, max_drop)
    own = measured[chosen]
    fit = [n for n in measured if n == "f32" or correct - measured[n]["correct"] <= max_drop * pictures + 1e-9]
    assert chosen in fit
    fastest = min(measured[name]["latency_ms_p50"] for name in fit)
    assert own["latency_ms_p50"] <= fastest / (1 - GAIN) ** 2 + 1e-9, "two steps that were each too small to take"
    if chosen != "f32":
        assert own["latency_ms_p50"] < measured["f32"]["latency_ms_p50"]


# Figures -------------------------------------------------------------------------------------------------------------

ROWS = [{"sha256": str(n), "class": COLOURS[n % 3], "split": "test"} for n in range(40)]


def answers(precision: str, wrong: int = 0, ms: float = 1.0, shift: float = 0.0) -> Answers:
    """Right about all of ROWS but the first `wrong`; every probability is `shift` away from 0.9, 0.05 or 0.05."""
    rows = np.full((len(ROWS), 3), 0.05, np.float32)
    for n in range(len(ROWS)):
        rows[n, (n + (n < wrong)) % 3] = 0.9
    model = SimpleNamespace(classes=list(COLOURS), precision=precision)
    took = np.full(len(ROWS), ms)
    return Answers(model, rows + np.float32(shift), took, took + 1)  # type: ignore[arg-type]


def write_reference(folder, rows=ROWS):
    names = np.array([row["sha256"] for row in rows])
    np.savez(folder / artifact.REFERENCE, sha256=names, probabilities=answers("f32").probabilities[: len(rows)])


def test_each_precision_is_measured_against_what_torch_answered(tmp_path):
    write_reference(tmp_path)
    found = [answers("f32", shift=1e-6), answers("bf16", wrong=0, ms=0.5, shift=0.01), answers("int8", wrong=2, ms=0.3)]
    choice = choose_precision(found, ROWS, tmp_path, {}, "auto", 0.005)
    assert (choice["chosen"], choice["reference"], choice["correct"], choice["pictures"]) == ("bf16", "torch", 40, 40)
    bf16, int8 = choice["measured"]["bf16"], choice["measured"]["int8"]
    assert bf16["accuracy"] == bf16["agreement"] == 1 and bf16["max_difference"] == pytest.approx(0.01, rel=1e-3)
    assert int8["accuracy"] == int8["agreement"] == 0.95 and int8["correct"] == 38
    assert int8["max_difference"] == pytest.approx(0.85) and int8["mean_difference"] == pytest.approx(1.7 / 3 * 2 / 40)
    assert choice["reason"] == (
        "served in bf16; 2.0 times as fast as f32, as many of 40 test pictures right; "
        "int8 gets 2 fewer right, 0 are allowed"
    )
    assert choose_precision(found, ROWS, tmp_path, {}, "auto", 0.05)["chosen"] == "int8"


def test_the_reference_knows_pictures_by_their_hash(tmp_path):
    """Those that could not be read when the model was trained are in no reference, and count for nothing here."""
    write_reference(tmp_path, ROWS[:10])
    shuffled = ROWS[20:] + ROWS[:20]
    found = answers("f32")
    moved = Answers(found.predictor, np.roll(found.probabilities, 20, axis=0), found.prediction_ms, found.total_ms)
    assert choose_precision([moved], shuffled, tmp_path, {}, "auto", 0.005)["pictures"] == 10


@pytest.mark.parametrize("rows", [None, []])
def test_an_artifact_without_reference_is_compared_with_its_own_float32(tmp_path, rows):
    if rows is not None:
        write_reference(tmp_path, rows)
    choice = choose_precision(
        [answers("f32", wrong=5), answers("int8", wrong=5, ms=0.3)], ROWS, tmp_path, {}, "auto", 0
    )
    assert (choice["reference"], choice["correct"], choice["chosen"]) == ("f32", 35, "int8")


def test_a_float32_that_is_not_what_was_trained_ends_the_evaluation(tmp_path):
    write_reference(tmp_path)
    with pytest.raises(EvaluationError, match="differs from the one that was trained by 0.002 in a probability"):
        choose_precision([answers("f32", shift=0.002)], ROWS, tmp_path, {}, "auto", 0.005)
    with pytest.raises(EvaluationError, match="differs"):
        choose_precision([answers("f32", shift=float("nan"))], ROWS, tmp_path, {}, "auto", 0.005)


def test_a_precision_that_was_asked_for_is_taken_whatever_it_loses_or_refused(tmp_path):
    found = [answers("f32"), answers("int8", wrong=20, ms=3.0)]
    missing = {"bf16": "this processor does not compute in bf16"}
    choice = choose_precision(found, ROWS, tmp_path, missing, "int8", 0.005)
    assert choice["chosen"] == "int8"
    assert choice["reason"] == (
        "served in int8, as it was asked to be; 0.3 times as fast as f32, 20 fewer of 40 test pictures right"
    )
    with pytest.raises(EvaluationError, match="cannot be served in bf16, as it was asked to be: this processor"):
        choose_precision(found, ROWS, tmp_path, missing, "bf16", 0.005)


def test_what_is_missing_or_damaged_is_said_and_costs_nothing_else(tmp_path, monkeypatch):
    make_artifact(tmp_path)
    monkeypatch.setattr(evaluate, "obstacle", lambda folder, precision: {"bf16": "no bf16 here"}.get(precision, ""))
    (tmp_path / "int8").mkdir()
    for name in ("model.xml", "model.bin"):
        (tmp_path / "int8" / name).write_bytes(b"<net")
    predictors, unavailable = open_all(tmp_path)
    assert [predictor.precision for predictor in predictors] == ["f32"]
    assert unavailable.keys() == {"bf16", "int8"} and "int8/model.xml with model.bin cannot" in unavailable["int8"]
    (tmp_path / "model.bin").unlink()
    with pytest.raises(BadArtifact):
        open_all(tmp_path)


def test_pictures_are_answered_alike_in_any_order_and_the_unreadable_not_at_all(tmp_path, snapshot):
    predictor = Predictor(make_artifact(tmp_path, classes=PATTERNS))
    names = sorted(path.name for path in (snapshot / "images").iterdir())  # one of them is broken
    rows = [{"sha256": name, "class": "dots"} for name in names]
    one, two = evaluate.answer([predictor, predictor], rows, snapshot / "images")
    assert np.array_equal(one.probabilities, two.probabilities, equal_nan=True)
    (unreadable,) = np.flatnonzero(~one.readable())
    assert one.labels()[unreadable] == -1
    for at in (0, 17, len(names) - 1):
        if at != unreadable:
            pixels = preprocessing.crop((snapshot / "images" / names[at]).read_bytes(), predictor.preprocess)
            expected = predictor.predict(np.frombuffer(pixels, np.uint8).reshape(1, 32, 32, 3))[0]
            assert np.array_equal(one.probabilities[at], expected)
    assert (one.total_ms[one.readable()] >= one.prediction_ms[one.readable()]).all()


# Exporting -----------------------------------------------------------------------------------------------------------


def test_int8_is_calibrated_on_training_pictures_as_the_server_cuts_them(snapshot, prepared):
    import data
    from export import CALIBRATION, calibration

    index = json.loads((prepared / "index.json").read_text())["splits"]["train"]["sha256"]
    found = data.load(prepared)
    served = {
        preprocessing.crop((snapshot / "images" / name).read_bytes(), found.preprocess): name for name in index
    }  # fmt: skip
    crops = calibration(found, 0)
    assert len(crops) == min(len(index), CALIBRATION) and crops.dtype == np.uint8
    assert {served[crop.tobytes()] for crop in crops} == set(index)
    assert np.array_equal(crops, calibration(found, 0)) and not np.array_equal(crops, calibration(found, 1))


def test_a_training_without_nncf_goes_on_without_int8(prepared, tmp_path, monkeypatch, capsys):
    import data
    import model
    import train
    from arguments import parse_arguments

    monkeypatch.setitem(sys.modules, "nncf", None)
    options = parse_arguments(["--model-dir", str(tmp_path / "model"), "--unfreeze", "all"])
    begin = train.Start(model.build(3).eval(), None, None, "", "")  # type: ignore[arg-type]
    train.write_artifact(options, data.load(prepared), begin, {}, {}, {}, True)
    assert "int8: not exported (ModuleNotFoundError: " in capsys.readouterr().out
    assert not (tmp_path / "model" / "int8").exists()
    card = json.loads((tmp_path / "model" / "model_card.json").read_text())
    assert "int8" not in card["export"] and card["export"]["max_difference"] <= card["export"]["tolerance"]
    predictors, unavailable = open_all(tmp_path / "model")
    assert "exported without int8" in unavailable["int8"] and predictors[0].precision == "f32"
