"""The Triton kernels of products of few tokens with weights in planes.

    T tokens, I inputs, O outputs, N columns of digits (four a token), B blocks of a row

Who calls which, and in what sizes: `triton_products.py`. Layout: `planes.py`. Not here: what a GEMM
of many tokens needs (`triton_gemm.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from sharding.kernels.planes import BLOCK, FLOAT_COLUMNS, RUN, TILE
from sharding.kernels.triton_digits import _power

_RUN = tl.constexpr(RUN)
_BLOCK = tl.constexpr(BLOCK)
_TILE = tl.constexpr(TILE)
_FLOAT_COLUMNS = tl.constexpr(FLOAT_COLUMNS)


@triton.jit
def _four_times(words):
    """Each word four times, side by side in a thread, `[..., 4]`; a broadcast would be moved to
    where it is cheapest, which is after what is done to whole words."""
    twice = tl.join(words, words)
    return tl.reshape(tl.join(twice, twice), words.shape + [4])


@triton.jit
def _bits(words, left: tl.constexpr, mask: tl.constexpr, ASM: tl.constexpr):
    """Bytes of words, uint8 `[..., 4]`, under `mask` once shifted left (right where negative).

    In assembly all four at once: Triton's compiler takes them apart."""
    # What Triton compiles has one `return`: what followed another would be compiled as well.
    if ASM and mask == 255:
        found = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r,r,r", [_four_times(words)], dtype=tl.uint8, is_pure=True,
            pack=4,
        )  # fmt: skip
    elif ASM and left > 0:
        found = tl.inline_asm_elementwise(
            f"{{ shl.b32 $0, $1, {left}; and.b32 $0, $0, {mask * 0x01010101}; }}", "=r,r,r,r,r",
            [_four_times(words)], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    elif ASM:
        found = tl.inline_asm_elementwise(
            f"{{ shr.u32 $0, $1, {-left}; and.b32 $0, $0, {mask * 0x01010101}; }}", "=r,r,r,r,r",
            [_four_times(words)], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        byte = (tl.expand_dims(words, len(words.shape)) >> (tl.arange(0, 4) * 8)) & 255
        found = ((byte << left if left > 0 else byte >> -left) & mask).to(tl.uint8)
    return found


@triton.jit
def _joined(one, other, ASM: tl.constexpr):
    """The bits of both."""
    if ASM:
        found = tl.inline_asm_elementwise(
            "or.b32 $0, $1, $2;", "=r,r,r", [one, other], dtype=tl.uint8, is_pure=True, pack=4
        )
    else:
        found = one | other
    return found


@triton.jit
def _integers(
    low, high, codes, k: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, PLACE: tl.constexpr,
    CODED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Of column 32 k + i of a block, int8 `[..., 4]` and exact, times 2^PLACE, from words."""
    left: tl.constexpr = PLACE - k * LOW % 8
    found = _bits(low, left, ((1 << LOW) - 1) << PLACE, ASM)
    if HIGH > 0:
        upper: tl.constexpr = PLACE + LOW - k * HIGH % 8
        bits = _bits(high, upper, ((1 << HIGH) - 1) << (PLACE + LOW), ASM)
        found = _joined(found, bits, ASM)
    return tl.load(codes + found.to(tl.int32)) if CODED else found.to(tl.int8, bitcast=True)


@triton.jit
def _loaded(
    low, high, scales, units, digits, block, row_O, rows, mask_O, inside, LOW: tl.constexpr,
    HIGH: tl.constexpr, SCALED: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr,
    N: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """What a block of a tile of rows is made of: words of integers, LOW of their runs and HIGH;
    COUNT words of scales and a unit, or as many units; with AHEAD its eight groups of digits."""
    found = (tl.load(low + block * (SIZE * LOW), mask=inside),)
    for number in tl.static_range(1, LOW):
        found = found + (tl.load(low + (block * LOW + number) * SIZE, mask=inside),)
    for number in tl.static_range(HIGH):
        found = found + (tl.load(high + (block * HIGH + number) * SIZE, mask=inside),)
    many = scales if SCALED else units
    for number in tl.static_range(COUNT):
        at = (block * COUNT + number) * rows + row_O
        found = found + (tl.load(many + at, mask=mask_O, other=0),)
    if SCALED:
        found = found + (tl.load(units + block * rows + row_O, mask=mask_O, other=0),)
    if AHEAD:
        for number in tl.static_range(8):
            found = found + (tl.load(digits + (block * 8 + number) * (_RUN * N // 4)),)
    return found


@triton.jit
def _as_tiles(bytes, TILES: tl.constexpr):
    """Bytes in the order of `planes.py` `[tile, g, t, h, r, b]` as rows `[16 TILES, 32]`, columns
    in the order t, h, b: eight of each thread, as the compiler deals out what was joined."""
    return tl.reshape(tl.permute(bytes, [0, 4, 1, 2, 3, 5]), [TILES * _TILE, _RUN])


@triton.jit
def _halved(words, part: tl.constexpr, PARTS: tl.constexpr, ASM: tl.constexpr):
    """Words of digits in the order of `_digits`, as bytes; of two parts one, zeros for the rest."""
    if PARTS > 1:
        words = tl.where(tl.arange(0, words.shape[0]) % 2 == part, words, 0)
    return _bits(words, 0, 255, ASM).to(tl.int8, bitcast=True)


@triton.jit
def _as_columns(bytes, N: tl.constexpr):
    """A group of digits `[32, N]`, rows in the order of `_as_tiles`, from the order of `_digits`:
    16 bytes, or 8, of each thread."""
    eights: tl.constexpr = 2 if N > 8 else 1
    lanes = tl.reshape(bytes, [N // 8 // eights, 8, 4, eights, 2, 4])
    return tl.reshape(tl.permute(lanes, [2, 4, 5, 0, 3, 1]), [_RUN, N])


@triton.jit
def _unit(bits, PLACE: tl.constexpr, MINIMUM: tl.constexpr):
    """d and m of a unit, float32 (d twice if there is no m); d undoes the integers' place."""
    if MINIMUM:
        d = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        m = (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        d = bits.to(tl.float32)
        m = d
    return d * (1.0 / (1 << PLACE)), m


@triton.jit
def _byte(word, at, SIGNED: tl.constexpr):
    """Byte `at` of a word, as a number."""
    return (word << (24 - 8 * at)) >> 24 if SIGNED else (word >> (8 * at)) & 255


@triton.jit
def _largest(x, cols, COLUMNS: tl.constexpr):
    """Of a row's absolute values, a NaN left aside."""
    largest = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, cols, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        largest = tl.maximum(largest, tl.abs(tl.load(x + column, mask=column < cols, other=0.0)))
    return tl.max(largest, axis=0)


@triton.jit
def _deliver(
    y_OT, y, residual, partials, counters, row_O, rows, y_cols, tokens, cuts, TOKENS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """A cut's share of `y[t, o]`. Whoever delivers the last of a tile adds them all up in order,
    and the residual."""
    t = tl.arange(0, TOKENS)
    mask = (row_O < rows)[:, None] & (t < tokens)[None, :]
    to = row_O[:, None] + t[None, :] * y_cols
    if cuts == 1:
        if RESIDUAL:
            y_OT = tl.load(residual + to, mask=mask, other=0.0) + y_OT
        tl.store(y + to, y_OT, mask=mask)
    else:
        part = partials + row_O[:, None] + t[None, :] * rows
        tl.store(part + tl.program_id(1) * (tokens * rows), y_OT, mask=mask)
        # All threads' stores come before the count, and the count before the sums.
        tl.debug_barrier()
        counter = counters + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == cuts - 1:
            total_OT = tl.load(part, mask=mask, other=0.0, cache_modifier=".cg")
            for cut in range(1, cuts):
                at = part + cut * (tokens * rows)
                total_OT += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
            if RESIDUAL:
                total_OT = tl.load(residual + to, mask=mask, other=0.0) + total_OT
            tl.store(y + to, total_OT, mask=mask)
            tl.store(counter, 0)


@triton.jit
def _block(
    own, digits, codes, N: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr, ASM: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, PLACE: tl.constexpr, GROUP: tl.constexpr,
    SCALED: tl.constexpr, MINIMUM: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """What a block adds to `[O, N]`, in the scale of its digits; `own` is what `_loaded` found."""
    tiles: tl.constexpr = ROWS // _TILE
    parts: tl.constexpr = _RUN // GROUP
    each: tl.constexpr = 2 if MINIMUM else 1
    scale: tl.constexpr = LOW + HIGH
    count: tl.constexpr = 8 * parts * each // 4 if SCALED else 8
    column: tl.constexpr = scale + count + SCALED
    ones_OI = tl.full([ROWS, _RUN], 1, tl.int8)
    sum_ON = tl.zeros([ROWS, N], tl.float32)
    if SCALED:
        d_O, m_O = _unit(own[scale + count], PLACE, MINIMUM)
        met_ON = tl.zeros([ROWS, N], tl.int32)
        least_ON = tl.zeros([ROWS, N], tl.int32)
    for k in tl.static_range(8):
        low_OI = tl.reshape(own[k * LOW // 8], [tiles, 8, 4, 2, 2])
        high_OI = low_OI
        if HIGH > 0:
            high_OI = tl.reshape(own[LOW + k * HIGH // 8], [tiles, 8, 4, 2, 2])
        bytes = _integers(low_OI, high_OI, codes, k, LOW, HIGH, PLACE, CODED, ASM)
        q_OI = _as_tiles(bytes, tiles)
        group = digits + k * (_RUN * N // 4)
        x = own[column + k] if AHEAD else tl.load(group)
        for part in tl.static_range(parts):
            x_IN = _as_columns(_halved(x, part, parts, ASM), N)
            dot_ON = tl.dot(q_OI, x_IN)
            if MINIMUM:  # which every digit of its group meets
                all_ON = tl.dot(ones_OI, x_IN)
            if SCALED:
                word_O = own[scale + (k * parts + part) * each // 4]
                scale_O = _byte(word_O, (k * parts + part) * each % 4, not MINIMUM)
                met_ON += scale_O[:, None] * dot_ON
                if MINIMUM:
                    minimum_O = _byte(word_O, (k * parts + part) * each % 4 + 1, False)
                    least_ON += minimum_O[:, None] * all_ON
            else:
                d_O, m_O = _unit(own[scale + k], PLACE, MINIMUM)
                sum_ON += d_O[:, None] * dot_ON.to(tl.float32)
                if MINIMUM:
                    sum_ON += m_O[:, None] * all_ON.to(tl.float32)
    if SCALED:
        sum_ON = d_O[:, None] * met_ON.to(tl.float32)
        if MINIMUM:
            sum_ON += m_O[:, None] * least_ON.to(tl.float32)
    return sum_ON


@triton.jit
def _few(
    digits, factors, y, residual, partials, counters, low, high, scales, units, codes, rows,
    blocks, y_cols, tokens, cuts, N: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr,
    RESIDUAL: tl.constexpr, ASM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    PLACE: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr, MINIMUM: tl.constexpr,
    CODED: tl.constexpr,
):  # fmt: skip
    """`residual + x @ weight.T` of some rows: products of bytes, exact in int32, group by group.

    Integers and digits lie in memory as tensor cores take them: they go neither through shared
    memory nor from one thread to another."""
    row_O = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there_O = row_O < rows
    n = tl.arange(0, N)
    tiles: tl.constexpr = ROWS // _TILE
    size: tl.constexpr = _TILE * _RUN // 4
    word = tl.arange(0, tiles * size)
    tile = (tl.program_id(0) * tiles + word // size).to(tl.int64)
    low_tile = low + tile * (blocks * (size * LOW)) + word % size
    high_tile = high + tile * (blocks * (size * HIGH)) + word % size
    inside = tile * _TILE < rows if tiles > 1 else None
    digits += tl.arange(0, _RUN * N // 4)
    each: tl.constexpr = 2 if MINIMUM else 1
    count: tl.constexpr = 8 * (_RUN // GROUP) * each // 4 if SCALED else 8
    length = tl.cdiv(blocks, cuts)
    first = tl.program_id(1) * length
    last = tl.minimum(blocks, first + length)
    loaded = _loaded(
        low_tile, high_tile, scales, units, digits, first, row_O, rows, there_O, inside, LOW, HIGH,
        SCALED, count, size, N, AHEAD,
    )  # fmt: skip
    y_ON = tl.zeros([ROWS, N], tl.float32)
    for block in range(first, last):
        # Fetched a block ahead: digits too, if registers hold them.
        own = loaded
        loaded = _loaded(
            low_tile, high_tile, scales, units, digits, tl.minimum(block + 1, last - 1), row_O,
            rows, there_O, inside, LOW, HIGH, SCALED, count, size, N, AHEAD,
        )  # fmt: skip
        factor_N = tl.load(factors + block * N + n)
        sum_ON = _block(
            own, digits + block * (8 * _RUN * N // 4), codes, N, ROWS, AHEAD, ASM, LOW, HIGH, PLACE,
            GROUP, SCALED, MINIMUM, CODED,
        )  # fmt: skip
        y_ON += factor_N[None, :] * sum_ON
    y_OT = tl.sum(tl.reshape(y_ON, [ROWS, N // 4, 4]), axis=2)
    _deliver(
        y_OT, y, residual, partials, counters, row_O, rows, y_cols, tokens, cuts, N // 4, RESIDUAL
    )


@triton.jit
def _halves(x, out, factors, tokens, cols, padded, N: tl.constexpr, COLUMNS: tl.constexpr):
    """Token t's activations, scaled, as two FP16 numbers: `out` `[padded, N]`, the upper ones in
    column 2 t, the lower ones in column 2 t + 1; `factors` undo the scale. Columns of no token are
    zeros."""
    t = tl.program_id(0)
    row = x + t.to(tl.int64) * cols
    there = tl.where(t < tokens, cols, 0)
    up, down = _power(_largest(row, there, COLUMNS), 14)
    for first in range(0, padded, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        value = tl.load(row + column, mask=column < there, other=0.0) * up
        upper = value.to(tl.float16)
        lower = (value - upper.to(tl.float32)).to(tl.float16)
        tl.store(out + column * N + 2 * t, upper, mask=column < padded)
        tl.store(out + column * N + 2 * t + 1, lower, mask=column < padded)
    tl.store(factors + t, down)


@triton.jit
def _few_floats(
    halves, factors, y, residual, partials, counters, low, rows, blocks, y_cols, tokens, cuts,
    factor, N: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The same of a matrix of floats, divided by `factor`; two FP16 numbers each unless EXACT."""
    row_O = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there_O = row_O < rows
    n, i = tl.arange(0, N), tl.arange(0, _FLOAT_COLUMNS)
    length = tl.cdiv(blocks, cuts)
    first = tl.program_id(1) * length
    low_O1 = low + (row_O.to(tl.int64) * (blocks * _FLOAT_COLUMNS))[:, None]
    y_ON = tl.zeros([ROWS, N], tl.float32)
    for block in range(first, tl.minimum(blocks, first + length)):
        column = block * _FLOAT_COLUMNS + i
        w_OI = tl.load(low_O1 + column[None, :], mask=there_O[:, None], other=0.0)
        x_IN = tl.load(halves + column[:, None] * N + n[None, :])
        if EXACT:
            y_ON = tl.dot(w_OI.to(tl.float16), x_IN, y_ON)
        else:
            scaled_OI = w_OI.to(tl.float32) * (1.0 / factor)
            upper_OI = scaled_OI.to(tl.float16)
            y_ON = tl.dot(upper_OI, x_IN, y_ON)
            y_ON = tl.dot((scaled_OI - upper_OI.to(tl.float32)).to(tl.float16), x_IN, y_ON)
    t = tl.arange(0, N // 2)
    y_OT = tl.sum(tl.reshape(y_ON, [ROWS, N // 2, 2]), axis=2)
    y_OT *= tl.load(factors + t, mask=t < tokens, other=1.0)[None, :]
    y_OT *= factor
    _deliver(
        y_OT, y, residual, partials, counters, row_O, rows, y_cols, tokens, cuts, N // 2, RESIDUAL
    )
