"""What an installation without extras must do, run by release_check in an environment that holds nothing else."""

import importlib.util

import torch

from meru_fast import config, ops
from meru_fast.tokenizer import Tokenizer

assert importlib.util.find_spec("kernels") is None, "the top-level name `kernels` belongs to another project"

image, text = (torch.randn(16, 8, requires_grad=True) for _ in range(2))
curv = torch.ones(1, requires_grad=True)
loss = ops.contrastive_loss(ops.exp_map0(image, curv), ops.exp_map0(text, curv), curv, 14.3)
loss.backward()
assert all(value.grad.isfinite().all() for value in (image, text, curv))

cfg = config.load("train_meru_vit_s", ["model.textual.arch=L1_W64", "model.embed_dim=32"])
cfg.model.visual.arch = "vit_base_patch16_224"
cfg.model.visual.update({"embed_dim": 64, "depth": 1, "num_heads": 1, "img_size": 32})
model = config.instantiate(cfg.model)
model(torch.rand(2, 3, 32, 32), Tokenizer()(["a dog", "a cat"]))["loss"].backward()
print(f"torch {torch.__version__}: ops, config, tokenizer and model work")
