"""Pictures with captions at several levels of detail: scikit-learn's handwritten digits and drawn scenes.

Every picture has a *ladder* of captions from general to specific ("a shape", "a red shape", "a red circle", "a large
red circle left of a small blue square"). That is the hierarchy a hyperbolic model is meant to find: the general caption
fits many pictures, so it belongs near the root.

All randomness comes from the generator that is passed in; the same seed draws the same pictures.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 80  # pixels of a stored picture; the training crop is 64
OVERSAMPLING = 3  # scenes are drawn larger and shrunk, which smooths their edges
SPECKLE = 4.0  # standard deviation of the pixel noise, in grey levels: no two pictures are equal

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
COLOURS = {
    "red": (206, 44, 49),
    "orange": (240, 138, 36),
    "green": (44, 145, 75),
    "blue": (38, 92, 190),
    "purple": (127, 63, 165),
    "black": (35, 35, 38),
}
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RADII = {"small": 0.095, "large": 0.19}  # half the width of a shape, in parts of the picture


@dataclass(frozen=True)
class Picture:
    """An image and its captions, general to specific."""

    image: Image.Image
    ladder: tuple[str, ...]


@dataclass(frozen=True)
class Thing:
    """One drawn object."""

    size: str
    colour: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def draw_digit(pixels: np.ndarray, label: int, rng: np.random.Generator) -> Picture:
    """Ink one of scikit-learn's 8 x 8 digits (values 0-16) on paper, slightly turned."""
    mask = Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    mask = mask.rotate(float(rng.uniform(-8, 8)), Image.Resampling.BICUBIC)
    paper = _paper(rng, SIZE)
    paper.paste(Image.new("RGB", mask.size, tuple(int(v) for v in rng.uniform(10, 90, 3))), (8, 8), mask)
    return Picture(_speckle(paper, rng), ("a digit", "a handwritten number", f"a handwritten {DIGIT_NAMES[label]}"))


def draw_scene(rng: np.random.Generator) -> Picture:
    """Draw one thing, or two of different shape and colour side by side or one above the other."""
    return draw_pair(rng) if rng.random() < 0.5 else draw_single(rng)


def draw_single(rng: np.random.Generator) -> Picture:
    """Draw one thing anywhere on the paper."""
    thing = _random_things(rng)[0]
    canvas = _paper(rng, SIZE * OVERSAMPLING)
    margin = RADII[thing.size] + 0.06
    _draw(canvas, thing, rng.uniform(margin, 1 - margin), rng.uniform(margin, 1 - margin))
    return Picture(_finish(canvas, rng), _ladder(thing))


def draw_pair(rng: np.random.Generator) -> Picture:
    """Draw two things; the most specific caption says how they lie to each other."""
    first, second = _random_things(rng)
    relation = str(rng.choice(list(RELATIONS)))
    canvas = _paper(rng, SIZE * OVERSAMPLING)
    near, far = 0.27 + rng.uniform(-0.03, 0.03), 0.73 + rng.uniform(-0.03, 0.03)
    along = (near, far) if relation in ("left of", "above") else (far, near)
    for thing, position in zip((first, second), along, strict=True):
        across = 0.5 + rng.uniform(-0.12, 0.12)
        centre = (position, across) if relation in ("left of", "right of") else (across, position)
        _draw(canvas, thing, *centre)
    return Picture(_finish(canvas, rng), (*_ladder(first), f"{article(first.name)} {relation} {article(second.name)}"))


def _random_things(rng: np.random.Generator) -> tuple[Thing, Thing]:
    colours = rng.choice(list(COLOURS), 2, replace=False)
    shapes = rng.choice(SHAPES, 2, replace=False)
    sizes = rng.choice(list(RADII), 2)
    first, second = (Thing(str(sizes[i]), str(colours[i]), str(shapes[i])) for i in range(2))
    return first, second


def _ladder(thing: Thing) -> tuple[str, ...]:
    return (
        "a shape",
        article(f"{thing.colour} shape"),
        article(f"{thing.colour} {thing.shape}"),
        article(thing.name),
    )


def _paper(rng: np.random.Generator, size: int) -> Image.Image:
    """A light background with a soft gradient."""
    start, end = rng.uniform(215, 252, 3), rng.uniform(215, 252, 3)
    ramp = np.linspace(0, 1, size)[:, None, None]
    pixels = np.broadcast_to(start + ramp * (end - start), (size, size, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def _finish(canvas: Image.Image, rng: np.random.Generator) -> Image.Image:
    return _speckle(canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS), rng)


def _speckle(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    noisy = np.asarray(image, np.float32) + rng.normal(0, SPECKLE, (image.height, image.width, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _draw(canvas: Image.Image, thing: Thing, x: float, y: float) -> None:
    """Draw a thing centred at (x, y), both in parts of the canvas."""
    scale, r, ink = canvas.width, RADII[thing.size], COLOURS[thing.colour]
    pen = ImageDraw.Draw(canvas)
    box = [(x - r) * scale, (y - r) * scale, (x + r) * scale, (y + r) * scale]
    if thing.shape == "circle":
        pen.ellipse(box, fill=ink)
    elif thing.shape == "ring":
        pen.ellipse(box, outline=ink, width=round(0.42 * r * scale))
    else:
        pen.polygon([((x + r * u) * scale, (y + r * v) * scale) for u, v in _OUTLINES[thing.shape]], fill=ink)


def _star() -> list[tuple[float, float]]:
    corners = (((1.08 if i % 2 == 0 else 0.45), math.pi * (i / 5 - 0.5)) for i in range(10))
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in corners]


def _heart() -> list[tuple[float, float]]:
    """The classic sine-cubed heart curve, scaled to the unit box."""
    turns = (2 * math.pi * i / 60 for i in range(60))
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
        )
        for t in turns
    ]


_OUTLINES = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
    "star": _star(),
    "heart": _heart(),
}
