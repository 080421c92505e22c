"""Landing: good rows in raw, the rest in quarantine, the same state however often and however interrupted."""

import csv
import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from psycopg.conninfo import make_conninfo

from assets.sources.contract import Column, Contract
from assets.sources.land import SourceRefused, land, write_catalogue

Connection = psycopg.Connection[Any]

COLUMNS = (
    Column("id", "string", required=True, primary_key=True, pattern="^T-[0-9]+$"),
    Column("opened", "timestamp", required=True),
    Column("day", "date"),
    Column("count", "integer", minimum=0, maximum=10),
    Column("price", "number"),
    Column("paid", "boolean"),
    Column("status", "string", valid_values=("open", "closed")),
    Column("email", "string", unique=True, max_length=20, pii=True),
    Column("tags", "array"),
)
HEADER = "id,opened,day,count,price,paid,status,email,tags\n"
GOOD = 'T-1,2026-01-31T12:00:00+02:00,2026-01-31,3,1.5,true,open,a@x.org,"[""b"", ""a""]"\n'


@pytest.fixture(autouse=True)
def as_the_pipeline(conn: Connection) -> None:
    conn.execute("set role datamoat_writer")
    conn.commit()


@pytest.fixture
def contract(tmp_path: Path) -> Contract:
    folder = tmp_path / "tickets"
    folder.mkdir()
    return Contract(
        name="tickets",
        version="1.0.0",
        owner="support",
        description="What customers ask.",
        grain="One row per ticket.",
        provenance="proprietary",
        pii=True,
        allowed_uses=("rag",),
        freshness_days=None,
        kind="table",
        format="csv",
        folder=folder,
        glob="*.csv",
        file=tmp_path / "tickets.odcs.yaml",
        sha256="1" * 64,
        columns=COLUMNS,
    )


def write(contract: Contract, name: str, *rows: str) -> Path:
    path = contract.folder / name
    path.write_text(HEADER + "".join(rows))
    return path


def plain(number: int, **changes: str) -> str:
    row = dict.fromkeys(HEADER.strip().split(","), "") | {
        "id": f"T-{number}",
        "opened": "2026-01-01T00:00:00Z",
    }
    return ",".join((row | changes).values()) + "\n"


def query(conn: Connection, statement: str) -> list[tuple[Any, ...]]:
    with conn.transaction():
        return conn.execute(statement.encode()).fetchall()


def address(conn: Connection, role: str | None = "datamoat_writer") -> str:
    options = f"-c role={role}" if role else ""
    return make_conninfo(conn.info.dsn, password=conn.info.password or None, options=options)


def state(conn: Connection) -> dict[str, list[tuple[Any, ...]]]:
    """Everything a landing writes but times, run ids and generated keys."""
    table = query(conn, "select to_regclass('raw.tickets')")[0][0]
    return {
        "raw": query(conn, "select to_jsonb(r) - '_loaded_at' from raw.tickets r order by 1")
        if table
        else [],
        "rows": query(
            conn,
            "select file, row_number, rule, reason, row, content_hash, resolved_at is null"
            " from quarantine.row order by 1, 2, 3",
        ),
        "files": query(
            conn, "select file, rule, sha256, resolved_at is null from quarantine.file order by 1, 2"
        ),
        "ledger": query(
            conn,
            "select file, sha256, size, rows_in, rows_landed, rows_refused, contract_sha256"
            " from registry.source_file order by 1",
        ),
    }


def versions(conn: Connection) -> list[tuple[Any, ...]]:
    """Changes with every write of a row, also with one that writes the same values."""
    return query(
        conn,
        "select 'raw', xmin::text, ctid::text from raw.tickets"
        " union all select 'row', xmin::text, ctid::text from quarantine.row"
        " union all select 'file', xmin::text, ctid::text from quarantine.file"
        " union all select 'ledger', xmin::text, ctid::text from registry.source_file order by 1, 2, 3",
    )


