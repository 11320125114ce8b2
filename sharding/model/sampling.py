"""Drawing a token from logits: a pure function of (logits, parameters, seed, position, history).

Not here: the model's head that makes the logits, and the end of a request. The only state is a
`History`, soft state that replaying the request's tokens rebuilds.

Order: log-probabilities of the raw logits, if asked -> logit bias -> repetition penalty -> presence
and frequency penalties -> ban of stop ids while fewer than `min_tokens` were drawn -> greedy at
temperature 0, else division by the temperature -> top_k -> top_p of what top_k left -> min_p ->
draw. Each filter keeps the likeliest token, so at least one survives all of them.

The draw is the Gumbel-max trick: the argmax of `scaled + gumbel noise` over the survivors is
distributed as their softmax. Two things make it the right trick here. An argmax has no order of
summation, whereas inverting a cumulative sum carries a rounding in one token over to all later
ones. And logits that differ by a tiny error change the result only where two candidates lie closer
than that error, not wherever a cumulative border moved. The noise is no stream with a state but a
hash of (seed, position, token id), so a token never depends on the batch it was drawn in, on the
number of stages or on a repair. The CPU's kernels draw the same in C++, and a GPU's in part: the
integers are the same there, a float64 `exp` or `log` or a sum may round its last bits differently.

Shapes: V vocabulary, T tokens, N some of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharding.batch import Choice, SamplingParams
from sharding.errors import StageError

LEAST_LOGPROB = -9999.0
"""Stands for every log-probability below it: JSON has no infinity, and clients know this number
from vLLM."""

SLAB_BYTES = 8 << 20
"""Most bytes of log-probabilities that `score` holds at a time (one row where a row is larger)."""


Race = Callable[[Tensor, int, int], int]
"""`gumbel_argmax`, by any arithmetic."""


class History:
    """What penalties need to know of a request: `seen_V` (bool: in prompt or output) and
    `output_counts_V` (float32, exact up to 2**24; what was counted was seen)."""

    def __init__(self, vocab: int, device: str | torch.device = "cpu") -> None:
        self.seen_V = torch.zeros(vocab, dtype=torch.bool, device=device)
        self.output_counts_V = torch.zeros(vocab, dtype=torch.float32, device=device)

    def add_prompt(self, ids: list[int]) -> None:
        """Tokens of the prompt; every id is in `[0, vocab)`."""
        self.seen_V[ids] = True

    def add_seen(self, bits: bytes) -> None:
        """Tokens of the prompt, as `Opened.seen` has them; what is beyond the vocabulary is left
        out."""
        flags = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
        known_N = torch.from_numpy(flags[: len(self.seen_V)]).bool()
        self.seen_V[: len(known_N)] |= known_N.to(self.seen_V.device)

    def add_output(self, ids: list[int]) -> None:
        """Drawn tokens; every id is in `[0, vocab)`."""
        self.seen_V[ids] = True
        if len(ids) <= 1:  # nearly always; 14 us instead of 22
            for token in ids:
                self.output_counts_V[token] += 1.0
            return
        at_N = torch.tensor(ids, device=self.seen_V.device)
        self.output_counts_V.index_put_((at_N,), self.output_counts_V.new_ones(()), accumulate=True)


def gumbel_argmax(scaled_V: Tensor, seed: int, position: int) -> int:
    """The id of the largest `scaled + noise`; kernel sets have faster ways to the same."""
    ids_V = torch.arange(scaled_V.numel(), device=scaled_V.device)
    return _largest_id(scaled_V + gumbel(seed, position, ids_V))


def draw(
    logits_V: Tensor,
    params: SamplingParams,
    position: int,
    drawn: int,
    history: History | None,
    race: Race = gumbel_argmax,
) -> int:
    """Draw the token at index `position` of its request (prompt tokens + tokens drawn before).

    `logits_V` float32, unchanged on return; `drawn` counts the tokens drawn before. `history` may
    be None where `params.needs_history` is False. `race` decides among all tokens, where nothing
    filters them. Equal logits at temperature 0: the lowest id.
    Raises `StageError` if a logit is NaN or +inf, or if no token is left to draw.
    """
    if params.temperature == 0.0 and not _adjusts(params, drawn):
        values_V = _for_argmax(logits_V)
        token = int(values_V.argmax())  # nothing of the below would move it
        if math.isfinite(values_V[token]):
            return token
    _check(logits_V, f"position {position}")
    adjusted_V = _adjust(logits_V, params, drawn, history)
    best = float(adjusted_V.max())
    if best == -math.inf:
        raise StageError(
            f"position {position}: all {logits_V.numel()} tokens are banned, none is left to draw; "
            "lower min_tokens or shorten stop_token_ids"
        )
    if params.temperature == 0.0:
        return _largest_id(adjusted_V)
    scaled_V = (adjusted_V - best) / params.temperature
    ids_N = survivors(scaled_V, params)
    if ids_N is None:
        return race(scaled_V, params.seed, position)
    noisy_N = scaled_V[ids_N] + gumbel(params.seed, position, ids_N)
    return int(ids_N[noisy_N.argmax()])


def keep_allowed(logits_V: Tensor, allowed: bytes) -> Tensor:
    """Logits with -inf for what `allowed` has no bit for (`Segment.allowed`), in float32 like
    `logits_V`, which stays as it is. Raises `StageError` if it is no mask of the vocabulary."""
    vocab = logits_V.numel()
    if not vocab <= 8 * len(allowed) < vocab + 64:
        raise StageError(f"a mask of {len(allowed)} bytes for {vocab} tokens")
    bits_V = np.unpackbits(np.frombuffer(allowed, np.uint8), count=vocab, bitorder="little")
    banned_V = torch.from_numpy(bits_V == 0).to(logits_V.device)
    return logits_V.masked_fill(banned_V, -math.inf)


def takes_likeliest(params: SamplingParams, drawn: int) -> bool:
    """Whether the largest logit is drawn, the lowest id of equals, and nothing is said of it."""
    return params.temperature == 0.0 and params.logprobs is None and not _adjusts(params, drawn)


def _largest_id(values_V: Tensor) -> int:
    """The id of the largest value, the lowest of equals; that of a NaN if there is one."""
    return int(_for_argmax(values_V).argmax())


def _for_argmax(values_V: Tensor) -> Tensor | NDArray[Any]:
    """On the host numpy's, which takes an eighth of torch's time."""
    return values_V.numpy() if values_V.device.type == "cpu" else values_V


def score(logits_TV: Tensor, targets: Sequence[int], alternatives: int) -> list[Choice]:
    """Log-probability of `targets[t]` under row t, each with the `alternatives` likeliest tokens.

    `logits_TV` float32. Natural logarithms in `[LEAST_LOGPROB, 0]`; alternatives come by falling
    logits, equals by rising id. Raises `StageError` for NaN, +inf or a row
    without a finite logit.
    """
    assert logits_TV.shape[0] == len(targets), "one target per row"
    rows = max(1, SLAB_BYTES // (4 * logits_TV.shape[1]))
    choices: list[Choice] = []
    for start in range(0, len(targets), rows):
        slab = logits_TV[start : start + rows]
        _check(slab, f"scored rows [{start}, {start + slab.shape[0]})")
        choices += _score_slab(slab, targets[start : start + rows], alternatives)
    return choices


def _score_slab(logits_TV: Tensor, targets: Sequence[int], alternatives: int) -> list[Choice]:
    logprobs_TV = torch.log_softmax(logits_TV, dim=1).clamp_(LEAST_LOGPROB, 0.0)
    targets_T1 = torch.tensor(targets, device=logits_TV.device)[:, None]
    own = logprobs_TV.gather(1, targets_T1).flatten().tolist()
    rows = zip(logits_TV, logprobs_TV, strict=True)
    tops = [_likeliest(*row, alternatives) for row in rows] if alternatives else [[]] * len(own)
    return [Choice(*found) for found in zip(targets, own, tops, strict=True)]


def _likeliest(logits_V: Tensor, logprobs_V: Tensor, count: int) -> list[tuple[int, float]]:
    # What is impossible comes too, last.
    ids_N = _largest(logits_V.clamp(min=torch.finfo(torch.float32).min), count)
    return list(zip(ids_N.tolist(), logprobs_V[ids_N].tolist(), strict=True))


def _check(logits: Tensor, where: str) -> None:
    """Refuse logits that a broken computation left; -inf alone is a legal way to say never."""
    best = logits.amax(dim=-1)  # NaN wins every maximum
    if bool(best.isfinite().all()):
        return
    n_nan, n_inf = int(logits.isnan().sum()), int((logits == math.inf).sum())
    if n_nan or n_inf:
        raise StageError(
            f"{where}: {n_nan} logits are NaN and {n_inf} are +inf of {logits.numel()}; "
            "the model's weights or a kernel are broken"
        )
    raise StageError(f"{where}: all {logits.shape[-1]} logits are -inf")


def _adjusts(params: SamplingParams, drawn: int) -> bool:
    """Whether `_adjust` changes any logit."""
    return bool(params.logit_bias) or params.needs_history or bool(banned(params, drawn))


def banned(params: SamplingParams, drawn: int) -> tuple[int, ...]:
    """What may not be drawn yet."""
    return params.stop_ids if drawn < params.min_tokens else ()


def _adjust(
    logits_V: Tensor, params: SamplingParams, drawn: int, history: History | None
) -> Tensor:
    """Bias, penalties and bans in float64: no parameter above 0 rounds to 0 there, so that
    -inf * penalty stays -inf instead of becoming NaN."""
    values_V = logits_V.double()
    for token in (*params.logit_bias, *banned(params, drawn)):
        if not 0 <= token < len(values_V):
            raise StageError(f"a bias or ban of token {token} of {len(values_V)}")
    if params.logit_bias:
        values_V[list(params.logit_bias)] += torch.tensor(
            list(params.logit_bias.values()), dtype=torch.float64, device=values_V.device
        )
    if params.needs_history:
        assert history is not None, "penalties need a history"
        values_V = _penalise(values_V, params, history)
    if ids := banned(params, drawn):
        values_V[list(ids)] = -math.inf
    return values_V


def _penalise(values_V: Tensor, params: SamplingParams, history: History) -> Tensor:
    """Repetition penalty as in CTRL (arXiv 1909.05858) and Hugging Face's processor: what favours
    a seen token shrinks, what speaks against it grows. Presence and frequency as OpenAI's."""
    repetition, counts_V = params.repetition_penalty, history.output_counts_V.double()
    if repetition != 1.0:
        against_V = torch.where(values_V > 0, values_V / repetition, values_V * repetition)
        # A penalty near 0 sends a logit beyond the largest float; +inf - +inf would be NaN.
        against_V.clamp_(max=torch.finfo(torch.float64).max)
        values_V = torch.where(history.seen_V, against_V, values_V)
    values_V = values_V - params.presence_penalty * (counts_V > 0).double()
    return values_V - params.frequency_penalty * counts_V


