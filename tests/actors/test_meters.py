"""What requests took: counted from their events, by a clock that the test turns."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.meters import Histogram, Meters
from actors.request import Event, GenerateRequest
from sharding.batch import Choice

REQUEST = GenerateRequest("r", [5] * 100, 10)


class Clock:
    """Stands still until it is turned."""

    now = 50.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.floats(0, 20), max_size=50))
def test_a_histogram_counts_every_value_once_at_its_bound(values: list[float]) -> None:
    histogram = Histogram([1.0, 4.0, 10.0])
    for value in values:
        histogram.add(value)
    found = histogram.snapshot()
    lower = [-math.inf, 1.0, 4.0, 10.0]
    upper = [1.0, 4.0, 10.0, math.inf]
    expected = [
        sum(above < value <= most for value in values)
        for above, most in zip(lower, upper, strict=True)
    ]
    assert found.counts == expected
    assert found.total == pytest.approx(sum(values))


def test_times_are_from_arrival_to_the_first_token_and_from_token_to_token() -> None:
    clock = Clock()
    meters = Meters(clock)
    heard: list[Event] = []
    sink = meters.watch(REQUEST, heard.append)
    events = [
        (0.0, Event()),
        (2.0, Event(prompt_done=50)),
        (2.0, Event([Choice(1)], prompt_done=100)),
        (0.5, Event([Choice(2)])),
        (1.5, Event([Choice(3), Choice(4), Choice(5)], finish_reason="length")),
    ]
    for passed, event in events:
        clock.now += passed
        sink(event)
    assert heard == [event for _, event in events], "all of it reaches the request"
    found = meters.snapshot()
    assert (sum(found.first_token_s.counts), found.first_token_s.total) == (1, 4.0)
    assert (sum(found.gap_s.counts), found.gap_s.total) == (4, 2.0)
    assert (sum(found.request_s.counts), found.request_s.total) == (1, 6.0)
    assert (found.prompt_tokens.total, found.drawn_tokens.total) == (100, 5)
    assert found.outcomes == {"length": 1}


def test_an_error_and_a_cancellation_are_outcomes_too() -> None:
    meters = Meters(Clock())
    meters.watch(REQUEST, lambda event: None)(Event(error="a stage died"))
    meters.watch(REQUEST, lambda event: None)(Event())
    meters.cancel()
    meters.refuse("busy")
    found = meters.snapshot()
    assert found.outcomes == {"error": 1, "cancelled": 1}
    assert found.refused == {"busy": 1}


def test_what_another_engine_began_has_no_first_token_here() -> None:
    clock = Clock()
    meters = Meters(clock)
    request = GenerateRequest("r", [5] * 100, 10, drawn=[1, 2], accepted=True)
    sink = meters.watch(request, lambda event: None)
    for event in (Event(), Event([Choice(3)]), Event([Choice(4)], finish_reason="length")):
        clock.now += 1.0
        sink(event)
    found = meters.snapshot()
    assert sum(found.first_token_s.counts) == sum(found.prompt_tokens.counts) == 0
    assert (found.gap_s.total, found.outcomes) == (1.0, {"length": 1})


def test_a_request_that_is_refused_has_no_prompt() -> None:
    meters = Meters(Clock())
    meters.watch(REQUEST, lambda event: None)
    assert sum(meters.snapshot().prompt_tokens.counts) == 0
