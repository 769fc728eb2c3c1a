"""One training step, whole and in parts, beside a plain-PyTorch transcription of the published recipe.

    python -m benchmarks.bench_train_step --config train_meru_vit_l --batch 1024 model.visual.grad_checkpointing=true
    python -m benchmarks.bench_train_step --config train_meru_vit_b --batch 1024
    python -m benchmarks.bench_train_step --config demo_meru --batch 64 --steps 5          a CPU's size

Both sides train on the same synthetic batches in turns, step by step, so that clocks and other load meet them alike.
Ours: the trainer's engine (DeepSpeed, packed captions, fused loss). Published: fp16 autocast with a loss scaler (fp32
on a CPU), captions padded to the longest, unfused attention in the image tower, eager loss with two distance matrices.

FLOP of a step: 3 x forward (backward counts twice; recomputation of activations is work, but not counted).
Forward, with 2 FLOP per multiply-add, for a transformer of width D, T tokens: 24 T D^2 + 4 T^2 D per layer. Images:
T = patches + class token, plus 2 x patches x 3 P^2 x D for the patch embedding. Text tower: T is each caption's own
length, padding counts nothing. Projections 2 D E per sample, loss 2 B^2 E. MFU is FLOP per second over the rate of the
best large bf16 matrix product measured here (fp32 on a CPU), and over the datasheet's dense bf16 rate.
"""

import argparse
import csv
import datetime
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn

from benchmarks import devices, published
from benchmarks.bench_text_tower import transformer_flop
from meru_fast import config as configs
from meru_fast.config import instantiate
from meru_fast.data import build_loader
from meru_fast.tokenizer import PackedTokens
from meru_fast.training import deepspeed_config, launch
from meru_fast.training.engine import Engine
from meru_fast.training.loop import prepare_process
from meru_fast.training.report import resident_gb
from meru_fast.training.settings import TrainSettings

