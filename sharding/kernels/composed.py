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

    def run(self, x_TI: torch.Tensor, index: BatchIndex) -> torch.Tensor:
        """Block after block."""
        for weights, pages in zip(self.weights, self.pages, strict=True):
            x_TI = self._feed_forward(self._attend(x_TI, weights, index, pages), weights)
        return x_TI

    def _attend(
        self, x_TI: torch.Tensor, weights: BlockWeights, index: BatchIndex, pages: LayerPages
    ) -> torch.Tensor:
        kernels = self.kernels
        normed_TI = kernels.rms_norm(x_TI, weights.attn_norm_I, weights.eps)
        q_TX = kernels.rotate_and_store(kernels.matmul(normed_TI, weights.qkv), index, pages)
        mixed_TX = kernels.attention(q_TX, index, pages, weights.window)
        return kernels.matmul(mixed_TX, weights.attn_output, x_TI)

    def _feed_forward(self, x_TI: torch.Tensor, weights: BlockWeights) -> torch.Tensor:
        kernels = self.kernels
        normed_TI = kernels.rms_norm(x_TI, weights.ffn_norm_I, weights.eps)
        gated_TF = kernels.gated_silu(kernels.matmul(normed_TI, weights.gate_up))
        return kernels.matmul(gated_TF, weights.ffn_down, x_TI)
