"""The packed torch engine against sentence-transformers in float32, on tiny models with random weights, on a CPU."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from benchmarks import gpu
from embedder.canary import worst_cosine
from embedder.encode import Embedder, Engine
from embedder.engines import torch_forward, torch_packed
from embedder.engines.torch_packed import TorchEngine, tune
from embedder.model import Model, open_model
from embedder.protocol import EmbedderError
from embedder.tokens import Tokeniser, Tokens, cut_by_budget

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'compat' is not installed")
sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="the extra 'compat' is not installed"
)

Floats = npt.NDArray[np.float32]

MAX_LENGTH = 48
WORDS = 120
ENCODER = {
    "vocab_size": WORDS + 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", ENCODER | {"max_position_embeddings": MAX_LENGTH}),
    "xlm-roberta": (
        "XLMRobertaModel",
        ENCODER | {"max_position_embeddings": MAX_LENGTH + 2, "type_vocab_size": 1},
    ),
    "mpnet": ("MPNetModel", ENCODER | {"max_position_embeddings": MAX_LENGTH + 2}),
    "qwen3": (
        "Qwen3Model",
        ENCODER | {"max_position_embeddings": MAX_LENGTH, "num_key_value_heads": 2, "head_dim": 16},
    ),
}
"""Architecture -> its class in transformers and a tiny configuration."""

TEXTS = [
    " ".join(f"w{(7 * length + 13 * i) % WORDS}" for i in range(length))
    for length in [*range(1, MAX_LENGTH - 1), 5, 5, 9]
]
"""One text of every length that fits, and some lengths again."""


def tiny_model(folder: Path, kind: str, pooling: str) -> Path:
    """A model folder with random weights that sentence-transformers opens too; special tokens are of ids 0 to 3."""
    special = (
        ["[PAD]", "<s>", "</s>", "<unk>"] if kind in ("bert", "qwen3") else ["<s>", "[PAD]", "</s>", "<unk>"]
    )
    tokenizer = Tokenizer(
        WordLevel({word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(WORDS))])}, "<unk>")
    )
    tokenizer.pre_tokenizer = Whitespace()
    around = [(word, special.index(word)) for word in ("<s>", "</s>")]
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    name, settings = KINDS[kind]
    ids = {"pad_token_id": special.index("[PAD]"), "bos_token_id": special.index("<s>"), "eos_token_id": 2}
    torch.manual_seed(7)
    # Weights far larger than at the start of training: small ones would leave attention all but uniform.
    config = getattr(transformers, name).config_class(**settings, **ids, initializer_range=0.3)
    network = getattr(transformers, name)(config)
    network.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="<unk>", model_max_length=MAX_LENGTH
    ).save_pretrained(folder)
    modules = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ],
        "sentence_bert_config.json": {"max_seq_length": MAX_LENGTH, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": 32,
            "pooling_mode_mean_tokens": pooling == "mean",
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_lasttoken": pooling == "lasttoken",
        },
    }
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for path, content in modules.items():
        (folder / path).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """A tiny model of every architecture, each with another pooling where there is a choice."""
    pooling = {"bert": "mean", "xlm-roberta": "cls", "mpnet": "mean", "qwen3": "lasttoken"}
    folder = tmp_path_factory.mktemp("models")
    return {kind: open_model(tiny_model(folder / kind, kind, how)) for kind, how in pooling.items()}


def vectors_of(engine: Engine, tokens: Tokens, budget: int) -> Floats:
    """The rows' vectors in their order, batched by the budget."""
    batches = cut_by_budget(tokens.lengths, budget, packed=True)
    order = []
    found: dict[int, Floats] = {}

    def take(number: int, vectors: Floats) -> None:
        order.append(number)
        found[number] = vectors.copy()

    engine.encode((tokens.take(batch) for batch in batches), take)
    assert order == list(range(len(batches)))
    vectors = np.empty((len(tokens.lengths), found[0].shape[1]), np.float32)
    for number, batch in enumerate(batches):
        vectors[batch] = found[number]
    return vectors


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_sentence_transformers_at_every_length(
    models: dict[str, Model], kind: str
) -> None:
    model = models[kind]
    tokens = Tokeniser(model).tokenise(TEXTS).tokens
    assert set(range(3, MAX_LENGTH + 1)) == set(tokens.lengths.tolist())
    reference = sentence_transformers.SentenceTransformer(str(model.folder), device="cpu").encode(TEXTS)

    engine = TorchEngine(model, device="cpu")
    together = vectors_of(engine, tokens, 10**6)

    assert (engine.name, engine.device, engine.precision, engine.packed) == ("torch", "cpu", "f32", True)
    assert worst_cosine(together, reference) >= 0.99999
    assert worst_cosine(vectors_of(engine, tokens, 100), together) >= 0.999999
    assert worst_cosine(vectors_of(engine, tokens, 1), together) >= 0.999999
    shuffled = np.random.default_rng(1).permutation(len(TEXTS))
    unsorted: list[Floats] = []
    engine.encode([tokens.take(shuffled)], lambda _number, vectors: unsorted.append(vectors))
    assert worst_cosine(unsorted[0], together[shuffled]) >= 0.999999


