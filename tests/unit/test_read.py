"""Reading: every row of a file comes out once, in a batch or refused whole, whatever the file holds."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assets.sources import lines
from assets.sources.batch import KEPT_OF_LONG_LINE, Batch, FileRefused
from assets.sources.contract import Column, Contract
from assets.sources.read import (
    MAX_DOCUMENT_BYTES,
    find_files,
    fingerprint,
    list_files,
    read_document,
    read_rows,
)
from assets.sources.rows import check_rows, quarantine_json

COLUMNS = (Column("id", "integer", required=True), Column("name", "string"), Column("note", "string"))


def contract_for(folder: Path, form: str, columns: tuple[Column, ...] = COLUMNS, **changes: Any) -> Contract:
    values: dict[str, Any] = {
        "name": "people",
        "version": "1.0.0",
        "owner": "support",
        "description": "",
        "grain": "One row per person.",
        "provenance": "proprietary",
        "pii": True,
        "allowed_uses": ("rag",),
        "freshness_days": None,
        "kind": "documents" if form == "documents" else "table",
        "format": form,
        "folder": folder,
        "glob": "*",
        "file": folder / "people.odcs.yaml",
        "sha256": "0" * 64,
        "columns": columns,
    }
    return Contract(**values | changes)


def batches(
    tmp_path: Path, content: bytes, form: str = "csv", name: str | None = None, **changes: Any
) -> list[Batch]:
    path = tmp_path / (name or f"people.{form}")
    path.write_bytes(content)
    contract = contract_for(tmp_path, form, **changes)
    return list(read_rows(contract, fingerprint(contract, path.name, path)))


def rows_of(found: list[Batch]) -> list[tuple[int, dict[str, Any]]]:
    return [
        (int(number), {name: column[index].as_py() for name, column in batch.columns.items()})
        for batch in found
        for index, number in enumerate(batch.numbers)
    ]


def refusals_of(found: list[Batch]) -> list[tuple[int, str]]:
    return sorted((row.number, row.rule) for batch in found for row in batch.refused)


def refused_file(tmp_path: Path, content: bytes, form: str = "csv", **changes: Any) -> FileRefused:
    with pytest.raises(FileRefused) as caught:
        batches(tmp_path, content, form, **changes)
    assert caught.value.reason
    assert caught.value.remedy.endswith(".")
    return caught.value


# --- CSV -----------------------------------------------------------------------------------------------


def test_csv_rows_carry_the_line_they_start_on(tmp_path: Path) -> None:
    found = batches(tmp_path, b'id,name,note\n1,Ann,"two\nlines"\r\n\n2,"say ""hi""",\n3,Bob,x')
    assert rows_of(found) == [
        (2, {"id": "1", "name": "Ann", "note": "two\nlines"}),
        (5, {"id": "2", "name": 'say "hi"', "note": None}),
        (6, {"id": "3", "name": "Bob", "note": "x"}),
    ]
    assert refusals_of(found) == []


def test_csv_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    assert rows_of(batches(tmp_path, b"\xef\xbb\xbfid,name,note\n1,a,b\n"))[0][1]["id"] == "1"


def test_csv_column_order_is_free_and_optional_columns_may_be_missing(tmp_path: Path) -> None:
    assert rows_of(batches(tmp_path, b"name,id\nAnn,7\n")) == [(2, {"id": "7", "name": "Ann", "note": None})]


def test_csv_empty_field_is_null_quoted_or_not(tmp_path: Path) -> None:
    assert rows_of(batches(tmp_path, b'id,name,note\n1,,""\n'))[0][1] == {
        "id": "1",
        "name": None,
        "note": None,
    }


def test_csv_delimiter_and_encoding_come_from_the_contract(tmp_path: Path) -> None:
    found = batches(
        tmp_path, "id;name;note\n1;Grüße, Anne;€\n".encode("cp1252"), delimiter=";", encoding="cp1252"
    )
    assert rows_of(found) == [(2, {"id": "1", "name": "Grüße, Anne", "note": "€"})]


