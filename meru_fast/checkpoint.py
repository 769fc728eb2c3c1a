"""Weights in and out: published ``.pth`` files, our safetensors export, DeepSpeed folders of any ZeRO stage.

Nothing here runs code from a file: tensors come through ``weights_only`` loading, DeepSpeed's own files (which hold a
few of its objects) are opened only if they name nothing but these, and an export's config may name only our models.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from meru_fast import config as configs
from meru_fast.config import LazyCall
from meru_fast.files import whole

SAFETENSORS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
RUN_CONFIG_FILE, EMA_FILE = "config.yaml", "ema.pt"

# Objects that DeepSpeed and our trainer (states of random generators) pickle beside the tensors. They are data holders;
# a file naming anything else is refused.
_DATA_HOLDERS = frozenset(
    {
        "_codecs.encode",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray._reconstruct",
        "numpy.dtype",
        "numpy.ndarray",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)

_MODEL_TARGETS = frozenset(
    f"meru_fast.models.{name}" for name in ("CLIP", "MERU", "TransformerTextEncoder", "build_timm_vit")
)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or does not fit the model; the message names the file and the fault."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What was read: ``kind`` is "published", "weights", "export" or "deepspeed".

    Attributes:
        file: the file or the DeepSpeed step folder that the weights came from.
        iteration: training step, if the checkpoint knows.
        root: [D] tensor of published CLIP files, the "root" of their image traversals.
        model: the recorded model config, if there is one beside the weights (an export, a run folder).
    """

    kind: str
    file: Path
    iteration: int | None = None
    root: Tensor | None = None
    model: DictConfig | None = None


def load_weights(model: nn.Module, path: str | os.PathLike, ema: bool = False) -> CheckpointInfo:
    """Load any checkpoint into `model`, strictly.

    Args:
        path: a ``.pth`` / ``.pt`` / ``.safetensors`` file, an export folder, or a DeepSpeed run, ``checkpoints`` or
            step folder (the first two mean their latest step).
        ema: take the averaged weights that a run keeps beside its own.

    Raises:
        CheckpointError: unreadable, truncated, not a checkpoint, or made for another architecture.
    """
    state, info = read_checkpoint(path, ema=ema)
    fit_state(model, state, info.file)
    return info


def load_model(
    path: str | os.PathLike, model_config: Mapping[str, Any] | None = None, ema: bool = False
) -> tuple[nn.Module, CheckpointInfo]:
    """Build the model of a checkpoint, in eval mode, with its weights.

    Args:
        model_config: the ``model`` part of the training config. Otherwise the one recorded with the checkpoint, and
            failing that a guess from the shapes (``info.model`` is None then).

    Raises:
        CheckpointError: as ``load_weights``.
        ConfigError: `model_config` does not build a model.
    """
    state, info = read_checkpoint(path, ema=ema)
    node = model_config if model_config is not None else info.model if info.model is not None else guess_model(state)
    model = configs.instantiate(_without_download(node))
    fit_state(model, state, info.file)
    return model.eval(), info


def _without_download(node: Mapping[str, Any]) -> dict[str, Any]:
    """`node` with an image tower that does not fetch the pretrained weights it once started from."""
    plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    visual = plain.get("visual")
    return {**plain, "visual": {**visual, "pretrained": False}} if visual and visual.get("pretrained") else plain


