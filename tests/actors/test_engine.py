"""The engine over stages of this process: what requests get, together, alone, cancelled or
broken."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from msgspec import convert

from actors.engine import Engine
from actors.local import LocalStages
from actors.pipeline import LocalPipeline
from actors.request import Event, GenerateRequest
from sharding.batch import Batch, Choice, Result, SamplingParams
from sharding.errors import ContextLengthError, LongspanError, StageError, UnavailableError
from sharding.gguf.reader import GGUFFile
from sharding.model_plan import Wanted, plan_model
from sharding.planner import Device
from tests.stages import (
    GREEDY,
    chunked_logits,
    generate,
    load_stages,
    local_engine,
    tokens_of,
    wait_until,
)
from tests.tiny_gguf import tiny_model


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Two tiny stages."""
    with closing(local_engine(GGUFFile.from_bytes(tiny_model()))) as running:
        yield running


def collect(engine: Engine, requests: list[GenerateRequest]) -> list[list[Event]]:
    """Run requests together."""
    sinks: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in requests]
    for request, sink in zip(requests, sinks, strict=True):
        engine.submit(request, sink.put)
    heard: list[list[Event]] = []
    for sink in sinks:
        events = [sink.get(timeout=60)]
        while not events[-1].last:
            events.append(sink.get(timeout=60))
        heard.append(events)
    return heard


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_requests_sent_together_get_what_each_gets_alone(stages: int) -> None:
    file = GGUFFile.from_bytes(tiny_model(layers=5))
    sampled = SamplingParams(temperature=0.9, top_p=0.95, seed=11, repetition_penalty=1.1)
    with closing(local_engine(file, stages)) as engine:
        requests = [
            GenerateRequest(f"r{n}", [5 + n] * (1 + 7 * n), 6 + n, GREEDY if n % 2 else sampled)
            for n in range(8)
        ]
        together = [tokens_of(events) for events in collect(engine, requests)]
        alone = [generate(engine, request) for request in requests]
        assert together == alone
        assert [len(tokens) for tokens in alone] == [6 + n for n in range(8)]


