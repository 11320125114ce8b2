"""GET /metrics: what Prometheus reads."""

from __future__ import annotations

from contextlib import closing

import httpx
import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse

from actors.request import GenerateRequest
from actors.stats import EngineStats, EngineStatus, StageStats
from sharding.errors import ContextLengthError
from sharding.gguf.reader import GGUFFile
from tests.serving.fakes import World
from tests.stages import GREEDY, local_engine
from tests.tiny_gguf import tiny_model

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples_of(answer: httpx.Response) -> Samples:
    """Every sample by its name and labels."""
    assert answer.status_code == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(answer.text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    """One sample."""
    return samples["longspan_" + name, frozenset(labels.items())]


STAGES = [
    StageStats(0, "10.0.0.1", "cpu", "Unix socket", (0, 18), 66, 3400, 262144, 5),
    StageStats(1, "10.0.0.2", "cuda #1", "TCP", (18, 30), 54, 2200, 262144, 5),
]


def test_the_books_are_told_with_their_labels() -> None:
    world = World()
    world.engine.books = EngineStats(
        3, waiting=2, running=5, pages=100, pages_free=60, pages_kept=35, window_pages=20,
        window_pages_free=8, steps=77, prompt_tokens=1000, cached_tokens=400, drawn_tokens=300,
        in_flight=2, context=8192, stages=STAGES, stage_s=[1.5, 2.5],
    )  # fmt: skip
    samples = samples_of(world.get("/metrics"))
    assert value(samples, "requests_running") == 5
    assert value(samples, "requests_waiting") == 2
    pages = {
        state: value(samples, "kv_pages", layers="all", state=state)
        for state in ("used", "kept", "blank")
    }
    assert pages == {"used": 40, "kept": 35, "blank": 25}
    assert value(samples, "kv_pages", layers="window", state="used") == 12
    assert value(samples, "prompt_tokens_total", source="computed") == 1000
    assert value(samples, "prompt_tokens_total", source="cached") == 400
    assert value(samples, "generated_tokens_total") == 300
    assert value(samples, "stage_busy_seconds_total", stage="1") == 2.5
    assert value(samples, "stage_bytes", stage="0", of="weights") == 66
    facts = {"stage": "1", "node": "10.0.0.2", "device": "cuda #1", "link": "TCP"}
    assert value(samples, "stage_info", **facts, layers="18-29") == 1
    assert value(samples, "pipeline_epochs_total") == 3


@pytest.mark.parametrize("state", ["loading", "ready", "repairing", "failed"])
def test_one_state_is_the_engine_s(state: str) -> None:
    world = World()
    world.engine.state = EngineStatus(state)
    samples = samples_of(world.get("/metrics"))
    states = {
        name: value(samples, "engine_state", state=name)
        for name in ("loading", "ready", "repairing", "failed")
    }
    assert states == {name: float(name == state) for name in states}


def test_an_engine_that_does_not_answer_still_has_a_state() -> None:
    world = World()
    world.engine.books, world.engine.state = None, EngineStatus("failed")
    samples = samples_of(world.get("/metrics"))
    assert value(samples, "engine_state", state="failed") == 1
    assert not any(name.startswith("longspan_requests") for name, _ in samples)


def test_a_scraper_that_prefers_openmetrics_gets_it() -> None:
    accept = {"Accept": "application/openmetrics-text; version=1.0.0,text/plain;q=0.5"}
    answer = World().request("GET", "/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in parse_openmetrics(answer.text)}
    assert {"longspan_steps", "longspan_requests_running"} <= names


def test_an_engine_s_requests_are_counted_as_they_end() -> None:
    with closing(local_engine(GGUFFile.from_bytes(tiny_model()))) as engine:
        prompt = list(range(3, 43))
        for name in ("first", "second"):
            list(engine.generate(GenerateRequest(name, prompt, 5, GREEDY)))
        left = engine.generate(GenerateRequest("left", [7] * 20, 200, GREEDY))
        next(left)
        left.close()
        with pytest.raises(ContextLengthError):
            engine.submit(GenerateRequest("large", [5] * 1000, 1), lambda event: None)
        world = World()
        world.engine.books = engine.stats()
    samples = samples_of(world.get("/metrics"))
    outcomes = {
        name: value(samples, "requests_total", outcome=name)
        for name in ("stop", "length", "error", "cancelled")
    }
    assert outcomes == {"stop": 0, "length": 2, "error": 0, "cancelled": 1}
    assert value(samples, "requests_refused_total", reason="context") == 1
    assert value(samples, "prompt_tokens_total", source="cached") == 32
    assert value(samples, "request_prompt_tokens_count") == 3
    assert value(samples, "request_prompt_tokens_sum") == 100
    assert value(samples, "time_to_first_token_seconds_count") >= 2
    assert value(samples, "inter_token_seconds_count") >= 8
    assert value(samples, "inter_token_seconds_bucket", le="+Inf") == value(
        samples, "inter_token_seconds_count"
    )
    assert value(samples, "stage_busy_seconds_total", stage="1") > 0
