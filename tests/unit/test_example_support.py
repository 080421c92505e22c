"""The support example: its files are what its scripts make, hold what its README says, and fit together.

Belongs here: checks of the example's data alone. Does not belong here: what the pipeline does with it.
"""

import asyncio
import csv
import importlib.util
import json
import re
import sys
from collections import Counter, defaultdict
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from assets.sources.contract import load_contracts
from feedback.payloads import PayloadError, body_sha256, parse_event, parse_interaction

SUPPORT = Path(__file__).resolve().parents[2] / "examples" / "support"
DATA = SUPPORT / "data"
HANDBOOK = DATA / "handbook"
README = (SUPPORT / "README.md").read_text(encoding="utf-8")


@cache
def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_support_{name}", SUPPORT / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while the class is made.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


@cache
def interactions() -> list[dict[str, Any]]:
    return list(script("loader").interactions(Path("unused")))


@cache
def feedback() -> list[dict[str, Any]]:
    return list(script("loader").feedback(Path("unused")))


@cache
def tickets() -> list[list[str]]:
    with (DATA / "tickets.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


def golden() -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / "golden.jsonl").read_text(encoding="utf-8").splitlines()]


def ticket_defects() -> list[str]:
    """What is wrong with each refused row, by rules written down here once more."""
    found, seen = [], set()
    for row in tickets():
        ticket_id, opened_at, *_, priority, status, subject, body = row if len(row) == 10 else [""] * 10
        if len(row) != 10:
            found.append("one field too many" if len(row) > 10 else "fields missing")
        elif not re.fullmatch(r"T-\d{4}", ticket_id):
            found.append("malformed ticket_id")
        elif ticket_id in seen:
            found.append("duplicate ticket_id")
        elif not re.fullmatch(r"2026-(0[1-9]|1[0-2])-\d\dT\d\d:\d\d:00Z", opened_at):
            found.append("unreadable opened_at")
        elif priority not in ("P1", "P2", "P3", "P4"):
            found.append("unknown priority")
        elif status not in ("open", "waiting", "closed"):
            found.append("unknown status")
        elif not subject:
            found.append("empty subject")
        else:
            assert body
            seen.add(ticket_id)
    return found


def good_ticket_ids() -> set[str]:
    broken = {"T-0134", "T-0256"}
    return {
        row[0]
        for row in tickets()
        if row[0] not in broken
        and row[1].startswith("2026-")
        and row[6] in ("P1", "P2", "P3", "P4")
        and row[7] in ("open", "waiting", "closed")
        and row[8]
    }


@pytest.mark.parametrize("name", ["make_documents", "make_tickets", "make_conversations"])
def test_committed_files_are_what_the_scripts_make(name: str, tmp_path: Path) -> None:
    target = tmp_path / "tickets.csv" if name == "make_tickets" else tmp_path
    script(name).main(target)
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    committed = HANDBOOK if name == "make_documents" else DATA
    assert len(made) == {"make_documents": 9, "make_tickets": 1, "make_conversations": 2}[name]
    for path in made:
        relative = path.relative_to(tmp_path)
        assert path.read_bytes() == (committed / relative).read_bytes(), (
            f"examples/support/data differs from what {name}.py makes at {relative}: run the script"
        )


def test_contracts_load() -> None:
    contracts, errors = load_contracts([SUPPORT / "contracts"], {"SITE_PACKAGES": "/anywhere"})
    assert errors == []
    kinds = {contract.name: contract.kind for contract in contracts}
    assert kinds == {
        "golden": "golden",
        "handbook": "documents",
        "packages": "documents",
        "products": "table",
        "tickets": "table",
    }
    uses = {contract.name: contract.allowed_uses for contract in contracts}
    assert "finetune" not in uses["tickets"]
    assert uses["packages"] == ("rag",)
    for contract in contracts:
        if contract.name != "packages":
            assert list(contract.folder.glob(contract.glob)), f"{contract.name} matches no file"


def test_refused_shares_stay_below_the_limits_of_the_contracts() -> None:
    contracts, _ = load_contracts([SUPPORT / "contracts"], {"SITE_PACKAGES": "/anywhere"})
    limits = {contract.name: contract.max_refused_share for contract in contracts}
    assert limits["tickets"] > 14 / 400
    assert limits["products"] > 1 / 13
    assert limits["handbook"] > 3 / 34


def test_handbook_has_the_pages_the_readme_counts() -> None:
    files = [path for path in HANDBOOK.rglob("*") if path.is_file()]
    broken = {"calibration-certificate-0417.pdf", "anleitung-roost-4.md", "holiday-cover.md"}
    counts = Counter(path.suffix for path in files if path.name not in broken)
    assert counts == {".md": 19, ".html": 6, ".pdf": 3, ".docx": 3}
    assert "31 pages: 19 Markdown, 6 HTML, 3 PDF, 3 Word; and 3 broken files" in README
    for path in files:
        if path.suffix in (".md", ".html") and path.name not in broken:
            words = len(re.sub(r"<[^>]+>", " ", path.read_text(encoding="utf-8")).split())
            assert 150 <= words <= 800, f"{path.name} has {words} words"


