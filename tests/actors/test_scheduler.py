"""The scheduler's decisions, seen in its batches and in the events that requests hear."""

from __future__ import annotations

from collections import deque
from functools import partial
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from actors.request import Event, GenerateRequest
from actors.scheduler import LEAST_CHUNK, MOST_PASSING, Limits, Scheduler
from sharding.batch import (
    PAGE_SLOTS,
    Batch,
    Choice,
    Result,
    SamplingParams,
    Segment,
    SegmentResult,
)
from sharding.errors import BusyError, ContextLengthError


def ask(name: str, prompt: int, answer: int, stop: int | None = None) -> GenerateRequest:
    """A request whose prompt begins like no other's."""
    stops, first = () if stop is None else (stop,), crc32(name.encode())
    tokens = list(range(first, first + prompt))
    return GenerateRequest(name, tokens, answer, SamplingParams(stop_ids=stops))


def drive(scheduler: Scheduler, token: int = 7, steps: int = 1000) -> list[Batch]:
    """Run batches one at a time until nothing is left to do; every draw gives `token`."""
    batches: list[Batch] = []
    while (batch := scheduler.next_step()) is not None and len(batches) < steps:
        batches.append(batch)
        scheduler.apply(batch, answer(batch, token))
    return batches


def answer(batch: Batch, token: int = 7) -> Result:
    """What a last stage would say."""
    return Result(
        batch.step,
        [
            SegmentResult(segment.request, Choice(token) if segment.sample else None)
            for segment in batch.segments
        ],
    )


def test_a_long_prompt_enters_in_chunks_and_only_the_last_draws() -> None:
    scheduler = Scheduler(Limits(context=2048, pages=128, in_flight=1))
    scheduler.submit(ask("a", 1100, 1), lambda event: None)
    segments = [batch.segments[0] for batch in drive(scheduler) if batch.segments]
    assert [(s.start, len(s.tokens), s.sample) for s in segments] == [
        (0, 512, False),
        (512, 512, False),
        (1024, 76, True),
    ]


def test_chunks_of_one_prompt_are_in_flight_together() -> None:
    """A prompt alone must keep every stage busy: its next chunk does not wait for the last one."""
    scheduler = Scheduler(Limits(context=2048, pages=128, in_flight=3))
    scheduler.submit(ask("a", 1500, 1), lambda event: None)
    flying = [scheduler.next_step() for _ in range(3)]
    assert [batch.segments[0].start for batch in flying if batch] == [0, 512, 1024]


def test_decoding_requests_are_divided_over_the_batches_in_flight() -> None:
    """One batch of all of them would leave every stage but one idle."""
    scheduler = Scheduler(Limits(context=64, pages=64, in_flight=2))
    for name in "abcdef":
        scheduler.submit(ask(name, 4, 8), lambda event: None)
    first = scheduler.next_step()
    assert first is not None
    scheduler.apply(first, answer(first))
    groups = [scheduler.next_step(), scheduler.next_step()]
    assert [len(batch.segments) for batch in groups if batch] == [3, 3]
    assert scheduler.next_step() is None, "each request has a token in flight"


def test_a_request_waits_until_its_whole_answer_has_kv() -> None:
    scheduler = Scheduler(Limits(context=64, pages=4, in_flight=1))
    scheduler.submit(ask("a", 16, 32), lambda event: None)
    scheduler.submit(ask("b", 16, 16), lambda event: None)
    batch = scheduler.next_step()
    assert batch is not None
    assert [len(opened.pages) for opened in batch.opened] == [3]
    assert (scheduler.running, scheduler.waiting) == (1, 1)
    scheduler.apply(batch, answer(batch))
    drive(scheduler)
    assert scheduler.running == scheduler.waiting == 0
    scheduler.check_integrity()


