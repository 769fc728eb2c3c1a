"""Train a small MERU for two steps with DeepSpeed at every ZeRO stage and save it, as a training run does.

Run by torchrun: ``torchrun --nproc_per_node 2 deepspeed_folders.py FOLDER``. Leaves ``FOLDER/stage{n}`` as run folders
and ``FOLDER/stage{n}.pt`` with the weights that were in memory (of bf16 weights the fp32 copies that were trained).
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

from meru_fast import config
from meru_fast.config import LazyCall
from meru_fast.tokenizer import PackedTokens

MODEL = LazyCall("meru_fast.models.MERU")(
    visual=LazyCall("meru_fast.models.build_timm_vit")(
        arch="vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2
    ),
    textual=LazyCall("meru_fast.models.TransformerTextEncoder")(arch="L1_W16_A2", vocab_size=49408, context_length=77),
    embed_dim=8,
    entail_weight=0.2,
)


def captions(count: int) -> PackedTokens:
    return PackedTokens.from_list([torch.randint(0, 31, (3,)).int() for _ in range(count)])


def save(folder: Path, stage: int, half: bool = False) -> None:
    torch.manual_seed(0)
    model = config.instantiate(MODEL)
    model.visual.cls_token.requires_grad_(False)  # a frozen part must come back as well
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.requires_grad and p.ndim == 1], "weight_decay": 0.0},
    ]
    settings = {"train_batch_size": 4, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    settings["bf16"] = {"enabled": half}
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for _ in range(2):
        loss = engine(torch.rand(2, 3, 16, 16), captions(2))["loss"]
        engine.backward(loss)
        engine.step()
    name = f"stage{stage}" + ("_bf16" if half else "")
    run = folder / name
    engine.save_checkpoint(str(run / "checkpoints"), tag="step_00000002")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masters = {name: safe_get_full_fp32_param(p).clone() for name, p in trained.items()} if half else {}
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        if engine.global_rank == 0:
            weights = {name: value.clone().float() for name, value in model.state_dict().items()}
            torch.save(weights | masters, folder / f"{name}.pt")
            config.save(config.OmegaConf.create({"model": MODEL}), run / "config.yaml")


if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for stage in range(4):
        save(Path(sys.argv[1]), stage)
    save(Path(sys.argv[1]), 2, half=True)
