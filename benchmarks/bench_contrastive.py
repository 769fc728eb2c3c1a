"""contrastive_loss, hyperbolic and cosine: the fused loss against everything that computes the same value.

Effective work is 8 B N D for forward and backward together: one pass over the logits forward, a recompute and two
products backward, 2 B N D each. It is the least that needs no B x N memory; every variant is rated by it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import embeddings, peers, published
from benchmarks.harness import Case, Op, Variant, Work, grid
from meru_fast import lorentz, ops

PRECISIONS = ("medium", "high", "highest")


def fused(precision: str, run: Callable[..., Tensor]) -> Variant:
    """Our variant of one precision; the PyTorch path of a CPU computes all of them alike, so one is enough there."""
    return Variant(f"meru_fast {precision}", run, needs_cuda=precision != "high")


CASES = {
    "smoke": grid([65], [24]) + grid([33], [24], data="noise", scale=14.3),
    "cpu": grid([1_024, 4_096, 8_192]) + grid([4_096], data="noise", scale=14.3),
    "gpu": grid([2_048, 8_192, 32_768, 65_536, 262_144])
    + grid([8_192, 65_536], [768])
    + grid([65_536], data="noise", scale=14.3)
    + grid([65_536], dtype=torch.bfloat16),
}


def cosine_inputs(case: Case, device: torch.device, seed: int) -> list[Tensor]:
    image, text = embeddings.pairs(case.rows, case.dim, case.data, device, seed)
    return [image.requires_grad_(), text.requires_grad_(), torch.tensor(case.scale, device=device, requires_grad=True)]


def lorentz_inputs(case: Case, device: torch.device, seed: int) -> list[Tensor]:
    tangents = embeddings.tangent_pairs(case.rows, case.dim, case.data, device, seed)
    points = [lorentz.exp_map0(x.double()).float().requires_grad_() for x in tangents]
    scalars = [torch.tensor(value, device=device, requires_grad=True) for value in (1.0, case.scale)]
    return [*points, *scalars]


def work(case: Case) -> Work:
    one_pass = 2.0 * case.rows * case.columns * case.dim
    return Work(forward_flop=one_pass, backward_flop=3 * one_pass)


def exact_lorentz(image: Tensor, text: Tensor, curv: Tensor, logit_scale: Tensor) -> Tensor:
    return published.chunked_symmetric_loss(lambda rows: -logit_scale * lorentz.pairwise_dist(rows, text, curv), image)


def exact_block(image: Tensor, text: Tensor, curv: Tensor, logit_scale: Tensor, labels: Tensor) -> Tensor:
    return published.block_loss(-logit_scale * lorentz.pairwise_dist(image, text, curv), labels)


def fused_cosine(image: Tensor, text: Tensor, logit_scale: Tensor, precision: str) -> Tensor:
    return ops.contrastive_loss(image, text, 1.0, logit_scale, geometry="cosine", precision=precision)


def block_inputs(case: Case, device: torch.device, seed: int) -> list[Tensor]:
    """The block that the first of columns / rows GPUs computes: its images, everyone's texts, whose are whose."""
    square = Case(rows=case.columns, dim=case.dim, data=case.data, scale=case.scale)
    image, text, *scalars = lorentz_inputs(square, device, seed)
    mine = image.detach()[: case.rows].clone().requires_grad_()
    return [mine, text, *scalars, torch.arange(case.rows, device=device)]


def fused_block(image: Tensor, text: Tensor, curv: Tensor, scale: Tensor, labels: Tensor, precision: str) -> Tensor:
    return ops.contrastive_loss(image, text, curv, scale, labels=labels, precision=precision)


LORENTZ = Op(
    name="contrastive_lorentz",
    inputs=lorentz_inputs,
    variants=[
        *(fused(word, partial(ops.contrastive_loss, precision=word)) for word in PRECISIONS),
        Variant("eager", published.lorentz_contrastive),
        Variant("torch.compile", published.lorentz_contrastive, compiled=True),
        Variant("chunked", published.lorentz_contrastive_chunked, max_rows=262_144),
    ],
    reference=exact_lorentz,
    work=work,
    cases=CASES | {"gpu": CASES["gpu"] + grid([1_048_576])},
    reference_max=1 << 32,
)
COSINE = Op(
    name="contrastive_cosine",
    inputs=cosine_inputs,
    variants=[
        *(fused(word, partial(fused_cosine, precision=word)) for word in PRECISIONS),
        Variant("eager", published.cosine_contrastive),
        Variant("torch.compile", published.cosine_contrastive, compiled=True),
        Variant("chunked", published.cosine_contrastive_chunked, max_rows=262_144),
        Variant("open_clip", peers.open_clip_loss, package="open_clip_torch"),
        Variant("inf-cl", peers.inf_cl_loss, package="inf-cl", needs_cuda=True, max_rows=262_144),
    ],
    reference=published.cosine_contrastive_chunked,
    work=work,
    cases=CASES,
    reference_max=1 << 32,
)
BLOCK = Op(
    name="contrastive_block",
    inputs=block_inputs,
    variants=[
        *(fused(word, partial(fused_block, precision=word)) for word in PRECISIONS),
        Variant("eager", published.lorentz_contrastive_block),
        Variant("torch.compile", published.lorentz_contrastive_block, compiled=True),
    ],
    reference=exact_block,
    work=work,
    cases={
        "smoke": [Case(rows=9, columns=33, dim=24)],
        "cpu": [Case(rows=256, columns=2_048, dim=512)],
        "gpu": [Case(rows=n // gpus, columns=n, dim=512) for n in (2_048, 65_536) for gpus in (8, 16, 32, 64)],
    },
    reference_max=1 << 32,
)
test_contrastive_lorentz = LORENTZ.as_test()
test_contrastive_cosine = COSINE.as_test()
test_contrastive_block = BLOCK.as_test()
