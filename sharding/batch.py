"""What crosses a stage border besides hidden states: plain values, encoded with msgspec.

A `Batch` enters stage 0 and travels with the hidden states through every stage; the last stage
answers with a `Result`. Not a tensor in sight: the hidden states `[T, hidden]` of a batch go beside
it, their rows in the order of `segments`. Stages keep only soft state about requests (page tables,
sampling history), opened and closed by the batches themselves, so order on the wire is order of
effect.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

PAGE_SLOTS = 16
"""Slots of one page: the KV of 16 consecutive tokens of one request, in every layer."""

CHUNK = 512
"""Most tokens of one step, decode tokens and prompt chunks together, unless a plan has another."""


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to draw a token; every field is in its valid range already (serving validates).

    Greedy at `temperature` 0. `top_k` 0, `top_p` 1 and `min_p` 0 switch these filters off.
    `stop_ids` end the request and are banned until `min_tokens` tokens were drawn. `logprobs` asks
    for that many alternatives beside the drawn token's own log-probability; None asks for neither.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    seed: int = 0
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    @property
    def needs_history(self) -> bool:
        """Whether a draw depends on the tokens before it."""
        neutral = self.repetition_penalty == 1.0
        return not (neutral and self.presence_penalty == 0.0 and self.frequency_penalty == 0.0)


class Opened(msgspec.Struct, frozen=True):
    """A request enters the stages: its page table for prompt and answer, reserved as a whole.

    `window_pages`: where layers with a window have pages of their own, those of this request, which
    its tokens fill in turn: what falls out of the window is written over.

    What draws must know of its first tokens, which no segment brings as their KV is there: `seen`
    has bit `id % 8` of byte `id // 8` set for each of the prompt's, if its sampling looks at those;
    `drawn` are those that were drawn.
    """

    request: int
    pages: list[int]
    prompt_tokens: int
    sampling: SamplingParams
    window_pages: list[int] = []
    seen: bytes = b""
    drawn: list[int] = []


def seen_bits(tokens: Iterable[int]) -> bytes:
    """The ids as `Opened.seen` has them: far less than a long prompt's tokens."""
    ids = set(tokens)
    bits = bytearray(max(ids) // 8 + 1 if ids else 0)
    for token in ids:
        bits[token // 8] |= 1 << token % 8
    return bytes(bits)


class Segment(msgspec.Struct, frozen=True):
    """A run of one request's tokens at positions `[start, start + len(tokens))`.

    `sample`: draw the token that follows the last of them. `targets`: score `targets[i]` as the
    successor of `tokens[i]` (prompt log-probabilities), with so many `alternatives` each; empty to
    score nothing. `allowed`: what may be drawn has bit `id % 8` of byte `id // 8` set; empty if all
    may.
    """

    request: int
    start: int
    tokens: list[int]
    sample: bool = False
    targets: list[int] = []
    alternatives: int = 0
    allowed: bytes = b""


class Batch(msgspec.Struct, frozen=True):
    """One step's work for every stage: first closings, then openings, then the segments."""

    step: int
    closed: list[int] = []
    opened: list[Opened] = []
    segments: list[Segment] = []

    @property
    def n_tokens(self) -> int:
        """Rows of the hidden states that travel with this batch."""
        return sum(len(segment.tokens) for segment in self.segments)


class Choice(msgspec.Struct, frozen=True):
    """A token with its log-probability under the model's own distribution, and the likeliest
    others.

    `logprob` is NaN-free and at most 0; `top` is sorted by falling log-probability. Both are taken
    before penalties, bias and temperature. `logprob` is None when nobody asked.
    """

    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []


class SegmentResult(msgspec.Struct, frozen=True):
    """What the last stage found for one segment: the drawn token, and a score per target.

    `error`: why this request cannot go on (its logits are not finite); the others of the batch can.
    """

    request: int
    drawn: Choice | None = None
    scores: list[Choice] = []
    error: str | None = None


class Result(msgspec.Struct, frozen=True):
    """The answer of the last stage to one batch.

    `stage_s`: seconds that each stage itself computed. `error`: why a stage could not do its part;
    the batch's requests are then lost, the others are not. `lost`: with it the stage's device, and
    so the KV of all.
    """

    step: int
    segments: list[SegmentResult] = []
    stage_s: list[float] = []
    error: str | None = None
    lost: bool = False
