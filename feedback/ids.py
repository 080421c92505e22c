"""Identifiers: time-ordered UUIDs, and the pseudonyms that stand in for people.

Belongs here: minting ids and turning a raw person id into its pseudonym.
Does not belong here: API keys (``feedback.keys``) or any storage of ids.
"""

import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path
from uuid import UUID

MIN_PSEUDONYM_KEY_BYTES = 16


def uuid7(unix_ms: int | None = None) -> UUID:
    """Mint a UUID version 7 (RFC 9562): 48 bits of Unix milliseconds, then 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000 if unix_ms is None else unix_ms
    if not 0 <= milliseconds < 1 << 48:
        raise ValueError(f"unix_ms must fit 48 bits, got {milliseconds}")
    value = (milliseconds << 80) | secrets.randbits(80)
    value = (value & ~(0xF << 76)) | (0x7 << 76)
    value = (value & ~(0x3 << 62)) | (0x2 << 62)
    return UUID(int=value)


def pseudonym(key: bytes, app: str, person_id: str) -> str:
    """32 hex characters that stand for one person within one app; without ``key`` they cannot be guessed back."""
    message = app.encode() + b"\0" + person_id.encode()
    return hmac.new(key, message, hashlib.sha256).hexdigest()[:32]


def read_pseudonym_key(path: Path) -> bytes:
    """Read the pseudonym key file: the bytes of its text, without surrounding white space.

    Raises ValueError, naming the file and the remedy, if the key is too short to protect anyone.
    """
    key = path.read_bytes().strip()
    if len(key) < MIN_PSEUDONYM_KEY_BYTES:
        raise ValueError(
            f"{path}: the pseudonym key has {len(key)} bytes, at least {MIN_PSEUDONYM_KEY_BYTES} are needed; "
            "restore the file from its backup, or delete it to have a new one made (people then get new pseudonyms)"
        )
    return key


def ensure_pseudonym_key(path: Path) -> tuple[bytes, bool]:
    """Read the key file, making it first (mode 0600) if it is missing. Returns the key and whether it is new.

    Two processes that start at once end up with the same key: the file appears whole, by a hard link, or not at all.
    """
    if path.exists():
        return read_pseudonym_key(path), False
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
    return read_pseudonym_key(path), created
