"""Exact nearest neighbours by Lorentz inner product, streamed over a gallery of any size."""

import torch
from torch import Tensor

from meru_fast import lorentz
from meru_fast.lorentz import Scalar, check_pairwise, check_points
from meru_fast.ops.arguments import rows, scalar
from meru_fast.ops.backend import active_backend

CHUNK = 1 << 22  # scores the PyTorch path holds at a time
POINTS = 1 << 20  # components of the gallery at a time: the passes over them stay in the cache
QUERIES = 1024
LAST = 0x7FFFFFFF
NONE = LAST << 32 | LAST  # behind every candidate


@torch.no_grad()
def topk(
    queries: Tensor, gallery: Tensor, k: int, curv: Scalar = 1.0, *, entailment: float | None = None
) -> tuple[Tensor, Tensor]:
    """The k gallery rows with the largest Lorentz inner product (= smallest distance) to each query.

    Exact, and the B x N score matrix never exists: memory is O(B k) plus one tile. Not differentiable. Gallery rows
    with a NaN are never found.

    Args:
        queries: [B, D], for example lifted images.
        gallery: [N, D], for example lifted captions; N below 2^31.
        k: at least 1; places beyond the number of candidates stay empty.
        curv: positive, a number or a tensor of one element.
        entailment: None, or the ``min_radius`` of the gallery's cones (MERU: 0.1): then only gallery rows whose cone
            contains the query are candidates, ``oxy_angle(gallery, query) <= half_aperture(gallery)``.

    Returns:
        values [B, k] fp32 (fp64 for fp64 inputs), Lorentz inner products in descending order, -inf in empty places;
        indices [B, k] int64, -1 in empty places. Of equal scores the lower index comes first.

    Raises:
        TypeError: integer points, a bool for ``entailment``.
        ValueError: k < 1, wrong shapes, negative ``entailment``, a `curv` that is not one positive number.
    """
    check_points(queries, gallery)
    check_pairwise(queries, gallery)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if isinstance(entailment, bool):
        raise TypeError("entailment takes the min_radius of the cones (0.1 in MERU) or None, not a bool")
    if entailment is not None and not entailment >= 0:
        raise ValueError(f"entailment, the min_radius of the cones, must not be negative, got {entailment}")
    curv = scalar("curv", curv, queries)
    delta, indices = _nearest(queries, gallery, k, curv, entailment)
    empty = delta == torch.inf
    values = (-1 - delta) / curv.to(delta.dtype)
    missing = k - delta.shape[1]  # a gallery of fewer than k rows
    return (
        torch.nn.functional.pad(values.masked_fill(empty, -torch.inf), (0, missing), value=-torch.inf),
        torch.nn.functional.pad(indices.masked_fill(empty, -1), (0, missing), value=-1),
    )


def _nearest(queries: Tensor, gallery: Tensor, k: int, curv: Tensor, entailment: float | None) -> tuple[Tensor, Tensor]:
    """``delta = -curv <x, y> - 1`` and index of the nearest k (at most), nearest first; inf where a place is empty."""
    if active_backend(queries, gallery) == "triton":
        from meru_fast.kernels import topk as kernels

        if k <= kernels.MAX_K:
            packed = kernels.candidates(rows(queries), rows(gallery), k, curv, entailment)
            return _unpack(_smallest(packed ^ NONE, k))
    dtype = torch.promote_types(torch.promote_types(queries.dtype, gallery.dtype), torch.float32)
    root = curv.to(dtype).sqrt()
    blocks = [_search(root * block.to(dtype), gallery, root, k, entailment) for block in queries.split(QUERIES)]
    delta, indices = zip(*blocks, strict=True)
    return torch.cat(delta), torch.cat(indices)


def _search(u: Tensor, gallery: Tensor, root: Tensor, k: int, entailment: float | None) -> tuple[Tensor, Tensor]:
    """``_nearest`` for a block of queries on the unit hyperboloid, a chunk of the gallery at a time."""
    best_delta, best_index = u.new_empty(len(u), 0), torch.empty(len(u), 0, dtype=torch.int64, device=u.device)
    rx = lorentz.norm(u)
    xi = lorentz.shifted_time(rx)
    step = max(k, min(CHUNK // max(1, len(u)), POINTS // gallery.shape[1]))
    for first in range(0, len(gallery), step):
        chunk = root * gallery[first : first + step].to(u.dtype)
        ry = lorentz.norm(chunk).T
        yi = lorentz.shifted_time(ry)
        inner = lorentz.gram(u, chunk)
        outside = None if entailment is None else ~_cone_contains(inner, ry, rx, 2 * entailment)
        delta = (
            inner.neg_().add_(yi).addr_(xi[:, 0], 1 + yi[0]).clamp_(min=0).nan_to_num_(nan=torch.inf, posinf=torch.inf)
        )
        if outside is not None:
            delta.masked_fill_(outside, torch.inf)
        index = torch.arange(first, first + len(chunk), device=u.device)[None]
        delta, index = _first(delta, index, k)
        best_delta, best_index = _first(torch.cat([best_delta, delta], 1), torch.cat([best_index, index], 1), k)
    return best_delta, best_index


def _first(delta: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row, smallest first, ties by lower index (which ascends within equal values)."""
    if delta.dtype == torch.float64:
        order = delta.sort(dim=1, stable=True).indices[:, :k]
        return delta.gather(1, order), index.expand(delta.shape).gather(1, order)
    packed = delta.view(torch.int32).to(torch.int64)  # the bits of a float >= 0 are ordered
    return _unpack(_smallest(packed.bitwise_left_shift_(32).bitwise_or_(index), k))


def _smallest(packed: Tensor, k: int) -> Tensor:
    return packed.topk(min(k, packed.shape[1]), dim=1, largest=False).values


def _unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """(delta fp32, index) of ``delta's bits << 32 | index``; infinite where there is none."""
    delta = (packed >> 32).to(torch.int32).view(torch.float32)
    return delta.masked_fill(packed == NONE, torch.inf), packed & LAST


def _cone_contains(inner: Tensor, apex: Tensor, point: Tensor, rim: float) -> Tensor:
    """Whether ``point`` lies in the cone at ``apex``, from norms and the product <u, v>: angle <= aperture."""
    along = inner / apex.clamp(min=torch.finfo(apex.dtype).tiny)
    across = ((point - along) * (point + along)).clamp_(min=0).sqrt_()
    apex_time, point_time = lorentz.time(apex), lorentz.time(point)
    total = torch.where(along > 0, apex_time * along + apex * point_time, 1.0)
    rise = ((along - apex) * ((along + apex) / total)).sub_((apex * across) * (apex * across / total))
    forward = torch.where(along > 0, rise, apex_time * along - apex * point_time)
    side = (apex - rim).clamp(min=0).sqrt() * (apex + rim).sqrt()
    return torch.where(apex > rim, across * side <= forward * rim, forward >= 0)
