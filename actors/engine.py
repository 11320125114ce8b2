"""The engine: one thread that keeps a pipeline busy with the scheduler's steps, and comes back when
it breaks.

A facade: `submit`, `generate`, `cancel`, `status`, `stats`. Its loop is three lines: schedule, run,
apply. It knows no Ray: a `StageSource` brings stages up, in this process or elsewhere. When the
pipeline breaks, its requests wait until it is mended and go on where they were.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Protocol

from actors.cores import compute_first
from actors.meters import Meters
from actors.pipeline import Pipeline
from actors.recovery import wait_before
from actors.request import Event, GenerateRequest, Sink
from actors.running import page_names
from actors.scheduler import Limits, Scheduler
from actors.stats import EngineStats, EngineStatus, StageStats
from sharding.batch import Batch, Result
from sharding.errors import (
    BusyError,
    ContextLengthError,
    LongspanError,
    PipelineError,
    ProtocolError,
    RequestError,
    UnavailableError,
)

if TYPE_CHECKING:  # its library is not needed where no grammar is
    from actors.grammar import Constraint, Grammars

log = logging.getLogger("longspan.engine")

_CLOSE_TIMEOUT_S = 10.0
_SILENT_S = 2.0
_UNEXPECTED = "the engine stopped unexpectedly; its log has the traceback"


@dataclass(frozen=True)
class ReadyPipeline:
    """A pipeline that is ready, and what it can hold."""

    pipeline: Pipeline
    limits: Limits
    epoch: int


class StageSource(Protocol):
    """Where stages come from. Called on the engine's thread, `close` from any."""

    def open(self, report: Callable[[float, str], None]) -> ReadyPipeline:
        """Load all stages; `report` hears the share loaded and a line for people."""

    def repair(self, report: Callable[[float, str], None]) -> ReadyPipeline:
        """Replace what died and join the stages anew. Raises `LongspanError` when that fails."""

    def check(self) -> None:
        """Prove that every stage answers, busy or not. Raises `PipelineError`."""

    def use_quiet(self) -> None:
        """Do what would disturb requests: for two seconds there was none."""

    def stats(self) -> list[StageStats]:
        """What each stage holds now."""

    def close(self) -> None:
        """End the stages."""


