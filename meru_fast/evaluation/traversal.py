"""Walk from an image to the root of the embedding space and read the text that is nearest at every step.

The protocol is that of MERU (arXiv 2304.09172, section 5): points at equal steps in the tangent space of the root, the
texts whose entailment cone does not hold a point are out, the best of the others is read, repetitions are dropped.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from meru_fast import lorentz
from meru_fast.evaluation.checkpoints import DEVICE, load_model
from meru_fast.evaluation.cones import curvature, root_of

if TYPE_CHECKING:
    from meru_fast.models import CLIP, MERU

ROOT = "[ROOT]"
STEPS = 50
EXCLUDED = -1e12  # the score of a text whose cone does not hold the point


@dataclass(frozen=True)
class Stop:
    """A text of a traversal and how far along the way it is first nearest: 0 at the start, 1 at the end."""

    text: str
    progress: float


def load_pool(path: str | os.PathLike | None = None) -> list[str]:
    """Texts to choose from, without the root, distinct.

    Args:
        path: a text file with a text a line; a JSON list of texts; or a JSON object of templates to lists, each text
            filled into its template's ``{}``. Default: the shipped pool of everyday captions, things and moods.

    Raises:
        ValueError: not such a file, or no texts in it.
    """
    source = resources.files("meru_fast") / "assets" / "text_pool.json" if path is None else Path(path)
    try:
        content = source.read_text(encoding="utf-8")
        found = json.loads(content) if source.name.endswith(".json") else content.splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: cannot read the texts ({error})") from error
    if isinstance(found, dict):
        found = [template.replace("{}", text) for template, texts in found.items() for text in texts]
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{source}: expected a list of texts or an object of templates to lists of texts")
    texts = list(dict.fromkeys(text.strip() for text in found if text.strip()))
    if not texts:
        raise ValueError(f"{source}: no texts")
    return texts


def points_between(model: "CLIP", start: Tensor, end: Tensor, steps: int = STEPS) -> Tensor:
    """Points [steps, D] at equal steps from `start` to `end` [D], both included.

    Hyperbolic models: straight in the tangent space of the root, which is a geodesic where one end is the root. Sphere:
    straight, then normalised.
    """
    weights = torch.linspace(0, 1, steps, device=start.device)[:, None]
    if model.geometry == "lorentz":
        curv = curvature(model)
        start, end = lorentz.log_map0(start, curv), lorentz.log_map0(end, curv)
        return lorentz.exp_map0(torch.lerp(start, end, weights), curv)
    return F.normalize(torch.lerp(start, end, weights), dim=-1)


def entailed_scores(model: "CLIP", points: Tensor, texts: Tensor, root: Tensor) -> Tensor:
    """Scores [P, T + 1] of the texts [T, D] and, last, the root [D] at each point [P, D].

    Lorentz inner product, ``EXCLUDED`` for a text whose cone does not hold the point; the root's cone holds all. On the
    sphere: dot product.
    """
    texts = torch.cat([texts, root[None]])
    scores = model.similarity(points, texts)
    if model.geometry == "lorentz":
        curv = curvature(model)
        outside = lorentz.pairwise_oxy_angle(texts, points, curv) - lorentz.half_aperture(
            texts, curv, cast("MERU", model).min_radius
        ).unsqueeze(1)
        outside[-1] = 0
        scores = scores.masked_fill(outside.T > 0, EXCLUDED)
    return scores


@torch.inference_mode()
def traverse(
    model: "CLIP",
    start: Tensor,
    end: Tensor,
    text_features: Tensor,
    texts: Sequence[str],
    root: Tensor,
    steps: int = STEPS,
) -> list[Stop]:
    """The distinct texts on the way from `start` to `end`, in the order in which they are met.

    Args:
        start, end: [D] projected features: an image and the root for a traversal, two images for an interpolation.
        text_features: [T, D] projected features of `texts`.
        root: [D], from ``cones.root_of``.
        steps: points on the way.

    Raises:
        ValueError: fewer than two steps, or as many texts as there are not features.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    if len(texts) != len(text_features):
        raise ValueError(f"{len(texts)} texts but {len(text_features)} text features")
    names = [*texts, ROOT]
    points = points_between(model, start, end, steps)
    best = entailed_scores(model, points, text_features, root).argmax(dim=1).tolist()
    first: dict[str, float] = {}
    for step, index in enumerate(best):
        first.setdefault(names[index], step / (steps - 1))
    return [Stop(text, progress) for text, progress in first.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of ``scripts/image_traversals.py``."""
    args = _parse(argv)
    from meru_fast.checkpoint import CheckpointError
    from meru_fast.config import ConfigError
    from meru_fast.evaluation.protocol import DatasetError

    try:
        walks = _walks(args)
    except (CheckpointError, ConfigError, DatasetError, ValueError) as error:
        sys.exit(f"error: {error}")
    if args.json:
        rows = [{"from": start, "to": end, "stops": [asdict(stop) for stop in stops]} for start, end, stops in walks]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for start, end, stops in walks:
        print(f"{start} -> {end}")
        for stop in stops:
            print(f"  {stop.progress:4.0%}  {stop.text}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="meru-fast traverse",
        description="Walk from images to the root of the embedding space and read the texts on the way.",
        epilog="examples:\n"
        "  meru-fast traverse --image-path cat.jpg --checkpoint-path runs/meru\n"
        "  ... --image-path cat.jpg --image-path dog.jpg --interpolate      from the first image to the second\n"
        "  ... --image-path cat.jpg --text-pool my_captions.txt --json      own texts, for machines\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--image-path", required=True, action="append", help="a picture; give it several times for several")
    add("--checkpoint-path", required=True, help="run folder, DeepSpeed checkpoint folder, exported file or .pth")
    add("--train-config", help="the config it was trained with (default: the run's own, or a guess from the weights)")
    add("--steps", type=int, default=STEPS, help="points on the way (default %(default)s)")
    add("--text-pool", help="texts to read: .txt with one a line, or .json (default: the shipped pool)")
    add("--interpolate", action="store_true", help="from each image to the next instead of to the root")
    add("--image-size", type=int, help="side of the model's input (default: what its image encoder was built for)")
    add("--device", **DEVICE)
    add("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if args.interpolate and len(args.image_path) < 2:
        parser.error("--interpolate needs two --image-path or more")
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, got {args.steps}")
    return args


def _walks(args: argparse.Namespace) -> list[tuple[str, str, list[Stop]]]:
    from meru_fast.evaluation.features import Loading, image_features, input_size, text_features
    from meru_fast.evaluation.sources import ImageFiles
    from meru_fast.evaluation.transforms import EvalTransform

    texts = load_pool(args.text_pool)
    model, info = load_model(args.checkpoint_path, args.train_config, args.device)
    transform = EvalTransform(args.image_size or input_size(model))
    images = image_features(model, ImageFiles(args.image_path), transform, Loading(), "images").features
    features = text_features(model, texts, "texts")
    root = root_of(model, features, images, root=info.root)
    following = zip(args.image_path[1:], images[1:], strict=True)
    ends = list(following) if args.interpolate else [(ROOT, root)] * len(images)
    return [
        (path, name, traverse(model, image, end, features, texts, root, args.steps))
        for path, image, (name, end) in zip(args.image_path, images, ends, strict=False)
    ]
