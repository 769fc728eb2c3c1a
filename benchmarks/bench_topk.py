"""topk: the best 10 of a gallery for each query, by Lorentz inner product. Forward only, 2 Q N D."""

import torch
from torch import Tensor

from benchmarks import embeddings, published
from benchmarks.harness import Case, Op, Variant, Work
from meru_fast import lorentz, ops

K = 10


def inputs(case: Case, device: torch.device, seed: int) -> list[Tensor]:
    """[Q, D] queries among the clusters of the [N, D] gallery."""
    images, texts = embeddings.tangent_pairs(case.columns, case.dim, case.data, device, seed)
    queries, gallery = images[: case.rows], texts
    return [lorentz.exp_map0(queries), lorentz.exp_map0(gallery), torch.tensor(1.0, device=device)]


def fused(queries: Tensor, gallery: Tensor, curv: Tensor) -> Tensor:
    return ops.topk(queries, gallery, K, curv)[0]


def eager(queries: Tensor, gallery: Tensor, curv: Tensor) -> Tensor:
    return published.pairwise_inner(queries, gallery, curv).topk(K).values


def exact(queries: Tensor, gallery: Tensor, curv: Tensor) -> Tensor:
    return lorentz.pairwise_inner(queries, gallery, curv).topk(K).values


OP = Op(
    name="topk",
    inputs=inputs,
    variants=[
        Variant("meru_fast", fused),
        Variant("eager", eager),
        Variant("torch.compile", eager, compiled=True),
    ],
    reference=exact,
    work=lambda case: Work(forward_flop=2.0 * case.rows * case.columns * case.dim),
    cases={
        "smoke": [Case(rows=5, columns=65, dim=24)],
        "cpu": [Case(rows=64, columns=65_536, dim=512), Case(rows=1_024, columns=16_384, dim=512)],
        "gpu": [Case(rows=q, columns=1_048_576, dim=512) for q in (64, 1_024, 16_384)],
    },
    differentiable=False,
)
test_topk = OP.as_test()
