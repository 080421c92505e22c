"""Splits by group: sticky, whole groups only, and of the size asked for."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from assets.datasets.splits import bucket, place
from tests.unit.dataset_strategies import signal, signal_lists

SHARES: dict[str, Any] = {"salt": "s", "validation": 0.3, "test": 0.3}


@settings(deadline=None)
@given(signal_lists())
def test_what_shares_a_session_or_prompt_shares_a_split(signals: list[Any]) -> None:
    placed = place(signals, **SHARES)
    for tie in ("session_id", "prompt_sha256"):
        seen: dict[str, tuple[str, str]] = {}
        for one in signals:
            here = placed[one.signal_id]
            assert seen.setdefault(getattr(one, tie), here) == here


@settings(deadline=None)
@given(signal_lists())
def test_a_group_is_in_one_split(signals: list[Any]) -> None:
    splits: dict[str, str] = {}
    for group, split in place(signals, **SHARES).values():
        assert splits.setdefault(group, split) == split


@settings(deadline=None)
@given(signal_lists(), st.randoms())
def test_order_does_not_matter(signals: list[Any], random: Any) -> None:
    shuffled = list(signals)
    random.shuffle(shuffled)
    assert place(shuffled, **SHARES) == place(signals, **SHARES)


@settings(deadline=None)
@given(signal_lists(), st.lists(st.tuples(st.text(min_size=1), st.integers(0, 5)), unique_by=lambda t: t[0]))
def test_unrelated_signals_move_nothing(signals: list[Any], others: list[tuple[str, int]]) -> None:
    strangers = [
        signal(f"other-{n}", question=f"unrelated {n} {text}", session=f"other {n}", minute=minute)
        for n, (text, minute) in enumerate(others)
    ]
    before, after = place(signals, **SHARES), place([*strangers, *signals], **SHARES)
    assert {signal_id: after[signal_id] for signal_id in before} == before


@settings(deadline=None)
@given(signal_lists(), st.sampled_from(("c1", "c2", "c3")), st.integers(0, 10**6))
def test_a_group_that_grows_stays_where_it_is(signals: list[Any], session: str, number: int) -> None:
    newer = signal("zz", question=f"new {number}", session=session, minute=60)
    before, after = place(signals, **SHARES), place([*signals, newer], **SHARES)
    assert {signal_id: after[signal_id] for signal_id in before} == before


def test_chains_join() -> None:
    chain = [
        signal("a", question="one", session="x"),
        signal("b", question="one", session="y"),
        signal("c", question="two", session="y"),
        signal("d", question="Two ", session="z"),
        signal("e", question="three", session="w"),
    ]
    groups = {signal_id: group for signal_id, (group, _) in place(chain, **SHARES).items()}
    assert len({groups[one] for one in "abcd"}) == 1
    assert groups["e"] != groups["a"]


def test_shares_come_out_as_asked() -> None:
    drawn = [bucket(f"group {n}", "salt", 0.05, 0.05) for n in range(20_000)]
    assert 850 < drawn.count("test") < 1150
    assert 850 < drawn.count("validation") < 1150
    assert [bucket("g", "salt", 0, 0), bucket("g", "salt", 0, 1), bucket("g", "salt", 1, 0)] == [
        "train",
        "test",
        "validation",
    ]
