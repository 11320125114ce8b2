"""The dashboard and the alert rules speak of what `/metrics` really tells, and of all of it."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import combinations, pairwise
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from actors.stats import EngineStats, EngineStatus, HistogramStats, RequestStats, StageStats
from serving.alerts import alert_rules, rules_text
from serving.dashboard import UID, dashboard
from serving.metrics import render
from serving.panels import STATE_COLOURS
from serving.service import ServedModel

SOME = HistogramStats([0.1, 1.0], [3, 2, 1], 4.5)
BUSY = EngineStats(
    3, waiting=2, running=5, pages=100, pages_free=60, pages_kept=35, window_pages=20,
    window_pages_free=8, steps=77, prompt_tokens=1000, cached_tokens=400, drawn_tokens=300,
    in_flight=2, context=8192, stage_s=[1.5],
    stages=[StageStats(0, "10.0.0.1", "cpu", "Unix socket", (0, 18), 66, 3400, 262144, 5)],
    requests=RequestStats({}, {}, SOME, SOME, SOME, SOME, SOME),
)  # fmt: skip
"""An engine with all that an engine can have: windows, stages and requests."""

Samples = dict[str, list[dict[str, str]]]


def told() -> tuple[Samples, dict[str, str]]:
    """Of the page's samples by name: the labels of each, and the type of their metric."""
    page, _ = render(ServedModel("tiny", 4096, 0, "fp"), EngineStatus("ready"), BUSY, "text/plain")
    samples, types = defaultdict(list), {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            types[sample.name] = family.type
            samples[sample.name].append(sample.labels)
    return samples, types


SAMPLES, TYPES = told()
MODEL = dashboard()
PANELS = [panel for panel in MODEL["panels"] if panel["type"] != "row"]
TARGETS = {
    f"{panel['title']}, {target['refId']}": target
    for panel in PANELS
    for target in panel["targets"]
}
RULES = [pytest.param(rule, id=rule["alert"]) for rule in alert_rules()["groups"][0]["rules"]]

HERE = {"instance": "$instance"}
_SELECTOR = re.compile(r"\b(longspan_\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)="([^"]*)"')


def selectors(expression: str) -> list[tuple[str, dict[str, str]]]:
    """The metrics of an expression, each with its matchers."""
    found = _SELECTOR.findall(expression)
    return [(name, dict(_MATCHER.findall(matchers))) for name, matchers in found]


def check(expression: str, added: dict[str, str]) -> None:
    """Each metric is on the page with the labels that are asked for, but for those that Prometheus
    adds; of counters the rise is taken, of others the value."""
    assert selectors(expression)
    for name, matchers in selectors(expression):
        assert added.items() <= matchers.items(), "an expression that mixes addresses"
        own = dict(matchers.items() - added.items())
        assert any(own.items() <= labels.items() for labels in SAMPLES[name]), (
            f"the page has no {name} with {own}"
        )
    rising = set(re.findall(r"(?:rate|increase)\((longspan_\w+)", expression))
    assert rising == {n for n, _ in selectors(expression) if TYPES[n] in ("counter", "histogram")}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_a_panel_asks_for_what_the_page_tells(target: dict[str, Any]) -> None:
    """A metric that is renamed would leave its panel empty, and nobody would know why."""
    check(target["expr"], HERE)
    assert set(re.findall(r"\$\w+", target["expr"])) <= {"$instance", "$__rate_interval"}
    assert "{HERE" not in target["expr"]


@pytest.mark.parametrize("rule", RULES)
def test_an_alert_watches_what_the_page_tells(rule: dict[str, Any]) -> None:
    check(rule["expr"], {})
    for text in rule["annotations"].values():
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= {"instance"}


def test_all_that_the_page_tells_is_shown() -> None:
    """What no panel shows nobody sees."""
    shown: Samples = defaultdict(list)
    for target in TARGETS.values():
        for name, matchers in selectors(target["expr"]):
            shown[name].append(dict(matchers.items() - HERE.items()))
    for name, samples in SAMPLES.items():
        if TYPES[name] == "histogram" and not name.endswith("_bucket"):
            continue  # sums and counts: percentiles tell more than a mean
        for labels in samples:
            assert any(asked.items() <= labels.items() for asked in shown[name]), (name, labels)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_a_legend_names_labels_that_its_series_have(target: dict[str, Any]) -> None:
    """Grafana shows nothing where a label is missing, so all series would look alike."""
    expression = target["expr"]
    ((name, matchers), *_) = selectors(expression)
    grouped = re.findall(r"(?:sum|max) (?:by )?\(([\w, ]+)\)", expression)
    values = {label: {labels[label] for labels in SAMPLES[name]} for label in SAMPLES[name][0]}
    left = set(re.split(r", *", grouped[0])) if grouped else set(values)
    named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    assert named <= left
    # Otherwise several series would have one legend.
    several = {label for label in left - {"le"} - set(matchers) if len(values[label]) > 1}
    summed = re.match(r"(sum|histogram_quantile)\(", expression)
    assert several <= named or summed or target["format"] == "table"


def test_percentiles_are_of_buckets_added_up() -> None:
    """`histogram_quantile` over anything else gives numbers too, but wrong ones."""
    asked = [each["expr"] for each in TARGETS.values() if "quantile" in each["expr"]]
    form = re.compile(
        r"histogram_quantile\((0\.5|0\.95|0\.99), "
        r"sum by \(le\) \(rate\((\w+)_bucket\{[^}]*\}\[\$__rate_interval\]\)\)\)"
    )
    found = defaultdict(set)
    for expression in asked:
        match = form.fullmatch(expression)
        assert match, expression
        found[match[2]].add(match[1])
    histograms = {n.removesuffix("_bucket") for n in TYPES if n.endswith("_bucket")}
    assert found == dict.fromkeys(histograms, {"0.5", "0.95", "0.99"})


def test_each_state_of_the_engine_has_its_colour() -> None:
    states = {labels["state"] for labels in SAMPLES["longspan_engine_state"]}
    assert set(STATE_COLOURS) == states
    state = next(panel for panel in PANELS if panel["title"] == "State")
    coloured = {each["matcher"]["options"] for each in state["fieldConfig"]["overrides"]}
    assert coloured == set(STATE_COLOURS)


def test_panels_say_what_they_show_and_in_which_unit() -> None:
    for panel in PANELS:
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
    units = {panel["title"]: panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS}
    assert units["Time to the first token"] == units["Time between tokens"] == "s"
    assert units["Busy"] == units["Cached share"] == "percentunit"
    assert units["Memory of stages"] == "bytes"


def test_panels_lie_in_their_rows_and_on_no_other() -> None:
    fields = defaultdict(list)
    for panel in MODEL["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        for line in range(place["y"], place["y"] + place["h"]):
            fields[line].append(range(place["x"], place["x"] + place["w"]))
    for taken in fields.values():
        assert not any(set(one) & set(other) for one, other in combinations(taken, 2))
    lines = [panel["gridPos"]["y"] for panel in MODEL["panels"]]
    assert all(above <= below for above, below in pairwise(lines))
    numbers = [panel["id"] for panel in MODEL["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_all_panels_read_the_source_that_is_chosen_above() -> None:
    names = [variable["name"] for variable in MODEL["templating"]["list"]]
    assert names == ["datasource", "instance"]
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert MODEL["templating"]["list"][1]["datasource"] == chosen
    for panel in PANELS:
        assert panel["datasource"] == chosen
        assert all(target["datasource"] == chosen for target in panel["targets"])
    assert dashboard("abc")["templating"]["list"][0]["current"]["value"] == "abc"


def test_the_uid_stays() -> None:
    """Links and bookmarks hold it, and a second one would make a second dashboard."""
    assert (MODEL["uid"], UID, MODEL["id"]) == ("longspan", "longspan", None)


def test_the_rule_file_is_yaml_of_the_rules() -> None:
    assert yaml.safe_load(rules_text()) == alert_rules()
