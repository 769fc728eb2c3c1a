"""The published formulas of MERU and CLIP, written down plainly from the papers, as the reference for tests.

Everything works on a state dict with published names, in the dtype of its tensors, one step per line: no fusion, no
packing, padded captions, whole distance matrices.
"""

from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8


def pick(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def layer_norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)


def attention(x: Tensor, in_weight, in_bias, out_weight, out_bias, heads: int, forbidden: Tensor | None) -> Tensor:
    batch, length, width = x.shape
    query, key, value = (x @ in_weight.T + in_bias).view(batch, length, 3, heads, width // heads).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / (width // heads) ** 0.5
    if forbidden is not None:
        scores = scores.masked_fill(forbidden[:length, :length], float("-inf"))
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value).reshape(batch, length, width)
    return mixed @ out_weight.T + out_bias


def image_features(state: dict[str, Tensor], images: Tensor, heads: int) -> Tensor:
    w = pick(state, "visual.")
    x = (images - state["pixel_mean"]) / state["pixel_std"]
    kernel = w["patch_embed.proj.weight"]
    x = F.conv2d(x, kernel, w["patch_embed.proj.bias"], stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) + w["pos_embed"]
    for layer in count():
        b = pick(w, f"blocks.{layer}.")
        if not b:
            break
        names = ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias")
        x = x + attention(layer_norm(x, b, "norm1"), *(b[name] for name in names), heads, None)
        hidden = F.gelu(layer_norm(x, b, "norm2") @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"])
        x = x + hidden @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
    return layer_norm(x, w, "norm")[:, 0] @ state["visual_proj.weight"].T


def text_features(state: dict[str, Tensor], tokens: list[Tensor], heads: int, context: int = 77) -> Tensor:
    w = pick(state, "textual.")
    cut = [t if len(t) <= context else torch.cat([t[: context - 1], t[-1:]]) for t in tokens]
    padded = torch.nn.utils.rnn.pad_sequence(cut, batch_first=True).long()
    x = w["token_embed.weight"][padded] + w["posit_embed"][: padded.shape[1]]
    for layer in count():
        b = pick(w, f"resblocks.{layer}.")
        if not b:
            break
        names = ("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias")
        x = x + attention(layer_norm(x, b, "ln_1"), *(b[name] for name in names), heads, w["attn_mask"])
        hidden = F.gelu(layer_norm(x, b, "ln_2") @ b["mlp.c_fc.weight"].T + b["mlp.c_fc.bias"])
        x = x + hidden @ b["mlp.c_proj.weight"].T + b["mlp.c_proj.bias"]
    x = layer_norm(x, w, "ln_final")
    return x[torch.arange(len(x)), padded.argmax(dim=-1)] @ state["textual_proj.weight"].T


def exp_map0(x: Tensor, curv: Tensor) -> Tensor:
    r = curv**0.5 * x.norm(dim=-1, keepdim=True)
    top = torch.asinh(torch.tensor(2.0**15, dtype=x.dtype))
    return torch.sinh(r.clamp(min=EPS, max=float(top))) * x / r.clamp(min=EPS)


def time(x: Tensor, curv: Tensor) -> Tensor:
    return (1 / curv + (x**2).sum(-1)).sqrt()


def pairwise_inner(x: Tensor, y: Tensor, curv: Tensor) -> Tensor:
    return x @ y.T - time(x, curv)[:, None] * time(y, curv)[None]


def pairwise_dist(x: Tensor, y: Tensor, curv: Tensor) -> Tensor:
    return torch.acosh((-curv * pairwise_inner(x, y, curv)).clamp(min=1 + EPS)) / curv**0.5


def half_aperture(x: Tensor, curv: Tensor, min_radius: float) -> Tensor:
    ratio = 2 * min_radius / (x.norm(dim=-1) * curv**0.5 + EPS)
    return torch.asin(ratio.clamp(-1 + EPS, 1 - EPS))


def oxy_angle(x: Tensor, y: Tensor, curv: Tensor) -> Tensor:
    product = curv * ((x * y).sum(-1) - time(x, curv) * time(y, curv))
    above = time(y, curv) + product * time(x, curv)
    below = x.norm(dim=-1) * (product**2 - 1).clamp(min=EPS).sqrt() + EPS
    return torch.acos((above / below).clamp(-1 + EPS, 1 - EPS))


def symmetric_cross_entropy(logits: Tensor) -> Tensor:
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def meru_loss(state: dict[str, Tensor], image: Tensor, text: Tensor, entail_weight: float, min_radius: float = 0.1):
    """(loss, contrastive, entailment) of linear features."""
    curv = state["curv"].exp()
    image = exp_map0(image * state["visual_alpha"].exp(), curv)
    text = exp_map0(text * state["textual_alpha"].exp(), curv)
    contrastive = symmetric_cross_entropy(-state["logit_scale"].exp() * pairwise_dist(image, text, curv))
    outside = oxy_angle(text, image, curv) - half_aperture(text, curv, min_radius)
    entailment = outside.clamp(min=0).mean()
    return contrastive + entail_weight * entailment, contrastive, entailment


def clip_loss(state: dict[str, Tensor], image: Tensor, text: Tensor) -> Tensor:
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    return symmetric_cross_entropy(state["logit_scale"].exp() * image @ text.T)
