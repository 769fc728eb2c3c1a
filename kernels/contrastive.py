"""Contrastive loss (hyperbolic or cosine): both directions from one pass over tiles of logits, memory O(B).

Notation: ``delta = arcosh argument - 1 = a B + b - c <x, y>`` with the time components ``A = 1 + a``, ``B = 1 + b`` on the unit
hyperboloid; ``measure = log2(1 + delta + sqrt(delta (delta + 2)))``; ``logit = gain * measure`` in base 2, so that every exponential
is one ``exp2``. In cosine geometry ``measure = <x, y>``. ``W = dL / d delta``.

Forward, 4 launches:
  1. ``prepare_kernel``  one read of the points: bfloat16 operands (``[hi | lo]`` where the product must be faithful to float32),
                         times, and ``delta`` of the given pairs from the Lorentz chord.
  2. ``forward_kernel``  one matrix pass. A program owns a group of row tiles and a span of column tiles; it keeps row statistics in
                         registers and folds column statistics into its own slice of a ``[groups, n]`` buffer. One exponential per
                         logit: a column's terms are the row's, rebased from the row maximum to the tile maximum.
  3. ``merge_kernel``    joins the slices; columns whose terms underflowed in the rebase are marked NaN and computed again here.
  4. a sum of the loss parts.
Backward, 4 launches and the products, per block of at most ``WORKSPACE`` bytes of weights:
  1. ``weights_kernel``  makes the logits again and writes ``W`` without the given pairs in bfloat16, with its row sums
                         ``sum_j W B``, ``sum_i W A`` and the two scalar sums. The row sums are taken of the *rounded* weights, so that
                         the rounding of ``W`` multiplies tangent vectors, not the points themselves.
  2. matrix products     ``W Y`` and ``W^T X`` by cuBLAS, accumulated in float32.
  3. ``finish_kernel``   adds the time terms and the given pairs and writes the gradients of the points.
  4. ``scalars_kernel``  sums the parts of the gradients of curv and logit_scale.
Everything is deterministic: every sum has one owner or a fixed order.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .geometry import INTERPRET, asinh, chord, fast_log2, row_norm, shifted_time
from .tuning import Tiles, processors, tiles_for

PAD = 128  # rows of an operand are padded to a multiple of this, components to a multiple of PAD_D
PAD_D = 64
WORKSPACE = 128 * 2**20  # bytes of weights alive at a time
PREPARE_TILE = 4096  # components a program of the row kernels holds

_INTERPRET = tl.constexpr(INTERPRET)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_FLOOR = tl.constexpr(-1e30)  # below every logit, yet finite
_ABSENT = tl.constexpr(1e30)  # |time| of padding
_PRESENT = tl.constexpr(1e29)
_LOST = tl.constexpr(5e-29)  # 2^-94: a column sum this far below its tile's maximum may miss terms that underflowed
_INF = tl.constexpr(float("inf"))


class Side(NamedTuple):
    """One operand of the logits, padded: rows to ``PAD``, components to ``PAD_D``."""

    matrix: Tensor  # bf16 [n_pad, d_pad], or [n_pad, 2 d_pad] for [hi | lo]
    time: Tensor  # fp32 [n_pad]; shifted time (0 in cosine geometry), +-_ABSENT marks padding


class Gradients(NamedTuple):
    """What the tiles add up for the last two kernels."""

    left: Tensor  # fp32 [b_pad, d_pad], W Y
    right: Tensor  # fp32 [n_pad, d_pad], W^T X
    row_sums: Tensor  # fp32 [spans, b_pad], sum_j W B
    col_sums: Tensor  # fp32 [groups, n_pad], sum_i W A
    parts: Tensor  # fp32 [2, programs], sum G * measure and sum W * (d delta / d log c)


@triton.jit
def round_bf16(x):
    """fp32 rounded to the nearest bf16, as fp32 (the interpreter's own conversion truncates)."""
    if _INTERPRET:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _gain(curv, scale, LORENTZ: tl.constexpr):
    """logit (base 2) = gain * measure."""
    if LORENTZ:
        return -tl.load(scale).to(tl.float32) / tl.sqrt_rn(tl.load(curv).to(tl.float32))
    else:
        return tl.load(scale).to(tl.float32) * _LOG2E


@triton.jit
def _inner_products(
    left, right, row, col,
    D_PAD: tl.constexpr, SPLIT: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> of one tile. Split operands are walked as one product of length 3 D: lo*hi, hi*lo, hi*hi."""
    STEPS: tl.constexpr = D_PAD // BK
    WIDTH: tl.constexpr = D_PAD * (2 if SPLIT else 1)
    if not TMA:
        k = tl.arange(0, BK)
        x_ptr = left + (row * BM + tl.arange(0, BM)).to(tl.int64)[:, None] * WIDTH + k[None, :]
        y_ptr = right + (col * BN + tl.arange(0, BN)).to(tl.int64)[:, None] * WIDTH + k[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for step in range(3 * STEPS if SPLIT else STEPS):
        x_k = step * BK
        y_k = step * BK
        if SPLIT:
            x_k = tl.where(step < STEPS, x_k + D_PAD, tl.where(step < 2 * STEPS, x_k - D_PAD, x_k - 2 * D_PAD))
            y_k = tl.where(step < 2 * STEPS, y_k, y_k - 2 * D_PAD)
        if TMA:
            x = left.load([row * BM, x_k])
            y = right.load([col * BN, y_k])
        else:
            x = tl.load(x_ptr + x_k)
            y = tl.load(y_ptr + y_k)
        if _INTERPRET:  # which has no bf16 arithmetic
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        acc = tl.dot(x, y.T, acc)
    return acc


@triton.jit
def _values(acc, a, b, c, LORENTZ: tl.constexpr):
    """delta of a tile, or the inner products, which are -inf where the column is padding."""
    if LORENTZ:
        return tl.maximum(a[:, None] * (1.0 + b)[None, :] + b[None, :] - c * acc, 0.0)
    else:
        return acc + b[None, :]


@triton.jit
def _fast_measure(value, LORENTZ: tl.constexpr):
    """Absolute error 2^-22, enough for a logit; one log2 and one sqrt instruction. inf where the column is padding."""
    if LORENTZ:
        return fast_log2(1.0 + value + tl.sqrt(value * (value + 2.0)))
    else:
        return value


@triton.jit
def _pair_value(x, y, c, LORENTZ: tl.constexpr):
    """delta of matching rows [R, D] -> [R], without cancellation."""
    if LORENTZ:
        length, _, _, _ = chord(x, y, tl.sqrt_rn(c))
        return 0.5 * length * length
    else:
        return tl.sum(x * y, axis=1)


@triton.jit
def _pair_measure(value, LORENTZ: tl.constexpr):
    """``measure`` of given pairs, to the last digits."""
    if LORENTZ:
        return 2.0 * _LOG2E * asinh(tl.sqrt_rn(0.5 * value))
    else:
        return value


@triton.jit
def _load_rows(ptr, row, n, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Whole rows as fp32, zero beyond the matrix. [R] -> [R, BLOCK_D]"""
    k = tl.arange(0, BLOCK_D)
    inside = ((row >= 0) & (row < n))[:, None] & (k < D)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + k[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_operand(
    points, row, n, matrix, time, c,
    LORENTZ: tl.constexpr, SPLIT: tl.constexpr, D_PAD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, BLOCK_D)
    inside = (k < D_PAD)[None, :]
    hi = round_bf16(points)
    target = matrix + row.to(tl.int64)[:, None] * (D_PAD * (2 if SPLIT else 1)) + k[None, :]
    tl.store(target, hi.to(tl.bfloat16), mask=inside)
    if SPLIT:
        tl.store(target + D_PAD, round_bf16(points - hi).to(tl.bfloat16), mask=inside)
    if LORENTZ:
        tl.store(time + row, tl.where(row < n, shifted_time(tl.sqrt_rn(c) * row_norm(points)), _ABSENT))
    else:
        tl.store(time + row, tl.where(row < n, 0.0, -_ABSENT))


@triton.jit
def prepare_kernel(
    image, text, labels, curv, left, left_time, right, right_time, pair,
    b, n, b_pad, image_stride, text_stride,
    LORENTZ: tl.constexpr, SPLIT: tl.constexpr, LABELS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Operands and times of both sides and the values of the given pairs."""
    start = tl.program_id(0) * ROWS
    c = tl.load(curv).to(tl.float32)
    if start < b_pad:
        row = start + tl.arange(0, ROWS)
        x = _load_rows(image, row, b, image_stride, D, BLOCK_D)
        _store_operand(x, row, b, left, left_time, c, LORENTZ, SPLIT, D_PAD, BLOCK_D)
        if LABELS:
            partner = tl.load(labels + row, mask=row < b, other=0).to(tl.int32)
        else:
            partner = row
        y = _load_rows(text, partner, n, text_stride, D, BLOCK_D)
        tl.store(pair + row, _pair_value(x, y, c, LORENTZ))
    else:
        row = start - b_pad + tl.arange(0, ROWS)
        y = _load_rows(text, row, n, text_stride, D, BLOCK_D)
        _store_operand(y, row, n, right, right_time, c, LORENTZ, SPLIT, D_PAD, BLOCK_D)


@triton.jit
def forward_kernel(
    left, right, row_time, col_time, pair, labels, curv, scale, row_max, row_sum, col_max, col_sum,
    b, b_pad, n_pad, row_tiles, col_tiles, groups, row_span, col_span,
    LORENTZ: tl.constexpr, SPLIT: tl.constexpr, PAIRS: tl.constexpr, LABELS: tl.constexpr, D_PAD: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of 2^(logit - maximum) of rows (per span) and of columns (per group)."""
    group = tl.program_id(0) % groups
    span = tl.program_id(0) // groups
    c = tl.load(curv).to(tl.float32)
    gain = _gain(curv, scale, LORENTZ)
    row_start = group * row_span
    row_end = tl.minimum(row_start + row_span, row_tiles)
    col_start = span * col_span
    col_end = tl.minimum(col_start + col_span, col_tiles)
    for row in range(row_start, row_end):
        rows = row * BM + tl.arange(0, BM)
        a = tl.load(row_time + rows)
        if PAIRS:
            label, first, last = _label_range(labels, rows, b, LABELS)
            pair_value = tl.load(pair + rows)
        run_max = tl.full([BM], _FLOOR, tl.float32)
        run_sum = tl.zeros([BM], tl.float32)
        for col in range(col_start, col_end):
            acc = _inner_products(left, right, row, col, D_PAD, SPLIT, TMA, BM, BN, BK)
            cols = col * BN + tl.arange(0, BN)
            b_time = tl.load(col_time + cols)
            value = _values(acc, a, b_time, c, LORENTZ)
            if PAIRS:
                if (first < (col + 1) * BN) & (last >= col * BN):
                    value = tl.where(label[:, None] == cols[None, :], pair_value[:, None], value)
            measure = _fast_measure(value, LORENTZ)
            if LORENTZ:
                top = gain * tl.min(measure, axis=1)
            else:
                top = gain * tl.max(measure, axis=1)
            top = tl.where(tl.abs(a) < _PRESENT, top, -_INF)
            tile_top = tl.maximum(tl.max(top), _FLOOR)
            e = tl.exp2(measure * gain - tl.where(top > -_INF, top, _INF)[:, None])
            new_max = tl.maximum(run_max, top)
            run_sum = run_sum * tl.exp2(run_max - new_max) + tl.sum(e, axis=1) * tl.exp2(top - new_max)
            run_max = new_max
            # the same exponentials, rebased from the row maxima to the tile maximum
            part = tl.sum(e * tl.exp2(top - tile_top)[:, None], axis=0)
            slot = tl.cast(n_pad, tl.int64) * group + cols
            if row > row_start:
                old_max = tl.load(col_max + slot)
                old_sum = tl.load(col_sum + slot)
            else:
                old_max = tl.full([BN], _FLOOR, tl.float32)
                old_sum = tl.zeros([BN], tl.float32)
            present = tl.abs(tl.load(col_time + cols)) < _PRESENT
            part = tl.where((part < _LOST) & present, float("nan"), part)
            both = tl.maximum(old_max, tile_top)
            tl.store(col_max + slot, both)
            tl.store(col_sum + slot, old_sum * tl.exp2(old_max - both) + part * tl.exp2(tile_top - both))
            tl.debug_barrier()  # the slice is read again at the next row
        slot = tl.cast(b_pad, tl.int64) * span + rows
        tl.store(row_max + slot, run_max)
        tl.store(row_sum + slot, run_sum)


@triton.jit
def _label_range(labels, rows, b, LABELS: tl.constexpr):
    """Columns of the given pairs of these rows (-1: none), with the first and the last of them."""
    if LABELS:
        label = tl.load(labels + rows, mask=rows < b, other=-1).to(tl.int32)
    else:
        label = tl.where(rows < b, rows, -1)
    return label, tl.min(tl.where(label >= 0, label, 2147483647)), tl.max(label)


@triton.jit
def _column_statistics(
    left, right, row_time, col_time, pair, labels, c, gain, b, col, row_start, row_end,
    LORENTZ: tl.constexpr, SPLIT: tl.constexpr, PAIRS: tl.constexpr, LABELS: tl.constexpr, D_PAD: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of the columns of one tile over some rows, with their own exponentials."""
    cols = col * BN + tl.arange(0, BN)
    b_time = tl.load(col_time + cols)
    run_max = tl.full([BN], _FLOOR, tl.float32)
    run_sum = tl.zeros([BN], tl.float32)
    for row in range(row_start, row_end):
        rows = row * BM + tl.arange(0, BM)
        a = tl.load(row_time + rows)
        acc = _inner_products(left, right, row, col, D_PAD, SPLIT, TMA, BM, BN, BK)
        value = _values(acc, a, b_time, c, LORENTZ)
        if PAIRS:
            label, _, _ = _label_range(labels, rows, b, LABELS)
            value = tl.where(label[:, None] == cols[None, :], tl.load(pair + rows)[:, None], value)
        logit = _fast_measure(value, LORENTZ) * gain
        logit = tl.where((tl.abs(a) < _PRESENT)[:, None], logit, -_INF)
        new_max = tl.maximum(run_max, tl.max(logit, axis=0))
        run_sum = run_sum * tl.exp2(run_max - new_max) + tl.sum(tl.exp2(logit - new_max[None, :]), axis=0)
        run_max = new_max
    return run_max, run_sum


@triton.jit
def merge_kernel(
    left, right, row_time, col_time, pair, labels, counts, curv, scale, row_max, row_sum, col_max, col_sum,
    row_lse, col_lse, loss_parts,
    b, n, b_pad, n_pad, row_tiles, col_tiles, groups, spans, row_span, loss_weight,
    LORENTZ: tl.constexpr, SPLIT: tl.constexpr, PAIRS: tl.constexpr, LABELS: tl.constexpr, D_PAD: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exps of rows and columns (0 for padding), and each tile's part of the loss."""
    program = tl.program_id(0)
    gain = _gain(curv, scale, LORENTZ)
    if program < col_tiles:
        cols = program * BN + tl.arange(0, BN)
        total_max = tl.full([BN], _FLOOR, tl.float32)
        total = tl.zeros([BN], tl.float32)
        present = tl.abs(tl.load(col_time + cols)) < _PRESENT
        for group in range(groups):
            slot = tl.cast(n_pad, tl.int64) * group + cols
            part_max = tl.load(col_max + slot)
            part = tl.load(col_sum + slot)
            if tl.max((part != part).to(tl.int32)) > 0:
                part_max, part = _column_statistics(
                    left, right, row_time, col_time, pair, labels, tl.load(curv).to(tl.float32), gain, b, program,
                    group * row_span, tl.minimum(group * row_span + row_span, row_tiles),
                    LORENTZ, SPLIT, PAIRS, LABELS, D_PAD, TMA, BM, BN, BK,
                )  # fmt: skip
            new_max = tl.maximum(total_max, part_max)
            total = total * tl.exp2(total_max - new_max) + part * tl.exp2(part_max - new_max)
            total_max = new_max
        lse = tl.where(present, total_max + tl.log2(tl.where(present, total, 1.0)), 0.0)
        tl.store(col_lse + cols, lse)
        if LABELS:
            lse *= tl.load(counts + cols, mask=cols < n, other=0.0)
        tl.store(loss_parts + program, tl.sum(lse) * tl.cast(loss_weight, tl.float32))
    else:
        rows = (program - col_tiles) * BM + tl.arange(0, BM)
        total_max = tl.full([BM], _FLOOR, tl.float32)
        total = tl.zeros([BM], tl.float32)
        for span in range(spans):
            slot = tl.cast(b_pad, tl.int64) * span + rows
            part_max = tl.load(row_max + slot)
            new_max = tl.maximum(total_max, part_max)
            total = total * tl.exp2(total_max - new_max) + tl.load(row_sum + slot) * tl.exp2(part_max - new_max)
            total_max = new_max
        lse = tl.where(rows < b, total_max + tl.log2(tl.where(rows < b, total, 1.0)), 0.0)
        tl.store(row_lse + rows, lse)
        if PAIRS:
            logit = gain * _pair_measure(tl.load(pair + rows), LORENTZ)
            lse -= tl.where(rows < b, 2.0 * logit, 0.0)
        tl.store(loss_parts + program, tl.sum(lse) * tl.cast(loss_weight, tl.float32))


@triton.jit
def weights_kernel(
    left, right, row_time, col_time, labels, curv, scale, row_lse, col_lse, weights, row_sums, col_sums, parts,
    b, b_pad, n_pad, width, row_first, col_first, row_tiles, col_tiles, groups, row_span, col_span, programs, log_weight,
    LORENTZ: tl.constexpr, SPLIT: tl.constexpr, PAIRS: tl.constexpr, LABELS: tl.constexpr, FAITHFUL: tl.constexpr,
    D_PAD: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """W of the block of tiles that starts at tile (row_first, col_first), in bf16 (``[hi | lo]`` if FAITHFUL)."""
    program = tl.program_id(0)
    group = program % groups
    span = program // groups
    c = tl.load(curv).to(tl.float32)
    gain = _gain(curv, scale, LORENTZ)
    row_start = row_first + group * row_span
    row_end = tl.minimum(row_start + row_span, row_first + row_tiles)
    col_start = col_first + span * col_span
    col_end = tl.minimum(col_start + col_span, col_first + col_tiles)
    gain_part = tl.zeros([BM], tl.float32)
    curv_part = tl.zeros([BM], tl.float32)
    for row in range(row_start, row_end):
        rows = row * BM + tl.arange(0, BM)
        a = tl.load(row_time + rows)
        row_present = tl.abs(a) < _PRESENT
        a = tl.where(row_present, a, 0.0)
        row_shift = tl.where(row_present, tl.load(row_lse + rows) + tl.cast(log_weight, tl.float32), _INF)
        if PAIRS:
            label, first, last = _label_range(labels, rows, b, LABELS)
        gain_row = tl.zeros([BM], tl.float32)
        curv_row = tl.zeros([BM], tl.float32)
        row_sum = tl.zeros([BM], tl.float32)
        for col in range(col_start, col_end):
            acc = _inner_products(left, right, row, col, D_PAD, SPLIT, TMA, BM, BN, BK)
            cols = col * BN + tl.arange(0, BN)
            b_time = tl.load(col_time + cols)
            col_present = tl.abs(b_time) < _PRESENT
            b_time = tl.where(col_present, b_time, 0.0)
            absent = tl.where(col_present, 0.0, -_INF)
            value = _values(acc, a, b_time, c, LORENTZ)
            if LORENTZ:
                square = value * (value + 2.0)
                inverse = tl.where(square > 1e-37, tl.rsqrt(tl.maximum(square, 1e-37)), 0.0)  # coinciding: no direction
                sinh = square * inverse
                # log2 loses digits next to 1, where the series of asinh converges
                near = 1.0 + square * (-1 / 6 + square * (3 / 40 + square * (-5 / 112 + square * (35 / 1152))))
                measure = tl.where(square < 0.04, sinh * near * _LOG2E, fast_log2(1.0 + value + sinh))
            else:
                measure = value
            logit = measure * gain + absent[None, :]
            grad = tl.exp2(logit - row_shift[:, None])
            grad += tl.exp2(logit - (tl.load(col_lse + cols) + tl.cast(log_weight, tl.float32))[None, :])
            if PAIRS:
                if (first < (col + 1) * BN) & (last >= col * BN):
                    grad = tl.where(label[:, None] == cols[None, :], 0.0, grad)
            gain_row += tl.sum(grad * measure, axis=1)
            if LORENTZ:
                weight = grad * (gain * inverse)
                gap = a[:, None] - b_time[None, :]
                slope_gap = (0.5 * a / (1.0 + a))[:, None] - (0.5 * b_time / (1.0 + b_time))[None, :]
                curv_row += tl.sum(weight * (value - gap * slope_gap), axis=1)
            else:
                weight = grad * (gain * _LN2)
            rounded = round_bf16(weight)
            target = weights + ((row - row_first) * BM + tl.arange(0, BM)).to(tl.int64)[:, None] * width
            target += ((col - col_first) * BN + tl.arange(0, BN))[None, :]
            tl.store(target, rounded.to(tl.bfloat16))
            if FAITHFUL:
                low = round_bf16(weight - rounded)
                tl.store(target + width // 2, low.to(tl.bfloat16))
                rounded += low
            if LORENTZ:
                row_sum += tl.sum(rounded * (1.0 + b_time)[None, :], axis=1)
                slot = col_sums + tl.cast(n_pad, tl.int64) * group + cols
                col_sum = tl.sum(rounded * tl.where(row_present, 1.0 + a, 0.0)[:, None], axis=0)
                tl.store(slot, tl.load(slot) + col_sum)
                tl.debug_barrier()  # the slice is read again at the next row
        gain_part += tl.where(row_present, gain_row, 0.0)
        curv_part += tl.where(row_present, curv_row, 0.0)
        if LORENTZ:
            slot = row_sums + tl.cast(b_pad, tl.int64) * span + rows
            tl.store(slot, tl.load(slot) + row_sum)
    tl.store(parts + program, tl.load(parts + program) + tl.sum(gain_part))
    tl.store(parts + programs + program, tl.load(parts + programs + program) + tl.sum(curv_part))


@triton.jit
def _sum_slices(ptr, row, stride, slices):
    """Sum over the first axis of a [slices, stride] buffer at some rows."""
    total = tl.zeros(row.shape, tl.float32)
    for index in range(slices):
        total += tl.load(ptr + tl.cast(stride, tl.int64) * index + row)
    return total


@triton.jit
def finish_kernel(
    image, text, labels, row_time, col_time, pair, row_lse, col_lse, left_grad, right_grad, row_sums, col_sums,
    curv, scale, upstream, d_image, d_text, d_pair, parts,
    b, n, b_pad, n_pad, image_stride, text_stride, groups, spans, row_programs, log_weight, pair_weight,
    LORENTZ: tl.constexpr, LABELS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of the points: products, time terms and given pairs. With LABELS the pairs' text part goes to d_pair."""
    program = tl.program_id(0)
    k = tl.arange(0, BLOCK_D)
    inside_d = (k < D)[None, :]
    c = tl.load(curv).to(tl.float32)
    gain = _gain(curv, scale, LORENTZ)
    grad_scale = tl.load(upstream).to(tl.float32)
    if program < row_programs:
        row = program * ROWS + tl.arange(0, ROWS)
        real = row < b
        if LABELS:
            partner = tl.load(labels + row, mask=real, other=0).to(tl.int32)
        else:
            partner = row
        x = _load_rows(image, row, b, image_stride, D, BLOCK_D)
        y = _load_rows(text, partner, n, text_stride, D, BLOCK_D)
        value = tl.load(pair + row)
        measure = _pair_measure(value, LORENTZ)
        logit = gain * measure
        pair_grad = (
            tl.exp2(logit - tl.load(row_lse + row) - tl.cast(log_weight, tl.float32))
            + tl.exp2(logit - tl.load(col_lse + partner) - tl.cast(log_weight, tl.float32))
            - tl.cast(pair_weight, tl.float32)
        )
        pair_grad = tl.where(real, pair_grad, 0.0)
        wy = _load_rows(left_grad, row, b, D_PAD, D, BLOCK_D)
        if LORENTZ:
            time_x = 1.0 + tl.load(row_time + row, mask=real, other=0.0)
            time_y = 1.0 + tl.load(col_time + partner, mask=real, other=0.0)
            gap = x - y
            a_minus_b = c * tl.sum(gap * (x + y), axis=1) / (time_x + time_y)
            square = value * (value + 2.0)
            weight = tl.where(square > 0.0, pair_grad * gain / tl.sqrt_rn(tl.maximum(square, 1e-37)), 0.0)
            # the tangent B x / A - y of a pair, from differences
            dx = c * (
                (_sum_slices(row_sums, row, b_pad, spans) / time_x)[:, None] * x
                - wy
                + weight[:, None] * (gap - (a_minus_b / time_x)[:, None] * x)
            )
            dy = (c * weight)[:, None] * ((a_minus_b / time_y)[:, None] * y - gap)
            curv_part = weight * (value - 0.5 * (a_minus_b / time_x) * (a_minus_b / time_y))
            curv_part = tl.where(real, curv_part, 0.0)
        else:
            weight = pair_grad * gain * _LN2
            dx = wy + weight[:, None] * y
            dy = weight[:, None] * x
            curv_part = tl.zeros([ROWS], tl.float32)
        inside = real[:, None] & inside_d
        target = row.to(tl.int64)[:, None] * D + k[None, :]
        _store_gradient(d_image + target, dx * grad_scale, inside)
        if LABELS:
            _store_gradient(d_pair + target, dy * grad_scale, inside)
        else:
            dy += _tile_gradient(
                right_grad, col_sums, col_time, y, row, n, n_pad, groups, c, LORENTZ, D, D_PAD, BLOCK_D
            )
            _store_gradient(d_text + target, dy * grad_scale, inside)
        tl.store(parts + program, tl.sum(tl.where(real, pair_grad * measure, 0.0)))
        tl.store(parts + row_programs + program, tl.sum(curv_part))
    else:
        row = (program - row_programs) * ROWS + tl.arange(0, ROWS)
        y = _load_rows(text, row, n, text_stride, D, BLOCK_D)
        dy = _tile_gradient(right_grad, col_sums, col_time, y, row, n, n_pad, groups, c, LORENTZ, D, D_PAD, BLOCK_D)
        target = row.to(tl.int64)[:, None] * D + k[None, :]
        _store_gradient(d_text + target, dy * grad_scale, (row < n)[:, None] & inside_d)


@triton.jit
def _tile_gradient(
    right_grad, col_sums, col_time, y, row, n, n_pad, groups, c,
    LORENTZ: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of texts by all pairs that are not given: c (sum_i W A / B y - W^T X)."""
    wx = _load_rows(right_grad, row, n, D_PAD, D, BLOCK_D)
    if LORENTZ:
        time = 1.0 + tl.load(col_time + row, mask=row < n, other=0.0)
        return c * ((_sum_slices(col_sums, row, n_pad, groups) / time)[:, None] * y - wx)
    else:
        return wx


@triton.jit
def _store_gradient(ptr, value, inside):
    if ptr.dtype.element_ty == tl.bfloat16:
        value = round_bf16(value)
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def scalars_kernel(
    tile_parts, pair_parts, curv, scale, upstream, d_curv, d_scale, tile_programs, pair_programs,
    LORENTZ: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of curv and logit_scale from the parts of all programs, in one fixed order."""
    index = tl.arange(0, BLOCK)
    gain_sum = tl.zeros([BLOCK], tl.float32)
    curv_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tile_programs, BLOCK):
        inside = start + index < tile_programs
        gain_sum += tl.load(tile_parts + start + index, mask=inside, other=0.0)
        curv_sum += tl.load(tile_parts + tile_programs + start + index, mask=inside, other=0.0)
    for start in range(0, pair_programs, BLOCK):
        inside = start + index < pair_programs
        gain_sum += tl.load(pair_parts + start + index, mask=inside, other=0.0)
        curv_sum += tl.load(pair_parts + pair_programs + start + index, mask=inside, other=0.0)
    gain_grad = tl.sum(gain_sum) * tl.load(upstream).to(tl.float32)
    curv_grad = tl.sum(curv_sum) * tl.load(upstream).to(tl.float32)
    if LORENTZ:
        c = tl.load(curv).to(tl.float32)
        gain_grad *= _LN2
        tl.store(d_scale, -gain_grad / tl.sqrt_rn(c))
        tl.store(d_curv, (curv_grad - 0.5 * gain_grad * _gain(curv, scale, LORENTZ)) / c)
    else:
        tl.store(d_scale, gain_grad)
        tl.store(d_curv, 0.0)


class Split(NamedTuple):
    """How tiles are dealt to programs: ``groups`` runs of ``row_span`` row tiles, ``spans`` runs of ``col_span`` column tiles."""

    groups: int
    row_span: int
    spans: int
    col_span: int


def split_tiles(row_tiles: int, col_tiles: int, programs: int) -> Split:
    """The split over at most ``programs`` programs whose busiest program has least to do, with fewest slices."""
    best = None
    for groups in range(1, min(row_tiles, programs) + 1):
        row_span = -(-row_tiles // groups)
        col_span = -(-col_tiles // min(col_tiles, programs // groups))
        split = Split(-(-row_tiles // row_span), row_span, -(-col_tiles // col_span), col_span)
        key = row_span * col_span, split.groups + split.spans
        if best is None or key < best[0]:
            best = key, split
    return best[1]


class TritonEngine:
    """The contrastive loss on the kernels of this module; the same interface as the PyTorch engine.

    Args:
        geometry: ``"lorentz"`` or ``"cosine"``.
        precision: ``"highest"``, ``"high"`` or ``"medium"``.
        dtype: of the points; bfloat16 points are exact operands and need no low part.
        curv: 0-dim tensor on the device. Not read on the host, like every other value here.
        scale: 0-dim tensor on the device.
    """

    def __init__(self, geometry: str, precision: str, dtype: torch.dtype, curv: Tensor, scale: Tensor) -> None:
        self.lorentz, self.precision = geometry == "lorentz", precision
        self.split = precision != "medium" and dtype != torch.bfloat16
        self.curv, self.scale = curv, scale

    def prepare(self, image: Tensor, text: Tensor, labels: Tensor | None) -> tuple[Side, Side, Tensor]:
        """Operands of both sides and the values ``[b_pad]`` of the given pairs. One launch."""
        (b, width), n = image.shape, len(text)
        b_pad, n_pad, d_pad = _padded(b, PAD), _padded(n, PAD), _padded(width, PAD_D)
        left, right = (
            Side(
                image.new_empty((rows, d_pad * (1 + self.split)), dtype=torch.bfloat16),
                image.new_empty(rows, dtype=torch.float32),
            )
            for rows in (b_pad, n_pad)
        )
        pair = image.new_empty(b_pad, dtype=torch.float32)
        image, text = _row_contiguous(image), _row_contiguous(text)
        rows = _rows_per_program(width)
        prepare_kernel[((b_pad + n_pad) // rows,)](
            image, text, labels if labels is not None else pair, self.curv, *left, *right, pair,
            b, n, b_pad, image.stride(0), text.stride(0),
            LORENTZ=self.lorentz, SPLIT=self.split, LABELS=labels is not None,
            D=width, D_PAD=d_pad, ROWS=rows, BLOCK_D=triton.next_power_of_2(_padded(width, PAD_D)), num_warps=4,
        )  # fmt: skip
        return Side(*left), Side(*right), pair

    def forward(
        self,
        left: Side,
        right: Side,
        pair: Tensor | None,
        labels: Tensor | None,
        counts: Tensor | None,
        b: int,
        n: int,
        loss_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Statistics of one block, in base 2. Two launches.

        Args:
            left: ``b`` real rows.
            right: ``n`` real rows, or several padded sides one after the other.
            pair: values of the given pairs, None if the block holds none.
            labels: ``[b]`` column of each row's pair; None is the diagonal.
            counts: ``[n]`` how often each column is a label, with ``labels``.
            loss_weight: factor of the loss parts.

        Returns:
            log-sum-exps of rows ``[b_pad]`` and columns ``[n_pad]``, 0 for padding, and the parts of
            ``loss_weight * (sum of both - 2 * logits of the pairs)``.
        """
        b_pad, n_pad = len(left.time), len(right.time)
        tiles = tiles_for("forward", left.time.device)
        row_tiles, col_tiles = -(-b // tiles.rows), n_pad // tiles.cols
        split = split_tiles(row_tiles, col_tiles, processors(left.time.device) * tiles.per_sm)
        row_stats = left.time.new_empty(2, split.spans, b_pad)
        col_stats = left.time.new_empty(2, split.groups, n_pad)
        row_lse, col_lse = torch.empty_like(left.time), torch.empty_like(right.time)
        loss_parts = left.time.new_empty(row_tiles + col_tiles)
        unused = left.time
        shared = (*self._tensors(left, right, tiles), unused if pair is None else pair)
        shared = (*shared, unused if labels is None else labels)
        options = self._options(left, pair is not None, labels is not None, tiles)
        forward_kernel[(split.groups * split.spans,)](
            *shared, self.curv, self.scale, *row_stats, *col_stats,
            b, b_pad, n_pad, row_tiles, col_tiles, split.groups, split.row_span, split.col_span, **options,
        )  # fmt: skip
        merge_kernel[(row_tiles + col_tiles,)](
            *shared, unused if counts is None else counts, self.curv, self.scale, *row_stats, *col_stats,
            row_lse, col_lse, loss_parts,
            b, n, b_pad, n_pad, row_tiles, col_tiles, split.groups, split.spans, split.row_span, loss_weight, **options,
        )  # fmt: skip
        return row_lse, col_lse, loss_parts

    def backward(
        self,
        left: Side,
        right: Side,
        pairs: bool,
        labels: Tensor | None,
        row_lse: Tensor,
        col_lse: Tensor,
        b: int,
        log_weight: float,
    ) -> Gradients:
        """Gradients of one block by all pairs that are not given, one launch and the products per workspace.

        ``dL/dlogit = 2^(logit - row_lse - log_weight) + 2^(logit - col_lse - log_weight)``.
        """
        b_pad, n_pad = len(left.time), len(right.time)
        faithful = self.precision == "highest"
        d_pad = left.matrix.shape[1] // (1 + self.split)
        tiles = tiles_for("weights", left.time.device)
        programs = processors(left.time.device) * tiles.per_sm
        blocks = [
            (rows, cols, split_tiles(_length(rows) // tiles.rows, _length(cols) // tiles.cols, programs))
            for rows, cols in _blocks(b_pad, n_pad, WORKSPACE // (4 if faithful else 2))
        ]
        spans, groups = max(split.spans for *_, split in blocks), max(split.groups for *_, split in blocks)
        sums = left.time.new_zeros(spans * b_pad + groups * n_pad + 2 * programs)
        row_sums, col_sums, parts = sums.split([spans * b_pad, groups * n_pad, 2 * programs])
        left_grad = left.time.new_empty(b_pad, d_pad)
        right_grad = left.time.new_empty(n_pad, d_pad)
        largest = max(_length(rows) * _length(cols) for rows, cols, _ in blocks)
        workspace = left.matrix.new_empty(largest * (1 + faithful))
        options = self._options(left, pairs, labels is not None, tiles)
        for rows, cols, split in blocks:
            width = _length(cols) * (1 + faithful)
            weights = workspace[: _length(rows) * width].view(_length(rows), width)
            weights_kernel[(split.groups * split.spans,)](
                *self._tensors(left, right, tiles), left.time if labels is None else labels, self.curv, self.scale,
                row_lse, col_lse, weights, row_sums, col_sums, parts,
                b, b_pad, n_pad, width, rows.start // tiles.rows, cols.start // tiles.cols,
                _length(rows) // tiles.rows, _length(cols) // tiles.cols,
                split.groups, split.row_span, split.col_span, programs, log_weight, FAITHFUL=faithful, **options,
            )  # fmt: skip
            high, low = weights[:, : _length(cols)], weights[:, _length(cols) :]
            x, y = left.matrix[rows], right.matrix[cols]
            terms = [(high, x[:, :d_pad], y[:, :d_pad])]
            if self.split:
                terms.append((high, x[:, d_pad:], y[:, d_pad:]))
            if faithful:
                terms.append((low, x[:, :d_pad], y[:, :d_pad]))
            for index, (weight, x_part, y_part) in enumerate(terms):
                _add_product(left_grad[rows], weight, y_part, new=index == 0 and cols.start == 0)
                _add_product(right_grad[cols], weight.T, x_part, new=index == 0 and rows.start == 0)
        return Gradients(left_grad, right_grad, row_sums.view(spans, b_pad), col_sums.view(groups, n_pad), parts)

    def finish(
        self,
        image: Tensor,
        text: Tensor,
        labels: Tensor | None,
        left: Side,
        right: Side,
        pair: Tensor,
        row_lse: Tensor,
        col_lse: Tensor,
        tiles: Gradients,
        log_weight: float,
        pair_weight: float,
        upstream: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of image, text, curv and scale (fp32, 0-dim). Two launches.

        ``right`` and everything of its size are this rank's own texts.
        """
        image, text = _row_contiguous(image), _row_contiguous(text)
        (b, width), n = image.shape, len(text)
        rows = _rows_per_program(width)
        row_programs, text_programs = -(-b // rows), -(-n // rows) if labels is not None else 0
        d_image = torch.empty(image.shape, dtype=image.dtype, device=image.device)
        d_text = torch.empty(text.shape, dtype=text.dtype, device=text.device)
        d_pair = d_image if labels is None else torch.empty_like(d_image)
        parts = row_lse.new_empty(2 * row_programs)
        d_curv, d_scale = row_lse.new_empty(2).unbind()
        finish_kernel[(row_programs + text_programs,)](
            image, text, pair if labels is None else labels, left.time, right.time, pair, row_lse, col_lse,
            tiles.left, tiles.right, tiles.row_sums, tiles.col_sums, self.curv, self.scale, upstream,
            d_image, d_text, d_pair, parts,
            b, n, len(left.time), len(right.time), image.stride(0), text.stride(0),
            len(tiles.col_sums), len(tiles.row_sums), row_programs, log_weight, pair_weight,
            LORENTZ=self.lorentz, LABELS=labels is not None,
            D=width, D_PAD=tiles.left.shape[1], ROWS=rows, BLOCK_D=triton.next_power_of_2(_padded(width, PAD_D)), num_warps=4,
        )  # fmt: skip
        if labels is not None:
            d_text.index_put_((labels,), d_pair, accumulate=True)  # sorts the labels: deterministic
        scalars_kernel[(1,)](
            tiles.parts, parts, self.curv, self.scale, upstream, d_curv, d_scale,
            tiles.parts.numel() // 2, row_programs, LORENTZ=self.lorentz, BLOCK=1024, num_warps=4,
        )  # fmt: skip
        return d_image, d_text, d_curv, d_scale

    def _tensors(self, left: Side, right: Side, tiles: Tiles) -> tuple[Any, ...]:
        matrices = left.matrix, right.matrix
        if tiles.tma:
            matrices = (
                TensorDescriptor.from_tensor(left.matrix, [tiles.rows, tiles.inner]),
                TensorDescriptor.from_tensor(right.matrix, [tiles.cols, tiles.inner]),
            )
        return *matrices, left.time, right.time

    def _options(self, left: Side, pairs: bool, labels: bool, tiles: Tiles) -> dict[str, Any]:
        return {
            "LORENTZ": self.lorentz,
            "SPLIT": self.split,
            "PAIRS": pairs,
            "LABELS": labels,
            "D_PAD": left.matrix.shape[1] // (1 + self.split),
            "TMA": tiles.tma,
            "BM": tiles.rows,
            "BN": tiles.cols,
            "BK": tiles.inner,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _length(part: slice) -> int:
    return part.stop - part.start


def _rows_per_program(width: int) -> int:
    return max(1, min(PAD, PREPARE_TILE // triton.next_power_of_2(_padded(width, PAD_D))))


def _row_contiguous(points: Tensor) -> Tensor:
    return points if points.stride(1) == 1 else points.contiguous()


def _blocks(rows: int, cols: int, elements: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of at most ``elements`` weights, as square as they can be: least traffic for the accumulated gradients."""
    side = max(PAD, int(elements**0.5) // PAD * PAD)
    height = min(rows, side)
    width = min(cols, max(PAD, elements // height // PAD * PAD))
    height = min(rows, max(PAD, elements // width // PAD * PAD))
    for row in range(0, rows, height):
        for col in range(0, cols, width):
            yield slice(row, min(row + height, rows)), slice(col, min(col + width, cols))


def _add_product(out: Tensor, a: Tensor, b: Tensor, new: bool) -> None:
    """``out (+)= a b`` of bf16 operands in fp32."""
    if not out.is_cuda:  # the interpreter's tensors: CPU products cannot return another dtype
        product = a.float() @ b.float()
        out.copy_(product) if new else out.add_(product)
    elif new:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    else:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