def test_csv_row_with_a_wrong_number_of_fields_is_refused_whole(tmp_path: Path) -> None:
    found = batches(tmp_path, b'id,name,note\n1,a,b\n2,a\n3,"x\ny",b,c\n4,a,b\n')
    assert [number for number, _ in rows_of(found)] == [2, 6]
    assert refusals_of(found) == [(3, "wrong_field_count"), (4, "wrong_field_count")]
    assert [row.row for batch in found for row in batch.refused] == [
        {"_raw": "2,a"},
        {"_raw": '3,"x\ny",b,c'},
    ]


def test_csv_quote_inside_an_unquoted_field_is_text(tmp_path: Path) -> None:
    found = batches(tmp_path, b'id,name,note\n1,5" pipe,a\n2,6" pipe,b\n3,c,"d,e"\n')
    assert [row["name"] for _, row in rows_of(found)] == ['5" pipe', '6" pipe', "c"]
    assert rows_of(found)[2][1]["note"] == "d,e"


@pytest.mark.parametrize(
    "line",
    [
        b'2,"not closed,x',
        b'2,"a"b,x',
        b'2,"a "b" c",x',
        b"2,a\rb,x",
    ],
)
def test_csv_stray_quote_or_carriage_return_costs_one_line_only(tmp_path: Path, line: bytes) -> None:
    found = batches(tmp_path, b"id,name,note\n1,a,b\n" + line + b'\n3,"c, d",e\n4,f,g\n')
    assert [number for number, _ in rows_of(found)] == [2, 4, 5]
    assert refusals_of(found) == [(3, "malformed_row")]
    assert found[-1].refused[0].row == {"_raw": line.decode()}


def test_csv_quote_left_open_to_the_end_costs_one_line_only(tmp_path: Path) -> None:
    found = batches(tmp_path, b'id,name,note\n1,"a,b\n2,c,d\n3,e,f')
    assert [number for number, _ in rows_of(found)] == [3, 4]
    assert refusals_of(found) == [(2, "malformed_row")]


def test_csv_nul_character_refuses_the_row(tmp_path: Path) -> None:
    found = batches(tmp_path, b'id,name,note\n1,a,b\n2,"c\n\x00",d\n\x00\n3,e,f\n')
    assert [number for number, _ in rows_of(found)] == [2, 6]
    assert refusals_of(found) == [(3, "nul_character"), (5, "nul_character")]


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"id,name,note,extra\n1,a,b,c\n", "unknown_column"),
        (b"1,a,b\n2,c,d\n", "unknown_column"),
        (b"name,note\na,b\n", "missing_column"),
        (b"id,name,name\n1,a,b\n", "duplicate_column"),
        (b"id,na\xe9me,note\n", "wrong_encoding"),
        ("id,name,note\n1,a,b\n".encode("utf-16"), "wrong_encoding"),
        ("id,name,note\n1,a,b\n".encode("utf-16-le"), "wrong_encoding"),
        (b"id,name,note\r1,a,b\r2,a,b\r", "broken_file"),
        (b'id,"name,note\n1,a,b\n', "broken_file"),
        (b"\n \n"[:1], "empty_file"),
        (b"", "empty_file"),
        (b"\xef\xbb\xbf", "empty_file"),
    ],
)
def test_csv_file_is_refused(tmp_path: Path, content: bytes, rule: str) -> None:
    assert refused_file(tmp_path, content).rule == rule


def test_header_alone_is_a_file_without_rows(tmp_path: Path) -> None:
    found = batches(tmp_path, b"id,name,note")
    assert (rows_of(found), refusals_of(found)) == ([], [])


