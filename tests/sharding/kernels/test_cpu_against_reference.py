"""The compiled kernels beside their slow twin, over shapes, formats and numbers that nobody chose:
never further apart than the sum of both bounds, and what is not finite stays where it belongs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from sharding.batch import SamplingParams
from sharding.cost import packed_resident
from sharding.errors import StageError, UnsupportedModelError
from sharding.gguf.quants import FORMATS
from sharding.kernels import Kernels
from sharding.kernels.cpu import CPUKernels
from sharding.kernels.reference import ReferenceKernels
from sharding.model.arch import Pairs
from sharding.model.kv_cache import LayerPages
from sharding.model.sampling import History
from tests.sharding.kernels import bounds
from tests.sharding.kernels.instruction_sets import KERNELS
from tests.sharding.kernels.world import (
    FLOATS,
    FORMAT_NAMES,
    Heads,
    file_of,
    index_of,
    normal,
    random_pages,
    random_raw,
    same,
)

REFERENCE = ReferenceKernels()
instruction_sets = st.sampled_from(list(KERNELS))
on_every_instruction_set = pytest.mark.parametrize("isa", KERNELS)
in_every_format = pytest.mark.parametrize("name", FORMAT_NAMES)
not_finite = pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])


def columns(name: str) -> st.SearchStrategy[int]:
    """Columns that a format allows: any number for the float ones."""
    block = bounds.BY_NAME[name].block_elements
    return st.integers(1, 600 // block).map(lambda blocks: blocks * block)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_products_of_any_shape(data: st.DataObject) -> None:
    kernels = KERNELS[data.draw(instruction_sets, "instruction set")]
    name = data.draw(st.sampled_from(FORMAT_NAMES), "format")
    rows, cols = data.draw(st.integers(1, 100), "rows"), data.draw(columns(name), "columns")
    tokens, seed = data.draw(st.integers(0, 30), "tokens"), data.draw(st.integers(0, 99), "seed")
    size = 2.0 ** data.draw(st.integers(-130, 40), "exponent")
    raw, x_TI = random_raw(name, rows, cols, seed), normal(tokens, cols, seed=seed) * size
    residual_TO = normal(tokens, rows) * size if data.draw(st.booleans(), "residual") else None
    file, exact = file_of(w=(name, raw)), bounds.exact_weight(name, raw)
    found = kernels.matmul(x_TI, kernels.pack(file, ["w"]), residual_TO)
    twin = REFERENCE.matmul(x_TI, REFERENCE.pack(file, ["w"]), residual_TO)
    _, own = bounds.matmul(kernels.instruction_set, x_TI, exact, residual_TO)
    _, twins = bounds.reference_matmul(x_TI, exact, residual_TO)
    assert found.shape == (tokens, rows)
    assert ((found.double() - twin.double()).abs() <= own + twins).all()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_attention_of_any_heads_windows_and_batches(data: st.DataObject) -> None:
    kernels = KERNELS[data.draw(instruction_sets, "instruction set")]
    kv_heads = data.draw(st.integers(1, 3), "kv heads")
    shared = data.draw(st.sampled_from([1, 2, 3, 4, 5, 7, 13, 25]), "heads that share one")
    heads = Heads(kv_heads * shared, kv_heads, data.draw(st.integers(1, 130), "head dim"))
    window = data.draw(st.sampled_from([0, 0, 1, 15, 16, 17, 256, 300]), "window")
    starts = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=3), "positions")
    runs = [(r, start, data.draw(st.integers(1, 20))) for r, start in enumerate(starts)]
    pages = random_pages(heads, 320, requests=len(runs))
    index = index_of(heads, runs, 320)
    q_TX = normal(sum(tokens for *_, tokens in runs), heads.heads * heads.dim)
    found = kernels.attention(q_TX, index, pages, window)
    twin = REFERENCE.attention(q_TX, index, pages, window)
    q_THD = q_TX.unflatten(1, (-1, heads.dim))
    for rows in index.rows:
        part = slice(rows.first, rows.stop)
        _, bound = bounds.attention(q_THD[part], rows, pages, window)
        apart = (found[part].double() - twin[part].double()).abs()
        assert (apart <= 2 * bound.flatten(1)).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rotation_gates_and_norms_of_any_width(data: st.DataObject) -> None:
    kernels = KERNELS[data.draw(instruction_sets, "instruction set")]
    dim = data.draw(st.integers(2, 70), "head dim")
    rope_dims = 2 * data.draw(st.integers(1, dim // 2), "pairs")
    choices: tuple[Pairs, ...] = ("adjacent", "halves")
    pairs = data.draw(st.sampled_from(choices), "which pair")
    heads = Heads(3, 1, dim, rope_dims, pairs)
    index, tokens = index_of(heads, [(0, 3, 5), (1, 0, 1)], 16), 6
    x = normal(tokens, 5 * dim)
    own, twins = random_pages(heads, 16, requests=2), random_pages(heads, 16, requests=2)
    q_TX = kernels.rotate_and_store(x, index, own)
    assert torch.equal(q_TX, REFERENCE.rotate_and_store(x, index, twins))
    assert torch.equal(own.k_PGDS, twins.k_PGDS)
    assert torch.equal(own.v_PGSD, twins.v_PGSD)
    gate_up = normal(tokens, 2 * dim) * data.draw(st.sampled_from([1.0, 100.0]))
    _, bound = bounds.gated(gate_up)
    apart = kernels.gated(gate_up).double() - REFERENCE.gated(gate_up).double()
    assert (apart.abs() <= 2 * bound).all()
    scale_I = normal(5 * dim, seed=4)
    _, bound = bounds.rms_norm(x, scale_I, 1e-5, lanes=1)
    apart = kernels.rms_norm(x, scale_I, 1e-5).double() - REFERENCE.rms_norm(x, scale_I, 1e-5)
    assert (apart.abs() <= 2 * bound).all()


@on_every_instruction_set
@in_every_format
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 65, 100])
def test_packed_bytes_are_what_the_planner_counts(isa: str, name: str, rows: int) -> None:
    cols = 33 if name in FLOATS else 512
    file = file_of(w=(name, random_raw(name, rows, cols)))
    weight = KERNELS[isa].pack(file, ["w"])
    assert (weight.rows, weight.cols) == (rows, cols)
    assert weight.n_bytes == packed_resident(file.tensors["w"])


@in_every_format
def test_tensors_at_odd_addresses_are_read_as_they_are(name: str) -> None:
    """GGUF aligns tensors, but a part of a row lies where it lies."""
    raw = random_raw(name, 17, 512)
    file = file_of(w=(name, raw))
    kernels, rows = next(iter(KERNELS.values())), range(17)
    expected = kernels.embed(kernels.pack(file, ["w"]), rows)
    whole = file._data[0]
    for shift in (1, 3):
        room = np.zeros(len(whole) + shift, np.uint8)
        room[shift:] = whole
        file._data = [room[shift:]]
        assert torch.equal(kernels.embed(kernels.pack(file, ["w"]), rows), expected), shift


@pytest.mark.parametrize("kernels", [*KERNELS.values(), REFERENCE], ids=[*KERNELS, "reference"])
def test_a_format_that_is_not_computed_is_refused(kernels: CPUKernels | ReferenceKernels) -> None:
    file = file_of(w=("Q8_0", random_raw("Q8_0", 2, 64)))
    other = next(format for format in FORMATS.values() if format.name == "MXFP4")
    file.tensors["w"] = replace(file.tensors["w"], format=other, n_bytes=2 * other.row_bytes(64))
    with pytest.raises(UnsupportedModelError, match="MXFP4"):
        kernels.pack(file, ["w"])


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="does not run avx1024"):
        CPUKernels("avx1024")


@on_every_instruction_set
def test_no_tokens_give_no_rows(isa: str) -> None:
    kernels = KERNELS[isa]
    weight = kernels.pack(file_of(w=("Q4_0", random_raw("Q4_0", 20, 4096))), ["w"])
    assert kernels.matmul(torch.empty(0, 4096), weight).shape == (0, 20)
    assert kernels.matmul(torch.empty(0, 4096), weight, torch.empty(0, 20)).shape == (0, 20)
    assert kernels.embed(weight, []).shape == (0, 4096)
    assert kernels.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5).shape == (0, 8)
    assert kernels.gated(torch.empty(0, 8)).shape == (0, 4)


@on_every_instruction_set
@pytest.mark.parametrize("row", [-1, 20])
def test_a_row_that_an_embedding_does_not_have_is_refused(isa: str, row: int) -> None:
    kernels = KERNELS[isa]
    weight = kernels.pack(file_of(w=("Q4_0", random_raw("Q4_0", 20, 32))), ["w"])
    with pytest.raises(IndexError):
        kernels.embed(weight, [3, row])


@on_every_instruction_set
@in_every_format
@not_finite
def test_a_token_that_is_not_finite_spoils_its_own_row_only(
    isa: str, name: str, bad: float
) -> None:
    kernels = KERNELS[isa]
    weight = kernels.pack(file_of(w=(name, random_raw(name, 33, 256))), ["w"])
    for tokens in (1, 2, 5, 13):
        x_TI = normal(tokens, 256)
        expected = kernels.matmul(x_TI, weight)
        x_TI[tokens // 2, 77] = bad
        found = kernels.matmul(x_TI, weight)
        others = torch.arange(tokens) != tokens // 2
        assert torch.equal(found[others], expected[others])
        assert not found[tokens // 2].isfinite().any()


@on_every_instruction_set
@pytest.mark.parametrize("packed_for", KERNELS)
def test_a_weight_of_another_instruction_set_is_refused_or_right(isa: str, packed_for: str) -> None:
    """Which of them pack alike is their affair; what none may do is read bytes in a wrong order."""
    raw, x_TI = random_raw("Q4_0", 16, 64), normal(1, 64)
    weight = KERNELS[packed_for].pack(file_of(w=("Q4_0", raw)), ["w"])
    try:
        found = KERNELS[isa].matmul(x_TI, weight)
    except ValueError as error:
        assert isa != packed_for and "another instruction set" in str(error)
        return
    truth, bound = bounds.matmul(isa, x_TI, bounds.exact_weight("Q4_0", raw))
    assert ((found.double() - truth).abs() <= bound).all()


@on_every_instruction_set
@not_finite
def test_norms_and_gates_pass_on_what_is_not_finite(isa: str, bad: float) -> None:
    """Element by element what torch makes of it."""
    kernels = KERNELS[isa]
    for width in (20, 64):
        x = normal(3, width)
        x[1, 3] = bad
        for found, twin in [
            (
                kernels.rms_norm(x, torch.ones(width), 1e-5),
                REFERENCE.rms_norm(x, torch.ones(width), 1e-5),
            ),
            (kernels.gated(x), REFERENCE.gated(x)),
        ]:
            assert torch.equal(found.isnan(), twin.isnan())
            assert torch.equal(found.isinf(), twin.isinf())


def attended(
    isa: str, heads: Heads, run: tuple[int, int], pages: LayerPages, window: int = 0
) -> torch.Tensor:
    """Attention `[T, H, D]` of the run's tokens (first, stop) of one request of 300 slots."""
    q_TX = normal(300, heads.heads * heads.dim)[run[0] : run[1]].contiguous()
    index = index_of(heads, [(0, run[0], run[1] - run[0])], 300)
    found_TX = KERNELS[isa].attention(q_TX, index, pages, window)
    return found_TX.reshape(len(q_TX), heads.heads, heads.dim)


