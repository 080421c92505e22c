"""The lake: files that never change once they have a name.

Belongs here: writing a file so that it is whole or absent, and addressing files by content.
Does not belong here: what the files mean (datasets, vectors, refused files).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader, or a crash, sees the whole file or none.

    Temporary file in the same folder, fsync, rename, fsync of the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _rename(Path(name), path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _rename(file: Path, path: Path) -> None:
    file.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def put(objects: Path, content: bytes, suffix: str) -> Path:
    """Store ``content`` under its SHA-256 below ``objects``; a second put of the same bytes writes nothing."""
    path = _place(objects, hashlib.sha256(content).hexdigest(), suffix)
    if not path.exists():
        write_atomic(path, content)
    return path


def put_file(objects: Path, file: Path, suffix: str) -> Path:
    """Move ``file``, which is on the same file system, to where ``put`` stores its content."""
    with file.open("rb") as content:
        os.fsync(content.fileno())
        path = _place(objects, hashlib.file_digest(content, "sha256").hexdigest(), suffix)
    if path.exists():
        file.unlink()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        _rename(file, path)
    return path


def _place(objects: Path, digest: str, suffix: str) -> Path:
    return objects / digest[:2] / f"{digest}{suffix}"
