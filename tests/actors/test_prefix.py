"""Requests that begin alike: what the second need not compute, and that it reads the right KV."""

from __future__ import annotations

from collections import deque
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from actors.request import Event, GenerateRequest
from actors.scheduler import Limits, Scheduler
from sharding.batch import PAGE_SLOTS, Batch, Result, SamplingParams
from tests.actors.kv_memory import Memory
from tests.actors.test_scheduler import answer, drive

BOOK = list(range(1000, 1000 + 20 * PAGE_SLOTS))


def ask(name: str, prompt: list[int], answer: int = 1) -> GenerateRequest:
    return GenerateRequest(name, prompt, answer)


def run(scheduler: Scheduler, request: GenerateRequest, token: int = 7) -> list[Event]:
    """A request alone, to its end."""
    events: list[Event] = []
    scheduler.submit(request, events.append)
    drive(scheduler, token)
    scheduler.check_integrity()
    assert events[-1].last and events[-1].error is None
    return events


def wide(in_flight: int = 1, pages: int = 256, chunk: int = 64) -> Scheduler:
    return Scheduler(Limits(context=4096, pages=pages, in_flight=in_flight, chunk=chunk))


def test_a_second_question_about_a_book_reads_only_the_question() -> None:
    scheduler = wide()
    first = run(scheduler, ask("first", [*BOOK, 1, 2, 3]))
    assert first[-1].cached_tokens == 0
    second = run(scheduler, ask("second", [*BOOK, 4, 5, 6, 7]))
    assert second[-1].cached_tokens == len(BOOK)
    assert scheduler.prompt_tokens == len(BOOK) + 3 + 4
    assert scheduler.cached_tokens == len(BOOK)


def test_the_next_turn_of_a_conversation_reads_only_what_is_new() -> None:
    """The answer's tokens but the last are in the KV too."""
    scheduler, memory = wide(), Memory()
    texts = {1: list(BOOK)}
    scheduler.submit(ask("turn 1", BOOK, 60), partial(note, [], texts[1], "turn 1"))
    while (batch := scheduler.next_step()) is not None:
        scheduler.apply(batch, memory.run(batch, texts))
    assert len(set(texts[1][len(BOOK) :])) > 16, "not one token again and again"
    turn = run(scheduler, ask("turn 2", [*texts[1], 1, 2, 3]))
    assert turn[-1].cached_tokens == len(BOOK) + 59 // PAGE_SLOTS * PAGE_SLOTS


def test_who_waits_for_memory_is_admitted_once_enough_of_its_prompt_is_there() -> None:
    """Nothing became free: the one that runs computes what both begin with."""
    scheduler = wide(pages=30)
    ended: list[str] = []
    for name, tokens in (("first", 100), ("second", 8)):
        request = ask(name, [*BOOK, tokens], tokens)
        scheduler.submit(request, partial(note, ended, [], name))
    batch = scheduler.next_step()
    assert batch is not None and (scheduler.running, scheduler.waiting) == (1, 1)
    scheduler.apply(batch, answer(batch))
    drive(scheduler)
    assert ended == ["second", "first"]


@pytest.mark.parametrize("more", [0, 1])
def test_the_last_token_of_a_prompt_is_always_computed(more: int) -> None:
    """Its logits are what the answer is drawn from."""
    scheduler = wide()
    prompt = [*BOOK, *[1] * more]
    run(scheduler, ask("first", prompt))
    events = run(scheduler, ask("second", prompt))
    assert events[-1].cached_tokens == (len(prompt) - 1) // PAGE_SLOTS * PAGE_SLOTS
    assert sum(len(event.tokens) for event in events) == 1


def test_choices_of_one_prompt_read_it_once() -> None:
    """All come at the same moment; the others wait for what the first computes."""
    scheduler = wide(in_flight=3)
    heard: dict[str, list[Event]] = {name: [] for name in "abcd"}
    for name, events in heard.items():
        scheduler.submit(ask(name, [*BOOK, 1, 2], 3), events.append)
    batches = fly(scheduler, 3)
    assert sum(batch.n_tokens for batch in batches) == len(BOOK) + 4 * 2 + 4 * 2
    assert [events[-1].cached_tokens for events in heard.values()] == [0] + [len(BOOK)] * 3


