"""Releases: which one is fed and which is live, what a candidate must pass, promotion and rollback."""

import io
import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psycopg
import pytest

from assets.documents.chunk import Chunking
from assets.embeddings import registry
from assets.embeddings.checks import check_candidate, recent_questions
from assets.embeddings.registry import (
    NotLive,
    ReleaseError,
    candidate_release,
    chain_release,
    drop,
    find_release,
    live_release,
    promote,
    releases,
    retired_longer_than,
    rollback,
)
from assets.embeddings.release import Release, Setting
from assets.evaluation.compare import Difference
from assets.sources.contract import load_contracts
from embedder.protocol import EmbedderError
from orchestration import releases as commands
from orchestration.screen import Screen
from orchestration.settings import ROOT, Settings
from storage.database import Database
from storage.warehouse import Warehouse
from tests.integration.releases import DIMENSIONS, add, load, release, vector_of, write_shard

Connection = psycopg.Connection[Any]

TEXTS = [f"text {number}" for number in range(150)]
WIDE = Path("/models/wide")
A, B = release("a"), replace(release("b", 16), model=WIDE)


def measured(value: float | None, high: float | None) -> Difference:
    """One figure of a comparison on a golden set."""
    return Difference("golden", "vector", "nDCG@10", value, -0.5, high, 100)


def same(*_: Any) -> list[Difference]:
    return [measured(0.01, 0.02), measured(None, None)]


def embed(model: Path | None, questions: Sequence[str]) -> Any:
    wide = model is not None
    return np.array(
        [vector_of(text, 2 if wide else 1, 16 if wide else DIMENSIONS) for text in questions], np.float32
    )


@pytest.fixture
def folder(conn: Connection, tmp_path: Path) -> Path:
    """A corpus with A live and B, of other dimensions, built beside it."""
    add(conn, "notes", TEXTS)
    write_shard(tmp_path / "a", TEXTS)
    write_shard(tmp_path / "b", TEXTS, seed=2, dimensions=16)
    assert load(conn, "notes", A, tmp_path / "a").live
    assert not load(conn, "notes", B, tmp_path / "b", follow=False).live
    return tmp_path


def check(conn: Connection, name: str = "b", compare: Any = same) -> set[str]:
    """The checks that did not pass."""
    outcomes = check_candidate(conn, name, compare, TEXTS[:5], embed)
    return {check for check, outcome in outcomes.items() if not outcome.passed}


def nearest(conn: Connection, vector: Any) -> str:
    rows = conn.execute(
        "select content_hash from retrieval.live order by embedding <=> %s::halfvec limit 1",
        [str(vector.tolist())],
    )
    (found,) = rows.fetchall()
    return str(found[0])


def test_before_anything_is_live_it_says_what_to_do(conn: Connection) -> None:
    with pytest.raises(NotLive, match="make run"):
        live_release(conn)
    assert releases(conn) == []
    with pytest.raises(NotLive):
        rollback(conn, "me", "to nowhere")


def test_a_candidate_is_promoted_once_it_passed_and_rolled_back(conn: Connection, folder: Path) -> None:
    with pytest.raises(ReleaseError, match="not been run since its newest load"):
        promote(conn, "b", "me", "better")
    assert check(conn) == {"shadow"}  # two random models find different things, which forbids nothing
    promote(conn, "b", "me", "better")
    live = live_release(conn)
    assert (live.name, live.model_folder, live.dimensions) == ("b", WIDE, 16)
    assert nearest(conn, vector_of("text 3", 2, 16)) == "text 3"
    with pytest.raises(ReleaseError, match="live already"):
        promote(conn, "b", "me", "again")
    assert rollback(conn, "you", "worse after all") == "a"
    assert nearest(conn, vector_of("text 3")) == "text 3"
    assert {one.name: one.state for one in releases(conn)} == {"a": "live", "b": "retired"}
    with pytest.raises(ReleaseError, match="no release was live before a"):
        rollback(conn, "me", "further")
    rows = conn.execute(
        "select action, release, previous, who, why, forced, checks ? 'retrieval' from registry.promotion order by id"
    ).fetchall()
    assert rows == [
        ("promote", "a", None, "datamoat", "the first release", False, False),
        ("promote", "b", "a", "me", "better", False, True),
        ("rollback", "a", "b", "you", "worse after all", False, False),
    ]


