"""The drawn dogs: the same for the same seed, different otherwise, and told apart by their coat alone."""

import io
import itertools
import time

import numpy as np
import pytest
from PIL import Image

from local.demo.pictures import PATTERNS, draw, pictures


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_picture_is_square_rgb_of_the_size_that_was_asked_for(pattern):
    image = draw(pattern, np.random.default_rng(1), 96)
    assert (image.mode, image.size) == ("RGB", (96, 96))


def test_the_same_seed_draws_the_same_bytes_whatever_the_count():
    few, many = list(pictures("merle", 2, seed=3)), list(pictures("merle", 4, seed=3))
    assert few == many[:2]


def test_no_two_pictures_of_any_class_or_seed_are_alike():
    drawn = [data for pattern in PATTERNS for seed in (1, 2) for data in pictures(pattern, 3, seed, 64)]
    assert len(set(drawn)) == len(drawn)


def test_pictures_are_jpegs_that_decode():
    for data in itertools.islice(pictures("saddle", 2, seed=1), 2):
        image = Image.open(io.BytesIO(data))
        image.load()
        assert image.format == "JPEG"


def test_colours_do_not_give_the_class_away():
    """A nearest-centroid classifier on the mean colours of whole pictures does hardly better than guessing."""
    names = list(PATTERNS)

    def colours(seed):
        return np.array(
            [
                [
                    np.asarray(Image.open(io.BytesIO(data)).resize((2, 2))).ravel()
                    for data in pictures(name, 24, seed, 64)
                ]
                for name in names
            ],
            float,
        )

    centroids = colours(1).mean(axis=1)
    right = 0
    for truth, group in enumerate(colours(2)):
        distance = ((group[:, None] - centroids[None]) ** 2).sum(-1)
        right += (distance.argmin(1) == truth).sum()
    chance = 1 / len(names)
    assert right / (24 * len(names)) < chance + 0.15


def test_an_unknown_pattern_is_an_error():
    with pytest.raises(KeyError):
        draw("plaid", np.random.default_rng(1), 64)


def test_drawing_is_quick_enough_for_a_demo():
    rng = np.random.default_rng(1)
    began = time.process_time()
    for _ in range(10):
        draw("spotted", rng, 128)
    assert (time.process_time() - began) / 10 < 0.05