def test_choices_of_one_prompt_that_fit_into_one_step_read_it_once_too() -> None:
    """What none of them needs to read leaves room for others in that step."""
    scheduler = wide(chunk=512)
    for name in "abc":
        scheduler.submit(ask(name, BOOK[:130]), lambda event: None)
    scheduler.submit(ask("another", list(range(400))), lambda event: None)
    sizes = [[len(at.tokens) for at in batch.segments] for batch in drive(scheduler)]
    assert sizes[:2] == [[130, 382], [2, 2, 18]]


def test_a_few_tokens_are_not_worth_waiting_for() -> None:
    """The second one begins with the first, not a step later."""
    scheduler = wide(chunk=512)
    for name in "ab":
        scheduler.submit(ask(name, BOOK[:50]), lambda event: None)
    batch = scheduler.next_step()
    assert batch is not None and [len(at.tokens) for at in batch.segments] == [50, 50]


def fly(scheduler: Scheduler, depth: int) -> list[Batch]:
    """Run to the end with so many batches in flight."""
    batches: list[Batch] = []
    flying: deque[Batch] = deque()
    while True:
        while len(flying) < depth and (batch := scheduler.next_step()) is not None:
            flying.append(batch)
        if not flying:
            scheduler.check_integrity()
            return batches
        batches.append(flying.popleft())
        scheduler.apply(batches[-1], answer(batches[-1]))


def test_shared_pages_leave_room_for_more_requests() -> None:
    """Memory for one book and a half holds many questions about it."""
    scheduler = wide(pages=30)
    run(scheduler, ask("first", BOOK))
    for number in range(4):
        scheduler.submit(ask(str(number), [*BOOK, number], 8), lambda event: None)
    scheduler.next_step()
    assert (scheduler.running, scheduler.waiting) == (4, 0)


def test_a_request_goes_on_alone_when_the_one_it_waited_for_is_cancelled() -> None:
    scheduler = wide()
    events: list[Event] = []
    scheduler.submit(ask("first", [*BOOK, 1]), lambda event: None)
    scheduler.submit(ask("second", [*BOOK, 2]), events.append)
    for _ in range(2):
        batch = scheduler.next_step()
        assert batch is not None and len(batch.segments) == 1
        scheduler.apply(batch, answer(batch))
    scheduler.cancel("first")
    drive(scheduler)
    assert events[-1].finish_reason == "length"
    assert events[-1].cached_tokens == 2 * 64
    scheduler.check_integrity()


def test_nobody_waits_for_a_request_that_others_hold_up() -> None:
    """Who begins like a prompt that has begun waits for its pages, but not once shorter ones take
    what that could have had."""
    scheduler = wide()
    ended: list[str] = []

    def submit(name: str, prompt: list[int]) -> None:
        scheduler.submit(ask(name, prompt), lambda event: ended.extend([name] * event.last))

    def step() -> None:
        batch = scheduler.next_step()
        assert batch is not None
        scheduler.apply(batch, answer(batch))

    submit("slow", list(range(5000, 8000)))
    submit("begun", BOOK)
    step()
    submit("short", BOOK[:160])
    for turn in range(8):
        for number in range(8):
            first = 10_000 * (8 * turn + number + 1)
            submit(f"other {first}", list(range(first, first + 200)))
        step()
    assert "short" in ended and "begun" not in ended


@pytest.mark.parametrize(
    "request_",
    [
        GenerateRequest("second", [*BOOK, 2], 1, cached=False),
        GenerateRequest("second", [*BOOK, 2], 1, cache_salt="another user"),
        GenerateRequest("second", [*BOOK, 2], 0, prompt_logprobs=0),
        GenerateRequest("second", [2, *BOOK], 1),
    ],
    ids=["unwanted", "another salt", "every token is scored", "another beginning"],
)
def test_what_may_not_be_shared_is_read_whole(request_: GenerateRequest) -> None:
    scheduler = wide()
    run(scheduler, ask("first", [*BOOK, 1]))
    assert run(scheduler, request_)[-1].cached_tokens == 0
    assert scheduler.prompt_tokens == 2 * (len(BOOK) + 1)


