"""prepare, train and evaluate from end to end, as processes under the container contract."""

import io
import itertools
import json
import os
import re
import signal
import tarfile

import numpy as np
import pytest
import torch

import data
import preprocessing
from predictor import Predictor
from preprocessing import Preprocess
from tests.unit.training.jobs import PATTERNS, prepare, run, start, write_snapshot

LINE = re.compile(r"validation:accuracy=([0-9\.]+);")


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """One profiled training job: its /opt/ml and its log."""
    opt_ml = tmp_path_factory.mktemp("job")
    log = run("train.py", "--training", prepared, "--lr", '"0.002"', "--batch-size", '"8"', "--epochs", '"4"',
              "--image-size", 32, "--profile", '"true"', "--model-version", "261122160000", "--dataset-hash", "abc",
              "--_tuning_objective_metric", "validation:accuracy", "--sagemaker_program", "train.py",
              opt_ml=opt_ml)  # fmt: skip
    return opt_ml, log


def test_prepared_pictures_are_the_crops_that_the_server_makes(snapshot, prepared):
    index = json.loads((prepared / "index.json").read_text())
    spec = Preprocess.from_json((prepared / "preprocess.json").read_text())
    assert (spec.size, spec.resize) == (32, 37)
    for split, side in (("train", 37), ("validation", 32), ("test", 32)):
        array = np.load(prepared / f"{split}.npy", mmap_mode="r")
        assert array.dtype == np.uint8 and array.shape[1:] == (side, side, 3)
        assert len(array) == len(index["splits"][split]["labels"]) == len(index["splits"][split]["sha256"])
        cut = Preprocess(side, spec.resize)
        for row, sha256 in zip(array, index["splits"][split]["sha256"], strict=True):
            assert row.tobytes() == preprocessing.crop((snapshot / "images" / sha256).read_bytes(), cut)


def test_a_broken_picture_is_named_and_left_out(prepared):
    skipped = json.loads((prepared / "index.json").read_text())["skipped"]
    assert len(skipped) == 1
    assert skipped[0]["origin"].startswith("s3://pictures/") and "not an image" in skipped[0]["reason"]


def test_too_many_broken_pictures_end_the_job_with_the_list(tmp_path):
    log = prepare(write_snapshot(tmp_path / "s", per_class=8, broken=6), tmp_path / "out", code=1)
    assert "6 of 30 pictures cannot be read" in log and "s3://pictures/labelled/dots/24.png" in log
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda rows: [r for r in rows if r["class"] != "dots" or r["split"] != "train"], "dots (0)"),
        (lambda rows: [r for r in rows if r["split"] != "validation"], "validation split"),
        (lambda rows: [{**r, "class": "cat"} for r in rows], "cat"),
    ],
)
def test_a_dataset_that_cannot_be_trained_on_is_refused(tmp_path, change, reason):
    folder = write_snapshot(tmp_path / "s", per_class=8)
    manifest = folder / "dataset" / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    manifest.write_text("\n".join(json.dumps(row) for row in change(rows)))
    assert reason in prepare(folder, tmp_path / "out", code=1)


def test_the_models_statistics_are_those_of_pictures_as_they_are_served(trained, prepared):
    found = torch.load(trained[0] / "model" / "weights.pt", weights_only=True)
    of_train = torch.from_numpy(np.array(data.load(prepared).train.images[:, 2:34, 2:34]))
    inputs = data.Normalise(Preprocess.default(32), torch.device("cpu"))(of_train)
    first = torch.nn.functional.conv2d(inputs, found["conv1.weight"], stride=2, padding=3)
    torch.testing.assert_close(found["bn1.running_mean"], first.mean((0, 2, 3)), atol=5e-3, rtol=0)


def test_the_log_has_a_metric_line_each_epoch_and_ends_with_the_best(trained):
    _, log = trained
    values = [float(value) for value in LINE.findall(log)]
    assert len(values) == 5
    assert values[-1] == max(values[:-1])
    assert all(name in log for name in ("train:loss=", "train:accuracy=", "validation:loss=", "epoch=4;"))
    assert "no weights channel" in log


