"""Events from the engine's thread to an answer: at once when they are rare, together when not."""

from __future__ import annotations

import asyncio
import threading
import time

from actors.request import LENGTH, Event
from serving.outbox import Outbox
from sharding.batch import Choice

_LONG_S = 60.0  # no test waits for it
_DONE = Event(finish_reason=LENGTH)


def token(number: int) -> Event:
    """An event with one token."""
    return Event(tokens=[Choice(number)])


def numbers(events: list[Event]) -> list[int]:
    """The tokens of events."""
    return [choice.token for event in events for choice in event.tokens]


def test_the_first_token_waits_for_nobody() -> None:
    async def run() -> None:
        outbox = Outbox(_LONG_S)
        outbox.put(Event())
        assert await outbox.take() == [Event()]
        outbox.put(token(1))
        assert numbers(await outbox.take()) == [1]

    asyncio.run(run())


def test_tokens_that_come_before_the_gap_is_over_travel_together() -> None:
    async def run() -> None:
        outbox = Outbox(0.05)
        outbox.put(token(1))
        assert numbers(await outbox.take()) == [1]
        taken = asyncio.create_task(outbox.take())
        for number in (2, 3, 4):
            await asyncio.sleep(0)
            outbox.put(token(number))
        assert numbers(await taken) == [2, 3, 4]

    asyncio.run(run())


def test_after_the_gap_a_token_leaves_at_once() -> None:
    async def run() -> None:
        outbox = Outbox(0.01)
        for number in range(3):
            outbox.put(token(number))
            assert numbers(await outbox.take()) == [number]
            await asyncio.sleep(0.02)

    asyncio.run(run())


def test_the_last_event_does_not_wait_for_the_gap() -> None:
    async def run() -> None:
        outbox = Outbox(_LONG_S)
        outbox.put(token(1))
        await outbox.take()
        outbox.put(token(2))
        taken = asyncio.create_task(outbox.take())
        await asyncio.sleep(0.01)
        assert not taken.done()
        outbox.put(_DONE)
        events = await asyncio.wait_for(taken, 5)
        assert numbers(events) == [2] and events[-1].last

    asyncio.run(run())


def test_events_of_another_thread_arrive_complete_and_in_order() -> None:
    count = 5000

    async def run() -> list[int]:
        outbox = Outbox(0.001)

        def engine() -> None:
            for number in range(count):
                outbox.put(token(number))
                if number % 500 == 0:
                    time.sleep(0.002)
            outbox.put(_DONE)

        thread = threading.Thread(target=engine)
        thread.start()
        found: list[int] = []
        last = False
        while not last:
            events = await asyncio.wait_for(outbox.take(), 5)
            found += numbers(events)
            last = events[-1].last
        thread.join()
        return found

    assert asyncio.run(run()) == list(range(count))
