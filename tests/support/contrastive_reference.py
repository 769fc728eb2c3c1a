"""The contrastive loss written down plainly (the whole logit matrix, in the dtype of its inputs), and its contract."""

from collections.abc import Callable

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


FLOOR = 4 * 2.0**-23  # four roundings of fp32 of the natural size of a result: where PyTorch happens to be exact
DRAWS = 5  # an error of PyTorch is the largest of so many draws: that of one is partly luck


def outcome(loss: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The loss and its gradients by image, text, curv, logit_scale."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    value = loss(*leaves)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))]


def errors(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Of a gradient of points as one vector: its direction is what training follows."""
    return [(mine.double() - truth).norm().item() for mine, truth in zip(results, exact, strict=True)]


def sizes(inputs: list[Tensor], exact: list[Tensor]) -> list[float]:
    """The natural size of each result: a gradient that nearly vanishes is still made of terms of this size."""
    image, _, curv, scale = (value.double() for value in inputs)
    reach = float((image * curv.sqrt()).norm(dim=1).mean().asinh() / curv.sqrt())
    points = float(scale) / len(image) ** 0.5
    natural = [1.0, points, points, reach * float(scale / curv), reach]
    return [max(value.norm().item(), size) for value, size in zip(exact, natural, strict=True)]


def pytorch_errors(draws: list[list[Tensor]], geometry: str, dtype: torch.dtype) -> list[float]:
    """The largest error of each result of the plain formulas in a dtype, over inputs drawn alike."""
    found = []
    for inputs in draws:
        exact = outcome(lambda *x: eager_loss(*x, geometry), [value.double() for value in inputs])
        found.append(errors(outcome(lambda *x: eager_loss(*x, geometry), [v.to(dtype) for v in inputs]), exact))
    return [max(column) for column in zip(*found, strict=True)]
