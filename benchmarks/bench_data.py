"""Loading speed of RedCaps-like shards, beside the published pipeline and other ways; and the soak test.

    python -m benchmarks.bench_data                                     all that runs on this machine
    python -m benchmarks.bench_data --device cuda --workers 16          decoding on the GPU
    python -m benchmarks.bench_data --soak 10000                        memory over 10,000 batches

Every variant goes from the same TARs (photographs of 512 pixels, JPEG quality 75) to crops of 224 pixels and token
ids in one process, with the same number of workers. Variants take turns in rounds, so that other load meets all alike.
Reported: median images per second over the rounds, CPU milliseconds per image of all processes together, and the
share of time that a consumer whose step lasts `--step-ms` waits for data.

- ours-pil, ours-dali: `meru_fast.data.build_loader`.
- published: webdataset's pipeline as MERU configures it (shuffle buffer 4000, Pillow, torchvision's RandomResizedCrop
  and ToTensor, captions tokenised in the training process), with our tokenizer, which is faster than the published one.
- torchvision: the same with torchvision's JPEG decoder and tensor transforms.
- dali-reader: DALI's own webdataset reader, decoder and random crop; captions parsed and tokenised in Python.

`ours-pil` and `ours-dali` are compared with `published` on the same crops: the mean difference in levels of 255.
"""

import argparse
import csv
import datetime
import io
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from benchmarks import devices, photo_shards
from meru_fast.data import build_loader, captions, decode, keyed
from meru_fast.data.index import open_shards
from meru_fast.data.samples import ShardSamples
from meru_fast.data.shards import patterns
from meru_fast.data.transforms import DRAWS, crop_window
from meru_fast.progress import progress_bar
from meru_fast.tokenizer import PackedTokens, Tokenizer

SIZE = 224
CROP = (0.5, 1.0)
RESULTS = Path(__file__).with_name("data.csv")
LIMIT_MB = 20  # what memory may rise by after warm-up
CURVE = Path(__file__).parents[1] / "docs" / "assets" / "data_soak"


class Ours:
    """This project's loader."""

    def __init__(self, args: argparse.Namespace, decoder: str):
        self.loader = build_loader(
            args.shards,
            batch_size=args.batch,
            num_workers=args.workers,
            image_size=SIZE,
            crop_scale=CROP,
            device=args.device,
            decoder=decoder,
        )

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.loader:
            yield batch.images

    def close(self) -> None:
        self.loader.close()


class Webdataset:
    """webdataset's reader in torch's DataLoader, with a transform of (image bytes) -> tensor."""

    def __init__(self, args: argparse.Namespace, decoder: Callable[[bytes], Tensor]):
        import webdataset

        self.device = args.device
        self.tokenizer = Tokenizer()
        stages = [
            webdataset.SimpleShardList(patterns(args.shards), seed=0),
            webdataset.split_by_worker,
            webdataset.tarfile_to_samples(),
            webdataset.shuffle(4000, initial=4000, rng=random.Random(0)),
            webdataset.map(_Mapper(decoder)),
        ]
        self.loader = torch.utils.data.DataLoader(
            webdataset.DataPipeline(*stages).repeat(),
            batch_size=args.batch,
            num_workers=args.workers,
            drop_last=True,
            pin_memory=args.device == "cuda",
        )

    def __iter__(self) -> Iterator[Tensor]:
        for images, texts in self.loader:
            PackedTokens.from_list(self.tokenizer(texts)).to(self.device, non_blocking=True)
            yield images.to(self.device, non_blocking=True)

    def close(self) -> None:
        """The workers end with the iterator."""


class _Mapper:
    """A webdataset sample to (tensor, text): subreddit prefix with probability 0.5."""

    def __init__(self, decoder: Callable[[bytes], Tensor]):
        self.decoder = decoder

    def __call__(self, sample: dict[str, bytes]) -> tuple[Tensor, str]:
        record = json.loads(sample["json"])
        text = record["caption"]
        if random.random() <= 0.5:
            text = f"{captions.segment(record['subreddit'])} : {text}"
        return self.decoder(sample["jpg"]), text


def published(args: argparse.Namespace) -> Webdataset:
    from PIL import Image
    from torchvision import transforms

    crop = transforms.RandomResizedCrop(SIZE, CROP, interpolation=transforms.InterpolationMode.BICUBIC)
    transform = transforms.Compose([crop, transforms.ToTensor()])
    return Webdataset(args, lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB")))


def torchvision_tensors(args: argparse.Namespace) -> Webdataset:
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import InterpolationMode, v2

    crop = v2.RandomResizedCrop(SIZE, CROP, interpolation=InterpolationMode.BICUBIC, antialias=True)

    def decoded(data: bytes) -> Tensor:
        return crop(decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB))

    return Webdataset(args, decoded)


