"""The compiled kernels bit for bit: neither the number of tokens, nor the threads, nor how a model
or a prompt is cut may show in a result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from sharding.batch import Segment
from sharding.gguf.reader import GGUFFile
from sharding.kernels import Layers, Weight, _cpu
from sharding.kernels.block_weights import BlockWeights, DenseWeights, ExpertWeights
from sharding.kernels.composed import ComposedLayers
from sharding.kernels.cpu import CPUKernels, use_threads
from sharding.model.kv_cache import LayerPages
from tests.sharding.kernels.instruction_sets import KERNELS
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
    same,
)
from tests.stages import chunked_logits, load_stages, logits, open_request
from tests.tiny_gguf import tiny_model

on_every_instruction_set = pytest.mark.parametrize("isa", KERNELS)
in_every_format = pytest.mark.parametrize("name", FORMAT_NAMES)

SLOTS = 530
NEAR_BORDERS = (0, 1, 15, 16, 17, 100, 254, 255, 256, 257, 511, 512, 513, 529)
SHARINGS = [
    Heads(2, 2, 16),
    Heads(3, 1, 64),
    Heads(4, 1, 80),
    Heads(8, 2, 100),
    Heads(14, 2, 64),
    Heads(16, 1, 64),
    Heads(25, 1, 32),
    Heads(3, 1, 128),
]


@on_every_instruction_set
@in_every_format
def test_a_row_of_a_product_is_the_same_in_any_company(isa: str, name: str) -> None:
    """Every tile size, several tiles, and what is left over; rows of two formats in one weight."""
    kernels = KERNELS[isa]
    raw, more = random_raw(name, 83, 512), random_raw("Q8_0", 20, 512)
    weight = kernels.pack(file_of(a=(name, raw), b=("Q8_0", more)), ["a", "b"])
    x_TI, residual_TO = normal(40, 512), normal(40, 103, seed=3)
    alone = [kernels.matmul(x_TI[t : t + 1], weight, residual_TO[t : t + 1]) for t in range(40)]
    expected = torch.cat(alone)
    for tokens in (2, 3, 5, 7, 8, 12, 13, 25, 40):
        found = kernels.matmul(x_TI[:tokens], weight, residual_TO[:tokens])
        assert torch.equal(found, expected[:tokens]), tokens
        last = kernels.matmul(x_TI[-tokens:], weight, residual_TO[-tokens:])
        assert torch.equal(last, expected[-tokens:]), tokens


def _products_in_every_way(x_TI: torch.Tensor, weight: Weight) -> Iterator[torch.Tensor]:
    """Columns one by one, in pairs, and on tiles where the processor has them."""
    before = _cpu.pairs_columns()
    try:
        for paired in (False, True):
            _cpu.pair_columns(paired)
            yield KERNELS["avx512_vnni"].matmul(x_TI, weight)
    finally:
        _cpu.pair_columns(before)
    if "avx512_amx" in KERNELS:
        yield KERNELS["avx512_amx"].matmul(x_TI, weight)


@pytest.mark.skipif("avx512_vnni" not in KERNELS, reason="without VNNI there is one way only")
@in_every_format
def test_every_way_of_multiplying_many_tokens_gives_the_same_bits(name: str) -> None:
    """Also where top digits and stored values are as large as they get, of either sign, and where
    an activation is not finite."""
    kernels = KERNELS["avx512_vnni"]
    weight = kernels.pack(file_of(w=(name, random_raw(name, 150, 512))), ["w"])
    x_TI = normal(300, 512)
    # Columns of one size a chunk, in steps of a top digit's unit.
    chunks = torch.arange(150 * 512) // 32
    x_TI[::2] = x_TI[::2].sign() * (1 + (chunks % 128 + 0.49) / 128).view(150, 512)
    x_TI[41, 77] = float("nan")
    x_TI[43, 78] = float("-inf")
    x_TI[45] *= 2.0**-120
    x_TI[47, :256] = 0
    alone = torch.cat([kernels.matmul(x_TI[t : t + 1], weight) for t in range(300)])
    for tokens in (32, 61, 300):  # 32 are the first that take pairs or tiles
        for found in _products_in_every_way(x_TI[:tokens], weight):
            assert same(found, alone[:tokens]), tokens


def everything(kernels: CPUKernels) -> list[torch.Tensor]:
    """A result of each kernel, large enough to be shared out."""
    weight = kernels.pack(file_of(w=("Q4_K", random_raw("Q4_K", 300, 512))), ["w"])
    heads = Heads(6, 2, 64, 64)
    runs = [(0, 0, 70), (1, 529, 1), (2, 250, 9), (3, 100, 2)]
    index, pages = index_of(heads, runs, SLOTS), random_pages(heads, SLOTS, requests=4)
    qkv_TX = normal(82, 10 * 64)
    turned = kernels.rotate_and_store(qkv_TX, index, pages)
    return [
        *(kernels.matmul(normal(tokens, 512), weight) for tokens in (1, 2, 40)),
        kernels.embed(weight, range(300)),
        kernels.rms_norm(normal(100, 512), normal(512, seed=3), 1e-5),
        kernels.gated(normal(100, 512)),
        turned,
        pages.k_PGDS,
        pages.v_PGSD,
        kernels.attention(turned, index, pages),
        kernels.attention(turned, index, pages, window=33),
    ]


@on_every_instruction_set
def test_two_threads_give_the_bits_of_one(isa: str) -> None:
    """Several times over: who computes what is never the same twice."""
    use_threads(1)
    expected = everything(KERNELS[isa])
    for threads in (2, 3, 2):
        use_threads(threads)
        for found, wanted in zip(everything(KERNELS[isa]), expected, strict=True):
            assert torch.equal(found, wanted), threads


@on_every_instruction_set
@pytest.mark.parametrize("window", [0, 20, 300])
@pytest.mark.parametrize("heads", SHARINGS, ids=lambda h: f"{h.heads}-{h.kv_heads}-{h.dim}")
def test_attention_of_a_chunk_is_that_of_its_tokens(isa: str, window: int, heads: Heads) -> None:
    kernels, pages = KERNELS[isa], random_pages(heads, SLOTS)
    q_TX = normal(SLOTS, heads.heads * heads.dim)

    def attended(start: int, stop: int) -> torch.Tensor:
        index = index_of(heads, [(0, start, stop - start)], SLOTS)
        return kernels.attention(q_TX[start:stop].contiguous(), index, pages, window)

    whole = attended(0, SLOTS)
    assert whole.isfinite().all()
    for position in NEAR_BORDERS:
        found = attended(position, position + 1)
        assert torch.equal(found, whole[position : position + 1]), position
    for start, stop in [(0, 2), (254, 258), (250, 257), (255, 319), (192, 256), (100, SLOTS)]:
        assert torch.equal(attended(start, stop), whole[start:stop]), (start, stop)


@on_every_instruction_set
def test_attention_does_not_see_who_else_is_in_the_batch(isa: str) -> None:
    """Prompts and decoded tokens of eight requests whose pages lie criss-cross."""
    heads, slots = Heads(6, 2, 64), 300
    kernels, pages = KERNELS[isa], random_pages(heads, slots, requests=8)
    runs = [(r, 37 * r, 1 if r % 2 else 3 + 5 * r) for r in range(8)]
    q_TX = normal(sum(tokens for *_, tokens in runs), heads.heads * heads.dim)
    together = kernels.attention(q_TX, index_of(heads, runs, slots), pages)
    first = 0
    for number, (_, start, tokens) in enumerate(runs):
        index = index_of(heads, [(7, 0, 1), (number, start, tokens)], slots)
        q_own = torch.cat(
            (normal(1, heads.heads * heads.dim, seed=9), q_TX[first : first + tokens])
        )
        assert torch.equal(kernels.attention(q_own, index, pages)[1:], together[first:][:tokens])
        first += tokens


DOWN = ("F16", 100), ("Q4_1", 96), ("Q6_K", 256)
"""Formats and inputs of the last product of each of three blocks: behind a quantised one a gate's
results become digits and are never written as numbers."""


HEADS = Heads(4, 2, 64, 64)

EXPERTS = 5

OWN: dict[str, dict[str, Any]] = {
    "plain": {},
    "experts": {},
    "bias": {"heads": own_weights(HEADS, bias=True, norms=False)},
    "norms": {
        "heads": own_weights(HEADS, bias=False, norms=True),
        "activation": "gelu",
        "attn_post_norm_I": normal(256, seed=21),
        "ffn_post_norm_I": normal(256, seed=22),
    },
}
"""What blocks of some families have beside; "experts" have others in a pair of matrices' place."""


