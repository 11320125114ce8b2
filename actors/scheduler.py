"""What the pipeline does next: pure decisions over requests, pages and results.

The engine calls `next_step` while the pipeline has room and `apply` for each result; in between
requests come (`submit`) and go (`cancel`). No clock, no threads, no tensors: the same calls give
the same steps. How long steps took is in their results.

A request waits until KV for prompt and answer is reserved on all stages, then its prompt enters in
chunks (several may be in flight: chunk k+1 needs nothing back from chunk k), then it has one token
in flight at a time. Where full pages hold the KV of what it begins with, it starts behind them; and
while another request computes such pages, it waits for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from actors.pages import PageKeys
from actors.request import Event, GenerateRequest, Sink
from actors.running import MOST_REPLAYS, Running, page_names
from actors.sharing import Leaders, late
from actors.windows import PagePools
from sharding.batch import (
    CHUNK,
    PAGE_SLOTS,
    Batch,
    Opened,
    Result,
    Segment,
    SegmentResult,
)
from sharding.errors import BusyError, ContextLengthError

if TYPE_CHECKING:
    from actors.grammar import Constraint

_STEP_S = 0.25
_TIMED_TOKENS = 16  # a step of fewer takes as long as one of one token

LEAST_CHUNK = 2
"""Tokens of a step: one of a prompt beside one of an answer."""

MOST_PASSING = 32
"""Requests that may be admitted before an older one that needs more memory than is free."""


@dataclass(frozen=True)
class Limits:
    """`context`: tokens of one request. `pages`: KV of all. `in_flight`: groups of decodes.
    `chunk`: tokens of a step. `even_depth`: where a prompt's token takes twice as long as at its
    beginning. `window_pages`, `ring`, `window`: see `PagePools`. `prefix_cache`: whether the KV of
    full pages is kept for later requests."""

    context: int
    pages: int
    in_flight: int
    max_waiting: int = 256
    chunk: int = CHUNK
    even_depth: int = 1 << 62
    window_pages: int = 0
    ring: int = 0
    window: int = 0
    prefix_cache: bool = True

    @property
    def most_tokens(self) -> int:
        """Prompt and answer of the largest request that can ever run."""
        return min(self.context, self.pages * PAGE_SLOTS)


class Scheduler:
    """The engine's requests and the order in which they advance."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool = PagePools(limits.pages, limits.window_pages, limits.ring, limits.window)
        self.steps = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.drawn_tokens = 0
        self.stage_s: list[float] = []
        self._waiting: deque[Running] = deque()
        self._running: dict[int, Running] = {}
        self._entries: dict[str, Running] = {}
        self._next_number = 0
        self._closed: list[int] = []
        self._leaders = Leaders(limits.in_flight + 1)
        self._admission: tuple[int, int, int] | None = None  # what it depended on when last tried
        self._token_s = 0.0  # of a prompt; 0 until one was read

    @property
    def waiting(self) -> int:
        """Requests that have no KV yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that own KV."""
        return len(self._running)

    def submit(
        self,
        request: GenerateRequest,
        sink: Sink,
        names: PageKeys | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        """Queue a request, or raise `ContextLengthError` (never fits) or `BusyError` (full).
        `names`: its `page_names`, which take a while; None: made here. `constraint`: its grammar's,
        behind what was drawn."""
        prompt, total = len(request.prompt), len(request.prompt) + request.max_tokens
        most = self.limits.most_tokens
        if total > most:
            raise ContextLengthError(
                f"the context holds {most} tokens, but {total} were asked for: {prompt} in the "
                f"prompt and {request.max_tokens} for the answer; shorten either",
                "prompt" if prompt >= most else "max_tokens",
            )
        full = len(self._waiting) >= self.limits.max_waiting and not self._all_fit(total)
        if full and not request.accepted:
            raise BusyError(f"{len(self._waiting)} requests wait already; try again later")
        assert request.prompt, "serving lets no empty prompt through"
        assert request.request_id not in self._entries, f"{request.request_id} is running"
        self._next_number += 1
        if names is None:
            names = page_names(request, self.limits.prefix_cache)
        entry = Running(self._next_number, request, sink, names, constraint)
        self._entries[request.request_id] = entry
        self._waiting.append(entry)
        sink(Event())

    def _all_fit(self, tokens: int) -> bool:
        """Whether those who wait only do until the next step, and so would one of so many tokens:
        there is memory for all."""
        return self.pool.fit([*(entry.tokens for entry in self._waiting), tokens])

    def cancel(self, request_id: str) -> bool:
        """Forget a request and free its pages on every stage; False for one that is unknown."""
        entry = self._entries.get(request_id)
        if entry is not None:
            self._end(entry)
        return entry is not None

    def replay_all(self, lost: Iterable[Batch], message: str) -> None:
        """The stages lost all KV, and these batches: every request begins again where it was. One
        that was in flight each time when the pipeline broke, and got no further in between, ends
        with an error: it may be the cause."""
        flying = {segment.request for batch in lost for segment in batch.segments}
        for entry in list(self._running.values()):
            if entry.number in flying:
                entry.losses = 1 if entry.done > entry.done_before else entry.losses + 1
            if entry.losses > MOST_REPLAYS:
                said = f"{message}; {entry.losses} times in this request's work"
                self._fail(entry.number, said, suspect=True)
                continue
            self._leave(entry)
            entry.start_over(self.limits.prefix_cache)
            self._waiting.append(entry)
        self._waiting = deque(sorted(self._waiting, key=lambda entry: entry.number))
        self._closed.clear()
        self.pool.forget()

    def fail_all(self, message: str) -> None:
        """End every request with an error event: the stages lost what they knew."""
        for entry in list(self._entries.values()):
            self._end(entry)
            entry.sink(Event(error=message))
        self._closed.clear()
        self.pool.forget()

    def next_step(self) -> Batch | None:
        """The next batch, or None when nothing can start before a result comes back."""
        self._admit()
        segments = self._decode_segments()
        taken = sum(len(segment.tokens) for segment in segments)
        opened, chunks = self._prompt_segments(self.limits.chunk - taken)
        segments += chunks
        if not (segments or self._closed):
            return None
        batch = Batch(self.steps, closed=self._closed, opened=opened, segments=segments)
        self._closed = []
        self.steps += 1
        return batch

    def apply(self, batch: Batch, result: Result) -> None:
        """Book the result of a batch and tell the requests' sinks."""
        self.stage_s = [
            sum(both) for both in zip_longest(self.stage_s, result.stage_s, fillvalue=0)
        ]
        if result.error is not None:
            for segment in batch.segments:
                self._fail(segment.request, result.error)
            return
        self._time(batch, result.stage_s)
        for segment, found in zip(batch.segments, result.segments, strict=True):
            entry = self._running.get(segment.request)
            if entry is not None:
                self._advance(entry, segment, found)

    def _admit(self) -> None:
        """First come, first served; while one finds no room, those behind it that do pass it. Not
        for ever: after `MOST_PASSING` of them it is next."""
        if self._admission == (self.pool.version, self._next_number, len(self._waiting)):
            return
        first: Running | None = None
        tried = 0
        for entry in list(self._waiting):
            if first is not None and max(first.passed, tried) >= MOST_PASSING:
                break
            filled = self._reserved(entry)
            if filled is None:
                first, tried = first or entry, tried + 1
                continue
            if first is not None:
                first.passed += 1
            self._waiting.remove(entry)
            self._running[entry.number] = entry
            entry.start_behind(filled)
        self._admission = (self.pool.version, self._next_number, len(self._waiting))

    def _reserved(self, entry: Running) -> int | None:
        """Take its pages if there is room; how many of the first are filled. Looks no closer than
        what changed since it was last tried: some wait with prompts of a million tokens."""
        if entry.suspect and any(other.suspect for other in self._running.values()):
            return None  # one at a time, so that only the guilty one is at work each time
        entry.found = self.pool.find(entry.keys, entry.findable, entry.found)
        tried = (entry.found, self.pool.freed)
        if tried == entry.tried:
            return None
        entry.tried = tried
        return self.pool.reserve(entry.number, entry.tokens, entry.keys, entry.found)

    def _decode_segments(self) -> list[Segment]:
        """The newest tokens, nearly always one, of as many requests as are its share: with as many
        groups as batches in flight every stage has work."""
        decoding = sum(entry.answering for entry in self._running.values())
        reading = any(entry.prefilling for entry in self._running.values())
        # A quarter stays for prompts: with answers enough they would never be read.
        most = self.limits.chunk - max(1, self.limits.chunk // 4) * reading
        share = min(most, -(-decoding // self.limits.in_flight))
        ready = [entry for entry in self._running.values() if entry.decodable][:share]
        segments = []
        for entry in ready:
            if most <= 0:
                break
            # Last in, last out: whoever decoded moves behind those who have not.
            self._running[entry.number] = self._running.pop(entry.number)
            segments.append(entry.next_tokens(most))
            entry.sent += len(segments[-1].tokens)
            most -= len(segments[-1].tokens)
        return segments

    def _prompt_segments(self, budget: int) -> tuple[list[Opened], list[Segment]]:
        """Chunks of prompts, and what the stages must know of those that begin."""
        prefilling = [entry for entry in self._running.values() if entry.prefilling]
        reading = [entry for entry in prefilling if not self._awaits_pages(entry)]
        fed = self._divided(reading, budget)
        while self.pool.shared_while_used and (waiting := late((at for at, _ in fed), reading)):
            reading = [entry for entry in reading if entry not in waiting]
            fed = self._divided(reading, budget)
        opened = [self._open(entry) for entry, _ in fed if not entry.opened]
        segments = []
        for entry, tokens in fed:
            segments.append(entry.chunk(tokens))
            entry.sent += tokens
            entry.fed = self.steps
        return opened, segments

    def _divided(self, reading: Sequence[Running], budget: int) -> list[tuple[Running, int]]:
        """The oldest prompt first, but half of the budget to those that are much shorter: a
        question need not wait until a book is read, nor the book for an endless row of questions.
        """
        if not reading:
            return []
        shorter = [entry for entry in reading[1:] if 2 * entry.left <= reading[0].left]
        shorter.sort(key=lambda entry: entry.left)
        takes = dict.fromkeys(reading, 0)
        budget, given = self._in_time(max(0, budget), reading[0]), 0
        for entries, most in ((shorter, budget // 2), (reading, budget)):
            for entry in entries:
                more = max(0, min(most - given, entry.left - takes[entry]))
                takes[entry] += more
                given += more
        return [(entry, tokens) for entry, tokens in takes.items() if tokens]

    def _awaits_pages(self, entry: Running) -> bool:
        """Whether the next pages of a prompt that has not begun are being computed for another
        request. It first takes those that have been computed since it was admitted."""
        if entry.opened or not self.pool.shared_while_used:
            return False
        filled = self.pool.share(entry.number, entry.keys, entry.findable, entry.filled)
        if filled > entry.filled:
            entry.start_behind(filled)
        return self._leaders.awaited(entry, self.steps)

    def _open(self, entry: Running) -> Opened:
        """Its first tokens go to the stages: it needs no more of others' pages, they may of its."""
        if not entry.done_before:
            entry.cached_tokens = min(entry.sent, len(entry.request.prompt))
            self.cached_tokens += entry.cached_tokens
        self._leaders.add(entry, self.steps)
        pages, window_pages = self.pool.pages_of(entry.number)
        return entry.opening(pages, window_pages)

    def _keep_full(self, entry: Running) -> None:
        """Give the pages that are full now their keys."""
        full = entry.done // PAGE_SLOTS
        if not self.limits.prefix_cache or full == entry.kept:
            return
        for index, key in enumerate(entry.keys_to(full)[entry.kept :], entry.kept):
            self.pool.keep(entry.number, index, key)
        self._leaders.drop(entry, full)
        entry.kept = full

    def _in_time(self, budget: int, oldest: Running) -> int:
        """So many tokens of a prompt that a step takes `_STEP_S` on a stage, where others wait for
        their next token: as many steps as are in flight are what they feel. But no fewer than a
        sixteenth of a chunk, since small ones cost the prompt much."""
        answering = any(entry.answering for entry in self._running.values())
        if not (answering and self._token_s):
            return budget
        tokens = int(_STEP_S / (self._token_s * self._price(oldest.sent)))
        return min(budget, max(self._fewest, tokens))

    @property
    def _fewest(self) -> int:
        """Prompt tokens of a step that has as few as can be."""
        return max(2, self.limits.chunk // 16)

    def _price(self, depth: float) -> float:
        """How much longer a prompt's token takes there than at its beginning."""
        return 1.0 + depth / self.limits.even_depth

    def _time(self, batch: Batch, stage_s: Sequence[float]) -> None:
        """Learn what a prompt's token takes at its beginning, on the slowest stage; from steps of
        the fewest tokens too, or one slow step would make all later ones small."""
        prompts = [segment for segment in batch.segments if len(segment.tokens) > 1]
        count = sum(len(segment.tokens) for segment in prompts)
        if not stage_s or count < min(_TIMED_TOKENS, self._fewest):
            return
        found = max(stage_s) / sum(
            len(each.tokens) * self._price(each.start + len(each.tokens) / 2) for each in prompts
        )
        self._token_s = (self._token_s + found) / 2 if self._token_s else found

    def _advance(self, entry: Running, segment: Segment, found: SegmentResult) -> None:
        if found.error is not None:
            self.pool.distrust(entry.number)
            self._fail(entry.number, found.error)
            return
        prompt = len(entry.request.prompt)
        entry.done = segment.start + len(segment.tokens)
        self._keep_full(entry)
        self.prompt_tokens += max(0, min(prompt, entry.done) - segment.start)
        tokens = [] if found.drawn is None else entry.draw(found.drawn)
        self.drawn_tokens += len(tokens)
        if entry.constraint is not None and entry.constraint.error is not None:
            self._fail(entry.number, entry.constraint.error, suspect=True)
            return
        reason = entry.finish_reason
        if reason is not None:
            self._end(entry)
        done = min(max(entry.done, entry.done_before), prompt)
        scores = entry.unheard(segment, found.scores)
        entry.sink(Event(tokens, scores, done, entry.cached_tokens, reason))

    def _fail(self, number: int, message: str, *, suspect: bool = False) -> None:
        entry = self._running.get(number)
        if entry is not None:
            self._end(entry)
            entry.sink(Event(error=message, suspect=suspect))

    def _end(self, entry: Running) -> None:
        del self._entries[entry.request.request_id]
        if entry.number in self._running:
            self._leave(entry)
        else:
            self._waiting.remove(entry)

    def _leave(self, entry: Running) -> None:
        """It runs no more, and its pages are free."""
        del self._running[entry.number]
        self._leaders.drop(entry, len(entry.keys))
        self.pool.release(entry.number, entry.keys[: entry.kept], entry.sent)
        if entry.opened:
            self._closed.append(entry.number)

    def check_integrity(self) -> None:
        """Prove the books; with nothing running or waiting, no page and no name may be held."""
        self.pool.check_integrity()
        assert len(self._entries) == len(self._running) + len(self._waiting)
        if not self._running:
            assert self.pool.idle, "pages without an owner"
            assert not self._leaders, "pages that nobody computes"
