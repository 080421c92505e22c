"""Versions as files: named by content, written once, loadable as they are, and checked byte by byte."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from assets.datasets import versions
from assets.datasets.builders import KINDS, Kind, Recipe, build
from assets.datasets.canonical import canonical, digest
from assets.datasets.versions import SCHEMAS, store, verify
from tests.unit.dataset_strategies import correction, signal, signal_lists

SIGNALS = [
    *(signal(f"u{n}", question=f"question {n}", completion=f"answer {n}") for n in range(40)),
    *(signal(f"d{n}", question=f"question {n}", completion=f"wrong {n}", up=False) for n in range(40)),
    *(correction(f"c{n}", f"right {n}", question=f"other {n}", completion=f"bad {n}") for n in range(10)),
    signal("x", excluded="train_not_ok"),
]
RECIPE = Recipe(validation=0.2, test=0.2)


def tree(lake: Path) -> dict[str, tuple[int, int]]:
    """Every file with its inode and modification time: unchanged means nothing was written."""
    files = [path for path in lake.rglob("*") if path.is_file()]
    return {str(path.relative_to(lake)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def contents(lake: Path) -> dict[str, bytes]:
    return {str(path.relative_to(lake)): path.read_bytes() for path in lake.rglob("*") if path.is_file()}


def overwrite(path: Path, data: bytes) -> None:
    """Damage a file in place, as a careless script would, keeping its inode."""
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_files_have_exactly_the_columns_trainers_want(kind: Kind, tmp_path: Path) -> None:
    stored = store(tmp_path, "answers", build(kind, SIGNALS, RECIPE))
    columns = {
        "sft": ["prompt", "completion"],
        "preference": ["prompt", "chosen", "rejected"],
        "kto": ["prompt", "completion", "label"],
    }[kind]
    rows = 0
    for split in ("train", "validation", "test"):
        table = pq.read_table(stored.folder / f"{split}.parquet")
        assert table.column_names == columns
        assert table.schema.equals(SCHEMAS[kind])
        assert table.num_rows == stored.manifest["splits"][split]["rows"] > 0
        ids = [digest(row) for row in table.to_pylist()]
        assert ids == sorted(ids)
        for row in table.to_pylist():
            for column in columns:
                if column == "label":
                    assert isinstance(row[column], bool)
                else:
                    assert set(row[column][0]) == {"role", "content"}
        rows += table.num_rows
    assert stored.rows == rows
    assert verify(tmp_path, "answers", stored.version) == []


def test_lineage_explains_every_row_and_stays_out_of_the_trainers_files(tmp_path: Path) -> None:
    built = build("kto", SIGNALS, RECIPE)
    stored = store(tmp_path, "answers", built)
    lineage = pq.read_table(stored.folder / "lineage.parquet").to_pylist()
    assert [entry["row_id"] for entry in lineage] == [row.row_id for row in built.rows]
    assert {s for entry in lineage for s in entry["signal_ids"]} == {one.signal_id for one in SIGNALS} - {"x"}
    for entry in lineage:
        rows = pq.read_table(stored.folder / f"{entry['split']}.parquet").to_pylist()
        assert entry["row_id"] in {digest(row) for row in rows}


def test_the_version_is_the_hash_of_a_canonical_manifest(tmp_path: Path) -> None:
    stored = store(tmp_path, "answers", build("sft", SIGNALS))
    payload = (stored.folder / "manifest.json").read_bytes()
    assert payload == canonical(orjson.loads(payload)) == canonical(stored.manifest)
    assert stored.manifest["signals"] == {
        "read": 91,
        "used": 50,
        "dropped": {"negative": 40, "train_not_ok": 1},
    }
    assert stored.manifest["origins"]["train"].keys() == {"vote", "correction"}
    assert stored.manifest["characters"]["completion"]["max"] == len("answer 39")


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    st.randoms(),
)
def test_canonical_json_ignores_key_order_and_survives_a_round_trip(value: Any, random: Any) -> None:
    def shuffled(item: Any) -> Any:
        if isinstance(item, dict):
            keys = list(item)
            random.shuffle(keys)
            return {key: shuffled(item[key]) for key in keys}
        return [shuffled(one) for one in item] if isinstance(item, list) else item

    assert canonical(shuffled(value)) == canonical(value) == canonical(orjson.loads(canonical(value)))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(KINDS), signal_lists(), st.randoms())
def test_any_order_of_signals_gives_the_same_version(kind: Kind, signals: list[Any], random: Any) -> None:
    shuffled = list(signals)
    random.shuffle(shuffled)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        first = store(Path(one), "answers", build(kind, signals))
        second = store(Path(other), "answers", build(kind, shuffled))
        assert first.version == second.version
        assert contents(Path(one)) == contents(Path(other))
        assert verify(Path(one), "answers", first.version) == []


def test_what_went_in_is_in_the_name(tmp_path: Path) -> None:
    names = {
        store(tmp_path, dataset, build(kind, signals, recipe, golden)).version
        for dataset, kind, signals, recipe, golden in (
            ("answers", KINDS[0], SIGNALS, Recipe(), ()),
            ("others", KINDS[0], SIGNALS, Recipe(), ()),
            ("answers", KINDS[2], SIGNALS, Recipe(), ()),
            ("answers", KINDS[0], SIGNALS[1:], Recipe(), ()),
            ("answers", KINDS[0], SIGNALS, Recipe(salt="other"), ()),
            ("answers", KINDS[0], SIGNALS, Recipe(), ("never asked",)),
        )
    }
    assert len(names) == 6


def test_storing_twice_writes_nothing(tmp_path: Path) -> None:
    first = store(tmp_path, "answers", build("sft", SIGNALS))
    before = tree(tmp_path)
    assert store(tmp_path, "answers", build("sft", SIGNALS)) == first
    assert tree(tmp_path) == before


def test_versions_share_the_shards_they_have_in_common(tmp_path: Path) -> None:
    store(tmp_path, "answers", build("sft", SIGNALS))
    objects = len(list(tmp_path.rglob("objects/*/*.parquet")))
    store(tmp_path, "answers", build("sft", [*SIGNALS, signal("y", excluded="train_not_ok")]))
    assert len(list((tmp_path / "datasets" / "answers").iterdir())) == 2
    assert len(list(tmp_path.rglob("objects/*/*.parquet"))) == objects


def test_split_files_are_the_objects_and_read_only(tmp_path: Path) -> None:
    stored = store(tmp_path, "answers", build("sft", SIGNALS))
    sha256 = stored.manifest["splits"]["train"]["shards"][0]["sha256"]
    target = tmp_path / "datasets" / "objects" / sha256[:2] / f"{sha256}.parquet"
    assert (stored.folder / "train.parquet").samefile(target)
    assert target.stat().st_mode & 0o222 == 0


def test_copies_where_hard_links_are_not_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    stored = store(tmp_path, "answers", build("sft", SIGNALS))
    before = tree(tmp_path)
    assert store(tmp_path, "answers", build("sft", SIGNALS)).version == stored.version
    assert tree(tmp_path) == before
    assert verify(tmp_path, "answers", stored.version) == []
    overwrite(stored.folder / "test.parquet", b"damaged")
    (problem,) = verify(tmp_path, "answers", stored.version)
    assert problem.rule == "the split file is the manifest's object"


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_set_is_a_version_with_files(kind: Kind, tmp_path: Path) -> None:
    stored = store(tmp_path, "answers", build(kind, []))
    assert stored.rows == 0
    for name in ("train", "validation", "test"):
        assert pq.ParquetFile(stored.folder / f"{name}.parquet").num_row_groups == 0
        table = pq.read_table(stored.folder / f"{name}.parquet")
        assert (table.num_rows, table.schema.equals(SCHEMAS[kind])) == (0, True)
    assert verify(tmp_path, "answers", stored.version) == []
    assert "None." in (stored.folder / "README.md").read_text()


def test_large_splits_are_cut_by_row_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "ROWS_PER_SHARD", 10)
    built = build("sft", SIGNALS, Recipe(validation=0, test=0))
    stored = store(tmp_path, "answers", built)
    assert len(stored.manifest["splits"]["train"]["shards"]) == 16
    assert (stored.folder / "train-00000-of-00016.parquet").exists()
    assert (stored.folder / "validation.parquet").exists()
    assert sum(shard["rows"] for shard in stored.manifest["splits"]["train"]["shards"]) == len(built.rows)
    assert verify(tmp_path, "answers", stored.version) == []
    more = [*SIGNALS, signal("one more", question="brand new")]
    grown = store(tmp_path, "answers", build("sft", more, Recipe(validation=0, test=0)))
    old, new = (
        {shard["sha256"] for shard in one.manifest["splits"]["train"]["shards"]} for one in (stored, grown)
    )
    assert len(new - old) == 1


def test_the_card_names_the_files_of_each_split(tmp_path: Path) -> None:
    stored = store(tmp_path, "answers", build("kto", SIGNALS, RECIPE))
    text = (stored.folder / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    default, lineage = head["configs"]
    assert (default["config_name"], lineage["config_name"]) == ("default", "lineage")
    for entry in (*default["data_files"], *lineage["data_files"]):
        assert (stored.folder / entry["path"]).exists()
    assert [entry["split"] for entry in default["data_files"]] == ["train", "validation", "test"]
    assert "| train_not_ok | 1 |" in text
    assert "desirable_weight" in text


def test_the_card_leaves_out_splits_without_rows(tmp_path: Path) -> None:
    stored = store(tmp_path, "answers", build("sft", SIGNALS, Recipe(validation=0, test=0.2)))
    head = yaml.safe_load((stored.folder / "README.md").read_text().split("---\n")[1])
    assert [entry["split"] for entry in head["configs"][0]["data_files"]] == ["train", "test"]
    empty = store(tmp_path, "answers", build("sft", []))
    assert "configs" not in yaml.safe_load((empty.folder / "README.md").read_text().split("---\n")[1])


@pytest.mark.parametrize("name", ["Answers", "a-b", "../x", "", "objects"])
def test_names_that_do_not_fit_the_layout_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataset name"):
        store(tmp_path, name, build("sft", []))


# --- damage ---


def test_a_damaged_object_is_named_and_a_rebuild_puts_it_back(tmp_path: Path) -> None:
    stored = store(tmp_path, "answers", build("sft", SIGNALS))
    sha256 = stored.manifest["splits"]["train"]["shards"][0]["sha256"]
    target = tmp_path / "datasets" / "objects" / sha256[:2] / f"{sha256}.parquet"
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    overwrite(target, bytes(data))
    (problem,) = verify(tmp_path, "answers", stored.version)
    assert problem.file == f"datasets/objects/{sha256[:2]}/{sha256}.parquet"
    assert problem.rule == "the object's SHA-256 is its name"
    assert "build the dataset again" in problem.remedy
    assert store(tmp_path, "answers", build("sft", SIGNALS)).version == stored.version
    assert verify(tmp_path, "answers", stored.version) == []
    assert (stored.folder / "train.parquet").samefile(target)


def test_missing_files_are_named(tmp_path: Path) -> None:
    stored = store(tmp_path, "answers", build("sft", SIGNALS))
    sha256 = stored.manifest["lineage"]["shards"][0]["sha256"]
    for path in (
        stored.folder / "test.parquet",
        stored.folder / "README.md",
        tmp_path / "datasets" / "objects" / sha256[:2] / f"{sha256}.parquet",
    ):
        path.unlink()
    rules = {problem.rule for problem in verify(tmp_path, "answers", stored.version)}
    assert rules == {"the split file exists", "the card exists", "the object exists"}
    (stored.folder / "manifest.json").unlink()
    (problem,) = verify(tmp_path, "answers", stored.version)
    assert problem.rule == "the manifest exists"


def test_a_changed_manifest_is_named(tmp_path: Path) -> None:
    stored = store(tmp_path, "answers", build("sft", SIGNALS))
    path = stored.folder / "manifest.json"
    overwrite(path, path.read_bytes().replace(b'"sft"', b'"kto"'))
    (problem,) = verify(tmp_path, "answers", stored.version)
    assert (problem.file, problem.rule) == (
        f"datasets/answers/{stored.version}/manifest.json",
        "the manifest's SHA-256 is the version",
    )


def test_rows_that_are_not_the_manifests_are_named(tmp_path: Path) -> None:
    """A forged object with a right name and count, under a manifest that claims it."""
    stored = store(tmp_path, "answers", build("sft", SIGNALS))
    forged = dict(stored.manifest["splits"]["train"]["shards"][0], logical_digest="0" * 64)
    manifest = dict(
        stored.manifest, splits=dict(stored.manifest["splits"], train={"rows": 0, "shards": [forged]})
    )
    payload = canonical(manifest)
    version = digest(manifest)
    folder = tmp_path / "datasets" / "answers" / version
    folder.mkdir()
    (folder / "manifest.json").write_bytes(payload)
    rules = [problem.rule for problem in verify(tmp_path, "answers", version)]
    assert "the rows have the manifest's logical digest" in rules


# --- crashes ---


class Killed(BaseException):
    """Stands in for a kill signal: nothing in the code may catch it."""


@contextmanager
def killed_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `steps` renames through, then die before the next."""
    done = 0
    rename = Path.replace

    def replace(self: Path, target: Path) -> Path:
        nonlocal done
        if done == steps:
            raise Killed
        done += 1
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        yield


def test_killed_at_any_step_and_run_again_ends_in_the_same_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build("kto", SIGNALS, RECIPE)
    whole = tmp_path / "whole"
    version = store(whole, "answers", built).version
    expected = contents(whole)
    steps = len(expected)
    for step in range(steps):
        lake = tmp_path / str(step)
        with killed_after(step, monkeypatch), pytest.raises(Killed):
            store(lake, "answers", built)
        assert not (lake / "datasets" / "answers" / version / "manifest.json").exists()
        assert store(lake, "answers", built).version == version
        assert {name: data for name, data in contents(lake).items() if "/." not in name} == expected
        assert verify(lake, "answers", version) == []


def test_texts_come_back_as_they_were(tmp_path: Path) -> None:
    odd = "\u00e9\U0001f600\n\t\"'\\ \u202e"
    stored = store(
        tmp_path, "answers", build("sft", [signal("a", completion=odd)], Recipe(validation=0, test=0))
    )
    table: pa.Table = pq.read_table(stored.folder / "train.parquet")
    assert table.to_pylist()[0]["completion"] == [{"role": "assistant", "content": odd}]
