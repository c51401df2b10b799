"""Reading S3's events, and the order of the versions of one key."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.events import MalformedEvent, ObjectEvent
from tests.makers import events

hexadecimal = st.text("0123456789ABCDEF", min_size=1, max_size=64)


def test_reads_the_document_that_aws_sends():
    event = ObjectEvent.from_body(events.object_created("b", "inbox/ä b+c%20.jpg", size=7, version="v1"))
    assert (event.bucket, event.key, event.size, event.version_id) == ("b", "inbox/ä b+c%20.jpg", 7, "v1")
    assert not event.deleted


def test_a_replayed_event_survives_the_round_trip():
    event = ObjectEvent.from_body(events.object_created("b", "inbox/1.jpg", version="v1"))
    again = ObjectEvent.from_body(event.to_body(replayed=True, postponed=3))
    assert (again.image, again.version_id, again.sequencer, again.size) == (
        event.image, event.version_id, event.sequencer, event.size,
    )  # fmt: skip
    assert again.replayed and again.postponed == 3


@given(hexadecimal, hexadecimal)
def test_sequencers_of_unequal_length_compare_as_aws_says(a: str, b: str):
    """AWS: right-pad the shorter with zeros, then compare as text."""
    width = max(len(a), len(b))
    expected = a.ljust(width, "0") < b.ljust(width, "0")
    first, second = (ObjectEvent.from_body(events.object_created("b", "k", sequencer=s)) for s in (a, b))
    assert (first.sequencer < second.sequencer) == expected


@pytest.mark.parametrize("body", ["", "hello", "{}", "[]", "null", '{"detail": {"bucket": {}}}'])
def test_what_is_no_event_is_named_as_such(body: str):
    with pytest.raises(MalformedEvent, match="not an S3 object event"):
        ObjectEvent.from_body(body)
