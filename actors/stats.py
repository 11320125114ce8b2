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


class EngineStats(msgspec.Struct, frozen=True):
    """The engine's books, counted from its start. `epoch` grows with each repair. `pages_kept`:
    free pages that hold KV for requests that begin alike. `window_pages`: those of layers with a
    window, where these have pages of their own. `cached_tokens`: of prompts, beside the
    `prompt_tokens` that were computed."""

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
