"""Which database to use and how to reach it: URLs, connections, and what an external server must offer.

Belongs here: resolving `DATABASE_URL` or the embedded server to a `Database`, and the probe that says in one
sentence what is wrong with a server. Does not belong here: running the embedded server (`storage.embedded`),
schemas and grants (the migrations).
"""

import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow

from storage.embedded import EmbeddedPostgres, Progress

Driver = Literal["psycopg", "psycopg2"]

MINIMUM_SERVER = 15
# Earlier releases corrupt HNSW indexes under concurrent inserts and vacuum.
MINIMUM_VECTOR = (0, 8, 4)
ROLES = (
    "datamoat_owner",
    "datamoat_writer",
    "datamoat_ingest",
    "datamoat_review",
    "datamoat_admin",
    "datamoat_analyst",
)
CONNECT_SECONDS = 10

_CREATE_DATABASE_LOCK = 0x6D6F6174  # any number of ours


class DatabaseError(RuntimeError):
    """The database cannot be used; the text is one sentence of what is wrong and what to do, without the password."""


class InvalidDatabaseUrl(DatabaseError):
    """DATABASE_URL is not a Postgres URL with a database name."""


class ServerUnreachable(DatabaseError):
    """Nothing answers there, or it does not accept connections now."""


class LoginFailed(DatabaseError):
    """The server refuses this user, password or host."""


class DatabaseMissing(DatabaseError):
    """The server has no database of that name."""


class ServerTooOld(DatabaseError):
    """The server is older than `MINIMUM_SERVER`."""


class VectorUnavailable(DatabaseError):
    """The server has no pgvector to install."""


class VectorNotInstalled(DatabaseError):
    """pgvector is there and this user may not install it in the database."""


class VectorTooOld(DatabaseError):
    """pgvector is older than `MINIMUM_VECTOR`."""


class CannotCreateSchemas(DatabaseError):
    """The user has no CREATE right on the database."""


class CannotManageRoles(DatabaseError):
    """A role of ours is missing and cannot be created, or exists and this user is not a member."""


class CannotCreateDatabase(DatabaseError):
    """The login may not create a database that is needed."""


@dataclass(frozen=True)
class Database:
    """A database, by its libpq URL (`postgresql://...`, no driver); printing it shows no password."""

    url: str = field(repr=False)
    name: str

    @classmethod
    def from_url(cls, url: str) -> "Database":
        """Accepts `postgres://`, `postgresql://` and `postgresql+driver://`; raises InvalidDatabaseUrl."""
        scheme, separator, rest = url.strip().partition("://")
        if not separator or scheme.partition("+")[0] not in ("postgres", "postgresql"):
            raise InvalidDatabaseUrl(
                f"DATABASE_URL must look like postgresql://user:password@host:5432/database; it starts with "
                f"{_harmless(scheme) if separator else 'no scheme'}."
            )
        address = f"postgresql://{rest}"
        try:
            name = psycopg.conninfo.conninfo_to_dict(address).get("dbname")
        except psycopg.ProgrammingError:
            # Its text quotes the part it could not read, which may be the password.
            raise InvalidDatabaseUrl(
                "DATABASE_URL cannot be read as a Postgres URL: percent-encode special characters in the user and "
                "password (@ is %40, : is %3A, / is %2F, % is %25), and check the port and the parameters."
            ) from None
        if not name:
            raise InvalidDatabaseUrl(
                "DATABASE_URL names no database: add it after the host, as in postgresql://user:password@host:5432/support."
            )
        return cls(address, str(name))

    @property
    def place(self) -> str:
        """`user@host:port/database`, for messages."""
        found = psycopg.conninfo.conninfo_to_dict(self.url)
        user = f"{found['user']}@" if "user" in found else ""
        port = f":{found['port']}" if "port" in found else ""
        return f"{user}{found.get('host') or found.get('hostaddr') or 'local socket'}{port}/{self.name}"

    def connect(
        self, role: str | None = None, autocommit: bool = False, application_name: str = "datamoat"
    ) -> psycopg.Connection[TupleRow]:
        """A new connection, acting as `role` if given. Raises psycopg's errors."""
        connection = psycopg.connect(self.url, autocommit=True, application_name=application_name)
        try:
            if role is not None:
                connection.execute(sql.SQL("set role {}").format(sql.Identifier(role)))
            connection.autocommit = autocommit
        except BaseException:
            connection.close()
            raise
        return connection

    def sqlalchemy_url(self, driver: Driver) -> str:
        """`postgresql+<driver>://...`: the driver is named, since what a bare `postgresql://` means has changed."""
        return self.url.replace("postgresql://", f"postgresql+{driver}://", 1)

    def with_name(self, name: str) -> "Database":
        """The same server, login and parameters with another database."""
        # As libpq reads it: no fragment, and a plus sign is a plus sign.
        address, _, query = self.url.partition("?")
        authority = address.removeprefix("postgresql://").partition("/")[0]
        query = "&".join(pair for pair in query.split("&") if pair and not pair.startswith("dbname="))
        return Database(
            f"postgresql://{authority}/{quote(name, safe='')}{'?' + query if query else ''}", name
        )


