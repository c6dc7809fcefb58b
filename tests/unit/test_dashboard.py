"""Dashboard and alerts: they can be read, and ask for nothing that is not exported."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector as PrometheusCollector
from ruamel.yaml import YAML

from blindtune.client.metrics import Collector
from blindtune.client.rounds.multiplier import PrivateMultiplier, ReferenceMultiplier
from blindtune.server.admission.refusals import Refusal
from blindtune.server.metrics import WorkerMetrics

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "blindtune.json"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
DOCUMENT = Path(__file__).parents[2] / "docs" / "observability.md"
_SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
    "info": ("_info",),
}


def exported(collector: PrometheusCollector) -> set[str]:
    """Names of all series that a collector can have, whether or not it has them already."""
    families: list[Metric] = list(collector.collect())
    return {family.name + suffix for family in families for suffix in _SUFFIXES[family.type]}


@pytest.fixture(scope="module")
def names() -> set[str]:
    nobody: PrivateMultiplier = object.__new__(ReferenceMultiplier)
    worker = WorkerMetrics(1, lambda: 0, lambda: 0, torch.device("cpu"), {"version": "1"})
    return exported(worker.registry) | exported(Collector(nobody))


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def rules() -> list[dict[str, Any]]:
    groups = YAML(typ="safe").load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Every query with where it stands."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield f"panel {panel['id']}, {target['refId']}", target["expr"]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']}", variable["query"]["query"]
    for rule in rules():
        yield f"alert {rule['alert']}", rule["expr"]


def asked(expression: str) -> set[str]:
    """The names in a query that are ours or the process's, quoted text left out."""
    return set(re.findall(r"\b(?:blindtune|process)_\w+", re.sub(r'"[^"]*"', '""', expression)))


def test_every_name_that_is_asked_for_is_exported(names: set[str]) -> None:
    found = {where: asked(expression) for where, expression in expressions()}
    assert len(found) > 30
    assert {where: gone for where, x in found.items() if (gone := x - names)} == {}
    unused = {x for x in names if x.startswith("blindtune_")} - set().union(*found.values())
    # Counts of histograms come with their buckets, and the client's version is for whoever looks for it.
    assert {x for x in unused if not x.endswith("_count")} == {"blindtune_client_build_info"}


def test_reasons_that_alerts_ask_for_exist() -> None:
    worker = WorkerMetrics(1, lambda: 0, lambda: 0, torch.device("cpu"), {"version": "1"})
    reasons = {
        sample.labels["reason"]
        for family in worker.registry.collect()
        for sample in family.samples
        if "reason" in sample.labels
    }
    assert len(reasons) > len(Refusal.__subclasses__())
    wanted = {
        reason
        for rule in rules()
        for quoted in re.findall(r'reason=~?"([^"]*)"', rule["expr"])
        for reason in quoted.split("|")
    }
    assert wanted and wanted <= reasons


def test_queries_are_closed_and_quoted() -> None:
    for where, expression in expressions():
        bare = re.sub(r'"[^"]*"', "", expression)
        assert '"' not in bare, where
        for opening, closing in ("()", "{}", "[]"):
            assert bare.count(opening) == bare.count(closing), where


def test_panels_have_numbers_of_their_own_places_of_their_own_and_the_chosen_source() -> None:
    panels = dashboard()["panels"]
    assert len({x["id"] for x in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            sources = [panel["datasource"], *(x["datasource"] for x in panel["targets"])]
            assert {x["uid"] for x in sources} == {"${datasource}"}


def test_alerts_say_what_happened_and_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
    scraped = YAML(typ="safe").load((ALERTS.parent / "prometheus.yml").read_text())
    jobs = {x["job_name"] for x in scraped["scrape_configs"]}
    assert {job for rule in rules() for job in re.findall(r'job="([^"]*)"', rule["expr"])} <= jobs
    assert all((ALERTS.parent / name).is_file() for name in scraped["rule_files"])


def test_the_documentation_has_every_metric(names: set[str]) -> None:
    text = DOCUMENT.read_text()
    ours = {re.sub(r"_(bucket|sum|count)$", "", x) for x in names if x.startswith("blindtune_")}
    assert {x for x in ours if f"`{x}`" not in text} == set()
    assert set(re.findall(r"`(blindtune_(?:worker|client)_\w+)`", text)) == ours
