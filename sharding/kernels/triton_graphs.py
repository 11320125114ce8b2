"""Decoding without launches: the blocks of a batch of single tokens as one CUDA graph.

A layer is a dozen kernels of a few microseconds each, less than it takes to launch them from
Python. A graph replays them all, on the same memory; so everything that differs from step to step
lies in one buffer that is written on the host and copied first: where tokens are, their page
tables, how attention is cut. A graph serves batches of one number of tokens, up to a number of
pages and of parts of attention, powers of two: what there is less of is filled up with parts that
do nothing.

    T tokens, I hidden size, R rotary pairs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from sharding.kernels.triton_plan import Items, Work
from sharding.model.attention import BatchIndex

MOST_GRAPHS = 32
"""Kept; the one that was not used for longest makes room."""

Blocks = Callable[[Tensor, BatchIndex, Sequence[Work]], Tensor]
"""Runs a stage's blocks, attention cut so."""

_ALIGNED = 64


@dataclass(frozen=True)
class Shape:
    """What a graph is made for: tokens, rotary pairs, page table entries, and of each cut of
    attention parts, rows that they are merged into, and the most rows of a token."""

    tokens: int
    pairs: int
    entries: int
    cuts: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, index: BatchIndex, cuts: Sequence[Items]) -> Shape:
        """The smallest that holds a batch."""
        entries = sum(len(rows.pages) for rows in index.rows)
        return cls(
            index.n_tokens,
            len(index.freqs_R),
            triton.next_power_of_2(entries),
            tuple(
                (triton.next_power_of_2(len(cut.fine)), len(cut.merged), cut.rows) for cut in cuts
            ),
        )


class Inputs:
    """What differs from step to step, on the host and on the device, byte for byte the same.

    On the host twice, in turn: a step is written while the former one's copy may be under way."""

    def __init__(self, shape: Shape, index: BatchIndex, device: torch.device) -> None:
        self._shape = shape
        self._places: list[tuple[int, tuple[int, ...], torch.dtype]] = []
        self._size = 0
        tokens, angles = (shape.tokens,), (shape.tokens, shape.pairs)
        for place, dtype in (
            (tokens, torch.int64),
            (tokens, torch.int64),
            ((shape.entries,), torch.int64),
            (angles, torch.float32),
            (angles, torch.float32),
        ):
            self._add(place, dtype)
        for parts, merged, _ in shape.cuts:
            self._add((parts, 8), torch.int32)
            self._add((merged, 4), torch.int32)
        pinned = device.type == "cuda"
        self._hosts = [
            torch.zeros(self._size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)
        ]
        self._copied = [torch.cuda.Event() for _ in range(2)] if pinned else []
        self._turn = 0
        self._device = torch.zeros(self._size, dtype=torch.uint8, device=device)
        self._written: list[list[NDArray[np.generic]]] = [
            [view.numpy() for view in self._views(host)] for host in self._hosts
        ]
        views = self._views(self._device)
        self.index = BatchIndex((), index.freqs_R, index.pair_shape, index.pair_axis, device)
        # The tensors that kernels ask the index for, which would make them of its rows.
        names = ("page_T", "slot_T", "tables", "cos_TR", "sin_TR")
        vars(self.index).update(zip(names, views[:5], strict=True))
        self.works = [
            Work(None, (), views[5 + 2 * number], views[6 + 2 * number], parts, rows)
            for number, (parts, _, rows) in enumerate(shape.cuts)
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
        """A batch of this shape; the copy to the device is under way afterwards."""
        self._turn = 1 - self._turn
        if self._copied:
            self._copied[self._turn].synchronize()  # of the step before the last
        written, host = self._written[self._turn], index.to(torch.device("cpu"))
        tensors = [host.page_T, host.slot_T, host.tables, host.cos_TR, host.sin_TR]
        for to, tensor in zip(written[:5], tensors, strict=True):
            to[: len(tensor)] = tensor.numpy()
        for number, cut in enumerate(cuts):
            fine, merged = written[5 + 2 * number : 7 + 2 * number]
            fine[: len(cut.fine)] = cut.fine
            fine[len(cut.fine) :] = 0  # no rows, no slots
            merged[:] = cut.merged
        self._device.copy_(self._hosts[self._turn], non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()


_Made = tuple[Inputs, Tensor, torch.cuda.CUDAGraph, Tensor]


class Graphs:
    """The graphs of a stage's blocks, made when a batch first needs one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[Shape, _Made] = {}
        # One for all: they run one after the other, and their results are held.
        self._pool: Any = None  # torch has a type for it, which differs between its versions

    def run(self, blocks: Blocks, x_TI: Tensor, index: BatchIndex, cuts: Sequence[Items]) -> Tensor:
        """Hidden states after the blocks; all fine parts, no chunks."""
        shape = Shape.of(index, cuts)
        made = self._made.pop(shape, None)
        if made is None:
            if len(self._made) >= MOST_GRAPHS:
                del self._made[next(iter(self._made))]
            made = self._make(blocks, shape, x_TI, index, cuts)
        self._made[shape] = made  # the last to go
        inputs, x, graph, y = made
        inputs.write(index, cuts)
        x.copy_(x_TI)
        graph.replay()
        return y.clone()  # the next step writes there

    def _make(
        self,
        blocks: Blocks,
        shape: Shape,
        x_TI: Tensor,
        index: BatchIndex,
        cuts: Sequence[Items],
    ) -> _Made:
        inputs, x = Inputs(shape, index, self._device), x_TI.clone()
        inputs.write(index, cuts)
        blocks(x, inputs.index, inputs.works)  # compiles; writes keys and values, as it will
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            y = blocks(x, inputs.index, inputs.works)
        return inputs, x, graph, y