_held: dict[Path, EmbeddedPostgres] = {}
_held_mutex = threading.Lock()


def resolve(
    database_url: str | None, home: Path, name: str, progress: Progress | None = None, *, durable: bool = True
) -> Database:
    """The database to use: `database_url` as it is (with the name in it) if given, else `name` on the embedded server.

    The embedded server under `home` is started if need be and used until this process ends (or `release(home)`);
    the database is created if missing; `durable` as in EmbeddedPostgres. An external one is not contacted: see `check`.
    Raises InvalidDatabaseUrl, or storage.embedded.EmbeddedPostgresError.
    """
    if database_url:
        return Database.from_url(database_url)
    key = home.expanduser().resolve()
    with _held_mutex:
        held = _held.get(key) or EmbeddedPostgres(key, durable=durable, progress=progress)
        server = held.acquire()
        _held[key] = held
    create_if_missing(Database(server.url("postgres"), "postgres"), name)
    return Database(server.url(name), name)


def release(home: Path) -> None:
    """End this process's use of the embedded server under `home`, as far as `resolve` began it."""
    with _held_mutex:
        held = _held.pop(home.expanduser().resolve(), None)
    if held is not None:
        held.release()


def create_if_missing(maintenance: Database, name: str) -> None:
    """Create the database `name` on the server of `maintenance`; several processes at once do not collide.

    Raises CannotCreateDatabase.
    """
    with maintenance.connect(autocommit=True) as connection:
        exists = "select 1 from pg_database where datname = %s"
        if connection.execute(exists, [name]).fetchone():
            return
        # Two processes that create at once would make one of them fail.
        connection.execute("select pg_advisory_lock(%s)", [_CREATE_DATABASE_LOCK])
        if not connection.execute(exists, [name]).fetchone():
            try:
                connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
            except psycopg.errors.InsufficientPrivilege:
                raise CannotCreateDatabase(
                    f"The user of {maintenance.place} may not create the database {name}: as a superuser, run "
                    f"CREATE DATABASE {_identifier(name)} OWNER {_user(maintenance)};"
                ) from None


def check(database: Database) -> None:
    """Ask the server whether Datamoat can work there; changes nothing. Raises the DatabaseError that fits."""
    with _connect(database) as connection:
        _check_version(_fetch(connection, _VERSION))
        _check_rights(database, _fetch(connection, _RIGHTS))
        _check_vector(database, _fetch(connection, _VECTOR))
        _check_roles(database, _fetch(connection, _ROLES))


Row = tuple[object, ...]

_VERSION = "select current_setting('server_version_num')::int, current_setting('server_version')"
_RIGHTS = "select current_user::text, has_database_privilege(current_database(), 'CREATE')"
# Installed version, version on offer, whether this user may install it.
_VECTOR = """
select (select extversion from pg_extension where extname = 'vector'),
       e.default_version,
       (select rolsuper from pg_roles where rolname = current_user)
       or exists (select from pg_available_extension_versions v
                  where v.name = 'vector' and v.version = e.default_version
                    and (not v.superuser or (v.trusted and has_database_privilege(current_database(), 'CREATE'))))
from (values (1)) one left join pg_available_extensions e on e.name = 'vector'
"""
# User, whether it may create roles, roles missing, roles it is not a member of.
_ROLES = """
select current_user::text, rolsuper or rolcreaterole,
       array(select name from unnest(%(names)s::text[]) with ordinality u(name, place)
             where not exists (select from pg_roles r where r.rolname = name) order by place),
       array(select r.rolname::text from pg_roles r join unnest(%(names)s::text[]) with ordinality u(name, place)
             on name = r.rolname where not pg_has_role(current_user, r.oid, 'member') order by place)
from pg_roles where rolname = current_user
"""


def _connect(database: Database) -> psycopg.Connection[TupleRow]:
    try:
        return psycopg.connect(
            database.url, autocommit=True, connect_timeout=CONNECT_SECONDS, application_name="datamoat check"
        )
    except psycopg.OperationalError as error:
        raise _explain(database, str(error)) from None


