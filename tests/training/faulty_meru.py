"""The tiny MERU on data with a fault."""

from meru_fast.config import LazyCall

from .tiny_meru import model, optim, train

dataset = LazyCall("faulty_loader.build")(
    shards="synthetic", num_samples=4000, image_size=16, fault="nan", at=[4], on_rank=0
)

__all__ = ["dataset", "model", "optim", "train"]
