"""Lorentz inner products and distances: all pairs (tiled, epilogue fused) and given pairs (whole rows in registers).

All pairs: the row norms are taken once, then every tile is one matrix product whose epilogue turns it into the result,
so the [B1, B2] matrix is written once and never read. Rows are multiplied as three tf32 products (tf32x3: the accuracy
of fp32 on the tensor cores). The backward needs two plain matrix products with a [B1, B2] weight and lives in
``meru_fast.ops.distance``.

Given pairs: one kernel each way; the distance goes through ``geometry.chord``, which cancels nowhere. With
``u - v = perp + par axis``, ``T = u_t + v_t`` and ``A = T/2 perp + (1 + cosh d)/T par axis`` the gradient is
``dd/du = A / (u_t sinh d)``, ``dd/dv = -A / (v_t sinh d)``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .geometry import LAUNCH, WARPS, arcosh1p, asinh, chord, hypot, row_norm, safe_inverse, shifted_time, unit_time

TILE = 2048  # elements of one operand that a program of the row kernels holds
FAR = tl.constexpr(2.0**60)  # rows beyond are pulled back here, the logarithm of the factor is added to their distances
PAIR_BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8}


@triton.jit
def row_norm_kernel(x_ptr, r_ptr, n, D, stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (row < n)[:, None] & (column < D)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(r_ptr + row, row_norm(x), mask=row < n)


@triton.jit
def tile_of_program(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Tiles in bands of GROUP rows of tiles, so that neighbours share their operands in L2."""
    program = tl.program_id(0)
    wide = tl.cdiv(n, BLOCK_N)
    band = program // (GROUP * wide)
    height = tl.minimum(tl.cdiv(m, BLOCK_M) - band * GROUP, GROUP)
    inner = program - band * GROUP * wide
    return band * GROUP + inner % height, inner // height


