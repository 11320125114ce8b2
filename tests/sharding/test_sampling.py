"""Drawing against a slow numpy twin, against the distribution it promises, and on broken logits: by
torch, and by the compiled kernels of every instruction set."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from torch import Tensor

from sharding.batch import SamplingParams, seen_bits
from sharding.errors import StageError
from sharding.kernels import Kernels
from sharding.kernels.reference import ReferenceKernels
from sharding.model.sampling import (
    History,
    gumbel,
    survivors,
)
from tests.sharding.kernels.instruction_sets import KERNELS

INF = math.inf
SETS: dict[str, Kernels] = {"reference": ReferenceKernels(), **KERNELS}


class Tested:
    """What draws."""

    kernels: Kernels = SETS["reference"]


@pytest.fixture(params=SETS, scope="module")
def tested(request: pytest.FixtureRequest) -> None:
    """One kernel set after the other."""
    Tested.kernels = SETS[request.param]


by_every_kernel_set = pytest.mark.usefixtures("tested")


def draw(
    logits_V: Tensor, params: SamplingParams, position: int, drawn: int, history: History | None
) -> int:
    """The token that the tested kernels draw."""
    return Tested.kernels.draw(logits_V, params, position, drawn, history)


def row(*logits: float) -> Tensor:
    """Float32 logits."""
    return torch.tensor(logits, dtype=torch.float32)


def noise_row(vocab: int, seed: int = 0) -> Tensor:
    """Logits of a plausible spread."""
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3


def token_at(logits_V: Tensor, params: SamplingParams, position: int = 5, drawn: int = 0) -> int:
    """The token drawn there without a history."""
    return draw(logits_V, params, position, drawn, None)


def left(scaled_V: Tensor, params: SamplingParams) -> list[int]:
    """Who survives the filters; everybody above -inf where there are none."""
    ids_N = survivors(scaled_V, params)
    return torch.nonzero(scaled_V > -INF).flatten().tolist() if ids_N is None else ids_N.tolist()


def twin(scaled: list[float], params: SamplingParams) -> list[int]:
    """What the filters leave, one token at a time as their definitions say."""
    weights = {token: math.exp(x) for token, x in enumerate(scaled) if x > -INF}
    ranked = sorted(weights, key=lambda token: (-scaled[token], token))
    if params.top_k:
        ranked = ranked[: params.top_k]
    if params.top_p < 1:
        total, reached, kept = sum(weights[token] for token in ranked), 0.0, []
        for token in ranked:
            kept.append(token)
            reached += weights[token]
            if reached >= params.top_p * total:
                break
        ranked = kept
    least = params.min_p * weights[ranked[0]]
    return sorted(token for token in ranked if weights[token] >= least)


def splitmix64(state: int) -> int:
    """The published generator's output for a state, in Python's unbounded integers."""
    mask = (1 << 64) - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def expected_noise(seed: int, position: int, token: int) -> float:
    """The noise by its definition."""
    mask = (1 << 64) - 1
    key = splitmix64(splitmix64(seed & mask) ^ position)
    word = splitmix64((key + token * 0x9E3779B97F4A7C15) & mask)
    return -math.log(-math.log(((word >> 12) + 0.5) / 2**52))


class TestNoise:
    """The counter-based generator under the draws."""

    def test_splitmix64_is_the_published_one(self) -> None:
        """First output for seed 0 in the reference implementation: guards the twin below."""
        assert splitmix64(0) == 0xE220A8397B1DCDAF

    @given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**40), st.integers(0, 2**20))
    def test_noise_equals_unbounded_integers(self, seed: int, position: int, token: int) -> None:
        """A shift that drags the sign bit along, or a product that saturates, would bias draws
        and differ between machines. Two logs: each within an ulp or two of Python's."""
        found = gumbel(seed, position, torch.tensor([token])).item()
        assert found == pytest.approx(expected_noise(seed, position, token), rel=1e-12, abs=1e-12)

    def test_noise_is_finite_and_uniform(self) -> None:
        """A uniform number of exactly 0 or 1 is infinite noise, and so the wrong token. Of 2**20
        uniforms the empirical distribution stays within 2.5 / sqrt(n) (p < 1e-5, Kolmogorov)."""
        n = 1 << 20
        noise = gumbel(7, 3, torch.arange(n))
        assert noise.isfinite().all()
        uniform = (-(-noise).exp()).exp().sort().values
        steps = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        assert (uniform - steps).abs().max() < 2.5 / math.sqrt(n)

    def test_neighbouring_positions_seeds_and_tokens_are_uncorrelated(self) -> None:
        """A weak mix repeats itself between positions: text would loop. |r| < 5 / sqrt(n)."""
        n = 1 << 16
        ids = torch.arange(n)
        base = gumbel(1, 100, ids)
        others = [gumbel(1, 101, ids), gumbel(2, 100, ids), gumbel(1, 100, ids + 1)]
        for other in others:
            r = torch.corrcoef(torch.stack((base, other)))[0, 1]
            assert abs(r.item()) < 5 / math.sqrt(n)