def test_cancel_frees_pages_at_once_and_tells_every_stage() -> None:
    scheduler = Scheduler(Limits(context=64, pages=4, in_flight=1))
    events: list[Event] = []
    scheduler.submit(ask("a", 16, 48), events.append)
    first = scheduler.next_step()
    assert first is not None
    scheduler.cancel("a")
    assert scheduler.pool.free == 4
    closing = scheduler.next_step()
    assert closing is not None
    assert closing.closed == [first.opened[0].request]
    scheduler.apply(first, answer(first))
    assert len(events) == 1, "a late result must not reach a cancelled request"


def test_a_stop_token_ends_the_answer_and_is_reported() -> None:
    scheduler = Scheduler(Limits(context=64, pages=4, in_flight=1))
    events: list[Event] = []
    scheduler.submit(ask("a", 4, 8, stop=7), events.append)
    drive(scheduler, token=7)
    assert events[-1].finish_reason == "stop"
    assert [choice.token for event in events for choice in event.tokens] == [7]


def test_a_request_that_can_never_run_is_refused_with_both_numbers() -> None:
    scheduler = Scheduler(Limits(context=64, pages=100, in_flight=1))
    with pytest.raises(ContextLengthError, match=r"64 tokens, but 70 .* 60 in the prompt and 10"):
        scheduler.submit(ask("a", 60, 10), lambda event: None)
    scheduler.check_integrity()


def test_too_many_waiting_requests_are_refused() -> None:
    scheduler = Scheduler(Limits(context=64, pages=2, in_flight=1, max_waiting=2))
    for name in "ab":
        scheduler.submit(ask(name, 4, 4), lambda event: None)
    with pytest.raises(BusyError):
        scheduler.submit(ask("c", 4, 4), lambda event: None)


def test_what_another_engine_accepted_may_wait_however_many_do() -> None:
    """Its client has had a part of the answer."""
    scheduler = Scheduler(Limits(context=64, pages=2, in_flight=1, max_waiting=2))
    for name in "ab":
        scheduler.submit(ask(name, 4, 4), lambda event: None)
    scheduler.submit(replace(ask("c", 4, 4), accepted=True), lambda event: None)
    assert scheduler.waiting == 3


def test_a_burst_that_memory_holds_is_not_refused() -> None:
    """All of it is admitted by the next step, which may be a long one away."""
    scheduler = Scheduler(Limits(context=64, pages=12, in_flight=1, max_waiting=2))
    for number in range(12):
        scheduler.submit(ask(str(number), 4, 4), lambda event: None)
    with pytest.raises(BusyError):
        scheduler.submit(ask("one more", 4, 4), lambda event: None)
    scheduler.next_step()
    assert (scheduler.running, scheduler.waiting) == (12, 0)


@pytest.mark.parametrize("chunk", [LEAST_CHUNK, 3, 8])
def test_prompts_are_read_however_many_answer(chunk: int) -> None:
    scheduler = Scheduler(Limits(context=4096, pages=1024, in_flight=1, chunk=chunk))
    for number in range(12):
        scheduler.submit(ask(str(number), 1, 900), lambda event: None)
    drive(scheduler, steps=40)
    heard: list[Event] = []
    scheduler.submit(ask("question", 10, 1), heard.append)
    drive(scheduler, steps=10)
    assert sum(len(event.tokens) for event in heard) == 1


def test_a_failed_batch_ends_its_requests_and_no_others() -> None:
    scheduler = Scheduler(Limits(context=64, pages=8, in_flight=1))
    events: dict[str, list[Event]] = {"a": [], "b": []}
    scheduler.submit(ask("a", 4, 4), events["a"].append)
    batch = scheduler.next_step()
    scheduler.submit(ask("b", 4, 4), events["b"].append)
    assert batch is not None
    scheduler.apply(batch, Result(batch.step, error="stage 1: out of memory"))
    drive(scheduler)
    assert events["a"][-1].error == "stage 1: out of memory"
    assert events["b"][-1].finish_reason == "length"
    scheduler.check_integrity()


