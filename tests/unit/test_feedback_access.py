"""Who is asking: keys looked up once for many, remembered for seconds, and held to their rate."""

import asyncio
import hashlib
from typing import Any

import pytest
from starlette.requests import Request

from feedback import access, log
from feedback.access import Access, bearer
from feedback.http import Refused

Questions = list[tuple[Any, ...]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Questions:
    """The look-ups that reach the database, which knows one key, of two requests a second."""
    asked: Questions = []

    async def fetch(_pool: log.Pool, _query: str, *args: Any) -> list[Any]:
        asked.append(args)
        await asyncio.sleep(0)
        known = hashlib.sha256(b"known").hexdigest()
        return [("key-id", "support", ["ingest"], "Ana", 2.0, None)] if args == (known,) else []

    monkeypatch.setattr(log, "fetch", fetch)
    return asked


def request(**headers: str) -> Request:
    raw = [(name.lower().replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw})


def status(found: object) -> int:
    return found.status if isinstance(found, Refused) else 200


def ask(*keys: str) -> list[object]:
    """What callers with these keys, all at once, are told."""

    async def run() -> list[object]:
        known = Access(pool=None)
        return list(await asyncio.gather(*(known.holder_of(key) for key in keys), return_exceptions=True))

    return asyncio.run(run())


def test_many_who_come_at_once_ask_the_database_once(asked: Questions) -> None:
    told = ask(*["known"] * 50)
    assert len(asked) == 1
    assert sorted({status(found) for found in told}) == [200, 429]


def test_a_key_is_held_to_its_rate_and_told_when_to_come_back(asked: Questions) -> None:
    told = ask(*["known"] * 5)
    assert [status(found) for found in told] == [200, 200, 429, 429, 429]
    late = told[-1]
    assert isinstance(late, Refused)
    assert late.headers is not None
    assert int(late.headers["Retry-After"]) >= 1


def test_looking_a_key_up_again_does_not_fill_its_bucket(
    asked: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "KEY_CACHE_SECONDS", -1.0)

    async def run() -> list[int]:
        known = Access(pool=None)
        told = []
        for _ in range(4):
            (found,) = await asyncio.gather(known.holder_of("known"), return_exceptions=True)
            told.append(status(found))
        return told

    assert asyncio.run(run()) == [200, 200, 429, 429]
    assert len(asked) == 4


def test_an_unknown_key_is_401_and_not_remembered_as_known(asked: Questions) -> None:
    assert [status(found) for found in ask("other", "other", "")] == [401, 401, 401]
    assert len(asked) == 1


def test_a_key_without_the_scope_is_403(asked: Questions) -> None:
    async def run(scope: str) -> int:
        found = await asyncio.gather(
            Access(pool=None).caller(request(X_API_Key="known"), scope), return_exceptions=True
        )
        return status(found[0])

    assert [asyncio.run(run(scope)) for scope in ("ingest", "admin")] == [200, 403]


@pytest.mark.parametrize(
    ("header", "token"),
    [("Bearer abc", "abc"), ("bearer  abc ", "abc"), ("Basic abc", ""), ("", ""), ("Bearer", "")],
)
def test_the_bearer_of_a_request(header: str, token: str) -> None:
    assert bearer(request(Authorization=header)) == token
