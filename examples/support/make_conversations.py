"""Writes `data/interactions.jsonl` and `data/feedback.jsonl` from the questions in `conversations.yaml`.

Belongs here: who asked what on which day, which model answered, and what people made of the answer; seeded,
so that the same source always gives the same bytes. Does not belong here: questions and answers themselves,
and sending anything (the command line posts both files to the feedback service).

    python examples/support/make_conversations.py            # rewrites data/*.jsonl
    python examples/support/make_conversations.py OUT_FOLDER # writes somewhere else
"""

import hashlib
import json
import random
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

import yaml

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
SEED = 20261001
FIRST_DAY = datetime(2026, 10, 1, tzinfo=UTC)
DAYS = 14
# Every id is a name in this space, so ids stay the same when the files are made again.
SPACE = UUID("6f1d2c1e-7a54-5c0b-9a53-2f0f5a1c4e11")

# What is planted in feedback.jsonl besides ordinary feedback: defect -> number of lines.
PLANTED = {
    "identical repeats": 6,
    "same event_id, other body": 1,
    "unknown kind": 1,
    "thumb with score 7": 1,
    "time without offset": 1,
    "no interaction_id": 1,
    "interaction that never came": 4,
    "revision ahead of what it revises": 2,
}

SYSTEM = {
    "3": "You are the help assistant of Hollowmere Instruments. Answer from the handbook.",
    "4": (
        "You are the help assistant of Hollowmere Instruments. Answer from the handbook pages below, in at most"
        " five sentences. If they do not hold the answer, say so. Never say whether a medicine may be used."
    ),
}
MODELS = {"control": "heron-7b-2026-06", "candidate": "heron-7b-2026-09"}
USERS = [f"perch-user-{number}" for number in range(1001, 1042)]
AGENTS = [
    "priya.raman@hollowmere.example.com",
    "callum.reid@hollowmere.example.com",
    "marcus.oyelaran@hollowmere.example.com",
]
_OPENINGS = ["", "", "", "In short: ", "Good question. "]
_ENDINGS = ["", "", "", " Does that help?", " The handbook page has the details."]
_COMMENTS = [
    "Fast and to the point, thank you.",
    "I had to ask twice before it understood which gateway I meant.",
    "Please show the page you got this from. I wanted to forward it to our pharmacist.",
    "Could you ring me about this? Grace Tinubu, +44 20 7946 0245.",
    "Right answer, but too long to read with a cool box in the other hand.",
    "The table on the page says the same, good.",
    "Please send this to petersen@apotheke-kanal.example.com as well.",
    "Worked. The light is green.",
]

Item = dict[str, Any]


@dataclass
class Asked:
    """One conversation: the payload, the entry it came from, and whether the answer was the good one."""

    payload: Item
    entry: Item
    good: bool
    at: datetime
    user: str
    feedback: list[Item] = field(default_factory=list)


def _id(*parts: object) -> str:
    return str(uuid5(SPACE, "/".join(map(str, parts))))