def survivors(scaled_V: Tensor, params: SamplingParams) -> Tensor | None:
    """Ids that top_k, then top_p, then min_p leave to draw from, at least one; None if no filter is
    set and all are left.

    `scaled_V` float64: logits over the temperature, shifted so that the largest is 0; a token at
    -inf never survives. top_k keeps exactly k, of equals the lower ids. top_p keeps the fewest
    likeliest whose share of what top_k left reaches top_p. min_p keeps what is at least min_p times
    as likely as the likeliest. Every filter first drops by one comparison what it surely drops:
    few values then need gathering and sorting.
    """
    ids_N: Tensor | None = None
    if params.top_k > 0:
        ids_N = _largest(scaled_V, params.top_k)
    if params.top_p < 1.0:
        ids_N = _nucleus(scaled_V, ids_N, params.top_p)
    if params.min_p > 0.0:
        least = math.log(params.min_p)
        ids_N = _where(scaled_V >= least) if ids_N is None else ids_N[scaled_V[ids_N] >= least]
    return ids_N


def _where(keep_V: Tensor) -> Tensor:
    return torch.nonzero(keep_V).flatten()


def _largest(values_V: Tensor, count: int) -> Tensor:
    """The ids of the `count` largest values above -inf, by falling value, equals by rising id.

    topk alone leaves the order of equals open; it only finds where the border lies, so that few
    values need the stable sort.
    """
    keep_V = values_V > -math.inf
    if count < values_V.numel():
        keep_V &= values_V >= values_V.topk(count).values[-1]
    ids_N = _where(keep_V)
    return ids_N[values_V[ids_N].argsort(descending=True, stable=True)[:count]]


