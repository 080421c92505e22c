"""The admin API: keys, dead letters, and the audit of what admins did.

Belongs here: routes for scope ``admin``, plain FastAPI. Does not belong here: what they do (``feedback.keys``,
``feedback.dead_letters``), the audit's lines (a trigger writes them), queues and rules (``feedback.review``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import msgspec
import psycopg
from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from psycopg.rows import dict_row
from pydantic import BaseModel, Field, ValidationError

from feedback import dead_letters, keys, openapi
from feedback.access import Caller
from feedback.answers import Error
from feedback.http import Refused, not_found, read_body
from feedback.log import Unavailable
from feedback.service import ADMIN_ROLE, Service

_REFUSALS: dict[int | str, dict[str, Any]] = {
    401: openapi.response("No valid API key", "ErrorBody"),
    403: openapi.response("The key lacks scope admin", "ErrorBody"),
    404: openapi.response("There is none such", "ErrorBody"),
    422: openapi.response("Invalid; the field and the remedy are named", "ErrorBody"),
    429: openapi.response("The key is used more often than it may be; see Retry-After", "ErrorBody"),
    503: openapi.response("The database is away; see Retry-After", "ErrorBody"),
}


class NewKey(BaseModel):
    """What a key is to be for."""

    app: str = Field(min_length=1, max_length=200)
    scopes: list[str] = Field(default=["ingest"], description=f"Of {', '.join(keys.SCOPES)}")
    holder: str | None = Field(default=None, max_length=200, description="The person or service that uses it")
    requests_per_second: float | None = Field(default=None, gt=0, description="Not limited if left out")
    burst: float | None = Field(default=None, ge=1)


class Key(BaseModel):
    """A key, without its secret."""

    key_id: UUID
    app: str
    scopes: list[str]
    holder: str | None
    requests_per_second: float | None
    burst: float | None
    created_at: datetime
    revoked_at: datetime | None


class MadeKey(Key):
    """A key at the only moment that shows its secret."""

    key: str


class DeadLetter(BaseModel):
    """A row that passed validation and that Postgres refused, without what people wrote."""

    dead_letter_id: UUID
    log: str
    key: str
    reason: str
    api_key_id: UUID
    received_at: datetime
    replayed_at: datetime | None
    outcome: str | None = Field(description="Of the last replay")


class Replayed(BaseModel):
    """What became of a dead letter that was appended again."""

    status: str = Field(description="created, duplicate, conflict, or invalid if Postgres refused it again")
    reason: str | None


class AuditLine(BaseModel):
    """One change of a key, queue, rule or dead letter."""

    audit_id: int
    at: datetime
    actor: str
    act: str
    subject: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


def router(service: Service) -> APIRouter:
    """The admin routes; FastAPI describes them."""

    async def admin(request: Request) -> Caller:
        return await service.access.caller(request, "admin")

    Admin = Annotated[Caller, Depends(admin)]
    api = APIRouter(prefix="/v1/admin", tags=["admin"], responses=_REFUSALS)

    # Plain functions: Starlette runs them in threads, so that admin work never holds up the capture of feedback.
    @api.get("/keys", summary="List keys, without their secrets")
    def list_keys(caller: Admin) -> list[Key]:
        with _connection(service, caller) as conn:
            return [_key(record) for record in keys.list_keys(conn)]

    async def new_key(request: Request, _: Admin) -> NewKey:
        # Not FastAPI's own reading of bodies, which comes before the question who sends them.
        try:
            return NewKey.model_validate_json(await read_body(request))
        except ValidationError as error:
            raise RequestValidationError(
                [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
            ) from None

    @api.post(
        "/keys",
        status_code=201,
        summary="Make a key; its secret is shown in this answer only",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": NewKey.model_json_schema(),
                        "examples": {
                            "ingest": {
                                "value": {"app": "shop", "requests_per_second": 200, "burst": 500},
                            },
                            "review": {"value": {"app": "shop", "scopes": ["review"], "holder": "Ana Lima"}},
                        },
                    }
                },
            }
        },
    )
    def create_key(caller: Admin, wanted: Annotated[NewKey, Depends(new_key)]) -> MadeKey:
        with _connection(service, caller) as conn:
            record, secret = keys.create_key(
                conn,
                wanted.app,
                wanted.scopes,
                holder=wanted.holder,
                requests_per_second=wanted.requests_per_second,
                burst=wanted.burst,
            )
        return MadeKey(**_key(record).model_dump(), key=secret)

    @api.delete("/keys/{key_id}", summary="Revoke a key; it stops working within seconds")
    def revoke_key(caller: Admin, key_id: UUID) -> Key:
        with _connection(service, caller) as conn:
            if not any(record.key_id == key_id for record in keys.list_keys(conn)):
                raise not_found(f"There is no key {key_id}", "GET /v1/admin/keys lists them")
            return _key(keys.revoke_key(conn, key_id))

    @api.get("/audit", summary="What admins did, newest first")
    def audit(
        caller: Admin,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        before: Annotated[int | None, Query(description="audit_id to go on from", ge=1, lt=2**63)] = None,
    ) -> list[AuditLine]:
        with _connection(service, caller) as conn, conn.cursor(row_factory=dict_row) as cursor:
            rows = cursor.execute(
                "SELECT audit_id, at, actor, act, subject, before, after FROM feedback.admin_audit"
                " WHERE audit_id < coalesce(%s, 9223372036854775807) ORDER BY audit_id DESC LIMIT %s",
                (before, limit),
            ).fetchall()
        return [AuditLine(**row) for row in rows]

    @api.get("/dead-letters", summary="Rows that Postgres refused, oldest first")
    async def list_dead_letters(
        _: Admin,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        replayed: Annotated[bool, Query(description="Those replayed already too")] = False,
    ) -> list[DeadLetter]:
        letters = await dead_letters.list_dead_letters(service.admin, limit=limit, replayed=replayed)
        return [DeadLetter(**msgspec.structs.asdict(letter)) for letter in letters]

    @api.post("/dead-letters/{dead_letter_id}/replay", summary="Append a refused row again")
    async def replay_dead_letter(caller: Admin, dead_letter_id: UUID) -> Replayed:
        outcome = await dead_letters.replay(service.admin, dead_letter_id, _actor(caller))
        if outcome is None:
            raise not_found(
                f"There is no dead letter {dead_letter_id}", "GET /v1/admin/dead-letters lists them"
            )
        return Replayed(status=outcome.status, reason=outcome.reason)

    return api


def _actor(caller: Caller) -> str:
    return f"{caller.holder or caller.app} (key {caller.key_id})"


@contextmanager
def _connection(service: Service, caller: Caller) -> Iterator[psycopg.Connection[Any]]:
    """A transaction as the admin role, in the caller's name. Raises Refused with 422, or Unavailable."""
    try:
        with psycopg.connect(service.database_url, connect_timeout=5) as conn:
            keys.act_as(conn, _actor(caller), ADMIN_ROLE)
            yield conn
    except keys.KeyRefused as error:
        raise Refused(422, Error("invalid", str(error))) from None
    except psycopg.Error as error:
        raise Unavailable(f"{type(error).__name__}: {error}") from error


def _key(record: keys.ApiKey) -> Key:
    return Key(
        key_id=record.key_id,
        app=record.app,
        scopes=list(record.scopes),
        holder=record.holder,
        requests_per_second=record.requests_per_second,
        burst=record.burst,
        created_at=record.created_at,
        revoked_at=record.revoked_at,
    )
