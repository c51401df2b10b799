"""The predictor answers from a whole artifact, and refuses any other with the reason, before the first request."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from predictor import FILES, BadArtifact, Predictor, obstacle
from preprocessing import Preprocess
from tests.makers.models import make_artifact


def colour(channel: int, size: int = 32) -> np.ndarray:
    image = np.zeros((size, size, 3), np.uint8)
    image[..., channel] = 255
    return image


def test_it_answers_each_picture_with_probabilities(tmp_path):
    predictor = Predictor(make_artifact(tmp_path))
    assert predictor.classes == ["red", "green", "blue"]
    assert predictor.preprocess == Preprocess.default(32)
    assert predictor.model_version == "260101000000"
    probabilities = predictor.predict(np.stack([colour(2), colour(0), colour(1), colour(0)]))
    assert probabilities.shape == (4, 3) and probabilities.dtype == np.float32
    assert np.allclose(probabilities.sum(axis=1), 1)
    assert probabilities.argmax(axis=1).tolist() == [2, 0, 1, 0]


def test_a_picture_gets_the_same_answer_alone_and_in_a_batch(tmp_path):
    predictor = Predictor(make_artifact(tmp_path))
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    together = predictor.predict(images)
    assert all(
        np.array_equal(predictor.predict(image[None])[0], row) for image, row in zip(images, together, strict=True)
    )
    assert np.array_equal(predictor.predict(images[::2]), together[::2]), "a view with gaps is taken too"


def test_top_lists_the_likeliest_first_and_equals_in_the_order_of_the_classes(tmp_path):
    predictor = Predictor(make_artifact(tmp_path, classes=[f"c{index}" for index in range(8)]))
    row = np.array([[0.1, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]], np.float32)
    best = predictor.top(row)[0]
    assert [entry["class"] for entry in best] == ["c1", "c0", "c2", "c3", "c4"]
    assert best[0]["probability"] == 0.3
    assert len(predictor.top(row, k=20)[0]) == 8


@pytest.mark.parametrize(
    "shape, dtype", [((1, 16, 16, 3), np.uint8), ((32, 32, 3), np.uint8), ((1, 32, 32, 3), np.float32)]
)
def test_pictures_of_another_shape_are_refused(tmp_path, shape, dtype):
    with pytest.raises(ValueError, match=r"the model takes uint8 \[N, 32, 32, 3\]"):
        Predictor(make_artifact(tmp_path)).predict(np.zeros(shape, dtype))


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="precision is 'f8'; it must be f32, bf16 or int8"):
        Predictor(make_artifact(tmp_path), precision="f8")


def quantised(folder: Path, **model: object) -> Path:
    """An artifact whose int8 model is another one, so that it shows which of the two answers."""
    make_artifact(folder)
    other = make_artifact(folder / "other", **model)  # type: ignore[arg-type]
    (folder / "int8").mkdir()
    for name in ("model.xml", "model.bin"):
        (other / name).rename(folder / "int8" / name)
    return folder


def test_int8_is_a_model_of_its_own(tmp_path):
    quantised(tmp_path)
    path = tmp_path / "int8" / "model.bin"
    path.write_bytes(path.read_bytes().replace(np.float32(10).tobytes(), np.float32(5).tobytes()))
    red = colour(0)[None]
    exact, int8 = (Predictor(tmp_path, precision).predict(red)[0, 0] for precision in ("f32", "int8"))
    assert exact > int8 > 0.5


def test_bf16_computes_what_float32_does_less_exactly_or_the_same(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    make_artifact(tmp_path)
    assert np.allclose(Predictor(tmp_path, "bf16").predict(images), Predictor(tmp_path).predict(images), atol=0.02)


def test_an_artifact_without_int8_cannot_be_served_in_it(tmp_path):
    quantised(tmp_path)
    assert obstacle(tmp_path, "int8") == ""
    (tmp_path / "int8" / "model.bin").unlink()
    assert "exported without int8" in obstacle(tmp_path, "int8")
    with pytest.raises(
        BadArtifact, match="no int8/model.xml with model.bin: it was exported without int8; serve it in"
    ):
        Predictor(tmp_path, "int8")
    assert Predictor(tmp_path).precision == "f32"


@pytest.mark.parametrize(("capabilities", "reason"), [(["FP32", "BF16"], ""), (["FP32", "INT8"], "no.* bf16")])
def test_a_processor_says_whether_it_has_bf16(tmp_path, monkeypatch, capabilities, reason):
    monkeypatch.setattr(ov.Core, "get_property", lambda *_: capabilities)
    assert re.search(reason, obstacle(tmp_path, "bf16")) and bool(obstacle(tmp_path, "bf16")) == bool(reason)
    assert obstacle(tmp_path, "f32") == ""


def test_an_int8_model_of_other_classes_or_another_size_is_refused(tmp_path):
    with pytest.raises(BadArtifact, match="int8/model.xml answers .*classes.json has 3 classes"):
        Predictor(quantised(tmp_path / "classes", classes=["red", "green"]), "int8")
    with pytest.raises(BadArtifact, match="int8/model.xml takes .*preprocess.json makes"):
        Predictor(quantised(tmp_path / "size", size=48), "int8")


def in_a_process(code: str, *arguments: str) -> str:
    """What the code prints in a process of its own, which must end well."""
    environment = os.environ | {"PYTHONPATH": str(Path(inspect.getfile(Predictor)).parent)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done
    return done.stdout


def test_a_signal_is_survived_after_predictors_that_went_in_the_order_they_came(tmp_path):
    code = (
        "import signal, sys; from predictor import Predictor\n"
        "first, second = (Predictor(sys.argv[1], precision) for precision in ('f32', 'bf16'))\n"
        "del first; del second\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('survived'))\n"
        "signal.raise_signal(signal.SIGTERM)"
    )
    assert in_a_process(code, str(make_artifact(tmp_path))) == "survived\n"


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="what a process holds of a file is read from Linux")
def test_a_worker_holds_the_weights_once(tmp_path):
    """As the processor takes them. What was read of the file goes back, and the answers are still the model's."""
    make_artifact(tmp_path)
    weights = np.random.default_rng(0).normal(0, 0.05, (256, 256, 3, 3)).astype(np.float32)
    images = ops.parameter([-1, 32, 32, 3], np.uint8, name="images")
    found = ops.transpose(ops.divide(ops.convert(images, "f32"), np.float32(255)), np.array([0, 3, 1, 2]))
    for kernel in (weights[:, :3], weights):
        found = ops.relu(ops.convolution(found, ops.constant(kernel.copy()), [1, 1], [1, 1], [1, 1], [1, 1]))
    last = ops.constant(weights[:, :3, 0, 0].copy())
    scores = ops.matmul(ops.reduce_mean(found, np.array([2, 3])), last, False, False)
    model = ov.Model([ops.softmax(scores, 1)], [images], "convolutions")
    ov.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    code = (
        "import re, sys, numpy as np; from predictor import Predictor, core; from pathlib import Path\n"
        "predictor = Predictor(sys.argv[1])\n"
        "image = np.random.default_rng(1).integers(0, 256, (1, 32, 32, 3), np.uint8)\n"
        "answer = predictor.predict(image)\n"
        "held = re.findall(r'model[.]bin\\n(?:.*\\n)*?Rss: +([0-9]+) kB', Path('/proc/self/smaps').read_text())\n"
        "model = core().compile_model(sys.argv[1] + '/model.xml', 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})\n"
        "np.testing.assert_allclose(answer, model(image)[0], atol=1e-6)\n"
        "assert answer.max() < 0.99, answer\n"
        "print(len(held), sum(map(int, held)))"
    )
    mapped, held = map(int, in_a_process(code, str(tmp_path)).split())
    size = (tmp_path / "model.bin").stat().st_size
    assert mapped and held * 1024 < size / 4, (mapped, held, size)


