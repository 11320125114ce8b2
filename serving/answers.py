"""Runs the engine requests behind one HTTP request: together they start, fail and are cancelled.

`Running` owns them and is a context manager: leaving it, for whatever reason, closes every iterator
of the engine that still runs. `stream` and `collect` are the two ways to answer with them; how an
answer is worded is an endpoint's own (`Wording`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from pydantic import BaseModel

from actors.request import Event, GenerateRequest
from serving.errors import error_body
from serving.openai_answers import PromptDetails, PromptProgress, Usage
from serving.prepare import Job
from serving.service import EngineClient, Service
from serving.text import AnswerText, Piece
from sharding.errors import LongspanError, PipelineError, RepeatedLossError

_log = logging.getLogger(__name__)
_CANCELLED = "the engine cancelled this request; try again"


class Wording(Protocol):
    """How an endpoint words its answers. `index` is a choice."""

    def opening(self) -> Iterable[BaseModel]:
        """The chunks that are sent as soon as the engine accepted the request."""

    def chunks(self, index: int, piece: Piece) -> Iterable[BaseModel]:
        """The chunks that say `piece`."""

    def progress(self, index: int, progress: PromptProgress) -> BaseModel:
        """The chunk that says how far a choice's prompt was read."""

    def closing(self, usage: Usage) -> BaseModel:
        """The chunk that says the usage."""

    def whole(self, answers: list[list[Piece]], usage: Usage) -> BaseModel:
        """Everything as one answer."""


@runtime_checkable
class _Closable(Protocol):
    async def aclose(self) -> None: ...


class Running:
    """The engine requests of one HTTP request."""

    def __init__(self, engine: EngineClient, requests: Sequence[GenerateRequest]) -> None:
        self._engine = engine
        self._requests = requests
        self._news: asyncio.Queue[tuple[int, Event | None]] = asyncio.Queue()
        self._early: list[tuple[int, Event]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._left = len(requests)
        self._stopped: set[int] = set()

    async def __aenter__(self) -> Self:
        for index, request in enumerate(self._requests):
            task = asyncio.create_task(self._pump(index, request))
            task.add_done_callback(partial(self._ended, index))
            self._tasks.append(task)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def admitted(self) -> None:
        """Return when the engine accepted all requests; raises why it did not accept one."""
        waiting = set(range(len(self._requests)))
        while waiting:
            news = await self._next()
            if news is not None:
                self._early.append(news)
                waiting.discard(news[0])

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Every request's events with its index, until the last of all. Raises what broke the first
        request that broke; the caller leaves the context and so cancels the others."""
        for early in self._early:
            yield early
        while self._left:
            news = await self._next()
            if news is not None:
                yield news

    def stop(self, index: int) -> None:
        """Cancel one request: its answer is complete."""
        self._stopped.add(index)
        self._tasks[index].cancel()

    async def _next(self) -> tuple[int, Event] | None:
        """The next event, or None when a request ended well."""
        index, event = await self._news.get()
        if event is not None:
            return index, event
        self._left -= 1
        task = self._tasks[index]
        if task.cancelled():
            if index not in self._stopped:
                raise PipelineError(_CANCELLED)
        elif error := task.exception():
            raise _ours(error)
        return None

    def _ended(self, index: int, task: asyncio.Task[None]) -> None:
        self._news.put_nowait((index, None))

    async def _pump(self, index: int, request: GenerateRequest) -> None:
        events = self._engine.generate(request)
        try:
            async for event in events:
                _check(event)
                self._news.put_nowait((index, event))
                if event.last:
                    return
        finally:
            if isinstance(events, _Closable):
                await events.aclose()
        raise PipelineError("the engine ended an answer without saying why; try again")


def _check(event: Event) -> None:
    """Raises `PipelineError` for an event that says that the answer will stay incomplete."""
    if event.error is not None:
        raise (RepeatedLossError if event.suspect else PipelineError)(event.error)


def _ours(error: BaseException) -> LongspanError:
    """An error that may be told to a client: of a foreign one only that it happened."""
    if isinstance(error, LongspanError):
        return error
    _log.error("unexpected error from the engine", exc_info=error)
    return LongspanError("the server failed on this request; its log says why")


class _Reading:
    """How far the prompts of a job were read, if its client wants to know."""

    def __init__(self, job: Job) -> None:
        self._wanted = job.return_progress
        self._totals = [len(request.prompt) for request in job.requests]
        self._told = [0] * len(job.requests)
        self._begin = time.monotonic()

    def take(self, index: int, piece: Piece, text: AnswerText) -> PromptProgress | None:
        """The news in a piece, if there are any."""
        if not self._wanted or piece.prompt_done <= self._told[index]:
            return None
        self._told[index] = piece.prompt_done
        spent_ms = int((time.monotonic() - self._begin) * 1e3)
        return PromptProgress(
            total=self._totals[index],
            cache=text.cached_tokens,
            processed=piece.prompt_done,
            time_ms=spent_ms,
        )


async def stream(
    service: Service, job: Job, wording: Wording
) -> AsyncGenerator[BaseModel | None, None]:
    """The chunks of `job`'s answers; None first, when the engine accepted everything, and None last
    when the answers are complete.

    What fails before the first None is raised. A later failure becomes an error body, and nothing
    follows.
    """
    async with Running(service.engine, job.requests) as running:
        await running.admitted()
        yield None
        for chunk in wording.opening():
            yield chunk
        texts, reading = _texts(service, job), _Reading(job)
        try:
            async with aclosing(_pieces(running, texts)) as pieces:
                async for index, piece in pieces:
                    if progress := reading.take(index, piece, texts[index]):
                        yield wording.progress(index, progress)
                    for chunk in wording.chunks(index, piece):
                        yield chunk
        except LongspanError as error:
            _log.error("a stream broke: %s", error)
            yield error_body(error)
            return
    if job.include_usage:
        yield wording.closing(_usage(job, texts))
    yield None


async def collect(service: Service, job: Job, wording: Wording) -> BaseModel:
    """`job`'s answers as one whole. Raises what broke any of them."""
    texts = _texts(service, job)
    answers: list[list[Piece]] = [[] for _ in texts]
    async with (
        Running(service.engine, job.requests) as running,
        aclosing(_pieces(running, texts)) as pieces,
    ):
        async for index, piece in pieces:
            answers[index].append(piece)
    return wording.whole(answers, _usage(job, texts))


def _texts(service: Service, job: Job) -> list[AnswerText]:
    return [
        AnswerText(service.tokenizer, request.sampling, job.stops, job.skip, job.shown)
        for request in job.requests
    ]


async def _pieces(
    running: Running, texts: list[AnswerText]
) -> AsyncGenerator[tuple[int, Piece], None]:
    async for index, event in running.events():
        text = texts[index]
        if text.finish_reason is not None:
            continue  # events that were under way when a stop string ended the answer
        piece = text.take(event)
        if piece.finish_reason is not None and not event.last:
            running.stop(index)
        yield index, piece


def _usage(job: Job, texts: list[AnswerText]) -> Usage:
    drawn = sum(text.drawn for text in texts)
    # Of a prompt with several choices, what none of them had to read.
    cached = sum(
        min(text.cached_tokens for text in texts[first : first + job.choices])
        for first in range(0, len(texts), job.choices)
    )
    return Usage(
        prompt_tokens=job.prompt_tokens,
        completion_tokens=drawn,
        total_tokens=job.prompt_tokens + drawn,
        prompt_tokens_details=PromptDetails(cached_tokens=cached),
    )
