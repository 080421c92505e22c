"""Model folders: what is read from them, what is refused, and what names their vectors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedder import model as models
from embedder.model import open_model, release_id
from embedder.protocol import EmbedderError

CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-12,
}
MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def make_folder(folder: Path, **changes: Any) -> Path:
    """A folder that passes every rule, but for `changes`: file contents by name; None leaves a file out."""
    files: dict[str, Any] = {
        "config.json": CONFIG,
        "modules.json": MODULES,
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
        "sentence_bert_config.json": {"max_seq_length": 48, "do_lower_case": False},
        "model.safetensors": "weights",
        "tokenizer.json": {},
        **changes,
    }
    for name, content in files.items():
        if content is None:
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_the_default_model_is_the_installed_one_and_its_release_is_stable() -> None:
    model = open_model()
    assert (model.layers, model.heads, model.dimensions, model.max_length) == (6, 12, 384, 256)
    assert (model.pooling, model.normalize, model.prefix) == ("mean", True, "")
    assert model.model_sha256 == models.DEFAULT_SHA256
    # Vectors in production are found under this name: a change here orphans them all.
    assert model.release() == models.DEFAULT_RELEASE


def test_everything_comes_from_the_folder(tmp_path: Path) -> None:
    folder = make_folder(
        tmp_path,
        **{
            "1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
            "modules.json": MODULES[:2],
            "config_sentence_transformers.json": {"prompts": {"query": "query: ", "passage": "passage: "}},
        },
    )
    model = open_model(folder)
    assert (model.pooling, model.normalize, model.max_length) == ("cls", False, 48)
    assert (model.prefix, model.query_prefix) == ("passage: ", "query: ")


def test_the_default_prompt_serves_where_no_prompt_is_named(tmp_path: Path) -> None:
    prompts = {"prompts": {"clustering": "cluster: "}, "default_prompt_name": "clustering"}
    model = open_model(make_folder(tmp_path, **{"config_sentence_transformers.json": prompts}))
    assert (model.prefix, model.query_prefix) == ("cluster: ", "cluster: ")


def test_the_length_is_never_above_the_positions_the_model_has(tmp_path: Path) -> None:
    assert open_model(make_folder(tmp_path / "a", **{"sentence_bert_config.json": None})).max_length == 64
    long = {"sentence_bert_config.json": {"max_seq_length": 4096}}
    assert open_model(make_folder(tmp_path / "b", **long)).max_length == 64


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"config.json": None}, "config.json is missing"),
        ({"config.json": "{"}, "not valid JSON"),
        ({"config.json": []}, "must be an object"),
        ({"config.json": {**CONFIG, "auto_map": {"AutoModel": "mine.Model"}}}, "(auto_map)"),
        ({"config.json": {**CONFIG, "hidden_size": None}}, "hidden_size must be a whole number"),
        ({"modules.json": None}, "modules.json is missing"),
        ({"modules.json": {}}, "must be a list"),
        ({"modules.json": [MODULES[1]]}, "lists the modules Pooling"),
        ({"modules.json": [*MODULES[:2], {"path": "2", "type": "x.Dense"}]}, "how many dimensions"),
        ({"modules.json": [{**MODULES[0], "path": "0_T"}, *MODULES[1:]]}, "subfolder '0_T'"),
        ({"1_Pooling/config.json": {}}, "names no pooling"),
        (
            {"1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "include_prompt": False}},
            "include_prompt",
        ),
        ({"config_sentence_transformers.json": {"truncate_dim": 64}}, "(truncate_dim)"),
        ({"tokenizer_config.json": {"truncation_side": "left"}}, "(truncation_side)"),
        ({"model.safetensors": None}, "model.safetensors is missing"),
        (
            {"model.safetensors": None, "model.safetensors.index.json": {"weight_map": {"a": "../a"}}},
            "must name files in this folder",
        ),
        (
            {"model.safetensors": None, "model.safetensors.index.json": {"weight_map": {"a": "a"}}},
            "/a is missing",
        ),
        ({"tokenizer.json": None}, "tokenizer.json is missing"),
    ],
)
def test_an_unusable_folder_is_refused_by_name_rule_and_remedy(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(EmbedderError, match="; ") as caught:
        open_model(make_folder(tmp_path, **changes))
    assert says in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"config.json": {**CONFIG, "model_type": "distilbert"}},
        {"config.json": {**CONFIG, "hidden_act": "gelu_new"}},
        {"config.json": {**CONFIG, "hidden_act": "relu"}},
        {"config.json": {**CONFIG, "position_embedding_type": "relative_key"}},
        {"config.json": {**CONFIG, "is_decoder": True}},
        {"sentence_bert_config.json": {"transformer_task": "fill-mask"}},
        {"1_Pooling/config.json": {"pooling_mode_max_tokens": True, "word_embedding_dimension": 32}},
        {"1_Pooling/config.json": {"pooling_mode": ["mean", "cls"], "embedding_dimension": 16}},
    ],
)
def test_whatever_the_graph_does_not_compute_is_another_architecture(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    pooling = {"pooling_mode": "mean", "word_embedding_dimension": 32}
    model = open_model(make_folder(tmp_path, **{"1_Pooling/config.json": pooling, **changes}))
    assert (model.architecture, model.dimensions) == ("other", 32)


@pytest.mark.parametrize(
    ("model_type", "architecture", "padding", "positions", "length"),
    [
        ("bert", "bert", 0, 64, 64),
        ("xlm-roberta", "xlm-roberta", 1, 64, 62),
        ("roberta", "xlm-roberta", 5, 64, 58),
        ("mpnet", "mpnet", 5, 64, 62),
    ],
)
def test_positions_that_begin_behind_the_padding_id_cost_length(
    tmp_path: Path, model_type: str, architecture: str, padding: int, positions: int, length: int
) -> None:
    config = {
        **CONFIG,
        "model_type": model_type,
        "pad_token_id": padding,
        "max_position_embeddings": positions,
    }
    model = open_model(make_folder(tmp_path, **{"config.json": config, "sentence_bert_config.json": None}))
    assert (model.architecture, model.max_length) == (architecture, length)


def test_the_tokenizer_says_the_length_where_nothing_else_does(tmp_path: Path) -> None:
    files = {"sentence_bert_config.json": None, "tokenizer_config.json": {"model_max_length": 40}}
    assert open_model(make_folder(tmp_path / "a", **files)).max_length == 40
    unlimited = {"sentence_bert_config.json": None, "tokenizer_config.json": {"model_max_length": 1e30}}
    assert open_model(make_folder(tmp_path / "b", **unlimited)).max_length == 64


def test_a_missing_folder_says_where_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(EmbedderError, match="EMBEDDING_MODEL"):
        open_model(tmp_path / "absent")


def test_a_missing_default_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "DEFAULT_PACKAGE", "no_such_package_here")
    with pytest.raises(EmbedderError, match="no_such_package_here is not installed"):
        open_model()


def test_default_weights_with_another_digest_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path)
    monkeypatch.setattr(models, "default_folder", lambda: folder)
    with pytest.raises(
        EmbedderError, match=r"model\.safetensors has sha256 [0-9a-f]{64}, the release in use"
    ):
        open_model()
    assert open_model(folder).folder == folder  # a folder named by hand is trusted


def test_weights_that_are_not_safetensors_are_refused(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    for content in (b"", b"weights", b"\xff" * 9, len(header).to_bytes(8, "little") + header + b"\0" * 8):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(EmbedderError, match="cannot be read as safetensors"):
            models.load_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    assert models.load_weights(tmp_path)["a"].tolist() == [0] * 4


def test_bfloat16_is_the_upper_half_of_a_float(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]},"b":{"dtype":"I64"}}'
    values = np.array([1.5, -2.0], np.float32).view(np.uint32) >> 16
    content = len(header).to_bytes(8, "little") + header + values.astype("<u2").tobytes()
    (tmp_path / "model.safetensors").write_bytes(content)
    assert {name: found.tolist() for name, found in models.load_weights(tmp_path).items()} == {
        "a": [[1.5, -2.0]]
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_sha256", "0" * 64),
        ("tokenizer_sha256", "0" * 64),
        ("pooling", "cls"),
        ("normalize", False),
        ("prefix", "passage: "),
        ("max_length", 128),
        ("dimensions", 128),
        ("lower_case", True),
        ("config", {**open_model().config, "num_attention_heads": 6}),
        ("architecture", "xlm-roberta"),
    ],
)
def test_whatever_changes_a_vector_changes_the_release(field: str, value: object) -> None:
    model = open_model()
    changes: dict[str, Any] = {field: value}
    assert replace(model, **changes).release() != model.release()


def test_where_the_folder_lies_does_not_change_the_release(tmp_path: Path) -> None:
    model = open_model()
    assert replace(model, folder=tmp_path).release() == model.release()


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.booleans()), st.randoms())
def test_a_release_does_not_depend_on_the_order_of_keys(fingerprint: dict[str, Any], random: Any) -> None:
    items = list(fingerprint.items())
    random.shuffle(items)
    assert release_id(dict(items)) == release_id(fingerprint)
