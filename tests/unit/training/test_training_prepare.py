"""What the prepare job reuses, survives and refuses."""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch

from model import _import_resnet18
from prepare import PrepareError, decode, main, prepare
from tests.unit.training.jobs import draw, write_snapshot


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights channel: a state dict as torchvision publishes it, of random numbers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    torch.save(_import_resnet18()().state_dict(), folder / "resnet18.pth")
    return folder


def run(snapshot, output, *arguments):
    """The job in this process; its exit code."""
    return main(["--image-size", "32", "--dataset", str(snapshot / "dataset"), "--images", str(snapshot / "images"),
                 "--output", str(output), "--workers", "2", *map(str, arguments)])  # fmt: skip


def change_manifest(snapshot, change):
    path = snapshot / "dataset" / "manifest.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(row) for row in change(rows)))


def assert_same_files(folder, other):
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    for name in names:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def test_a_changed_dataset_is_prepared_from_the_previous_one_to_the_same_bytes(tmp_path, weights, monkeypatch, capsys):
    snapshot = write_snapshot(tmp_path / "s", per_class=8, broken=1)
    assert run(snapshot, tmp_path / "previous", "--weights", weights) == 0
    for path in (tmp_path / "previous").iterdir():
        path.chmod(0o444)  # a channel is not for writing
    # one picture goes, one comes, one learns better, and the order is another
    (snapshot / "images" / "f00d").write_bytes(draw("plain", np.random.default_rng(1)))

    def change(rows):
        readable = [row for row in rows if "24.png" not in row["origin"]][:-1]
        added = {"sha256": "f00d", "class": "plain", "split": "train", "origin": "s3://pictures/new.png"}
        readable[3] = {**readable[3], "class": "plain"}
        return [*reversed(readable), added]

    change_manifest(snapshot, change)
    assert run(snapshot, tmp_path / "full", "--weights", weights) == 0

    decoded = []

    def watched(work, items, workers):
        decoded.extend(sha256 for _, sha256 in items)
        return decode(work, items, workers)

    monkeypatch.setattr("prepare.decode", watched)
    capsys.readouterr()
    assert run(snapshot, tmp_path / "reused", "--weights", weights, "--previous", tmp_path / "previous") == 0
    assert decoded == ["f00d"], "only what is new is decoded"
    out = capsys.readouterr().out
    # the new picture alone went through the backbone, in two views
    passes = sum(array.size // 512 for name, array in np.load(tmp_path / "full" / "features.npz").items() if array.ndim)
    assert f"features: {passes} by torch" in out and f"{passes - 2} of them copied" in out
    assert_same_files(tmp_path / "full", tmp_path / "reused")


@pytest.mark.parametrize("spoil", ["size", "code", "damaged", "empty"])
def test_a_previous_output_that_does_not_fit_is_not_used(tmp_path, spoil, capsys):
    snapshot = write_snapshot(tmp_path / "s", per_class=8)
    old, new = tmp_path / "old", tmp_path / "new"
    prepare(snapshot / "dataset", snapshot / "images", old, 48 if spoil == "size" else 32, workers=1)
    for path in old.glob("*.npy"):  # pictures that would be seen in the result
        array = np.load(path)
        np.save(path, np.zeros_like(array[:1] if spoil == "damaged" else array))
    if spoil == "code":
        index = json.loads((old / "index.json").read_text())
        (old / "index.json").write_text(json.dumps({**index, "code": "another"}))
    if spoil == "empty":
        (old / "index.json").unlink()
    prepare(snapshot / "dataset", snapshot / "images", new, 32, workers=1, previous=old)
    assert np.load(new / "train.npy").max(axis=(1, 2, 3)).min() > 0
    assert ("previous: not used" in capsys.readouterr().out) == (spoil != "empty")


def die_on(number, items):
    """A decoder that crashes, as a fault in a C library does."""
    if any(row == number for row, _ in items):
        os._exit(11)
    return [(row, "odd") for row, _ in items if row % 2]


def test_a_picture_that_ends_the_decoding_process_is_named_and_the_others_are_decoded():
    reasons = decode(partial(die_on, 34), [(row, "") for row in range(40)], 2)
    assert reasons.pop(34) == "decoding it ended the process that did it"
    assert reasons == dict.fromkeys(range(1, 40, 2), "odd")


def test_a_process_may_end_while_pictures_are_still_being_handed_out(monkeypatch):
    submit = ProcessPoolExecutor.submit

    def late(pool, work, items):
        future = submit(pool, work, items)
        if items[0][0] == 32:  # the chunk that ends its process
            future.exception()
        return future

    monkeypatch.setattr(ProcessPoolExecutor, "submit", late)
    reasons = decode(partial(die_on, 34), [(row, "") for row in range(130)], 2)
    assert reasons.pop(34) == "decoding it ended the process that did it"
    assert reasons == dict.fromkeys(range(1, 130, 2), "odd")


def test_the_limit_of_broken_pictures_can_be_set(tmp_path):
    snapshot = write_snapshot(tmp_path / "s", per_class=8, broken=3)
    places = (snapshot / "dataset", snapshot / "images", tmp_path / "out", 32)
    with pytest.raises(PrepareError, match="3 of 27 pictures cannot be read, more than the 2 .*dots/26.png"):
        prepare(*places, max_broken=0.1, workers=1)
    index = prepare(*places, max_broken=0.12, workers=1)
    assert [row["origin"].rpartition("/")[2] for row in index["skipped"]] == ["24.png", "25.png", "26.png"]


def test_classes_that_lost_too_many_pictures_are_refused(tmp_path):
    snapshot = write_snapshot(tmp_path / "s", per_class=8)
    rows = [json.loads(line) for line in (snapshot / "dataset" / "manifest.jsonl").read_text().splitlines()]
    stripes = {row["sha256"] for row in rows if row["class"] == "stripes" and row["split"] == "train"}
    for sha256 in stripes:
        (snapshot / "images" / sha256).unlink()
    with pytest.raises(PrepareError, match=r"too few readable training pictures: stripes \(0\)"):
        prepare(snapshot / "dataset", snapshot / "images", tmp_path / "out", 32, max_broken=0.5, workers=1)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--image-size", "16"], "argument --image-size: must be a whole number from 32 to 1024, not 16"),
        (["--views", "0"], "argument --views: must be a whole number from 1 to 16, not 0"),
        (["--max-broken", "2"], "argument --max-broken: must be a number from 0 to 1, not 2"),
        (["--dataset", "nowhere"], "has no manifest.jsonl"),
    ],
)
def test_a_refusal_says_why(tmp_path, snapshot, arguments, reason, capsys):
    assert run(snapshot, tmp_path / "out", *arguments) == 1
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("job", ["prepare", "evaluate"])
def test_whatever_nobody_thought_of_is_the_exit_message(monkeypatch, job):
    def fails(*_, **__):
        raise OSError("No space left on device")

    told: list[str] = []
    monkeypatch.setattr(f"{job}.{job}", fails)
    monkeypatch.setattr("artifact.exit_message", lambda processing, reason: told.append(reason))
    with pytest.raises(OSError):
        import_module(job).main([])
    assert told == ["OSError: No space left on device"]


def test_weights_that_do_not_match_fail_the_job_that_would_use_them(tmp_path, snapshot, capsys):
    (tmp_path / "w").mkdir()
    torch.save({"conv1.weight": torch.zeros(8, 3, 7, 7)}, tmp_path / "w" / "resnet18.pth")
    assert run(snapshot, tmp_path / "out", "--weights", tmp_path / "w") == 1
    assert "does not match torchvision's resnet18" in capsys.readouterr().err
    assert run(snapshot, tmp_path / "out", "--weights", tmp_path / "w", "--unfreeze", "all") == 0
    assert not (tmp_path / "out" / "features.npz").exists()
