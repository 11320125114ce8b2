"""Causal attention over paged FP16 keys and values, in Triton.

Rows are the queries that share a kv head: token after token, within a token head after head. An
item of work is a run of one segment's rows over a run of its slots; all kv heads do the same items.

    fine     few rows (a decoded token): queries and weights as two FP16 numbers each, which is
             nearly float32; slots in runs of equal length that are merged in order afterwards,
             so that a context fills the GPU. Where a run begins depends on the request alone:
             what else is in the batch does not show
    chunks   many rows: queries and weights rounded to FP16, every item over all its slots, or over
             those that a library has left it (`triton_prefix.py`)

The softmax is online (Milakov and Gimelshein 2018; Dao et al. 2022). Bounds: docs/numerics.md.

    T tokens, H query heads, G kv heads, D head dim, N slots
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sharding.batch import PAGE_SLOTS
from sharding.kernels.triton_plan import Tiles, Work
from sharding.kernels.triton_prefix import attend_prefixes
from sharding.model.attention import BatchIndex
from sharding.model.kv_cache import LayerPages

MOST_DIMS = 256
"""The largest head."""

_PAGE = tl.constexpr(PAGE_SLOTS)
_LOG2_E = tl.constexpr(1.4426950408889634)

# Weights are 2^14 at most, not 1: small ones would be lost in FP16. Their sum is raised as well.
_RAISED = tl.constexpr(14.0)


@triton.jit
def _split(values):
    """Two FP16 numbers for each float32, which are their sum but for 2^-22 of it."""
    upper = values.to(tl.float16)
    return upper, (values - upper.to(tl.float32)).to(tl.float16)


@triton.jit
def _seen(score_RN, slot_N, last_R, stop, window):
    """Scores; those of slots that a row does not see are -inf."""
    seen = (slot_N[None, :] <= last_R[:, None]) & (slot_N < stop)[None, :]
    if window > 0:
        seen = seen & (slot_N[None, :] > last_R[:, None] - window)
    return tl.where(seen, score_RN, float("-inf"))


@triton.jit
def _weigh(score_RN, most_R, MASKED: tl.constexpr):
    """The largest scores so far, the slots' weights, and what former sums shrink by."""
    higher_R = tl.maximum(most_R, tl.max(score_RN, axis=1))
    shift_R = higher_R - _RAISED
    if MASKED:  # a row that has seen nothing yet has no largest score to subtract
        shift_R = tl.where(higher_R == float("-inf"), 0.0, higher_R) - _RAISED
    weight_RN = tl.exp2(score_RN - shift_R[:, None])
    return higher_R, weight_RN, tl.exp2(most_R - _RAISED - shift_R)