@by_every_kernel_set
class TestDistribution:
    """Draws follow the softmax of what survives."""

    @pytest.mark.parametrize(("temperature", "seed"), [(1.0, 1), (0.7, -9), (2.0, 2**63 - 1)])
    def test_draws_follow_the_softmax(self, temperature: float, seed: int) -> None:
        """Chi-square over 8 tokens and 6,000 positions: with 7 degrees of freedom, 50 is passed by
        chance once in 1e8."""
        logits = row(2.0, 1.0, 0.0, -1.0, 0.5, 1.5, -0.5, 0.2)
        params, n = SamplingParams(temperature=temperature, seed=seed), 6_000
        drawn = [token_at(logits, params, position) for position in range(n)]
        counts = np.bincount(drawn, minlength=8)
        expected = torch.softmax(logits.double() / temperature, 0).numpy() * n
        assert float((((counts - expected) ** 2) / expected).sum()) < 50

    def test_draws_repeat_and_positions_do_not_matter_to_each_other(self) -> None:
        """A replay after a repair must draw the same tokens, in whatever order it asks."""
        logits, params = noise_row(1000), SamplingParams(seed=42, top_p=0.9)
        forward = [token_at(logits, params, position) for position in range(50)]
        backward = [token_at(logits, params, position) for position in reversed(range(50))]
        assert forward == backward[::-1]
        assert len(set(forward)) > 5

    def test_tiny_logit_noise_rarely_changes_a_draw(self) -> None:
        """A GPU's rounding must not change the text: of 1,000 draws under noise of 1e-5, the odds
        that the two leading candidates lie that close are about 2e-5 each."""
        logits, params = noise_row(500), SamplingParams(seed=3)
        shaken = logits + 1e-5 * noise_row(500, seed=1) / 3
        changed = [
            token_at(logits, params, at) != token_at(shaken, params, at) for at in range(1000)
        ]
        assert sum(changed) <= 2


@st.composite
def logits_and_params(draw_from: st.DrawFn) -> tuple[list[float], SamplingParams]:
    """Rows with ties and -inf, and any filters."""
    values = st.sampled_from([-INF, -30.0, -2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 3.0])
    logits = draw_from(st.lists(values, min_size=1, max_size=12).filter(lambda x: max(x) > -INF))
    params = SamplingParams(
        temperature=draw_from(st.sampled_from([1e-300, 1e-3, 0.5, 1.0, 1.7, 2.0])),
        top_k=draw_from(st.integers(0, 14)),
        top_p=draw_from(st.sampled_from([1e-9, 0.1, 0.333, 0.5, 0.77, 0.95, 0.999, 1.0])),
        min_p=draw_from(st.sampled_from([0.0, 1e-9, 0.05, 0.3, 0.9, 1.0])),
        seed=draw_from(st.integers(-(2**63), 2**63 - 1)),
    )
    return logits, params


