"""Exponential and logarithmic map at the root, with the learnable scale of the features folded in."""

import torch
from torch import Tensor

from meru_fast import lorentz
from meru_fast.lorentz import Scalar, check_points
from meru_fast.ops.arguments import MAX_WIDTH, refuse_double_backward, rows, scalar
from meru_fast.ops.backend import active_backend


def exp_map0(x: Tensor, curv: Scalar = 1.0, eps: float = 1e-8, *, scale: Scalar | None = None) -> Tensor:
    """Lift ``scale * x`` from the tangent space at the root onto the hyperboloid (MERU eq. 5).

    Args:
        x: [..., D], fp32, bf16, fp16 or fp64, D up to 1024 in the kernels.
        curv: positive, a number or a tensor of one element.
        eps: unused, part of the published signature.
        scale: positive, a number or a tensor of one element; None for 1.

    Returns:
        Space components [..., D] in fp32 (fp64 for fp64 inputs). Differentiable in x, curv and scale.

    Raises:
        TypeError: integer points.
        ValueError: no components, or a `curv` or `scale` that is not one positive number.
    """
    return _map(x, curv, scale, inverse=False)


def log_map0(x: Tensor, curv: Scalar = 1.0, eps: float = 1e-8, *, scale: Scalar | None = None) -> Tensor:
    """Inverse of ``exp_map0`` applied to ``scale * x``; arguments and result as there.

    Raises:
        TypeError: integer points.
        ValueError: no components, or a `curv` or `scale` that is not one positive number.
    """
    return _map(x, curv, scale, inverse=True)


def _map(x: Tensor, curv: Scalar, scale: Scalar | None, inverse: bool) -> Tensor:
    check_points(x)
    curv = scalar("curv", curv, x)
    scale = None if scale is None else scalar("scale", scale, x)
    if active_backend(x, max_width=MAX_WIDTH) == "triton":
        return radial_map(rows(x), scale, curv, inverse).view(x.shape)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (lorentz.log_map0 if inverse else lorentz.exp_map0)(x if scale is None else scale * x, curv)


@torch.library.custom_op("meru_fast::radial_map", mutates_args=())
def radial_map(x: Tensor, scale: Tensor | None, curv: Tensor, inverse: bool) -> Tensor:
    from meru_fast.kernels import exp_map

    return exp_map.forward(x, scale, curv, inverse)


@radial_map.register_fake
def _(x: Tensor, scale: Tensor | None, curv: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.custom_op("meru_fast::radial_map_backward", mutates_args=())
def radial_map_backward(
    dy: Tensor, x: Tensor, scale: Tensor | None, curv: Tensor, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from meru_fast.kernels import exp_map

    return exp_map.backward(rows(dy), x, scale, curv, inverse)


@radial_map_backward.register_fake
def _(dy: Tensor, x: Tensor, scale: Tensor | None, curv: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    number = x.new_empty((), dtype=torch.float32)
    return x.new_empty(x.shape), number, torch.empty_like(number)


def _setup_context(ctx, inputs, output) -> None:
    x, scale, curv, ctx.inverse = inputs
    ctx.save_for_backward(x, scale, curv)


def _backward(ctx, dy: Tensor):
    x, scale, curv = ctx.saved_tensors
    dx, dscale, dcurv = radial_map_backward(dy, x, scale, curv, ctx.inverse)
    return dx, None if scale is None else dscale.to(scale.dtype), dcurv.to(curv.dtype), None


radial_map.register_autograd(_backward, setup_context=_setup_context)
radial_map_backward.register_autograd(refuse_double_backward)
