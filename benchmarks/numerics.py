"""Measure published formulas, reference and kernels against 50-digit arithmetic: the tables of docs/numerics.md.

    python -m benchmarks.numerics            print the tables
    python -m benchmarks.numerics --write    and put them into docs/numerics.md

Inputs are the places where the published code is known to return NaN, infinities or garbage, in fp32 at D = 512, and
the places where training really is. Values and gradients are compared row by row with mpmath; the worst of 16 draws
counts. Without a GPU the kernels run in Triton's interpreter.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mpmath
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks import published
from meru_fast import lorentz, ops

DOCS = Path(__file__).parent.parent / "docs" / "numerics.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
DRAWS, WIDTH, DIGITS = 16, 512, 400  # 50 digits of the results; norms of 1e20 and their squares cost the rest
MIN_RADIUS = 0.1
TORCH = torch.__version__.split("+")[0]


def sphere(norm: float, seed: int = 0) -> Tensor:
    x = torch.randn(DRAWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (x / x.norm(dim=1, keepdim=True) * norm).float()


# --- the truth --------------------------------------------------------------------------------------------------------


def vector(row: Tensor) -> mpmath.matrix:
    return [mpmath.mpf(value) for value in row.double().tolist()]


def dot(a: list, b: list) -> mpmath.mpf:
    return mpmath.fsum(p * q for p, q in zip(a, b, strict=True))


def combine(s: mpmath.mpf, a: list, t: mpmath.mpf, b: list) -> list:
    return [s * p + t * q for p, q in zip(a, b, strict=True)]


@dataclass
class Truth:
    """Value and gradient by x of one row; None where undefined."""

    value: mpmath.mpf | None
    gradient: list | None


def radial(value: Callable, slope: Callable) -> Callable:
    """Truth of a function of the norm alone."""

    def truth(x: list, y: list, c: mpmath.mpf) -> Truth:
        r = mpmath.sqrt(dot(x, x))
        gradient = [slope(r, c) * p / r for p in x] if r else None
        return Truth(value(r, c), gradient)

    return truth


def true_distance(x: list, y: list, c: mpmath.mpf) -> Truth:
    tx, ty = (mpmath.sqrt(1 / c + dot(v, v)) for v in (x, y))
    z = c * (tx * ty - dot(x, y))
    if x == y:
        return Truth(mpmath.mpf(0), None)
    sinh = mpmath.sqrt(z**2 - 1)
    root = mpmath.sqrt(c)
    return Truth(mpmath.acosh(z) / root, combine(root * ty / tx / sinh, x, -root / sinh, y))


def true_angle(x: list, y: list, c: mpmath.mpf) -> Truth:
    root = mpmath.sqrt(c)
    u, v = [root * p for p in x], [root * q for q in y]
    r = mpmath.sqrt(dot(u, u))
    if not r or x == y:
        return Truth(None, None)
    direction = [p / r for p in u]
    along = dot(direction, v)
    aside = combine(mpmath.mpf(1), v, -along, direction)
    across = mpmath.sqrt(dot(aside, aside))
    tu, tv = mpmath.sqrt(1 + r**2), mpmath.sqrt(1 + dot(v, v))
    forward = tu * along - r * tv
    angle = mpmath.atan2(across, forward)
    if across < mpmath.mpf(10) ** -30 * mpmath.sqrt(dot(v, v)):  # on one ray: a cone, no gradient
        return Truth(angle, None)
    z, square = tu * tv - r * along, across**2 + forward**2
    gradient = combine(-(tv * z - tu) / (r * square * across), aside, across * z / (tu * square), direction)
    return Truth(angle, [root * g for g in gradient])


CAP = mpmath.mpf(2) ** 15
TRUTH = {
    "exp_map0": radial(
        lambda r, c: min(mpmath.sinh(mpmath.sqrt(c) * r) if r < 100 else CAP, CAP) / mpmath.sqrt(c),
        lambda r, c: mpmath.cosh(mpmath.sqrt(c) * r) if mpmath.sqrt(c) * r < mpmath.asinh(CAP) else mpmath.mpf(0),
    ),
    "log_map0": radial(
        lambda r, c: mpmath.asinh(mpmath.sqrt(c) * r) / mpmath.sqrt(c), lambda r, c: 1 / mpmath.sqrt(1 + c * r**2)
    ),
    "half_aperture": radial(
        lambda r, c: mpmath.asin(2 * MIN_RADIUS / (mpmath.sqrt(c) * r)) if c * r**2 > rim() ** 2 else mpmath.pi / 2,
        lambda r, c: -rim() / (r * mpmath.sqrt(c * r**2 - rim() ** 2)) if c * r**2 > rim() ** 2 else mpmath.mpf(0),
    ),
    "pairwise_dist": true_distance,
    "elementwise_dist": true_distance,
    "oxy_angle": true_angle,
}


def rim() -> mpmath.mpf:
    return mpmath.mpf(2 * MIN_RADIUS)


# --- the candidates ---------------------------------------------------------------------------------------------------


def published_elementwise(x: Tensor, y: Tensor, curv: Tensor) -> Tensor:
    """The published distance for given pairs, as its successors write it."""
    time = [(1 / curv + (v**2).sum(-1)) ** 0.5 for v in (x, y)]
    return torch.acosh((-curv * ((x * y).sum(-1) - time[0] * time[1])).clamp(min=1 + published.EPS)) / curv**0.5


def published_with_passing_clamp(x: Tensor, y: Tensor, curv: Tensor) -> Tensor:
    """The same under a ``clamp`` whose gradient is 1 where the value equals the bound: torch has had it both ways."""
    time = [(1 / curv + (v**2).sum(-1)) ** 0.5 for v in (x, y)]
    z = -curv * ((x * y).sum(-1) - time[0] * time[1])
    bound = torch.tensor(1 + published.EPS)  # 1.0 in fp32
    return torch.acosh(torch.where(z >= bound, z, bound)) / curv**0.5


def fused(op: Callable) -> Callable:
    def run(*arguments: Tensor) -> Tensor:
        with ops.use_backend("triton"):
            return op(*arguments)

    return run


def candidates(name: str) -> dict[str, Callable]:
    theirs = published_elementwise if name == "elementwise_dist" else getattr(published, name)
    return {"published": theirs, "reference": getattr(lorentz, name), "kernel": fused(getattr(ops, name))}


def scalar_of(name: str, function: Callable, x: Tensor, y: Tensor, curv: Tensor) -> Tensor:
    """One number per row: the norm of a map's result (along x), the diagonal of a matrix."""
    if name in ("exp_map0", "log_map0"):
        result = function(x, curv)
        direction = x.detach().double()
        direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-300)
        return (result.double() * direction).sum(1)
    if name == "half_aperture":
        return function(x, curv)
    result = function(x, y, curv)
    return result.diagonal() if result.dim() == 2 else result


