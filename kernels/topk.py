"""Exact streaming top-k by Lorentz inner product: a program keeps the k best of its queries while gallery tiles pass.

Ranking is by ``delta = -c <x, y> - 1 >= 0``, which keeps its digits where the inner product does not. ``delta`` and the
gallery index are packed into one int64 whose order is "nearer first, lower index first"; 0 means no candidate. A tile
is sorted only when it improves some query of the block, which becomes rare as the gallery passes. The gallery is split
over programs when there are few queries; the caller joins the parts' winners. Nothing of size B x N exists.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .distance import gram_tile, row_norms
from .entailment import tangent
from .geometry import LAUNCH, WARPS, safe_inverse, shifted_time, unit_time

MAX_K = 64  # beyond, the sorting network spills
BLOCK_M, BLOCK_K = 32, 32
MIN_BLOCK_N = 64
PROGRAMS = 512  # enough to fill a large GPU; beyond, the gallery is not split further
LAST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def cone_contains(inner, apex, point, rim):
    """Whether ``point`` lies in the cone at ``apex``, from norms and the product <u, v>: angle <= aperture."""
    along = inner * safe_inverse(apex)
    across = tl.sqrt_rn(tl.maximum((point - along) * (point + along), 0.0))
    forward = tangent(apex, unit_time(apex), apex, along - apex, across, unit_time(point))
    side = tl.sqrt_rn(tl.maximum(apex - rim, 0.0)) * tl.sqrt_rn(apex + rim)
    return tl.where(apex > rim, across * side <= forward * rim, forward >= 0.0)


@triton.jit
def topk_kernel(
    x_ptr, y_ptr, rx_ptr, ry_ptr, curv_ptr, out_ptr, m, n, D, x_stride, y_stride, tiles_per_part, rim,
    CONES: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    root = tl.sqrt_rn(tl.load(curv_ptr).to(tl.float32))
    rx = root * tl.load(rx_ptr + row, mask=row < m, other=0.0)
    best = tl.zeros([BLOCK_M, K], dtype=tl.int64)
    last = tl.minimum((part + 1) * tiles_per_part, tl.cdiv(n, BLOCK_N))
    for tile in range(part * tiles_per_part, last):
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        ry = root * tl.load(ry_ptr + column, mask=column < n, other=0.0)
        inner = gram_tile(
            x_ptr, y_ptr, row, column, m, n, D, x_stride, y_stride, root + 0.0 * rx, root + 0.0 * ry,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        xi = shifted_time(rx)[:, None]
        yi = shifted_time(ry)[None, :]
        delta = tl.maximum(xi + yi + xi * yi - inner, 0.0)
        candidate = (row < m)[:, None] & (column < n)[None, :] & (inner == inner)  # a NaN is no match
        if CONES:
            candidate &= cone_contains(inner, ry[None, :], rx[:, None], rim)
        nearness = delta.to(tl.int32, bitcast=True) ^ LAST  # the bits of a float >= 0 are ordered
        packed = (nearness.to(tl.int64) << 32) | (column ^ LAST)[None, :]
        packed = tl.where(candidate, packed, 0)
        if tl.max((packed > tl.min(best, axis=1)[:, None]).to(tl.int32)) > 0:
            found = tl.topk(packed, K)  # both are sorted, so the larger of best[i] and found[K - 1 - i] are the K best
            best = tl.sort(tl.maximum(best, tl.flip(found, 1)), descending=True)
    slot = (row[:, None] * tl.num_programs(1) + part) * K + tl.arange(0, K)[None, :]
    tl.store(out_ptr + slot, best, mask=(row < m)[:, None])


def candidates(x: Tensor, y: Tensor, k: int, curv: Tensor, min_radius: float | None) -> Tensor:
    """Packed candidates [m, parts * K] of the queries x [m, D] in the gallery y [n, D], k <= MAX_K; 0 where missing."""
    m, n = len(x), len(y)
    width = triton.next_power_of_2(k)
    block_n = max(MIN_BLOCK_N, width)
    rows, tiles = triton.cdiv(m, BLOCK_M), triton.cdiv(n, block_n)
    parts = max(1, min(tiles, PROGRAMS // max(1, rows)))
    per_part = max(1, triton.cdiv(tiles, parts))
    parts = max(1, triton.cdiv(tiles, per_part))
    out = torch.empty(m, parts * width, dtype=torch.int64, device=x.device)
    if m:
        with torch.cuda.device_of(x):
            topk_kernel[(rows, parts)](
                x, y, row_norms(x), row_norms(y), curv, out, m, n, x.shape[1], x.stride(0), y.stride(0), per_part,
                2.0 * (min_radius or 0.0), CONES=min_radius is not None, K=width,
                BLOCK_M=BLOCK_M, BLOCK_N=block_n, BLOCK_K=BLOCK_K, **LAUNCH,
            )  # fmt: skip
    return out


def compile_specs() -> list:
    """What ``kernels.resources`` compiles: k = 16 with and without cones, and the largest k."""
    from .specs import describe

    found = []
    for k, cones in ((16, False), (16, True), (MAX_K, False)):
        block_n = max(MIN_BLOCK_N, k)
        constexprs = {"CONES": cones, "K": k, "BLOCK_M": BLOCK_M, "BLOCK_N": block_n, "BLOCK_K": BLOCK_K}
        name = f"topk[{'cones,' if cones else ''}k={k}]"
        found.append(describe(name, topk_kernel, constexprs, types={"out_ptr": "*i64"}, num_warps=WARPS,
                              outputs=BLOCK_M * block_n))  # fmt: skip
    return found
