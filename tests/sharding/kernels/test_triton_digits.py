"""Digits that a norm, a gate or attention's merge writes, beside those of its plain result."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from sharding.kernels.triton_attention import MERGED, Parts
from sharding.kernels.triton_digits import Digits, of_parts
from tests.sharding.kernels.test_triton import DEVICE, KERNELS, packed
from tests.sharding.kernels.world import Heads, normal


def same_products(found: Digits, x_TI: torch.Tensor) -> bool:
    """Whether digits made where activations are made serve as well as those of the activations."""
    weight, _ = packed("Q4_0", 40, x_TI.shape[1], seed=5)
    one, other = KERNELS.products.of_digits(found, weight), KERNELS.matmul(x_TI, weight)
    size_TO = x_TI.abs() @ KERNELS.embed(weight, range(40)).abs().T
    return bool(((one - other).abs() <= 2.0**-19 * size_TO).all()) and bool(one.any())


@pytest.mark.parametrize(("tokens", "width"), [(1, 32), (16, 32), (3, 576), (1, 992), (16, 992)])
def test_digits_after_a_norm_and_a_gate(tokens: int, width: int) -> None:
    x_TI, scale_I = normal(tokens, width).to(DEVICE), normal(width, seed=1).to(DEVICE)
    normed = KERNELS.products.normed_digits(x_TI, scale_I, 1e-5)
    assert same_products(normed, KERNELS.rms_norm(x_TI, scale_I, 1e-5))
    both_T2F = normal(tokens, 2 * width, seed=2).to(DEVICE)
    assert same_products(KERNELS.products.gated_digits(both_T2F), KERNELS.gated(both_T2F))


@pytest.mark.parametrize("heads", [Heads(9, 3, 64), Heads(4, 4, 128), Heads(4, 1, 256)])
def test_digits_after_attention(heads: Heads) -> None:
    """Of tokens whose contexts are one part, some, and more than are merged at a time."""
    shared, runs = heads.heads // heads.kv_heads, (1, MERGED + 2, 5)
    firsts = [sum(runs[:token]) for token in range(len(runs))]
    merged = [
        (token, row, firsts[token], runs[token])
        for token in range(len(runs))
        for row in range(shared)
    ]
    partials = normal(sum(runs), heads.kv_heads, shared, heads.dim + 2, seed=6).to(DEVICE)
    partials[..., -1].abs_()  # sums of weights
    parts = Parts(
        partials, torch.tensor(merged, dtype=torch.int32, device=DEVICE), heads.heads,
        heads.kv_heads, heads.dim,
    )  # fmt: skip
    y_TX = torch.empty(len(runs), heads.heads * heads.dim, device=DEVICE)
    parts.merge(y_TX)
    assert same_products(of_parts(parts, len(runs)), y_TX)
