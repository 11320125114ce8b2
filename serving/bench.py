"""`longspan bench`: prompt and decode rates of stages in this process, in the manner of
llama-bench.

It drives the pipeline directly with batches of its own, one request at a time, so that depth is
exact: the KV is filled to the depth, then only the tokens after it are timed. Not here: HTTP, Ray
and many users (see `bench/`).
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from actors.pages import pages_for
from actors.pipeline import Pipeline
from actors.scheduler import Limits
from sharding.batch import Batch, Opened, SamplingParams, Segment
from sharding.errors import ConfigError, StageError

_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class BenchCase:
    """One row: `prompt` tokens entered, or `tokens` drawn, after `depth` tokens of context."""

    depth: int
    prompt: int = 0
    tokens: int = 0

    @property
    def name(self) -> str:
        """As llama-bench writes it: `pp512`, `tg128 @ d4096`."""
        work = f"pp{self.prompt}" if self.prompt else f"tg{self.tokens}"
        return f"{work} @ d{self.depth}" if self.depth else work

    @property
    def context(self) -> int:
        """Tokens of KV that it needs; a decode starts from at least one token."""
        return self.depth + self.prompt + self.tokens + 1


@dataclass(frozen=True)
class BenchRow:
    """Mean and standard deviation of the rate over `runs`, in tokens a second."""

    case: BenchCase
    tok_s: float
    tok_s_sd: float
    runs: int


class Bencher:
    """Runs cases over a pipeline that nobody else uses."""

    def __init__(self, pipeline: Pipeline, vocab: int, limits: Limits) -> None:
        self._pipeline = pipeline
        self._vocab = vocab
        self._chunk = limits.chunk
        self._ring = limits.ring
        self._steps = count()
        self._requests = count(1)
        self._random = random.Random(0)

    def run(self, case: BenchCase, runs: int) -> BenchRow:
        """Time a case after one run to warm up. Raises `PipelineError`."""
        rates = [self._rate(case) for _ in range(runs + 1)][1:]
        spread = statistics.stdev(rates) if runs > 1 else 0.0
        return BenchRow(case, statistics.mean(rates), spread, runs)

    def _rate(self, case: BenchCase) -> float:
        request = next(self._requests)
        pages = list(range(pages_for(case.context)))
        opened = Opened(request, pages, case.context, _GREEDY, pages[: self._ring])
        self._step(Batch(next(self._steps), opened=[opened]))
        depth = case.depth or (1 if case.tokens else 0)
        self._prefill(request, 0, depth)
        begin = time.perf_counter()
        if case.prompt:
            self._prefill(request, depth, depth + case.prompt)
        else:
            self._decode(request, depth, case.tokens)
        spent = time.perf_counter() - begin
        self._step(Batch(next(self._steps), closed=[request]))
        return (case.prompt or case.tokens) / spent

    def _prefill(self, request: int, start: int, stop: int) -> None:
        """Positions `[start, stop)` in chunks, as many in flight as the pipeline holds."""
        in_flight = 0
        for batch in self._chunks(request, start, stop):
            if in_flight == self._pipeline.depth:
                self._receive()
                in_flight -= 1
            self._pipeline.send(batch)
            in_flight += 1
        for _ in range(in_flight):
            self._receive()

    def _chunks(self, request: int, start: int, stop: int) -> Iterator[Batch]:
        for first in range(start, stop, self._chunk):
            tokens = self._random.choices(range(self._vocab), k=min(self._chunk, stop - first))
            segment = Segment(request, first, tokens, sample=first + len(tokens) == stop)
            yield Batch(next(self._steps), segments=[segment])

    def _decode(self, request: int, start: int, tokens: int) -> None:
        token = self._random.randrange(self._vocab)
        for position in range(start, start + tokens):
            segment = Segment(request, position, [token], sample=True)
            token = self._step(Batch(next(self._steps), segments=[segment]))

    def _step(self, batch: Batch) -> int:
        self._pipeline.send(batch)
        return self._receive()

    def _receive(self) -> int:
        """The drawn token of the oldest batch, 0 if it drew none."""
        result = None
        while result is None:
            result = self._pipeline.receive(timeout_s=None)
        if result.error is not None:
            raise StageError(result.error)
        drawn = [segment.drawn for segment in result.segments if segment.drawn is not None]
        return drawn[0].token if drawn else 0


def bench_cases(prompts: list[int], tokens: list[int], depths: list[int]) -> list[BenchCase]:
    """Every prompt and decode length at every depth, in llama-bench's order; zeros are left out."""
    cases = [
        case
        for depth in depths
        for case in (
            *(BenchCase(depth, prompt=prompt) for prompt in prompts if prompt),
            *(BenchCase(depth, tokens=count) for count in tokens if count),
        )
    ]
    if not cases:
        raise ConfigError("nothing to measure: give -p or -n a number above 0, and -d a depth")
    return cases