def _stamp(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def _pick(rng: random.Random, percent: int) -> bool:
    return rng.randrange(100) < percent


def _answers(rng: random.Random, entry: Item) -> list[bool]:
    """Good or bad for each time the question was asked; a question with a correction has a bad answer to correct."""
    count = entry["asked"]
    if count == 1:
        return [not ("fix" in entry or _pick(rng, 25))]
    return [False, *([True] * (count // 2)), False, True][:count]


def _ask(
    rng: random.Random, entry: Item, number: int, good: bool, first_half: bool, pages: list[str]
) -> Asked:
    day = rng.randrange(7) + (0 if first_half else 7)
    at = FIRST_DAY + timedelta(days=day, minutes=rng.randrange(6 * 60, 20 * 60), seconds=rng.randrange(60))
    version = "3" if first_half else "4"
    variant = "candidate" if _pick(rng, 65 if good else 30) else "control"
    user = rng.choice(USERS)
    messages = [{"role": "system", "content": SYSTEM[version]}]
    if "before" in entry:
        messages += [{"role": role, "content": entry["before"][role]} for role in ("user", "assistant")]
    messages.append({"role": "user", "content": entry["question"]})
    found = list(entry["pages"])
    if not good and _pick(rng, 35):
        # Retrieval put something else first, which is how some of the bad answers came about.
        found.insert(0, rng.choice([page for page in pages if page not in found]))
    while len(found) < 3:
        found.append(rng.choice([page for page in pages if page not in found]))
    top = rng.randrange(68, 88)
    output = rng.choice(_OPENINGS) + entry["good" if good else "bad"] + rng.choice(_ENDINGS)
    input_tokens = (
        sum(len(message["content"]) for message in messages) // 4 + 300 * len(found) + rng.randrange(120)
    )
    output_tokens = len(output) // 4 + rng.randrange(8)
    payload = {
        "interaction_id": _id("interaction", entry["question"], number),
        "session_id": _id("session", user, day),
        "user_id": user,
        "occurred_at": _stamp(at),
        "messages": messages,
        "output": output,
        "retrieved": [
            {
                "document_id": page if page.startswith("tickets/") else f"handbook/{page}",
                "source": "tickets" if page.startswith("tickets/") else "handbook",
                "rank": rank,
                "score": (top - 7 * (rank - 1)) / 100,
            }
            for rank, page in enumerate(found, start=1)
        ],
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "cost_usd": (input_tokens * 2 + output_tokens * 8) / 10_000_000,
        "latency_ms": 400 + output_tokens * (11 if variant == "control" else 9) + rng.randrange(300),
        "provider": "self-hosted",
        "model": MODELS[variant],
        "prompt_name": "help-assistant",
        "prompt_version": version,
        "prompt_hash": hashlib.sha256(SYSTEM[version].encode()).hexdigest(),
        "app_release": "perch-2026.09.2" if day < 5 else "perch-2026.10.0",
        "variant": variant,
    }
    return Asked(payload, entry, good, at, user)


def make_interactions(rng: random.Random, entries: list[Item]) -> list[Asked]:
    """One `Asked` for every time a question was asked, in the order of time."""
    pages = sorted({page for entry in entries for page in entry["pages"] if not page.startswith("tickets/")})
    asked = []
    for entry in entries:
        half = _pick(rng, 50)
        for number, good in enumerate(_answers(rng, entry)):
            # The first three askings share a prompt version, so that good and bad answers to one prompt meet.
            asked.append(_ask(rng, entry, number, good, half if number < 3 else not half, pages))
    asked.sort(key=lambda one: (one.at, one.payload["interaction_id"]))
    for one in asked[9::37]:
        one.payload["train_ok"] = False  # this customer switched training off under Account, Privacy
    return asked


def _event(one: Asked, kind: str, after: timedelta, author: str, role: str, **rest: Any) -> Item:
    feedback_id = _id(
        "feedback", one.payload["interaction_id"], kind, rest.get("label", "") if kind == "implicit" else ""
    )
    item = {
        "event_id": _id("event", feedback_id, rest.get("revision", 1)),
        "feedback_id": feedback_id,
        "op": "create",
        "revision": 1,
        "kind": kind,
        "interaction_id": one.payload["interaction_id"],
        "session_id": one.payload["session_id"],
        "author_id": author,
        "author_role": role,
        "annotator_kind": "CODE" if kind == "implicit" else "HUMAN",
        "occurred_at": _stamp(one.at + after),
        **rest,
    }
    one.feedback.append(item)
    return item


def _thumb(one: Asked, up: bool, after: timedelta, **rest: Any) -> Item:
    label = "up" if up else "down"
    return _event(one, "thumb", after, one.user, "end_user", score=int(up), label=label, **rest)


def _people_react(rng: random.Random, asked: list[Asked]) -> None:
    """Shown, thumbs, copies and the like: what the users did."""
    for one in asked:
        entry = one.entry
        if _pick(rng, 76):
            _event(one, "implicit", timedelta(seconds=1), one.user, "end_user", label="shown")
        after = timedelta(seconds=rng.randrange(15, 400))
        if one.good and _pick(rng, 72):
            _thumb(one, not _pick(rng, 6), after)
        elif not one.good and _pick(rng, 78):
            if _pick(rng, 12):
                _thumb(one, True, after)  # sounded convincing
            elif _pick(rng, 60):
                _thumb(one, False, after, reasons=entry["reasons"], explanation=entry["why"])
            else:
                _thumb(one, False, after, reasons=entry["reasons"])
        if one.good and _pick(rng, 12):
            _event(one, "implicit", after, one.user, "end_user", label="copied")
        if not one.good and _pick(rng, 16):
            label = rng.choice(["rephrased", "regenerated", "abandoned"])
            _event(one, "implicit", after, one.user, "end_user", label=label)
    for one, text in zip(rng.sample(asked, len(_COMMENTS)), _COMMENTS, strict=True):
        _event(
            one, "comment", timedelta(minutes=rng.randrange(2, 50)), one.user, "end_user", explanation=text
        )


def _colleagues_correct(rng: random.Random, asked: list[Asked]) -> None:
    """One correction for each entry that has one, and one flag, by people of the support desk on the next day."""
    done: set[str] = set()
    for one in asked:
        entry = one.entry
        if one.good or entry["question"] in done:
            continue
        done.add(entry["question"])
        agent = rng.choice(AGENTS)
        after = timedelta(hours=rng.randrange(14, 26), minutes=rng.randrange(60))
        if "fix" in entry:
            _event(
                one,
                "correction",
                after,
                agent,
                "support_agent",
                correction=entry["fix"],
                reasons=entry["reasons"],
            )
        if "flag" in entry:
            _event(one, "flag", after, agent, "support_agent", label=entry["flag"], explanation=entry["why"])


def _minds_change(rng: random.Random, asked: list[Asked]) -> list[Item]:
    """Revisions and retractions; returns the two revisions that shall arrive ahead of what they revise."""
    thumbs = [(one, item) for one in asked for item in one.feedback if item["kind"] == "thumb"]
    chosen = rng.sample(thumbs, 10)
    for one, item in chosen[:6]:
        up = item["label"] == "down"
        _thumb(one, up, timedelta(minutes=rng.randrange(10, 600)), op="revise", revision=2)
    for one, item in chosen[6:]:
        gone = _thumb(
            one, item["label"] == "up", timedelta(minutes=rng.randrange(10, 90)), op="retract", revision=2
        )
        del gone["score"], gone["label"]
    corrections = [
        (one, item)
        for one in asked
        for item in one.feedback
        if item["kind"] == "correction" and item["correction"].find(". ") > 30
    ]
    revised = []
    for one, item in rng.sample(corrections, 4):
        # First written in a hurry, then in full.
        full = item["correction"]
        item["correction"] = full[: full.find(". ") + 1]
        later = datetime.fromisoformat(item["occurred_at"]) - one.at + timedelta(minutes=rng.randrange(3, 40))
        author, role = item["author_id"], item["author_role"]
        revised.append(
            _event(
                one,
                "correction",
                later,
                author,
                role,
                op="revise",
                revision=2,
                correction=full,
                reasons=item["reasons"],
            )
        )
    return revised[:2]


def _plant(rng: random.Random, events: list[Item]) -> list[Item]:
    """Puts what PLANTED names among the events."""
    template = next(item for item in events if item["kind"] == "thumb" and item["op"] == "create")
    planted = []

    def variation(name: str, **changes: Any) -> Item:
        item = {
            **template,
            "event_id": _id("planted", name),
            "feedback_id": _id("planted feedback", name),
            **changes,
        }
        planted.append(item)
        return item

    for number in range(PLANTED["interaction that never came"]):
        variation(f"orphan {number}", interaction_id=_id("interaction", "never came", number))
    variation("unknown kind", kind="applause")
    variation("score 7", score=7)
    variation("naive time", occurred_at="2026-10-06T09:30:00")
    del variation("no interaction")["interaction_id"]
    out = list(events)
    for item in planted:
        out.insert(rng.randrange(len(out)), item)
    for item in rng.sample(events, PLANTED["identical repeats"]):
        out.insert(out.index(item) + rng.randrange(1, 6), dict(item))  # an app that retried
    return [*out, {**template, "explanation": "The same id once more, with other words."}]


def make_conversations(seed: int = SEED) -> dict[str, bytes]:
    """File name -> bytes of the two JSONL files."""
    entries: list[Item] = yaml.safe_load((HERE / "conversations.yaml").read_text(encoding="utf-8"))
    rng = random.Random(seed)
    asked = make_interactions(rng, entries)
    _people_react(rng, asked)
    _colleagues_correct(rng, asked)
    early = _minds_change(rng, asked)
    events = sorted(
        (item for one in asked for item in one.feedback),
        key=lambda item: (item["occurred_at"], item["event_id"]),
    )
    for item in early:
        events.remove(item)
        first = next(n for n, other in enumerate(events) if other["feedback_id"] == item["feedback_id"])
        events.insert(first, item)
    files = {"interactions.jsonl": [one.payload for one in asked], "feedback.jsonl": _plant(rng, events)}
    return {
        name: "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()
        for name, items in files.items()
    }


def main(folder: Path = DATA) -> None:
    """Writes both files."""
    for name, content in make_conversations().items():
        (folder / name).write_bytes(content)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:2]))