def test_checks_that_object_forbid_a_promotion_unless_it_is_forced(conn: Connection, folder: Path) -> None:
    assert "retrieval" in check(conn, compare=lambda *_: [measured(-0.1, -0.01)])
    with pytest.raises(ReleaseError, match="retrieval did not pass"):
        promote(conn, "b", "me", "hope")
    with pytest.raises(ReleaseError, match="who moves the index and why"):
        promote(conn, "b", "me", "  ", force=True)
    assert live_release(conn).name == "a"
    promote(conn, "b", "me", "the golden set is wrong", force=True)
    assert conn.execute("select forced from registry.promotion order by id desc limit 1").fetchone() == (
        True,
    )
    with pytest.raises(ReleaseError, match="no release c: take one of a, b"):
        promote(conn, "c", "me", "a slip")


def test_what_changed_since_the_checks_forbids_a_promotion(conn: Connection, folder: Path) -> None:
    check(conn)
    add(conn, "notes", ["new"])
    write_shard(folder / "a", ["new"])
    load(conn, "notes", A, folder / "a")
    with pytest.raises(ReleaseError, match="1 texts have no vector"):
        promote(conn, "b", "me", "better")
    assert "coverage" in check(conn)
    write_shard(folder / "b", ["new"], seed=2, dimensions=16)
    load(conn, "notes", B, folder / "b", follow=False)
    with pytest.raises(ReleaseError, match="not been run since"):
        promote(conn, "b", "me", "better")
    assert check(conn) == {"shadow"}
    promote(conn, "b", "me", "better")
    # The release to go back to has not seen what came after.
    add(conn, "notes", ["newer"])
    assert find_release(conn, rollback(conn, "me", "slow")).missing == 0


def test_a_text_that_nobody_could_embed_does_not_hold_a_candidate_back(
    conn: Connection, folder: Path
) -> None:
    add(conn, "notes", ["poison"])
    add(conn, "secret", ["not to be retrieved"], uses="{finetune}")
    load(conn, "notes", B, folder / "b", follow=False)
    assert find_release(conn, "b").missing == 1
    for name in "ab":
        conn.execute("insert into retrieval.embedding_failure values ('poison', %s, 'odd', 1, now())", [name])
    assert find_release(conn, "b").missing == 0
    # That the live release has it is another matter.
    write_shard(folder / "a", ["poison"])
    load(conn, "notes", A, folder / "a")
    assert find_release(conn, "b").missing == 1


def test_vectors_that_say_nothing_do_not_pass(conn: Connection, folder: Path) -> None:
    conn.execute(
        "update retrieval.release_b set embedding = (select embedding from retrieval.release_b limit 1)"
    )
    assert "neighbours" in check(conn)
    conn.execute(
        "update retrieval.release_b set embedding = l2_normalize(embedding)::halfvec * '[2"
        + ",2" * 15
        + "]'::halfvec where passage_no < 3"
    )
    assert "vectors_are_sound" in check(conn)
    conn.execute(
        "update registry.embedding_release set fingerprint = '{\"normalize\": false}' where release = 'b'"
    )
    assert "vectors_are_sound" not in check(conn)


def test_two_models_alike_pass_the_shadow(conn: Connection, folder: Path) -> None:
    c = release("c")
    load(conn, "notes", c, folder / "a", follow=False)
    outcomes = check_candidate(conn, "c", same, TEXTS[:5], embed)
    assert outcomes["shadow"].figures == {
        "questions": 5,
        "overlap_at_10": 1.0,
        "rank_correlation": pytest.approx(1),
    }
    assert outcomes["neighbours"].figures["recall_at_10"] == 1