def read_checkpoint(path: str | os.PathLike, ema: bool = False) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """The model's state dict (on the CPU) and what is known about it. Arguments and errors as ``load_weights``.

    Raises:
        CheckpointError: as ``load_weights``.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.is_file():
        state, info = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch_file(path)
    elif (path / SAFETENSORS_FILE).is_file():
        state, info = _read_safetensors(path / SAFETENSORS_FILE)
    else:
        state, info = _read_deepspeed(find_step(path), ema)
    if ema and info.kind != "deepspeed":
        raise CheckpointError(f"{path}: averaged weights are kept by training runs, this is one set of weights")
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in state.items()}
    return state, replace(info, root=state.pop("root", info.root))


def fit_state(model: nn.Module, state: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    """``load_state_dict``, strict, with an error that says which names or shapes differ and what to do.

    Raises:
        CheckpointError: they differ.
    """
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = [
        f"{name} is {list(state[name].shape)}, the model has {list(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape and not state[name].numel() == value.numel() == 1
    ]
    faults = [f"{text} {_some(names)}" for text, names in (("lacks", missing), ("has unknown", unexpected)) if names]
    faults += [_some(shapes)] if shapes else []
    if faults:
        try:
            hint = f" The weights look like {describe(guess_model(state))}."
        except CheckpointError:
            hint = ""
        raise CheckpointError(f"{source} does not fit this {type(model).__name__}: {'; '.join(faults)}.{hint}")
    model.load_state_dict(state)


def guess_model(state: Mapping[str, Tensor]) -> DictConfig:
    """The ``model`` config that a state dict of MERU or CLIP was made with, from its names and shapes.

    Head counts leave no trace in a state dict: the published ones are assumed (64 channels a head, 12 heads for ViT-S).

    Raises:
        CheckpointError: the weights of another model.
    """
    try:
        width, _, patch, _ = state["visual.patch_embed.proj.weight"].shape
        class_token = "visual.cls_token" in state
        grid = math.isqrt(state["visual.pos_embed"].shape[1] - int(class_token))
        vocab_size, text_width = state["textual.token_embed.weight"].shape
        context_length = len(state["textual.posit_embed"])
        embed_dim = len(state["visual_proj.weight"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"not the weights of a MERU or CLIP model: {error}") from error
    depth, text_depth = _count(state, "visual.blocks"), _count(state, "textual.resblocks")
    visual: dict[str, Any] = {"global_pool": "token" if class_token else "avg"}
    published = {(384, 12): "small_mocov3", (768, 12): "base", (1024, 24): "large"}.get((width, depth))
    if published and patch == 16:
        visual["arch"] = f"vit_{published}_patch16_224"
    else:
        visual |= {"arch": "vit_base_patch16_224", "patch_size": patch, "embed_dim": width, "depth": depth}
        visual["num_heads"] = max(1, width // 64)
    if grid * patch != 224:
        visual["img_size"] = grid * patch
    arguments = {
        "visual": LazyCall("meru_fast.models.build_timm_vit")(**visual),
        "textual": LazyCall("meru_fast.models.TransformerTextEncoder")(
            arch=f"L{text_depth}_W{text_width}" + ("" if text_width >= 64 else "_A1"),
            vocab_size=vocab_size,
            context_length=context_length,
        ),
        "embed_dim": embed_dim,
    }
    if "logit_bias" in state:
        arguments["pair_loss"] = "sigmoid"
    if "curv" not in state:
        return LazyCall("meru_fast.models.CLIP")(**arguments)
    curv = math.exp(float(state["curv"]))
    # The learned curvature lies within a factor 10 of the initial one, which is 1 wherever that can be.
    return LazyCall("meru_fast.models.MERU")(**arguments, curv_init=1.0 if 0.0999 < curv < 10.01 else curv)


def describe(node: Mapping[str, Any]) -> str:
    """One line about a ``model`` config: 'MERU, vit_base_patch16_224 + L12_W512, embed_dim 512'."""
    name = str(node["_target_"]).rpartition(".")[2]
    sizes = {key: node["visual"].get(key) for key in ("embed_dim", "depth", "patch_size", "img_size")}
    details = "".join(f" {key}={value}" for key, value in sizes.items() if value is not None)
    return f"{name}, {node['visual']['arch']}{details} + {node['textual']['arch']}, embed_dim {node['embed_dim']}"


def save_published(
    file: str | os.PathLike, state: Mapping[str, Tensor], iteration: int = 0, root: Tensor | None = None
) -> None:
    """Write a state dict in the layout of the published ``.pth`` files, which the published code base reads."""
    content: dict[str, Any] = {"model": {name: value.cpu() for name, value in state.items()}, "iteration": iteration}
    if root is not None:
        content["root"] = root.cpu()
    with whole(Path(file)) as partial:
        torch.save(content, partial)


def save_export(
    folder: str | os.PathLike,
    state: Mapping[str, Tensor],
    model_config: Mapping[str, Any],
    iteration: int | None = None,
    root: Tensor | None = None,
) -> None:
    """Write ``model.safetensors`` and the ``config.json`` that ``MERU.from_pretrained`` and ``load_model`` read.

    Raises:
        CheckpointError: `model_config` names a callable that is not one of our models and towers.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    trusted_model(model_config, "model config")
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    tensors |= {} if root is None else {"root": root.cpu()}
    metadata = {"format": "pt"} | ({} if iteration is None else {"iteration": str(iteration)})
    with whole(folder / SAFETENSORS_FILE) as partial:
        save_file(tensors, partial, metadata)
    with whole(folder / CONFIG_FILE) as partial:
        partial.write_text(json.dumps(model_config, indent=2) + "\n", encoding="utf-8")


def trusted_model(node: Mapping[str, Any], source: str | os.PathLike) -> Mapping[str, Any]:
    """`node`, unless it names a callable that is not one of our models and towers: an export may come from anywhere.

    Raises:
        CheckpointError: it names another callable.
    """
    for key, value in node.items() if isinstance(node, Mapping) else ():
        if key == configs.TARGET and value not in _MODEL_TARGETS:
            raise CheckpointError(f"{source}: refused, it names {value!r}; pass the model config if you trust it")
        if isinstance(value, Mapping):
            trusted_model(value, source)
    return node


