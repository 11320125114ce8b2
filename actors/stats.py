"""Plain snapshots of the engine, for health checks, tables and metrics. No behaviour, no state."""

from __future__ import annotations

import msgspec


class EngineStatus(msgspec.Struct, frozen=True):
    """Whether the engine serves.

    `state`: "loading", "ready", "repairing" or "failed". `progress`: share of the weights loaded,
    0 to 1. `detail`: one line for people. `context`: tokens of the largest request, 0 until known.
    """

    state: str
    progress: float = 0.0
    detail: str = ""
    context: int = 0


class StageStats(msgspec.Struct, frozen=True):
    """One stage: where it is and what it holds. `layers` is half-open `[start, stop)`; `link` is
    what batches come in by."""

    stage: int
    node: str
    device: str
    link: str
    layers: tuple[int, int]
    weights_bytes: int
    kv_bytes: int
    kv_tokens: int
    pages_used: int


class HistogramStats(msgspec.Struct, frozen=True):
    """`counts[i]`: values up to `bounds[i]` that are above the bound before; the last one counts
    those above all. `total`: the values' sum."""

    bounds: list[float] = []
    counts: list[int] = []
    total: float = 0.0


class RequestStats(msgspec.Struct, frozen=True):
    """What became of requests, from the engine's start.

    `outcomes`: how many ended with "stop", "length", "error" or "cancelled" (by a client that left,
    or at a stop string). `refused`: how many were not taken on, by reason. `first_token_s`: from
    their arrival; `gap_s`: between tokens; `request_s`: of those that were not cancelled.
    """

    outcomes: dict[str, int] = {}
    refused: dict[str, int] = {}
    first_token_s: HistogramStats = HistogramStats()
    gap_s: HistogramStats = HistogramStats()
    request_s: HistogramStats = HistogramStats()
    prompt_tokens: HistogramStats = HistogramStats()
    drawn_tokens: HistogramStats = HistogramStats()


class EngineStats(msgspec.Struct, frozen=True):
    """The engine's books, counted from its start. `epoch` grows with each repair. `pages_kept`:
    free pages that hold KV for requests that begin alike. `window_pages`: those of layers with a
    window, where these have pages of their own. `cached_tokens`: of prompts, beside the
    `prompt_tokens` that were computed. `stage_s`: seconds that each stage computed."""

    epoch: int
    waiting: int = 0
    running: int = 0
    pages: int = 0
    pages_free: int = 0
    pages_kept: int = 0
    window_pages: int = 0
    window_pages_free: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    drawn_tokens: int = 0
    in_flight: int = 0
    context: int = 0
    stages: list[StageStats] = []
    stage_s: list[float] = []
    requests: RequestStats = RequestStats()
