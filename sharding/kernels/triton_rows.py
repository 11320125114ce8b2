"""The kernels that take one row or one element at a time, in Triton: norms, gates, rotation with
the KV write, the draw. What bounds them is memory; docs/numerics.md says how exact they are.

    T tokens, I columns, H query heads, G kv heads, D head dim, R rotary pairs, V vocabulary
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sharding.batch import PAGE_SLOTS
from sharding.kernels.block_weights import HeadWeights
from sharding.model.arch import Activation
from sharding.model.attention import BatchIndex
from sharding.model.kv_cache import LayerPages

_PAGE = tl.constexpr(PAGE_SLOTS)
DRAW_BLOCK = 4096
"""Logits that one program of the draw looks at."""


@triton.jit
def _inverse_root(x_I, width, eps):
    """`1 / sqrt(mean(x^2) + eps)` of so many numbers and zeros."""
    mean = tl.div_rn(tl.sum(x_I * x_I, axis=0), tl.cast(width, tl.float32))
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))


@triton.jit
def _inverse_rms(row, stop, width, eps, WIDTH: tl.constexpr):
    """The same of a row whose numbers from `stop` on are zeros."""
    column = tl.arange(0, WIDTH)
    x_I = tl.load(row + column, mask=column < stop, other=0.0)
    return _inverse_root(x_I, width, eps)


@triton.jit
def _rms_norm(x, scale, residual, y, width, eps, WIDTH: tl.constexpr, ADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    inverse = _inverse_rms(x + row, width, width, eps, WIDTH)
    column = tl.arange(0, WIDTH)
    inside = column < width
    y_I = tl.load(x + row + column, mask=inside, other=0.0) * inverse
    y_I *= tl.load(scale + column, mask=inside, other=0.0)
    if ADDED:
        y_I += tl.load(residual + row + column, mask=inside, other=0.0)
    tl.store(y + row + column, y_I, mask=inside)


def rms_norm(
    x_TI: Tensor, scale_I: Tensor, eps: float, residual_TI: Tensor | None = None
) -> Tensor:
    """`residual + x / sqrt(mean(x^2) + eps) * scale`, a row a program."""
    tokens, width = x_TI.shape
    y_TI = torch.empty_like(x_TI)
    if tokens:
        size, added = triton.next_power_of_2(width), residual_TI is not None
        _rms_norm[(tokens,)](x_TI, scale_I, residual_TI, y_TI, width, eps, size, added)
    return y_TI


@triton.jit
def _gate(gate, up, GELU: tl.constexpr):
    """`silu(gate) * up`, or `gelu(gate) * up`: (1 + tanh(z)) / 2 is 1 / (1 + e^-2z)."""
    by = gate
    if GELU:
        by = gate * (gate * gate * 0.07135481627 + 1.59576912161)
    return tl.div_rn(gate, 1.0 + tl.exp(-by)) * up


@triton.jit
def _gated(gate_up, y, width, WIDTH: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0)
    tl.store(y + row * width + column, _gate(gate, up, GELU), mask=inside)


def gated(gate_up_T2F: Tensor, activation: Activation) -> Tensor:
    """`activation(gate) * up`."""
    tokens, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    y_TF = gate_up_T2F.new_empty(tokens, width)
    if tokens:
        size = min(2048, triton.next_power_of_2(width))
        _gated[(tokens, triton.cdiv(width, size))](
            gate_up_T2F, y_TF, width, size, activation == "gelu"
        )
    return y_TF


@triton.jit
def _head(own, bias, norm, at, inside, inverse, BIASED: tl.constexpr, NORMED: tl.constexpr):
    """Elements `at` of a head, with its bias and normed."""
    x_D = tl.load(own + at, mask=inside, other=0.0)
    if BIASED:
        x_D += tl.load(bias + at, mask=inside, other=0.0)
    if NORMED:
        x_D = x_D * inverse * tl.load(norm + at, mask=inside, other=0.0)
    return x_D


@triton.jit
def _rotate_and_store(
    qkv, bias, q_norm, k_norm, q, keys, values, cos, sin, pages, slots, heads, kv_heads, eps,
    PAIRS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, ADJACENT: tl.constexpr,
    BIASED: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """One head of one token: a query, a key or a value, in the order in which they lie."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, DIMS)
    inside = d < DIM
    own = qkv + (token * (heads + 2 * kv_heads) + head) * DIM
    own_bias = bias
    if BIASED:
        own_bias += head * DIM
    x_D = _head(own, own_bias, q_norm, d, inside, 1.0, BIASED, False)
    page = tl.load(pages + token)
    slot = tl.load(slots + token)
    if head < heads + kv_heads:
        if ADJACENT:
            pair, upper, partner = d // 2, d % 2, d ^ 1
        else:
            pair, upper = d % PAIRS, d // PAIRS
            partner = tl.where(upper == 0, d + PAIRS, d - PAIRS)
        turning = d < 2 * PAIRS
        norm, inverse = q_norm, 1.0
        if NORMED:
            if head >= heads:
                norm = k_norm
            inverse = _inverse_root(x_D, DIM, eps)
            x_D = x_D * inverse * tl.load(norm + d, mask=inside, other=0.0)
        angle = token * PAIRS + pair
        cos_D = tl.load(cos + angle, mask=turning, other=1.0)
        sin_D = tl.load(sin + angle, mask=turning, other=0.0)
        other_D = _head(own, own_bias, norm, partner, turning, inverse, BIASED, NORMED)
        other_D = tl.where(upper == 0, -other_D, other_D)
        x_D = tl.where(turning, x_D * cos_D + other_D * sin_D, x_D)
        if head < heads:
            tl.store(q + (token * heads + head) * DIM + d, x_D, mask=inside)
        else:
            at = (page * kv_heads + head - heads) * (DIM * _PAGE) + d * _PAGE + slot
            tl.store(keys + at, x_D.to(tl.float16), mask=inside)
    else:
        at = (page * kv_heads + head - heads - kv_heads) * (DIM * _PAGE) + slot * DIM + d
        tl.store(values + at, x_D.to(tl.float16), mask=inside)


