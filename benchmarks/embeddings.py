"""Inputs like those of a model: unit-norm noise as at initialisation, and clusters as after training.

Data matters for speed as for accuracy: GPUs clock higher on easy numbers, and close pairs are where arithmetic fails.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

PUBLISHED_NORM = {"image": 0.8, "text": 0.6}
"""Typical |x| before the lift in trained MERU models: captions lie nearer to the root than images."""


def _clustered(rows: int, dim: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pairs at cosine 0.60 in clusters of 16 at cosine 0.55: the loss is near 1 at scale 100, as in training."""

    def noise(count: int) -> Tensor:
        return normalize(torch.randn(count, dim, generator=generator, device=device), dim=-1)

    clusters = max(1, rows // 16)
    which = torch.randint(clusters, (rows,), generator=generator, device=device)
    shared = 0.55**0.5 * noise(clusters)[which] + 0.05**0.5 * noise(rows)
    return tuple(normalize(shared + 0.4**0.5 * noise(rows), dim=-1) for _ in range(2))


def pairs(rows: int, dim: int, kind: str, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Matching unit vectors (image, text), fp32 [rows, dim]; `kind` is "clusters" or "noise"."""
    generator = torch.Generator(device).manual_seed(seed)
    if kind == "clusters":
        return _clustered(rows, dim, generator, device)
    if kind == "noise":
        both = [torch.randn(rows, dim, generator=generator, device=device) for _ in range(2)]
        return normalize(both[0], dim=-1), normalize(both[1], dim=-1)
    raise ValueError(f"kind must be 'clusters' or 'noise', not {kind!r}")


def tangent_pairs(rows: int, dim: int, kind: str, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Matching tangent vectors at the root with the norms of trained models, fp32 [rows, dim]."""
    image, text = pairs(rows, dim, kind, device, seed)
    return PUBLISHED_NORM["image"] * image, PUBLISHED_NORM["text"] * text
