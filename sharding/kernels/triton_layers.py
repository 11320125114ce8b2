"""Decoder blocks on the Triton kernels: pairs of steps as one kernel, single tokens as CUDA graphs.

    T tokens, I hidden size, X queries of all heads, F feed-forward width

Not here: capture and replay (`triton_graphs.py`), the order of steps (`composed.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch

from sharding.kernels import triton_attention, triton_digits
from sharding.kernels.composed import ComposedLayers
from sharding.kernels.planes import BLOCK
from sharding.kernels.triton_graphs import Graphs
from sharding.kernels.triton_plan import Items, Way, Work
from sharding.kernels.triton_products import FEW_TOKENS
from sharding.kernels.triton_weights import PlanesWeight

if TYPE_CHECKING:
    from sharding.kernels import Weight
    from sharding.kernels.block_weights import BlockWeights
    from sharding.kernels.triton import TritonKernels
    from sharding.model.arch import Activation
    from sharding.model.attention import BatchIndex
    from sharding.model.kv_cache import LayerPages


@dataclass(frozen=True)
class FusedLayers(ComposedLayers):
    """Few tokens' norms, gates and merges write the digits that the next product takes: ten kernels
    a block instead of fourteen."""

    kernels: TritonKernels

    def _normed(
        self, x_TI: torch.Tensor, norm_I: torch.Tensor, eps: float, weight: Weight
    ) -> torch.Tensor:
        products = self.kernels.products
        if not _takes_digits(weight, len(x_TI)):
            return super()._normed(x_TI, norm_I, eps, weight)
        return products.of_digits(products.normed_digits(x_TI, norm_I, eps), weight)

    def _mixed(
        self,
        q_TX: torch.Tensor,
        index: BatchIndex,
        pages: LayerPages,
        weights: BlockWeights,
        residual_TI: torch.Tensor | None,
    ) -> torch.Tensor:
        kernels, weight = self.kernels, weights.attn_output
        work = kernels.work(q_TX, index, pages, weights.window)
        whole = work.chunks is None and BLOCK % pages.head_dim == 0
        if not whole or not _takes_digits(weight, len(q_TX)):
            return super()._mixed(q_TX, index, pages, weights, residual_TI)
        parts = triton_attention.attend_finely(
            q_TX, index, pages, weights.window, work, kernels.tiles
        )
        digits = triton_digits.of_parts(parts, len(q_TX))
        return kernels.products.of_digits(digits, weight, residual_TI)

    def _gated(
        self,
        gate_up_T2F: torch.Tensor,
        activation: Activation,
        down: Weight,
        residual_TI: torch.Tensor | None,
    ) -> torch.Tensor:
        products = self.kernels.products
        if not _takes_digits(down, len(gate_up_T2F)):
            return super()._gated(gate_up_T2F, activation, down, residual_TI)
        digits = products.gated_digits(gate_up_T2F, activation)
        return products.of_digits(digits, down, residual_TI)


class GraphedLayers:
    """`Layers` on a GPU: single tokens as CUDA graphs, everything else kernel by kernel."""

    def __init__(self, kernels: TritonKernels, composed: ComposedLayers) -> None:
        self._kernels = kernels
        self._composed = composed
        blocks = zip(composed.weights, composed.pages, strict=True)
        self._ways = sorted({_way(block, pages) for block, pages in blocks})
        self._graphs = Graphs(kernels.device, self._run, self._cut)

    def run(
        self, x_TI: torch.Tensor, index: BatchIndex, wanted: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Hidden states after all blocks; writes the batch's keys and values."""
        decoding = all(rows.stop - rows.first == 1 for rows in index.rows)
        if wanted is None and decoding and 0 < len(x_TI) <= FEW_TOKENS:
            y_TI = self._graphs.run(x_TI, index)
            if y_TI is not None:
                return y_TI
        return self._composed.run(x_TI, index, wanted)

    def _cut(self, index: BatchIndex) -> Sequence[Items] | None:
        cuts = self._kernels.cuts(index, self._ways)
        # More heads may share a kv head than are computed finely.
        return None if any(cut.chunks for cut in cuts) else cuts

    def _run(self, x_TI: torch.Tensor, index: BatchIndex, works: Sequence[Work]) -> torch.Tensor:
        self._kernels.use(index, dict(zip(self._ways, works, strict=True)))
        return self._composed.run(x_TI, index)


def _way(block: BlockWeights, pages: LayerPages) -> Way:
    heads = block.attn_output.cols // pages.head_dim
    return Way(heads // pages.kv_heads, pages.kv_heads, block.window, pages.head_dim)


def _takes_digits(weight: Weight, tokens: int) -> TypeGuard[PlanesWeight]:
    """Whether nothing but digits of the activations is needed."""
    assert isinstance(weight, PlanesWeight), "a weight of another kernel set"
    return 0 < tokens <= FEW_TOKENS and all(part.planes.quantised for part in weight.parts)
