"""The measurement behind docs/numerics.md: it sees errors, and ours are small where the page says so."""

import mpmath
import pytest
import torch

from benchmarks import numerics


@pytest.fixture(autouse=True)
def digits():
    with mpmath.workdps(numerics.DIGITS):
        yield


def measured(op: str, label: str, candidate: str) -> tuple[str, str]:
    row = next(row for row in numerics.rows() if (row.op, row.label) == (op, label))
    row.x, row.y = row.x[:2], row.y[:2]
    truths = [
        numerics.TRUTH[op](numerics.vector(x), numerics.vector(y), mpmath.mpf(row.curv))
        for x, y in zip(row.x, row.y, strict=True)
    ]
    return numerics.cells(row, truths, numerics.candidates(op)[candidate])


@pytest.mark.parametrize("candidate", ["reference", "kernel"])
@pytest.mark.parametrize(
    ("op", "label"),
    [
        ("exp_map0", "norm 3e+19"),
        ("log_map0", "norm 0.0003"),
        ("pairwise_dist", "random, norm 0.001"),
        ("elementwise_dist", "norm 1, y = x + 0.0003 u"),
        ("half_aperture", "norm 1"),
        ("oxy_angle", "random, norm 10000"),
    ],
)
def test_ours_are_right_where_the_published_are_not(op: str, label: str, candidate: str) -> None:
    for cell in measured(op, label, candidate):
        assert float(cell.removeprefix("abs ")) < 2e-6


@pytest.mark.parametrize(
    ("op", "label", "value", "gradient"),
    [
        ("log_map0", "norm 0.0003", "1e0", "1e0"),
        ("log_map0", "norm 1e+20", "**NaN** 100 %", "**not finite** 100 %, c **nan**"),
        ("elementwise_dist", "random, norm 0.001", "5e-2", "5e-2"),
    ],
)
def test_published_faults_are_seen(op: str, label: str, value: str, gradient: str) -> None:
    found = measured(op, label, "published")
    if value[0] == "*":
        assert found == (value, gradient)
    else:
        assert [float(cell) for cell in found] == pytest.approx([float(value), float(gradient)], rel=0.9)


def test_the_true_gradients_are_gradients() -> None:
    """Central differences with 400 digits."""
    x, y = numerics.sphere(1.3)[:2, :6].double(), numerics.sphere(0.9, 1)[:2, :6].double()
    curv, step = mpmath.mpf("0.7"), mpmath.mpf(10) ** -60
    for op, truth in numerics.TRUTH.items():
        a, b = numerics.vector(20 * x[0]), numerics.vector(20 * y[0])
        gradient = truth(a, b, curv).gradient
        for axis in (0, 3):
            moved = [[value + sign * step * (i == axis) for i, value in enumerate(a)] for sign in (1, -1)]
            slope = (truth(moved[0], b, curv).value - truth(moved[1], b, curv).value) / (2 * step)
            assert abs(slope - gradient[axis]) < mpmath.mpf(10) ** -40, op


def test_the_page_holds_every_row() -> None:
    page = numerics.DOCS.read_text()
    for row in numerics.rows():
        assert f"| {row.label} | {row.curv:g} |" in page
    ours = [line.split(" | ")[5:] for line in page.splitlines() if line.startswith("| ") and line.count("|") == 10]
    assert len(ours) > 60
    assert not any("**" in cell for line in ours if line[0] != "reference" for cell in line)


def test_torch_is_named() -> None:
    assert torch.__version__.startswith(numerics.TORCH)
