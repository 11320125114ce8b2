"""Requests that outlive their pipeline: they read again what they had, and go on from there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine import Engine
from actors.grammar import Constraint
from actors.pipeline import LocalPipeline
from actors.request import Event, GenerateRequest
from actors.running import MOST_REPLAYS
from actors.scheduler import Limits, Scheduler
from sharding.batch import PAGE_SLOTS, Batch, Choice, Result, SamplingParams
from sharding.errors import PeerLostError, StageError
from sharding.gguf.reader import GGUFFile
from sharding.stage import Stage
from tests.actors.kv_memory import Memory, draw
from tests.actors.test_engine import collect
from tests.actors.test_scheduler import answer, ask
from tests.stages import GREEDY, generate, local_engine, tokens_of, wait_until
from tests.tiny_gguf import tiny_model


def expected(prompt: list[int], count: int, forcing: bool = False) -> list[int]:
    """What `Memory` draws after a prompt."""
    history = list(prompt)
    while len(history) < len(prompt) + count:
        history.append(draw(history))
        history += following(history[-1]) if forcing else []
    return history[len(prompt) : len(prompt) + count]


def following(token: int) -> list[int]:
    """What can only follow a token, in the texts of `Forcing`."""
    return list(range(token, token + token % 7))


class Forcing(Constraint):
    """A grammar's, without one: any token may be drawn, and some have others follow them."""

    def __init__(self) -> None:
        self.allowed, self.complete, self.error = b"", False, None

    def take(self, token: int, most: int) -> list[int]:
        return following(token)[:most]


