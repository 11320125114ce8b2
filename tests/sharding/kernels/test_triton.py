"""The Triton kernels against float64, within the bounds of docs/numerics.md, and against the slow
twin: on a GPU where there is one, else in Triton's interpreter (`conftest.py` decides)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from sharding.batch import SamplingParams
from sharding.errors import UnsupportedModelError
from sharding.kernels import triton_attention
from sharding.kernels.planes import planes_resident
from sharding.kernels.reference import ReferenceKernels
from sharding.kernels.triton import TritonKernels
from sharding.kernels.triton_plan import (
    LEAST_SPLIT,
    SPLIT,
    Way,
    fine_rows,
    plan_work,
    split_of,
)
from sharding.kernels.triton_prefix import Library
from sharding.kernels.triton_weights import PlanesWeight
from sharding.model.arch import Activation
from sharding.model.attention import BatchIndex
from sharding.model.kv_cache import LayerPages
from sharding.model.sampling import draw
from tests.sharding.kernels import bounds, triton_bounds
from tests.sharding.kernels.world import (
    FLOATS,
    FORMAT_NAMES,
    Heads,
    file_of,
    index_of,
    normal,
    own_weights,
    random_pages,
    random_raw,
)

KERNELS = TritonKernels()
DEVICE = KERNELS.device
ON_GPU = DEVICE.type == "cuda"
REFERENCE = ReferenceKernels()
in_every_format = pytest.mark.parametrize("name", FORMAT_NAMES)
not_finite = pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
COLS = 2304 if ON_GPU else 768
"""Enough for a row to be cut in eight; an interpreter is slow."""

WAYS = (1, 3, 16, 17)
"""Tokens for every way that a product takes."""


def within(found: torch.Tensor, truth_and_bound: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Whether all numbers are within their bounds, none of them NaN."""
    truth, bound = truth_and_bound
    assert found.shape == truth.shape == bound.shape
    return bool(((found.cpu().double() - truth).abs() <= bound).all())


def packed(
    name: str, rows: int, cols: int, seed: int = 0
) -> tuple[PlanesWeight, bounds.ExactWeight]:
    """A random matrix, in planes and exactly."""
    raw = random_raw(name, rows, cols, seed)
    weight = KERNELS.pack(file_of(w=(name, raw)), ["w"])
    assert isinstance(weight, PlanesWeight)
    return weight, bounds.exact_weight(name, raw)


def matmul(
    x_TI: torch.Tensor, weight: PlanesWeight, residual_TO: torch.Tensor | None = None
) -> torch.Tensor:
    """On the kernels' device, from and to the host."""
    residual = None if residual_TO is None else residual_TO.to(DEVICE)
    return KERNELS.matmul(x_TI.to(DEVICE), weight, residual).cpu()


def on_device(pages: LayerPages) -> LayerPages:
    """The same pages where the kernels read them."""
    return LayerPages(pages.k_PGDS.to(DEVICE), pages.v_PGSD.to(DEVICE))


def attend(q_TX: torch.Tensor, index: BatchIndex, pages: LayerPages, window: int) -> torch.Tensor:
    """Attention on the kernels' device, from and to the host."""
    return KERNELS.attention(q_TX.to(DEVICE), index.to(DEVICE), on_device(pages), window).cpu()


@in_every_format
def test_matmul(name: str) -> None:
    weight, exact = packed(name, 70, COLS)
    for tokens in WAYS:
        x_TI, residual_TO = normal(tokens, COLS), normal(tokens, 70, seed=3)
        # Interpreted, every way once.
        for residual in (residual_TO, None) if ON_GPU else (residual_TO if tokens % 2 else None,):
            expected = triton_bounds.matmul(x_TI, exact, weight.parts[0], residual)
            assert within(matmul(x_TI, weight, residual), expected), tokens


@in_every_format
@pytest.mark.parametrize("exponent", [-110, 40])
def test_matmul_of_tiny_and_huge_activations(name: str, exponent: int) -> None:
    """Far beyond what FP16 holds: rows are scaled."""
    weight, exact = packed(name, 17, 256)
    for tokens in (1, 5, 17):
        x_TI = normal(tokens, 256) * 2.0**exponent
        expected = triton_bounds.matmul(x_TI, exact, weight.parts[0])
        assert within(matmul(x_TI, weight), expected), tokens


