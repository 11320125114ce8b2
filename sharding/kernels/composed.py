"""Decoder blocks put together from a kernel set's single steps.

The reference computes this way; a compiled set runs all blocks in one call, and is held to this bit
for bit.

    T tokens, I hidden size, X queries of all heads, F feed-forward width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from sharding.kernels import BlockWeights, Kernels, Weight
    from sharding.model.attention import BatchIndex
    from sharding.model.kv_cache import LayerPages


@dataclass(frozen=True)
class ComposedHead:
    """`Head` of any kernel set."""

    kernels: Kernels
    norm_I: torch.Tensor
    eps: float
    weight: Weight

    def logits(self, x_TI: torch.Tensor) -> torch.Tensor:
        """Norm, then product."""
        return self.kernels.matmul(self.kernels.rms_norm(x_TI, self.norm_I, self.eps), self.weight)

    def likeliest(self, x_TI: torch.Tensor) -> list[int]:
        """Of all rows at once."""
        logits_TV = self.logits(x_TI)
        finite_T = logits_TV.isfinite().all(dim=-1)
        ids: list[int] = logits_TV.argmax(dim=-1).where(finite_T, -1).tolist()
        return ids


@dataclass(frozen=True)
class ComposedLayers:
    """`Layers` of any kernel set."""

    kernels: Kernels
    weights: Sequence[BlockWeights]
    pages: Sequence[LayerPages]

    def run(
        self, x_TI: torch.Tensor, index: BatchIndex, wanted: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Block after block."""
        last = len(self.weights) - 1
        blocks = zip(self.weights, self.pages, strict=True)
        for number, (weights, pages) in enumerate(blocks):
            q_TX, at = self._store(x_TI, weights, index, pages), index
            if wanted is not None and number == last:
                if not wanted:
                    return x_TI[:0]
                rows = list(wanted)
                x_TI, q_TX, at = x_TI[rows], q_TX[rows], index.alone(rows)
            mixed_TX = self.kernels.attention(q_TX, at, pages, weights.window)
            x_TI = self.kernels.matmul(mixed_TX, weights.attn_output, x_TI)
            x_TI = self._feed_forward(x_TI, weights)
        return x_TI

    def _store(
        self, x_TI: torch.Tensor, weights: BlockWeights, index: BatchIndex, pages: LayerPages
    ) -> torch.Tensor:
        """The turned queries; keys and values go to their pages."""
        normed_TI = self.kernels.rms_norm(x_TI, weights.attn_norm_I, weights.eps)
        qkv_TX = self.kernels.matmul(normed_TI, weights.qkv)
        return self.kernels.rotate_and_store(qkv_TX, index, pages)

    def _feed_forward(self, x_TI: torch.Tensor, weights: BlockWeights) -> torch.Tensor:
        kernels = self.kernels
        normed_TI = kernels.rms_norm(x_TI, weights.ffn_norm_I, weights.eps)
        gated_TF = kernels.gated_silu(kernels.matmul(normed_TI, weights.gate_up))
        return kernels.matmul(gated_TF, weights.ffn_down, x_TI)
