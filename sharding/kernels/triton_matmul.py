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
    low, high, scales, units, block_C, row_O, rows, mask_O, inside, LOW: tl.constexpr,
    HIGH: tl.constexpr, SCALED: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """What a block of each cut is made of: words of integers, LOW of their runs and HIGH; COUNT
    words of scales and a unit, or as many units."""
    block_C1 = block_C[:, None]
    low_CW = low + block_C1 * (SIZE * LOW)
    found = (tl.load(low_CW, mask=inside),)
    for number in tl.static_range(1, LOW):
        found = found + (tl.load(low_CW + number * SIZE, mask=inside),)
    for number in tl.static_range(HIGH):
        at_CW = high + (block_C1 * HIGH + number) * SIZE
        found = found + (tl.load(at_CW, mask=inside),)
    many = scales if SCALED else units
    for number in tl.static_range(COUNT):
        at_CO = (block_C1 * COUNT + number) * rows + row_O[None, :]
        found = found + (tl.load(many + at_CO, mask=mask_O[None, :], other=0),)
    if SCALED:
        at_CO = block_C1 * rows + row_O[None, :]
        found = found + (tl.load(units + at_CO, mask=mask_O[None, :], other=0),)
    return found


@triton.jit
def _as_tiles(bytes, TILES: tl.constexpr):
    """Bytes in the order of `planes.py` `[C, tile, g, t, h, r, b]` as rows `[C, 16 TILES, 32]`,
    columns in the order t, h, b: eight of each thread, as the compiler deals out what was
    joined."""
    ordered = tl.permute(bytes, [0, 1, 5, 2, 3, 4, 6])
    return tl.reshape(ordered, [bytes.shape[0], TILES * _TILE, _RUN])


@triton.jit
def _group(at, N: tl.constexpr):
    """Words of a group of digits `[C, w, 1, 2 or 4]`, in pieces of 128: of a longer row the
    compiler would give each warp a part, and fetch what it needs through shared memory."""
    if N == 64:
        one = tl.join(tl.load(at), tl.load(at + 256))
        other = tl.join(tl.load(at + 128), tl.load(at + 384))
        found = tl.join(one, other)
        found = tl.reshape(found, [found.shape[0], 128, 4])
    elif N == 32:
        found = tl.join(tl.load(at), tl.load(at + 128))
    else:
        found = tl.expand_dims(tl.load(at), 2)
    return found


@triton.jit
def _halved(words, part: tl.constexpr, PARTS: tl.constexpr, ASM: tl.constexpr):
    """Words of digits in the order of `_digits`, as bytes; of two parts one, zeros for the rest."""
    if PARTS > 1:
        words = tl.where((tl.arange(0, words.shape[1]) % 2 == part)[None, :, None], words, 0)
    return _bits(words, 0, 255, ASM).to(tl.int8, bitcast=True)


