"""Exactness of stages: how a model is cut, a prompt is chunked or a batch is mixed must not
matter."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from sharding.batch import Batch, Opened, Segment
from sharding.errors import (
    ConfigError,
    CorruptFileError,
    DoesNotFitError,
    ModelFileError,
    StageError,
    UnsupportedModelError,
)
from sharding.gguf.reader import GGUFFile
from sharding.kernels import use_threads
from sharding.kernels.cpu import CPULayers
from sharding.model.arch import read_shape
from sharding.model.rotation import Stretch
from tests.stages import GREEDY, chunked_logits, load_stages, logits, open_request
from tests.tiny_gguf import tiny_model


def tokens_for(vocab: int, count: int, seed: int = 1) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (count,), generator=generator).tolist()


def tiny(**options: object) -> GGUFFile:
    """A tiny model of six layers, or as the options say."""
    return GGUFFile.from_bytes(tiny_model(**{"layers": 6, **options}))


@pytest.fixture(params=["cpu", "reference"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Every kernel set."""
    return str(request.param)


@pytest.mark.parametrize("quant", ["F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K"])
def test_any_number_of_stages_gives_the_same_bits(quant: str, kernels: str) -> None:
    hidden = 256 if quant.endswith("K") else 64
    ffn = 256 if quant.endswith("K") else 96
    file = tiny(quant=quant, hidden=hidden, ffn=ffn)
    one = load_stages(file, 1, kernels=kernels)
    tokens = tokens_for(one[0].shape.vocab, 40)
    expected = chunked_logits(one, tokens, 16)
    for stages in (2, 3, 5):
        found = chunked_logits(load_stages(file, stages, kernels=kernels), tokens, 16)
        assert torch.equal(found, expected), stages


@pytest.mark.parametrize("options", [{"tied": False}, {"rope_freqs": True}, {"kv_heads": 4}])
def test_variants_of_the_family_are_exact_over_stages(
    options: dict[str, object], kernels: str
) -> None:
    file = tiny(**options)
    tokens = tokens_for(200, 30)
    expected = chunked_logits(load_stages(file, 1, kernels=kernels), tokens, 8)
    assert expected.isfinite().all()
    assert torch.equal(chunked_logits(load_stages(file, 3, kernels=kernels), tokens, 8), expected)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_of_any_size_give_the_same_bits(chunk: int, kernels: str) -> None:
    file = tiny()
    tokens = tokens_for(200, 130)
    whole = chunked_logits(load_stages(file, 2, kernels=kernels), tokens, 512)
    pieces = chunked_logits(load_stages(file, 2, kernels=kernels), tokens, chunk)
    assert torch.equal(pieces, whole)


def batch_of_eight(file: GGUFFile, prompts: list[list[int]], kernels: str) -> torch.Tensor:
    """The last logits of eight prompts, decoded together, in pages that lie criss-cross."""
    stages = load_stages(file, 2, kernels=kernels)
    for number, prompt in enumerate(prompts):
        open_request(stages, number, [number + 8 * page for page in range(8)])
        logits(stages, [Segment(number, 0, prompt[:-1])])
    return logits(stages, [Segment(n, len(p) - 1, p[-1:]) for n, p in enumerate(prompts)])


def test_a_batch_of_eight_gives_each_request_the_bits_it_gets_alone(kernels: str) -> None:
    prompts = [tokens_for(200, 3 + 5 * number, seed=number) for number in range(8)]
    alone = [
        chunked_logits(load_stages(tiny(), 2, kernels=kernels), prompt, 512)[-1]
        for prompt in prompts
    ]
    assert torch.equal(batch_of_eight(tiny(), prompts, kernels), torch.stack(alone))


