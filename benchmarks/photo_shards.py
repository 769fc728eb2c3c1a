"""Shards as RedCaps has them: JPEGs of 512 pixels on the longer side, quality 75, cut out of real photographs."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

SUBREDDITS = ("itookapicture", "cats", "foodporn", "earthporn", "spaceporn", "retrobattlestations", "mid_century")
PER_SHARD = 500


def write(folder: Path, samples: int, longer: int = 512) -> str:
    """Write shards (unless they are there) and return the pattern that names them."""
    import webdataset

    folder = folder / f"photos_{samples}_{longer}"
    done = folder / "done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        photos = _photos()
        for first in range(0, samples, PER_SHARD):
            shard = folder / f"shard_{first // PER_SHARD:05d}.tar"
            with webdataset.TarWriter(str(shard), encoder=False) as tar:
                for number in range(first, min(first + PER_SHARD, samples)):
                    tar.write(_sample(photos, number, longer))
        done.touch()
    return f"{folder}/shard_{{{0:05d}..{(samples - 1) // PER_SHARD:05d}}}.tar"


def _sample(photos: list[Image.Image], number: int, longer: int) -> dict:
    random = np.random.default_rng(number)
    source = photos[number % len(photos)]
    draws = random.uniform(0.4, 1.0, 2)
    width, height = (int(side * draw) for side, draw in zip(source.size, draws, strict=True))
    left, top = random.integers(source.width - width + 1), random.integers(source.height - height + 1)
    image = source.crop((left, top, left + width, top + height))
    scale = longer / max(image.size)
    image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG")
    words = random.choice(["my", "old", "the", "first", "view", "from", "a", "window", "this", "morning"], 8)
    text = {"subreddit": SUBREDDITS[number // PER_SHARD % len(SUBREDDITS)], "caption": " ".join(words)}
    return {"__key__": f"{number:07d}", "jpg": jpeg.getvalue(), "json": json.dumps(text).encode()}


def _photos() -> list[Image.Image]:
    import skimage
    import sklearn

    skimage_data = Path(skimage.__file__).parent / "data"
    sklearn_data = Path(sklearn.__file__).parent / "datasets" / "images"
    paths = [skimage_data / name for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg")]
    paths += [skimage_data / name for name in ("hubble_deep_field.jpg", "motorcycle_left.png")]
    paths += [sklearn_data / name for name in ("china.jpg", "flower.jpg")]
    return [Image.open(path).convert("RGB") for path in paths]
