"""Send an example's interactions and feedback through the feedback service, as an application would.

Belongs here: finding the example's loader and counting what came back. Does not belong here: the payloads.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from feedback.client import FeedbackClient, SendReport
from orchestration.screen import Screen
from orchestration.settings import Settings


@dataclass
class Loaded:
    """What the service answered: counts by ``created``, ``duplicate``, ``conflict``, ``invalid``, and reasons."""

    interactions: dict[str, int] = field(default_factory=dict)
    feedback: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)


def load_example(settings: Settings, url: str, api_key: str, screen: Screen) -> Loaded:
    """Post everything the example holds; safe to repeat, since ids make repeats duplicates."""
    loader = example_loader(settings)
    loaded = Loaded()
    if loader is None:
        return loaded
    reasons: Counter[str] = Counter()
    with FeedbackClient(url, api_key) as client:
        for name, items, send in (
            ("interactions", loader.interactions(settings.data_dir), client.send_interactions),
            ("feedback", loader.feedback(settings.data_dir), client.send_feedback),
        ):
            label = f"feedback API /v1/{name}"
            report = send(items, _shown(screen, label))
            counts = {
                "created": report.created,
                "duplicate": report.duplicate,
                "refused": len(report.refused),
            }
            setattr(loaded, name, counts)
            reasons.update(f"{name}: {refusal.message}" for refusal in report.refused)
            screen.line(label, ", ".join(f"{n:,} {what}" for what, n in counts.items() if n))
    loaded.refused = dict(reasons.most_common())
    return loaded


def _shown(screen: Screen, label: str) -> Callable[[SendReport], None]:
    return lambda report: screen.progress(label, f"{report.sent:,} sent")


def example_loader(settings: Settings) -> ModuleType | None:
    """The module ``examples/<example>/loader.py``; None when the example has none."""
    path = settings.root / "examples" / settings.example / "loader.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location(f"examples_{settings.example}_loader", path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module  # type: ignore[no-any-return]
