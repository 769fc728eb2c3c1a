"""Figures of the report, as SVG text that goes into a page as it is."""

import io
from collections.abc import Mapping, Sequence

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
    "grid.color": "#e6eaee",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
}


def svg(figure: Figure, salt: str) -> str:
    """`figure` as an ``<svg>`` element. Figures on one page need different salts, which keep their ids apart."""
    text = io.StringIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": salt}):
        figure.savefig(
            text, format="svg", bbox_inches="tight", pad_inches=0.05, transparent=True, metadata={"Date": None}
        )
    whole = text.getvalue()
    return whole[whole.index("<svg") :].replace("<svg ", '<svg role="img" ', 1)


def _axes(width: float, height: float, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(1, columns, squeeze=False)[0]


def loss_curves(log: Mapping[str, Sequence[float]], salt: str) -> str:
    """Loss parts over steps, and beside them the learned scalars, from the columns of a run's metrics.csv."""
    figure, (left, right) = _axes(8.4, 3.0, columns=2)
    steps = log["step"]
    parts = {"contrastive_loss": ("contrastive", IMAGE_COLOUR), "entailment_loss": ("entailment", CAPTION_COLOURS[1])}
    for name, (label, colour) in parts.items():
        if name in log:
            left.plot(steps, log[name], color=colour, linewidth=1, alpha=0.3)
            left.plot(steps, _smooth(log[name]), color=colour, linewidth=1.8, label=label)
    left.set(title="Loss", xlabel="step", ylim=(0, None))
    left.legend()
    scalars = {"curv": ("curvature c", CAPTION_COLOURS[0]), "image_radius": ("mean distance of images", IMAGE_COLOUR)}
    scalars |= {"text_radius": ("mean distance of captions", CAPTION_COLOURS[1])}
    for name, (label, colour) in scalars.items():
        if name in log:
            right.plot(steps, log[name], color=colour, linewidth=1.8, label=label)
    right.set(title="Geometry", xlabel="step", ylim=(0, None))
    right.legend()
    return svg(figure, salt)


def _smooth(values: Sequence[float], window: int = 9) -> np.ndarray:
    """Centred running mean; the ends are averaged over what there is."""
    kernel = np.ones(min(window, len(values)))
    values = np.asarray(values, float)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def radius_histogram(images: np.ndarray, captions: Mapping[str, np.ndarray], unit: str, salt: str) -> str:
    """Shares of images and of each group of captions over the distance from the root."""
    figure, (axes,) = _axes(6.4, 3.0)
    everything = np.concatenate([images, *captions.values()])
    bins = np.linspace(0, everything.max() * 1.02, 60)
    groups = [(name, values, colour) for (name, values), colour in zip(captions.items(), CAPTION_COLOURS, strict=False)]
    for name, values, colour in (*groups, ("images", images, IMAGE_COLOUR)):
        share = np.full(len(values), 100 / len(values))
        axes.hist(values, bins, weights=share, color=colour, alpha=0.75, label=name)
    axes.set(xlabel=f"distance from the root ({unit})", ylabel="share (%)")
    axes.grid(axis="x", visible=False)
    axes.legend()
    return svg(figure, salt)


def poincare_disk(
    images: np.ndarray,
    captions: np.ndarray,
    pictures: Sequence[tuple[int, Image.Image]],
    ladders: Sequence[Sequence[int]],
    labels: Mapping[int, str],
    rings: Mapping[float, str],
    salt: str,
) -> str:
    """Points of the unit disk: images, captions, and the way from the root over the captions to some of the images.

    Args:
        images, captions: [N, 2] inside the unit disk.
        pictures: positions in `images`, with the picture to draw there.
        ladders: for each of `pictures` the positions of its captions, general to specific.
        labels: captions to write out, by position.
        rings: radius on the disk to the text beside that circle.
    """
    figure, (axes,) = _axes(7.2, 7.2)
    axes.set_aspect("equal")
    axes.set_axis_off()
    angle = np.linspace(0, 2 * np.pi, 200)
    for radius, text in rings.items():
        axes.plot(radius * np.cos(angle), radius * np.sin(angle), color="#dfe4e8", linewidth=0.8, zorder=0)
        axes.text(0, -radius, text, fontsize=7.5, color=PALE, ha="center", va="top", zorder=1)
    axes.plot(np.cos(angle), np.sin(angle), color=INK, linewidth=1.2, zorder=1)
    for (image, _), ladder in zip(pictures, ladders, strict=True):
        way = np.stack([np.zeros(2), *(captions[position] for position in ladder), images[image]])
        axes.plot(way[:, 0], way[:, 1], color=CAPTION_COLOURS[1], linewidth=0.8, alpha=0.55, zorder=2)
    axes.scatter(*images.T, s=7, color=IMAGE_COLOUR, alpha=0.35, linewidths=0, zorder=2, label="image")
    axes.scatter(*captions.T, s=11, color=CAPTION_COLOURS[1], alpha=0.8, linewidths=0, zorder=3, label="caption")
    axes.scatter(0, 0, s=40, marker="+", color=INK, zorder=4, label="root")
    for image, picture in pictures:
        box = OffsetImage(np.asarray(picture.convert("RGB").resize((56, 56))), zoom=0.55)
        frame = {"edgecolor": IMAGE_COLOUR, "linewidth": 0.8, "boxstyle": "square,pad=0.08"}
        axes.add_artist(AnnotationBbox(box, images[image], bboxprops=frame, zorder=5))
    for position, text in labels.items():
        _label(axes, captions[position], text)
    axes.legend(loc="upper right", fontsize=8.5)
    axes.set(xlim=(-1.03, 1.03), ylim=(-1.03, 1.03))
    return svg(figure, salt)


def _label(axes: Axes, point: np.ndarray, text: str) -> None:
    outwards = point / max(np.linalg.norm(point), 1e-6)
    side = "left" if outwards[0] >= 0 else "right"
    axes.annotate(
        text,
        point,
        xytext=outwards * 9,
        textcoords="offset points",
        fontsize=8,
        ha=side,
        va="center",
        zorder=6,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
    )
