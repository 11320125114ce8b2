"""The Ray Serve application: a stateless ingress that speaks HTTP and an engine replica that owns
the pipeline.

The only file that knows Ray Serve. `build` is what `serve.yaml` and `longspan serve` deploy. HTTP
itself is `http.py`, requests and pages are `actors/`; here the two are joined, and Ray's exceptions
on that border become ours.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve import Application as ServeApplication
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from actors.engine import Engine
from actors.grammar import Grammars
from actors.placement import PlacementConfig, RayStages
from actors.request import Event, GenerateRequest
from actors.stats import EngineStats, EngineStatus
from serving.access import Access, read_access
from serving.config import ServeConfig, load_config
from serving.feed import FeedAddress, Feeds, Subscription
from serving.fetch import resolve_model
from serving.http import Application, create_app
from serving.resume import ReplicaGoneError, resumed
from serving.service import ServedModel, Service
from sharding.errors import ConfigError, LongspanError, UnavailableError
from sharding.gguf.reader import GGUFFile
from sharding.gguf.tokenizer import Tokenizer
from sharding.model.arch import read_shape
from sharding.model.rotation import Stretch
from sharding.model_plan import Wanted

_log = logging.getLogger(__name__)

# Requests wait in the scheduler's own queue, which knows pages and answers 429: Serve must not
# queue before it. Stages own the CPUs, these two only pass things on.
_REPLICA: dict[str, Any] = {
    "max_ongoing_requests": 1_000_000,
    "ray_actor_options": {"num_cpus": 0},
    # A line for every call would bury what matters.
    "logging_config": {"enable_access_log": False},
}
_WATCH_LOADING_S = 0.5
_WATCH_READY_S = 5.0
_STATUS_TIMEOUT_S = 2.0
# Patience with a replica that is not there at all, while requests wait to go on.
_GONE_S = 120.0
_STAGES_TIMEOUT_S = 1.0
_FEED_TIMEOUT_S = 10.0


class EngineReplica:
    """Owns one pipeline, and answers while it loads in the background."""

    def __init__(self, options: dict[str, Any]) -> None:
        config = load_config(options)
        wanted = Wanted(
            config.context,
            config.kv_tokens,
            config.kernels,
            config.chunk,
            stretch=config.stretch,
        )
        placement = PlacementConfig(
            resolve_model(config.model),
            config.stages,
            wanted,
            config.threads,
            config.max_waiting,
            config.prefix_cache,
        )
        node = ray.get_runtime_context().get_node_id()
        self._feeds = Feeds(node, ray.util.get_node_ip_address())
        self._stages = RayStages(placement)
        grammars = Grammars(lambda: describe_model(config)[1])
        self._engine = Engine(self._stages, grammars)
        self._reader = ThreadPoolExecutor(1, "longspan-reader")
        self._asking: asyncio.Task[EngineStats] | None = None
        self._engine.start()
        _in_background(grammars.prepare)

    async def feed(self) -> FeedAddress:
        """Where an ingress gets its requests' events."""
        return await self._feeds.address()

    async def generate(self, request: GenerateRequest, feed_name: str) -> None:
        """Run a request to its end; its events go to the feed. Cancelling the call cancels it, and
        so does the feed's end."""
        feed, loop = self._feeds.get(feed_name), asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        cancelled = False

        def sink(event: Event) -> None:
            if cancelled:  # what the engine was at meanwhile
                return
            feed.put(request.request_id, event)
            if event.last:
                loop.call_soon_threadsafe(_set, ended)

        constraint = None
        if request.grammar:  # not here: others' events would wait, nor where the books are asked
            constraint = await loop.run_in_executor(self._reader, self._engine.constrain, request)
        self._engine.submit(request, sink, constraint)
        try:
            await asyncio.wait((ended, feed.lost), return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not ended.done():
                cancelled = True
                ended.cancel()
                self._engine.cancel(request.request_id)
                feed.forget(request.request_id)

    async def status(self) -> EngineStatus:
        """Whether it serves."""
        return self._engine.status()

    async def stats(self) -> EngineStats:
        """The books."""
        return await asyncio.to_thread(self._engine.stats)

    async def books(self) -> EngineStats:
        """The same at once: the stages are asked when they were joined anew, and one that does not
        answer keeps nobody waiting."""
        stats = self._engine.stats(ask=False)
        if stats.stages:
            return stats
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self.stats())
        await asyncio.wait((self._asking,), timeout=_STAGES_TIMEOUT_S)
        return self._engine.stats(ask=False)

    async def pids(self) -> tuple[int, list[int]]:
        """This process and the stages', for tests that end one."""
        return os.getpid(), await asyncio.to_thread(self._stages.pids)

    def check_health(self) -> None:
        """Serve replaces the replica when this raises: only once the engine gave up repairing."""
        status = self._engine.status()
        if status.state == "failed":
            raise UnavailableError(status.detail)

    def __del__(self) -> None:
        """Serve's way to say that the replica goes."""
        if hasattr(self, "_engine"):
            self._engine.close()
            self._feeds.close()