def _nucleus(scaled_V: Tensor, ids_N: Tensor | None, top_p: float) -> Tensor:
    """The likeliest of `ids_N` (None: of all) until their share reaches `top_p` (arXiv 1904.09751).

    Tokens below `(1 - top_p) / N / 2` weigh less than half of what may be left out, even together:
    they need no sorting. The total is a running sum because `sum` divides its work by threads.
    """
    weights_N = (scaled_V if ids_N is None else scaled_V[ids_N]).exp()
    total = weights_N.cumsum(0)[-1]
    kept_N = _where(weights_N >= total * ((1.0 - top_p) / weights_N.numel() / 2))
    ids_N = kept_N if ids_N is None else ids_N[kept_N]
    ids_N = ids_N[scaled_V[ids_N].argsort(descending=True, stable=True)]
    weights_N = scaled_V[ids_N].exp()
    before_N = weights_N.cumsum(0) - weights_N
    return ids_N[: max(1, int((before_N < top_p * total).sum()))]


# SplitMix64 (Steele, Lea, Flood 2014): a Weyl sequence through a mixer. Constants as signed int64,
# because torch has no unsigned arithmetic; products wrap modulo 2**64 either way.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def gumbel(seed: int, position: int, ids_N: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, for each token id at one position of one request.

    A uniform number in the open interval (0, 1): 52 bits of the hash and a half, which float64
    holds exactly; one bit more and the largest would round to 1, whose noise is infinite.
    """
    words_N = _hash(seed, position, ids_N)
    uniform_N = (_shift_right(words_N, 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform_N))


def _hash(seed: int, position: int, ids_N: Tensor) -> Tensor:
    """64 bits per id, int64: element `id` of the SplitMix64 stream keyed by (seed, position)."""
    signed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)  # seeds from 2**63 up wrap to negative
    key = _mix(torch.tensor(signed, device=ids_N.device) + _GAMMA)
    key = _mix((key ^ position) + _GAMMA)
    return _mix(key + (ids_N + 1) * _GAMMA)


def _mix(words: Tensor) -> Tensor:
    words = (words ^ _shift_right(words, 30)) * _MIX_1
    words = (words ^ _shift_right(words, 27)) * _MIX_2
    return words ^ _shift_right(words, 31)


def _shift_right(words: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own copies the sign bit, which the mask takes away."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)
