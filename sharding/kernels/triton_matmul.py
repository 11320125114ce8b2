"""Products with weights in planes, and their rows: Triton kernels and who is called when.

    T tokens, I inputs, O outputs, W words of a row (`planes.py`)

Three ways, by the number of tokens; docs/numerics.md bounds each:

    matvec      to 4 tokens: float32 throughout, integers as they are stored, scales once a word
    fine tiles  to 16: weights as float32, products of tensor cores in three parts (tf32x3)
    GEMM        above: weights expanded to FP16 in a bounded workspace, the library's own GEMM

The first two read a weight's bytes once and are bound by memory; the last reads them once for a
whole chunk. Not here: layout (`planes.py`) and packing (`triton_weights.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sharding.kernels.planes import Planes
from sharding.kernels.triton_weights import IQ4_CODES, Part, PlanesWeight

MATVEC_TOKENS = 4
"""Above, multiply-adds of a weight would take longer than its bytes."""

FINE_TOKENS = 16
"""Above, the library's GEMM is worth expanding the weight."""

WORKSPACE_BYTES = 1 << 27
"""Most bytes of expanded weights at a time."""

_MAGIC = tl.constexpr(0x4B000000)
_MAGIC_VALUE = tl.constexpr(8388608.0)


@dataclass(frozen=True)
class Tiles:
    """Sizes of one program's work, powers of two: rows of a weight and words or columns of them, in
    `_matvec`, `_fine` and `_spread`."""

    rows: int = 2
    words: int = 128
    fine_rows: int = 32
    fine_columns: int = 64
    spread_rows: int = 4
    spread_columns: int = 1024


INTERPRETED = Tiles(256, 64, 256, 256, 64, 512)
"""An interpreted program costs milliseconds, however large it is."""


@triton.jit
def _fp16(bits):
    """The number whose bits are the lowest 16."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _numbers(
    word, upper, codes, j, LOW: tl.constexpr, HIGH: tl.constexpr, OFFSET: tl.constexpr,
    CODED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Column j of each word, float32: a stored integer less the offset, a code, or a float."""
    # One branch is compiled; a `return` in it would leave what follows to be compiled as well.
    if KIND == "f32":
        values = word.to(tl.float32, bitcast=True)
    elif KIND == "bf16":
        values = ((word >> (j * 16)) << 16).to(tl.float32, bitcast=True)
    elif KIND == "f16":
        values = _fp16(word >> (j * 16))
    else:
        q = (word >> (j * LOW)) & ((1 << LOW) - 1)
        if HIGH > 0:
            q |= ((upper >> (j * HIGH)) & ((1 << HIGH) - 1)) << LOW
        if CODED:
            values = tl.load(codes + q).to(tl.float32)
        else:
            # The integer as the last bits of a float of 2^23: one operation, no conversion.
            values = (q | _MAGIC).to(tl.float32, bitcast=True) - (_MAGIC_VALUE + OFFSET)
    return values


@triton.jit
def _shifted(bits, left: tl.constexpr):
    """Shifted left, or right where `left` is negative."""
    return bits << left if left >= 0 else bits >> -left


