"""Plans and shards: nothing embedded twice, nothing lost, and a kill changes no byte."""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedder import protocol, shards
from embedder.protocol import EmbedderError, read_fingerprint, read_vectors
from embedder.shards import Plan, Shard, distinct_rows, locked, make_plan, shard_id

FINGERPRINT = {"model_sha256": "m", "dimensions": 4}
OTHER = {"model_sha256": "other", "dimensions": 4}
MADE_BY = {"engine": "fake", "device": "cpu", "dtype": "f32"}
NOW = datetime(2026, 1, 1, tzinfo=UTC)

keys_lists = st.lists(st.sampled_from([f"key{i}" for i in range(30)]), max_size=40)


def as_column(keys: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(keys, pa.string())])


def vector(key: str) -> npt.NDArray[np.float32]:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    return np.random.default_rng(seed).normal(size=4).astype(np.float32)


def plan_of(
    folder: Path, keys: list[str], size: int = 4, now: datetime = NOW, parked: Collection[str] = ()
) -> Plan:
    return make_plan(
        folder, FINGERPRINT, as_column(keys), now=now, parked=lambda _now: parked, shard_size=size
    )


def keys_of(shard: Shard, keys: list[str]) -> list[str]:
    return [keys[row] for row in shard.rows]


def write(folder: Path, shard: Shard, keys: list[str], failures: dict[str, str] | None = None) -> None:
    failures = failures or {}
    good = [key for key in keys_of(shard, keys) if key not in failures]
    vectors = np.stack([vector(key) for key in good]) if good else np.zeros((0, 4), np.float32)
    shards.write_shard(folder, shard, good, vectors, failures, fingerprint=FINGERPRINT, **MADE_BY)


def work(folder: Path, keys: list[str], *, killed_after: int | None = None, now: datetime = NOW) -> int:
    """One run; returns the number of keys embedded. A killed one stops without ending its plan."""
    with locked(folder):
        plan = plan_of(folder, keys, now=now)
        for shard in plan.missing[:killed_after]:
            write(folder, shard, keys)
        if killed_after is None or killed_after > len(plan.missing):
            shards.end_plan(folder, plan)
        return sum(len(shard.rows) for shard in plan.missing[:killed_after])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in protocol.shard_paths(folder)}


@settings(deadline=None)
@given(keys_lists)
def test_distinct_keys_keep_the_order_and_place_they_are_first_seen_at(keys: list[str]) -> None:
    distinct, rows = distinct_rows(as_column(keys))
    assert distinct.to_pylist() == list(dict.fromkeys(keys))
    assert rows.tolist() == [keys.index(key) for key in dict.fromkeys(keys)]


def test_distinct_rows_are_found_across_the_pieces_of_a_column() -> None:
    column = pa.chunked_array([pa.array(["b", "a"]), pa.array(["a", "c"])])
    distinct, rows = distinct_rows(column)
    assert (distinct.to_pylist(), rows.tolist()) == (["b", "a", "c"], [0, 1, 3])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(keys_lists, st.none() | st.integers(0, 5)), min_size=1, max_size=5))
def test_whatever_inputs_and_kills_follow_each_other_no_key_is_twice_and_none_is_lost(
    runs: list[tuple[list[str], int | None]],
) -> None:
    with mock.patch("os.fsync"), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for keys, killed_after in runs:
            work(folder, keys, killed_after=killed_after)
            found, vectors = read_vectors(folder)
            assert len(found) == len(set(found))
            assert all((vectors[i] == vector(key)).all() for i, key in enumerate(found))
            if killed_after is None:
                assert set(keys) <= set(found)
        last = runs[-1][0]
        work(folder, last)
        assert work(folder, last) == 0


