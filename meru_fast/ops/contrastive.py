"""Contrastive loss between two sets of embeddings: both directions from one pass over the logits, memory O(B).

    logit_ij = -logit_scale * dist(image_i, text_j)      (lorentz)      logit_scale * <image_i, text_j>      (cosine)
    loss     = 1 / (2 b) * sum_i [LSE_j logit_ij + LSE_k logit_kp - 2 logit_ip],   p = labels_i

as in Desai et al., "Hyperbolic Image-Text Representations", section 3 (arXiv 2304.09172), and CLIP. No ``B x B`` tensor exists in
forward or backward: tiles of logits are made, used and, for the gradients, made again. With a process group every rank gathers
the texts only, computes its ``b x B`` block once, and the column statistics are merged over the ranks.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from .backend import active_backend
from .contrastive_torch import TorchEngine

GEOMETRIES = ("lorentz", "cosine")
PRECISIONS = ("highest", "high", "medium")  # the words of torch.set_float32_matmul_precision


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    curv: float | Tensor,
    logit_scale: float | Tensor,
    *,
    geometry: str = "lorentz",
    precision: str = "high",
    group: "dist.ProcessGroup | None" = None,
    labels: Tensor | None = None,
    ring: bool = False,
) -> Tensor:
    """Mean of the image-to-text and text-to-image cross-entropies. Differentiable once, in every float input.

    Args:
        image: ``[b, D]`` points: space components on the hyperboloid, or unit vectors in cosine geometry (they are not
            normalised here). float16, bfloat16 and float32 are computed in float32, float64 in float64.
        text: ``[n, D]`` points, ``n = b`` unless ``labels`` are given.
        curv: ``c > 0`` where the hyperboloid has curvature ``-c``; one number or a tensor of one element.
        logit_scale: inverse temperature (the linear value, not its logarithm); one number or a tensor of one element.
        geometry: ``"lorentz"`` or ``"cosine"``; the latter does not read ``curv``.
        precision: of the matrix products of the GPU kernels. ``"highest"``: faithful to float32; ``"high"``: logits faithful
            to float32, gradient products in bfloat16 with float32 accumulation; ``"medium"``: everything in bfloat16 with
            float32 accumulation. The PyTorch path computes all three in full.
        group: process group over which the batch is spread, every rank holding the same number of pairs. The returned loss and
            the scalars' gradients are those of the whole batch on every rank; the feature gradients are those of the whole
            loss by this rank's rows.
        labels: ``[b]`` int64, the row of ``text`` that belongs to each image; several images may share a text. The
            text-to-image direction then counts the labelled texts, once per image. Default: row ``i`` belongs to row ``i``.
        ring: with ``group``, pass the texts around so that no rank ever holds all of them.

    Returns:
        The loss, 0-dim, float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: inputs that do not fit together; the message names them.
        RuntimeError: on a second derivative.
    """
    _check(image, text, labels, geometry, precision, group, ring)
    curv, logit_scale = as_scalar(curv, "curv", image), as_scalar(logit_scale, "logit_scale", image)
    name = "" if group is None else group.group_name
    return torch.ops.meru_fast.contrastive_forward(
        image, text, labels, curv, logit_scale, geometry, precision, active_backend(image, text), name, ring
    )[0]


@torch.library.custom_op("meru_fast::contrastive_forward", mutates_args=())
def _forward(
    image: Tensor,
    text: Tensor,
    labels: Tensor | None,
    curv: Tensor,
    logit_scale: Tensor,
    geometry: str,
    precision: str,
    backend: str,
    group: str,
    ring: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, row and column log-sum-exps, and the right operand (of all ranks unless ``ring``)."""
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        engine, x, y = _engine(image, text, curv, logit_scale, geometry)
        index = _labels(labels, image)
        left, own = engine.left(x), engine.right(y)
        values = engine.pair_values(x, y if labels is None else y[labels])
        logit = engine.logits(values)
        row_lse, col_lse = engine.forward(left, own, values, index)
        matched = col_lse if labels is None else col_lse[labels]
        loss = (row_lse + matched - 2 * logit).sum() / (2 * len(x))
    return loss, row_lse, col_lse, own


@_forward.register_fake
def _(image, text, labels, curv, logit_scale, geometry, precision, backend, group, ring):
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    extra = 2 if geometry == "lorentz" else 0
    return (
        image.new_empty((), dtype=dtype),
        image.new_empty(image.shape[0], dtype=dtype),
        image.new_empty(text.shape[0], dtype=dtype),
        image.new_empty((text.shape[0], text.shape[1] + extra), dtype=dtype),
    )


