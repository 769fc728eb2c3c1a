"""What holds for any batch, of any shape, far out or near the root."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meru_fast import ops

SIZES = {"rows": st.integers(1, 9), "width": st.integers(1, 12), "seed": st.integers(0, 2**31)}
SCALES = {"spread": st.floats(1e-3, 3.0), "curv": st.floats(0.1, 10.0)}


def batch(rows: int, width: int, seed: int, spread: float, curv: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, rows, width, generator=generator, dtype=torch.float64) * spread
    return ops.exp_map0(pair[0], curv), ops.exp_map0(pair[1], curv)


@settings(max_examples=60, deadline=None)
@given(**SIZES, **SCALES)
def test_contrastive_loss(rows, width, seed, spread, curv):
    """Not negative, the same for both directions and any order of the pairs; 0 for a batch of one."""
    image, text = batch(rows, width, seed, spread, curv)
    loss = ops.contrastive_loss(image, text, curv, 14.3)
    assert loss >= -1e-6
    torch.testing.assert_close(ops.contrastive_loss(text, image, curv, 14.3), loss, rtol=1e-5, atol=1e-6)
    order = torch.randperm(rows)
    torch.testing.assert_close(ops.contrastive_loss(image[order], text[order], curv, 14.3), loss, rtol=1e-5, atol=1e-6)
    if rows == 1:
        assert abs(loss.item()) < 1e-6


@settings(max_examples=60, deadline=None)
@given(**SIZES, **SCALES)
def test_entailment_loss(rows, width, seed, spread, curv):
    """Between 0 and half a turn; the mean over the pairs."""
    image, text = batch(rows, width, seed, spread, curv)
    loss = ops.entailment_loss(text, image, curv)
    assert 0 <= loss <= math.pi
    each = [ops.entailment_loss(text[row : row + 1], image[row : row + 1], curv) for row in range(rows)]
    torch.testing.assert_close(torch.stack(each).mean(), loss, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(**SIZES, **SCALES, data=st.data())
def test_topk_is_the_head_of_the_sorted_distances(rows, width, seed, spread, curv, data):
    image, text = batch(rows, width, seed, spread, curv)
    k = data.draw(st.integers(1, rows))
    values, indices = ops.topk(image, text, k, curv)
    assert (values.diff(dim=1) <= 0).all()
    inner = ops.pairwise_inner(image, text, curv)
    torch.testing.assert_close(inner.gather(1, indices).to(values.dtype), values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        inner.sort(dim=1, descending=True).values[:, :k].to(values.dtype), values, rtol=1e-5, atol=1e-6
    )


@settings(max_examples=60, deadline=None)
@given(**SIZES, **SCALES)
def test_log_map_undoes_exp_map(rows, width, seed, spread, curv):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, width, generator=generator, dtype=torch.float64) * spread
    vectors *= (9 / curv**0.5 / vectors.norm(dim=1, keepdim=True)).clamp(max=1)  # the lift saturates farther out
    torch.testing.assert_close(ops.log_map0(ops.exp_map0(vectors, curv), curv), vectors, rtol=1e-5, atol=1e-9)