def test_losing_the_pipeline_ends_all_with_an_error() -> None:
    scheduler = Scheduler(Limits(context=64, pages=4, in_flight=1))
    events: list[Event] = []
    for name in "abc":
        scheduler.submit(ask(name, 30, 4), events.append)
    scheduler.next_step()
    scheduler.fail_all("a stage died")
    assert [event.error for event in events if event.last] == ["a stage died"] * 3
    scheduler.check_integrity()
    assert scheduler.next_step() is None


def first_tokens(prompts: dict[str, int], chunk: int = 64) -> list[str]:
    """Names in the order in which they hear their first tokens."""
    scheduler = Scheduler(Limits(context=4096, pages=1024, in_flight=2, chunk=chunk))
    order: list[str] = []

    def hear(name: str, event: Event) -> None:
        if event.tokens:
            order.append(name)

    for name, prompt in prompts.items():
        scheduler.submit(ask(name, prompt, 1), partial(hear, name))
    drive(scheduler)
    return order


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    assert first_tokens({"book": 2000, "question": 10, "letter": 300})[:2] == ["question", "letter"]


def test_equal_prompts_are_read_one_after_the_other() -> None:
    """Side by side all would be late."""
    assert first_tokens(dict.fromkeys("abcd", 500)) == ["a", "b", "c", "d"]


