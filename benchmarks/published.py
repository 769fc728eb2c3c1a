"""The published formulas in plain PyTorch, as most people would write them: the baselines of every table.

Written from the papers (MERU, arXiv 2304.09172, equations 1-9; CLIP, arXiv 2103.00020, figure 3) with the published
clamps (eps 1e-8, lift capped at asinh(2^15)). Space components only, curvature -curv. They keep every B x N matrix.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

EPS = 1e-8
LIFT_LIMIT = math.asinh(2**15)


def exp_map0(x: Tensor, curv: Tensor) -> Tensor:
    """MERU equation 5 at the root."""
    radius = curv**0.5 * x.norm(dim=-1, keepdim=True)
    return torch.sinh(radius.clamp(EPS, LIFT_LIMIT)) * x / radius.clamp(min=EPS)


def log_map0(x: Tensor, curv: Tensor) -> Tensor:
    """Inverse of the above, through the time component."""
    time = (1 + curv * (x**2).sum(-1, keepdim=True)) ** 0.5
    return torch.acosh(time.clamp(min=1 + EPS)) * x / (curv**0.5 * x.norm(dim=-1, keepdim=True)).clamp(min=EPS)


def _time(x: Tensor, curv: Tensor) -> Tensor:
    return (1 / curv + (x**2).sum(-1, keepdim=True)) ** 0.5


def pairwise_inner(x: Tensor, y: Tensor, curv: Tensor) -> Tensor:
    """MERU equation 1 for all pairs, [B1, B2]."""
    return x @ y.T - _time(x, curv) @ _time(y, curv).T


def pairwise_dist(x: Tensor, y: Tensor, curv: Tensor) -> Tensor:
    """MERU equation 4 for all pairs, [B1, B2]."""
    return torch.acosh((-curv * pairwise_inner(x, y, curv)).clamp(min=1 + EPS)) / curv**0.5


def half_aperture(x: Tensor, curv: Tensor, min_radius: float = 0.1) -> Tensor:
    """MERU equation 7, [B]."""
    sine = 2 * min_radius / (x.norm(dim=-1) * curv**0.5 + EPS)
    return torch.asin(sine.clamp(-1 + EPS, 1 - EPS))


def oxy_angle(x: Tensor, y: Tensor, curv: Tensor) -> Tensor:
    """MERU equation 8: exterior angle at x of the triangle (root, x, y), [B]."""
    x_time, y_time = _time(x, curv).squeeze(-1), _time(y, curv).squeeze(-1)
    inner = curv * ((x * y).sum(-1) - x_time * y_time)
    denominator = x.norm(dim=-1) * (inner**2 - 1).clamp(min=EPS).sqrt() + EPS
    return torch.acos(((y_time + inner * x_time) / denominator).clamp(-1 + EPS, 1 - EPS))


def entailment_loss(text: Tensor, image: Tensor, curv: Tensor) -> Tensor:
    """MERU equation 9, the mean over pairs."""
    return (oxy_angle(text, image, curv) - half_aperture(text, curv)).clamp(min=0).mean()


def lorentz_contrastive(image: Tensor, text: Tensor, curv: Tensor, logit_scale: Tensor) -> Tensor:
    """Both directions as published: the distances are computed once for each."""
    labels = torch.arange(len(image), device=image.device)
    image_logits = -logit_scale * pairwise_dist(image, text, curv)
    text_logits = -logit_scale * pairwise_dist(text, image, curv)
    return (cross_entropy(image_logits, labels) + cross_entropy(text_logits, labels)) / 2


def block_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Symmetric loss of a [b, B] block of logits; the text direction counts the texts that belong to its images."""
    rows = torch.arange(len(labels), device=labels.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T[labels], rows)) / 2


def lorentz_contrastive_block(image: Tensor, text: Tensor, curv: Tensor, logit_scale: Tensor, labels: Tensor) -> Tensor:
    """One rank's [b, B] block as published: its images against all texts, and its texts' columns."""
    return block_loss(-logit_scale * pairwise_dist(image, text, curv), labels)


def cosine_contrastive(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's loss; features are already normalised."""
    labels = torch.arange(len(image), device=image.device)
    logits = logit_scale * image @ text.T
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def chunked_symmetric_loss(logits_of_rows: Callable[[Tensor], Tensor], image: Tensor, chunk: int = 1024) -> Tensor:
    """Symmetric cross entropy over row chunks; each chunk's logits are recomputed in backward instead of kept."""

    def statistics(rows: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = logits_of_rows(rows)
        positive = logits.gather(1, (first + torch.arange(len(rows), device=rows.device))[:, None]).squeeze(1)
        return logits.logsumexp(1), logits.logsumexp(0), positive

    rows_lse, columns_lse, positives = [], [], []
    for first in range(0, len(image), chunk):
        offset = torch.tensor(first, device=image.device)
        row, column, positive = checkpoint(statistics, image[first : first + chunk], offset, use_reentrant=False)
        rows_lse.append(row)
        columns_lse.append(column)
        positives.append(positive)
    image_side = torch.cat(rows_lse)
    text_side = torch.stack(columns_lse).logsumexp(0)
    return ((image_side + text_side) / 2 - torch.cat(positives)).mean()


def lorentz_contrastive_chunked(image: Tensor, text: Tensor, curv: Tensor, logit_scale: Tensor) -> Tensor:
    """The same value with O(B * chunk) memory: what a careful user writes without a kernel."""
    return chunked_symmetric_loss(lambda rows: -logit_scale * pairwise_dist(rows, text, curv), image)


def cosine_contrastive_chunked(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    return chunked_symmetric_loss(lambda rows: logit_scale * rows @ text.T, image)