class TestFilters:
    """top_k, top_p, min_p."""

    @pytest.mark.parametrize(
        "params",
        [
            SamplingParams(), SamplingParams(top_k=1), SamplingParams(top_k=7),
            SamplingParams(top_k=1000), SamplingParams(top_p=0.0001), SamplingParams(top_p=0.5),
            SamplingParams(top_p=0.99), SamplingParams(min_p=0.1), SamplingParams(min_p=1.0),
            SamplingParams(top_k=40, top_p=0.8), SamplingParams(top_k=40, top_p=0.8, min_p=0.2),
        ],
    )  # fmt: skip
    def test_filters_equal_the_slow_twin(self, params: SamplingParams) -> None:
        """The fast filters skip sorting what cannot survive; the twin sorts everything."""
        scaled = noise_row(300).double()
        scaled -= scaled.max()
        assert sorted(left(scaled, params)) == twin(scaled.tolist(), params)

    @pytest.mark.parametrize(
        ("params", "kept"),
        [
            (SamplingParams(top_k=3), [0, 1, 2]),
            (SamplingParams(top_p=0.79), [0, 1]),
            (SamplingParams(min_p=0.2), [0, 1, 2]),
            (SamplingParams(top_k=2, top_p=0.62), [0]),  # 0.625 of what top_k leaves
        ],
    )
    def test_filters_alone_by_hand(self, params: SamplingParams, kept: list[int]) -> None:
        """Probabilities 0.5, 0.3, 0.15, 0.05."""
        scaled = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log() - math.log(0.5)
        assert left(scaled, params) == kept

    def test_top_k_keeps_exactly_k_of_equals(self) -> None:
        """Which of equals survive must not depend on a sort's whim: the lower ids do."""
        equals = torch.zeros(500, dtype=torch.float64)
        assert left(equals, SamplingParams(top_k=4)) == [0, 1, 2, 3]

    @by_every_kernel_set
    @pytest.mark.parametrize(
        "params",
        [
            SamplingParams(top_k=3),
            SamplingParams(top_p=0.5),
            SamplingParams(top_p=0.9),
            SamplingParams(min_p=0.5),
            SamplingParams(top_k=5, top_p=0.7),
            SamplingParams(top_p=0.9, min_p=0.4),
            SamplingParams(top_k=40, min_p=1.0),
            SamplingParams(temperature=3.0, top_p=0.95),
        ],
    )
    def test_all_survivors_and_no_others_are_drawn(self, params: SamplingParams) -> None:
        """Of 50 tokens the most that survive weigh enough to come up in 3000 draws."""
        logits = noise_row(50, seed=9) / 3
        logits[7] = logits[3]
        scaled = (logits.double() - logits.double().max()) / params.temperature
        drawn = {token_at(logits, replace(params, seed=8), at) for at in range(3000)}
        assert sorted(drawn) == sorted(left(scaled, params))

    @by_every_kernel_set
    @pytest.mark.parametrize("count", [31, 33, 100, 3000])
    def test_a_nucleus_of_many_equals_has_the_first_of_them(self, count: int) -> None:
        """So many tokens weigh the same that halves of them are weighed, not all sorted."""
        logits = torch.zeros(count)
        params = SamplingParams(top_p=0.25)
        drawn = [token_at(logits, params, at) for at in range(400)]
        assert max(drawn) < math.ceil(count / 4)
        assert max(drawn) > count / 4 * 0.9 - 1

    @by_every_kernel_set
    @pytest.mark.parametrize("slope", [-1.0, 1.0])
    def test_the_k_largest_of_many_in_any_order(self, slope: float) -> None:
        """Rising logits replace all that was kept before, again and again."""
        logits = torch.arange(5000.0) * slope * 1e-4
        drawn = {token_at(logits, SamplingParams(top_k=5), at) for at in range(200)}
        assert drawn == (set(range(4995, 5000)) if slope > 0 else set(range(5)))

    @by_every_kernel_set
    @given(logits_and_params())
    def test_a_draw_is_a_survivor(self, case: tuple[list[float], SamplingParams]) -> None:
        """Whatever the parameters, some token is drawn and the filters allow it. The twin gets its
        share in exact steps, so a sum that lands on top_p within rounding may differ by a token."""
        logits, params = case
        token = token_at(row(*logits), params)
        best = max(logits)
        scaled = [(x - best) / params.temperature for x in logits]
        looser = SamplingParams(
            top_k=params.top_k, top_p=min(1.0, params.top_p + 1e-12), min_p=params.min_p - 1e-12
        )
        assert token in twin(scaled, looser)


