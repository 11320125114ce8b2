"""The Triton kernels of products with weights in planes, and of their rows.

    T tokens, I inputs, O outputs, N columns of prepared activations, B blocks of a row

Who calls which, and in what sizes: `triton_products.py`. Layout: `planes.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sharding.kernels.planes import FLOAT_COLUMNS, WORDS

_WORDS = tl.constexpr(WORDS)
_FLOAT_COLUMNS = tl.constexpr(FLOAT_COLUMNS)
_FP16_1024 = tl.constexpr(0x6400)


@triton.jit
def _fp16(bits):
    """The number whose bits are the lowest 16."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _shifted(bits, left: tl.constexpr):
    """Shifted left, or right where `left` is negative."""
    return bits << left if left >= 0 else bits >> -left


@triton.jit
def _integers(
    word, upper, codes, j: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    OFFSET: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """Field j of each word, less the offset, FP16, exact, and times 2^place: where it lies in its
    byte it need not be shifted. As the last bits of 1024 it needs no conversion either."""
    # What Triton compiles has one `return`: what followed another would be compiled as well.
    if CODED:
        values = tl.load(codes + ((word >> (j * LOW)) & ((1 << LOW) - 1))).to(tl.float16)
    else:
        byte = word >> (j * LOW // 8 * 8)
        q = byte & (((1 << LOW) - 1) << (j * LOW % 8))
        if HIGH > 0:
            high = _shifted(upper, j * LOW % 8 + LOW - j * HIGH)
            q |= high & (((1 << HIGH) - 1) << (j * LOW % 8 + LOW))
        values = _fp16(q | _FP16_1024) - (1024.0 + (OFFSET << (j * LOW % 8)))
    return values


@triton.jit
def _unplaced(j: tl.constexpr, LOW: tl.constexpr, CODED: tl.constexpr):
    """What undoes the place of field j."""
    return 1.0 if CODED else 1.0 / (1 << (j * LOW % 8))


@triton.jit
def _unit(units, at, mask, MINIMUM: tl.constexpr):
    """d and m of units, float32 (d twice if there is no m)."""
    bits = tl.load(units + at, mask=mask, other=0)
    if MINIMUM:
        d, m = _fp16(bits).to(tl.float32), _fp16(bits >> 16).to(tl.float32)
    else:
        d = bits.to(tl.float32)
        m = d
    return d, m


@triton.jit
def _group(scales, at, d, m, mask, SCALED: tl.constexpr, MINIMUM: tl.constexpr):
    """What multiplies and what is added in groups, float32, exact."""
    scale, minimum = d, m
    if SCALED:
        both = tl.load(scales + at, mask=mask, other=0)
        if MINIMUM:
            scale = d * (both & 255).to(tl.float32)
            minimum = m * (both >> 8).to(tl.float32)
        else:
            scale = d * both.to(tl.float32)
    return scale, minimum


@triton.jit
def _raised(largest):
    """The power of two that brings a positive number to [2^13, 2^14), and its inverse."""
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    raised = tl.minimum(tl.maximum(267 - exponent, 1), 253)
    up = (raised << 23).to(tl.float32, bitcast=True)
    return up, ((254 - raised) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _largest(x, cols, COLUMNS: tl.constexpr):
    """Of a row's absolute values, a NaN left aside."""
    largest = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, cols, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        largest = tl.maximum(largest, tl.abs(tl.load(x + column, mask=column < cols, other=0.0)))
    return tl.max(largest, axis=0)


@triton.jit
def _prepare(
    x, halves, sums, factors, tokens, cols, padded, N: tl.constexpr, GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Token t's activations, scaled, as two FP16 numbers: `halves` `[padded, N]`, the upper ones in
    column t, the lower ones in column N / 2 + t; `sums` `[padded / GROUP, N]` of groups. Columns
    of no token are zeros."""
    t = tl.program_id(0)
    row = x + t.to(tl.int64) * cols
    there = tl.where(t < tokens, cols, 0)
    up, down = _raised(_largest(row, there, COLUMNS))
    for first in range(0, padded, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        value = tl.load(row + column, mask=column < there, other=0.0) * up
        upper = value.to(tl.float16)
        lower = (value - upper.to(tl.float32)).to(tl.float16)
        tl.store(halves + column * N + t, upper, mask=column < padded)
        tl.store(halves + column * N + N // 2 + t, lower, mask=column < padded)
        group = first // GROUP + tl.arange(0, COLUMNS // GROUP)
        total = tl.sum(tl.reshape(value, [COLUMNS // GROUP, GROUP]), axis=1)
        tl.store(sums + group * N + t, total, mask=group * GROUP < padded)
        tl.store(sums + group * N + N // 2 + t, total * 0.0, mask=group * GROUP < padded)
    tl.store(factors + t, down)


@triton.jit
def _store_cut(y, y_ON, cut, row_O, rows, N: tl.constexpr, ROWS: tl.constexpr):
    """`y[cut, t, o]`: what the upper and the lower halves of a token's activations made."""
    y_OT = tl.sum(tl.reshape(y_ON, [ROWS, 2, N // 2]), axis=1)
    t = tl.arange(0, N // 2)
    to = y + (cut * (N // 2) + t)[None, :] * rows + row_O[:, None]
    tl.store(to, y_OT, mask=(row_O < rows)[:, None])


@triton.jit
def _few(
    halves, sums, y, low, high, scales, units, codes, rows, blocks, cuts, N: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    OFFSET: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, SCALED: tl.constexpr,
    MINIMUM: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """A cut of some rows' product, `y[cut, t, o]`, float32, in the activations' scale."""
    row_O = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    cut = tl.program_id(1)
    n = tl.arange(0, N)
    w = tl.arange(0, GROUP)
    there_O = row_O < rows
    length = tl.cdiv(blocks, cuts)
    y_ON = tl.zeros([ROWS, N], tl.float32)
    for block in range(cut * length, tl.minimum(blocks, (cut + 1) * length)):
        base = block * (_WORDS * COLUMNS)
        d_O, m_O = _unit(units, row_O * (blocks * (_WORDS * COLUMNS) // UNIT) + base // UNIT,
                         there_O, MINIMUM)  # fmt: skip
        for part in tl.static_range(_WORDS // GROUP):
            at = (row_O * blocks + block)[:, None] * _WORDS + (w + part * GROUP)[None, :]
            word = tl.load(low + at, mask=there_O[:, None], other=0).to(tl.int32)
            upper = word
            if HIGH > 0:
                upper = tl.load(high + at, mask=there_O[:, None], other=0).to(tl.int32)
            for j in tl.static_range(COLUMNS):
                first = base + j * _WORDS + part * GROUP
                if UNIT == _WORDS:
                    d_O, m_O = _unit(
                        units, row_O * (blocks * COLUMNS) + block * COLUMNS + j, there_O, MINIMUM
                    )
                group_O = row_O * (blocks * (_WORDS * COLUMNS) // GROUP) + first // GROUP
                scale_O, minimum_O = _group(scales, group_O, d_O, m_O, there_O, SCALED, MINIMUM)
                q_OI = _integers(word, upper, codes, j, LOW, HIGH, OFFSET, CODED)
                x_IN = tl.load(halves + (w + first)[:, None] * N + n[None, :])
                met_ON = tl.dot(q_OI, x_IN)
                y_ON += (scale_O * _unplaced(j, LOW, CODED))[:, None] * met_ON
                if MINIMUM:
                    y_ON += minimum_O[:, None] * tl.load(sums + first // GROUP * N + n)[None, :]
    _store_cut(y, y_ON, cut, row_O, rows, N, ROWS)


@triton.jit
def _few_floats(
    halves, y, low, rows, blocks, cuts, factor, N: tl.constexpr, ROWS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """The same of a matrix of floats, times `factor`; two FP16 numbers each unless EXACT."""
    row_O = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    cut = tl.program_id(1)
    n = tl.arange(0, N)
    i = tl.arange(0, _FLOAT_COLUMNS)
    there_O = row_O < rows
    length = tl.cdiv(blocks, cuts)
    y_ON = tl.zeros([ROWS, N], tl.float32)
    for block in range(cut * length, tl.minimum(blocks, (cut + 1) * length)):
        at = (row_O * blocks + block)[:, None] * _FLOAT_COLUMNS + i[None, :]
        w_OI = tl.load(low + at, mask=there_O[:, None], other=0.0)
        x_IN = tl.load(halves + (i + block * _FLOAT_COLUMNS)[:, None] * N + n[None, :])
        if EXACT:
            y_ON = tl.dot(w_OI.to(tl.float16), x_IN, y_ON)
        else:
            scaled_OI = w_OI.to(tl.float32) * factor
            upper_OI = scaled_OI.to(tl.float16)
            y_ON = tl.dot(upper_OI, x_IN, y_ON)
            y_ON = tl.dot((scaled_OI - upper_OI.to(tl.float32)).to(tl.float16), x_IN, y_ON)
    _store_cut(y, y_ON, cut, row_O, rows, N, ROWS)


@triton.jit
def _finish(
    product, y, residual, factors, factor, cuts, cut_stride, cols, y_cols, COLUMNS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """`y = residual + (sum of product's cuts, in order) * factors[t] * factor`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < cols
    at = product + row * cols + column
    value = tl.load(at, mask=there, other=0.0)
    for cut in range(1, cuts):
        value += tl.load(at + cut * cut_stride, mask=there, other=0.0)
    value *= tl.load(factors + row)
    value *= factor
    if RESIDUAL:
        value = tl.load(residual + row * y_cols + column, mask=there, other=0.0) + value
    tl.store(y + row * y_cols + column, value, mask=there)


@triton.jit
def _spread(
    out, ids, low, high, scales, units, codes, first_row, rows, count, cols, blocks, factor,
    GATHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, OFFSET: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr,
    SCALED: tl.constexpr, MINIMUM: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """A block of `count` rows from `first_row` on, times `factor`, in the type of `out`.

    With GATHER the rows that `ids` name in a matrix where this part begins at `first_row`; those
    that are not in it are left alone."""
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    block = tl.program_id(1)
    w = tl.arange(0, _WORDS)
    there_O = n < count
    if GATHER:
        row_O = tl.load(ids + n, mask=there_O, other=-1) - first_row
        there_O = there_O & (row_O >= 0) & (row_O < rows)
    else:
        row_O = first_row + n
    base = block * (_WORDS * COLUMNS)
    at = (row_O * blocks + block)[:, None] * _WORDS + w[None, :]
    word = tl.load(low + at, mask=there_O[:, None], other=0).to(tl.int32)
    upper = word
    if HIGH > 0:
        upper = tl.load(high + at, mask=there_O[:, None], other=0).to(tl.int32)
    for j in tl.static_range(COLUMNS):
        column = w + base + j * _WORDS
        unit_OI = (row_O * (blocks * (_WORDS * COLUMNS) // UNIT))[:, None] + (column // UNIT)[None]
        group_OI = (row_O * (blocks * (_WORDS * COLUMNS) // GROUP))[:, None]
        group_OI += (column // GROUP)[None, :]
        d_OI, m_OI = _unit(units, unit_OI, there_O[:, None], MINIMUM)
        scale_OI, minimum_OI = _group(scales, group_OI, d_OI, m_OI, there_O[:, None], SCALED,
                                      MINIMUM)  # fmt: skip
        q_OI = _integers(word, upper, codes, j, LOW, HIGH, OFFSET, CODED).to(tl.float32)
        w_OI = (scale_OI * _unplaced(j, LOW, CODED)) * q_OI
        if MINIMUM:
            w_OI += minimum_OI
        tl.store(
            out + n[:, None] * cols + column[None, :],
            (w_OI * factor).to(out.dtype.element_ty),
            mask=there_O[:, None] & (column < cols)[None, :],
        )


@triton.jit
def _halve(x, out, factors, cols, COLUMNS: tl.constexpr):
    """Rows as FP16, each times a power of two that brings its largest to [2^13, 2^14); `factors`
    undo it. Infinities and NaN stay what they are."""
    row = tl.program_id(0).to(tl.int64)
    up, down = _raised(_largest(x + row * cols, cols, COLUMNS))
    for first in range(0, cols, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        value = tl.load(x + row * cols + column, mask=column < cols, other=0.0) * up
        tl.store(out + row * cols + column, value.to(tl.float16), mask=column < cols)
    tl.store(factors + row, down)
