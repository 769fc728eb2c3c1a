"""Draw the pictures of docs/geometry.md from the library's own functions.

python -m benchmarks.geometry_figures
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from benchmarks import published
from meru_fast import lorentz

ASSETS = Path(__file__).parent.parent / "docs" / "assets"
INK, BLUE, RED, GREEN, GRAY = "#333333", "#2f6fb3", "#c8553d", "#4a8f5a", "#b9b9b9"
plt.rcParams |= {
    "font.size": 10, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "svg.fonttype": "none", "svg.hashsalt": "meru_fast", "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False,
}  # fmt: skip


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(ASSETS / name, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    print(f"wrote {ASSETS / name}")


def poincare(x: Tensor, curv: float) -> Tensor:
    """The disk of radius 1 seen from the point below the root."""
    time = torch.sqrt(1 / curv + x.square().sum(-1, keepdim=True))
    return x / (time + curv**-0.5)


def draw_lift() -> None:
    """One space dimension: the tangent line at the root, the curve, and the lift between them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.6), width_ratios=(1.25, 1))
    space = torch.linspace(-3.2, 3.2, 400, dtype=torch.float64)
    for curv, color in ((0.25, GREEN), (1.0, BLUE), (4.0, RED)):
        left.plot(space, torch.sqrt(1 / curv + space**2), color=color, label=f"c = {curv:g}")
    tangent = torch.tensor([-1.4, -0.9, -0.4, 0.4, 0.9, 1.4], dtype=torch.float64)
    lifted = lorentz.exp_map0(tangent[:, None], 1.0)[:, 0]
    left.plot([-1.75, 1.75], [1, 1], color=GRAY, lw=1)
    for start, end in zip(tangent, lifted, strict=True):
        target = (end.item(), (1 + end.item() ** 2) ** 0.5)
        left.annotate("", target, (start.item(), 1), arrowprops={"arrowstyle": "->", "color": INK, "lw": 0.8})
    left.plot(tangent, torch.ones_like(tangent), "o", color=GRAY, ms=4)
    left.plot(0, 1, "o", color=INK, ms=5)
    left.annotate("root", (0, 1), (0, 0.72), ha="center", va="top")
    left.set(xlabel="space", ylabel="time", ylim=(0, 3.4), title="exp_map0 lifts the tangent line")
    left.legend(loc="lower right", fontsize=9)
    radius = torch.linspace(0, 4, 200, dtype=torch.float64)
    for curv, color in ((0.25, GREEN), (1.0, BLUE), (4.0, RED)):
        right.plot(radius, lorentz.exp_map0(radius[:, None], curv)[:, 0], color=color)
    right.plot(radius, radius, color=GRAY, lw=1, label="flat")
    right.set(xlabel="distance to the root", ylabel="space norm", ylim=(0, 8), title="space norms grow exponentially")
    right.legend(loc="lower right", fontsize=9)
    save(figure, "geometry_lift.svg")


