"""Log-probabilities against float64: by torch, and by the compiled kernels of every instruction
set."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharding.errors import StageError
from sharding.kernels import Kernels
from sharding.kernels.reference import ReferenceKernels
from sharding.model.sampling import LEAST_LOGPROB
from tests.sharding.kernels.instruction_sets import KERNELS

SETS: dict[str, Kernels] = {"reference": ReferenceKernels(), **KERNELS}
by_every_kernel_set = pytest.mark.parametrize("kernels", SETS.values(), ids=SETS)
INF = math.inf


def row(*logits: float) -> Tensor:
    """One row of float32 logits."""
    return torch.tensor([logits], dtype=torch.float32)


def noise_row(vocab: int, seed: int = 0) -> Tensor:
    """Logits of a plausible spread."""
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3


def slow_logprobs(logits_V: Tensor) -> NDArray[np.float64]:
    """Log-softmax in float64."""
    x = logits_V.double().numpy()
    shifted = x - x.max()
    logprobs: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return logprobs


@by_every_kernel_set
def test_a_token_comes_with_the_likeliest(kernels: Kernels) -> None:
    logits = row(1.0, 2.0, 0.0)
    (choice,) = kernels.score(logits, [2], 2)
    expected = slow_logprobs(logits[0])
    assert choice.token == 2
    assert choice.logprob == pytest.approx(expected[2], abs=1e-6)
    assert [token for token, _ in choice.top] == [1, 0]
    assert [logprob for _, logprob in choice.top] == pytest.approx(expected[[1, 0]], abs=1e-6)


@by_every_kernel_set
def test_no_alternatives_come_where_none_are_asked_for(kernels: Kernels) -> None:
    (choice,) = kernels.score(row(0.0, 0.0), [1], 0)
    assert choice.token == 1
    assert choice.logprob == pytest.approx(-math.log(2))
    assert choice.top == []


@by_every_kernel_set
@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 31, 33, 1040, 50000])
@pytest.mark.parametrize("step", [1e-4, 0.1])
def test_all_of_a_vocabulary_of_any_size_takes_part(
    kernels: Kernels, vocab: int, step: float
) -> None:
    """Every logit is another, in any order: the likeliest are known, and where they lie."""
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(5))
    logits = order.float() * step
    for target in (0, vocab - 1):
        (choice,) = kernels.score(logits[None], [target], 20)
        expected = slow_logprobs(logits)
        likeliest = np.argsort(-expected, kind="stable")[:20]
        assert [token for token, _ in choice.top] == likeliest.tolist()
        assert [logprob for _, logprob in choice.top] == pytest.approx(
            expected[likeliest], abs=2e-5
        )
        assert choice.logprob == pytest.approx(expected[target], rel=1e-6, abs=2e-5)


@by_every_kernel_set
@pytest.mark.parametrize("alternatives", [0, 3])
def test_scores_equal_float64_row_by_row(kernels: Kernels, alternatives: int) -> None:
    """70 rows of 50,000 take two of torch's slabs. Float32 sums 50,000 positive terms: relative
    error of the sum, so absolute error of its log, below 50,000 x 6e-8 = 3e-3 at worst, 1e-5 by
    pairs; the logits themselves carry 1e-6."""
    logits = torch.stack([noise_row(50_000, seed) for seed in range(70)])
    targets = [(997 * t) % 50_000 for t in range(70)]
    found = kernels.score(logits, targets, alternatives)
    assert [choice.token for choice in found] == targets
    for logits_V, choice in zip(logits, found, strict=True):
        expected = slow_logprobs(logits_V)
        assert choice.logprob == pytest.approx(expected[choice.token], abs=2e-5)
        ranked = np.argsort(-expected, kind="stable")[:alternatives]
        assert [token for token, _ in choice.top] == ranked.tolist()


@by_every_kernel_set
def test_rows_do_not_change_each_other_s_scores(kernels: Kernels) -> None:
    """A prompt scored in other chunks must give the same numbers to the last bit."""
    logits = torch.stack([noise_row(50_000, seed) for seed in range(45)])
    targets = list(range(45))
    alone = [kernels.score(logits[t : t + 1], [t], 2)[0] for t in targets]
    assert kernels.score(logits, targets, 2) == alone


@by_every_kernel_set
def test_fewer_alternatives_are_the_first_of_more(kernels: Kernels) -> None:
    """Also where two logits differ and their rounded log-probabilities do not."""
    logits = torch.full((50_000,), -8.0)
    logits[40] = 0.25
    logits[7] = torch.nextafter(torch.tensor(0.25), torch.tensor(0.0))
    (one,), (two,) = (kernels.score(logits[None], [0], count) for count in (1, 2))
    assert [token for token, _ in two.top] == [40, 7]
    assert one.top == two.top[:1]


@by_every_kernel_set
def test_impossible_tokens_stay_within_json(kernels: Kernels) -> None:
    """JSON has no -Infinity: one such number would make the whole answer unreadable. More
    alternatives than tokens give all."""
    (choice,) = kernels.score(row(0.0, -INF, -INF), [1], 20)
    assert choice.logprob == LEAST_LOGPROB == -9999.0
    assert choice.top == [(0, 0.0), (1, -9999.0), (2, -9999.0)]


@by_every_kernel_set
def test_equal_alternatives_come_by_rising_id(kernels: Kernels) -> None:
    """The order of equals must not change between runs."""
    (choice,) = kernels.score(torch.zeros(1, 400), [399], 3)
    assert [token for token, _ in choice.top] == [0, 1, 2]


@by_every_kernel_set
@pytest.mark.parametrize("broken", [math.nan, INF])
@pytest.mark.parametrize("at", [0, 70, 99])
def test_a_broken_row_among_good_ones_is_refused(kernels: Kernels, broken: float, at: int) -> None:
    """A NaN score would be served as a number."""
    logits = torch.zeros(3, 100)
    logits[1, at] = broken
    with pytest.raises(StageError, match=r"rows \[0, 3\): . logits are NaN and . are"):
        kernels.score(logits, [0, 0, 0], 1)


@by_every_kernel_set
def test_a_row_without_a_possible_token_is_refused(kernels: Kernels) -> None:
    with pytest.raises(StageError, match="all 100 logits are -inf"):
        kernels.score(torch.full((1, 100), -INF), [3], 2)
