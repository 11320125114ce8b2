"""Events on their way from the engine replica to an ingress, past Ray Serve.

A request is a call through Serve, which refuses it, cancels it and knows of it while it runs; but
each piece of a stream that Serve passes on is a call of its own, milliseconds of processor time on
cores that compute the next token. So an ingress opens one socket to the engine replica, and the
events of all its requests come over that, together: a request's first at once, the following ones
ten times a second.

    feed    one ingress's socket at the replica; a frame is its length in 4 bytes and, in msgpack,
            the events of some requests

Not here: what an event means; Ray (`app.py` carries the address from one side to the other).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import socket
import threading
import time
from collections.abc import Callable

import msgspec

from actors.request import Event
from serving.resume import ReplicaGoneError

GAP_S = 0.1
"""Least time between two departures of a feed with tokens that nobody waits for most. On two cores
that also compute, ten pieces a second instead of twenty make an answer a tenth faster, and it still
reads as fluent."""

_HELLO_TIMEOUT_S = 2.0
_CONNECT_TIMEOUT_S = 5.0
_MOST_HELLO_BYTES = 256
_MOST_FRAME_BYTES = 256 << 20
# An ingress that reads nothing for so many bytes is stuck; its requests end.
_MOST_UNSENT_BYTES = 256 << 20
# A peer that acknowledges nothing for so long is gone (a pulled cable sends no end of file).
_UNACKNOWLEDGED_MS = 10_000

Bundle = list[tuple[str, list[Event]]]
"""The events of some requests, by their ids."""

_bundles = msgspec.msgpack.Decoder(Bundle)


class FeedGoneError(ReplicaGoneError):
    """The feed that a request names is none of this replica's."""


class FeedAddress(msgspec.Struct, frozen=True):
    """Where a replica's feeds begin: on its own node a Unix socket, elsewhere a TCP port."""

    node: str
    path: str
    host: str
    port: int
    secret: bytes


class _Hello(msgspec.Struct, frozen=True):
    secret: bytes
    feed: str


