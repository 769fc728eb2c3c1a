"""Cones: apertures, exterior angles, the entailment loss."""

import math

import pytest
import torch
from accuracy import assert_contract, near, outcome, points

from meru_fast import lorentz, ops
from meru_fast.ops import entailment_torch
from meru_fast.ops.entailment import cone, pairwise_angle

CASES = [  # rows, width, norm, curv, dtype
    (1, 24, 1.0, 1.0, torch.float32),
    (63, 64, 1e-4, 0.1, torch.float32),
    (129, 512, 1.0, 10.0, torch.float32),
    (1000, 24, 0.5, 1.0, torch.float32),
    (17, 640, 1e4, 0.1, torch.float32),
    (9, 768, 30.0, 10.0, torch.float32),
    (63, 512, 1.0, 1.0, torch.bfloat16),
    (63, 129, 1.0, 0.1, torch.float16),
]


def pair(case: tuple, device: torch.device) -> list[torch.Tensor]:
    """Random and clustered pairs, the root, and equal points. Not exactly collinear ones: the angle is a cone there."""
    rows, width, norm, curv, dtype = case
    x, y = points(rows, width, norm, dtype), points(rows, width, norm, dtype, seed=1)
    y[1::3] = near(x, 0.3)[1::3]
    y[2::3] = near(1.5 * x, 0.1)[2::3].to(dtype)
    if rows > 6:
        x[4], y[6] = 0, x[6]
    return [x.to(device), y.to(device), torch.tensor(curv, device=device)]


