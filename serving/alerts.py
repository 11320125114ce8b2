"""Prometheus's alert rules over `/metrics`, as plain data and as the file that it reads.

Not here: an address that does not answer the scraper at all, which Prometheus's own `up` tells.
"""

from __future__ import annotations

from typing import Any

import yaml

_RULES: tuple[dict[str, Any], ...] = (
    {
        "alert": "LongspanNotReady",
        "expr": 'longspan_engine_state{state="ready"} == 0',
        "for": "2m",
        "labels": {"severity": "critical"},
        "annotations": {
            "summary": "{{ $labels.instance }} has not served for 2 minutes",
            "description": "Its engine is loading, repairing or failed; /health says which, and how"
            " far it is.",
        },
    },
    {
        "alert": "LongspanRefusesRequests",
        "expr": 'increase(longspan_requests_refused_total{reason="busy"}[5m]) > 0',
        "for": "5m",
        "labels": {"severity": "warning"},
        "annotations": {
            "summary": "{{ $labels.instance }} refuses requests: too many wait for memory",
            "description": "More KV (--kv-tokens), shorter requests or a second deployment would"
            " help.",
        },
    },
    {
        "alert": "LongspanRepairsAgainAndAgain",
        "expr": "increase(longspan_pipeline_epochs_total[1h]) > 3",
        "labels": {"severity": "warning"},
        "annotations": {
            "summary": "{{ $labels.instance }} lost stages more than 3 times in an hour",
            "description": "Requests go on, but each repair stops them for a while; the logs of the"
            " stages say what ended them.",
        },
    },
)


def alert_rules() -> dict[str, Any]:
    """What a rule file of Prometheus holds."""
    return {"groups": [{"name": "longspan", "rules": list(_RULES)}]}


def rules_text() -> str:
    """The rule file, as YAML."""
    return yaml.safe_dump(alert_rules(), sort_keys=False, width=100).rstrip()
