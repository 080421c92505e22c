"""Secrets in files that only their owner may read: the pseudonym key, an API key.

Belongs here: making a secret once and reading it back. Does not belong here: what secrets are for.
"""

import os
import secrets
from pathlib import Path

MIN_BYTES = 16


def read_secret(path: Path) -> bytes:
    """Read a secret's file: the bytes of its text, without surrounding white space.

    Raises ValueError, naming the file and the remedy, if the secret is too short to protect anyone.
    """
    key = path.read_bytes().strip()
    if len(key) < MIN_BYTES:
        raise ValueError(
            f"{path}: the secret has {len(key)} bytes, at least {MIN_BYTES} are needed; "
            "restore the file from its backup, or delete it to have a new one made (a new pseudonym key gives people new pseudonyms)"
        )
    return key


def ensure_secret(path: Path) -> tuple[bytes, bool]:
    """Read a secret's file, making it first (64 hex digits, mode 0600) if it is missing. Returns it and whether it is new.

    Two processes that start at once end up with the same secret: the file appears whole, by a hard link, or not at all.
    """
    if path.exists():
        return read_secret(path), False
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(32).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            path.hardlink_to(draft)
            created = True
        except FileExistsError:
            created = False
    finally:
        draft.unlink()
    return read_secret(path), created
