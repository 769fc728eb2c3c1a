"""Entailment cones: half aperture, exterior angle, and the entailment loss."""

import torch
from torch import Tensor

from meru_fast import lorentz
from meru_fast.lorentz import Scalar, check_pairwise, check_points
from meru_fast.ops import entailment_torch
from meru_fast.ops.arguments import MAX_WIDTH, refuse_double_backward, rows, scalar
from meru_fast.ops.backend import active_backend

CHUNK = 1 << 22  # angles whose gradient is taken at a time


def half_aperture(x: Tensor, curv: Scalar = 1.0, min_radius: float = 0.1, eps: float = 1e-8) -> Tensor:
    """Half aperture of the entailment cone at x (MERU eq. 7): [..., D] -> [...] fp32 (fp64 for fp64 inputs).

    pi/2 with zero gradient inside the rim ``sqrt(curv) |x| <= 2 min_radius``. Just outside the slope is bounded by
    ``eps`` in the PyTorch path, and by the resolution of fp32, which is coarser than the default, in the kernel.

    Raises:
        TypeError: integer points.
        ValueError: no components, a `curv` that is not one positive number, or a negative `min_radius`.
    """
    check_points(x)
    _check_cone(min_radius)
    curv = scalar("curv", curv, x)
    if active_backend(x, max_width=MAX_WIDTH) == "torch":
        return lorentz.half_aperture(x, curv, min_radius, eps)
    flat = rows(x)
    return cone("aperture", flat, None, curv, min_radius, 1.0).view(x.shape[:-1])


def oxy_angle(x: Tensor, y: Tensor, curv: Scalar = 1.0, eps: float = 1e-8) -> Tensor:
    """Exterior angle at x of the triangle (root, x, y) (MERU eq. 8): [..., D], [..., D] (broadcast) -> [...].

    fp32 (fp64 for fp64 inputs); pi/2 for ``x = 0`` and 0 for ``x = y``, there with zero gradient. ``eps`` is unused.

    Raises:
        TypeError: integer points.
        ValueError: no components, widths or devices that differ, or a `curv` that is not one positive number.
    """
    check_points(x, y)
    curv = scalar("curv", curv, x)
    if active_backend(x, y, max_width=MAX_WIDTH) == "torch":
        return lorentz.oxy_angle(x, y, curv)
    x, y = torch.broadcast_tensors(x, y)
    return cone("angle", rows(x), rows(y), curv, 0.0, 1.0).view(x.shape[:-1])


def pairwise_oxy_angle(x: Tensor, y: Tensor, curv: Scalar = 1.0, eps: float = 1e-8) -> Tensor:
    """Exterior angles at x_i towards y_j of all pairs: [B1, D], [B2, D] -> [B1, B2] fp32 (fp64 for fp64 inputs).

    No [B1, B2, D] tensor is made. Values of undefined angles as in ``oxy_angle``; ``eps`` is unused.

    Raises:
        TypeError: integer points.
        ValueError: no matrices, widths or devices that differ, or a `curv` that is not one positive number.
    """
    check_points(x, y)
    check_pairwise(x, y)
    curv = scalar("curv", curv, x)
    if active_backend(x, y) == "torch":
        return lorentz.pairwise_oxy_angle(x, y, curv)
    return pairwise_angle(rows(x), rows(y), curv)


def entailment_loss(
    text: Tensor, image: Tensor, curv: Scalar, min_radius: float = 0.1, aperture_scale: float = 1.0
) -> Tensor:
    """Mean over pairs of ``max(0, oxy_angle(text, image) - aperture_scale * half_aperture(text))`` (MERU eq. 9).

    Args:
        text: [B, D] (or [..., D]), the apexes of the cones.
        image: same shape, the points that should lie inside.
        curv: positive, a number or a tensor of one element.
        min_radius: the cones' K; within ``2 K / sqrt(curv)`` of the root a cone is a half space.
        aperture_scale: factor on the aperture (HyCoCLIP, arXiv 2410.06912).

    Returns:
        A 0-dim tensor, fp32 (fp64 for fp64 inputs), differentiable in text, image and curv.

    Raises:
        TypeError: integer points.
        ValueError: shapes or devices differ, the batch is empty, `curv` is not one positive number, or `min_radius` is
            negative.
    """
    check_points(text, image)
    _check_cone(min_radius)
    if text.shape != image.shape:
        raise ValueError(f"text and image must have one shape, got {tuple(text.shape)} and {tuple(image.shape)}")
    if text.numel() == 0:
        raise ValueError("the entailment loss of an empty batch is undefined")
    curv = scalar("curv", curv, text)
    if active_backend(text, image, max_width=MAX_WIDTH) == "torch":
        return entailment_torch.loss(rows(text), rows(image), curv, min_radius, aperture_scale)
    return cone("entailment", rows(text), rows(image), curv, min_radius, aperture_scale)


def _check_cone(min_radius: float) -> None:
    if not min_radius >= 0:
        raise ValueError(f"min_radius must not be negative, got {min_radius}")


