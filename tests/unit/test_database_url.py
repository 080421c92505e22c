"""DATABASE_URL: what is accepted, what each driver is given, and that no text shows the password."""

from urllib.parse import quote

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import make_url

from storage.database import Database, InvalidDatabaseUrl

text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg2"])
def test_the_driver_is_removed(scheme: str) -> None:
    database = Database.from_url(f" {scheme}://ann:secret@db.example:5433/support?sslmode=require\n")
    assert database.url == "postgresql://ann:secret@db.example:5433/support?sslmode=require"
    assert database.name == "support"
    assert database.place == "ann@db.example:5433/support"


def test_sqlalchemy_urls_name_their_driver() -> None:
    database = Database.from_url("postgres://ann:secret@db.example/support")
    assert database.sqlalchemy_url("psycopg") == "postgresql+psycopg://ann:secret@db.example/support"
    assert database.sqlalchemy_url("psycopg2") == "postgresql+psycopg2://ann:secret@db.example/support"


@given(user=text, password=text, name=text, other=text)
def test_every_reader_of_a_url_finds_the_same(user: str, password: str, name: str, other: str) -> None:
    login = f"{quote(user, safe='')}:{quote(password, safe='')}"
    database = Database.from_url(
        f"postgresql://{login}@db.example:5433/{quote(name, safe='')}?connect_timeout=3"
    )
    assert database.name == name
    moved = database.with_name(other)
    assert moved.name == other
    libpq = psycopg.conninfo.conninfo_to_dict(moved.url)
    assert libpq == {
        "user": user,
        "password": password,
        "host": "db.example",
        "port": "5433",
        "dbname": other,
        "connect_timeout": "3",
    }
    sqlalchemy = make_url(moved.sqlalchemy_url("psycopg"))
    assert (sqlalchemy.username, sqlalchemy.password) == (user, password)
    assert (sqlalchemy.host, sqlalchemy.port) == ("db.example", 5433)
    assert dict(sqlalchemy.query) == {"connect_timeout": "3"}


@pytest.mark.parametrize(
    ("url", "moved"),
    [
        ("postgresql://h/a?dbname=b&sslmode=disable", "postgresql://h/new?sslmode=disable"),
        ("postgresql:///a?host=/run/pg", "postgresql:///new?host=/run/pg"),
        ("postgresql://u@[::1]:5433/a", "postgresql://u@[::1]:5433/new"),
        ("postgresql://h1:1,h2:2/a?options=-c%20x%3D1+2", "postgresql://h1:1,h2:2/new?options=-c%20x%3D1+2"),
        ("postgresql://u:p%23w@h/a", "postgresql://u:p%23w@h/new"),
        ("postgresql://u:p#w@h/a", "postgresql://u:p#w@h/new"),
    ],
)
def test_another_database_keeps_everything_else(url: str, moved: str) -> None:
    assert Database.from_url(url).with_name("new").url == moved


def test_the_name_may_be_a_parameter() -> None:
    assert Database.from_url("postgresql://h/a?dbname=b").name == "b"


@pytest.mark.parametrize(
    "url",
    [
        "mysql://ann:s3cret@h/a",
        "s3cret",
        "host=h password=s3cret",
        "ann:s3cret@h://a",
        "postgresql://ann:s3cret@h",
        "postgresql://ann:s3cret@h/",
        "postgresql://ann:s3cret@h:port/a?sslmode",
        "postgresql://ann:s3cret/x@h/a?b",
        "postgresql://ann:s3%cret@h/a",
        "postgresql://ann@h/a?pass_word=s3cret",
    ],
)
def test_what_cannot_be_used_is_refused_without_showing_the_password(url: str) -> None:
    with pytest.raises(InvalidDatabaseUrl, match="DATABASE_URL") as caught:
        Database.from_url(url)
    assert "s3" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_printing_shows_no_password() -> None:
    assert "s3cret" not in repr(Database.from_url("postgresql://ann:s3cret@h/a"))