def test_row_lands_typed_with_where_it_came_from(conn: Connection, contract: Contract) -> None:
    path = write(contract, "a.csv", GOOD)
    report = land(conn, contract, "run-1")
    assert (report.rows_in, report.rows_landed, report.rows_refused, report.unchanged) == (1, 1, 0, False)
    [row] = query(
        conn,
        "select id, opened = '2026-01-31 10:00Z', day::text, count, price, paid, status, email, tags, _source, _row,"
        " length(_content_hash), _loaded_at <= now() from raw.tickets",
    )
    assert row == (
        "T-1", True, "2026-01-31", 3, 1.5, True, "open", "a@x.org", ["b", "a"], "a.csv", 2, 64, True,
    )  # fmt: skip
    assert query(conn, "select file, size, rows_in, rows_landed, rows_refused from registry.source_file") == [
        ("a.csv", path.stat().st_size, 1, 1, 0)
    ]


@pytest.mark.parametrize(
    ("changes", "rule", "shown"),
    [
        ({"id": ""}, "required", "'id' is missing"),
        ({"opened": ""}, "required", "'opened' is missing"),
        ({"id": "X-1"}, "pattern", "'X-1' does not match ^T-[0-9]+$"),
        ({"opened": "31.01.2026 10:00"}, "wrong_type", "'31.01.2026 10:00'"),
        ({"opened": "2026-01-31"}, "wrong_type", "is not an ISO 8601 time"),
        ({"opened": "2026-02-30T10:00:00Z"}, "wrong_type", "2026-02-30"),
        ({"opened": "0001-01-01T00:00:00+14:00"}, "wrong_type", "in the years 1 to 9999"),
        ({"day": "2026-02-30"}, "wrong_type", "2026-02-30"),
        ({"day": "0000-01-01"}, "wrong_type", "0000-01-01"),
        ({"count": "1.5"}, "wrong_type", "'1.5' is not a whole number"),
        ({"count": "0x1"}, "wrong_type", "0x1"),
        ({"count": "9223372036854775808"}, "wrong_type", "below 2**63"),
        ({"count": "-1"}, "minimum", "'-1' is less than 0"),
        ({"count": "11"}, "maximum", "'11' is more than 10"),
        ({"price": "nan"}, "wrong_type", "'nan'"),
        ({"price": "1e999"}, "wrong_type", "finite"),
        ({"price": "1 000"}, "wrong_type", "1 000"),
        ({"paid": "maybe"}, "wrong_type", "'maybe' is not true or false"),
        ({"status": "OPEN"}, "valid_values", "'OPEN' is not a valid value"),
        ({"email": "someone.with.a.long.name@example.org"}, "max_length", "(withheld: personal)"),
        ({"tags": "{}"}, "wrong_type", "a JSON array"),
        ({"tags": '"[""\\u0000""]"'}, "wrong_type", "a JSON array"),
    ],
)
def test_row_that_breaks_a_rule_is_quarantined_whole(
    conn: Connection, contract: Contract, changes: dict[str, str], rule: str, shown: str
) -> None:
    write(contract, "a.csv", plain(1), plain(2, **changes), plain(3))
    report = land(conn, contract, "run-1")
    assert (report.rows_in, report.rows_landed, report.refused_by_rule) == (3, 2, {rule: 1})
    [(file, number, found, reason, remedy, row, version, run)] = query(
        conn,
        "select file, row_number, rule, reason, remedy, row, contract_version, run_id from quarantine.row",
    )
    assert (file, number, found, version, run) == ("a.csv", 3, rule, "1.0.0", "run-1")
    assert shown in reason
    assert remedy.endswith(".")
    for name, value in changes.items():
        assert row[name] == (value.strip('"').replace('""', '"') or None)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-01-31 10:00", "2026-01-31 10:00:00Z"),
        ("2026-01-31T10:00:00", "2026-01-31 10:00:00Z"),
        ("2026-01-31T10:00:00.123456789Z", "2026-01-31 10:00:00.123456Z"),
        ("2026-01-31T10:00:00-0530", "2026-01-31 15:30:00Z"),
        ("2026-01-31T10:00+01", "2026-01-31 09:00:00Z"),
        ("1850-01-31T10:00:00Z", "1850-01-31 10:00:00Z"),
    ],
)
def test_times_are_iso_8601_and_utc_where_they_name_no_zone(
    conn: Connection, contract: Contract, text: str, moment: str
) -> None:
    write(contract, "a.csv", plain(1, opened=text), plain(2, opened="2026-01-31T10:00:00Z"))
    land(conn, contract, None)
    assert query(conn, f"select opened = '{moment}' from raw.tickets where id = 'T-1'") == [(True,)]