def test_the_artifact_is_complete_and_serves(trained, prepared):
    model = trained[0] / "model"
    assert {path.name for path in model.iterdir()} == {
        "weights.pt", "model.xml", "model.bin", "int8", "reference.npz", "classes.json", "preprocess.json",
        "model_card.json",
    }  # fmt: skip
    card = json.loads((model / "model_card.json").read_text())
    assert (card["model_version"], card["dataset_hash"]) == ("261122160000", "abc")
    assert card["hyperparameters"]["batch-size"] == 8 and card["hyperparameters"]["unfreeze"] == "all"
    assert card["metrics"]["validation_accuracy"] > 0 and card["versions"]["torch"].startswith("2.")
    assert card["export"]["max_difference"] <= card["export"]["tolerance"]
    assert card["findings"]["ExplodingTensor"] == "NoIssuesFound"

    from export import Served
    from model import build

    served = build(3)
    served.load_state_dict(torch.load(model / "weights.pt", weights_only=True))
    crops = np.load(prepared / "test.npy")
    spec = Preprocess.from_json((model / "preprocess.json").read_text())
    with torch.inference_mode():
        expected = Served(served, spec).eval()(torch.from_numpy(crops)).numpy()
    predictor = Predictor(model)
    assert predictor.classes == sorted(PATTERNS)
    np.testing.assert_allclose(predictor.predict(crops), expected, atol=1e-3)
    with np.load(model / "reference.npz") as reference:
        np.testing.assert_allclose(reference["probabilities"], expected, atol=1e-6)
        index = json.loads((prepared / "index.json").read_text())
        assert reference["sha256"].tolist() == index["splits"]["test"]["sha256"]


def test_the_artifact_serves_in_int8_what_it_was_calibrated_for(trained, prepared):
    model = trained[0] / "model"
    card = json.loads((model / "model_card.json").read_text())
    assert card["export"]["int8"]["calibration"] == len(np.load(prepared / "train.npy"))
    assert (model / "int8" / "model.bin").stat().st_size < 0.3 * (model / "model.bin").stat().st_size
    xml = (model / "int8" / "model.xml").read_text()
    assert xml.count('type="FakeQuantize"') >= 20 and 'element_type="i8"' in xml, "activations and weights"
    crops = np.load(prepared / "train.npy")[:, 2:34, 2:34]
    exact, quantised = Predictor(model).predict(crops), Predictor(model, "int8").predict(crops)
    assert not np.array_equal(exact, quantised) and np.abs(exact - quantised).mean() < 0.1
    assert "int8: quantised on 30 pictures" in trained[1] and "Statistics collection" not in trained[1]


