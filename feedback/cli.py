"""``python -m feedback``: serve, migrate, and look after API keys.

Belongs here: reading options and the environment, printing. Does not belong here: any work of its own.
"""

import functools
import getpass
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from uuid import UUID

import psycopg
import typer

if TYPE_CHECKING:
    from feedback import log

T = TypeVar("T")

app = typer.Typer(
    help="The feedback capture service.", no_args_is_help=True, pretty_exceptions_show_locals=False
)
key_app = typer.Typer(help="API keys of the apps that send feedback.", no_args_is_help=True)
app.add_typer(key_app, name="key")
dead_letter_app = typer.Typer(
    help="Rows that Postgres refused after validation, kept until they are replayed.", no_args_is_help=True
)
app.add_typer(dead_letter_app, name="dead-letter")

DatabaseUrl = Annotated[
    str,
    typer.Option(envvar="DATABASE_URL", help="postgresql://user:password@host/database", show_default=False),
]


@app.command()
def serve(
    database_url: DatabaseUrl,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8787,
    workers: Annotated[int, typer.Option(min=1, max=64)] = 1,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            envvar="DATAMOAT_ALLOWED_ORIGINS",
            help="Origin whose pages may use the API, such as https://app.example.com; repeat it for several.",
        ),
    ] = None,
    pseudonym_key_file: Annotated[
        Path,
        typer.Option(
            envvar="DATAMOAT_PSEUDONYM_KEY_FILE",
            help="Secret that turns people's ids into pseudonyms; made if missing. Back it up.",
        ),
    ] = Path(".datamoat/pseudonym.key"),
    search: Annotated[
        str | None,
        typer.Option(
            envvar="DATAMOAT_SEARCH",
            help="Function behind /v1/search and the ask page, as MODULE:FUNCTION; none by default.",
        ),
    ] = None,
) -> None:
    """Serve the HTTP API and the pages until interrupted."""
    from feedback.search import check_search
    from feedback.secret import ensure_secret
    from feedback.server import NotStarted, PortTaken
    from feedback.server import serve as run

    try:
        pseudonym_key, created = ensure_secret(pseudonym_key_file)
        if created:
            typer.echo(
                f"made the pseudonym key {pseudonym_key_file}: back it up, people cannot be recognised without it",
                err=True,
            )
        run(
            database_url,
            pseudonym_key=pseudonym_key,
            host=host,
            port=port,
            workers=workers,
            allowed_origins=allow_origin or (),
            search=check_search(search) if search else None,
            on_ready=lambda line: print(line, flush=True),
        )
    except (NotStarted, PortTaken, ValueError) as error:
        raise _stop(error) from error


@app.command()
def migrate(database_url: DatabaseUrl) -> None:
    """Bring the feedback schema to the newest revision; run again at will."""
    from sqlalchemy.exc import SQLAlchemyError

    from feedback.migrations import upgrade

    try:
        applied = upgrade(database_url)
    except (psycopg.Error, SQLAlchemyError, ValueError) as error:
        raise _stop(error) from error
    typer.echo(f"applied {', '.join(applied)}" if applied else "nothing to do")


@app.command("import")
def import_export(
    name: Annotated[
        str, typer.Argument(metavar="FORMAT", help="Whose export it is; `list` names those there are.")
    ],
    files: Annotated[list[Path] | None, typer.Argument(help="JSON or JSON Lines, gzipped or not.")] = None,
    url: Annotated[str, typer.Option(help="The feedback service.")] = "http://127.0.0.1:8787",
    api_key: Annotated[
        str | None,
        typer.Option(envvar="DATAMOAT_API_KEY", help="A key with scope ingest.", show_default=False),
    ] = None,
) -> None:
    """Send another system's export through the API; importing it again stores nothing twice."""
    from feedback.client import FeedbackClient, SendFailed
    from feedback.importing import FORMATS, ImportRefused, import_file

    if name == "list":
        typer.echo("\n".join(FORMATS))
        return
    if not files or not api_key:
        raise _stop("name the files, and give a key: --api-key or DATAMOAT_API_KEY")
    refused = False
    try:
        with FeedbackClient(url, api_key) as client:
            for file in files:
                done = import_file(client, name, file)
                typer.echo(f"{file}: {done.records:,} records")
                for (kind, fate), count in sorted(done.items.items()):
                    if count:
                        typer.echo(f"  {kind}: {count:,} {fate}")
                if done.refused_records:
                    typer.echo(f"  {done.refused_records:,} of them refused: are these {name} exports?")
                if done.refused_records or any(n for (_, fate), n in done.items.items() if fate == "refused"):
                    refused = True
                    typer.echo(f"  refused ones, each with its reason: {file}.refused.jsonl", err=True)
    except (ImportRefused, SendFailed) as error:
        raise _stop(error) from error
    if refused:
        raise typer.Exit(1)


