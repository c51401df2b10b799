"""The features of a frozen backbone: what they depend on, and which engine makes them."""

from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
import features
import model as models
from artifact import SPLITS
from data import Prepared, Split
from preprocessing import Preprocess

CPU = torch.device("cpu")
SPEC = Preprocess(32, 37)


def split(count: int, side: int, seed: int) -> Split:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return Split(images, torch.arange(count) % 2, [f"{rng.integers(2**60):064x}"[::-1] for _ in range(count)])


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return Prepared(split(5, 37, 1), split(35, 32, 2), split(0, 32, 3), ["a", "b"], SPEC)


@pytest.fixture
def options(tmp_path) -> Namespace:
    return Namespace(views=2, augmentation="light", seed=0, precision="float32", training=tmp_path)


def backbone():
    torch.manual_seed(0)
    model = models.build(2).eval()
    for module in model.modules():  # statistics that are not those of a new layer
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def test_both_engines_extract_what_the_network_computes(prepared, options):
    images = torch.from_numpy(prepared.validation.images)
    with torch.inference_mode():
        expected = models.features(backbone(), data.Normalise(SPEC, CPU)(images)).numpy()
    scale = np.abs(expected).max()
    found = {}
    for engine in ("torch", "openvino"):
        found[engine], copied = features.extract(backbone(), prepared, options, CPU, engine)
        assert copied == 0 and {name: array.shape for name, array in found[engine].items()} == {
            "train": (2, 5, 512), "validation": (35, 512), "test": (0, 512)
        }  # fmt: skip
        np.testing.assert_allclose(found[engine]["validation"], expected, atol=1e-3 * scale)
    np.testing.assert_allclose(found["torch"]["train"], found["openvino"]["train"], atol=1e-3 * scale)
    with torch.inference_mode():
        centre = models.features(backbone(), data.Normalise(SPEC, CPU)(images_of(prepared.train)[:, 2:34, 2:34]))
    np.testing.assert_allclose(found["torch"]["train"][0], centre.numpy(), atol=1e-3 * scale)
    assert np.abs(found["torch"]["train"][1] - found["torch"]["train"][0]).max() > 0.01 * scale


def images_of(split: Split) -> torch.Tensor:
    return torch.from_numpy(split.images)


def test_features_depend_on_the_picture_and_not_on_its_place(prepared, options):
    whole, _ = features.extract(backbone(), prepared, options, CPU, "torch")
    order = [3, 0, 4]
    some = Split(prepared.train.images[order], prepared.train.labels[order], [prepared.train.sha256[n] for n in order])
    part, _ = features.extract(backbone(), replace(prepared, train=some), options, CPU, "torch")
    assert np.array_equal(part["train"], whole["train"][:, order])


def test_features_of_other_settings_are_not_used(prepared, options, capsys):
    arrays, _ = features.extract(backbone(), prepared, options, CPU, "torch")
    wanted = features.settings(options, prepared, "abc")
    made_of = features.json.dumps({"settings": wanted, "engine": "", "source": ""})
    np.savez(options.training / features.FILE, **arrays, made_of=np.array(made_of))
    found = features.load(options.training, wanted, prepared)
    assert found is not None and np.array_equal(found["train"], arrays["train"])
    for change, named in (({"seed": 1}, "seed"), ({"views": 3}, "views"), ({"augmentation": "strong"}, "augmentation")):
        changed = features.settings(Namespace(**{**vars(options), **change}), prepared, "abc")
        assert features.load(options.training, changed, prepared) is None
        assert f"made with other {named}" in capsys.readouterr().out
    assert features.load(options.training, features.settings(options, prepared, "other weights"), prepared) is None
    with pytest.raises(data.DataError, match="prepare the dataset again"):
        features.load(options.training, wanted, replace(prepared, validation=prepared.test))


def test_features_are_copied_where_the_crops_are_still_the_same(prepared, options, tmp_path, monkeypatch):
    options.weights = tmp_path / "weights"
    for folder in (options.weights, tmp_path / "old", tmp_path / "new"):
        folder.mkdir()
    torch.save(models._import_resnet18()().state_dict(), options.weights / "resnet18.pth")
    splits = {name: {"sha256": getattr(prepared, name).sha256} for name in SPLITS}
    (tmp_path / "old" / "index.json").write_text(features.json.dumps({"splits": splits}))
    assert "45 by torch" in features.write(tmp_path / "old", options, prepared, None)
    assert features.write(tmp_path / "new", options, prepared, tmp_path / "old").endswith("45 of them copied")
    monkeypatch.setattr(features, "code_version", lambda: "another decoder")
    assert features.write(tmp_path / "new", options, prepared, tmp_path / "old").endswith(" 0 of them copied")


def test_openvino_is_for_enough_work_on_a_cpu(prepared, options, monkeypatch):
    assert features.choose_engine(prepared, options, CPU).startswith("torch ")
    monkeypatch.setattr(features, "WORTH_OPENVINO", 45 * 32 * 32)
    assert features.choose_engine(prepared, options, CPU).startswith("openvino ")
    monkeypatch.setattr(features, "find_spec", lambda name: None)  # the prepare job on AWS has none
    assert features.choose_engine(prepared, options, CPU).startswith("torch ")
