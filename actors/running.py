"""A request as the scheduler follows it: how far it is, what it owns, and its next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.pages import PageKeys
from actors.request import LENGTH, STOP, GenerateRequest, Sink
from sharding.batch import PAGE_SLOTS, Choice, Opened, Segment, seen_bits

if TYPE_CHECKING:
    from actors.grammar import Constraint

MOST_REPLAYS = 2
"""How often a request begins again after the pipeline broke with tokens of its in flight, if it got
no further in between."""

_WORTH_WAITING = 4  # pages: what a step spends on fewer tokens is not what it takes


@dataclass(eq=False)
class Running:
    """A request with its drawn tokens.

    `sent` tokens of prompt and answer entered the pipeline or were there, `done` of them came out.
    `passed`: how many that came later were admitted before it. `kept` of its pages have keys.
    `fed`: the last step with tokens that it reads, -1 before the first. `scored`: prompt tokens
    whose log-probabilities it heard. `losses`: how often the pipeline broke with tokens of its in
    flight, `done_before`: how far it was then. `filled` of its pages had its KV when it began, and
    while it waits, `found` could be found, when last `tried`. `constraint`: what may be drawn next,
    None if anything.
    """

    number: int
    request: GenerateRequest
    sink: Sink
    names: PageKeys
    constraint: Constraint | None = None
    sent: int = 0
    done: int = 0
    passed: int = 0
    kept: int = 0
    fed: int = -1
    scored: int = 0
    cached_tokens: int = 0
    losses: int = 0
    done_before: int = 0
    filled: int = 0
    found: int = 0
    tried: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.drawn = list(self.request.drawn)
        self.given: Sequence[int] = _given(self.request.prompt, self.drawn)
        """What it reads before it draws: its prompt, after a repair with what it had drawn."""
        self.stops = frozenset(self.request.sampling.stop_ids)

    @property
    def tokens(self) -> int:
        """That its KV has room for."""
        return len(self.request.prompt) + self.request.max_tokens

    @property
    def opened(self) -> bool:
        """Whether the stages know it."""
        return self.fed >= 0

    @property
    def suspect(self) -> bool:
        """Whether it ends if the pipeline breaks once more in its work."""
        return self.losses == MOST_REPLAYS

    @property
    def prefilling(self) -> bool:
        return self.left > 0

    @property
    def left(self) -> int:
        """Tokens that it reads and that did not enter the pipeline yet."""
        return len(self.given) - self.sent

    @property
    def answering(self) -> bool:
        """Whether its tokens come one by one."""
        return bool(self.drawn) and not self.prefilling

    @property
    def decodable(self) -> bool:
        """Its newest token was drawn and has not entered the pipeline yet."""
        return self.answering and self.sent < len(self.request.prompt) + len(self.drawn)

    @property
    def keys(self) -> list[bytes]:
        """Those of its prompt's full pages, and of the answer's as far as `keys_to` made them."""
        return self.names.keys

    @property
    def findable(self) -> int:
        """How many of its first pages may be filled already: not the one with the last token that
        it reads, which draws, and none if every token is to be scored."""
        request = self.request
        if not request.cached or request.prompt_logprobs is not None:
            return 0
        return min(len(self.keys), (len(self.given) - 1) // PAGE_SLOTS)

    @property
    def awaited_key(self) -> bytes:
        """That of the page which another request must be computing to be worth waiting for: the
        last of the next few, since one or two are computed as soon. Empty where it needs no more.
        """
        index = self.filled + _WORTH_WAITING - 1
        return self.keys[index] if index < self.findable else b""

    def keys_to(self, pages: int) -> list[bytes]:
        """Those of its first full pages, whose tokens are all known."""
        start, stop, prompt = len(self.keys) * PAGE_SLOTS, pages * PAGE_SLOTS, self.request.prompt
        if stop > start:
            drawn = self.drawn[max(0, start - len(prompt)) : stop - len(prompt)]
            self.names.extend([*prompt[start:], *drawn])
        return self.keys[:pages]

    def start_behind(self, filled: int) -> None:
        """So many of its first pages need not be computed."""
        self.filled = self.kept = filled
        self.sent = self.done = filled * PAGE_SLOTS

    def start_over(self, named: bool) -> None:
        """Its KV is gone. It reads again what it had read and drawn, and draws on: a draw depends
        on its position, not on how the tokens before it came. `named`: its pages have keys."""
        if self.opened:  # else `done` is what was there
            self.done_before = max(self.done_before, self.done)
        self.given = _given(self.request.prompt, self.drawn)
        if named:
            self.keys_to(len(self.given) // PAGE_SLOTS)
        self.start_behind(0)
        self.fed, self.tried = -1, None

    def opening(self, pages: list[int], window_pages: list[int]) -> Opened:
        """What the stages must know before its first tokens."""
        sampling, prompt = self.request.sampling, self.request.prompt
        seen = prompt[: self.sent] if sampling.repetition_penalty != 1.0 else []
        drawn = list(self.given[len(prompt) : self.sent]) if sampling.needs_history else []
        return Opened(
            self.number, pages, len(prompt), sampling, window_pages, seen_bits(seen), drawn
        )

    def chunk(self, tokens: int) -> Segment:
        """The next piece of what it reads; the last piece draws a token."""
        prompt, start = self.request.prompt, self.sent
        stop = start + tokens
        scored = self.request.prompt_logprobs
        heard = scored is None or min(stop + 1, len(prompt)) <= self.scored + 1
        draws = stop == len(self.given) and self.request.max_tokens > 0
        return Segment(
            self.number,
            start,
            list(self.given[start:stop]),
            sample=draws,
            targets=[] if heard else prompt[start + 1 : stop + 1],
            alternatives=scored or 0,
            allowed=self._allowed if draws else b"",
        )

    def next_tokens(self, most: int) -> Segment:
        """Its newest tokens, as many as a step has room for, and to draw the one that follows
        them."""
        stop = len(self.request.prompt) + len(self.drawn)
        taken = self.drawn[self.sent - stop :][:most]
        draws = self.sent + len(taken) == stop
        allowed = self._allowed if draws else b""
        return Segment(self.number, self.sent, taken, sample=draws, allowed=allowed)

    @property
    def _allowed(self) -> bytes:
        return b"" if self.constraint is None else self.constraint.allowed

    def draw(self, choice: Choice) -> list[Choice]:
        """A token was drawn: it, and those that can only follow it."""
        self.drawn.append(choice.token)
        if self.constraint is None or self.finish_reason is not None:
            return [choice]
        room = self.request.max_tokens - len(self.drawn)
        # To be scored, a token must be drawn.
        scored = self.request.sampling.logprobs is not None
        forced = self.constraint.take(choice.token, 0 if scored else room)
        ends = (i + 1 for i, token in enumerate(forced) if token in self.stops)
        forced = forced[: next(ends, len(forced))]
        self.drawn += forced
        return [choice, *map(Choice, forced)]

    def unheard(self, segment: Segment, scores: list[Choice]) -> list[Choice]:
        """Of a segment's scores those that it did not hear before a repair."""
        fresh = scores[max(0, self.scored - segment.start) :]
        self.scored += len(fresh)
        return fresh

    @property
    def finish_reason(self) -> str | None:
        """Why it is complete, None if it is not."""
        if self.done < len(self.given):
            return None
        if self.drawn and self.drawn[-1] in self.stops:
            return STOP
        if self.constraint is not None and self.constraint.complete:
            return STOP
        return LENGTH if len(self.drawn) >= self.request.max_tokens else None


def page_names(request: GenerateRequest, named: bool = True) -> PageKeys:
    """The keys of what a request reads at first, none unless its pages get any. Takes 0.2 s for a
    million tokens."""
    names = PageKeys(request.cache_salt)
    if named:
        names.extend(_given(request.prompt, request.drawn))
    return names


def _given(prompt: list[int], drawn: list[int]) -> list[int]:
    return [*prompt, *drawn] if drawn else prompt
