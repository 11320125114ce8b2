"""Stages as the engine sees them: batches in at the front, results out at the back, in order.

`LocalPipeline` runs stages of this process one after the other; `SocketPipeline` talks to stages
elsewhere over two edges. Both hold `depth` batches in flight, so that the scheduler decides alike
over either. Not here: how stages come to be (`placement.py`) and what happens when they die
(`recovery.py`).
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

from sharding.batch import Batch, Result
from sharding.errors import DeviceLostError, PeerLostError, ProtocolError, StageError

if TYPE_CHECKING:
    import torch

    from actors.transport import Edge
    from sharding.stage import Stage


class Pipeline(Protocol):
    """What the engine needs. Only `wake` may be called from another thread."""

    depth: int

    def send(self, batch: Batch) -> None:
        """Put a batch in flight. Raises `PipelineError` when the pipeline broke."""

    def receive(self, timeout_s: float | None) -> Result | None:
        """The next result, in the order of sending; None after the timeout or a `wake`.

        Raises `PipelineError` when the pipeline broke: all in flight is lost.
        """

    def wake(self) -> None:
        """Make a `receive` that waits return at once."""

    def close(self) -> None:
        """Let go of the stages."""


ENVELOPE, RESULT = 2, 3
"""Kinds of frames between stages; 1 is the transport's own greeting."""

_LAST_WORDS_S = 1.0
"""Patience with what is in flight behind a first stage that died; a stage that computes for longer
than that takes the reason with it."""


class Envelope(msgspec.Struct, frozen=True):
    """What a stage passes on: the batch, each stage's seconds, a failure if there was one, and
    whether it cost a stage its device."""

    batch: Batch
    stage_s: list[float] = []
    error: str | None = None
    lost: bool = False


# Made once: a decoded token pays for every look-up.
_encode = msgspec.msgpack.Encoder().encode
_envelopes = msgspec.msgpack.Decoder(Envelope)
_results = msgspec.msgpack.Decoder(Result)


def forward_envelope(
    stage: Stage, envelope: Envelope, hidden: torch.Tensor | None
) -> tuple[torch.Tensor | None, Envelope | Result]:
    """Run one stage's part of a batch.

    Answers (hidden states, envelope) for the next stage or (None, result) from the last. After a
    failure the later stages still keep their books, so that openings and closings are never lost.
    """
    begin = time.perf_counter()
    error, output = envelope.error, None
    try:
        if error is None:
            output = stage.forward(envelope.batch, hidden)
        else:
            stage.apply_books(envelope.batch)
    except StageError as failure:
        error = str(failure)
    spent = [*envelope.stage_s, time.perf_counter() - begin]
    lost = envelope.lost or (error is not None and stage.lost)
    if not stage.is_last:
        passed = Envelope(envelope.batch, spent, error, lost)
        return (None if output is None else output.hidden_TI), passed
    segments = [] if output is None else output.segments
    return None, Result(envelope.batch.step, segments, spent, error, lost)


