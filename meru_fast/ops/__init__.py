"""Fused, differentiable operations of the Lorentz model: Triton kernels on GPUs, PyTorch elsewhere.

The functions of ``meru_fast.lorentz`` under the same names, plus the losses and the streaming top-k.
"""

from meru_fast.ops.backend import BackendError, active_backend, backend_report, set_backend, use_backend
from meru_fast.ops.contrastive import contrastive_loss
from meru_fast.ops.distance import elementwise_dist, elementwise_inner, pairwise_dist, pairwise_inner
from meru_fast.ops.entailment import entailment_loss, half_aperture, oxy_angle, pairwise_oxy_angle
from meru_fast.ops.exp_map import exp_map0, log_map0
from meru_fast.ops.meru import meru_loss
from meru_fast.ops.topk import topk

__all__ = [
    "BackendError",
    "active_backend",
    "backend_report",
    "contrastive_loss",
    "elementwise_dist",
    "elementwise_inner",
    "entailment_loss",
    "exp_map0",
    "half_aperture",
    "log_map0",
    "meru_loss",
    "oxy_angle",
    "pairwise_dist",
    "pairwise_inner",
    "pairwise_oxy_angle",
    "set_backend",
    "topk",
    "use_backend",
]
