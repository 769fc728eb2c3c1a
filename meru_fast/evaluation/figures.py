"""Figures of the report, as SVG text that goes into a page as it is."""

import csv
import functools
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image

IMAGE_COLOUR = "#1f6f8b"
CAPTION_COLOURS = ("#7a3803", "#c8661b", "#f2a65a")  # general, in between, specific
INK, PALE = "#22282f", "#9aa4ae"

STYLE = {
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6eaee",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
}


def _drawn(draw: Callable[..., Figure]) -> Callable[..., str]:
    """Draw in the style of the page and return an ``<svg>`` element.

    The last argument of the figure functions, `salt`, keeps the ids of figures on one page apart.
    """

    @functools.wraps(draw)
    def svg(*arguments: Any, salt: str) -> str:
        text = io.StringIO()
        settings: Any = STYLE | {"svg.hashsalt": salt}
        with mpl.rc_context(settings):
            figure = draw(*arguments)
            figure.savefig(
                text, format="svg", bbox_inches="tight", pad_inches=0.05, transparent=True, metadata={"Date": None}
            )
        whole = text.getvalue()
        whole = re.sub(r'<g id="[^"]*">', "<g>", whole)  # nothing refers to groups
        return whole[whole.index("<svg") :].replace("<svg ", '<svg role="img" ', 1)

    return svg


def _axes(width: float, height: float, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def read_log(run: Path) -> dict[str, list[float]]:
    """Numeric columns of a run's metrics.csv; empty if there is none."""
    if not (run / "metrics.csv").is_file():
        return {}
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns: dict[str, list[float]] = {}
    for name in rows[0] if rows else ():
        try:
            columns[name] = [float(row[name]) for row in rows]
        except ValueError:  # a column of text, or one that not every row has
            continue
    return columns


def training_minutes(log: Mapping[str, Sequence[float]]) -> float | None:
    """How long the run took, from the mean time of the steps up to each logged one; None if that is not logged."""
    if "step_seconds" not in log:
        return None
    counts = [step - before for before, step in pairwise([0, *log["step"]])]
    return sum(count * seconds for count, seconds in zip(counts, log["step_seconds"], strict=True)) / 60


@_drawn
def loss_curves(log: Mapping[str, Sequence[float]]) -> Figure:
    """Parts of the loss over the steps, from the columns of metrics.csv."""
    figure, (axes,) = _axes(4.6, 3.0)
    parts = {"contrastive_loss": ("contrastive", IMAGE_COLOUR), "entailment_loss": ("entailment", CAPTION_COLOURS[1])}
    for name, (label, colour) in parts.items():
        if name in log:
            axes.plot(log["step"], log[name], color=colour, linewidth=1, alpha=0.3)
            axes.plot(log["step"], _smooth(log[name]), color=colour, linewidth=1.8, label=label)
    axes.set(title="Loss", xlabel="step", ylim=(0, None))
    axes.legend()
    return figure


@_drawn
def geometry_curves(log: Mapping[str, Sequence[float]]) -> Figure:
    """Curvature, and distances of a batch from the root, over the steps of a hyperbolic model."""
    figure, (axes,) = _axes(4.6, 3.0)
    axes.plot(log["step"], log["image_radius"], color=IMAGE_COLOUR, linewidth=1.8, label="mean distance of images")
    axes.plot(
        log["step"], log["text_radius"], color=CAPTION_COLOURS[1], linewidth=1.8, label="mean distance of captions"
    )
    axes.plot(log["step"], log["curv"], color=CAPTION_COLOURS[0], linewidth=1.8, label="curvature c")
    axes.set(title="Geometry", xlabel="step", ylim=(0, None))
    axes.legend()
    return figure


def _smooth(values: Sequence[float], window: int = 9) -> np.ndarray:
    """Centred running mean; the ends are averaged over what there is."""
    kernel = np.ones(min(window, len(values)))
    series = np.asarray(values, float)
    return np.convolve(series, kernel, "same") / np.convolve(np.ones_like(series), kernel, "same")


@_drawn
def radius_histogram(images: np.ndarray, captions: Mapping[str, np.ndarray], unit: str) -> Figure:
    """Shares of images and of each group of captions over the distance from the root."""
    figure, (axes,) = _axes(5.6, 2.9)
    everything = np.concatenate([images, *captions.values()])
    bins = np.linspace(0, everything.max() * 1.02, 60).tolist()
    groups = [(name, values, colour) for (name, values), colour in zip(captions.items(), CAPTION_COLOURS, strict=False)]
    for name, values, colour in (*groups, ("images", images, IMAGE_COLOUR)):
        share = np.full(len(values), 100 / len(values))
        axes.hist(values, bins, weights=share, color=colour, alpha=0.75, label=name)
    axes.set(xlabel=f"distance from the root ({unit})", ylabel="share (%)")
    axes.grid(axis="x", visible=False)
    axes.legend()
    return figure


@_drawn
def poincare_disk(
    images: np.ndarray,
    captions: np.ndarray,
    pictures: Sequence[tuple[int, Image.Image]],
    ladders: Sequence[Sequence[int]],
    labels: Mapping[int, str],
    rings: Mapping[float, str],
) -> Figure:
    """Points of the unit disk: images, captions, and the way from the root over the captions to some of the images.

    Args:
        images, captions: [N, 2] inside the unit disk.
        pictures: positions in `images`, with the picture to draw outside the rim.
        ladders: for each of `pictures` the positions of its captions, general to specific.
        labels: captions to write out, by position.
        rings: radius on the disk to the text beside that circle.
    """
    figure, (axes,) = _axes(8, 8)
    axes.set_aspect("equal")
    axes.set_axis_off()
    angle = np.linspace(0, 2 * np.pi, 200)
    for radius, text in rings.items():
        axes.plot(radius * np.cos(angle), radius * np.sin(angle), color="#dfe4e8", linewidth=0.8, zorder=0)
        axes.text(0, -radius, text, fontsize=7.5, color=PALE, ha="center", va="center", zorder=1, bbox=_PAPER)
    axes.plot(np.cos(angle), np.sin(angle), color=INK, linewidth=1.2, zorder=1)
    for (image, _), ladder in zip(pictures, ladders, strict=True):
        way = np.stack([np.zeros(2), *(captions[position] for position in ladder), images[image]])
        axes.plot(way[:, 0], way[:, 1], color=CAPTION_COLOURS[1], linewidth=0.8, alpha=0.55, zorder=2)
    axes.scatter(images[:, 0], images[:, 1], s=7, color=IMAGE_COLOUR, alpha=0.4, linewidths=0, zorder=2, label="image")
    axes.scatter(
        captions[:, 0],
        captions[:, 1],
        s=9,
        color=CAPTION_COLOURS[1],
        alpha=0.7,
        linewidths=0,
        zorder=3,
        label="caption",
    )
    axes.scatter(0, 0, s=40, marker="+", color=INK, zorder=4, label="root")
    _pictures_at_rim(axes, images, pictures)
    _labels_in_columns(axes, captions, labels)
    axes.legend(loc="upper right", bbox_to_anchor=(1.0, 1.0))
    axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2))
    return figure