RESULTS = Path(__file__).with_name("train_step.csv")
PARTS = ("image tower", "text tower", "loss", "optimiser", "data")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="train_meru_vit_l", help="a MERU config (%(default)s)")
    parser.add_argument("--batch", type=int, required=True, help="pairs per step")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each side (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (%(default)s)")
    parser.add_argument("--deepspeed_config", help="as for training")
    parser.add_argument("--no-published", action="store_true", help="ours alone (less memory)")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="append a row to this file (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    args = parser.parse_intermixed_args(argv)

    overrides = [*args.overrides, f"train.total_batch_size={args.batch}"]
    cfg = configs.load(args.config, overrides)
    with launch.process_environment(launch.Place.alone()):
        row = measure(cfg, deepspeed_config.read(args.deepspeed_config), args)
    show(row)
    append(args.csv, row)
    return 0


def measure(cfg: Any, given: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    settings = TrainSettings.from_config(cfg.train)
    on_gpu = torch.cuda.is_available()
    device = prepare_process(settings, on_gpu)
    batches = Batches(cfg, settings, device)
    engine = ours(cfg, settings, given, device)
    sides: dict[str, Callable[[Tensor, PackedTokens], Any]] = {"ours": engine.step}
    if not args.no_published:
        sides["published"] = Published(cfg, device).step

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks = dict.fromkeys(sides, 0.0)
    for index in range(args.warmup + args.steps):
        batch = next(batches)
        for name, step in sides.items():
            taken, peak = timed(lambda step=step, batch=batch: step(*batch), device)
            if index >= args.warmup:
                seconds[name].append(taken)
                peaks[name] = max(peaks[name], peak)
    median = {name: statistics.median(times) for name, times in seconds.items()}

    lengths = [n for _ in range(5) for n in next(batches)[1].lengths]
    flop = step_flop(cfg, args.batch, [*lengths[: args.batch]])
    peak_rate = matrix_rate(device)
    limits = devices.datasheet(torch.cuda.get_device_name(device)) if on_gpu else None
    rate = flop / median["ours"] / 1e12
    parts = share(engine, batches, median["ours"], device)
    row = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "config": args.config,
        "overrides": " ".join(args.overrides),
        "batch": args.batch,
        "precision": engine.precision,
        "img_per_s": args.batch / median["ours"],
        "published_img_per_s": args.batch / median["published"] if "published" in median else "",
        "speedup": median["published"] / median["ours"] if "published" in median else "",
        "tflop_per_step": flop / 1e12,
        "tflop_per_s": rate,
        "mfu_of_measured": rate / peak_rate,
        "mfu_of_datasheet": rate / limits.bf16 if limits else "",
        "measured_matrix_tflop_per_s": peak_rate,
        "peak_gb": peaks["ours"],
        "published_peak_gb": peaks.get("published", "") if on_gpu else "",
        "step_ms": 1e3 * median["ours"],
        **{f"{part.replace(' ', '_')}_ms": 1e3 * parts[part] for part in PARTS},
        **devices.describe(device),
        "clocks": devices.clocks(device),
    }
    batches.close()
    engine.close()
    return row


class Batches:
    """Synthetic images and captions, made by the loader as for training; `waited` is what it let us wait."""

    def __init__(self, cfg: Any, settings: TrainSettings, device: torch.device):
        self.loader = build_loader(
            "synthetic",
            batch_size=settings.total_batch_size,
            num_workers=settings.num_workers,
            image_size=cfg.dataset.get("image_size", 224),
            device=device,
        )
        self.iterator: Iterator[Any] = iter(self.loader)
        self.waited: list[float] = []

    def __next__(self) -> tuple[Tensor, PackedTokens]:
        start = time.perf_counter()
        batch = next(self.iterator)
        self.waited.append(time.perf_counter() - start)
        return batch.images, batch.tokens

    def close(self) -> None:
        self.loader.close()


def ours(cfg: Any, settings: TrainSettings, given: dict[str, Any], device: torch.device) -> Engine:
    """The trainer's engine, as ``meru_fast.training`` builds it."""
    resolved = deepspeed_config.resolve(given, settings, 1, device.type == "cuda")
    model = instantiate(cfg.model).to(device)
    if settings.compile:
        model.visual.compile()
    optimizer = instantiate(cfg.optim.optimizer, model=model)
    return Engine(model, optimizer, lambda basic: instantiate(cfg.optim.lr_scheduler, optimizer=basic), resolved)


class Published:
    """The published training step in plain PyTorch, on a model of the same config."""

    def __init__(self, cfg: Any, device: torch.device):
        fused = timm.layers.use_fused_attn()
        timm.layers.set_fused_attn(False)  # timm of that time had no fused attention
        try:
            self.model = instantiate(cfg.model).to(device)
        finally:
            timm.layers.set_fused_attn(bool(fused))
        self.device = device
        self.amp = device.type == "cuda"
        groups = [
            {"params": [p for p in self.model.parameters() if p.requires_grad and p.numel() > 1], "weight_decay": 0.2},
            {"params": [p for p in self.model.parameters() if p.requires_grad and p.numel() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98))
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp)

    def step(self, images: Tensor, tokens: PackedTokens) -> None:
        model = self.model
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.float16, enabled=self.amp):
            pixels = (images.float() / 255 - model.pixel_mean) / model.pixel_std
            image = model.visual_proj(model.visual(pixels))
            text = model.textual_proj(model.textual(tokens.to_padded().to(self.device)))
            with torch.autocast(self.device.type, enabled=False):
                loss = self.loss(image.float(), text.float())
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        model = self.model
        curv = model.curv.exp()
        image = published.exp_map0(image * model.visual_alpha.exp(), curv)
        text = published.exp_map0(text * model.textual_alpha.exp(), curv)
        targets = torch.arange(len(image), device=self.device)
        image_logits = -published.pairwise_dist(image, text, curv) * model.logit_scale.exp()
        text_logits = -published.pairwise_dist(text, image, curv) * model.logit_scale.exp()
        contrastive = 0.5 * (
            nn.functional.cross_entropy(image_logits, targets) + nn.functional.cross_entropy(text_logits, targets)
        )
        return contrastive + model.entail_weight * published.entailment_loss(text, image, curv)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds, and peak memory in GB (of the process on a CPU)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    devices.synchronize(device)
    start = time.perf_counter()
    call()
    devices.synchronize(device)
    taken = time.perf_counter() - start
    return taken, torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else resident_gb()


