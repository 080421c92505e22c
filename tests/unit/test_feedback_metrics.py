"""The Grafana dashboard asks for metrics that exist, with labels they have."""

import json
import re
from pathlib import Path

from prometheus_client import Counter, Gauge, Histogram

from feedback import metrics

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "feedback.json"
# Made from the database at each scrape.
STORED: dict[str, set[str]] = {"datamoat_dead_letters": set(), "datamoat_review_open_items": set()}


def known() -> dict[str, set[str]]:
    """Metric names as Prometheus stores them, with their labels."""
    names: dict[str, set[str]] = dict(STORED)
    for metric in vars(metrics).values():
        if isinstance(metric, Counter | Gauge | Histogram):
            labels = set(metric._labelnames)
            for suffix in ("", "_total", "_bucket", "_sum", "_count"):
                names[metric._name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return names


def test_the_dashboard_asks_for_what_there_is() -> None:
    expressions = [
        target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]
    ]
    assert expressions
    for expression in expressions:
        asked = set(re.findall(r"datamoat_\w+", expression))
        assert asked and asked <= set(known()), expression
        labels = {label for name in asked for label in known()[name]}
        for group in re.findall(r"by \(([^)]*)\)", expression):
            assert {label.strip() for label in group.split(",")} <= labels, expression
