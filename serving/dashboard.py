"""The Grafana dashboard over `/metrics` in Grafana's JSON model, as plain data.

Pure: what is shown is `serving/panels.py`, how it reaches a Grafana is `serving/grafana.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from string import ascii_uppercase
from typing import Any

from serving.panels import ROWS, Panel

UID = "longspan"
"""Of the dashboard, and part of its address: saving it again replaces it."""

_HERE = 'instance="$instance"'
_GRID = 24
"""Columns of a Grafana page."""

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}

_LEGEND = {"showLegend": True, "displayMode": "list", "placement": "bottom"}
_LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}
KINDS: dict[str, dict[str, Any]] = {
    "timeseries": {"legend": _LEGEND, "tooltip": {"mode": "multi", "sort": "desc"}},
    "stacked": {"legend": _LEGEND, "tooltip": {"mode": "multi", "sort": "none"}},
    "state-timeline": {"legend": {"showLegend": False}, "showValue": "never", "mergeValues": True},
    "stat": {"reduceOptions": _LAST, "textMode": "value", "graphMode": "none"},
    "name": {"reduceOptions": _LAST, "textMode": "name", "graphMode": "none"},
    "bargauge": {"reduceOptions": _LAST, "orientation": "horizontal", "displayMode": "basic"},
    "table": {"showHeader": True, "cellHeight": "sm"},
}
"""Options of each kind of panel. Two are no plugins' names: `_PLUGINS` says whose they are."""

_PLUGINS = {"stacked": "timeseries", "name": "stat"}
_INSTANT = ("stat", "name", "bargauge", "table")
"""Kinds that show the present value and no course."""


def dashboard(source_uid: str | None = None, source_name: str | None = None) -> dict[str, Any]:
    """The dashboard as Grafana's JSON model. `source_uid`: of the data source that is chosen at
    first; without, Grafana takes its default one."""
    source = {"text": source_name or source_uid, "value": source_uid} if source_uid else {}
    return {
        "id": None,
        "uid": UID,
        "title": "Longspan",
        "description": "One Longspan engine: its requests, latency, tokens, memory and stages.",
        "tags": ["longspan"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,  # one crosshair through all panels
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source_variable(source), _instance_variable()]},
        "panels": list(_panels()),
    }


def _source_variable(chosen: dict[str, str]) -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "refresh": 1,
        "current": chosen,
    }


def _instance_variable() -> dict[str, Any]:
    values = "label_values(longspan_engine_state, instance)"
    return {
        "name": "instance",
        "label": "Address",
        "type": "query",
        "datasource": _SOURCE,
        "definition": values,
        "query": {"query": values, "refId": "instance"},
        "refresh": 2,  # with the time range too, for addresses that came and went
        "sort": 1,
        "multi": False,
        "includeAll": False,
    }


def _panels() -> Iterator[dict[str, Any]]:
    """Rows and their panels with numbers and places, from left to right and from the top down."""
    number, line = 1, 0
    for title, panels in ROWS:
        place = {"x": 0, "y": line, "w": _GRID, "h": 1}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place}
        number, line, column = number + 1, line + 1, 0
        for panel in panels:
            if column + panel.width > _GRID:
                line, column = line + panel.height, 0
            place = {"x": column, "y": line, "w": panel.width, "h": panel.height}
            yield {"id": number, "gridPos": place} | _panel(panel)
            number, column = number + 1, column + panel.width
        line += panels[-1].height


def _panel(panel: Panel) -> dict[str, Any]:
    told: dict[str, Any] = {
        "type": _PLUGINS.get(panel.kind, panel.kind),
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": _defaults(panel), "overrides": list(_overrides(panel))},
        "options": KINDS[panel.kind],
        "targets": [
            _target(panel, *query, ref)
            for query, ref in zip(panel.queries, ascii_uppercase, strict=False)
        ],
    }
    if panel.kind == "table":
        hidden = dict.fromkeys(("Time", "Value", "__name__", "instance", "job"), True)
        told["transformations"] = [{"id": "organize", "options": {"excludeByName": hidden}}]
    return told


def _defaults(panel: Panel) -> dict[str, Any]:
    found: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.unit == "percentunit":
        found["max"] = 1
    if panel.kind == "stacked":
        found["custom"] = {"stacking": {"mode": "normal"}, "fillOpacity": 30}
    return found


def _overrides(panel: Panel) -> Iterator[dict[str, Any]]:
    """The colour of each series where it is 1."""
    for legend, colour in panel.colours:
        shown = {"0": {"text": "no", "color": "transparent"}, "1": {"text": "yes", "color": colour}}
        mappings = {"id": "mappings", "value": [{"type": "value", "options": shown}]}
        yield {"matcher": {"id": "byName", "options": legend}, "properties": [mappings]}


def _target(panel: Panel, expression: str, legend: str, ref: str) -> dict[str, Any]:
    instant = panel.kind in _INSTANT
    return {
        "refId": ref,
        "datasource": _SOURCE,
        "expr": expression.replace("HERE", _HERE),
        "legendFormat": legend,
        "instant": instant,
        "range": not instant,
        "format": "table" if panel.kind == "table" else "time_series",
    }