def rotate_and_store(
    qkv_TX: Tensor, index: BatchIndex, pages: LayerPages, own: HeadWeights
) -> Tensor:
    """Queries turned; keys turned and, with the values, written to their pages."""
    tokens, width = qkv_TX.shape
    dim, kv_heads, rope = pages.head_dim, pages.kv_heads, index.rope
    heads = width // dim - 2 * kv_heads
    q_TX = qkv_TX.new_empty(tokens, heads * dim)
    if tokens:
        cos_TR, sin_TR = index.cos_NTR[own.rotation], index.sin_NTR[own.rotation]
        _rotate_and_store[(tokens, heads + 2 * kv_heads)](
            qkv_TX, own.bias_X, own.q_norm_D, own.k_norm_D, q_TX, pages.k_PGDS, pages.v_PGSD,
            cos_TR, sin_TR, index.page_T, index.slot_T, heads, kv_heads, own.eps, rope.turning, dim,
            triton.next_power_of_2(dim), rope.pairs == "adjacent", own.bias_X is not None,
            own.q_norm_D is not None,
        )  # fmt: skip
    return q_TX


@triton.jit
def _mixed(word):
    """SplitMix64's finaliser, as in `sharding.model.sampling`."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    return word ^ (word >> 31)


@triton.jit
def _race(scaled, best, ids, seed, position, count, SIZE: tl.constexpr):
    """The largest `scaled + noise` of SIZE tokens, and the lowest id that has it."""
    gamma = 0x9E3779B97F4A7C15
    token = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    key = _mixed(tl.load(seed).to(tl.uint64) + gamma)
    key = _mixed((key ^ tl.load(position).to(tl.uint64)) + gamma)
    word = _mixed(key + (token + 1).to(tl.uint64) * gamma)
    uniform = ((word >> 12).to(tl.int64).to(tl.float64) + 0.5) * (1.0 / (1 << 52))
    noise = -tl.log(-tl.log(uniform))
    value = tl.load(scaled + token, mask=token < count, other=float("-inf")) + noise
    most = tl.max(value, axis=0)
    tl.store(best + tl.program_id(0), most)
    tl.store(ids + tl.program_id(0), tl.min(tl.where(value == most, token, count), axis=0))


def gumbel_argmax(scaled_V: Tensor, seed: int, position: int) -> int:
    """The id of the largest `scaled + noise`; `sharding.model.sampling.gumbel` is the noise."""
    count = scaled_V.numel()
    blocks = triton.cdiv(count, DRAW_BLOCK)
    best = scaled_V.new_empty(blocks)
    ids = torch.empty(blocks, dtype=torch.int32, device=scaled_V.device)
    signed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
    words = torch.tensor([signed, position], device=scaled_V.device)
    _race[(blocks,)](scaled_V, best, ids, words, words[1:], count, DRAW_BLOCK)
    return int(ids[best.argmax()])
