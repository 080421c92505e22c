"""Identifiers: UUIDv7 order and layout, pseudonyms, the pseudonym key file."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.ids import pseudonym, uuid7
from feedback.secret import ensure_secret, read_secret

MILLISECONDS = st.integers(0, (1 << 48) - 1)


@given(MILLISECONDS)
def test_uuid7_holds_its_time_version_and_variant(unix_ms: int) -> None:
    minted = uuid7(unix_ms)
    assert minted.version == 7
    assert minted.int >> 80 == unix_ms
    assert (minted.int >> 62) & 0b11 == 0b10


@given(MILLISECONDS, MILLISECONDS)
def test_uuid7_sorts_by_time(one: int, other: int) -> None:
    if one != other:
        assert (uuid7(one) < uuid7(other)) == (one < other)


def test_uuid7_refuses_a_time_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="48 bits"):
        uuid7(1 << 48)


def test_uuid7_does_not_repeat() -> None:
    assert len({uuid7(0) for _ in range(1000)}) == 1000


def test_pseudonym_depends_on_key_app_and_person() -> None:
    reference = pseudonym(b"k" * 16, "app", "ana")
    assert reference == pseudonym(b"k" * 16, "app", "ana")
    assert len(reference) == 32
    others = {
        pseudonym(b"x" * 16, "app", "ana"),
        pseudonym(b"k" * 16, "other", "ana"),
        pseudonym(b"k" * 16, "app", "bo"),
        pseudonym(b"k" * 16, "ap", "pana"),
    }
    assert reference not in others
    assert len(others) == 4


def test_the_key_file_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "state" / "pseudonym.key"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: ensure_secret(path), range(8)))
    assert len({key for key, _ in made}) == 1
    assert [created for _, created in made].count(True) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["pseudonym.key"]


def test_a_short_key_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "pseudonym.key"
    path.write_text("short\n")
    with pytest.raises(ValueError, match=r"pseudonym\.key.*backup"):
        read_secret(path)