def cut(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Without the bits after the first so many."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**bits).trunc() / 2**bits, exponent)


@pytest.mark.parametrize("tokens", [2, 16, 17])
@in_every_format
def test_the_bound_of_matmul_is_not_a_formality(name: str, tokens: int) -> None:
    """Activations with fewer bits than a way keeps would be found out, where none cancels."""
    weight, exact = packed(name, 20, 512)
    x_TI = normal(tokens, 512).abs() * exact.values_OI[0].sign().float()
    expected = triton_bounds.matmul(x_TI, exact, weight.parts[0])
    assert within(matmul(x_TI, weight), expected)
    bits = 7 if tokens == 17 else 10 if name in FLOATS else 14
    assert not within(matmul(cut(x_TI, bits), weight), expected)


@pytest.mark.parametrize("tokens", [1, 5, 17])
def test_a_stack_of_formats_is_one_weight(tokens: int) -> None:
    """Query, key and value as a Q4_K_M file has them: two of one format, one of another."""
    raws = {key: random_raw(name, rows, 512, seed) for seed, (key, name, rows) in enumerate(_STACK)}
    tensors = {key: (name, raws[key]) for key, name, _ in _STACK}
    weight = KERNELS.pack(file_of(**tensors), [key for key, *_ in _STACK])
    assert isinstance(weight, PlanesWeight) and len(weight.parts) == 2
    x_TI = normal(tokens, 512)
    found, first = matmul(x_TI, weight), 0
    for part in weight.parts:
        for key, name, rows in _STACK[:2] if part.first == 0 else _STACK[2:]:
            exact = bounds.exact_weight(name, raws[key])
            expected = triton_bounds.matmul(x_TI, exact, part)
            assert within(found[:, first : first + rows], expected)
            first += rows
    ids = [0, 43, 44, 60, 61, 77]
    assert torch.equal(
        KERNELS.embed(weight, ids).cpu(),
        torch.cat([bounds.exact_weight(n, raws[k]).values_OI for k, n, _ in _STACK]).float()[ids],
    )


_STACK = (("q", "Q5_0", 44), ("k", "Q5_0", 17), ("v", "Q8_0", 17))


@in_every_format
@pytest.mark.parametrize("rows", [1, 7, 65])
def test_planes_are_what_the_planner_counts(name: str, rows: int) -> None:
    cols = 33 if name in FLOATS else 512
    file = file_of(w=(name, random_raw(name, rows, cols)))
    weight = KERNELS.pack(file, ["w"])
    assert (weight.rows, weight.cols) == (rows, cols)
    assert weight.n_bytes == planes_resident(file.tensors["w"])


@in_every_format
def test_embedding(name: str) -> None:
    """All that a unit's bytes may spell: the planes lose nothing."""
    weight, exact = packed(name, 40, 512, seed=7)
    everything = KERNELS.embed(weight, range(40)).cpu()
    assert within(everything, triton_bounds.embedding(exact))
    some = [39, 0, 0, 17]
    assert torch.equal(KERNELS.embed(weight, some).cpu(), everything[some])
    with pytest.raises(IndexError):
        KERNELS.embed(weight, [40])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_products_of_any_shape(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FORMAT_NAMES), "format")
    block = bounds.BY_NAME[name].block_elements
    cols = block * data.draw(st.integers(1, 600 // block), "blocks")
    rows, tokens = data.draw(st.integers(1, 150), "rows"), data.draw(st.integers(0, 40), "tokens")
    size = 2.0 ** data.draw(st.integers(-100, 40), "exponent")
    weight, exact = packed(name, rows, cols)
    x_TI = normal(tokens, cols) * size
    residual_TO = normal(tokens, rows) * size if data.draw(st.booleans(), "residual") else None
    found = matmul(x_TI, weight, residual_TO)
    assert found.shape == (tokens, rows)
    if tokens:
        expected = triton_bounds.matmul(x_TI, exact, weight.parts[0], residual_TO)
        assert within(found, expected)


@not_finite
@pytest.mark.parametrize("tokens", [1, 4, 16, 20])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_stays_in_its_row(bad: float, tokens: int) -> None:
    weight, _ = packed("Q4_K", 20, 512)
    clean_TI = normal(tokens, 512)
    dirty_TI = clean_TI.clone()
    dirty_TI[tokens - 1, 300] = bad
    found, expected = matmul(dirty_TI, weight), matmul(clean_TI, weight)
    assert torch.equal(found[: tokens - 1], expected[: tokens - 1])
    assert not found[tokens - 1].isfinite().any()


@pytest.mark.parametrize("name", ["Q6_K", "Q4_1", "F16"][: 3 if ON_GPU else 2])
def test_a_token_beside_others_is_the_token_alone(name: str) -> None:
    """Of up to sixteen tokens each is computed as it would be alone, bit for bit. Interpreted, with
    sums that are exact: numpy adds up a wider matrix product in another order."""
    weight, _ = packed(name, 50, COLS)
    x_TI = normal(16, COLS)
    x_TI = x_TI if ON_GPU else (x_TI * 8).round()
    some = list(range(16)) if ON_GPU else [0, 1, 4, 15]
    alone = torch.cat([matmul(x_TI[t : t + 1], weight) for t in some])
    for tokens in (2, 5, 16):
        inside = [number for number, t in enumerate(some) if t < tokens]
        together = matmul(x_TI[:tokens], weight)
        assert torch.equal(together[[some[number] for number in inside]], alone[inside])


@pytest.mark.parametrize("width", [1, 15, 100, 2048])
@pytest.mark.parametrize("size", [1e-18, 1.0, 1e15])
def test_rms_norm(width: int, size: float) -> None:
    x_TI, scale_I = normal(3, width) * size, normal(width, seed=4)
    found = KERNELS.rms_norm(x_TI.to(DEVICE), scale_I.to(DEVICE), 1e-5)
    assert within(found, bounds.rms_norm(x_TI, scale_I, 1e-5, lanes=1))


def test_rms_norm_on_top_of_a_residual() -> None:
    x_TI, scale_I, residual_TI = normal(3, 100), normal(100, seed=4), normal(3, 100, seed=5)
    x, scale, residual = (tensor.to(DEVICE) for tensor in (x_TI, scale_I, residual_TI))
    found = KERNELS.rms_norm(x, scale, 1e-5, residual)
    assert within(found, bounds.rms_norm(x_TI, scale_I, 1e-5, 1, residual_TI))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated(activation: Activation) -> None:
    gate = torch.cat((torch.linspace(-3, 3, 3001), torch.linspace(-400, 400, 6001)))
    gate_up = torch.cat((gate, normal(len(gate), seed=5)))[None]
    found = KERNELS.gated(gate_up.to(DEVICE), activation)
    assert within(found, triton_bounds.gated(gate_up, activation))


@pytest.mark.parametrize(
    "heads",
    [
        Heads(3, 1, 64, 64, "halves"),
        Heads(4, 2, 100, 80, "halves"),
        Heads(2, 2, 10, 4),
        Heads(4, 2, 128, 128),
    ],
    ids=lambda heads: f"{heads.dim}-{heads.rope_dims}-{heads.pairs}",
)
def test_rotation_and_the_rounding_of_keys_and_values(heads: Heads) -> None:
    index = index_of(heads, [(0, 5, 20), (1, 0, 1)], 32)
    pages = on_device(random_pages(heads, 32, requests=2))
    qkv_TX = normal(21, (heads.heads + 2 * heads.kv_heads) * heads.dim)
    found = KERNELS.rotate_and_store(qkv_TX.to(DEVICE), index.to(DEVICE), pages)
    q_THD, k_TGD, v_TGD = qkv_TX.unflatten(1, (-1, heads.dim)).split(
        [heads.heads, heads.kv_heads, heads.kv_heads], dim=1
    )
    assert within(found.unflatten(1, (-1, heads.dim)), bounds.rotated(q_THD, index))
    truth, bound = bounds.rotated(k_TGD, index)
    stored = pages.k_PGDS.cpu()[index.page_T, :, :, index.slot_T]
    assert within(stored, (truth, bounds.stored_half(truth, bound)))
    assert torch.equal(pages.v_PGSD.cpu()[index.page_T, :, index.slot_T], v_TGD.half())


@pytest.mark.parametrize(("bias", "norms"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("heads", [Heads(3, 1, 64, 64, "halves"), Heads(4, 2, 90, 70)], ids=str)
def test_heads_with_a_bias_and_norms(heads: Heads, bias: bool, norms: bool) -> None:
    index = index_of(heads, [(0, 5, 20), (1, 0, 1)], 32, rotations=2)
    pages = on_device(random_pages(heads, 32, requests=2))
    qkv_TX = normal(21, (heads.heads + 2 * heads.kv_heads) * heads.dim)
    own = own_weights(heads, bias, norms, DEVICE)
    found = KERNELS.rotate_and_store(qkv_TX.to(DEVICE), index.to(DEVICE), pages, own)
    own = own_weights(heads, bias, norms)
    expected = bounds.rotate_and_store(qkv_TX, index, heads.kv_heads, heads.dim, own)
    assert within(found.unflatten(1, (-1, heads.dim)), expected.q)
    assert within(pages.k_PGDS.cpu()[index.page_T, :, :, index.slot_T], expected.k)
    assert within(pages.v_PGSD.cpu()[index.page_T, :, index.slot_T], expected.v)


def steps_of(rows: int, length: int) -> int:
    """At most so many steps of 32 slots, and parts."""
    return length // 32 + 2 + length // LEAST_SPLIT


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("heads", [Heads(3, 1, 64), Heads(8, 2, 100), Heads(2, 2, 16)])
@pytest.mark.parametrize("size", [0.3, 3.0])
def test_attention(window: int, heads: Heads, size: float) -> None:
    """A few rows, a chunk, and one token whose slots are several parts, in one batch."""
    length = 2 * SPLIT + 100
    pages = random_pages(heads, length)
    index = index_of(heads, [(0, 0, 3), (0, 200, 70), (0, length - 1, 1)], length)
    q_TX = normal(74, heads.heads * heads.dim) * size
    found = attend(q_TX, index, pages, window).unflatten(1, (-1, heads.dim))
    q_THD = q_TX.unflatten(1, (-1, heads.dim))
    for rows in index.rows:
        part = slice(rows.first, rows.stop)
        count = (rows.stop - rows.first) * heads.heads // heads.kv_heads
        expected = triton_bounds.attention(
            q_THD[part],
            rows,
            pages,
            window,
            count <= fine_rows(heads.dim),
            steps_of(count, rows.stop + length),
        )
        assert within(found[part], expected)


@pytest.mark.parametrize("heads", [Heads(3, 1, 64), Heads(4, 2, 128), Heads(2, 2, 104)])
def test_attention_over_a_prefix_that_a_library_does(heads: Heads) -> None:
    """Two chunks with long prefixes, one of them split by the library's grain, one without."""
    length, library = 900, Library(tokens=48, rows=128, grain=256)
    pages = random_pages(heads, length)
    index = index_of(heads, [(0, 512, 140), (0, 600, 300), (0, 0, 50), (0, length - 1, 1)], length)
    q_TX = normal(491, heads.heads * heads.dim) * 2
    tiles = replace(KERNELS.tiles, library=library)
    way = Way(heads.heads // heads.kv_heads, heads.kv_heads, 0, heads.dim)
    work = plan_work(index.to(DEVICE), way, tiles)
    found = [(prefix.first, prefix.stop, prefix.slots) for prefix in work.prefixes]
    assert found == [(0, 128, 512), (140, 396, 512)]  # whole multiples of tokens and slots
    mixed = triton_attention.attend(
        q_TX.to(DEVICE), index.to(DEVICE), on_device(pages), 0, work, tiles
    ).cpu()
    q_THD = q_TX.unflatten(1, (-1, heads.dim))
    for rows in index.rows:
        part = slice(rows.first, rows.stop)
        fine = rows.stop - rows.first == 1
        truth, bound = triton_bounds.attention(q_THD[part], rows, pages, 0, fine, 40)
        if rows.position >= library.grain and not fine:
            bound = bound + triton_bounds.library_attention(q_THD[part], rows, pages)
        assert within(mixed.unflatten(1, (-1, heads.dim))[part], (truth, bound))


def test_the_bounds_of_attention_are_not_a_formality() -> None:
    """Queries of 5 bits would be found out in a chunk, of 12 in a decoded token."""
    heads, length = Heads(2, 1, 32), 300
    pages = random_pages(heads, length)
    for run, fine, bits in (((0, 299, 1), True, 12), ((0, 200, 64), False, 5)):
        index = index_of(heads, [run], length)
        q_TX = normal(run[2], 64) * 3
        found = attend(cut(q_TX, bits), index, pages, 0).unflatten(1, (-1, 32))
        q_THD = q_TX.unflatten(1, (-1, 32))
        expected = triton_bounds.attention(q_THD, index.rows[0], pages, 0, fine, 4)
        assert not within(found, expected)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_attention_of_any_heads_windows_and_batches(data: st.DataObject) -> None:
    kv_heads, shared = data.draw(st.integers(1, 2), "kv heads"), data.draw(st.integers(1, 5))
    heads = Heads(kv_heads * shared, kv_heads, data.draw(st.integers(1, 130), "head dim"))
    window = data.draw(st.sampled_from([0, 0, 1, 15, 16, 17, 256, 300]), "window")
    starts = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=3), "positions")
    runs = [(r, start, data.draw(st.integers(1, 40))) for r, start in enumerate(starts)]
    pages = random_pages(heads, 340, requests=len(runs))
    index = index_of(heads, runs, 340)
    q_TX = normal(sum(tokens for *_, tokens in runs), heads.heads * heads.dim)
    found = attend(q_TX, index, pages, window).unflatten(1, (-1, heads.dim))
    q_THD = q_TX.unflatten(1, (-1, heads.dim))
    for rows in index.rows:
        part = slice(rows.first, rows.stop)
        fine = (rows.stop - rows.first) * shared <= fine_rows(heads.dim)
        expected = triton_bounds.attention(q_THD[part], rows, pages, window, fine, 20)
        assert within(found[part], expected)


@pytest.mark.parametrize("tokens", [1, 40])
def test_stale_slots_do_not_show(tokens: int) -> None:
    """What a former request left behind the last slot, were it infinite."""
    heads = Heads(4, 2, 64)
    pages = random_pages(heads, 64)
    index = index_of(heads, [(0, 0, tokens)], 64)
    q_TX = normal(tokens, 256)
    expected = attend(q_TX, index, pages, 0)
    for page in range(4):
        for slot in range(16):
            if (3 - page) * 16 + slot >= tokens:  # pages lie in reverse
                pages.k_PGDS[page, :, :, slot] = torch.nan
                pages.v_PGSD[page, :, slot] = torch.inf
    assert torch.equal(attend(q_TX, index, pages, 0), expected)


def test_a_decoded_token_does_not_see_its_batch() -> None:
    """Its attention is the same bits alone and beside a chunk and other requests."""
    heads, length = Heads(4, 2, 64), SPLIT + 50
    pages = random_pages(heads, length, requests=3)
    runs = [(0, length - 1, 1), (1, 10, 60), (2, 30, 1)]
    q_TX = normal(62, 256)
    together = attend(q_TX, index_of(heads, runs, length), pages, 0)
    apart = index_of(heads, runs[:1] + [(2, 0, 1)], length)
    assert torch.equal(attend(q_TX[:2], apart, pages, 0)[0], together[0])


def test_a_context_is_cut_into_programs_enough_for_a_gpu() -> None:
    """Of Llama-2-7B's heads and of one kv head, at any length; runs do not shrink as it grows."""
    for kv_heads in (1, 8, 32):
        splits = [split_of(length, kv_heads) for length in range(1, 1 << 18, 997)]
        assert splits == sorted(splits) and splits[0] == LEAST_SPLIT and splits[-1] == SPLIT
    assert 32 * 2048 // split_of(2048, 32) >= 1000
    assert split_of(65536, 1) == 256


@pytest.mark.parametrize("vocab", [1, 100, 5000, 49152])
def test_the_draw_is_the_definition(vocab: int) -> None:
    """Among all, where a kernel decides, and among what a filter leaves."""
    for seed, position in ((0, 0), (7, 12), ((1 << 64) - 1, 130000)):
        logits_V = normal(vocab, seed=seed % 1000)
        for top_p in (1.0, 0.9):
            params = SamplingParams(seed=seed, top_p=top_p)
            found = KERNELS.draw(logits_V.to(DEVICE), params, position, 1, None)
            assert found == draw(logits_V, params, position, 1, None)


def test_heads_beyond_the_kernels_are_refused_at_load() -> None:
    pages = random_pages(Heads(1, 1, 300), 16)
    with pytest.raises(UnsupportedModelError, match="heads of 300.*up to 256"):
        KERNELS.layers([], [pages])
