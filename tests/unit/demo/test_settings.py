"""Each thing that cannot work ends with one clear sentence, before anything has been started."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from local.demo import settings
from local.demo.data import FEWEST, broken_files, collect
from local.demo.pictures import pictures
from local.demo.settings import DemoError, find_weights, parse

CHECKOUT = Path(__file__).resolve().parents[3]


def folder(root: Path, **classes: int) -> Path:
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number, data in enumerate(pictures("solid", count, seed=1, size=32)):
            (root / name / f"{number}.jpg").write_bytes(data)
    (root / "README.md").write_text("files beside the class folders are nothing to the demo")
    return root


def test_options_come_from_the_environment_that_make_passes_on(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA", str(tmp_path))
    monkeypatch.setenv("KEEP", "1")
    monkeypatch.setenv("PORT", "4777")
    monkeypatch.delenv("WEIGHTS", raising=False)
    found = parse([])
    assert (found.data, found.keep, found.port, found.weights) == (tmp_path, True, 4777, None)


def test_empty_variables_count_as_not_set(monkeypatch):
    for name in ("DATA", "KEEP", "PORT", "WEIGHTS"):
        monkeypatch.setenv(name, "")
    found = parse([])
    assert (found.data, found.keep, found.port, found.weights) == (None, False, settings.DEFAULT_PORT, None)


def test_a_port_that_is_none_is_refused():
    with pytest.raises(DemoError, match="PORT must be a number from 1024 to 65535, not 'http'"):
        parse(["--port", "http"])


def test_a_missing_data_folder_is_named(tmp_path):
    with pytest.raises(DemoError, match="there is no such folder"):
        collect(parse(["--data", str(tmp_path / "nowhere")]))


def test_a_data_folder_of_one_class_is_refused(tmp_path):
    with pytest.raises(DemoError, match=r"has pictures of 1 class \(beagle\); the demo needs three or more"):
        collect(parse(["--data", str(folder(tmp_path, beagle=10))]))


def test_classes_with_too_few_pictures_are_named_with_their_count(tmp_path):
    data = folder(tmp_path, beagle=10, boxer=3, pug=10)
    with pytest.raises(DemoError, match=rf"boxer \(3\); every class needs at least {FEWEST}"):
        collect(parse(["--data", str(data)]))


def test_a_folder_is_split_so_that_no_held_out_picture_is_labelled(tmp_path):
    data = folder(tmp_path, beagle=10, boxer=12, pug=10)
    (data / "pug" / "broken.jpg").write_bytes(b"not a picture")
    found = collect(parse(["--data", str(data)]))
    assert (found.first, found.new) == (["beagle", "boxer"], "pug")
    assert {p.truth for p in found.held_out} == {"beagle", "boxer", "pug"}
    held = {(p.truth, p.name) for p in found.held_out}
    labelled = {(p.truth, p.name) for group in found.labelled.values() for p in group}
    assert not held & labelled
    assert len(held) + len(labelled) == 32  # the broken one is left out


def test_drawn_pictures_that_are_held_out_are_no_labelled_ones():
    found = collect(parse(["--labelled", "10"]))
    labelled = {p.data for group in found.labelled.values() for p in group}
    assert not labelled & {p.data for p in [*found.held_out, *found.stream]}
    assert found.new not in found.first


def test_the_broken_files_are_no_pictures():
    picture = collect(parse(["--labelled", "10"])).held_out[0]
    text, cut, empty = broken_files(picture)
    assert b"Kibble" in text.data
    assert cut.data == picture.data[: len(cut.data)] and 0 < len(cut.data) < len(picture.data)
    assert empty.data == b""


def test_weights_of_another_file_are_refused(tmp_path):
    wrong = tmp_path / "weights.pth"
    wrong.write_bytes(b"something else")
    start = hashlib.sha256(b"something else").hexdigest()[:8]
    with pytest.raises(DemoError, match=f"its sha256 starts with {start}, not with f37072fd"):
        find_weights(wrong)


def test_weights_that_are_missing_are_never_replaced_by_others(tmp_path):
    with pytest.raises(DemoError, match="there is no such file"):
        find_weights(tmp_path / "weights.pth")


def test_weights_of_the_cache_are_used_if_they_are_genuine(tmp_path, monkeypatch):
    cached = tmp_path / settings.WEIGHTS_FILE
    cached.write_bytes(b"weights")
    monkeypatch.setattr(settings, "WEIGHTS_SHA256", hashlib.sha256(b"weights").hexdigest()[:8])
    found = find_weights(None, cache=tmp_path)
    assert found.path == cached
    assert str(cached) in found.line


def test_without_weights_one_line_says_so_and_why(tmp_path):
    found = find_weights(None, cache=tmp_path, url="http://127.0.0.1:9/weights.pth")
    assert found.path is None
    assert "\n" not in found.line
    assert "random weights" in found.line and "refused" in found.line
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_is_another_file_is_not_kept(tmp_path):
    elsewhere = tmp_path / "elsewhere.pth"
    elsewhere.write_bytes(b"a page that says please log in")
    cache = tmp_path / "cache"
    found = find_weights(None, cache=cache, url=f"file://localhost{elsewhere}")
    assert found.path is None
    assert list(cache.iterdir()) == []


def test_the_cache_is_where_torch_keeps_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert settings.hub_cache() == tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("version", [(3, 10, 14), (3, 14, 0)])
def test_another_version_of_python_ends_with_one_sentence(version):
    program = f"import sys, runpy; sys.version_info = {version}; runpy.run_module('local.demo', run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"Houndloop needs Python 3.11, 3.12 or 3.13, and this is Python 3.{version[1]} ")
    assert ended.stderr.count("\n") == 1


def test_what_an_old_python_reads_first_has_no_modern_syntax():
    import ast

    for name in ("local/__init__.py", "local/demo/__init__.py", "local/demo/__main__.py"):
        ast.parse((CHECKOUT / name).read_text(), feature_version=(3, 7))
