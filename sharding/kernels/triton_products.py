"""Products with weights in planes, and their rows: which Triton kernels are called when.

    T tokens, I inputs, O outputs, N columns of prepared activations, B blocks of a row

Two ways, by the number of tokens; docs/numerics.md bounds both:

    few     to 16 tokens: integers as they are stored, exact in FP16, meet activations that are two
            FP16 numbers each on tensor cores, group by group; scales come after the sum. Nearly
            float32, and a token's result is the same bits in any company. Bound by memory
    GEMM    above: weights expanded to FP16 in a bounded workspace, then the library's own GEMM

Not here: the kernels (`triton_matmul.py`), layout (`planes.py`), packing (`triton_weights.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from sharding.kernels import triton_matmul
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
                triton_matmul._few[grid](
                    halves, sums, product, part.low, part.high, part.scales, part.units,
                    self._codes, part.rows, blocks, cuts, width, self._tiles.rows,
                    *constants(part.planes), num_warps=self._tiles.warps,
                )  # fmt: skip
            else:
                exact = part.planes.kind == "f16"
                factor = 1.0 if exact else part.headroom
                triton_matmul._few_floats[grid](
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
        triton_matmul._prepare[(width // 2,)](
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
        triton_matmul._halve[(tokens,)](x_TI, half_TI, factor_T, cols, size)
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
        triton_matmul._finish[(len(y_TO), triton.cdiv(cols, size))](
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
        triton_matmul._spread[(triton.cdiv(count, rows_at_once), blocks)](
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
