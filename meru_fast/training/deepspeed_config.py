"""The DeepSpeed JSON: read whole, "auto" values filled in, contradictions found before anything is built."""

import copy
import json
import os
from pathlib import Path
from typing import Any

from meru_fast.config import ConfigError
from meru_fast.training.settings import TrainSettings

AUTO = "auto"
PRECISIONS = ("fp16", "bf16", "torch_autocast")
#: What resolve() looks into: blocks, and whole numbers.
BLOCKS = ("zero_optimization", *PRECISIONS, "optimizer", "scheduler", "checkpoint", "nebula")
NUMBERS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def read(path: str | os.PathLike | None) -> dict[str, Any]:
    """The JSON file as a dictionary; of no file, an empty one. Raises ConfigError naming the file and the fault."""
    if path is None:
        return {}
    path = Path(path)
    if not path.is_file():
        packaged = Path(str(_packaged_folder() / path.name))
        if not packaged.is_file():
            known = ", ".join(sorted(file.name for file in _packaged_folder().glob("*.json")))
            raise ConfigError(f"no DeepSpeed config {str(path)!r}; packaged ones: {known}")
        path = packaged
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return found


def resolve(
    given: dict[str, Any], settings: TrainSettings, world_size: int, on_gpu: bool, optim: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The configuration that ``deepspeed.initialize`` gets.

    Args:
        given: the user's JSON (an empty dictionary without one); every key of it reaches DeepSpeed.
        settings: fills what is absent or "auto": batch sizes, accumulation, clipping, ZeRO stage, precision.
        world_size: data-parallel processes.
        on_gpu: False on a CPU, where training is in fp32 unless the JSON asks for bf16.
        optim: arguments of our optimiser and schedule (lr, betas, eps, weight_decay, total_steps, warmup_steps), for
            "auto" values of "optimizer" and "scheduler" blocks.

    Raises:
        ConfigError: with every contradiction found, one a line.
    """
    config = copy.deepcopy(given)
    config.pop("$comment", None)
    _check_types(config)
    _fill(config, "gradient_accumulation_steps", settings.accumulation_steps)
    _fill(config, "gradient_clipping", settings.gradient_clipping)
    _fill(config, "train_batch_size", settings.total_batch_size)
    per_step = world_size * config["gradient_accumulation_steps"]
    _fill(config, "train_micro_batch_size_per_gpu", settings.total_batch_size // per_step)
    _fill(config.setdefault("zero_optimization", {}), "stage", settings.zero_stage)
    _fill(config, "steps_per_print", 2**31)
    _fill_precision(config, settings, on_gpu)
    _fill_blocks(config, optim or {})
    if offloads(config, "optimizer"):
        # Any AdamW will do: torch's needs no compiler, engine.py takes the faster one where there is a GPU.
        _fill(config, "zero_force_ds_cpu_optimizer", False)
    _drop_auto(config)

    faults = list(_contradictions(config, settings, world_size, on_gpu))
    if faults:
        raise ConfigError("the DeepSpeed config and the train config contradict each other:\n  " + "\n  ".join(faults))
    return config


def zero_stage(config: dict[str, Any]) -> int:
    return int(config["zero_optimization"]["stage"])


def precision(config: dict[str, Any]) -> str:
    """ "fp32", "fp16", "bf16" (whole model in that type) or "autocast-<dtype>"."""
    for name in PRECISIONS:
        if config.get(name, {}).get("enabled"):
            return f"autocast-{config[name].get('dtype', 'bfloat16')}" if name == "torch_autocast" else name
    return "fp32"


def offloads(config: dict[str, Any], what: str) -> bool:
    """Whether `what` ("optimizer" or "param") lives in host memory or on disk."""
    block = config.get("zero_optimization", {}).get(f"offload_{what}") or {}
    return block.get("device", "none") not in ("none", None)


def _check_types(config: dict[str, Any]) -> None:
    for name in BLOCKS:
        if not isinstance(config.get(name, {}), dict):
            raise ConfigError(f"DeepSpeed config: {name}={config[name]!r} should be an object, {{...}}")
    values = {name: config[name] for name in NUMBERS if name in config}
    if "stage" in config.get("zero_optimization", {}):
        values["zero_optimization.stage"] = config["zero_optimization"]["stage"]
    for name, value in values.items():
        least = 0 if name.endswith("stage") else 1
        if value != AUTO and (type(value) is not int or value < least):
            raise ConfigError(f'DeepSpeed config: {name}={value!r} should be a whole number from {least} on, or "auto"')


def _fill(block: dict[str, Any], key: str, value: Any) -> None:
    if block.get(key, AUTO) == AUTO:
        block[key] = value


def _fill_precision(config: dict[str, Any], settings: TrainSettings, on_gpu: bool) -> None:
    """Autocast with fp32 weights is the default on a GPU: the learnable scalars never see 8 bits of mantissa.

    In float16 it is DeepSpeed's fp16 mode: of its loss scalers, only that one survives a step with an overflow.
    """
    chosen = any(config.get(name, {}).get("enabled") is True for name in PRECISIONS)
    wanted = settings.amp_dtype if settings.amp and on_gpu and not chosen else None
    if wanted == "float16":
        config.setdefault("fp16", {}).setdefault("enabled", AUTO)
    for name, dtype in (("fp16", "float16"), ("bf16", "bfloat16")):
        if config.get(name, {}).get("enabled") == AUTO:
            config[name]["enabled"] = wanted == dtype
            wanted = None if wanted == dtype else wanted
    autocast = config.get("torch_autocast", {})
    if autocast.get("enabled", AUTO) == AUTO and (autocast or wanted):
        config["torch_autocast"] = autocast | {"enabled": wanted is not None}
    if "torch_autocast" in config:
        _fill(config["torch_autocast"], "dtype", settings.amp_dtype)


def _fill_blocks(config: dict[str, Any], optim: dict[str, Any]) -> None:
    names = {
        "optimizer": {key: key for key in ("lr", "betas", "eps", "weight_decay")},
        "scheduler": {
            "warmup_num_steps": "warmup_steps",
            "total_num_steps": "total_steps",
            "warmup_max_lr": "lr",
        },
    }
    for block, keys in names.items():
        parameters = config.get(block, {}).get("params", {})
        for key, source in keys.items():
            if parameters.get(key) == AUTO and source in optim:
                parameters[key] = optim[source]


def _drop_auto(block: dict[str, Any]) -> None:
    """What is still "auto" is something only DeepSpeed has a default for: leave it out."""
    for key, value in list(block.items()):
        if value == AUTO:
            del block[key]
        elif isinstance(value, dict):
            _drop_auto(value)


def _contradictions(config: dict[str, Any], settings: TrainSettings, world_size: int, on_gpu: bool):
    total, accumulation = config["train_batch_size"], config["gradient_accumulation_steps"]
    micro, stage = config["train_micro_batch_size_per_gpu"], zero_stage(config)
    if total != settings.total_batch_size:
        yield (
            f"train_batch_size={total} in the JSON, train.total_batch_size={settings.total_batch_size} in the config: "
            'make the first one "auto"'
        )
    elif total % (world_size * accumulation):
        yield (
            f"train.total_batch_size={total} is not divisible by {world_size} processes x {accumulation} accumulation "
            f"steps; {total - total % (world_size * accumulation) or world_size * accumulation} would be"
        )
    elif micro * accumulation * world_size != total:
        yield (
            f"train_micro_batch_size_per_gpu={micro} x gradient_accumulation_steps={accumulation} x {world_size} "
            f"processes is {micro * accumulation * world_size}, not train_batch_size={total}: leave one of them "
            '"auto"'
        )
    if settings.accumulation_steps not in (1, accumulation):
        yield (
            f"gradient_accumulation_steps={accumulation} in the JSON, train.accumulation_steps="
            f"{settings.accumulation_steps} in the config"
        )
    if settings.gradient_clipping not in (0.0, config["gradient_clipping"]):
        yield (
            f"gradient_clipping={config['gradient_clipping']} in the JSON, train.gradient_clipping="
            f"{settings.gradient_clipping} in the config"
        )
    if stage not in (0, 1, 2, 3):
        yield f"zero_optimization.stage={stage}: ZeRO has the stages 0, 1, 2 and 3"

    enabled = [name for name in PRECISIONS if config.get(name, {}).get("enabled")]
    if len(enabled) > 1:
        yield f"{' and '.join(enabled)} are all enabled: choose one"
    if enabled and not settings.amp:
        yield f"{enabled[0]} is enabled in the JSON, but train.amp=false asks for fp32"
    if "fp16" in enabled and not on_gpu:
        yield "fp16 needs a GPU: on a CPU train in fp32 or bf16"
    if precision(config) == "autocast-float16":
        yield (
            "torch_autocast in float16 discards every step after its first overflow, since DeepSpeed leaves the loss "
            "scale as it is: use fp16, or torch_autocast in bfloat16"
        )
    if "bf16" in enabled and config["bf16"].get("check_grad_overflow") is False:
        yield "bf16.check_grad_overflow=false lets gradients that are not finite into the weights: remove it"
    if config["zero_optimization"].get("compute_grad_norm") is False:
        yield "zero_optimization.compute_grad_norm=false lets gradients that are not finite into the weights: remove it"
    if "bf16" in enabled and stage == 0:
        yield (
            "bf16 with ZeRO stage 0 trains wrongly in DeepSpeed (a zero-gradient optimiser step at the start): use "
            "stage 1, or torch_autocast with stage 0"
        )
    if offloads(config, "optimizer") and stage == 0:
        yield "zero_optimization.offload_optimizer needs stage 1, 2 or 3, not 0"
    if offloads(config, "param") and stage != 3:
        yield f"zero_optimization.offload_param needs stage 3, not {stage}"
    if stage == 3 and accumulation > 1 and config["zero_optimization"].get("stage3_param_persistence_threshold", 1) < 1:
        yield "stage3_param_persistence_threshold=0 with gradient accumulation: the loss needs the scalars, allow 1"
    if config.get("managed_gradient_accumulation") is False:
        yield "managed_gradient_accumulation=false: the trainer relies on DeepSpeed's own accumulation boundary"
    for key in ("writer", "load_universal"):
        if key in config.get("checkpoint", {}):
            yield f"checkpoint.{key}: checkpoints are the trainer's (train.checkpoint_*); remove it"
    if config.get("nebula", {}).get("enabled"):
        yield "nebula: checkpoints are the trainer's (train.checkpoint_*); remove it"


def _packaged_folder() -> Path:
    import meru_fast.configs

    return Path(meru_fast.configs.__file__).parent / "deepspeed"
