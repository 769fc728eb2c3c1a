"""A MERU of 0.4 M parameters on synthetic pairs: milliseconds per step on one core."""

from meru_fast.config import LazyCall
from meru_fast.training.settings import train_settings

dataset = LazyCall("meru_fast.data.build_loader")(shards="synthetic", num_samples=4000, image_size=16)

model = LazyCall("meru_fast.models.MERU")(
    visual=LazyCall("meru_fast.models.build_timm_vit")(
        arch="vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        depth=2,
        embed_dim=32,
        num_heads=2,
        grad_checkpointing=False,
    ),
    textual=LazyCall("meru_fast.models.TransformerTextEncoder")(
        arch="L1_W16_A2", vocab_size=49408, context_length=77, grad_checkpointing=False
    ),
    embed_dim=16,
    curv_init=1.0,
    learn_curv=True,
    entail_weight=0.2,
)

optim = {
    "optimizer": LazyCall("meru_fast.training.optim.build_optimizer")(
        lr=3e-3, betas=(0.9, 0.98), weight_decay=0.2, gain_bias_decay=0.0
    ),
    "lr_scheduler": LazyCall("meru_fast.training.optim.LinearWarmupCosineDecayLR")(
        total_steps="${train.num_iterations}", warmup_steps=2
    ),
}

train = train_settings(
    total_batch_size=12, num_iterations=8, num_workers=0, log_period=1, checkpoint_period=4, watchdog_seconds=120.0
)
