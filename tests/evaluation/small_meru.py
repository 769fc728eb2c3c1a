"""The config of ``small_models.meru``."""

from meru_fast.config import LazyCall

model = LazyCall("meru_fast.models.MERU")(
    visual=LazyCall("meru_fast.models.build_timm_vit")(
        arch="vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2
    ),
    textual=LazyCall("meru_fast.models.TransformerTextEncoder")(arch="L3_W64_A2"),
    embed_dim=32,
)
