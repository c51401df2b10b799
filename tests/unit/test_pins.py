"""One version of a package wherever it is pinned: what is tested here is what runs on AWS and is measured beside."""

import re

import pytest

from tests.makers.template import ROOT

FOLDERS = ["*/requirements.txt", "functions/*.txt", "benchmarks/servers/*.txt"]
FILES = ["requirements.in", *sorted(str(path.relative_to(ROOT)) for glob in FOLDERS for path in ROOT.glob(glob))]
ALONE = {  # in no other file
    "training/requirements.txt": {"nvidia-ml-py"},
    "benchmarks/requirements.txt": {"timm", "huggingface-hub"},
    "benchmarks/servers/bentoml.txt": {"bentoml"},
    "benchmarks/servers/fastapi.txt": {"fastapi"},
    "benchmarks/servers/litserve.txt": {"litserve", "python-multipart"},
    "benchmarks/servers/torchserve.txt": {"torchserve", "torch-model-archiver"},
}


def pins(name: str) -> dict[str, str]:
    """Versions by package, as PyPI spells it: in lower case, with dashes."""
    found = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)", (ROOT / name).read_text(), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}


ALL = pins("requirements.txt")


@pytest.mark.parametrize("name", FILES)
def test_what_is_pinned_twice_is_of_one_version(name):
    pinned = pins(name)
    assert pinned and pinned.keys() - ALL.keys() == ALONE.get(name, set())
    for package in pinned.keys() & ALL.keys():
        assert pinned[package] == ALL[package], package


@pytest.mark.parametrize("name", ["inference/requirements.txt", "training/requirements.txt"])
def test_what_decodes_and_answers_is_pinned_where_it_runs(name):
    assert {"pillow", "pi-heif", "openvino"} <= pins(name).keys()


def test_no_package_is_asked_for_twice():
    asked = re.findall(r"^[\w.-]+", (ROOT / "requirements.in").read_text(), re.MULTILINE)
    assert len(asked) == len(set(asked))


def test_smdebug_is_of_one_version():
    source = "".join(path.read_text() for path in ROOT.glob("training/*.py"))
    texts = [(ROOT / name).read_text() for name in ("requirements.in", "training/Makefile")] + [source]
    versions = [set(re.findall(r"smdebug==([\d.]*\d)", text)) for text in texts]
    assert len(versions[0]) == 1 and versions == versions[:1] * 3
