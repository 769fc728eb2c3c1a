"""The entailment loss in PyTorch: rows are split in bands that stay in a core's cache, all else is [B, 1].

Autograd over ``meru_fast.lorentz`` would move twenty tensors of [B, D] through memory; these bands read both sides once
each way and write both gradients.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from meru_fast import lorentz

BAND = 1 << 17  # components of a band


def loss(text: Tensor, image: Tensor, curv: Tensor, min_radius: float, aperture_scale: float) -> Tensor:
    """``ops.entailment_loss`` of [B, D] rows."""
    text_norm, image_norm, ahead, across = split(text, image)
    root = curv.to(text_norm.dtype).sqrt()
    angle = lorentz.angle_of_parts(root, text_norm, image_norm, ahead, across)
    return (angle - aperture_scale * lorentz.aperture(root * text_norm, min_radius)).clamp(min=0).mean()


def _bands(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Bands of rows in at least fp32: (rows, x, y - x)."""
    dtype = _wide(x, y)
    step = max(1, BAND // x.shape[1])
    for first in range(0, len(x), step):
        rows = slice(first, first + step)
        band = x[rows].to(dtype)
        yield rows, band, y[rows].to(dtype) - band


def _wide(x: Tensor, y: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)


def _inverse(length: Tensor) -> Tensor:
    zero = length < torch.finfo(length.dtype).tiny
    return torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, length))


@torch.library.custom_op("meru_fast::split", mutates_args=())
def split(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``lorentz.split`` of [B, D] rows, in at least fp32."""
    parts: list[tuple[Tensor, ...]] = []
    with torch.autocast(x.device.type, enabled=False):
        for rows, band, w in _bands(x, y):
            x_peak, w_peak = lorentz.peak(band), lorentz.peak(w)
            direction, w = band * (1 / x_peak), w * (1 / w_peak)
            length = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
            inverse = _inverse(length)
            ahead = torch.linalg.vecdot(direction, w)[:, None] * inverse
            aside = torch.addcmul(w, direction, -ahead * inverse)
            across = torch.linalg.vector_norm(aside, dim=-1, keepdim=True)
            parts.append((x_peak * length, lorentz.norm(y[rows].to(w.dtype)), w_peak * ahead, w_peak * across))
    x_norm, y_norm, ahead, across = (torch.cat(part) for part in zip(*parts, strict=True))
    return x_norm, y_norm, ahead, across


@split.register_fake
def _(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    part = x.new_empty((x.shape[0], 1), dtype=_wide(x, y))
    return part, part.clone(), part.clone(), part.clone()


@torch.library.custom_op("meru_fast::split_backward", mutates_args=())
def split_backward(
    x: Tensor, y: Tensor, x_norm: Tensor, y_norm: Tensor, ahead: Tensor, across: Tensor, grads: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """With ``d = x / |x|`` and n the unit vector across it towards y, the derivatives by x and y are

    |x|: d, 0; |y|: 0, y / |y|; ahead: ``across / |x| n - d``, d; across: ``-(1 + ahead / |x|) n``, n.
    """
    g_x, g_y, g_ahead, g_across = grads
    x_unit, w_unit = lorentz.peak(x_norm), lorentz.peak(torch.hypot(ahead, across))
    per_x, per_y, per_across = _inverse(x_norm / x_unit), _inverse(y_norm), _inverse(across / w_unit)
    tilt = (ahead / w_unit) * per_x
    # weights of n and of d, both divided by the lengths that `aside` and `band` below have
    x_across = ((across * g_ahead - ahead * g_across) * (per_x / x_unit) - g_across) * per_across
    y_across = (g_across + (across * per_y) * g_y) * per_across
    x_along = (g_x - g_ahead) * per_x
    y_along = (g_ahead + ((x_norm + ahead) * per_y) * g_y) * per_x
    dx, dy = x.new_empty(x.shape), y.new_empty(y.shape)
    with torch.autocast(x.device.type, enabled=False):
        for rows, band, w in _bands(x, y):
            band = band * (1 / x_unit[rows])
            aside = torch.addcmul(w.mul_(1 / w_unit[rows]), band, -tilt[rows])
            slip = torch.linalg.vecdot(aside, band)[:, None] * per_x[rows] ** 2  # what rounding left of x in it
            dx[rows] = torch.addcmul(aside * x_across[rows], band, x_along[rows] - slip * x_across[rows])
            dy[rows] = torch.addcmul(aside * y_across[rows], band, y_along[rows] - slip * y_across[rows])
    return dx, dy


@split_backward.register_fake
def _(x: Tensor, y: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _reference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return lorentz.split(x.to(_wide(x, y)), y.to(_wide(x, y)))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx, *grads: Tensor):
    if torch.is_grad_enabled():  # for a second derivative
        return torch.func.vjp(_reference, *ctx.saved_tensors[:2])[1](grads)
    return split_backward(*ctx.saved_tensors, list(grads))


split.register_autograd(_gradients, setup_context=_setup)
