"""The demo's data on disk: training shards in the RedCaps layout and a held-out part for evaluation.

train/shard_00000000.tar ...   {id}.jpg and {id}.json with "subreddit" and "caption", 1,000 pairs each, one subreddit
digits/<name>/*.png            held-out digits (other originals than those of the shards), a folder for each class
scenes.json, scenes/*.png      held-out scenes, rows of {"image", "captions"} with the most specific caption
ladders.json                   the held-out scenes and digits with all their captions, general to specific
"""

import argparse
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from meru_fast.demo.pictures import DIGIT_NAMES, Picture, draw_digit, draw_pair, draw_scene
from meru_fast.progress import progress_bar

SHARD_SIZE = 1000
DIGIT_SHARDS = 5
HELD_OUT_DIGITS = 397  # of scikit-learn's 1,797
HELD_OUT_SCENES = 400
SUBREDDITS = {"digits": "handwriting", "scenes": "drawnshapes"}
SPECIFICITY = 3  # a rung of the ladder is that much more frequent in training than the more general one above it
JPEG_QUALITY = 90


def make(output_dir: str | os.PathLike, num_shards: int = 10, seed: int = 0) -> Path:
    """Write shards and held-out part, unless they are already there.

    Args:
        output_dir: a folder that does not exist, or one that this function made with the same arguments.
        num_shards: training shards of 1,000 pairs; at least one of each kind (digits and scenes).
        seed: the same seed gives the same files, byte for byte.

    Returns:
        The folder.

    Raises:
        ValueError: too few shards.
        FileExistsError: the folder holds something else.
    """
    if num_shards < 2:
        raise ValueError(f"num_shards={num_shards}: needs at least 2, one of digits and one of scenes")
    output_dir = Path(output_dir)
    settings = {"num_shards": num_shards, "seed": seed}
    finished = output_dir / "settings.json"
    if finished.is_file() and json.loads(finished.read_text()) == settings:
        return output_dir
    if output_dir.exists():
        raise FileExistsError(f"{output_dir} exists and holds no demo data with {settings}: remove it or name another")
    partial = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "train").mkdir(parents=True)
    _write_all(partial, num_shards, seed)
    (partial / finished.name).write_text(json.dumps(settings))
    partial.rename(output_dir)
    return output_dir


def _write_all(folder: Path, num_shards: int, seed: int) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    training, held_out = split_digits(len(digits.target), seed)
    num_digit_shards = min(DIGIT_SHARDS, num_shards - 1)
    with progress_bar("drawing pictures", num_shards * SHARD_SIZE, "pictures") as advance:
        for shard in range(num_shards):
            kind = "digits" if shard < num_digit_shards else "scenes"
            rng = np.random.default_rng([seed, 1, shard])
            if kind == "digits":  # every original comes several times, turned and inked differently
                positions = training[np.arange(shard * SHARD_SIZE, (shard + 1) * SHARD_SIZE) % len(training)]
                pictures = (draw_digit(digits.images[i], int(digits.target[i]), rng) for i in positions)
            else:
                pictures = (draw_scene(rng) for _ in range(SHARD_SIZE))
            _write_shard(folder / "train" / f"shard_{shard:08d}.tar", SUBREDDITS[kind], pictures, rng, advance)
    rng = np.random.default_rng([seed, 2])
    _write_held_out(folder, [(digits.images[i], int(digits.target[i])) for i in held_out], rng)


def split_digits(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the originals that are trained on, and of those that are held out."""
    order = np.random.default_rng(seed).permutation(count)
    return order[HELD_OUT_DIGITS:], order[:HELD_OUT_DIGITS]


def _write_shard(
    path: Path, subreddit: str, pictures: Iterator[Picture], rng: np.random.Generator, advance: Callable[[], None]
) -> None:
    import webdataset

    with webdataset.TarWriter(str(path), mtime=0) as tar:
        for number, picture in enumerate(pictures):
            weights = SPECIFICITY ** np.arange(float(len(picture.ladder)))
            caption = picture.ladder[rng.choice(len(picture.ladder), p=weights / weights.sum())]
            jpeg = io.BytesIO()
            picture.image.save(jpeg, "JPEG", quality=JPEG_QUALITY)
            tar.write(
                {
                    "__key__": f"{path.stem[-4:]}{number:04d}",
                    "jpg": jpeg.getvalue(),
                    "json": {"subreddit": subreddit, "caption": caption},
                }
            )
            advance()


def _write_held_out(folder: Path, digits: list[tuple[np.ndarray, int]], rng: np.random.Generator) -> None:
    ladders = []
    for number, (pixels, label) in enumerate(digits):
        name = f"digits/{DIGIT_NAMES[label]}/{number:04d}.png"
        ladders.append(_save(folder, name, draw_digit(pixels, label, rng)))
    scenes = [_save(folder, f"scenes/{number:04d}.png", draw_pair(rng)) for number in range(HELD_OUT_SCENES)]
    rows = [{"image": row["image"], "captions": row["captions"][-1:]} for row in scenes]
    (folder / "scenes.json").write_text(json.dumps(rows, indent=1))
    (folder / "ladders.json").write_text(json.dumps(scenes + ladders, indent=1))


def _save(folder: Path, name: str, picture: Picture) -> dict:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    picture.image.save(folder / name)
    return {"image": name, "captions": list(picture.ladder)}


def main(argv: list[str] | None = None) -> None:
    """Command line of ``scripts/make_demo_shards.py``."""
    parser = argparse.ArgumentParser(
        description="Write the demo's data: shards in the RedCaps layout and a held-out part.",
        epilog="example: python scripts/make_demo_shards.py --output-dir datasets/demo --num-shards 10",
    )
    parser.add_argument("--output-dir", required=True, help="folder to create")
    parser.add_argument("--num-shards", type=int, default=10, help="training shards of 1,000 pairs (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same bytes (default 0)")
    args = parser.parse_args(argv)
    try:
        folder = make(args.output_dir, args.num_shards, args.seed)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{folder}: {args.num_shards} shards, {HELD_OUT_DIGITS} digits and {HELD_OUT_SCENES} scenes held out")
