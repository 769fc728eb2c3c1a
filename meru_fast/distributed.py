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


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def sum_gradient(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`x`, whose gradient is summed over the group: for a scalar that every rank applies to its own rows only."""
    return x if group is None else _SumGradient.apply(x, group)


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.size = dist.get_world_size(group)
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total / ctx.size

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.size, None


def mean_over_ranks(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Mean of a value over the group; each rank gets the gradient of its own value."""
    return value if group is None else _MeanOverRanks.apply(value, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        own = grad.new_empty(grad.shape[0] // dist.get_world_size(ctx.group), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows [b, ...] of all ranks as [b * world_size, ...]; each rank gets what all ranks' losses say about its rows."""
    return rows if group is None else _GatherRows.apply(rows, group)
