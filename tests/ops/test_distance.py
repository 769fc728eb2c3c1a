"""Inner products and distances, of all pairs and of given pairs."""

import pytest
import torch
from accuracy import assert_contract, near, outcome, points

from meru_fast import lorentz, ops
from meru_fast.ops.distance import lorentz_elementwise, lorentz_pairwise

PAIRWISE = [  # rows of x, rows of y, width, norm, curv, dtype
    (1, 1, 24, 1.0, 1.0, torch.float32),
    (63, 129, 24, 1.0, 0.1, torch.float32),
    (65, 3, 512, 0.7, 1.0, torch.float32),
    (7, 70, 640, 1e4, 10.0, torch.float32),
    (9, 11, 768, 1e-4, 0.1, torch.float32),
    (33, 20, 64, 30.0, 10.0, torch.float32),
    (20, 33, 64, 1.0, 1.0, torch.bfloat16),
    (20, 33, 63, 1.0, 1.0, torch.float16),
]
ELEMENTWISE = [
    (1, 24, 1.0, 1.0, torch.float32),
    (63, 64, 1e-4, 0.1, torch.float32),
    (129, 512, 1.0, 10.0, torch.float32),
    (1000, 24, 0.3, 1.0, torch.float32),
    (17, 640, 1e4, 0.1, torch.float32),
    (9, 768, 30.0, 10.0, torch.float32),
    (63, 512, 1.0, 1.0, torch.bfloat16),
    (63, 129, 1.0, 0.1, torch.float16),
]


