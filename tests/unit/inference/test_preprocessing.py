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
from preprocessing import BrokenImage, Preprocess, crop, decode, extension_differs, inspect, prepare
from tests.makers import corpus, profiles
from tests.makers.heic import heic
from tests.makers.images import encode, oriented, picture, png_header

GOOD = {name: (data, expected) for name, data, expected in corpus.good()}
BROKEN = {name: (data, reason) for name, data, reason in corpus.broken()}
WHOLE = {name: data for name, (data, _) in GOOD.items()}


def pixels(data: bytes, spec: Preprocess) -> np.ndarray:
    return np.frombuffer(crop(data, spec), np.uint8).reshape(spec.size, spec.size, 3)


def reference(
    image: Image.Image, spec: Preprocess, method: Image.Resampling = Image.Resampling.BILINEAR
) -> np.ndarray:  # fmt: skip
    """torchvision 0.28's Resize and CenterCrop on a PIL image, in their own steps."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    resized = (spec.resize, int(spec.resize * long / short))
    if width > height:
        resized = resized[::-1]
    image = image.resize(resized, method)
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


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (720, 721), (301, 400), (900, 120), (100, 80)])
def test_bicubic_crops_are_exact_too(size):
    """GIVEN an interpolation that looks further, enlarged and reduced, copied by rows and not (720x721)."""
    spec, image = Preprocess(224, 256, "bicubic"), picture(*size)
    assert np.array_equal(reference(image, spec, Image.Resampling.BICUBIC), pixels(encode(image), spec))


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


@pytest.mark.parametrize("name", GOOD)
def test_whatever_can_be_read_is_prepared(name):
    data, expected = GOOD[name]
    spec = Preprocess.default(32)
    prepared = prepare(data, spec)
    assert prepared[1:] == (*expected.image.size, expected.format)
    whole = decode(data)
    assert whole.size == expected.image.size and whole.mode == "RGB"
    assert difference(whole, expected.image).mean() <= expected.tolerance
    got = np.frombuffer(prepared.pixels, np.uint8).reshape(32, 32, 3)
    assert np.abs(got - reference(expected.image, spec).astype(int)).mean() <= expected.tolerance
    header = inspect(data, spec)
    assert header.format == expected.format and sorted(header[1:3]) == sorted(expected.image.size)
    assert extension_differs(name, header.format) == expected.differs


def difference(one: Image.Image, other: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(one, int) - np.asarray(other, int))


@pytest.mark.parametrize("seed", range(1, 4))
def test_the_corpus_of_any_seed_holds_what_it_promises(seed):
    spec = Preprocess.default(32)
    names = set()
    for name, data, expected in corpus.good(seed):
        assert prepare(data, spec)[1:] == (*expected.image.size, expected.format), name
        assert difference(decode(data), expected.image).mean() <= expected.tolerance, name
        names.add(name)
    for name, data, reason in corpus.broken(seed):
        with pytest.raises(BrokenImage) as refusal:
            prepare(data, spec)
        assert reason and reason in str(refusal.value), name
        names.add(name)
    assert len(names) == len(GOOD) + len(BROKEN)


def test_the_corpus_of_a_seed_is_always_the_same():
    for make in (corpus.good, corpus.broken):
        assert [file[:2] for file in make(5)] == [file[:2] for file in make(5)]
        assert [file[1] for file in make(5)] != [file[1] for file in make(6)]


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


def test_what_a_truncated_file_says():
    webp = encode(picture(200, 150), "WEBP", lossless=True)
    png = encode(picture(500, 375))  # in chunks of 64 kB
    jpeg = encode(picture(500, 375), "JPEG")
    tiff = encode(picture(64, 48), "TIFF", compression="tiff_lzw")  # its directory lies at the end
    for data, length, reason in [
        (webp, 2000, f"truncated after 2,000 bytes of {len(webp) / 1000:,.0f} kB: the WebP ends"),
        (png, 12_345, "truncated after 12 kB of at least 66 kB: the PNG ends"),
        (jpeg, 2000, "truncated after 2,000 bytes: the JPEG ends"),
        (tiff, 1000, "truncated after 1,000 bytes of at least "),
        (heic(picture()), 3000, "truncated after 3,000 bytes of 13 kB: the HEIC ends"),
        (
            jpeg[:3000] + bytes(len(jpeg) - 3000),
            len(jpeg),
            f"truncated after 3,000 bytes of {len(jpeg) / 1000:,.0f} kB: the JPEG ends",
        ),
    ]:
        with pytest.raises(BrokenImage) as refusal:
            decode(data[:length])
        assert str(refusal.value).startswith(reason)


@pytest.mark.parametrize("kind", ["WEBP", "HEIF"])
@pytest.mark.parametrize("zeros", [40, 3000])
def test_zeros_that_end_the_metadata_are_no_missing_picture(kind, zeros):
    """Windows pads what it writes of a picture's properties, and metadata may be the last thing in a file."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0hi" + bytes(zeros)  # UserComment
    data = heic(picture(), exif=exif.tobytes()) if kind == "HEIF" else encode(picture(), kind, exif=exif.tobytes())
    assert data.rstrip(b"\0") + bytes(zeros // 2) in data
    assert prepare(data, Preprocess.default()).format == kind


def test_the_name_is_compared_with_the_content():
    for key, format, note in [
        ("inbox/a.jpeg", "JPEG", None),
        ("inbox/a.PNG", "JPEG", "named .png, is a JPEG"),
        ("inbox/a.heic", "JPEG", "named .heic, is a JPEG"),
        ("inbox/a.b/c.jpg", "AVIF", "named .jpg, is an AVIF"),
        ("inbox/a.jpg", "WEBP", "named .jpg, is a WebP"),
        ("inbox/a.mpo", "JPEG", None),
        ("inbox/jpg", "PNG", None),
        ("inbox/.png", "JPEG", None),
        ("inbox/scan.2026-11-22", "PNG", None),
        ("inbox/raw.dng", "TIFF", None),
    ]:
        assert extension_differs(key, format) == note, key


# ---------------------------------------------------------------- colours


@pytest.mark.parametrize("name", [name for name in profiles.SPACES if name != "sRGB"])
def test_colours_become_srgb(name):
    """GIVEN a picture stored in the numbers of another space. THEN the crop is that of the sRGB original."""
    original, spec = picture(500, 375), Preprocess.default(224)
    stored = profiles.stored(original, name)
    expected = reference(original, spec).astype(int)
    got = pixels(encode(stored, icc_profile=profiles.rgb(name)), spec)
    assert np.abs(got - expected).mean() < 0.8
    assert np.abs(pixels(encode(stored), spec) - expected).mean() > 5  # without the profile it is another picture


@pytest.mark.parametrize("name", profiles.SPACES)
def test_converting_the_crop_is_as_good_as_converting_the_picture(name):
    """GIVEN smooth detail, as in a photograph. THEN half a level on average at most."""
    spec = Preprocess.default(224)
    smooth = picture(100, 75).resize((1000, 750), Image.Resampling.BICUBIC)
    data = encode(profiles.stored(smooth, name), icc_profile=profiles.rgb(name))
    moved = np.abs(reference(decode(data), spec).astype(int) - pixels(data, spec))
    assert moved.mean() <= 0.5 and moved.max() <= 20


def test_inks_are_seen_as_the_press_prints_them():
    inks = {
        (255, 0, 0, 0): profiles.CYAN,
        (0, 0, 0, 0): (255, 255, 255),
        (0, 0, 0, 255): (0, 0, 0),
        (0, 255, 255, 0): (255, 0, 0),
    }
    for ink, seen in inks.items():
        data = encode(Image.new("CMYK", (40, 40), ink), "TIFF", icc_profile=profiles.cmyk())
        for got in (decode(data).getpixel((20, 20)), tuple(crop(data, Preprocess.default(32))[:3])):
            assert max(abs(a - b) for a, b in zip(got, seen, strict=True)) <= 6, (ink, got)


def test_a_profile_that_says_srgb_changes_nothing():
    data, profile = encode(picture(100, 80)), profiles.rgb("sRGB")
    assert crop(encode(picture(100, 80), icc_profile=profile), Preprocess.default(32)) == crop(
        data, Preprocess.default(32)
    )


def test_a_heic_is_turned_once():
    """GIVEN a file whose container and EXIF both say how to turn it. THEN it is turned by the container's word."""
    original = picture(64, 48)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = original.transpose(Image.Transpose.ROTATE_90)
    turned = decode(heic(stored, rotate=3, exif=exif.tobytes()))
    assert difference(turned, decode(heic(original))).max() == 0
    assert decode(heic(stored, exif=exif.tobytes())).size == (48, 64)  # EXIF alone says nothing (ISO/IEC 23008-12, 6.5)


# ---------------------------------------------------------------- limits and memory


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


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux")
def test_the_memory_that_a_header_announces_is_enough():
    """GIVEN pictures of 3 megapixels. THEN preparing one takes no more than `inspect` said, and half of it at least."""
    code = """
import ctypes, gc, sys
from preprocessing import Preprocess, inspect, prepare
def kilobytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])
spec = Preprocess.default()
size = int(sys.argv[1])
small, data = sys.stdin.buffer.read(size), sys.stdin.buffer.read()
prepare(small, spec)  # which loads the decoder
announced = inspect(data, spec).bytes_needed
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
before = kilobytes("VmRSS")
prepare(data, spec)
print(announced, (kilobytes("VmHWM") - before) * 1024)
"""
    small, big = picture(64, 48), picture(3000, 1000)
    folder = Path(preprocessing.__file__).parent
    for kind, options in [
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "subsampling": 0}),
        ("PNG", {"compress_level": 1}),
        ("WEBP", {"method": 0}),
        ("AVIF", {"speed": 10}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("HEIF", {}),
    ]:
        made = [heic(image) if kind == "HEIF" else encode(image, kind, **options) for image in (small, big)]
        command = [sys.executable, "-c", code, str(len(made[0]))]
        done = subprocess.run(command, input=b"".join(made), capture_output=True, cwd=folder, check=True)
        announced, peak = map(int, done.stdout.split())
        assert peak <= announced, f"{kind} {options}: {announced:,} bytes announced, {peak:,} taken"


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


def test_it_imports_nothing_that_it_does_not_need_yet():
    heavy = ("numpy", "torch", "openvino", "pi_heif", "PIL.ImageCms")
    code = f"import sys, preprocessing; print(*sorted(m for m in sys.modules if m in {heavy}))"
    folder = Path(preprocessing.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True)
    assert done.stdout.strip() == ""
