"""Decoder blocks put together from a kernel set's single steps.

The reference computes this way; a compiled set runs all blocks in one call, and is held to this bit
for bit. A set that has a faster way for two steps that follow each other overrides the pair.

    T tokens, I hidden size, X queries of all heads, F feed-forward width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sharding.kernels.block_weights import DenseWeights

if TYPE_CHECKING:
    import torch

    from sharding.kernels import Kernels, Weight
    from sharding.kernels.block_weights import BlockWeights
    from sharding.model.arch import Activation
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
            qkv_TX = self._normed(x_TI, weights.attn_norm_I, weights.eps, weights.qkv)
            at = index.seen_by(weights.window)
            q_TX = self.kernels.rotate_and_store(qkv_TX, at, pages, weights.heads)
            if wanted is not None and number == last:
                if not wanted:
                    return x_TI[:0]
                rows = list(wanted)
                x_TI, q_TX, at = x_TI[rows], q_TX[rows], at.alone(rows)
            mixed = partial(self._mixed, q_TX, at, pages, weights)
            x_TI = self._onto(x_TI, mixed, weights.attn_post_norm_I, weights.eps)
            fed = partial(self._fed, x_TI, weights)
            x_TI = self._onto(x_TI, fed, weights.ffn_post_norm_I, weights.eps)
        return x_TI

    def _onto(
        self,
        x_TI: torch.Tensor,
        step: Callable[[torch.Tensor | None], torch.Tensor],
        norm_I: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        """What a step gives, normed if there is a norm, on top of `x`."""
        if norm_I is None:
            return step(x_TI)
        return self.kernels.rms_norm(step(None), norm_I, eps, x_TI)

    def _normed(
        self, x_TI: torch.Tensor, norm_I: torch.Tensor, eps: float, weight: Weight
    ) -> torch.Tensor:
        """A norm and what is made of it."""
        return self.kernels.matmul(self.kernels.rms_norm(x_TI, norm_I, eps), weight)

    def _mixed(
        self,
        q_TX: torch.Tensor,
        index: BatchIndex,
        pages: LayerPages,
        weights: BlockWeights,
        residual_TI: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention and its output."""
        mixed_TX = self.kernels.attention(q_TX, index, pages, weights.window)
        return self.kernels.matmul(mixed_TX, weights.attn_output, residual_TI)

    def _fed(
        self, x_TI: torch.Tensor, weights: BlockWeights, residual_TI: torch.Tensor | None
    ) -> torch.Tensor:
        """The feed-forward, with its norm."""
        feed, norm_I, eps = weights.feed_forward, weights.ffn_norm_I, weights.eps
        if isinstance(feed, DenseWeights):
            both_T2F = self._normed(x_TI, norm_I, eps, feed.gate_up)
            return self._gated(both_T2F, weights.activation, feed.down, residual_TI)
        normed_TI = self.kernels.rms_norm(x_TI, norm_I, eps)
        return self.kernels.mix_experts(normed_TI, feed, weights.activation, residual_TI)

    def _gated(
        self,
        gate_up_T2F: torch.Tensor,
        activation: Activation,
        down: Weight,
        residual_TI: torch.Tensor | None,
    ) -> torch.Tensor:
        """A gate and the product after it."""
        gated_TF = self.kernels.gated(gate_up_T2F, activation)
        return self.kernels.matmul(gated_TF, down, residual_TI)
