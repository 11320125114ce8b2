"""What attention needs to know about a batch: positions, where KV goes, which rows see which pages.

Built once a batch and stage, shared by all layers. Not here: the arithmetic (`kernels/`).

    T tokens, N rotations of a model, R rotary pairs of a head
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from sharding.batch import PAGE_SLOTS, Segment
from sharding.model.rope import Rope


@dataclass(frozen=True)
class Rows:
    """A segment: rows `[first, stop)`, its first token's position, its page table (int64)."""

    first: int
    stop: int
    position: int
    pages: torch.Tensor

    def positions(self) -> torch.Tensor:
        """Of each token, int64."""
        return torch.arange(self.position, self.position + self.stop - self.first)


@dataclass(frozen=True)
class BatchIndex:
    """The segments of a batch and how their tokens turn.

    The tensors are for kernels in torch and Triton, made when one asks for them, on `device`; the
    compiled kernels make their own in less time than torch takes for one. `window_rows`: the same
    with the page tables of layers with a window, where these have pages of their own.
    """

    rows: tuple[Rows, ...]
    rope: Rope
    device: torch.device = torch.device("cpu")
    window_rows: tuple[Rows, ...] | None = None

    def to(self, device: torch.device) -> BatchIndex:
        """The same for kernels there; `rows` stay on the host, which cuts the work by them."""
        return self if device == self.device else replace(self, device=device)

    def seen_by(self, window: int) -> BatchIndex:
        """The batch as layers with that window see it, 0 for none."""
        return self._windowed if window else self

    @cached_property
    def _windowed(self) -> BatchIndex:
        if self.window_rows is None:
            return self
        twin = replace(self, rows=self.window_rows, window_rows=None)
        vars(twin).update(cos_NTR=self.cos_NTR, sin_NTR=self.sin_NTR, slot_T=self.slot_T)
        return twin

    def is_of(self, other: BatchIndex) -> bool:
        """Whether both are of one batch: the same, or one as layers with a window see the other."""
        return self is other or self._windowed is other or other._windowed is self

    def alone(self, rows: Sequence[int]) -> BatchIndex:
        """These rows, ascending, as a batch of single tokens."""
        window_rows = None if self.window_rows is None else _alone(self.window_rows, rows)
        return replace(self, rows=_alone(self.rows, rows), window_rows=window_rows)

    @property
    def n_tokens(self) -> int:
        """T."""
        return self.rows[-1].stop if self.rows else 0

    @cached_property
    def tables(self) -> torch.Tensor:
        """The page tables of all rows, one after the other, int64."""
        return torch.cat([at.pages for at in self.rows]).to(self.device)

    @cached_property
    def page_T(self) -> torch.Tensor:
        """The page of each token's KV, int64 `[T]`."""
        pages = [at.pages[at.positions() // PAGE_SLOTS] for at in self.rows]
        return torch.cat(pages).to(self.device)

    @cached_property
    def slot_T(self) -> torch.Tensor:
        """Its slot there, int64 `[T]`."""
        return (self._positions_T % PAGE_SLOTS).to(self.device)

    @cached_property
    def cos_NTR(self) -> torch.Tensor:
        """Cosines of each token's angles, float32 `[N, T, R]`."""
        return self._angles[0].to(self.device)

    @cached_property
    def sin_NTR(self) -> torch.Tensor:
        """Their sines."""
        return self._angles[1].to(self.device)

    @cached_property
    def _angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rope.angles(self._positions_T)

    @cached_property
    def _positions_T(self) -> torch.Tensor:
        return torch.cat([at.positions() for at in self.rows])


def _alone(segments: Sequence[Rows], rows: Sequence[int]) -> tuple[Rows, ...]:
    alone: list[Rows] = []
    rest = iter(segments)
    at = next(rest, None)
    for row in rows:
        while at is not None and row >= at.stop:
            at = next(rest, None)
        assert at is not None and row >= at.first, row
        i = len(alone)
        alone.append(Rows(i, i + 1, at.position + row - at.first, at.pages))
    return tuple(alone)


def build_index(
    segments: Sequence[Segment],
    tables: Mapping[int, torch.Tensor],
    rope: Rope,
    window_tables: Mapping[int, torch.Tensor] | None = None,
) -> BatchIndex:
    """Lay a batch's segments out as rows; `tables` maps a request to its page table (int64), and
    so does `window_tables` for layers with a window, unless they share the others' pages."""
    rows = _lay_out(segments, tables)
    if window_tables is None:
        return BatchIndex(rows, rope)
    return BatchIndex(rows, rope, window_rows=_lay_out(segments, window_tables))


def _lay_out(segments: Sequence[Segment], tables: Mapping[int, torch.Tensor]) -> tuple[Rows, ...]:
    rows: list[Rows] = []
    first = 0
    for segment in segments:
        stop = first + len(segment.tokens)
        rows.append(Rows(first, stop, segment.start, tables[segment.request]))
        first = stop
    return tuple(rows)
