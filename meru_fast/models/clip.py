"""CLIP: two encoders, one embedding space on the sphere. MERU builds on it."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from torch import Tensor, nn

from meru_fast import checkpoint, ops
from meru_fast.distributed import get_world_size, scale_gradient
from meru_fast.models.losses import sigmoid_loss
from meru_fast.models.recipe import from_recipe, recipe_of
from meru_fast.ops.contrastive import PRECISIONS
from meru_fast.tokenizer import PackedTokens

# Arguments of from_pretrained that say how to download; the last two are those of huggingface_hub before 1.0.
_HUB = ("revision", "cache_dir", "force_download", "local_files_only", "token", "proxies", "resume_download")
PAIR_LOSSES = ("softmax", "sigmoid")
# SigLIP starts from the scale 10 and from logits of -10, where all pairs but the true ones are already nearly right.
SIGMOID_SCALE, SIGMOID_LOGIT = 10.0, -10.0

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class CLIP(nn.Module, PyTorchModelHubMixin, coders={nn.Module: (recipe_of, from_recipe)}):
    """The CLIP baseline of MERU (arXiv:2304.09172, section 4).

    ``save_pretrained(folder)`` writes safetensors and a config, ``CLIP.from_pretrained(folder or Hub id)`` reads them.

    Learnable scalars are stored as logarithms with shape [1] (DeepSpeed cannot partition 0-dim parameters) and appear
    0-dim in the state dict, as in published checkpoints.

    Args:
        visual: image encoder, [B, 3, H, W] to [B, visual.width].
        textual: text encoder, ``PackedTokens`` to [B, textual.width].
        embed_dim: size D of the joint embedding.
        pixel_mean, pixel_std: normalisation of images in [0, 1].
        precision: of the fused loss, ``"highest"``, ``"high"`` or ``"medium"`` (see ``meru_fast.ops``).
        pair_loss: ``"softmax"`` for the symmetric cross-entropy, ``"sigmoid"`` for that of SigLIP (arXiv:2303.15343),
            which adds the parameter ``logit_bias``.

    Raises:
        ValueError: no such precision or pair loss.
    """

    geometry = "cosine"
    pixel_mean: Tensor
    pixel_std: Tensor
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter

    def __init__(
        self,
        visual: nn.Module,
        textual: nn.Module,
        embed_dim: int,
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
        precision: str = "high",
        pair_loss: str = "softmax",
    ):
        super().__init__()
        if pair_loss not in PAIR_LOSSES:
            raise ValueError(f"pair_loss is one of {', '.join(PAIR_LOSSES)}, got {pair_loss!r}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.visual, self.textual = visual, textual
        self.embed_dim, self.precision, self.pair_loss = embed_dim, precision, pair_loss
        self.visual_proj = nn.Linear(visual.width, embed_dim, bias=False)
        self.textual_proj = nn.Linear(textual.width, embed_dim, bias=False)
        nn.init.normal_(self.visual_proj.weight, std=visual.width**-0.5)
        nn.init.normal_(self.textual_proj.weight, std=textual.width**-0.5)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(pixel_std, dtype=torch.float32).view(-1, 1, 1))
        self.scalar_bounds: dict[str, tuple[float, float]] = {}
        scale = 1 / 0.07 if pair_loss == "softmax" else SIGMOID_SCALE
        self._add_scalar("logit_scale", math.log(scale), high=math.log(100))
        if pair_loss == "sigmoid":
            self.logit_bias = nn.Parameter(torch.tensor([SIGMOID_LOGIT]))  # linear and without bounds
        self.register_state_dict_post_hook(_scalars_to_0dim)
        self.register_load_state_dict_pre_hook(_scalars_to_1dim)

    def _add_scalar(
        self, name: str, value: float, low: float = -math.inf, high: float = math.inf, learn: bool = True
    ) -> None:
        if learn:
            self.register_parameter(name, nn.Parameter(torch.tensor([value])))
        else:  # not a frozen parameter: those are partitioned by ZeRO, and a schedule could not set them
            self.register_buffer(name, torch.tensor([value]))
        self.scalar_bounds[name] = (low, high)

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @torch.no_grad()
    def clamp_scalars(self) -> None:
        """Bring the learnable scalars back within their bounds, in place. Called at the start of every forward pass.

        An optimiser that keeps its own copy of the parameters (DeepSpeed) must have that copy clamped as well.
        """
        for name, (low, high) in self.scalar_bounds.items():
            getattr(self, name).clamp_(low, high)

    def scalar(self, name: str) -> Tensor:
        """The linear value (the exponential, within its bounds) of a learnable scalar: fp32 or better, shape [1].

        The gradient passes through the bound unchanged, as it does when the stored value itself was clamped.
        """
        stored = full_precision(getattr(self, name))
        low, high = self.scalar_bounds[name]
        bound = stored.detach().clamp(low, high) - stored.detach()
        return (stored + bound).exp()

    def encode_image(self, images: Tensor, project: bool = True) -> Tensor:
        """Image features [B, D].

        Args:
            images: [B, 3, H, W], float in [0, 1] or uint8.
            project: end in the embedding space; otherwise right after the linear projection.

        Raises:
            ValueError: another shape.
            TypeError: another dtype.
        """
        if images.ndim != 4 or images.shape[1] != len(self.pixel_mean):
            raise ValueError(f"expected images [B, {len(self.pixel_mean)}, H, W], got {tuple(images.shape)}")
        if not images.is_floating_point():
            if images.dtype != torch.uint8:
                raise TypeError(f"expected float images in [0, 1] or uint8, got {images.dtype}")
            images = images.to(torch.float32) / 255
        images = (images - self.pixel_mean) / self.pixel_std
        features = self.visual_proj(self.visual(images.to(self.visual_proj.weight.dtype)))
        return self.project_image(features) if project else features

    def encode_text(self, tokens: PackedTokens | Sequence[Tensor] | Tensor, project: bool = True) -> Tensor:
        """Text features [B, D].

        Args:
            tokens: captions: packed, or a list of int ids [n], or right-padded ids [B, n] (the slower reference). They
                may lie on another device and are never changed.
            project: end in the embedding space; otherwise right after the linear projection.

        Raises:
            ValueError: no captions, an empty one, or ids longer than the context.
            TypeError: texts that are not tokenised.
        """
        if not isinstance(tokens, (PackedTokens, Tensor)):
            tokens = PackedTokens.from_list(tokens, self.textual.context_length)
        features = self.textual_proj(self.textual(tokens.to(self.device, non_blocking=True)))
        return self.project_text(features) if project else features

    def project_image(self, features: Tensor) -> Tensor:
        """Linear image features [..., D] into the embedding space."""
        return F.normalize(full_precision(features), dim=-1)

    def project_text(self, features: Tensor) -> Tensor:
        """Linear text features [..., D] into the embedding space."""
        return F.normalize(full_precision(features), dim=-1)

    def similarity(self, image_feats: Tensor, text_feats: Tensor) -> Tensor:
        """Scores [B1, B2] of projected features, higher is closer."""
        return image_feats @ text_feats.T

    def forward(self, images: Tensor, tokens: PackedTokens | Sequence[Tensor] | Tensor) -> dict:
        """Training loss of a batch of pairs: ``{"loss": scalar, "logging": {name: detached scalar}}``.

        With a process group the loss is that of the joint batch of all ranks, which must be equally large.

        Raises:
            ValueError, TypeError: as ``encode_image``, ``encode_text`` and ``loss`` do.
        """
        self.clamp_scalars()
        return self.loss(self.encode_image(images, project=False), self.encode_text(tokens, project=False))

    def loss(self, image_feats: Tensor, text_feats: Tensor) -> dict:
        """``forward`` from the linear features [B, D] of ``encode_*(project=False)``.

        Raises:
            ValueError: not as many images as captions.
        """
        with no_autocast(image_feats):
            image = self.project_image(self._for_engine(image_feats))
            text = self.project_text(self._for_engine(text_feats))
            logit_scale = self.scalar("logit_scale")
            loss = self._pair_loss(image, text, 1.0, logit_scale)
        logging = {"contrastive_loss": loss.detach(), "logit_scale": logit_scale.detach()[0]}
        return {"loss": loss, "logging": logging | self._bias()}

    def _pair_loss(self, image: Tensor, text: Tensor, curv: Tensor | float, logit_scale: Tensor) -> Tensor:
        """The chosen loss of embeddings [b, D], over the joint batch of all ranks."""
        where = {"geometry": self.geometry, "group": joint_group()}
        if self.pair_loss == "sigmoid":
            return sigmoid_loss(image, text, curv, logit_scale, full_precision(self.logit_bias), **where)
        return ops.contrastive_loss(image, text, curv, logit_scale, precision=self.precision, **where)

    def _bias(self) -> dict[str, Tensor]:
        return {"logit_bias": self.logit_bias.detach()[0]} if self.pair_loss == "sigmoid" else {}

    def _save_pretrained(self, save_directory: Path) -> None:
        checkpoint.save_export(save_directory, self.state_dict(), self.hub_config())

    def generate_model_card(self, *_args: Any, **_kwargs: Any) -> ModelCard:
        """A draft of the model card (called by ``save_pretrained`` and ``push_to_hub``)."""
        from meru_fast.models.export import card

        return card(self, type(self).__name__)

    def hub_config(self) -> dict[str, Any]:
        """The arguments that build this model again, as the ``model`` part of a config.

        Raises:
            ValueError: a tower carries no recipe.
        """
        for name in ("visual", "textual"):
            if self._hub_mixin_config.get(name) is None:
                raise ValueError(f"the {name} tower does not say how it was built: give it a `recipe` (models.recipe)")
        return {"_target_": f"meru_fast.models.{type(self).__name__}", **self._hub_mixin_config}

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: dict | None = None,
        map_location: str = "cpu",
        **arguments: Any,
    ) -> "CLIP":
        download = {key: arguments.pop(key) for key in _HUB if key in arguments}
        if config is None:
            raise checkpoint.CheckpointError(f"{model_id}: no {checkpoint.CONFIG_FILE} there")
        recorded = str(config.get("_target_", cls.__name__)).rpartition(".")[2]
        if recorded != cls.__name__:
            raise checkpoint.CheckpointError(f"{model_id} holds a {recorded}: use {recorded}.from_pretrained")
        file = os.path.join(model_id, checkpoint.SAFETENSORS_FILE)
        if not os.path.isdir(model_id):
            file = hf_hub_download(model_id, checkpoint.SAFETENSORS_FILE, **download)
        model = cls(**arguments)
        state, _ = checkpoint.read_checkpoint(file)
        checkpoint.fit_state(model, state, file)
        return model.to(map_location).eval()

    @staticmethod
    def _for_engine(features: Tensor) -> Tensor:
        """Features in fp32 or better, whose gradient outlives the averaging over ranks of DDP and DeepSpeed."""
        return scale_gradient(full_precision(features), get_world_size())


def joint_group() -> torch.distributed.ProcessGroup | None:
    """All ranks, over which a batch is spread; None in a single process."""
    return torch.distributed.group.WORLD if get_world_size() > 1 else None


def full_precision(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(x: Tensor) -> torch.autocast:
    """Geometry is computed in fp32 even where the encoders run under autocast."""
    return torch.autocast(x.device.type, enabled=False)


def _scalars_to_0dim(module: CLIP, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for name in (*module.scalar_bounds, "logit_bias"):
        value = state_dict.get(f"{prefix}{name}")
        # Live parameters (keep_vars) stay what they are, and the empty stand-ins of ZeRO stage 3 have no value.
        if value is not None and value.numel() == 1 and not isinstance(value, nn.Parameter):
            state_dict[f"{prefix}{name}"] = value.reshape(())


def _scalars_to_1dim(module: CLIP, state_dict: dict, prefix: str, *_unused) -> None:
    for name in (*module.scalar_bounds, "logit_bias"):
        value = state_dict.get(f"{prefix}{name}")
        if value is not None and value.numel() == 1:
            state_dict[f"{prefix}{name}"] = value.reshape(1)
