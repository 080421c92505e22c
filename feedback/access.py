"""Who is asking: API keys on a request, what they may do, and how often.

Belongs here: looking a key up, its scopes, its rate. Does not belong here: making keys (``feedback.keys``), the
signed tokens of browsers (``feedback.tokens``), or any route.
"""

import asyncio
import hashlib
import time
from dataclasses import dataclass, field

from starlette.requests import Request

from feedback import log
from feedback.answers import Error
from feedback.http import Refused, forbidden, header

KEY_CACHE_SECONDS = 5.0
KEY_CACHE_SIZE = 1024
LONGEST_WAIT_SECONDS = 3600
MAX_QUESTIONS = 2


@dataclass
class Bucket:
    """A token bucket: ``rate`` requests a second on average, ``burst`` at once."""

    rate: float
    burst: float
    level: float = field(init=False)
    filled_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.level = self.burst
        self.filled_at = time.monotonic()

    def wait(self) -> float:
        """Take one request. Returns 0, or the seconds after which there is room again."""
        now = time.monotonic()
        self.level = min(self.burst, self.level + (now - self.filled_at) * self.rate)
        self.filled_at = now
        if self.level >= 1:
            self.level -= 1
            return 0.0
        return (1 - self.level) / self.rate


@dataclass(frozen=True)
class Caller:
    """Whose key a request carries. ``holder`` is the person or service the key was made for."""

    key_id: str
    app: str
    scopes: tuple[str, ...]
    holder: str | None = None


@dataclass
class _Known:
    caller: Caller
    until: float
    bucket: Bucket | None


def bearer(request: Request) -> str:
    """What ``Authorization: Bearer`` carries, or an empty text."""
    scheme, _, token = header(request, b"authorization").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


@dataclass
class Access:
    """Recognises keys; remembers those seen within the last seconds. Rates hold per worker process."""

    pool: log.Pool
    _known: dict[str, _Known] = field(default_factory=dict)
    _in_use: "dict[str, tuple[float, Caller | None]]" = field(default_factory=dict)
    _asked: "dict[str, asyncio.Future[_Known]]" = field(default_factory=dict)
    # A flood of unknown keys must leave connections to those who write.
    _questions: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_QUESTIONS))

    async def caller(self, request: Request, scope: str) -> Caller:
        """Who sent this request. Raises Refused: 401 unknown, 403 without ``scope``, 429 too often."""
        return await self.holder_in(bearer(request) or header(request, b"x-api-key"), scope)

    async def holder_in(self, key: str, scope: str) -> Caller:
        """As ``holder_of``; also raises Refused with 403 where ``key`` lacks ``scope``."""
        caller = await self.holder_of(key)
        if scope not in caller.scopes:
            raise forbidden(
                f"The API key may not do this: it lacks scope {scope}", f"Use a key with scope {scope}"
            )
        return caller

    async def holder_of(self, key: str) -> Caller:
        """Whose key ``key`` is; takes one request from its rate. Raises Refused with 401 or 429."""
        if not key:
            raise unauthorized("No API key was sent")
        known = self._known.get(key)
        if known is None or known.until < time.monotonic():
            known = await self._look_up(key)
        wait = known.bucket.wait() if known.bucket else 0.0
        if wait:
            raise too_often(
                wait,
                "The API key sends more requests than it may",
                "Wait for the seconds in Retry-After, send arrays, or have the key's rate raised",
            )
        return known.caller

    async def by_id(self, key_id: str) -> Caller | None:
        """Whose key has this id, as a token or a session names it; None if it was revoked. Takes nothing from its rate."""
        until, caller = self._in_use.get(key_id, (0.0, None))
        if until < time.monotonic():
            rows = await log.fetch(
                self.pool,
                "SELECT app, scopes, holder FROM feedback.api_key WHERE key_id = $1::uuid AND revoked_at IS NULL",
                key_id,
            )
            caller = Caller(key_id, rows[0][0], tuple(rows[0][1]), rows[0][2]) if rows else None
            if len(self._in_use) >= KEY_CACHE_SIZE:
                self._in_use.clear()
            self._in_use[key_id] = time.monotonic() + KEY_CACHE_SECONDS, caller
        return caller

    async def _look_up(self, key: str) -> _Known:
        """Ask the database, once for all who want to know the same key at the same time."""
        asked = self._asked.get(key)
        if asked is None:
            asked = self._asked[key] = asyncio.ensure_future(self._ask(key))
            asked.add_done_callback(lambda _: self._asked.pop(key))
        return await asyncio.shield(asked)

    async def _ask(self, key: str) -> _Known:
        before = self._known.pop(key, None)
        key_sha256 = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        async with self._questions:
            rows = await log.fetch(
                self.pool,
                "SELECT key_id::text, app, scopes, holder, requests_per_second, burst FROM feedback.api_key"
                " WHERE key_sha256 = $1 AND revoked_at IS NULL",
                key_sha256,
            )
        if not rows:
            raise unauthorized("The API key is unknown or revoked")
        key_id, app, scopes, holder, rate, burst = rows[0]
        bucket = Bucket(rate, burst or max(rate, 1.0)) if rate else None
        if before is not None and before.bucket is not None and bucket is not None:
            bucket.level = min(before.bucket.level, bucket.burst)
        if len(self._known) >= KEY_CACHE_SIZE:
            self._known.clear()
        known = _Known(
            Caller(key_id, app, tuple(scopes), holder), time.monotonic() + KEY_CACHE_SECONDS, bucket
        )
        self._known[key] = known
        return known


def too_often(wait: float, message: str, remedy: str) -> Refused:
    """What is answered when a bucket asks for ``wait`` seconds."""
    seconds = max(1, round(min(wait, LONGEST_WAIT_SECONDS)))
    return Refused(429, Error("too_many_requests", message, remedy=remedy), {"Retry-After": str(seconds)})


def unauthorized(message: str) -> Refused:
    return Refused(
        401,
        Error(
            "unauthorized",
            message,
            remedy="Send Authorization: Bearer KEY; `python -m feedback key create --app NAME` makes a key",
        ),
        {"WWW-Authenticate": "Bearer"},
    )
