"""What float64 gives, and how far a float32 kernel may be from it, as docs/numerics.md derives it.

Every function returns `(truth, bound)` in float64. Nothing here is fitted: a bound is worked out
from a kernel's inputs alone. Not here: the data (`world.py`).

    T tokens, I inputs, O outputs, H query heads, G kv heads, D head dim, N slots of a request
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sharding.gguf.quants import FORMATS, QuantFormat, dequantise
from sharding.kernels.block_weights import HeadWeights
from sharding.model.arch import Activation
from sharding.model.attention import BatchIndex, Rows
from sharding.model.kv_cache import LayerPages

U = 2.0**-24  # unit roundoff of float32
TINY = 2.0**-149  # its smallest number
EXP_ERROR = 8 * U
KV_BLOCK = 256
CHUNK = 32
IN_DIGITS = {"avx512_amx", "avx512_vnni"}
"""Instruction sets that multiply quantised weights in integers."""

BY_NAME: dict[str, QuantFormat] = {
    format.name: format for format in FORMATS.values() if format.computed
}


@dataclass(frozen=True)
class Arithmetic:
    """How a format's products are grouped, and where its bytes are.

    `group` columns share a scale; `offset` is subtracted from a stored value; `d_at` and `m_at` are
    bytes of a unit where its FP16 scales of values and of minima begin; `quants` the bytes of the
    stored values; `scale_most` the largest integer beside d; `room` what the top digit of a
    fixed-point activation leaves of its byte; `product_underflow` what a product may lose below the
    smallest number, in units of the group's scale.
    """

    group: int
    offset: int = 0
    d_at: int | None = None
    m_at: int | None = None
    quants: slice | None = None
    scale_most: int = 1
    room: int = 0
    product_underflow: float = 2.0**-120


_FLOAT = Arithmetic(32, product_underflow=TINY)

ARITHMETIC = {
    "F32": _FLOAT,
    "F16": _FLOAT,
    "BF16": _FLOAT,
    "Q4_0": Arithmetic(32, offset=8, d_at=0, quants=slice(2, 18), room=8),
    "Q4_1": Arithmetic(32, d_at=0, m_at=2, room=8),
    "Q5_0": Arithmetic(32, offset=16, d_at=0, quants=slice(2, 22), room=16),
    "Q5_1": Arithmetic(32, d_at=0, m_at=2, room=16),
    "Q8_0": Arithmetic(32, d_at=0, product_underflow=TINY),
    "IQ4_NL": Arithmetic(32, d_at=0, product_underflow=TINY),
    "Q2_K": Arithmetic(16, d_at=80, m_at=82, scale_most=15, room=2),
    "Q3_K": Arithmetic(16, offset=4, d_at=108, quants=slice(0, 96), scale_most=32, room=4),
    "Q4_K": Arithmetic(32, d_at=0, m_at=2, scale_most=63, room=8),
    "Q5_K": Arithmetic(32, d_at=0, m_at=2, scale_most=63, room=16),
    "Q6_K": Arithmetic(16, offset=32, d_at=208, quants=slice(0, 192), scale_most=128, room=32),
    "IQ4_XS": Arithmetic(32, d_at=0, scale_most=32, product_underflow=TINY),
}


def gamma(roundings: float) -> float:
    """Largest relative error of a term that is rounded so often (Higham 2002, lemma 3.1)."""
    return roundings * U / (1 - roundings * U)


@dataclass(frozen=True)
class ExactWeight:
    """A matrix without a rounding: `values_OI`; `size_OI`, |D| |q - offset| + |M|; `magnitude_OI`,
    |D| (q + offset) + |M|; `scale_most`, the largest |D|."""

    name: str
    values_OI: torch.Tensor
    size_OI: torch.Tensor
    magnitude_OI: torch.Tensor
    scale_most: float


def exact_weight(name: str, raw: NDArray[np.uint8]) -> ExactWeight:
    """Reads rows with scales or quants set to zero, which leaves one exact term of each weight."""
    how = ARITHMETIC[name]
    if how.m_at is not None and how.d_at is not None:
        products = _read(name, raw, slice(how.m_at, how.m_at + 2))
        minima = _read(name, raw, slice(how.d_at, how.d_at + 2))
        values, size = products + minima, products.abs() + minima.abs()
        magnitude = size
    elif how.quants is not None:
        values, offsets = _read(name, raw), _read(name, raw, how.quants)
        size, magnitude = values.abs(), (values - offsets).abs() + offsets.abs()
    else:
        values = _read(name, raw)
        size = magnitude = values.abs()
    scale_most = 1.0
    if how.d_at is not None:
        units = raw.reshape(-1, BY_NAME[name].block_bytes)
        d = units[:, how.d_at : how.d_at + 2].copy().view(np.float16)
        scale_most = float(np.abs(d).max()) * how.scale_most
    return ExactWeight(name, values, size, magnitude, scale_most)


def _read(name: str, raw: NDArray[np.uint8], zeroed: slice | None = None) -> torch.Tensor:
    format = BY_NAME[name]
    units = raw.copy().reshape(-1, format.block_bytes)
    if zeroed is not None:
        units[:, zeroed] = 0
    return torch.from_numpy(dequantise(format, units.reshape(raw.shape))).double()


def matmul(
    isa: str, x_TI: torch.Tensor, weight: ExactWeight, residual_TO: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the grouped kernels, in float32 or in digits."""
    x = x_TI.double()
    residual = torch.zeros(1) if residual_TO is None else residual_TO.double()
    truth_TO = x @ weight.values_OI.T + residual
    how = ARITHMETIC[weight.name]
    groups = -(-x_TI.shape[1] // how.group)
    steps = (2 if how.m_at is not None else 1) * groups
    if isa in IN_DIGITS and how is not _FLOAT:
        # What a chunk's fixed-point numbers are off by.
        largest_TI = x.abs().unflatten(1, (-1, CHUNK)).amax(-1)
        fixed_TI = 256 / (127.498 - how.room) * U * largest_TI + 2.0**-107
        off_TI = fixed_TI.repeat_interleave(CHUNK, dim=1)
        size_TO = residual.abs() + (x.abs() + off_TI) @ weight.size_OI.T
        lost = (steps + 1) * 2.0**20 * TINY
        bound_TO = gamma(steps + 4) * size_TO + off_TI @ weight.size_OI.T + lost
        return truth_TO, bound_TO
    size_TO = residual.abs() + x.abs() @ weight.magnitude_OI.T
    lost = groups * how.group * weight.scale_most * how.product_underflow + (steps + 1) * TINY
    return truth_TO, gamma(how.group + steps + 7) * size_TO + lost


def reference_matmul(
    x_TI: torch.Tensor, weight: ExactWeight, residual_TO: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one float32 sum over all columns, in any order, of weights rounded once."""
    cols = x_TI.shape[1]
    truth_TO = x_TI.double() @ weight.values_OI.T
    size_TO = x_TI.double().abs() @ weight.values_OI.T.abs()
    if residual_TO is not None:
        truth_TO = truth_TO + residual_TO.double()
        size_TO = size_TO + residual_TO.double().abs()
    return truth_TO, gamma(cols + 3) * size_TO + (cols + 1) * TINY


def rms_norm(
    x_TI: torch.Tensor,
    scale_I: torch.Tensor,
    eps: float,
    lanes: int = 16,
    residual_TI: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squares are summed in so many lanes; the residual's addition rounds once."""
    x, scale = x_TI.double(), scale_I.double()
    truth = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * scale
    mean_roundings = -(-x.shape[-1] // lanes) + 8
    bound = gamma(mean_roundings / 2 + 5) * truth.abs() + TINY * (1 + scale.abs())
    if residual_TI is None:
        return truth, bound
    truth = truth + residual_TI.double()
    return truth, bound * (1 + U) + U * truth.abs()


def sigmoid_of(gate: torch.Tensor, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    """What a gate's sigmoid is taken of, and how far that is off: GELU's polynomial has terms of
    one sign, five roundings. Where that were more than 1, the sigmoid is 0 or 1 however far."""
    if activation == "silu":
        return gate, torch.zeros_like(gate)
    by = 2 * (2 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return by, (gamma(5) * by.abs()).clamp(max=1)


def gated(
    gate_up_T2F: torch.Tensor, activation: Activation = "silu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """e^-by, an addition, a division, a product; 2^-121 where e^-by is beyond float32."""
    gate, up = gate_up_T2F.double().chunk(2, dim=-1)
    by, off = sigmoid_of(gate, activation)
    truth = gate * torch.sigmoid(by) * up
    relative = torch.expm1(off) + gamma(EXP_ERROR / U + 4)
    return truth, relative * truth.abs() + 2.0**-121 * up.abs() + TINY * (1 + up.abs())


def rotated(
    x_THD: torch.Tensor, index: BatchIndex, rotation: int = 0, off_THD: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two products and a sum for each turning element; the others are copied. `off_THD`: how far
    `x` may be off."""
    rope = index.rope
    cos = index.cos_NTR[rotation].double()[:, None]
    sin = index.sin_NTR[rotation].double()[:, None]
    x = x_THD.double()
    off = torch.zeros_like(x) if off_THD is None else off_THD
    a, b = x[..., : 2 * rope.turning].unflatten(-1, rope.pair_shape).unbind(rope.pair_axis)
    c, d = off[..., : 2 * rope.turning].unflatten(-1, rope.pair_shape).unbind(rope.pair_axis)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=rope.pair_axis)
    sizes = (a * cos).abs() + (b * sin).abs(), (a * sin).abs() + (b * cos).abs()
    size = torch.stack(sizes, dim=rope.pair_axis).flatten(-2)
    offs = c * cos.abs() + d * sin.abs(), c * sin.abs() + d * cos.abs()
    carried = torch.stack(offs, dim=rope.pair_axis).flatten(-2)
    rest = slice(2 * rope.turning, None)
    truth = torch.cat((turned.flatten(-2), x[..., rest]), dim=-1)
    bound = gamma(2) * (size + carried) + carried + 2 * TINY
    return truth, torch.cat((bound, off[..., rest]), dim=-1)


@dataclass(frozen=True)
class Turned:
    """Queries as they turn, keys and values as they are stored: truth and bound of each, `[T, H,
    D]` and `[T, G, D]`."""

    q: tuple[torch.Tensor, torch.Tensor]
    k: tuple[torch.Tensor, torch.Tensor]
    v: tuple[torch.Tensor, torch.Tensor]


def rotate_and_store(
    qkv_TX: torch.Tensor, index: BatchIndex, kv_heads: int, dim: int, own: HeadWeights
) -> Turned:
    """A bias, a norm, a rotation, a rounding to FP16; each passes on what the one before is off by.

    A norm is off by that twice: in its own element, and half in each root of squares.
    """
    x_TX = qkv_TX.double()
    off_TX = torch.zeros_like(x_TX)
    if own.bias_X is not None:
        x_TX = x_TX + own.bias_X.double()
        off_TX = U * x_TX.abs()
    heads = x_TX.shape[1] // dim - 2 * kv_heads
    sizes = [heads, kv_heads, kv_heads]
    parts = [x.unflatten(1, (-1, dim)).split(sizes, dim=1) for x in (x_TX, off_TX)]
    q, k, v = zip(*parts, strict=True)
    if own.q_norm_D is not None and own.k_norm_D is not None:
        q, k = _normed_head(q[0], own.q_norm_D, own.eps), _normed_head(k[0], own.k_norm_D, own.eps)
    q, k = rotated(q[0], index, own.rotation, q[1]), rotated(k[0], index, own.rotation, k[1])
    return Turned(q, (k[0], stored_half(*k)), (v[0], stored_half(*v)))


def _normed_head(
    x_THD: torch.Tensor, norm_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    truth, bound = rms_norm(x_THD, norm_D, eps, lanes=1)
    return truth, bound + gamma(3) * truth.abs()


def stored_half(truth: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """The bound once a number within it was rounded to FP16 (11 bits; 2^-25 if subnormal)."""
    return bound + 2.0**-11 * (truth.abs() + bound) + 2.0**-25


@dataclass(frozen=True)
class ExactAttention:
    """One segment's attention in float64, of the keys and values that are stored: queries
    `[T, G, S, D]`, keys `[G, D, N]`, values `[G, N, D]`; scores, weights `p` and what is hidden
    `[T, G, S, N]`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scores: torch.Tensor
    hidden: torch.Tensor
    p: torch.Tensor

    def score_sizes(self) -> torch.Tensor:
        """The sums of absolute values that scores are sums of."""
        return torch.einsum("tgsd,gdn->tgsn", self.q.abs(), self.k.abs())

    def fall(self, score_error: torch.Tensor) -> torch.Tensor:
        """How far a score may lie below the largest, as computed; 0 where hidden."""
        off = 2 * score_error.amax(-1, keepdim=True)
        most = self.scores.amax(-1, keepdim=True)
        return (most - self.scores + off).masked_fill(self.hidden, 0.0)

    def mixed(
        self, weight_error: torch.Tensor, adding: float, lost: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mix of values, `[T, H, D]`, and its bound: weights off by `weight_error`, sums by
        `adding`, both relative, and `lost` beside."""
        pa = self.p * ((1 + weight_error) * (1 + adding) - 1)
        mixed = torch.einsum("tgsn,gnd->tgsd", self.p, self.v)
        total_error = pa.sum(-1, keepdim=True)
        spread = torch.einsum("tgsn,gnd->tgsd", pa, self.v.abs()) + mixed.abs() * total_error
        bound = spread / (1 - total_error) * (1 + U) + U * mixed.abs() + lost
        return mixed.flatten(1, 2), bound.flatten(1, 2)


def exact_attention(
    q_THD: torch.Tensor, rows: Rows, pages: LayerPages, window: int
) -> ExactAttention:
    """Of a segment's queries `[T, H, D]`."""
    tokens, _, dim = q_THD.shape
    length = rows.position + tokens
    k_GDN, v_GND = (part.double() for part in pages.gather(rows.pages, 0, _whole(length), length))
    k_GDN, v_GND = k_GDN[..., :length], v_GND[:, :length]
    q_TGSD = q_THD.double().unflatten(1, (pages.kv_heads, -1)) / dim**0.5
    last_T1 = torch.arange(rows.position, length)[:, None]
    slots = torch.arange(length)
    hidden_TN = (slots > last_T1) | ((slots <= last_T1 - window) if window else slots < 0)
    hidden = hidden_TN[:, None, None, :]
    scores = torch.einsum("tgsd,gdn->tgsn", q_TGSD, k_GDN).masked_fill(hidden, -torch.inf)
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    return ExactAttention(q_TGSD, k_GDN, v_GND, scores, hidden, p / p.sum(-1, keepdim=True))


def attention(
    q_THD: torch.Tensor, rows: Rows, pages: LayerPages, window: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """One segment's attention `[T, H, D]`; keys and values are those stored."""
    exact = exact_attention(q_THD, rows, pages, window)
    dim, length = q_THD.shape[-1], rows.position + len(q_THD)
    score_error = gamma(dim + 4) * exact.score_sizes()
    seen = min(length, window or length)
    blocks = -(-seen // KV_BLOCK) + 1
    # What a weight is off by: its score, the rounding of what e is raised to, and every e^x.
    weight_error = torch.expm1(score_error + U * exact.fall(score_error) + (blocks + 1) * EXP_ERROR)
    adding = gamma(min(seen, KV_BLOCK) + 5 + 2 * blocks)
    return exact.mixed(weight_error, adding, length * 2.0**-147 * (exact.v.abs().max() + 1))


def _whole(length: int) -> int:
    return -(-length // 16) * 16
