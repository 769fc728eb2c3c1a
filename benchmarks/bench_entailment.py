"""entailment_loss over matching pairs. Memory-bound: forward reads both sides, backward reads both and writes both."""

import torch
from torch import Tensor

from benchmarks import embeddings, published
from benchmarks.harness import Case, Op, Variant, Work, grid
from meru_fast import lorentz, ops


def inputs(case: Case, device: torch.device, seed: int) -> list[Tensor]:
    tangents = embeddings.tangent_pairs(case.rows, case.dim, case.data, device, seed)
    image, text = (lorentz.exp_map0(x.double()).float().requires_grad_() for x in tangents)
    return [text, image, torch.tensor(1.0, device=device, requires_grad=True)]


def exact(text: Tensor, image: Tensor, curv: Tensor) -> Tensor:
    return (lorentz.oxy_angle(text, image, curv) - lorentz.half_aperture(text, curv)).clamp(min=0).mean()


def work(case: Case) -> Work:
    both_sides = 2 * case.rows * case.dim * case.dtype.itemsize
    return Work(forward_bytes=both_sides, backward_bytes=2 * both_sides)


OP = Op(
    name="entailment_loss",
    inputs=inputs,
    variants=[
        Variant("meru_fast", ops.entailment_loss),
        Variant("eager", published.entailment_loss),
        Variant("torch.compile", published.entailment_loss, compiled=True),
    ],
    reference=exact,
    work=work,
    cases={
        "smoke": grid([33], [24]),
        "cpu": grid([4_096, 65_536]),
        "gpu": grid([2_048, 65_536, 1_048_576], [512, 768]) + grid([1_048_576], dtype=torch.bfloat16),
    },
    reference_max=1 << 42,
)
test_entailment_loss = OP.as_test()
