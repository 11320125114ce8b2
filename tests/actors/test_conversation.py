"""Whole conversations over real stages: read anew or not, they are the same."""

from __future__ import annotations

from contextlib import closing

import pytest
from msgspec.structs import replace

from actors.request import GenerateRequest
from sharding.batch import SamplingParams
from sharding.gguf.reader import GGUFFile
from tests.stages import local_engine
from tests.tiny_gguf import tiny_model

CONVERSATION = [[5, 9, 30] * 30, [7, 8] * 11, [3], [40, 41, 42] * 20]


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.0, logprobs=2),
        SamplingParams(seed=3, repetition_penalty=1.3, frequency_penalty=0.5, logprobs=2),
    ],
    ids=["greedy", "penalties"],
)
def test_a_conversation_says_the_same_whether_it_is_read_anew_or_not(
    kind: str, stages: int, sampling: SamplingParams
) -> None:
    """Bit by bit, as its log-probabilities show; also where layers have a window."""
    keys = {"gemma3.attention.sliding_window": 40, "gemma3.attention.sliding_window_pattern": 2}
    extra = keys if kind == "gemma3" else {}
    file = GGUFFile.from_bytes(tiny_model(family=kind, layers=4, context=512, extra_metadata=extra))
    with closing(local_engine(file, stages, context=512, kv=2048, chunk=32)) as engine:
        prompt: list[int] = []
        reused = []
        for turn, said in enumerate(CONVERSATION):
            prompt += said
            request = GenerateRequest(f"{turn}", prompt, 20, sampling)
            again, fresh = (
                list(engine.generate(replace(request, cached=cached))) for cached in (True, False)
            )
            reused.append(again[-1].cached_tokens)
            said_ = [choice for event in again for choice in event.tokens]
            assert said_ == [choice for event in fresh for choice in event.tokens]
            assert (len(said_), fresh[-1].cached_tokens) == (20, 0)
            prompt += [choice.token for choice in said_]
        assert reused == [0, 96, 144, 160]
        assert engine.stats().cached_tokens == sum(reused)