def test_wrong_encoding_names_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 16)
    content = "id,name,note\n1,é,b\n2,Käse,b\n".encode()
    broken = content.replace("ä".encode(), b"\xe4")
    problem = refused_file(tmp_path, broken)
    assert f"offset {broken.index(bytes([0xE4]))} " in problem.reason
    problem = refused_file(tmp_path, content + "é".encode()[:1])
    assert f"offset {len(content)} " in problem.reason


CELL = st.text(alphabet='ab,"\n\r é', max_size=6)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(CELL, CELL, CELL), max_size=12), block=st.integers(7, 64), crlf=st.booleans())
def test_csv_reads_what_the_standard_library_writes(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]], block: int, crlf: bool
) -> None:
    """However the file is cut into blocks, and though quoted fields hold every special character."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n" if crlf else "\n", quoting=csv.QUOTE_ALL)
    writer.writerow(["id", "name", "note"])
    writer.writerows(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK_BYTES", block)
        found = batches(tmp_path_factory.mktemp("csv"), text.getvalue().encode())
    assert refusals_of(found) == []
    assert [tuple(row.values()) for _, row in rows_of(found)] == [
        tuple(cell or None for cell in row) for row in rows
    ]


@settings(max_examples=300, deadline=None)
@given(body=st.text(alphabet='a,"\n\r\0é', max_size=60), block=st.integers(5, 40))
def test_csv_loses_no_character_of_any_file(
    tmp_path_factory: pytest.TempPathFactory, body: str, block: int
) -> None:
    """Each line lies in exactly one row or refused row, in whatever way quotes are wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK_BYTES", block)
        found = batches(tmp_path_factory.mktemp("csv"), b"id,name,note\n" + body.encode())
    text_lines = f"id,name,note\n{body}".split("\n")
    refused = {row.number: str(row.row["_raw"]) for batch in found for row in batch.refused}
    landed = dict(rows_of(found))
    starts = sorted([*refused, *landed])
    assert len(starts) == len(set(starts)) == len(refused) + len(landed)
    assert not "".join(text_lines[1 : starts[0] - 1 if starts else None]).strip("\r")
    for start, following in zip(starts, [*starts[1:], len(text_lines) + 1], strict=False):
        span = "\n".join(text_lines[start - 1 : following - 1])
        if start in refused:
            assert refused[start].rstrip("\r\n") == span.rstrip("\r\n")
        else:
            parsed = next(csv.reader(io.StringIO(span, newline="")))
            assert list(landed[start].values()) == [value or None for value in parsed]


# --- JSON Lines ----------------------------------------------------------------------------------------


def test_jsonl_rows_are_typed_and_carry_their_line(tmp_path: Path) -> None:
    found = batches(tmp_path, b'{"id": 1, "name": "A", "note": null}\n\n{"id": 2.0, "name": ""}\n', "jsonl")
    assert rows_of(found) == [
        (1, {"id": 1, "name": "A", "note": None}),
        (3, {"id": 2, "name": "", "note": None}),
    ]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (b'{"id": 1', "bad_json"),
        (b'{"id": NaN}', "bad_json"),
        (b'{"id": 1} {"id": 2}', "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b'{"id": 1, "name": ' + b"[" * 900 + b"]" * 900 + b"}", "bad_json"),
        (b"[1]", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b"null", "not_an_object"),
        (b'{"id": 1, "id": 2}', "duplicate_json_key"),
        (b'{"id": 1, "name": "a:\\":", "\\u0069d": 2}', "duplicate_json_key"),
        (b'{"id": 1, "name": "a\\u0000"}', "nul_character"),
        (b'{"id": 1, "name": "a\x00"}', "nul_character"),
        (b'{"id": 1, "name": "\\ud800"}', "lone_surrogate"),
        (b'{"id": 1, "name": "\\udc00x"}', "lone_surrogate"),
        (b'{"id": 1, "nick": "a"}', "unknown_column"),
        (b'{"id": "1"}', "wrong_type"),
        (b'{"id": true}', "wrong_type"),
        (b'{"id": 1.5}', "wrong_type"),
        (b'{"id": 9223372036854775808}', "wrong_type"),
        (b'{"id": 1, "name": 5}', "wrong_type"),
        (b'{"id": 1, "name": {"a": 1}}', "wrong_type"),
    ],
)
def test_jsonl_row_is_refused_whole_and_costs_no_other(tmp_path: Path, line: bytes, rule: str) -> None:
    found = batches(tmp_path, b'{"id": 1}\n' + line + b'\n{"id": 3}\n', "jsonl")
    assert [number for number, _ in rows_of(found)] == [1, 3]
    assert refusals_of(found) == [(2, rule)]
    [row] = found[0].refused
    kept = json.loads(quarantine_json(row.row))
    if "_raw" in kept and "_base64" not in kept:
        assert kept == {"_raw": line.decode()}
    assert row.remedy.endswith(".")


