"""Products with weights in planes, and their rows: which Triton kernels are called when.

    T tokens, I inputs, O outputs, N columns of digits or halves, B blocks of a row

Two ways, by the number of tokens; docs/numerics.md bounds both:

    few     to 16 tokens: activations are integers of 22 bits and a power of two for each block of
            256, and their digits to the base 256 meet the stored integers on tensor cores, exactly;
            scales come after the sum. Nearly float32, and a token's result is the same bits in any
            company. Bound by memory
    GEMM    above: weights expanded to FP16 in a bounded workspace, then the library's own GEMM

Float weights of few tokens meet activations that are two FP16 numbers each.

Not here: the kernels (`triton_digits.py`, `triton_matmul.py`, `triton_gemm.py`), layout
(`planes.py`), packing (`triton_weights.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from sharding.kernels import triton_digits, triton_gemm, triton_matmul
from sharding.kernels.planes import BLOCK, FLOAT_COLUMNS, Planes
from sharding.kernels.triton_digits import Digits
from sharding.kernels.triton_weights import IQ4_CODES, Part, PlanesWeight
from sharding.model.arch import Activation

FEW_TOKENS = 16
"""Above, the library's GEMM is worth expanding the weight."""

WORKSPACE_BYTES = 1 << 27
"""Most bytes of expanded weights at a time."""

COPIED_BYTES = 1 << 24
"""Bytes of floats that are copied at a time."""

WARPS = 2048
"""A matrix of few rows is cut along its columns too, into up to so many warps: enough for any GPU
to wait for memory in all of them at once. The cuts depend on the matrix alone."""

MOST_CUTS = 8
"""Warps of a program: with more, 16 tokens find too few registers."""

MOST_TILES = 1 << 16
"""Most tiles of rows of a matrix of floats."""


@dataclass(frozen=True)
class Tiles:
    """Rows of one program, powers of two: in `_few`, `_few_floats` and `_spread`; columns in
    `_halves`, `_halve` and `_finish`; blocks in the kernels of
    `triton_digits.py`."""

    rows: int = 16
    float_rows: int = 32
    spread_rows: int = 8
    columns: int = 4096
    blocks: int = 2


INTERPRETED = Tiles(256, 256, 128, 4096, 16)
"""An interpreted program costs milliseconds, however large it is."""


