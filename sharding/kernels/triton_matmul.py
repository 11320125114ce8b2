"""Products with weights in planes, and their rows: Triton kernels and who is called when.

    T tokens, I inputs, O outputs, N columns of prepared activations, B blocks of a row

Two ways, by the number of tokens; docs/numerics.md bounds both:

    few     to 16 tokens: integers as they are stored, exact in FP16, meet activations that are two
            FP16 numbers each on tensor cores, group by group; scales come after the sum. Nearly
            float32, and a token's result is the same bits in any company. Bound by memory
    GEMM    above: weights expanded to FP16 in a bounded workspace, then the library's own GEMM

Not here: layout (`planes.py`) and packing (`triton_weights.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sharding.kernels.planes import FLOAT_COLUMNS, WORDS, Planes
from sharding.kernels.triton_weights import IQ4_CODES, Part, PlanesWeight

FEW_TOKENS = 16
"""Above, the library's GEMM is worth expanding the weight."""

WORKSPACE_BYTES = 1 << 27
"""Most bytes of expanded weights at a time."""

COPIED_BYTES = 1 << 24
"""Bytes of floats that are copied at a time."""

PROGRAMS = 512
"""A matrix of few rows is cut along its columns too, into about so many programs: enough for any
GPU to wait for memory in all of them at once. The cuts depend on the matrix alone."""

_WORDS = tl.constexpr(WORDS)
_FLOAT_COLUMNS = tl.constexpr(FLOAT_COLUMNS)
_FP16_1024 = tl.constexpr(0x6400)


@dataclass(frozen=True)
class Tiles:
    """Rows of one program, powers of two: in `_few`, with its threads in 32s, and in `_spread`.
    Columns in `_prepare`, `_halve` and `_finish`.

    Two times 32 threads, not four: four have other matrix instructions for many columns than for
    few, and a token's result would depend on how many there are.
    """

    rows: int = 32
    warps: int = 2
    spread_rows: int = 16
    columns: int = 4096


