"""The warm start from the champion's model."""

import io
import json
import tarfile
from argparse import Namespace

import pytest
import torch
from torch import nn

import artifact
import champion as champions
import model as models
from champion import ChampionError
from tests.unit.training.jobs import run


def write_champion(folder, classes=("b", "old", "a"), weights="1234", unfreeze="none"):
    """An artifact as a training writes it; its state."""
    torch.manual_seed(5)
    state = models.build(len(classes)).state_dict()
    folder.mkdir()
    torch.save(state, folder / artifact.WEIGHTS)
    (folder / artifact.CLASSES).write_text(json.dumps(classes))
    card = {"model_version": "v1", "weights": weights, "hyperparameters": {"unfreeze": unfreeze}}
    (folder / artifact.CARD).write_text(json.dumps(card))
    return state


def pack(folder, archive):
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for path in folder.iterdir():
            tar.add(path, path.name)


@pytest.mark.parametrize("packed", [True, False])
def test_rows_are_copied_by_the_names_of_classes_and_new_ones_start_fresh(tmp_path, packed, capsys):
    state = write_champion(tmp_path / "model")
    if packed:
        pack(tmp_path / "model", tmp_path / "channel" / "model.tar.gz")
    champion = champions.load(tmp_path / ("channel" if packed else "model"))
    fc = nn.Linear(512, 3)
    fresh = fc.weight.detach().clone()
    champion.start_head(fc, ["a", "b", "new"])
    assert torch.equal(fc.weight[0], state["fc.weight"][2]) and torch.equal(fc.bias[0], state["fc.bias"][2])
    assert torch.equal(fc.weight[1], state["fc.weight"][0])
    assert torch.equal(fc.weight[2], fresh[2])
    assert "2 of 3 classes start from model v1" in capsys.readouterr().out


def test_the_backbone_comes_along_where_it_is_trained(tmp_path):
    state = write_champion(tmp_path / "model")
    model = models.build(5)
    fc = model.fc.weight.detach().clone()
    champions.load(tmp_path / "model").start_backbone(model)
    assert torch.equal(model.conv1.weight, state["conv1.weight"]) and torch.equal(model.fc.weight, fc)


def test_a_head_belongs_to_its_backbone(tmp_path):
    write_champion(tmp_path / "frozen")
    write_champion(tmp_path / "tuned", unfreeze="layer4")
    assert champions.load(tmp_path / "frozen").frozen_on("1234")
    assert not champions.load(tmp_path / "frozen").frozen_on("other weights")
    assert not champions.load(tmp_path / "tuned").frozen_on("1234")


def test_no_channel_is_no_champion_and_a_damaged_one_is_refused(tmp_path):
    assert champions.load(tmp_path / "nowhere") is None
    (tmp_path / "empty").mkdir()
    assert champions.load(tmp_path / "empty") is None
    write_champion(tmp_path / "model")
    for name, content in (("classes.json", b'["a"]'), ("weights.pt", b"nothing"), ("model_card.json", b"{}")):
        kept = (tmp_path / "model" / name).read_bytes()
        (tmp_path / "model" / name).write_bytes(content)
        with pytest.raises(ChampionError, match="give it the champion's model.tar.gz"):
            champions.load(tmp_path / "model")
        (tmp_path / "model" / name).write_bytes(kept)
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "model.tar.gz").write_bytes(io.BytesIO(b"\x1f\x8b nothing").getvalue())
    with pytest.raises(ChampionError):
        champions.load(tmp_path / "archive")


def test_a_champion_of_another_network_is_refused(tmp_path):
    write_champion(tmp_path / "model")
    state = torch.load(tmp_path / "model" / artifact.WEIGHTS, weights_only=True)
    torch.save({**state, "conv1.weight": torch.zeros(8, 3, 7, 7)}, tmp_path / "model" / artifact.WEIGHTS)
    with pytest.raises(ChampionError, match="the champion does not match .*; leave the channel out"):
        champions.load(tmp_path / "model").start_backbone(models.build(2))


@pytest.fixture(scope="module")
def frozen(tmp_path_factory, prepared):
    """A weights channel and the model that was trained on it for 8 epochs."""
    folder = tmp_path_factory.mktemp("frozen")
    torch.manual_seed(0)
    (folder / "weights").mkdir()
    torch.save(models._import_resnet18()().state_dict(), folder / "weights" / "resnet18.pth")
    run("train.py", "--training", prepared, "--weights", folder / "weights", "--image-size", 32, "--epochs", 8, "--lr",
        0.01, "--model-version", "v1", opt_ml=folder)  # fmt: skip
    return folder


def test_a_warm_start_begins_where_the_champion_was(frozen, prepared, tmp_path):
    arguments = ("--training", prepared, "--weights", frozen / "weights", "--image-size", 32, "--epochs", 1, "--lr",
                 1e-6, "--export", "false")  # fmt: skip
    run("train.py", *arguments, opt_ml=tmp_path / "cold")
    log = run("train.py", *arguments, "--champion", frozen / "model", opt_ml=tmp_path / "warm")
    assert "3 of 3 classes start from model v1" in log
    cards = {
        name: json.loads((path / "model" / "model_card.json").read_text())
        for name, path in (("champion", frozen), ("cold", tmp_path / "cold"), ("warm", tmp_path / "warm"))
    }
    losses = {name: card["metrics"]["validation_loss"] for name, card in cards.items()}
    assert losses["warm"] == pytest.approx(losses["champion"], rel=0.02)
    assert abs(losses["cold"] - losses["champion"]) > 0.05
    assert cards["warm"]["champion"] == "v1" and cards["cold"]["champion"] == ""
    assert {path.name for path in (tmp_path / "warm" / "model").iterdir()} == {"model_card.json"}


def test_a_champion_on_another_backbone_is_left_where_the_backbone_is_frozen(frozen, prepared, tmp_path, capsys):
    import train
    from arguments import parse_arguments
    from data import load

    card = json.loads((frozen / "model" / "model_card.json").read_text())
    other = tmp_path / "model"
    other.mkdir()
    for name in (artifact.WEIGHTS, artifact.CLASSES):
        (other / name).write_bytes((frozen / "model" / name).read_bytes())
    (other / artifact.CARD).write_text(json.dumps({**card, "weights": "another"}))
    options: Namespace = parse_arguments([
        "--training", str(prepared), "--weights", str(frozen / "weights"), "--champion", str(other), "--views", "1"
    ])  # fmt: skip
    begun = train.start(options, load(prepared), torch.device("cpu"))
    assert begun.champion == "" and "its head was trained on another backbone" in capsys.readouterr().out
