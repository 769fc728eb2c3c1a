"""Image tower: a timm Vision Transformer, with the fixed 2-D sine-cosine positions of MoCo-v3 (arXiv:2104.02057)."""

import difflib
from functools import partial
from typing import Any

import timm
import torch
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


@register_model
def vit_small_mocov3_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-S/16 with the 12 heads of MoCo-v3 (timm's own ViT-S has 6)."""
    settings = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 12} | kwargs
    return timm.models.vision_transformer._create_vision_transformer(
        "vit_small_patch16_224", pretrained=pretrained, **settings
    )


def build_timm_vit(
    arch: str,
    global_pool: str = "token",
    use_sincos2d_pos: bool = True,
    grad_checkpointing: bool = False,
    img_size: int = 224,
    norm_eps: float = 1e-5,
    pretrained: bool | str = False,
    **kwargs: Any,
) -> VisionTransformer:
    """A timm ViT without classifier: images [B, 3, H, W] to features [B, width].

    Args:
        arch: a timm name ``vit_*``; published are ``vit_small_mocov3_patch16_224``, ``vit_base_patch16_224`` and
            ``vit_large_patch16_224``.
        global_pool: ``"token"`` for the class token, ``"avg"`` for the mean of the patches (then without class token).
        use_sincos2d_pos: fixed 2-D sine-cosine positions instead of learned ones.
        grad_checkpointing: recompute activations in the backward pass.
        img_size: side of the square images in pixels.
        norm_eps: of the LayerNorms (timm's own models have 1e-6).
        pretrained: start from timm's weights: True downloads them, a path names a file of them. They bring learned
            positions, so not together with ``use_sincos2d_pos``.
        kwargs: whatever else the timm model takes: ``patch_size``, ``depth``, ``embed_dim``, ``num_heads``, ...

    Returns:
        The model; ``.width`` is its feature size.

    Raises:
        ValueError: no such architecture (the nearest is named), or positions that contradict ``pretrained``.
    """
    known = timm.list_models("vit_*")
    if arch not in known:
        close = difflib.get_close_matches(arch, known, n=1)
        raise ValueError(
            f"no ViT {arch!r} in timm {timm.__version__}" + (f"; did you mean {close[0]!r}?" if close else "")
        )
    if pretrained and use_sincos2d_pos:
        raise ValueError("pretrained weights bring learned positions: set use_sincos2d_pos=False")
    vit = timm.create_model(
        arch,
        pretrained=bool(pretrained),
        pretrained_cfg_overlay={"file": pretrained} if isinstance(pretrained, str) else None,
        num_classes=0,
        global_pool=global_pool,
        class_token=global_pool == "token",
        norm_layer=partial(nn.LayerNorm, eps=norm_eps),
        img_size=img_size,
        **kwargs,
    )
    vit.width = vit.embed_dim
    vit.recipe = {
        "_target_": "meru_fast.models.build_timm_vit",
        "arch": arch,
        "global_pool": global_pool,
        "use_sincos2d_pos": use_sincos2d_pos,
        "img_size": img_size,
        "norm_eps": norm_eps,
        **kwargs,
    }
    if use_sincos2d_pos:
        positions = sincos_2d(vit.patch_embed.grid_size, vit.embed_dim, prefix=vit.num_prefix_tokens)
        vit.pos_embed = nn.Parameter(positions, requires_grad=False)
    vit.set_grad_checkpointing(grad_checkpointing)
    return vit


def sincos_2d(grid: tuple[int, int], width: int, prefix: int = 1) -> Tensor:
    """Fixed positions [1, prefix + rows * columns, width] of a patch grid, zero for the `prefix` tokens.

    Frequencies are ``10000^(-i / (width/4))``. The first half of the channels encodes the *row* of a patch, the second
    its column, as in MoCo-v3 (whose code calls the row "w").

    Raises:
        ValueError: `width` is not divisible by 4.
    """
    if width % 4:
        raise ValueError(f"2-D sine-cosine positions need a width divisible by 4, got {width}")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(size, dtype=torch.float64)[:, None] * frequencies for size in grid)
    row = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(-1, grid[1], -1)
    column = torch.cat([columns.sin(), columns.cos()], dim=1)[None].expand(grid[0], -1, -1)
    positions = torch.cat([row, column], dim=2).flatten(0, 1)
    return torch.cat([positions.new_zeros(prefix, width), positions]).float()[None]
