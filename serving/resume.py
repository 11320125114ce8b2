"""A request that outlives its engine replica: what of it is known here is enough to go on.

A draw depends on the tokens before it and on its position, not on who drew those. So when a
replica dies, the request goes to the one that comes in its place together with what was drawn, and
its client sees a pause.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from msgspec.structs import replace

from actors.request import Event, GenerateRequest
from sharding.errors import RepeatedLossError, UnavailableError

MOST_RESUMES = 2
"""A request may be what its replicas die of."""

_MOST_VAIN, _AGAIN_S = 20, 0.5
"""Attempts in a row that no replica took on, and seconds before the next."""


class ReplicaGoneError(UnavailableError):
    """The replica that ran a request is there no more."""


Attempt = Callable[[GenerateRequest], AsyncGenerator[Event, None]]
"""Runs a request on the replica that there is. Raises `ReplicaGoneError`, or what the engine
says."""


class _Progress:
    """What was heard of a request, over all replicas."""

    def __init__(self, request: GenerateRequest) -> None:
        self._request = request
        self._drawn: list[int] = []
        self._scored = self._prompt_done = 0
        self._behind = 0  # scores that this replica must tell again
        self._attempts = self._deaths = self._vain = 0
        self.accepted = False

    def rest(self) -> GenerateRequest:
        """What is left to do. A name of its own: the old one may not be over yet."""
        self._attempts += 1
        if self._attempts == 1:
            return self._request
        self._behind = self._scored
        return replace(
            self._request,
            request_id=f"{self._request.request_id}-again{self._attempts}",
            drawn=[*self._request.drawn, *self._drawn],
            accepted=True,
        )

    def note_loss(self, heard: bool, error: UnavailableError) -> None:
        """A replica died with it, or was not there to take it. Raises when that was too often."""
        self._deaths += heard
        self._vain = 0 if heard else self._vain + 1
        if self._deaths > MOST_RESUMES:
            raise RepeatedLossError(f"{error}; {self._deaths} times in this request's work")
        if self._vain > _MOST_VAIN:
            raise error

    def take(self, event: Event) -> Event:
        """An event as it would have been if nothing had happened."""
        self.accepted = True
        self._drawn += [choice.token for choice in event.tokens]
        scores = event.prompt_scores[self._behind :]
        self._behind = max(0, self._behind - len(event.prompt_scores))
        self._scored += len(scores)
        self._prompt_done = max(self._prompt_done, event.prompt_done)
        cached = 0 if self._attempts > 1 else event.cached_tokens
        return replace(
            event, prompt_scores=scores, prompt_done=self._prompt_done, cached_tokens=cached
        )


async def resumed(
    request: GenerateRequest, attempt: Attempt, ready: Callable[[], Awaitable[None]]
) -> AsyncGenerator[Event, None]:
    """A request's events, over as many replicas as it takes, within bounds; `ready` returns when
    there is one that serves. What was not accepted is not tried again: its client can. Raises
    `RepeatedLossError` for what more replicas died of than is likely."""
    progress = _Progress(request)
    while True:
        heard = False  # of this replica
        try:
            async with aclosing(attempt(progress.rest())) as events:
                async for event in events:
                    heard = True
                    yield progress.take(event)
            return
        except UnavailableError as error:
            gone = isinstance(error, ReplicaGoneError)
            if not progress.accepted or (heard and not gone):
                raise
            progress.note_loss(heard, error)
        if not heard:
            await asyncio.sleep(_AGAIN_S)
        await ready()
