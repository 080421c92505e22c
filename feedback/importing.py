"""``python -m feedback import``: the export of another system, read from files and sent through the public API.

Belongs here: reading JSON and JSON Lines (also gzipped), sending in order, keeping what was refused.
Does not belong here: any format (``feedback.formats``), how items are sent (``feedback.client``).
"""

import gzip
import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from feedback.client import FeedbackClient, RefusedItem
from feedback.formats import Format, Item
from feedback.payloads import PayloadError

FORMATS = ("chatlog", "label_studio", "langfuse", "langsmith", "mlflow", "opik", "otlp", "phoenix")
RECORDS_AT_ONCE = 500


class ImportRefused(ValueError):
    """A file that cannot be read as an export; the text names it and the remedy."""


@dataclass
class Imported:
    """What became of an export: counts of items by kind and fate, of records read and refused."""

    records: int = 0
    refused_records: int = 0
    items: Counter[tuple[str, str]] = field(default_factory=Counter)


def format_named(name: str) -> Format:
    """The module of a format. Raises ImportRefused if there is none."""
    if name not in FORMATS:
        raise ImportRefused(f"there is no format {name}; take one of {', '.join(FORMATS)}")
    return cast(Format, importlib.import_module(f"feedback.formats.{name}"))


def import_file(
    client: FeedbackClient, name: str, path: Path, on_progress: Callable[[Imported], None] | None = None
) -> Imported:
    """Send everything in the export at ``path``. Doing it again stores nothing twice.

    A record that is not of the format, or whose items the service refuses, goes with the reason to
    ``<path>.refused.jsonl``; the others are stored. Raises ImportRefused, and ``client.SendFailed``.
    """
    read = format_named(name)
    imported = Imported()
    refused = path.with_name(path.name + ".refused.jsonl")
    refused.unlink(missing_ok=True)
    for batch in _batches(records(path)):
        items: list[tuple[int, Any, Item]] = []
        lost: list[dict[str, Any]] = []
        for place, record in batch:
            imported.records += 1
            try:
                for item in read.to_items(record):
                    items.append((place, record, item))
            except PayloadError as error:
                imported.refused_records += 1
                lost.append({"place": place, "reason": error.message, "field": error.field, "record": record})
        for kind, send in (("interaction", client.send_interactions), ("feedback", client.send_feedback)):
            chosen = [entry for entry in items if entry[2].kind == kind]
            report = send([item.body for _, _, item in chosen])
            imported.items[kind, "created"] += report.created
            imported.items[kind, "duplicate"] += report.duplicate
            imported.items[kind, "refused"] += len(report.refused)
            lost += [_lost(refusal, *chosen[refusal.index]) for refusal in report.refused]
        if lost:
            with refused.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lost)
        if on_progress is not None:
            on_progress(imported)
    return imported


def records(path: Path) -> Iterator[tuple[int, Any]]:
    """The records of a file with their places, from 1: a JSON array, one object, or JSON Lines; gzipped or not.

    Raises ImportRefused, naming the file and the line.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            first = file.readline()
            try:
                if not first.strip().startswith("["):
                    yield 1, json.loads(first)
                    lines = True
                else:
                    lines = False
            except json.JSONDecodeError:
                lines = False
            if lines:
                yield from _lines(path, file)
                return
            whole = json.loads(first + file.read())
    except ImportRefused:
        raise
    except FileNotFoundError:
        raise ImportRefused(f"{path} is missing") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ImportRefused(f"{path} cannot be read: {error}; export it as UTF-8 JSON again") from error
    except (ValueError, RecursionError) as error:
        raise ImportRefused(f"{path} is neither JSON nor JSON Lines: {error}") from error
    yield from enumerate(whole if isinstance(whole, list) else [whole], start=1)


def _lines(path: Path, file: Any) -> Iterator[tuple[int, Any]]:
    for place, line in enumerate(file, start=2):
        if not line.strip():
            continue
        try:
            yield place, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ImportRefused(
                f"{path}, line {place} is not JSON: {error}; the lines before it are stored, and importing the"
                " mended file again stores them no second time"
            ) from error


def _batches(found: Iterator[tuple[int, Any]]) -> Iterator[Sequence[tuple[int, Any]]]:
    batch = []
    for entry in found:
        batch.append(entry)
        if len(batch) == RECORDS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _lost(refusal: RefusedItem, place: int, record: Any, item: Item) -> dict[str, Any]:
    return {
        "place": place,
        "reason": refusal.message,
        "field": refusal.field,
        "remedy": refusal.remedy,
        "item": item.body,
        "record": record,
    }
