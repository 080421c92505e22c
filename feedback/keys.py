"""API keys: made once, shown once, kept as a hash.

Belongs here: creating, ensuring, listing and revoking keys on a psycopg connection.
Does not belong here: checking a key on a request (``feedback.service``).
"""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg

from feedback.ids import uuid7

# ingest: send; read: read states back; review: the queues and their pages; admin: keys, rules, dead letters, metrics.
SCOPES = ("ingest", "read", "review", "admin")
MIN_KEY_LENGTH = 20


class KeyRefused(ValueError):
    """A key that cannot be stored or revoked; the text says what to do."""


@dataclass(frozen=True)
class ApiKey:
    """A stored key, without the secret."""

    key_id: UUID
    app: str
    scopes: tuple[str, ...]
    created_at: datetime
    revoked_at: datetime | None
    holder: str | None = None
    requests_per_second: float | None = None
    burst: float | None = None


_COLUMNS = "key_id, app, scopes, created_at, revoked_at, holder, requests_per_second, burst"


def act_as(conn: psycopg.Connection[Any], actor: str, role: str | None = None) -> None:
    """Do what follows in this transaction in the name of ``actor``, which the audit keeps, and as ``role``."""
    conn.execute("SELECT set_config('datamoat.actor', %s, true)", (actor,))
    if role is not None:
        conn.execute("SELECT set_config('role', %s, true)", (role,))


def key_sha256(key: str) -> str:
    """What is stored of a key: it has too much entropy to be guessed, so a plain hash is enough."""
    return hashlib.sha256(key.encode()).hexdigest()


def create_key(
    conn: psycopg.Connection[Any], app: str, scopes: Sequence[str] = ("ingest",), **more: Any
) -> tuple[ApiKey, str]:
    """Make a key for ``app``; ``more`` as for ``ensure_key``. Returns its record and the secret, shown only now."""
    key = "dm_" + secrets.token_urlsafe(32)
    return ensure_key(conn, app, key, scopes, **more), key


def ensure_key(
    conn: psycopg.Connection[Any],
    app: str,
    key: str,
    scopes: Sequence[str] = ("ingest",),
    *,
    holder: str | None = None,
    requests_per_second: float | None = None,
    burst: float | None = None,
) -> ApiKey:
    """Store the hash of ``key`` unless it is there already: calling it again, or from two processes, is harmless.

    ``holder`` names the person or service that uses it (a reviewer's name, on the review page); without
    ``requests_per_second`` its rate is not limited. ``burst`` requests may come at once.

    Raises KeyRefused if the key is too short, has an unknown scope, was revoked, or belongs to another app.
    """
    _check(app, key, scopes, holder)
    conn.execute(
        "INSERT INTO feedback.api_key (key_id, key_sha256, app, scopes, holder, requests_per_second, burst)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (key_sha256) DO NOTHING",
        (uuid7(), key_sha256(key), app, list(scopes), holder, requests_per_second, burst),
    )
    row = conn.execute(
        f"SELECT {_COLUMNS} FROM feedback.api_key WHERE key_sha256 = %s",
        (key_sha256(key),),
    ).fetchone()
    if row is None:
        raise KeyRefused("the key was removed while it was being stored; try again")
    stored = _from_row(row)
    if stored.revoked_at is not None:
        raise KeyRefused(f"key {stored.key_id} was revoked on {stored.revoked_at:%Y-%m-%d}; make a new one")
    if stored.app != app or set(stored.scopes) != set(scopes):
        raise KeyRefused(
            f"key {stored.key_id} is stored for app {stored.app} with scopes {', '.join(stored.scopes)}; "
            f"make another key for app {app}"
        )
    return stored


def revoke_key(conn: psycopg.Connection[Any], key_id: UUID) -> ApiKey:
    """Revoke a key, or find it revoked already. Running services stop accepting it within a few seconds.

    Raises KeyRefused if there is no such key.
    """
    conn.execute(
        "UPDATE feedback.api_key SET revoked_at = now() WHERE key_id = %s AND revoked_at IS NULL", (key_id,)
    )
    row = conn.execute(f"SELECT {_COLUMNS} FROM feedback.api_key WHERE key_id = %s", (key_id,)).fetchone()
    if row is None:
        raise KeyRefused(f"there is no key {key_id}; see `python -m feedback key list`")
    return _from_row(row)


def list_keys(conn: psycopg.Connection[Any]) -> list[ApiKey]:
    """All keys, oldest first, revoked ones included."""
    rows = conn.execute(f"SELECT {_COLUMNS} FROM feedback.api_key ORDER BY created_at, key_id").fetchall()
    return [_from_row(row) for row in rows]


def _check(app: str, key: str, scopes: Sequence[str], holder: str | None) -> None:
    if not app.strip() or len(app) > 200:
        raise KeyRefused("the app name must have 1 to 200 characters")
    if "\0" in app + (holder or ""):
        raise KeyRefused("the names of app and holder must not hold a NUL character")
    if "review" in scopes and not holder:
        raise KeyRefused("a key with scope review needs a holder: the reviewer's name")
    if len(key) < MIN_KEY_LENGTH:
        raise KeyRefused(f"the key must have at least {MIN_KEY_LENGTH} characters; let `key create` make one")
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise KeyRefused(f"unknown scopes {unknown}; known: {', '.join(SCOPES)}")


def _from_row(row: tuple[Any, ...]) -> ApiKey:
    key_id, app, scopes, *rest = row
    return ApiKey(key_id, app, tuple(scopes), *rest)
