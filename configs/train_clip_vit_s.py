"""The CLIP baseline with ViT-S/16; all else as with ViT-L/16."""

from .train_clip_vit_l import dataset, model, optim, train

model.visual.arch = "vit_small_mocov3_patch16_224"

__all__ = ["dataset", "model", "optim", "train"]
