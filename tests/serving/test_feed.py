"""A feed between the engine replica and an ingress: what leaves when, strangers, and who is told
when the other side goes. Over real sockets, in one process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import pytest

from actors.request import LENGTH, Event
from serving import feed as feed_module
from serving.feed import Feed, FeedAddress, Feeds, Subscription
from sharding.batch import Choice
from sharding.errors import UnavailableError

_LONG_S = 60.0  # no test waits for it
_DONE = Event(finish_reason=LENGTH)
HERE, ELSEWHERE = "this node", "another node"


def token(number: int) -> Event:
    """An event with one token."""
    return Event(tokens=[Choice(number)])


@dataclass
class Pair:
    """Both ends of a feed, and what came: lists of events, None at the end."""

    feeds: Feeds
    address: FeedAddress
    subscription: Subscription
    feed: Feed
    came: dict[str, list[list[Event] | None]] = field(default_factory=dict)

    def take(self, request: str) -> None:
        """Ask for a request's events."""
        self.subscription.take(request, self.came.setdefault(request, []).append)

    def tokens(self, request: str) -> list[list[int]]:
        """Of each piece that came."""
        return [
            [choice.token for event in events for choice in event.tokens]
            for events in self.came[request]
            if events is not None
        ]


@asynccontextmanager
async def pair(
    node: str = HERE, requests: str = "a", gap_s: float = _LONG_S
) -> AsyncIterator[Pair]:
    """An open feed that `node` reads."""
    feeds = Feeds(HERE, "127.0.0.1")
    address = await feeds.address()
    subscription = await Subscription.open(address, node)
    opened = feeds.get(subscription.name)
    opened._gap_s = gap_s
    both = Pair(feeds, address, subscription, opened)
    for request in requests:
        both.take(request)
    try:
        yield both
    finally:
        subscription.close()
        feeds.close()
        await until(lambda: not feeds._feeds)


async def until(done: Callable[[], bool]) -> None:
    """Wait, 5 seconds at most."""
    async with asyncio.timeout(5):
        while not done():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("node", [HERE, ELSEWHERE])
def test_events_come_in_order_over_either_socket(node: str) -> None:
    async def run() -> None:
        async with pair(node, "ab", gap_s=0.0) as both:
            for number in range(50):
                both.feed.put("ab"[number % 2], token(number))
            both.feed.put("a", _DONE)
            await until(lambda: sum(map(len, both.tokens("a") + both.tokens("b"))) == 50)
            assert sum(both.tokens("a"), []) == list(range(0, 50, 2))
            assert sum(both.tokens("b"), []) == list(range(1, 50, 2))

    asyncio.run(run())


def test_first_tokens_wait_for_nobody_and_later_ones_travel_together() -> None:
    async def run() -> None:
        async with pair(requests="ab") as both:
            both.feed.put("a", Event())
            both.feed.put("a", token(1))
            await until(lambda: sum(both.tokens("a"), []) == [1])
            both.feed.put("a", token(2))  # within the gap of 1
            await asyncio.sleep(0.02)
            assert sum(both.tokens("a"), []) == [1]
            both.feed.put("b", token(3))  # b's first: it takes a's along
            await until(lambda: both.tokens("b") == [[3]])
            assert both.tokens("a")[-1] == [2]

    asyncio.run(run())


def test_the_last_event_waits_for_nobody() -> None:
    async def run() -> None:
        async with pair() as both:
            for number in (1, 2, 3):
                both.feed.put("a", token(number))
            both.feed.put("a", _DONE)
            await until(lambda: any(_DONE in (piece or []) for piece in both.came["a"]))
            assert sum(both.tokens("a"), []) == [1, 2, 3]

    asyncio.run(run())