def three_blocks(kernels: CPUKernels, family: str) -> list[BlockWeights]:
    """Of `HEADS`, two of them with a window."""

    def weight(name: str, rows: int, cols: int, seed: int) -> Weight:
        return kernels.pack(file_of(w=(name, random_raw(name, rows, cols, seed))), ["w"])

    def feed_forward(name: str, width: int, seed: int) -> DenseWeights | ExpertWeights:
        pairs = [
            (weight("Q6_K", 2 * width, 256, seed + 9 * e), weight(name, 256, width, seed + 9 * e))
            for e in range(EXPERTS if family == "experts" else 1)
        ]
        if family != "experts":
            return DenseWeights(*pairs[0])
        gate_up, down = zip(*pairs, strict=True)
        return ExpertWeights(weight("F32", EXPERTS, 256, seed), gate_up, down, used=2)

    return [
        BlockWeights(
            attn_norm_I=normal(256, seed=seed),
            qkv=weight("Q5_K", 512, 256, seed),
            attn_output=weight("Q4_0", 256, 256, seed),
            ffn_norm_I=normal(256, seed=seed + 10),
            feed_forward=feed_forward(name, width, seed),
            eps=1e-5,
            window=7 * seed,
            **OWN[family],
        )
        for seed, (name, width) in enumerate(DOWN)
    ]


