"""From drawn tokens to the text that a client sees: stop strings, whole characters, offsets.

One `AnswerText` per choice. It holds text back while it could still become a stop string, so that
no part of one is ever sent, and hands out each token with its place in the text. Not here: wire
formats, and the end of the engine's request (`answers.py` cancels it).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from actors.request import LENGTH, Event
from serving.openai_answers import FinishReason
from serving.service import Tokenizer
from sharding.batch import Choice, SamplingParams

_LEAST_LOGPROB = -9999.0  # OpenAI's own value for "impossible"


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, or `bytes:\\xf0\\x9f` where its bytes are no whole characters, so that
    different tokens never share a name."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float | None) -> float:
    """A log-probability as JSON has it: no infinity, `_LEAST_LOGPROB` for what cannot be drawn."""
    return _LEAST_LOGPROB if logprob is None else max(logprob, _LEAST_LOGPROB)


class StopMatcher:
    """Finds the stop string that is complete first, in text that comes in any pieces.

    Knuth-Morris-Pratt for each stop string: linear in the text, and its state is exactly how many
    characters at the end of the text could begin a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)

    @property
    def held(self) -> int:
        """Characters at the end of the text so far that could begin a stop string."""
        return max(self._matched, default=0)

    def feed(self, text: str) -> int | None:
        """Where the first complete stop string begins, relative to the start of `text` (negative if
        it began in an earlier piece). Of several that end together, the longest."""
        for i, char in enumerate(text):
            ended = [stop for k, (stop, _) in enumerate(self._stops) if self._step(k, char)]
            if ended:
                return i + 1 - max(map(len, ended))
        return None

    def _step(self, k: int, char: str) -> bool:
        stop, borders = self._stops[k]
        matched = self._matched[k]
        while matched and stop[matched] != char:
            matched = borders[matched - 1]
        matched += stop[matched] == char
        self._matched[k] = matched
        return matched == len(stop)


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`, how long its longest proper prefix is that also ends it."""
    borders, length = [0] * len(stop), 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = borders[length - 1]
        length += stop[i] == stop[length]
        borders[i] = length
    return borders


@dataclass(frozen=True)
class PlacedToken:
    """A drawn token whose text is `[start, stop)` of the answer, in characters."""

    choice: Choice
    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """What became known of one answer: text that may be sent, its tokens, and how it ended;
    `prompt_done`: tokens of its prompt read so far."""

    text: str = ""
    tokens: list[PlacedToken] = field(default_factory=list)
    prompt_scores: list[Choice] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_done: int = 0


class AnswerText:
    """The text of one answer, fed with the engine's events."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        stops: Sequence[str],
        skip: bool,
        shown: Collection[int] = (),
    ) -> None:
        """`skip`: leave special tokens out of the text, all but those `shown`."""
        self.drawn = 0
        self.cached_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._decoder = tokenizer.incremental(skip_special=skip, continues=True, shown=shown)
        self._sampling, self._stop_ids = sampling, frozenset(sampling.stop_ids)
        self._matcher = StopMatcher(stops)
        self._pending = ""  # decoded, not yet handed out
        self._length = 0  # characters decoded
        self._cut: int | None = None  # where a stop string begins
        self._tokens: deque[PlacedToken] = deque()

    def take(self, event: Event) -> Piece:
        """The news in `event`. A piece with a finish reason is the last, whatever the engine still
        sends: tokens behind a stop string are neither counted nor shown."""
        self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
        for choice in event.tokens:
            self.drawn += 1
            if choice.token in self._stop_ids:
                break  # it ends the answer and is no part of it
            self._append(self._decoder.push(choice.token), choice)
            if self._cut is not None:
                break
        if event.finish_reason is not None and self._cut is None:
            self._append(self._decoder.finish())
        if self._cut is not None:
            self.finish_reason = "stop"
        elif event.finish_reason is not None:
            self.finish_reason = "length" if event.finish_reason == LENGTH else "stop"
        text, tokens = self._release()
        return Piece(text, tokens, event.prompt_scores, self.finish_reason, event.prompt_done)

    def _append(self, text: str, choice: Choice | None = None) -> None:
        start = self._length
        self._pending += text
        self._length += len(text)
        if choice is not None:
            self._tokens.append(PlacedToken(choice, start, self._length))
        if self.drawn > self._sampling.min_tokens:
            found = self._matcher.feed(text)
            self._cut = None if found is None else start + found

    def _release(self) -> tuple[str, list[PlacedToken]]:
        """Text up to the cut, the end or what could begin a stop string, and its tokens."""
        released = self._length - len(self._pending)
        if self.finish_reason is None:
            stop = self._length - self._matcher.held
        else:
            stop = self._length if self._cut is None else self._cut
        text = self._pending[: stop - released]
        self._pending = self._pending[stop - released :]
        tokens = []
        while self._tokens and self._shown(self._tokens[0], stop):
            tokens.append(self._tokens.popleft())
        return text, tokens

    def _shown(self, token: PlacedToken, stop: int) -> bool:
        """A token goes out with the last of its text; a cut one with what is left of it."""
        return token.start < stop if self._cut is not None else token.stop <= stop
