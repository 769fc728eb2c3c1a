"""Contrastive loss between two sets of embeddings: both directions from one pass over the logits, memory O(B).

    logit_ij = -logit_scale * dist(image_i, text_j)      (lorentz)      logit_scale * <image_i, text_j>      (cosine)
    loss     = 1 / (2 b) * sum_i [LSE_j logit_ij + LSE_k logit_kp - 2 logit_ip],   p = labels_i

as in Desai et al., "Hyperbolic Image-Text Representations", section 3 (arXiv 2304.09172), and CLIP. No ``B x B`` tensor
exists in forward or backward: tiles of logits are made, used and, for the gradients, made again. With a process group
every rank gathers the texts only, computes its ``b x B`` block once, and column statistics are merged over the ranks.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import contrastive_group
from .arguments import MAX_WIDTH, scalar
from .backend import active_backend
from .contrastive_torch import TorchEngine

GEOMETRIES = ("lorentz", "cosine")
PRECISIONS = ("highest", "high", "medium")  # the words of torch.set_float32_matmul_precision
LN2 = math.log(2)


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
        precision: of the matrix products of the GPU kernels. ``"highest"``: all faithful to float32; ``"high"``: logits
            faithful to float32, gradient products in bfloat16 with float32 accumulation; ``"medium"``: everything in
            bfloat16 with float32 accumulation. The PyTorch path computes all three in full.
        group: process group over which the batch is spread, every rank holding the same number of pairs. The returned
            loss and the scalars' gradients are those of the whole batch on every rank; the feature gradients are those
            of the whole loss by this rank's rows.
        labels: ``[b]`` int64, the row of ``text`` that belongs to each image; several images may share a text. The
            text-to-image direction then counts the labelled texts, once per image. Default: row i belongs to row i.
        ring: with ``group``, pass the texts around so that no rank ever holds all of them.

    Returns:
        The loss, 0-dim, float32 (float64 for float64 inputs).

    Raises:
        TypeError: integer points.
        ValueError: inputs that do not fit together, or no such geometry or precision; the message names them.
        RuntimeError: on a second derivative.
    """
    _check(image, text, labels, geometry, precision, group, ring)
    curv, logit_scale = scalar("curv", curv, image), scalar("logit_scale", logit_scale, image)
    name = ""
    if group is not None:
        contrastive_group.check_equal_rows(len(image), group, image.device)
        name = contrastive_group.register(group)
    backend = active_backend(image, text, max_width=MAX_WIDTH)
    return torch.ops.meru_fast.contrastive_forward(
        image, text, labels, curv, logit_scale, geometry, precision, backend, name, ring
    )[0]


def _engine(geometry: str, precision: str, backend: str, dtype: torch.dtype, curv: Tensor, scale: Tensor) -> Any:
    if backend == "torch":
        return TorchEngine(geometry, dtype, curv, scale)
    from meru_fast.kernels.contrastive import TritonEngine

    return TritonEngine(geometry, precision, dtype, curv, scale)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and what the backward pass needs: statistics, given pairs and both operands."""
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        engine = _engine(geometry, precision, backend, image.dtype, curv, logit_scale)
        if group:
            kept = contrastive_group.forward(engine, image, text, group, ring)
            return *kept[:5], *kept.left, *kept.right
        b = len(image)
        left, right, pair = engine.prepare(image, text, labels)
        reference, counts = _references(pair, len(right.time), labels)
        weight = LN2 / (2 * b)
        row_gap, col_gap, parts = engine.forward(left, right, pair, reference, True, labels, counts, b, weight)
        loss = parts.sum()
        if counts is None:
            reference = pair.new_empty(0)  # the pairs' own logits
        else:  # the columns' part is relative to their references, not to each pair
            loss += ((reference * counts).sum() - pair[1:, :b].sum()) * weight
            col_gap -= counts.log2()
        return loss, row_gap, col_gap, reference, pair, *left, *right


def _references(pair: Tensor, columns: int, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A logit of each column that its statistics are relative to, and how often each column is a label."""
    if labels is None:
        return pair[1], None
    zeros = pair.new_zeros(columns)
    reference = zeros.scatter_reduce(0, labels, pair[1, : len(labels)], "amax", include_self=False)
    return reference, zeros.scatter_add(0, labels, torch.ones_like(labels, dtype=pair.dtype))