@pytest.mark.parametrize("name", ["pairwise_inner", "pairwise_dist"])
@pytest.mark.parametrize("case", PAIRWISE, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_pairwise_contract(name: str, case: tuple, device: torch.device) -> None:
    m, n, width, norm, curv, dtype = case
    x, y = points(m, width, norm, dtype), points(n, width, norm, dtype, seed=1)
    x[0] = 0
    inputs = [x.to(device), y.to(device), torch.tensor(curv, device=device)]
    # the derivative by curvature is a difference that vanishes with the norm: d is a multiple of |x - y| there
    floor = {3: 1e-6 * (m * n) ** 0.5 * norm / curv} if name == "pairwise_dist" else {}
    with ops.use_backend("triton"):
        assert_contract(getattr(ops, name), getattr(lorentz, name), inputs, floor)


@pytest.mark.parametrize("name", ["elementwise_inner", "elementwise_dist"])
@pytest.mark.parametrize("case", ELEMENTWISE, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_elementwise_contract(name: str, case: tuple, device: torch.device) -> None:
    """Random pairs, clustered pairs, near duplicates, duplicates, opposite points and the root, in one batch."""
    rows, width, norm, curv, dtype = case
    x, y = points(rows, width, norm, dtype), points(rows, width, norm, dtype, seed=1)
    y[1::4] = near(x, 0.1)[1::4]
    y[2::4] = near(x, 1e-3)[2::4]
    for row, value in ((4, x), (5, -x), (6, 0 * x)):
        if rows > row:
            y[row] = value[row]
    inputs = [x.to(device), y.to(device), torch.tensor(curv, device=device)]
    floor = {3: 1e-6 * rows**0.5 * norm / curv} if name == "elementwise_dist" else {}
    with ops.use_backend("triton"):
        assert_contract(getattr(ops, name), getattr(lorentz, name), inputs, floor)


def test_pairwise_near_duplicates_are_right_to_the_resolution_of_the_product(device: torch.device) -> None:
    x = points(64, 512, 1.0).to(device)
    y = torch.cat([x, near(x.cpu(), 1e-2).to(device), -x])
    truth = lorentz.pairwise_dist(x.double(), y.double(), 2.0)
    for backend in ("triton", "torch"):
        with ops.use_backend(backend):
            mine = ops.pairwise_dist(x, y, 2.0).double()
        # cosh(d) - 1, the quantity that is summed, is off by a few roundings of the largest term
        error = (torch.cosh(2**0.5 * mine) - torch.cosh(2**0.5 * truth)).abs().max() / torch.cosh(2**0.5 * truth).max()
        assert error < 2e-6


def test_equal_points_at_every_norm_have_finite_gradients(device: torch.device) -> None:
    for norm in (0.0, 1e-30, 1e-4, 1.0, 1e3, 1e18):
        x = points(6, 16, 1.0).to(device) * norm
        for name in ("pairwise_dist", "elementwise_dist", "pairwise_inner", "elementwise_inner"):
            with ops.use_backend("triton"):
                results = outcome(getattr(ops, name), [x, x.clone(), torch.tensor(10.0, device=device)])
            assert all(result.isfinite().all() for result in results), (name, norm)
    with ops.use_backend("triton"):
        value, dx, dy, _ = outcome(ops.elementwise_dist, [x, x.clone(), torch.tensor(1.0, device=device)])
    assert not value.any()
    assert not dx.any()
    assert not dy.any()


def test_beyond_the_range_of_products(device: torch.device) -> None:
    """At norms of 1e20 the products of two points exceed fp32; the distances do not."""
    x, y = points(3, 16, 1e20).to(device), points(4, 16, 1e20, seed=1).to(device)
    truth = lorentz.pairwise_dist(x.double(), y.double(), 1.0)
    for backend in ("triton", "torch"):
        with ops.use_backend(backend):
            torch.testing.assert_close(ops.pairwise_dist(x, y).double(), truth, rtol=1e-6, atol=0)
            torch.testing.assert_close(ops.elementwise_dist(x, y[:3]).double(), truth.diagonal(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["pairwise_inner", "pairwise_dist"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_torch_path_has_the_gradients_of_the_reference(name: str, dtype: torch.dtype) -> None:
    inputs = [points(9, 24, 1.0, dtype), points(12, 24, 1.0, dtype, seed=1), torch.tensor(0.5, dtype=dtype)]
    with ops.use_backend("torch"):
        mine = outcome(getattr(ops, name), inputs)
    for one, other in zip(mine, outcome(getattr(lorentz, name), inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_layouts(device: torch.device) -> None:
    x, y = points(24, 40, 1.0).to(device), points(24, 40, 1.0, seed=1).to(device)
    with ops.use_backend("triton"):
        flat = ops.elementwise_dist(x, y, 0.5)
        assert torch.equal(ops.elementwise_dist(x.view(2, 12, 40), y.view(2, 12, 40), 0.5), flat.view(2, 12))
        assert torch.equal(ops.elementwise_dist(x[::2], y.T.contiguous().T[::2], 0.5), flat[::2])
        table = ops.elementwise_dist(x[:3, None], y[None, :4], 0.5)
        assert table.shape == (3, 4)
        assert torch.equal(table.diagonal(), flat[:3])
        pairs = ops.pairwise_dist(x, y, 0.5)
        torch.testing.assert_close(ops.pairwise_dist(x[::5], y.T.contiguous().T, 0.5), pairs[::5])
        assert ops.pairwise_dist(x[:0], y).shape == (0, 24)
        assert ops.pairwise_dist(x, y[:0]).shape == (24, 0)
        assert ops.elementwise_inner(x[:0], y[:0]).shape == (0,)
        results = outcome(ops.pairwise_dist, [x[:0], y, torch.tensor(1.0, device=device)])
        assert all(not result.any() for result in results)


def test_custom_op_rules(device: torch.device) -> None:
    x, y = (points(5, 24, 1.0, seed=seed).to(device).requires_grad_() for seed in (0, 1))
    curv = torch.tensor(0.5, device=device, requires_grad=True)
    for distance in (False, True):
        torch.library.opcheck(lorentz_elementwise, (x, y, curv, distance))
        torch.library.opcheck(lorentz_pairwise, (x, y, curv, distance, True))
        torch.library.opcheck(lorentz_pairwise, (x, y, curv, distance, False))


@pytest.mark.parametrize("name", ["pairwise_inner", "pairwise_dist", "elementwise_inner", "elementwise_dist"])
def test_compiles_into_one_graph_and_refuses_double_backward(name: str, device: torch.device) -> None:
    op = getattr(ops, name)
    inputs = [points(5, 24, 1.0, seed=seed).to(device) for seed in (0, 1)] + [torch.tensor(0.5, device=device)]
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
        ((torch.ones(2, 3), torch.ones(2, 4)), "last dimension"),
        ((torch.ones(2, 3), torch.ones(3)), r"\[B1, D\] and \[B2, D\]"),
        ((torch.ones(2, 3), torch.ones(2, 3), float("nan")), "curv must be positive, got nan"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.pairwise_dist(*arguments)
