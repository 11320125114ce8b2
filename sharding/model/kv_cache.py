"""Storage of KV pages: one stage's slice of the cache. Soft state: replaying tokens rebuilds it.

    P pages, G kv heads, D head dim, S slots a page

Not here: which page belongs to whom (`actors/pages.py` decides, page tables arrive with the
batches).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sharding.batch import PAGE_SLOTS


@dataclass(frozen=True)
class LayerPages:
    """One layer's pages in FP16: `k_PGDS` `[P, G, D, S]`, `v_PGSD` `[P, G, S, D]`."""

    k_PGDS: torch.Tensor
    v_PGSD: torch.Tensor

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.k_PGDS.shape[1]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.k_PGDS.shape[2]

    def gather(
        self, table: torch.Tensor, start: int, slots: int, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots `[start, start + slots)` of a page table, whole pages: `[G, D, N]` and `[G, N, D]`.

        Float32. Slots from `length` on are zero: what a former request left there may be infinite,
        and a weight of zero times infinity is not zero.
        """
        used = table[
            start // PAGE_SLOTS : min(start + slots, length + PAGE_SLOTS - 1) // PAGE_SLOTS
        ]
        k_GDN = torch.zeros(self.kv_heads, self.k_PGDS.shape[2], slots)
        v_GND = torch.zeros(self.kv_heads, slots, self.k_PGDS.shape[2])
        valid = min(slots, length - start)
        k_GDN[..., :valid] = self.k_PGDS[used].permute(1, 2, 0, 3).flatten(2)[..., :valid]
        v_GND[:, :valid] = self.v_PGSD[used].transpose(0, 1).flatten(1, 2)[:, :valid]
        return k_GDN, v_GND


class PageStore:
    """The pages of a stage's layers, so many of each. Memory is committed as pages are first
    written."""

    def __init__(
        self,
        pages: Sequence[int],
        kv_heads: int,
        head_dim: int,
        device: torch.device | None = None,
    ) -> None:
        # One allocation for all layers: what rounding and headers cost, they cost once.
        keys = _lazy_zeros((sum(pages), kv_heads, head_dim, PAGE_SLOTS), device)
        values = _lazy_zeros((sum(pages), kv_heads, PAGE_SLOTS, head_dim), device)
        parts = zip(keys.split(list(pages)), values.split(list(pages)), strict=True)
        self.layers = [LayerPages(k, v) for k, v in parts]
        self.n_bytes = 2 * keys.numel() * keys.element_size()


def _lazy_zeros(shape: tuple[int, ...], device: torch.device | None) -> torch.Tensor:
    """FP16 zeros, on the host from calloc, so that an unused page costs no memory (torch.zeros
    would touch all)."""
    if device is not None and device.type != "cpu":
        return torch.zeros(shape, dtype=torch.float16, device=device)
    return torch.from_numpy(np.zeros(shape, dtype=np.float16))
