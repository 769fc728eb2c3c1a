import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meru_fast.data.order import EpochOrder, mixing, rank_share


def starts(counts):
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    block=st.integers(1, 16),
    blocks_per_window=st.integers(1, 8),
    seed=st.integers(0, 2**62),
)
def test_every_epoch_has_every_sample_once(counts, block, blocks_per_window, seed):
    order = EpochOrder(starts(counts), seed, block=block, window=block * blocks_per_window)
    for epoch in (0, 1):
        assert sorted(order[epoch, 0, sum(counts)].samples) == list(range(sum(counts)))


def test_any_stretch_equals_the_part_of_the_whole():
    order = EpochOrder(starts([37, 0, 64, 5, 200]), seed=3, block=8, window=32)
    whole = order[2, 0, 306]
    for start, stop in [(0, 306), (0, 1), (17, 17), (30, 70), (111, 305), (305, 306)]:
        part = order[2, start, stop]
        assert part.samples.tolist() == whole.samples[start:stop].tolist()
        assert part.slots.tolist() == whole.slots[start:stop].tolist()
    with pytest.raises(IndexError, match="0 to 307"):
        order[2, 0, 307]


def test_epochs_and_seeds_differ():
    counts = starts([100] * 10)
    order = EpochOrder(counts, seed=1, block=10, window=100)
    first = order[0, 0, 1000].samples
    assert (first == order[1, 0, 1000].samples).mean() < 0.01
    assert (first == EpochOrder(counts, seed=2, block=10, window=100)[0, 0, 1000].samples).mean() < 0.01
    assert (first == EpochOrder(counts, seed=1, block=10, window=100)[0, 0, 1000].samples).all()


def test_the_order_never_changes():
    """A run resumed with a later version must go on with the same samples."""
    order = EpochOrder(starts([50, 7, 50]), seed=5, block=4, window=20)
    assert order[3, 10, 22].samples.tolist() == [
        77,
        45,
        78,
        106,
        98,
        35,
        51,
        93,
        2,
        34,
        97,
        94,
    ]


def test_read_ahead_is_bounded_and_reads_are_blocks():
    order = EpochOrder(starts([1000] * 40), seed=0, block=50, window=2000)
    samples, slots = order[0, 0, 40_000]
    for start in range(0, 40_000, 2000):  # windows of 40 blocks of 50
        stretch = samples[start : start + 2000]
        assert len(np.unique(stretch // 50)) == 40
        assert set(slots[start : start + 2000]) == set(range(start // 50, start // 50 + 40))
    for sample, slot in zip(samples[:100], slots[:100], strict=True):
        first, stop = order.block(0, int(slot))
        assert first <= sample < stop
        assert stop - first == 50


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_next_window_is_read_evenly_while_this_one_is_consumed(world_size):
    order = EpochOrder(starts([1000] * 40), seed=0, block=50, window=10_000)  # 4 windows of 200 blocks
    for epoch, window, following in [(0, 0, (0, 1)), (2, 2, (2, 3)), (2, 3, (3, 0))]:
        read = []
        for first in range(10_000 * window, 10_000 * (window + 1), 500):
            for rank in range(world_size):
                of_epoch, slots = order.upcoming(epoch, first, first + 500, rank, world_size)
                assert of_epoch == following[0]
                assert len(slots) <= 200 / 20 / world_size + 1
                read += slots.tolist()
        assert sorted(read) == list(range(200 * following[1], 200 * (following[1] + 1)))


def test_a_rank_reads_ahead_what_it_will_need():
    order = EpochOrder(starts([1000] * 40), seed=0, block=50, window=10_000)
    ahead = {int(s) for first in range(0, 10_000, 500) for s in order.upcoming(0, first, first + 500, 1, 4)[1]}
    needed = set()
    for first in range(10_000, 20_000, 500):
        slots = order[0, first, first + 500].slots
        needed |= set(slots[rank_share(slots, 1, 4)].tolist())
    assert len(needed - ahead) <= 0.3 * len(needed)  # the borders of its stretch move a little from batch to batch


def test_mixing_is_close_to_a_perfect_shuffle():
    """Shards of one subreddit each, as in RedCaps: reading them in order would put one group in a batch."""
    counts = np.full(1200, 100)
    groups = np.repeat(np.arange(1200) // 4, 100)  # 300 subreddits of 4 shards
    result = mixing(EpochOrder(starts(counts), seed=0, block=16, window=16384), groups, batch_size=512)
    assert result.groups > 0.88 * result.ideal
    assert result.same_next < 1.5 * result.ideal_same_next
    unmixed = mixing(EpochOrder(starts(counts), seed=0, block=100, window=100), groups, batch_size=512)
    assert unmixed.groups < 10


def test_ranks_share_a_batch_and_read_their_own_blocks():
    order = EpochOrder(starts([1000] * 64), seed=0, block=64, window=16384)
    _, slots = order[0, 2048, 4096]
    for world_size in (1, 2, 4, 8):
        shares = [rank_share(slots, rank, world_size) for rank in range(world_size)]
        assert sorted(np.concatenate(shares)) == list(range(2048))
        assert {len(share) for share in shares} == {2048 // world_size}
        assert all((np.diff(share) > 0).all() for share in shares)
        read = sum(len(np.unique(slots[share])) for share in shares)
        assert read <= len(np.unique(slots)) + world_size


def test_pickled_order_goes_on():
    order = EpochOrder(starts([30, 30]), seed=0, block=4, window=8)
    expected = order[1, 5, 25].samples
    assert (pickle.loads(pickle.dumps(order))[1, 5, 25].samples == expected).all()


def test_impossible_sizes():
    with pytest.raises(ValueError, match="block 10 and window 5"):
        EpochOrder(starts([30]), seed=0, block=10, window=5)


def test_twelve_million_samples_cost_little():
    import time

    order = EpochOrder(starts([1000] * 12_000), seed=0)
    start = time.process_time()
    picks = order[7, 9_000_000, 9_002_048]
    assert time.process_time() - start < 1.0  # measured 0.03 s; where it resumes does not matter
    assert len(np.unique(picks.samples)) == 2048