INTERPRETED = Tiles(256, 2, 128, 4096)
"""An interpreted program costs milliseconds, however large it is."""


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
    # The upper and the lower halves meet.
    y_OT = tl.sum(tl.reshape(y_ON, [ROWS, 2, N // 2]), axis=1)
    t = tl.arange(0, N // 2)
    to = y + (cut * (N // 2) + t)[None, :] * rows + row_O[:, None]
    tl.store(to, y_OT, mask=there_O[:, None])


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
    y_OT = tl.sum(tl.reshape(y_ON, [ROWS, 2, N // 2]), axis=1)
    t = tl.arange(0, N // 2)
    to = y + (cut * (N // 2) + t)[None, :] * rows + row_O[:, None]
    tl.store(to, y_OT, mask=there_O[:, None])


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


class Products:
    """The kernels with the sizes and tables that they need on one device."""

    def __init__(self, device: torch.device, tiles: Tiles) -> None:
        self._tiles = tiles
        self._codes = torch.tensor(IQ4_CODES, dtype=torch.int8, device=device)

    def matmul(self, x_TI: Tensor, weight: PlanesWeight, residual_TO: Tensor | None) -> Tensor:
        """`residual + x @ weight.T`, `[T, O]`."""
        tokens = len(x_TI)
        y_TO = torch.empty(tokens, weight.rows, dtype=torch.float32, device=x_TI.device)
        if tokens > FEW_TOKENS:
            self._gemm(x_TI, weight, residual_TO, y_TO)
        elif tokens > 0:
            self._few(x_TI, weight, residual_TO, y_TO)
        return y_TO

    def rows(self, weight: PlanesWeight, ids_T: Tensor) -> Tensor:
        """Rows `ids_T` of the weight, float32 `[T, I]`."""
        out_TI = torch.empty(len(ids_T), weight.cols, dtype=torch.float32, device=ids_T.device)
        for part in weight.parts:
            self._expand(part, out_TI, part.first, 1.0, ids_T)
        return out_TI

    def _few(
        self, x_TI: Tensor, weight: PlanesWeight, residual_TO: Tensor | None, y_TO: Tensor
    ) -> None:
        tokens, cols = x_TI.shape
        width = prepared_columns(tokens)
        prepared: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        for part in weight.parts:
            # Only formats with minima look at the sums.
            way = part.cols, part.planes.group if part.planes.minimum else 32
            if way not in prepared:
                prepared[way] = self._prepared(x_TI, width, *way)
            halves, sums, factor_T = prepared[way]
            grid, blocks, cuts = self._cut(part)
            product = x_TI.new_empty(cuts, width // 2, part.rows)
            factor = 1.0
            if part.planes.quantised:
                _few[grid](
                    halves, sums, product, part.low, part.high, part.scales, part.units,
                    self._codes, part.rows, blocks, cuts, width, self._tiles.rows,
                    *constants(part.planes), num_warps=self._tiles.warps,
                )  # fmt: skip
            else:
                exact = part.planes.kind == "f16"
                factor = 1.0 if exact else part.headroom
                _few_floats[grid](
                    halves, product, part.low, part.rows, blocks, cuts, 1.0 / factor, width,
                    self._tiles.rows, exact, num_warps=self._tiles.warps,
                )  # fmt: skip
            self._finish(product, factor_T, factor, part.first, y_TO, residual_TO)

    def _prepared(
        self, x_TI: Tensor, width: int, padded: int, group: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, cols = x_TI.shape
        halves = torch.empty(padded, width, dtype=torch.float16, device=x_TI.device)
        sums = x_TI.new_empty(padded // group, width)
        factor_T = x_TI.new_empty(width // 2)
        size = _columns_at_once(padded, self._tiles.columns)
        _prepare[(width // 2,)](
            x_TI, halves, sums, factor_T, tokens, cols, padded, width, group, size, num_warps=8
        )
        return halves, sums, factor_T

    def _cut(self, part: Part) -> tuple[tuple[int, int], int, int]:
        """A grid of (rows, columns), the blocks of a row, and how many cuts they make."""
        tall = triton.cdiv(part.rows, self._tiles.rows)
        columns = WORDS * part.planes.columns if part.planes.quantised else FLOAT_COLUMNS
        blocks = part.cols // columns
        length = triton.cdiv(blocks, min(blocks, triton.cdiv(PROGRAMS, tall)))
        cuts = triton.cdiv(blocks, length)
        return (tall, cuts), blocks, cuts

    def _gemm(
        self, x_TI: Tensor, weight: PlanesWeight, residual_TO: Tensor | None, y_TO: Tensor
    ) -> None:
        tokens, cols = x_TI.shape
        half_TI = torch.empty(tokens, cols, dtype=torch.float16, device=x_TI.device)
        factor_T = x_TI.new_empty(tokens)
        size = _columns_at_once(cols, self._tiles.columns)
        _halve[(tokens,)](x_TI, half_TI, factor_T, cols, size)
        slab = max(1, min(weight.rows, WORKSPACE_BYTES // (2 * cols)))
        space = torch.empty(slab, cols, dtype=torch.float16, device=x_TI.device)
        for part in weight.parts:
            for first in range(0, part.rows, slab):
                count, at = min(slab, part.rows - first), part.first + first
                if part.planes.kind == "f16":
                    expanded_OI, factor = part.low[first : first + count, :cols], 1.0
                else:
                    expanded_OI, factor = space[:count], part.headroom
                    self._expand(part, expanded_OI, first, 1.0 / factor)
                product = _half_gemm(half_TI, expanded_OI)[None]
                self._finish(product, factor_T, factor, at, y_TO, residual_TO)

    def _finish(
        self,
        product: Tensor,
        factor_T: Tensor,
        factor: float,
        first: int,
        y_TO: Tensor,
        residual_TO: Tensor | None,
    ) -> None:
        """Cuts `[cuts, T or more, o]` into columns from `first` on."""
        cuts, _, cols = product.shape
        size = _columns_at_once(cols, self._tiles.columns)
        y = y_TO[:, first:]
        _finish[(len(y_TO), triton.cdiv(cols, size))](
            product, y, y if residual_TO is None else residual_TO[:, first:], factor_T, factor,
            cuts, product.stride(0), cols, y_TO.shape[1], size, residual_TO is not None,
        )  # fmt: skip

    def _expand(
        self, part: Part, out: Tensor, first: int, factor: float, ids: Tensor | None = None
    ) -> None:
        """Rows from `first` of the part, or those named of the weight, into `out` `[n, I]`."""
        count, cols = out.shape
        if not part.planes.quantised:
            _copy(part, out, first, factor, ids)
            return
        if count == 0:
            return
        rows_at_once = self._tiles.spread_rows
        blocks = part.cols // (WORDS * part.planes.columns)
        _spread[(triton.cdiv(count, rows_at_once), blocks)](
            out, part.low if ids is None else ids, part.low, part.high, part.scales, part.units,
            self._codes, first, part.rows, count, cols, blocks, factor, ids is not None,
            rows_at_once, *constants(part.planes),
        )  # fmt: skip


def _copy(part: Part, out: Tensor, first: int, factor: float, ids: Tensor | None) -> None:
    """`_expand` of floats."""
    count, cols = out.shape
    if ids is None:
        step = max(1, COPIED_BYTES // (4 * cols))
        for row in range(0, count, step):
            stop = min(count, row + step)
            out[row:stop] = part.low[first + row : first + stop, :cols].float() * factor
        return
    own_T1 = ((ids >= first) & (ids < first + part.rows))[:, None]
    rows_TI = part.low[(ids - first).clamp(0, part.rows - 1), :cols].float()
    out.copy_(torch.where(own_T1, rows_TI * factor, out))


def _half_gemm(x_TI: Tensor, w_OI: Tensor) -> Tensor:
    """FP16 in, float32 sums out. What the GPU's library does; elsewhere the same definition."""
    if x_TI.is_cuda:
        return torch.mm(x_TI, w_OI.t(), out_dtype=torch.float32)
    return torch.mm(x_TI.float(), w_OI.float().t())


def prepared_columns(tokens: int) -> int:
    """Two for each token, and enough of them for a matrix instruction."""
    return 2 * max(4, int(triton.next_power_of_2(tokens)))


def _columns_at_once(cols: int, most: int) -> int:
    return int(min(most, triton.next_power_of_2(max(32, cols))))


def constants(planes: Planes) -> tuple[int | bool, ...]:
    """What a kernel of a quantised format is compiled for."""
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
    )
