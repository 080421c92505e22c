"""``python -m feedback``: serve, migrate, and look after API keys.

Belongs here: reading options and the environment, printing. Does not belong here: any work of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import psycopg
import typer

app = typer.Typer(
    help="The feedback capture service.", no_args_is_help=True, pretty_exceptions_show_locals=False
)
key_app = typer.Typer(help="API keys of the apps that send feedback.", no_args_is_help=True)
app.add_typer(key_app, name="key")

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
    pseudonym_key_file: Annotated[
        Path,
        typer.Option(
            envvar="DATAMOAT_PSEUDONYM_KEY_FILE",
            help="Secret that turns people's ids into pseudonyms; made if missing. Back it up.",
        ),
    ] = Path(".datamoat/pseudonym.key"),
) -> None:
    """Serve the HTTP API until interrupted."""
    from feedback.secret import ensure_secret
    from feedback.server import PortTaken
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
            on_ready=lambda line: print(line, flush=True),
        )
    except (PortTaken, ValueError) as error:
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


@key_app.command("create")
def create(
    database_url: DatabaseUrl,
    app_name: Annotated[str, typer.Option("--app", help="The app that will use the key.")],
    scope: Annotated[list[str] | None, typer.Option(help="What the key may do; ingest by default.")] = None,
) -> None:
    """Make a key and print it: it cannot be shown again."""
    from feedback.keys import create_key

    with _connection(database_url) as conn:
        record, key = create_key(conn, app_name, scope or ["ingest"])
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
            typer.echo(f"{key.key_id}  {key.app}  {','.join(key.scopes)}  {key.created_at:%Y-%m-%d}  {state}")


@contextmanager
def _connection(database_url: str) -> Iterator[psycopg.Connection[Any]]:
    from feedback.keys import KeyRefused

    try:
        with psycopg.connect(database_url) as conn:
            yield conn
    except psycopg.errors.UndefinedTable as error:
        raise _stop("the feedback schema is missing; run `python -m feedback migrate` first") from error
    except (psycopg.Error, KeyRefused) as error:
        raise _stop(error) from error


def _stop(reason: object) -> typer.Exit:
    typer.echo(f"error: {reason}", err=True)
    return typer.Exit(1)