def test_short_prompts_without_end_take_half_of_the_budget_at_most() -> None:
    scheduler = Scheduler(Limits(context=4096, pages=1024, in_flight=1, chunk=64))
    heard: list[Event] = []
    scheduler.submit(ask("book", 2000, 1), heard.append)
    for step in range(2000 // 32 + 1):
        for number in range(8):
            scheduler.submit(ask(f"{step} {number}", 60, 0), lambda event: None)
        batch = scheduler.next_step()
        assert batch is not None
        scheduler.apply(batch, answer(batch))
    assert sum(len(event.tokens) for event in heard) == 1


def test_steps_are_short_in_time_while_others_answer() -> None:
    """What the reader of an answer feels is how long the steps before its next token take, and a
    prompt's tokens take the longer the deeper they are."""
    limits = Limits(context=8192, pages=1024, in_flight=1, chunk=512, even_depth=1000)

    def seconds(segment: Segment) -> float:
        return len(segment.tokens) * 0.001 * (1 + segment.start / 1000)

    def chunks(answers: int) -> list[tuple[int, float]]:
        """Tokens and time of each of the book's."""
        scheduler = Scheduler(limits)
        scheduler.submit(ask("answer", 1, 1 + answers), lambda event: None)
        scheduler.submit(ask("book", 7900, 0), lambda event: None)
        found = []
        while (batch := scheduler.next_step()) is not None:
            times = [seconds(segment) for segment in batch.segments]
            result = answer(batch)
            result.stage_s[:] = [0.001, sum(times)]
            scheduler.apply(batch, result)
            sizes = [len(segment.tokens) for segment in batch.segments]
            found += [each for each in zip(sizes, times, strict=True) if each[0] > 1]
        return found

    assert {size for size, _ in chunks(0)[1:-1]} == {512}
    _, *beside = chunks(240)
    assert max(time for _, time in beside) < 0.4
    assert beside[0][0] > 2 * beside[-2][0], "deep in the book fewer tokens take as long"
    assert min(size for size, _ in beside[:-1]) >= 512 // 16


def test_many_short_prompts_share_a_step() -> None:
    """What a token takes is the step's time over all of its tokens, not over some of them."""
    scheduler = Scheduler(Limits(context=4096, pages=1024, in_flight=1, chunk=512))
    scheduler.submit(ask("answer", 1, 200), lambda event: None)
    sizes = []
    for step in range(12):
        for number in range(20):
            scheduler.submit(ask(f"{step} {number}", 15 + (number == 0), 0), lambda event: None)
        batch = scheduler.next_step()
        assert batch is not None
        sizes.append(sum(len(segment.tokens) for segment in batch.segments))
        result = answer(batch)
        result.stage_s[:] = [0.0003 * sizes[-1]]
        scheduler.apply(batch, result)
    assert min(sizes[1:]) >= 300


@pytest.mark.parametrize("chunk", [16, 128, 512])
def test_one_slow_step_does_not_make_all_later_ones_small(chunk: int) -> None:
    scheduler = Scheduler(Limits(context=32768, pages=4096, in_flight=1, chunk=chunk))
    scheduler.submit(ask("answer", 1, 4000), lambda event: None)
    scheduler.submit(ask("book", 32768, 0), lambda event: None)
    sizes: list[int] = []
    while (batch := scheduler.next_step()) is not None and len(sizes) < 40:
        sizes.append(sum(len(segment.tokens) for segment in batch.segments))
        result = answer(batch)
        result.stage_s[:] = [60.0 if len(sizes) == 3 else 0.002 + 0.0002 * sizes[-1]]
        scheduler.apply(batch, result)
    assert min(sizes[3:]) < chunk / 2, "the slow step was noticed"
    assert sizes[-1] == chunk


def test_small_requests_pass_one_that_waits_for_memory_but_not_for_ever() -> None:
    scheduler = Scheduler(Limits(context=160, pages=10, in_flight=1))
    admitted: list[str] = []

    def hear(name: str, event: Event) -> None:
        if event.tokens:
            admitted.append(name)

    def submit(name: str, tokens: int) -> None:
        scheduler.submit(ask(name, 1, tokens), partial(hear, name))

    submit("holds half", 79)
    submit("wants all", 159)
    for number in range(100):
        submit(f"small {number}", 1)
    for _ in range(60):
        batch = scheduler.next_step()
        assert batch is not None
        scheduler.apply(batch, answer(batch))
    assert "small 0" in admitted and "wants all" not in admitted, "there was room for the small"
    drive(scheduler)
    order = list(dict.fromkeys(admitted))
    assert order.index("wants all") <= MOST_PASSING + 1


requests = st.tuples(st.integers(1, 90), st.integers(0, 20), st.booleans())


@given(
    asked=st.lists(requests, min_size=1, max_size=12),
    in_flight=st.integers(1, 4),
    pages=st.integers(8, 20),
    chunk=st.integers(1, 40),
    ring=st.integers(0, 3),
)
def test_any_mix_of_requests_runs_to_its_end(
    asked: list[tuple[int, int, bool]], in_flight: int, pages: int, chunk: int, ring: int
) -> None:
    """Each gets its tokens in order, no batch is over its budget, no page is left behind; also
    where layers with a window have pages of their own."""
    window_pages = max(ring, pages // 4) if ring else 0
    limits = Limits(
        PAGE_SLOTS * 8, pages, in_flight, chunk=chunk, window_pages=window_pages, ring=ring
    )
    scheduler = Scheduler(limits)
    events: dict[str, list[Event]] = {}
    cancelled = set()
    for number, (prompt, tokens, cancel) in enumerate(asked):
        name = str(number)
        events[name] = []
        scheduler.submit(ask(name, prompt, tokens), events[name].append)
        if cancel:
            cancelled.add(name)
    flying: deque[Batch] = deque()
    seen: dict[int, int] = {}
    for _ in range(10_000):
        while len(flying) < in_flight and (batch := scheduler.next_step()) is not None:
            assert batch.n_tokens <= chunk
            for segment in batch.segments:
                assert segment.start == seen.get(segment.request, 0), "a gap in the KV"
                seen[segment.request] = segment.start + len(segment.tokens)
            flying.append(batch)
        scheduler.check_integrity()
        if not flying:
            break
        batch = flying.popleft()
        scheduler.apply(batch, answer(batch))
        while cancelled:
            scheduler.cancel(cancelled.pop())
    assert not flying, "it never came to an end"
    assert scheduler.running == scheduler.waiting == 0
    for number, (_, tokens, cancel) in enumerate(asked):
        if not cancel:
            heard = events[str(number)]
            assert sum(len(event.tokens) for event in heard) == tokens
            assert heard[-1].finish_reason == "length"
