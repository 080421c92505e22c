"""Secrets in files that only their owner may read.

Belongs here: making a key once and reading it back. Does not belong here: what keys are for.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

KEY_BYTES = 32


def read_or_create_key(path: Path) -> bytes:
    """The 32-byte key in ``path`` (hex), made on first use; two processes at once agree on one key.

    Raises:
        ValueError: The file is not 64 hex digits.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(KEY_BYTES))
        try:
            # link() fails when another process was first; then its key is the key.
            os.link(name, path)
        except FileExistsError:
            pass
        finally:
            Path(name).unlink()
    text = path.read_text("utf-8").strip()
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ValueError(
            f"{path}: expected {2 * KEY_BYTES} hex digits. Restore the file from your backup; a new key would"
            " give every person a new pseudonym."
        )
    return key
