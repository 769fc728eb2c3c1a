"""Real shards for tests: photographs from the wheels of scikit-image and scikit-learn, in TARs of any shape."""

import io
import json
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import skimage
import sklearn
from PIL import Image

SUBREDDITS = ("itookapicture", "cats", "foodporn", "earthporn", "spaceporn", "retrobattlestations")


@cache
def photos() -> list[Image.Image]:
    """Real photographs, RGB."""
    skimage_data = Path(skimage.__file__).parent / "data"
    sklearn_data = Path(sklearn.__file__).parent / "datasets" / "images"
    names = ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "motorcycle_left.png"]
    paths = [skimage_data / name for name in names] + [sklearn_data / "china.jpg", sklearn_data / "flower.jpg"]
    return [Image.open(path).convert("RGB") for path in paths]


def photo(number: int, longer: int = 160) -> Image.Image:
    """A part of one of the photographs; every number gives another picture."""
    source = photos()[number % len(photos())]
    draws = np.random.default_rng(number).uniform(size=4)
    width, height = (int(side * (0.5 + draw / 2)) for side, draw in zip(source.size, draws, strict=False))
    left, top = int((source.width - width) * draws[2]), int((source.height - height) * draws[3])
    part = source.crop((left, top, left + width, top + height))
    scale = longer / max(part.size)
    return part.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def caption_json(number: int) -> bytes:
    record = {"subreddit": SUBREDDITS[number % len(SUBREDDITS)], "caption": f"picture number {number}"}
    return json.dumps(record).encode()


def sample(number: int, longer: int = 160) -> list[tuple[str, bytes]]:
    """The two members of a RedCaps sample."""
    key = f"k{number:05d}"
    return [(f"{key}.jpg", encoded(photo(number, longer))), (f"{key}.json", caption_json(number))]


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, shards: int = 4, per_shard: int = 20, longer: int = 160, first: int = 0) -> list[Path]:
    """RedCaps shards of good samples, numbered on from `first`."""
    return [
        write_tar(
            folder / f"shard_{index:05d}.tar",
            [m for n in range(per_shard) for m in sample(first + index * per_shard + n, longer)],
        )
        for index in range(shards)
    ]
