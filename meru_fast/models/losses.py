"""Losses over all pairs that are no symmetric softmax: pairwise sigmoids, and cross-entropy in one direction.

Rows are taken in chunks that are computed again in the backward pass, so memory is O(B * chunk), not O(B^2).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup, get_rank
from torch.utils.checkpoint import checkpoint

from meru_fast import ops
from meru_fast.distributed import gather_rows, mean_over_ranks, sum_gradient

CHUNK = 1024


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    curv: Tensor | float,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    geometry: str = "lorentz",
    group: ProcessGroup | None = None,
) -> Tensor:
    """Mean over images of ``-sum_j log sigmoid(z_ij * logit_ij)``, ``z = 1`` for the pair and -1 for all others.

    SigLIP (arXiv:2303.15343, eq. 1) with ``logit = logit_scale * similarity + logit_bias``, where the similarity is the
    negative geodesic distance or the inner product of unit vectors.

    Args:
        image, text: [b, D] embeddings; row i belongs to row i.
        curv: curvature, for lorentz geometry.
        logit_scale, logit_bias: linear values, one element.
        group: as in ``ops.contrastive_loss``: the loss is that of the joint batch, feature gradients are this rank's.

    Raises:
        ValueError: not as many rows on both sides.
    """

    def of_rows(logits: Tensor, target: Tensor) -> Tensor:
        signs = torch.full_like(logits, -1.0).scatter(1, target[:, None], 1.0)
        return -F.logsigmoid(signs * logits).sum()

    return _over_rows(of_rows, image, text, curv, logit_scale, logit_bias, geometry, group)


def one_way_contrastive_loss(
    query: Tensor,
    gallery: Tensor,
    curv: Tensor | float,
    logit_scale: Tensor,
    *,
    geometry: str = "lorentz",
    group: ProcessGroup | None = None,
) -> Tensor:
    """Mean cross-entropy of finding row i of `gallery` from row i of `query`; arguments as in ``sigmoid_loss``."""

    def of_rows(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, reduction="sum")

    return _over_rows(of_rows, query, gallery, curv, logit_scale, None, geometry, group)


def _over_rows(
    of_rows: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    curv: Tensor | float,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    geometry: str,
    group: ProcessGroup | None,
) -> Tensor:
    if len(x) != len(y):
        raise ValueError(f"row i belongs to row i, but there are {len(x)} and {len(y)} rows")
    scalars = [logit_scale] if logit_bias is None else [logit_scale, logit_bias]
    scalars += [curv] if isinstance(curv, Tensor) else []
    local = sum_gradient(torch.stack([scalar.reshape(()).to(x.dtype) for scalar in scalars]), group).unbind()
    scale, bias = local[0], None if logit_bias is None else local[1]
    curv = local[-1] if isinstance(curv, Tensor) else curv
    gallery = gather_rows(y, group)
    first = 0 if group is None else get_rank(group) * len(x)
    targets = torch.arange(first, first + len(x), device=x.device)

    def chunk(rows: Tensor, target: Tensor) -> Tensor:
        similarity = rows @ gallery.T if geometry == "cosine" else -ops.pairwise_dist(rows, gallery, curv)
        logits = scale * similarity
        return of_rows(logits if bias is None else logits + bias, target)

    parts = zip(x.split(CHUNK), targets.split(CHUNK), strict=True)
    total = torch.stack([checkpoint(chunk, rows, target, use_reentrant=False) for rows, target in parts]).sum()
    return mean_over_ranks(total / len(x), group)