def test_first_row_of_a_key_wins_by_file_and_line(conn: Connection, contract: Contract) -> None:
    write(contract, "b.csv", plain(1, status="closed"), plain(2, email="a@x.org"))
    write(contract, "a.csv", plain(3), plain(1, status="open"), plain(3), plain(3, email="a@x.org"))
    report = land(conn, contract, "run-1")
    assert (report.rows_in, report.rows_landed, report.refused_by_rule) == (6, 3, {"duplicate_key": 3})
    assert query(conn, "select id, status, _source, _row from raw.tickets order by id") == [
        ("T-1", "open", "a.csv", 3),
        ("T-2", None, "b.csv", 3),
        ("T-3", None, "a.csv", 2),
    ]
    assert query(conn, "select file, row_number, reason, row ->> 'id' from quarantine.row order by 1, 2") == [
        ("a.csv", 4, "id T-3 is already in a.csv, row 2", "T-3"),
        ("a.csv", 5, "id T-3 is already in a.csv, row 2", "T-3"),
        ("b.csv", 2, "id T-1 is already in a.csv, row 3", "T-1"),
    ]


def test_duplicate_of_a_personal_key_does_not_tell_it(conn: Connection, contract: Contract) -> None:
    write(contract, "a.csv", plain(1, email="a@x.org"), plain(2, email="a@x.org"))
    land(conn, contract, None)
    assert query(conn, "select reason from quarantine.row") == [
        ("email (withheld: personal) is already in a.csv, row 2",)
    ]


def test_second_run_with_nothing_changed_writes_nothing(conn: Connection, contract: Contract) -> None:
    write(contract, "a.csv", GOOD, plain(2, count="x"), plain(2), plain(2))
    (contract.folder / "b.csv").write_bytes(b"\xff\xfe\x00")
    (contract.folder / "c.csv").write_bytes(b"")
    first = land(conn, contract, "run-1")
    before = versions(conn)
    second = land(conn, contract, "run-2")
    assert versions(conn) == before
    assert (first.unchanged, second.unchanged) == (False, True)
    assert second == replace(second, files=second.files)
    for report in (first, second):
        assert (report.rows_in, report.rows_landed, report.rows_refused, report.files_refused) == (4, 2, 2, 2)
        assert report.refused_by_rule == {"wrong_type": 1, "duplicate_key": 1}
        assert {file.file: file.refused.rule for file in report.files if file.refused} == {
            "b.csv": "wrong_encoding",
            "c.csv": "empty_file",
        }


def test_same_bytes_written_again_are_no_change(conn: Connection, contract: Contract) -> None:
    path = write(contract, "a.csv", GOOD)
    land(conn, contract, None)
    path.touch()
    os.utime(path, (1, 1))
    assert land(conn, contract, None).unchanged


def test_only_rows_that_changed_are_written(conn: Connection, contract: Contract) -> None:
    write(contract, "a.csv", plain(1), plain(2), plain(3))
    land(conn, contract, None)
    before = dict(query(conn, "select id, xmin::text from raw.tickets"))
    write(contract, "a.csv", plain(1), plain(2, status="open"))
    land(conn, contract, None)
    after = dict(query(conn, "select id, xmin::text from raw.tickets"))
    assert after["T-1"] == before["T-1"]
    assert after["T-2"] != before["T-2"]
    assert "T-3" not in after


def test_file_that_is_gone_takes_its_rows_along(conn: Connection, contract: Contract) -> None:
    write(contract, "a.csv", plain(1))
    path = write(contract, "b.csv", plain(2), plain(3, count="x"))
    land(conn, contract, None)
    path.unlink()
    report = land(conn, contract, None)
    assert (report.rows_in, report.rows_landed) == (1, 1)
    assert query(conn, "select id from raw.tickets") == [("T-1",)]
    assert query(conn, "select resolved_at is not null from quarantine.row") == [(True,)]


def test_corrected_row_is_resolved_and_broken_again_reopened(conn: Connection, contract: Contract) -> None:
    write(contract, "a.csv", plain(1), plain(2, count="x"))
    land(conn, contract, "run-1")
    write(contract, "a.csv", plain(1), plain(2, count="1"))
    land(conn, contract, "run-2")
    assert query(conn, "select resolved_at is not null from quarantine.row") == [(True,)]
    write(contract, "a.csv", plain(1), plain(2, count="x"))
    report = land(conn, contract, "run-3")
    assert report.rows_refused == 1
    assert query(conn, "select resolved_at is null, last_seen > first_seen from quarantine.row") == [
        (True, True)
    ]