class Products:
    """The kernels with the sizes and tables that they need on one device."""

    def __init__(self, device: torch.device, tiles: Tiles) -> None:
        self._tiles = tiles
        # Of the cuts of a tile of floats that are done; every product leaves zeros.
        self._counters = torch.zeros(MOST_TILES, dtype=torch.int32, device=device)
        self._codes = torch.tensor(IQ4_CODES, dtype=torch.int8, device=device)

    def matmul(self, x_TI: Tensor, weight: PlanesWeight, residual_TO: Tensor | None) -> Tensor:
        """`residual + x @ weight.T`, `[T, O]`."""
        tokens = len(x_TI)
        y_TO = torch.empty(tokens, weight.rows, dtype=torch.float32, device=x_TI.device)
        if tokens > FEW_TOKENS:
            self._gemm(x_TI, weight, residual_TO, y_TO)
        elif tokens > 0:
            self._few_tokens(x_TI, weight, residual_TO, y_TO)
        return y_TO

    def rows(self, weight: PlanesWeight, ids_T: Tensor) -> Tensor:
        """Rows `ids_T` of the weight, float32 `[T, I]`."""
        out_TI = torch.empty(len(ids_T), weight.cols, dtype=torch.float32, device=ids_T.device)
        for part in weight.parts:
            self._expand(part, out_TI, part.first, 1.0, ids_T)
        return out_TI

    def of_digits(
        self, digits: Digits, weight: PlanesWeight, residual_TO: Tensor | None = None
    ) -> Tensor:
        """`matmul` of few activations that are digits already, with a quantised weight."""
        y_TO = digits.factors.new_empty(digits.tokens, weight.rows)
        for part in weight.parts:
            self._few(digits, part, residual_TO, y_TO)
        return y_TO

    def digits(self, x_TI: Tensor) -> Digits:
        """Of few tokens: what a product makes of them first."""
        return triton_digits.of_rows(x_TI, self._tiles.blocks)

    def normed_digits(self, x_TI: Tensor, norm_I: Tensor, eps: float) -> Digits:
        """Of `rms_norm(x)`."""
        return triton_digits.of_norm(x_TI, norm_I, eps, self._tiles.blocks)

    def gated_digits(self, gate_up_T2F: Tensor, activation: Activation = "silu") -> Digits:
        """Of `gated(gate_up)`."""
        return triton_digits.of_gate(gate_up_T2F, activation, self._tiles.blocks)

    def _few_tokens(
        self, x_TI: Tensor, weight: PlanesWeight, residual_TO: Tensor | None, y_TO: Tensor
    ) -> None:
        digits: Digits | None = None
        for part in weight.parts:
            if part.planes.quantised:
                digits = digits or self.digits(x_TI)
                self._few(digits, part, residual_TO, y_TO)
            else:
                self._few_floats(x_TI, part, residual_TO, y_TO)

    def _few(self, digits: Digits, part: Part, residual_TO: Tensor | None, y_TO: Tensor) -> None:
        tokens, blocks = digits.tokens, part.cols // BLOCK
        assert blocks == digits.blocks, (blocks, digits.blocks)
        tall, cuts, length = cut(part.rows, self._tiles.rows, blocks)
        y = y_TO[:, part.first :]
        residual = y if residual_TO is None else residual_TO[:, part.first :]
        triton_matmul._few[tall,](
            digits.words, digits.factors, y, residual, *part.tensors, self._codes, part.rows,
            blocks, length, y_TO.shape[1], tokens, cuts, digits.width, self._tiles.rows,
            residual_TO is not None, *constants(part.planes), num_warps=cuts, num_stages=1,
        )  # fmt: skip

    def _few_floats(
        self, x_TI: Tensor, part: Part, residual_TO: Tensor | None, y_TO: Tensor
    ) -> None:
        tokens, exact = len(x_TI), part.planes.kind == "f16"
        blocks = part.cols // FLOAT_COLUMNS
        tall = triton.cdiv(part.rows, self._tiles.float_rows)
        assert tall <= MOST_TILES, part.rows
        length = triton.cdiv(blocks, min(blocks, max(1, round(WARPS / tall))))
        grid, y = (tall, triton.cdiv(blocks, length)), y_TO[:, part.first :]
        partials = y_TO.new_empty(grid[1], tokens, part.rows)
        residual = y if residual_TO is None else residual_TO[:, part.first :]
        width = 4 * max(2, triton_digits.room(tokens) // 2)
        halves, factor_T = self._halves(x_TI, width, part.cols)
        triton_matmul._few_floats[grid](
            halves, factor_T, y, residual, partials, self._counters, part.low, part.rows, blocks,
            y_TO.shape[1], tokens, grid[1], 1.0 if exact else part.headroom, width,
            self._tiles.float_rows, residual_TO is not None, exact, num_warps=2,
        )  # fmt: skip

    def _halves(self, x_TI: Tensor, width: int, padded: int) -> tuple[Tensor, Tensor]:
        """Two FP16 numbers for each activation, and what undoes their scale."""
        tokens, cols = x_TI.shape
        halves = torch.empty(padded, width, dtype=torch.float16, device=x_TI.device)
        factor_T = x_TI.new_empty(width // 2)
        size = _columns_at_once(padded, self._tiles.columns)
        triton_matmul._halves[(width // 2,)](
            x_TI, halves, factor_T, tokens, cols, padded, width, size, num_warps=8
        )
        return halves, factor_T

    def _gemm(
        self, x_TI: Tensor, weight: PlanesWeight, residual_TO: Tensor | None, y_TO: Tensor
    ) -> None:
        tokens, cols = x_TI.shape
        half_TI = torch.empty(tokens, cols, dtype=torch.float16, device=x_TI.device)
        factor_T = x_TI.new_empty(tokens)
        size = _columns_at_once(cols, self._tiles.columns)
        triton_gemm._halve[(tokens,)](x_TI, half_TI, factor_T, cols, size)
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
                product = _half_gemm(half_TI, expanded_OI)
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
        """A product `[T, o]` into columns from `first` on."""
        cols = product.shape[1]
        size = _columns_at_once(cols, self._tiles.columns)
        y = y_TO[:, first:]
        triton_gemm._finish[(len(y_TO), triton.cdiv(cols, size))](
            product, y, y if residual_TO is None else residual_TO[:, first:], factor_T, factor,
            cols, y_TO.shape[1], size, residual_TO is not None,
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
        blocks = part.cols // BLOCK
        triton_gemm._spread[(triton.cdiv(count, rows_at_once), blocks)](
            out, part.low if ids is None else ids, *part.tensors, self._codes, first, part.rows,
            count, cols, blocks, factor, ids is not None, rows_at_once, *constants(part.planes),
            num_warps=1,
        )  # fmt: skip


def cut(rows: int, tile: int, blocks: int) -> tuple[int, int, int]:
    """Tiles of rows, cuts of each along its blocks, blocks of a cut."""
    tall = triton.cdiv(rows, tile)
    wanted = min(MOST_CUTS, blocks, max(1, WARPS // tall))
    cuts = 1 << wanted.bit_length() - 1
    return tall, cuts, triton.cdiv(blocks, cuts)


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


def _columns_at_once(cols: int, most: int) -> int:
    return int(min(most, triton.next_power_of_2(max(32, cols))))


def constants(planes: Planes) -> tuple[int | bool, ...]:
    """What a kernel of a quantised format is compiled for, from ASM on."""
    return (
        not triton.knobs.runtime.interpret,
        planes.low_bits,
        planes.high_bits,
        planes.place,
        planes.group,
        planes.scaled,
        planes.minimum,
        planes.coded,
    )