def test_the_questions_are_those_asked_last_then_golden_ones(conn: Connection) -> None:
    golden: Any = SimpleNamespace(
        name="golden", golden=SimpleNamespace(question="question", question_source=None)
    )
    assert recent_questions(conn, [golden]) == []
    conn.execute("create table raw.golden (question text)")
    conn.execute("insert into raw.golden values ('how?'), ('how?'), (' '), ('why?')")
    assert recent_questions(conn, [golden]) == ["how?", "why?"]
    asked = [
        {"role": "user", "content": "first?"},
        {"role": "user", "content": "then?"},
        {"role": "assistant"},
    ]
    conn.execute(
        "insert into feedback.interaction (interaction_id, app, messages, occurred_at, api_key_id, body_sha256)"
        " values ('i', 'app', %s, now(), gen_random_uuid(), '')",
        [json.dumps(asked)],
    )
    assert recent_questions(conn, [golden]) == ["then?", "how?", "why?"]


def test_releases_retired_long_ago_are_dropped_and_the_live_one_is_not(
    conn: Connection, folder: Path
) -> None:
    check(conn)
    promote(conn, "b", "me", "better")
    assert retired_longer_than(conn, 1) == []
    conn.execute(
        "update registry.embedding_release set retired_at = now() - interval '2 days' where release = 'a'"
    )
    assert retired_longer_than(conn, 1) == ["a"]
    with pytest.raises(ReleaseError, match="live"):
        drop(conn, "b")
    drop(conn, "a")
    assert [one.name for one in releases(conn)] == ["b"]
    with pytest.raises(ReleaseError, match="a, which was live before b, was dropped"):
        rollback(conn, "me", "too late")


def test_readers_go_on_while_releases_of_other_dimensions_change_places(
    database: Database, tmp_path: Path
) -> None:
    with database.connect("datamoat_writer") as conn:
        add(conn, "notes", TEXTS)
        write_shard(tmp_path / "a", TEXTS)
        write_shard(tmp_path / "b", TEXTS, seed=2, dimensions=16)
        load(conn, "notes", A, tmp_path / "a")
        load(conn, "notes", B, tmp_path / "b", follow=False)
        check(conn)
    stop = threading.Event()
    reads: list[int] = []
    errors: list[Exception] = []

    def read() -> None:
        with database.connect("datamoat_writer", autocommit=True) as mine:
            while not stop.is_set():
                try:
                    found = mine.execute(
                        "select count(content_hash) from retrieval.live", prepare=True
                    ).fetchone()
                    reads.append(found[0] if found else 0)
                except Exception as error:
                    errors.append(error)
                    return

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    with database.connect("datamoat_writer", autocommit=True) as conn:
        for _ in range(8):
            begun = conn.execute("select pg_current_wal_insert_lsn()").fetchone()
            promote(conn, "b", "me", "forth")
            # Readers do not wait for the disk, but who promotes does.
            assert conn.execute("select pg_current_wal_flush_lsn() > %s", begun).fetchone() == (True,)
            rollback(conn, "me", "back")
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors and set(reads) == {len(TEXTS)}


def test_a_reader_who_does_not_let_go_is_named_and_nobody_waits_behind(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "LOCK_ATTEMPTS", 2)
    monkeypatch.setattr(registry, "LOCK_PAUSE_SECONDS", 0)
    with database.connect("datamoat_writer") as conn:
        add(conn, "notes", TEXTS)
        write_shard(tmp_path / "a", TEXTS)
        load(conn, "notes", A, tmp_path / "a")
        load(conn, "notes", release("c"), tmp_path / "a", follow=False)
    with (
        database.connect("datamoat_writer", application_name="a long report") as reader,
        database.connect("datamoat_writer") as conn,
    ):
        reader.execute("select count(*) from retrieval.live")
        with pytest.raises(ReleaseError, match="a long report"):
            promote(conn, "c", "me", "better", force=True)
        assert live_release(conn).name == "a"


