"""Label files as SageMaker Ground Truth and Label Studio write them, good and broken (tests/labels)."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from register_labels import formats
from tests.makers import template

FILES = template.ROOT / "tests" / "labels"
ODD = "unlabelled/ünïcödé 3+4%20.png"


def read(name: str) -> list[formats.Line]:
    return formats.read((FILES / name).read_bytes(), "pictures").lines


def reasons(name: str) -> dict[int, str]:
    return {line.number: line.reason for line in read(name)}


def test_a_manifest_of_ground_truth():
    assert [line[:3] for line in read("ground_truth.manifest")] == [
        (1, "unlabelled/1.png", "beagle"),
        (2, "unlabelled/2.png", "boxer"),
        (3, ODD, "beagle"),
    ]


def test_what_is_wrong_in_a_manifest_is_named_line_by_line_and_the_rest_counts():
    found = reasons("ground_truth_broken.manifest")
    expected = {
        1: "",
        2: "it has no label",
        3: "Ground Truth could not label it: ClientError: The file is missing or inaccessible.",
        4: "s3://elsewhere/4.png is in another bucket",
        5: "its labels are of type groundtruth/image-classification-multilabel",
        6: "it is not JSON: Unterminated string",
        8: "it has no source-ref",
        9: "it has several labels that differ (breed says 'beagle', again says 'boxer')",
        10: "'<b>' is no class name",
        11: "its label breed has no class-name",
        12: "it has no source-ref",
    }
    assert found.keys() == expected.keys()
    for number, reason in expected.items():
        assert found[number].startswith(reason) and bool(found[number]) == bool(reason), number


def test_an_export_of_label_studio():
    assert [line[:3] for line in read("label_studio.json")] == [
        (1, "unlabelled/1.png", "beagle"),
        (2, "unlabelled/2.png", "boxer"),  # two agree
        (3, ODD, "beagle"),  # one skipped it
        (4, "unlabelled/4.png", "beagle"),  # one is the ground truth
        (5, "unlabelled/5 a.png", "boxer"),  # presigned
    ]


def test_what_is_wrong_in_an_export_is_named_task_by_task():
    found = list(reasons("label_studio_broken.json").values())
    expected = [
        "task 11: its annotators disagree: 'beagle' (1), 'boxer' (1)",
        "task 12: whoever annotated it skipped it",
        "task 13: it was not annotated",
        "task 14: /data/upload/4/5f3a-dog.png is not in S3: put the picture into s3://pictures",
        "task 15: /data/local-files/?d=dogs/dog.png is not in S3",
        "task 16: https://example.com/dog.png is not in S3",
        "task 17: it has several classes: 'beagle', 'boxer'",
        "task 18: it has no choice",
        "task 19: several of its fields could be the picture: left, right",
        "task 20: it has no choice",
        "task 21: gs://bucket/dog.png is not in S3",
        "task 22: it names no picture",
        "it is no task",
    ]
    assert len(found) == len(expected)
    for reason, start in zip(found, expected, strict=True):
        assert reason.startswith(start)


def test_a_small_export_of_label_studio_has_one_record_an_annotation():
    lines = read("label_studio_min.json")
    assert [line.class_name for line in lines] == ["beagle", "boxer", "boxer", "", "", ""]
    assert [line.reason for line in lines[3:]] == [
        "task 3: it has several classes: 'beagle', 'boxer'",
        "task 4: it has no choice",
        "task 5: several of its fields could be the class (choice, quality): export as JSON, not JSON-MIN",
    ]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is neither"),
        (b"picture,class\n1.png,beagle\n", "it is neither"),
        (b"[]", "it has no tasks"),
        (b"\xff\xfe[\x00]\x00", "it is not UTF-8"),
        ((FILES / "label_studio.json").read_bytes()[:3000], "it is not JSON, or was cut off"),
        (b'[{"id": 1} {"id": 2}]', "it is not JSON, or was cut off: Expecting ',' delimiter: line 1 column 12"),
        (b"[" * 100_000, "it is not JSON"),
        (json.dumps({"images": [{"id": n} for n in range(9)]}, indent=1).encode(), "none of its first lines is a JSON"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(data: bytes, reason: str):
    with pytest.raises(formats.NoLabels, match=reason.replace("(", r"\(")):
        formats.read(data, "pictures")


def test_a_byte_order_mark_and_windows_line_ends_are_no_trouble():
    data = (FILES / "ground_truth.manifest").read_bytes().replace(b"\n", b"\r\n")
    assert len(formats.read(b"\xef\xbb\xbf" + data, "pictures").lines) == 3


@pytest.mark.parametrize(
    ("uri", "key"),
    [
        ("s3://pictures/a%20b+c?d#e", "a%20b+c?d#e"),
        ("https://pictures.s3.amazonaws.com/a%20b", "a b"),
        ("https://s3.eu-central-1.amazonaws.com/pictures/a/b?X-Amz-Expires=60", "a/b"),
        ("https://pictures.s3.dualstack.us-west-2.amazonaws.com/a", "a"),
        ("https://pictures.s3.cn-north-1.amazonaws.com.cn/a", "a"),
        ("https://pictures.s3.amazonaws.com.evil.example/a", None),
        ("http://pictures.s3.amazonaws.com/a", None),
        ("https://other.s3.amazonaws.com/a", None),
        ("https://[broken/a", None),
        ("s3://pictures", None),
        ("s3://pictures/" + "a" * 1025, None),
    ],
)
def test_where_a_picture_is(uri: str, key: str | None):
    annotation = {"class-name": "beagle", "type": formats.CLASSIFICATION}
    (line,) = formats.read(json.dumps({"source-ref": uri, "b-metadata": annotation}).encode(), "pictures").lines
    assert (line.key or None) == key and bool(line.reason) == (key is None)


FIELDS = ["id", "data", "image", "annotations", "result", "type", "value", "choices"]
FIELDS += ["a-metadata", "class-name", "source-ref"]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["s3://pictures/1.png", "beagle"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.sampled_from(FIELDS), inner, max_size=5)
    ),
    max_leaves=12,
)


@given(st.lists(values, min_size=1, max_size=5), st.booleans())
def test_whatever_a_file_holds_each_line_is_a_label_or_has_a_reason(things, as_lines):
    text = "{}\n" + "\n".join(map(json.dumps, things)) if as_lines else json.dumps(things)
    lines = formats.read(text.encode(), "pictures").lines
    assert all(bool(line.reason) != bool(line.key and line.class_name) for line in lines)
    json.dumps([list(line) for line in lines]).encode()
