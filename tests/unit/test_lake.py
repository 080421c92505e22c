"""Files in the lake are whole or absent, and a second put of the same bytes writes nothing."""

from pathlib import Path

import pytest

from storage.lake import put, put_file, write_atomic


def test_the_same_bytes_are_stored_once(tmp_path: Path) -> None:
    first = put(tmp_path, b"content", ".bin")
    before = first.stat().st_mtime_ns
    assert put(tmp_path, b"content", ".bin") == first
    assert first.stat().st_mtime_ns == before
    assert put(tmp_path, b"other", ".bin") != first


def test_a_file_is_moved_to_where_its_bytes_would_be_put(tmp_path: Path) -> None:
    for _ in range(2):
        file = tmp_path / "file"
        file.write_bytes(b"content")
        assert put_file(tmp_path / "objects", file, ".bin") == put(tmp_path / "objects", b"content", ".bin")
        assert not file.exists()


def test_a_failed_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
