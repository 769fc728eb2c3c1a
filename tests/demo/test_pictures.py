"""Captions tell the truth about the pictures, as far as pixels can show."""

from itertools import pairwise

import numpy as np
import pytest

from meru_fast.demo.pictures import COLOURS, DIGIT_NAMES, RELATIONS, SHAPES, SIZE, draw_digit, draw_pair, draw_scene


def ink(image, colour: str) -> np.ndarray:
    """Where the pixels are near a colour."""
    return np.abs(np.asarray(image, float) - COLOURS[colour]).max(axis=-1) < 30


def things(caption: str) -> tuple[list[str], str, list[str]]:
    """The words of both things and the relation between them."""
    relation = next(name for name in RELATIONS if f" {name} " in caption)
    first, second = caption.split(f" {relation} ")
    return first.split()[1:], relation, second.split()[1:]


@pytest.mark.parametrize("seed", range(40))
def test_pairs_lie_as_the_caption_says(seed):
    picture = draw_pair(np.random.default_rng(seed))
    first, relation, second = things(picture.ladder[-1])
    centres = []
    for size, colour, shape in (first, second):
        assert shape in SHAPES
        rows, columns = np.nonzero(ink(picture.image, colour))
        share = max(np.ptp(rows), np.ptp(columns)) / SIZE
        assert (share > 0.28) == (size == "large")
        centres.append((rows.mean(), columns.mean()))
    (row, column), (other_row, other_column) = centres
    truth = {
        "left of": column < other_column,
        "right of": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }
    assert truth[relation]


@pytest.mark.parametrize("seed", range(20))
def test_each_rung_says_more_than_the_one_above(seed):
    ladder = draw_scene(np.random.default_rng(seed)).ladder
    assert ladder[0] == "a shape"
    assert len(ladder) in (4, 5)
    for upper, lower in pairwise(ladder[1:]):
        assert set(upper.split()) - {"a", "an", "shape"} <= set(lower.split())
    words = [len(rung.split()) for rung in ladder]
    assert words == sorted(words)


def test_digits_are_inked_where_the_original_is():
    pixels = np.zeros((8, 8))
    pixels[1:7, 3:5] = 16
    picture = draw_digit(pixels, 1, np.random.default_rng(0))
    assert picture.ladder == ("a digit", "a handwritten number", "a handwritten one")
    grey = np.asarray(picture.image.convert("L"), float)
    assert picture.image.size == (SIZE, SIZE)
    assert grey[SIZE // 2, SIZE // 2] < 120 < 200 < grey[SIZE // 2, 5]
    assert len(DIGIT_NAMES) == 10


def test_the_seed_decides_every_pixel():
    first, again, other = (draw_scene(np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.ladder == again.ladder
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    assert not np.array_equal(np.asarray(first.image), np.asarray(other.image))
