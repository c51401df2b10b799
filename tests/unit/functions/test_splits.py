"""Which split a picture gets, and what a dataset is made of: pure functions, held to models of what they should do."""

import io
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from common import dataset, splits
from common.names import BadLabel, class_name, fold
from local.demo import pictures as drawn
from register_labels.pictures import difference_hash

# Few bits that differ, in places of all bands, so that many hashes are near and many are just too far.
PLACES = [1 << place for place in range(0, 128, 7)]
hashes = st.lists(st.sampled_from(PLACES), max_size=19, unique=True).map(lambda bits: f"{sum(bits):032x}")
classes = st.sampled_from(["beagle", "boxer", "pug"])


def distance(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


@given(st.sets(hashes, max_size=40), st.sets(hashes, max_size=40))
def test_what_looks_alike_is_found_exactly_and_once(those, askers):
    near = {one: {other for other in those if 0 < distance(one, other) <= splits.NEAR} for one in those | askers}
    others = {one for asker in askers - those for one in near[asker]}
    assert splits.alike(those, askers - those) == {one for one in those if near[one]} | others
    index, found = splits.Lookalikes(those), set()
    for one in sorted(askers):
        assert index.take(one) == near[one] - found
        found |= near[one] | {one}


def test_thousands_of_pictures_of_one_scene_are_split_in_no_time():
    """Each looks like every other: what is near what must not be kept, or a fixed camera ends all retraining."""
    scene = {f"{1 << one | 1 << other | 1 << third:032x}": "beagle"
             for one, other, third in itertools.combinations(range(0, 128, 5), 3)}  # fmt: skip
    new, torn = splits.assign(scene, splits.Splits())
    assert set(new.of.values()) == {"train"} and len(new.of) == len(scene) == 2600 and not torn


@given(st.lists(st.dictionaries(hashes, classes, max_size=15), max_size=4), st.randoms())
def test_splits_never_change_and_no_two_that_look_alike_are_in_different_ones(batches, shuffle):
    """Pictures come in batches, a snapshot after each; what is dealt is saved before the next."""
    known = splits.Splits()
    for batch in batches:
        new, torn = splits.assign(batch, known)
        items = list(batch.items())
        shuffle.shuffle(items)
        assert splits.assign(dict(items), known) == (new, torn), "whatever order they come in"
        assert not new.of.keys() & known.of.keys() and not torn.keys() & (new.of.keys() | known.of.keys())
        assert batch.keys() <= new.of.keys() | known.of.keys() | torn.keys()
        known = splits.Splits(known.of | new.of, known.dealt | new.dealt)
        for one, other in itertools.combinations(known.of, 2):
            assert distance(one, other) > splits.NEAR or known.of[one] == known.of[other]
        for hash, two in torn.items():
            assert {known.of[o] for o in known.of if distance(hash, o) <= splits.NEAR} >= set(two) and len(two) == 2
        again, torn_again = splits.assign(batch, known)
        assert again == splits.Splits() and torn_again.keys() == torn.keys(), "decided once"


@given(st.integers(1, 60))
def test_groups_of_a_class_are_dealt_in_turn_over_any_number_of_snapshots(count):
    generator = random.Random(count)
    known = splits.Splits()
    for _ in range(count):
        new, _ = splits.assign({f"{generator.getrandbits(128):032x}": "beagle"}, known)
        known = splits.Splits(known.of | new.of, known.dealt | new.dealt)
    assert list(known.of.values()) == list(itertools.islice(itertools.cycle(splits.DEAL), count))


def test_what_a_new_picture_brings_together_stays_as_it_was_and_the_new_one_is_left_out():
    far = f"{(1 << 16) - 1:032x}"
    between = f"{(1 << 8) - 1:032x}"  # 8 bits from either
    known = splits.Splits({"0" * 32: "train", far: "test"}, {"beagle": 2})
    assert splits.assign({between: "beagle"}, known) == (splits.Splits(), {between: ["test", "train"]})
    alone = splits.Splits({"0" * 32: "test"}, {"beagle": 2})
    new, torn = splits.assign({between: "beagle", far: "boxer"}, alone)
    assert new.of == {between: "test", far: "test"} and not torn, "through the one between them"


def changed(picture: Image.Image) -> dict[str, Image.Image]:
    """The same picture as it comes back from other programs."""
    small = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
    pressed = io.BytesIO()
    picture.save(pressed, "JPEG", quality=40)
    edge = picture.width // 100
    return {
        "smaller": small,
        "larger": picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.BICUBIC),
        "pressed": Image.open(pressed),
        "darker": ImageEnhance.Brightness(picture).enhance(0.8),
        "grey": picture.convert("L").convert("RGB"),
        "cropped": picture.crop((edge, edge, picture.width - edge, picture.height - edge)),
    }


def test_a_changed_copy_looks_like_its_picture_and_no_two_pictures_look_alike():
    pictures = [Image.open(io.BytesIO(data)) for name in ("spotted", "brindle") for data in drawn.pictures(name, 15, 5)]
    found = [difference_hash(picture) for picture in pictures]
    for picture, hash in zip(pictures, found, strict=True):
        for how, copy in changed(picture).items():
            assert distance(difference_hash(copy), hash) <= splits.NEAR, how
    assert min(distance(a, b) for a, b in itertools.combinations(found, 2)) > splits.NEAR


# --- Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("beagle", "beagle"),
        ("  Great \t Dane ", "Great Dane"),
        ("E\u0301pagneul", "Épagneul"),
        ("柴犬", "柴犬"),
        ("9", "9"),
        *((name, name) for name in ("कुत्ता", "สุนัข", "நாய்", "ខ្មែរ", "كَلْب", "דָּג", "می\u200cخواهم")),
    ],
)
def test_class_names_are_normalised(written: str, name: str):
    assert class_name(written) == name