def test_rows_of_one_token_and_a_padding_id_in_the_text_are_no_exceptions(models: dict[str, Model]) -> None:
    for kind, model in models.items():
        network = getattr(transformers, KINDS[kind][0]).from_pretrained(model.folder).eval()
        ids = np.array([9, 4, model.padding_id, 5, 6], np.int32)
        tokens = Tokens(ids, np.array([1, 4], np.int32))
        expected = []
        for row in (ids[:1], ids[1:]):
            whole = {"input_ids": torch.tensor(row[None].astype(np.int64))}
            with torch.no_grad():
                states = network(**whole, attention_mask=torch.ones_like(whole["input_ids"]))[0][0].numpy()
            expected.append(
                {"mean": states.mean(0), "cls": states[0], "lasttoken": states[-1]}[model.pooling]
            )
        found = vectors_of(TorchEngine(model, device="cpu"), tokens, 100)
        assert worst_cosine(found, np.stack(expected)) >= 0.99999, kind


def test_a_compiler_that_fails_is_said_and_left_out(models: dict[str, Model]) -> None:
    def backend(_graph: Any, _inputs: Any) -> Any:
        raise NotImplementedError("no such instruction")

    said: list[str] = []
    torch._dynamo.reset()
    model = models["bert"]
    engine = TorchEngine(model, device="cpu", compiler=backend, say=said.append)
    tokens = Tokeniser(model).tokenise(TEXTS).tokens

    assert (
        worst_cosine(
            vectors_of(engine, tokens, 500), vectors_of(TorchEngine(model, device="cpu"), tokens, 500)
        )
        > 0.999999
    )
    assert not engine.info["compiled"]
    assert len(said) == 1 and "no such instruction" in said[0] and "without it" in said[0]


