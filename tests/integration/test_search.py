"""The index and the search over it: what may be found, how much of it, and by which release."""

from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assets.embeddings import index
from assets.embeddings.index import NotLive, check_live, load_vectors

Connection = psycopg.Connection[Any]

DIMENSIONS = 8


def vector_of(number: int, seed: int) -> np.ndarray[Any, Any]:
    found = np.random.default_rng(1_000 * seed + number).normal(size=DIMENSIONS)
    return (found / np.linalg.norm(found)).astype(np.float32)


@pytest.fixture
def vectors(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Content hash -> number, for a model that is told apart by ``seed``; stands in for a folder of shards."""
    known: dict[str, int] = {}

    def read(folder: Any, hashes: list[str]) -> tuple[list[str], Any]:
        found = [name for name in hashes if name in known]
        rows = [vector_of(known[name], int(str(folder))) for name in found]
        return found, np.array(rows, np.float32).reshape(-1, DIMENSIONS)

    monkeypatch.setattr(index, "read_vectors", read)
    return known


def add(conn: Connection, vectors: dict[str, int], source: str, numbers: range, uses: str = "{rag}") -> None:
    conn.execute(
        "insert into registry.source (source, version, owner, description, provenance, pii, allowed_uses, kind,"
        " location, contract_sha256) values (%s, '1', 'us', '', 'proprietary', false, %s, 'documents', '', '')"
        " on conflict do nothing",
        [source, uses],
    )
    for n in numbers:
        document = f"{source}/{n}"
        conn.execute(
            "insert into corpus.document values (%s, %s, %s, 'title', 'text/plain', '', 'text', '', '', '', '{}')",
            [document, source, str(n)],
        )
        conn.execute(
            "insert into corpus.chunk values (%s, %s, %s, 0, 0, 4, %s, %s, '', '1')",
            [document, document, source, f"valve number{n} closes", f"hash-{source}-{n}"],
        )
        vectors[f"hash-{source}-{n}"] = n


def load(conn: Connection, source: str, release: str, seed: int = 1) -> index.IndexReport:
    return load_vectors(conn, source, release, {"model": release}, DIMENSIONS, seed)  # type: ignore[arg-type]


def search(
    conn: Connection, text: str, number: int, k: int, mode: str = "hybrid", seed: int = 1
) -> list[str]:
    rows = conn.execute(
        "select document_id from retrieval.search(%s, %s::halfvec, %s, %s)",
        [text, str(vector_of(number, seed).tolist()), k, mode],
    )
    return [row[0] for row in rows]


def test_the_best_comes_first_in_every_mode(conn: Connection, vectors: dict[str, int]) -> None:
    add(conn, vectors, "notes", range(50))
    load(conn, "notes", "a")
    for mode in ("hybrid", "vector", "text"):
        assert search(conn, "what about number7?", 7, 3, mode)[0] == "notes/7"
    assert search(conn, "the of and", 7, 1, "text") == []
    assert search(conn, "'); drop table corpus.chunk; -- & | ! <-> :*", 7, 1) == ["notes/7"]


def test_a_source_that_may_not_be_retrieved_is_not_found(conn: Connection, vectors: dict[str, int]) -> None:
    add(conn, vectors, "notes", range(5))
    add(conn, vectors, "secret", range(5, 10), uses="{finetune}")
    load(conn, "notes", "a")
    load(conn, "secret", "a")
    for mode in ("hybrid", "vector", "text"):
        assert not [d for d in search(conn, "number7", 7, 10, mode) if d.startswith("secret")]


def test_as_many_are_found_as_were_asked_for(conn: Connection, vectors: dict[str, int]) -> None:
    add(conn, vectors, "notes", range(400))
    load(conn, "notes", "a")
    assert len(search(conn, "", 1, 150, "vector")) == 150


def test_a_new_release_goes_live_when_it_covers_what_the_old_one_answers(
    conn: Connection, vectors: dict[str, int]
) -> None:
    add(conn, vectors, "notes", range(5))
    add(conn, vectors, "orders", range(5, 10))
    assert load(conn, "notes", "a").live
    assert load(conn, "orders", "a").live
    # A text that only the old release remembers must not hold the new one back.
    conn.execute("delete from corpus.document where document_id = 'notes/0'")
    assert not load(conn, "notes", "b", seed=2).live
    assert search(conn, "", 1, 1, "vector") == ["notes/1"]
    with pytest.raises(NotLive, match="EMBEDDING_MODEL"):
        check_live(conn, "b")
    assert load(conn, "orders", "b", seed=2).live
    check_live(conn, "b")
    assert search(conn, "", 6, 1, "vector", seed=2) == ["orders/6"]


def test_a_text_nobody_has_any_more_leaves_the_index(conn: Connection, vectors: dict[str, int]) -> None:
    add(conn, vectors, "notes", range(5))
    assert load(conn, "notes", "a").vectors == 5
    conn.execute("delete from corpus.document where document_id = 'notes/0'")
    report = load(conn, "notes", "a")
    assert (report.loaded, report.dropped, report.vectors, report.missing) == (0, 1, 4, 0)


def test_a_text_the_embedder_refused_is_counted(conn: Connection, vectors: dict[str, int]) -> None:
    add(conn, vectors, "notes", range(3))
    del vectors["hash-notes-1"]
    report = load(conn, "notes", "a")
    assert (report.wanted, report.loaded, report.missing) == (3, 2, 1)


def test_before_any_load_it_says_what_to_do(conn: Connection) -> None:
    with pytest.raises(NotLive, match="make run"):
        check_live(conn, "a")


def test_the_dataset_names_itself_by_its_content(
    conn: Connection, vectors: dict[str, int], tmp_path: Any
) -> None:
    from assets.embeddings.dataset import current_dataset, export_chunks

    with pytest.raises(FileNotFoundError, match="embedding_dataset/notes"):
        current_dataset("notes", tmp_path)
    add(conn, vectors, "notes", range(3))
    first = export_chunks(conn, "notes", tmp_path)
    assert export_chunks(conn, "notes", tmp_path).path == first.path == current_dataset("notes", tmp_path)
    assert pq.read_table(first.path).schema.names == ["chunk_id", "content_hash", "text"]
    assert pq.read_table(first.path).column("text").type == pa.string()
    conn.execute("delete from corpus.document")
    assert export_chunks(conn, "notes", tmp_path).rows == 0
    assert current_dataset("notes", tmp_path) != first.path
