"""Splits: slices, and the order of TensorFlow Datasets without it."""

import pytest

from meru_fast.evaluation.protocol import names, protocols
from meru_fast.evaluation.splits import base_name, slice_of, tfds_order


def test_order_is_that_of_tensorflow_datasets():
    """The constants come from tensorflow_datasets 4.9.10 (``core/hashing.py``), sorting the same keys by its hash."""
    assert tfds_order("train", range(12)) == [6, 5, 4, 10, 0, 8, 3, 1, 9, 7, 11, 2]
    assert tfds_order("validation", range(12)) == [3, 9, 0, 8, 7, 10, 11, 4, 2, 5, 1, 6]
    files = [f"AnnualCrop_AnnualCrop_{number}.jpg" for number in range(8)]
    assert tfds_order("train", files) == [2, 1, 5, 7, 3, 0, 4, 6]


@pytest.mark.parametrize(
    ("source", "total", "expected"),
    [
        ("test", 7, range(7)),
        ("train[:80%]", 3680, range(2944)),
        ("train[80%:]", 3680, range(2944, 3680)),
        ("train[10%:20%]", 31500, range(3150, 6300)),
        ("train[5000:10000]", 27000, range(5000, 10000)),
        ("train[:80%]", 3059, range(2447)),  # 2447.2
        ("train[:50%]", 5, range(2)),  # 2.5, half to even
        ("validation[:5000]", 24, range(24)),
    ],
)
def test_slices(source, total, expected):
    assert range(total)[slice_of(source, total)] == expected


def test_bad_slices_are_refused():
    for source in ("train[", "train[80%]", "train[-5:]", "", "Train[:1]"):
        with pytest.raises(ValueError, match="expected a name with an optional slice"):
            slice_of(source, 10)


def test_protocol_counts():
    """22 datasets, 135 templates, and the numbers of classes that the paper's sources state."""
    every = protocols()
    assert len(every) == 22
    assert len(names("classification")) == 20
    assert names("retrieval") == ["coco", "flickr30k"]
    assert sum(len(protocol.prompts) for protocol in every.values()) == 135
    assert all(prompt.count("{}") == 1 for protocol in every.values() for prompt in protocol.prompts)
    assert {name: len(every[name].class_names) for name in ("imagenet", "caltech101", "sun397", "clevr")} == {
        "imagenet": 1000,
        "caltech101": 102,
        "sun397": 397,
        "clevr": 8,
    }
    assert [base_name(source) for source in every["clevr"].splits.values()] == ["train", "train", "validation"]