def test_jsonl_keys_are_counted_where_text_looks_like_keys(tmp_path: Path) -> None:
    rows = [{"id": 1, "name": '"id": 2', "note": 'a":b'}, {"id": 2, "name": '\\"id":'}]
    found = batches(tmp_path, b"\n".join(map(orjson.dumps, rows)), "jsonl")
    assert [row["name"] for _, row in rows_of(found)] == [row["name"] for row in rows]


def test_jsonl_literal_backslash_u0000_is_text(tmp_path: Path) -> None:
    found = batches(tmp_path, b'{"id": 1, "name": "a\\\\u0000"}\n', "jsonl")
    assert rows_of(found)[0][1]["name"] == "a\\u0000"


def test_jsonl_nested_values_are_canonical_json(tmp_path: Path) -> None:
    columns = (Column("o", "object"), Column("a", "array"), Column("n", "number"))
    found = batches(
        tmp_path,
        b'{"o": {"b": 1, "a": [1.0]}, "a": [ 1, 2 ], "n": 9007199254740993}\n',
        "jsonl",
        columns=columns,
    )
    assert found[0].columns["o"].storage.to_pylist() == ['{"a":[1.0],"b":1}']
    assert found[0].columns["a"].storage.to_pylist() == ["[1,2]"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \r\n"])
def test_jsonl_without_rows_is_an_empty_file(tmp_path: Path, content: bytes) -> None:
    assert refused_file(tmp_path, content, "jsonl").rule == "empty_file"


# --- Parquet -------------------------------------------------------------------------------------------


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


GOOD = pa.table({"id": pa.array([1, 2], pa.int32()), "name": ["a", None], "note": ["x", "y"]})


def test_parquet_rows_count_from_one(tmp_path: Path) -> None:
    found = batches(tmp_path, parquet(GOOD), "parquet")
    assert rows_of(found) == [
        (1, {"id": 1, "name": "a", "note": "x"}),
        (2, {"id": 2, "name": None, "note": "y"}),
    ]


@pytest.mark.parametrize("cut", [3, 200, -9, -4, -1])
def test_half_written_parquet_is_broken(tmp_path: Path, cut: int) -> None:
    assert refused_file(tmp_path, parquet(GOOD)[:cut], "parquet").rule == "broken_file"


def test_parquet_damaged_in_the_middle_is_broken(tmp_path: Path) -> None:
    content = bytearray(parquet(pa.table({"id": pa.array(range(50_000))}), compression="zstd"))
    content[2_000:60_000] = bytes(58_000)
    assert refused_file(tmp_path, bytes(content), "parquet").rule == "broken_file"


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        (pa.table({"id": [1.5], "name": ["a"]}), "changed_type"),
        (pa.table({"id": [1], "name": [5]}), "changed_type"),
        (pa.table({"id": [1], "name": [["a"]]}), "changed_type"),
        (pa.table({"name": ["a"]}), "missing_column"),
        (pa.table({"id": [1], "nick": ["a"]}), "unknown_column"),
    ],
)
def test_parquet_schema_other_than_promised_is_refused(tmp_path: Path, changed: pa.Table, rule: str) -> None:
    assert refused_file(tmp_path, parquet(changed), "parquet").rule == rule


