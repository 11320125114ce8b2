"""Exactness of stages: how a model is cut, a prompt is chunked or a batch is mixed must not
matter."""

from __future__ import annotations

import pytest
import torch

from sharding.batch import Batch, Opened, Segment
from sharding.errors import CorruptFileError, StageError, UnsupportedModelError
from sharding.gguf.reader import GGUFFile
from sharding.kernels.reference import Float32Weight, ReferenceKernels
from tests.stages import GREEDY, chunked_logits, load_stages, logits, open_request
from tests.tiny_gguf import tiny_llama

# Two float32 GEMMs of different shapes may sum 64 to 1536 products in another order: at most n *
# eps of the sum of magnitudes, 1536 * 6e-8 = 9e-5 for values around 1.
CHUNK_TOLERANCE = 1e-4


def tokens_for(vocab: int, count: int, seed: int = 1) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (count,), generator=generator).tolist()


def tiny(**options: object) -> GGUFFile:
    """A tiny model of six layers, or as the options say."""
    return GGUFFile.from_bytes(tiny_llama(**{"layers": 6, **options}))


@pytest.mark.parametrize("quant", ["F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K"])
def test_any_number_of_stages_gives_the_same_bits(quant: str) -> None:
    hidden = 256 if quant.endswith("K") else 64
    ffn = 256 if quant.endswith("K") else 96
    file = tiny(quant=quant, hidden=hidden, ffn=ffn)
    one = load_stages(file, 1)
    tokens = tokens_for(one[0].shape.vocab, 40)
    expected = chunked_logits(one, tokens, 16)
    for stages in (2, 3, 5):
        assert torch.equal(chunked_logits(load_stages(file, stages), tokens, 16), expected), stages


@pytest.mark.parametrize("options", [{"tied": False}, {"rope_freqs": True}, {"kv_heads": 4}])
def test_variants_of_the_family_are_exact_over_stages(options: dict[str, object]) -> None:
    file = tiny(**options)
    tokens = tokens_for(200, 30)
    expected = chunked_logits(load_stages(file, 1), tokens, 8)
    assert expected.isfinite().all()
    assert torch.equal(chunked_logits(load_stages(file, 3), tokens, 8), expected)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_of_any_size_agree(chunk: int) -> None:
    file = tiny()
    tokens = tokens_for(200, 130)
    whole = chunked_logits(load_stages(file, 2), tokens, 512)
    pieces = chunked_logits(load_stages(file, 2), tokens, chunk)
    assert (pieces - whole).abs().max() < CHUNK_TOLERANCE
    assert torch.equal(pieces.argmax(-1), whole.argmax(-1))


def test_a_batch_of_eight_agrees_with_each_request_alone() -> None:
    """Requests of different lengths, decoded together, in pages that lie criss-cross."""
    stages = load_stages(tiny(), 2)
    prompts = [tokens_for(200, 3 + 5 * number, seed=number) for number in range(8)]
    alone = [chunked_logits(load_stages(tiny(), 2), prompt, 512)[-1] for prompt in prompts]
    for number, prompt in enumerate(prompts):
        open_request(stages, number, [number + 8 * page for page in range(3)])
        logits(stages, [Segment(number, 0, prompt[:-1])])
    last = [Segment(number, len(p) - 1, p[-1:]) for number, p in enumerate(prompts)]
    together = logits(stages, last)
    assert (together - torch.stack(alone)).abs().max() < CHUNK_TOLERANCE


def test_what_a_former_request_left_in_a_page_does_not_leak() -> None:
    """Infinite keys of a dead request in the tail of a reused page would make NaN of a masked
    slot."""
    stages = load_stages(tiny(), 1)
    tokens = tokens_for(200, 20)
    clean = chunked_logits(stages, tokens, 512)
    for pages in stages[0]._pages.layers:
        pages.k_PGDS.fill_(float("inf"))
        pages.v_PGSD.fill_(float("nan"))
    assert torch.equal(chunked_logits(stages, tokens, 512, request=2), clean)


@pytest.mark.slow
def test_smollm2_is_exact_over_stages_and_agrees_over_chunks(smollm2: GGUFFile) -> None:
    tokens = tokens_for(49152, 96)
    expected = chunked_logits(load_stages(smollm2, 1), tokens, 64)
    for stages in (2, 3, 5):
        found = chunked_logits(load_stages(smollm2, stages), tokens, 64)
        assert torch.equal(found, expected), stages
    loaded = load_stages(smollm2, 2)
    for chunk in (1, 7, 512):
        found = chunked_logits(loaded, tokens, chunk)
        assert (found - expected).abs().max() < CHUNK_TOLERANCE, chunk
        assert torch.equal(found.argmax(-1), expected.argmax(-1)), chunk


def test_a_segment_beyond_its_reservation_is_refused() -> None:
    stages = load_stages(tiny(), 1)
    open_request(stages, 1, [0])
    with pytest.raises(StageError, match="position 17 of 16 reserved"):
        logits(stages, [Segment(1, 0, [3] * 17)])


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
    embedding = stage._embedding
    assert isinstance(embedding, Float32Weight)
    embedding.matrix[5] = float("nan")
    batch = Batch(1, segments=[Segment(n, 0, [3 + n], sample=True) for n in (2, 1)])
    broken, whole = stage.forward(batch, None).segments
    assert broken.error is not None
    assert whole.drawn is not None


def test_memory_that_runs_out_costs_one_batch_and_not_the_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (stage,) = load_stages(tiny(), 1)
    open_request([stage], 1, [0])
    batch = Batch(1, segments=[Segment(1, 0, [3], sample=True)])

    def no_memory(self: ReferenceKernels, *arguments: object) -> None:
        raise RuntimeError("can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(ReferenceKernels, "matmul", no_memory)
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


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_rotary_scale_is_not_overlooked(key: str) -> None:
    """Files for long contexts give a factor without a type, older ones under another name."""
    plain, scaled = tiny(), tiny(extra_metadata={f"llama.{key}": 4.0})
    tokens = tokens_for(200, 20)
    expected = chunked_logits(load_stages(plain, 1), tokens, 20)
    assert not torch.allclose(chunked_logits(load_stages(scaled, 1), tokens, 20), expected)


@pytest.mark.parametrize("name", ["blk.3.ffn_up.weight", "output_norm.weight"])
def test_a_missing_tensor_is_named(name: str) -> None:
    file = tiny()
    del file.tensors[name]
    with pytest.raises(CorruptFileError, match=name):
        load_stages(file, 1)


def test_a_tensor_that_nothing_uses_is_refused() -> None:
    """An unknown bias that is silently left out would make every answer a little wrong."""
    file = tiny()
    file.tensors["blk.0.attn_q.bias"] = file.tensors["blk.0.attn_norm.weight"]
    with pytest.raises(UnsupportedModelError, match="attn_q.bias"):
        load_stages(file, 1)
