"""A request inside the engine: its token ids, the only truth about it.

Everything else (KV pages, hidden states, page tables on the stages) can be rebuilt from what is
here. Not here: text, HTTP, stop strings (those live in serving).
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from sharding.batch import Choice, SamplingParams

STOP = "stop"
LENGTH = "length"


class GenerateRequest(msgspec.Struct, frozen=True):
    """What the engine is asked to do.

    `request_id`: unique among running requests. `prompt`: at least one token id. `max_tokens`: most
    tokens to draw; 0 only scores the prompt. `prompt_logprobs`: log-probabilities of the prompt's
    own tokens with that many alternatives, or None. `cached`: whether KV of earlier requests that
    began alike may be used, of those with the same `cache_salt`. `drawn`: what another engine drew
    for it, of its `max_tokens`; it is not told again. `accepted`: by another engine before, so that
    it may wait however many do. `grammar`: what its answer must follow (`grammar.py`), empty for
    none.
    """

    request_id: str
    prompt: list[int]
    max_tokens: int
    sampling: SamplingParams = SamplingParams()
    prompt_logprobs: int | None = None
    cached: bool = True
    cache_salt: str = ""
    drawn: list[int] = []
    accepted: bool = False
    grammar: str = ""


class Event(msgspec.Struct, frozen=True):
    """Progress of a request, in order; the last event has `finish_reason` or `error`.

    `tokens`: drawn since the last event (a drawn stop token is included, as the last).
    `prompt_scores`: one choice for each prompt token but the first, as far as computed since the
    last event. `prompt_done`: prompt tokens computed so far, with `cached_tokens` that were there
    already. `error`: the message of an engine failure; the answer is incomplete. `suspect`: the
    request may be what the engine failed of.
    """

    tokens: list[Choice] = []
    prompt_scores: list[Choice] = []
    prompt_done: int = 0
    cached_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    suspect: bool = False

    @property
    def last(self) -> bool:
        """Whether no event follows."""
        return self.finish_reason is not None or self.error is not None


Sink = Callable[[Event], None]
"""Takes a request's events, called on the engine's thread: must return at once and must not
raise."""