HEADS = Heads(6, 2, 48)
RUNS = [(299, 300), (290, 292), (0, 300), (255, 300)]


@on_every_instruction_set
@not_finite
@pytest.mark.parametrize("run", [(5, 6), (299, 300), (297, 300), (200, 300)])
def test_a_query_that_is_not_finite_spoils_its_own_head_only(
    isa: str, bad: float, run: tuple[int, int]
) -> None:
    pages = random_pages(HEADS, 300)
    index = index_of(HEADS, [(0, run[0], run[1] - run[0])], 300)
    q_THD = normal(run[1] - run[0], HEADS.heads, HEADS.dim)

    def attention() -> torch.Tensor:
        found_TX = KERNELS[isa].attention(q_THD.flatten(1), index, pages)
        return found_TX.reshape(q_THD.shape)

    expected = attention()
    q_THD[-1, 4, 7] = bad
    found = attention()
    assert found[-1, 4].isnan().all()
    found[-1, 4] = expected[-1, 4]
    assert torch.equal(found, expected)


def position_in(pages: LayerPages, slot: int) -> tuple[int, int]:
    """Page and slot in the page of a request of 300 slots; its first page is the last."""
    return len(pages.k_PGDS) - 1 - slot // 16, slot % 16


@on_every_instruction_set
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("what", ["NaN key", "infinite value", "NaN value"])
def test_a_slot_that_is_not_finite_reaches_later_tokens_and_no_earlier_one(
    isa: str, run: tuple[int, int], what: str
) -> None:
    """Of the first kv head, whose heads are 0 to 2. Earlier tokens of the same chunk keep their
    bits."""
    pages = random_pages(HEADS, 300)
    expected = attended(isa, HEADS, run, pages)
    bad_slot = min(run[0] + 20, run[1] - 1)
    page, slot = position_in(pages, bad_slot)
    if what == "NaN key":
        pages.k_PGDS[page, 0, 5, slot] = torch.nan
    else:
        pages.v_PGSD[page, 0, slot, 5] = torch.inf if what == "infinite value" else torch.nan
    found = attended(isa, HEADS, run, pages)
    before = bad_slot - run[0]
    assert torch.equal(found[:before], expected[:before])
    assert torch.equal(found[:, 3:], expected[:, 3:])
    reached = slice(None) if what == "NaN key" else 5
    assert not found[before:, :3, reached].isfinite().any()