def _in_background(work: Callable[[], None]) -> None:
    """What only the first request with a grammar would wait for."""
    threading.Thread(target=work, name="longspan-grammars", daemon=True).start()


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class RemoteEngine:
    """The engine as the ingress sees it (`EngineClient`)."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._subscription: Subscription | None = None
        self._opening = asyncio.Lock()
        self._again: asyncio.Task[None] | None = None

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """Events one by one, over the death of a replica; closing this iterator cancels the
        request."""
        async with aclosing(resumed(request, self._attempt, self._serving_again)) as events:
            async for event in events:
                yield event

    async def _serving_again(self) -> None:
        """Wait for the replica that Serve starts for one that died, and for what it loads; all that
        wait do so together. Raises `UnavailableError` if none comes, or one that cannot load."""
        if self._again is None or self._again.done():
            self._again = asyncio.create_task(self._wait_ready())
        await asyncio.shield(self._again)

    async def _wait_ready(self) -> None:
        deadline = time.monotonic() + _GONE_S
        while True:
            try:
                status = await self._heard_status()
            except UnavailableError:
                if time.monotonic() > deadline:
                    raise
            else:
                if status.state == "ready":
                    return
                if status.state == "failed":
                    raise UnavailableError(status.detail)
                deadline = time.monotonic() + _GONE_S
            await asyncio.sleep(_WATCH_LOADING_S)

    async def _attempt(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        subscription = await self._subscribed()
        news: asyncio.Queue[list[Event] | None] = asyncio.Queue()
        response = self._handle.generate.remote(request, subscription.name)
        subscription.take(request.request_id, news.put_nowait)
        refused: list[LongspanError] = []

        async def call() -> None:
            try:
                await response
            except RayTaskError as error:
                refused.append(_cause(error))
            except (RayError, RayServeException) as error:
                refused.append(ReplicaGoneError(f"the engine replica is gone: {error}"))
            except asyncio.CancelledError:  # ours, or Serve's
                refused.append(UnavailableError("the engine cancelled the call"))
                raise
            finally:
                if refused:  # else the last event is here, or on its way
                    news.put_nowait(None)

        calling = asyncio.create_task(call())
        ended = False
        try:
            while not ended:
                events = await news.get()
                if events is None:
                    self._doubt(subscription, refused)
                    raise refused[0] if refused else ReplicaGoneError("the engine replica is gone")
                for event in events:
                    ended = event.last
                    yield event
        finally:
            calling.cancel()
            subscription.leave(request.request_id)
            if not ended:
                response.cancel()

    def _doubt(self, subscription: Subscription, refused: list[LongspanError]) -> None:
        """Open another feed for the next request if this one's replica is not asked any more; the
        answers that it still gives come to their ends."""
        gone = any(isinstance(error, ReplicaGoneError) for error in refused)
        if gone and self._subscription is subscription:
            self._subscription = None

    async def _subscribed(self) -> Subscription:
        """To the replica there is; it may be another one than last time. All that wait for it do so
        together: raises `ReplicaGoneError` when it does not answer in time."""
        try:
            async with asyncio.timeout(_FEED_TIMEOUT_S), self._opening:
                if self._subscription is None or not self._subscription.alive:
                    address = await self._handle.feed.remote()
                    node = ray.get_runtime_context().get_node_id()
                    self._subscription = await Subscription.open(address, node)
                return self._subscription
        except (RayError, RayServeException, TimeoutError) as error:
            raise ReplicaGoneError(_silence(error)) from error

    async def status(self) -> EngineStatus:
        """The engine's word, or that it has none."""
        try:
            return await self._heard_status()
        except UnavailableError as error:
            return EngineStatus("failed", detail=str(error))

    async def _heard_status(self) -> EngineStatus:
        """Raises `UnavailableError` for silence: a handle would wait for a new replica for ever."""
        try:
            asked = self._handle.status.remote()
            status: EngineStatus = await asyncio.wait_for(asked, _STATUS_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError) as error:
            raise UnavailableError(_silence(error)) from error
        return status

    async def stats(self) -> EngineStats | None:
        """The engine's books."""
        try:
            asked = self._handle.books.remote()
            stats: EngineStats = await asyncio.wait_for(asked, _STATUS_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError):
            return None
        return stats


