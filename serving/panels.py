"""What the Grafana dashboard shows: an operator's questions, in rows of panels.

Plain data. The metrics are those of `serving/metrics.py`; a test compares them. Every expression is
PromQL for one scraped address, for which `HERE` stands: all ingresses tell the same engine's books,
and a sum over them would count twice. Not here: Grafana's JSON (`serving/dashboard.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

STATE_COLOURS = {"loading": "blue", "ready": "green", "repairing": "orange", "failed": "red"}

Query = tuple[str, str]
"""A PromQL expression and the legend of its series."""


@dataclass(frozen=True)
class Panel:
    """One panel. `unit` is Grafana's name of it; `kind` is one of `KINDS` in `dashboard.py`;
    `width` and `height` count columns and lines of Grafana's grid; `colours` are those of series,
    by their legend."""

    title: str
    about: str
    unit: str
    queries: tuple[Query, ...]
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    colours: tuple[tuple[str, str], ...] = ()


def _quantiles(histogram: str) -> tuple[Query, ...]:
    """Median, 95th and 99th percentile of what a histogram counted."""
    rate = f"sum by (le) (rate({histogram}_bucket{{HERE}}[$__rate_interval]))"
    return tuple(
        (f"histogram_quantile({quantile}, {rate})", legend)
        for quantile, legend in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
    )


def _page_tokens(layers: str) -> Query:
    """Pages of a pool by their state, in tokens."""
    pages = f'max by (state) (longspan_kv_pages{{HERE, layers="{layers}"}})'
    return f"{pages} * scalar(max(longspan_kv_page_tokens{{HERE}}))", "{{state}}"


_ENGINE = (
    Panel(
        "State",
        "What the engine does now. No data: the address does not answer the scraper.",
        "none",
        (("longspan_engine_state{HERE} == 1", "{{state}}"),),
        kind="name",
        width=4,
        height=5,
        colours=tuple(STATE_COLOURS.items()),
    ),
    Panel(
        "States over time",
        "Repairing: a stage died, and running requests wait until it is replaced.",
        "none",
        (("longspan_engine_state{HERE}", "{{state}}"),),
        kind="state-timeline",
        height=5,
        colours=tuple(STATE_COLOURS.items()),
    ),
    Panel(
        "Model",
        "The name that clients ask for.",
        "none",
        (("longspan_model_info{HERE}", "{{model}}"),),
        kind="name",
        width=4,
        height=5,
    ),
    Panel(
        "Context",
        "Most tokens of a request, its prompt and its answer together.",
        "locale",
        (("longspan_context_tokens{HERE}", "tokens"),),
        kind="stat",
        width=3,
        height=5,
    ),
    Panel(
        "Repairs",
        "How often the pipeline was joined anew because a stage died.",
        "short",
        (("increase(longspan_pipeline_epochs_total{HERE}[$__rate_interval])", "repairs"),),
        width=5,
        height=5,
    ),
)

_REQUESTS = (
    Panel(
        "Running and waiting",
        "Waiting requests have no memory for their KV yet. If they grow in number, so do the times "
        "to the first token.",
        "short",
        (
            ("longspan_requests_running{HERE}", "running"),
            ("longspan_requests_waiting{HERE}", "waiting"),
        ),
    ),
    Panel(
        "Outcomes",
        "Requests that ended, a second. Cancelled: the client left, or a stop string was reached.",
        "reqps",
        (("rate(longspan_requests_total{HERE}[$__rate_interval])", "{{outcome}}"),),
        kind="stacked",
    ),
    Panel(
        "Errors",
        "Share of the requests that ended with an error.",
        "percentunit",
        (
            (
                'sum(rate(longspan_requests_total{HERE, outcome="error"}[$__rate_interval]))'
                " / (sum(rate(longspan_requests_total{HERE}[$__rate_interval])) > 0)",
                "errors",
            ),
        ),
    ),
    Panel(
        "Refused",
        "Requests not taken on, a second. Busy: too many wait for memory already; context: longer "
        "than can ever fit; unavailable: the engine was loading or repairing.",
        "reqps",
        (("rate(longspan_requests_refused_total{HERE}[$__rate_interval])", "{{reason}}"),),
        kind="stacked",
    ),
    Panel(
        "Length of prompts",
        "Tokens of the prompts that were taken on.",
        "short",
        _quantiles("longspan_request_prompt_tokens"),
    ),
    Panel(
        "Length of answers",
        "Tokens drawn for a request.",
        "short",
        _quantiles("longspan_request_generated_tokens"),
    ),
)

_LATENCY = (
    Panel(
        "Time to the first token",
        "From a request's arrival, so it holds the wait for memory and the reading of the prompt.",
        "s",
        _quantiles("longspan_time_to_first_token_seconds"),
    ),
    Panel(
        "Time between tokens",
        "What a reader sees while an answer streams.",
        "s",
        _quantiles("longspan_inter_token_seconds"),
    ),
    Panel(
        "Time of a request",
        "From arrival to the end, of those that were not cancelled.",
        "s",
        _quantiles("longspan_request_seconds"),
    ),
)

_TOKENS = (
    Panel(
        "Tokens a second",
        "Read: of prompts, computed by the stages; cached: of prompts whose KV was there already; "
        "drawn: of answers.",
        "suffix: tok/s",
        (
            (
                'rate(longspan_prompt_tokens_total{HERE, source="computed"}[$__rate_interval])',
                "read",
            ),
            (
                'rate(longspan_prompt_tokens_total{HERE, source="cached"}[$__rate_interval])',
                "cached",
            ),
            ("rate(longspan_generated_tokens_total{HERE}[$__rate_interval])", "drawn"),
        ),
        width=12,
    ),
    Panel(
        "Cached share",
        "Share of the prompts' tokens that did not have to be read.",
        "percentunit",
        (
            (
                'sum(rate(longspan_prompt_tokens_total{HERE, source="cached"}[$__rate_interval]))'
                " / (sum(rate(longspan_prompt_tokens_total{HERE}[$__rate_interval])) > 0)",
                "cached",
            ),
        ),
        width=12,
    ),
)

_MEMORY = (
    Panel(
        "KV, in tokens",
        "Used: reserved for requests; kept: free, but holding KV for prompts that begin alike; "
        "blank: free and empty. With none blank, kept pages make room.",
        "locale",
        (_page_tokens("all"),),
        kind="stacked",
    ),
    Panel(
        "KV of windows, in tokens",
        "Of layers that see but a window, which have pages of their own; no data where a model has "
        "none.",
        "locale",
        (_page_tokens("window"),),
        kind="stacked",
    ),
    Panel(
        "Memory of stages",
        "Of each stage, when all its KV is used.",
        "bytes",
        (("longspan_stage_bytes{HERE}", "stage {{stage}}, {{of}}"),),
        kind="bargauge",
    ),
)

_STAGES = (
    Panel(
        "Busy",
        "Share of the time in which a stage computed. One that is far above the others holds "
        "them up.",
        "percentunit",
        (("rate(longspan_stage_busy_seconds_total{HERE}[$__rate_interval])", "stage {{stage}}"),),
    ),
    Panel(
        "Batches in flight",
        "Fewer than stages while requests run: some stage has nothing to do.",
        "short",
        (("longspan_batches_in_flight{HERE}", "batches"),),
    ),
    Panel(
        "Steps a second",
        "Batches that went through the pipeline.",
        "ops",
        (("rate(longspan_steps_total{HERE}[$__rate_interval])", "steps"),),
    ),
    Panel(
        "Where stages run",
        "Node, device and layers of each stage, and what its batches come in by.",
        "none",
        (("longspan_stage_info{HERE}", ""),),
        kind="table",
        width=24,
    ),
)

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    ("Engine", _ENGINE),
    ("Requests", _REQUESTS),
    ("Latency", _LATENCY),
    ("Tokens", _TOKENS),
    ("Memory", _MEMORY),
    ("Stages", _STAGES),
)
