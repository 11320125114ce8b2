"""Log-probabilities against float64: of rows by torch, of one row by every kernel set."""

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
from sharding.model.sampling import LEAST_LOGPROB, score
from tests.sharding.kernels.instruction_sets import KERNELS

SETS: dict[str, Kernels] = {"reference": ReferenceKernels(), **KERNELS}
by_every_kernel_set = pytest.mark.parametrize("kernels", SETS.values(), ids=SETS)
INF = math.inf


def row(*logits: float) -> Tensor:
    """Float32 logits."""
    return torch.tensor(logits, dtype=torch.float32)


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
    choice = kernels.score(logits, 2, 2)
    expected = slow_logprobs(logits)
    assert choice.token == 2
    assert choice.logprob == pytest.approx(expected[2], abs=1e-6)
    assert [token for token, _ in choice.top] == [1, 0]
    assert [logprob for _, logprob in choice.top] == pytest.approx(expected[[1, 0]], abs=1e-6)


@by_every_kernel_set
def test_no_alternatives_come_where_none_are_asked_for(kernels: Kernels) -> None:
    choice = kernels.score(row(0.0, 0.0), 1, 0)
    assert choice.token == 1
    assert choice.logprob == pytest.approx(-math.log(2))
    assert choice.top == []


@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 1040, 50000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1e30])
@by_every_kernel_set
def test_one_row_is_scored_as_many_are(kernels: Kernels, vocab: int, spread: float) -> None:
    logits = noise_row(vocab, seed=2) * spread
    logits[3 % vocab] = -INF if vocab > 1 else 0.0
    for token, alternatives in ((0, 5), (vocab - 1, 0), (3 % vocab, 20)):
        (expected,) = score(logits[None], [token], alternatives)
        found = kernels.score(logits, token, alternatives)
        assert found.logprob == pytest.approx(expected.logprob, rel=1e-6, abs=2e-6)
        assert [lp for _, lp in found.top] == pytest.approx(
            [lp for _, lp in expected.top], rel=1e-6, abs=2e-6
        )
        if len(set(logits.tolist())) == vocab:  # no ties but those of rounding
            assert {at for at, _ in found.top} == {at for at, _ in expected.top}


@pytest.mark.parametrize("broken", [math.nan, INF])
@by_every_kernel_set
def test_a_broken_row_is_not_scored(kernels: Kernels, broken: float) -> None:
    logits = noise_row(100)
    logits[70] = broken
    with pytest.raises(StageError, match="are NaN and"):
        kernels.score(logits, 3, 2)
    with pytest.raises(StageError, match="all 100 logits are -inf"):
        kernels.score(torch.full((100,), -INF), 3, 2)


@pytest.mark.parametrize("alternatives", [None, 0, 3])
def test_scores_equal_float64_row_by_row(alternatives: int | None) -> None:
    """70 rows of 50,000 take two slabs. Float32 sums 50,000 positive terms: relative error of
    the sum, so absolute error of its log, below 50,000 x 6e-8 = 3e-3 at worst, 1e-5 by pairs;
    the logits themselves carry 1e-6."""
    logits = torch.stack([noise_row(50_000, seed) for seed in range(70)])
    targets = [(997 * t) % 50_000 for t in range(70)]
    found = score(logits, targets, alternatives)
    assert [choice.token for choice in found] == targets
    for logits_V, choice in zip(logits, found, strict=True):
        expected = slow_logprobs(logits_V)
        assert choice.logprob == pytest.approx(expected[choice.token], abs=2e-5)
        ranked = np.argsort(-expected, kind="stable")[: alternatives or 0]
        assert [token for token, _ in choice.top] == ranked.tolist()


def test_slabs_do_not_change_scores() -> None:
    """A prompt scored in other chunks must give the same numbers to the last bit."""
    logits = torch.stack([noise_row(50_000, seed) for seed in range(45)])
    targets = list(range(45))
    alone = [score(logits[t : t + 1], [t], 2)[0] for t in targets]
    assert score(logits, targets, 2) == alone


@by_every_kernel_set
def test_impossible_tokens_stay_within_json(kernels: Kernels) -> None:
    """JSON has no -Infinity: one such number would make the whole answer unreadable. More
    alternatives than tokens give all."""
    logits = row(0.0, -INF, -INF)
    for choice in (score(logits[None], [1], 20)[0], kernels.score(logits, 1, 20)):
        assert choice.logprob == LEAST_LOGPROB == -9999.0
        assert choice.top == [(0, 0.0), (1, -9999.0), (2, -9999.0)]


@by_every_kernel_set
def test_equal_alternatives_come_by_rising_id(kernels: Kernels) -> None:
    """The order of equals must not change between runs."""
    logits = torch.zeros(400)
    for choice in (score(logits[None], [399], 3)[0], kernels.score(logits, 399, 3)):
        assert [token for token, _ in choice.top] == [0, 1, 2]


def test_a_broken_row_among_good_ones_is_refused() -> None:
    """A NaN score would be served as a number."""
    logits = torch.zeros(3, 4)
    logits[1, 2] = math.nan
    with pytest.raises(StageError, match=r"rows \[0, 3\): 1 logits are NaN"):
        score(logits, [0, 0, 0], None)
