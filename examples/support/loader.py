"""The conversations of the support example as payloads of the feedback service.

Belongs here: reading the two JSONL files. Does not belong here: judging them; a few feedback items are
broken on purpose, and it is the service that refuses them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_DATA = Path(__file__).resolve().parent / "data"


def interactions(data_dir: Path) -> Iterator[dict[str, Any]]:
    """Payloads of `POST /v1/interactions`, in the order of time. `data_dir` is not used: the data lies beside."""
    return _read("interactions.jsonl")


def feedback(data_dir: Path) -> Iterator[dict[str, Any]]:
    """Payloads of `POST /v1/feedback`, in the order of arrival, the broken ones included. `data_dir` is not used."""
    return _read("feedback.jsonl")


def _read(name: str) -> Iterator[dict[str, Any]]:
    with (_DATA / name).open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