def test_equal_salts_share() -> None:
    scheduler = wide()
    for name, cached in (("first", 0), ("second", len(BOOK))):
        request = GenerateRequest(name, [*BOOK, 1], 1, cache_salt="a user")
        assert run(scheduler, request)[-1].cached_tokens == cached


def test_the_cache_can_be_switched_off() -> None:
    scheduler = Scheduler(Limits(4096, 256, in_flight=1, chunk=64, prefix_cache=False))
    for name in ("first", "second"):
        assert run(scheduler, ask(name, [*BOOK, 1], 40))[-1].cached_tokens == 0
    assert (scheduler.pool.kept, scheduler.cached_tokens) == (0, 0)


def test_nothing_is_left_of_a_pipeline_that_was_lost() -> None:
    scheduler = wide()
    run(scheduler, ask("first", [*BOOK, 1]))
    scheduler.fail_all("a stage died")
    assert run(scheduler, ask("second", [*BOOK, 2]))[-1].cached_tokens == 0


def test_a_batch_that_failed_leaves_no_kv() -> None:
    """Also not the later chunks of the same prompt that were in flight behind it."""
    scheduler = wide(in_flight=3)
    scheduler.submit(ask("first", [*BOOK, 1]), lambda event: None)
    flying = [scheduler.next_step() for _ in range(3)]
    results = [answer(batch) for batch in flying if batch]
    results[1] = Result(results[1].step, error="no memory")
    for batch, result in zip(flying, results, strict=True):
        assert batch is not None
        scheduler.apply(batch, result)
    assert run(scheduler, ask("second", [*BOOK, 2]))[-1].cached_tokens == 64


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        (SamplingParams(), False),
        (SamplingParams(presence_penalty=1.0, frequency_penalty=1.0), False),
        (SamplingParams(repetition_penalty=1.1), True),
    ],
    ids=["none", "of the answer only", "of the prompt too"],
)
def test_a_penalty_knows_the_tokens_that_are_not_computed(
    sampling: SamplingParams, told: bool
) -> None:
    """Stages count what passes them; of the rest they hear what the penalty looks at, and in a bit
    for each token of the vocabulary: a prompt may have a million."""
    scheduler = wide()
    run(scheduler, ask("first", [*BOOK, 1]))
    scheduler.submit(GenerateRequest("second", [*BOOK, 2], 1, sampling), lambda event: None)
    (opened,) = [opened for batch in drive(scheduler) for opened in batch.opened]
    bits = int.from_bytes(opened.seen, "little")
    assert {at for at in range(bits.bit_length()) if bits >> at & 1} == set(BOOK if told else [])
    assert opened.drawn == []


def test_progress_begins_behind_what_was_there() -> None:
    scheduler = wide()
    run(scheduler, ask("first", BOOK))
    events = run(scheduler, ask("second", BOOK * 2))
    assert [event.prompt_done for event in events[1:3]] == [len(BOOK) + 64, len(BOOK) + 128]


def test_a_model_with_windows_goes_on_in_the_ring_of_the_last_turn() -> None:
    limits = Limits(
        4096, 256, in_flight=1, chunk=64, window_pages=40, ring=8, window=4 * PAGE_SLOTS
    )
    scheduler, memory = Scheduler(limits), Memory(window=4 * PAGE_SLOTS)
    prompts: dict[int, list[int]] = {}
    turns = [BOOK, [*BOOK, *[7] * 20, 1, 2, 3], [*BOOK, *[7] * 20, 1, 2, 3, *[7] * 20, 4]]
    cached = []
    for number, prompt in enumerate(turns, 1):
        events: list[Event] = []
        scheduler.submit(ask(str(number), prompt, 20), events.append)
        prompts[number] = prompt
        while (batch := scheduler.next_step()) is not None:
            memory.run(batch, prompts)
            scheduler.apply(batch, answer(batch))
        cached.append(events[-1].cached_tokens)
    assert cached == [0, len(BOOK) + PAGE_SLOTS, len(BOOK) + 2 * PAGE_SLOTS]


