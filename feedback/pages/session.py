"""Who is signed in on the pages: an API key becomes a signed cookie that ends with the key.

The cookie is all there is of a session. Signing out takes it from the browser, and the process that was asked accepts
no copy of it any more; another process does until it expires. Revoking the key ends all its sessions everywhere.

Belongs here: the cookie, the proof that a request comes from our own page, the limit on attempts to sign in.
Does not belong here: what a page shows (the other modules), API keys on the API (``feedback.access``).
"""

import secrets
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from feedback import signing
from feedback.access import Bucket, Caller
from feedback.answers import Error
from feedback.http import Refused, forbidden
from feedback.review import Reviewer
from feedback.service import Service

COOKIE = "datamoat_session"
SESSION_SECONDS = 12 * 3600
SCOPE = "review"

# Attempts to sign in that fail, per address and worker: ten at once, then one every six seconds. Beyond, they are told
# to wait; a right key is let in all the same, since behind a proxy many people have one address.
ATTEMPTS_AT_ONCE = 10
ATTEMPTS_PER_SECOND = 1 / 6
# Addresses and ended sessions remembered at most.
MAX_REMEMBERED = 10_000


class Claims(msgspec.Struct):
    """What the cookie says. ``session_id`` ties together what one browser asks within one sign-in."""

    key_id: str
    session_id: str
    expires_at: int


@dataclass(frozen=True)
class Person:
    """Who is signed in, by which key, and what that key may do."""

    caller: Caller
    session_id: str

    @property
    def name(self) -> str:
        """The key's holder, else the key's id: two keys without holder are two people."""
        return self.caller.holder or f"key {self.caller.key_id}"

    @property
    def actor(self) -> str:
        """Who the audit names, as it does for the admin API."""
        return f"{self.caller.holder or self.caller.app} (key {self.caller.key_id})"

    @property
    def reviewer(self) -> Reviewer:
        return Reviewer(key_id=self.caller.key_id, app=self.caller.app, name=self.name)

    @property
    def is_admin(self) -> bool:
        return "admin" in self.caller.scopes


@dataclass
class Sessions:
    """Signs people in and recognises them again; a revoked key ends its sessions within seconds."""

    service: Service
    _attempts: dict[str, Bucket] = field(default_factory=dict)
    _ended: dict[str, None] = field(default_factory=dict)

    async def sign_in(self, request: Request, key: str) -> Person:
        """Whose key this is. Raises Refused: 401 unknown or revoked, 403 without scope review, 429 too often."""
        try:
            caller = await self.service.access.holder_of(key)
        except Refused as error:
            if error.status != 401:
                raise
            self._count_failure(request.client.host if request.client else "")
            raise Refused(
                401,
                Error(
                    "unauthorized",
                    "This key is unknown or revoked",
                    remedy="Check it, or ask whoever runs this service for a new one",
                ),
            ) from None
        if SCOPE not in caller.scopes:
            raise forbidden(
                "This key is not for reviewing",
                f"Ask for a key with scope {SCOPE}: `python -m feedback key create --app NAME --scope {SCOPE}`",
            )
        return Person(caller, "page-" + secrets.token_hex(12))

    def remember(self, request: Request, response: Response, person: Person) -> None:
        """Put the signed cookie on ``response``."""
        claims = Claims(person.caller.key_id, person.session_id, int(time.time()) + SESSION_SECONDS)
        # Behind a proxy only the browser knows that it speaks TLS; it says so in Origin.
        secure = request.url.scheme == "https" or request.headers.get("origin", "").startswith("https://")
        response.set_cookie(
            COOKIE,
            signing.sign(self._key, msgspec.json.encode(claims)),
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="strict",
            secure=secure,
        )

    def forget(self, response: Response, person: Person) -> None:
        """Take the cookie from the browser, and accept no copy of it here."""
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")
        if len(self._ended) >= MAX_REMEMBERED:
            del self._ended[next(iter(self._ended))]
        self._ended[person.session_id] = None

    async def person(self, request: Request) -> Person | None:
        """Who sent this request, or None: no cookie, a forged or expired one, or a key that is no longer valid."""
        claims = self._claims(request.cookies.get(COOKIE, ""))
        if claims is None:
            return None
        caller = await self.service.access.by_id(claims.key_id)
        if caller is None or SCOPE not in caller.scopes:
            return None
        return Person(caller, claims.session_id)

    def _claims(self, cookie: str) -> Claims | None:
        payload = signing.opened(self._key, cookie)
        if payload is None:
            return None
        try:
            claims = msgspec.json.decode(payload, type=Claims)
        except msgspec.DecodeError:
            return None
        return claims if claims.expires_at > time.time() and claims.session_id not in self._ended else None

    @property
    def _key(self) -> bytes:
        return signing.key_for(self.service.pseudonym_key, b"datamoat page session")

    def _count_failure(self, address: str) -> None:
        """Raises Refused with 429 after too many."""
        if len(self._attempts) >= MAX_REMEMBERED and address not in self._attempts:
            self._attempts.clear()
        bucket = self._attempts.setdefault(address, Bucket(ATTEMPTS_PER_SECOND, ATTEMPTS_AT_ONCE))
        wait = bucket.wait()
        if wait:
            raise Refused(
                429,
                Error(
                    "too_many_attempts",
                    "Too many attempts to sign in",
                    remedy=f"Wait {round(wait) + 1} seconds and try again",
                ),
                {"Retry-After": str(round(wait) + 1)},
            )


def check_same_site(request: Request) -> None:
    """Refuse a request that another site's page made the browser send. Raises Refused with 403.

    Browsers say where a request comes from: Sec-Fetch-Site on secure origins, Origin with every POST.
    """
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin", "")
    if site == "same-origin":
        return
    if site is None and urlsplit(origin).netloc == request.headers.get("host", "") != "":
        return
    raise forbidden(
        "The request does not come from a page of this service", "Open the page here and send it again"
    )