@settings(max_examples=150, deadline=None)
@given(
    asked=st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=6),
            st.integers(0, 17),
            st.integers(1, 30),
            st.booleans(),
        ),
        min_size=1,
        max_size=10,
    ),
    in_flight=st.integers(1, 4),
    pages=st.integers(10, 40),
    chunk=st.integers(2, 70),
    window=st.sampled_from([0, 0, 5, 40]),
    breaks=st.sets(st.integers(0, 60), max_size=6),
)
def test_every_request_says_what_it_would_have_said(
    asked: list[tuple[list[int], int, int, bool]],
    in_flight: int,
    pages: int,
    chunk: int,
    window: int,
    breaks: set[int],
) -> None:
    """Over pipelines that break at any time, with shared pages, windows and too little memory, and
    whether or not some tokens follow others undrawn; but for those that were at work each time too
    often."""
    ring = -(-(window + chunk - 1) // PAGE_SLOTS) if window else 0
    window_pages = ring + pages // 4 if ring else 0
    limits = Limits(
        10 * PAGE_SLOTS, pages, in_flight, 256, chunk,
        window_pages=window_pages, ring=ring, window=window,
    )  # fmt: skip
    scheduler, memory = Scheduler(limits), Memory(window)
    waiting = deque(enumerate(asked, 1))
    heard: dict[int, list[Event]] = {}
    texts: dict[int, list[int]] = {}
    prompts: dict[int, list[int]] = {}
    flying: deque[Batch] = deque()
    losses: dict[int, int] = {}
    for turn in range(1500):
        if waiting and turn % 3 != 2:
            number, (kinds, more, tokens, forcing) = waiting.popleft()
            prompt = [kind * 100 + at for kind in kinds for at in range(PAGE_SLOTS)] + [9] * more
            prompts[number], texts[number], heard[number] = prompt, list(prompt), []
            scheduler.submit(
                GenerateRequest(str(number), prompt, tokens),
                listener(heard[number], texts[number]),
                constraint=Forcing() if forcing else None,
            )
        while len(flying) < in_flight and (batch := scheduler.next_step()) is not None:
            flying.append(batch)
            assert batch.n_tokens <= chunk
        scheduler.check_integrity()
        if turn in breaks:
            for number in {at.request for batch in flying for at in batch.segments}:
                losses[number] = losses.get(number, 0) + 1
            scheduler.replay_all(flying, "a stage died")
            flying.clear()
            memory = Memory(window)
        elif flying:
            batch = flying.popleft()
            scheduler.apply(batch, memory.run(batch, texts))
    assert scheduler.running == scheduler.waiting == 0
    for number, events in heard.items():
        said = texts[number][len(prompts[number]) :]
        assert events[-1].last
        if losses.get(number, 0) <= MOST_REPLAYS:
            assert said == expected(prompts[number], *asked[number - 1][2:])
        done = [event.prompt_done for event in events if event.error is None]
        assert done == sorted(done), "progress never goes back"


def listener(events: list[Event], text: list[int]) -> Callable[[Event], None]:
    """Keeps a request's events, and its text with what it draws."""

    def hear(event: Event) -> None:
        events.append(event)
        text.extend(choice.token for choice in event.tokens)

    return hear


def test_requests_come_back_in_the_order_in_which_they_came() -> None:
    scheduler = Scheduler(Limits(context=64, pages=8, in_flight=1))
    for name in "abcd":
        scheduler.submit(ask(name, 30, 4), lambda event: None)
    first = scheduler.next_step()
    assert first is not None and (scheduler.running, scheduler.waiting) == (2, 2)
    scheduler.replay_all([first], "a stage died")
    again = scheduler.next_step()
    assert again is not None and again.closed == [], "the stages know of nothing to close"
    assert [at.request for at in again.opened] == [at.request for at in first.opened]


def test_who_is_in_flight_each_time_may_be_the_cause() -> None:
    """Others, which wait or have nothing in flight, are not."""
    scheduler = Scheduler(Limits(context=64, pages=4, in_flight=1))
    events: dict[str, list[Event]] = {"poison": [], "patient": []}
    for name, heard in events.items():
        scheduler.submit(ask(name, 40, 4), heard.append)
    for _ in range(MOST_REPLAYS + 1):
        assert not any(event.last for heard in events.values() for event in heard)
        batch = scheduler.next_step()
        assert batch is not None
        scheduler.replay_all([batch], "a stage died")
    (error,) = [event.error for event in events["poison"] if event.last]
    assert error == f"a stage died; {MOST_REPLAYS + 1} times in this request's work"
    while (batch := scheduler.next_step()) is not None:
        scheduler.apply(batch, answer(batch))
    assert events["patient"][-1].finish_reason == "length"
    scheduler.check_integrity()


def test_an_answer_that_gets_on_between_breaks_is_no_suspect() -> None:
    """It may take a day, in which any hardware fails now and then."""
    scheduler = Scheduler(Limits(context=256, pages=16, in_flight=1))
    events: list[Event] = []
    scheduler.submit(ask("long", 10, 100), events.append)
    for _ in range(8):
        for _ in range(5):
            batch = scheduler.next_step()
            assert batch is not None
            scheduler.apply(batch, answer(batch))
        batch = scheduler.next_step()
        assert batch is not None
        scheduler.replay_all([batch], "a stage died")
    while (batch := scheduler.next_step()) is not None:
        scheduler.apply(batch, answer(batch))
    assert events[-1].finish_reason == "length"


def test_of_many_suspects_only_the_guilty_one_ends() -> None:
    """All were in flight when the pipeline broke; then they are at work one at a time."""
    scheduler = Scheduler(Limits(context=64, pages=40, in_flight=1))
    events: dict[str, list[Event]] = {name: [] for name in ("a", "b", "poison", "c", "d")}
    for name, heard in events.items():
        scheduler.submit(ask(name, 20, 6), heard.append)
    poison = 3
    while (batch := scheduler.next_step()) is not None:
        if any(at.request == poison for at in batch.segments):
            scheduler.replay_all([batch], "a stage died")
        else:
            scheduler.apply(batch, answer(batch))
    ends = {name: heard[-1].finish_reason for name, heard in events.items()}
    assert ends == {"a": "length", "b": "length", "poison": None, "c": "length", "d": "length"}
    assert events["poison"][-1].suspect
    scheduler.check_integrity()


def test_a_request_can_be_cancelled_while_it_waits_for_a_repair() -> None:
    scheduler = Scheduler(Limits(context=64, pages=4, in_flight=1))
    scheduler.submit(ask("a", 20, 4), lambda event: None)
    batch = scheduler.next_step()
    assert batch is not None
    scheduler.replay_all([batch], "a stage died")
    scheduler.cancel("a")
    assert scheduler.next_step() is None
    scheduler.check_integrity()


class BreakingPipeline(LocalPipeline):
    """Stages that are gone at some of their results, with what was in flight."""

    breaks: set[int] = set()
    results = 0

    def receive(self, timeout_s: float | None) -> Result | None:
        """One of them is an error."""
        result = super().receive(timeout_s)
        if result is not None:
            BreakingPipeline.results += 1
            if BreakingPipeline.results in self.breaks:
                raise PeerLostError("stage 1 is gone")
        return result


@contextmanager
def breaking(monkeypatch: pytest.MonkeyPatch, breaks: set[int], **options: int) -> Iterator[Engine]:
    """An engine whose pipeline breaks at these results."""
    monkeypatch.setattr("actors.local.LocalPipeline", BreakingPipeline)
    monkeypatch.setattr(BreakingPipeline, "breaks", breaks)
    monkeypatch.setattr(BreakingPipeline, "results", 0)
    with closing(local_engine(GGUFFile.from_bytes(tiny_model()), **options)) as engine:
        yield engine


REQUESTS = [
    GenerateRequest("greedy", list(range(3, 60)), 30, GREEDY),
    GenerateRequest(
        "penalties",
        list(range(3, 40)),
        30,
        SamplingParams(seed=5, repetition_penalty=1.3, frequency_penalty=0.4, logprobs=2),
    ),
    GenerateRequest("scored", list(range(9, 100)), 8, SamplingParams(seed=6), prompt_logprobs=1),
    GenerateRequest("patient", [4, 5], 40, SamplingParams(seed=7, min_tokens=3, stop_ids=(9,))),
]


def test_an_engine_gives_the_same_answers_over_a_pipeline_that_breaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens, log-probabilities and scores of the prompt, bit by bit, each of them once."""

    def answers(breaks: set[int]) -> list[tuple[list[Choice], list[Choice], str | None]]:
        with breaking(monkeypatch, breaks, chunk=16) as engine:
            found = [
                (
                    [choice for event in events for choice in event.tokens],
                    [choice for event in events for choice in event.prompt_scores],
                    events[-1].finish_reason,
                )
                for events in collect(engine, REQUESTS)
            ]
            assert engine.stats().epoch == len(breaks)
            assert engine.stats().pages_free == engine.stats().pages
        return found

    whole = answers(set())
    assert len(whole[2][1]) == 90
    assert answers({4, 23}) == whole
    assert answers({1, 11}) == whole


def test_penalties_count_what_was_drawn_though_another_request_computes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The younger one's answer so far is the older one's prompt. A bias makes it say 7 until it has
    said it so often that the penalty outweighs the bias."""
    text = list(range(10, 42))
    penal = SamplingParams(temperature=0.0, logit_bias={7: 70.0}, frequency_penalty=2.0)
    requests = [
        GenerateRequest("older", [*text, *[7] * 32], 70, GREEDY),
        GenerateRequest("younger", text, 70, penal),
    ]

    def answers(breaks: set[int]) -> list[list[int]]:
        with breaking(monkeypatch, breaks) as engine:
            return [tokens_of(events) for events in collect(engine, requests)]

    whole = answers(set())
    assert whole[1][:32] == [7] * 32 and whole[1].count(7) < 45
    assert answers({90}) == whole


def test_a_request_that_breaks_every_pipeline_ends_with_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with breaking(monkeypatch, set(range(1, MOST_REPLAYS + 2))) as engine:
        (events,) = collect(engine, [REQUESTS[0]])
        assert "stage 1 is gone" in str(events[-1].error)
        wait_until(lambda: engine.status().state == "ready")
        assert len(generate(engine, REQUESTS[1])) == 30, "the next one runs"


def test_a_device_that_is_lost_costs_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its stage says of it reaches the engine before its process ends."""
    failed: list[bool] = []

    def fail_once(self: Stage, batch: Batch) -> None:
        if not failed:
            failed.append(True)
            self.lost = True
            raise StageError("CUDA error: an illegal memory access")
        self.lost = False  # another process

    with closing(local_engine(GGUFFile.from_bytes(tiny_model()))) as engine:
        tokens = generate(engine, REQUESTS[0])
        monkeypatch.setattr(Stage, "_check", fail_once)
        assert generate(engine, REQUESTS[0]) == tokens
        assert (failed, engine.stats().epoch) == ([True], 1)