class Feed:
    """One ingress's socket at the replica. `put` may be called from any thread."""

    def __init__(self, writer: asyncio.StreamWriter, gap_s: float = GAP_S) -> None:
        self._writer = writer
        self._gap_s = gap_s
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._events: dict[str, list[Event]] = {}
        self._begun: set[str] = set()
        self._called = self._hurried = False
        self._next_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.lost = self._loop.create_future()

    def put(self, request_id: str, event: Event) -> None:
        """Take an event on; wakes the event loop only for one that cannot wait, or once a gap."""
        with self._lock:
            self._events.setdefault(request_id, []).append(event)
            first = request_id not in self._begun
            if first and event.tokens:
                self._begun.add(request_id)
            if event.last:
                self._begun.discard(request_id)
            hurry = first or event.last or time.monotonic() >= self._next_s
            if self._called and (self._hurried or not hurry):
                return
            self._called, self._hurried = True, hurry
        # A loop that is closed has no use for events.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._depart if hurry else self._wait)

    def forget(self, request_id: str) -> None:
        """A request is over, whatever became of it."""
        with self._lock:
            self._events.pop(request_id, None)
            self._begun.discard(request_id)

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(self._next_s - time.monotonic(), self._depart)

    def _depart(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        with self._lock:
            bundle = list(self._events.items())
            self._events.clear()
            self._called = self._hurried = False
            if any(event.tokens for _, events in bundle for event in events):
                self._next_s = time.monotonic() + self._gap_s
        if not bundle or self._writer.is_closing():
            return
        self._writer.write(_framed(msgspec.msgpack.encode(bundle)))
        if self._writer.transport.get_write_buffer_size() > _MOST_UNSENT_BYTES:
            self._writer.transport.abort()

    def lose(self) -> None:
        """The ingress is gone, or shall be."""
        if not self.lost.done():
            self.lost.set_result(None)
        self._writer.close()


class Feeds:
    """The replica's side: who may open a feed, and which are open."""

    def __init__(self, node: str, host: str) -> None:
        """`host`: this node's address for others."""
        self._node, self._host = node, host
        self._feeds: dict[str, Feed] = {}
        self._servers: list[asyncio.Server] = []
        self._address: FeedAddress | None = None
        self._lock = asyncio.Lock()

    async def address(self) -> FeedAddress:
        """Listens, from the first call on."""
        async with self._lock:
            if self._address is None:
                # Linux's abstract names leave no file behind, not even after a SIGKILL. Sockets are
                # made here because uvloop, which Serve runs, cannot spell such a name.
                path = f"\0longspan-feed-{secrets.token_hex(16)}"
                local = socket.socket(socket.AF_UNIX)
                local.bind(path)
                self._servers = [
                    await asyncio.start_unix_server(self._open, sock=local),
                    await self._listen(),
                ]
                port = self._servers[1].sockets[0].getsockname()[1]
                secret = secrets.token_bytes(32)
                self._address = FeedAddress(self._node, path, self._host, port, secret)
            return self._address

    async def _listen(self) -> asyncio.Server:
        try:
            return await asyncio.start_server(self._open, self._host, 0)
        except OSError:  # what others call this node need not be an address that it has itself
            return await asyncio.start_server(self._open, "0.0.0.0", 0)

    def get(self, name: str) -> Feed:
        """Raises `FeedGoneError` if there is none: it was opened to another replica."""
        feed = self._feeds.get(name)
        if feed is None:
            raise FeedGoneError("the engine replica was replaced; try again")
        return feed

    async def _open(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        feed, name = None, ""
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                hello = msgspec.msgpack.decode(
                    await _receive(reader, _MOST_HELLO_BYTES), type=_Hello
                )
            assert self._address is not None, "it listens"
            if hmac.compare_digest(hello.secret, self._address.secret):
                name, feed = hello.feed, Feed(writer)
                self._feeds[name] = feed
                _tune(writer)
                writer.write(_framed(b""))
                await reader.read(1)  # an ingress says no more; it ends
        except (OSError, EOFError, ValueError, TimeoutError, msgspec.MsgspecError):
            pass  # a stranger, or one that is gone
        finally:
            if feed is not None:
                del self._feeds[name]
                feed.lose()
            writer.close()

    def close(self) -> None:
        """Ends all feeds."""
        for server in self._servers:
            server.close()
        for feed in list(self._feeds.values()):
            feed.lose()


class Subscription:
    """The ingress's side of a feed: passes each request's events on to whoever asked."""

    def __init__(
        self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.name = name
        self._writer = writer
        self._sinks: dict[str, Callable[[list[Event] | None], None]] = {}
        self.alive = True
        self._reading = asyncio.get_running_loop().create_task(self._read(reader))

    @classmethod
    async def open(cls, address: FeedAddress, node: str) -> Subscription:
        """From `node`. Raises `ReplicaGoneError`."""
        name, writer = secrets.token_hex(16), None
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                reader, writer = await _connected(address, node)
                _tune(writer)
                writer.write(_framed(msgspec.msgpack.encode(_Hello(address.secret, name))))
                await _receive(reader, 0)  # it is known now
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            if writer is not None:
                writer.close()
            raise ReplicaGoneError(f"the engine replica is gone: {error}") from error
        return cls(name, reader, writer)

    def take(self, request_id: str, sink: Callable[[list[Event] | None], None]) -> None:
        """`sink` gets a request's events as they come, and None if no more can come."""
        self._sinks[request_id] = sink
        if not self.alive:
            sink(None)

    def leave(self, request_id: str) -> None:
        """Nobody waits for this request's events any more."""
        self._sinks.pop(request_id, None)

    def close(self) -> None:
        """End the feed."""
        self._reading.cancel()
        self._writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                for request_id, events in _bundles.decode(
                    await _receive(reader, _MOST_FRAME_BYTES)
                ):
                    if sink := self._sinks.get(request_id):
                        sink(events)
        except (OSError, EOFError, ValueError, msgspec.MsgspecError):
            pass  # the replica is gone, or this is none
        finally:
            self.alive = False
            self._writer.close()
            for sink in list(self._sinks.values()):
                sink(None)


async def _connected(
    address: FeedAddress, node: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """From the same node over the Unix socket. Raises `OSError`."""
    if address.node != node:
        return await asyncio.open_connection(address.host, address.port)
    with contextlib.ExitStack() as unless_opened:
        sock = unless_opened.enter_context(socket.socket(socket.AF_UNIX))
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address.path)
        opened = await asyncio.open_unix_connection(sock=sock)
        unless_opened.pop_all()
        return opened


def _framed(data: bytes) -> bytes:
    return len(data).to_bytes(4) + data


async def _receive(reader: asyncio.StreamReader, most: int) -> bytes:
    """A frame. Raises `EOFError` at the end, `ValueError` for one of more than `most` bytes."""
    size = int.from_bytes(await reader.readexactly(4))
    if size > most:
        raise ValueError(f"a frame of {size} bytes")
    return await reader.readexactly(size)


def _tune(writer: asyncio.StreamWriter) -> None:
    sock: socket.socket = writer.get_extra_info("socket")
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_KEEPIDLE, 3),
            (socket.TCP_KEEPINTVL, 1),
            (socket.TCP_KEEPCNT, 5),
            (socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS),
        ):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
