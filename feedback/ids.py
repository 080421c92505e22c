"""Identifiers: time-ordered UUIDs, and the pseudonyms that stand in for people.

Belongs here: minting ids and turning a raw person id into its pseudonym.
Does not belong here: API keys (``feedback.keys``) or any storage of ids.
"""

import hmac
import secrets
import time
from uuid import UUID


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
    return hmac.digest(key, message, "sha256").hex()[:32]