def test_what_waits_leaves_after_the_gap() -> None:
    async def run() -> None:
        async with pair(gap_s=0.05) as both:
            both.feed.put("a", token(1))
            await until(lambda: both.tokens("a") == [[1]])
            for number in (2, 3, 4):
                both.feed.put("a", token(number))
            await until(lambda: both.tokens("a") == [[1], [2, 3, 4]])
            await asyncio.sleep(0.1)  # and after a silence at once
            both.feed.put("a", token(5))
            await until(lambda: both.tokens("a")[-1] == [5])

    asyncio.run(run())


def test_events_from_the_engines_thread_all_arrive() -> None:
    async def run() -> None:
        async with pair(requests="abc", gap_s=0.001) as both:

            def engine() -> None:
                for number in range(3000):
                    both.feed.put("abc"[number % 3], token(number))

            thread = threading.Thread(target=engine)
            thread.start()
            await until(lambda: sum(len(t) for r in "abc" for t in both.tokens(r)) == 3000)
            thread.join()

    asyncio.run(run())


def test_a_replica_whose_name_is_not_its_address_serves_its_own_node() -> None:
    async def run() -> None:
        feeds = Feeds(HERE, "203.0.113.7")
        subscription = await Subscription.open(await feeds.address(), HERE)
        assert feeds.get(subscription.name) is not None
        subscription.close()
        feeds.close()
        await until(lambda: not feeds._feeds)

    asyncio.run(run())


def test_an_ingress_that_goes_is_noticed() -> None:
    async def run() -> None:
        async with pair() as both:
            both.subscription.close()
            async with asyncio.timeout(5):
                await both.feed.lost
            with pytest.raises(UnavailableError):
                both.feeds.get(both.subscription.name)
            both.feed.put("a", token(1))  # to nobody

    asyncio.run(run())


def test_a_replica_that_goes_ends_every_request() -> None:
    async def run() -> None:
        async with pair(requests="ab") as both:
            both.feed._writer.transport.abort()
            await until(lambda: both.came == {"a": [None], "b": [None]})
            assert not both.subscription.alive
            both.take("c")  # too late
            assert both.came["c"] == [None]
            both.feeds.close()
            with pytest.raises(UnavailableError):
                gone = msgspec.structs.replace(both.address, path=both.address.path + "?")
                await Subscription.open(gone, HERE)

    asyncio.run(run())


@pytest.mark.parametrize(
    "said", [b"", b"\0\0\0\x05hello", b"\xff\xff\xff\xff", b"GET / HTTP/1.1\r\n\r\n"]
)
def test_strangers_get_nothing(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "_HELLO_TIMEOUT_S", 0.05)

    async def run() -> None:
        async with pair() as both:
            reader, writer = await asyncio.open_connection(both.address.host, both.address.port)
            writer.write(said)
            async with asyncio.timeout(5):
                assert await reader.read() == b""
            writer.close()
            wrong = msgspec.structs.replace(both.address, secret=b"x" * 32)
            with pytest.raises(UnavailableError):
                await Subscription.open(wrong, HERE)
            both.feed.put("a", token(1))  # the feed lives on
            await until(lambda: both.tokens("a") == [[1]])

    asyncio.run(run())


def test_an_ingress_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "_MOST_UNSENT_BYTES", 1 << 20)

    async def run() -> None:
        feeds = Feeds(HERE, "127.0.0.1")
        address = await feeds.address()
        with socket.create_connection((address.host, address.port)) as idle:
            hello = msgspec.msgpack.encode({"secret": address.secret, "feed": "idle"})
            idle.sendall(len(hello).to_bytes(4) + hello)
            await until(lambda: "idle" in feeds._feeds)
            feed = feeds.get("idle")
            feed._gap_s = 0.0
            many = Event(tokens=[Choice(1, -1.0, [(2, -2.0)] * 100)] * 1000)
            for _ in range(200):
                feed.put("a", many)
                await asyncio.sleep(0)
                if feed.lost.done():
                    break
            async with asyncio.timeout(5):
                await feed.lost
        feeds.close()
        await until(lambda: not feeds._feeds)

    asyncio.run(run())
