"""The weights of a decoder block as kernels take them. Not here: loading (`model/block.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from sharding.kernels import Weight
    from sharding.model.arch import Activation


@dataclass(frozen=True)
class HeadWeights:
    """What becomes of a block's queries, keys and values before they are stored.

    `bias_X` is added to all of them; queries and keys are normed head by head by `q_norm_D` and
    `k_norm_D`, and turn by rotation number `rotation`.
    """

    rotation: int = 0
    bias_X: torch.Tensor | None = None
    q_norm_D: torch.Tensor | None = None
    k_norm_D: torch.Tensor | None = None
    eps: float = 0.0

    def __post_init__(self) -> None:
        assert (self.q_norm_D is None) == (self.k_norm_D is None), "both norms or none"

    @property
    def n_bytes(self) -> int:
        """Resident bytes."""
        vectors = (self.bias_X, self.q_norm_D, self.k_norm_D)
        return sum(vector.nbytes for vector in vectors if vector is not None)


PLAIN_HEADS = HeadWeights()
"""They turn by the first rotation, and nothing else."""


@dataclass(frozen=True)
class DenseWeights:
    """A feed-forward of one pair of matrices: gates `[2F, I]` and what they let through, `down`
    `[I, F]`."""

    gate_up: Weight
    down: Weight

    @property
    def n_bytes(self) -> int:
        """Resident bytes."""
        return self.gate_up.n_bytes + self.down.n_bytes


@dataclass(frozen=True)
class ExpertWeights:
    """A mixture of experts: expert e is `gate_up[e]` and `down[e]`, sized as in `DenseWeights`.

    The router `[experts, I]` says which `used` of them a token takes.
    """

    router: Weight
    gate_up: Sequence[Weight]
    down: Sequence[Weight]
    used: int

    def __post_init__(self) -> None:
        assert len(self.gate_up) == len(self.down) == self.router.rows, len(self.gate_up)
        assert 1 <= self.used <= self.router.rows, self.used

    @property
    def n_bytes(self) -> int:
        """Resident bytes."""
        matrices = (self.router, *self.gate_up, *self.down)
        return sum(weight.n_bytes for weight in matrices)


@dataclass(frozen=True)
class BlockWeights:
    """A decoder block's weights. Matrices with the same input are one: one pass reads them.

    `window`: a token sees only so many slots, its own the last of them; 0 for all. The post norms,
    if any, are of what attention and feed-forward add. `eps` is that of all norms but the heads'.
    """

    attn_norm_I: torch.Tensor
    qkv: Weight
    attn_output: Weight
    ffn_norm_I: torch.Tensor
    feed_forward: DenseWeights | ExpertWeights
    eps: float
    window: int = 0
    heads: HeadWeights = PLAIN_HEADS
    activation: Activation = "silu"
    attn_post_norm_I: torch.Tensor | None = None
    ffn_post_norm_I: torch.Tensor | None = None

    @property
    def n_bytes(self) -> int:
        """Resident bytes."""
        parts = (self.qkv, self.attn_output, self.feed_forward)
        norms = (self.attn_norm_I, self.ffn_norm_I, self.attn_post_norm_I, self.ffn_post_norm_I)
        vectors = self.heads.n_bytes + sum(norm.nbytes for norm in norms if norm is not None)
        return vectors + sum(part.n_bytes for part in parts)
