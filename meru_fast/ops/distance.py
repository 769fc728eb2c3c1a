"""Lorentz inner products and geodesic distances, of all pairs and of given pairs."""

import torch
from torch import Tensor

from meru_fast import lorentz
from meru_fast.lorentz import Scalar, check_pairwise, check_points
from meru_fast.ops.arguments import MAX_WIDTH, refuse_double_backward, rows, scalar
from meru_fast.ops.backend import active_backend


def pairwise_inner(x: Tensor, y: Tensor, curv: Scalar = 1.0) -> Tensor:
    """Lorentz inner products of all pairs (MERU eq. 1): [B1, D], [B2, D] -> [B1, B2] fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError: integer points.
        ValueError: no matrices, widths or devices that differ, or a `curv` that is not one positive number.
    """
    return _pairwise(x, y, curv, distance=False)


def pairwise_dist(x: Tensor, y: Tensor, curv: Scalar = 1.0, eps: float = 1e-8) -> Tensor:
    """Geodesic distances of all pairs (MERU eq. 4): [B1, D], [B2, D] -> [B1, B2] fp32 (fp64 for fp64 inputs).

    In fp32 distances below about ``5e-4 |x|`` are noise, zero included; ``elementwise_dist`` has no such floor.
    ``eps`` is unused, part of the published signature. Backward keeps the result, and nothing else of that size.

    Raises:
        TypeError: integer points.
        ValueError: no matrices, widths or devices that differ, or a `curv` that is not one positive number.
    """
    return _pairwise(x, y, curv, distance=True)


def elementwise_inner(x: Tensor, y: Tensor, curv: Scalar = 1.0) -> Tensor:
    """Lorentz inner products of given pairs: [..., D], [..., D] (broadcast) -> [...] fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError: integer points.
        ValueError: no components, widths or devices that differ, or a `curv` that is not one positive number.
    """
    return _elementwise(x, y, curv, distance=False)


def elementwise_dist(x: Tensor, y: Tensor, curv: Scalar = 1.0, eps: float = 1e-8) -> Tensor:
    """Geodesic distances of given pairs: [..., D], [..., D] (broadcast) -> [...] fp32 (fp64 for fp64 inputs).

    Right to the last digits at any distance, zero with zero gradient for equal points. ``eps`` is unused.

    Raises:
        TypeError: integer points.
        ValueError: no components, widths or devices that differ, or a `curv` that is not one positive number.
    """
    return _elementwise(x, y, curv, distance=True)


def _pairwise(x: Tensor, y: Tensor, curv: Scalar, distance: bool) -> Tensor:
    check_points(x, y)
    check_pairwise(x, y)
    curv = scalar("curv", curv, x)
    fused = active_backend(x, y) == "triton"
    if not fused:
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        x, y, curv = x.to(dtype), y.to(dtype), curv.to(dtype)
    return lorentz_pairwise(rows(x), rows(y), curv, distance, fused)


def _elementwise(x: Tensor, y: Tensor, curv: Scalar, distance: bool) -> Tensor:
    check_points(x, y)
    curv = scalar("curv", curv, x)
    if active_backend(x, y, max_width=MAX_WIDTH) == "torch":
        return (lorentz.elementwise_dist if distance else lorentz.elementwise_inner)(x, y, curv)
    x, y = torch.broadcast_tensors(x, y)
    return lorentz_elementwise(rows(x), rows(y), curv, distance).view(x.shape[:-1])


# --- all pairs --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("meru_fast::lorentz_pairwise", mutates_args=())
def lorentz_pairwise(x: Tensor, y: Tensor, curv: Tensor, distance: bool, fused: bool) -> Tensor:
    if fused:
        from meru_fast.kernels import distance as kernels

        return kernels.pairwise(x, y, curv, distance)
    return (lorentz.pairwise_dist if distance else lorentz.pairwise_inner)(x, y, curv)


