"""How attention of a batch is cut: into items for the kernels of `triton_attention.py`, in tiles.

An item is eight numbers: a segment's first token and position, where its page table begins, the
first and last row, the first and last slot, and for few rows the part that it makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharding.batch import PAGE_SLOTS
from sharding.kernels.triton_prefix import Library, Prefix
from sharding.model.attention import BatchIndex, Rows

LEAST_SPLIT, SPLIT = 64, 512
"""Slots that one program of a decoded token's attention reads, at least and at most."""

PROGRAMS = 1024
"""A token's attention is cut into about so many programs: several for each processor of a GPU."""

MOST_PARTS = 256
"""But not finer than into about so many parts, since they are merged, while parts are short."""

FINE_ROWS = 32
"""Up to so many rows of a segment are computed finely; of heads above 128, half as many."""


@dataclass(frozen=True)
class Tile:
    """Rows and slots of one step, powers of two; threads in 32s; steps under way."""

    rows: int
    slots: int
    warps: int
    stages: int = 3


@dataclass(frozen=True)
class Tiles:
    """Of few rows and of chunks, for heads up to 128 and above: registers and shared memory hold
    half as much of those. Few rows are one warp's, or 16: then 16 rows and 32 are the same bits."""

    fine: Tile = Tile(FINE_ROWS, 32, 1)
    fine_large: Tile = Tile(FINE_ROWS // 2, 64, 4)
    chunk: Tile = Tile(128, 64, 8)
    chunk_large: Tile = Tile(64, 32, 4, 2)
    library: Library | None = None

    def of(self, dim: int, fine: bool) -> Tile:
        """For heads of so many numbers."""
        if fine:
            return self.fine if dim <= 128 else self.fine_large
        return self.chunk if dim <= 128 else self.chunk_large


_SLOW = Tile(64, 256, 4)
INTERPRETED = Tiles(_SLOW, _SLOW, _SLOW, _SLOW, Library(48, 64, 256))
"""An interpreted step costs a millisecond, however large it is."""

HOPPER = Tiles(chunk=Tile(128, 64, 4), chunk_large=Tile(128, 64, 8, 2), library=Library())
"""Where a program has 227 KB of shared memory, and cuDNN has kernels that are faster than ours."""


@dataclass(frozen=True, order=True)
class Way:
    """What cuts attention beside the batch: query heads that share a kv head, kv heads, the window
    and the head dim of a block."""

    shared: int
    kv_heads: int
    window: int
    dim: int


@dataclass(frozen=True)
class Items:
    """How a batch is cut, on the host: `fine` int32 `[n, 8]`, `merged` int32 `[m, 4]`. `rows`: the
    most of a fine segment."""

    chunks: Sequence[tuple[int, ...]]
    prefixes: Sequence[Prefix]
    fine: NDArray[np.int32]
    merged: NDArray[np.int32]
    rows: int


@dataclass(frozen=True)
class Work:
    """The same on the device, for the kernels of every layer of one window; so many fine parts."""

    chunks: Tensor | None
    prefixes: Sequence[Prefix]
    fine: Tensor | None
    merged: Tensor | None
    parts: int
    rows: int


def plan_items(index: BatchIndex, way: Way, tiles: Tiles) -> Items:
    """Cuts a batch into items."""
    shared, dim = way.shared, way.dim
    chunks: list[tuple[int, ...]] = []
    fine: list[NDArray[np.int32]] = []
    merged: list[NDArray[np.int32]] = []
    prefixes: list[Prefix] = []
    table = most = made = 0
    for rows in index.rows:
        count = (rows.stop - rows.first) * shared
        if count > fine_rows(dim):
            prefix = _prefix(rows, table, way, tiles.library)
            prefixes += [prefix] if prefix else []
            row_tile = tiles.of(dim, fine=False).rows
            chunks += _chunk_items(rows, table, way, row_tile, prefix)
        else:
            most = max(most, count)
            parts = _fine_items(rows, table, count, way, first_part=made)
            merged.append(_merged_rows(rows, shared, made, len(parts)))
            fine.append(parts)
            made += len(parts)
        table += len(rows.pages)
    # The longest first, so that the last to begin is not the last to end.
    chunks.sort(key=lambda item: item[6] - item[5], reverse=True)
    return Items(chunks, prefixes, _stacked(fine, 8), _stacked(merged, 4), most)


def plan_work(index: BatchIndex, way: Way, tiles: Tiles) -> Work:
    """The cut of a batch, on its device."""
    items, device = plan_items(index, way, tiles), index.tables.device
    return Work(
        chunks=_on(device, items.chunks),
        prefixes=items.prefixes,
        fine=_on(device, items.fine),
        merged=_on(device, items.merged),
        parts=len(items.fine),
        rows=items.rows,
    )


def fine_rows(dim: int) -> int:
    """Up to so many rows of a segment are computed finely."""
    return FINE_ROWS if dim <= 128 else FINE_ROWS // 2


def _on(
    device: torch.device, items: Sequence[tuple[int, ...]] | NDArray[np.int32]
) -> Tensor | None:
    return torch.tensor(items, dtype=torch.int32).to(device) if len(items) else None


def _stacked(arrays: Sequence[NDArray[np.int32]], width: int) -> NDArray[np.int32]:
    if len(arrays) == 1:  # a lone user's
        return arrays[0]
    return np.concatenate(arrays) if arrays else np.empty((0, width), np.int32)


def _first_seen(position: int, window: int, grain: int) -> int:
    """The first slot that a token sees, down to a multiple of `grain`."""
    return max(0, position - window + 1) // grain * grain if window else 0


def _prefix(rows: Rows, table: int, way: Way, library: Library | None) -> Prefix | None:
    """What of a chunk is the library's."""
    tokens = rows.stop - rows.first
    if library is None or way.window or tokens < library.tokens:
        return None
    slots = rows.position // library.grain * library.grain
    if not slots or way.dim > library.dims or way.dim % 8:  # cuDNN's own limits
        return None
    stop = rows.first + tokens // library.rows * library.rows
    return Prefix(rows.first, stop, table, slots)


def _chunk_items(
    rows: Rows, table: int, way: Way, row_tile: int, prefix: Prefix | None
) -> Iterator[tuple[int, ...]]:
    """Rows that have a prefix begin after it."""
    shared, window = way.shared, way.window
    count = (rows.stop - rows.first) * shared
    done = (prefix.stop - prefix.first) * shared if prefix else 0
    for row in range(0, count, row_tile):
        stop = min(count, row + row_tile)
        start_slot = _first_seen(rows.position + row // shared, window, PAGE_SLOTS)
        if prefix and row < done:
            start_slot = prefix.slots
        stop_slot = rows.position + (stop - 1) // shared + 1
        yield rows.first, rows.position, table, row, stop, start_slot, stop_slot, 0


def split_of(slots: int, kv_heads: int) -> int:
    """How many of a token's slots a program reads: a power of two."""
    wanted = max(LEAST_SPLIT, slots // MOST_PARTS, slots * kv_heads // PROGRAMS)
    return min(SPLIT, 1 << wanted.bit_length() - 1)


def _fine_items(rows: Rows, table: int, count: int, way: Way, first_part: int) -> NDArray[np.int32]:
    length = rows.position + rows.stop - rows.first
    split = split_of(min(length, way.window or length), way.kv_heads)
    first = _first_seen(rows.position, way.window, split)
    starts = np.arange(first, length, split, dtype=np.int32)
    items = np.empty((len(starts), 8), np.int32)
    items[:, :5] = rows.first, rows.position, table, 0, count
    items[:, 5] = starts
    np.minimum(starts + split, length, out=items[:, 6])
    items[:, 7] = np.arange(first_part, first_part + len(starts))
    return items


def _merged_rows(rows: Rows, shared: int, first_part: int, parts: int) -> NDArray[np.int32]:
    """For each of a segment's rows: its token, itself, its first part and how many."""
    row = np.arange((rows.stop - rows.first) * shared, dtype=np.int32)
    merged = np.empty((len(row), 4), np.int32)
    merged[:, 0] = rows.first + row // shared
    merged[:, 1] = row
    merged[:, 2:] = first_part, parts
    return merged