@settings(max_examples=25, deadline=None)
@given(keys_lists, keys_lists, st.lists(st.integers(0, 3), min_size=1, max_size=3))
def test_a_killed_and_resumed_run_leaves_the_files_of_an_uninterrupted_one(
    before: list[str], keys: list[str], kills: list[int]
) -> None:
    with mock.patch("os.fsync"), tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        for folder in (Path(one), Path(two)):
            work(folder, before)
        work(Path(one), keys)
        for killed_after in kills:
            work(Path(two), keys, killed_after=killed_after)
        work(Path(two), keys)
        assert contents(Path(one)) == contents(Path(two))
        assert not (Path(two) / protocol.PLAN_FILE).exists()


def test_one_changed_text_is_one_key_to_embed(tmp_path: Path) -> None:
    keys = [f"k{i}" for i in range(10)]
    assert work(tmp_path, keys) == 10
    assert work(tmp_path, [*keys[:4], "changed", *keys[5:]]) == 1


def test_vectors_of_another_model_do_not_count_as_present(tmp_path: Path) -> None:
    work(tmp_path, ["a", "b"])
    with locked(tmp_path):
        plan = make_plan(tmp_path, OTHER, as_column(["a", "b"]), now=NOW)
    assert [shard.rows.tolist() for shard in plan.shards] == [[0, 1]]
    assert shard_id(OTHER, ["a", "b"]) != shard_id(FINGERPRINT, ["a", "b"])


def test_a_shard_is_named_by_its_keys_and_their_order() -> None:
    assert shard_id(FINGERPRINT, ["a", "b"]) != shard_id(FINGERPRINT, ["b", "a"])
    assert shard_id(FINGERPRINT, ["a", "b"]) != shard_id(FINGERPRINT, ["ab"])


def test_a_resumed_plan_keeps_the_decision_of_the_first_attempt(tmp_path: Path) -> None:
    keys = [f"k{i}" for i in range(10)]
    with locked(tmp_path):
        first = plan_of(tmp_path, keys, parked=["k1", "absent"])
        write(tmp_path, first.missing[0], keys)

        def parked(at: datetime) -> list[str]:
            return ["k1"] if at == NOW else []

        later = make_plan(
            tmp_path,
            FINGERPRINT,
            as_column(keys),
            now=NOW + timedelta(days=1),
            parked=parked,
            shard_size=4,
        )
    assert later.planned_at == first.planned_at == NOW
    assert later.parked == first.parked == {"k1"}
    assert [shard.shard_id for shard in later.missing] == [shard.shard_id for shard in first.missing[1:]]


def test_a_plan_of_which_nothing_was_made_is_decided_anew(tmp_path: Path) -> None:
    with locked(tmp_path):
        plan_of(tmp_path, ["a", "b"], parked=["a"])
        again = plan_of(tmp_path, ["a", "b"], now=NOW + timedelta(days=1))
    assert (again.planned_at, again.parked) == (NOW + timedelta(days=1), frozenset())


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([f"a{i}" for i in range(20)]), min_size=1, max_size=40),
    st.lists(st.sampled_from([f"b{i}" for i in range(20)]), max_size=40),
    st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=6),
)
def test_a_work_resumes_its_plan_whatever_was_done_of_another_meanwhile(
    mine: list[str], theirs: list[str], kills: list[tuple[bool, int]]
) -> None:
    with mock.patch("os.fsync"), tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        for keys in (mine, theirs):
            work(Path(one), keys)
        for is_mine, killed_after in kills:
            work(Path(two), mine if is_mine else theirs, killed_after=killed_after)
        for keys in (theirs, mine):
            work(Path(two), keys)
        assert contents(Path(one)) == contents(Path(two))
        assert not (Path(two) / protocol.PLAN_FILE).exists()