@triton.jit
def _placed(
    word, upper, codes, j: tl.constexpr, COLUMNS: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, OFFSET: tl.constexpr, CODED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The same times 2^place, the integer's place in its half of a word: there it need not be
    shifted. `_turn` divides what it meets by as much."""
    if CODED or KIND != "int":
        values = _numbers(word, upper, codes, j, LOW, HIGH, OFFSET, CODED, KIND)
    else:
        place: tl.constexpr = j * LOW % 16
        half = word if j * LOW < 16 else word >> 16
        q = half & (((1 << LOW) - 1) << place)
        if HIGH > 0:
            high = _shifted(upper, place + LOW - j * HIGH)
            q |= high & (((1 << HIGH) - 1) << (place + LOW))
        values = (q | _MAGIC).to(tl.float32, bitcast=True) - (_MAGIC_VALUE + (OFFSET << place))
    return values


@triton.jit
def _words(low, high, row_O, word_W, words, mask, HIGH: tl.constexpr):
    """Words of the low plane and of the high one (or the same once more), int32 `[O, W]`."""
    at = (row_O * words)[:, None] + word_W[None, :]
    word = tl.load(low + at, mask=mask, other=0).to(tl.int32)
    upper = word
    if HIGH > 0:
        upper = tl.load(high + at, mask=mask, other=0).to(tl.int32)
    return word, upper


@triton.jit
def _scales(
    scales, units, row_O, word_W, words, mask, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr, SCALED: tl.constexpr, MINIMUM: tl.constexpr,
):  # fmt: skip
    """What multiplies and what is added in each word of a quantised format, float32 `[O, W]`."""
    unit_OW = row_O[:, None] * (words * COLUMNS // UNIT) + (word_W * COLUMNS // UNIT)[None, :]
    group_OW = row_O[:, None] * (words * COLUMNS // GROUP) + (word_W * COLUMNS // GROUP)[None, :]
    unit = tl.load(units + unit_OW, mask=mask, other=0)
    if MINIMUM:
        scale, minimum = _fp16(unit), _fp16(unit >> 16)
        if SCALED:
            both = tl.load(scales + group_OW, mask=mask, other=0)
            scale *= (both & 255).to(tl.float32)
            minimum *= (both >> 8).to(tl.float32)
    else:
        scale = unit.to(tl.float32)
        if SCALED:
            scale *= tl.load(scales + group_OW, mask=mask, other=0).to(tl.float32)
        minimum = scale
    return scale, minimum


@triton.jit
def _turn(x, out, cols, quads, COLUMNS: tl.constexpr, LOW: tl.constexpr, WORDS: tl.constexpr):
    """A row `[I]` as `[COLUMNS + 1, W]`: what meets column j of each word, then each word's sum.
    LOW is the bits of an integer that is used in its place, else 0."""
    words = quads * 4
    row = tl.program_id(0).to(tl.int64)
    word_W = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    total = tl.zeros([WORDS], tl.float32)
    to = out + row * words * (COLUMNS + 1) + word_W
    for j in tl.static_range(COLUMNS):
        column = word_W * COLUMNS + j
        value = tl.load(x + row * cols + column, mask=column < cols, other=0.0)
        total += value
        tl.store(to + j * words, value * (1.0 / (1 << j * LOW % 16)), mask=word_W < words)
    tl.store(to + COLUMNS * words, total, mask=word_W < words)


@triton.jit
def _matvec(
    turned, y, residual, low, high, scales, units, codes, tokens, quads, rows, y_cols,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, RESIDUAL: tl.constexpr,
    COLUMNS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, OFFSET: tl.constexpr,
    GROUP: tl.constexpr, UNIT: tl.constexpr, SCALED: tl.constexpr, MINIMUM: tl.constexpr,
    CODED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """`y[t, o]` of a few rows, all inputs, up to TOKENS tokens. A lane keeps the sum of its words;
    lanes meet once, at the end."""
    words = quads * 4
    row_O = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside_O = row_O < rows
    sums = _nothing(ROWS, WORDS)
    for first in range(0, words, WORDS):
        word_W = first + tl.arange(0, WORDS)
        mask = inside_O[:, None] & (word_W < words)[None, :]
        word_OW, upper_OW = _words(low, high, row_O, word_W, words, mask, HIGH)
        met = _nothing(ROWS, WORDS)
        for j in tl.static_range(COLUMNS):
            q_OW = _placed(word_OW, upper_OW, codes, j, COLUMNS, LOW, HIGH, OFFSET, CODED, KIND)
            met = _multiply_add(
                q_OW, turned + j * words, words, word_W, tokens, met, TOKENS, COLUMNS
            )
        if KIND == "int":
            scale_OW, minimum_OW = _scales(
                scales, units, row_O, word_W, words, mask, COLUMNS, GROUP, UNIT, SCALED,
                MINIMUM,
            )  # fmt: skip
            sums = _scaled_add(scale_OW, met, sums, TOKENS)
            if MINIMUM:
                sums = _multiply_add(
                    minimum_OW, turned + COLUMNS * words, words, word_W, tokens, sums, TOKENS,
                    COLUMNS,
                )  # fmt: skip
        else:
            sums = _scaled_add(1.0, met, sums, TOKENS)
    for t in tl.static_range(TOKENS):
        y_O = tl.sum(sums[t], axis=1)
        at = t * y_cols + row_O
        mask = inside_O & (t < tokens)
        if RESIDUAL:
            y_O = tl.load(residual + at, mask=mask, other=0.0) + y_O
        tl.store(y + at, y_O, mask=mask)


@triton.jit
def _nothing(ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Zeros for four tokens, of which the compiler drops those that stay what they are. Not an axis
    of one tensor: lanes would have to exchange what they hold."""
    zero = tl.zeros([ROWS, WORDS], tl.float32)
    return zero, zero, zero, zero


@triton.jit
def _meeting(turned, t, words, word_W, tokens, COLUMNS: tl.constexpr):
    """Token t's activations for a column of each word, `[1, W]`."""
    at = turned + t * words * (COLUMNS + 1) + word_W[None, :]
    return tl.load(at, mask=(word_W < words)[None, :] & (t < tokens), other=0.0)


@triton.jit
def _multiply_add(
    a_OW, turned, words, word_W, tokens, sums, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Each token's sum plus `a` times its activations."""
    first, second, third, fourth = sums
    first += a_OW * _meeting(turned, 0, words, word_W, tokens, COLUMNS)
    if TOKENS > 1:
        second += a_OW * _meeting(turned, 1, words, word_W, tokens, COLUMNS)
    if TOKENS > 2:
        third += a_OW * _meeting(turned, 2, words, word_W, tokens, COLUMNS)
        fourth += a_OW * _meeting(turned, 3, words, word_W, tokens, COLUMNS)
    return first, second, third, fourth


@triton.jit
def _scaled_add(scale, parts, sums, TOKENS: tl.constexpr):
    """Each token's sum plus its part times the scale."""
    first, second, third, fourth = sums
    first += scale * parts[0]
    if TOKENS > 1:
        second += scale * parts[1]
    if TOKENS > 2:
        third += scale * parts[2]
        fourth += scale * parts[3]
    return first, second, third, fourth


@triton.jit
def _weights(
    low, high, scales, units, codes, row_O, word_W, words, mask, COLUMNS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, OFFSET: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr, SCALED: tl.constexpr, MINIMUM: tl.constexpr, CODED: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Weights, float32 `[O, W, COLUMNS]`."""
    j = tl.arange(0, COLUMNS)[None, None, :]
    word_OW, upper_OW = _words(low, high, row_O, word_W, words, mask, HIGH)
    w_OWj = _numbers(
        word_OW[:, :, None], upper_OW[:, :, None], codes, j, LOW, HIGH, OFFSET, CODED, KIND
    )
    if KIND == "int":
        scale_OW, minimum_OW = _scales(
            scales, units, row_O, word_W, words, mask, COLUMNS, GROUP, UNIT, SCALED, MINIMUM
        )
        w_OWj *= scale_OW[:, :, None]
        if MINIMUM:
            w_OWj += minimum_OW[:, :, None]
    return w_OWj


@triton.jit
def _fine(
    x, y, residual, low, high, scales, units, codes, tokens, cols, quads, rows, y_cols,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, RESIDUAL: tl.constexpr,
    COLUMNS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, OFFSET: tl.constexpr,
    GROUP: tl.constexpr, UNIT: tl.constexpr, SCALED: tl.constexpr, MINIMUM: tl.constexpr,
    CODED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """`y[t, o]` of TOKENS tokens and ROWS rows on tensor cores, to nearly float32's precision."""
    words = quads * 4
    row_O = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside_O = row_O < rows
    y_OT = tl.zeros([ROWS, TOKENS], tl.float32)
    for first in range(0, words, WORDS):
        word_W = first + tl.arange(0, WORDS)
        mask = inside_O[:, None] & (word_W < words)[None, :]
        w_OWj = _weights(
            low, high, scales, units, codes, row_O, word_W, words, mask, COLUMNS, LOW, HIGH,
            OFFSET, GROUP, UNIT, SCALED, MINIMUM, CODED, KIND,
        )  # fmt: skip
        column = first * COLUMNS + tl.arange(0, WORDS * COLUMNS)
        x_IT = tl.load(
            x + t[None, :] * cols + column[:, None],
            mask=(t < tokens)[None, :] & (column < cols)[:, None],
            other=0.0,
        )
        w_OI = tl.reshape(w_OWj, [ROWS, WORDS * COLUMNS])
        y_OT = tl.dot(w_OI, x_IT, y_OT, input_precision="tf32x3")
    at = t[None, :] * y_cols + row_O[:, None]
    mask = (t < tokens)[None, :] & inside_O[:, None]
    if RESIDUAL:
        y_OT = tl.load(residual + at, mask=mask, other=0.0) + y_OT
    tl.store(y + at, y_OT, mask=mask)


@triton.jit
def _spread(
    out, ids, low, high, scales, units, codes, first_row, rows, count, cols, quads, factor,
    GATHER: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, COLUMNS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, OFFSET: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr, SCALED: tl.constexpr, MINIMUM: tl.constexpr, CODED: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """`count` rows from `first_row` on, times `factor`, in the type of `out` `[count, cols]`.

    With GATHER the rows that `ids` name in a matrix where this part begins at `first_row`; those
    that are not in it are left alone."""
    words = quads * 4
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    word_W = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside_O = n < count
    if GATHER:
        row_O = tl.load(ids + n, mask=inside_O, other=-1) - first_row
        inside_O = inside_O & (row_O >= 0) & (row_O < rows)
    else:
        row_O = first_row + n
    mask = inside_O[:, None] & (word_W < words)[None, :]
    w_OWj = _weights(
        low, high, scales, units, codes, row_O, word_W, words, mask, COLUMNS, LOW, HIGH,
        OFFSET, GROUP, UNIT, SCALED, MINIMUM, CODED, KIND,
    )  # fmt: skip
    column = (word_W[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])[None]
    tl.store(
        out + n[:, None, None] * cols + column,
        (w_OWj * factor).to(out.dtype.element_ty),
        mask=mask[:, :, None] & (column < cols),
    )


@triton.jit
def _halve(x, out, factors, cols, COLS: tl.constexpr):
    """Rows as FP16, each times a power of two that brings its largest to [2^13, 2^14); `factors`
    undo it. Infinities and NaN stay what they are."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([COLS], tl.float32)
    for first in range(0, cols, COLS):
        column = first + tl.arange(0, COLS)
        part = tl.load(x + row * cols + column, mask=column < cols, other=0.0)
        largest = tl.maximum(largest, tl.abs(part))
    exponent = tl.max(largest, axis=0).to(tl.int32, bitcast=True) >> 23
    raised = tl.minimum(tl.maximum(267 - exponent, 1), 253)
    factor = (raised << 23).to(tl.float32, bitcast=True)
    for first in range(0, cols, COLS):
        column = first + tl.arange(0, COLS)
        part = tl.load(x + row * cols + column, mask=column < cols, other=0.0)
        tl.store(out + row * cols + column, (part * factor).to(tl.float16), mask=column < cols)
    tl.store(factors + row, ((254 - raised) << 23).to(tl.float32, bitcast=True))


@triton.jit
def _finish(
    product, y, residual, factors, factor, cols, y_cols, COLS: tl.constexpr, RESIDUAL: tl.constexpr
):
    """`y = residual + product * factors[t] * factor`, a row of the product a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    value = tl.load(product + row * cols + column, mask=column < cols, other=0.0)
    value *= tl.load(factors + row)
    value *= factor
    if RESIDUAL:
        value = tl.load(residual + row * y_cols + column, mask=column < cols, other=0.0) + value
    tl.store(y + row * y_cols + column, value, mask=column < cols)


class Products:
    """The kernels with the sizes and tables that they need on one device."""

    def __init__(self, device: torch.device, tiles: Tiles) -> None:
        self._tiles = tiles
        self._codes = torch.tensor(IQ4_CODES, dtype=torch.int8, device=device)

    def matmul(self, x_TI: Tensor, weight: PlanesWeight, residual_TO: Tensor | None) -> Tensor:
        """`residual + x @ weight.T`, `[T, O]`."""
        tokens = len(x_TI)
        y_TO = torch.empty(tokens, weight.rows, dtype=torch.float32, device=x_TI.device)
        if tokens > FINE_TOKENS:
            self._gemm(x_TI, weight, residual_TO, y_TO)
        elif tokens > MATVEC_TOKENS:
            self._few(x_TI, weight, residual_TO, y_TO)
        elif tokens > 0:
            self._one(x_TI, weight, residual_TO, y_TO)
        return y_TO

    def rows(self, weight: PlanesWeight, ids_T: Tensor) -> Tensor:
        """Rows `ids_T` of the weight, float32 `[T, I]`."""
        out_TI = torch.empty(len(ids_T), weight.cols, dtype=torch.float32, device=ids_T.device)
        for part in weight.parts:
            self._expand(part, out_TI, part.first, 1.0, ids_T)
        return out_TI

    def _one(
        self, x_TI: Tensor, weight: PlanesWeight, residual_TO: Tensor | None, y_TO: Tensor
    ) -> None:
        tokens, cols = x_TI.shape
        tiles = self._tiles
        turned: dict[tuple[int, int], Tensor] = {}
        for part in weight.parts:
            size = min(tiles.words, triton.next_power_of_2(part.words))
            columns, low = part.planes.columns, part.planes.low_bits if part.planes.placed else 0
            way = columns, low
            if way not in turned:
                turned[way] = x_TI.new_empty(tokens, columns + 1, part.words)
                grid = tokens, triton.cdiv(part.words, size)
                _turn[grid](x_TI, turned[way], cols, part.words // 4, columns, low, size)
            _matvec[(triton.cdiv(part.rows, tiles.rows),)](
                turned[way],
                *_outputs(y_TO, residual_TO, part.first),
                *part.tensors,
                self._codes,
                tokens,
                part.words // 4,
                part.rows,
                weight.rows,
                triton.next_power_of_2(tokens),
                tiles.rows,
                size,
                residual_TO is not None,
                *constants(part.planes),
                num_warps=1,
            )

    def _few(
        self, x_TI: Tensor, weight: PlanesWeight, residual_TO: Tensor | None, y_TO: Tensor
    ) -> None:
        tokens, cols = x_TI.shape
        tiles = self._tiles
        for part in weight.parts:
            _fine[(triton.cdiv(part.rows, tiles.fine_rows), 1)](
                x_TI,
                *_outputs(y_TO, residual_TO, part.first),
                *part.tensors,
                self._codes,
                tokens,
                cols,
                part.words // 4,
                part.rows,
                weight.rows,
                FINE_TOKENS,
                tiles.fine_rows,
                tiles.fine_columns // part.planes.columns,
                residual_TO is not None,
                *constants(part.planes),
            )

    def _gemm(
        self, x_TI: Tensor, weight: PlanesWeight, residual_TO: Tensor | None, y_TO: Tensor
    ) -> None:
        tokens, cols = x_TI.shape
        half_TI = torch.empty(tokens, cols, dtype=torch.float16, device=x_TI.device)
        factor_T = torch.empty(tokens, dtype=torch.float32, device=x_TI.device)
        _halve[(tokens,)](x_TI, half_TI, factor_T, cols, _columns_at_once(cols))
        slab = max(1, min(weight.rows, WORKSPACE_BYTES // (2 * cols)))
        space = torch.empty(slab, cols, dtype=torch.float16, device=x_TI.device)
        for part in weight.parts:
            for first in range(0, part.rows, slab):
                count = min(slab, part.rows - first)
                self._expand(part, space[:count], first, 1.0 / part.headroom)
                product_TO = _half_gemm(half_TI, space[:count])
                size = _columns_at_once(count)
                _finish[(tokens, triton.cdiv(count, size))](
                    product_TO,
                    *_outputs(y_TO, residual_TO, part.first + first),
                    factor_T,
                    part.headroom,
                    count,
                    weight.rows,
                    size,
                    residual_TO is not None,
                )

    def _expand(
        self, part: Part, out: Tensor, first: int, factor: float, ids: Tensor | None = None
    ) -> None:
        """Rows from `first` of the part, or those named of the weight, into `out` `[n, I]`."""
        count, cols = out.shape
        if count == 0:
            return
        tiles, words = self._tiles, self._tiles.spread_columns // part.planes.columns
        _spread[(triton.cdiv(count, tiles.spread_rows), triton.cdiv(part.words, words))](
            out,
            part.low if ids is None else ids,
            *part.tensors,
            self._codes,
            first,
            part.rows,
            count,
            cols,
            part.words // 4,
            factor,
            ids is not None,
            tiles.spread_rows,
            words,
            *constants(part.planes),
        )


def _half_gemm(x_TI: Tensor, w_OI: Tensor) -> Tensor:
    """FP16 in, float32 sums out. What the GPU's library does; elsewhere the same definition."""
    if x_TI.is_cuda:
        return torch.mm(x_TI, w_OI.t(), out_dtype=torch.float32)
    return torch.mm(x_TI.float(), w_OI.float().t())


def _outputs(y_TO: Tensor, residual_TO: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
    """Where rows from `first` on go, and what is added to them (anything, if nothing is)."""
    y = y_TO[:, first:]
    return y, y if residual_TO is None else residual_TO[:, first:]


def _columns_at_once(cols: int) -> int:
    return int(min(4096, triton.next_power_of_2(cols)))


def constants(planes: Planes) -> tuple[int | bool | str, ...]:
    """What a kernel is compiled for."""
    return (
        planes.columns,
        planes.low_bits,
        planes.high_bits,
        planes.offset,
        planes.group,
        planes.unit,
        planes.scaled,
        planes.minimum,
        planes.coded,
        planes.kind,
    )