def test_broken_files_are_broken() -> None:
    with pytest.raises(UnicodeDecodeError):
        (HANDBOOK / "gateways" / "anleitung-roost-4.md").read_text(encoding="utf-8")
    assert (HANDBOOK / "procedures" / "holiday-cover.md").read_bytes() == b""
    truncated = (HANDBOOK / "quality" / "calibration-certificate-0417.pdf").read_bytes()
    assert truncated.startswith(b"%PDF-1.4")
    assert b"/Catalog" not in truncated
    assert b"%%EOF" not in truncated


@pytest.mark.parametrize("name", ["audit-trail-and-signatures", "calibration-guide", "temperature-mapping"])
def test_pdf_cross_references_point_at_their_objects(name: str) -> None:
    content = (HANDBOOK / "quality" / f"{name}.pdf").read_bytes()
    start = int(content.rsplit(b"startxref\n", 1)[1].split()[0])
    assert content[start:].startswith(b"xref\n")
    offsets = [int(match) for match in re.findall(rb"(\d{10}) 00000 n ", content[start:])]
    assert offsets
    for number, offset in enumerate(offsets, start=1):
        assert content[offset:].startswith(b"%d 0 obj\n" % number)


@pytest.mark.parametrize("source", sorted((SUPPORT / "documents").rglob("*.md")), ids=lambda path: path.stem)
def test_a_parser_reads_every_word_of_the_made_documents(source: Path) -> None:
    import xberg

    target = HANDBOOK / source.relative_to(SUPPORT / "documents").with_suffix("")
    request = xberg.ExtractInput(kind=xberg.ExtractInputKind.URI, uri=str(target))
    if target.name == "calibration-certificate-0417.pdf":
        with pytest.raises(RuntimeError):
            asyncio.run(xberg.extract(request, xberg.ExtractionConfig()))
        return
    result = asyncio.run(xberg.extract(request, xberg.ExtractionConfig()))
    read = Counter(re.findall(r"[\w@.]+", result.results[0].content))
    for block in script("make_documents").parse(source.read_text(encoding="utf-8")):
        for text in [block.text, *(cell for row in block.rows for cell in row)]:
            missing = [
                word for word in re.findall(r"\w{3,}", text) if not any(word in token for token in read)
            ]
            assert not missing, f"{target.name} lost {missing} of {text!r}"


def test_planted_ticket_defects_are_those_the_script_names() -> None:
    assert len(tickets()) == 400
    assert Counter(ticket_defects()) == script("make_tickets").PLANTED
    assert len(ticket_defects()) == 14
    assert "14 of 400 rows refused (3.5 %); 386 land" in README


def test_products_agree_with_the_price_page_and_the_tickets() -> None:
    with (DATA / "products.csv").open(encoding="utf-8", newline="") as file:
        products = {row["sku"]: row for row in csv.DictReader(file)}
    assert len(products) == 13
    assert [sku for sku, row in products.items() if not re.fullmatch(r"\d+\.\d\d", row["price_gbp"])] == [
        "ROOST-5"
    ]
    page = (HANDBOOK / "help" / "plans-and-prices.html").read_text(encoding="utf-8")
    quoted = dict(re.findall(r"<td>([A-Z0-9]+-[A-Z0-9]+)</td><td>£([\d.]+)</td>", page))
    assert len(quoted) == 9
    assert {sku: float(price) for sku, price in quoted.items()} == {
        sku: float(products[sku]["price_gbp"]) for sku in quoted
    }
    assert {row[4] for row in tickets() if len(row) == 10} <= set(products) - {"ROOST-5"}


def test_golden_questions_name_pages_that_can_be_read() -> None:
    rows = golden()
    assert len(rows) == len({row["question"] for row in rows}) == 60
    broken = {
        "quality/calibration-certificate-0417.pdf",
        "gateways/anleitung-roost-4.md",
        "procedures/holiday-cover.md",
    }
    for row in rows:
        assert (HANDBOOK / row["path"]).is_file(), row["path"]
        assert row["path"] not in broken
    pages = {path.relative_to(HANDBOOK).as_posix() for path in HANDBOOK.rglob("*") if path.is_file()}
    assert {row["path"] for row in rows} == pages - broken, "every page is the answer to some question"
    asked = {item["messages"][-1]["content"] for item in interactions()}
    assert len(asked & {row["question"] for row in rows}) == 3


def test_interactions_are_accepted_and_cover_fourteen_days() -> None:
    items = interactions()
    for item in items:
        parse_interaction(json.dumps(item).encode())
    assert len({item["interaction_id"] for item in items}) == len(items) == 150
    days = {item["occurred_at"][:10] for item in items}
    assert days == {f"2026-10-{day:02d}" for day in range(1, 15)}
    assert len({item["model"] for item in items}) == len({item["prompt_version"] for item in items}) == 2
    assert sum(not item.get("train_ok", True) for item in items) == 4


