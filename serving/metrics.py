"""`/metrics`: the engine's books in Prometheus's words.

All of it is counted by the engine, of which there is one, so any ingress replica answers alike.
Counters begin anew with a new engine replica. Base units: seconds, bytes, tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from actors.stats import EngineStats, EngineStatus, HistogramStats, StageStats
from serving.service import ServedModel
from sharding.batch import PAGE_SLOTS

_STATES = ("loading", "ready", "repairing", "failed")


def render(
    model: ServedModel, status: EngineStatus, stats: EngineStats | None, accept: str
) -> tuple[bytes, str]:
    """The page and its content type, in the format that `accept` prefers. Without `stats`, because
    the engine does not answer, it tells the state only."""
    registry = CollectorRegistry()
    registry.register(_Books(model, status, stats))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Books(Collector):
    def __init__(self, model: ServedModel, status: EngineStatus, stats: EngineStats | None) -> None:
        self._model, self._status, self._stats = model, status, stats

    def collect(self) -> Iterator[Metric]:
        """All families."""
        facts = {"model": self._model.name, "fingerprint": self._model.fingerprint}
        yield InfoMetricFamily("longspan_model", "What is served.", facts)
        state = GaugeMetricFamily(
            "longspan_engine_state", "1 for the state that the engine is in.", labels=["state"]
        )
        for name in _STATES:
            state.add_metric([name], float(self._status.state == name))
        yield state
        if self._stats is None:
            return
        yield from _requests(self._stats)
        yield from _tokens(self._stats)
        yield from _pages(self._stats)
        yield from _stages(self._stats)


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"longspan_{name}", what, value)


def _counter(name: str, what: str, label: str, values: dict[str, float]) -> Metric:
    family = CounterMetricFamily(f"longspan_{name}", what, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


def _histogram(name: str, what: str, found: HistogramStats) -> Metric:
    buckets, below = [], 0
    for bound, count in zip([*map(str, found.bounds), "+Inf"], found.counts, strict=True):
        below += count
        buckets.append((bound, float(below)))
    return HistogramMetricFamily(f"longspan_{name}", what, buckets or None, found.total)


def _requests(stats: EngineStats) -> Iterator[Metric]:
    requests = stats.requests
    yield _gauge("requests_running", "Requests that own KV.", stats.running)
    yield _gauge("requests_waiting", "Requests that wait for KV.", stats.waiting)
    ends = dict.fromkeys(("stop", "length", "error", "cancelled"), 0.0) | requests.outcomes
    yield _counter(
        "requests",
        "Requests that ended; cancelled: the client left, or a stop string was reached.",
        "outcome",
        ends,
    )
    refused = dict.fromkeys(("busy", "context", "unavailable"), 0.0) | requests.refused
    yield _counter("requests_refused", "Requests that were not taken on.", "reason", refused)
    for name, what, found in (
        ("time_to_first_token_seconds", "From arrival to the first token.", requests.first_token_s),
        ("inter_token_seconds", "From a token to the next.", requests.gap_s),
        ("request_seconds", "From arrival to the end, if not cancelled.", requests.request_s),
        ("request_prompt_tokens", "Tokens of a prompt.", requests.prompt_tokens),
        ("request_generated_tokens", "Tokens of an answer.", requests.drawn_tokens),
    ):
        if found.counts:
            yield _histogram(name, what, found)


def _tokens(stats: EngineStats) -> Iterator[Metric]:
    sources = {"computed": float(stats.prompt_tokens), "cached": float(stats.cached_tokens)}
    yield _counter(
        "prompt_tokens", "Tokens of prompts, by where their KV is from.", "source", sources
    )
    yield CounterMetricFamily(
        "longspan_generated_tokens", "Tokens that were drawn.", stats.drawn_tokens
    )
    yield CounterMetricFamily("longspan_steps", "Batches through the pipeline.", stats.steps)
    yield _gauge("batches_in_flight", "Batches in the pipeline now.", stats.in_flight)
    yield CounterMetricFamily(
        "longspan_pipeline_epochs", "How often the pipeline was joined anew.", stats.epoch
    )
    yield _gauge("context_tokens", "Most tokens of a request.", stats.context)


def _pages(stats: EngineStats) -> Iterator[Metric]:
    yield _gauge("kv_page_tokens", "Tokens of a page of KV.", PAGE_SLOTS)
    pages = GaugeMetricFamily(
        "longspan_kv_pages",
        "Pages of KV; kept: free, with KV for prompts that begin alike.",
        labels=["layers", "state"],
    )
    pages.add_metric(["all", "used"], stats.pages - stats.pages_free)
    pages.add_metric(["all", "kept"], stats.pages_kept)
    pages.add_metric(["all", "blank"], stats.pages_free - stats.pages_kept)
    if stats.window_pages:
        pages.add_metric(["window", "used"], stats.window_pages - stats.window_pages_free)
        pages.add_metric(["window", "free"], stats.window_pages_free)
    yield pages


def _stages(stats: EngineStats) -> Iterator[Metric]:
    busy = CounterMetricFamily(
        "longspan_stage_busy_seconds", "Time in which a stage computed.", labels=["stage"]
    )
    for number, seconds in enumerate(stats.stage_s):
        busy.add_metric([str(number)], seconds)
    yield busy
    facts = InfoMetricFamily("longspan_stage", "Where a stage runs.", labels=["stage"])
    memory = GaugeMetricFamily(
        "longspan_stage_bytes",
        "Memory of a stage, when all its KV is used.",
        labels=["stage", "of"],
    )
    for stage in stats.stages:
        label = str(stage.stage)
        facts.add_metric([label], _facts(stage))
        memory.add_metric([label, "weights"], stage.weights_bytes)
        memory.add_metric([label, "kv"], stage.kv_bytes)
    yield facts
    yield memory


def _facts(stage: StageStats) -> dict[str, str]:
    first, stop = stage.layers
    return {
        "node": stage.node,
        "device": stage.device,
        "link": stage.link,
        "layers": f"{first}-{stop - 1}",
    }
