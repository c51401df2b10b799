"""Hyperparameters, weights and data that cannot be used are refused at once, with the reason."""

import pytest
import torch

import train
from arguments import TrainingError, parse_arguments
from data import AUGMENTATIONS, augment, batch_count, batches
from model import WeightsError, _import_resnet18, build, load_pretrained, set_trainable, train_mode


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
    with pytest.raises(TrainingError, match="must hold one .pth file, not 2"):
        train.find_weights(tmp_path)


def test_frozen_batchnorm_keeps_its_statistics():
    model = build(2)
    set_trainable(model, "layer4")
    train_mode(model)
    assert model.layer4[0].bn1.training and not model.layer1[0].bn1.training


@pytest.mark.parametrize("kind", sorted(AUGMENTATIONS))
def test_augmentation_is_decided_by_its_generator(kind):
    images = torch.randn(5, 3, 37, 37)
    first, again, other = (augment(images, 32, kind, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == (5, 3, 32, 32) and torch.equal(first, again)
    assert torch.equal(first, other) == (kind == "none")


@pytest.mark.parametrize(("pictures", "size"), [(1, 4), (8, 4), (9, 4), (10, 4), (3, 16)])
def test_no_batch_of_one_unless_there_is_but_one_picture(prepared, pictures, size):
    import data

    split = data.load(prepared).train
    sizes = [len(labels) for _, labels in batches(split, torch.arange(pictures), size, torch.device("cpu"))]
    assert sum(sizes) == pictures and len(sizes) == batch_count(pictures, size)
    assert min(sizes) > 1 or pictures == 1


def test_class_weights_count_every_class_alike():
    weights = train.class_weights(torch.tensor([0, 0, 0, 1]), 2)
    assert weights[1] == pytest.approx(3 * weights[0])
