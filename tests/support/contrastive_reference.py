"""The contrastive loss written down plainly: the whole logit matrix, in the dtype of its inputs."""

import torch
import torch.nn.functional as F
from torch import Tensor


def logits(image: Tensor, text: Tensor, curv: Tensor, scale: Tensor, geometry: str = "lorentz") -> Tensor:
    """All pairs. The hyperbolic distance in its stable form: the argument of arcosh less 1, from shifted times."""
    if geometry == "cosine":
        return scale * image @ text.T
    square_x, square_y = (curv * points.square().sum(-1) for points in (image, text))
    a, b = (square / (torch.sqrt(1 + square) + 1) for square in (square_x, square_y))
    delta = a[:, None] + b + a[:, None] * b - curv * image @ text.T
    delta = torch.where(delta > 0, delta, torch.finfo(delta.dtype).tiny)
    return -scale * torch.log1p(delta + torch.sqrt(delta * (delta + 2))) / curv.sqrt()


def eager_loss(
    image: Tensor, text: Tensor, curv: Tensor, scale: Tensor, geometry: str = "lorentz", labels: Tensor | None = None
) -> Tensor:
    """Mean of both cross-entropies; a text that several images share counts once per image."""
    all_logits = logits(image, text, curv, scale, geometry)
    if labels is None:
        target = torch.arange(len(image), device=image.device)
        return (F.cross_entropy(all_logits, target) + F.cross_entropy(all_logits.T, target)) / 2
    rows = torch.arange(len(image), device=image.device)
    own = all_logits[rows, labels]
    return (all_logits.logsumexp(1) + all_logits.logsumexp(0)[labels] - 2 * own).mean() / 2


def embeddings(rows: int, width: int, norm: float, kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images and texts: ``noise``; ``clusters`` of 8 topics; ``twins`` with duplicated and nearly duplicated rows."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(rows, width, generator=generator) / width**0.5

    if kind == "noise":
        image, text = noise(), noise()
        text = 0.7 * text + 0.3 * image
    else:
        topics = torch.randn(8, width, generator=generator) / width**0.5
        image = topics[torch.randint(0, 8, (rows,), generator=generator)] + 0.1 * noise()
        text = 0.9 * image + 0.1 * noise()
        if kind == "twins" and rows > 3:
            image[1], text[1] = image[0], text[0]  # the same pair twice
            text[2] = text[3] * (1 + 1e-4)  # two captions that hardly differ
            image[3] = text[3]  # an image on its caption
    return norm * image, norm * text
