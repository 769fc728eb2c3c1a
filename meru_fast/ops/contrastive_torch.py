"""The contrastive loss in plain PyTorch, tile by tile: any device, any float dtype, memory O(B).

With ``A = sqrt(1 + c |x|^2)`` and ``a = A - 1`` (likewise ``B``, ``b`` for the texts) the hyperbolic distance of two points is
``arcosh(1 + delta) / sqrt(c)`` with ``delta = a B + b - c <x, y>``, which never subtracts numbers near 1. So

    left = [-c x, a, 1],  right = [y, B, b]   =>   delta = left right^T,

one matrix product per tile, and the same two operands give every gradient: ``W right`` and ``W^T left`` hold ``W Y``, ``W^T X``
and all row sums that the time components need. Cosine geometry is the same code with ``left = x`` and ``right = y``.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE_ROWS, TILE_COLS = 512, 1024  # the five buffers of a tile stay in the last-level cache
SAFE_REBASE = 40.0  # what a rebased exponential loses is below exp(-40), less than float64 resolves


class Pairs(NamedTuple):
    """The given pairs (positives) from differences, so that close pairs lose no digits. All ``[b]`` but ``gap``."""

    gap: Tensor  # x - y, [b, D]
    a_minus_b: Tensor  # difference of the shifted times
    time_x: Tensor  # A
    time_y: Tensor  # B
    delta: Tensor


class Gradients(NamedTuple):
    """What the tiles add up: gradients by the operands, and the two scalar sums."""

    left: Tensor  # W right, [b, K]
    right: Tensor  # W^T left, [n, K]
    gain: Tensor  # sum G * measure, 0-dim float64
    delta: Tensor  # sum W * delta, 0-dim float64


def shifted_time(points: Tensor, curv: Tensor) -> Tensor:
    """``sqrt(1 + c |x|^2) - 1`` of each row without cancellation. ``[n, D] -> [n]``"""
    square = curv * points.square().sum(-1)
    return square / (torch.sqrt(1 + square) + 1)


class TorchEngine:
    """Tiles of logits and of their gradients for one pair of scalars.

    Args:
        geometry: ``"lorentz"`` or ``"cosine"``.
        curv: ``c > 0``, 0-dim, in the compute dtype. Not read in cosine geometry.
        logit_scale: inverse temperature, 0-dim, in the compute dtype.
    """

    def __init__(self, geometry: str, curv: Tensor, logit_scale: Tensor) -> None:
        self.lorentz = geometry == "lorentz"
        self.curv, self.scale = curv, logit_scale
        self.gain = -logit_scale / curv.sqrt() if self.lorentz else logit_scale  # logit = gain * measure

    def left(self, points: Tensor) -> Tensor:
        """The row operand. ``[b, D] -> [b, K]``"""
        if not self.lorentz:
            return points.clone()
        time = shifted_time(points, self.curv)[:, None]
        return torch.cat([-self.curv * points, time, torch.ones_like(time)], 1)

    def right(self, points: Tensor) -> Tensor:
        """The column operand. ``[n, D] -> [n, K]``"""
        if not self.lorentz:
            return points.clone()
        time = shifted_time(points, self.curv)[:, None]
        return torch.cat([points, 1 + time, time], 1)

    def pairs(self, x: Tensor, y: Tensor) -> Pairs:
        """``delta`` of matching rows, at any norm without cancellation.

        With ``u = sqrt(c) x``, ``v = sqrt(c) y`` and ``u - v`` split along and across ``u + v`` (``par``, ``perp``):
        ``2 delta = ((A + B)^2 |perp|^2 + 4 par^2) / (2 (1 + A B + <u, v>) + |perp|^2)`` for acute pairs and
        ``2 (a + b + a b - <u, v>)`` for obtuse ones; every term is positive.
        """
        root = self.curv.sqrt()
        u, v = root * x, root * y
        a, b = shifted_time(x, self.curv), shifted_time(y, self.curv)
        gap, middle = u - v, u + v
        length = middle.norm(dim=-1)
        par = (gap * middle).sum(-1) / length.clamp_min(torch.finfo(x.dtype).tiny)
        perp = (gap - middle * (par / length.clamp_min(torch.finfo(x.dtype).tiny))[:, None]).square().sum(-1)
        inner = (u * v).sum(-1)
        width = a + b + 2
        acute = (width.square() * perp + 4 * par.square()) / (2 * (1 + (1 + a) * (1 + b) + inner) + perp)
        delta = torch.where(inner > 0, acute / 2, a + b + a * b - inner)
        return Pairs(x - y, par * length / width, 1 + a, 1 + b, delta)

    def pair_values(self, x: Tensor, y: Tensor) -> Tensor:
        """What stands in a tile for a given pair: ``delta``, or the dot product. ``[b, D], [b, D] -> [b]``"""
        return self.pairs(x, y).delta if self.lorentz else (x * y).sum(-1)

    def logits(self, values: Tensor) -> Tensor:
        """Logits of tile values, in new memory."""
        if not self.lorentz:
            return values * self.gain
        return torch.log1p(values + torch.sqrt(values * (values + 2))) * self.gain

    def forward(
        self, left: Tensor, right: Tensor, values: Tensor | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-sum-exp of the logits over every row and every column.

        Args:
            left: ``[b, K]``.
            right: ``[n, K]``.
            values: exact values of the given pairs ``[b]``, None if the block holds none.
            labels: ``[b]`` column of each row's pair, with ``values``.

        Returns:
            ``[b]`` (over columns) and ``[n]`` (over rows).
        """
        row_lse = left.new_full((len(left),), -math.inf)
        col_lse = left.new_full((len(right),), -math.inf)
        buffers = left.new_empty(2, TILE_ROWS * TILE_COLS)
        for rows, cols in _tiles(len(left), len(right)):
            logit = self._tile_logits(left, right, values, labels, rows, cols, buffers)
            row_max = logit.amax(1)
            top = row_max.max()
            # One exp serves both directions: a column's terms are the row's, rebased from the row maximum to the tile's.
            exp = logit.sub_(row_max[:, None]).exp_()
            row_part = row_max + exp.sum(1).log_()
            col_sum = torch.mv(exp.T, (row_max - top).exp_())
            if _known(col_sum.min() > math.exp(-SAFE_REBASE / 2)):
                col_part = top + col_sum.log_()
            else:
                col_part = self._tile_logits(left, right, values, labels, rows, cols, buffers).logsumexp(0)
            row_lse[rows] = torch.logaddexp(row_lse[rows], row_part)
            col_lse[cols] = torch.logaddexp(col_lse[cols], col_part)
        return row_lse, col_lse

    def backward(
        self,
        left: Tensor,
        right: Tensor,
        row_shift: Tensor,
        col_shift: Tensor,
        labels: Tensor | None = None,
    ) -> Gradients:
        """Gradients of the block without its given pairs.

        ``dL/dlogit = exp(logit - row_shift) + exp(logit - col_shift)``: a shift is the log-sum-exp less the logarithm of the
        weight that the loss gives to this row or column, so ``inf`` takes it out of the loss.
        """
        into = Gradients(
            torch.zeros_like(left),
            torch.zeros_like(right),
            left.new_zeros((), dtype=torch.float64),
            left.new_zeros((), dtype=torch.float64),
        )
        buffers = left.new_empty(5, TILE_ROWS * TILE_COLS)
        for rows, cols in _tiles(len(left), len(right)):
            value = self._tile_values(left, right, None, None, rows, cols, buffers[0])
            measure, root = self._measure(value, buffers[1], buffers[2])
            grad = self._softmaxes(measure, row_shift[rows], col_shift[cols], buffers[3], buffers[4])
            if labels is not None:
                _put(grad, grad.new_zeros(len(grad)), labels[rows] - cols.start)
            into.gain.add_(torch.dot(grad.view(-1), measure.view(-1)))
            if self.lorentz:  # d arcosh(1 + delta) / d delta = 1 / root; coinciding points have no direction: 0
                grad.div_(torch.nn.functional.threshold_(root, 0, math.inf))
                into.delta.add_(torch.dot(grad.view(-1), value.view(-1)))
            into.left[rows].addmm_(grad, right[cols])
            into.right[cols].addmm_(grad.T, left[rows])
        if self.lorentz:
            for part in (into.left, into.right, into.delta):
                part.mul_(self.gain)
        else:
            into.left.mul_(self.gain)
            into.right.mul_(self.gain)
        return into

    def points_grad(
        self, x: Tensor, y: Tensor, labels: Tensor | None, pair_grad: Tensor, into: Gradients
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From operand gradients to gradients of points and scalars, with the given pairs added.

        Args:
            x: ``[b, D]``.
            y: ``[n, D]``.
            labels: ``[b]`` row of ``y`` that belongs to each row of ``x``; None is the identity.
            pair_grad: ``[b]`` gradient of the loss by each given pair's logit.
            into: the sums over all other pairs. Overwritten.

        Returns:
            Gradients of ``x``, ``y``, ``curv`` and ``logit_scale``.
        """
        partner = y if labels is None else y[labels]
        dim = x.shape[1]
        if not self.lorentz:
            weight = (pair_grad * self.gain)[:, None]
            dx, dy = into.left.addcmul_(weight, partner), into.right
            _add_rows(dy, labels, weight * x)
            dscale = into.gain + (pair_grad * (x * partner).sum(-1)).sum(dtype=torch.float64)
            return dx, dy, torch.zeros_like(dscale), dscale

        curv = self.curv
        pair = self.pairs(x, partner)
        root = torch.sqrt(pair.delta * (pair.delta + 2))
        measure = torch.log1p(pair.delta + root)
        weight = pair_grad * self.gain / torch.nn.functional.threshold(root, 0, math.inf)
        time_a, time_b = shifted_time(x, curv), shifted_time(y, curv)
        slope_a, slope_b = time_a / (1 + time_a), time_b / (1 + time_b)
        row_time, row_b = into.left[:, dim], into.left[:, dim + 1]  # W B, W b
        col_a, col_one = into.right[:, dim], into.right[:, dim + 1]  # W^T a, W^T 1

        # d delta / d log c = delta - (a - b)^2 / (2 A B), and (a - b)^2 / (A B) = (a - b) (a / A - b / B)
        squares = (
            (slope_a * (time_a * (row_time - row_b) - row_b)).sum(dtype=torch.float64)
            + (slope_b * (time_b * col_one - col_a)).sum(dtype=torch.float64)
        ) / 2
        ratio = pair.a_minus_b / pair.time_x
        pair_square = ratio * pair.a_minus_b / pair.time_y / 2
        dlog = into.delta - squares + (weight * (pair.delta - pair_square)).sum(dtype=torch.float64)
        dgain = into.gain + (pair_grad * measure).sum(dtype=torch.float64)
        dcurv = (dlog - dgain * self.gain / 2) / curv
        dscale = -dgain / curv.sqrt()

        dx = x * (curv * row_time / (1 + time_a))[:, None]
        dx -= curv * into.left[:, :dim]
        dy = into.right[:, :dim] + y * (curv * (col_a + col_one) / (1 + time_b))[:, None]
        # the pair's tangent B x / A - y = (x - y) - x (a - b) / A: no digits lost for close pairs
        weight = (weight * curv)[:, None]
        dx += weight * (pair.gap - x * ratio[:, None])
        _add_rows(dy, labels, weight * (partner * (pair.a_minus_b / pair.time_y)[:, None] - pair.gap))
        return dx, dy, dcurv, dscale

    def _tile_values(
        self,
        left: Tensor,
        right: Tensor,
        values: Tensor | None,
        labels: Tensor | None,
        rows: slice,
        cols: slice,
        buffer: Tensor,
    ) -> Tensor:
        tile = torch.mm(left[rows], right[cols].T, out=_view(buffer, rows, cols))
        if self.lorentz:
            tile.clamp_min_(0)
        if values is not None and labels is not None:
            _put(tile, values[rows], labels[rows] - cols.start)
        return tile

    def _tile_logits(
        self,
        left: Tensor,
        right: Tensor,
        values: Tensor | None,
        labels: Tensor | None,
        rows: slice,
        cols: slice,
        buffers: Tensor,
    ) -> Tensor:
        value = self._tile_values(left, right, values, labels, rows, cols, buffers[0])
        if self.lorentz:
            root = torch.addcmul(value, value, value, value=0.5, out=_view(buffers[1], rows, cols)).sqrt_()
            value.add_(root, alpha=math.sqrt(2)).log1p_()
        return value.mul_(self.gain)

    def _measure(self, value: Tensor, buffer: Tensor, root_buffer: Tensor) -> tuple[Tensor, Tensor]:
        """``arcosh(1 + delta)`` and its ``sinh``; in cosine geometry the value itself."""
        if not self.lorentz:
            return value, value
        root = (
            torch.addcmul(value, value, value, value=0.5, out=_view_as(root_buffer, value)).sqrt_().mul_(math.sqrt(2))
        )
        return torch.add(value, root, out=_view_as(buffer, value)).log1p_(), root

    def _softmaxes(
        self, measure: Tensor, row_shift: Tensor, col_shift: Tensor, buffer: Tensor, other_buffer: Tensor
    ) -> Tensor:
        """``exp(logit - row_shift) + exp(logit - col_shift)``, with one exp where that is exact."""
        grad = torch.mul(measure, self.gain, out=_view_as(buffer, measure)).sub_(row_shift[:, None]).exp_()
        other = _view_as(other_buffer, measure)
        top = row_shift.max()
        if _known(top - col_shift.min() < SAFE_REBASE):
            torch.mul(grad, (row_shift - top).exp_()[:, None], out=other)
            return grad.addcmul_(other, (top - col_shift).exp_())
        return grad.add_(torch.mul(measure, self.gain, out=other).sub_(col_shift).exp_())


def _tiles(rows: int, cols: int) -> Iterator[tuple[slice, slice]]:
    for row in range(0, rows, TILE_ROWS):
        for col in range(0, cols, TILE_COLS):
            yield slice(row, min(row + TILE_ROWS, rows)), slice(col, min(col + TILE_COLS, cols))


def _view(buffer: Tensor, rows: slice, cols: slice) -> Tensor:
    shape = rows.stop - rows.start, cols.stop - cols.start
    return buffer[: shape[0] * shape[1]].view(shape)


def _view_as(buffer: Tensor, like: Tensor) -> Tensor:
    return buffer[: like.numel()].view(like.shape)


def _put(tile: Tensor, values: Tensor, columns: Tensor) -> None:
    """Set ``tile[i, columns[i]] = values[i]`` where the column lies in the tile, without a host synchronisation."""
    inside = (columns >= 0) & (columns < tile.shape[1])
    index = columns.clamp(0, tile.shape[1] - 1)[:, None]
    tile.scatter_(1, index, torch.where(inside[:, None], values[:, None], tile.gather(1, index)))


def _add_rows(target: Tensor, index: Tensor | None, rows: Tensor) -> None:
    """``target[index] += rows``; deterministic where an index occurs twice."""
    if index is None:
        target += rows
    else:
        target.index_put_((index,), rows, accumulate=True)


def _known(condition: Tensor) -> bool:
    """The condition where reading it costs nothing (on CPU); elsewhere the careful branch is taken without waiting."""
    return condition.device.type == "cpu" and bool(condition)
