"""Throughput of the evaluation against the published loop, on the same model and data.

    python -m benchmarks.bench_eval                                              ViT-S, 64 images: a CPU's size
    python -m benchmarks.bench_eval --config train_meru_vit_l --images 5000      a GPU's

The data are JPEGs of noise, 500 x 375 as COCO's, with five captions each. "published" encodes one image with its
captions at a time for retrieval and the prompts of one class at a time for classification, decodes between forward
passes, and sorts the whole score matrix; "ours" is ``meru_fast.evaluation``. Both must find the same recalls, or
nothing is recorded.
"""

import argparse
import csv
import datetime
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.bench_linear_probe import commit
from meru_fast import config, lorentz
from meru_fast.evaluation.protocol import protocols
from meru_fast.evaluation.retrieval import ZeroShotRetrieval
from meru_fast.evaluation.transforms import EvalTransform
from meru_fast.evaluation.zeroshot import class_embeddings
from meru_fast.tokenizer import Tokenizer

RESULTS = Path(__file__).with_name("eval.csv")
WORDS = ("a", "red", "small", "old", "dog", "cat", "house", "street", "on", "with", "people", "near", "water", "tree")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="train_meru_vit_s", help="whose model (%(default)s), with random weights")
    parser.add_argument("--images", type=int, default=64, help="images of the retrieval set (%(default)s)")
    parser.add_argument(
        "--classes", type=int, default=20, help="classes of the classifier, 18 prompts each (%(default)s)"
    )
    parser.add_argument("--csv", type=Path, default=RESULTS, help="append rows to this file (%(default)s)")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = config.instantiate(config.load(args.config).model).eval().to(device)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        manifest = make_data(Path(folder), args.images)
        retrieval = ZeroShotRetrieval([{"name": "noise", "kind": "manifest", "root": str(manifest)}])
        model.encode_image(torch.zeros(2, 3, 224, 224, device=device))  # warm up
        ours, seconds = timed(lambda: retrieval.evaluate(model, "noise"))
        expected, published_seconds = timed(lambda: published_retrieval(model, manifest))
        off = [name for name in ours.keys() & expected.keys() if abs(ours[name] - expected[name]) > 1.5 / args.images]
        if off:  # a near tie may fall either way, more may not
            raise SystemExit(f"error: not the same recalls: {ours} and {expected}")
        texts = 5 * args.images
        report(args, device, "retrieval", args.images, texts, seconds, published_seconds)
        names = list(protocols()["imagenet"].class_names[: args.classes])
        prompts = list(protocols()["cifar10"].prompts)
        ours, seconds = timed(lambda: class_embeddings(model, names, prompts))
        expected, published_seconds = timed(lambda: published_classifier(model, names, prompts))
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
        report(args, device, "classifier", 0, len(names) * len(prompts), seconds, published_seconds)
    return 0


def make_data(folder: Path, images: int) -> Path:
    """JPEGs and a manifest with five captions each."""
    random = np.random.RandomState(0)
    rows = []
    for number in range(images):
        coarse = Image.fromarray(random.randint(0, 256, (30, 40, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
        captions = [" ".join(random.choice(WORDS, random.randint(6, 14))) for _ in range(5)]
        rows.append({"image": f"{number}.jpg", "captions": captions})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def published_retrieval(model: nn.Module, manifest: Path) -> dict[str, float]:
    """The published loop: one image and its captions a forward pass, all scores, all sorted."""
    tokenizer, transform = Tokenizer(), EvalTransform(224, "squeeze")
    images, texts, image_of = [], [], []
    for number, row in enumerate(json.loads(manifest.read_text())):
        pixels = transform(Image.open(manifest.parent / row["image"]))[None].to(model.device) / 255
        images.append(model.encode_image(pixels))
        texts.append(model.encode_text(tokenizer(row["captions"])))
        image_of += [number] * len(row["captions"])
    image_feats, text_feats = torch.cat(images), torch.cat(texts)
    owner = torch.tensor(image_of, device=model.device)
    to_images = sorted_scores(model, text_feats, image_feats)
    to_texts = owner[sorted_scores(model, image_feats, text_feats)]
    scores = {}
    for k in (5, 10):
        found = (to_images[:, :k] == owner[:, None]).any(dim=1)
        scores[f"image_retrieval_recall@{k}"] = found.double().mean().item()
        found = (to_texts[:, :k] == torch.arange(len(image_feats), device=model.device)[:, None]).any(dim=1)
        scores[f"text_retrieval_recall@{k}"] = found.double().mean().item()
    return scores


def sorted_scores(model: nn.Module, queries: Tensor, gallery: Tensor) -> Tensor:
    """Gallery positions of every query, best first, by 256 queries."""
    score = lorentz.pairwise_inner if model.geometry == "lorentz" else lambda x, y, _: x @ y.T
    curv = model.curv.exp() if model.geometry == "lorentz" else None
    return torch.cat([score(chunk, gallery, curv).argsort(dim=1, descending=True) for chunk in queries.split(256)])


def published_classifier(model: nn.Module, names: list[str], prompts: list[str]) -> Tensor:
    """The published loop: one class a forward pass."""
    tokenizer = Tokenizer()
    rows = []
    for name in names:
        features = model.encode_text(tokenizer([prompt.format(name) for prompt in prompts]), project=False)
        if model.geometry == "cosine":
            features = model.project_text(features)
        rows.append(model.project_text(features.mean(dim=0, keepdim=True)))
    return torch.cat(rows)


def timed(call: Callable) -> tuple:
    """The result of a call, and its wall and CPU seconds."""
    began, cpu_began = time.perf_counter(), time.process_time()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, (time.perf_counter() - began, time.process_time() - cpu_began)


def report(
    args: argparse.Namespace,
    device: torch.device,
    task: str,
    images: int,
    texts: int,
    ours: tuple[float, float],
    published: tuple[float, float],
) -> None:
    """Print a line and add a row to the CSV."""
    print(f"{task}: {images} images and {texts} texts in {ours[0]:.1f} s, published loop {published[0]:.1f} s")
    row = {
        "date": datetime.date.today().isoformat(),
        "task": task,
        "config": args.config,
        "images": images,
        "texts": texts,
        "seconds": round(ours[0], 2),
        "cpu_seconds": round(ours[1], 2),
        "published_seconds": round(published[0], 2),
        "published_cpu_seconds": round(published[1], 2),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "commit": commit(),
    }
    new = not args.csv.exists()
    with args.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    raise SystemExit(main())