@on_every_instruction_set
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("heads", [HEADS, Heads(4, 2, 20)], ids=["48", "20"])
def test_slots_that_are_not_used_yet_may_hold_anything(
    isa: str, run: tuple[int, int], heads: Heads
) -> None:
    """What a former request left behind: infinite keys and values in the tail of a page."""
    pages = random_pages(heads, 300)
    expected = attended(isa, heads, run, pages)
    for slot in range(run[1], 304):
        page, at = position_in(pages, slot)
        pages.k_PGDS[page, :, :, at] = torch.inf
        pages.v_PGSD[page, :, at] = torch.nan
    assert same(attended(isa, heads, run, pages), expected)


@on_every_instruction_set
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("heads", [HEADS, Heads(4, 2, 20)], ids=["48", "20"])
def test_slots_that_the_window_has_left_may_hold_anything(
    isa: str, run: tuple[int, int], heads: Heads
) -> None:
    """In a chunk as for a token alone: both must give the same bits."""
    pages, window = random_pages(heads, 300), 10
    expected = attended(isa, heads, run, pages, window)
    page, at = position_in(pages, max(0, run[0] - window))
    pages.k_PGDS[page, :, :, at] = torch.nan
    pages.v_PGSD[page, :, at] = torch.inf
    found = attended(isa, heads, run, pages, window)
    unspoilt = 10 if run[0] == 0 else 0
    assert torch.equal(found[unspoilt:], expected[unspoilt:])