@by_every_kernel_set
class TestGreedy:
    """Temperature 0 and its neighbourhood."""

    def test_greedy_takes_the_largest_and_the_lowest_id_of_equals(self) -> None:
        """Vectorised reductions may return any of equals; replays need the same one."""
        logits = torch.zeros(5000)
        logits[[17, 3000, 4999]] = 2.5
        assert token_at(logits, SamplingParams(temperature=0.0)) == 17

    @pytest.mark.parametrize("temperature", [1e-3, 1e-45, 5e-324])
    def test_a_temperature_near_0_is_greedy_not_nan(self, temperature: float) -> None:
        """1e-45 rounds to a float32 that overflows every quotient; 0 / 0 would draw garbage."""
        params = SamplingParams(temperature=temperature)
        assert {token_at(row(0.0, 3.0, 2.9, -INF), params, at) for at in range(50)} == {1}


@by_every_kernel_set
class TestExtremes:
    """Logits at the limits of float32, and beyond."""

    def test_the_largest_floats_are_drawn_from(self) -> None:
        """A difference of -max and max overflows float32."""
        assert token_at(row(-3.4e38, 3.4e38, 0.0), SamplingParams()) == 1

    def test_what_is_impossible_or_filtered_is_never_drawn(self) -> None:
        """A filter that is computed but not applied; -inf says never, in any filter."""
        logits, params = row(-INF, 0.0, -INF, 0.1, -0.2), SamplingParams(top_k=2, top_p=0.999)
        assert {token_at(logits, params, at) for at in range(100)} == {1, 3}

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize(
        ("logits", "complaint"),
        [
            (row(0.0, math.nan, math.nan), "position 5: 2 logits are NaN and 0 are"),
            (row(0.0, INF, 1.0), r"0 logits are NaN and 1 are \+inf of 3"),
            (row(-INF, -INF), "all 2 logits are -inf"),
        ],
    )
    def test_broken_logits_are_named(
        self, logits: Tensor, complaint: str, temperature: float
    ) -> None:
        """NaN compares false with everything: an argmax over it is fluent garbage."""
        with pytest.raises(StageError, match=complaint):
            token_at(logits, SamplingParams(temperature=temperature))

    def test_logits_stay_as_they_were(self) -> None:
        """The caller scores or logs the same row afterwards."""
        logits = row(1.0, 2.0, 3.0)
        params = SamplingParams(
            logit_bias={0: 5.0}, repetition_penalty=2.0, stop_ids=(1,), min_tokens=9, logprobs=2
        )
        draw(logits, params, 1, 1, told(3, [], [2]))
        assert logits.tolist() == [1.0, 2.0, 3.0]


def told(vocab: int, prompt: list[int], output: list[int]) -> History:
    """A history of these tokens."""
    history = History(vocab)
    history.add_prompt(prompt)
    history.add_output(output)
    return history


@given(st.lists(st.integers(0, 99), max_size=40))
def test_a_prompt_told_in_bits_is_the_prompt(ids: list[int]) -> None:
    in_bits = History(100)
    in_bits.add_seen(seen_bits(ids))
    assert torch.equal(in_bits.seen_V, told(100, ids, []).seen_V)


def test_bits_beyond_the_vocabulary_are_left_out() -> None:
    history = History(12)
    history.add_seen(seen_bits([3, 11, 12, 4000]))
    assert history.seen_V.nonzero().flatten().tolist() == [3, 11]