def draw_cones() -> None:
    """Two space dimensions in the Poincare disk: cones of three texts, and the exterior angle of one image."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.5))
    side = torch.linspace(-0.999, 0.999, 700, dtype=torch.float64)
    disk = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)
    square = disk.square().sum(-1, keepdim=True)
    space = torch.where(square < 0.998, 2 * disk / (1 - square.clamp(max=0.998)), torch.nan)
    for axis in (left, right):
        axis.add_patch(plt.Circle((0, 0), 1, fill=False, color=INK, lw=1.2))
        axis.plot(0, 0, "o", color=INK, ms=4)
        axis.annotate("root", (0, 0), (-0.03, -0.1), ha="center", fontsize=9)
        axis.set(xlim=(-1.03, 1.03), ylim=(-1.03, 1.03), aspect="equal")
        axis.axis("off")
    for angle, distance, color, name in (
        (25, 0.5, BLUE, "generic"),
        (145, 1.0, GREEN, ""),
        (265, 2.0, RED, "specific"),
    ):
        radians = np.deg2rad(angle)
        apex = lorentz.exp_map0(torch.tensor([np.cos(radians), np.sin(radians)]) * distance)
        excess = lorentz.oxy_angle(apex, space) - lorentz.half_aperture(apex, 1.0, 0.2)
        left.contourf(side, side, (excess <= 0).double(), levels=[0.5, 1.5], colors=[color], alpha=0.22)
        x, y = poincare(apex, 1.0).tolist()
        left.plot(x, y, "o", color=color, ms=5)
        left.annotate(name, (x, y), (x - 0.04, y + 0.06), color=color, fontsize=9, ha="right")
    left.set_title("cones narrow away from the root")

    text = lorentz.exp_map0(torch.tensor([0.75, 0.15], dtype=torch.float64))
    image = lorentz.exp_map0(torch.tensor([0.9, 1.9], dtype=torch.float64))
    steps = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None]

    def geodesic(a: Tensor, b: Tensor) -> Tensor:
        d = lorentz.elementwise_dist(a, b)
        points = (torch.sinh((1 - steps) * d) * a + torch.sinh(steps * d) * b) / torch.sinh(d)
        return poincare(points, 1.0)

    opening = lorentz.oxy_angle(text, space) <= lorentz.half_aperture(text, 1.0, 0.2)
    right.contourf(side, side, opening.double(), levels=[0.5, 1.5], colors=[BLUE], alpha=0.22)
    right.plot(*geodesic(torch.zeros(2, dtype=torch.float64), text).T, color=INK, lw=1)
    right.plot(*geodesic(text, 6 * text).T, color=INK, lw=1, ls=":")
    right.plot(*geodesic(text, image).T, color=RED, lw=1.4)
    for point, color, name, offset in ((text, BLUE, "text x", (0.03, -0.1)), (image, RED, "image y", (-0.06, 0.05))):
        x, y = poincare(point, 1.0).tolist()
        right.plot(x, y, "o", color=color, ms=5)
        right.annotate(name, (x, y), (x + offset[0], y + offset[1]), color=color, fontsize=9, ha="left")
    degrees = np.rad2deg(lorentz.oxy_angle(text, image).item())
    limit = np.rad2deg(lorentz.half_aperture(text, 1.0, 0.2).item())
    right.set_title(f"exterior angle {degrees:.0f}°, half aperture {limit:.0f}°: outside")
    save(figure, "geometry_cones.svg")


def error(mine: Tensor, truth: Tensor) -> Tensor:
    return ((mine.double() - truth).abs() / truth).median()


def draw_errors() -> None:
    """fp32 against the fp64 reference, median of 64 pairs at D = 512: separation, norm, and the exterior angle."""
    generator = torch.Generator().manual_seed(0)

    def sphere() -> Tensor:
        x = torch.randn(64, 512, dtype=torch.float64, generator=generator)
        return x / x.norm(dim=1, keepdim=True)

    x, other = sphere(), sphere()
    one = torch.tensor(1.0)
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.3), sharey=True)

    def curve(axis: plt.Axes, places: np.ndarray, pair, function, color: str, label: str, style: str = "-") -> None:
        results = []
        for place in places:
            a, b = (v.float() for v in pair(place))
            name = lorentz.oxy_angle if "angle" in axis.get_title() else lorentz.elementwise_dist
            results.append(error(function(a, b), name(a.double(), b.double(), 1.0)).clamp(min=1e-8))
        axis.loglog(places, results, style, color=color, label=label)

    axes[0].set(title="distance of close pairs", xlabel="separation, norm 1", ylabel="relative error")
    axes[1].set(title="distance of random pairs", xlabel="norm")
    axes[2].set(title="exterior angle of random pairs", xlabel="norm")

    def close(gap: float) -> tuple[Tensor, Tensor]:
        return x, x + gap * other

    def random(norm: float) -> tuple[Tensor, Tensor]:
        return norm * x, norm * other

    def diagonal(function):
        return lambda a, b: function(a, b, one).diagonal()

    for axis, places, pair in ((axes[0], np.logspace(-6, 0, 31), close), (axes[1], np.logspace(-6, 4, 41), random)):
        curve(axis, places, pair, diagonal(published.pairwise_dist), RED, "published")
        curve(axis, places, pair, diagonal(lorentz.pairwise_dist), BLUE, "pairwise_dist")
        curve(axis, places, pair, lorentz.elementwise_dist, GREEN, "elementwise_dist", "--")
    places = np.logspace(-6, 4, 41)
    curve(axes[2], places, random, lambda a, b: published.oxy_angle(a, b, one), RED, "published")
    curve(axes[2], places, random, lorentz.oxy_angle, GREEN, "oxy_angle", "--")
    for axis in axes:
        axis.legend(fontsize=8)
    axes[0].set_ylim(5e-9, 20)
    save(figure, "geometry_errors.svg")


if __name__ == "__main__":
    ASSETS.mkdir(exist_ok=True)
    draw_lift()
    draw_cones()
    draw_errors()