def test_bad_file_does_not_stop_the_others(conn: Connection, contract: Contract) -> None:
    write(contract, "a.csv", plain(1))
    # The damage lies behind rows that were good, more than one block of them.
    (contract.folder / "b.csv").write_bytes(
        HEADER.encode() + b"".join(plain(n).encode() for n in range(2, 60_000)) + b"\xff\n"
    )
    (contract.folder / "c.csv").mkdir()
    report = land(conn, contract, "run-1")
    assert (report.rows_in, report.rows_landed, report.files_refused) == (1, 1, 2)
    assert query(conn, "select id from raw.tickets") == [("T-1",)]
    assert query(conn, "select file, rule, sha256 is null, size from quarantine.file order by 1") == [
        ("b.csv", "wrong_encoding", False, (contract.folder / "b.csv").stat().st_size),
        ("c.csv", "unreadable_file", True, None),
    ]
    write(contract, "b.csv", plain(2))
    (contract.folder / "c.csv").rmdir()
    assert land(conn, contract, "run-2").files_refused == 0
    assert query(conn, "select count(*) from quarantine.file where resolved_at is null") == [(0,)]


def test_source_of_bad_files_only_keeps_what_was_landed(conn: Connection, contract: Contract) -> None:
    path = write(contract, "a.csv", plain(1))
    land(conn, contract, "run-1")
    good = path.read_text()
    before = (
        query(conn, "select *, xmin::text from raw.tickets"),
        query(conn, "select * from registry.source_file"),
    )
    path.write_text("nonsense\n")
    for run in ("run-2", "run-3"):
        with pytest.raises(SourceRefused, match="unknown_column") as caught:
            land(conn, contract, run)
        assert [problem.file for problem in caught.value.problems] == ["a.csv"]
    assert before == (
        query(conn, "select *, xmin::text from raw.tickets"),
        query(conn, "select * from registry.source_file"),
    )
    assert query(conn, "select rule, run_id, resolved_at is null from quarantine.file") == [
        ("unknown_column", "run-3", True)
    ]
    path.write_text(good)
    land(conn, contract, "run-4")
    assert query(conn, "select count(*) from quarantine.file where resolved_at is null") == [(0,)]
    assert land(conn, contract, "run-5").unchanged


def test_missing_folder_and_no_file_refuse_the_source(conn: Connection, contract: Contract) -> None:
    with pytest.raises(SourceRefused, match="no_file"):
        land(conn, contract, "run-1")
    contract.folder.rmdir()
    with pytest.raises(SourceRefused, match="missing_folder"):
        land(conn, contract, "run-2")
    assert query(conn, "select file, rule, resolved_at is null from quarantine.file order by id") == [
        ("*.csv", "no_file", False),
        ("*.csv", "missing_folder", True),
    ]


def test_contract_change_reads_again_and_rescues_rows(conn: Connection, contract: Contract) -> None:
    write(contract, "a.csv", plain(1), plain(2, count="99"))
    assert land(conn, contract, None).rows_landed == 1
    columns = tuple(replace(column, maximum=None) for column in COLUMNS)
    wider = replace(contract, columns=columns, sha256="2" * 64, version="1.1.0")
    report = land(conn, wider, None)
    assert (report.unchanged, report.rows_landed, report.rows_refused) == (False, 2, 0)
    assert query(conn, "select count(*) from quarantine.row where resolved_at is null") == [(0,)]


def test_new_column_keeps_views_and_changed_column_drops_only_those_that_use_it(
    conn: Connection, contract: Contract
) -> None:
    path = contract.folder / "a.csv"
    path.write_text("id,opened,count\nT-1,2026-01-01T00:00:00Z,3\n")
    few = replace(contract, columns=tuple(c for c in COLUMNS if c.name in ("id", "opened", "count")))
    land(conn, few, None)
    with conn.transaction():
        conn.execute("create view staging.ids as select id from raw.tickets")
        conn.execute("create view staging.counts as select count from raw.tickets")
    first = query(conn, "select _content_hash, xmin::text from raw.tickets")
    more = replace(few, columns=(*few.columns, Column("note", "string")), sha256="2" * 64)
    land(conn, more, None)
    assert query(conn, "select _content_hash, xmin::text from raw.tickets") == first
    assert query(conn, "select c.count, note from raw.tickets, staging.counts c") == [(3, None)]

    changed = tuple(Column("count", "string") if c.name == "count" else c for c in few.columns)
    land(conn, replace(few, columns=changed, sha256="3" * 64), None)
    assert query(conn, "select id, count, (select id from staging.ids) from raw.tickets") == [
        ("T-1", "3", "T-1")
    ]
    assert query(conn, "select to_regclass('staging.counts') is null") == [(True,)]
    with conn.transaction():
        conn.execute("drop view staging.ids")


