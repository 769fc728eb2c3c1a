"""The crop window of a training image, drawn by us so that every decoder cuts the same pixels."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ATTEMPTS = 10
DRAWS = 4 * ATTEMPTS  # uniform numbers that one window consumes at most


class Window(NamedTuple):
    """Part of an image, in pixels from the upper left."""

    left: int
    top: int
    width: int
    height: int


def crop_window(
    width: int,
    height: int,
    draws: np.ndarray,
    scale: Sequence[float] = (0.5, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
) -> Window:
    """The window of a random resized crop, with the distribution and the rounding of torchvision's RandomResizedCrop.

    Args:
        width, height: of the whole image.
        draws: float64 [DRAWS], uniform in [0, 1).
        scale: range of the window's share of the area, uniform.
        ratio: range of width / height, log-uniform.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, ratio_draw, top_draw, left_draw in draws.reshape(ATTEMPTS, 4).tolist():
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(log_low + (log_high - log_low) * ratio_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Window(int(left_draw * (width - w + 1)), int(top_draw * (height - h + 1)), w, h)
    return _central(width, height, ratio)


def _central(width: int, height: int, ratio: Sequence[float]) -> Window:
    """The largest central window of an allowed shape, for images too long or too flat for any draw."""
    w, h = width, height
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    w, h = max(w, 1), max(h, 1)
    return Window((width - w) // 2, (height - h) // 2, w, h)
