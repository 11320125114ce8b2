"""The KV of stages without tensors, to prove that no request reads another's."""

from __future__ import annotations

from sharding.batch import PAGE_SLOTS, Batch, Choice, Opened, Result, Segment, SegmentResult


def draw(history: list[int]) -> int:
    """The token that follows these."""
    return hash(tuple(history)) % 89


class Memory:
    """The KV of stages without tensors: of each slot, the tokens up to its own. A batch that reads
    what is not its request's own history is a failed assertion."""

    def __init__(self, window: int = 0) -> None:
        self._window = window
        self._open: dict[int, Opened] = {}
        self._slots: dict[tuple[bool, int, int], int] = {}
        self._histories: dict[int, list[int]] = {}
        self._broken: set[int] = set()

    def run(self, batch: Batch, prompts: dict[int, list[int]], fails: bool = False) -> Result:
        """As a stage does it: closings, openings, then segments, which write and read. One that
        fails leaves anything in its slots, and so do later ones of the same request.

        `prompts`: of each request, what may be there before its first segment. What is drawn
        follows from all tokens before it.
        """
        for request in batch.closed:
            del self._open[request]
        for opened in batch.opened:
            self._open[opened.request] = opened
            self._histories[opened.request] = []
        if fails:
            self._broken.update(segment.request for segment in batch.segments)
        for segment in batch.segments:
            history = self._histories[segment.request]
            history += prompts[segment.request][len(history) : segment.start]
            assert len(history) == segment.start, "a gap in the tokens"
            history += segment.tokens
            for position in range(segment.start, len(history)):
                kv = -1 if segment.request in self._broken else hash(tuple(history[: position + 1]))
                for windowed in (False, True):
                    self._slots[self._slot(segment.request, position, windowed)] = kv
        for segment in batch.segments:
            if segment.request not in self._broken:
                self._read(segment)
        return Result(
            batch.step,
            [
                SegmentResult(
                    at.request, Choice(draw(self._histories[at.request])) if at.sample else None
                )
                for at in batch.segments
            ],
        )

    def _read(self, segment: Segment) -> None:
        history = self._histories[segment.request]
        first_seen = max(0, segment.start - self._window + 1) if self._window else 0
        for windowed, first in ((False, 0), (True, first_seen)):
            for position in range(first, len(history)):
                found = self._slots.get(self._slot(segment.request, position, windowed))
                assert found == hash(tuple(history[: position + 1])), (
                    f"request {segment.request} reads another's KV at {position}"
                )

    def _slot(self, request: int, position: int, windowed: bool) -> tuple[bool, int, int]:
        opened = self._open[request]
        pages = opened.window_pages if windowed and opened.window_pages else opened.pages
        page = pages[position // PAGE_SLOTS % len(pages)]
        return pages is opened.window_pages, page, position % PAGE_SLOTS
