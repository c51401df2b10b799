"""Hyperparameters, weights and data that cannot be used are refused at once, with the reason."""

import pytest
import torch

import steps
from arguments import TrainingError, parse_arguments
from data import AUGMENTATIONS, CHANCES, augment, chunks
from model import WeightsError, _import_resnet18, build, find_weights, load_pretrained, set_trainable, train_mode


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--lr", "7"], "from 1e-06 to 1, not 7"),
        (["--lr", "fast"], "'fast' is not a number"),
        (["--lr", "nan"], "not nan"),
        (["--epochs", "2.5"], "a whole number from 1 to 1000, not 2.5"),
        (["--batch-size", '"1"'], "from 2 to 4096, not 1"),
        (["--unfreeze", "some"], "must be none, layer4 or all, not 'some'"),
        (["--learning-rate", "0.1"], "unknown: --learning-rate; known are"),
        (["--profile", "yes"], "must be true or false"),
    ],
)
def test_a_bad_hyperparameter_is_refused_with_the_reason(arguments, reason):
    with pytest.raises(TrainingError) as caught:
        parse_arguments(arguments)
    assert reason in str(caught.value)


def test_values_may_come_in_double_quotes_and_sagemakers_own_are_left_alone():
    options = parse_arguments(["--lr", '"0.001"', "--epochs", '"10.0"', "--unfreeze", '"layer4"', "--run-uri", '"s3://b/r"',
                               "--_tuning_objective_metric", "x", "--sagemaker_region", "eu-west-1"])  # fmt: skip
    assert (options.lr, options.epochs, options.unfreeze, options.run_uri) == (0.001, 10, "layer4", "s3://b/r")


def test_more_than_one_instance_is_refused(monkeypatch):
    monkeypatch.setenv("SM_HOSTS", '["algo-1", "algo-2"]')
    with pytest.raises(TrainingError, match="InstanceCount to 1"):
        parse_arguments([])


def test_paths_follow_the_containers_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SM_MODEL_DIR", str(tmp_path / "model"))
    monkeypatch.delenv("SM_CHANNEL_TRAINING", raising=False)
    options = parse_arguments([])
    assert options.training == tmp_path / "input/data/training"
    assert options.checkpoint_dir == tmp_path / "checkpoints"


def test_weights_of_another_network_are_refused_by_name_and_shape(tmp_path):
    state = _import_resnet18()().state_dict()
    torch.save({**state, "conv1.weight": torch.zeros(8, 3, 7, 7)}, tmp_path / "a.pth")
    torch.save({name: value for name, value in state.items() if not name.startswith("layer3")}, tmp_path / "b.pth")
    torch.save([1, 2], tmp_path / "c.pth")
    (tmp_path / "d.pth").write_bytes(b"nothing")
    for name, reason in (("a", "conv1.weight \\(8, 3, 7, 7\\)"), ("b", "missing \\(layer3"), ("c", "holds a list"),
                         ("d", "not a state dict that torch can load")):  # fmt: skip
        with pytest.raises(WeightsError, match=reason):
            load_pretrained(build(2), tmp_path / f"{name}.pth")


def test_more_than_one_weights_file_is_refused(tmp_path):
    (tmp_path / "a.pth").touch()
    (tmp_path / "b.pth").touch()
    with pytest.raises(WeightsError, match="must hold one .pth file, not 2"):
        find_weights(tmp_path)


def test_frozen_batchnorm_keeps_its_statistics():
    model = build(2)
    set_trainable(model, "layer4")
    train_mode(model)
    assert model.layer4[0].bn1.training and not model.layer1[0].bn1.training


@pytest.mark.parametrize("kind", sorted(AUGMENTATIONS))
def test_augmentation_is_decided_by_its_chances(kind):
    images = torch.randint(0, 256, (5, 37, 37, 3), dtype=torch.uint8)
    chances, others = (torch.rand(CHANCES, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    first, light = augment(images, 32, kind, chances)
    again, _ = augment(images, 32, kind, chances)
    other, _ = augment(images, 32, kind, others)
    alone, _ = augment(images[2:3], 32, kind, chances[:, 2:3])
    assert first.shape == (5, 32, 32, 3) and first.dtype == torch.uint8 and torch.equal(first, again)
    assert torch.equal(first, other) == (kind == "none") == (light is None)
    assert torch.equal(alone[0], first[2]), "a picture's augmentation must not depend on its neighbours"


def test_augmentation_crops_mirrors_and_changes_the_light():
    ramp = torch.arange(64).mul(4).to(torch.uint8)[None, None, :, None].expand(1, 64, 64, 3).contiguous()
    whole = torch.tensor([[1.0], [0.5], [0.0], [0.0], [1.0], [0.5], [0.5]])  # all of the area, not mirrored, same light
    same, light = augment(ramp, 64, "strong", whole)
    assert torch.equal(same, ramp) and torch.equal(light, torch.tensor([[1.0], [0.0]]))
    whole[4] = 0
    assert torch.equal(augment(ramp, 64, "strong", whole)[0], ramp.flip(2))
    least = torch.tensor([[0.0], [0.5], [1.0], [0.0], [1.0], [1.0], [0.0]])  # a quarter of the area, at the right
    part, light = augment(ramp, 32, "strong", least)
    assert torch.equal(part, ramp[:, :32, 32:]) and light.flatten().tolist() == pytest.approx([1.4, -0.4])


def test_light_is_changed_in_normalised_pictures():
    from data import Normalise
    from preprocessing import Preprocess

    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    spec = Preprocess(8, 9)
    normalise = Normalise(spec, torch.device("cpu"))
    plain = ((images / 255 - torch.tensor(spec.mean)) / torch.tensor(spec.std)).permute(0, 3, 1, 2)
    torch.testing.assert_close(normalise(images), plain)
    light = torch.tensor([[1.4, 0.8], [-0.3, 0.1]])
    expected = torch.stack([plain[0] * 1.4 - 0.3, plain[1] * 0.8 + 0.1])
    torch.testing.assert_close(normalise(images, light), expected)


@pytest.mark.parametrize(
    ("pictures", "size", "sizes"),
    [(8, 4, [4, 4]), (9, 4, [3, 3, 3]), (10, 4, [4, 3, 3]), (100, 16, [15, 15, 14, 14, 14, 14, 14]), (3, 16, [3]),
     (5, 2, [3, 2]), (3, 2, [3]), (1, 4, [1])],
)  # fmt: skip
def test_batches_are_of_one_size_or_nearly_and_none_is_of_one_picture(pictures, size, sizes):
    batches = chunks(torch.arange(pictures), size)
    assert [len(batch) for batch in batches] == sizes
    assert torch.equal(torch.cat(batches), torch.arange(pictures))


def test_batches_are_read_ahead_in_order_and_no_further():
    from data import prefetch

    begun = []

    def read(number):
        begun.append(number)
        if number == 6:
            raise ValueError("unreadable")
        return number

    batches = prefetch(read, range(2, 9), workers=2)
    assert next(batches) == 2 and max(begun) <= 2 + 4
    batches.close()  # an epoch that SIGTERM ends
    assert max(begun) < 8
    with pytest.raises(ValueError, match="unreadable"):
        list(prefetch(read, range(5, 9), workers=1))


def test_class_weights_count_every_class_alike():
    weights = steps.class_weights(torch.tensor([0, 0, 0, 1]), 2)
    assert weights[1] == pytest.approx(3 * weights[0])
