"""A chunk's attention over the long prefix before it, by the library that does it fastest: cuDNN's
fused attention, which torch calls, on keys and values gathered from their pages.

The library knows neither pages nor a causal mask that does not begin at the first slot, so it gets
the slots that every row of a chunk sees, in whole grains; the rest, the chunk's own above all, is
our kernel's, which continues from what the library found (Dao et al. 2022: parts of a softmax merge
by their largest score and their sum).

    T tokens of the chunk, H query heads, G kv heads, D head dim, S slots
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sharding.batch import PAGE_SLOTS
from sharding.model.attention import BatchIndex
from sharding.model.kv_cache import LayerPages

WORKSPACE_BYTES = 1 << 28
"""Most bytes of gathered keys and values at a time."""

_PAGE = tl.constexpr(PAGE_SLOTS)


@dataclass(frozen=True)
class Library:
    """When it is worth its calls: chunks of so many tokens, after a prefix of so many slots.
    cuDNN plans 50 ms for every new length of either, so it gets multiples of `rows` tokens and of
    `grain` slots."""

    tokens: int = 256
    rows: int = 128
    grain: int = 4096
    dims: int = 128


@dataclass(frozen=True)
class Prefix:
    """Rows `[first, stop)` of a batch, all of which see the first `slots` of their request; its
    page table begins at `table`."""

    first: int
    stop: int
    table: int
    slots: int


@triton.jit
def _gather(
    keys, values, k, v, table, slots, kv_heads, first_head, DIM: tl.constexpr, DIMS: tl.constexpr
):  # fmt: skip
    """A page of a kv head, as rows of `k` and `v` `[G, S, D]`."""
    page = tl.load(table + tl.program_id(0))
    head = tl.program_id(1)
    d, s = tl.arange(0, DIMS), tl.arange(0, _PAGE)
    from_page = (page * kv_heads + first_head + head) * (DIM * _PAGE)
    to = (head.to(tl.int64) * slots + tl.program_id(0) * _PAGE + s)[:, None] * DIM + d[None, :]
    inside = (d < DIM)[None, :]
    k_SD = tl.load(keys + from_page + d[None, :] * _PAGE + s[:, None], mask=inside, other=0.0)
    tl.store(k + to, k_SD, mask=inside)
    v_SD = tl.load(values + from_page + s[:, None] * DIM + d[None, :], mask=inside, other=0.0)
    tl.store(v + to, v_SD, mask=inside)


def attend_prefixes(
    half_TX: Tensor, index: BatchIndex, pages: LayerPages, prefixes: Sequence[Prefix]
) -> tuple[Tensor, Tensor]:
    """Of scaled FP16 queries: what rows saw in their prefixes, FP16 `[T, H, D]`, and the logarithm
    of their sums to the base e, float32 `[T, H]`; 0 and -inf for rows without one."""
    dim, kv_heads = pages.head_dim, pages.kv_heads
    q_THD = half_TX.unflatten(1, (-1, dim))
    seen_THD = torch.zeros_like(q_THD)
    log_TH = torch.full(q_THD.shape[:2], -math.inf, dtype=torch.float32, device=q_THD.device)
    shared = q_THD.shape[1] // kv_heads
    for prefix in prefixes:
        rows, slots = slice(prefix.first, prefix.stop), prefix.slots
        at_once = max(1, min(kv_heads, WORKSPACE_BYTES // (4 * slots * dim)))
        table = index.tables[prefix.table :]
        k, v = (half_TX.new_empty(at_once, slots, dim) for _ in range(2))
        for first in range(0, kv_heads, at_once):
            count = min(at_once, kv_heads - first)
            _gather[(slots // PAGE_SLOTS, count)](
                pages.k_PGDS, pages.v_PGSD, k, v, table, slots, kv_heads, first, dim,
                triton.next_power_of_2(dim), num_warps=1,
            )  # fmt: skip
            heads = slice(first * shared, (first + count) * shared)
            q_HTD = q_THD[rows, heads].transpose(0, 1)
            seen_HTD, log_HT = _library(q_HTD, k[:count], v[:count])
            seen_THD[rows, heads] = seen_HTD.transpose(0, 1)
            log_TH[rows, heads] = log_HT.t()
    return seen_THD, log_TH


def _library(q_HTD: Tensor, k_GSD: Tensor, v_GSD: Tensor) -> tuple[Tensor, Tensor]:
    """Attention without a mask and the logarithm of its sums. Scores are to the base 2."""
    scale = math.log(2.0)
    if q_HTD.is_cuda:
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q_HTD[None], k_GSD[None], v_GSD[None], None, True, scale=scale
        )
        return found[0][0], found[1][0, ..., 0]
    # The definition, for tests where there is no such library.
    shared = len(q_HTD) // len(k_GSD)
    k, v = (each.float().repeat_interleave(shared, 0) for each in (k_GSD, v_GSD))
    score_HTS = q_HTD.float() @ k.mT * scale
    return (score_HTS.softmax(-1) @ v).half(), score_HTS.logsumexp(-1)
