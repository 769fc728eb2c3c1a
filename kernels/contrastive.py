"""Contrastive loss (hyperbolic or cosine): both directions from one pass over tiles of logits, memory O(B).

Notation. ``A = 1 + a``, ``B = 1 + b``: time components on the unit hyperboloid. ``delta = a B + b - c <x, y>``, the
argument of arcosh less 1; ``measure = log2(1 + delta + sqrt(delta (delta + 2)))``; ``logit = gain * measure``, base 2,
so that every exponential is one ``exp2``. In cosine geometry ``measure = <x, y>``. ``G = dL / dlogit``,
``W = dL / d delta``.

Operands. Logits faithful to float32 from half-precision units: each row is scaled by a power of two and split into
``[hi | lo]`` in float16 (22 bits), walked as one product of length 3 D. float16 points need no low part; bfloat16
points, and all points at precision "medium", are bfloat16 operands as they are.

Forward, 4 launches
  prepare_kernel  one read of the points: operands, times, and the value of every given pair from its Lorentz chord.
  forward_kernel  one matrix pass. A program owns a group of row tiles and a span of column tiles, keeps row statistics
                  in registers and folds column sums into its own slices of a ``[groups * BM / 16, n]`` buffer. One
                  exponential per logit: a column's terms are the row's, rebased from row maximum to tile maximum.
  merge_kernel    joins the slices. A column so far below its tiles' maxima that terms may have underflowed is computed
                  again here, with its own exponentials.
  (a sum)         of the loss parts.
Statistics leave as log-sum-exp *less the logit of the row's (column's) own pair*: the loss is their mean, and next to
0, where training ends, they keep all their digits.

Backward, per block of at most ``WORKSPACE`` bytes of weights
  weights_kernel  makes the logits again and writes ``W`` without the given pairs in bfloat16, with ``sum_j W B``,
                  ``sum_i W A`` and the sums for curv and logit_scale. The first two are sums of the *rounded* weights:
                  so the rounding of W multiplies tangent vectors, which are short for close pairs, not the points.
                  In cosine geometry they are sums of what the rounding lost, for the row's own pair to make up:
                  so the rounding multiplies the difference from that pair.
  expand_kernel   the points of the block as sums of bfloat16 parts (float16 operands only).
  products        ``W Y`` and ``W^T X`` by cuBLAS, accumulated in float32: W in one part and the points in two ("high":
                  2 products each), both in three ("highest": 6), both in one ("medium").
then
  finish_kernel   adds the time terms and the given pairs and writes the gradients of the points.
  scalars_kernel  sums the parts of the gradients of curv and logit_scale.
Every sum has one owner or a fixed order: results are deterministic. Nothing here waits for the device.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

from .geometry import INTERPRET, asinh, chord, fast_log2, row_norm, shifted_time
from .tuning import TABLE, Tiles, processors, tiles_for

PAD = 128  # rows of an operand are padded to a multiple of this, components to a multiple of PAD_D
PAD_D = 64
WORKSPACE = 128 * 2**20  # bytes of weights alive at a time
ROW_TILE = 4096  # components a program of the row kernels holds
MERGE_ROWS = 64  # the merge kernel recomputes columns in lower tiles: it keeps more per logit
PLAIN, HALF, SPLIT = 0, 1, 2  # operands: bfloat16 as is; float16, scaled; float16 [hi | lo], scaled

if TYPE_CHECKING:
    from .resources import CompileSpec

_INTERPRET = tl.constexpr(INTERPRET)
_HALF = tl.constexpr(HALF)
_SPLIT = tl.constexpr(SPLIT)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_FLOOR = tl.constexpr(-1e30)  # below every logit, yet finite
_ABSENT = tl.constexpr(1e30)  # |time| of padding
_PRESENT = tl.constexpr(1e29)
_FAR = tl.constexpr(1e9)  # time of padding where it has to be finite: farther than any point, and its square still is
_LOST = tl.constexpr(5e-29)  # 2^-94: below it, a rebased column sum may miss terms that underflowed (2^-126)
_INF = tl.constexpr(float("inf"))


class Side(NamedTuple):
    """One operand of the logits, padded: rows to ``PAD``, components to ``PAD_D``."""

    matrix: Tensor  # [n_pad, d_pad] bf16 or fp16, or [n_pad, 2 d_pad] fp16 for [hi | lo]
    time: Tensor  # fp32 [n_pad], shifted time a (0 in cosine geometry); +-1e30 or inf marks padding
    scale: Tensor  # fp32 [n_pad], inverse of the row's scale


class Gradients(NamedTuple):
    """What the tiles add up for the last two kernels."""

    left: Tensor  # fp32 [b_pad, d_pad], W Y
    right: Tensor  # fp32 [n_pad, d_pad], W^T X
    row_sums: Tensor  # fp32 [slices, b_pad], sum_j W B
    col_sums: Tensor  # fp32 [slices, n_pad], sum_i W A
    parts: Tensor  # fp32 [2 * programs], sum G * (logit - reference), then sum G * (d logit / d log c)


@triton.jit
def to_bf16(x):
    """fp32 to the nearest bf16 (the interpreter's own conversion truncates)."""
    if _INTERPRET:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def fast_rsqrt(x):
    """1 / sqrt(x) in one instruction: no scaling of denormals."""
    if _INTERPRET:
        return tl.rsqrt(x)
    else:
        return libdevice.rsqrt(x)


@triton.jit
def fast_ratio(x, y):
    """x / y to two units in the last place."""
    if _INTERPRET:
        return x / y
    else:
        return libdevice.fast_dividef(x, y)


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
def _values(acc, a, b, row_scale, col_scale, c, LORENTZ: tl.constexpr):
    """delta of a tile, or the inner products. A padded column has inf (lorentz) or -inf (cosine)."""
    if LORENTZ:
        return a[:, None] * (1.0 + b)[None, :] + b[None, :] - acc * ((c * row_scale)[:, None] * col_scale[None, :])
    else:
        return acc * (row_scale[:, None] * col_scale[None, :]) + b[None, :]


@triton.jit
def _fast_measure(value, LORENTZ: tl.constexpr):
    """Absolute error 2^-22, enough for a logit; one log2 and one sqrt instruction."""
    if LORENTZ:
        value = tl.abs(value)  # below 0 it is rounding; an absolute value costs no instruction, a maximum would
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
def _load_rows(ptr, row, n, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Whole rows as fp32, zero beyond the matrix. [R] -> [R, BLOCK_D]"""
    k = tl.arange(0, BLOCK_D)
    inside = ((row >= 0) & (row < n))[:, None] & (k < D)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + k[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_operand(
    points, row, n, matrix, time, scales, c,
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
        hi = to_bf16(points)
        tl.store(target, hi, mask=inside)
        points = hi.to(tl.float32)  # times of the same points as the products, or delta would lose all digits
    if LORENTZ:
        shifted = tl.where(row < n, shifted_time(tl.sqrt_rn(c) * row_norm(points)), _ABSENT)
    else:
        shifted = tl.where(row < n, 0.0, -_INF)
    tl.store(time + row, shifted)
    tl.store(scales + row, inverse)


@triton.jit
def prepare_kernel(
    image, text, labels, curv, scale, left, left_time, left_scale, right, right_time, right_scale, pair,
    b, n, b_pad, image_stride, text_stride,
    LORENTZ: tl.constexpr, KIND: tl.constexpr, LABELS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Operands and times of both sides; value, logit and its rounding of the given pairs, ``pair`` [3, b_pad]."""
    start = tl.program_id(0) * ROWS
    c = tl.load(curv).to(tl.float32)
    if start < b_pad:
        row = start + tl.arange(0, ROWS)
        x = _load_rows(image, row, b, image_stride, D, BLOCK_D)
        _store_operand(x, row, b, left, left_time, left_scale, c, LORENTZ, KIND, D_PAD, BLOCK_D)
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
        _store_operand(y, row, n, right, right_time, right_scale, c, LORENTZ, KIND, D_PAD, BLOCK_D)


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
    left, right, row_time, col_time, row_scales, col_scales, pair, labels, curv, scale,
    row_max, row_sum, col_top, col_sum,
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
        a = tl.load(row_time + rows)
        row_scale = tl.load(row_scales + rows)
        if PAIRS:
            label, first, last = _label_range(labels, rows, b, LABELS)
            pair_value = tl.load(pair + rows)
        run_max = tl.full([BM], _FLOOR, tl.float32)
        run_sum = tl.zeros([BM], tl.float32)
        for col in range(col_start, col_end):
            acc = _inner_products(left, right, row, col, D_PAD, KIND, TMA, BM, BN, BK)
            cols = col * BN + tl.arange(0, BN)
            b_time = tl.load(col_time + cols)
            col_scale = tl.load(col_scales + cols)
            value = _values(acc, a, b_time, row_scale, col_scale, c, LORENTZ)
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
    left, right, row_time, col_time, row_scales, col_scales, pair, labels, c, gain, b, col, row_tiles,
    LORENTZ: tl.constexpr, KIND: tl.constexpr, PAIRS: tl.constexpr, LABELS: tl.constexpr, D_PAD: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of the columns of one tile over all rows, with their own exponentials."""
    cols = col * BN + tl.arange(0, BN)
    b_time = tl.load(col_time + cols)
    col_scale = tl.load(col_scales + cols)
    run_max = tl.full([BN], _FLOOR, tl.float32)
    run_sum = tl.zeros([BN], tl.float32)
    for row in range(row_tiles):
        rows = row * BM + tl.arange(0, BM)
        a = tl.load(row_time + rows)
        row_scale = tl.load(row_scales + rows)
        acc = _inner_products(left, right, row, col, D_PAD, KIND, TMA, BM, BN, BK)
        value = _values(acc, a, b_time, row_scale, col_scale, c, LORENTZ)
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
    left, right, row_time, col_time, row_scales, col_scales, pair, labels, curv, scale,
    row_max, row_sum, col_top, col_sum,
    reference, counts, row_gap, col_gap, loss_parts,
    b, b_pad, n_pad, row_tiles, col_tiles, groups, spans, loss_weight,
    LORENTZ: tl.constexpr, KIND: tl.constexpr, PAIRS: tl.constexpr, LABELS: tl.constexpr, D_PAD: tl.constexpr,
    SLICES: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exps less the reference logits (0 for padding), and each tile's part of the loss."""
    program = tl.program_id(0)
    gain = _gain(curv, scale, LORENTZ)
    if program < col_tiles:
        cols = program * BN + tl.arange(0, BN)
        present = tl.abs(tl.load(col_time + cols)) < _PRESENT
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
                left, right, row_time, col_time, row_scales, col_scales, pair, labels,
                tl.load(curv).to(tl.float32), gain, b, program,
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
        real = rows < b
        row_peak = tl.full([BM], _FLOOR, tl.float32)
        row_total = tl.zeros([BM], tl.float32)
        for span in range(spans):
            row_slot = tl.cast(b_pad, tl.int64) * span + rows
            part_max = tl.load(row_max + row_slot)
            new_max = tl.maximum(row_peak, part_max)
            row_total = row_total * tl.exp2(row_peak - new_max)
            row_total += tl.load(row_sum + row_slot) * tl.exp2(part_max - new_max)
            row_peak = new_max
        row_own = tl.load(pair + b_pad + rows)
        row_gaps = tl.where(real, (row_peak - row_own) + tl.log2(tl.where(real, row_total, 1.0)), 0.0)
        tl.store(row_gap + rows, row_gaps)
        row_gaps = tl.where(real, row_gaps - tl.load(pair + 2 * b_pad + rows), 0.0)
        tl.store(loss_parts + program, tl.sum(row_gaps) * tl.cast(loss_weight, tl.float32))


@triton.jit
def _store_parts(value, target, stride, inside, PARTS: tl.constexpr):
    """fp32 as a sum of bf16 parts, ``stride`` apart."""
    for part in tl.static_range(PARTS):
        rounded = to_bf16(value)
        tl.store(target + part * stride, rounded, mask=inside)
        value -= rounded.to(tl.float32)


@triton.jit
def _halves(tile):
    """The left and the right half of a tile's columns."""
    rows: tl.constexpr = tile.shape[0]
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, [rows, 2, half]), [0, 2, 1]))