@triton.jit
def gram_tile(
    x_ptr, y_ptr, row, column, m, n, D, x_stride, y_stride, x_factor, y_factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``(x_factor x) @ (y_factor y)^T`` for the given rows, fp32-faithful; a factor per row."""
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        inside = start + k < D
        x_inside = (row < m)[:, None] & inside[None, :]
        y_inside = (column < n)[:, None] & inside[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + (start + k)[None, :], mask=x_inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + column[:, None] * y_stride + (start + k)[None, :], mask=y_inside, other=0.0).to(tl.float32)
        x *= x_factor[:, None]
        y *= y_factor[:, None]
        total = tl.dot(x, tl.trans(y), total, input_precision="tf32x3")
    return total


@triton.jit
def pairwise_kernel(
    x_ptr, y_ptr, rx_ptr, ry_ptr, curv_ptr, out_ptr, m, n, D, x_stride, y_stride,
    DISTANCE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of_program(m, n, BLOCK_M, BLOCK_N, GROUP)
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    curv = tl.load(curv_ptr).to(tl.float32)
    root = tl.sqrt_rn(curv)
    rx = root * tl.load(rx_ptr + row, mask=row < m, other=0.0)
    ry = root * tl.load(ry_ptr + column, mask=column < n, other=0.0)
    far_x = tl.maximum(rx / FAR, 1.0)
    far_y = tl.maximum(ry / FAR, 1.0)
    inner = gram_tile(
        x_ptr, y_ptr, row, column, m, n, D, x_stride, y_stride, root / far_x, root / far_y, BLOCK_M, BLOCK_N, BLOCK_K
    )
    rx /= far_x
    ry /= far_y
    if DISTANCE:
        xi = shifted_time(rx)[:, None]
        yi = shifted_time(ry)[None, :]
        arc = arcosh1p(xi + yi + xi * yi - inner)
        result = (arc + tl.log(far_x)[:, None] + tl.log(far_y)[None, :]) / root
    else:
        result = (inner - unit_time(rx)[:, None] * unit_time(ry)[None, :]) / curv * far_x[:, None] * far_y[None, :]
    tl.store(out_ptr + row[:, None] * n + column[None, :], result, mask=(row < m)[:, None] & (column < n)[None, :])


@triton.jit
def load_pair(x_ptr, y_ptr, row, n, D, x_stride, y_stride, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    inside = (row < n)[:, None] & (column < D)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row[:, None] * y_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    return x, y, inside


@triton.jit
def elementwise_fwd_kernel(
    x_ptr, y_ptr, curv_ptr, out_ptr, n, D, x_stride, y_stride,
    DISTANCE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x, y, _ = load_pair(x_ptr, y_ptr, row, n, D, x_stride, y_stride, BLOCK_D)
    root = tl.sqrt_rn(tl.load(curv_ptr).to(tl.float32))
    if DISTANCE:
        separation, _, _, _ = chord(x, y, root)
        result = 2.0 * asinh(0.5 * separation) / root
    else:
        result = tl.sum(x * y, axis=1) - hypot(row_norm(x), 1.0 / root) * hypot(row_norm(y), 1.0 / root)
    tl.store(out_ptr + row, result, mask=row < n)


@triton.jit
def elementwise_bwd_kernel(
    g_ptr, x_ptr, y_ptr, curv_ptr, dx_ptr, dy_ptr, partial_ptr, n, D, x_stride, y_stride,
    DISTANCE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x, y, inside = load_pair(x_ptr, y_ptr, row, n, D, x_stride, y_stride, BLOCK_D)
    g = tl.load(g_ptr + row, mask=row < n, other=0.0).to(tl.float32)
    curv = tl.load(curv_ptr).to(tl.float32)
    root = tl.sqrt_rn(curv)
    if DISTANCE:
        length, perp, par, axis = chord(x, y, root)
        half = unit_time(0.5 * length)
        inverse = safe_inverse(length)
        tu = unit_time(root * row_norm(x))
        tv = unit_time(root * row_norm(y))
        across = (0.5 * inverse) * ((tu + tv) / tu)  # of perp / half: sinh d = length half overflows far out
        along = (2.0 * inverse / half + 0.5 * length / half) * (par / (tu + tv)) / tu
        step = across[:, None] * (perp / half[:, None]) + along[:, None] * axis
        dx = g[:, None] * step
        dy = -(g * (tu / tv))[:, None] * step
        across *= row_norm(perp) / half
        square = (across * length) * (across * half) + (along * length) * (along * half)
        dcurv = g * (square * (tu / tv) - 2.0 * asinh(0.5 * length)) / (2.0 * curv * root)
    else:
        tx = hypot(row_norm(x), 1.0 / root)
        ty = hypot(row_norm(y), 1.0 / root)
        dx = g[:, None] * (y - (ty / tx)[:, None] * x)
        dy = g[:, None] * (x - (tx / ty)[:, None] * y)
        dcurv = g * (ty / tx + tx / ty) / (2.0 * curv * curv)
    offset = row[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dy_ptr + offset, dy.to(dy_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(row < n, dcurv, 0.0)))


def row_blocks(width: int) -> dict[str, int]:
    """Launch configuration of the row kernels for rows of this many components."""
    block = triton.next_power_of_2(width)
    return {"ROWS": max(1, TILE // block), "BLOCK_D": block}


def row_norms(x: Tensor) -> Tensor:
    """x [n, D] with contiguous rows -> |x| [n] fp32."""
    n, width = x.shape
    r = torch.empty(n, dtype=torch.float32, device=x.device)
    blocks = row_blocks(width)
    if n:
        with torch.cuda.device_of(x):
            row_norm_kernel[(triton.cdiv(n, blocks["ROWS"]),)](x, r, n, width, x.stride(0), **blocks, **LAUNCH)
    return r


def pairwise(x: Tensor, y: Tensor, curv: Tensor, distance: bool) -> Tensor:
    """x [m, D], y [n, D] with contiguous rows -> Lorentz inner products or distances [m, n] fp32."""
    m, n = len(x), len(y)
    out = torch.empty(m, n, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(m, PAIR_BLOCKS["BLOCK_M"]) * triton.cdiv(n, PAIR_BLOCKS["BLOCK_N"]),)
    if m and n:
        with torch.cuda.device_of(x):
            pairwise_kernel[grid](
                x, y, row_norms(x), row_norms(y), curv, out, m, n, x.shape[1], x.stride(0), y.stride(0),
                DISTANCE=distance, **PAIR_BLOCKS, **LAUNCH, num_stages=3,
            )  # fmt: skip
    return out


def elementwise(x: Tensor, y: Tensor, curv: Tensor, distance: bool) -> Tensor:
    """x, y [n, D] with contiguous rows -> Lorentz inner products or distances [n] fp32."""
    n, width = x.shape
    out = torch.empty(n, dtype=torch.float32, device=x.device)
    blocks = row_blocks(width)
    if n:
        with torch.cuda.device_of(x):
            elementwise_fwd_kernel[(triton.cdiv(n, blocks["ROWS"]),)](
                x, y, curv, out, n, width, x.stride(0), y.stride(0), DISTANCE=distance, **blocks, **LAUNCH
            )
    return out


def elementwise_backward(
    g: Tensor, x: Tensor, y: Tensor, curv: Tensor, distance: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """g [n], x, y [n, D] -> (dx, dy in the dtypes of x and y, dcurv [])."""
    n, width = x.shape
    dx = torch.empty(n, width, dtype=x.dtype, device=x.device)
    dy = torch.empty(n, width, dtype=y.dtype, device=x.device)
    blocks = row_blocks(width)
    grid = (triton.cdiv(n, blocks["ROWS"]),)
    partial = torch.empty(grid, dtype=torch.float32, device=x.device)
    if n:
        with torch.cuda.device_of(x):
            elementwise_bwd_kernel[grid](
                g.contiguous(), x, y, curv, dx, dy, partial, n, width, x.stride(0), y.stride(0),
                DISTANCE=distance, **blocks, **LAUNCH,
            )  # fmt: skip
    return dx, dy, partial.sum()


def compile_specs() -> list:
    """What ``kernels.resources`` compiles: both kinds of result, at D = 512."""
    from .specs import describe

    blocks = row_blocks(512)
    tile = PAIR_BLOCKS["BLOCK_M"] * PAIR_BLOCKS["BLOCK_N"]
    found = [describe("row_norm[fp32,512]", row_norm_kernel, blocks, num_warps=WARPS)]
    for distance, label in ((False, "inner"), (True, "dist")):
        kind = {"DISTANCE": distance}
        found += [
            describe(f"pairwise[{label},fp32]", pairwise_kernel, kind | PAIR_BLOCKS, num_warps=WARPS, outputs=tile),
            describe(f"elementwise_fwd[{label},fp32,512]", elementwise_fwd_kernel, kind | blocks, num_warps=WARPS),
            describe(f"elementwise_bwd[{label},fp32,512]", elementwise_bwd_kernel, kind | blocks, num_warps=WARPS),
        ]
    return found
