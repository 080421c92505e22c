"""One spelling for every value that is hashed: canonical JSON and its SHA-256.

What belongs here: the bytes that row ids, version ids and input digests are made from, and the normal
form in which two texts count as the same. What does not: what is hashed, and where the results are kept.
"""

import hashlib
import unicodedata
from collections.abc import Iterable
from typing import Any

import orjson


def canonical(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes on any machine."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON, 64 lowercase hex digits."""
    return hashlib.sha256(canonical(value)).hexdigest()


def digest_of_ids(ids: Iterable[str]) -> str:
    """SHA-256 over a set of ids; the order in which they come does not matter."""
    hasher = hashlib.sha256()
    for identifier in sorted(ids):
        hasher.update(identifier.encode())
        hasher.update(b"\n")
    return hasher.hexdigest()


def normalise(text: str) -> str:
    """The text without differences nobody reads: Unicode compatibility forms, case and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