class LocalPipeline:
    """Stages of this process: `receive` computes the oldest batch on the caller's thread."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.depth = len(stages)
        self._stages = tuple(stages)
        self._sent: deque[Batch] = deque()
        self._woken = threading.Event()

    def send(self, batch: Batch) -> None:
        """Queue the batch."""
        self._sent.append(batch)

    def receive(self, timeout_s: float | None) -> Result | None:
        """Run the oldest batch through all stages, or wait for a `wake`."""
        if not self._sent:
            self._woken.wait(timeout_s)
            self._woken.clear()
            return None
        passed: Envelope | Result = Envelope(self._sent.popleft())
        hidden = None
        for stage in self._stages:
            assert isinstance(passed, Envelope), "only the last stage has results"
            hidden, passed = forward_envelope(stage, passed, hidden)
        assert isinstance(passed, Result), "the last stage is missing"
        return passed

    def wake(self) -> None:
        """End a wait."""
        self._woken.set()

    def close(self) -> None:
        """Nothing to let go of: the stages die with their last reference."""


class SocketPipeline:
    """Stages behind two edges: `front` leads into the first stage, `back` comes from the last."""

    def __init__(self, front: Edge, back: Edge, stages: int) -> None:
        # One more than the stages can work on, so that none waits for the engine's round trip.
        self.depth = stages + 1
        self._front, self._back = front, back
        self._front_lost: PeerLostError | None = None
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._selector = selectors.DefaultSelector()
        for end in (self._back, self._front, self._woken):
            self._selector.register(end, selectors.EVENT_READ)

    def send(self, batch: Batch) -> None:
        """Send the batch to the first stage; `receive` tells if that is gone."""
        try:
            self._front.send(ENVELOPE, batch.step, _encode(Envelope(batch)))
        except PeerLostError as error:
            self._lose_front(error)

    def receive(self, timeout_s: float | None) -> Result | None:
        """Wait for the last stage's answer. The front edge only ever tells that its stage died."""
        if self._back.pending:
            return decode(self._back.receive().meta, _results)
        if self._front_lost is not None:
            timeout_s = _LAST_WORDS_S
        ready = [key.fileobj for key, _ in self._selector.select(timeout_s)]
        if self._woken in ready:
            self._woken.recv(4096)
        if self._back in ready:
            return decode(self._back.receive().meta, _results)
        if self._front_lost is not None:
            raise self._front_lost
        if self._front in ready:
            self._hear_front()
        return None

    def _hear_front(self) -> None:
        try:
            self._front.receive()
        except PeerLostError as error:
            self._lose_front(error)
        else:
            raise ProtocolError("the first stage sent a frame backwards")

    def _lose_front(self, error: PeerLostError) -> None:
        """Not the end yet: what the first stage still sent passes through the others, and may be
        the reason, which users would rather read. Its end follows, and comes out at the back."""
        if self._front_lost is None:
            self._front_lost = error
            self._selector.unregister(self._front)
            self._selector.unregister(self._woken)  # only one thing is waited for now

    def wake(self) -> None:
        """End a wait; a full pipe means that one is on its way already."""
        with contextlib.suppress(BlockingIOError):
            self._waker.send(b".")

    def close(self) -> None:
        """Close both edges: every stage sees end of file, one after the other."""
        self._selector.close()
        for end in (self._front, self._back, self._woken, self._waker):
            end.close()


def serve_stage(
    stage: Stage,
    upstream: Edge,
    downstream: Edge,
    spent: Callable[[float], None] = lambda step_s: None,
) -> None:
    """Work for the pipeline until an edge ends: then close the other, so that all neighbours learn
    of it. `spent` hears how long each step took.

    Raises `PipelineError`, of which `DeviceLostError` says that this process is of no use any more;
    it never returns.
    """
    try:
        while True:
            frame = upstream.receive()
            envelope = decode(frame.meta, _envelopes)
            hidden, passed = forward_envelope(stage, envelope, frame.hidden)
            spent(passed.stage_s[-1])
            kind = RESULT if isinstance(passed, Result) else ENVELOPE
            try:
                downstream.send(kind, frame.step, _encode(passed), hidden)
            except PeerLostError:
                if not stage.lost:
                    raise
            if stage.lost:  # after its requests were told why, if somebody still listens
                raise DeviceLostError(f"the stage's device failed: {passed.error}")
    finally:
        upstream.close()
        downstream.close()


Message = TypeVar("Message")


def decode(meta: bytes, messages: msgspec.msgpack.Decoder[Message]) -> Message:
    """The meta part of a frame. Raises `ProtocolError`."""
    try:
        return messages.decode(meta)
    except msgspec.DecodeError as error:
        wanted = messages.type.__name__
        raise ProtocolError(f"a frame's meta part is no {wanted}: {error}") from error