def find_step(folder: Path) -> Path:
    """The step folder that a run folder, a ``checkpoints`` folder or a step folder means.

    Raises:
        CheckpointError: there is none.
    """
    if any(folder.glob("*_model_states.pt")):
        return folder
    for parent in (folder, folder / "checkpoints"):
        latest = parent / "latest"
        if latest.is_file():
            step = parent / latest.read_text(encoding="utf-8").strip()
            if any(step.glob("*_model_states.pt")):
                return step
            raise CheckpointError(f"{latest} names {step.name!r}, which is no complete DeepSpeed checkpoint")
    raise CheckpointError(
        f"{folder}: no checkpoint here (looked for {SAFETENSORS_FILE}, *_model_states.pt, latest, checkpoints/latest)"
    )


def _read_torch_file(file: Path) -> tuple[dict[str, Tensor], CheckpointInfo]:
    content = _torch_load(file)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, expected a dictionary of weights")
    if isinstance(content.get("model"), Mapping):
        iteration = content.get("iteration")
        root = content.get("root")
        return dict(content["model"]), CheckpointInfo("published", file, iteration, root)
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return dict(content), CheckpointInfo("weights", file)
    raise CheckpointError(f'{file}: neither a state dict nor a dictionary with "model" (keys: {_some(list(content))})')


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], CheckpointInfo]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or not a safetensors file ({error})") from error
    iteration = int(metadata["iteration"]) if "iteration" in metadata else None
    recorded = file.with_name(CONFIG_FILE)
    model = None
    if recorded.is_file():
        try:
            model = OmegaConf.create(dict(trusted_model(json.loads(recorded.read_text(encoding="utf-8")), recorded)))
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{recorded}: {error}") from error
    return state, CheckpointInfo("export", file, iteration, model=model)


def _read_deepspeed(step: Path, ema: bool) -> tuple[dict[str, Tensor], CheckpointInfo]:
    recorded = (folder / RUN_CONFIG_FILE for folder in (step, *step.resolve().parents[:2]))
    model = next((configs.load(file).get("model") for file in recorded if file.is_file()), None)
    number = re.search(r"(\d+)$", step.name)
    info = CheckpointInfo("deepspeed", step, int(number[1]) if number else None, model=model)
    if ema:
        if not (step / EMA_FILE).is_file():
            raise CheckpointError(f"{step}: keeps no averaged weights (train.ema_decay was 0)")
        return _read_torch_file(step / EMA_FILE)[0], info
    whole = step / "mp_rank_00_model_states.pt"
    if whole.is_file():  # ZeRO 0 to 2: one file holds all weights, in the precision of the computation
        module = _torch_load(whole).get("module")
        if not isinstance(module, Mapping):
            raise CheckpointError(f'{whole}: holds no "module"')
        floats = [value for value in module.values() if value.is_floating_point()]
        if all(value.dtype == torch.float32 for value in floats) or not any(step.glob("*_optim_states.pt")):
            return {name: value.float() if value.is_floating_point() else value for name, value in module.items()}, info
    return _gather_shards(step), info


def _gather_shards(step: Path) -> dict[str, Tensor]:
    """fp32 weights from the shards of ZeRO 1 to 3, through DeepSpeed's own tool."""
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise CheckpointError(
            f"{step}: reading ZeRO shards needs deepspeed (pip install 'meru_fast[train]')"
        ) from error
    for file in sorted(step.glob("*_states.pt")):
        refuse_foreign_objects(file)
    try:
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(step.parent), tag=step.name))
    except Exception as error:  # the tool raises whatever the first surprise is
        raise CheckpointError(f"{step}: DeepSpeed cannot join the shards ({type(error).__name__}: {error})") from error


def refuse_foreign_objects(file: str | os.PathLike) -> None:
    """Raise CheckpointError if unpickling the file would make anything but tensors and the data holders above."""
    try:
        foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(file))) - _DATA_HOLDERS
    except Exception as error:
        raise CheckpointError(f"{file}: truncated or not a PyTorch file ({_first_line(error)})") from error
    if foreign:
        raise CheckpointError(f"{file}: refused, its pickle names {_some(sorted(foreign))}")


def _torch_load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        fault = "truncated or not a PyTorch file"
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            fault = f"refused, its pickle names {named[1]}"
        raise CheckpointError(f"{file}: {fault} ({_first_line(error)})") from error


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    numbers = [int(match[1]) for name in state if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _some(names: list[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(map(str, names[:most])) + (f" and {rest} more" if rest > 0 else "")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