_PAPER = {"facecolor": "#fbfbf9", "edgecolor": "none", "alpha": 0.85, "pad": 0.8}


def _pictures_at_rim(axes: Axes, points: np.ndarray, pictures: Sequence[tuple[int, Image.Image]]) -> None:
    """Each picture outside the rim, as near as the others allow to the direction of its point."""
    angles = sorted(
        (math.atan2(points[index][1], points[index][0]), number) for number, (index, _) in enumerate(pictures)
    )
    gaps = [angle - before for (before, _), (angle, _) in pairwise([(angles[-1][0] - 2 * math.pi, 0), *angles])]
    cut = gaps.index(max(gaps))  # the circle is cut open where it is emptiest
    angles = angles[cut:] + [(angle + 2 * math.pi, number) for angle, number in angles[:cut]]
    for (_, number), angle in zip(angles, _spread([angle for angle, _ in angles], gap=0.172), strict=True):
        index, picture = pictures[number]
        place = 1.1 * np.array([math.cos(angle), math.sin(angle)])
        axes.plot(*np.stack([points[index], place]).T, color=IMAGE_COLOUR, linewidth=0.6, alpha=0.5, zorder=2)
        box = OffsetImage(np.asarray(picture.convert("RGB").resize((72, 72))), zoom=0.5)
        frame = {"edgecolor": IMAGE_COLOUR, "linewidth": 0.8, "boxstyle": "square,pad=0.06"}
        axes.add_artist(AnnotationBbox(box, (place[0], place[1]), bboxprops=frame, zorder=5))


def _labels_in_columns(axes: Axes, points: np.ndarray, labels: Mapping[int, str]) -> None:
    """Texts in a column on either side of the points, with a line from each to its point."""
    for side in (-1, 1):
        chosen = sorted(
            (index for index in labels if (points[index][0] >= 0) == (side > 0)), key=lambda i: points[i][1]
        )
        heights = _spread([1.5 * points[index][1] for index in chosen], gap=0.042)
        for index, height in zip(chosen, heights, strict=True):
            place = np.array([side * 0.6, height])
            axes.plot(*np.stack([points[index], place]).T, color=PALE, linewidth=0.5, alpha=0.7, zorder=3)
            axes.scatter(points[index][0], points[index][1], s=16, color=CAPTION_COLOURS[0], linewidths=0, zorder=4)
            axes.text(
                place[0],
                place[1],
                labels[index],
                fontsize=8.5,
                ha="left" if side > 0 else "right",
                va="center",
                zorder=6,
                bbox=_PAPER,
            )


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending positions at least `gap` apart whose squared distance from the `wanted` ones, ascending, is least."""
    blocks: list[tuple[float, int]] = []  # (mean of wanted position minus place in the row, length)
    for number, position in enumerate(wanted):
        mean, size = position - number * gap, 1
        while blocks and blocks[-1][0] >= mean:  # pool adjacent violators
            before, length = blocks.pop()
            mean, size = (before * length + mean * size) / (length + size), length + size
        blocks.append((mean, size))
    starts = [mean for mean, size in blocks for _ in range(size)]
    return [start + number * gap for number, start in enumerate(starts)]