@lorentz_pairwise.register_fake
def _(x: Tensor, y: Tensor, curv: Tensor, distance: bool, fused: bool) -> Tensor:
    return x.new_empty((x.shape[0], y.shape[0]), dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("meru_fast::lorentz_pairwise_backward", mutates_args=())
def lorentz_pairwise_backward(
    g: Tensor, x: Tensor, y: Tensor, curv: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of inner products (out None) or of distances (their values in out): two matrix products.

    A distance is a function of the inner product, ``dd/d<x,y> = -sqrt(c) / sinh(sqrt(c) d)``, so both share the rest.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    wide_x, wide_y, c = x.to(compute), y.to(compute), curv.to(compute)
    weight = g if out is None else _inner_weight(g, out, c)
    rest = c.rsqrt()
    x_time = torch.hypot(lorentz.norm(wide_x).squeeze(1), rest)
    y_time = torch.hypot(lorentz.norm(wide_y).squeeze(1), rest)
    row, column = weight @ y_time, weight.T @ x_time
    dx = torch.addmm(wide_x * (-row / x_time)[:, None], weight, wide_y)
    dy = torch.addmm(wide_y * (-column / y_time)[:, None], weight.T, wide_x)
    if out is None:
        dcurv = ((row / x_time).sum() + (column / y_time).sum()) / (2 * c * c)
    else:
        dcurv = ((wide_x * dx).sum() + (wide_y * dy).sum() - (g * out).sum()) / (2 * c)
    return dx.to(x.dtype), dy.to(y.dtype), dcurv.to(curv.dtype)


def _inner_weight(g: Tensor, distance: Tensor, curv: Tensor) -> Tensor:
    """``-sqrt(c) g / sinh(sqrt(c) d)``, 0 where d = 0. expm1 keeps small distances exact and is fast everywhere."""
    root = curv.sqrt()
    growth = (root * distance).expm1_()
    sinh = growth.add_(growth / (growth + 1)).mul_(0.5)
    return torch.where(sinh > 0, g * (-root) / sinh, 0.0)


@lorentz_pairwise_backward.register_fake
def _(g: Tensor, x: Tensor, y: Tensor, curv: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape), curv.new_empty(())


def _pairwise_setup(ctx, inputs, output) -> None:
    x, y, curv, ctx.distance, _ = inputs
    ctx.save_for_backward(x, y, curv, output if ctx.distance else None)


def _pairwise_grad(ctx, g: Tensor):
    return *lorentz_pairwise_backward(g, *ctx.saved_tensors), None, None


lorentz_pairwise.register_autograd(_pairwise_grad, setup_context=_pairwise_setup)
lorentz_pairwise_backward.register_autograd(refuse_double_backward)


# --- given pairs ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("meru_fast::lorentz_elementwise", mutates_args=())
def lorentz_elementwise(x: Tensor, y: Tensor, curv: Tensor, distance: bool) -> Tensor:
    from meru_fast.kernels import distance as kernels

    return kernels.elementwise(x, y, curv, distance)


@lorentz_elementwise.register_fake
def _(x: Tensor, y: Tensor, curv: Tensor, distance: bool) -> Tensor:
    return x.new_empty(x.shape[:1], dtype=torch.float32)


@torch.library.custom_op("meru_fast::lorentz_elementwise_backward", mutates_args=())
def lorentz_elementwise_backward(
    g: Tensor, x: Tensor, y: Tensor, curv: Tensor, distance: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from meru_fast.kernels import distance as kernels

    dx, dy, dcurv = kernels.elementwise_backward(g, x, y, curv, distance)
    return dx, dy, dcurv.to(curv.dtype)


@lorentz_elementwise_backward.register_fake
def _(g: Tensor, x: Tensor, y: Tensor, curv: Tensor, distance: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape), curv.new_empty(())


def _elementwise_setup(ctx, inputs, output) -> None:
    x, y, curv, ctx.distance = inputs
    ctx.save_for_backward(x, y, curv)


def _elementwise_grad(ctx, g: Tensor):
    return *lorentz_elementwise_backward(g, *ctx.saved_tensors, ctx.distance), None


lorentz_elementwise.register_autograd(_elementwise_grad, setup_context=_elementwise_setup)
lorentz_elementwise_backward.register_autograd(refuse_double_backward)
