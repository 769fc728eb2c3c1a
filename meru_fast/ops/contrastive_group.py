"""The contrastive loss over a process group: one-sided exchange, every pair of the global batch computed once.

Rank r holds b images and b texts. Only the texts travel (as prepared operands), and rank r computes the b x B block of
its images against all texts. Row statistics stay local; column statistics are merged with two all-reduces of B floats;
in the backward pass image gradients are local and text gradients are reduce-scattered.

``gather`` holds all texts and computes its own block while the others arrive. ``ring`` holds two blocks at a time and
passes them on while it computes; in the backward pass a block travels together with its gradient.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

# Its functions take the default group of the moment of import as a default argument. torch._dynamo imports it at the
# first call of a custom operator; imported before there is a group, it does not keep one alive for ever: a group that
# lives at the interpreter's end has threads that abort the process there.
import torch.distributed.nn
from torch import Tensor

LN2 = 0.6931471805599453
_GROUPS: WeakValueDictionary[str, dist.ProcessGroup] = WeakValueDictionary()


class Forward(NamedTuple):
    """What the forward pass keeps. Column tensors are of all ranks, in rank order."""

    loss: Tensor
    row_gap: Tensor
    col_gap: Tensor
    reference: Tensor
    pair: Tensor
    left: Any  # Side
    right: Any  # Side, of all ranks (gather) or this one (ring)


def register(group: dist.ProcessGroup) -> str:
    """A name by which a custom operator finds the group again."""
    _GROUPS[group.group_name] = group
    return group.group_name


def size(name: str) -> int:
    """Number of ranks of a registered group."""
    return dist.get_world_size(_GROUPS[name])


def check_equal_rows(rows: int, group: dist.ProcessGroup, device: torch.device) -> None:
    """Refuse ragged batches where asking costs no device synchronisation (CPU groups).

    Raises:
        ValueError: the ranks hold different numbers of pairs.
    """
    if device.type != "cpu":
        return
    counts = torch.empty(dist.get_world_size(group), dtype=torch.int64)
    dist.all_gather_into_tensor(counts, torch.tensor([rows]), group=group)
    if (counts != rows).any():
        raise ValueError(f"every rank must hold the same number of pairs, got {counts.tolist()}")


def forward(engine: Any, image: Tensor, text: Tensor, name: str, ring: bool) -> Forward:
    """Loss and statistics of the whole batch. Arguments as ``contrastive_loss``."""
    group, b, world = _GROUPS[name], len(image), size(name)
    left, own, pair = engine.prepare(image, text, None)
    reference, wait_references = _gather([pair[1]], group)
    right, blocks = (own, _ring(own, group)) if ring else _gathered(own, group)
    col_gap = torch.empty_like(reference[0])
    cols, side = next(blocks)  # this rank's own texts, while the others are on their way
    row_gap, col_gap[cols], _ = engine.forward(left, side, pair, pair[1], True, None, None, b, 1.0)
    wait_references()
    for cols, side in blocks:
        part, col_gap[cols], _ = engine.forward(left, side, pair, reference[0][cols], False, None, None, b, 1.0)
        row_gap = torch.logaddexp2(row_gap, part)
    peak = col_gap.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    local = (row_gap[:b] - 2 * pair[2, :b]).sum()
    total = torch.cat([torch.exp2(col_gap - peak), local[None]])
    dist.all_reduce(total, group=group)
    col_gap = peak + torch.log2(total[:-1])
    loss = (total[-1] + col_gap.view(world, -1)[:, :b].sum()) * (LN2 / (2 * b * world))
    return Forward(loss, row_gap, col_gap, reference[0], pair, left, right)


def backward(
    engine: Any, kept: Forward, image: Tensor, text: Tensor, name: str, ring: bool, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of this rank's points, and of the scalars for the whole batch."""
    group, b, world = _GROUPS[name], len(image), size(name)
    rows, rank = len(kept.pair[1]), dist.get_rank(group)
    mine = slice(rank * rows, (rank + 1) * rows)
    log_weight = math.log2(2 * b * world)

    def block(cols: slice, side: Any) -> Any:
        own = cols == mine
        reference, gap = kept.reference[cols], kept.col_gap[cols]
        grads = engine.backward(kept.left, side, kept.pair, reference, own, None, kept.row_gap, gap, b, log_weight)
        # column sums travel beside the gradient of the texts
        column = grads.col_sums.sum(0)[:, None] if len(grads.col_sums) else grads.right[:, :0]
        return grads._replace(right=torch.cat([grads.right, column], 1), col_sums=grads.col_sums[:0])

    total = _ring_backward(block, kept.right, group) if ring else _gathered_backward(block, kept.right, group)
    width = total.left.shape[1]
    total = total._replace(right=total.right[:, :width].contiguous(), col_sums=total.right[:, width:].T.contiguous())
    own = type(kept.right)(*(tensor if ring else tensor[mine] for tensor in kept.right))
    dx, dy, dcurv, dscale = engine.finish(
        image, text, None, kept.left, own, kept.pair, kept.reference[mine], kept.row_gap, kept.col_gap[mine],
        total, 0.5 / (b * world), upstream,
    )  # fmt: skip
    scalars = torch.stack([dcurv, dscale])
    dist.all_reduce(scalars, group=group)
    return dx, dy, scalars[0].clone(), scalars[1].clone()