turns = st.tuples(
    st.lists(st.integers(0, 2), min_size=1, max_size=6),  # pages of three kinds: many begin alike
    st.integers(0, 17),  # tokens that fill no page
    st.integers(0, 20),  # to draw
    st.integers(0, 9),  # when it is cancelled, 0: never
    st.integers(-1, 12),  # whose text it goes on with, if that is there
    st.integers(0, 40),  # how much of that it leaves out
)


@settings(max_examples=150)
@given(
    asked=st.lists(turns, min_size=2, max_size=14),
    in_flight=st.integers(1, 4),
    pages=st.integers(12, 40),
    chunk=st.integers(2, 70),
    window=st.one_of(st.just(0), st.integers(1, 40)),
    faults=st.dictionaries(st.integers(0, 40), st.sampled_from(["batch", "segment"]), max_size=3),
)
def test_whatever_is_shared_every_request_reads_its_own_history(
    asked: list[tuple[list[int], int, int, int, int, int]],
    in_flight: int,
    pages: int,
    chunk: int,
    window: int,
    faults: dict[int, str],
) -> None:
    """Conversations and prompts that begin alike, cancelled at any time, in a pool that is too
    small for all, over batches some of which fail."""
    ring = -(-(window + chunk - 1) // PAGE_SLOTS) if window else 0
    limits = Limits(
        12 * PAGE_SLOTS, pages, in_flight, 256, chunk,
        window_pages=ring + pages // 4 if ring else 0, ring=ring, window=window,
    )  # fmt: skip
    scheduler, memory = Scheduler(limits), Memory(window)
    waiting = deque(enumerate(asked, 1))
    ended: list[str] = []
    texts: dict[int, list[int]] = {}
    cancel_at: dict[int, str] = {}
    flying: deque[Batch] = deque()
    for turn in range(3000):
        if len(ended) == len(asked) and not flying:
            break
        if waiting and turn % 3 != 2:  # not all at once
            number, (kinds, more, tokens, patience, after, less) = waiting.popleft()
            prompt = [kind * 100 + at for kind in kinds for at in range(PAGE_SLOTS)] + [9] * more
            if before := texts.get(after):
                prompt = [*before[: max(0, len(before) - less)], *prompt][: 10 * PAGE_SLOTS]
            texts[number] = list(prompt)
            hear = partial(note, ended, texts[number], str(number))
            scheduler.submit(GenerateRequest(str(number), prompt, tokens), hear)
            cancel_at[turn + 2 * patience if patience else -turn] = str(number)
        if (name := cancel_at.get(turn)) is not None and scheduler.cancel(name):
            ended.append(name)
        while len(flying) < in_flight and (batch := scheduler.next_step()) is not None:
            flying.append(batch)
        scheduler.check_integrity()
        if flying:
            batch = flying.popleft()
            fault = faults.get(batch.step)
            result = memory.run(batch, texts, fails=fault == "batch")
            scheduler.apply(batch, faulty(result, fault))
    assert len(ended) == len(asked), "a request never came to an end"
    assert scheduler.running == scheduler.waiting == 0


def faulty(result: Result, fault: str | None) -> Result:
    """A result of which all is lost, or one request."""
    if fault == "batch":
        return Result(result.step, error="no memory")
    if fault == "segment" and result.segments:
        first, *others = result.segments
        return replace(result, segments=[replace(first, error="not finite"), *others])
    return result


def note(ended: list[str], text: list[int], name: str, event: Event) -> None:
    """Keeps a request's text, and that it has ended."""
    text.extend(choice.token for choice in event.tokens)
    if event.last:
        ended.append(name)