def test_formats_land_the_same_rows_with_the_same_hash(
    conn: Connection, contract: Contract, tmp_path: Path
) -> None:
    columns = tuple(c for c in COLUMNS if c.name in ("id", "opened", "count", "paid", "tags"))
    row = {"id": "T-1", "opened": "2026-01-31T10:00:00Z", "count": 3, "paid": True, "tags": ["é", 1]}
    hashes = set()
    for form in ("csv", "csv.gz", "jsonl", "parquet"):
        path = contract.folder / f"a.{form}"
        if form == "csv":
            with path.open("w", newline="") as stream:
                writer = csv.writer(stream)
                writer.writerow(row)
                writer.writerow([*list(row.values())[:-1], json.dumps(row["tags"])])
        elif form == "csv.gz":
            path.write_bytes(gzip.compress((contract.folder / "a.csv").read_bytes()))
        elif form == "jsonl":
            path.write_text(json.dumps(row))
        else:
            opened = pa.array([1769853600_000_000_000], pa.timestamp("ns"))
            table = pa.table(
                {
                    "id": ["T-1"],
                    "opened": opened,
                    "count": [3],
                    "paid": [True],
                    "tags": [json.dumps(row["tags"])],
                }
            )
            pq.write_table(table, path)
        kind: Any = form.removesuffix(".gz")
        one = replace(contract, columns=columns, format=kind, glob=f"a.{form}", sha256=f"{form:0>64}")
        report = land(conn, one, None)
        assert (report.rows_landed, report.refused_by_rule) == (1, {})
        hashes.update(query(conn, "select _content_hash from raw.tickets"))
    assert len(hashes) == 1


def test_document_lands_as_bytes_and_only_changed_ones_are_written(
    conn: Connection, contract: Contract
) -> None:
    documents = replace(
        contract, name="handbook", kind="documents", format="documents", glob="**/*", columns=()
    )
    (contract.folder / "sub").mkdir()
    for name, content in {"a.md": b"# A\0", "sub/b.html": b"<p>B", "empty.txt": b""}.items():
        (contract.folder / name).write_bytes(content)
    report = land(conn, documents, "run-1")
    assert (report.rows_in, report.rows_landed, report.files_refused) == (2, 2, 1)
    rows = "select path, size, media_type, content, _source from raw.handbook order by path"
    assert query(conn, rows) == [
        ("a.md", 4, "text/markdown", b"# A\0", "a.md"),
        ("sub/b.html", 4, "text/html", b"<p>B", "sub/b.html"),
    ]
    assert land(conn, documents, "run-2").unchanged

    before = dict(query(conn, "select path, xmin::text from raw.handbook"))
    (contract.folder / "a.md").rename(contract.folder / "c.md")
    land(conn, documents, "run-3")
    after = dict(query(conn, "select path, xmin::text from raw.handbook"))
    assert sorted(after) == ["c.md", "sub/b.html"]
    assert after["sub/b.html"] == before["sub/b.html"]
    assert query(conn, "select file, rows_in, rows_landed from registry.source_file order by 1") == [
        ("c.md", 1, 1),
        ("sub/b.html", 1, 1),
    ]
    (contract.folder / "c.md").write_bytes(b"")
    (contract.folder / "sub" / "b.html").write_bytes(b"")
    with pytest.raises(SourceRefused, match="empty_file"):
        land(conn, documents, "run-4")
    assert len(query(conn, rows)) == 2


def test_report_says_how_far_it_is(conn: Connection, contract: Contract) -> None:
    write(contract, "a.csv", plain(1), plain(2, count="x"))
    write(contract, "b.csv", plain(3))
    seen: list[tuple[str, int, int]] = []
    land(conn, contract, None, progress=lambda *step: seen.append(step))
    assert seen[-1] == ("rows", 3, 0)