def test_nothing_reports_over_the_network():
    assert in_a_process("import predictor, sys; print(sys.modules['openvino_telemetry'])") == "None\n"


@pytest.mark.parametrize("name", FILES)
def test_an_incomplete_artifact_is_refused(tmp_path, name):
    make_artifact(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(BadArtifact, match=f"lacks {name}"):
        Predictor(tmp_path)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def not_a_number(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(np.float32(10).tobytes(), np.float32("nan").tobytes()))


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda f: (f / "classes.json").write_text('["red", "green"]'), r"classes.json has 2 classes, so f32 \[N,2\]"),
        (lambda f: (f / "classes.json").write_text('["red", "green", "red"]'), "names 'red' more than once"),
        (lambda f: (f / "classes.json").write_text("[]"), "must be a list of names"),
        (lambda f: (f / "classes.json").write_text('{"red": 0}'), "holds a dict; expected a list"),
        (lambda f: (f / "classes.json").write_text('["red",'), "classes.json is not JSON"),
        (lambda f: edit(f / "preprocess.json", size=48, resize=55), r"preprocess.json makes u8 \[N,48,48,3\]"),
        (lambda f: edit(f / "preprocess.json", resize=8), "size 32 must be positive and at most resize 8"),
        (lambda f: edit(f / "preprocess.json", mean=None), "preprocess.json"),
        (lambda f: edit(f / "model_card.json", model_version=""), "must name the model_version"),
        (lambda f: (f / "model.xml").write_text("<net"), "model.xml with model.bin cannot be read"),
        (lambda f: (f / "model.bin").write_bytes((f / "model.bin").read_bytes()[:-8]), "cannot be read"),
        (lambda f: not_a_number(f / "model.bin"), "the model answers no probabilities"),
    ],
)
def test_an_artifact_whose_parts_do_not_belong_together_is_refused(tmp_path, damage, reason):
    damage(make_artifact(tmp_path))
    with pytest.raises(BadArtifact, match=reason):
        Predictor(tmp_path)