def test_parquet_rows_that_postgres_cannot_store_are_refused(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2, 3], "name": ["a", "b\0", "c"]})
    found = batches(tmp_path, parquet(table), "parquet")
    assert [number for number, _ in rows_of(found)] == [1, 3]
    assert refusals_of(found) == [(2, "nul_character")]
    assert found[0].original(1)["id"] == 3


def test_parquet_text_that_is_not_utf8_refuses_the_file(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    content = parquet(pa.table({"id": [1], "name": bad}))
    assert refused_file(tmp_path, content, "parquet").rule == "wrong_encoding"


# --- Files ---------------------------------------------------------------------------------------------


def test_gzip_is_read_as_its_contents(tmp_path: Path) -> None:
    found = batches(tmp_path, gzip.compress(b"id,name,note\n1,a,b\n"), name="people.csv.gz")
    assert rows_of(found) == [(2, {"id": "1", "name": "a", "note": "b"})]


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (lambda content: content[:-9], "broken_file"),
        (lambda content: content[: len(content) // 2], "broken_file"),
        (lambda content: content[:12] + b"\xff\xff\xff\xff" + content[16:], "broken_file"),
        (lambda content: content[:-8] + bytes(8), "broken_file"),
        (lambda content: b"id,name,note\n1,a,b\n", "unreadable_file"),
    ],
)
def test_damaged_gzip_is_refused(tmp_path: Path, damage: Any, rule: str) -> None:
    content = gzip.compress(b"id,name,note\n" + b"1,a,b\n" * 1000)
    assert refused_file(tmp_path, damage(content), name="people.csv.gz").rule == rule


def test_directory_with_a_file_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(FileRefused, match=r"unreadable_file.*a directory"):
        fingerprint(contract_for(tmp_path, "csv"), "x.csv", tmp_path / "x.csv")


def test_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.csv")
    with pytest.raises(FileRefused, match="unreadable_file"):
        fingerprint(contract_for(tmp_path, "csv"), "x.csv", tmp_path / "x.csv")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("id\n1\n")
    path.chmod(0)
    with pytest.raises(FileRefused, match="unreadable_file"):
        fingerprint(contract_for(tmp_path, "csv"), "x.csv", path)


def test_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.csv")
    with pytest.raises(FileRefused, match="bad_file_name") as caught:
        fingerprint(contract_for(tmp_path, "csv"), name, tmp_path / name)
    assert caught.value.file == r"caf\xe9.csv"


def test_file_that_changes_while_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("id,name,note\n1,a,b\n")
    contract = contract_for(tmp_path, "csv")
    file = fingerprint(contract, "x.csv", path)
    with pytest.raises(FileRefused, match="file_changed"):
        for _ in read_rows(contract, file):
            path.write_text("id,name,note\n1,a,c\n")


def test_file_that_grows_while_read_is_not_read_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 20)
    path = tmp_path / "x.csv"
    path.write_text("id,name,note\n1,a,b\n")
    contract = contract_for(tmp_path, "csv")
    file = fingerprint(contract, "x.csv", path)
    with pytest.raises(FileRefused, match="file_changed"):
        for _ in read_rows(contract, file):
            with path.open("a") as stream:
                stream.write("2,a,b\n" * 10)


