"""Activations of few tokens as digits, in Triton: what products of bytes meet (`triton_matmul.py`).

Made of activations, or where activations are made: after a norm, a gate or attention's merge, which
saves a kernel and a trip through memory for each. The arithmetic is the same either way.

    T tokens, I inputs, N columns of digits (four a token), B blocks of a row, H heads, D head dim
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sharding.kernels.planes import BLOCK, RUN
from sharding.kernels.triton_attention import MERGED, Parts, _merged
from sharding.kernels.triton_rows import _gate, _inverse_rms
from sharding.model.arch import Activation

_RUN = tl.constexpr(RUN)
_BLOCK = tl.constexpr(BLOCK)


@dataclass(frozen=True)
class Digits:
    """Three digits to the base 256 of each activation.

    Of token t, digits in column 4 t + j times `factors[block, 4 t + j]` are, together, its
    activations: integers of 22 bits and a sign times the block's power of two. `words`, int32, are
    group by group as a tensor core takes them. What is not finite makes its block's factors NaN.
    Columns of no token are zeros.
    """

    words: Tensor
    factors: Tensor
    tokens: int

    @property
    def blocks(self) -> int:
        """Of a row."""
        return self.factors.shape[0]

    @property
    def width(self) -> int:
        """Columns: four for each token that there is room for."""
        return self.factors.shape[1]


@triton.jit
def _power(largest, bits: tl.constexpr):
    """The power of two that brings a positive number to [2^(bits - 1), 2^bits), and its inverse,
    both within the normal range."""
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    raised = tl.minimum(tl.maximum(253 + bits - exponent, 1), 253)
    up = (raised << 23).to(tl.float32, bitcast=True)
    return up, ((254 - raised) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _store(value_BI, block_B, column_BI, t, digits, factors, blocks, N: tl.constexpr):
    """Blocks of activations of token t as digits; zeros where there are none."""
    finite_BI = tl.abs(value_BI) < float("inf")
    value_BI = tl.where(finite_BI, value_BI, 0.0)
    up_B, down_B = _power(tl.max(tl.abs(value_BI), axis=1), 22)
    down_B = tl.where(tl.min(finite_BI.to(tl.int32), axis=1) == 1, down_B, float("nan"))
    whole_BI = tl.floor(value_BI * up_B[:, None] + 0.5).to(tl.int32)
    there_B = block_B < blocks
    eights: tl.constexpr = 2 if N > 8 else 1
    i_BI = column_BI % _RUN
    at_BI = column_BI // _RUN * (_RUN * N) + i_BI // 16 * 4 + i_BI % 4
    for j in tl.static_range(4):
        # The lowest first, each from -128 to 127; after three nothing is left.
        digit_BI = ((whole_BI + 128) & 255) - 128
        whole_BI = (whole_BI - digit_BI) >> 8
        n = t * 4 + j
        lane_BI = n // 8 // eights * 32 + n % 8 * 4 + i_BI % 16 // 4
        to = digits + at_BI + (lane_BI * eights + n // 8 % eights) * 8
        tl.store(to, digit_BI.to(tl.int8), mask=there_B[:, None])
        factor_B = down_B * (1 << (8 * j)) if j < 3 else down_B * 0.0
        tl.store(factors + block_B * N + n, factor_B, mask=there_B)


@triton.jit
def _place(BLOCKS: tl.constexpr):
    """A program's token, its blocks and their columns."""
    block_B = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column_BI = block_B[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    return tl.program_id(0), block_B, column_BI


@triton.jit
def _digits(
    x, digits, factors, tokens, cols, blocks, N: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Of activations that there are."""
    t, block_B, column_BI = _place(BLOCKS)
    mask_BI = (column_BI < cols) & (t < tokens)
    value_BI = tl.load(x + t.to(tl.int64) * cols + column_BI, mask=mask_BI, other=0.0)
    _store(value_BI, block_B, column_BI, t, digits, factors, blocks, N)


@triton.jit
def _norm_digits(
    x, scale, digits, factors, tokens, cols, blocks, eps, N: tl.constexpr, BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Of a norm's result: every program reads its whole row, which is less than a launch."""
    t, block_B, column_BI = _place(BLOCKS)
    row = x + t.to(tl.int64) * cols
    mask_BI = (column_BI < cols) & (t < tokens)
    inverse = _inverse_rms(row, tl.where(t < tokens, cols, 0), cols, eps, WIDTH)
    value_BI = tl.load(row + column_BI, mask=mask_BI, other=0.0) * inverse
    value_BI *= tl.load(scale + column_BI, mask=mask_BI, other=0.0)
    _store(value_BI, block_B, column_BI, t, digits, factors, blocks, N)


@triton.jit
def _gate_digits(
    gate_up, digits, factors, tokens, cols, blocks, N: tl.constexpr, BLOCKS: tl.constexpr,
    GELU: tl.constexpr,
):  # fmt: skip
    """Of `activation(gate) * up`."""
    t, block_B, column_BI = _place(BLOCKS)
    at_BI = gate_up + t.to(tl.int64) * 2 * cols + column_BI
    mask_BI = (column_BI < cols) & (t < tokens)
    gate_BI = tl.load(at_BI, mask=mask_BI, other=0.0)
    value_BI = _gate(gate_BI, tl.load(at_BI + cols, mask=mask_BI, other=0.0), GELU)
    _store(value_BI, block_B, column_BI, t, digits, factors, blocks, N)


@triton.jit
def _merge_digits(
    partials, rows, digits, factors, tokens, blocks, heads, kv_heads, part_rows, N: tl.constexpr,
    DIM: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of attention's parts, merged as `_merge` does; `rows` are those of all tokens, in order."""
    t, block_B, column_BI = _place(1)
    count: tl.constexpr = _BLOCK // DIM
    row = rows + tl.minimum(t, tokens - 1) * (heads // kv_heads) * 4
    mixed_HD = _merged(
        partials, row, t < tokens, tl.program_id(1) * count, heads, kv_heads, part_rows, DIM, DIM,
        count, PARTS,
    )  # fmt: skip
    value_BI = tl.reshape(mixed_HD, [1, _BLOCK])
    _store(value_BI, block_B, column_BI, t, digits, factors, blocks, N)


def room(tokens: int) -> int:
    """Tokens that a product of few is computed for: at least a matrix instruction's columns."""
    return max(2, int(triton.next_power_of_2(tokens)))


def blocks_of(cols: int) -> int:
    """That digits of so many columns are padded to."""
    return -(-cols // BLOCK)


def _empty(tokens: int, cols: int, like: Tensor) -> tuple[Tensor, Tensor, Digits]:
    """The tensors that a kernel fills, and the same as digits."""
    blocks, width = blocks_of(cols), 4 * room(tokens)
    bytes = torch.empty(blocks * BLOCK, width, dtype=torch.int8, device=like.device)
    factors = like.new_empty(blocks, width)
    return bytes, factors, Digits(bytes.view(torch.int32), factors, tokens)


def of_rows(x_TI: Tensor, at_once: int) -> Digits:
    """Of activations, so many blocks a program."""
    tokens, cols = x_TI.shape
    bytes, factors, made = _empty(tokens, cols, x_TI)
    _digits[made.width // 4, triton.cdiv(made.blocks, at_once)](
        x_TI, bytes, factors, tokens, cols, made.blocks, made.width, at_once
    )
    return made


def of_norm(x_TI: Tensor, scale_I: Tensor, eps: float, at_once: int) -> Digits:
    """Of `rms_norm(x)`."""
    tokens, cols = x_TI.shape
    bytes, factors, made = _empty(tokens, cols, x_TI)
    _norm_digits[made.width // 4, triton.cdiv(made.blocks, at_once)](
        x_TI, scale_I, bytes, factors, tokens, cols, made.blocks, eps, made.width, at_once,
        triton.next_power_of_2(cols),
    )  # fmt: skip
    return made


def of_gate(gate_up_T2F: Tensor, activation: Activation, at_once: int) -> Digits:
    """Of `gated(gate_up)`."""
    tokens, cols = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    bytes, factors, made = _empty(tokens, cols, gate_up_T2F)
    _gate_digits[made.width // 4, triton.cdiv(made.blocks, at_once)](
        gate_up_T2F, bytes, factors, tokens, cols, made.blocks, made.width, at_once,
        activation == "gelu",
    )  # fmt: skip
    return made


def of_parts(parts: Parts, tokens: int) -> Digits:
    """Of attention, not merged yet. Heads divide a block; no token is part of a chunk."""
    assert BLOCK % parts.dim == 0, parts.dim
    bytes, factors, made = _empty(tokens, parts.heads * parts.dim, parts.partials)
    _merge_digits[made.width // 4, made.blocks](
        parts.partials, parts.merged, bytes, factors, tokens, made.blocks, parts.heads,
        parts.kv_heads, parts.rows, made.width, parts.dim, MERGED,
    )  # fmt: skip
    return made