@torch.library.custom_op("meru_fast::contrastive_backward", mutates_args=())
def _backward(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    labels: Tensor | None,
    curv: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    col_lse: Tensor,
    right: Tensor,
    geometry: str,
    precision: str,
    backend: str,
    group: str,
    ring: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of image, text, curv and logit_scale."""
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        engine, x, y = _engine(image, text, curv, logit_scale, geometry)
        index = _labels(labels, image)
        values = engine.pair_values(x, y if labels is None else y[labels])
        logit = engine.logits(values)
        # each row weighs 1 / (2 b) in the loss, each column as often as it is somebody's label
        row_shift = row_lse + math.log(2 * len(x))
        col_shift = col_lse + math.log(2 * len(x))
        if labels is not None:
            col_shift = col_shift - torch.bincount(labels, minlength=len(y)).to(x.dtype).log()
        into = engine.backward(engine.left(x), right, row_shift, col_shift, index)
        matched = col_shift if labels is None else col_shift[labels]
        pair_grad = torch.exp(logit - row_shift) + torch.exp(logit - matched) - 1 / len(x)
        dx, dy, dcurv, dscale = engine.points_grad(x, y, labels, pair_grad, into)
        return (
            (dx * grad).to(image.dtype),
            (dy * grad).to(text.dtype),
            (dcurv * grad).to(curv.dtype),
            (dscale * grad).to(logit_scale.dtype),
        )


@_backward.register_fake
def _(grad, image, text, labels, curv, logit_scale, *_):
    return (
        torch.empty_like(image, memory_format=torch.contiguous_format),
        torch.empty_like(text, memory_format=torch.contiguous_format),
        torch.empty_like(curv),
        torch.empty_like(logit_scale),
    )


def _setup_context(ctx, inputs, output):
    image, text, labels, curv, logit_scale, *ctx.options = inputs
    _, row_lse, col_lse, right = output
    ctx.mark_non_differentiable(row_lse, col_lse, right)
    ctx.save_for_backward(image, text, labels, curv, logit_scale, row_lse, col_lse, right)


def _gradients(ctx, grad, *_):
    dx, dy, dcurv, dscale = torch.ops.meru_fast.contrastive_backward(grad, *ctx.saved_tensors, *ctx.options)
    return dx, dy, None, dcurv, dscale, *[None] * len(ctx.options)


def _refuse(ctx, *_):
    raise RuntimeError(
        "contrastive_loss has no second derivative: its backward pass keeps nothing to differentiate again"
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)
_backward.register_autograd(_refuse)


def _engine(
    image: Tensor, text: Tensor, curv: Tensor, scale: Tensor, geometry: str
) -> tuple[TorchEngine, Tensor, Tensor]:
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    return TorchEngine(geometry, curv.to(dtype).view(()), scale.to(dtype).view(())), image.to(dtype), text.to(dtype)


def _labels(labels: Tensor | None, image: Tensor) -> Tensor:
    return torch.arange(len(image), device=image.device) if labels is None else labels


def as_scalar(value: float | Tensor, name: str, like: Tensor) -> Tensor:
    """A 0-dim tensor on the device of ``like``, made without a copy from the host."""
    if not isinstance(value, Tensor):
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.full((), float(value), dtype=dtype, device=like.device)
    if value.numel() != 1:
        raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")
    return value.reshape(())


def _check(
    image: Tensor,
    text: Tensor,
    labels: Tensor | None,
    geometry: str,
    precision: str,
    group: "dist.ProcessGroup | None",
    ring: bool,
) -> None:
    if geometry not in GEOMETRIES:
        raise ValueError(f"geometry is {geometry!r}, expected one of {', '.join(GEOMETRIES)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    for name, points in (("image", image), ("text", text)):
        if not points.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {points.dtype}")
        if points.dim() != 2 or points.numel() == 0:
            raise ValueError(f"{name} must be [rows, D] and not empty, got shape {tuple(points.shape)}")
    if image.dtype != text.dtype or image.device != text.device or image.shape[1] != text.shape[1]:
        raise ValueError(
            f"image and text must agree in dtype, device and D, got {image.dtype} {image.device} {tuple(image.shape)} "
            f"and {text.dtype} {text.device} {tuple(text.shape)}"
        )
    if labels is None:
        if len(image) != len(text):
            raise ValueError(f"{len(image)} images and {len(text)} texts: pass labels, the text row of each image")
    elif labels.dtype != torch.int64 or labels.shape != image.shape[:1]:
        raise ValueError(f"labels must be int64 [{len(image)}], got {labels.dtype} {tuple(labels.shape)}")
    elif group is not None:
        raise ValueError(
            "labels and group cannot be combined: with a group, image i belongs to text i of the same rank"
        )
    if ring and group is None:
        raise ValueError("ring passes texts around a process group: give the group too")
