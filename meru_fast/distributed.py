"""Ranks and gradients of a distributed run; everything here also works with no process group (rank 0 of 1)."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Rank of this process, 0 with no process group."""
    return dist.get_rank() if is_initialized() else 0


def get_world_size() -> int:
    """Number of processes, 1 with no process group."""
    return dist.get_world_size() if is_initialized() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def barrier() -> None:
    """Wait for all processes; nothing to wait for with one."""
    if get_world_size() > 1:
        dist.barrier()


def all_gather_object(value: T) -> list[T]:
    """The (picklable) `value` of every rank, in rank order, on every rank."""
    if get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: T, src: int = 0) -> T:
    """The (picklable) `value` of rank `src`, on every rank."""
    if get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=src)
    return box[0]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`, whose gradient is multiplied by `factor`.

    Data-parallel engines average gradients over ranks. A loss over the *joined* batch hands every rank the exact
    gradient of its own rows, so what reaches the encoders must be multiplied by the world size to survive that average.
    """
    return x if factor == 1 else _ScaleGradient.apply(x, factor)
