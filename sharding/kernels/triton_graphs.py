"""Decoding without launches: the blocks of a batch of single tokens as one CUDA graph.

A layer is a dozen kernels of a few microseconds each, less than it takes to launch them from
Python. A graph replays them all, on the same memory; so everything that differs from step to step
lies in one buffer that is written on the host and copied first: where tokens are, their page
tables, how attention is cut. A graph serves batches of one number of tokens, up to a number of
pages and of parts of attention, powers of two: what there is less of is filled up with parts that
do nothing.

    T tokens, I hidden size, N rotations of a model, R rotary pairs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
import triton
from torch import Tensor

from sharding.batch import PAGE_SLOTS
from sharding.kernels.triton_plan import Items, Work
from sharding.model.attention import BatchIndex, Rows

MOST_GRAPHS = 32
"""Kept; the one that was not used for longest makes room."""

Blocks = Callable[[Tensor, BatchIndex, Sequence[Work]], Tensor]
"""Runs a stage's blocks, attention cut so."""

Cut = Callable[[BatchIndex], Sequence[Items] | None]
"""How attention of a batch is cut, for each kind of blocks; None unless all of it is fine parts."""

_ALIGNED = 64


@dataclass(frozen=True)
class Shape:
    """What a graph is made for: tokens, page table entries, page tables (two where layers with a
    window have pages of their own), and of each cut of attention parts, rows that they are merged
    into, and the most rows of a token."""

    tokens: int
    entries: int
    tables: int
    cuts: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, index: BatchIndex, cuts: Sequence[Items]) -> Shape:
        """The smallest that holds a batch."""
        entries = sum(len(rows.pages) for rows in index.rows)
        return cls(
            index.n_tokens,
            triton.next_power_of_2(entries),
            1 if index.window_rows is None else 2,
            tuple(
                (triton.next_power_of_2(len(cut.fine)), len(cut.merged), cut.rows) for cut in cuts
            ),
        )


Array = TypeVar("Array")


@dataclass(frozen=True)
class _Fields(Generic[Array]):
    """The inputs' tensors: angles, slots, of each kind of layers the tokens' pages and the page
    tables, of each cut its parts and what they are merged into."""

    cos_NTR: Array
    sin_NTR: Array
    slot_T: Array
    tables: list[tuple[Array, Array]]
    cuts: list[tuple[Array, Array]]

    @classmethod
    def of(cls, views: Sequence[Array], tables: int) -> _Fields[Array]:
        """From all of them in a row."""
        cos_NTR, sin_NTR, slot_T, *others = views
        pairs = list(zip(others[::2], others[1::2], strict=True))
        return cls(cos_NTR, sin_NTR, slot_T, pairs[:tables], pairs[tables:])