@triton.jit
def weights_kernel(
    left, right, row_time, col_time, row_scales, col_scales, pair, labels, curv, scale,
    row_gap, col_gap, reference, weights, row_sums, col_sums, parts,
    b, b_pad, n_pad, width, row_first, col_first, row_tiles, col_tiles, groups, row_span, col_span, programs,
    log_weight,
    LORENTZ: tl.constexpr, KIND: tl.constexpr, PAIRS: tl.constexpr, LABELS: tl.constexpr, PARTS: tl.constexpr,
    D_PAD: tl.constexpr, TMA: tl.constexpr, HALVES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """W of the block of tiles that starts at tile (row_first, col_first), as a sum of bf16 PARTS side by side."""
    HALF_N: tl.constexpr = BN // HALVES
    program = tl.program_id(0)
    group = program % groups
    span = program // groups
    c = tl.load(curv).to(tl.float32)
    gain = _gain(curv, scale, LORENTZ)
    half_gain = 0.5 * _LN2 * gain
    offset = tl.cast(log_weight, tl.float32)
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
        a = tl.where(row_present, a, _FAR)
        row_scale = tl.load(row_scales + rows)
        row_slope = 0.5 * fast_ratio(a, 1.0 + a)
        row_logit = tl.load(pair + b_pad + rows)
        row_shift = tl.where(row_present, tl.load(row_gap + rows) + offset, _INF)
        if PAIRS:
            label, _, _ = _label_range(labels, rows, b, LABELS)
        gain_row = tl.zeros([BM], tl.float32)
        curv_row = tl.zeros([BM], tl.float32)
        row_sum = tl.zeros([BM], tl.float32)
        for col in range(col_start, col_end):
            acc = _inner_products(left, right, row, col, D_PAD, KIND, TMA, BM, BN, BK)
            for half in tl.static_range(HALVES):
                if HALVES == 1:
                    products = acc
                elif half == 0:
                    products, rest = _halves(acc)  # half as many column vectors alive at a time: nothing spills
                else:
                    products = rest
                start = col * BN + half * HALF_N
                cols = start + tl.arange(0, HALF_N)
                b_time = tl.load(col_time + cols)
                col_present = tl.abs(b_time) < _PRESENT
                b_time = tl.where(col_present, b_time, _FAR if LORENTZ else -_FAR)
                value = _values(products, a, b_time, row_scale, tl.load(col_scales + cols), c, LORENTZ)
                if LORENTZ:
                    value = tl.abs(value)
                    square = value * (value + 2.0)
                    # coinciding points have no direction
                    inverse = tl.where(square > 1e-37, fast_rsqrt(tl.maximum(square, 1e-37)), 0.0)
                    sinh = square * inverse
                    measure = fast_log2(1.0 + value + sinh)
                    if KIND != 0:  # log2 loses digits next to 1, where the series of asinh converges
                        near = 1.0 + square * (-1 / 6 + square * (3 / 40 + square * (-5 / 112 + square * (35 / 1152))))
                        measure = tl.where(square < 0.04, sinh * near * _LOG2E, measure)
                else:
                    measure = value
                if PAIRS:  # infinitely unlike: no weight, and not a part of any sum
                    own = (label - start)[:, None] == tl.arange(0, HALF_N)[None, :]
                    measure = tl.where(own, _FAR if LORENTZ else -_FAR, measure)
                # twice two differences: the first is nearly exact, as both terms are of one size
                col_logit = tl.load(reference + cols, mask=col_present, other=0.0)
                col_shift = tl.where(col_present, tl.load(col_gap + cols) + offset, _INF)
                to_row = tl.fma(measure, gain, -row_logit[:, None])
                to_col = tl.fma(measure, gain, -col_logit[None, :])
                grad = tl.exp2(to_row - row_shift[:, None]) * tl.where(col_present, 1.0, 0.0)[None, :]
                col_grad = tl.exp2(to_col - col_shift[None, :])
                gain_row += tl.sum(grad * to_row + col_grad * to_col, axis=1)
                grad += col_grad
                if not LORENTZ:
                    grad = tl.where(row_present[:, None], grad, 0.0)
                if LORENTZ:
                    weight = (grad * gain) * inverse
                    gap = a[:, None] - b_time[None, :]
                    slope_gap = row_slope[:, None] - (0.5 * fast_ratio(b_time, 1.0 + b_time))[None, :]
                    # both ways c enters a logit, term by term: next to the root they cancel
                    curv_row += tl.sum(weight * (value - gap * slope_gap) - (grad * half_gain) * measure, axis=1)
                else:
                    weight = grad * (gain * _LN2)
                total = tl.zeros([BM, HALF_N], tl.float32)  # of the rounded parts; weight keeps what they lose
                for part in tl.static_range(PARTS):
                    rounded = to_bf16(weight)
                    at_row = (row - row_first) * BM
                    at_col = (col - col_first) * BN + half * HALF_N + part * (width // PARTS)
                    if TMA:
                        weights.store([at_row, at_col], rounded)
                    else:
                        target = weights + (at_row + tl.arange(0, BM)).to(tl.int64)[:, None] * width
                        tl.store(target + (at_col + tl.arange(0, HALF_N))[None, :], rounded)
                    weight -= rounded.to(tl.float32)
                    total = rounded.to(tl.float32) if PARTS == 1 else total + rounded.to(tl.float32)
                if LORENTZ:
                    row_sum += tl.sum(total * tl.where(col_present, 1.0 + b_time, 0.0)[None, :], axis=1)
                    _add_columns(col_sums, total * tl.where(row_present, 1.0 + a, 0.0)[:, None], group, n_pad, cols)
                elif PARTS == 1:
                    row_sum += tl.sum(weight, axis=1)
                    _add_columns(col_sums, weight, group, n_pad, cols)
            tl.debug_barrier()  # the slices of column sums are read again at the next row
        gain_part += tl.where(row_present, gain_row, 0.0)
        curv_part += tl.where(row_present, curv_row, 0.0)
        if LORENTZ or PARTS == 1:
            slot = row_sums + tl.cast(b_pad, tl.int64) * span + rows
            tl.store(slot, tl.load(slot) + row_sum)
    tl.store(parts + program, tl.load(parts + program) + tl.sum(gain_part))
    tl.store(parts + programs + program, tl.load(parts + programs + program) + tl.sum(curv_part))


@triton.jit
def _add_columns(target, values, group, stride, cols):
    """Add sums over every 16 rows of a tile to this group's slices."""
    slices: tl.constexpr = values.shape[0] // 16
    sums = tl.sum(tl.reshape(values, [slices, 16, values.shape[1]]), axis=1)
    slot = target + (tl.cast(stride, tl.int64) * (group * slices + tl.arange(0, slices)))[:, None] + cols[None, :]
    tl.store(slot, tl.load(slot) + sums)


@triton.jit
def expand_kernel(
    left, left_scale, right, right_scale, out_left, out_right, rows,
    KIND: tl.constexpr, PARTS: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """float16 operands -> points as sums of bf16 PARTS, for the gradient products. ``rows`` of left, then right."""
    start = tl.program_id(0) * ROWS
    if start < rows:
        _expand(left, left_scale, out_left, start, KIND, PARTS, D_PAD, ROWS, BLOCK_D)
    else:
        _expand(right, right_scale, out_right, start - rows, KIND, PARTS, D_PAD, ROWS, BLOCK_D)


@triton.jit
def _expand(
    matrix, scales, out, start,
    KIND: tl.constexpr, PARTS: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = start + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_D)
    inside = (k < D_PAD)[None, :]
    source = matrix + row.to(tl.int64)[:, None] * (D_PAD * (2 if KIND == _SPLIT else 1)) + k[None, :]
    points = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    if KIND == _SPLIT:
        points += tl.load(source + D_PAD, mask=inside, other=0.0).to(tl.float32)
    points *= tl.load(scales + row)[:, None]
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
    LORENTZ: tl.constexpr, KIND: tl.constexpr, LABELS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of the points: products, time terms, given pairs. With LABELS the pairs' text part goes to d_pair."""
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
        to_row = tl.load(pair + 2 * b_pad + row)
        to_col = to_row - (tl.load(reference + partner, mask=real, other=0.0) - tl.load(pair + b_pad + row))
        row_grad = tl.exp2(to_row - tl.load(row_gap + row)) - 1.0
        col_grad = tl.exp2(to_col - tl.load(col_gap + partner, mask=real, other=0.0)) - 1.0
        present = tl.where(real, tl.cast(half_weight, tl.float32), 0.0)
        pair_grad = (row_grad + col_grad) * present
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
                (_sum_slices(row_sums, row, b_pad, row_slices) / time_x)[:, None] * _multiplied(x, KIND)
                - wy
                + weight[:, None] * (gap - (a_minus_b / time_x)[:, None] * x)
            )
            dy = (c * weight)[:, None] * ((a_minus_b / time_y)[:, None] * y - gap)
            curv_part = weight * (value - 0.5 * (a_minus_b / time_x) * (a_minus_b / time_y))
            curv_part -= 0.5 * _LN2 * pair_grad * gain * measure
            curv_part = tl.where(real, curv_part, 0.0)
        else:
            weight = pair_grad * gain * _LN2
            # what the rounded weights lack goes to the row's (column's) own pair, the likeliest near-duplicate
            dx = wy + (weight + _sum_slices(row_sums, row, b_pad, row_slices))[:, None] * y
            dy = (weight + _sum_slices(col_sums, partner, n_pad, col_slices))[:, None] * x
            curv_part = tl.zeros([ROWS], tl.float32)
        inside = real[:, None] & inside_d
        target = row.to(tl.int64)[:, None] * D + k[None, :]
        _store_gradient(d_image + target, dx * grad_scale, inside)
        if LABELS:
            _store_gradient(d_pair + target, dy * grad_scale, inside)
        else:
            dy += _tile_gradient(
                right_grad, col_sums, col_time, y, row, n, n_pad, col_slices, c, LORENTZ, KIND, D, D_PAD, BLOCK_D
            )
            _store_gradient(d_text + target, dy * grad_scale, inside)
        # the tiles' sums are relative to the rounded logit of the pair: here is its full one
        shift = tl.fma(measure, gain, -tl.load(pair + b_pad + row)) - to_row
        tl.store(parts + program, tl.sum((row_grad * (to_row + shift) + col_grad * (to_col + shift)) * present))
        tl.store(parts + row_programs + program, tl.sum(curv_part))
    else:
        row = (program - row_programs) * ROWS + tl.arange(0, ROWS)
        y = _load_rows(text, row, n, text_stride, D, BLOCK_D)
        dy = _tile_gradient(
            right_grad, col_sums, col_time, y, row, n, n_pad, col_slices, c, LORENTZ, KIND, D, D_PAD, BLOCK_D
        )
        target = row.to(tl.int64)[:, None] * D + k[None, :]
        _store_gradient(d_text + target, dy * grad_scale, (row < n)[:, None] & inside_d)


@triton.jit
def _multiplied(points, KIND: tl.constexpr):
    """The points that the products were made of: a coinciding pair must have no tangent."""
    return to_bf16(points).to(tl.float32) if KIND == 0 else points


@triton.jit
def _tile_gradient(
    right_grad, col_sums, col_time, y, row, n, n_pad, slices, c,
    LORENTZ: tl.constexpr, KIND: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of texts by all pairs that are not given: c (sum_i W A / B y - W^T X)."""
    wx = _load_rows(right_grad, row, n, D_PAD, D, BLOCK_D)
    if LORENTZ:
        time = 1.0 + tl.load(col_time + row, mask=row < n, other=0.0)
        return c * ((_sum_slices(col_sums, row, n_pad, slices) / time)[:, None] * _multiplied(y, KIND) - wx)
    else:
        return wx


@triton.jit
def _store_gradient(ptr, value, inside):
    if ptr.dtype.element_ty == tl.bfloat16:
        tl.store(ptr, to_bf16(value), mask=inside)
    else:
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
    gain_grad = tl.sum(gain_sum) * _LN2 * tl.load(upstream).to(tl.float32)
    curv_grad = tl.sum(curv_sum) * tl.load(upstream).to(tl.float32)
    tl.store(d_scale, gain_grad / tl.load(scale).to(tl.float32))
    if LORENTZ:
        tl.store(d_curv, curv_grad / tl.load(curv).to(tl.float32))
    else:
        tl.store(d_curv, 0.0)


class Split(NamedTuple):
    """Shares of programs: ``groups`` runs of ``row_span`` row tiles, ``spans`` runs of ``col_span`` columns."""

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
        self._forward_name = "forward" if self.lorentz else "forward_cosine"
        self._weights_name = "weights" if self.weight_parts == 1 else "weights_highest"

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
        return Side(matrix, *(like.new_empty(rows, dtype=torch.float32) for _ in range(2)))

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
            log-sum-exp less the pair's logit of rows ``[b_pad]``, less the reference of columns ``[n_pad]``, 0 padded;
            and parts whose sum is ``loss_weight`` times their sum.
        """
        key = len(left.time), len(right.time), left.matrix.shape[1], self.kind, self.lorentz

        def run(tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
            return self._forward(tiles, left, right, pair, reference, has_pairs, labels, counts, b, loss_weight)

        return run(tiles_for(self._forward_name, left.time.device, key, run))

    def _forward(
        self,
        tiles: Tiles,
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
        b_pad, n_pad = len(left.time), len(right.time)
        row_tiles, col_tiles = -(-b // tiles.rows), n_pad // tiles.cols
        split = split_tiles(row_tiles, col_tiles, processors(left.time.device) * tiles.per_sm)
        row_max, row_sum = left.time.new_empty(2, split.spans, b_pad).unbind()
        col_sum = left.time.new_empty(split.groups * (tiles.rows // 16), n_pad)
        col_top = left.time.new_empty(split.groups, col_tiles)
        row_gap, col_gap = left.time.new_empty(b_pad), left.time.new_empty(n_pad)
        loss_parts = left.time.new_empty(b_pad // MERGE_ROWS + col_tiles)
        statistics = row_max, row_sum, col_top, col_sum
        tensors = *self._tensors(left, right, tiles), pair, pair if labels is None else labels, self.curv, self.scale
        options = self._options(left, has_pairs, labels, tiles)
        forward_kernel[(split.groups * split.spans,)](
            *tensors, *statistics, b, b_pad, n_pad, row_tiles, col_tiles, split.groups, split.row_span, split.col_span,
            **options, **_register_limit(tiles, has_pairs),
        )  # fmt: skip
        slices, lower = tiles.rows // 16, replace(tiles, rows=MERGE_ROWS)
        tensors = *self._tensors(left, right, lower), *tensors[6:]
        merge_tiles = b_pad // lower.rows
        merge_kernel[(merge_tiles + col_tiles,)](
            *tensors, *statistics, reference, reference if counts is None else counts, row_gap, col_gap, loss_parts,
            b, b_pad, n_pad, merge_tiles, col_tiles, split.groups, split.spans, loss_weight,
            SLICES=slices, **self._options(left, has_pairs, labels, lower),
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

        ``dL/dlogit = 2^(logit - row_lse - log_weight) + 2^(logit - col_lse - log_weight)``.
        A column that counts several times has the base-2 logarithm of its count taken off ``col_gap``.
        """
        key = len(left.time), len(right.time), left.matrix.shape[1], self.kind, self.lorentz, self.weight_parts

        def run(tiles: Tiles) -> Gradients:
            return self._backward(
                tiles, left, right, pair, reference, has_pairs, labels, row_gap, col_gap, b, log_weight
            )

        return run(tiles_for(self._weights_name, left.time.device, key, run))

    def _backward(
        self,
        tiles: Tiles,
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
        b_pad, n_pad = len(left.time), len(right.time)
        options = _row_options(left.matrix.shape[1] // (2 if self.kind == SPLIT else 1))
        d_pad = options["D_PAD"]
        parts, depth = self.weight_parts, self.point_parts
        terms = [(i, j) for i in range(parts) for j in range(depth) if i + j < max(parts, depth)]
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
            target = (
                TensorDescriptor.from_tensor(weights, [tiles.rows, tiles.cols // tiles.halves])
                if tiles.tma
                else weights
            )
            weights_kernel[(split.groups * split.spans,)](
                *self._tensors(left, right, tiles), pair, pair if labels is None else labels, self.curv, self.scale,
                row_gap, col_gap, reference, target, row_sums, col_sums, totals,
                b, b_pad, n_pad, width, rows.start // tiles.rows, cols.start // tiles.cols,
                _length(rows) // tiles.rows, _length(cols) // tiles.cols,
                split.groups, split.row_span, split.col_span, programs, log_weight,
                PARTS=parts, HALVES=tiles.halves, **self._options(left, has_pairs, labels, tiles),
            )  # fmt: skip
            x, y = left.matrix[rows], right.matrix[cols]
            if expanded is not None:
                targets = expanded[: len(x)], expanded[len(x) : len(x) + len(y)]
                expand_kernel[((len(x) + len(y)) // options["ROWS"],)](
                    x,
                    left.scale[rows],
                    y,
                    right.scale[cols],
                    *targets,
                    len(x),
                    KIND=self.kind,
                    PARTS=depth,
                    **options | {"num_warps": 8},
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

        What has one row per text is of this rank's own texts. ``half_weight``: 1 / (2 * pairs of the whole batch).
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
        if labels is not None and not self.lorentz:  # a text's correction is shared by its images
            counts = torch.zeros_like(tiles.col_sums[0]).scatter_add(0, labels, row_gap.new_ones(b))
            tiles.col_sums.div_(counts.clamp_min(1))
        finish_kernel[(row_programs + text_programs,)](
            image, text, pair if labels is None else labels, left.time, right.time, pair, row_gap, col_gap, reference,
            tiles.left, tiles.right, tiles.row_sums, tiles.col_sums, self.curv, self.scale, upstream,
            d_image, d_text, d_pair, parts,
            b, n, len(left.time), len(right.time), image.stride(0), text.stride(0),
            len(tiles.row_sums), len(tiles.col_sums), row_programs, half_weight,
            LORENTZ=self.lorentz, KIND=self.kind, LABELS=labels is not None, D=width, **options,
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
        return *matrices, left.time, right.time, left.scale, right.scale

    def _specs(self, capability: int, arch: str, pairs: bool) -> "list[CompileSpec]":
        """Entries of the tile kernels for one architecture."""
        found = []
        kind = "bf16" if self.kind == PLAIN else "fp16"
        variant = f"{'lorentz' if self.lorentz else 'cosine'},{self.precision}{',pairs' if pairs else ''}"
        names = (
            (forward_kernel, self._forward_name),
            (merge_kernel, self._forward_name),
            (weights_kernel, self._weights_name),
        )
        for kernel, name in names:
            tiles = TABLE[name, capability][0]
            extra = {"PARTS": self.weight_parts, "HALVES": tiles.halves} if kernel is weights_kernel else {}
            if kernel is merge_kernel:
                extra = {"SLICES": tiles.rows // 16}
                tiles = replace(tiles, rows=MERGE_ROWS)
            types = {"left": f"*{kind}", "right": f"*{kind}", "weights": "*bf16"}
            if tiles.tma:
                types = {
                    "left": f"tensordesc<{kind}[{tiles.rows},{tiles.inner}]>",
                    "right": f"tensordesc<{kind}[{tiles.cols},{tiles.inner}]>",
                    "weights": f"tensordesc<bf16[{tiles.rows},{tiles.cols // tiles.halves}]>",
                }
            spec = _spec(kernel, variant, types, self._constants(512, pairs, False, tiles) | extra, tiles, arch)
            if kernel is forward_kernel:
                spec = replace(spec, **_register_limit(tiles, pairs))
            elif kernel is merge_kernel:
                spec = replace(spec, outputs=0)
            found.append(spec)
        return found

    def _constants(self, d_pad: int, has_pairs: bool, has_labels: bool, tiles: Tiles) -> dict[str, Any]:
        return {
            "LORENTZ": self.lorentz,
            "KIND": self.kind,
            "PAIRS": has_pairs,
            "LABELS": has_labels,
            "D_PAD": d_pad,
            "TMA": tiles.tma,
            "BM": tiles.rows,
            "BN": tiles.cols,
            "BK": tiles.inner,
        }

    def _options(self, left: Side, has_pairs: bool, labels: Tensor | None, tiles: Tiles) -> dict[str, Any]:
        d_pad = left.matrix.shape[1] // (2 if self.kind == SPLIT else 1)
        launch = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}
        return self._constants(d_pad, has_pairs, labels is not None, tiles) | launch


def _register_limit(tiles: Tiles, has_pairs: bool) -> dict[str, int]:
    """Without pairs the forward kernel fits two programs on an SM only when told to."""
    return {"maxnreg": 128} if tiles.tma and tiles.per_sm == 2 and tiles.warps == 8 and not has_pairs else {}


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


def compile_specs() -> "list[CompileSpec]":
    """What ``resources`` compiles: D = 512 in every precision and geometry, with and without pairs in the block."""
    variants = [  # geometry, precision, points, pairs in the block
        (True, "high", torch.float32, True),
        (True, "high", torch.float32, False),
        (True, "highest", torch.float32, True),
        (True, "medium", torch.float32, True),
        (False, "high", torch.float32, True),
        (False, "medium", torch.float32, True),
    ]
    found = []
    for capability, arch in ((8, "sm_80"), (9, "sm_90"), (10, "sm_100")):
        for lorentz, precision, dtype, pairs in variants:
            engine = TritonEngine("lorentz" if lorentz else "cosine", precision, dtype, None, None)
            found += engine._specs(capability, arch, pairs)
    return found + _row_specs()


def _spec(
    kernel: Any, variant: str, dtypes: dict[str, str], constants: dict[str, Any], tiles: Tiles | None, arch: str | None
) -> "CompileSpec":
    """An entry; arguments not named in ``dtypes`` are fp32 pointers, sizes i32, weights fp32."""
    from .resources import ARCHITECTURES, CompileSpec

    sizes = {"b", "n", "groups", "spans", "programs", "width", "rows", "row_slices", "col_slices", "row_programs"}
    sizes |= {"b_pad", "n_pad", "row_tiles", "col_tiles", "row_span", "col_span", "row_first", "col_first"}
    sizes |= {"image_stride", "text_stride", "tile_programs", "pair_programs"}
    factors = {"loss_weight", "log_weight", "half_weight"}
    signature = {}
    for name in kernel.arg_names:
        if name not in constants:
            default = "i32" if name in sizes else "fp32" if name in factors else "*fp32"
            signature[name] = dtypes.get(name, default)
    aligned = {"b_pad", "n_pad", "width", "image_stride", "text_stride"}
    pointers = (
        name for name, kind in signature.items() if kind[0] == "*" and name not in ("curv", "scale", "upstream")
    )
    return CompileSpec(
        name=f"{kernel.__name__.removesuffix('_kernel')}[{variant}]",
        kernel=kernel,
        signature=signature,
        constexprs=constants,
        divisible=(*pointers, *(name for name in signature if name in aligned)),
        num_warps=tiles.warps if tiles else 4,
        num_stages=tiles.stages if tiles else 3,
        outputs=tiles.rows * tiles.cols if tiles else 0,
        architectures=(arch,) if arch else tuple(ARCHITECTURES),
    )


def _row_specs() -> "list[CompileSpec]":
    options = _row_options(512)
    options.pop("num_warps")
    rows = {"D": 512, **options, "LORENTZ": True, "LABELS": False}
    return [
        _spec(
            prepare_kernel, "contrastive,high", {"left": "*fp16", "right": "*fp16"}, rows | {"KIND": SPLIT}, None, None
        ),
        _spec(finish_kernel, "contrastive", {}, rows | {"KIND": SPLIT}, None, None),
        replace(
            _spec(
                expand_kernel,
                "contrastive,high",
                {"left": "*fp16", "right": "*fp16", "out_left": "*bf16", "out_right": "*bf16"},
                {"KIND": SPLIT, "PARTS": 2, **options},
                None,
                None,
            ),
            num_warps=8,
        ),
        _spec(scalars_kernel, "contrastive", {}, {"LORENTZ": True, "BLOCK": 1024}, None, None),
    ]
