"""Rotary position embedding: angles of a batch's positions. The rotation itself is a kernel.

Su et al., 2021 (RoFormer). Angles are computed in float64: at position 131072 a float32 product has
lost a hundredth of a radian.

    N rotations of a model (`ModelShape.rotations`), R rotary pairs of a head
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sharding.model.arch import ModelShape, Pairs
from sharding.model.rotation import Rotation, Yarn


@dataclass(frozen=True)
class Rope:
    """How heads turn: `freqs_NR` radians a position, float64; cosines and sines are times
    `gains[n]`."""

    freqs_NR: torch.Tensor
    gains: tuple[float, ...]
    pairs: Pairs

    @property
    def rotations(self) -> int:
        """N."""
        return self.freqs_NR.shape[0]

    @property
    def turning(self) -> int:
        """Pairs of a head that turn, R."""
        return self.freqs_NR.shape[1]

    @property
    def pair_axis(self) -> int:
        """Of the two in `pair_shape`."""
        return -1 if self.pairs == "adjacent" else -2

    @property
    def pair_shape(self) -> tuple[int, int]:
        """How to unflatten a head's turning elements into pairs."""
        return (self.turning, 2) if self.pairs == "adjacent" else (2, self.turning)

    def angles(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of every position and pair, float32 `[N, T, R]` each."""
        radians_NTR = positions_T.double()[:, None] * self.freqs_NR[:, None]
        gains_N = torch.tensor(self.gains, dtype=torch.float64)[:, None, None]
        return (radians_NTR.cos() * gains_N).float(), (radians_NTR.sin() * gains_N).float()


def rope_of(shape: ModelShape, factors_R: torch.Tensor | None) -> Rope:
    """A model's; `factors_R` divide all frequencies (the tensor `rope_freqs.weight` of Llama 3.1,
    or LongRoPE's)."""
    freqs_NR = torch.stack([_frequencies(each, shape.rope_dims) for each in shape.rotations])
    if factors_R is not None:
        freqs_NR = freqs_NR / factors_R.double()
    gains = tuple(_gain(each) for each in shape.rotations)
    return Rope(freqs_NR, gains, shape.family.rope_pairs)


def _frequencies(rotation: Rotation, dims: int) -> torch.Tensor:
    """Radians a position, float64 `[R]`."""
    exponents_R = torch.arange(0, dims, 2, dtype=torch.float64) / dims
    freqs_R = rotation.base**-exponents_R
    if rotation.yarn is None:
        return freqs_R / rotation.scale
    kept_R = _kept(rotation.yarn, rotation.base, dims)
    return freqs_R * (kept_R + (1 - kept_R) / rotation.scale)


def _kept(yarn: Yarn, base: float, dims: int) -> torch.Tensor:
    """How far each pair keeps its frequency under YaRN, 1 for all of it, float64 `[R]`."""

    def pair_that_turns(times: float) -> float:
        return dims * math.log(yarn.context / (times * 2 * math.pi)) / (2 * math.log(base))

    first = max(math.floor(pair_that_turns(yarn.fast)), 0)
    last = min(math.ceil(pair_that_turns(yarn.slow)), dims - 1)
    pair_R = torch.arange(dims // 2, dtype=torch.float64)
    return 1 - ((pair_R - first) / max(last - first, 0.001)).clamp(0, 1)


def _gain(rotation: Rotation) -> float:
    """With YaRN's correction for scores that spread over more tokens, half of it in the queries and
    half in the keys."""
    if rotation.yarn is None:
        return rotation.gain
    return rotation.gain * (0.1 * math.log(max(1.0, rotation.scale)) + 1.0)
