"""Contrastive loss (hyperbolic or cosine): both directions from one pass over tiles of logits, memory O(B).

Notation. ``A = 1 + a``, ``B = 1 + b``: time components on the unit hyperboloid. ``delta = a B + b - c <x, y>``, the argument of
arcosh less 1; ``measure = log2(1 + delta + sqrt(delta (delta + 2)))``; ``logit = gain * measure``, in base 2, so that every
exponential is one ``exp2``. In cosine geometry ``measure = <x, y>``. ``G = dL / dlogit``, ``W = dL / d delta``.

Operands. Logits faithful to float32 from half-precision units: each row is scaled by a power of two and split into
``[hi | lo]`` in float16 (22 bits), walked as one product of length 3 D. float16 points need no low part; bfloat16 points, and all
points at precision "medium", are bfloat16 operands as they are.

Forward, 4 launches
  prepare_kernel  one read of the points: operands, times, and the value of every given pair from its Lorentz chord.
  forward_kernel  one matrix pass. A program owns a group of row tiles and a span of column tiles, keeps row statistics in
                  registers and folds column sums into its own slices of a ``[groups * BM / 16, n]`` buffer. One exponential per
                  logit: a column's terms are the row's, rebased from the row maximum to the tile maximum.
  merge_kernel    joins the slices. A column that lies so far below its tiles' maxima that terms may have underflowed is computed
                  again here, with its own exponentials.
  (a sum)         of the loss parts.
Statistics leave as log-sum-exp *less the logit of the row's (column's) own pair*: the loss is their mean, and next to 0, where
training ends, they keep all their digits.

Backward, per block of at most ``WORKSPACE`` bytes of weights
  weights_kernel  makes the logits again and writes ``W`` without the given pairs in bfloat16, with ``sum_j W B``, ``sum_i W A`` and
                  the sums for curv and logit_scale. The first two are sums of the *rounded* weights: so the rounding of W
                  multiplies tangent vectors, which are short for close pairs, and not the points.
  expand_kernel   the points of the block as sums of bfloat16 parts (float16 operands only).
  products        ``W Y`` and ``W^T X`` by cuBLAS, accumulated in float32: W in one part and the points in two ("high": 2 products
                  each), both in three ("highest": 6), both in one ("medium").
then
  finish_kernel   adds the time terms and the given pairs and writes the gradients of the points.
  scalars_kernel  sums the parts of the gradients of curv and logit_scale.
Every sum has one owner or a fixed order: results are deterministic. Nothing here waits for the device.
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
ROW_TILE = 4096  # components a program of the row kernels holds
PLAIN, HALF, SPLIT = 0, 1, 2  # operands: bfloat16 as is; float16, scaled; float16 [hi | lo], scaled

_INTERPRET = tl.constexpr(INTERPRET)
_HALF = tl.constexpr(HALF)
_SPLIT = tl.constexpr(SPLIT)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_FLOOR = tl.constexpr(-1e30)  # below every logit, yet finite
_ABSENT = tl.constexpr(1e30)  # |time| of padding
_PRESENT = tl.constexpr(1e29)
_LOST = tl.constexpr(5e-29)  # 2^-94: below it, a rebased column sum may miss terms that underflowed (2^-126)
_INF = tl.constexpr(float("inf"))


class Side(NamedTuple):
    """One operand of the logits, padded: rows to ``PAD``, components to ``PAD_D``."""

    matrix: Tensor  # [n_pad, d_pad] bf16 or fp16, or [n_pad, 2 d_pad] fp16 for [hi | lo]
    time: (
        Tensor  # fp32 [n_pad, 2]: shifted time (0 in cosine geometry, +-1e30 marks padding), inverse of the row's scale
    )


class Gradients(NamedTuple):
    """What the tiles add up for the last two kernels."""

    left: Tensor  # fp32 [b_pad, d_pad], W Y
    right: Tensor  # fp32 [n_pad, d_pad], W^T X
    row_sums: Tensor  # fp32 [slices, b_pad], sum_j W B
    col_sums: Tensor  # fp32 [slices, n_pad], sum_i W A
    parts: Tensor  # fp32 [2 * programs], sum G * measure, then sum W * (d delta / d log c)


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
    D_PAD: tl.constexpr, KIND: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> of one tile, of the scaled rows. Split operands: lo*hi, hi*lo, hi*hi as one product of length 3 D."""
    STEPS: tl.constexpr = D_PAD // BK
    WIDTH: tl.constexpr = D_PAD * (2 if KIND == _SPLIT else 1)
    if not TMA:
        k = tl.arange(0, BK)
        x_ptr = left + (row * BM + tl.arange(0, BM)).to(tl.int64)[:, None] * WIDTH + k[None, :]
        y_ptr = right + (col * BN + tl.arange(0, BN)).to(tl.int64)[:, None] * WIDTH + k[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for step in range(3 * STEPS if KIND == _SPLIT else STEPS):
        x_k = step * BK
        y_k = step * BK
        if KIND == _SPLIT:
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
def _load_times(time, index):
    """Shifted times (+-_ABSENT: padding) and inverse scales of some rows of one side."""
    return tl.load(time + 2 * index), tl.load(time + 2 * index + 1)


@triton.jit
def _values(acc, a, b, row_scale, col_scale, c, LORENTZ: tl.constexpr, KIND: tl.constexpr):
    """delta of a tile, or the inner products. A padded column has inf (lorentz) or -inf (cosine)."""
    if KIND >= _HALF:
        if LORENTZ:
            row_scale = c * row_scale
        acc *= row_scale[:, None] * col_scale[None, :]
    elif LORENTZ:
        acc *= c
    if LORENTZ:
        return a[:, None] * (1.0 + b)[None, :] + b[None, :] - acc
    else:
        return acc + b[None, :]


@triton.jit
def _fast_measure(value, LORENTZ: tl.constexpr):
    """Absolute error 2^-22, enough for a logit; one log2 and one sqrt instruction. Rounding may leave delta below 0."""
    if LORENTZ:
        return fast_log2(1.0 + value + tl.sqrt(tl.abs(value * (value + 2.0))))
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
def _load_rows(ptr, row, n, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Whole rows as fp32, zero beyond the matrix. [R] -> [R, BLOCK_D]"""
    k = tl.arange(0, BLOCK_D)
    inside = ((row >= 0) & (row < n))[:, None] & (k < D)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + k[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_operand(
    points, row, n, matrix, time, c,
    LORENTZ: tl.constexpr, KIND: tl.constexpr, D_PAD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, BLOCK_D)
    inside = (k < D_PAD)[None, :]
    target = matrix + row.to(tl.int64)[:, None] * (D_PAD * (2 if KIND == _SPLIT else 1)) + k[None, :]
    inverse = tl.full(row.shape, 1.0, tl.float32)
    if KIND >= _HALF:
        # the largest component goes to [2^12, 2^13): room above for float16, and below for the low parts
        peak = tl.max(tl.abs(points), axis=1)
        exponent = tl.maximum((peak.to(tl.int32, bitcast=True) >> 23) - 127, -100)
        inverse = ((exponent - 12 + 127) << 23).to(tl.float32, bitcast=True)
        scaled = points * ((127 + 12 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
        hi = scaled.to(tl.float16)
        tl.store(target, hi, mask=inside)
        if KIND == _SPLIT:
            tl.store(target + D_PAD, (scaled - hi.to(tl.float32)).to(tl.float16), mask=inside)
    else:
        tl.store(target, round_bf16(points).to(tl.bfloat16), mask=inside)
    if LORENTZ:
        shifted = tl.where(row < n, shifted_time(tl.sqrt_rn(c) * row_norm(points)), _ABSENT)
    else:
        shifted = tl.where(row < n, 0.0, -_INF)
    tl.store(time + 2 * row, shifted)
    tl.store(time + 2 * row + 1, inverse)


@triton.jit
def prepare_kernel(
    image, text, labels, curv, scale, left, left_time, right, right_time, pair,
    b, n, b_pad, image_stride, text_stride,
    LORENTZ: tl.constexpr, KIND: tl.constexpr, LABELS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Operands and times of both sides; value, logit and rounding of the logit of the given pairs, ``pair`` [3, b_pad]."""
    start = tl.program_id(0) * ROWS
    c = tl.load(curv).to(tl.float32)
    if start < b_pad:
        row = start + tl.arange(0, ROWS)
        x = _load_rows(image, row, b, image_stride, D, BLOCK_D)
        _store_operand(x, row, b, left, left_time, c, LORENTZ, KIND, D_PAD, BLOCK_D)
        if LABELS:
            partner = tl.load(labels + row, mask=row < b, other=0).to(tl.int32)
        else:
            partner = row
        value = _pair_value(x, _load_rows(text, partner, n, text_stride, D, BLOCK_D), c, LORENTZ)
        measure = _fast_measure(value, LORENTZ)
        gain = _gain(curv, scale, LORENTZ)
        logit = gain * measure
        tl.store(pair + row, value)
        tl.store(pair + b_pad + row, logit)
        tl.store(pair + 2 * b_pad + row, tl.fma(measure, gain, -logit))
    else:
        row = start - b_pad + tl.arange(0, ROWS)
        y = _load_rows(text, row, n, text_stride, D, BLOCK_D)
        _store_operand(y, row, n, right, right_time, c, LORENTZ, KIND, D_PAD, BLOCK_D)


@triton.jit
def _label_range(labels, rows, b, LABELS: tl.constexpr):
    """Columns of the given pairs of these rows (-1: none), with the first and the last of them."""
    if LABELS:
        label = tl.load(labels + rows, mask=rows < b, other=-1).to(tl.int32)
    else:
        label = tl.where(rows < b, rows, -1)
    return label, tl.min(tl.where(label >= 0, label, 2147483647)), tl.max(label)


@triton.jit
def forward_kernel(
    left, right, row_time, col_time, pair, labels, curv, scale, row_max, row_sum, col_top, col_sum,
    b, b_pad, n_pad, row_tiles, col_tiles, groups, row_span, col_span,
    LORENTZ: tl.constexpr, KIND: tl.constexpr, PAIRS: tl.constexpr, LABELS: tl.constexpr, D_PAD: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Maxima and sums of 2^(logit - maximum): of rows per span, of columns per group and 16 rows of a tile."""
    SLICES: tl.constexpr = BM // 16  # a warp's rows: sums stay inside it
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
        a, row_scale = _load_times(row_time, rows)
        if PAIRS:
            label, first, last = _label_range(labels, rows, b, LABELS)
            pair_value = tl.load(pair + rows)
        run_max = tl.full([BM], _FLOOR, tl.float32)
        run_sum = tl.zeros([BM], tl.float32)
        for col in range(col_start, col_end):
            acc = _inner_products(left, right, row, col, D_PAD, KIND, TMA, BM, BN, BK)
            cols = col * BN + tl.arange(0, BN)
            b_time, col_scale = _load_times(col_time, cols)
            value = _values(acc, a, b_time, row_scale, col_scale, c, LORENTZ, KIND)
            if PAIRS:
                if (first < (col + 1) * BN) & (last >= col * BN):
                    value = tl.where(
                        (label - col * BN)[:, None] == tl.arange(0, BN)[None, :], pair_value[:, None], value
                    )
            measure = _fast_measure(value, LORENTZ)
            if LORENTZ:
                top = gain * tl.min(measure, axis=1)
            else:
                top = gain * tl.max(measure, axis=1)
            top = tl.where(tl.abs(a) < _PRESENT, top, -_INF)
            tile_top = tl.maximum(tl.max(top), _FLOOR)
            e = tl.exp2(tl.fma(measure, gain, -tl.where(top > -_INF, top, _INF)[:, None]))
            new_max = tl.maximum(run_max, top)
            run_sum = run_sum * tl.exp2(run_max - new_max) + tl.sum(e, axis=1) * tl.exp2(top - new_max)
            run_max = new_max
            # the same exponentials, rebased from the row maxima to the tile maximum
            part = tl.sum(tl.reshape(e * tl.exp2(top - tile_top)[:, None], [SLICES, 16, BN]), axis=1)
            slot = (tl.cast(n_pad, tl.int64) * (group * SLICES + tl.arange(0, SLICES)))[:, None] + cols[None, :]
            if row > row_start:
                old_top = tl.load(col_top + group * col_tiles + col)
                old = tl.load(col_sum + slot)
            else:
                old_top = tile_top
                old = tl.zeros([SLICES, BN], tl.float32)
            new_top = tl.maximum(old_top, tile_top)
            tl.store(col_sum + slot, old * tl.exp2(old_top - new_top) + part * tl.exp2(tile_top - new_top))
            tl.store(col_top + group * col_tiles + col, new_top)
            tl.debug_barrier()  # the slices are read again at the next row
        slot = tl.cast(b_pad, tl.int64) * span + rows
        tl.store(row_max + slot, run_max)
        tl.store(row_sum + slot, run_sum)


@triton.jit
def _column_statistics(
    left, right, row_time, col_time, pair, labels, c, gain, b, col, row_tiles,
    LORENTZ: tl.constexpr, KIND: tl.constexpr, PAIRS: tl.constexpr, LABELS: tl.constexpr, D_PAD: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of the columns of one tile over all rows, with their own exponentials."""
    cols = col * BN + tl.arange(0, BN)
    b_time, col_scale = _load_times(col_time, cols)
    run_max = tl.full([BN], _FLOOR, tl.float32)
    run_sum = tl.zeros([BN], tl.float32)
    for row in range(row_tiles):
        rows = row * BM + tl.arange(0, BM)
        a, row_scale = _load_times(row_time, rows)
        acc = _inner_products(left, right, row, col, D_PAD, KIND, TMA, BM, BN, BK)
        value = _values(acc, a, b_time, row_scale, col_scale, c, LORENTZ, KIND)
        if PAIRS:
            label, _, _ = _label_range(labels, rows, b, LABELS)
            value = tl.where(label[:, None] == cols[None, :], tl.load(pair + rows)[:, None], value)
        logit = tl.where((tl.abs(a) < _PRESENT)[:, None], _fast_measure(value, LORENTZ) * gain, -_INF)
        new_max = tl.maximum(run_max, tl.max(logit, axis=0))
        run_sum = run_sum * tl.exp2(run_max - new_max) + tl.sum(tl.exp2(logit - new_max[None, :]), axis=0)
        run_max = new_max
    return run_max, run_sum


@triton.jit
def merge_kernel(
    left, right, row_time, col_time, pair, labels, curv, scale, row_max, row_sum, col_top, col_sum,
    reference, counts, row_gap, col_gap, loss_parts,
    b, b_pad, n_pad, row_tiles, col_tiles, groups, spans, loss_weight,
    LORENTZ: tl.constexpr, KIND: tl.constexpr, PAIRS: tl.constexpr, LABELS: tl.constexpr, D_PAD: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exps less the reference logits (0 for padding), and each tile's part of the loss."""
    SLICES: tl.constexpr = BM // 16
    program = tl.program_id(0)
    gain = _gain(curv, scale, LORENTZ)
    if program < col_tiles:
        cols = program * BN + tl.arange(0, BN)
        present = tl.abs(tl.load(col_time + 2 * cols)) < _PRESENT
        peak = tl.load(col_top + program)
        for group in range(1, groups):
            peak = tl.maximum(peak, tl.load(col_top + group * col_tiles + program))
        peak = tl.full([BN], 0.0, tl.float32) + peak
        total = tl.zeros([BN], tl.float32)
        for group in range(groups):
            rebase = tl.exp2(tl.load(col_top + group * col_tiles + program) - peak)
            slot = (tl.cast(n_pad, tl.int64) * (group * SLICES + tl.arange(0, SLICES)))[:, None] + cols[None, :]
            total += tl.sum(tl.load(col_sum + slot), axis=0) * rebase
        total = tl.where(present, total, 1.0)
        if tl.min(total) < _LOST:
            peak, total = _column_statistics(
                left, right, row_time, col_time, pair, labels, tl.load(curv).to(tl.float32), gain, b, program,
                row_tiles, LORENTZ, KIND, PAIRS, LABELS, D_PAD, TMA, BM, BN, BK,
            )  # fmt: skip
            total = tl.where(present, total, 1.0)
        own = tl.load(reference + cols, mask=present, other=0.0)
        gap = tl.where(present, (peak - own) + tl.log2(total), 0.0)
        tl.store(col_gap + cols, gap)
        if LABELS:
            gap *= tl.load(counts + cols, mask=present, other=0.0)
        elif PAIRS:
            gap -= tl.load(pair + 2 * b_pad + cols, mask=present, other=0.0)
        tl.store(loss_parts + program, tl.sum(gap) * tl.cast(loss_weight, tl.float32))
    else:
        rows = (program - col_tiles) * BM + tl.arange(0, BM)
        present = rows < b
        peak = tl.full([BM], _FLOOR, tl.float32)
        total = tl.zeros([BM], tl.float32)
        for span in range(spans):
            slot = tl.cast(b_pad, tl.int64) * span + rows
            part_max = tl.load(row_max + slot)
            new_max = tl.maximum(peak, part_max)
            total = total * tl.exp2(peak - new_max) + tl.load(row_sum + slot) * tl.exp2(part_max - new_max)
            peak = new_max
        own = tl.load(pair + b_pad + rows)
        gap = tl.where(present, (peak - own) + tl.log2(tl.where(present, total, 1.0)), 0.0)
        tl.store(row_gap + rows, gap)
        gap = tl.where(present, gap - tl.load(pair + 2 * b_pad + rows), 0.0)
        tl.store(loss_parts + program, tl.sum(gap) * tl.cast(loss_weight, tl.float32))


@triton.jit
def _store_parts(value, target, stride, inside, PARTS: tl.constexpr):
    """fp32 as a sum of bf16 parts, ``stride`` apart; returns the sum."""
    total = tl.zeros(value.shape, tl.float32)
    for part in tl.static_range(PARTS):
        rounded = round_bf16(value - total)
        tl.store(target + part * stride, rounded.to(tl.bfloat16), mask=inside)
        total += rounded
    return total


@triton.jit
def weights_kernel(
    left, right, row_time, col_time, pair, labels, curv, scale, row_gap, col_gap, reference,
    weights, row_sums, col_sums, parts,
    b, b_pad, n_pad, width, row_first, col_first, row_tiles, col_tiles, groups, row_span, col_span, programs, log_weight,
    LORENTZ: tl.constexpr, KIND: tl.constexpr, PAIRS: tl.constexpr, LABELS: tl.constexpr, PARTS: tl.constexpr,
    D_PAD: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """W of the block of tiles that starts at tile (row_first, col_first), as a sum of bf16 PARTS side by side."""
    SLICES: tl.constexpr = BM // 16
    program = tl.program_id(0)
    group = program % groups
    span = program // groups
    c = tl.load(curv).to(tl.float32)
    gain = _gain(curv, scale, LORENTZ)
    offset = tl.cast(log_weight, tl.float32)
    row_start = row_first + group * row_span
    row_end = tl.minimum(row_start + row_span, row_first + row_tiles)
    col_start = col_first + span * col_span
    col_end = tl.minimum(col_start + col_span, col_first + col_tiles)
    gain_part = tl.zeros([BM], tl.float32)
    curv_part = tl.zeros([BM], tl.float32)
    for row in range(row_start, row_end):
        rows = row * BM + tl.arange(0, BM)
        a, row_scale = _load_times(row_time, rows)
        row_present = tl.abs(a) < _PRESENT
        a = tl.where(row_present, a, 0.0)
        row_logit = tl.load(pair + b_pad + rows)
        row_shift = tl.where(row_present, tl.load(row_gap + rows) + offset, _INF)
        if PAIRS:
            label, first, last = _label_range(labels, rows, b, LABELS)
        gain_row = tl.zeros([BM], tl.float32)
        curv_row = tl.zeros([BM], tl.float32)
        row_sum = tl.zeros([BM], tl.float32)
        for col in range(col_start, col_end):
            acc = _inner_products(left, right, row, col, D_PAD, KIND, TMA, BM, BN, BK)
            cols = col * BN + tl.arange(0, BN)
            b_time, col_scale = _load_times(col_time, cols)
            col_present = tl.abs(b_time) < _PRESENT
            b_time = tl.where(col_present, b_time, 0.0)
            col_logit = tl.load(reference + cols, mask=col_present, other=0.0)
            col_shift = tl.where(col_present, tl.load(col_gap + cols) + offset, _INF)
            value = _values(acc, a, b_time, row_scale, col_scale, c, LORENTZ, KIND)
            if LORENTZ:
                square = tl.abs(value * (value + 2.0))
                inverse = tl.where(square > 1e-37, tl.rsqrt(tl.maximum(square, 1e-37)), 0.0)  # coinciding: no direction
                sinh = square * inverse
                # log2 loses digits next to 1, where the series of asinh converges
                near = 1.0 + square * (-1 / 6 + square * (3 / 40 + square * (-5 / 112 + square * (35 / 1152))))
                measure = tl.where(square < 0.04, sinh * near * _LOG2E, fast_log2(1.0 + value + sinh))
            else:
                measure = value
            # twice two differences: the first is nearly exact, as both terms are of one size
            grad = tl.exp2(tl.fma(measure, gain, -row_logit[:, None]) - row_shift[:, None])
            grad += tl.exp2(tl.fma(measure, gain, -col_logit[None, :]) - col_shift[None, :])
            ragged = tl.min(col_present.to(tl.int32)) == 0
            if PAIRS:
                if ragged | ((first < (col + 1) * BN) & (last >= col * BN)):
                    own = (label - col * BN)[:, None] == tl.arange(0, BN)[None, :]
                    grad = tl.where(own | (col_shift == _INF)[None, :], 0.0, grad)
            elif ragged:
                grad = tl.where((col_shift == _INF)[None, :], 0.0, grad)
            gain_row += tl.sum(grad * measure, axis=1)
            if LORENTZ:
                weight = grad * (gain * inverse)
                gap = a[:, None] - b_time[None, :]
                slope_gap = (0.5 * a / (1.0 + a))[:, None] - (0.5 * b_time / (1.0 + b_time))[None, :]
                curv_row += tl.sum(weight * (value - gap * slope_gap), axis=1)
            else:
                weight = grad * (gain * _LN2)
            target = weights + ((row - row_first) * BM + tl.arange(0, BM)).to(tl.int64)[:, None] * width
            target += ((col - col_first) * BN + tl.arange(0, BN))[None, :]
            rounded = _store_parts(weight, target, width // PARTS, True, PARTS)
            if LORENTZ:
                row_sum += tl.sum(rounded * (1.0 + b_time)[None, :], axis=1)
                col_sum = rounded * tl.where(row_present, 1.0 + a, 0.0)[:, None]
                col_sum = tl.sum(tl.reshape(col_sum, [SLICES, 16, BN]), axis=1)
                slot = (tl.cast(n_pad, tl.int64) * (group * SLICES + tl.arange(0, SLICES)))[:, None] + cols[None, :]
                tl.store(col_sums + slot, tl.load(col_sums + slot) + col_sum)
                tl.debug_barrier()  # the slices are read again at the next row
        gain_part += tl.where(row_present, gain_row, 0.0)
        curv_part += tl.where(row_present, curv_row, 0.0)
        if LORENTZ:
            slot = row_sums + tl.cast(b_pad, tl.int64) * span + rows
            tl.store(slot, tl.load(slot) + row_sum)
    tl.store(parts + program, tl.load(parts + program) + tl.sum(gain_part))
    tl.store(parts + programs + program, tl.load(parts + programs + program) + tl.sum(curv_part))


@triton.jit
def expand_kernel(
    left, left_time, right, right_time, out_left, out_right, rows,
    KIND: tl.constexpr, PARTS: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """float16 operands -> points as sums of bf16 PARTS, for the gradient products. ``rows`` of left, then right."""
    start = tl.program_id(0) * ROWS
    if start < rows:
        _expand(left, left_time, out_left, start, KIND, PARTS, D_PAD, ROWS, BLOCK_D)
    else:
        _expand(right, right_time, out_right, start - rows, KIND, PARTS, D_PAD, ROWS, BLOCK_D)


@triton.jit
def _expand(
    matrix, time, out, start,
    KIND: tl.constexpr, PARTS: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = start + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_D)
    inside = (k < D_PAD)[None, :]
    source = matrix + row.to(tl.int64)[:, None] * (D_PAD * (2 if KIND == _SPLIT else 1)) + k[None, :]
    points = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    if KIND == _SPLIT:
        points += tl.load(source + D_PAD, mask=inside, other=0.0).to(tl.float32)
    points *= tl.load(time + 2 * row + 1)[:, None]
    target = out + row.to(tl.int64)[:, None] * (PARTS * D_PAD) + k[None, :]
    _store_parts(points, target, D_PAD, inside, PARTS)


@triton.jit
def _sum_slices(ptr, row, stride, slices):
    """Sum over the first axis of a [slices, stride] buffer at some rows."""
    total = tl.zeros(row.shape, tl.float32)
    for index in range(slices):
        total += tl.load(ptr + tl.cast(stride, tl.int64) * index + row)
    return total


@triton.jit
def finish_kernel(
    image, text, labels, row_time, col_time, pair, row_gap, col_gap, reference,
    left_grad, right_grad, row_sums, col_sums, curv, scale, upstream, d_image, d_text, d_pair, parts,
    b, n, b_pad, n_pad, image_stride, text_stride, row_slices, col_slices, row_programs, half_weight,
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
        if LORENTZ:
            measure = 2.0 * _LOG2E * asinh(tl.sqrt_rn(0.5 * value))
        else:
            measure = value
        # probabilities of the pair in its row and in its column, less 1
        residue = tl.load(pair + 2 * b_pad + row)
        distance = tl.load(reference + partner, mask=real, other=0.0) - tl.load(pair + b_pad + row)
        pair_grad = tl.exp2(residue - tl.load(row_gap + row)) - 1.0
        pair_grad += tl.exp2(residue - (distance + tl.load(col_gap + partner, mask=real, other=0.0))) - 1.0
        pair_grad = tl.where(real, pair_grad * tl.cast(half_weight, tl.float32), 0.0)
        wy = _load_rows(left_grad, row, b, D_PAD, D, BLOCK_D)
        if LORENTZ:
            time_x = 1.0 + tl.load(row_time + 2 * row, mask=real, other=0.0)
            time_y = 1.0 + tl.load(col_time + 2 * partner, mask=real, other=0.0)
            gap = x - y
            a_minus_b = c * tl.sum(gap * (x + y), axis=1) / (time_x + time_y)
            square = value * (value + 2.0)
            weight = tl.where(square > 0.0, pair_grad * gain / tl.sqrt_rn(tl.maximum(square, 1e-37)), 0.0)
            # the tangent B x / A - y of a pair, from differences
            dx = c * (
                (_sum_slices(row_sums, row, b_pad, row_slices) / time_x)[:, None] * x
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
                right_grad, col_sums, col_time, y, row, n, n_pad, col_slices, c, LORENTZ, D, D_PAD, BLOCK_D
            )
            _store_gradient(d_text + target, dy * grad_scale, inside)
        tl.store(parts + program, tl.sum(tl.where(real, pair_grad * measure, 0.0)))
        tl.store(parts + row_programs + program, tl.sum(curv_part))
    else:
        row = (program - row_programs) * ROWS + tl.arange(0, ROWS)
        y = _load_rows(text, row, n, text_stride, D, BLOCK_D)
        dy = _tile_gradient(right_grad, col_sums, col_time, y, row, n, n_pad, col_slices, c, LORENTZ, D, D_PAD, BLOCK_D)
        target = row.to(tl.int64)[:, None] * D + k[None, :]
        _store_gradient(d_text + target, dy * grad_scale, (row < n)[:, None] & inside_d)


@triton.jit
def _tile_gradient(
    right_grad, col_sums, col_time, y, row, n, n_pad, slices, c,
    LORENTZ: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of texts by all pairs that are not given: c (sum_i W A / B y - W^T X)."""
    wx = _load_rows(right_grad, row, n, D_PAD, D, BLOCK_D)
    if LORENTZ:
        time = 1.0 + tl.load(col_time + 2 * row, mask=row < n, other=0.0)
        return c * ((_sum_slices(col_sums, row, n_pad, slices) / time)[:, None] * y - wx)
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

    side = Side

    def __init__(self, geometry: str, precision: str, dtype: torch.dtype, curv: Tensor, scale: Tensor) -> None:
        self.lorentz, self.precision = geometry == "lorentz", precision
        plain = precision == "medium" or dtype == torch.bfloat16
        self.kind = PLAIN if plain else HALF if dtype == torch.float16 else SPLIT
        # bf16 parts of the weights and of the points in the gradient products
        self.weight_parts = 3 if precision == "highest" else 1
        self.point_parts = 1 if plain else 3 if self.kind == SPLIT and precision == "highest" else 2
        self.curv, self.scale = curv, scale

    def prepare(self, image: Tensor, text: Tensor, labels: Tensor | None) -> tuple[Side, Side, Tensor]:
        """Operands of both sides; values, logits and roundings ``[3, b_pad]`` of the given pairs. One launch."""
        (b, width), n = image.shape, len(text)
        b_pad, n_pad = self.padded(b), self.padded(n)
        left, right = self.empty_side(image, b_pad, width), self.empty_side(text, n_pad, width)
        pair = left.time.new_empty(3, b_pad)
        image, text = _row_contiguous(image), _row_contiguous(text)
        options = _row_options(width)
        prepare_kernel[((b_pad + n_pad) // options["ROWS"],)](
            image, text, pair if labels is None else labels, self.curv, self.scale, *left, *right, pair,
            b, n, b_pad, image.stride(0), text.stride(0),
            LORENTZ=self.lorentz, KIND=self.kind, LABELS=labels is not None, D=width, **options,
        )  # fmt: skip
        return left, right, pair

    @staticmethod
    def padded(rows: int) -> int:
        """Rows of an operand of that many points."""
        return _padded(rows, PAD)

    def empty_side(self, like: Tensor, rows: int, width: int) -> Side:
        """Room for one operand of ``rows`` padded rows."""
        dtype = torch.bfloat16 if self.kind == PLAIN else torch.float16
        matrix = like.new_empty((rows, _padded(width, PAD_D) * (2 if self.kind == SPLIT else 1)), dtype=dtype)
        return Side(matrix, like.new_empty((rows, 2), dtype=torch.float32))

    def forward(
        self,
        left: Side,
        right: Side,
        pair: Tensor,
        reference: Tensor,
        has_pairs: bool,
        labels: Tensor | None,
        counts: Tensor | None,
        b: int,
        loss_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Statistics of one block, in base 2. Two launches.

        Args:
            left: ``b`` real rows.
            right: the columns; may be several padded sides one after the other.
            pair: values, logits and roundings of the rows' pairs ``[3, b_pad]``.
            reference: ``[n_pad]`` a logit of each column, its own pair's where it has one.
            has_pairs: whether the pairs lie in this block.
            labels: ``[b]`` column of each row's pair; None is the diagonal.
            counts: ``[n]`` how often each column is a label, with ``labels``.
            loss_weight: factor of the loss parts.

        Returns:
            log-sum-exp less the pair's logit of rows ``[b_pad]``, less the reference of columns ``[n_pad]``, 0 for padding;
            and parts whose sum is ``loss_weight`` times their sum.
        """
        b_pad, n_pad = len(left.time), len(right.time)
        tiles = tiles_for("forward", left.time.device)
        row_tiles, col_tiles = -(-b // tiles.rows), n_pad // tiles.cols
        split = split_tiles(row_tiles, col_tiles, processors(left.time.device) * tiles.per_sm)
        row_max, row_sum = left.time.new_empty(2, split.spans, b_pad).unbind()
        col_sum = left.time.new_empty(split.groups * (tiles.rows // 16), n_pad)
        col_top = left.time.new_empty(split.groups, col_tiles)
        row_gap, col_gap = left.time.new_empty(b_pad), left.time.new_empty(n_pad)
        loss_parts = left.time.new_empty(row_tiles + col_tiles)
        statistics = row_max, row_sum, col_top, col_sum
        tensors = *self._tensors(left, right, tiles), pair, pair if labels is None else labels, self.curv, self.scale
        options = self._options(left, has_pairs, labels, tiles)
        forward_kernel[(split.groups * split.spans,)](
            *tensors, *statistics, b, b_pad, n_pad, row_tiles, col_tiles, split.groups, split.row_span, split.col_span,
            **options,
        )  # fmt: skip
        merge_kernel[(row_tiles + col_tiles,)](
            *tensors, *statistics, reference, reference if counts is None else counts, row_gap, col_gap, loss_parts,
            b, b_pad, n_pad, row_tiles, col_tiles, split.groups, split.spans, loss_weight, **options,
        )  # fmt: skip
        return row_gap, col_gap, loss_parts

    def backward(
        self,
        left: Side,
        right: Side,
        pair: Tensor,
        reference: Tensor,
        has_pairs: bool,
        labels: Tensor | None,
        row_gap: Tensor,
        col_gap: Tensor,
        b: int,
        log_weight: float,
    ) -> Gradients:
        """Gradients of one block by all pairs that are not given.

        ``dL/dlogit = 2^(logit - row_lse - log_weight) + 2^(logit - col_lse - log_weight)``. A column that counts several times
        has the base-2 logarithm of its count taken off ``col_gap``.
        """
        b_pad, n_pad = len(left.time), len(right.time)
        options = _row_options(left.matrix.shape[1] // (2 if self.kind == SPLIT else 1))
        d_pad = options["D_PAD"]
        parts, depth = self.weight_parts, self.point_parts
        terms = [(i, j) for i in range(parts) for j in range(depth) if i + j < max(parts, depth)]
        tiles = tiles_for("weights", left.time.device)
        programs = processors(left.time.device) * tiles.per_sm
        blocks = [
            (rows, cols, split_tiles(_length(rows) // tiles.rows, _length(cols) // tiles.cols, programs))
            for rows, cols in _blocks(b_pad, n_pad, WORKSPACE // (2 * parts))
        ]
        row_slices = max(split.spans for *_, split in blocks)
        col_slices = max(split.groups for *_, split in blocks) * (tiles.rows // 16)
        sums = left.time.new_zeros(row_slices * b_pad + col_slices * n_pad + 2 * programs)
        row_sums, col_sums, totals = sums.split([row_slices * b_pad, col_slices * n_pad, 2 * programs])
        left_grad, right_grad = left.time.new_empty(b_pad, d_pad), left.time.new_empty(n_pad, d_pad)
        height, breadth = (max(_length(block[axis]) for block in blocks) for axis in (0, 1))
        workspace = left.matrix.new_empty(height * breadth * parts, dtype=torch.bfloat16)
        expanded = left.matrix.new_empty((height + breadth, depth * d_pad), dtype=torch.bfloat16) if self.kind else None
        for rows, cols, split in blocks:
            width = _length(cols) * parts
            weights = workspace[: _length(rows) * width].view(_length(rows), width)
            weights_kernel[(split.groups * split.spans,)](
                *self._tensors(left, right, tiles), pair, pair if labels is None else labels, self.curv, self.scale,
                row_gap, col_gap, reference, weights, row_sums, col_sums, totals,
                b, b_pad, n_pad, width, rows.start // tiles.rows, cols.start // tiles.cols,
                _length(rows) // tiles.rows, _length(cols) // tiles.cols,
                split.groups, split.row_span, split.col_span, programs, log_weight,
                PARTS=parts, **self._options(left, has_pairs, labels, tiles),
            )  # fmt: skip
            x, y = left.matrix[rows], right.matrix[cols]
            if expanded is not None:
                targets = expanded[: len(x)], expanded[len(x) : len(x) + len(y)]
                expand_kernel[((len(x) + len(y)) // options["ROWS"],)](
                    x, left.time[rows], y, right.time[cols], *targets, len(x), KIND=self.kind, PARTS=depth, **options
                )
                x, y = targets
            weights, x, y = weights.chunk(parts, 1), x.split(d_pad, 1), y.split(d_pad, 1)
            for i, j in terms:
                _add_product(left_grad[rows], weights[i], y[j], new=i + j + cols.start == 0)
                _add_product(right_grad[cols], weights[i].T, x[j], new=i + j + rows.start == 0)
        return Gradients(left_grad, right_grad, row_sums.view(-1, b_pad), col_sums.view(-1, n_pad), totals)

    def finish(
        self,
        image: Tensor,
        text: Tensor,
        labels: Tensor | None,
        left: Side,
        right: Side,
        pair: Tensor,
        reference: Tensor,
        row_gap: Tensor,
        col_gap: Tensor,
        tiles: Gradients,
        half_weight: float,
        upstream: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of image, text, curv and scale (fp32, 0-dim). Two launches.

        Everything that has one row per text is of this rank's own texts. ``half_weight``: 1 / (2 * pairs of the whole batch).
        """
        image, text = _row_contiguous(image), _row_contiguous(text)
        (b, width), n = image.shape, len(text)
        options = _row_options(width)
        row_programs = -(-b // options["ROWS"])
        text_programs = 0 if labels is None else -(-n // options["ROWS"])
        d_image = torch.empty(image.shape, dtype=image.dtype, device=image.device)
        d_text = torch.empty(text.shape, dtype=text.dtype, device=text.device)
        d_pair = d_image if labels is None else torch.empty_like(d_image)
        parts = row_gap.new_empty(2 * row_programs)
        d_curv, d_scale = row_gap.new_empty(()), row_gap.new_empty(())
        finish_kernel[(row_programs + text_programs,)](
            image, text, pair if labels is None else labels, left.time, right.time, pair, row_gap, col_gap, reference,
            tiles.left, tiles.right, tiles.row_sums, tiles.col_sums, self.curv, self.scale, upstream,
            d_image, d_text, d_pair, parts,
            b, n, len(left.time), len(right.time), image.stride(0), text.stride(0),
            len(tiles.row_sums), len(tiles.col_sums), row_programs, half_weight,
            LORENTZ=self.lorentz, LABELS=labels is not None, D=width, **options,
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

    def _options(self, left: Side, has_pairs: bool, labels: Tensor | None, tiles: Tiles) -> dict[str, Any]:
        return {
            "LORENTZ": self.lorentz,
            "KIND": self.kind,
            "PAIRS": has_pairs,
            "LABELS": labels is not None,
            "D_PAD": left.matrix.shape[1] // (2 if self.kind == SPLIT else 1),
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


def _row_options(width: int) -> dict[str, int]:
    """Launch options of the kernels that hold whole rows."""
    d_pad = _padded(width, PAD_D)
    block = triton.next_power_of_2(d_pad)
    return {"D_PAD": d_pad, "BLOCK_D": block, "ROWS": max(1, min(PAD, ROW_TILE // block)), "num_warps": 4}


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