def test_what_a_former_request_left_in_a_page_does_not_leak(kernels: str) -> None:
    """Infinite keys of a dead request in the tail of a reused page would make NaN of a masked
    slot."""
    stages = load_stages(tiny(), 1, kernels=kernels)
    tokens = tokens_for(200, 20)
    clean = chunked_logits(stages, tokens, 512)
    for pages in stages[0]._pages.layers:
        pages.k_PGDS.fill_(float("inf"))
        pages.v_PGSD.fill_(float("nan"))
    assert torch.equal(chunked_logits(stages, tokens, 512, request=2), clean)


@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "length"), [("cpu", 530), ("reference", 20)])
def test_smollm2_is_exact_over_stages_chunks_and_batches(
    smollm2: GGUFFile, kernels: str, length: int
) -> None:
    """Bit for bit: the KV is FP16, where a difference in the last bit grows a thousandfold."""
    tokens = tokens_for(49152, length)
    loaded = load_stages(smollm2, 1, kernels=kernels)
    expected = chunked_logits(loaded, tokens, 512)
    for chunk in (1, 7, 64):
        assert torch.equal(chunked_logits(loaded, tokens, chunk), expected), chunk
    for stages in (2, 3, 5):
        found = chunked_logits(load_stages(smollm2, stages, kernels=kernels), tokens, 512)
        assert torch.equal(found, expected), stages
    step = length // 60
    prompts = [tokens_for(49152, 5 + step * number, seed=number) for number in range(8)]
    alone = [chunked_logits(loaded, prompt, 512)[-1] for prompt in prompts]
    assert torch.equal(batch_of_eight(smollm2, prompts, kernels), torch.stack(alone))


@pytest.mark.slow
def test_smollm2_is_exact_over_threads(smollm2: GGUFFile) -> None:
    """Which thread computes a row, and who takes over from whom, must not show."""
    tokens = tokens_for(49152, 300)
    (stage,) = load_stages(smollm2, 1)
    expected = chunked_logits([stage], tokens, 64)
    use_threads(2, "cpu")
    try:
        assert torch.equal(chunked_logits([stage], tokens, 64), expected)
        assert torch.equal(chunked_logits([stage], tokens, 1), expected)
    finally:
        use_threads(1, "cpu")


def test_a_segment_beyond_its_reservation_is_refused() -> None:
    stages = load_stages(tiny(), 1)
    open_request(stages, 1, [0])
    with pytest.raises(StageError, match="position 17 of 16 reserved"):
        logits(stages, [Segment(1, 0, [3] * 17)])


def test_a_page_that_the_stage_does_not_have_is_refused() -> None:
    """Compiled kernels write where a page table points: nothing may point outside."""
    stages = load_stages(tiny(), 1, pages=4)
    open_request(stages, 1, [0, 4])
    with pytest.raises(StageError, match=r"page outside \[0, 4\)"):
        logits(stages, [Segment(1, 0, [3])])


def test_a_request_that_was_closed_is_unknown() -> None:
    stages = load_stages(tiny(), 1)
    open_request(stages, 1, [0])
    stages[0].forward(Batch(1, closed=[1]), None)
    assert stages[0].pages_used == 0
    with pytest.raises(StageError, match="request 1 is not open"):
        logits(stages, [Segment(1, 0, [3])])


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    stages = load_stages(tiny(), 1)
    open_request(stages, 1, [0])
    with pytest.raises(StageError, match="token id"):
        logits(stages, [Segment(1, 0, [10**6])])


def test_hidden_states_of_another_shape_are_refused() -> None:
    _, second = load_stages(tiny(), 2)
    open_request([second], 1, [0])
    with pytest.raises(StageError, match="hidden states"):
        second.forward(Batch(1, segments=[Segment(1, 0, [3])]), torch.zeros(2, 64))


def test_one_request_with_broken_logits_does_not_take_others_along() -> None:
    (stage,) = load_stages(tiny(tied=False), 1)
    stage.forward(Batch(0, opened=[Opened(n, [n], 1, GREEDY) for n in (1, 2)]), None)
    batch = Batch(1, segments=[Segment(n, 0, [3 + n], sample=True) for n in (2, 1)])
    hidden = stage.hidden(batch, None).clone()
    hidden[0] = float("nan")
    broken, whole = stage._results(batch, hidden)
    assert broken.error is not None
    assert whole.drawn is not None