def adjusted_by(params: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    """Logits [2, -2, 1, -1] after penalties, read back through the draw: the smallest bias of a
    spare token 4 (at 0 otherwise) that wins over token i alone."""
    found = []
    for token, logit in enumerate([2.0, -2.0, 1.0, -1.0]):
        logits = torch.full((5,), -INF)
        logits[token], logits[4] = logit, 0.0
        low, high = -64.0, 64.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            biased = replace(params, temperature=0.0, logit_bias={4: middle})
            won = draw(logits, biased, 9, 9, told(5, prompt, output)) == 4
            low, high = (low, middle) if won else (middle, high)
        found.append(round(low, 4))
    return found


@by_every_kernel_set
class TestPenalties:
    """Bias, penalties and bans, computed by hand."""

    def test_repetition_penalty_counts_prompt_and_output(self) -> None:
        """Positive logits are divided and negative ones multiplied: dividing both would favour
        repeating unlikely tokens."""
        found = adjusted_by(SamplingParams(repetition_penalty=2.0), prompt=[0, 1], output=[3])
        assert found == [1.0, -4.0, 1.0, -2.0]

    def test_presence_and_frequency_count_output_only(self) -> None:
        """OpenAI's: once for presence, per occurrence for frequency, never for the prompt."""
        params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
        found = adjusted_by(params, prompt=[1, 1], output=[0, 0, 0, 2])
        assert found == [2.0 - 0.5 - 0.75, -2.0, 1.0 - 0.5 - 0.25, -1.0]

    def test_bias_comes_before_the_repetition_penalty(self) -> None:
        """(1 + 3) / 2 = 2 loses to 2.25; 1 / 2 + 3 would win."""
        params = SamplingParams(temperature=0.0, repetition_penalty=2.0, logit_bias={0: 3.0})
        assert draw(row(1.0, 2.25), params, 1, 0, told(2, [0], [])) == 1

    @pytest.mark.parametrize("penalty", [1e-320, 1e-40, 1e-9])
    def test_a_penalty_near_0_does_not_break_the_draw(self, penalty: float) -> None:
        """The API allows any penalty above 0: quotients overflow, and -inf * 0 is NaN."""
        params = SamplingParams(repetition_penalty=penalty)
        assert draw(row(3.0, -INF, 1.0), params, 2, 2, told(3, [], [0, 1])) == 0

    def test_stop_ids_are_banned_until_min_tokens_were_drawn(self) -> None:
        """Off by one ends an answer a token early or late."""
        params = SamplingParams(temperature=0.0, stop_ids=(1, 2), min_tokens=3)
        logits = row(0.0, 9.0, 8.0)
        found = [token_at(logits, params, position=10 + drawn, drawn=drawn) for drawn in range(5)]
        assert found == [0, 0, 0, 1, 1]

    @pytest.mark.parametrize("token", [-1, 2, 2**40])
    def test_a_token_that_there_is_not_is_named(self, token: int) -> None:
        """Torch would count -1 from the end."""
        for params in (
            SamplingParams(logit_bias={token: 1.0}),
            SamplingParams(stop_ids=(token,), min_tokens=1),
        ):
            with pytest.raises(StageError, match=f"token {token} of 2"):
                token_at(row(0.0, 0.0), params)

    def test_a_bias_cannot_lift_a_ban(self) -> None:
        """min_tokens is a promise; the ban comes last."""
        params = SamplingParams(logit_bias={1: 100.0}, stop_ids=(1,), min_tokens=1)
        assert token_at(row(0.0, 0.0), params) == 0

    def test_all_tokens_banned_is_an_error_with_a_remedy(self) -> None:
        """Nothing is left to draw: say so instead of drawing a banned token."""
        params = SamplingParams(stop_ids=(0, 1), min_tokens=1)
        with pytest.raises(StageError, match="all 2 tokens are banned.*min_tokens"):
            token_at(row(0.0, 0.0), params)
