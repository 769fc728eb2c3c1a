"""The whole MERU objective from raw projected features: lift, contrastive loss, entailment loss."""

import torch
import torch.distributed as dist
from torch import Tensor

from meru_fast.distributed import mean_over_ranks, sum_gradient
from meru_fast.lorentz import check_points

from .arguments import scalar
from .contrastive import contrastive_loss
from .entailment import entailment_loss
from .exp_map import exp_map0


def meru_loss(
    image_raw: Tensor,
    text_raw: Tensor,
    visual_alpha: float | Tensor,
    textual_alpha: float | Tensor,
    curv: float | Tensor,
    logit_scale: float | Tensor,
    *,
    entail_weight: float = 0.2,
    min_radius: float = 0.1,
    precision: str = "high",
    group: "dist.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``contrastive + entail_weight * entailment`` of ``exp_map0(alpha * raw)`` (arXiv 2304.09172, section 3).

    Args:
        image_raw: ``[b, D]`` projected image features, before scaling and lift; any float dtype, computed in float32
            or better.
        text_raw: ``[b, D]`` projected text features; row ``i`` belongs to image ``i``.
        visual_alpha: scale of the image features before the lift (linear value), a number or a tensor of one element.
        textual_alpha: the same for the text features.
        curv: ``c > 0`` where the hyperboloid has curvature ``-c``.
        logit_scale: inverse temperature.
        entail_weight: weight of the entailment loss; with 0 it is still returned, without a gradient.
        min_radius: ``K`` of the entailment cones.
        precision: see ``contrastive_loss``.
        group: process group over which the batch is spread. Losses are those of the whole batch, feature gradients
            those of the whole loss by this rank's rows, scalar gradients complete on every rank.

    Returns:
        ``(loss, contrastive, entailment)``, 0-dim float32 (float64 for float64 inputs); the parts carry no gradient.

    Raises:
        TypeError: integer features.
        ValueError: features that do not fit together, no such precision, a scalar that is not one positive number, or a
            negative `min_radius`.
    """
    check_points(image_raw, text_raw)
    dtype = torch.float64 if image_raw.dtype == torch.float64 else torch.float32
    scalars = [
        scalar(name, value, image_raw)
        for name, value in (("visual_alpha", visual_alpha), ("textual_alpha", textual_alpha), ("curv", curv))
    ]
    curv = scalars[2]
    # These act on this rank's rows only, so their gradients are parts of a sum.
    scalars = list(sum_gradient(torch.stack([value.to(dtype) for value in scalars]), group).unbind())
    scale_x, scale_y, local_curv = scalars
    image = exp_map0(image_raw.to(dtype), local_curv, scale=scale_x)
    text = exp_map0(text_raw.to(dtype), local_curv, scale=scale_y)
    contrastive = contrastive_loss(image, text, curv, logit_scale, precision=precision, group=group)
    entailment = entailment_loss(text, image, local_curv, min_radius=min_radius)
    entailment = mean_over_ranks(entailment, group)
    loss = contrastive + entail_weight * entailment if entail_weight else contrastive
    return loss, contrastive.detach(), entailment.detach()