@triton.jit
def _round_queries(q, out, scale, count, SIZE: tl.constexpr):
    """Queries times the scale of scores, as FP16."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    value = tl.load(q + at, mask=at < count, other=0.0) * scale
    tl.store(out + at, value.to(tl.float16), mask=at < count)


@triton.jit
def _step(
    keys, values, table, upper_RD, lower_RD, most_R, total_R, mixed_RD, last_R, begin, stop, window,
    kv_head, kv_heads, DIM: tl.constexpr, DIMS: tl.constexpr, SLOTS: tl.constexpr,
    FINE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows meet slots from `begin` on: unless MASKED, every row sees all SLOTS of them."""
    d = tl.arange(0, DIMS)
    slot_N = begin + tl.arange(0, SLOTS)
    # Keys by whole pages: a mask by slots would make loads of two bytes.
    there_N = slot_N // _PAGE * _PAGE < stop
    if MASKED:
        page_N = tl.load(table + slot_N // _PAGE, mask=there_N, other=0)
    else:
        page_N = tl.load(table + slot_N // _PAGE)
    page_N = (page_N * kv_heads + kv_head) * (DIM * _PAGE)
    key_DN = keys + page_N[None, :] + d[:, None] * _PAGE + (slot_N % _PAGE)[None, :]
    value_ND = values + page_N[:, None] + (slot_N % _PAGE)[:, None] * DIM + d[None, :]
    # What a former request left beyond the item's slots may be infinite: 0 times that is NaN.
    if MASKED:
        k_DN = tl.load(key_DN, mask=(d < DIM)[:, None] & there_N[None, :], other=0.0)
        v_ND = tl.load(value_ND, mask=(slot_N < stop)[:, None] & (d < DIM)[None, :], other=0.0)
    elif DIM < DIMS:
        k_DN = tl.load(key_DN, mask=(d < DIM)[:, None], other=0.0)
        v_ND = tl.load(value_ND, mask=(d < DIM)[None, :], other=0.0)
    else:
        k_DN = tl.load(key_DN)
        v_ND = tl.load(value_ND)
    score_RN = tl.dot(upper_RD, k_DN)
    if FINE:
        score_RN = tl.dot(lower_RD, k_DN, score_RN)
    if MASKED:
        score_RN = _seen(score_RN, slot_N, last_R, stop, window)
    most_R, weight_RN, shrink_R = _weigh(score_RN, most_R, MASKED)
    total_R = total_R * shrink_R + tl.sum(weight_RN, axis=1)
    mixed_RD *= shrink_R[:, None]
    if FINE:
        upper_RN, lower_RN = _split(weight_RN)
        mixed_RD = tl.dot(upper_RN, v_ND, mixed_RD)
        mixed_RD = tl.dot(lower_RN, v_ND, mixed_RD)
    else:
        mixed_RD = tl.dot(weight_RN.to(tl.float16), v_ND, mixed_RD)
    return most_R, total_R, mixed_RD


@triton.jit
def _attend(
    q, keys, values, y, partials, prior, prior_logs, items, tables, heads, kv_heads, window,
    part_rows, scale, DIM: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr,
    SLOTS: tl.constexpr, FINE: tl.constexpr, PRIOR: tl.constexpr,
):  # fmt: skip
    """One item and kv head. Chunks, whose queries are scaled FP16 already, go to `y`; fine parts to
    `partials`, as `[part, G, part_rows, DIM + 2]`: the mix of values, the largest score and the sum
    of weights. With PRIOR a row continues from what `attend_prefixes` found."""
    item = items + tl.program_id(0) * 8
    first, position, table = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    row_start, row_stop = tl.load(item + 3), tl.load(item + 4)
    start, stop = tl.multiple_of(tl.load(item + 5), _PAGE), tl.load(item + 6)
    kv_head = tl.program_id(1)
    shared = heads // kv_heads
    row_R = row_start + tl.arange(0, ROWS)
    d = tl.arange(0, DIMS)
    last_R = position + row_R // shared
    inside = (row_R < row_stop)[:, None] & (d < DIM)[None, :]
    token_R = (first + row_R // shared).to(tl.int64)
    at = (token_R * heads + kv_head * shared + row_R % shared) * DIM
    q_RD = tl.load(q + at[:, None] + d[None, :], mask=inside, other=0.0)
    if FINE:
        upper_RD, lower_RD = _split(q_RD * scale)
    else:
        upper_RD = q_RD
        lower_RD = q_RD
    most_R = tl.full([ROWS], float("-inf"), tl.float32)
    total_R = tl.zeros([ROWS], tl.float32)
    mixed_RD = tl.zeros([ROWS, DIMS], tl.float32)
    if PRIOR:
        # One weight of 2^14 at a score that stands for all: what `_weigh` would have left.
        to_log = token_R * heads + kv_head * shared + row_R % shared
        most_R = tl.load(prior_logs + to_log, mask=row_R < row_stop, other=float("-inf")) * _LOG2_E
        total_R = tl.where(most_R == float("-inf"), 0.0, 1 << 14)
        seen_RD = tl.load(prior + at[:, None] + d[None, :], mask=inside, other=0.0)
        mixed_RD = seen_RD.to(tl.float32) * (1 << 14)
    # Slots that every row sees need no mask.
    certain = start
    if window == 0:
        certain += (tl.minimum(position + row_start // shared + 1, stop) - start) // SLOTS * SLOTS
    for begin in range(start, certain, SLOTS):
        most_R, total_R, mixed_RD = _step(
            keys, values, tables + table, upper_RD, lower_RD, most_R, total_R, mixed_RD, last_R,
            begin, stop, window, kv_head, kv_heads, DIM, DIMS, SLOTS, FINE, False,
        )  # fmt: skip
    for begin in range(certain, stop, SLOTS):
        most_R, total_R, mixed_RD = _step(
            keys, values, tables + table, upper_RD, lower_RD, most_R, total_R, mixed_RD, last_R,
            begin, stop, window, kv_head, kv_heads, DIM, DIMS, SLOTS, FINE, True,
        )  # fmt: skip
    if FINE:
        part = (tl.load(item + 7) * kv_heads + kv_head) * part_rows + tl.arange(0, ROWS)
        to = partials + part.to(tl.int64) * (DIM + 2)
        tl.store(to[:, None] + d[None, :], mixed_RD, mask=inside)
        tl.store(to + DIM, most_R, mask=row_R < row_stop)
        tl.store(to + DIM + 1, total_R, mask=row_R < row_stop)
    else:
        total_R = tl.where(row_R < row_stop, total_R, 1.0)
        tl.store(y + at[:, None] + d[None, :], tl.div_rn(mixed_RD, total_R[:, None]), mask=inside)


@triton.jit
def _merged(
    partials, row, there, first_head, heads, kv_heads, part_rows, DIM: tl.constexpr,
    DIMS: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The parts of some heads of a token in order, `[HEADS, DIMS]`; zeros for heads that there are
    not, and without `there`. `row` is the token's first of `_merge`'s rows."""
    shared = heads // kv_heads
    head_H = first_head + tl.arange(0, HEADS)
    d = tl.arange(0, DIMS)
    first, parts = tl.load(row + 2), tl.where(there, tl.load(row + 3), 0)
    at_H = head_H // shared * part_rows + tl.load(row + 1) + head_H % shared
    there_H = (head_H < heads) & there
    most_PH = tl.full([PARTS, HEADS], float("-inf"), tl.float32)
    for begin in range(0, parts, PARTS):
        part_P = begin + tl.arange(0, PARTS)
        there_PH = (part_P < parts)[:, None] & there_H[None, :]
        at_P = (first + part_P) * (kv_heads * part_rows)
        at_PH = (at_P[:, None] + at_H[None, :]).to(tl.int64) * (DIM + 2)
        part_most_PH = tl.load(partials + at_PH + DIM, mask=there_PH, other=float("-inf"))
        most_PH = tl.maximum(most_PH, part_most_PH)
    highest_H = tl.where(there_H, tl.max(most_PH, axis=0), 0.0)
    mixed_HD = tl.zeros([HEADS, DIMS], tl.float32)
    total_PH = tl.zeros([PARTS, HEADS], tl.float32)
    for begin in range(0, parts, PARTS):
        part_P = begin + tl.arange(0, PARTS)
        there_PH = (part_P < parts)[:, None] & there_H[None, :]
        at_P = (first + part_P) * (kv_heads * part_rows)
        at_PH = (at_P[:, None] + at_H[None, :]).to(tl.int64) * (DIM + 2)
        part_most_PH = tl.load(partials + at_PH + DIM, mask=there_PH, other=float("-inf"))
        share_PH = tl.exp2(part_most_PH - highest_H[None, :])
        total_PH += share_PH * tl.load(partials + at_PH + DIM + 1, mask=there_PH, other=0.0)
        mix_PHD = tl.load(
            partials + at_PH[:, :, None] + d[None, None, :],
            mask=there_PH[:, :, None] & (d < DIM)[None, None, :],
            other=0.0,
        )
        mixed_HD += tl.sum(mix_PHD * share_PH[:, :, None], axis=0)
    total_H = tl.where(there_H, tl.sum(total_PH, axis=0), 1.0)
    return tl.div_rn(mixed_HD, total_H[:, None])


@triton.jit
def _merge(
    partials, y, rows, heads, kv_heads, part_rows, DIM: tl.constexpr, DIMS: tl.constexpr,
    HEADS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Some heads of a token. `rows`: for each of the heads that share a kv head, where it goes as
    (token, row of its segment, first part, parts)."""
    row = rows + tl.program_id(0) * (heads // kv_heads) * 4
    first_head = tl.program_id(1) * HEADS
    mixed_HD = _merged(
        partials, row, True, first_head, heads, kv_heads, part_rows, DIM, DIMS, HEADS, PARTS
    )  # fmt: skip
    head_H = first_head + tl.arange(0, HEADS)
    d = tl.arange(0, DIMS)
    to_H = (tl.load(row).to(tl.int64) * heads + head_H) * DIM
    there_HD = (head_H < heads)[:, None] & (d < DIM)[None, :]
    tl.store(y + to_H[:, None] + d[None, :], mixed_HD, mask=there_HD)


MERGED = 64
"""Parts that are merged at a time: with the heads of `heads_merged`, as many as registers hold."""


def heads_merged(dim: int) -> int:
    """By a program: 256 numbers of a token, which is a block of digits."""
    return 256 // max(16, int(triton.next_power_of_2(dim)))


@dataclass(frozen=True)
class Parts:
    """Attention of few rows, `[part, G, rows, D + 2]` as `_attend` leaves them; `merged` says of
    each row where it goes."""

    partials: Tensor
    merged: Tensor
    heads: int
    kv_heads: int
    dim: int

    @property
    def rows(self) -> int:
        """Of a part, at most."""
        return self.partials.shape[2]

    def merge(self, y_TX: Tensor) -> None:
        """Into the rows of their tokens."""
        dims, many = max(16, triton.next_power_of_2(self.dim)), heads_merged(self.dim)
        tokens = len(self.merged) * self.kv_heads // self.heads
        _merge[tokens, triton.cdiv(self.heads, many)](
            self.partials, y_TX, self.merged, self.heads, self.kv_heads, self.rows, self.dim, dims,
            many, MERGED,
        )  # fmt: skip


def attend(
    q_TX: Tensor, index: BatchIndex, pages: LayerPages, window: int, work: Work, tiles: Tiles
) -> Tensor:
    """Attention of every token over its slots, `[T, H * D]`."""
    y_TX = torch.empty_like(q_TX)
    if work.chunks is not None:
        _attend_chunks(q_TX, y_TX, index, pages, window, work, tiles)
    if work.fine is not None:
        attend_finely(q_TX, index, pages, window, work, tiles).merge(y_TX)
    return y_TX


def _scale(dim: int) -> float:
    """Of scores, whose powers are of two."""
    return float(_LOG2_E.value * dim**-0.5)


def _attend_chunks(
    q_TX: Tensor,
    y_TX: Tensor,
    index: BatchIndex,
    pages: LayerPages,
    window: int,
    work: Work,
    tiles: Tiles,
) -> None:
    """The rows of a batch's chunks, into `y`."""
    assert work.chunks is not None
    dim, kv_heads = pages.head_dim, pages.kv_heads
    tile, count = tiles.of(dim, fine=False), q_TX.numel()
    half_TX = torch.empty_like(q_TX, dtype=torch.float16)
    _round_queries[(triton.cdiv(count, 4096),)](q_TX, half_TX, _scale(dim), count, 4096)
    prior, logs = half_TX, y_TX
    if work.prefixes:
        prior, logs = attend_prefixes(half_TX, index, pages, work.prefixes)
    _attend[len(work.chunks), kv_heads](
        half_TX, pages.k_PGDS, pages.v_PGSD, y_TX, y_TX, prior, logs, work.chunks, index.tables,
        q_TX.shape[1] // dim, kv_heads, window, 0, _scale(dim), dim,
        max(16, triton.next_power_of_2(dim)), tile.rows, tile.slots, False, bool(work.prefixes),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def attend_finely(
    q_TX: Tensor, index: BatchIndex, pages: LayerPages, window: int, work: Work, tiles: Tiles
) -> Parts:
    """The few rows of a batch's other segments, in parts."""
    assert work.fine is not None and work.merged is not None
    dim, kv_heads = pages.head_dim, pages.kv_heads
    heads, tile = q_TX.shape[1] // dim, tiles.of(dim, fine=True)
    partials = q_TX.new_empty(work.parts, kv_heads, work.rows, dim + 2)
    _attend[work.parts, kv_heads](
        q_TX, pages.k_PGDS, pages.v_PGSD, q_TX, partials, q_TX, q_TX, work.fine, index.tables,
        heads, kv_heads, window, work.rows, _scale(dim), dim,
        max(16, triton.next_power_of_2(dim)), 16 if work.rows <= 16 else tile.rows, tile.slots,
        True, False, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return Parts(partials, work.merged, heads, kv_heads, dim)