@triton.jit
def _as_columns(bytes, N: tl.constexpr):
    """A group of digits `[C, 32, N]`, rows in the order of `_as_tiles`, from the order of
    `_digits`: 16 bytes, or 8, of each thread."""
    eights: tl.constexpr = 2 if N > 8 else 1
    cuts: tl.constexpr = bytes.shape[0]
    lanes = tl.reshape(bytes, [cuts, 8, 4, eights, 2, N // 8 // eights, 4])
    return tl.reshape(tl.permute(lanes, [0, 2, 4, 6, 5, 3, 1]), [cuts, _RUN, N])


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
def _block(
    own, digits, codes, CUTS: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, PLACE: tl.constexpr, GROUP: tl.constexpr,
    SCALED: tl.constexpr, MINIMUM: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """What a block of each cut adds to `[C, O, N]`, in the scale of its digits; `own` is what
    `_loaded` found."""
    tiles: tl.constexpr = ROWS // _TILE
    parts: tl.constexpr = _RUN // GROUP
    each: tl.constexpr = 2 if MINIMUM else 1
    scale: tl.constexpr = LOW + HIGH
    count: tl.constexpr = 8 * parts * each // 4 if SCALED else 8
    ones_COI = tl.full([CUTS, ROWS, _RUN], 1, tl.int8)
    sum_CON = tl.zeros([CUTS, ROWS, N], tl.float32)
    if SCALED:
        d_CO, m_CO = _unit(own[scale + count], PLACE, MINIMUM)
        met_CON = tl.zeros([CUTS, ROWS, N], tl.int32)
        least_CON = tl.zeros([CUTS, ROWS, N], tl.int32)
    for k in tl.static_range(8):
        low_COI = tl.reshape(own[k * LOW // 8], [CUTS, tiles, 8, 4, 2, 2])
        high_COI = low_COI
        if HIGH > 0:
            high_COI = tl.reshape(own[LOW + k * HIGH // 8], [CUTS, tiles, 8, 4, 2, 2])
        bytes = _integers(low_COI, high_COI, codes, k, LOW, HIGH, PLACE, CODED, ASM)
        q_COI = _as_tiles(bytes, tiles)
        x = _group(digits + k * (_RUN * N // 4), N)
        for part in tl.static_range(parts):
            x_CIN = _as_columns(_halved(x, part, parts, ASM), N)
            dot_CON = tl.dot(q_COI, x_CIN)
            if MINIMUM:  # which every digit of its group meets
                all_CON = tl.dot(ones_COI, x_CIN)
            if SCALED:
                word_CO = own[scale + (k * parts + part) * each // 4]
                scale_CO = _byte(word_CO, (k * parts + part) * each % 4, not MINIMUM)
                met_CON += scale_CO[:, :, None] * dot_CON
                if MINIMUM:
                    minimum_CO = _byte(word_CO, (k * parts + part) * each % 4 + 1, False)
                    least_CON += minimum_CO[:, :, None] * all_CON
            else:
                d_CO, m_CO = _unit(own[scale + k], PLACE, MINIMUM)
                sum_CON += d_CO[:, :, None] * dot_CON.to(tl.float32)
                if MINIMUM:
                    sum_CON += m_CO[:, :, None] * all_CON.to(tl.float32)
    if SCALED:
        sum_CON = d_CO[:, :, None] * met_CON.to(tl.float32)
        if MINIMUM:
            sum_CON += m_CO[:, :, None] * least_CON.to(tl.float32)
    return sum_CON


@triton.jit
def _few(
    digits, factors, y, residual, low, high, scales, units, codes, rows, blocks, length, y_cols,
    tokens, CUTS: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr,
    ASM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, PLACE: tl.constexpr,
    GROUP: tl.constexpr, SCALED: tl.constexpr, MINIMUM: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """`residual + x @ weight.T` of some rows: products of bytes, exact in int32, group by group.
    A row's blocks are cut into runs of `length`, one for each warp, which are added up at the end.

    Integers and digits lie in memory as tensor cores take them: they go neither through shared
    memory nor from one thread to another."""
    row_O = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there_O = row_O < rows
    n = tl.arange(0, N)
    tiles: tl.constexpr = ROWS // _TILE
    size: tl.constexpr = _TILE * _RUN // 4
    word = tl.arange(0, tiles * size)
    tile_W = (tl.program_id(0) * tiles + word // size).to(tl.int64)
    low_1W = (low + tile_W * (blocks * (size * LOW)) + word % size)[None, :]
    high_1W = (high + tile_W * (blocks * (size * HIGH)) + word % size)[None, :]
    inside = (tile_W * _TILE < rows)[None, :] if tiles > 1 else None
    group_1X = digits + tl.arange(0, 64 if N == 8 else 128)[None, :]
    each: tl.constexpr = 2 if MINIMUM else 1
    count: tl.constexpr = 8 * (_RUN // GROUP) * each // 4 if SCALED else 8
    first_C = tl.arange(0, CUTS) * length
    last_C = tl.minimum(blocks, first_C + length)
    loaded = _loaded(
        low_1W, high_1W, scales, units, tl.minimum(first_C, blocks - 1), row_O, rows, there_O,
        inside, LOW, HIGH, SCALED, count, size,
    )  # fmt: skip
    y_CON = tl.zeros([CUTS, ROWS, N], tl.float32)
    for number in range(length):
        own = loaded
        loaded = _loaded(
            low_1W, high_1W, scales, units, tl.minimum(first_C + number + 1, blocks - 1), row_O,
            rows, there_O, inside, LOW, HIGH, SCALED, count, size,
        )  # fmt: skip
        # The compiler would compute first, fetch the next block into the same registers and wait:
        # but it moves no loads over a barrier, nor what needs the digits that come after it.
        tl.debug_barrier()
        block_C = tl.minimum(first_C + number, blocks - 1)
        sum_CON = _block(
            own, group_1X + block_C[:, None] * (8 * _RUN * N // 4), codes, CUTS, N, ROWS, ASM, LOW,
            HIGH, PLACE, GROUP, SCALED, MINIMUM, CODED,
        )  # fmt: skip
        factor_CN = tl.load(factors + block_C[:, None] * N + n[None, :])
        there_C11 = (first_C + number < last_C)[:, None, None]
        y_CON += tl.where(there_C11, factor_CN[:, None, :] * sum_CON, 0.0)
    y_COT = tl.sum(tl.reshape(y_CON, [CUTS, ROWS, N // 4, 4]), axis=3)
    y_OT = tl.sum(y_COT, axis=0)
    t = tl.arange(0, N // 4)
    mask = there_O[:, None] & (t < tokens)[None, :]
    to = row_O[:, None] + t[None, :] * y_cols
    if RESIDUAL:
        y_OT = tl.load(residual + to, mask=mask, other=0.0) + y_OT
    tl.store(y + to, y_OT, mask=mask)


@triton.jit
def _deliver_cut(
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
    _deliver_cut(
        y_OT, y, residual, partials, counters, row_O, rows, y_cols, tokens, cuts, N // 2, RESIDUAL
    )
