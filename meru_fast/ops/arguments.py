"""Checks and conversions of op arguments, shared by the ops."""

import torch
from torch import Tensor

from meru_fast.lorentz import Scalar

MAX_WIDTH = 1024  # longest row the Triton kernels hold in registers


def scalar(name: str, value: Scalar, like: Tensor) -> Tensor:
    """A positive number or a tensor of one element as a 0-dim tensor on the device of ``like``, without a host sync.

    Raises:
        ValueError: not positive, or a tensor of several elements.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")
        return value.reshape(()).to(like.device, non_blocking=True)
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.full((), value, dtype=dtype, device=like.device)


def rows(x: Tensor) -> Tensor:
    """[..., D] as [n, D] with contiguous rows; a copy only where the layout demands one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def refuse_double_backward(ctx: object, *grads: Tensor) -> None:
    """Registered as the derivative of every backward kernel. Raises RuntimeError: always."""
    raise RuntimeError(
        "the Triton kernels have no double backward: take the functions of meru_fast.lorentz, "
        "or meru_fast.ops.use_backend('torch')"
    )
