"""Keys in files: made once, private, never silently replaced."""

import threading
from pathlib import Path

import pytest

from storage.secrets import KEY_BYTES, read_or_create_key


def test_a_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "one.key"
    first = read_or_create_key(path)
    assert len(first) == KEY_BYTES
    assert read_or_create_key(path) == first
    assert path.stat().st_mode & 0o077 == 0
    assert [entry.name for entry in path.parent.iterdir()] == ["one.key"]


def test_two_at_once_agree(tmp_path: Path) -> None:
    path = tmp_path / "one.key"
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(read_or_create_key(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1


@pytest.mark.parametrize("content", ["", "zz" * 32, "ab"])
def test_a_damaged_key_is_refused_with_the_remedy(tmp_path: Path, content: str) -> None:
    path = tmp_path / "one.key"
    path.write_text(content)
    with pytest.raises(ValueError, match="Restore the file from your backup"):
        read_or_create_key(path)