class DaliReader:
    """DALI from TAR to crop; captions leave it as bytes."""

    def __init__(self, args: argparse.Namespace):
        from nvidia.dali import Pipeline, fn, types

        self.tokenizer = Tokenizer()
        on_gpu = args.device == "cuda"
        self.pipeline = Pipeline(
            args.batch,
            num_threads=max(1, args.workers),
            device_id=0 if on_gpu else None,
            prefetch_queue_depth=2,
            seed=0,
        )
        with self.pipeline:
            jpegs, texts = fn.readers.webdataset(
                paths=patterns(args.shards), ext=["jpg", "json"], random_shuffle=True, initial_fill=4000, name="tars"
            )
            images = fn.decoders.image_random_crop(
                jpegs, device="mixed" if on_gpu else "cpu", random_area=CROP, random_aspect_ratio=(3 / 4, 4 / 3)
            )
            images = fn.resize(images, size=(SIZE, SIZE), interp_type=types.INTERP_CUBIC, antialias=True)
            self.pipeline.set_outputs(fn.transpose(images, perm=(2, 0, 1)), texts)
        self.pipeline.build()

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            images, texts = self.pipeline.run()
            records = (json.loads(bytes(texts.at(i))) for i in range(len(texts)))
            prefixed = [
                f"{captions.segment(r['subreddit'])} : {r['caption']}" if random.random() <= 0.5 else r["caption"]
                for r in records
            ]
            PackedTokens.from_list(self.tokenizer(prefixed))
            yield torch.from_dlpack(images.as_tensor()).clone()

    def close(self) -> None:
        """Nothing runs on."""


VARIANTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "ours-pil": lambda args: Ours(args, "pil"),
    "ours-dali": lambda args: Ours(args, "dali"),
    "published": published,
    "torchvision": torchvision_tensors,
    "dali-reader": DaliReader,
}


def cpu_seconds() -> float:
    """CPU time of this process and its living children."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        times = process.cpu_times()
        total += times.user + times.system
    return total


def measure(batches: Iterator[Tensor], count: int, step_seconds: float = 0.0) -> tuple[float, float, float]:
    """Wall and CPU seconds of `count` batches, and the part of the wall time spent waiting for them."""
    waited = 0.0
    start, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(count):
        asked = time.perf_counter()
        images = next(batches)
        if images.is_cuda:
            torch.cuda.synchronize()
        waited += time.perf_counter() - asked
        time.sleep(step_seconds)
    wall = time.perf_counter() - start
    return wall, cpu_seconds() - cpu, waited


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the chosen variants in turns; one row each."""
    differences = difference_to_published(args)
    rounds = max(1, args.images // args.batch)
    found: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in args.variants}
    for number, name in itertools.product(range(args.rounds), args.variants):
        pipeline = VARIANTS[name](args)
        batches = iter(pipeline)
        measure(batches, 2 * max(1, args.workers) + 2)  # workers start, buffers fill
        wall, cpu, _ = measure(batches, rounds)
        step = args.step_ms / 1e3
        measure(batches, 2, step)
        busy, _, waited = measure(batches, 10, step)
        images = rounds * args.batch
        found[name].append((images / wall, 1e3 * cpu / images, waited / busy, images))
        print(f"round {number + 1}: {name:12} {images / wall:8.0f} img/s", file=sys.stderr)
        del batches
        pipeline.close()
        del pipeline
    rows = []
    for name, measured in found.items():
        rate, cpu, waits, _ = (statistics.median(column) for column in zip(*measured, strict=True))
        rows.append(
            {
                "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "variant": name,
                "workers": args.workers,
                "batch": args.batch,
                "rounds": args.rounds,
                "images_per_round": measured[0][3],
                "img_per_s": rate,
                "img_per_s_lowest": min(measured)[0],
                "img_per_s_highest": max(measured)[0],
                "cpu_ms_per_img": cpu,
                "step_ms": args.step_ms,
                "data_wait_share": waits,
                "mean_difference": differences.get(name, ""),
                **devices.describe(torch.device(args.device)),
                "clocks": devices.clocks(torch.device(args.device)),
            }
        )
    return rows


def difference_to_published(args: argparse.Namespace, samples: int = 200) -> dict[str, float]:
    """Mean difference of our pixels to Pillow's and torchvision's on the same windows, in levels of 255."""
    from PIL import Image
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import pil_to_tensor, resized_crop

    source = ShardSamples(open_shards(args.shards))
    files = [source.read(number).image for number in range(min(samples, len(source)))]
    sizes = [decode.open_image(file).size for file in files]
    draws = keyed.uniform(np.arange(len(files))[:, None], np.arange(DRAWS))
    windows = [crop_window(*size, draw, CROP) for size, draw in zip(sizes, draws, strict=True)]

    def reference(file: bytes, window) -> Tensor:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        part = (window.top, window.left, window.height, window.width)
        return pil_to_tensor(resized_crop(image, *part, [SIZE, SIZE], InterpolationMode.BICUBIC)).float()

    expected = torch.stack([reference(file, window) for file, window in zip(files, windows, strict=True)])
    found = {}
    if "ours-pil" in args.variants:
        pairs = zip(files, windows, strict=True)
        pixels = torch.stack([decode.crop_and_resize(decode.open_image(f), w, SIZE) for f, w in pairs])
        found["ours-pil"] = float((pixels.float() - expected).abs().mean())
    if "ours-dali" in args.variants:
        from meru_fast.data.dali import DaliDecoder

        decoder = DaliDecoder(len(files), SIZE, torch.device(args.device), threads=max(1, args.workers))
        decoder.start([torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files], windows)
        found["ours-dali"] = float((decoder.finish().cpu().float() - expected).abs().mean())
    return found