# --- given pairs ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("meru_fast::cone", mutates_args=())
def cone(kind: str, x: Tensor, y: Tensor | None, curv: Tensor, min_radius: float, aperture_scale: float) -> Tensor:
    from meru_fast.kernels import entailment as kernels

    return kernels.cone(kind, x, y, curv, min_radius, aperture_scale)


@cone.register_fake
def _(kind: str, x: Tensor, y: Tensor | None, curv: Tensor, min_radius: float, aperture_scale: float) -> Tensor:
    return x.new_empty(() if kind == "entailment" else x.shape[:1], dtype=torch.float32)


@torch.library.custom_op("meru_fast::cone_backward", mutates_args=())
def cone_backward(
    kind: str, g: Tensor, x: Tensor, y: Tensor | None, curv: Tensor, min_radius: float, aperture_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    from meru_fast.kernels import entailment as kernels

    dx, dy, dcurv = kernels.cone_backward(kind, g, x, y, curv, min_radius, aperture_scale)
    return dx, dy, dcurv.to(curv.dtype)


@cone_backward.register_fake
def _(
    kind: str, g: Tensor, x: Tensor, y: Tensor | None, curv: Tensor, min_radius: float, aperture_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if y is None else y.new_empty(y.shape), curv.new_empty(())


def _cone_setup(ctx, inputs, output) -> None:
    ctx.kind, x, y, curv, *ctx.shape = inputs
    ctx.save_for_backward(x, y, curv)


def _cone_grad(ctx, g: Tensor):
    x, y, curv = ctx.saved_tensors
    dx, dy, dcurv = cone_backward(ctx.kind, g, x, y, curv, *ctx.shape)
    return None, dx, None if y is None else dy, dcurv, None, None


cone.register_autograd(_cone_grad, setup_context=_cone_setup)
cone_backward.register_autograd(refuse_double_backward)


# --- all pairs --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("meru_fast::pairwise_angle", mutates_args=())
def pairwise_angle(x: Tensor, y: Tensor, curv: Tensor) -> Tensor:
    from meru_fast.kernels import entailment as kernels

    return kernels.pairwise_angle(x, y, curv)


@pairwise_angle.register_fake
def _(x: Tensor, y: Tensor, curv: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], y.shape[0]), dtype=torch.float32)


@torch.library.custom_op("meru_fast::pairwise_angle_backward", mutates_args=())
def pairwise_angle_backward(g: Tensor, x: Tensor, y: Tensor, curv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three matrix products per band of rows, in fp64: the weights are differences of nearly equal numbers.

    With p and q the components of v along and across u, ``dx = A v + rowsum(E - A p) u/r`` and
    ``dy = colsum(F) v + (H - F p)^T u/r`` (derivation: docs/geometry.md).
    """
    c = curv.double()
    root = c.sqrt()
    v = root * y.double()
    rv = lorentz.norm(v).T
    vt = torch.hypot(rv, torch.ones_like(rv))
    dx, dy, dcurv = x.new_empty(x.shape), torch.zeros_like(v), torch.zeros_like(c)
    step = max(1, CHUNK // max(1, len(y)))
    for first in range(0, len(x), step):
        band = slice(first, first + step)
        u = root * x[band].double()
        r = lorentz.norm(u)
        ut = torch.hypot(r, torch.ones_like(r))
        direction = u / r.clamp(min=torch.finfo(r.dtype).tiny)
        p = direction @ v.T
        q = ((rv - p) * (rv + p)).clamp(min=0).sqrt()
        z = ut * vt - r * p
        square = q**2 + (ut * p - r * vt) ** 2
        apart = (q**2 + (p - r) ** 2 > 64 * torch.finfo(q.dtype).eps * rv**2) & (r > 0) & (q > 0)
        weight = torch.where(apart, g[band].double() / square, 0.0)
        q = torch.where(apart, q, 1.0)
        along = weight * q * z
        x_across = -weight * (vt * z - ut) / (r.clamp(min=torch.finfo(r.dtype).tiny) * q)
        y_across = weight * (p * z - r) / (vt * q)
        dx[band] = (root * (x_across @ v + (along / ut - x_across * p).sum(1, keepdim=True) * direction)).to(x.dtype)
        dy += root * (y_across.sum(0)[:, None] * v - (along / vt + y_across * p).T @ direction)
        dcurv += (weight * q * r * (z * vt - ut) / (ut * vt)).sum() / (2 * c)
    return dx, dy.to(y.dtype), dcurv.to(curv.dtype)


@pairwise_angle_backward.register_fake
def _(g: Tensor, x: Tensor, y: Tensor, curv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape), curv.new_empty(())


def _pairwise_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _pairwise_grad(ctx, g: Tensor):
    return pairwise_angle_backward(g, *ctx.saved_tensors)


pairwise_angle.register_autograd(_pairwise_grad, setup_context=_pairwise_setup)
pairwise_angle_backward.register_autograd(refuse_double_backward)
