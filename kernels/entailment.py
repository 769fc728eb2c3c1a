"""Entailment cones: half aperture, exterior angle, and the entailment loss, one kernel each way.

A program holds whole rows; the angle, the aperture and the hinge are computed in registers, so the loss reads text and
image once and writes one partial sum per program. With ``S = sinh d``, ``z = cosh d``, ``n`` the unit vector across u
towards v, ``a = <u/r, v> - r`` and ``q`` the component of v across u, the gradients of the angle are (docs/geometry.md)

``dv: ((a z / S^2 + r / (1 + z)) n - (q z / S^2) u/r) / v_t``,
``du: (q z / S^2) / u_t u/r - (B / r) n``, ``dc: q r B / (2 c u_t v_t)``, where
``B = (z v_t - u_t) / S^2 = v_t / (1 + z) + (a (a + 2 r) + q^2) / (S^2 (u_t + v_t))``.

All pairs: the angle between two rows comes from the chords ``|u/|u| - v/|v||`` and ``|u/|u| + v/|v||``, summed as
squares of differences, because a matrix product loses nearly parallel rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .distance import load_pair, row_blocks, row_norms, tile_of_program
from .geometry import LAUNCH, WARPS, atan2, hypot, row_norm, safe_inverse, unit_time

KINDS = ("angle", "aperture", "entailment")  # what a cone kernel computes
PAIR_BLOCKS = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP": 8}


@triton.jit
def aperture(s, rim):
    """Half aperture at norm s and its derivative: asin(rim / s) outside the rim, pi/2 inside."""
    outside = s > rim
    s = tl.where(outside, s, rim + 1.0)
    side = tl.sqrt_rn(s - rim) * tl.sqrt_rn(s + rim)
    angle = tl.where(outside, atan2(rim + 0.0 * s, side), 1.5707963267948966)
    return angle, tl.where(outside, -rim / (s * side), 0.0)


@triton.jit
def tangent(ru, tu, near, ahead, across, tv):
    """Forward component of the tangent at u towards v; ``across`` is the other one (see lorentz._exterior_angle)."""
    along = near + ahead
    total = tl.where(along > 0.0, tu * along + ru * tv, 1.0)
    rise = ahead * ((along + near) / total) - (ru * across) * (ru * across / total)
    return tl.where(along > 0.0, rise, tu * along - ru * tv)


@triton.jit
def exterior_angle(x, y, root):
    """Exterior angle at the rows of x towards the rows of y, and the parts its gradient is made of."""
    length = row_norm(x)
    direction = x * safe_inverse(length)[:, None]
    ru = root * length
    rv = root * row_norm(y)
    scale = tl.maximum(rv, 1.0)  # v enters through ratios only
    w = y - x
    ahead = tl.sum(direction * w, axis=1)
    aside = w - (ahead * safe_inverse(length))[:, None] * x  # with FMA near-parallel rows keep their side
    ahead *= root / scale
    width = row_norm(aside)
    across = width * (root / scale)
    forward = tangent(ru, unit_time(ru), ru / scale, ahead, across, unit_time(rv) / scale)
    aside *= safe_inverse(width)[:, None]
    return atan2(across, forward), forward, ahead, across, aside, direction, ru, rv, scale


@triton.jit
def cone_fwd_kernel(
    x_ptr, y_ptr, curv_ptr, out_ptr, n, D, x_stride, y_stride, rim, aperture_scale,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x, y, _ = load_pair(x_ptr, y_ptr, row, n, D, x_stride, y_stride, BLOCK_D)
    root = tl.sqrt_rn(tl.load(curv_ptr).to(tl.float32))
    if KIND == "aperture":
        opening, _ = aperture(root * row_norm(x), rim)
        tl.store(out_ptr + row, opening, mask=row < n)
    else:
        angle, _, _, _, _, _, ru, _, _ = exterior_angle(x, y, root)
        if KIND == "angle":
            tl.store(out_ptr + row, angle, mask=row < n)
        else:
            opening, _ = aperture(ru, rim)
            excess = tl.maximum(angle - aperture_scale * opening, 0.0)
            tl.store(out_ptr + tl.program_id(0), tl.sum(tl.where(row < n, excess, 0.0)) / n)


@triton.jit
def cone_bwd_kernel(
    g_ptr, x_ptr, y_ptr, curv_ptr, dx_ptr, dy_ptr, partial_ptr, n, D, x_stride, y_stride, rim, aperture_scale,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x, y, inside = load_pair(x_ptr, y_ptr, row, n, D, x_stride, y_stride, BLOCK_D)
    offset = row[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    curv = tl.load(curv_ptr).to(tl.float32)
    root = tl.sqrt_rn(curv)
    if KIND == "aperture":
        g = tl.load(g_ptr + row, mask=row < n, other=0.0)
        length = row_norm(x)
        _, slope = aperture(root * length, rim)
        dx = (g * slope * root)[:, None] * (x * safe_inverse(length)[:, None])
        dcurv = g * slope * root * length / (2.0 * curv)
    else:
        angle, forward, ahead, across, aside, direction, ru, rv, scale = exterior_angle(x, y, root)
        tu = unit_time(ru)
        tv = unit_time(rv)
        sine = hypot(across, forward)
        inverse = safe_inverse(sine)
        sine *= scale
        z = unit_time(sine)
        coth = tl.where(sine > 0.0, z / tl.where(sine > 0.0, sine, 1.0), 0.0)
        a = ahead * inverse
        q = across * inverse
        lift = tv / (1.0 + z) + (a * ((ahead + 2.0 * ru / scale) * inverse) + q * q) / (tu + tv)
        lift = tl.where(sine > 0.0, lift, 0.0)
        x_across = -lift * safe_inverse(ru)
        y_across = tl.where(sine > 0.0, (a * coth + ru / (1.0 + z)) / tv, 0.0)
        x_along = q * coth / tu
        y_along = -q * coth / tv
        curvature = (across * scale / tu) * (ru / tv) * lift / (2.0 * curv)
        if KIND == "angle":
            g = tl.load(g_ptr + row, mask=row < n, other=0.0)
        else:
            opening, slope = aperture(ru, rim)
            g = tl.load(g_ptr).to(tl.float32) / n
            g = tl.where((row < n) & (angle > aperture_scale * opening), g, 0.0)
            x_along -= aperture_scale * slope
            curvature -= aperture_scale * slope * ru / (2.0 * curv)
        dx = (g * root * x_across)[:, None] * aside + (g * root * x_along)[:, None] * direction
        dy = (g * root * y_across)[:, None] * aside + (g * root * y_along)[:, None] * direction
        dcurv = g * curvature
        tl.store(dy_ptr + offset, dy.to(dy_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(row < n, dcurv, 0.0)))


@triton.jit
def pairwise_angle_kernel(
    x_ptr, y_ptr, rx_ptr, ry_ptr, curv_ptr, out_ptr, m, n, D, x_stride, y_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of_program(m, n, BLOCK_M, BLOCK_N, GROUP)
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    root = tl.sqrt_rn(tl.load(curv_ptr).to(tl.float32))
    rx = tl.load(rx_ptr + row, mask=row < m, other=0.0)
    ry = tl.load(ry_ptr + column, mask=column < n, other=0.0)
    x_factor = safe_inverse(rx)
    y_factor = safe_inverse(ry)
    k = tl.arange(0, BLOCK_K)
    less = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    more = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        inside = start + k < D
        x_inside = (row < m)[:, None] & inside[None, :]
        y_inside = (column < n)[:, None] & inside[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + (start + k)[None, :], mask=x_inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + column[:, None] * y_stride + (start + k)[None, :], mask=y_inside, other=0.0).to(tl.float32)
        x = (x * x_factor[:, None])[:, None, :]
        y = (y * y_factor[:, None])[None, :, :]
        less += tl.sum((x - y) * (x - y), axis=2)
        more += tl.sum((x + y) * (x + y), axis=2)
    ru = (root * rx)[:, None]
    rv = (root * ry)[None, :]
    scale = tl.maximum(rv, 1.0)
    across = (rv / scale) * (0.5 * tl.sqrt_rn(less) * tl.sqrt_rn(more))
    across = tl.where(ru > 0.0, across, rv / scale)  # the root has no direction: everything lies across
    ahead = tl.where(ru > 0.0, (rv - ru) / scale - (rv / scale) * (0.5 * less), 0.0)
    forward = tangent(ru, unit_time(ru), ru / scale, ahead, across, unit_time(rv) / scale)
    inside = (row < m)[:, None] & (column < n)[None, :]
    tl.store(out_ptr + row[:, None] * n + column[None, :], atan2(across, forward), mask=inside)


def cone(kind: str, x: Tensor, y: Tensor | None, curv: Tensor, min_radius: float, aperture_scale: float) -> Tensor:
    """x, y [n, D] with contiguous rows -> angles or apertures (y None) [n] fp32, or the entailment loss []."""
    n, width = x.shape
    y = x if y is None else y
    blocks = row_blocks(width)
    grid = (triton.cdiv(n, blocks["ROWS"]),)
    out = torch.empty(grid if kind == "entailment" else (n,), dtype=torch.float32, device=x.device)
    if n:
        with torch.cuda.device_of(x):
            cone_fwd_kernel[grid](
                x, y, curv, out, n, width, x.stride(0), y.stride(0), 2.0 * min_radius, aperture_scale,
                KIND=kind, **blocks, **LAUNCH,
            )  # fmt: skip
    return out.sum() if kind == "entailment" else out


def cone_backward(
    kind: str, g: Tensor, x: Tensor, y: Tensor | None, curv: Tensor, min_radius: float, aperture_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """g [n] ([] for the loss), x, y [n, D] -> (dx, dy in the dtypes of x, y, dcurv []); dy is empty where y is None."""
    n, width = x.shape
    dx = torch.empty(n, width, dtype=x.dtype, device=x.device)
    dy = x.new_empty(0) if y is None else torch.empty(n, width, dtype=y.dtype, device=x.device)
    y = x if y is None else y
    blocks = row_blocks(width)
    grid = (triton.cdiv(n, blocks["ROWS"]),)
    partial = torch.empty(grid, dtype=torch.float32, device=x.device)
    if n:
        with torch.cuda.device_of(x):
            cone_bwd_kernel[grid](
                g.contiguous(), x, y, curv, dx, dy, partial, n, width, x.stride(0), y.stride(0),
                2.0 * min_radius, aperture_scale, KIND=kind, **blocks, **LAUNCH,
            )  # fmt: skip
    return dx, dy, partial.sum()


def pairwise_angle(x: Tensor, y: Tensor, curv: Tensor) -> Tensor:
    """x [m, D], y [n, D] with contiguous rows -> exterior angles at x [m, n] fp32."""
    m, n = len(x), len(y)
    out = torch.empty(m, n, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(m, PAIR_BLOCKS["BLOCK_M"]) * triton.cdiv(n, PAIR_BLOCKS["BLOCK_N"]),)
    if m and n:
        with torch.cuda.device_of(x):
            pairwise_angle_kernel[grid](
                x, y, row_norms(x), row_norms(y), curv, out, m, n, x.shape[1], x.stride(0), y.stride(0),
                **PAIR_BLOCKS, **LAUNCH,
            )  # fmt: skip
    return out


def compile_specs() -> list:
    """What ``kernels.resources`` compiles: every kind of result both ways, at D = 512."""
    from .specs import describe

    blocks = row_blocks(512)
    found = [
        describe("pairwise_angle[fp32]", pairwise_angle_kernel, PAIR_BLOCKS, num_warps=WARPS,
                 outputs=PAIR_BLOCKS["BLOCK_M"] * PAIR_BLOCKS["BLOCK_N"]),
    ]  # fmt: skip
    for kind in KINDS:
        constexprs = {"KIND": kind, **blocks}
        found += [
            describe(f"cone_fwd[{kind},fp32,512]", cone_fwd_kernel, constexprs, num_warps=WARPS),
            describe(f"cone_bwd[{kind},fp32,512]", cone_bwd_kernel, constexprs, num_warps=WARPS),
        ]
    return found
