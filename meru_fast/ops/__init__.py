"""Fused, differentiable operations of the Lorentz model: Triton kernels on GPUs, PyTorch elsewhere.

The functions of ``meru_fast.lorentz`` under the same names, plus the losses and the streaming top-k.
"""

import importlib
from typing import Any

_MODULES = {
    "backend": ("BackendError", "active_backend", "backend_report", "set_backend", "use_backend"),
    "contrastive": ("contrastive_loss",),
    "distance": ("elementwise_dist", "elementwise_inner", "pairwise_dist", "pairwise_inner"),
    "entailment": ("entailment_loss", "half_aperture", "oxy_angle", "pairwise_oxy_angle"),
    "exp_map": ("exp_map0", "log_map0"),
    "meru": ("meru_loss",),
    "topk": ("topk",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
