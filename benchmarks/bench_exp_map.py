"""exp_map0: lift tangent vectors onto the hyperboloid. Memory-bound: two tensor passes forward, three backward."""

import torch
from torch import Tensor

from benchmarks import embeddings, peers, published
from benchmarks.harness import Case, Op, Variant, Work, grid
from meru_fast import lorentz, ops


def inputs(case: Case, device: torch.device, seed: int) -> list[Tensor]:
    image, _ = embeddings.tangent_pairs(case.rows, case.dim, case.data, device, seed)
    return [image.requires_grad_(), torch.tensor(1.0, device=device, requires_grad=True)]


def work(case: Case) -> Work:
    one_pass = case.rows * case.dim * case.dtype.itemsize
    return Work(forward_bytes=2 * one_pass, backward_bytes=3 * one_pass)


OP = Op(
    name="exp_map0",
    inputs=inputs,
    variants=[
        Variant("meru_fast", ops.exp_map0),
        Variant("eager", published.exp_map0),
        Variant("torch.compile", published.exp_map0, compiled=True),
        Variant("geoopt", peers.geoopt_exp_map0, package="geoopt"),
        Variant("hypll", peers.hypll_exp_map0, package="hypll"),
    ],
    reference=lorentz.exp_map0,
    work=work,
    cases={
        "smoke": grid([33], [24]),
        "cpu": grid([4_096, 65_536]),
        "gpu": grid([2_048, 65_536, 1_048_576], [512, 768]) + grid([1_048_576], dtype=torch.bfloat16),
    },
    reference_max=1 << 42,
)
test_exp_map0 = OP.as_test()