def _silence(error: Exception) -> str:
    return f"the engine replica does not answer: {str(error) or 'nothing was heard in time'}"


def _cause(error: RayTaskError) -> LongspanError:
    if isinstance(error.cause, LongspanError):
        return error.cause
    return UnavailableError(f"the engine failed: {error.cause!r}")


class Ingress:
    """Tokenises, applies templates, streams. Holds nothing that outlives a request."""

    def __init__(self, options: dict[str, Any], access: Access, engine: DeploymentHandle) -> None:
        config = load_config(options)
        model, tokenizer = describe_model(config)
        self._key_file, self._access = config.api_key_file, access
        self._app: Application | None = None
        self._service = Service(model, tokenizer, RemoteEngine(engine))
        _in_background(self._service.vetting.prepare)
        self._watch = asyncio.get_running_loop().create_task(self._learn_context())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the constructor is done."""
        self._app = create_app(self._service, self._access)
        return self._app

    async def _learn_context(self) -> None:
        """How long a context fits is known when stages are placed, and anew with every replica."""
        while True:
            status = await self._service.engine.status()
            if status.context:
                self._service.model = replace(self._service.model, context=status.context)
            await asyncio.to_thread(self._read_keys_again)
            await asyncio.sleep(_WATCH_READY_S if status.context else _WATCH_LOADING_S)

    def _read_keys_again(self) -> None:
        """A key that was taken out of the file opens nothing a few seconds later; deploying anew
        would not build what did not change. On nodes without the file its first keys count."""
        name = self._key_file
        # os.path's: Path.exists raises for a folder that may not be looked into.
        if self._app is None or name is None or not os.path.exists(os.path.expanduser(name)):
            return
        try:
            self._app.access = self._access.with_file(name)
        except ConfigError as error:
            _log.error("the API keys stay as they were: %s", error)


def describe_model(config: ServeConfig) -> tuple[ServedModel, Tokenizer]:
    """What the ingress must know of a model: all but its weights."""
    path = resolve_model(config.model)
    with GGUFFile.open(path) as file:
        shape = read_shape(file.metadata, config.stretch)
        tokenizer = Tokenizer.from_metadata(file.metadata)
        fingerprint = fingerprint_of(file.paths, config.stretch)
    model = ServedModel(
        name=config.served_name,
        context=config.context or shape.train_context,
        created=int(path.stat().st_mtime),
        fingerprint=fingerprint,
    )
    return model, tokenizer


def fingerprint_of(paths: tuple[Path, ...], stretch: Stretch | None = None) -> str:
    """Tells model files apart by each part's size and first MiB; reading all takes minutes. A
    stretched model is another one."""
    digest = hashlib.sha256(b"" if stretch is None else repr(stretch).encode())
    for path in paths:
        digest.update(str(path.stat().st_size).encode())
        with path.open("rb") as part:
            digest.update(part.read(1 << 20))
    return f"fp_{digest.hexdigest()[:16]}"


def build(args: dict[str, Any]) -> ServeApplication:
    """The application of `serve.yaml`: `args` are `ServeConfig`'s keys. API keys are read here, so
    that replicas on other nodes need neither the file nor the variable. Raises `ConfigError`."""
    config = load_config(args)
    options = config.model_dump()
    access = read_access(config.api_key_file, config.cors_origins)
    engine = serve.deployment(EngineReplica, name="engine", **_REPLICA)
    ingress = serve.deployment(
        serve.ingress()(Ingress), name="ingress", num_replicas=config.ingress_replicas, **_REPLICA
    )
    app: ServeApplication = ingress.bind(options, access, engine.bind(options))
    return app
