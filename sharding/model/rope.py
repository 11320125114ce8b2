"""Rotary position embedding: angles of a batch's positions. The rotation itself is a kernel.

Su et al., 2021 (RoFormer). Angles are computed in float64: at position 131072 a float32 product has
lost a hundredth of a radian.
"""

from __future__ import annotations

import torch

from sharding.model.arch import ModelShape


def frequencies(shape: ModelShape, factors_R: torch.Tensor | None) -> torch.Tensor:
    """Radians a position, float64 `[R]`; `factors_R` divide them (the tensor `rope_freqs.weight` of
    Llama 3.1)."""
    exponents = torch.arange(0, shape.rope_dims, 2, dtype=torch.float64) / shape.rope_dims
    freqs_R = shape.rope_base**-exponents / shape.rope_scale
    return freqs_R if factors_R is None else freqs_R / factors_R.double()


def angles(positions_T: torch.Tensor, freqs_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position and pair, float32 `[T, R]` each."""
    radians = positions_T.double()[:, None] * freqs_R
    return radians.cos().float(), radians.sin().float()


def pair_view(pairs: str, rope_dims: int) -> tuple[tuple[int, int], int]:
    """How to unflatten a head's rotating elements into pairs: (shape, axis of the two)."""
    if pairs == "adjacent":
        return (rope_dims // 2, 2), -1
    assert pairs == "halves", pairs
    return (2, rope_dims // 2), -2