class Engine:
    """Runs requests over one pipeline. Thread-safe."""

    def __init__(self, source: StageSource, grammars: Grammars | None = None) -> None:
        """`grammars`: over the model's vocabulary; None: requests with a grammar are refused."""
        self._source = source
        self._grammars = grammars
        self._lock = threading.Lock()
        self._status = EngineStatus("loading")
        self._scheduler: Scheduler | None = None
        self._pipeline: Pipeline | None = None
        self._meters = Meters(time.monotonic)
        self._stages: tuple[int, list[StageStats]] = (-1, [])
        self._epoch = 0
        self._in_flight: deque[Batch] = deque()
        self._ending = _UNEXPECTED
        self._stopping = threading.Event()
        self._settled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="longspan-engine", daemon=True)

    def start(self) -> None:
        """Begin loading; `status` tells how far it is."""
        self._thread.start()

    def wait_ready(self) -> None:
        """Block until the engine serves. Raises `UnavailableError` with the reason if it cannot."""
        self._settled.wait()
        status = self.status()
        if status.state != "ready":
            raise UnavailableError(status.detail)

    def constrain(self, request: GenerateRequest) -> Constraint | None:
        """What a request's grammar leaves to draw, None if it has none. Takes a while, without the
        interpreter's lock. Raises `RequestError`."""
        if not request.grammar:
            return None
        if self._grammars is None:
            raise RequestError("this engine knows no vocabulary that a grammar could guide")
        return self._grammars.compile(request.grammar, request.drawn)

    def submit(
        self, request: GenerateRequest, sink: Sink, constraint: Constraint | None = None
    ) -> None:
        """Take a request on; `sink` hears an empty event at once, then its progress. `constraint`:
        what `constrain` made of it; None: made here.

        Raises `UnavailableError`, `BusyError`, `ContextLengthError` or `RequestError`.
        """
        constraint = constraint or self.constrain(request)
        scheduler = self._scheduler
        names = page_names(request, scheduler is not None and scheduler.limits.prefix_cache)
        with self._lock:
            if self._status.state != "ready" or self._scheduler is None:
                self._meters.refuse("unavailable")
                reason = f": {self._status.detail}" if self._status.detail else ""
                raise UnavailableError(f"the engine is {self._status.state}{reason}")
            try:
                self._scheduler.submit(
                    request, self._meters.watch(request, sink), names, constraint
                )
            except (BusyError, ContextLengthError) as error:
                self._meters.refuse("busy" if isinstance(error, BusyError) else "context")
                raise
            self._wake()

    def cancel(self, request_id: str) -> None:
        """Stop a request, free its pages on every stage, send no event. Unknown ids are fine."""
        with self._lock:
            if self._scheduler is not None and self._scheduler.cancel(request_id):
                self._meters.cancel()
            self._wake()

    def generate(self, request: GenerateRequest) -> Generator[Event, None, None]:
        """Submit and iterate over the events; closing the iterator cancels."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.submit(request, events.put)
        try:
            while True:
                event = events.get()
                yield event
                if event.last:
                    return
        finally:
            self.cancel(request.request_id)

    def status(self) -> EngineStatus:
        """Whether it serves."""
        with self._lock:
            return self._status

    def stats(self, *, ask: bool = True) -> EngineStats:
        """The books, with the stages' own; without `ask` as these were when they last answered
        since the pipeline was joined: that takes no time."""
        if ask and self.status().state == "ready":
            epoch, stages = self._epoch, self._source.stats()
            self._stages = (epoch, stages)
        with self._lock:
            epoch, stages = self._stages
            if epoch != self._epoch or self._status.state != "ready":
                stages = []
            scheduler = self._scheduler
            if scheduler is None:
                return EngineStats(epoch=self._epoch, requests=self._meters.snapshot())
            return EngineStats(
                epoch=self._epoch,
                waiting=scheduler.waiting,
                running=scheduler.running,
                pages=scheduler.pool.pages,
                pages_free=scheduler.pool.free,
                pages_kept=scheduler.pool.kept,
                window_pages=scheduler.pool.window_pages,
                window_pages_free=scheduler.pool.window_free,
                steps=scheduler.steps,
                prompt_tokens=scheduler.prompt_tokens,
                cached_tokens=scheduler.cached_tokens,
                drawn_tokens=scheduler.drawn_tokens,
                in_flight=len(self._in_flight),
                context=scheduler.limits.most_tokens,
                stages=stages,
                stage_s=list(scheduler.stage_s),
                requests=self._meters.snapshot(),
            )

    def close(self) -> None:
        """Fail what runs, end the thread and the stages."""
        self._stopping.set()
        with self._lock:
            self._wake()
        # A step ends soon, loading may not: then it ends because its stages do.
        if self._thread.is_alive():
            self._thread.join(_CLOSE_TIMEOUT_S)
        self._source.close()

    def _wake(self) -> None:
        if self._pipeline is not None:
            self._pipeline.wake()

    def _run(self) -> None:
        opening = self._source.open
        compute_first()
        try:
            while (opened := self._open_with_patience(opening)) is not None:
                self._attach(opened)
                self._serve_until_broken(opened.pipeline)
                opening = self._source.repair
        finally:
            # Whatever ended this thread, a bug of ours included: nobody may wait for it in vain.
            self._lose("failed", self._ending)

    def _open_with_patience(
        self, opening: Callable[[Callable[[float, str], None]], ReadyPipeline]
    ) -> ReadyPipeline | None:
        """A working pipeline, or None when it is time to end; the reason is then in `_ending`."""
        for tries in count():
            wait_s = wait_before(tries)
            if wait_s is None:
                return None
            if self._stopping.wait(wait_s):
                self._ending = "the engine is shutting down"
                return None
            try:
                return opening(self._report)
            except PipelineError as error:
                log.warning("try %d to open the pipeline failed: %s", tries + 1, error)
                self._report(0.0, f"try {tries + 1} failed: {error}")
                self._ending = str(error)
            except LongspanError as error:
                # A wrong file or too little memory does not mend itself.
                log.error("the pipeline cannot be opened: %s", error)
                self._ending = str(error)
                return None
        raise AssertionError("unreachable: patience ends")

    def _report(self, share: float, detail: str) -> None:
        with self._lock:
            state = "repairing" if self._status.state == "repairing" else "loading"
            self._status = EngineStatus(state, share, detail)

    def _attach(self, opened: ReadyPipeline) -> None:
        with self._lock:
            self._pipeline, self._epoch = opened.pipeline, opened.epoch
            self._scheduler = self._scheduler or Scheduler(opened.limits)
            self._status = EngineStatus("ready", 1.0, context=opened.limits.most_tokens)
            self._ending = _UNEXPECTED
        self._settled.set()

    def _serve_until_broken(self, pipeline: Pipeline) -> None:
        try:
            self._serve(pipeline)
        except PipelineError as error:
            log.warning("the pipeline broke, repairing: %s", error)
            self._replay(f"the engine lost its pipeline and is repairing: {error}")
        finally:
            with self._lock:
                self._pipeline = None
            pipeline.close()

    def _replay(self, reason: str) -> None:
        """Leave the state "ready"; requests wait for the pipeline to come back."""
        with self._lock:
            self._status = EngineStatus("repairing", detail=reason)
            lost = list(self._in_flight)
            self._in_flight.clear()
            if self._scheduler is not None:
                self._scheduler.replay_all(lost, reason)

    def _lose(self, state: str, reason: str) -> None:
        """Leave the state "ready"; every request ends with an error event."""
        with self._lock:
            self._status = EngineStatus(state, detail=reason)
            self._in_flight.clear()
            if self._scheduler is not None:
                self._scheduler.fail_all(reason)
        self._settled.set()

    def _serve(self, pipeline: Pipeline) -> None:
        heard = time.monotonic()
        while not self._stopping.is_set():
            while len(self._in_flight) < pipeline.depth and (batch := self._schedule()):
                pipeline.send(batch)
            result = pipeline.receive(max(0.0, heard + _SILENT_S - time.monotonic()))
            if result is not None:
                self._apply(result)
            elif time.monotonic() - heard >= _SILENT_S:
                # A long step, or a stage that stopped without closing its sockets: ask.
                self._source.check()
                if not self._in_flight:
                    self._source.use_quiet()
            else:
                continue  # woken: a request came or went
            heard = time.monotonic()

    def _schedule(self) -> Batch | None:
        with self._lock:
            assert self._scheduler is not None, "attached without a scheduler"
            batch = self._scheduler.next_step()
            if batch is not None:
                self._in_flight.append(batch)
            return batch

    def _apply(self, result: Result) -> None:
        with self._lock:
            assert self._scheduler is not None, "attached without a scheduler"
            awaited = self._in_flight[0].step if self._in_flight else None
            if result.step != awaited:
                raise ProtocolError(f"the result of step {result.step} came for step {awaited}")
            if result.lost:
                raise PipelineError(f"a stage's device failed: {result.error}")
            batch = self._in_flight.popleft()
            self._scheduler.apply(batch, result)