@dataclass
class Row:
    op: str
    label: str
    x: Tensor
    y: Tensor
    curv: float = 1.0


def share(mask: Tensor) -> str:
    return f"{100 * mask.double().mean().item():.0f} %"


def figure(error: float) -> str:
    return "0" if error == 0 else f"{error:.0e}".replace("e-0", "e-").replace("e+0", "e")


def worst(errors: list[mpmath.mpf], sizes: list[mpmath.mpf]) -> str:
    """The worst relative error, or absolute error where the truth is zero."""
    if max(sizes) < 1e-100:
        return f"abs {figure(float(max(errors)))}" if max(errors) else "0"
    return figure(float(max(error / (size or max(sizes)) for error, size in zip(errors, sizes, strict=True))))


def cells(row: Row, truths: list[Truth], function: Callable) -> tuple[str, str]:
    """The errors of one candidate: of its values, of its gradients (by x; c where that is not finite)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = row.x.to(device).requires_grad_()
    curv = torch.tensor(row.curv, device=device, requires_grad=True)
    values = scalar_of(row.op, function, x, row.y.to(device), curv)
    gradient, slope = torch.autograd.grad(values.sum(), (x, curv))
    values, gradient = values.detach().double().cpu(), gradient.double().cpu()

    broken = ~values.isfinite()
    if broken.any():
        value = f"**{'NaN' if values.isnan().any() else 'inf'}** {share(broken)}"
    elif truths[0].value is None:
        low, high = values.min().item(), values.max().item()
        value = f"{low:.3g}" if low == high else f"{low:.3g} … {high:.3g}"
    else:
        errors = [abs(v - t.value) for v, t in zip(values.tolist(), truths, strict=True)]
        value = worst(errors, [abs(t.value) for t in truths])

    broken = ~gradient.isfinite().all(1)
    if broken.any():
        text = f"**not finite** {share(broken)}"
    elif truths[0].gradient is None:
        text = f"size {figure(gradient.norm(dim=1).max().item())}"
    else:
        errors = []
        for mine, truth in zip(gradient, truths, strict=True):
            difference = combine(mpmath.mpf(1), vector(mine), mpmath.mpf(-1), truth.gradient)
            errors.append(mpmath.sqrt(dot(difference, difference)))
        text = worst(errors, [mpmath.sqrt(dot(truth.gradient, truth.gradient)) for truth in truths])
    return value, text if slope.isfinite() else f"{text}, c **{slope.item():g}**"


def rows() -> list[Row]:
    """Every place of the list, in its order."""
    zero, other = torch.zeros(DRAWS, WIDTH), 1
    found = []
    for norm in (0.0, 1e-30, 1e-4, 1.0, 5.0, 20.0, 1e4, 1e19, 3e19):
        found.append(Row("exp_map0", f"norm {norm:g}", sphere(norm), zero))
    for norm, curv in (
        (0.0, 1.0), (1e-30, 1.0), (3e-4, 1.0), (1e-3, 0.1), (1e-4, 10.0), (1e-3, 1.0), (1.0, 1.0), (30.0, 1.0),
        (3e4, 1.0), (1e20, 1.0), (1e19, 10.0),
    ):  # fmt: skip
        found.append(Row("log_map0", f"norm {norm:g}", sphere(norm), zero, curv))

    pairs = [("x = y = 0", zero, zero, 1.0)]
    pairs += [(f"x = y, norm {norm:g}", sphere(norm), sphere(norm), 1.0) for norm in (0.3, 1.0, 10.0, 100.0)]
    pairs += [(f"norm 1, y = x + {step:g} u", sphere(1.0), sphere(1.0) + sphere(step, 1), 0.1) for step in (1e-4, 3e-4)]
    pairs += [(f"random, norm {n:g}", sphere(n), sphere(n, 1), 1.0) for n in (1e-3, 0.8, 1, 10, 1e3, 32768, 1e20)]
    for norm, gap in ((1.0, 1e-3), (10.0, 1e-2), (100.0, 0.1), (1e3, 1.0), (32768.0, 1.0)):
        further = torch.asinh(torch.tensor(norm, dtype=torch.float64)) + gap
        pairs.append((f"one ray, norm {norm:g}, {gap:g} apart", sphere(norm), sphere(further.sinh().item()), 1.0))
    for op in ("pairwise_dist", "elementwise_dist"):
        found += [Row(op, label, x, y, curv) for label, x, y, curv in pairs]

    for label, norm, curv in (
        ("norm 0", 0.0, 1.0), ("norm 0.1, inside the rim", 0.1, 1.0), ("at the rim", 0.2 / 10**0.5, 10.0),
        ("rim (1 + 1e-6)", 0.2 * (1 + 1e-6), 1.0), ("rim (1 + 1e-4)", 0.2 * (1 + 1e-4), 1.0), ("norm 1", 1.0, 1.0),
        ("norm 1e4", 1e4, 1.0), ("norm 1e19", 1e19, 1.0),
    ):  # fmt: skip
        found.append(Row("half_aperture", label, sphere(norm), zero, curv))

    one = sphere(1.0)
    angles = [("x = y = 0", zero, zero, 1.0)]
    angles += [("x = 0, norm of y 1", zero, one, curv) for curv in (0.1, 1.0, 10.0)]
    angles += [
        (f"x = y, norm {n:g}", sphere(n), sphere(n), c) for n, c in ((1, 1.0), (10, 1.0), (10, 10.0), (32768, 1.0))
    ]
    angles += [("y = 2 x, norm 1", one, 2 * one, 1.0), ("y = 2 x, norm 1000", sphere(1e3), 2 * sphere(1e3), 0.1)]
    angles += [("y = x / 2, norm 1", one, one / 2, 1.0), ("y = -x, norm 1", one, -one, 1.0)]
    angles += [("y = -x, norm 1", one, -one, 10.0)]
    angles += [
        (f"random, norm {n:g}", sphere(n), sphere(n, other), c)
        for n, c in (
            (1e-4, 1.0), (0.8, 1.0), (1, 1.0), (100, 1.0), (1e3, 10.0), (1e4, 0.1), (1e4, 1.0), (1e4, 10.0),
            (32768, 1.0),
        )
    ]  # fmt: skip
    return found + [Row("oxy_angle", label, x, y, curv) for label, x, y, curv in angles]


def table(op: str, places: list[Row]) -> list[str]:
    lines = [
        f"### {op}",
        "",
        "| input | c | truth | published | its gradient | reference | its gradient | kernel | its gradient |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in places:
        curv = mpmath.mpf(torch.tensor(row.curv).item())  # what fp32 makes of it
        truths = [TRUTH[op](vector(x), vector(y), curv) for x, y in zip(row.x, row.y, strict=True)]
        value = "undefined" if truths[0].value is None else mpmath.nstr(mpmath.chop(truths[0].value, 1e-100), 6)
        measured = [cell for function in candidates(op).values() for cell in cells(row, truths, function)]
        lines.append(f"| {row.label} | {row.curv:g} | {value} | " + " | ".join(measured) + " |")
        print(lines[-1], flush=True)
    return [*lines, ""]


def duplicates() -> list[str]:
    """How often a pair of equal points has a gradient that is not finite: 1,000 rows each."""
    norms = (0.1, 0.3, 0.5, 1.0, 1.5, 3.0, 10.0, 100.0)
    lines = ["### Rows of equal points whose distance has no finite gradient", ""]
    lines += ["| formula | c | " + " | ".join(f"norm {norm:g}" for norm in norms) + " |"]
    lines += ["|---" * (len(norms) + 2) + "|"]
    formulas = {
        f"published, torch {TORCH}": published_elementwise,
        "published, clamp passing its gradient at equality": published_with_passing_clamp,
        "reference": lorentz.elementwise_dist,
    }
    for label, function in formulas.items():
        for curv in (0.1, 1.0, 10.0):
            shares = []
            for norm in norms:
                x = torch.randn(1000, WIDTH, generator=torch.Generator().manual_seed(0))
                x = (x / x.norm(dim=1, keepdim=True) * norm).requires_grad_()
                grad = torch.autograd.grad(function(x, x.detach().clone(), torch.tensor(curv)).sum(), x)[0]
                shares.append(share(~grad.isfinite().all(1)))
            lines.append(f"| {label} | {curv:g} | " + " | ".join(shares) + " |")
    return [*lines, ""]


def measure() -> str:
    with mpmath.workdps(DIGITS):
        found, lines = rows(), []
        for op in dict.fromkeys(row.op for row in found):
            lines += table(op, [row for row in found if row.op == op])
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "Triton's interpreter on a CPU"
    note = f"fp32, D = {WIDTH}, torch {TORCH}; kernels on {where}."
    return "\n".join([note, "", *lines, *duplicates()]).rstrip()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Errors of values and gradients against 50-digit arithmetic.")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {DOCS.name}")
    arguments = parser.parse_args(argv)
    text = measure()
    if not arguments.write:
        print(text)
        return
    page = DOCS.read_text()
    head, tail = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    DOCS.write_text(f"{head}\n\n{text}\n\n{tail}")
    print(f"wrote {DOCS}")


if __name__ == "__main__":
    main()