@pytest.fixture
def packed_kernel() -> list[tuple[bool, list[int], bool]]:
    """Arithmetic for a CPU behind torch's declaration of the packed kernel, which itself needs CUDA; how it was called."""
    from torch.nn.attention import varlen

    calls: list[tuple[bool, list[int], bool]] = []

    @varlen._varlen_attn.register_kernel("cpu")
    def attend(  # defaults do not reach a kernel
        query: Any,
        key: Any,
        value: Any,
        starts: Any,
        starts_k: Any,
        longest: int,
        _longest_k: int,
        causal: bool = False,
        _scale: float | None = None,
        window: Any = None,
        grouped: bool = False,
    ) -> Any:
        assert starts.dtype == torch.int32 and torch.equal(starts, starts_k)
        assert longest >= int(starts.diff().max()) and int(starts[-1]) == len(query)
        assert grouped or query.shape == key.shape
        calls.append((causal, list(window), grouped))
        runs = torch.tensor([(1, length) for length in starts.diff().tolist()])
        found = torch_forward.run_attention(query, key, value, runs, None, causal)
        return found, query.new_empty(query.shape[1], len(query)), query.new_empty(2, dtype=torch.uint64)

    return calls


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Two CUDA devices that are this CPU: what the engine asks of torch.cuda, and the order it asks in."""
    asked: list[str] = []

    class Stream:
        def __init__(self, name: str = "other") -> None:
            self.name = name

        def wait_stream(self, _other: Stream) -> None:
            asked.append("wait for the copy in")

        def wait_event(self, _event: Event) -> None:
            asked.append("wait for the vectors")

    class Event:
        def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
            self.timed = enable_timing

        def record(self, _stream: Stream) -> None:
            asked.append("timed" if self.timed else "copied out")

        def synchronize(self) -> None:
            assert not self.timed

        def elapsed_time(self, other: Event) -> float:
            assert self.timed and other.timed
            return 7.0

    plain_to, plain_empty = torch.Tensor.to, torch.empty

    def to(tensor: Any, *arguments: Any, **settings: Any) -> Any:
        settings.pop("non_blocking", None)
        kept = [one for one in arguments if not (isinstance(one, str) and one.startswith("cuda"))]
        return plain_to(tensor, *kept, **settings) if kept or settings else tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: plain_empty(*a, **k))
    cuda = {
        "Stream": Stream,
        "Event": Event,
        "current_stream": Stream,
        "stream": lambda _stream: contextlib.nullcontext(),
        "set_device": lambda _name: None,
        "device_count": lambda: 2,
        "get_device_name": lambda _name: "Stand-in",
        "get_device_capability": lambda _name: (9, 0),
        "get_device_properties": lambda _name: SimpleNamespace(total_memory=10**9),
        "max_memory_allocated": lambda _name: 10**8,
        "reset_peak_memory_stats": lambda _name: None,
        "empty_cache": lambda: asked.append("memory given back"),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch_packed, "SMALLEST_TOKENS", 1024)
    monkeypatch.setattr(torch_packed, "LARGEST_TOKENS", 2048)
    return asked


@pytest.mark.parametrize("kind", ["mpnet", "qwen3"])
def test_the_way_over_two_cuda_devices(
    models: dict[str, Model], kind: str, stand_in: list[str], packed_kernel: list[Any]
) -> None:
    """No proof that CUDA takes it: that the steps are there, in order, and give the vectors."""
    torch._dynamo.reset()
    model = models[kind]
    tokens = Tokeniser(model).tokenise(TEXTS).tokens
    plain = vectors_of(TorchEngine(model, device="cpu"), tokens, 10**6)

    graphs: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    engine = TorchEngine(model, device="cuda", compiler=backend)
    found = vectors_of(engine, tokens, 300)
    for budget in (10**6, 100):
        assert worst_cosine(vectors_of(engine, tokens, budget), found) >= 0.9999

    assert (engine.device, engine.precision, engine.streams) == ("cuda (2 x Stand-in)", "bf16", 2)
    assert worst_cosine(found, plain) >= 0.999
    assert engine.info["compiled"] and min(engine.info["busy_s"]) > 0
    assert len(graphs) <= 2 * engine.streams, "every shape of batch goes through one or two graphs a device"
    assert engine.token_budget in (1024, 2048) and engine.info["tuned"]
    again = TorchEngine(model, device="cuda:1", compiler=None)
    assert again.token_budget == engine.token_budget and not again.info["tuned"], "measured once a machine"
    expected = (
        [] if kind == "mpnet" else [(True, [-1, 0], True)]
    )  # MPNet's bias is more than the kernel takes
    assert all(call in packed_kernel for call in expected) and all(call in expected for call in packed_kernel)
    with pytest.raises(EmbedderError, match=r"'cuda:7' is not here \(found: cpu, cuda:0, cuda:1\)"):
        TorchEngine(model, device="cuda:7")


def test_the_steps_of_a_batch_on_cuda(
    models: dict[str, Model], stand_in: list[str], packed_kernel: list[Any]
) -> None:
    engine = TorchEngine(models["bert"], device="cuda:0", compiler=None, token_budget=1000)
    engine.encode([Tokens(np.arange(9, dtype=np.int32), np.array([5, 4], np.int32))], lambda *_: None)
    assert stand_in == ["wait for the copy in", "timed", "timed", "wait for the vectors", "copied out"]
    assert packed_kernel == [(False, [-1, -1], False)] * models["bert"].layers


def test_memory_that_runs_out_halves_the_budget_and_loses_nothing(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two devices in turn, so that batches behind the failed one are in flight."""
    model = models["bert"]
    tokens = Tokeniser(model).tokenise(TEXTS).tokens
    plain = vectors_of(TorchEngine(model, device="cpu"), tokens, 10**6)
    monkeypatch.setattr(torch_packed, "_devices", lambda _device, _limit: ["cpu", "cpu"])
    engine = TorchEngine(model, device="cpu", token_budget=400)
    arranged = torch_forward.arrange
    most = []

    def arrange(model: Model, batch: Tokens, multiple: int) -> Any:
        if len(batch.ids) > 150:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        most.append(len(batch.ids))
        return arranged(model, batch, multiple)

    monkeypatch.setattr(torch_packed, "arrange", arrange)
    encoded = Embedder(model, engine=engine).encode_tokens(tokens)

    assert not encoded.errors and engine.streams == 2
    assert worst_cosine(encoded.vectors, plain) >= 0.999999
    assert engine.token_budget < 400 and max(most) <= 150


def test_an_exception_of_the_batches_comes_out_and_the_engine_goes_on(models: dict[str, Model]) -> None:
    engine = TorchEngine(models["bert"], device="cpu")
    batch = Tokens(np.arange(4, 9, dtype=np.int32), np.array([5], np.int32))

    def batches() -> Iterator[Tokens]:
        for _ in range(5):
            yield batch
        raise KeyError("stopped")

    taken: list[int] = []
    with pytest.raises(KeyError, match="stopped"):
        engine.encode(batches(), lambda number, _vectors: taken.append(number))
    assert taken == [0, 1], "read three batches ahead and no further"
    engine.encode([batch] * 2, lambda number, _vectors: taken.append(number))
    assert taken == [0, 1, 0, 1]


