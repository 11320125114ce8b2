"""What attention needs to know about a batch: positions, where KV goes, which rows see which pages.

Built once a batch and stage, shared by all layers. Not here: the arithmetic (`kernels/`).

    T tokens, R rotary pairs of a head
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from sharding.batch import PAGE_SLOTS, Segment
from sharding.model.arch import ModelShape
from sharding.model.rope import angles, pair_view


@dataclass(frozen=True)
class Rows:
    """A segment: rows `[first, stop)`, its first token's position, its page table (int64)."""

    first: int
    stop: int
    position: int
    pages: torch.Tensor


@dataclass(frozen=True)
class BatchIndex:
    """Where each token's KV goes (page, slot), its angles, which elements rotate together.

    `spans_N4`: the segments once more for compiled kernels, int64 (first row, stop row, position,
    where its page table begins in `tables`).
    """

    rows: tuple[Rows, ...]
    spans_N4: torch.Tensor
    tables: torch.Tensor
    page_T: torch.Tensor
    slot_T: torch.Tensor
    cos_TR: torch.Tensor
    sin_TR: torch.Tensor
    pair_shape: tuple[int, int]
    pair_axis: int

    def to(self, device: torch.device) -> BatchIndex:
        """What kernels read there; `rows` stay on the host, which cuts the work by them."""
        if device == self.tables.device:
            return self
        return replace(
            self,
            spans_N4=self.spans_N4.to(device),
            tables=self.tables.to(device),
            page_T=self.page_T.to(device),
            slot_T=self.slot_T.to(device),
            cos_TR=self.cos_TR.to(device),
            sin_TR=self.sin_TR.to(device),
        )


def build_index(
    segments: Sequence[Segment],
    tables: Mapping[int, torch.Tensor],
    shape: ModelShape,
    freqs_R: torch.Tensor,
) -> BatchIndex:
    """Lay a batch's segments out as rows; `tables` maps a request to its page table (int64)."""
    rows: list[Rows] = []
    spans: list[tuple[int, int, int, int]] = []
    positions: list[int] = []
    entries: list[int] = []
    first = before = 0
    for segment in segments:
        table, stop = tables[segment.request], first + len(segment.tokens)
        rows.append(Rows(first, stop, segment.start, table))
        spans.append((first, stop, segment.start, before))
        run = range(segment.start, segment.start + len(segment.tokens))
        positions.extend(run)
        entries.extend(before + position // PAGE_SLOTS for position in run)
        first, before = stop, before + len(table)
    positions_T = torch.tensor(positions)
    flat = torch.cat([at.pages for at in rows])
    cos_TR, sin_TR = angles(positions_T, freqs_R)
    pair_shape, pair_axis = pair_view(shape.family.rope_pairs, shape.rope_dims)
    return BatchIndex(
        rows=tuple(rows),
        spans_N4=torch.tensor(spans),
        tables=flat,
        page_T=flat[torch.tensor(entries)],
        slot_T=positions_T % PAGE_SLOTS,
        cos_TR=cos_TR,
        sin_TR=sin_TR,
        pair_shape=pair_shape,
        pair_axis=pair_axis,
    )
