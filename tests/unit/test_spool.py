"""The spool on disk: the segment format under truncation and damage, ownership, adoption, refused records."""

import errno
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.client import spool as spool_module
from feedback.client.spool import MAGIC, Record, Spool, next_whole, pack, unpack

RECORDS = st.lists(
    st.builds(Record, st.binary(min_size=1, max_size=1), st.binary(max_size=40)), min_size=1, max_size=8
)
MANY, LARGE = 1000, 1 << 20


def record(body: str) -> Record:
    return Record(b"f", body.encode())


def append(spool: Spool, *bodies: str) -> None:
    spool.append(b"".join(pack(record(body)) for body in bodies))


def drain(spool: Spool, max_records: int = MANY) -> list[str]:
    found = []
    while (batch := spool.read(max_records, LARGE)) is not None:
        found += [each.body.decode() for each in batch.records]
        spool.done(batch)
    return found


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.spool"))


@given(RECORDS, st.data())
def test_any_truncation_yields_a_prefix(records: list[Record], data: st.DataObject) -> None:
    packed = [pack(each) for each in records]
    whole = b"".join(packed)
    cut = data.draw(st.integers(0, len(whole)))
    found, taken = unpack(whole[:cut])
    assert found == records[: len(found)]
    assert taken == sum(map(len, packed[: len(found)]))
    # Nothing that is whole is left out.
    assert len(found) == len(records) or cut < taken + len(packed[len(found)])


@given(RECORDS, st.data())
def test_damage_hides_what_follows_and_invents_nothing(records: list[Record], data: st.DataObject) -> None:
    whole = bytearray(b"".join(map(pack, records)))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    found, _ = unpack(bytes(whole))
    assert found == records[: len(found)]
    assert len(found) < len(records)


@given(RECORDS, st.binary(max_size=20), st.data())
def test_the_next_whole_record_is_found_behind_anything(
    records: list[Record], before: bytes, data: st.DataObject
) -> None:
    whole = b"".join(map(pack, records))
    at = next_whole(before + whole)
    assert unpack((before + whole)[at:])[0][-len(records) :] == records
    cut = whole[: data.draw(st.integers(1, len(pack(records[0])) - 1))]
    assert next_whole(cut) == len(cut)


def test_zeros_after_a_power_cut_are_no_records() -> None:
    packed = pack(record("a"))
    assert unpack(packed + bytes(64)) == ([record("a")], len(packed))


