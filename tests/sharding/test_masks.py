"""The last stage draws what a mask allows and nothing else, with every kernel set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sharding.batch import Batch, Opened, SamplingParams, Segment, SegmentResult
from sharding.gguf.reader import GGUFFile
from sharding.stage import Stage
from tests.stages import GREEDY, load_stages
from tests.tiny_gguf import tiny_model

HOT = SamplingParams(temperature=2.0, seed=4, top_k=5, logprobs=1)


@pytest.fixture(scope="module", params=["cpu", "reference"])
def stage(request: pytest.FixtureRequest) -> Stage:
    """A whole tiny model."""
    return load_stage(request.param)


def load_stage(kernels: str) -> Stage:
    (stage,) = load_stages(GGUFFile.from_bytes(tiny_model(layers=1)), 1, kernels=kernels)
    return stage


def mask(stage: Stage, tokens: list[int]) -> bytes:
    """As `Segment.allowed` has it."""
    bits = np.zeros(stage.shape.vocab, np.uint8)
    bits[tokens] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def draw(stage: Stage, sampling: SamplingParams, *masks: bytes) -> list[SegmentResult]:
    """A token after the same prompt for each mask, in one batch."""
    stage.reset()
    stage.forward(Batch(0, opened=[Opened(n, [n], 3, sampling) for n in range(len(masks))]), None)
    segments = [Segment(n, 0, [5, 6, 7], sample=True, allowed=mask) for n, mask in enumerate(masks)]
    return stage.forward(Batch(1, segments=segments), None).segments


def token(result: SegmentResult) -> int:
    assert result.drawn is not None, result.error
    return result.drawn.token


def test_the_likeliest_of_what_is_allowed(stage: Stage) -> None:
    (free,) = draw(stage, GREEDY, b"")
    logits_V = stage.logits(_hidden(stage))[-1]
    order = logits_V.argsort(descending=True).tolist()
    assert token(free) == order[0]
    for some in ([order[3], order[9]], [order[-1]], [t for t in order if t != order[0]]):
        best = min(some, key=order.index)
        assert [token(each) for each in draw(stage, GREEDY, mask(stage, some), b"")] == [
            best,
            order[0],
        ]


def _hidden(stage: Stage) -> torch.Tensor:
    stage.reset()
    stage.forward(Batch(0, opened=[Opened(0, [0], 3, GREEDY)]), None)
    return stage.hidden(Batch(1, segments=[Segment(0, 0, [5, 6, 7])]), None)


def test_draws_stay_within_the_mask_and_are_scored_without_it(stage: Stage) -> None:
    few = mask(stage, [3, 40, 41, 99])
    everything = mask(stage, list(range(stage.shape.vocab)))
    drawn = set()
    for seed in range(6):
        sampling = SamplingParams(temperature=2.0, seed=seed, logprobs=1)
        masked, full, free = draw(stage, sampling, few, everything, b"")
        assert full == SegmentResult(1, free.drawn), "a mask of all changes nothing"
        assert masked.drawn is not None and free.drawn is not None
        assert masked.drawn.top == free.drawn.top, "the model's own"
        drawn.add(token(masked))
    assert drawn <= {3, 40, 41, 99} and len(drawn) > 1


def test_a_mask_of_another_vocabulary_costs_its_request_only(stage: Stage) -> None:
    short, whole = draw(stage, HOT, b"\xff", b"")
    assert short.error == f"a mask of 1 bytes for {stage.shape.vocab} tokens"
    assert whole.drawn is not None


def test_what_a_mask_and_a_ban_leave_may_be_nothing(stage: Stage) -> None:
    sampling = SamplingParams(temperature=0.0, stop_ids=(8,), min_tokens=2)
    (none,) = draw(stage, sampling, mask(stage, [8]))
    assert none.error is not None and "banned" in none.error


def test_triton_draws_within_the_mask() -> None:
    """On a GPU, where there is none in the interpreter."""
    pytest.importorskip("triton", reason="Triton is for Linux on x86-64")
    stage, few = load_stage("triton"), [3, 40, 41, 99]
    greedy, free = draw(stage, GREEDY, mask(stage, few), b"")
    best = stage.logits(_hidden(stage))[-1].cpu()
    assert token(greedy) == max(few, key=lambda each: float(best[each]))
    assert token(free) == int(best.argmax())
    assert token(draw(stage, HOT, mask(stage, few))[0]) in few