@pytest.mark.parametrize("written", ["", " ", "_x", "a/b", "<b>", "a" * 64, "a\x00b", "a\ud800", "\u0301", "a\u202eb"])
def test_what_is_no_class_name_is_refused(written: str):
    with pytest.raises(BadLabel, match="is no class name"):
        class_name(written)


def test_spellings_of_one_class():
    assert len({fold(name) for name in ("Great Dane", "great_dane", "GREAT-DANE", "greatdane")}) == 1
    assert fold("great dane") != fold("great danes")


# --- Datasets --------------------------------------------------------------------------------------------------------


def label(
    sha: str, name: str, number: int = 0, registered: str = "2026-11-01", phash: int | None = None
) -> dict[str, str]:
    value = random.Random(sha).getrandbits(128) if phash is None else phash
    return {
        "sha256": sha, "class": name, "phash": f"{value:032x}", "bucket": "b", "key": f"labelled/{name}/{number}",
        "registered_at": registered,
    }  # fmt: skip


labels = st.lists(
    st.builds(
        label,
        st.sampled_from("abcdefghijklmnopqrst"),
        st.sampled_from(["beagle", "Beagle", "boxer", "great dane", "great_dane"]),
        st.integers(0, 9),
        st.sampled_from(["2026-11-01", "2026-11-02"]),
    ),
    max_size=60,
)


@given(labels, st.randoms())
def test_a_dataset_depends_on_content_not_on_order(items, shuffle):
    one = dataset.assemble(items, splits.Splits(), 2)
    two = dataset.assemble(shuffle.sample(items, len(items)), splits.Splits(), 2)
    assert one.hash == two.hash and one.manifest() == two.manifest() and one.new_splits == two.new_splits
    assert (one.left_out, one.left_out_pictures) == (two.left_out, two.left_out_pictures)
    assert not one.pictures or dataset.Dataset.from_manifest(one.manifest()).hash == one.hash


@given(labels)
def test_a_picture_takes_part_once_under_one_class_or_is_left_out_with_the_reason(items):
    found = dataset.assemble(items, splits.Splits(), 1)
    contents = [picture.sha256 for picture in found.pictures]
    assert len(contents) == len(set(contents))
    folded = {sha: {fold(i["class"]) for i in items if i["sha256"] == sha} for sha in {i["sha256"] for i in items}}
    contradictions = {sha for sha, names in folded.items() if len(names) > 1}
    assert contradictions == {each.sha256 for each in found.left_out_pictures}
    assert not contradictions & set(contents)
    for one in found.pictures:
        assert one.class_name in {i["class"] for i in items if i["sha256"] == one.sha256}
    assert len({fold(name) for name in found.classes}) == len(found.classes), "one spelling of each class"


@given(labels)
def test_of_two_spellings_most_pictures_decide(items):
    found = dataset.assemble(items, splits.Splits(), 1)
    for name in found.classes:
        count = {
            other: len({i["sha256"] for i in items if i["class"] == other})
            for other in {i["class"] for i in items if fold(i["class"]) == fold(name)}
        }
        assert count[name] == max(count.values())


def test_labels_in_another_spelling_are_left_out_with_what_to_do():
    items = [label(sha, "beagle") for sha in "abcde"] + [label(sha, "Beagle", registered="2026-10-01") for sha in "xyz"]
    found = dataset.assemble(items, splits.Splits(), 5)
    assert found.counts == {"beagle": 5}
    assert found.left_out == {
        "Beagle": "3 pictures are labelled 'Beagle', which is another spelling of 'beagle': label them 'beagle'"
    }


def test_as_many_pictures_in_each_spelling_the_first_registered_decides():
    items = [label("a", "beagle", registered="2026-11-02"), label("b", "Beagle", registered="2026-11-01")]
    assert "Beagle" in str(dataset.assemble(items, splits.Splits(), 1).left_out["beagle"])


def test_a_picture_that_would_join_two_splits_is_left_out_and_named():
    known = splits.Splits({"0" * 32: "train", f"{(1 << 16) - 1:032x}": "test"})
    found = dataset.assemble([label("a", "beagle", phash=(1 << 8) - 1)], known, 1)
    (left,) = found.left_out_pictures
    assert (left.sha256, left.origins) == ("a", ["s3://b/labelled/beagle/0"]) and "of test and of train" in left.reason
    assert found.new_splits == splits.Splits()


def test_a_class_of_which_every_picture_is_left_out_is_left_out_itself():
    items = [label("a", "beagle"), label("b", "beagle"), label("b", "boxer")]
    assert dataset.assemble(items, splits.Splits(), 1).left_out["boxer"].startswith("boxer has 0 of the 1 pictures")


def test_a_message_holds_no_more_reasons_than_a_person_reads():
    items = [label(str(n), name, n) for n in range(50) for name in ("beagle", "boxer")]
    reasons = dataset.assemble(items, splits.Splits(), 2).reasons
    assert len(reasons) == dataset.MOST_REASONS and reasons[-1] == "and 33 more (left_out.json has all)"


@settings(max_examples=20)
@given(st.integers(5, 40))
def test_a_class_of_few_pictures_has_some_of_each_split(count):
    items = [label(f"{name}{n}", name, n) for name in ("beagle", "boxer") for n in range(count)]
    found = dataset.assemble(items, splits.Splits(), 5)
    assert found.classes == ["beagle", "boxer"] and {p.split for p in found.pictures} == set(splits.SPLITS)