def test_files_are_found_below_the_folder_hidden_ones_apart(tmp_path: Path) -> None:
    for name in ("b/2.csv", "a.csv", ".tmp.csv", ".git/c.csv", "d.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    contract = contract_for(tmp_path, "csv", glob="**/*.csv")
    assert [name for name, _ in find_files(contract)] == ["a.csv", "b/2.csv"]
    assert list_files(contract) == [tmp_path / "a.csv", tmp_path / "b" / "2.csv"]


@pytest.mark.parametrize(("folder", "rule"), [("absent", "missing_folder"), ("", "no_file")])
def test_source_without_files_is_refused(tmp_path: Path, folder: str, rule: str) -> None:
    contract = contract_for(tmp_path / folder, "csv", glob="*.csv")
    assert list_files(contract) == []
    with pytest.raises(FileRefused) as caught:
        find_files(contract)
    assert caught.value.rule == rule


def test_document_is_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "Guide.MD").write_bytes(b"# Guide\xff")
    contract = contract_for(tmp_path, "documents", (), glob="**/*")
    [(name, path)] = find_files(contract)
    file = fingerprint(contract, name, path)
    assert (file.name, file.media_type, file.size) == ("sub/Guide.MD", "text/markdown", 8)
    assert read_document(file) == b"# Guide\xff"
    path.write_bytes(b"# Other\xff")
    with pytest.raises(FileRefused, match="file_changed"):
        read_document(file)


def test_document_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "big.pdf"
    with path.open("wb") as stream:
        stream.truncate(MAX_DOCUMENT_BYTES + 1)
    with pytest.raises(FileRefused, match="too_large"):
        fingerprint(contract_for(tmp_path, "documents", ()), "big.pdf", path)


# --- Bounded memory ------------------------------------------------------------------------------------

READ_ALL = """
import resource, sys
from pathlib import Path
from tests.unit.test_read import contract_for
from assets.sources.read import fingerprint, read_rows
path = Path(sys.argv[1])
contract = contract_for(path.parent, sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = bad = 0
for batch in read_rows(contract, fingerprint(contract, path.name, path)):
    rows += len(batch.numbers)
    for row in batch.refused:
        bad += 1
        print(row.number, row.rule, len(row.row["_raw"]))
unit = 1 if sys.platform == "darwin" else 1024
print(rows, bad, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit // 2**20)
"""


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_line_of_100_mb_is_refused_alone_in_bounded_memory(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"x.{form}"
    row, head = (b"1,a,b\n", b"id,name,note\n") if form == "csv" else (b'{"id": 1}\n', b'{"id": 1}\n')
    with path.open("wb") as stream:
        stream.write(head + row)
        stream.write(b'"' if form == "csv" else b'{"id": 1, "name": "')
        for _ in range(100):
            stream.write(b"x" * 1_000_000)
        stream.write(b"\n" + row)
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(path), form],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    refused, summary = done.stdout.splitlines()
    assert refused == f"3 line_too_long {KEPT_OF_LONG_LINE}"
    rows, bad, megabytes = map(int, summary.split())
    assert (rows, bad) == (2 if form == "csv" else 3, 1)
    assert megabytes < 80


def test_every_row_of_every_format_is_accounted_for(tmp_path: Path) -> None:
    """rows in = rows out + refused, through the contract's checks too."""
    content = b"id,name,note\n" + b"".join(
        b"%d,%s,x\n" % (n, b"a,b" if n % 7 == 0 else b"ok") if n % 5 else b"n%d,a,x\n" % n
        for n in range(1, 1001)
    )
    found = batches(tmp_path, content)
    contract = contract_for(tmp_path, "csv")
    checked = [check_rows(contract, batch) for batch in found]
    assert sum(len(part.rows) + len(part.refused) for part in checked) == 1000
    assert {row.rule for part in checked for row in part.refused} == {"wrong_field_count", "wrong_type"}


def test_csv_is_not_quadratic_in_stray_quotes(tmp_path: Path) -> None:
    content = b"id,name,note\n" + b'1,"a,b\n2,c,d\n' * 30_000
    started = time.process_time()
    found = batches(tmp_path, content)
    assert len(rows_of(found)) + len(refusals_of(found)) >= 30_000
    assert time.process_time() - started < 20
