"""The reference geometry: published values, 50-digit values, finite gradients everywhere, every dtype and mode."""

import math
from pathlib import Path

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meru_fast import lorentz

GOLDEN = torch.load(Path(__file__).parent / "golden" / "lorentz_f64.pt")
ONE_POINT = ("exp_map0", "log_map0", "half_aperture")
PAIRWISE = ("pairwise_inner", "pairwise_dist", "pairwise_oxy_angle")
ELEMENTWISE = ("elementwise_inner", "elementwise_dist", "oxy_angle")


def points(rows: int, width: int, norm: float, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    x = torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (x / x.norm(dim=-1, keepdim=True) * norm).to(dtype)


def call(name: str, x: torch.Tensor, y: torch.Tensor, curv) -> torch.Tensor:
    arguments = (x,) if name in ONE_POINT else (x, y)
    return getattr(lorentz, name)(*arguments, curv)


# Where the published 1e-8 in a denominator of size a or under a root is itself larger than 1e-6 of the result.
def published_eps_bites(name: str, case: dict) -> bool:
    u = case["curv"] ** 0.5 * case["x"].norm(dim=-1)
    if name == "half_aperture":
        return bool((u < 0.2 * (1 + 1e-2)).any())
    return name == "oxy_angle" and bool((u < 0.2).any())


@pytest.mark.parametrize("index", range(len(GOLDEN)))
@pytest.mark.parametrize("name", [key for key in GOLDEN[0] if hasattr(lorentz, key)])
def test_agrees_with_the_published_formulas(name: str, index: int) -> None:
    case = GOLDEN[index]
    x = case["x"].clone().requires_grad_()
    y = (case["x2"] if name == "oxy_angle" else case["y"]).clone().requires_grad_()
    curv = torch.tensor(case["curv"], dtype=torch.float64, requires_grad=True)
    out = call(name, x, y, curv)
    tolerance = 1e-4 if published_eps_bites(name, case) else 1e-6
    torch.testing.assert_close(out, case[name]["out"], rtol=tolerance, atol=tolerance)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    inputs = (x, curv) if name in ONE_POINT else (x, y, curv)
    for mine, published in zip(torch.autograd.grad((out * weights).sum(), inputs), case[name]["grads"], strict=True):
        bound = tolerance * (1 + published.abs().max().item())
        assert (mine - published).abs().max().item() <= bound


def test_golden_cases_mostly_have_the_tight_tolerance() -> None:
    loose = [published_eps_bites(name, case) for case in GOLDEN for name in case if hasattr(lorentz, name)]
    assert sum(loose) < len(loose) / 3


def exact(name: str, x: torch.Tensor, y: torch.Tensor, curv: float) -> mpmath.mpf:
    """The definitions, with 50 digits (400 inside: the largest norms square to 1e36)."""
    with mpmath.workdps(400):
        c = mpmath.mpf(curv)
        a, b = ([mpmath.mpf(value) for value in vector.double().tolist()] for vector in (x, y))
        dot = mpmath.fsum(p * q for p, q in zip(a, b, strict=True))
        rx, ry = (mpmath.sqrt(mpmath.fsum(p * p for p in v)) for v in (a, b))
        tx, ty = mpmath.sqrt(1 / c + rx**2), mpmath.sqrt(1 / c + ry**2)
        inner = dot - tx * ty
        if name.endswith("inner"):
            return inner
        if name.endswith("dist"):
            return mpmath.acosh(max(-c * inner, 1)) / mpmath.sqrt(c)
        if name == "half_aperture":
            return mpmath.asin(min(1, mpmath.mpf("0.2") / (mpmath.sqrt(c) * rx)))
        along = dot / rx
        across = mpmath.sqrt(mpmath.fsum((q - along * p / rx) ** 2 for p, q in zip(a, b, strict=True)))
        return mpmath.atan2(across, mpmath.sqrt(c) * (tx * along - rx * ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("curv", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("norm", [1e-30, 1e-6, 1e-3, 0.3, 1.0, 30.0, 1e4, 1e9, 1e18])
def test_digits_at_every_norm(norm: float, curv: float, dtype: torch.dtype) -> None:
    """Given pairs are right to the last digits, near and far.

    Beyond norms of 1e3 the rounding of the inputs themselves moves points on one ray apart (``eps |x|`` across, against
    a distance of order 1), so those rows end there.
    """
    resolution = torch.finfo(dtype).eps
    x = points(6, 16, norm, dtype)
    y = points(6, 16, norm, dtype, seed=1)
    y[1], y[2], y[3] = 2 * x[1], -x[2], x[3] * (1 + 1e-3)
    y[4] = x[4] + 1e-3 * y[4]
    for name in ("elementwise_inner", "elementwise_dist", "half_aperture"):
        result = call(name, x, y, curv)
        for row in range(len(x)) if norm <= 1e3 else (0, 2, 5):
            truth = exact(name, x[row], y[row], curv)
            scale = abs(truth)
            if name == "elementwise_inner":  # a difference by definition
                scale = (1 / curv + norm**2) * 4
            if name == "half_aperture" and truth > 1.5:  # the rim magnifies the rounding of the norm
                scale = math.sqrt(1 / resolution)
            assert abs(mpmath.mpf(result[row].item()) - truth) <= 40 * resolution * scale, (name, row)


@pytest.mark.parametrize("curv", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("norm", [1e-4, 1e-2, 1.0, 30.0])
def test_angle_digits(norm: float, curv: float) -> None:
    x, y = points(5, 16, norm, torch.float32), points(5, 16, norm, torch.float32, seed=1)
    y[1], y[2], y[3] = 2 * x[1], -x[2], x[3] + 1e-3 * y[3]
    tolerance = 1e-6 + 2e-7 * curv**0.5 * norm  # rounding x tilts it by eps, which the radius magnifies
    for mine, row in zip(lorentz.oxy_angle(x, y, curv), range(5), strict=True):
        assert abs(mine.item() - exact("oxy_angle", x[row], y[row], curv)) < tolerance
    pairs = lorentz.pairwise_oxy_angle(x, y, curv)
    assert (pairs.diagonal() - lorentz.oxy_angle(x, y, curv)).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("curv", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("norm", [0.0, 1e-30, 1e-20, 1e-8, 1e-4, 0.01, 0.2, 1.0, 1e3, 32768.0, 1e8, 1e18])
def test_everything_is_finite_everywhere(norm: float, curv: float, dtype: torch.dtype) -> None:
    x, other = points(6, 16, norm, dtype), points(6, 16, norm, dtype, seed=1)
    rim = points(6, 16, 0.2 / curv**0.5, dtype)
    for y in (other, x, -x, 2 * x, torch.zeros_like(x), x + 1e-6 * other):
        for first, second in ((x, y), (y, x), (rim, y)):
            for name in ONE_POINT + PAIRWISE + ELEMENTWISE:
                leaves = [v.detach().clone().requires_grad_() for v in (first, second)]
                scale = torch.tensor(curv, dtype=dtype, requires_grad=True)
                out = call(name, *leaves, scale)
                inputs = (leaves[0], scale) if name in ONE_POINT else (*leaves, scale)
                results = (out, *torch.autograd.grad(out.sum(), inputs))
                assert all(result.isfinite().all() for result in results), name


def test_undefined_angles_and_equal_points_have_the_documented_value_and_no_gradient() -> None:
    x = points(4, 8, 1.0).requires_grad_()
    root = torch.zeros(4, 8, dtype=torch.float64, requires_grad=True)
    for angle, inputs, value in (
        (lorentz.oxy_angle(root, x), (root, x), math.pi / 2),
        (lorentz.oxy_angle(x, x), (x,), 0.0),
        (lorentz.pairwise_oxy_angle(root, x), (root, x), math.pi / 2),
        (lorentz.pairwise_oxy_angle(x, x).diagonal(), (x,), 0.0),
        (lorentz.elementwise_dist(x, x), (x,), 0.0),
        (lorentz.half_aperture(0.05 * x, 1.0), (x,), math.pi / 2),
    ):
        assert (angle == value).all()
        assert all((grad == 0).all() for grad in torch.autograd.grad(angle.sum(), inputs, retain_graph=True))


@pytest.mark.parametrize("name", ONE_POINT + PAIRWISE + ELEMENTWISE)
@pytest.mark.parametrize("norm", [0.05, 0.7, 3.0])
def test_first_and_second_derivatives(name: str, norm: float) -> None:
    x, y = (points(3, 4, norm, seed=seed).requires_grad_() for seed in (0, 1))
    curv = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    inputs = (x, curv) if name in ONE_POINT else (x, y, curv)
    function = getattr(lorentz, name)
    assert torch.autograd.gradcheck(function, inputs, atol=1e-6)
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-5)


@pytest.mark.parametrize("name", ONE_POINT + PAIRWISE + ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32_also_under_autocast(name: str, dtype: torch.dtype) -> None:
    x, y = points(5, 32, 1.0, dtype), points(5, 32, 1.0, dtype, seed=1)
    curv = torch.tensor([0.7])
    wide = call(name, x.float(), y.float(), curv)
    x.requires_grad_()
    narrow = call(name, x, y, curv)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow.detach(), wide)
    assert torch.autograd.grad(narrow.sum(), x)[0].dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = call(name, x.float(), y.float(), curv)
    assert inside.dtype == torch.float32
    assert torch.equal(inside.detach(), wide)


@pytest.mark.parametrize("name", ONE_POINT + PAIRWISE + ELEMENTWISE)
def test_compiles_into_one_graph(name: str) -> None:
    x, y = points(5, 16, 1.0, torch.float32), points(5, 16, 1.0, torch.float32, seed=1)
    curv = torch.tensor(0.5)
    torch.compiler.reset()
    compiled = torch.compile(lambda *args: call(name, *args), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y, curv), call(name, x, y, curv))


def test_given_pairs_broadcast() -> None:
    x, y = points(4, 8, 1.0), points(6, 8, 2.0, seed=1)
    table = lorentz.elementwise_dist(x[:, None], y[None])
    assert table.shape == (4, 6)
    torch.testing.assert_close(table, lorentz.pairwise_dist(x, y))
    torch.testing.assert_close(lorentz.oxy_angle(x[:, None], y[None]), lorentz.pairwise_oxy_angle(x, y))
    torch.testing.assert_close(lorentz.elementwise_inner(x[:, None], y[None]), lorentz.pairwise_inner(x, y))


def test_batch_of_none() -> None:
    empty, y = torch.zeros(0, 8), torch.zeros(3, 8)
    assert lorentz.pairwise_dist(empty, y).shape == (0, 3)
    assert lorentz.oxy_angle(empty, empty).shape == (0,)
    assert lorentz.exp_map0(empty).shape == (0, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2, 4)), ValueError, r"last dimension.*\(2, 3\), \(2, 4\)"),
        ((torch.ones(2, 3), torch.ones(3)), ValueError, r"\[B1, D\] and \[B2, D\]"),
        ((torch.ones(2, 3).long(), torch.ones(2, 3)), TypeError, "floating.*int64"),
        ((torch.ones(2, 3), torch.ones(2, 3), -1.0), ValueError, "curv must be positive, got -1.0"),
        ((torch.ones(2, 3), torch.ones(2, 3), torch.ones(2)), ValueError, "curv must be one number"),
        ((torch.ones(2, 0), torch.ones(2, 0)), ValueError, "at least one component"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lorentz.pairwise_dist(*arguments)


vectors = st.lists(st.floats(-3, 3, width=32), min_size=5, max_size=5).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)
curvatures = st.floats(0.1, 10)


@settings(max_examples=100, deadline=None)
@given(vectors, vectors, vectors, curvatures)
def test_distance_is_a_metric(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, curv: float) -> None:
    def dist(a: torch.Tensor, b: torch.Tensor) -> float:
        return lorentz.elementwise_dist(a, b, curv).item()

    assert dist(x, y) == pytest.approx(dist(y, x), rel=1e-13, abs=1e-300)
    assert dist(x, z) <= (dist(x, y) + dist(y, z)) * (1 + 1e-12)
    assert dist(x, x) == 0
    if not torch.equal(x, y):
        assert dist(x, y) > 0
    assert dist(x, torch.zeros_like(x)) == pytest.approx(lorentz.log_map0(x, curv).norm().item(), rel=1e-12, abs=1e-300)


@settings(max_examples=100, deadline=None)
@given(vectors, curvatures)
def test_maps_are_inverse(x: torch.Tensor, curv: float) -> None:
    there = lorentz.exp_map0(x, curv)
    if there.norm() < 2**14 / curv**0.5:  # before saturation
        torch.testing.assert_close(lorentz.log_map0(there, curv), x, rtol=1e-12, atol=1e-300)


@settings(max_examples=100, deadline=None)
@given(vectors, st.floats(1.001, 100), curvatures)
def test_cones_narrow_outwards_and_hold_what_lies_behind(x: torch.Tensor, factor: float, curv: float) -> None:
    further = factor * x
    assert lorentz.half_aperture(further, curv) <= lorentz.half_aperture(x, curv) * (1 + 1e-12)
    if x.norm() > 1e-3:
        assert lorentz.oxy_angle(x, further, curv).item() == pytest.approx(0, abs=1e-6)
        assert lorentz.oxy_angle(further, x, curv).item() == pytest.approx(math.pi, abs=1e-6)
