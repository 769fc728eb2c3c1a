"""Small models of both geometries, and pictures that carry their label."""

import numpy as np
import torch
from PIL import Image

from meru_fast.models import CLIP, MERU, TransformerTextEncoder, build_timm_vit

IMAGE_SIZE = 32


def tiny(kind: str, seed: int = 0) -> CLIP:
    """A random "meru" or "clip" with a ViT of two layers on 32 pixels, in eval mode."""
    torch.manual_seed(seed)
    visual = build_timm_vit("vit_tiny_patch16_224", img_size=IMAGE_SIZE, patch_size=8, depth=2)
    textual = TransformerTextEncoder("L2_W64", vocab_size=49408, context_length=77)
    model = {"meru": MERU, "clip": CLIP}[kind](visual, textual, embed_dim=48)
    if kind == "meru":  # a radius and a curvature that matter
        with torch.no_grad():
            model.curv.fill_(0.7)
            model.visual_alpha.fill_(-0.5)
            model.textual_alpha.fill_(-0.3)
    return model.eval()


def paint(label: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """A plain picture that says `label` (below 1000) in its colour, also after JPEG."""
    return Image.new("RGB", size, tuple(25 * int(digit) + 12 for digit in f"{label:03d}"))


def painted(image: Image.Image) -> int:
    """The label that ``paint`` put into a picture."""
    colour = np.asarray(image.convert("RGB"), dtype=float).mean(axis=(0, 1))
    return int("".join(str(int(channel // 25)) for channel in colour))


def noise(seed: int, size: tuple[int, int] = (40, 28)) -> Image.Image:
    """A picture of seeded noise; no two are alike."""
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def overlapping(samples: int, dim: int, classes: int, noise: float, seed: int = 0):
    """Gaussian classes with a falling spectrum and a large mean, float32."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, dim, generator=generator)
    labels = torch.randint(classes, (samples,), generator=generator)
    mix = torch.randn(dim, dim, generator=generator) / dim**0.5 * torch.logspace(0, -1.5, dim)
    features = (means[labels] + noise * torch.randn(samples, dim, generator=generator)) @ mix
    return features + torch.randn(dim, generator=generator), labels
