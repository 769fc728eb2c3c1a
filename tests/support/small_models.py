"""Small models and inputs for tests: the published architecture with few layers, on 32-pixel images."""

import random

import torch
from torch import Tensor

from meru_fast.models import CLIP, MERU, TransformerTextEncoder, build_timm_vit
from meru_fast.tokenizer import Tokenizer

WORDS = "a photo of the red dog cat house in garden with my friend at night : itap large small".split(" ")  # noqa: SIM905


def towers(**visual):
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2} | visual
    return build_timm_vit("vit_tiny_patch16_224", **settings), TransformerTextEncoder("L3_W64_A2")


def meru(seed: int = 0, embed_dim: int = 32, **arguments) -> MERU:
    torch.manual_seed(seed)
    return MERU(*towers(), embed_dim, **({"entail_weight": 0.2, "precision": "highest"} | arguments))


def clip(seed: int = 0, embed_dim: int = 32, **arguments) -> CLIP:
    torch.manual_seed(seed)
    return CLIP(*towers(), embed_dim, **({"precision": "highest"} | arguments))


def images(count: int, seed: int = 0, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def captions(count: int, seed: int = 0, longest: int = 20) -> list[Tensor]:
    chosen = random.Random(seed)
    return Tokenizer()([" ".join(chosen.choices(WORDS, k=chosen.randint(0, longest))) for _ in range(count)])