def entailment(text: torch.Tensor, image: torch.Tensor, curv: torch.Tensor) -> torch.Tensor:
    opening = lorentz.half_aperture(text, curv, 0.1)
    return (lorentz.oxy_angle(text, image, curv) - 0.7 * opening).clamp(min=0).mean()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_half_aperture_contract(case: tuple, device: torch.device) -> None:
    x, _, curv = pair(case, device)
    with ops.use_backend("triton"):
        assert_contract(ops.half_aperture, lorentz.half_aperture, [x, curv])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_oxy_angle_contract(case: tuple, device: torch.device) -> None:
    with ops.use_backend("triton"):
        assert_contract(ops.oxy_angle, lorentz.oxy_angle, pair(case, device), relative=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.usefixtures("poisoned_empty")
def test_entailment_loss_contract(backend: str, case: tuple, device: torch.device) -> None:
    with ops.use_backend(backend):
        assert_contract(
            lambda text, image, curv: ops.entailment_loss(text, image, curv, 0.1, aperture_scale=0.7),
            entailment,
            pair(case, device),
            relative=1e-6,
        )


@pytest.mark.parametrize(
    "case",
    [
        (1, 1, 24, 1.0, 1.0, torch.float32),
        (35, 66, 24, 1.0, 0.1, torch.float32),
        (5, 9, 512, 0.7, 1.0, torch.float32),
        (9, 5, 640, 30.0, 10.0, torch.float32),
        (6, 6, 63, 1e-4, 0.1, torch.float32),
        (20, 33, 64, 1.0, 1.0, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned_empty")
def test_pairwise_oxy_angle_contract(case: tuple, device: torch.device) -> None:
    m, n, width, norm, curv, dtype = case
    x, y = points(m, width, norm, dtype), points(n, width, norm, dtype, seed=1)
    if m > 3:
        x[0], y[2] = 0, x[2]
    y[3:5] = near(x[3:5], 0.2)
    inputs = [x.to(device), y.to(device), torch.tensor(curv, device=device)]
    # the reference multiplies in fp64; the kernel's differences are rounded to fp32 (an error per unit of the radius)
    floor = {0: 3e-7 * (1 + curv**0.5 * norm)}
    with ops.use_backend("triton"):
        assert_contract(ops.pairwise_oxy_angle, lorentz.pairwise_oxy_angle, inputs, floor, relative=2e-6)


@pytest.mark.parametrize("norm", [30.0, 1e4, 1e18])
@pytest.mark.usefixtures("poisoned_empty")
def test_bands_keep_the_side_of_nearly_parallel_pairs(norm: float, device: torch.device, monkeypatch) -> None:
    monkeypatch.setattr(entailment_torch, "BAND", 1000)
    text, other = points(65, 64, norm), points(65, 64, norm, seed=1)
    inputs = [text.to(device), (1.5 * text + 1e-3 * (other - text)).to(device), torch.tensor(0.7, device=device)]
    with ops.use_backend("torch"):
        mine = outcome(lambda text, image, curv: ops.entailment_loss(text, image, curv, 0.1, 0.7), inputs)
    exact = outcome(entailment, [tensor.double() for tensor in inputs])
    for value, truth in zip(mine, exact, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=2e-6, atol=2e-6 * truth.abs().max().item())


def test_second_derivatives_of_the_torch_path() -> None:
    x, y = (points(3, 5, 1.0, seed=seed).double().requires_grad_() for seed in (0, 1))
    curv = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.entailment_loss, (x, y, curv))
    assert torch.autograd.gradgradcheck(ops.entailment_loss, (x, y, curv))


def test_values_where_the_angle_is_undefined(device: torch.device) -> None:
    x = points(4, 16, 1.0).to(device)
    root = torch.zeros_like(x)
    for backend in ("triton", "torch"):
        with ops.use_backend(backend):
            for first, second, value in ((root, x, math.pi / 2), (x, x, 0.0), (x, root, math.pi)):
                angle, dx, dy, _ = outcome(ops.oxy_angle, [first, second, torch.tensor(1.0, device=device)])
                torch.testing.assert_close(angle, torch.full_like(angle, value), rtol=1e-6, atol=0)
                if value != math.pi:
                    assert not dx.any()
                    assert not dy.any()
                pairs = ops.pairwise_oxy_angle(first, second).diagonal()
                torch.testing.assert_close(pairs, torch.full_like(angle, value), rtol=1e-6, atol=0)


def test_finite_gradients_everywhere(device: torch.device) -> None:
    """The published loss is NaN for the saturated lift (norm 2^15) and at the rim of a cone."""
    curv = torch.tensor(10.0, device=device)
    for norm in (0.0, 1e-30, 1e-8, 0.2 / 10**0.5, 1.0, 1e3, 32768.0, 1e18):
        x, other = points(6, 16, 1.0).to(device) * norm, points(6, 16, 1.0, seed=1).to(device) * norm
        for y in (other, x, -x, 2 * x, torch.zeros_like(x)):
            for op in (ops.oxy_angle, ops.entailment_loss, ops.pairwise_oxy_angle):
                for backend in ("triton", "torch"):
                    with ops.use_backend(backend):
                        results = outcome(op, [x, y.clone(), curv])
                    assert all(result.isfinite().all() for result in results), (op.__name__, norm, backend)
        with ops.use_backend("triton"):
            assert all(result.isfinite().all() for result in outcome(ops.half_aperture, [x, curv]))


def test_the_loss_vanishes_inside_the_cone_and_pulls_outside(device: torch.device) -> None:
    text = points(8, 32, 0.5).to(device)
    inside, outside = 3 * text, near(text.cpu(), 1.0).to(device)
    curv = torch.tensor(1.0, device=device)
    with ops.use_backend("triton"):
        loss, dtext, dimage, dcurv = outcome(ops.entailment_loss, [text, inside, curv])
        assert loss == 0
        assert not dtext.any()
        assert not dimage.any()
        assert dcurv == 0
        outside.requires_grad_()
        before = ops.entailment_loss(text, outside, curv)
        step = torch.autograd.grad(before, outside)[0]
        after = ops.entailment_loss(text, outside - 0.05 * step / step.norm(dim=1, keepdim=True), curv)
    assert after < before


def test_layouts(device: torch.device) -> None:
    x, y = points(24, 40, 1.0).to(device), points(24, 40, 1.0, seed=1).to(device)
    with ops.use_backend("triton"):
        flat = ops.oxy_angle(x, y, 0.5)
        assert torch.equal(ops.oxy_angle(x.view(2, 12, 40), y.view(2, 12, 40), 0.5), flat.view(2, 12))
        assert torch.equal(ops.oxy_angle(x[::2], y.T.contiguous().T[::2], 0.5), flat[::2])
        table = ops.oxy_angle(x[:3, None], y[None, :4], 0.5)
        torch.testing.assert_close(table, ops.pairwise_oxy_angle(x[:3], y[:4], 0.5), rtol=1e-5, atol=1e-6)
        assert ops.half_aperture(x.view(2, 3, 4, 40)).shape == (2, 3, 4)
        assert ops.oxy_angle(x[:0], y[:0]).shape == (0,)
        assert ops.half_aperture(x[:0]).shape == (0,)
        assert ops.pairwise_oxy_angle(x[:0], y).shape == (0, 24)
        loss = ops.entailment_loss(x.view(2, 12, 40), y.view(2, 12, 40), 0.5)
        torch.testing.assert_close(loss, ops.entailment_loss(x, y, 0.5))


def test_custom_op_rules(device: torch.device) -> None:
    x, y = (points(5, 24, 1.0, seed=seed).to(device).requires_grad_() for seed in (0, 1))
    curv = torch.tensor(0.5, device=device, requires_grad=True)
    torch.library.opcheck(cone, ("aperture", x, None, curv, 0.1, 1.0))
    torch.library.opcheck(cone, ("angle", x, y, curv, 0.1, 1.0))
    torch.library.opcheck(cone, ("entailment", x, y, curv, 0.1, 0.7))
    torch.library.opcheck(pairwise_angle, (x, y, curv))
    torch.library.opcheck(entailment_torch.split, (x, y))


@pytest.mark.parametrize("name", ["half_aperture", "oxy_angle", "pairwise_oxy_angle", "entailment_loss"])
def test_compiles_into_one_graph_and_refuses_double_backward(name: str, device: torch.device) -> None:
    op = getattr(ops, name)
    inputs = [points(5, 24, 1.0, seed=seed).to(device) for seed in (0, 1)] + [torch.tensor(0.5, device=device)]
    if name == "half_aperture":
        del inputs[1]
    for backend in ("torch", "triton"):
        torch.compiler.reset()
        with ops.use_backend(backend):
            compiled = torch.compile(lambda *leaves: op(*leaves), fullgraph=True, backend="aot_eager")
            for mine, eager in zip(outcome(compiled, inputs), outcome(op, inputs), strict=True):
                torch.testing.assert_close(mine, eager)
    x = inputs[0].requires_grad_()
    with ops.use_backend("triton"):
        first = torch.autograd.grad(op(x, *inputs[1:]).sum(), x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r"no double backward.*meru_fast.lorentz"):
            torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(3, 3), 1.0), r"one shape, got \(2, 3\) and \(3, 3\)"),
        ((torch.ones(0, 3), torch.ones(0, 3), 1.0), "empty batch"),
        ((torch.ones(2, 3), torch.ones(2, 3), 1.0, -0.1), "min_radius must not be negative, got -0.1"),
        ((torch.ones(2, 3), torch.ones(2, 3), 0.0), "curv must be positive, got 0.0"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.entailment_loss(*arguments)