@on_every_instruction_set
@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize("tokens", [1, 2, 5, 13, 31, 70])
def test_blocks_in_one_call_are_their_kernels_one_by_one(
    isa: str, tokens: int, family: str
) -> None:
    """All rows, or the last block for some of them alone; on any number of threads; beside a row
    that is not finite."""
    kernels, heads = KERNELS[isa], HEADS
    weights = three_blocks(kernels, family)
    index = index_of(heads, [(0, 10, tokens), (1, 3, 2)], 96, rotations=2)
    x_TI = normal(tokens + 2, 256)
    x_TI[-1, 5] = torch.nan  # nobody sees that position's keys

    def run(make: Callable[..., Layers], wanted: list[int] | None) -> list[torch.Tensor]:
        pages = [random_pages(heads, 96, requests=2, seed=seed) for seed in range(3)]
        y_TI = make(weights, pages).run(x_TI.clone(), index, wanted)
        return [y_TI, *(part for at in pages for part in (at.k_PGDS, at.v_PGSD))]

    def composed(blocks: Sequence[BlockWeights], pages: Sequence[LayerPages]) -> Layers:
        return ComposedLayers(kernels, blocks, pages)

    all_rows = run(kernels.layers, None)
    assert all_rows[0].isfinite().all(dim=1).tolist() == [True] * (tokens + 1) + [False]
    some = [tokens - 1, tokens + 1]
    wanted_rows: list[list[int] | None] = [
        None,
        [],
        [0],
        some,
        list(range(0, tokens + 2, 2)),
        list(range(tokens + 2)),
    ]
    for threads in (2, 3, 1):
        use_threads(threads)
        for wanted in wanted_rows:
            rows = range(tokens + 2) if wanted is None else wanted
            expected = [all_rows[0][list(rows)], *all_rows[1:]]
            for make in (kernels.layers, composed):
                for found, tensor in zip(run(make, wanted), expected, strict=True):
                    assert same(found, tensor), (threads, make, wanted)


def tiny(name: str) -> GGUFFile:
    """A model of five layers whose matrices are all of that format."""
    size = 256 if name.endswith(("_K", "_XS")) else 64
    heads = {"heads": 6, "hidden": 96} if name in FLOATS else {"hidden": size}
    return GGUFFile.from_bytes(tiny_model(layers=5, quant=name, ffn=size, **heads))


