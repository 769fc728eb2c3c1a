"""The CLIP baseline with ViT-L/16: the data, encoders and recipe of MERU, embeddings on the sphere."""

from meru_fast.config import LazyCall

from .train_meru_vit_l import dataset, model, optim, train

model = LazyCall("meru_fast.models.CLIP")(
    visual=model.visual,
    textual=model.textual,
    embed_dim=model.embed_dim,
    pixel_mean=model.pixel_mean,
    pixel_std=model.pixel_std,
    precision=model.precision,
    pair_loss=model.pair_loss,
)

optim["optimizer"].exclude_params = ["logit_scale"]

__all__ = ["dataset", "model", "optim", "train"]
