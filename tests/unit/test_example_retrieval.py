"""The scifact and xquad examples: their contracts load, and without their data they say what is missing."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from assets.sources.contract import load_contracts

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def loader(example: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{example}", EXAMPLES / example / "loader.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("example", "golden"),
    [
        ("scifact", {"citations": "abstracts"}),
        ("xquad", {f"questions_{language}": f"passages_{language}" for language in ("de", "en", "es")}),
    ],
)
def test_contracts_and_missing_data(example: str, golden: dict[str, str], tmp_path: Path) -> None:
    contracts, errors = load_contracts(
        [EXAMPLES / example / "contracts"], {"DATAMOAT_DATA_DIR": str(tmp_path)}
    )
    assert errors == []
    assert {one.name: one.golden.document_source for one in contracts if one.golden} == golden
    by_name = {one.name: one for one in contracts}
    assert all("rag" in by_name[source].allowed_uses for source in golden.values())
    assert all(one.language == by_name[golden[one.name]].language for one in contracts if one.golden)
    with pytest.raises(FileNotFoundError, match=f"{loader(example).FOLDER} is missing.*DATAMOAT_DATA_DIR"):
        loader(example).interactions(tmp_path)
