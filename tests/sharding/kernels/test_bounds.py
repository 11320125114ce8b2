"""Every kernel, on every instruction set and in every format, against float64: within the bound
that docs/numerics.md derives, which is worked out from the inputs at hand."""

from __future__ import annotations

import pytest
import torch

from sharding.kernels import Kernels
from sharding.kernels.reference import ReferenceKernels
from sharding.model.arch import Activation
from tests.sharding.kernels import bounds
from tests.sharding.kernels.instruction_sets import KERNELS
from tests.sharding.kernels.world import (
    FORMAT_NAMES,
    Heads,
    file_of,
    index_of,
    normal,
    own_weights,
    random_pages,
    random_raw,
)

on_every_instruction_set = pytest.mark.parametrize("isa", KERNELS)
in_every_format = pytest.mark.parametrize("name", FORMAT_NAMES)
REFERENCE = ReferenceKernels()


def within(found: torch.Tensor, truth_and_bound: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Whether all numbers are within their bounds, none of them NaN."""
    truth, bound = truth_and_bound
    assert found.shape == truth.shape == bound.shape
    return bool(((found.double() - truth).abs() <= bound).all())


@on_every_instruction_set
@in_every_format
def test_matmul(isa: str, name: str) -> None:
    """One token, two, a tile and several tiles: the ways that the kernel takes."""
    raw = random_raw(name, 70, 768)
    packed = KERNELS[isa].pack(file_of(w=(name, raw)), ["w"])
    weight = bounds.exact_weight(name, raw)
    for tokens in (1, 2, 13):
        x_TI, residual_TO = normal(tokens, 768), normal(tokens, 70, seed=3)
        assert within(KERNELS[isa].matmul(x_TI, packed), bounds.matmul(isa, x_TI, weight))
        expected = bounds.matmul(isa, x_TI, weight, residual_TO)
        assert within(KERNELS[isa].matmul(x_TI, packed, residual_TO), expected)


@on_every_instruction_set
@in_every_format
@pytest.mark.parametrize("exponent", [-139, -110, 40, 112])
def test_matmul_of_tiny_and_huge_activations(isa: str, name: str, exponent: int) -> None:
    """Where products fall below the smallest number: what is lost must stay as small."""
    raw = random_raw(name, 17, 256)
    packed = KERNELS[isa].pack(file_of(w=(name, raw)), ["w"])
    for tokens in (1, 3):
        x_TI = normal(tokens, 256) * 2.0**exponent
        expected = bounds.matmul(isa, x_TI, bounds.exact_weight(name, raw))
        assert within(KERNELS[isa].matmul(x_TI, packed), expected)


@on_every_instruction_set
@in_every_format
def test_the_bound_of_matmul_is_not_a_formality(isa: str, name: str) -> None:
    """Activations that were rounded to 11 bits on the way would be found out."""
    raw = random_raw(name, 70, 768)
    packed = KERNELS[isa].pack(file_of(w=(name, raw)), ["w"])
    x_TI = normal(2, 768)
    found = KERNELS[isa].matmul(x_TI.half().float(), packed)
    assert not within(found, bounds.matmul(isa, x_TI, bounds.exact_weight(name, raw)))


@on_every_instruction_set
@in_every_format
def test_matmul_of_a_chunk_with_one_huge_activation(isa: str, name: str) -> None:
    """Its neighbours lose bits where a chunk shares a scale, but no more than the huge one's own
    rounding is worth. Largest numbers just below, at and above a power of two."""
    raw = random_raw(name, 17, 512)
    packed = KERNELS[isa].pack(file_of(w=(name, raw)), ["w"])
    weight = bounds.exact_weight(name, raw)
    for largest in (2.0, 1.9921874, 1.9921875, 1.9999999, -1.0, -1.9999999):
        x_TI = normal(3, 512) * 1e-3
        x_TI[:, 40] = largest * 1024
        x_TI[:, 500] = largest
        assert within(KERNELS[isa].matmul(x_TI, packed), bounds.matmul(isa, x_TI, weight))


@in_every_format
def test_matmul_of_the_slow_twin(name: str) -> None:
    raw, x_TI = random_raw(name, 70, 768), normal(5, 768)
    packed = REFERENCE.pack(file_of(w=(name, raw)), ["w"])
    expected = bounds.reference_matmul(x_TI, bounds.exact_weight(name, raw))
    assert within(REFERENCE.matmul(x_TI, packed), expected)


@on_every_instruction_set
@pytest.mark.parametrize("width", [1, 15, 16, 100, 2048])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e15])
def test_rms_norm(isa: str, width: int, size: float) -> None:
    x_TI, scale_I = normal(3, width) * size, normal(width, seed=4)
    found = KERNELS[isa].rms_norm(x_TI, scale_I, 1e-5)
    assert within(found, bounds.rms_norm(x_TI, scale_I, 1e-5))
    twin = REFERENCE.rms_norm(x_TI, scale_I, 1e-5)
    assert within(twin, bounds.rms_norm(x_TI, scale_I, 1e-5, lanes=1))


@on_every_instruction_set
@pytest.mark.parametrize("width", [1, 15, 16, 100])
def test_rms_norm_on_top_of_a_residual(isa: str, width: int) -> None:
    x_TI, scale_I, residual_TI = normal(3, width), normal(width, seed=4), normal(3, width, seed=5)
    for kernels in (KERNELS[isa], REFERENCE):
        found = kernels.rms_norm(x_TI, scale_I, 1e-5, residual_TI)
        assert within(found, bounds.rms_norm(x_TI, scale_I, 1e-5, 1, residual_TI))


@on_every_instruction_set
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated(isa: str, activation: Activation) -> None:
    """Gates over the whole range of e^x and beyond, densest where its reduction changes."""
    near_zero = torch.linspace(-3, 3, 3001)
    wide = torch.linspace(-400, 400, 6001)
    extremes = torch.tensor([0.0, -0.0, 1e-40, -1e-30, 3e38, -3e38, -88.72284, -103.98, -177.0])
    gate = torch.cat((near_zero, wide, extremes))
    gate_up = torch.cat((gate, normal(len(gate), seed=5)))[None]
    expected = bounds.gated(gate_up, activation)
    assert within(KERNELS[isa].gated(gate_up, activation), expected)
    assert within(REFERENCE.gated(gate_up, activation), expected)


@on_every_instruction_set
@pytest.mark.parametrize(
    "heads",
    [
        Heads(3, 1, 64, 64),
        Heads(4, 2, 100, 80, "halves"),
        Heads(2, 2, 10, 4),
        Heads(8, 2, 128, 128, "halves"),
    ],
    ids=lambda heads: f"{heads.dim}-{heads.rope_dims}-{heads.pairs}",
)
def test_rotation_and_the_rounding_of_keys_and_values(isa: str, heads: Heads) -> None:
    runs = [(0, 5, 20), (1, 0, 1)]
    index, pages = index_of(heads, runs, 32), random_pages(heads, 32, requests=2)
    qkv_TX = normal(21, (heads.heads + 2 * heads.kv_heads) * heads.dim)
    found = KERNELS[isa].rotate_and_store(qkv_TX, index, pages)
    q_THD, k_TGD, v_TGD = qkv_TX.unflatten(1, (-1, heads.dim)).split(
        [heads.heads, heads.kv_heads, heads.kv_heads], dim=1
    )
    assert within(found.unflatten(1, (-1, heads.dim)), bounds.rotated(q_THD, index))
    truth, bound = bounds.rotated(k_TGD, index)
    stored = pages.k_PGDS[index.page_T, :, :, index.slot_T]
    assert within(stored, (truth, bounds.stored_half(truth, bound)))
    assert torch.equal(pages.v_PGSD[index.page_T, :, index.slot_T], v_TGD.half())


@on_every_instruction_set
@pytest.mark.parametrize(("bias", "norms"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("heads", [Heads(3, 1, 64, 64, "halves"), Heads(4, 2, 90, 70)], ids=str)
def test_heads_with_a_bias_and_norms(isa: str, heads: Heads, bias: bool, norms: bool) -> None:
    index = index_of(heads, [(0, 5, 20), (1, 0, 1)], 32, rotations=2)
    qkv_TX = normal(21, (heads.heads + 2 * heads.kv_heads) * heads.dim)
    own = own_weights(heads, bias, norms)
    expected = bounds.rotate_and_store(qkv_TX, index, heads.kv_heads, heads.dim, own)
    for kernels in (KERNELS[isa], REFERENCE):
        pages = random_pages(heads, 32, requests=2)
        found = kernels.rotate_and_store(qkv_TX, index, pages, own)
        assert within(found.unflatten(1, (-1, heads.dim)), expected.q)
        assert within(pages.k_PGDS[index.page_T, :, :, index.slot_T], expected.k)
        assert within(pages.v_PGSD[index.page_T, :, index.slot_T], expected.v)


@on_every_instruction_set
def test_values_are_rounded_to_fp16_as_ieee_754_says(isa: str) -> None:
    """Ties, subnormals, what is just too large, infinities."""
    heads = Heads(1, 1, 32)
    edges = [0.0, -0.0, 1.00048828125, 1.00146484375, 65504.0, 65519.0, 65520.0, 1e9, torch.inf]
    edges += [2.0**-24, 2.0**-25, 2.0**-25 * 1.001, 3 * 2.0**-25, 6.1e-5, 1e-40, -(2.0**-14)]
    values = torch.tensor(edges + [-edge for edge in edges])
    qkv_TX = torch.cat((torch.zeros(64), values))[None]
    pages = random_pages(heads, 16)
    KERNELS[isa].rotate_and_store(qkv_TX, index_of(heads, [(0, 3, 1)], 16), pages)
    found = pages.v_PGSD[0, 0, 3]
    assert torch.equal(found.view(torch.int16), values.half().view(torch.int16))


@on_every_instruction_set
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("heads", [Heads(3, 1, 64), Heads(8, 2, 100), Heads(2, 2, 16)])
@pytest.mark.parametrize("size", [0.3, 3.0])
def test_attention(isa: str, window: int, heads: Heads, size: float) -> None:
    """Over three blocks of slots; scores that are all alike, and scores far apart."""
    pages = random_pages(heads, 560)
    index = index_of(heads, [(0, 0, 3), (0, 240, 30), (0, 559, 1)], 560)
    q_TX = normal(34, heads.heads * heads.dim) * size
    for kernels in (KERNELS[isa], REFERENCE):
        found = kernels.attention(q_TX, index, pages, window).unflatten(1, (-1, heads.dim))
        q_THD = q_TX.unflatten(1, (-1, heads.dim))
        for rows in index.rows:
            part = slice(rows.first, rows.stop)
            assert within(found[part], bounds.attention(q_THD[part], rows, pages, window))


@on_every_instruction_set
@in_every_format
def test_embedding_is_the_correctly_rounded_weight(isa: str, name: str) -> None:
    """All that a unit's bytes may spell, value by value: the packing loses nothing."""
    raw = random_raw(name, 40, 512, seed=7)
    file = file_of(w=(name, raw))
    kernels: Kernels = KERNELS[isa]
    everything = kernels.embed(kernels.pack(file, ["w"]), range(40))
    assert torch.equal(everything, bounds.exact_weight(name, raw).values_OI.float())
    twin = REFERENCE.embed(REFERENCE.pack(file, ["w"]), range(40))
    assert torch.equal(everything, twin)