def soak(args: argparse.Namespace) -> int:
    """Watch the memory of all processes over many batches; write the curve. Fails where it grows by 20 MB."""
    shards = args.shards or photo_shards.write(args.cache, samples=2000, longer=64)
    rows = []
    for decoder in ("pil", "dali"):
        loader = build_loader(
            shards,
            batch_size=16,
            num_workers=args.workers,
            image_size=32,
            block=8,
            window=256,
            device=args.device,
            decoder=decoder,
        )
        with progress_bar(f"soak {decoder}", args.soak, "batches") as advance:
            for batch in loader:
                if batch.step % 100 == 0:
                    this = psutil.Process()
                    children = [child.memory_info().rss for child in this.children(recursive=True)]
                    rows.append((decoder, batch.step, this.memory_info().rss / 2**20, sum(children) / 2**20))
                advance(note=f"{rows[-1][2]:.0f} + {rows[-1][3]:.0f} MB")
                if batch.step == args.soak:
                    break
        loader.close()
    args.curve.parent.mkdir(parents=True, exist_ok=True)
    with args.curve.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["decoder", "batch", "trainer_mb", "workers_mb"])
        writer.writerows((name, step, f"{main:.1f}", f"{workers:.1f}") for name, step, main, workers in rows)
    return plot_soak(rows, args.curve, warm_up=args.soak // 10)


def plot_soak(rows: Sequence[tuple[str, int, float, float]], curve_file: Path, warm_up: int) -> int:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    worst = 0.0
    for decoder in dict.fromkeys(row[0] for row in rows):
        curve = [(step, main + workers) for name, step, main, workers in rows if name == decoder]
        after = [memory for step, memory in curve if step >= warm_up]
        growth = max(memory - lowest for memory, lowest in zip(after, itertools.accumulate(after, min), strict=True))
        worst = max(worst, growth)
        print(f"{decoder}: {after[0]:.0f} MB after {warm_up} batches, rises by at most {growth:.1f} MB after that")
        change = [(step, memory - after[0]) for step, memory in curve]
        axes.plot(*zip(*change, strict=True), label=f"{decoder}: {after[0]:.0f} MB, rises by at most {growth:.1f} MB")
    axes.axhline(LIMIT_MB, color="tab:red", linestyle="--", linewidth=1, label=f"limit: {LIMIT_MB} MB")
    axes.axvline(warm_up, color="grey", linestyle=":", linewidth=1, label="end of warm-up")
    axes.set(xlabel="batches", ylabel="change of resident memory,\nall processes (MB)")
    axes.legend(loc="center right")
    figure.savefig(curve_file.with_suffix(".png"), dpi=120)
    return 0 if worst < LIMIT_MB else 1


def show(rows: Sequence[dict[str, Any]]) -> None:
    base = next((row["img_per_s"] for row in rows if row["variant"] == "published"), None)
    first = rows[0]
    print(f"\n{first['device']}, {first['workers']} workers, batches of {first['batch']}, {first['clocks']}")
    print(f"{'variant':14}{'img/s':>8}{'x published':>13}{'CPU ms/img':>12}{'data wait':>11}{'difference':>12}")
    for row in sorted(rows, key=lambda row: -row["img_per_s"]):
        ratio = f"{row['img_per_s'] / base:.2f}" if base else ""
        difference = f"{row['mean_difference']:.3f}/255" if row["mean_difference"] != "" else ""
        wait = f"{100 * row['data_wait_share']:.1f} %"
        print(
            f"{row['variant']:14}{row['img_per_s']:8.0f}{ratio:>13}{row['cpu_ms_per_img']:12.2f}{wait:>11}{difference:>12}"
        )
    print(f"data wait: of a consumer whose step lasts {first['step_ms']:g} ms")


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows below a header in a new file."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shards", help="measure these instead of photographs made for it")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where batches go (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, or DALI threads (%(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images in a batch (%(default)s)")
    parser.add_argument("--images", type=int, default=4000, help="timed images of a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each variant (%(default)s)")
    parser.add_argument(
        "--step-ms", type=float, default=500, help="step of the consumer for the data wait (%(default)s)"
    )
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="default: all")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "meru_fast", help="where photographs go")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="append rows to this file (%(default)s)")
    parser.add_argument("--soak", type=int, metavar="BATCHES", help="watch memory over so many batches instead")
    parser.add_argument("--curve", type=Path, default=CURVE, help="soak: CSV and PNG go to this name (%(default)s)")
    args = parser.parse_args(argv)
    if args.soak:
        return soak(args)
    args.shards = args.shards or photo_shards.write(args.cache, samples=6000)
    rows = compare(args)
    append(args.csv, rows)
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
