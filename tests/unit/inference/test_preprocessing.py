"""One definition of preprocessing: equal to torchvision's, the same everywhere, and honest about broken files."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import preprocessing
from preprocessing import BrokenImage, Preprocess, crop, decode, prepare
from tests.makers.images import broken, encode, oriented, picture, png_header, whole

WHOLE, BROKEN = whole(), broken()


def pixels(data: bytes, spec: Preprocess) -> np.ndarray:
    return np.frombuffer(crop(data, spec), np.uint8).reshape(spec.size, spec.size, 3)


def reference(image: Image.Image, spec: Preprocess) -> np.ndarray:
    """torchvision 0.28's Resize and CenterCrop on a PIL image, in their own steps."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    resized = (spec.resize, int(spec.resize * long / short))
    if width > height:
        resized = resized[::-1]
    image = image.resize(resized, Image.Resampling.BILINEAR)
    left, top = (int(round((side - spec.size) / 2.0)) for side in resized)
    return np.asarray(image.crop((left, top, left + spec.size, top + spec.size)))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(8, 600),
    height=st.integers(8, 600),
    size=st.sampled_from([32, 64, 96, 224]),
    seed=st.integers(0, 9),
)
def test_a_lossless_picture_is_cropped_exactly_as_the_reference_does(width, height, size, seed):
    spec = Preprocess.default(size)
    image = picture(width, height, seed)
    difference = np.abs(reference(image, spec).astype(int) - pixels(encode(image), spec))
    if max(width, height) < 10 * min(width, height):
        assert difference.max() == 0
    else:  # a strip, of which only the middle is resized
        assert difference.max() <= 2 and difference.mean() < 0.1


def test_the_reference_here_is_what_torchvision_does():
    import model

    model.build(classes=2)  # which makes torchvision importable where its wheel was built for CUDA
    import torchvision

    for width, height, size in [(500, 375, 224), (375, 500, 224), (61, 200, 64), (300, 301, 96)]:
        image, spec = picture(width, height), Preprocess.default(size)
        steps = [torchvision.transforms.Resize(spec.resize), torchvision.transforms.CenterCrop(spec.size)]
        expected = np.asarray(torchvision.transforms.Compose(steps)(image))
        assert np.array_equal(expected, reference(image, spec))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(500, 375), (301, 400)])