PENALTIES = st.sampled_from([-2.0, 0.0, 0.5, 2.0])


@st.composite
def recipes(draw: st.DrawFn, vocab: int) -> SamplingParams:
    """Of filters, penalties, bias and bans any mixture, and often none."""
    few = st.lists(st.integers(0, vocab - 1), max_size=3, unique=True)
    made = SamplingParams(
        temperature=draw(st.sampled_from([1.0, 0.7, 3.0, 1e-3, 1e-300, 0.0])),
        seed=draw(st.integers(-(2**63), 2**64 - 1)),
    )
    if draw(st.booleans(), "filters"):
        made = structs.replace(
            made,
            top_k=draw(st.sampled_from([0, 0, 1, 7, 40, vocab, 10 * vocab])),
            top_p=draw(st.sampled_from([1.0, 0.9, 0.3, 0.999, 1e-9, 1 - 1e-12])),
            min_p=draw(st.sampled_from([0.0, 0.0, 1e-6, 0.05, 1.0])),
        )
    if draw(st.booleans(), "adjustments"):
        made = structs.replace(
            made,
            repetition_penalty=draw(st.sampled_from([1.0, 0.5, 1.3, 1e-320])),
            presence_penalty=draw(PENALTIES),
            frequency_penalty=draw(PENALTIES),
            logit_bias={token: draw(st.sampled_from([-100.0, 3.0, 100.0])) for token in draw(few)},
            stop_ids=tuple(draw(few)),
            min_tokens=draw(st.integers(0, 6)),
        )
    return made


# Those with byte products draw as AVX-512 does.
DRAWING = [name for name in KERNELS if name not in ("avx512_vnni", "avx512_amx")]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_draws(data: st.DataObject) -> None:
    """Vocabularies of any size, flat and steep, tokens that are impossible, all recipes."""
    vocab, fill = data.draw(st.integers(1, 3000), "vocabulary"), data.draw(st.integers(0, 99))
    spread = data.draw(st.sampled_from([1.0, 5.0, 0.0, 1e-3, 40.0, 1e37]), "spread")
    logits_V = normal(vocab, seed=fill) * spread
    if data.draw(st.booleans(), "equals"):
        logits_V = logits_V.round()
    logits_V[normal(vocab, seed=fill + 1) < data.draw(st.sampled_from([-9.0, 0.0]))] = -torch.inf
    logits_V[fill % vocab] = 1.0
    history = History(vocab)
    told = torch.randint(0, vocab, (20,), generator=torch.Generator().manual_seed(fill)).tolist()
    history.add_prompt(told[:10])
    history.add_output(told[5:] + told[18:])
    params = data.draw(recipes(vocab), "recipe")

    def outcome(kernels: Kernels, position: int) -> int | str:
        try:
            return kernels.draw(logits_V, params, position, 3, history)
        except StageError as error:
            return str(error)

    for position in range(fill, fill + 10):
        expected = outcome(REFERENCE, position)
        for name in DRAWING:
            assert outcome(KERNELS[name], position) == expected, (name, position)


@pytest.mark.parametrize("isa", DRAWING)
def test_a_draw_knows_nothing_of_the_one_before(isa: str) -> None:
    """Filters that filter nothing, as only our own code could ask for, after one that did."""
    for params in (SamplingParams(top_k=-1, seed=1), SamplingParams(min_p=-1.0, seed=1)):
        KERNELS[isa].draw(normal(3000), SamplingParams(top_k=50), 1, 1, None)
        logits_V = normal(4)
        found = KERNELS[isa].draw(logits_V, params, 1, 1, None)
        assert found == REFERENCE.draw(logits_V, params, 1, 1, None)