def test_memory_that_runs_out_costs_one_batch_and_not_the_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (stage,) = load_stages(tiny(), 1)
    open_request([stage], 1, [0])
    batch = Batch(1, segments=[Segment(1, 0, [3], sample=True)])

    def no_memory(self: CPULayers, *arguments: object) -> None:
        raise RuntimeError("can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(CPULayers, "run", no_memory)
        with pytest.raises(StageError, match="allocate memory"):
            stage.forward(batch, None)
    assert stage.forward(batch, None).segments[0].drawn is not None


def test_a_vocabulary_size_that_contradicts_the_embedding_is_refused() -> None:
    """Ids that the tokenizer knows and the model does not would end other requests' batches."""
    file = tiny()
    tokens = file.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    tokens.append("extra")
    with pytest.raises(CorruptFileError, match="token_embd.weight"):
        load_stages(file, 1)


def refused() -> Exception:
    """What torch says when there is no memory for a tensor on a CPU."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50)
    return raised.value


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        torch.OutOfMemoryError("CUDA out of memory.\nSee"),
        refused(),
    ],
    ids=["kernels", "gpu", "cpu"],
)
def test_memory_that_ends_while_a_stage_loads_is_said(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was there when the plan was made; somebody else took it since."""

    def full(*sizes: object) -> None:
        raise error

    monkeypatch.setattr("sharding.stage.PageStore", full)
    said = re.escape(str(error).split("\n")[0])
    with pytest.raises(DoesNotFitError, match=rf"layers \[0, 2\) .* 1024 tokens: {said}; lower"):
        load_stages(tiny(layers=2), 1, pages=64)


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_rotary_scale_is_not_overlooked(key: str) -> None:
    """Files for long contexts give a factor without a type, older ones under another name."""
    plain, scaled = tiny(), tiny(extra_metadata={f"llama.{key}": 4.0})
    tokens = tokens_for(200, 20)
    expected = chunked_logits(load_stages(plain, 1), tokens, 20)
    assert not torch.allclose(chunked_logits(load_stages(scaled, 1), tokens, 20), expected)


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_rotary_scale_of_0_is_none(key: str) -> None:
    """Converters write it for a model without one."""
    plain, unscaled = tiny(), tiny(extra_metadata={f"llama.{key}": 0.0})
    tokens = tokens_for(200, 20)
    expected = chunked_logits(load_stages(plain, 1), tokens, 20)
    assert torch.equal(chunked_logits(load_stages(unscaled, 1), tokens, 20), expected)


GEMMA = {"gemma3.attention.sliding_window": 20, "gemma3.attention.sliding_window_pattern": 3}


@pytest.mark.parametrize("chunk", [16, 7, 1])
@pytest.mark.parametrize("stages", [1, 5])
def test_pages_that_fall_out_of_a_window_are_used_again_unseen(
    chunk: int, stages: int, kernels: str
) -> None:
    """Three pages hold a window of 20 tokens and a chunk of 16; 110 tokens want seven."""
    file = GGUFFile.from_bytes(tiny_model(family="gemma3", layers=5, extra_metadata=GEMMA))
    tokens = tokens_for(200, 110)
    expected = chunked_logits(load_stages(file, 1, kernels=kernels), tokens, 16)
    loaded = load_stages(file, stages, kernels=kernels)
    found = chunked_logits(loaded, tokens, chunk, page=2, ring=3)
    assert torch.equal(found, expected)
    # Other requests' pages are not touched.
    windows = [layer for stage in loaded for layer in stage._pages.layers[:2]]
    assert not any(layer.k_PGDS[5:].any() for layer in windows[:2])


def test_too_few_pages_for_a_window_and_a_chunk_are_refused() -> None:
    """They would be written over what the chunk's first token still sees."""
    file = GGUFFile.from_bytes(tiny_model(family="gemma3", layers=5, extra_metadata=GEMMA))
    stages = load_stages(file, 1)
    open_request(stages, 1, range(10), ring=2)
    logits(stages, [Segment(1, 0, [5] * 32)])  # all of them still fit
    with pytest.raises(StageError, match="16 tokens and a window of 20 in 32 slots"):
        logits(stages, [Segment(1, 32, [5] * 16)])
    open_request(stages, 2, range(10), ring=0)
    with pytest.raises(StageError, match="1 tokens and a window of 20 in 0 slots"):
        logits(stages, [Segment(2, 0, [5])])


def test_a_stretch_is_as_if_the_file_had_asked_for_it() -> None:
    """Files seldom say how far their model may be stretched; users do."""
    asked = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
    keys: dict[str, object] = {f"llama.rope.scaling.{key}": value for key, value in asked.items()}
    plain, stretched = tiny(context=64), tiny(context=256, extra_metadata=keys)
    tokens = tokens_for(200, 20)
    expected = chunked_logits(load_stages(stretched, 1), tokens, 20)
    found = chunked_logits(load_stages(plain, 2, stretch=Stretch("yarn", 4.0)), tokens, 20)
    assert torch.equal(found, expected)
    unstretched = chunked_logits(load_stages(plain, 1), tokens, 20)
    assert not torch.allclose(unstretched, expected)
    found = chunked_logits(load_stages(stretched, 1, stretch=Stretch("none")), tokens, 20)
    assert torch.equal(found, unstretched)


@pytest.mark.parametrize(
    ("keys", "stretch", "context"),
    [
        ({}, Stretch("yarn", 4.0), 1024),
        ({}, Stretch("linear", 1.5, 100), 150),
        ({"rope.scaling.original_context_length": 64}, Stretch("yarn", 8.0), 512),
        ({"rope.scaling.original_context_length": 64}, Stretch("none"), 64),
        # What a file's own factor made of a context is no training.
        ({"rope.scale_linear": 2.0}, Stretch("yarn", 2.0), 256),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, Stretch("linear", 16.0), 512),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, Stretch("none"), 32),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 8.0}, Stretch("yarn", 2.0), 512),
    ],
)
def test_a_stretched_model_has_a_longer_context(
    keys: dict[str, object], stretch: Stretch, context: int
) -> None:
    named = {f"llama.{key}": value for key, value in keys.items()}
    file = tiny(context=256, extra_metadata=named)
    assert read_shape(file.metadata, stretch).train_context == context


