"""A small MERU on the demo's shards (``meru-fast demo``): digits and drawn scenes, in minutes on two CPU cores."""

from meru_fast.config import LazyCall

from .train_meru_vit_l import dataset, model, optim, train

dataset.shards = "demo_output/data/train/*.tar"
dataset.image_size = 64
dataset.crop_scale = (0.8, 1.0)  # a tighter crop would cut things off that the caption names

model.visual = LazyCall("meru_fast.models.build_timm_vit")(
    arch="vit_tiny_patch16_224",
    global_pool="avg",
    img_size=64,
    depth=4,
    num_heads=6,
    weight_init="jax",  # Xavier; timm's default of 0.02 is small for a width of 192 and learns slower
)
model.textual.arch = "L2_W64"
model.embed_dim = 64
model.entail_weight = 0.5  # more than the published 0.2 and 0.1: the cones have 1,500 steps to form
model.min_radius = 0.2

optim["optimizer"].lr = 1e-3
optim["optimizer"].weight_decay = 0.05
optim["lr_scheduler"].warmup_steps = 60

train |= {
    "total_batch_size": 64,
    "num_iterations": 1500,
    "num_workers": 1,
    "gradient_clipping": 1.0,
    "checkpoint_period": 250,
    "keep_checkpoints": 1,
    "log_period": 10,
}

__all__ = ["dataset", "model", "optim", "train"]
