"""What requests took, counted for whoever watches a server: histograms and outcomes. Pure, its
clock is given.

Times are those of the engine: what tokenising, HTTP and a client's own network add is not in them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence

from actors.request import Event, GenerateRequest, Sink
from actors.stats import HistogramStats, RequestStats

CANCELLED = "cancelled"
ERROR = "error"

_FIRST_TOKEN_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
_GAP_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_REQUEST_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
_TOKENS = tuple(float(1 << power) for power in range(0, 21, 2))  # 1 to a million


class Histogram:
    """Counts of values up to each of `bounds`, which rise, and of larger ones."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._total += value * times

    def snapshot(self) -> HistogramStats:
        """As it is now."""
        return HistogramStats(list(self._bounds), list(self._counts), self._total)


class Meters:
    """Watches requests' events. Its owner calls it from one thread at a time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: seconds that never go back."""
        self._clock = clock
        self._outcomes: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._first_token_s = Histogram(_FIRST_TOKEN_S)
        self._gap_s = Histogram(_GAP_S)
        self._request_s = Histogram(_REQUEST_S)
        self._prompt_tokens = Histogram(_TOKENS)
        self._drawn_tokens = Histogram(_TOKENS)

    def watch(self, request: GenerateRequest, sink: Sink) -> Sink:
        """The sink to give to the engine instead."""
        clock = self._clock
        begin = last = clock()
        drawn, accepted = 0, False

        def hear(event: Event) -> None:
            nonlocal last, drawn, accepted
            if not accepted:
                accepted = True
                if not request.accepted:
                    self._prompt_tokens.add(len(request.prompt))
            if event.tokens:
                now = clock()
                if drawn:
                    each = (now - last) / len(event.tokens)
                    self._gap_s.add(each, len(event.tokens))
                elif not request.accepted:  # else another engine counted it
                    self._first_token_s.add(now - begin)
                last, drawn = now, drawn + len(event.tokens)
            if event.last:
                self._outcomes[event.finish_reason or ERROR] += 1
                self._request_s.add(clock() - begin)
                self._drawn_tokens.add(drawn)
            sink(event)

        return hear

    def refuse(self, reason: str) -> None:
        """A request was not taken on."""
        self._refused[reason] += 1

    def cancel(self) -> None:
        """A request that ran or waited was cancelled."""
        self._outcomes[CANCELLED] += 1

    def snapshot(self) -> RequestStats:
        """As it is now."""
        return RequestStats(
            outcomes=dict(self._outcomes),
            refused=dict(self._refused),
            first_token_s=self._first_token_s.snapshot(),
            gap_s=self._gap_s.snapshot(),
            request_s=self._request_s.snapshot(),
            prompt_tokens=self._prompt_tokens.snapshot(),
            drawn_tokens=self._drawn_tokens.snapshot(),
        )