@key_app.command("create")
def create(
    database_url: DatabaseUrl,
    app_name: Annotated[str, typer.Option("--app", help="The app that will use the key.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="What the key may do: ingest (the default), read, review or admin; repeat it for several."
        ),
    ] = None,
    holder: Annotated[
        str | None, typer.Option(help="The person or service that uses it; a reviewer's name.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Requests a second on average; not limited if left out.")
    ] = None,
    burst: Annotated[
        float | None, typer.Option(min=1, help="Requests at once; the rate if left out.")
    ] = None,
) -> None:
    """Make a key and print it: it cannot be shown again."""
    from feedback.keys import create_key

    with _connection(database_url) as conn:
        record, key = create_key(
            conn, app_name, scope or ["ingest"], holder=holder, requests_per_second=rate, burst=burst
        )
    typer.echo(f"key {record.key_id} for app {record.app}", err=True)
    typer.echo(key)


@key_app.command("revoke")
def revoke(database_url: DatabaseUrl, key_id: UUID) -> None:
    """Stop accepting a key, by the id that `key list` shows."""
    from feedback.keys import revoke_key

    with _connection(database_url) as conn:
        record = revoke_key(conn, key_id)
    typer.echo(f"key {record.key_id} for app {record.app} is revoked")


@key_app.command("list")
def show(database_url: DatabaseUrl) -> None:
    """List keys, without their secrets."""
    from feedback.keys import list_keys

    with _connection(database_url) as conn:
        for key in list_keys(conn):
            state = f"revoked {key.revoked_at:%Y-%m-%d}" if key.revoked_at else "active"
            rate = f"{key.requests_per_second:g}/s" if key.requests_per_second else "no limit"
            typer.echo(
                f"{key.key_id}  {key.app}  {','.join(key.scopes)}  {key.holder or '-'}  {rate}"
                f"  {key.created_at:%Y-%m-%d}  {state}"
            )


@app.command()
def audit(
    database_url: DatabaseUrl,
    limit: Annotated[int, typer.Option(min=1, help="How many of the newest lines.")] = 50,
) -> None:
    """Show what admins did to keys, queues, rules and dead letters, newest first."""
    with _connection(database_url) as conn:
        for at, actor, act, subject, before, after in conn.execute(
            "SELECT at, actor, act, subject, before, after FROM feedback.admin_audit ORDER BY audit_id DESC LIMIT %s",
            (limit,),
        ):
            typer.echo(f"{at:%Y-%m-%d %H:%M:%S}  {actor}  {act} {subject}  {_changed(before, after)}")


@dead_letter_app.command("list")
def list_dead_letters(
    database_url: DatabaseUrl,
    replayed: Annotated[bool, typer.Option(help="Those replayed already too.")] = False,
) -> None:
    """List dead letters, oldest first, without what people wrote."""
    from feedback import dead_letters

    letters = _as_admin(
        database_url, lambda pool: dead_letters.list_dead_letters(pool, limit=1000, replayed=replayed)
    )
    if not letters:
        typer.echo("there are none")
    for letter in letters:
        outcome = f"  replayed: {letter.outcome}" if letter.outcome else ""
        typer.echo(
            f"{letter.dead_letter_id}  {letter.received_at:%Y-%m-%d %H:%M}  {letter.log} {letter.key}"
            f"  {letter.reason}{outcome}"
        )


@dead_letter_app.command("replay")
def replay(database_url: DatabaseUrl, dead_letter_ids: list[UUID]) -> None:
    """Append dead letters again, by the ids that `dead-letter list` shows, once the cause is gone."""
    from feedback import dead_letters

    refused = False
    for id in dead_letter_ids:
        outcome = _as_admin(
            database_url, functools.partial(dead_letters.replay, dead_letter_id=id, actor=_actor())
        )
        if outcome is None:
            raise _stop(f"there is no dead letter {id}; see `python -m feedback dead-letter list`")
        typer.echo(f"{id}  {outcome.status}" + (f": {outcome.reason}" if outcome.reason else ""))
        refused |= outcome.status not in ("created", "duplicate")
    if refused:
        raise typer.Exit(1)


@contextmanager
def _connection(database_url: str) -> Iterator[psycopg.Connection[Any]]:
    from feedback.keys import KeyRefused, act_as

    try:
        with psycopg.connect(database_url) as conn:
            act_as(conn, _actor())
            yield conn
    except psycopg.errors.UndefinedTable as error:
        raise _stop("the feedback schema is missing; run `python -m feedback migrate` first") from error
    except (psycopg.Error, KeyRefused) as error:
        raise _stop(error) from error


def _as_admin(database_url: str, work: Callable[["log.Pool"], Awaitable[T]]) -> T:
    """Do ``work`` on a pool that acts as the admin role."""
    import asyncio

    from feedback import log
    from feedback.service import ADMIN_ROLE

    async def run() -> T:
        pool = await log.connect(database_url, ADMIN_ROLE, 1)
        try:
            return await work(pool)
        finally:
            await log.close(pool)

    try:
        return asyncio.run(run())
    except log.Unavailable as error:
        raise _stop(error) from error


def _actor() -> str:
    """Who types this, for the audit."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a container may run as a number that has no name
        name = f"uid {os.getuid()}"
    return f"{name} (command line)"


def _changed(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """The columns that differ, as ``name=value``; the whole row of what was made."""
    old, new = before or {}, after or {}
    shown = new if not old else {name: new.get(name) for name in old if old[name] != new.get(name)}
    return " ".join(f"{name}={value}" for name, value in shown.items() if value is not None)


def _stop(reason: object) -> typer.Exit:
    typer.echo(f"error: {reason}", err=True)
    return typer.Exit(1)