def test_requests_share_the_pages_of_layers_with_a_window() -> None:
    """More of them than have room at once; each gets what a lone one with a page for every token
    gets."""
    keys = {"gemma3.attention.sliding_window": 40, "gemma3.attention.sliding_window_pattern": 2}
    options = {"family": "gemma3", "layers": 4, "context": 512, "extra_metadata": keys}
    file = GGUFFile.from_bytes(tiny_model(**options))
    plan = plan_model(file, [Device("here", 1 << 40)], Wanted(512, 1024, chunk=32)).plan
    assert (plan.pages, plan.window_pages, plan.ring_pages) == (64, 16, 5)
    prompts = [[5 + n, 9, 30 + n] * (5 + 17 * n) for n in range(6)]
    with closing(local_engine(file, context=512, kv=1024, chunk=32)) as engine:
        requests = [
            GenerateRequest(f"w{n}", prompt, 30, GREEDY) for n, prompt in enumerate(prompts)
        ]
        found = [tokens_of(events) for events in collect(engine, requests)]
        assert engine.stats().pages_free == engine.stats().pages
    for prompt, tokens in zip(prompts, found, strict=True):
        whole = chunked_logits(load_stages(file, 1), prompt + tokens, 512)
        assert whole[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


def test_the_same_seed_draws_the_same_and_another_seed_does_not(engine: Engine) -> None:
    def draw(seed: int) -> list[int]:
        return generate(engine, GenerateRequest("s", [9, 8, 7], 20, SamplingParams(seed=seed)))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize(
    ("chunk", "steps"), [(None, [0, 512, 1024, 1200]), (700, [0, 700, 1200]), (1200, [0, 1200])]
)
def test_a_prompt_of_several_chunks_reports_its_progress(
    chunk: int | None, steps: list[int]
) -> None:
    file = GGUFFile.from_bytes(tiny_model(context=2048))
    with closing(local_engine(file, context=2048, kv=4096, chunk=chunk)) as engine:
        events = list(engine.generate(GenerateRequest("p", [5] * 1200, 2, GREEDY)))
        assert [event.prompt_done for event in events[: len(steps)]] == steps


def test_cancel_frees_the_pages_on_every_stage(engine: Engine) -> None:
    events = engine.generate(GenerateRequest("c", [5] * 40, 200, GREEDY))
    for _ in range(3):
        next(events)
    assert engine.stats().pages_free < engine.stats().pages
    events.close()
    assert engine.stats().pages_free == engine.stats().pages
    wait_until(lambda: [stage.pages_used for stage in engine.stats().stages] == [0, 0])


def test_prompt_scores_are_the_log_probabilities_of_the_prompt(engine: Engine) -> None:
    """A token scored as part of a prompt has the log-probability it had when it was drawn."""
    asked = SamplingParams(temperature=0.0, logprobs=2)
    drawn = list(engine.generate(GenerateRequest("a", [5, 6, 7], 6, asked)))
    tokens = [choice for event in drawn for choice in event.tokens]
    prompt = [5, 6, 7] + [choice.token for choice in tokens]
    scored = list(engine.generate(GenerateRequest("b", prompt, 0, GREEDY, prompt_logprobs=2)))
    scores = [choice for event in scored for choice in event.prompt_scores]
    assert [choice.token for choice in scores] == prompt[1:]
    for score, choice in zip(scores[2:], tokens, strict=True):
        assert score.logprob == pytest.approx(choice.logprob, abs=1e-4)
        assert [token for token, _ in score.top] == [token for token, _ in choice.top]


def test_a_drawn_token_reports_the_model_s_own_distribution(engine: Engine) -> None:
    """From before bias and temperature: what clients compare between settings; and only if asked
    for: no log-probability is not 0, which would mean certainty."""

    def first(**params: object) -> Choice:
        asked = convert(params, SamplingParams)
        drawn = list(engine.generate(GenerateRequest("o", [5, 6, 7], 1, asked)))
        return next(choice for event in drawn for choice in event.tokens)

    plain = first(temperature=0.0, logprobs=3)
    biased = first(temperature=0.5, logprobs=3, logit_bias={9: 100.0})
    assert biased.token == 9 != plain.token
    assert biased.top == plain.top
    assert biased.logprob is not None and plain.logprob is not None
    assert biased.logprob < plain.logprob
    assert first(temperature=1.0, seed=4).logprob is None


def test_a_request_that_can_never_fit_is_refused(engine: Engine) -> None:
    with pytest.raises(ContextLengthError, match="256 tokens, but 300"):
        engine.submit(GenerateRequest("l", [5] * 290, 10, GREEDY), lambda event: None)


def test_a_stage_that_fails_ends_its_requests_with_the_reason(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sharding.stage import Stage

    def broken(self: Stage, batch: Batch, *more: object) -> None:
        raise StageError("the device is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "hidden", broken)
        (events,) = collect(engine, [GenerateRequest("f", [5], 4, GREEDY)])
    assert events[-1].error == "the device is on fire"
    assert len(generate(engine, GenerateRequest("g", [5], 4, GREEDY))) == 4


def test_a_closed_engine_ends_its_requests_and_takes_no_more() -> None:
    engine = local_engine(GGUFFile.from_bytes(tiny_model()))
    heard: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(GenerateRequest("x", [5], 250, GREEDY), heard.put)
    closer = threading.Thread(target=engine.close)
    closer.start()
    event = heard.get(timeout=30)
    while not event.last:
        event = heard.get(timeout=30)
    closer.join(timeout=30)
    assert event.error is not None or event.finish_reason == "length"
    with pytest.raises(UnavailableError):
        engine.submit(GenerateRequest("y", [5], 1, GREEDY), lambda event: None)


def test_a_model_that_cannot_be_loaded_is_reported_with_the_reason() -> None:
    file = GGUFFile.from_bytes(tiny_model())
    del file.tensors["output_norm.weight"]
    with pytest.raises(LongspanError, match="output_norm.weight"):
        local_engine(file)


class HeldPipeline(LocalPipeline):
    """Stages that answer nothing while they are `held`."""

    held = threading.Event()

    def receive(self, timeout_s: float | None) -> Result | None:
        """Nothing after the timeout, as from a stage that computes for long."""
        if self._sent and self.held.is_set():
            time.sleep(timeout_s or 0.0)
            return None
        return super().receive(timeout_s)


class QuietStages(LocalStages):
    """Counts the quiet moments that it is told of, and how often it is asked whether it lives."""

    quiet = asked = 0

    def use_quiet(self) -> None:
        """One more."""
        self.quiet += 1

    def check(self) -> None:
        """They do."""
        self.asked += 1


def test_a_long_step_is_no_quiet_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What starts in a quiet moment would slow down the step that somebody waits for."""
    monkeypatch.setattr("actors.engine._SILENT_S", 0.05)
    monkeypatch.setattr("actors.local.LocalPipeline", HeldPipeline)
    file = GGUFFile.from_bytes(tiny_model())
    source = QuietStages(file, plan_model(file, [Device("here", 1 << 40)], Wanted(256, 2048)))
    engine = Engine(source)
    engine.start()
    engine.wait_ready()
    with closing(engine):
        wait_until(lambda: source.quiet > 1)
        HeldPipeline.held.set()
        sink: queue.SimpleQueue[Event] = queue.SimpleQueue()
        engine.submit(GenerateRequest("long", [5], 2, GREEDY), sink.put)
        asked = source.asked
        wait_until(lambda: source.asked > asked + 1)  # in flight by now
        quiet, asked = source.quiet, source.asked
        wait_until(lambda: source.asked > asked + 3)
        assert source.quiet == quiet
        HeldPipeline.held.clear()
        while not sink.get(timeout=30).last:
            pass
        wait_until(lambda: source.quiet > quiet)