@_forward.register_fake
def _(image, text, labels, curv, logit_scale, geometry, precision, backend, group, ring):
    engine = _engine(geometry, precision, backend, image.dtype, curv, logit_scale)
    rows, cols = (engine.padded(points.shape[0]) for points in (image, text))
    world = contrastive_group.size(group) if group else 1
    left = engine.empty_side(image, rows, image.shape[1])
    right = engine.empty_side(text, cols if ring else cols * world, text.shape[1])
    references = cols * world if group or labels is not None else 0
    shapes = (), (rows,), (cols * world,), (references,), (3, rows)
    return *(left.time.new_empty(shape) for shape in shapes), *left, *right


@torch.library.custom_op("meru_fast::contrastive_backward", mutates_args=())
def _backward(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    labels: Tensor | None,
    curv: Tensor,
    logit_scale: Tensor,
    row_gap: Tensor,
    col_gap: Tensor,
    reference: Tensor,
    pair: Tensor,
    left: Tensor,
    left_time: Tensor,
    left_scale: Tensor,
    right: Tensor,
    right_time: Tensor,
    right_scale: Tensor,
    geometry: str,
    precision: str,
    backend: str,
    group: str,
    ring: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of image, text, curv and logit_scale."""
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        engine = _engine(geometry, precision, backend, image.dtype, curv, logit_scale)
        sides = engine.side(left, left_time, left_scale), engine.side(right, right_time, right_scale)
        if group:
            kept = contrastive_group.Forward(grad, row_gap, col_gap, reference, pair, *sides)
            grads = contrastive_group.backward(engine, kept, image, text, group, ring, grad)
        else:
            b = len(image)
            given = pair, pair[1] if labels is None else reference
            gaps = row_gap, col_gap
            tiles = engine.backward(*sides, *given, True, labels, *gaps, b, math.log2(2 * b))
            grads = engine.finish(image, text, labels, *sides, *given, *gaps, tiles, 0.5 / b, grad)
        dx, dy, dcurv, dscale = grads
        return dx, dy, dcurv.to(curv.dtype), dscale.to(logit_scale.dtype)


@_backward.register_fake
def _(grad, image, text, labels, curv, logit_scale, *_):
    points = image.new_empty(image.shape), text.new_empty(text.shape)
    return *points, torch.empty_like(curv), torch.empty_like(logit_scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, labels, curv, logit_scale, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(image, text, labels, curv, logit_scale, *output[1:])


def _gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx, dy, dcurv, dscale = torch.ops.meru_fast.contrastive_backward(grad, *ctx.saved_tensors, *ctx.options)
    return dx, dy, None, dcurv, dscale, *[None] * len(ctx.options)


def _refuse(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError("contrastive_loss has no second derivative: its backward pass keeps nothing to differentiate")


_forward.register_autograd(_gradients, setup_context=_setup_context)
_backward.register_autograd(_refuse)


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
        if image.shape[0] != text.shape[0]:
            raise ValueError(f"{len(image)} images and {len(text)} texts: pass labels, the text row of each image")
    elif labels.dtype != torch.int64 or labels.shape != image.shape[:1]:
        raise ValueError(f"labels must be int64 [{len(image)}], got {labels.dtype} {tuple(labels.shape)}")
    elif group is not None:
        raise ValueError("labels and group cannot be combined: with a group, image i belongs to text i of its rank")
    if ring and group is None:
        raise ValueError("ring passes texts around a process group: give the group too")