def test_a_jpeg_of_ordinary_size_is_exact_in_every_orientation(orientation, size):
    data = oriented(picture(*size), orientation, quality=90)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    spec = Preprocess.default(224)
    assert np.array_equal(reference(upright, spec), pixels(data, spec))
    assert prepare(data, spec)[1:3] == upright.size


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(4000, 3000), (3027, 4033)])
def test_a_large_photograph_decoded_at_a_fraction_stays_in_its_place(orientation, size):
    """GIVEN smooth detail, as in a photograph. THEN a quarter of a level on average at most, and no shift."""
    rng = np.random.default_rng(0)
    cells = Image.fromarray(rng.integers(0, 256, (size[1] // 64, size[0] // 64, 3), np.uint8))
    data = oriented(cells.resize(size, Image.Resampling.BICUBIC), orientation, quality=90)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    spec = Preprocess.default(224)
    expected = reference(upright, spec).astype(int)
    prepared = prepare(data, spec)
    got = np.frombuffer(prepared.pixels, np.uint8).reshape(expected.shape).astype(int)
    assert np.abs(expected - got).mean() < 0.25 and np.abs(expected - got).max() <= 3
    for axis in (0, 1):  # half a pixel of shift would show as a bias along the gradient
        slope = np.gradient(expected, axis=axis)
        assert abs(((got - expected) * slope).sum() / (slope**2).sum()) < 0.02
    assert prepared[1:] == (*upright.size, "JPEG")


def test_golden_values():
    """The bytes of one picture in three sizes. A change means that every model sees other pixels than before."""
    data = encode(picture(500, 375, seed=7))
    digests = {size: hashlib.sha256(crop(data, Preprocess.default(size))).hexdigest()[:16] for size in (32, 96, 224)}
    assert digests == {32: "dad3262fec0d80f8", 96: "2a2499bbc657f2ba", 224: "4734fc66e1c044dd"}
    grey = encode(Image.new("RGB", (300, 200), (10, 128, 250)))
    assert crop(grey, Preprocess.default(32)) == bytes((10, 128, 250)) * 32 * 32


@pytest.mark.parametrize("name", WHOLE)
def test_whatever_can_be_read_is_prepared(name):
    spec = Preprocess.default(32)
    prepared = prepare(WHOLE[name], spec)
    assert prepared[1:3] == (64, 48)
    assert prepared.format == name.split()[0].upper()
    original = picture()
    grey = any(word in name for word in ("grey", "16 bit", "float"))
    expected = reference(original.convert("L").convert("RGB") if grey else original, spec).astype(int)
    got = np.frombuffer(prepared.pixels, np.uint8).reshape(32, 32, 3)
    if "black and white" not in name:
        assert np.abs(expected - got).mean() < (16 if "palette" in name or "gif" in name else 5)
    assert decode(WHOLE[name]).size == (64, 48) and decode(WHOLE[name]).mode == "RGB"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_its_reason(name):
    data, reason = BROKEN[name]
    for action in (decode, lambda data: crop(data, Preprocess.default(32))):
        with pytest.raises(BrokenImage) as refusal:
            action(data)
        assert reason in str(refusal.value)


@pytest.mark.parametrize("name", WHOLE)
def test_a_truncated_picture_is_never_taken_for_whole(name):
    """Whatever is cut off: refused, or nothing of the picture was missing."""
    data, spec = WHOLE[name], Preprocess.default(32)
    expected = crop(data, spec)
    for length in {*range(0, len(data), max(1, len(data) // 60)), *range(max(0, len(data) - 40), len(data))}:
        try:
            assert crop(data[:length], spec) == expected, f"{length} of {len(data)} bytes gave another picture"
        except BrokenImage:
            continue


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(WHOLE)), damage=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=8))
def test_damaged_bytes_give_pixels_or_a_broken_image_and_nothing_else(name, damage):
    data = bytearray(WHOLE[name])
    for position, value in damage:
        data[position % len(data)] = value
    try:
        assert len(crop(bytes(data), Preprocess.default(32))) == 32 * 32 * 3
    except BrokenImage as broken:
        assert str(broken)


def test_limits_are_arguments():
    data = encode(picture(100, 50))
    for limits, reason in [
        ({"max_bytes": 1000}, "larger than 1,000 bytes"),
        ({"max_pixels": 4999}, "decompression bomb: 100x50 pixels; the limit is 4,999"),
        ({"min_side": 51}, "100x50 pixels"),
    ]:
        with pytest.raises(BrokenImage, match=reason):
            prepare(data, Preprocess.default(32), **limits)
    assert prepare(data, Preprocess.default(32), max_bytes=len(data), max_pixels=5000, min_side=50)


def test_a_bomb_is_refused_before_it_takes_memory():
    code = """
import resource, sys
from preprocessing import BrokenImage, decode
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode(sys.stdin.buffer.read())
except BrokenImage as reason:
    print(reason, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, sep="|")
"""
    folder = Path(preprocessing.__file__).parent
    webp = bytearray(encode(picture(64, 48).convert("RGBA"), "WEBP", lossless=True, exif=b"Exif\0\0"))
    webp[24:30] = (16382).to_bytes(3, "little") * 2  # the canvas that the header declares
    for data in (png_header(30_000, 30_000), bytes(webp)):
        done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, cwd=folder, check=True)
        reason, grown = done.stdout.decode().split("|")
        assert int(grown) < 30, f"{reason}: {grown} MB"
        assert "decompression bomb" in reason or "header" in reason


def test_transparency_is_shown_over_white():
    image = Image.new("RGBA", (64, 64), (200, 0, 0, 0))
    assert set(crop(encode(image), Preprocess.default(32))) == {255}
    palette = Image.new("P", (64, 64), 3)
    palette.putpalette(bytes(range(30)))
    assert set(crop(encode(palette, "PNG", transparency=3), Preprocess.default(32))) == {255}


def test_unreadable_metadata_does_not_make_a_picture_unreadable():
    data = encode(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert decode(data).size == (64, 48)


def test_settings_travel_as_json():
    spec = Preprocess(size=64, resize=73, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(1, 1, 1))
    assert Preprocess.from_json(spec.to_json()) == spec
    assert json.loads(Preprocess.default(224).to_json()) == {
        "size": 224,
        "resize": 256,
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert Preprocess.default(64).resize == 73


@pytest.mark.parametrize(
    "change", [{"size": 0}, {"resize": 10}, {"interpolation": "magic"}, {"std": [0, 1, 1]}, {"mean": [1]}, {"extra": 1}]
)
def test_settings_that_make_no_sense_are_refused(change):
    with pytest.raises(ValueError, match="preprocess"):
        Preprocess.from_json(json.dumps(json.loads(Preprocess.default(64).to_json()) | change))


def test_it_imports_nothing_but_pillow():
    code = "import sys, preprocessing; print(*sorted(m for m in sys.modules if m in ('numpy', 'torch', 'openvino')))"
    folder = Path(preprocessing.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True)
    assert done.stdout.strip() == ""
