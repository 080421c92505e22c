"""Engines give the vectors of sentence-transformers in float32, at every length; and which engine is chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from embedder import canary, engines
from embedder.encode import Embedder
from embedder.engines import encoder_graph
from embedder.model import Model, open_model
from embedder.protocol import EmbedderError
from embedder.tokens import open_tokenizer
from tests.unit.model_folders import NEEDS, texts_by_length, write_folder, write_json, write_modules

Floats = npt.NDArray[np.float32]

# Longest row and pooling of the tiny folders. XLM-R and MPNet have two positions fewer than their table has rows.
TINY: dict[str, tuple[dict[str, Any], dict[str, Any], int | None]] = {
    "bert": ({"max_position_embeddings": 48}, {"pooling_mode_cls_token": True}, 40),
    "xlm-roberta": ({"max_position_embeddings": 50}, {"pooling_mode": "mean"}, 48),
    "mpnet": ({"max_position_embeddings": 162}, {"pooling_mode_mean_tokens": True}, 160),
}


def reference(model: Model, texts: list[str]) -> Floats:
    """What sentence-transformers gives, compared only where the extra is installed."""
    pytest.importorskip("sentence_transformers", reason=NEEDS)
    return canary.reference_vectors(model.folder, texts)


def lengths_up_to(longest: int, every: int = 1) -> list[int]:
    """Text lengths from one token to beyond the longest row."""
    return [
        *range(1, longest, every),
        longest - 2,
        longest - 1,
        longest,
        longest + 1,
        2 * longest,
        5 * longest,
    ]


@pytest.fixture(scope="module")
def default_case() -> tuple[list[str], Floats]:
    model = open_model()
    lengths = [*range(1, 12), *lengths_up_to(256, every=9)]
    texts = texts_by_length(open_tokenizer(model.folder / "tokenizer.json"), lengths)
    return texts, reference(model, texts)


@pytest.mark.parametrize(("precision", "needed"), [("bf16", 0.999), ("f32", 0.9999)])
def test_the_default_model_equals_the_reference_at_every_length(
    default_case: tuple[list[str], Floats], precision: str, needed: float
) -> None:
    texts, expected = default_case
    embedder = Embedder.open(engine="openvino", precision=precision)
    lengths = embedder.tokeniser.tokenise(texts).tokens.lengths
    assert (lengths.min(), lengths.max(), len(set(lengths.tolist())) > 36) == (3, 256, True)
    assert canary.worst_cosine(embedder.encode(texts), expected) >= needed


@pytest.mark.parametrize("kind", TINY)
def test_every_architecture_equals_the_reference_at_every_length(tmp_path: Path, kind: str) -> None:
    settings, pooling, longest = TINY[kind]
    write_modules(write_folder(tmp_path, kind, **settings), pooling, max_length=longest)
    model = open_model(tmp_path)
    assert (model.architecture, model.max_length) == (kind, longest)
    texts = texts_by_length(open_tokenizer(tmp_path / "tokenizer.json"), lengths_up_to(model.max_length))
    # The name of the padding token within a text: it takes no position of its own in XLM-R and MPNet.
    texts += ["a", "the <pad> token and <pad> <pad> another [PAD] one"]
    embedder = Embedder(model, engine="openvino", precision="f32")
    assert set(embedder.tokeniser.tokenise(texts).tokens.lengths.tolist()) >= {3, model.max_length}
    assert canary.worst_cosine(embedder.encode(texts), reference(model, texts)) >= 0.9999


def test_the_folder_says_how_to_prefix_and_whether_to_scale(tmp_path: Path) -> None:
    settings, pooling, longest = TINY["bert"]
    folder = write_modules(
        write_folder(tmp_path, "bert", **settings), pooling, max_length=longest, kinds="TP"
    )
    prompts = {"prompts": {"query": "find ", "document": "the text "}}
    write_json(folder / "config_sentence_transformers.json", prompts)
    embedder = Embedder.open(folder, engine="openvino", precision="f32", streams=1)
    texts = ["alpha", "a second text, longer than the first one"]
    for as_query, prompt in ((True, "find "), (False, "the text ")):
        expected = reference(embedder.model, [prompt + text for text in texts])
        assert np.abs(np.linalg.norm(expected, axis=1) - 1).min() > 0.1
        np.testing.assert_allclose(embedder.encode(texts, as_query=as_query), expected, atol=1e-4)


def test_distances_fall_into_the_buckets_of_the_reference() -> None:
    modelling = pytest.importorskip("transformers.models.mpnet.modeling_mpnet", reason=NEEDS)
    torch = pytest.importorskip("torch", reason=NEEDS)
    distances = np.arange(-600, 601)
    expected = modelling.MPNetEncoder.relative_position_bucket(torch.from_numpy(distances))
    assert encoder_graph.distance_buckets(distances).tolist() == expected.tolist()


def test_weights_in_shards_and_in_half_precision_are_read_alike(tmp_path: Path) -> None:
    settings, pooling, longest = TINY["bert"]
    whole = write_modules(write_folder(tmp_path / "a", "bert", **settings), pooling, max_length=longest)
    parts = write_modules(write_folder(tmp_path / "b", "bert", **settings), pooling, max_length=longest)
    weights = {
        name: values.astype(np.float16) for name, values in load_file(whole / "model.safetensors").items()
    }
    save_file(weights, whole / "model.safetensors")
    (parts / "model.safetensors").unlink()
    index = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(weights)}
    for part in sorted(set(index.values())):
        save_file({name: weights[name] for name in weights if index[name] == part}, parts / part)
    write_json(parts / "model.safetensors.index.json", {"weight_map": index})
    texts = ["one text", "and another one, a little longer"]
    vectors = [
        Embedder.open(folder, engine="openvino", precision="f32").encode(texts) for folder in (whole, parts)
    ]
    assert vectors[0].tobytes() == vectors[1].tobytes()
    assert open_model(whole).release() != open_model(parts).release()


def test_what_no_graph_computes_goes_through_sentence_transformers_and_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings, pooling, longest = TINY["bert"]
    folder = write_modules(
        write_folder(tmp_path, "bert", **settings, hidden_act="gelu_new"),
        pooling,
        max_length=longest,
        kinds="TPDN",
    )
    pytest.importorskip("sentence_transformers", reason=NEEDS)
    from sentence_transformers.sentence_transformer.modules import Dense

    Dense(64, 24).save(str(folder / "2_Dense"))
    model = open_model(folder)
    assert (model.architecture, model.dimensions, model.normalize) == ("other", 24, True)
    said: list[str] = []
    embedder = Embedder.open(folder, say=said.append)
    texts = texts_by_length(open_tokenizer(tmp_path / "tokenizer.json"), lengths_up_to(longest or 0, every=4))
    capfd.readouterr()
    vectors = embedder.encode(texts)
    assert not capfd.readouterr().err  # progress bars of the libraries would stand in the job's log
    assert canary.worst_cosine(vectors, reference(model, texts)) >= 0.99999
    assert embedder.engine.name == "sentence-transformers"
    assert len(said) == 1 and "'bert'" in said[0] and "slow path" in said[0]
    release = model.release()
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"other weights")
    assert open_model(folder).release() != release


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(
        EmbedderError, match=r"not installed; install the extra with pip install 'datamoat\[compat\]'"
    ):
        engines.open_engine(
            other(tmp_path), "sentence-transformers", device="cpu", precision=None, streams=None
        )


def test_a_folder_that_the_library_cannot_open_is_an_error_of_ours(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason=NEEDS)
    with pytest.raises(EmbedderError, match="sentence-transformers cannot open this folder"):
        engines.open_engine(
            other(tmp_path), "sentence-transformers", device="cpu", precision=None, streams=None
        )


def other(folder: Path) -> Model:
    """A model of a type that nobody computes."""
    config = {"model_type": "unheard-of", "max_position_embeddings": 64}
    write_json(folder / "config.json", config)
    write_modules(folder, {"pooling_mode": "mean"}, max_length=None)
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    return open_model(folder)


@pytest.mark.parametrize(
    ("model_type", "name", "device", "cuda", "expected"),
    [
        ("bert", "auto", None, False, ("openvino", "cpu")),
        ("bert", "auto", None, True, ("torch", "cuda")),
        ("bert", "auto", "cpu", True, ("openvino", "cpu")),
        ("mpnet", "openvino", None, True, ("openvino", "cpu")),
        ("qwen3", "auto", None, False, ("torch", "cpu")),
        ("other", "auto", None, True, ("sentence-transformers", "cuda")),
        ("other", "auto", None, False, ("sentence-transformers", "cpu")),
        ("bert", "sentence-transformers", "cpu", True, ("sentence-transformers", "cpu")),
    ],
)
def test_the_engine_follows_the_model_and_the_machine(
    model_type: str,
    name: str,
    device: str | None,
    cuda: bool,
    expected: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engines, "has_cuda", lambda: cuda)
    said: list[str] = []
    model = replace(open_model(), architecture=model_type)
    assert engines.choose(model, name, device, said.append) == expected
    assert bool(said) == (name == "auto" and model_type in ("qwen3", "other"))


@pytest.mark.parametrize(
    ("name", "device", "says"),
    [
        ("onnx", None, "unknown engine 'onnx'; choose auto, openvino, torch, sentence-transformers"),
        ("openvino", "cuda", "computes on cpu, not on cuda; choose torch"),
        ("torch", None, "does not compute"),
    ],
)
def test_an_engine_that_cannot_serve_is_refused(
    name: str, device: str | None, says: str, tmp_path: Path
) -> None:
    model = other(tmp_path) if name == "torch" else open_model()
    with pytest.raises(EmbedderError, match="; choose") as caught:
        engines.choose(model, name, device, lambda _line: None)
    assert says in str(caught.value)


def test_a_decoder_is_told_by_its_folder(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3",
        "hidden_act": "silu",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    write_modules(tmp_path, {"pooling_mode_lasttoken": True}, max_length=None)
    prompts = {"prompts": {"query": "Instruct: find it\nQuery:", "document": ""}}
    write_json(tmp_path / "config.json", config)
    write_json(tmp_path / "config_sentence_transformers.json", prompts)
    write_json(tmp_path / "tokenizer_config.json", {"model_max_length": 131072})
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    model = open_model(tmp_path)
    assert (model.architecture, model.pooling, model.max_length) == ("qwen3", "lasttoken", 32768)
    assert (model.query_prefix, model.prefix) == ("Instruct: find it\nQuery:", "")
    for change in (
        {"use_sliding_window": True},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"is_causal": False},
    ):
        write_json(tmp_path / "config.json", {**config, **change})
        assert open_model(tmp_path).architecture == "other", json.dumps(change)