class Inputs:
    """What differs from step to step, on the host and on the device, byte for byte the same.

    On the host twice, in turn: a step is written while the former one's copy may be under way."""

    def __init__(self, shape: Shape, index: BatchIndex, device: torch.device) -> None:
        self._places: list[tuple[int, tuple[int, ...], torch.dtype]] = []
        self._size = 0
        rope = index.rope
        for _ in ("cosines", "sines"):
            self._add((rope.rotations, shape.tokens, rope.turning), torch.float32)
        self._add((shape.tokens,), torch.int64)
        for _ in range(shape.tables):
            self._add((shape.tokens,), torch.int64)
            self._add((shape.entries,), torch.int64)
        for parts, merged, _ in shape.cuts:
            self._add((parts, 8), torch.int32)
            self._add((merged, 4), torch.int32)
        pinned = device.type == "cuda"
        self._hosts = [
            torch.zeros(self._size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)
        ]
        self._copied = [torch.cuda.Event() for _ in range(2)] if pinned else []
        # Whose page tables are written there: they stay the same from a request's step to its next.
        self._tables: list[list[Sequence[Tensor]]] = [[()] * shape.tables for _ in range(2)]
        self._turn = 0
        self._device = torch.zeros(self._size, dtype=torch.uint8, device=device)
        self._written = [
            _Fields.of([view.numpy() for view in self._views(host)], shape.tables)
            for host in self._hosts
        ]
        fields = _Fields.of(self._views(self._device), shape.tables)
        self.index = BatchIndex((), rope, device, () if shape.tables == 2 else None)
        # The tensors that kernels ask an index for, which would make them of its rows.
        known = {"cos_NTR": fields.cos_NTR, "sin_NTR": fields.sin_NTR, "slot_T": fields.slot_T}
        vars(self.index).update(known)
        for window, (page_T, entries) in enumerate(fields.tables):
            vars(self.index.seen_by(window)).update(page_T=page_T, tables=entries)
        self.works = [
            Work(None, (), fine, merged, parts, rows)
            for (fine, merged), (parts, _, rows) in zip(fields.cuts, shape.cuts, strict=True)
        ]

    def _add(self, place: tuple[int, ...], dtype: torch.dtype) -> None:
        self._places.append((self._size, place, dtype))
        size = int(np.prod(place)) * dtype.itemsize
        self._size += -(-size // _ALIGNED) * _ALIGNED

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[at : at + int(np.prod(place)) * dtype.itemsize].view(dtype).view(place)
            for at, place, dtype in self._places
        ]

    def write(self, index: BatchIndex, cuts: Sequence[Items]) -> None:
        """A batch of single tokens of this shape, on the host."""
        self._turn = 1 - self._turn
        if self._copied:
            self._copied[self._turn].synchronize()  # of the step before the last
        to = self._written[self._turn]
        for row, rows in enumerate(index.rows):
            to.slot_T[row] = rows.position % PAGE_SLOTS
        for kind in range(len(to.tables)):
            self._write_tables(index.rows if kind == 0 else index.window_rows or (), kind)
        positions_T = torch.tensor([rows.position for rows in index.rows])
        cos_NTR, sin_NTR = index.rope.angles(positions_T)
        to.cos_NTR[:], to.sin_NTR[:] = cos_NTR.numpy(), sin_NTR.numpy()
        for (fine, merged), cut in zip(to.cuts, cuts, strict=True):
            fine[: len(cut.fine)] = cut.fine
            fine[len(cut.fine) :] = 0  # no rows, no slots
            merged[:] = cut.merged

    def _write_tables(self, segments: Sequence[Rows], kind: int) -> None:
        page_T, entries = self._written[self._turn].tables[kind]
        tables = [rows.pages for rows in segments]
        for row, rows in enumerate(segments):
            page_T[row] = tables[row][rows.position // PAGE_SLOTS]
        if not _same(tables, self._tables[self._turn][kind]):
            np.concatenate(tables, out=entries[: sum(map(len, tables))])
            self._tables[self._turn][kind] = tables

    def submit(self) -> None:
        """What was written last is under way to the device."""
        self._device.copy_(self._hosts[self._turn], non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _next(index: BatchIndex) -> BatchIndex | None:
    """The batch of the same requests' next tokens, unless one has no room for it."""
    if any(each.position + 1 >= len(each.pages) * PAGE_SLOTS for each in index.rows):
        return None
    window_rows = None if index.window_rows is None else _moved_on(index.window_rows)
    return replace(index, rows=_moved_on(index.rows), window_rows=window_rows)


def _moved_on(segments: Sequence[Rows]) -> tuple[Rows, ...]:
    return tuple(replace(rows, position=rows.position + 1) for rows in segments)


class Replayed(Protocol):
    """A `torch.cuda.CUDAGraph`, as far as it is needed."""

    def replay(self) -> None:
        """Compute again, from and to the same memory."""


@dataclass(frozen=True)
class CapturedGraph:
    """The blocks of batches of one shape, from `x` to `y`."""

    shape: Shape
    inputs: Inputs
    x: Tensor
    graph: Replayed
    y: Tensor


class Graphs:
    """The graphs of a stage's blocks, made when a batch first needs one.

    While a step computes, the inputs of the next are written as if every request went on: what
    decides that is only its token, which comes as `x`."""

    def __init__(self, device: torch.device, blocks: Blocks, cut: Cut) -> None:
        self._device = device
        self._blocks = blocks
        self._cut = cut
        self._made: dict[Shape, CapturedGraph] = {}
        self._foreseen: tuple[BatchIndex, CapturedGraph] | None = None
        # One for all: they run one after the other, and their results are held.
        self._pool: Any = None  # torch has a type for it, which differs between its versions

    def run(self, x_TI: Tensor, index: BatchIndex) -> Tensor | None:
        """Hidden states after the blocks; None for a batch that no graph can compute."""
        found = self._ready(index) or self._planned(index, x_TI)
        if found is None:
            return None
        self._keep(found)
        found.inputs.submit()
        found.x.copy_(x_TI)
        found.graph.replay()
        y_TI = found.y.clone()  # the next step writes there
        self._foresee(index)
        return y_TI

    def _ready(self, index: BatchIndex) -> CapturedGraph | None:
        """If this batch was foreseen, its graph, whose inputs are written."""
        (expected, found), self._foreseen = self._foreseen or (None, None), None
        if expected is None or len(expected.rows) != len(index.rows):
            return None
        for one, other in zip(expected.rows, index.rows, strict=True):
            if one.position != other.position or one.pages is not other.pages:
                return None
        return found

    def _planned(self, index: BatchIndex, x_TI: Tensor) -> CapturedGraph | None:
        cuts = self._cut(index)
        if cuts is None:
            return None
        shape = Shape.of(index, cuts)
        found = self._made.get(shape) or self._make(shape, x_TI, index, cuts)
        found.inputs.write(index, cuts)
        return found

    def _keep(self, used: CapturedGraph) -> None:
        """It is the last to go."""
        self._made.pop(used.shape, None)
        if len(self._made) >= MOST_GRAPHS:
            del self._made[next(iter(self._made))]
        self._made[used.shape] = used

    def _foresee(self, index: BatchIndex) -> None:
        following = _next(index)
        cuts = None if following is None else self._cut(following)
        if following is None or cuts is None:
            return
        found = self._made.get(Shape.of(following, cuts))
        if found is not None:
            found.inputs.write(following, cuts)
            self._foreseen = following, found

    def _make(
        self, shape: Shape, x_TI: Tensor, index: BatchIndex, cuts: Sequence[Items]
    ) -> CapturedGraph:
        inputs, x = Inputs(shape, index, self._device), x_TI.clone()
        inputs.write(index, cuts)
        inputs.submit()
        self._blocks(x, inputs.index, inputs.works)  # compiles; writes keys and values, as it will
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            y = self._blocks(x, inputs.index, inputs.works)
        return CapturedGraph(shape, inputs, x, graph, y)