def share(engine: Engine, batches: Batches, whole: float, device: torch.device, repeats: int = 5) -> dict[str, float]:
    """Seconds of each part, forward and backward, timed alone; the optimiser's is what is left of the whole step."""
    model = engine.model
    images, tokens = next(batches)

    def backward(features: Tensor) -> None:
        features.float().sum().backward()

    def autocast() -> torch.autocast:
        kind = engine.precision.removeprefix("autocast-")
        enabled = engine.precision.startswith("autocast")
        return torch.autocast(device.type, getattr(torch, kind) if enabled else torch.bfloat16, enabled=enabled)

    def image_tower() -> None:
        with autocast():
            features = model.encode_image(images, project=False)
        backward(features)

    def text_tower() -> None:
        with autocast():
            features = model.encode_text(tokens, project=False)
        backward(features)

    def loss() -> None:
        sides = [torch.randn(len(images), model.embed_dim, device=device, requires_grad=True) for _ in range(2)]
        model.loss(*sides)["loss"].backward()

    # Towers alone, outside of DeepSpeed: a copy without its hooks would not fit beside ViT-L, so the hooks stay quiet.
    with engine.deepspeed.no_sync():
        found = {
            name: statistics.median(timed(call, device)[0] for _ in range(repeats))
            for name, call in (("image tower", image_tower), ("text tower", text_tower), ("loss", loss))
        }
    engine.deepspeed.zero_grad()
    found["optimiser"] = max(whole - sum(found.values()), 0.0)
    found["data"] = statistics.median(batches.waited[1:] or [0.0])
    return found


def step_flop(cfg: Any, batch: int, lengths: Sequence[int]) -> float:
    """FLOP of a training step by the formula of the module's docstring."""
    with torch.device("meta"):
        model = instantiate(cfg.model)
    vit = model.visual
    patches = vit.patch_embed.num_patches
    patch_values = vit.patch_embed.proj.weight[0].numel()
    image = (
        transformer_flop(len(vit.blocks), vit.width, patches + vit.num_prefix_tokens)
        + 2 * patches * patch_values * vit.width
    )
    text = sum(transformer_flop(model.textual.layers, model.textual.width, n) for n in lengths)
    heads = 2 * batch * model.embed_dim * (vit.width + model.textual.width) + 2 * batch**2 * model.embed_dim
    gc.collect()
    return 3.0 * (batch * image + text + heads)


def matrix_rate(device: torch.device) -> float:
    """TFLOP/s of the best large bf16 matrix product on a GPU, of fp32 on a CPU."""
    if device.type != "cuda":
        return devices.measured_fp32_tflop_per_s(device)
    size = 8192
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = min(timed(lambda: left @ right, device)[0] for _ in range(12))
    return 2 * size**3 / best / 1e12


def show(row: dict[str, Any]) -> None:
    whole = row["step_ms"] + row["data_ms"]
    print(f"\n{row['config']} {row['overrides']}, batch {row['batch']}, {row['precision']}, {row['device']}")
    print(
        f"  ours       {row['img_per_s']:10.1f} img/s   {row['step_ms']:.0f} ms per step, peak {row['peak_gb']:.2f} GB"
    )
    if row["published_img_per_s"] != "":
        print(f"  published  {row['published_img_per_s']:10.1f} img/s   ours is {row['speedup']:.2f} times as fast")
    print(f"  {row['tflop_per_step']:.3f} TFLOP per step, {row['tflop_per_s']:.3f} TFLOP/s: ", end="")
    print(f"{100 * row['mfu_of_measured']:.1f} % of the measured matrix rate", end="")
    print(f", {100 * row['mfu_of_datasheet']:.1f} % of the datasheet's" if row["mfu_of_datasheet"] != "" else "")
    for part in PARTS:
        taken = row[f"{part.replace(' ', '_')}_ms"]
        print(f"  {part:<12}{taken:10.1f} ms {100 * taken / whole:5.1f} %")


def append(path: Path, row: dict[str, Any]) -> None:
    """One row, below a header in a new file."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})


if __name__ == "__main__":
    raise SystemExit(main())
