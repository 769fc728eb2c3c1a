"""Nearest neighbours in the geometry of a model, and the scores counted from them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from meru_fast.models import CLIP

QUERY_CHUNK = 1024
GALLERY_CHUNK = 16384


@torch.inference_mode()
def nearest(model: "CLIP", queries: Tensor, gallery: Tensor, k: int) -> Tensor:
    """Positions [Q, k] of the best `gallery` entries for every query, best first.

    The score is that of ``model.similarity`` (Lorentz inner product, which orders like the negative distance, or dot
    product). The score matrix is never held: memory is O(Q * k) and a block.

    Args:
        queries: [Q, D] projected features.
        gallery: [G, D] projected features; G >= k.
    """
    if model.geometry == "lorentz":
        from meru_fast import ops

        return ops.topk(queries, gallery, k, model.scalar("curv"))[1]
    found = [_nearest_dot(chunk, gallery, k) for chunk in queries.split(QUERY_CHUNK)]
    return torch.cat(found)


def _nearest_dot(queries: Tensor, gallery: Tensor, k: int) -> Tensor:
    best = torch.full((len(queries), k), -torch.inf, device=queries.device)
    where = torch.zeros((len(queries), k), dtype=torch.long, device=queries.device)
    for start in range(0, len(gallery), GALLERY_CHUNK):
        block = gallery[start : start + GALLERY_CHUNK]
        scores, positions = (queries @ block.T).topk(min(k, len(block)), dim=1)
        best, order = torch.cat([best, scores], dim=1).topk(k, dim=1)
        where = torch.cat([where, positions + start], dim=1).gather(1, order)
    return where


def accuracies(ranked: Tensor, labels: Tensor, num_classes: int, prefix: str = "") -> dict[str, float]:
    """Classification scores as fractions, in the names of CLIP_benchmark.

    Args:
        ranked: [N, k] classes of each sample, best first.
        labels: [N] true classes.

    Returns:
        ``acc1``, ``acc5`` (with five classes or more) and ``mean_per_class_recall``, the published metric: top-1
        accuracy averaged over the classes that occur or are predicted (a class that is only predicted counts as 0).
    """
    hits = ranked == labels[:, None]
    total = torch.bincount(labels, minlength=num_classes)
    right = torch.bincount(labels[hits[:, 0]], minlength=num_classes).double()
    seen = (total + torch.bincount(ranked[:, 0], minlength=num_classes)) > 0
    scores = {"acc1": hits[:, 0].double().mean().item()}
    if ranked.shape[1] >= 5:
        scores["acc5"] = hits[:, :5].any(dim=1).double().mean().item()
    scores["mean_per_class_recall"] = (right / total.clamp(min=1))[seen].mean().item()
    return {f"{prefix}{name}": value for name, value in scores.items()}


def recalls(ranked: Tensor, pairs: Tensor, queries: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """Share of the queries with a true match among the first k, for every k.

    Args:
        ranked: [Q, K] gallery positions of each query, best first.
        pairs: [P, 2] (query, gallery) positions that belong together.
        queries: [Q] position of each row's query in the numbering of `pairs`.
    """
    size = max(int(ranked.max()), int(pairs[:, 1].max())) + 1
    true = pairs[:, 0] * size + pairs[:, 1]
    hits = torch.isin(queries[:, None] * size + ranked, true)
    return {k: hits[:, :k].any(dim=1).double().mean().item() for k in ks}
