"""The whole loop through the ``moat`` command: complete, repeatable, and only as much work as has changed."""

import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.integration.deployments import Deployment


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A deployment after one clean run."""
    deployment = Deployment(tmp_path_factory.mktemp("clean")).write()
    deployment.send_feedback()
    done = deployment.moat("run")
    assert done.returncode == 0, done.stdout + done.stderr
    yield deployment
    deployment.destroy()


def test_one_run_does_it_all(clean: Deployment) -> None:
    report = clean.report()
    assert report["failed"] == []
    # 7 notes (one in a wrong encoding, refused when parsed) and 21 orders (one key twice).
    assert report["rows"] == {"in": 28, "landed": 27, "refused": 1, "files_refused": 1}
    assert {(r["source"], r["rule"], r["rows"]) for r in report["refusals"]} == {
        ("notes", "wrong_encoding", 1),
        ("orders", "duplicate_key", 1),
    }
    assert report["documents"] == 26
    assert report["chunks"] == report["vectors"] == report["embedded_now"] == 26
    assert report["days_folded"] == ["2026-03-01", "2026-03-02", "2026-03-03"]
    assert {d["dataset"]: d["rows"] for d in report["datasets"]}.keys() == {"sft", "preference", "kto"}
    assert all(d["rows"] > 0 for d in report["datasets"])
    assert {r["entity"] for r in report["redactions"]} == {"EMAIL_ADDRESS", "PHONE_NUMBER"}


def test_without_contracts_and_feedback_everything_is_there_and_empty(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path).write()
    try:
        for contract in deployment.contracts.iterdir():
            contract.unlink()
        done = deployment.moat("run")
        assert done.returncode == 0, done.stdout + done.stderr
        assert {d["dataset"]: d["rows"] for d in deployment.report()["datasets"]} == {
            "sft": 0,
            "preference": 0,
            "kto": 0,
        }
        assert "the index is empty" in deployment.moat("search", "anything").stderr
    finally:
        deployment.destroy()


def test_nothing_personal_reaches_corpus_or_marts(clean: Deployment) -> None:
    state = clean.state()
    for table, rows in state.items():
        if table.split(".")[0] in ("corpus", "marts"):
            assert not [row for row in rows if "@example.com" in row or "23125" in row], table


def test_the_index_answers(clean: Deployment) -> None:
    found = clean.moat("search", "at what pressure does the valve of machine 4 close?", "-k", "1")
    assert found.returncode == 0, found.stderr
    assert "notes/note-4.md" in found.stdout


def test_a_second_run_writes_nothing_and_says_so(clean: Deployment) -> None:
    def written() -> tuple[object, ...]:
        with psycopg.connect(clean.database().url) as connection:
            changes = connection.execute(
                "select schemaname, relname, n_tup_ins, n_tup_upd, n_tup_del from pg_stat_user_tables order by 1, 2"
            ).fetchall()
        lake = sorted((str(path), path.stat().st_mtime_ns) for path in clean.settings.lake.rglob("*"))
        return changes, lake

    before = written()
    again = clean.moat("run")
    assert again.returncode == 0, again.stderr
    assert "nothing changed" in again.stdout
    assert clean.report()["embedded_now"] == 0
    assert written() == before


def test_a_full_run_on_the_same_input_ends_in_the_same_state(clean: Deployment) -> None:
    before = clean.state()
    again = clean.moat("run", "--full")
    assert again.returncode == 0, again.stdout
    assert clean.report()["embedded_now"] == 0
    assert clean.state() == before


def test_ctrl_c_ends_the_run_and_says_how_to_go_on(clean: Deployment) -> None:
    assert clean.run_until("raw/notes", "--full", how=signal.SIGINT) == 130
    assert "run it again to go on" in (clean.folder / "killed.log").read_text()
    again = clean.moat("run", "--full")
    assert again.returncode == 0, again.stdout


def test_killed_anywhere_and_run_again_ends_as_one_clean_run(clean: Deployment, tmp_path: Path) -> None:
    killed = Deployment(tmp_path).write(data=clean.folder)
    try:
        killed.run_until("postgres")
        killed.send_feedback()
        for moment in (
            "raw/notes",
            "documents/notes",
            "vectors/notes",
            "Feedback to datasets",
            "dbt_before_days",
        ):
            killed.run_until(moment)
        done = killed.moat("run")
        assert done.returncode == 0, done.stdout + done.stderr
        assert killed.state() == clean.state()
        lake = {path.relative_to(killed.settings.lake) for path in killed.settings.lake.rglob("*.parquet")}
        assert lake == {p.relative_to(clean.settings.lake) for p in clean.settings.lake.rglob("*.parquet")}
    finally:
        killed.destroy()


def test_only_what_changed_is_done_again(clean: Deployment) -> None:
    def updated() -> dict[str, object]:
        with psycopg.connect(clean.database().url) as connection:
            return dict(connection.execute("select document_id, updated_at from corpus.document").fetchall())

    before = updated()
    (clean.notes / "note-0.md").write_text("# Note 0\n\nMachine 0 has a new valve that closes at 77 bar.\n")
    (clean.notes / "note-1.md").unlink()
    (clean.notes / "note-2.md").rename(clean.notes / "renamed.md")
    done = clean.moat("run")
    assert done.returncode == 0, done.stdout
    report = clean.report()
    assert report["embedded_now"] == 1
    after = updated()
    assert before.keys() - after.keys() == {"notes/note-1.md", "notes/note-2.md"}
    assert after.keys() - before.keys() == {"notes/renamed.md"}
    assert {d for d in before.keys() & after.keys() if before[d] != after[d]} == {"notes/note-0.md"}
    # The old text of note 0 and that of note 1 left the index in the same run.
    assert report["vectors"] == 25
    assert "notes/note-1.md" not in clean.moat("search", "machine 1 closes at 10 bar").stdout


def test_a_bad_source_stops_what_depends_on_it_and_nothing_else(clean: Deployment) -> None:
    good = clean.orders.read_text()
    clean.orders.write_text(
        "order_id,amount,remark\n" + "".join(f"O-{n},free,no price\n" for n in range(30)) + "O-99,1,fine\n"
    )
    (clean.notes / "note-3.md").write_text("# Note 3\n\nThe valve of machine 3 was removed.\n")
    (clean.contracts / "third.odcs.yaml").write_text("kind: DataContract\n")
    stopped = clean.moat("run")
    assert stopped.returncode == 1
    report = clean.report()
    assert set(report["failed"]) == {"raw/orders", "documents/orders", "chunks/orders"} | {
        f"{stage}/orders" for stage in ("embedding_dataset", "vectors", "index")
    }
    assert "third.odcs.yaml" in stopped.stdout
    # The notes went on, and what was indexed of the orders before is still there.
    assert report["embedded_now"] == 1
    assert "orders/O-5" in clean.moat("search", "deliver order 5 to the north gate").stdout

    clean.orders.write_text(good)
    (clean.contracts / "third.odcs.yaml").unlink()
    mended = clean.moat("run")
    assert mended.returncode == 0, mended.stdout
    assert clean.report()["failed"] == []
