"""Exponential and logarithmic map at the root, with a learnable scale folded in: y = f(sqrt(c) |a x|) a x.

Forward reads x once and writes y once; backward reads x and dy and writes dx. A program holds whole rows in registers.
The gradients of the two scalars leave as one partial sum per program (deterministic, no atomics).
With ``v = a x``, ``n = v / |v|`` and ``(f, k)`` of ``geometry.exp_factors`` / ``log_factors``:
``dv = f dy + k <n, dy> n``, ``dx = a dv``, ``da = (f + k) <x, dy>``, ``dc = k <v, dy> / (2 c)``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .geometry import LAUNCH, WARPS, exp_factors, log_factors, row_norm, safe_inverse

TILE = 4096  # elements a program holds


@triton.jit
def exp_map_fwd_kernel(
    x_ptr, scale_ptr, curv_ptr, y_ptr, n, D, stride,
    INVERSE: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (row < n)[:, None] & (column < D)[None, :]
    v = tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        v *= tl.load(scale_ptr).to(tl.float32)
    s = tl.sqrt_rn(tl.load(curv_ptr).to(tl.float32)) * row_norm(v)
    if INVERSE:
        f, _ = log_factors(s)
    else:
        f, _ = exp_factors(s)
    tl.store(y_ptr + row[:, None] * D + column[None, :], f[:, None] * v, mask=inside)


@triton.jit
def exp_map_bwd_kernel(
    dy_ptr, x_ptr, scale_ptr, curv_ptr, dx_ptr, partial_ptr, n, D, dy_stride, stride,
    INVERSE: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (row < n)[:, None] & (column < D)[None, :]
    v = tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    along_x = tl.sum(v * dy, axis=1)
    along = along_x
    if SCALED:
        scale = tl.load(scale_ptr).to(tl.float32)
        v *= scale
        along *= scale
    curv = tl.load(curv_ptr).to(tl.float32)
    r = row_norm(v)
    s = tl.sqrt_rn(curv) * r
    if INVERSE:
        f, k = log_factors(s)
    else:
        f, k = exp_factors(s)
    inverse_r = safe_inverse(r)
    dv = f[:, None] * dy + (k * along * inverse_r)[:, None] * (v * inverse_r[:, None])
    if SCALED:
        dv *= scale
    tl.store(dx_ptr + row[:, None] * D + column[None, :], dv.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + program, tl.sum((f + k) * along_x))
    tl.store(partial_ptr + tl.num_programs(0) + program, tl.sum(k * along) / (2.0 * curv))


def _blocks(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"ROWS": max(1, TILE // block), "BLOCK_D": block}


def forward(x: Tensor, scale: Tensor | None, curv: Tensor, inverse: bool) -> Tensor:
    """x [n, D] with contiguous rows -> y [n, D] fp32."""
    n, width = x.shape
    y = torch.empty(n, width, dtype=torch.float32, device=x.device)
    blocks = _blocks(width)
    grid = (triton.cdiv(n, blocks["ROWS"]),)
    if n:
        with torch.cuda.device_of(x):
            exp_map_fwd_kernel[grid](
                x, curv if scale is None else scale, curv, y, n, width, x.stride(0),
                INVERSE=inverse, SCALED=scale is not None, **blocks, **LAUNCH,
            )  # fmt: skip
    return y


def backward(dy: Tensor, x: Tensor, scale: Tensor | None, curv: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dy, x [n, D] with contiguous rows -> (dx [n, D] in the dtype of x, dscale [], dcurv [])."""
    n, width = x.shape
    dx = torch.empty(n, width, dtype=x.dtype, device=x.device)
    blocks = _blocks(width)
    grid = (triton.cdiv(n, blocks["ROWS"]),)
    partial = torch.empty(2, *grid, dtype=torch.float32, device=x.device)
    if n:
        with torch.cuda.device_of(x):
            exp_map_bwd_kernel[grid](
                dy, x, curv if scale is None else scale, curv, dx, partial, n, width, dy.stride(0), x.stride(0),
                INVERSE=inverse, SCALED=scale is not None, **blocks, **LAUNCH,
            )  # fmt: skip
    dscale, dcurv = partial.sum(1).unbind()
    return dx, dscale.clone(), dcurv.clone()


def compile_specs() -> list:
    """What ``kernels.resources`` compiles: both directions of both maps, at D = 512."""
    from .specs import describe

    blocks = _blocks(512)
    found = []
    for inverse, label in ((False, "exp"), (True, "log")):
        constexprs = {"INVERSE": inverse, "SCALED": True, **blocks}
        forward_types = {"y_ptr": "*fp32"}
        found += [
            describe(f"exp_map_fwd[{label},bf16,512]", exp_map_fwd_kernel, constexprs, dtype="bf16",
                     types=forward_types, num_warps=WARPS, outputs=TILE),
            describe(f"exp_map_bwd[{label},bf16,512]", exp_map_bwd_kernel, constexprs, dtype="bf16",
                     types={"dy_ptr": "*fp32"}, num_warps=WARPS, outputs=TILE),
        ]  # fmt: skip
    return found