ELSEWHERE = [
    ("attention.scale", 0.5, 16**-0.5),
    ("attention.causal", False, True),
    ("attn_logit_softcapping", 50.0, 0.0),
    ("final_logit_softcapping", 30.0, 0.0),
    ("logit_scale", 0.25, 1.0),
    ("embedding_scale", 12.0, 1.0),
    ("residual_scale", 0.2, 0.0),
    ("rope.scaling.yarn_ext_factor", 0.5, 1.0),
    ("attention.clamp_kqv", 8.0, 0.0),
    ("use_parallel_residual", True, False),
]


@pytest.mark.parametrize(("key", "changes", "neutral"), ELSEWHERE)
def test_a_key_that_would_change_every_answer_is_refused(
    key: str, changes: object, neutral: object
) -> None:
    """Fine-tunes of other families are now and then converted as llama, their own keys kept."""
    load_stages(tiny(extra_metadata={f"llama.{key}": neutral}), 1)
    for value in (changes, "yes"):
        with pytest.raises(UnsupportedModelError, match=f"llama.{key} of {value!r}"):
            load_stages(tiny(extra_metadata={f"llama.{key}": value}), 1)


@pytest.mark.parametrize("name", ["blk.3.ffn_up.weight", "output_norm.weight"])
def test_a_missing_tensor_is_named(name: str) -> None:
    file = tiny()
    del file.tensors[name]
    with pytest.raises(CorruptFileError, match=name):
        load_stages(file, 1)


