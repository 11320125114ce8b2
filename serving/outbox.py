"""Events on their way from the engine's thread to an answer, several at a time when they come fast.

Passing something on through Serve costs milliseconds of processor time, more than a token of a
small model, on cores that compute the next one. Not here: what an event means.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from actors.request import Event

GAP_S = 0.1
"""Least time between two departures with tokens. On two cores that also compute, ten pieces a
second instead of twenty make an answer a tenth faster, and it still reads as fluent."""


class Outbox:
    """One request's events. `put` may be called from any thread; the rest belongs to the event loop
    that it was made in."""

    def __init__(self, gap_s: float = GAP_S) -> None:
        self._gap_s = gap_s
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._wake = asyncio.Event()
        self._hungry = False
        self._next_s = 0.0

    def put(self, event: Event) -> None:
        """Take an event on; wakes the event loop only if somebody waits for just this one."""
        self._events.append(event)
        if event.last or self._hungry:
            self._hungry = False
            self._loop.call_soon_threadsafe(self._wake.set)

    async def take(self) -> list[Event]:
        """What has come, at least one event.

        At once, if no tokens left within the last `gap_s`; else when those are over, or with a
        request's last event.
        """
        while not self._events:
            self._wake.clear()
            self._hungry = True
            if not self._events:  # it may have come before this side was hungry
                await self._wake.wait()
        await self._until_departure()
        taken = [self._events.popleft() for _ in range(len(self._events))]
        if any(event.tokens for event in taken):
            self._next_s = self._loop.time() + self._gap_s
        return taken

    async def _until_departure(self) -> None:
        self._hungry = False
        self._wake.clear()
        left_s = self._next_s - self._loop.time()
        if left_s > 0 and not self._events[-1].last:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._wake.wait()
