import numpy as np

from meru_fast.data import keyed


def test_bits_never_change():
    """The order of every run ever made hangs on these numbers."""
    first = [int(x) for x in keyed.bits(0, np.arange(3))]
    assert first == [
        16793947846496867128,
        15963558336024545114,
        6304893083686547121,
    ]
    assert int(keyed.bits(1, 2, 3)) == 5556189170377431807


def test_every_part_of_the_key_counts():
    keys = [(a, b, c) for a in range(8) for b in range(8) for c in range(8)]
    assert len({int(keyed.bits(*key)) for key in keys}) == len(keys)
    assert keyed.bits(1, 2) != keyed.bits(2, 1)
    assert keyed.bits(0) != keyed.bits(0, 0)


def test_uniform_is_uniform_and_independent():
    draws = keyed.uniform(7, np.arange(50_000)[:, None], np.arange(4))
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, 20, (0, 1))[0]
    expected = draws.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-squared, 19 degrees: p = 0.001
    assert abs(np.corrcoef(draws.T)[np.triu_indices(4, 1)]).max() < 0.02


def test_permutation():
    first, second = keyed.permutation(1000, 1, 2), keyed.permutation(1000, 1, 3)
    assert sorted(first) == list(range(1000))
    assert (first != second).mean() > 0.99
    assert len(keyed.permutation(0, 1)) == 0
