"""What surrounds the library's GEMM of many tokens, in Triton, and a weight's rows: weights are
expanded, activations halved, products scaled.

Who calls which, and in what sizes: `triton_products.py`. Layout: `planes.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sharding.kernels.planes import BLOCK, RUN, TILE
from sharding.kernels.triton_digits import _power
from sharding.kernels.triton_matmul import _byte, _integers, _largest, _unit

_RUN = tl.constexpr(RUN)
_BLOCK = tl.constexpr(BLOCK)
_TILE = tl.constexpr(TILE)


@triton.jit
def _finish(
    product, y, residual, factors, factor, cols, y_cols, COLUMNS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """`y = residual + product * factors[t] * factor`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < cols
    value = tl.load(product + row * cols + column, mask=there, other=0.0)
    value *= tl.load(factors + row)
    value *= factor
    if RESIDUAL:
        value = tl.load(residual + row * y_cols + column, mask=there, other=0.0) + value
    tl.store(y + row * y_cols + column, value, mask=there)


@triton.jit
def _spread(
    out, ids, low, high, scales, units, codes, first_row, rows, count, cols, blocks, factor,
    GATHER: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, PLACE: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr,
    MINIMUM: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """A block of `count` rows from `first_row` on, times `factor`, in the type of `out`.

    With GATHER the rows that `ids` name in a matrix where this part begins at `first_row`; those
    that are not in it are left alone."""
    at_O = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    block = tl.program_id(1)
    i = tl.arange(0, _RUN)
    there_O1 = (at_O < count)[:, None]
    if GATHER:
        row_O1 = tl.load(ids + at_O, mask=at_O < count, other=-1)[:, None] - first_row
        there_O1 = there_O1 & (row_O1 >= 0) & (row_O1 < rows)
    else:
        row_O1 = (first_row + at_O)[:, None]
    parts: tl.constexpr = _RUN // GROUP
    each: tl.constexpr = 2 if MINIMUM else 1
    words: tl.constexpr = 8 * parts * each // 4
    if SCALED:
        unit_O1 = tl.load(units + block * rows + row_O1, mask=there_O1, other=0)
        d_O1, m_O1 = _unit(unit_O1, PLACE, MINIMUM)
    # Where the 8 words of a row of a run are in a tile, in the order of `planes.py`.
    w = tl.arange(0, 8)
    at_OI = (row_O1 % 8 * 4 + (w % 4)[None, :]) * 4 + (w // 4 * 2)[None, :] + row_O1 % 16 // 8
    for k in tl.static_range(8):
        run = (row_O1 // _TILE * (blocks * LOW) + block * LOW + k * LOW // 8) * (_TILE * _RUN // 4)
        low_OI = tl.load(low + run + at_OI, mask=there_O1, other=0)
        high_OI = low_OI
        if HIGH > 0:
            run = row_O1 // _TILE * (blocks * HIGH) + block * HIGH + k * HIGH // 8
            at = high + run * (_TILE * _RUN // 4) + at_OI
            high_OI = tl.load(at, mask=there_O1, other=0)
        bytes = _integers(low_OI, high_OI, codes, k, LOW, HIGH, PLACE, CODED, ASM)
        q_OI = tl.reshape(bytes, [ROWS, _RUN]).to(tl.float32)
        if SCALED:
            byte_1I = ((i // GROUP + k * parts) * each)[None, :]
            at = (block * words + byte_1I // 4) * rows + row_O1
            word_OI = tl.load(scales + at, mask=there_O1, other=0)
            w_OI = (d_O1 * _byte(word_OI, byte_1I % 4, not MINIMUM).to(tl.float32)) * q_OI
            if MINIMUM:
                w_OI += m_O1 * _byte(word_OI, byte_1I % 4 + 1, False).to(tl.float32)
        else:
            unit_O1 = tl.load(units + (block * 8 + k) * rows + row_O1, mask=there_O1, other=0)
            d_O1, m_O1 = _unit(unit_O1, PLACE, MINIMUM)
            w_OI = d_O1 * q_OI
            if MINIMUM:
                w_OI += m_O1
        column = block * _BLOCK + k * _RUN + i
        tl.store(
            out + at_O[:, None] * cols + column[None, :],
            (w_OI * factor).to(out.dtype.element_ty),
            mask=there_O1 & (column < cols)[None, :],
        )


@triton.jit
def _halve(x, out, factors, cols, COLUMNS: tl.constexpr):
    """Rows as FP16, each times a power of two that brings its largest to [2^13, 2^14); `factors`
    undo it. Infinities and NaN stay what they are."""
    row = tl.program_id(0).to(tl.int64)
    up, down = _power(_largest(x + row * cols, cols, COLUMNS), 14)
    for first in range(0, cols, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        value = tl.load(x + row * cols + column, mask=column < cols, other=0.0) * up
        tl.store(out + row * cols + column, value.to(tl.float16), mask=column < cols)
    tl.store(factors + row, down)