def test_a_token_the_model_does_not_know_costs_its_row_alone(models: dict[str, Model]) -> None:
    model = models["bert"]
    tokens = Tokens(np.array([4, 5, 4, WORDS + 4, 4, 6], np.int32), np.array([2, 2, 2], np.int32))
    encoded = Embedder(model, engine=TorchEngine(model, device="cpu")).encode_tokens(tokens)
    assert encoded.errors.keys() == {1} and "token id 124 is beyond" in encoded.errors[1]
    assert np.abs(encoded.vectors[[0, 2]]).sum(axis=1).min() > 0


def test_the_batch_grows_while_it_pays_and_fits() -> None:
    def tuned(rates: dict[int, tuple[float, float]]) -> tuple[int, list[int]]:
        tried: list[int] = []

        def measure(tokens: int) -> tuple[float, float]:
            tried.append(tokens)
            if tokens not in rates:
                raise torch.OutOfMemoryError
            return rates[tokens]

        return tune(measure, lambda _found: None), tried

    k = 1024
    assert tuned({16 * k: (100, 0.1), 32 * k: (110, 0.1), 64 * k: (113, 0.1)}) == (
        32 * k,
        [16 * k, 32 * k, 64 * k],
    )
    assert tuned({16 * k: (100, 0.3), 32 * k: (200, 0.7)}) == (16 * k, [16 * k, 32 * k])
    assert tuned({16 * k: (100, 0.3)}) == (16 * k, [16 * k, 32 * k])
    assert tuned({}) == (16 * k, [16 * k])
    growing = {2**i * k: (2.0**i, 0.1) for i in range(4, 12)}
    assert tuned(growing)[0] == torch_packed.LARGEST_TOKENS


def test_a_measured_number_is_kept_and_the_first_one_counts(tmp_path: Path) -> None:
    assert torch_packed._kept(tmp_path, "a", lambda: 5) == 5
    assert torch_packed._kept(tmp_path, "a", lambda: 6) == 5
    assert torch_packed._kept(tmp_path, "b", lambda: 7) == 7
    assert torch_packed._kept(None, "a", lambda: 8) == 8

    def slower() -> int:
        return torch_packed._kept(tmp_path, "c", lambda: 1) + 1

    assert torch_packed._kept(tmp_path, "c", slower) == 1
    assert sorted(path.name[:6] for path in tmp_path.iterdir()) == ["batch-"] * 3


def test_weights_that_do_not_fit_the_configuration_are_named(
    models: dict[str, Model], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(models["qwen3"].folder, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.self_attn.q_norm.weight"))
    save_file(weights | {name: torch.ones(3)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(EmbedderError, match=r"layers.1.self_attn.q_norm.weight has shape \(3,\).*\(16,\)"):
        TorchEngine(open_model(tmp_path / "m"), device="cpu")
    save_file({one: weights[one] for one in weights if one != name}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(EmbedderError, match=r"has no tensor layers.1.self_attn.q_norm.weight"):
        TorchEngine(open_model(tmp_path / "m"), device="cpu")


def test_the_benchmark_runs_here(capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--tiny", "--models", "tiny-qwen3"]) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    one = found["models"]["tiny-qwen3"]
    assert found["min_cosine"] >= 0.9999 and one["device"] == "cpu"
    assert one["mfu"] > 0 and 0 <= found["waiting_share"] < 1 and found["ratio_st_best"] > 0
    assert one["tokens"] > one["texts"] and one["tokeniser_tokens_per_s"] > 0


def test_flop_are_counted_as_the_product_of_their_shapes() -> None:
    def count(shape: gpu.Shape, length: int) -> float:
        model = SimpleNamespace(
            architecture=shape.kind,
            hidden=shape.hidden,
            layers=shape.layers,
            heads=shape.heads,
            config={
                "intermediate_size": shape.inner,
                "head_dim": shape.head_size or None,
                "num_key_value_heads": shape.key_heads,
            },
        )
        return gpu.flops(cast(Model, model), np.array([length], np.int32)) / length / 1e6

    # MFLOP a token: 21.2 and 9.2 kFLOP x length for MiniLM, about 175 and 617 at 128, 940 at 512.
    assert count(gpu.SHAPES["minilm"], 128) == pytest.approx(21.23 + 0.009216 * 128, rel=1e-3)
    assert count(gpu.SHAPES["bge-base"], 128) == pytest.approx(175, rel=0.01)
    assert count(gpu.SHAPES["bge-large"], 128) == pytest.approx(617, rel=0.01)
    assert count(gpu.SHAPES["qwen3-0.6b"], 512) == pytest.approx(940, rel=0.01)