def test_records_come_back_in_order_and_leave_no_bytes(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    append(spool, "a", "b")
    append(spool, "c")
    assert spool.unsent_bytes() == 3 * len(pack(record("a")))
    assert drain(spool, max_records=2) == ["a", "b", "c"]
    assert spool.unsent_bytes() == 0
    assert [path.read_bytes() for path in segments(tmp_path)] == [MAGIC]
    append(spool, "d")
    assert drain(spool) == ["d"]
    spool.close()
    assert segments(tmp_path) == []


def test_a_record_larger_than_a_batch_is_read_alone(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    append(spool, "x" * 500, "b")
    batch = spool.read(MANY, 50)
    assert batch is not None
    assert batch.records == [record("x" * 500)]
    spool.done(batch)
    assert drain(spool) == ["b"]


def test_full_segments_are_removed_as_they_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", 40)
    spool = Spool(tmp_path)
    for body in "abcdef":
        append(spool, body)
    before = len(segments(tmp_path))
    assert before > 1
    batch = spool.read(MANY, LARGE)
    assert batch is not None
    spool.done(batch)
    assert len(segments(tmp_path)) == before - 1
    assert drain(spool) == list("abcdef")[len(batch.records) :]


def test_segments_belong_to_the_living_and_are_adopted_from_the_dead(tmp_path: Path) -> None:
    first, second = Spool(tmp_path), Spool(tmp_path)
    append(first, "a", "b")
    assert second.adopt() == 0
    assert drain(second) == []
    first.close()
    append(second, "c")
    assert second.adopt() == 1
    assert second.adopt() == 0
    # What the dead left is older.
    assert drain(second) == ["a", "b", "c"]


def test_what_was_adopted_can_be_released_to_another(tmp_path: Path) -> None:
    dead, stopped, heir = Spool(tmp_path), Spool(tmp_path), Spool(tmp_path)
    append(dead, "a")
    dead.close()
    append(stopped, "own")
    assert stopped.adopt() == 1
    assert heir.adopt() == 0
    stopped.release_adopted()
    assert heir.adopt() == 1
    assert drain(heir) == ["a"]
    assert drain(stopped) == ["own"]


def test_what_was_not_acknowledged_is_sent_again_by_the_heir(tmp_path: Path) -> None:
    first = Spool(tmp_path)
    append(first, "a", "b")
    batch = first.read(1, LARGE)
    assert batch is not None
    first.done(batch)
    unfinished = first.read(1, LARGE)
    assert unfinished is not None
    first.close()
    first.done(unfinished)  # a sender that comes back late
    heir = Spool(tmp_path)
    heir.adopt()
    assert drain(heir) == ["a", "b"]


@pytest.mark.parametrize("lost", [1, 5, 9])
def test_a_torn_tail_is_cut_and_counted(tmp_path: Path, lost: int, caplog: pytest.LogCaptureFixture) -> None:
    first = Spool(tmp_path)
    append(first, "a", "b", "c")
    first.close()
    [path] = segments(tmp_path)
    os.truncate(path, path.stat().st_size - lost)
    heir = Spool(tmp_path)
    heir.adopt()
    assert drain(heir) == ["a", "b"]
    assert heir.torn_bytes == len(pack(record("c"))) - lost
    assert "no whole record" in caplog.text
    assert segments(tmp_path) == []


@pytest.mark.parametrize("where", ["length", "crc", "tag", "body"])
@pytest.mark.parametrize("batch", [1, MANY])
def test_damage_takes_nothing_intact_with_it(
    tmp_path: Path, where: str, batch: int, caplog: pytest.LogCaptureFixture
) -> None:
    first = Spool(tmp_path)
    append(first, "a", "b", "c", "d", "e")
    first.close()
    [path] = segments(tmp_path)
    content = bytearray(path.read_bytes())
    size = len(pack(record("b")))
    for damaged in (1, 3):
        offset = {"length": 0, "crc": 4, "tag": 8, "body": 9}[where]
        content[len(MAGIC) + damaged * size + offset] ^= 0x11
    path.write_bytes(content)
    heir = Spool(tmp_path)
    heir.adopt()
    assert drain(heir, batch) == ["a", "c", "e"]
    assert (heir.damaged_bytes, heir.torn_bytes) == (2 * size, 0)
    assert caplog.text.count("is damaged") == 2
    assert "no whole record" not in caplog.text
    assert segments(tmp_path) == []


def test_what_is_damaged_while_it_waits_does_not_stop_its_owner(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    append(spool, "a", "b")
    [path] = segments(tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert drain(spool) == ["a"]
    assert spool.torn_bytes == len(pack(record("b")))
    append(spool, "c")
    assert drain(spool) == ["c"]


@pytest.mark.parametrize("content", [b"", MAGIC[:5], MAGIC])
def test_a_segment_without_records_goes_away(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0.spool").write_bytes(content)
    spool = Spool(tmp_path)
    spool.adopt()
    assert drain(spool) == []
    assert spool.torn_bytes == 0
    assert segments(tmp_path) == []


def test_a_file_of_another_version_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "0.spool").write_bytes(b"datamoat-spool-2\nsomething")
    spool = Spool(tmp_path)
    assert (spool.adopt(), spool.adopt()) == (0, 0)
    assert drain(spool) == []
    assert (tmp_path / "0.spool").exists()
    assert caplog.text.count("left alone") == 1


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)
    append(spool, "a")

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(os, "fsync", full)
        append(spool, "lost", "lost too")
    append(spool, "b")
    spool.close()
    heir = Spool(tmp_path)
    heir.adopt()
    assert drain(heir) == ["a", "b"]


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    spool = Spool(folder)
    append(spool, "a")
    [path] = segments(folder)
    path.unlink()
    folder.rmdir()
    assert spool.folder_bytes() == 0
    append(spool, "b")
    assert drain(spool) == ["a", "b"]


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "spool"
    spool = Spool(folder)
    append(spool, "a")
    spool.refuse(b"{}\n")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert set(modes.values()) == {0o600}
    assert len(modes) == 2
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_refused_line_that_was_cut_short_stays_alone(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.refuse(b'{"a":1}\n')
    path = tmp_path / spool_module.REFUSED
    path.write_bytes(path.read_bytes() + b'{"b"')
    spool.refuse(b'{"c":1}\n')
    assert path.read_bytes() == b'{"a":1}\n{"b"\n{"c":1}\n'


def test_a_place_that_cannot_hold_a_folder_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        Spool(tmp_path / "file" / "spool")
