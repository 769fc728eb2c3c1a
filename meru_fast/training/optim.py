"""Parameter groups and learning-rate schedule of the published recipe."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from meru_fast.config import ConfigError

#: Learnable scalars, by leaf name: never decayed.
SCALARS = ("logit_scale", "curv", "visual_alpha", "textual_alpha")

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm)


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    gain_bias_decay: float | None = 0.0,
    exclude_params: Iterable[str] = SCALARS,
) -> list[dict[str, Any]]:
    """Trainable parameters in three groups: weights, gains and biases, excluded ones.

    Args:
        model: its parameters with ``requires_grad`` are grouped.
        weight_decay: of the weights (matrices, embeddings, class token).
        gain_bias_decay: of normalisation gains and of all biases. None means `weight_decay`: that is how every released
            checkpoint was trained, because the published code took the configured 0.0 for "not given".
        exclude_params: parameters whose leaf name contains one of these are never decayed.

    Returns:
        Groups with "params", "weight_decay" and "name"; empty ones are left out.
    """
    excluded = tuple(exclude_params)
    weights, gains_and_biases, scalars = [], [], []
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if any(name in leaf for name in excluded):
                scalars.append(parameter)
            elif isinstance(module, _NORMS) or "bias" in leaf:
                gains_and_biases.append(parameter)
            else:
                weights.append(parameter)
    groups = [
        {"name": "weights", "params": weights, "weight_decay": weight_decay},
        {
            "name": "gains_and_biases",
            "params": gains_and_biases,
            "weight_decay": weight_decay if gain_bias_decay is None else gain_bias_decay,
        },
        {"name": "scalars", "params": scalars, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module,
    lr: float = 5e-4,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.2,
    gain_bias_decay: float | None = 0.0,
    exclude_params: Iterable[str] = SCALARS,
) -> torch.optim.AdamW:
    """torch's fused AdamW (one pass over weights, gradients and moments) over :func:`parameter_groups`.

    Raises:
        ConfigError: the model has no trainable parameter.
    """
    groups = parameter_groups(model, weight_decay, gain_bias_decay, exclude_params)
    if not groups:
        raise ConfigError("the model has no trainable parameter (train.freeze matches all of them?)")
    betas = (betas[0], betas[1])  # a list, if from YAML
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


class LinearWarmupCosineDecayLR(torch.optim.lr_scheduler.LambdaLR):
    """Rate times ``step / warmup_steps`` first (so the first step has rate 0), then times ``cos(pi/2 * f)**2``.

    `f` is the finished fraction of the steps after warm-up.

    Raises:
        ConfigError: a warm-up that is negative or not shorter than the whole.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int, last_epoch: int = -1):
        if not 0 <= warmup_steps < total_steps:
            raise ConfigError(f"warmup_steps={warmup_steps} must be at least 0 and less than total_steps={total_steps}")
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, self.multiplier, last_epoch)

    def multiplier(self, step: int) -> float:
        if step < self.warmup_steps:
            return step / self.warmup_steps
        done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return math.cos(0.5 * math.pi * min(done, 1.0)) ** 2