def test_the_chain_feeds_the_live_release(
    conn: Connection, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What EMBEDDING_MODEL says counts while nothing is live, and where the live model lies."""
    made: dict[Path | None, Release] = {None: A, WIDE: B, Path("/moved"): A}

    def current(model: Path | None, _: Chunking) -> Release:
        if model not in made:
            raise EmbedderError(f"{model} is not there")
        return made[model]

    monkeypatch.setattr(registry, "current_release", current)
    monkeypatch.setattr(registry, "vectors_of", lambda fingerprint: fingerprint["model"])
    nothing = Setting()
    assert chain_release(conn, nothing) == registry.Chain(A, "a")
    assert chain_release(conn, Setting(Path("/moved"))).notes == ()
    other = chain_release(conn, Setting(WIDE))
    assert other.release == A and "EMBEDDING_CANDIDATE" in other.notes[0] and "promote b" in other.notes[0]
    assert "cannot be read" in chain_release(conn, Setting(Path("/nowhere"))).notes[0]
    cut = chain_release(conn, Setting(None, Chunking(100, 200, 60)))
    assert cut.release == A and "DATAMOAT_CHUNKING_CANDIDATE" in cut.notes[0]
    # What a candidate leaves open is the live release's.
    assert candidate_release(conn, Setting(WIDE), nothing) == B
    assert candidate_release(conn, Setting(None, Chunking(100, 200, 60)), Setting(Path("/moved"))) == A
    promote(conn, "b", "me", "better", force=True)
    # Who promoted another model than the installed one knows it.
    assert chain_release(conn, nothing) == registry.Chain(B, "b")
    del made[WIDE]
    with pytest.raises(NotLive, match="put it back"):
        chain_release(conn, nothing)
    # Cut differently, by the same model: another release that may follow.
    made[WIDE] = Release("b2", {"model": "b"}, 16, "b", WIDE)
    chain = chain_release(conn, nothing)
    assert chain.release.name == "b2" and "cut differently" in chain.notes[-1]


def test_a_release_cut_differently_takes_the_vectors_over_and_goes_live(
    conn: Connection, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "vectors_of", lambda fingerprint: fingerprint["model"])
    monkeypatch.setattr("assets.embeddings.index.protocol.shard_paths", lambda _: [])
    add(conn, "orders", ["cut anew"])
    report = load(conn, "orders", release("a2", model="a"), folder / "a", after="a")
    assert (report.loaded, report.missing, report.vectors, report.live) == (0, 1, len(TEXTS), True)
    assert nearest(conn, vector_of("text 3")) == "text 3"


def test_a_model_replaced_in_its_folder_follows_when_it_covers_what_was_found(
    conn: Connection, folder: Path
) -> None:
    add(conn, "orders", ["order"])
    write_shard(folder / "a", ["order"])
    load(conn, "orders", A, folder / "a")
    # A text that only the live release remembers must not hold its successor back.
    conn.execute("delete from corpus.document where path = 'text 0'")
    assert not load(conn, "notes", B, folder / "b", after="a").live
    write_shard(folder / "b", ["order"], seed=2, dimensions=16)
    assert load(conn, "orders", B, folder / "b", after="a").live


def test_a_load_under_way_does_not_undo_what_a_person_decided(conn: Connection, folder: Path) -> None:
    """Each release covers the other, and was the chain's when its load began."""
    promote(conn, "b", "me", "better", force=True)
    assert not load(conn, "notes", A, folder / "a", after="a").live
    assert live_release(conn).name == "b"
    rollback(conn, "me", "worse")
    assert not load(conn, "notes", B, folder / "b", after="b").live
    assert live_release(conn).name == "a"


def test_a_release_is_not_dropped_while_it_is_loaded(
    conn: Connection, database: Database, folder: Path
) -> None:
    conn.commit()
    with database.connect() as loading:
        registry.one_load_at_a_time(loading, "b")
        conn.execute("set lock_timeout = '50ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            drop(conn, "b")


def test_the_commands_say_what_they_did(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "_connect", lambda _: database.connect("datamoat_writer"))
    monkeypatch.setattr(commands, "load_contracts", lambda *_: ([], []))
    monkeypatch.setattr(commands, "comparison", lambda _: same)
    stream = io.StringIO()
    screen, settings = Screen(stream), Settings.from_environment({})
    commands.show_releases(settings, screen)
    with database.connect("datamoat_writer") as conn:
        add(conn, "notes", TEXTS)
        write_shard(tmp_path / "a", TEXTS)
        load(conn, "notes", A, tmp_path / "a")
        load(conn, "notes", release("c"), tmp_path / "a", follow=False)
    assert commands.check_release(settings, screen, "c")
    commands.promote_release(settings, screen, "c", "better", False)
    commands.roll_back(settings, screen, "slower")
    commands.promote_release(settings, screen, "c", "faster", False)
    commands.show_releases(settings, screen)
    commands.drop_releases(settings, screen, None, 0)
    said = stream.getvalue()
    for part in (
        "none yet",
        "400-1000/240",
        "neighbours",
        "recall_at_10 1",
        "retired",
        "c is live",
        "faster",
        "dropped",
    ):
        assert part in " ".join(said.split()), said


def test_a_candidate_is_built_by_source_checked_and_promoted_in_dagster(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dagster as dg

    from assets.embeddings import assets
    from orchestration.jobs import promote_release

    contracts, _ = load_contracts(
        [ROOT / "examples" / "support" / "contracts"], {"DATAMOAT_DATA_DIR": "/", "SITE_PACKAGES": "/"}
    )
    with warehouse.connect() as conn:
        add(conn, "handbook", TEXTS)
        write_shard(warehouse.lake / "a", TEXTS)
        load(conn, "handbook", A, warehouse.lake / "a")
    write_shard(B.folder(warehouse.lake), TEXTS, seed=2, dimensions=16)
    monkeypatch.setattr(assets, "candidate_release", lambda *_: B)
    monkeypatch.setattr(assets, "embed_questions", embed)
    monkeypatch.setattr(assets, "recent_questions", lambda *_: TEXTS[:5])
    compared: list[tuple[str, str]] = []

    def compare(_: Connection, candidate: str, live: Any) -> list[Difference]:
        compared.append((candidate, live.name))
        return [measured(-0.1, 0.01)]

    *_, index, whole = assets.candidate_assets(contracts, Setting(WIDE), compare)
    with dg.instance_for_test() as instance:
        resources = {"warehouse": warehouse}
        early = dg.materialize([whole], resources=resources, instance=instance, raise_on_error=False)
        assert "Materialize candidate/chunks" in str(early.failure_data_for_node("candidate__release"))
        assert dg.materialize(
            [index], resources=resources, instance=instance, partition_key="handbook"
        ).success
        done = dg.materialize([whole], resources=resources, instance=instance)
        failed = {found.check_name for found in done.get_asset_check_evaluations() if not found.passed}
        assert (compared, failed) == ([("b", "a")], {"shadow"})
        for release, success in (("c", False), ("b", True)):
            config = {"ops": {"promote_to_live": {"config": {"release": release, "why": "better"}}}}
            run = promote_release.execute_in_process(
                run_config=config, resources=resources, instance=instance, raise_on_error=False
            )
            assert run.success is success
    with warehouse.connect() as conn:
        assert live_release(conn).name == "b"
        (who,) = conn.execute("select who from registry.promotion order by id desc limit 1").fetchall()[0]
    assert who.startswith("Dagster run ")