def _gather(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> tuple[list[Tensor], Callable[[], None]]:
    """Tensors of all ranks one after the other, and what to call before they are read."""
    results, works = [], []
    for tensor in tensors:
        result = tensor.new_empty((dist.get_world_size(group) * len(tensor), *tensor.shape[1:]))
        works.append(dist.all_gather_into_tensor(result, tensor.contiguous(), group=group, async_op=True))
        results.append(result)
    return results, _waiter(works)


def _waiter(works: Iterable[Any]) -> Callable[[], None]:
    def wait() -> None:
        for work in works:
            work.wait()

    return wait


def _gathered(own: Any, group: dist.ProcessGroup) -> tuple[Any, Iterator[tuple[slice, Any]]]:
    """The operand of all ranks, on its way, and its blocks: this rank's own first."""
    tensors, wait = _gather(own, group)
    right = type(own)(*tensors)

    def blocks() -> Iterator[tuple[slice, Any]]:
        mine = slice(dist.get_rank(group) * len(own.time), (dist.get_rank(group) + 1) * len(own.time))
        yield mine, own
        wait()
        yield from _others(right, mine)

    return right, blocks()


def _others(right: Any, mine: slice) -> Iterator[tuple[slice, Any]]:
    """The blocks before and after this rank's own."""
    for cols in (slice(0, mine.start), slice(mine.stop, len(right.time))):
        if cols.start < cols.stop:
            yield cols, type(right)(*(tensor[cols] for tensor in right))


def _gathered_backward(block: Callable[[slice, Any], Any], right: Any, group: dist.ProcessGroup) -> Any:
    """The other ranks' texts first, so that their gradients travel while this rank's own block is computed."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    rows = len(right.time) // world
    mine = slice(rank * rows, (rank + 1) * rows)
    total, outgoing = None, None
    for cols, side in _others(right, mine):
        grads = block(cols, side)
        if outgoing is None:
            outgoing = grads.right.new_zeros(len(right.time), grads.right.shape[1])
        outgoing[cols] = grads.right
        total = _joined(total, grads)
    incoming, work = None, None
    if outgoing is not None:
        incoming = outgoing.new_empty(rows, outgoing.shape[1])
        work = dist.reduce_scatter_tensor(incoming, outgoing, group=group, async_op=True)
    total = _joined(total, block(mine, type(right)(*(tensor[mine] for tensor in right))))
    if work is not None:
        work.wait()
        total.right.add_(incoming)
    return total


def _joined(total: Any, grads: Any) -> Any:
    """Gradients of two blocks of the same images; ``right`` is the later block's."""
    if total is None:
        return grads
    return grads._replace(
        left=total.left.add_(grads.left),
        row_sums=torch.cat([total.row_sums, grads.row_sums]),
        parts=total.parts.add_(grads.parts),
    )


def _pass_on(tensors: Iterable[Tensor], group: dist.ProcessGroup, tag: int) -> tuple[list[Tensor], Callable[[], None]]:
    """Send tensors to the next rank; the previous rank's, and what to call before they are read."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    after, before = (dist.get_global_rank(group, (rank + step) % world) for step in (1, -1))
    tensors = [tensor.contiguous() for tensor in tensors]
    arriving = [torch.empty_like(tensor) for tensor in tensors]
    operations = []
    for index, (tensor, room) in enumerate(zip(tensors, arriving, strict=True)):
        operations.append(dist.P2POp(dist.isend, tensor, after, group, tag + index))
        operations.append(dist.P2POp(dist.irecv, room, before, group, tag + index))
    return arriving, _waiter(dist.batch_isend_irecv(operations))


def _ring(own: Any, group: dist.ProcessGroup) -> Iterator[tuple[slice, Any]]:
    """All blocks in ring order, each on its way while the one before is used."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    rows, side = len(own.time), own
    for step in range(world):
        owner = (rank - step) % world
        cols = slice(owner * rows, (owner + 1) * rows)
        if step == world - 1:
            yield cols, side
            return
        arriving, wait = _pass_on(side, group, tag=0)
        yield cols, side
        wait()
        side = type(own)(*arriving)


def _ring_backward(block: Callable[[slice, Any], Any], own: Any, group: dist.ProcessGroup) -> Any:
    """A block's text gradient follows it around the ring, one addition per rank, and comes home last."""
    blocks = _ring(own, group)
    total = block(*next(blocks))
    arriving, wait = _pass_on([total.right], group, tag=8)
    for cols, side in blocks:
        grads = block(cols, side)
        total = _joined(total, grads)
        wait()
        arriving, wait = _pass_on([grads.right.add_(arriving[0])], group, tag=8)
    wait()
    return total._replace(right=arriving[0])
