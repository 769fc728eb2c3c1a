"""pairwise_dist: all Lorentz distances of two sets. Forward one matrix product with B x N results, backward two."""

import torch
from torch import Tensor

from benchmarks import embeddings, peers, published
from benchmarks.harness import Case, Op, Variant, Work, grid
from meru_fast import lorentz, ops


def inputs(case: Case, device: torch.device, seed: int) -> list[Tensor]:
    """Points on the hyperboloid, lifted in fp64 so that every variant gets the same."""
    tangents = embeddings.tangent_pairs(case.rows, case.dim, case.data, device, seed)
    points = [lorentz.exp_map0(x.double()).float().requires_grad_() for x in tangents]
    return [*points, torch.tensor(1.0, device=device, requires_grad=True)]


def work(case: Case) -> Work:
    product = 2.0 * case.rows * case.columns * case.dim
    return Work(forward_flop=product, backward_flop=2 * product)


OP = Op(
    name="pairwise_dist",
    inputs=inputs,
    variants=[
        Variant("meru_fast", ops.pairwise_dist),
        Variant("eager", published.pairwise_dist),
        Variant("torch.compile", published.pairwise_dist, compiled=True),
        Variant("geoopt", peers.geoopt_pairwise_dist, package="geoopt", max_rows=1_024),
        Variant("hypll", peers.hypll_pairwise_dist, package="hypll", max_rows=4_096),
    ],
    reference=lorentz.pairwise_dist,
    work=work,
    cases={"smoke": grid([33], [24]), "cpu": grid([512, 4_096]), "gpu": grid([1_024, 4_096, 16_384], [512, 768])},
)
test_pairwise_dist = OP.as_test()