def test_a_work_keeps_its_decision_while_another_is_done_and_loses_it_to_one_that_shares_a_text(
    tmp_path: Path,
) -> None:
    mine = [f"k{i}" for i in range(10)]
    with locked(tmp_path):
        first = plan_of(tmp_path, mine, parked=["k1"])
        write(tmp_path, first.missing[0], mine)
    later = NOW + timedelta(days=1)
    work(tmp_path, ["x", "y"], now=later)
    with locked(tmp_path):
        again = plan_of(tmp_path, mine, now=later, parked=["k1"])
    assert (again.planned_at, again.shards[0].shard_id) == (NOW, first.shards[0].shard_id)
    assert len(again.missing) == len(first.missing) - 1
    work(tmp_path, ["k9", "z"], now=later)
    with locked(tmp_path):
        anew = plan_of(tmp_path, mine, now=later)
    assert anew.planned_at == later and not anew.finished
    assert [keys_of(shard, mine) for shard in anew.missing] == [["k1", "k5", "k6", "k7"], ["k8"]]


def test_a_plan_that_nobody_comes_back_to_is_forgotten(tmp_path: Path) -> None:
    work(tmp_path, ["a", "b"], killed_after=0)
    work(tmp_path, ["c"], now=NOW + shards.KEPT - timedelta(seconds=1))
    assert (tmp_path / protocol.PLAN_FILE).exists()
    work(tmp_path, ["d"], now=NOW + shards.KEPT)
    assert not (tmp_path / protocol.PLAN_FILE).exists()


def test_marks_of_a_dead_run_make_its_keys_suspects_until_they_are_settled(tmp_path: Path) -> None:
    assert shards.marks(tmp_path) == {}
    shards.begin(tmp_path, "one", ["a", "b\n\u00fc"])
    shards.begin(tmp_path, "two", ["c"])
    shards.begin(tmp_path, "gone", ["d"])
    shards.ended(tmp_path, "gone")
    (tmp_path / ".half.begun").write_text('["e')
    found = shards.marks(tmp_path)
    assert sorted(map(sorted, found.values())) == [[], ["a", "b\n\u00fc"], ["c"]]

    keys = [f"k{i}" for i in range(8)]
    plan = make_plan(tmp_path, FINGERPRINT, as_column(keys), now=NOW, shard_size=4, suspects={"k6", "absent"})
    assert plan.suspect == {plan.shards[1].shard_id}
    assert plan.shards[1].shard_id == plan_of(tmp_path, keys).shards[1].shard_id

    shards.settle({path: keys - {"a", "c"} for path, keys in found.items()})
    assert list(shards.marks(tmp_path).values()) == [{"b\n\u00fc"}]
    (mark,) = shards.marks(tmp_path)
    long_ago = mark.stat().st_mtime - shards.KEPT.total_seconds() - 60
    os.utime(mark, (long_ago, long_ago))
    assert shards.marks(tmp_path) == {} and not mark.exists()


def test_a_mark_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(EmbedderError, match=r"\.one\.begun cannot be written"):
        shards.begin(tmp_path / "absent", "one", ["a"])


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(EmbedderError, match=r"cannot be locked .No locks available"), locked(tmp_path):
        pass


def test_a_damaged_plan_file_is_no_plan(tmp_path: Path) -> None:
    for content in ("no", "[]", '{"work": 1}', '{"a": null}', '{"a": {"earlier": [], "planned_at": "x"}}'):
        (tmp_path / protocol.PLAN_FILE).write_text(content)
        assert work(tmp_path, ["a"]) in (0, 1)
    assert work(tmp_path, ["a"]) == 0


def test_a_descriptor_is_small_enough_to_be_sent(tmp_path: Path) -> None:
    keys = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(4096)]
    with locked(tmp_path):
        (shard,) = plan_of(tmp_path, keys, size=4096).shards
    sent = pickle.dumps(shard)
    assert len(sent) < 9 * 4096
    assert pickle.loads(sent).rows.tolist() == shard.rows.tolist()


def test_a_full_disk_is_named_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_table: pa.Table, path: Path, **_options: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(EmbedderError, match="No space left on device"):
        work(tmp_path, ["a"])
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_live_run_keeps_others_out_and_a_dead_ones_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / ".0123.parquet.77.tmp").write_bytes(b"half")
    with locked(tmp_path):
        assert not list(tmp_path.glob("*.tmp"))
        with pytest.raises(KeyboardInterrupt), locked(tmp_path, waiting=_give_up):
            pass
    with locked(tmp_path, waiting=_give_up):
        pass