def _explain(database: Database, text: str) -> DatabaseError:
    """libpq gives no error code for a failed connection, only the server's text, so that is what we read."""
    # One attempt per address is listed; the last that reached a server says most.
    lines = text.strip().splitlines()
    said = next((line for line in reversed(lines) if "FATAL:" in line), lines[-1]).strip()
    reason = said.partition("FATAL:")[2].strip()
    if "no password supplied" in text:
        reason = "no password supplied"
    place = database.place
    if not reason:
        return ServerUnreachable(
            f"No Postgres answers at {place} ({said}): start the server, or correct the host and port in DATABASE_URL."
        )
    if re.fullmatch(r'database ".*" does not exist', reason):
        return DatabaseMissing(
            f"The server at {place} has no such database: create it with CREATE DATABASE {_identifier(database.name)}; "
            "or correct the name in DATABASE_URL."
        )
    if re.search(
        r"authentication failed|^role .* (does not exist|is not permitted)|no pg_hba|no password", reason
    ):
        return LoginFailed(
            f"The server at {place} refuses the login ({reason}): correct the user and password in DATABASE_URL, or "
            "allow that user from this host in pg_hba.conf."
        )
    if "permission denied for database" in reason:
        return LoginFailed(
            f"The server at {place} refuses the login ({reason}): run GRANT CONNECT ON DATABASE "
            f"{_identifier(database.name)} TO {_identifier(_user(database))};"
        )
    return ServerUnreachable(
        f"The server at {place} accepts no connection now ({reason}): try again when it does."
    )


def _check_version(row: Row) -> None:
    number, name = row
    if int(str(number)) // 10000 < MINIMUM_SERVER:
        raise ServerTooOld(
            f"The server is Postgres {name} and Datamoat needs {MINIMUM_SERVER} or later: upgrade it, or unset "
            "DATABASE_URL to use the embedded server."
        )


def _check_rights(database: Database, row: Row) -> None:
    user, may_create = row
    if not may_create:
        raise CannotCreateSchemas(
            f"User {user} may not create schemas in database {database.name}: run, as its owner, GRANT CREATE ON "
            f"DATABASE {_identifier(database.name)} TO {_identifier(str(user))};"
        )


def _check_vector(database: Database, row: Row) -> None:
    installed, offered, may_install = row
    needed = ".".join(map(str, MINIMUM_VECTOR))
    place = database.place
    if installed is None and offered is None:
        raise VectorUnavailable(
            f"The server of {place} has no pgvector: install the package pgvector {needed} or later on its machine, "
            "then run, as superuser in that database, CREATE EXTENSION vector;"
        )
    if _numbers(str(installed or offered)) < MINIMUM_VECTOR:
        if offered is not None and _numbers(str(offered)) >= MINIMUM_VECTOR:
            raise VectorTooOld(
                f"pgvector in {place} is {installed} and Datamoat needs {needed} or later, which the server has: "
                "run, as superuser in that database, ALTER EXTENSION vector UPDATE;"
            )
        update = "ALTER EXTENSION vector UPDATE;" if installed else "CREATE EXTENSION vector;"
        raise VectorTooOld(
            f"pgvector on the server of {place} is {installed or offered} and Datamoat needs {needed} or later "
            f"(earlier ones corrupt indexes): upgrade the package, then run in that database {update}"
        )
    if installed is None and not may_install:
        raise VectorNotInstalled(
            f"pgvector is not installed in {place} and this user may not do it: run, as superuser in that database, "
            "CREATE EXTENSION vector;"
        )


def _check_roles(database: Database, row: Row) -> None:
    user, may_create, missing, foreign = row
    assert isinstance(missing, list) and isinstance(foreign, list)
    who = _identifier(str(user))
    if missing and not may_create:
        raise CannotManageRoles(
            f"User {user} of {database.place} may not create the roles {', '.join(missing)}: run, as superuser, "
            f"ALTER ROLE {who} CREATEROLE;"
        )
    if foreign:
        raise CannotManageRoles(
            f"User {user} of {database.place} is not a member of {', '.join(foreign)}: run, as superuser, "
            f"GRANT {', '.join(foreign)} TO {who};"
        )


def _fetch(connection: psycopg.Connection[TupleRow], query: str) -> Row:
    row = connection.execute(query, {"names": list(ROLES)}).fetchone()
    assert row is not None
    return row


def _user(database: Database) -> str:
    return str(psycopg.conninfo.conninfo_to_dict(database.url).get("user") or "CURRENT_USER")


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def _harmless(scheme: str) -> str:
    """The scheme, unless it is so odd that it may hold something private."""
    return f"{scheme}://" if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]{0,20}", scheme) else "something else"
