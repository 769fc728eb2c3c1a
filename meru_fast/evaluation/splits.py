"""Which samples belong to which part of a dataset.

Most published splits slice a dataset in the order of TensorFlow Datasets. That order needs no TensorFlow: samples are
sorted by the md5 of (split name + sample key), and the keys are file names or running numbers
(tensorflow_datasets/core/hashing.py and shuffle.py; the keys are in each builder's ``_generate_examples``).
"""

import hashlib
import re
from collections.abc import Iterable

_SLICE = re.compile(r"(?P<name>[a-z]+)(?:\[(?P<start>\d+%?)?:(?P<stop>\d+%?)?\])?")


def tfds_order(split: str, keys: Iterable[str | int]) -> list[int]:
    """Positions of `keys` in the order in which TensorFlow Datasets stores the split named `split`."""
    salt = hashlib.md5(split.encode())

    def digest(key: str | int) -> bytes:
        hasher = salt.copy()
        hasher.update(str(key).encode())
        return hasher.digest()

    digests = [digest(key) for key in keys]
    return sorted(range(len(digests)), key=digests.__getitem__)


def base_name(source: str) -> str:
    """Name of the split that `source` slices: "train" for ``train[:80%]``."""
    return str(_parse(source)["name"])


def slice_of(source: str, total: int) -> slice:
    """The range that `source` (``train``, ``train[80%:]``, ``train[:4500]``) takes out of `total` samples.

    Percentages are rounded to the nearest sample, half to even, as TensorFlow Datasets does.
    """
    parts = _parse(source)

    def position(text: str | None, default: int) -> int:
        if text is None:
            return default
        return round(int(text[:-1]) * total / 100) if text.endswith("%") else min(int(text), total)

    return slice(position(parts["start"], 0), position(parts["stop"], total))


def _parse(source: str) -> dict[str, str | None]:
    match = _SLICE.fullmatch(source)
    if match is None:
        raise ValueError(f"split {source!r}: expected a name with an optional slice, such as train[:80%]")
    return match.groupdict()