def _give_up() -> None:
    raise KeyboardInterrupt


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbedderError, match="cannot be written to"), locked(tmp_path / "file"):
        pass


def test_a_broken_shard_is_moved_aside_and_made_again(tmp_path: Path) -> None:
    work(tmp_path, ["a", "b"])
    good = contents(tmp_path)
    (broken,) = protocol.shard_paths(tmp_path)
    broken.write_bytes(b"PAR1 half a file")
    said: list[str] = []
    with locked(tmp_path):
        plan = make_plan(tmp_path, FINGERPRINT, as_column(["a", "b"]), now=NOW, say=said.append)
        for shard in plan.shards:
            write(tmp_path, shard, ["a", "b"])
    assert contents(tmp_path) == good
    assert len(said) == 1 and "moved aside" in said[0]
    assert broken.with_suffix(".unreadable").exists()


def test_a_shard_says_how_it_was_made_and_what_failed(tmp_path: Path) -> None:
    shard = Shard(0, shard_id(FINGERPRINT, ["a", "b"]), np.array([0, 1]))
    write(tmp_path, shard, ["a", "b"], {"a": "text is empty"})
    (path,) = protocol.shard_paths(tmp_path)
    schema = pq.read_schema(path)
    assert schema.field("vector").type == pa.list_(pa.float32(), 4)
    assert schema.field("content_hash").type == pa.string()
    assert protocol.shard_metadata(path)[protocol.META_ENGINE] == b"fake"
    assert protocol.shard_metadata(path)[protocol.META_DEVICE] == b"cpu"
    assert protocol.shard_metadata(path)[protocol.META_DTYPE] == b"f32"
    assert shards.shard_failures(tmp_path, shard.shard_id) == {"a": "text is empty"}
    assert read_vectors(tmp_path)[0] == ["b"]


def test_a_shard_without_any_vector_is_not_written(tmp_path: Path) -> None:
    write(tmp_path, Shard(0, "0" * 32, np.array([0])), ["a"], {"a": "text is empty"})
    assert not protocol.shard_paths(tmp_path)


def test_reading_gives_the_wanted_hashes_in_the_wanted_order(tmp_path: Path) -> None:
    keys = [f"k{i}" for i in range(11)]
    work(tmp_path, keys)
    found, vectors = read_vectors(tmp_path, ["k7", "absent", "k0", "k10"])
    assert found == ["k7", "k0", "k10"]
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, np.stack([vector(key) for key in found]))
    everything, matrix = read_vectors(tmp_path)
    assert sorted(everything) == sorted(keys) and matrix.shape == (11, 4)


def test_reading_an_empty_or_absent_folder_gives_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        found, vectors = read_vectors(folder)
        assert (found, vectors.shape) == ([], (0, 0))
        assert read_fingerprint(folder) is None


def test_vectors_of_two_releases_are_never_mixed(tmp_path: Path) -> None:
    work(tmp_path, ["a"])
    assert read_fingerprint(tmp_path) == FINGERPRINT
    shard = Shard(0, shard_id(OTHER, ["a"]), np.array([0]))
    flipped: Any = -vector("a")[None]
    shards.write_shard(tmp_path, shard, ["a"], flipped, {}, fingerprint=OTHER, **MADE_BY)
    with pytest.raises(EmbedderError, match="several releases"):
        read_vectors(tmp_path)
    from embedder.model import release_id

    found, vectors = read_vectors(tmp_path, release=release_id(OTHER))
    assert found == ["a"]
    np.testing.assert_array_equal(vectors, flipped)


def test_a_foreign_file_under_a_shards_name_is_reported(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / f"{'a' * 32}.parquet")
    with pytest.raises(EmbedderError, match="no embedding fingerprint"):
        read_vectors(tmp_path)
