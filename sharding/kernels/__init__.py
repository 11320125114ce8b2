"""The kernel contract: what a stage asks of the arithmetic under it, and the choice of one set at
load.

    T tokens of a batch, I inputs, O outputs, V vocabulary, H query heads, G kv heads, D head dim,
    R rotary pairs of a head, F feed-forward width, P pages, S slots a page

Activations are float32, contiguous, row-major. KV pages are FP16: keys `[P, G, D, S]` so that
vector lanes run over slots, values `[P, G, S, D]`. Every output element is reduced in one fixed
order, whatever T is and whatever else is in the batch: chunks, batches and stages must not show in
the logits. Nothing here may keep a request's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from sharding.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from sharding.gguf.reader import GGUFFile
    from sharding.model.attention import BatchIndex
    from sharding.model.kv_cache import LayerPages


class Weight(Protocol):
    """A quantised matrix `[rows, cols]` in the layout that its kernel set likes."""

    @property
    def rows(self) -> int:
        """Outputs."""

    @property
    def cols(self) -> int:
        """Inputs."""

    @property
    def n_bytes(self) -> int:
        """Resident bytes."""


class Kernels(Protocol):
    """One kernel set. Every method is a pure function but `write_kv`."""

    name: str

    def pack(self, file: GGUFFile, names: Sequence[str]) -> Weight:
        """Load tensors of equal `cols`, stacked by rows, in the order of `names`.

        Raises `UnsupportedModelError` for a quantisation format that this set does not compute.
        """

    def embed(self, weight: Weight, ids_T: torch.Tensor) -> torch.Tensor:
        """Rows `ids_T` (int64) of the weight, `[T, I]`."""

    def matmul(self, x_TI: torch.Tensor, weight: Weight) -> torch.Tensor:
        """`x @ weight.T`, `[T, O]`."""

    def rms_norm(self, x_TI: torch.Tensor, scale_I: torch.Tensor, eps: float) -> torch.Tensor:
        """`x / sqrt(mean(x^2) + eps) * scale`, row by row (Zhang and Sennrich, 2019)."""

    def rotate(self, x_THD: torch.Tensor, index: BatchIndex) -> torch.Tensor:
        """Rotary embedding of the first 2R elements of each head by `index.cos_TR` and `sin_TR`."""

    def write_kv(
        self, k_TGD: torch.Tensor, v_TGD: torch.Tensor, index: BatchIndex, pages: LayerPages
    ) -> None:
        """Store keys and values as FP16 at each token's page and slot."""

    def attention(self, q_THD: torch.Tensor, index: BatchIndex, pages: LayerPages) -> torch.Tensor:
        """Causal attention of each token over its request's slots so far, `[T, H * D]`.

        Scores are scaled by `1/sqrt(D)`; the batch's own keys and values are written already.
        """

    def gated_silu(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up`, `[T, F]` (Shazeer 2020, SwiGLU)."""


def load_kernels(name: str) -> Kernels:
    """The kernel set of that name. Raises `ConfigError` for an unknown one."""
    from sharding.kernels.reference import ReferenceKernels

    sets = {"reference": ReferenceKernels}
    if name not in sets:
        raise ConfigError(f"no kernel set {name!r}; there are: {', '.join(sets)}")
    return sets[name]()