def tokens_for(count: int, seed: int) -> list[int]:
    """Token ids that every vocabulary has."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 200, (count,), generator=generator).tolist()


@in_every_format
def test_logits_are_the_same_for_any_stages_and_chunks(name: str) -> None:
    file, tokens = tiny(name), tokens_for(70, seed=1)
    expected = chunked_logits(load_stages(file, 1), tokens, 512)
    assert expected.isfinite().all()
    for stages in (2, 3, 5):
        assert torch.equal(chunked_logits(load_stages(file, stages), tokens, 512), expected), stages
    for chunk in (1, 7, 64):
        assert torch.equal(chunked_logits(load_stages(file, 1), tokens, chunk), expected), chunk


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3", "gemma", "gemma3"])
def test_logits_of_every_family_are_the_same_for_any_stages_and_chunks(family: str) -> None:
    """One layer of three sees everything, where a family has windows."""
    keys = {"gemma3.attention.sliding_window": 20, "gemma3.attention.sliding_window_pattern": 3}
    data = tiny_model(family=family, layers=5, head_dim=32, extra_metadata=keys)
    file, tokens = GGUFFile.from_bytes(data), tokens_for(70, seed=1)
    expected = chunked_logits(load_stages(file, 1), tokens, 512)
    assert expected.isfinite().all()
    for stages, chunk in ((2, 512), (5, 7), (1, 1)):
        found = chunked_logits(load_stages(file, stages), tokens, chunk)
        assert torch.equal(found, expected), (stages, chunk)


def mixture(family: str, name: str) -> GGUFFile:
    """A model of five layers of eight experts, of which a token takes three."""
    size = 256 if name.endswith("_K") else 64
    sizes = {"hidden": size, "ffn": size, "experts": 8, "experts_used": 3}
    return GGUFFile.from_bytes(tiny_model(family=family, layers=5, quant=name, **sizes))


@pytest.mark.parametrize("family", ["qwen3moe", "llama"])
@pytest.mark.parametrize("name", ["F16", "Q4_1", "Q6_K"])
def test_logits_of_mixtures_are_the_same_for_any_stages_chunks_and_batches(
    family: str, name: str
) -> None:
    """Any threads, too: where a token's experts lie depends on who else is there."""
    file, tokens = mixture(family, name), tokens_for(300, seed=2)
    expected = chunked_logits(load_stages(file, 1, context=512), tokens, 512)
    assert expected.isfinite().all()
    for threads, stages, chunk in ((1, 2, 512), (2, 5, 7), (3, 1, 64), (2, 2, 1)):
        use_threads(threads)
        found = chunked_logits(load_stages(file, stages, context=512), tokens, chunk)
        assert torch.equal(found, expected), (threads, stages, chunk)
    prompts = [tokens[: 3 + 5 * number] for number in range(8)]
    stages_of_all = load_stages(file, 2)
    for number, prompt in enumerate(prompts):
        open_request(stages_of_all, number, [number + 8 * page for page in range(3)])
        logits(stages_of_all, [Segment(number, 0, prompt[:-1])])
    last = [Segment(number, len(p) - 1, p[-1:]) for number, p in enumerate(prompts)]
    ends = [len(prompt) - 1 for prompt in prompts]
    assert torch.equal(logits(stages_of_all, last), expected[ends])


@pytest.mark.parametrize("name", ["F16", "Q4_1", "Q6_K"])
def test_logits_of_a_long_prompt_are_the_same_for_any_chunks(name: str) -> None:
    """Over the border of a block of slots, at 256, and of the longest chunk, at 512."""
    file, tokens = tiny(name), tokens_for(520, seed=2)
    expected = chunked_logits(load_stages(file, 2), tokens, 512)
    for chunk in (1, 7, 64):
        assert torch.equal(chunked_logits(load_stages(file, 2), tokens, chunk), expected), chunk


@in_every_format
def test_logits_are_the_same_alone_and_in_a_batch_of_eight(name: str) -> None:
    file = tiny(name)
    prompts = [tokens_for(3 + 5 * number, seed=number) for number in range(8)]
    alone = [chunked_logits(load_stages(file, 2), prompt, 512)[-1] for prompt in prompts]
    stages = load_stages(file, 2)
    for number, prompt in enumerate(prompts):
        open_request(stages, number, [number + 8 * page for page in range(3)])
        logits(stages, [Segment(number, 0, prompt[:-1])])
    last = [Segment(number, len(p) - 1, p[-1:]) for number, p in enumerate(prompts)]
    assert torch.equal(logits(stages, last), torch.stack(alone))


POINTWISE: dict[str, Callable[[CPUKernels, torch.Tensor], torch.Tensor]] = {
    "rms_norm": lambda kernels, x: kernels.rms_norm(x, normal(x.shape[1], seed=3), 1e-5),
    "gated_silu": lambda kernels, x: kernels.gated(x),
}


@on_every_instruction_set
@pytest.mark.parametrize("kernel", POINTWISE)
def test_rows_of_norms_and_gates_are_the_same_in_any_company(isa: str, kernel: str) -> None:
    x = normal(50, 1000)
    together = POINTWISE[kernel](KERNELS[isa], x)
    for t in (0, 17, 49):
        alone = POINTWISE[kernel](KERNELS[isa], x[t : t + 1].contiguous())
        assert torch.equal(alone, together[t : t + 1]), t
