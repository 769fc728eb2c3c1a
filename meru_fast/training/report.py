"""What a run says about itself: environment, model sizes, memory, the dry run."""

import os
import platform
import socket
import sys
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

import meru_fast
from meru_fast.config import instantiate
from meru_fast.distributed import get_world_size
from meru_fast.training import deepspeed_config
from meru_fast.training.checkpoints import code_version
from meru_fast.training.settings import TrainSettings
from meru_fast.versions import installed

PACKAGES = ("torch", "triton", "deepspeed", "timm", "xformers", "nvidia-dali-cuda130", "numpy", "torchvision")


def environment(ds_config: dict[str, Any]) -> str:
    """Versions, machine, command line and DeepSpeed config of a run, as text."""
    lines = [f"meru_fast {meru_fast.__version__} {code_version()}", f"command   {' '.join(sys.argv)}"]
    lines += [f"host      {socket.gethostname()} {platform.platform()}", f"python    {platform.python_version()}"]
    lines += [f"{name:<9} {installed(name)}" for name in PACKAGES]
    lines.append(f"processes {get_world_size()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            lines.append(f"gpu {index}     {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        lines.append(f"cuda      {torch.version.cuda}, cudnn {torch.backends.cudnn.version()}")
    else:
        lines.append(f"cpu       {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads per process")
    lines += ["", "DeepSpeed config:", OmegaConf.to_yaml(OmegaConf.create(ds_config))]
    return "\n".join(lines)


def resident_gb() -> float:
    """Memory of this process in GB (10^9 bytes)."""
    import psutil

    return psutil.Process().memory_info().rss / 1e9


def parameter_counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(all, trainable) parameters of each child module, of the scalars beside them, and in total."""
    counts = {}
    for name, child in model.named_children():
        counts[name] = _count(child.parameters())
    counts["scalars"] = _count(model.parameters(recurse=False))
    counts["total"] = _count(model.parameters())
    return counts


def _count(parameters: Any) -> tuple[int, int]:
    # ZeRO stage 3 leaves empty stand-ins, whose true size is in ds_numel.
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in parameters]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def state_bytes(parameters: int, trainable: int, stage: int, world_size: int, precision: str) -> dict[str, float]:
    """Bytes of model state per process under ZeRO with AdamW, activations not counted.

    "weights" as the forward pass uses them, "gradients", and "optimizer": both moments and, where the optimiser updates
    a copy (half precision, ZeRO 1 and 2, ZeRO 3 without autocast), that copy in fp32. Stage 1 shares out the optimiser,
    2 the gradients too, 3 the weights too.
    """
    half = precision in ("fp16", "bf16")
    width = 2 if half else 4
    master = 4 if half or stage in (1, 2) or (stage == 3 and precision == "fp32") else 0
    split = [1 / world_size if stage >= level else 1.0 for level in (3, 2, 1)]
    return {
        "weights": width * parameters * split[0],
        "gradients": width * trainable * split[1],
        "optimizer": (8 + master) * trainable * split[2],
    }


def memory_table(parameters: int, trainable: int, world_size: int, precision: str) -> str:
    lines = ["stage   weights gradients optimizer     total   (GB per process; activations come on top)"]
    for stage in (0, 1, 2, 3):
        parts = state_bytes(parameters, trainable, stage, world_size, precision)
        cells = [parts["weights"], parts["gradients"], parts["optimizer"], sum(parts.values())]
        lines.append(f"{stage:<5}" + "".join(f"{cell / 1e9:>10.2f}" for cell in cells))
    return "\n".join(lines)


def summary(cfg: DictConfig, engine: Any, loader: Any) -> str:
    """One paragraph at the start of a run."""
    total, trainable = parameter_counts(engine.model)["total"]
    return (
        f"{type(engine.model).__name__} with {total / 1e6:.1f} M parameters ({trainable / 1e6:.1f} M trained), "
        f"{get_world_size()} x {engine.device.type}, ZeRO stage {engine.stage}, {engine.precision}; "
        f"{loader.num_samples:,} pairs, "
        f"{loader.batches_per_epoch:,} batches of {cfg.train.total_batch_size} per epoch, "
        f"{cfg.train.num_iterations:,} steps"
    )


def dry_run(cfg: DictConfig, given: dict[str, Any], world_size: int) -> None:
    """Print what a run would do: config, DeepSpeed config, parameters, memory, epochs."""
    from meru_fast.training.loop import freeze, optim_values

    settings = TrainSettings.from_config(cfg.train)
    resolved = deepspeed_config.resolve(given, settings, world_size, torch.cuda.is_available(), optim_values(cfg))
    print(OmegaConf.to_yaml(cfg))
    print("DeepSpeed config:\n" + OmegaConf.to_yaml(OmegaConf.create(resolved)))
    with torch.device("meta"):
        model = instantiate(cfg.model)
    freeze(model, settings.freeze)
    counts = parameter_counts(model)
    print("parameters" + " " * 12 + "all      trained")
    for name, (total, trainable) in counts.items():
        print(f"{name:<14}{total:>12,}{trainable:>13,}")
    print(f"\nmodel state, {world_size} process(es), {deepspeed_config.precision(resolved)}:")
    print(memory_table(*counts["total"], world_size, deepspeed_config.precision(resolved)))
    loader = instantiate(
        cfg.dataset,
        batch_size=settings.total_batch_size,
        rank=0,
        world_size=world_size,
        num_workers=0,
        seed=settings.seed,
        device=torch.device("cpu"),
    )
    try:
        epochs = settings.num_iterations / loader.batches_per_epoch
        print(
            f"\n{loader.num_samples:,} pairs, {loader.batches_per_epoch:,} batches of {settings.total_batch_size} per "
            f"epoch; {settings.num_iterations:,} steps are {epochs:.2f} epochs"
        )
    finally:
        loader.close()