def test_findings_and_report_are_whole(trained):
    data = trained[0] / "output" / "data"
    findings = json.loads((data / "findings.json").read_text())
    named = {rule["rule"]: rule for rule in findings["rules"]}
    assert {"VanishingGradient", "ExplodingTensor", "Overfit", "LossNotDecreasing", "Overtraining", "ClassImbalance",
            "PoorWeightInitialization", "LowGPUUtilization", "CPUBottleneck", "Dataloader"} <= named.keys()  # fmt: skip
    assert all(rule["status"] in ("NoIssuesFound", "IssuesFound") for rule in named.values()), named
    assert findings["blocking"] == any(rule["blocking"] for rule in named.values())
    summary = findings["summary"]
    assert summary["per_class"].keys() == set(PATTERNS) and summary["steps"]["count"] == 16 and summary["model"]
    assert len(summary["skipped"]) == 1
    page = (data / "report.html").read_text()
    assert page.count("Plotly.newPlot(") >= 8
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=['\"]https?:", page), "the report must work offline"
    assert "LowGPUUtilization" in page and "stripes" in page


# The stated tolerance of a resumed training: on one machine the result is the same to the bit, on another one kernels
# may add in another order.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}


def assert_same_model(folder, other):
    first, second = (torch.load(opt_ml / "model" / "weights.pt", weights_only=True) for opt_ml in (folder, other))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **TOLERANCE, msg=name)
    cards = [json.loads((opt_ml / "model" / "model_card.json").read_text()) for opt_ml in (folder, other)]
    for name in ("epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "test_loss"):
        assert cards[0]["metrics"][name] == pytest.approx(cards[1]["metrics"][name], rel=TOLERANCE["rtol"]), name


@pytest.mark.parametrize("unfreeze", ["none", "layer4"])
def test_a_training_that_sigterm_ends_in_the_middle_of_an_epoch_reaches_the_same_model(
    prepared, backbone, tmp_path, monkeypatch, capsys, unfreeze
):
    import train
    from steps import Learner

    def job(opt_ml):
        monkeypatch.setenv("SM_MODEL_DIR", str(opt_ml / "model"))
        monkeypatch.setenv("SM_OUTPUT_DIR", str(opt_ml / "output"))
        arguments = ["--training", prepared, "--weights", backbone, "--unfreeze", unfreeze, "--image-size", 32,
                     "--batch-size", 4, "--epochs", 3, "--seed", 3, "--int8", str(unfreeze == "none")]  # fmt: skip
        assert train.main(list(map(str, arguments))) == 0

    handler = signal.getsignal(signal.SIGTERM)
    try:
        job(tmp_path / "whole")
        steps, step = [], Learner.step

        def step_and_terminate(learner, *batch):
            steps.append(batch)
            if len(steps) == 8 + 3:  # of 8 steps an epoch
                os.kill(os.getpid(), signal.SIGTERM)
            return step(learner, *batch)

        monkeypatch.setattr(Learner, "step", step_and_terminate)
        job(tmp_path / "cut")
        assert len(steps) == 11 and "stopped by SIGTERM in epoch 2" in capsys.readouterr().out
        assert (tmp_path / "cut/checkpoints/checkpoint.pt").is_file() and not (tmp_path / "cut/model").exists()
        job(tmp_path / "cut")
        assert len(steps) == 3 * 8 and "going on in epoch 2, after 3 batches" in capsys.readouterr().out
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert not (tmp_path / "cut/checkpoints/checkpoint.pt").exists()
    assert_same_model(tmp_path / "whole", tmp_path / "cut")


def test_a_training_on_a_machine_that_is_lost_goes_on_from_its_last_checkpoint(prepared, backbone, tmp_path):
    arguments = ["--training", prepared, "--weights", backbone, "--batch-size", 4, "--epochs", 50, "--image-size", 32,
                 "--patience", 50, "--checkpoint-seconds", 0, "--int8", "false"]  # fmt: skip
    run("train.py", *arguments, opt_ml=tmp_path / "whole")
    with start("train.py", *arguments, opt_ml=tmp_path / "cut") as job:
        assert job.stdout is not None
        for line in job.stdout:
            if line.startswith("epoch=2"):
                job.kill()
                break
    assert job.returncode == -signal.SIGKILL and not (tmp_path / "cut" / "model" / "model.xml").exists()
    assert "going on in epoch" in run("train.py", *arguments, opt_ml=tmp_path / "cut")
    assert_same_model(tmp_path / "whole", tmp_path / "cut")


def test_evaluation_compares_by_class_name(trained, snapshot, tmp_path):
    archive = tmp_path / "challenger" / "model.tar.gz"
    pack(trained[0] / "model", archive)
    champion = tmp_path / "champion" / "model.tar.gz"
    settled = tmp_path / "settled"  # what the champion learnt from: without the pictures of one class
    settled.mkdir()
    rows = (snapshot / "dataset" / "manifest.jsonl").read_text().splitlines(keepends=True)
    (settled / "manifest.jsonl").write_text("".join(row for row in rows if '"stripes"' not in row))
    # a champion that knows the same classes under other indices, and one of them under no name of ours
    pack(trained[0] / "model", champion, {"classes.json": json.dumps(["stripes", "cat", "dots"]).encode()})
    run("evaluate.py", "--dataset", snapshot / "dataset", "--images", snapshot / "images", "--challenger",
        archive.parent, "--champion", champion.parent, "--settled", settled, "--output", tmp_path / "out",
        opt_ml=tmp_path)  # fmt: skip
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    challenger = result["challenger"]
    precision = result["precision"]
    assert (precision["reference"], precision["pictures"]) == ("torch", 9)
    assert precision["measured"]["f32"]["max_difference"] < 1e-3 and precision["measured"]["f32"]["agreement"] == 1
    assert {*precision["measured"], *precision["unavailable"]} == {"f32", "bf16", "int8"} and precision["processor"]
    assert challenger["precision"] == precision["chosen"] and result["champion"]["precision"] == "f32"
    assert challenger["accuracy"] == precision["measured"][precision["chosen"]]["accuracy"]
    card = json.loads((tmp_path / "out" / "model_card.json").read_text())
    assert card.pop("serving") == precision
    assert card == json.loads((trained[0] / "model" / "model_card.json").read_text())
    assert challenger["per_class"].keys() == set(PATTERNS) and len(challenger["predictions"]) == 9
    assert challenger["accuracy"] == sum(c["correct"] for c in challenger["per_class"].values()) / 9
    assert challenger["latency_ms_p50"] > 0
    assert result["common_classes"] == ["dots", "stripes"] and result["new_classes"] == ["plain"]
    assert result["missing_classes"] == ["cat"], "what no test picture shows"
    assert result["champion"]["per_class"].keys() == {"dots", "stripes"}
    common = result["common"]
    for who, name in itertools.product(("challenger", "champion"), ("dots", "stripes")):
        paired = common["per_class"][name]
        assert paired["both"] + paired[f"only_{who}"] == result[who]["per_class"][name]["correct"]
    assert common["n"] == sum(common[kind] for kind in ("both", "only_champion", "only_challenger", "neither")) == 6
    assert common["challenger_correct"] == sum(challenger["per_class"][name]["correct"] for name in ("dots", "stripes"))
    assert common["settled"] == common["per_class"]["dots"]
    assert common["per_class"].keys() == {"dots", "stripes"}, "plain is new to the champion, as cat is to the test"
    for answer in [*challenger["predictions"], *result["champion"]["predictions"]]:
        assert answer["ms"] > 0 and answer["origin"].startswith("s3://pictures/labelled/")


def test_evaluation_without_champion_and_with_a_broken_archive(trained, snapshot, tmp_path):
    archive = tmp_path / "model.tar.gz"
    pack(trained[0] / "model", archive)
    places = ["--dataset", snapshot / "dataset", "--images", snapshot / "images", "--output", tmp_path / "out"]
    run("evaluate.py", *places, "--challenger", archive, "--precision", "int8", opt_ml=tmp_path)
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["champion"] is None and result["common"] is None and result["new_classes"] == sorted(PATTERNS)
    assert result["missing_classes"] == []
    assert result["challenger"]["precision"] == result["precision"]["chosen"] == "int8"
    pack(trained[0] / "model", archive, leave_out="model.bin")
    assert "model.bin missing" in run("evaluate.py", *places, "--challenger", archive, opt_ml=tmp_path, code=1)
    pack(trained[0] / "model", archive, {"classes.json": b"[]"})
    assert "evaluate: classes.json must" in run(
        "evaluate.py", *places, "--challenger", archive, opt_ml=tmp_path, code=1
    )


def pack(folder, archive, replace=None, leave_out=None):
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = str(path.relative_to(folder))
            if name == leave_out:
                continue
            data = (replace or {}).get(name, path.read_bytes())
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A weights channel: a state dict as torchvision publishes it, of random numbers."""
    from model import _import_resnet18

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    torch.save(_import_resnet18()().state_dict(), folder / "resnet18.pth")
    return folder


@pytest.mark.parametrize("unfreeze", ["none", "layer4"])
def test_frozen_layers_stay_as_they_were(prepared, backbone, tmp_path, unfreeze):
    run("train.py", "--training", prepared, "--weights", backbone, "--unfreeze", unfreeze, "--epochs", 2, "--profile",
        "true" if unfreeze == "none" else "false", "--int8", "false", "--image-size", 32, opt_ml=tmp_path)  # fmt: skip
    before = torch.load(backbone / "resnet18.pth", weights_only=True)
    after = torch.load(tmp_path / "model" / "weights.pt", weights_only=True)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == ({"fc"} if unfreeze == "none" else {"fc", "layer4"})


@pytest.mark.parametrize(
    ("spoil", "arguments", "reason"),
    [
        ("", ["--image-size", "64"], "prepared for 32"),
        ("", ["--batch-size", "0"], "from 2 to 4096, not 0"),
        ("", ["--loader-workers", "0"], "from 1 to 64, not 0"),
        ("weights", [], "is damaged: its sha256 starts with"),
        ("weights", ["--unfreeze", "all"], "is damaged: its sha256 starts with"),
        ("champion", [], "the champion channel holds no model that can be started from"),
        ("channel", [], "holds no prepared dataset (found: nothing)"),
        ("validation", [], "no pictures in the train or validation split"),
        ("index", [], "the channel mixes two datasets"),
    ],
)
def test_a_failure_reason_names_what_is_wrong(prepared, tmp_path, monkeypatch, spoil, arguments, reason):
    import train

    for name in ("weights", "champion", "channel"):
        (tmp_path / name).mkdir()
    training = tmp_path / "channel"
    if spoil != "channel":
        for path in prepared.iterdir():
            (training / path.name).write_bytes(path.read_bytes())
    if spoil in ("weights", "champion"):
        name = "resnet18-f37072fd.pth" if spoil == "weights" else "model.tar.gz"
        (tmp_path / spoil / name).write_bytes(b"nothing")
    if spoil in ("validation", "index"):
        index = json.loads((training / "index.json").read_text())
        index["splits"]["validation"] = {"labels": [], "sha256": []}
        (training / "index.json").write_text(json.dumps(index))
    if spoil == "validation":
        np.save(training / "validation.npy", np.zeros((0, 32, 32, 3), np.uint8))
    monkeypatch.setenv("SM_OUTPUT_DIR", str(tmp_path / "output"))
    monkeypatch.setenv("SM_MODEL_DIR", str(tmp_path / "model"))
    places = ["--training", training, "--weights", tmp_path / "weights", "--champion", tmp_path / "champion"]
    assert train.main([*map(str, places), "--image-size", "32", *arguments]) == 1
    assert reason in (tmp_path / "output" / "failure").read_text()
    assert not (tmp_path / "model").exists()


def test_a_training_may_have_as_few_steps_as_one(prepared, tmp_path, monkeypatch):
    import train

    monkeypatch.setenv("SM_MODEL_DIR", str(tmp_path / "model"))
    monkeypatch.setenv("SM_OUTPUT_DIR", str(tmp_path / "output"))
    for batch_size, steps in ((30, 1), (15, 2), (10, 3)):
        arguments = ["--training", prepared, "--epochs", 1, "--batch-size", batch_size, "--image-size", 32]
        assert train.main([*map(str, arguments), "--export", "false"]) == 0, steps


@pytest.mark.parametrize("unfreeze", ["none", "all"])
def test_a_seed_decides_the_result(prepared, backbone, tmp_path, monkeypatch, unfreeze):
    import train

    def metrics(name, seed):
        monkeypatch.setenv("SM_MODEL_DIR", str(tmp_path / name / "model"))
        monkeypatch.setenv("SM_OUTPUT_DIR", str(tmp_path / name / "output"))
        arguments = ["--training", prepared, "--weights", backbone, "--unfreeze", unfreeze, "--epochs", 1, "--seed",
                     seed, "--image-size", 32, "--export", "false"]  # fmt: skip
        assert train.main(list(map(str, arguments))) == 0
        found = json.loads((tmp_path / name / "model" / "model_card.json").read_text())["metrics"]
        return {name: value for name, value in found.items() if name.endswith("loss")}

    first = metrics("first", 1)
    assert len(first) == 3 and first == metrics("again", 1)
    assert all(value != first[name] for name, value in metrics("other", 2).items())
