"""dbt models split so that a bad source stops only its own descendants."""

from typing import Any

from assets.warehouse.families import families


def manifest(parents: dict[str, list[str]], daily: set[str]) -> dict[str, Any]:
    """A manifest of models ``m.<name>`` and sources ``s.<name>``, as far as families reads one."""
    sources = sorted({p for listed in parents.values() for p in listed if p.startswith("s.")})
    return {
        "nodes": {
            name: {"resource_type": "model", "tags": ["daily"] if name in daily else []} for name in parents
        },
        "sources": {
            name: {
                "name": name.removeprefix("s."),
                "source_name": "feedback" if name == "s.log" else "raw",
            }
            for name in sources
        },
        "parent_map": {**parents, **{name: [] for name in sources}},
    }


def test_models_are_grouped_by_the_raw_sources_they_descend_from() -> None:
    found = families(
        manifest(
            {
                "m.tickets": ["s.tickets"],
                "m.ticket_report": ["m.tickets"],
                "m.products": ["s.products"],
                "m.both": ["m.tickets", "m.products"],
                "m.events": ["s.log"],
            },
            daily=set(),
        )
    )
    assert {family.name: family.models for family in found} == {
        "before_days": ("m.events",),
        "before_days_products": ("m.products",),
        "before_days_tickets": ("m.ticket_report", "m.tickets"),
        "before_days_products_tickets": ("m.both",),
    }


def test_daily_models_what_they_need_and_what_needs_them_are_apart() -> None:
    found = families(
        manifest(
            {"m.view": ["s.log"], "m.fact": ["m.view"], "m.fold": ["m.fact"], "m.mart": ["m.fold", "m.view"]},
            daily={"m.fact", "m.fold"},
        )
    )
    assert [(family.name, family.daily, family.models) for family in found] == [
        ("before_days", False, ("m.view",)),
        ("daily", True, ("m.fact", "m.fold")),
        ("after_days", False, ("m.mart",)),
    ]


def test_a_seed_counts_as_a_model_and_a_test_does_not() -> None:
    content = manifest({"m.view": ["s.log"]}, daily=set())
    content["nodes"]["t.not_null"] = {"resource_type": "test", "tags": []}
    content["parent_map"]["t.not_null"] = ["m.view"]
    assert [family.models for family in families(content)] == [("m.view",)]