def test_retrieved_documents_exist() -> None:
    for item in interactions():
        assert [found["rank"] for found in item["retrieved"]] == list(range(1, len(item["retrieved"]) + 1))
        for found in item["retrieved"]:
            source, _, path = found["document_id"].partition("/")
            assert source == found["source"]
            if source == "handbook":
                assert (HANDBOOK / path).is_file(), path
            else:
                assert path in good_ticket_ids(), path
    found_ticket = [
        item for item in interactions() if any(found["source"] == "tickets" for found in item["retrieved"])
    ]
    assert len(found_ticket) == 8


def test_a_ticket_that_is_retrieved_is_about_the_question() -> None:
    subjects = {row[0]: row[8] for row in tickets() if len(row) == 10}
    entries = yaml.safe_load((SUPPORT / "conversations.yaml").read_text(encoding="utf-8"))
    retrieved = {
        page.split("/")[1] for entry in entries for page in entry["pages"] if page.startswith("tickets/")
    }
    assert {subjects[ticket] for ticket in retrieved} == {
        "Correct a wrong reading",
        "Stopped by the receiver",
        "Gaps in our copy of the readings",
        "Mains lost alarm every night",
    }


def test_the_service_would_answer_feedback_as_the_readme_says() -> None:
    outcomes: Counter[str] = Counter()
    refused = set()
    stored: dict[str, str] = {}
    for item in feedback():
        try:
            event = parse_event(json.dumps(item).encode())
        except PayloadError as error:
            outcomes["invalid"] += 1
            refused.add(error.field)
            continue
        event_id, body = str(event.event_id), body_sha256(event, None)
        if event_id in stored:
            outcomes["duplicate" if stored[event_id] == body else "conflict"] += 1
        else:
            stored[event_id] = body
            outcomes["created"] += 1
    assert refused == {"kind", "score", "occurred_at", "interaction_id"}
    assert outcomes == {"created": 302, "duplicate": 6, "conflict": 1, "invalid": 4}
    assert "302 of the 313 lines are stored, 6 are duplicates, 1 conflicts and 4 are invalid" in README


def valid_feedback() -> list[dict[str, Any]]:
    """What would be stored, in the order of arrival."""
    stored: dict[str, dict[str, Any]] = {}
    for item in feedback():
        try:
            parse_event(json.dumps(item).encode())
        except PayloadError:
            continue
        stored.setdefault(item["event_id"], item)
    return list(stored.values())


def test_planted_feedback_is_what_the_script_names() -> None:
    planted = script("make_conversations").PLANTED
    asked = {item["interaction_id"] for item in interactions()}
    stored = valid_feedback()
    orphans = [item for item in stored if item["interaction_id"] not in asked]
    assert len(orphans) == planted["interaction that never came"] == 4
    arrived: set[str] = set()
    early = 0
    for item in stored:
        early += item["op"] == "revise" and item["feedback_id"] not in arrived
        arrived.add(item["feedback_id"])
    assert early == planted["revision ahead of what it revises"] == 2
    assert Counter(item["op"] for item in stored) == {"create": 288, "revise": 10, "retract": 4}


def test_feedback_comes_after_the_answer() -> None:
    answered = {
        item["interaction_id"]: datetime.fromisoformat(item["occurred_at"]) for item in interactions()
    }
    for item in valid_feedback():
        if item["interaction_id"] in answered:
            delay = datetime.fromisoformat(item["occurred_at"]) - answered[item["interaction_id"]]
            assert timedelta(0) < delay < timedelta(days=2)


def test_there_is_enough_to_learn_from() -> None:
    by_id = {item["interaction_id"]: item for item in interactions()}
    current: dict[str, dict[str, Any]] = {}
    for item in sorted(
        valid_feedback(), key=lambda item: (item["revision"], item["occurred_at"], item["event_id"])
    ):
        current[item["feedback_id"]] = item
    kept = [item for item in current.values() if item["op"] != "retract" and item["interaction_id"] in by_id]
    corrections = [item["correction"] for item in kept if item["kind"] == "correction"]
    assert len(set(corrections)) == 30
    for item in kept:
        if item["kind"] == "correction":
            assert item["correction"] not in by_id[item["interaction_id"]]["output"]
    liked: dict[str, set[str]] = defaultdict(set)
    disliked: dict[str, set[str]] = defaultdict(set)
    for item in kept:
        if item["kind"] == "thumb":
            answer = by_id[item["interaction_id"]]
            side = liked if item["score"] else disliked
            side[json.dumps(answer["messages"])].add(answer["output"])
    assert len(set(liked) & set(disliked)) == 29
    assert "29 prompts have an" in README


def test_example_stays_small() -> None:
    files = [path for path in SUPPORT.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 1_000_000
