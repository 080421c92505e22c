"""Which split a signal belongs to, decided by group and by nothing else.

What belongs here: connected components over what ties signals together, and the bucket of each. What does
not: rows and their files. All sets are placed from all signals, so a prompt that is tested in one set is
trained on in none.
"""

import hashlib
from collections.abc import Iterable, Sequence
from datetime import datetime

from assets.datasets.canonical import digest, normalise
from assets.datasets.signals import Signal

SPLITS = ("train", "validation", "test")


def place(
    signals: Sequence[Signal], *, salt: str, validation: float, test: float
) -> dict[str, tuple[str, str]]:
    """For each signal id its (group, split); `validation` and `test` are shares between 0 and 1.

    Signals are in one group when a chain of shared sessions and shared prompts joins them. The split follows
    from the salt and the group's oldest member alone: growing a group with newer signals, or adding
    unrelated ones, moves nothing. Only a signal that joins two groups can move one of them, the younger.
    """
    parents: dict[str, str] = {}
    first_seen: dict[str, datetime] = {}

    def root(member: str) -> str:
        while parents[member] != member:
            parents[member] = parents[parents[member]]
            member = parents[member]
        return member

    anchors: dict[str, str] = {}
    for signal in signals:
        members = _members(signal)
        for member in members:
            parents.setdefault(member, member)
            first_seen[member] = min(signal.occurred_at, first_seen.get(member, signal.occurred_at))
        for member in members[1:]:
            parents[root(member)] = root(members[0])
        anchors[signal.signal_id] = members[0]

    oldest: dict[str, str] = {}
    for member, seen in first_seen.items():
        top = root(member)
        best = oldest.get(top)
        if best is None or (seen, member) < (first_seen[best], best):
            oldest[top] = member
    groups = {signal_id: oldest[root(anchor)] for signal_id, anchor in anchors.items()}
    buckets = {group: bucket(group, salt, validation, test) for group in set(groups.values())}
    return {signal_id: (group, buckets[group]) for signal_id, group in groups.items()}


def bucket(group: str, salt: str, validation: float, test: float) -> str:
    """The split of a group, by the first 64 bits of SHA-256 over salt and group."""
    head = hashlib.sha256(f"{salt}\x00{group}".encode()).digest()[:8]
    share = int.from_bytes(head, "big") / 2**64
    if share < test:
        return "test"
    return "validation" if share < test + validation else "train"


def largest_share(groups: Iterable[str]) -> float:
    """The share of rows in the largest group, 0 when there are none; `groups` has one entry per row."""
    counts: dict[str, int] = {}
    for group in groups:
        counts[group] = counts.get(group, 0) + 1
    return round(max(counts.values()) / sum(counts.values()), 4) if counts else 0.0


def _members(signal: Signal) -> list[str]:
    members = []
    if signal.prompt:
        # Case and white space make no new question: without this a retyped prompt could be trained and tested.
        turns = [[turn["role"], normalise(turn["content"])] for turn in signal.prompt]
        members.append("question:" + digest(turns))
    if signal.prompt_sha256:
        members.append("prompt:" + signal.prompt_sha256)
    if signal.session_id:
        members.append("session:" + signal.session_id)
    return members or ["signal:" + signal.signal_id]
