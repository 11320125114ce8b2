"""Server-sent events, and noticing that a client left.

Frames are the `text/event-stream` format of the HTML standard: `data: …` and a blank line; a line
that begins with a colon is a comment, which keeps connections open. Not here: what a chunk says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_T = TypeVar("_T")
_COMMENT = b":\n\n"
_DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """A stream of chunks. `chunks` yields None first, when the request was accepted: until then its
    errors become ordinary HTTP errors. None last means complete and sends `[DONE]`; a stream that
    ends without it broke. The client's leaving closes `chunks` at once."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[BaseModel | None, None], keep_alive_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._chunks):
            await anext(self._chunks)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(_frames(self._chunks, self._keep_alive_s)) as frames:
                async for frame in frames:
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _frames(
    chunks: AsyncIterator[BaseModel | None], keep_alive_s: float
) -> AsyncGenerator[bytes, None]:
    """Chunks as frames, with a comment after every `keep_alive_s` seconds without one."""
    while True:
        coming = asyncio.ensure_future(anext(chunks, _END))
        try:
            while not (await asyncio.wait({coming}, timeout=keep_alive_s))[0]:
                yield _COMMENT
        finally:
            await cancelled(coming)
        chunk = coming.result()
        if isinstance(chunk, _End):
            return
        yield _DONE if chunk is None else frame(chunk)


class _End:
    """No chunk follows."""


_END = _End()


def frame(chunk: BaseModel) -> bytes:
    """One event."""
    return f"data: {chunk.model_dump_json()}\n\n".encode()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T | None:
    """The result of `work`, or None if the client left, which cancels it.

    The request's body must have been read: whatever `receive` says after it is the client leaving.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancelled(leaving)
        await cancelled(working)
    return None if working.cancelled() else working.result()


async def cancelled(task: asyncio.Future[Any]) -> None:
    """Cancel `task` unless it is done, and wait until it is: its clean-up has run then."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
