"""Random numbers as a pure function of integers: no state to save, the same on every rank, worker and numpy version.

The generator is the finaliser of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014), folded over the key.
"""

import numpy as np

# What a draw is for is part of its key, so that no two uses share a stream.
SET, BLOCKS, WINDOW, CROP, PREFIX, REPLACEMENT, SYNTHETIC = range(7)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


def bits(*key: int | np.ndarray) -> np.ndarray:
    """64 random bits for every key; integers and integer arrays broadcast against each other.

    Returns:
        uint64 array of the broadcast shape.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for part in key:
            state = _mix(state * _MIX1 + _mix(np.asarray(part).astype(np.uint64) + _GOLDEN) + _GOLDEN)
    return state


def uniform(*key: int | np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1) for every key."""
    return (bits(*key) >> np.uint64(11)) * 2.0**-53


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n), int64 [n]."""
    return np.argsort(bits(*key, np.arange(n)), kind="stable")
