"""A request as the scheduler follows it: how far it is, what it owns, and its next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.pages import PageKeys
from actors.request import LENGTH, STOP, GenerateRequest, Sink
from actors.windows import Reserved
from sharding.batch import PAGE_SLOTS, Segment

_WORTH_WAITING = 4  # pages: what a step spends on fewer tokens is not what it takes


@dataclass(eq=False)
class Running:
    """A request with its drawn tokens.

    `sent` tokens of prompt and answer entered the pipeline or were there, `done` of them came out.
    `passed`: how many that came later were admitted before it. `kept` of its pages have keys.
    `fed`: the last step with tokens of its prompt, -1 before the first. Without `named` its pages
    get no keys.
    """

    number: int
    request: GenerateRequest
    sink: Sink
    named: bool = True
    drawn: list[int] = field(default_factory=list)
    sent: int = 0
    done: int = 0
    passed: int = 0
    kept: int = 0
    fed: int = -1

    def __post_init__(self) -> None:
        self.stops = frozenset(self.request.sampling.stop_ids)
        self.reserved = Reserved([])
        self._names = PageKeys(self.request.cache_salt)
        if self.named:
            self._names.extend(self.request.prompt)

    @property
    def tokens(self) -> int:
        """That its KV has room for."""
        return len(self.request.prompt) + self.request.max_tokens

    @property
    def opened(self) -> bool:
        """Whether the stages know it."""
        return self.fed >= 0

    @property
    def prefilling(self) -> bool:
        return self.left > 0

    @property
    def left(self) -> int:
        """Tokens of its prompt that did not enter the pipeline yet."""
        return len(self.request.prompt) - self.sent

    @property
    def decodable(self) -> bool:
        """Its newest token was drawn and has not entered the pipeline yet."""
        return bool(self.drawn) and self.sent < len(self.request.prompt) + len(self.drawn)

    @property
    def cached_tokens(self) -> int:
        """Of its prompt, whose KV was there already."""
        return self.reserved.filled * PAGE_SLOTS

    @property
    def keys(self) -> list[bytes]:
        """Those of its prompt's full pages, and of the answer's as far as `keys_to` made them."""
        return self._names.keys

    @property
    def findable(self) -> Sequence[bytes]:
        """Keys of pages that may be filled already: not the one with the prompt's last token, which
        draws, and none if every token is to be scored."""
        request = self.request
        if not request.cached or request.prompt_logprobs is not None:
            return ()
        return self.keys[: (len(request.prompt) - 1) // PAGE_SLOTS]

    @property
    def awaited_key(self) -> bytes:
        """That of the page which another request must be computing to be worth waiting for: the
        last of the next few, since one or two are computed as soon. Empty where it needs no more.
        """
        keys, index = self.findable, self.reserved.filled + _WORTH_WAITING - 1
        return keys[index] if index < len(keys) else b""

    def keys_to(self, pages: int) -> list[bytes]:
        """Those of its first full pages, whose tokens are all known."""
        start, stop, prompt = len(self.keys) * PAGE_SLOTS, pages * PAGE_SLOTS, self.request.prompt
        if stop > start:
            drawn = self.drawn[max(0, start - len(prompt)) : stop - len(prompt)]
            self._names.extend([*prompt[start:], *drawn])
        return self.keys[:pages]

    def start_behind(self, reserved: Reserved) -> None:
        """These are its pages; what the first hold already need not be computed."""
        self.reserved, self.kept = reserved, reserved.filled
        self.sent = self.done = self.cached_tokens

    def chunk(self, tokens: int) -> Segment:
        """The next piece of its prompt; the last piece draws the first token."""
        prompt, start = self.request.prompt, self.sent
        stop = start + tokens
        scored = self.request.prompt_logprobs
        return Segment(
            self.number,
            start,
            prompt[start:stop],
            sample=stop == len(prompt) and self.request.max_tokens > 0,
            targets=[] if scored is None else prompt[start + 1 : stop + 1],
            alternatives=scored or 0,
        )

    @property
    def finish_reason(self) -> str | None:
        """Why it is complete, None if it is not."""
        if self.done < len(self.request.prompt):
            return None
        if self.drawn and self.drawn[-1] in self.stops:
            return STOP
        return LENGTH if len(self.drawn) >= self.request.max_tokens else None
