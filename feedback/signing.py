"""Text that only this service can have made: what a browser holds, and hands back unchanged.

Belongs here: signing and checking. Does not belong here: what is signed (``feedback.tokens``, the pages' sessions).
"""

import base64
import binascii
import hashlib
import hmac


def key_for(secret: bytes, purpose: bytes) -> bytes:
    """A key of its own for each purpose, so that what is signed for one is worth nothing for another."""
    return digest(secret, purpose)


def digest(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA256 (RFC 2104)."""
    return hmac.digest(key, message, hashlib.sha256)


def sign(key: bytes, payload: bytes) -> str:
    """``<payload>.<signature>``, each as base64url without padding."""
    body = _base64url(payload)
    return f"{body}.{_base64url(digest(key, body.encode()))}"


def opened(key: bytes, signed: str) -> bytes | None:
    """The payload of what ``sign`` made with the same key; None of anything else."""
    body, _, signature = signed.partition(".")
    expected = _base64url(digest(key, body.encode("utf-8", "surrogateescape")))
    if not hmac.compare_digest(expected.encode(), signature.encode("utf-8", "surrogateescape")):
        return None
    try:
        return base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    except binascii.Error:
        return None


def _base64url(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()