LAND = """
import pickle, sys, psycopg
from assets.sources.land import land
contract, url = pickle.loads(bytes.fromhex(sys.argv[1])), sys.argv[2]
def progress(what, done, total):
    if done >= int(sys.argv[3]):
        print("reached", flush=True)
        sys.stdin.read()
with psycopg.connect(url) as conn:
    land(conn, contract, "run-1", progress)
"""


@pytest.mark.parametrize("reached", [1, 30_000])
def test_killed_landing_leaves_nothing_and_the_next_completes_it(
    conn: Connection, contract: Contract, reached: int
) -> None:
    write(contract, "a.csv", plain(1))
    land(conn, contract, "run-0")
    before = state(conn)
    write(contract, "a.csv", *(plain(n, count="x" if n % 100 == 0 else "1") for n in range(40_000)))
    child = subprocess.Popen(
        [sys.executable, "-c", LAND, pickle.dumps(contract).hex(), address(conn), str(reached)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == b"reached\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    child.stdin.close()
    assert state(conn) == before
    report = land(conn, contract, "run-2")
    assert (report.rows_in, report.rows_landed, report.rows_refused) == (40_000, 39_600, 400)
    clean = state(conn)
    assert land(conn, contract, "run-3").unchanged
    assert state(conn) == clean


def test_landings_of_one_source_wait_for_each_other(conn: Connection, contract: Contract) -> None:
    write(contract, "a.csv", *(plain(n) for n in range(5_000)))
    reports = []

    def work() -> None:
        with psycopg.connect(address(conn)) as other:
            reports.append(land(other, contract, "run"))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(report.unchanged for report in reports) == [False, True, True]
    assert query(conn, "select count(*) from raw.tickets") == [(5_000,)]


def test_catalogue_follows_the_contracts(conn: Connection, contract: Contract) -> None:
    other = replace(contract, name="handbook", kind="documents", allowed_uses=(), freshness_days=1.5)
    write_catalogue(conn, [contract, other])
    rows = "select source, owner, pii, allowed_uses, kind, freshness_days, xmin::text from registry.source order by 1"
    first = query(conn, rows)
    assert [row[:4] for row in first] == [
        ("handbook", "support", True, []),
        ("tickets", "support", True, ["rag"]),
    ]
    changed = replace(other, owner="docs", sha256="3" * 64)
    write_catalogue(conn, [contract, changed])
    second = query(conn, rows)
    assert (second[0][1], second[1]) == ("docs", first[1])
    write_catalogue(conn, [contract])
    assert query(conn, rows) == [first[1]]


@pytest.fixture
def tiny_disk(conn: Connection, tmp_path: Path) -> Iterator[Path]:
    """A tablespace on a disk of 4 MB, where a server on this machine and root allow one."""
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("needs root to mount a small disk")
    if conn.info.host not in ("127.0.0.1", "localhost"):
        pytest.skip("needs a server on this machine")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005:
            folder.chmod(folder.stat().st_mode | 0o055)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=0777", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("may not mount")
    try:
        place = disk / "space"
        place.mkdir()
        with psycopg.connect(address(conn, role=None), autocommit=True) as admin:
            [(data,)] = admin.execute("show data_directory").fetchall()
            os.chown(place, Path(data).stat().st_uid, -1)
            admin.execute(f"create tablespace tiny location '{place}'".encode())
            admin.execute("grant create on tablespace tiny to public")
            yield disk
            conn.rollback()
            for (table,) in admin.execute(
                "select tablename from pg_tables where tablespace = 'tiny'"
            ).fetchall():
                admin.execute(f"drop table raw.{table} cascade".encode())
            admin.execute("drop tablespace tiny")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_full_disk_leaves_what_was_landed(conn: Connection, contract: Contract, tiny_disk: Path) -> None:
    with conn.transaction():
        conn.execute("set default_tablespace = tiny")
    write(contract, "a.csv", plain(1))
    land(conn, contract, "run-1")
    before = state(conn)
    write(contract, "a.csv", *(plain(n) for n in range(60_000)))
    with pytest.raises(psycopg.errors.DiskFull):
        land(conn, contract, "run-2")
    assert state(conn) == before
    subprocess.run(["mount", "-o", "remount,size=64m", tiny_disk], check=True)
    assert land(conn, contract, "run-3").rows_landed == 60_000