def test_a_tensor_that_nothing_uses_is_refused() -> None:
    """An unknown bias that is silently left out would make every answer a little wrong."""
    file = tiny()
    file.tensors["blk.0.attn_output.bias"] = file.tensors["blk.0.attn_norm.weight"]
    with pytest.raises(UnsupportedModelError, match="attn_output.bias"):
        load_stages(file, 1)


def test_biases_are_there_for_queries_keys_and_values_or_for_none() -> None:
    """Models are converted as qwen2 that have none."""
    file = GGUFFile.from_bytes(tiny_model(family="qwen2", layers=2))
    whole = chunked_logits(load_stages(file, 1), tokens_for(200, 20), 20)
    names = [f"blk.1.attn_{part}.bias" for part in "qkv"]
    for name in names[:2]:
        del file.tensors[name]
    with pytest.raises(CorruptFileError, match=r"blk.1.attn_q.bias is missing"):
        load_stages(file, 1)
    del file.tensors[names[2]]
    assert not torch.equal(chunked_logits(load_stages(file, 1), tokens_for(200, 20), 20), whole)


def test_a_window_where_no_layer_has_one_is_refused() -> None:
    """Not every answer would be wrong: only long ones."""
    for family, key in (("qwen2", "sliding_window"), ("qwen3", "sliding_window")):
        keys = {f"{family}.attention.{key}": 20}
        with pytest.raises(UnsupportedModelError, match=f"{family}.attention.{key} of 20"):
            read_shape(GGUFFile.from_bytes(tiny_model(family=family, extra_metadata=keys)).metadata)
    keys = {"qwen2.attention.sliding_window": 32768}  # of no consequence
    data = tiny_model(family="qwen2", context=32768, extra_metadata=keys)
    assert read_shape(GGUFFile.from_bytes(data).metadata).window == 0
    keys = {"llama.attention.sliding_window": 20, "llama.attention.sliding_window_pattern": 4}
    with pytest.raises(UnsupportedModelError, match="sliding_window_pattern"):
        read_shape(tiny(extra_metadata=keys).metadata)


def test_older_files_of_gemma3_name_their_rotations_otherwise() -> None:
    keys = {
        "gemma3.rope.global.freq_base": 1e6,
        "gemma3.rope.local.freq_base": 20000.0,
        "gemma3.rope.freq_base": None,
    }
    data = tiny_model(family="gemma3", extra_metadata=keys)
    shape = read_shape(GGUFFile.from_bytes(data).metadata)
    assert [rotation.base for rotation in shape.rotations] == [1e6, 20000.0]


def test_factors_for_long_contexts_come_with_those_for_short_ones() -> None:
    file = tiny(longrope=True)
    del file.tensors["rope_factors_short.weight"]
    with pytest.raises(CorruptFileError, match="rope_factors_short.weight is missing"):
        load_stages(file, 1)
    with pytest.raises(CorruptFileError, match="rope_factors_long.weight is missing"):
        load_stages(tiny(extra_metadata={"llama.rope.scaling.type": "longrope"}), 1)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"rope.freq_base": 1.0}, "freq_base of 1 under YaRN"),
        ({"rope.scaling.yarn_beta_fast": 1e300}, "turn 1e.300 times"),
        ({"rope.scaling.beta_fast": 64.0}, "beta_fast of 64.0 is not supported"),
    ],
)
def test_yarn_that_cannot_be_is_refused(keys: dict[str, object], complaint: str) -> None:
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    named = {
        f"llama.{key}": np.float64(value) if value == 1e300 else value
        for key, value in (yarn | keys).items()
    }
    with pytest.raises(ModelFileError, match=complaint):
        read_shape(tiny(extra_metadata=named).metadata)


def test_a_user_s_scaling_beyond_any_context_is_the_user_s_fault() -> None:
    with pytest.raises(ConfigError, match="lower rope_scale or yarn_orig_ctx"):
        read_shape(tiny().metadata, Stretch("yarn", 1024, 1 << 30))
