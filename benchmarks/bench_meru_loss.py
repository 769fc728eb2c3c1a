"""meru_loss: lift, contrastive and entailment losses from the projected features, as the model calls it."""

from functools import partial

import torch
from torch import Tensor

from benchmarks import embeddings, published
from benchmarks.bench_contrastive import PRECISIONS, fused, work
from benchmarks.harness import Case, Op, Variant, grid
from meru_fast import lorentz, ops

ENTAIL_WEIGHT = 0.2


def inputs(case: Case, device: torch.device, seed: int) -> list[Tensor]:
    """Raw features as wide as encoders give them, two alphas of 1/sqrt(D), curv, logit_scale."""
    tangents = embeddings.tangent_pairs(case.rows, case.dim, case.data, device, seed)
    raw = [(x * case.dim**0.5).requires_grad_() for x in tangents]
    scalars = [case.dim**-0.5, case.dim**-0.5, 1.0, case.scale]
    return [*raw, *(torch.tensor(value, device=device, requires_grad=True) for value in scalars)]


def fused_loss(*arguments: Tensor, precision: str) -> Tensor:
    return ops.meru_loss(*arguments, entail_weight=ENTAIL_WEIGHT, precision=precision)[0]


def eager(image: Tensor, text: Tensor, image_alpha: Tensor, text_alpha: Tensor, curv: Tensor, scale: Tensor) -> Tensor:
    image, text = published.exp_map0(image * image_alpha, curv), published.exp_map0(text * text_alpha, curv)
    contrastive = published.lorentz_contrastive(image, text, curv, scale)
    return contrastive + ENTAIL_WEIGHT * published.entailment_loss(text, image, curv)


def exact(image: Tensor, text: Tensor, image_alpha: Tensor, text_alpha: Tensor, curv: Tensor, scale: Tensor) -> Tensor:
    image, text = lorentz.exp_map0(image * image_alpha, curv), lorentz.exp_map0(text * text_alpha, curv)
    contrastive = published.chunked_symmetric_loss(lambda rows: -scale * lorentz.pairwise_dist(rows, text, curv), image)
    excess = lorentz.oxy_angle(text, image, curv) - lorentz.half_aperture(text, curv)
    return contrastive + ENTAIL_WEIGHT * excess.clamp(min=0).mean()


OP = Op(
    name="meru_loss",
    inputs=inputs,
    variants=[
        *(fused(word, partial(fused_loss, precision=word)) for word in PRECISIONS),
        Variant("eager", eager),
        Variant("torch.compile", eager, compiled=True),
    ],
    reference=exact,
    work=work,
    cases={"smoke": grid([33], [24]), "cpu": grid([4_096]), "gpu": grid([2_048, 32_768, 65_536])},
    reference_max=1 << 32,
)
test_meru_loss = OP.as_test()
