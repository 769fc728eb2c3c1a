"""The order of samples: a pure function of (seed, epoch), with bounded read-ahead.

Shards of RedCaps hold one subreddit each, so samples must be mixed over shards, yet disks and object stores want long
reads. Hence two levels. Every shard is cut into *blocks* of neighbouring samples; an epoch shuffles the blocks of all
shards, then walks through them in *windows* of many blocks, shuffling the samples of a window. What has been read
and not yet used never exceeds two windows, the current one and the next, and reads are as long as a block.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from meru_fast.data import keyed

BLOCK_SAMPLES = 32
WINDOW_SAMPLES = 131072


class Picks(NamedTuple):
    """Samples in training order.

    Attributes:
        samples: int64 [n], numbers in the shard set.
        slots: int64 [n], where the block of each sample comes in this epoch; neighbours on disk share a slot.
    """

    samples: np.ndarray
    slots: np.ndarray


class EpochOrder:
    """All epochs of one shard set. Any stretch of any epoch costs the same, so resuming is only a matter of asking.

    Args:
        starts: int64 [shards + 1], number of the first sample of every shard, and the total.
        seed: of the whole run.
        block: samples that are read together.
        window: samples that are shuffled together; the read-ahead. At least a few batches.

    Raises:
        ValueError: a window smaller than a block, or a block of none.
    """

    def __init__(self, starts: np.ndarray, seed: int, *, block: int = BLOCK_SAMPLES, window: int = WINDOW_SAMPLES):
        if block < 1 or window < block:
            raise ValueError(f"need 1 <= block <= window, got block {block} and window {window}")
        self.seed = seed
        self.block_samples = block
        self.window_samples = window
        self.num_samples = int(starts[-1])
        counts = np.diff(starts)
        per_shard = -(-counts // block)
        within = np.arange(per_shard.sum()) - np.repeat(np.cumsum(per_shard) - per_shard, per_shard)
        self._block_starts = np.repeat(starts[:-1], per_shard) + within * block
        self._block_sizes = np.minimum(block, np.repeat(starts[1:], per_shard) - self._block_starts)
        # Windows of equal length: a short last one would mix badly.
        num_windows = -(-len(self._block_starts) // max(1, window // block))
        self._window_slots = np.linspace(0, len(self._block_starts), num_windows + 1).astype(np.int64)
        self._epoch = lru_cache(2)(self._shuffle_blocks)
        self._window = lru_cache(2)(self._shuffle_window)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_epoch", "_window")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._epoch = lru_cache(2)(self._shuffle_blocks)
        self._window = lru_cache(2)(self._shuffle_window)

    def __getitem__(self, stretch: tuple[int, int, int]) -> Picks:
        """The samples at positions [start, stop) of an epoch, asked for as `order[epoch, start, stop]`.

        Raises:
            IndexError: positions outside the epoch.
        """
        epoch, start, stop = stretch
        if not 0 <= start <= stop <= self.num_samples:
            raise IndexError(f"positions {start} to {stop} of an epoch of {self.num_samples} samples")
        starts = self._epoch(epoch)[1]
        parts = []
        while start < stop:
            window = int(np.searchsorted(starts, start, "right")) - 1
            end = min(stop, int(starts[window + 1]))
            picks = self._window(epoch, window)
            parts.append([part[start - starts[window] : end - starts[window]] for part in picks])
            start = end
        if not parts:
            return Picks(np.zeros(0, np.int64), np.zeros(0, np.int64))
        return Picks(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def block(self, epoch: int, slot: int) -> tuple[int, int]:
        """First sample and end of the block that comes at `slot` of an epoch."""
        index = self._epoch(epoch)[0][slot]
        start = int(self._block_starts[index])
        return start, start + int(self._block_sizes[index])

    def upcoming(self, epoch: int, start: int, stop: int, rank: int = 0, world_size: int = 1) -> tuple[int, np.ndarray]:
        """What to read ahead while the positions [start, stop) of an epoch are consumed: an epoch and block slots.

        A window's blocks are read evenly while the window before it is consumed, not all at once when it begins.
        """
        starts = self._epoch(epoch)[1]
        window = int(np.searchsorted(starts, start, "right")) - 1
        begin, end = starts[window : window + 2]
        consumed = ((start - begin) / (end - begin), (min(stop, end) - begin) / (end - begin))
        epoch, window = (epoch, window + 1) if window + 2 < len(starts) else (epoch + 1, 0)
        first, last = self._window_slots[window : window + 2]
        mine = (last - first) / world_size  # a rank's samples come from a stretch of the window's blocks: `rank_share`
        return epoch, np.arange(*(int(first + mine * (rank + part)) for part in consumed))

    def _shuffle_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of blocks, and the position at which each window starts (and the end)."""
        blocks = keyed.permutation(len(self._block_starts), self.seed, epoch, keyed.BLOCKS)
        ends = np.concatenate([[0], np.cumsum(self._block_sizes[blocks])])
        return blocks, ends[self._window_slots]

    def _shuffle_window(self, epoch: int, window: int) -> Picks:
        first, stop = self._window_slots[window : window + 2]
        blocks = self._epoch(epoch)[0][first:stop]
        sizes = self._block_sizes[blocks]
        slots = np.repeat(np.arange(first, stop), sizes)
        within = np.arange(len(slots)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        samples = np.repeat(self._block_starts[blocks], sizes) + within
        mixed = keyed.permutation(len(samples), self.seed, epoch, keyed.WINDOW, window)
        return Picks(samples[mixed], slots[mixed])


def rank_share(slots: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Which samples of a global batch this rank takes: positions int64 [n / world_size], in batch order.

    A rank takes a stretch of block slots, so that a machine reads about 1/world_size of the blocks instead of all of
    them. Which rank holds a sample does not matter to a loss over the global batch.
    """
    size = len(slots) // world_size
    by_block = np.argsort(slots, kind="stable")
    return np.sort(by_block[rank * size : (rank + 1) * size])


class Mixing(NamedTuple):
    """How well batches are mixed: means over the batches looked at."""

    groups: float  # different groups (shards or subreddits) in a batch
    ideal: float  # the same under a perfect shuffle of the epoch
    same_next: float  # chance that two neighbours in a batch share a group
    ideal_same_next: float


def mixing(order: EpochOrder, groups: np.ndarray, batch_size: int, batches: int = 50, epoch: int = 0) -> Mixing:
    """Measure how an epoch's order mixes groups: int [samples], the shard or the subreddit of every sample."""
    steps = np.unique(np.linspace(0, order.num_samples // batch_size - 1, batches).astype(int))
    picked = [groups[order[epoch, s * batch_size, (s + 1) * batch_size].samples] for s in steps]
    share = np.bincount(groups) / len(groups)
    return Mixing(
        groups=float(np.mean([len(np.unique(batch)) for batch in picked])),
        ideal=float(np.sum(1 - (1 - share) ** batch_size)),
        same_next=float(np.mean([np.mean(batch[1:] == batch[:-1]) for batch in picked])),
        ideal_same_next=float(np.sum(share**2)),
    )
