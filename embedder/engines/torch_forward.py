"""Forward passes over packed tokens in torch: BERT, XLM-R and MPNet encoders, the Qwen3 decoder, and pooling.

All rows of a batch stand one after the other in [tokens, ...] tensors; there is no filler and no mask. Only
attention knows where a row ends. Weights go from the safetensors file straight to the device. Matrix products run
in the weights' precision; norms, the decoder's residual stream and pooling in float32.

Belongs here: reading weights, the arithmetic. Does not belong here: devices, copies, compiling, batches (see
`torch_packed`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from embedder.engines.encoder_graph import DISTANCE_BUCKETS, distance_buckets
from embedder.model import Model, weight_files
from embedder.protocol import EmbedderError
from embedder.tokens import Int32s, Int64s, Tokens, steps

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Forward = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
    """(ids, positions, starts, runs, longest) of `Layout` -> hidden states [tokens, hidden]."""
    Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]

_PREFIXES = ("", "bert.", "roberta.", "mpnet.", "model.")
_ENCODER_PARTS = {
    "bert": ("attention.self.{}", "attention.output.dense", "attention.output.LayerNorm"),
    "mpnet": ("attention.attn.{}", "attention.attn.o", "attention.LayerNorm"),
}
_QUERY_KEY_VALUE = {"bert": ("query", "key", "value"), "mpnet": ("q", "k", "v")}


class Layout(NamedTuple):
    """A packed batch as arrays. Rows beyond `rows` are filler and pooled into nothing."""

    ids: Int32s
    """int32[T]."""
    positions: Int32s
    """int32[T], as the model numbers them."""
    starts: Int32s
    """int32[n + 1]: row i is ids[starts[i]:starts[i + 1]]."""
    runs: Int64s
    """int64[r, 2]: (rows, length) of each stretch of rows with one length, and (0, 0) at the end."""
    longest: int
    """No row has more tokens. Rounded up to a power of two, so that few values are seen."""
    rows: int


def arrange(model: Model, batch: Tokens, multiple: int) -> Layout:
    """The batch with filler up to a multiple of this many tokens, cut into rows no longer than the batch's own."""
    lengths = batch.lengths
    ids = batch.ids
    filler = -len(ids) % multiple
    if filler:
        whole, rest = divmod(filler, int(lengths.max()))
        extra = [int(lengths.max())] * whole + ([rest] if rest else [])
        lengths = np.concatenate([lengths, np.array(extra, np.int32)])
        ids = np.concatenate([ids, np.zeros(filler, np.int32)])
    starts = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    changes = np.flatnonzero(np.diff(lengths, prepend=-1))
    counts = np.diff(changes, append=len(lengths))
    runs = np.stack([np.append(counts, 0), np.append(lengths[changes], 0)], axis=1).astype(np.int64)
    longest = 1 << (int(lengths.max()) - 1).bit_length()
    return Layout(ids, _positions(model, ids, lengths, starts), starts, runs, longest, len(batch.lengths))


def _positions(model: Model, ids: Int32s, lengths: Int32s, starts: Int32s) -> Int32s:
    if model.architecture in ("bert", "qwen3"):
        return steps(lengths).astype(np.int32)
    # These count from behind the padding id, and do not count a padding id that stands in the text.
    real = ids != model.padding_id
    seen = np.cumsum(real)
    before = np.where(starts[:-1] > 0, seen[starts[:-1] - 1], 0)
    positions: Int32s = ((seen - np.repeat(before, lengths)) * real + model.padding_id).astype(np.int32)
    return positions


def build(model: Model, *, device: str, precision: torch.dtype) -> Forward:
    """The model's forward pass with its weights on `device`.

    Raises EmbedderError when a weight is missing or has another shape than config.json says.
    """
    from safetensors import SafetensorError, safe_open

    paths = weight_files(model.folder)
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
            weights = _Weights(model, files, device, precision)
            return _decoder(model, weights) if model.architecture == "qwen3" else _encoder(model, weights)
    except (SafetensorError, FileNotFoundError) as error:
        raise EmbedderError(
            f"{', '.join(map(str, paths))} cannot be read as safetensors ({error}); download the model again"
        ) from error


def pool(hidden: Tensor, starts: Tensor, rows: int, how: str) -> Tensor:
    """float32[rows, hidden] from [tokens, hidden]. Sums are taken in one order, so that equal input gives equal bits."""
    import torch

    if how == "cls":
        return hidden[starts[:rows]].float()
    if how == "lasttoken":
        return hidden[starts[1 : rows + 1] - 1].float()
    # The kernel looks at the whole of its input, filler included; the filler's rows are dropped afterwards.
    lengths = (starts[1:] - starts[:-1]).long()
    return torch.segment_reduce(hidden.float(), "mean", lengths=lengths, axis=0, unsafe=True)[:rows]


def _encoder(model: Model, weights: _Weights) -> Forward:
    from torch.nn import functional

    kind = "mpnet" if model.architecture == "mpnet" else "bert"
    parts, output, norm = _ENCODER_PARTS[kind]
    hidden, heads = model.hidden, model.heads

    words = weights.matrix("embeddings.word_embeddings.weight", None, hidden)
    places = weights.floats("embeddings.position_embeddings.weight", None, hidden)
    if kind == "bert":  # all tokens are of type 0
        places = places + weights.floats("embeddings.token_type_embeddings.weight", None, hidden)[0]
    first_norm = weights.norm("embeddings.LayerNorm")
    layers = []
    for number in range(model.layers):
        name = f"encoder.layer.{number}"
        asks = [f"{name}.{parts.format(part)}" for part in _QUERY_KEY_VALUE[kind]]
        layers.append(
            (
                *weights.linear(asks, hidden, hidden),
                *weights.linear([f"{name}.{output}"], hidden, hidden),
                weights.norm(f"{name}.{norm}"),
                *weights.linear([f"{name}.intermediate.dense"], None, hidden),
                *weights.linear([f"{name}.output.dense"], hidden, None),
                weights.norm(f"{name}.output.LayerNorm"),
            )
        )
    bias = _relative_bias(model, weights) if kind == "mpnet" else None
    attend = _attention(weights, heads, heads, causal=False, bias=bias)
    precision, eps = weights.precision, model.layer_norm_eps

    def normed(x: Tensor, scale_shift: tuple[Tensor, Tensor]) -> Tensor:
        return functional.layer_norm(x, (hidden,), *scale_shift, eps).to(precision)

    def forward(ids: Tensor, positions: Tensor, starts: Tensor, runs: Tensor, longest: int) -> Tensor:
        x = functional.embedding(ids, words).float() + functional.embedding(positions, places)
        x = normed(x, first_norm)
        for ask, ask_bias, out, out_bias, norm1, up, up_bias, down, down_bias, norm2 in layers:
            asked = functional.linear(x, ask, ask_bias).view(-1, 3, heads, hidden // heads)
            query, key, value = asked.unbind(1)
            mixed = attend(query, key, value, starts, runs, longest).reshape(-1, hidden)
            x = normed(functional.linear(mixed, out, out_bias).float() + x.float(), norm1)
            inner = functional.gelu(functional.linear(x, up, up_bias))
            x = normed(functional.linear(inner, down, down_bias).float() + x.float(), norm2)
        return x

    return forward


def _decoder(model: Model, weights: _Weights) -> Forward:
    import torch
    from torch.nn import functional

    config, hidden, heads = model.config, model.hidden, model.heads
    key_heads = int(config.get("num_key_value_heads") or heads)
    size = int(config.get("head_dim") or hidden // heads)
    eps = float(config.get("rms_norm_eps", 1e-6))
    precision = weights.precision

    words = weights.matrix("embed_tokens.weight", None, hidden)
    cosines, sines = _rotation(model, size, words.device)
    layers = []
    for number in range(model.layers):
        name = f"layers.{number}"
        asks = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
        layers.append(
            (
                weights.floats(f"{name}.input_layernorm.weight", hidden),
                *weights.linear(asks, None, hidden, bias=False),
                weights.floats(f"{name}.self_attn.q_norm.weight", size),
                weights.floats(f"{name}.self_attn.k_norm.weight", size),
                *weights.linear([f"{name}.self_attn.o_proj"], hidden, heads * size, bias=False),
                weights.floats(f"{name}.post_attention_layernorm.weight", hidden),
                weights.linear([f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"], None, hidden, bias=False)[0],
                weights.linear([f"{name}.mlp.down_proj"], hidden, None, bias=False)[0],
            )
        )
    last_norm = weights.floats("norm.weight", hidden)
    attend = _attention(weights, heads, key_heads, causal=True, bias=None)

    def normed(x: Tensor, scale: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale

    def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return torch.cat([left * cosine - right * sine, right * cosine + left * sine], -1).to(precision)

    def forward(ids: Tensor, positions: Tensor, starts: Tensor, runs: Tensor, longest: int) -> Tensor:
        cosine = functional.embedding(positions, cosines).unsqueeze(1)
        sine = functional.embedding(positions, sines).unsqueeze(1)
        # In float32, for dozens of layers add to it and nothing normalises it on the way.
        x = functional.embedding(ids, words).float()
        for norm1, ask, ask_bias, query_norm, key_norm, out, out_bias, norm2, gate_up, down in layers:
            asked = functional.linear(normed(x, norm1).to(precision), ask, ask_bias)
            asked = asked.view(-1, heads + 2 * key_heads, size)
            query, key, value = torch.split(asked, [heads, key_heads, key_heads], 1)
            query = rotated(normed(query, query_norm), cosine, sine)
            key = rotated(normed(key, key_norm), cosine, sine)
            mixed = attend(query, key, value, starts, runs, longest).reshape(-1, heads * size)
            x = x + functional.linear(mixed, out, out_bias).float()
            gate, up = functional.linear(normed(x, norm2).to(precision), gate_up).chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * up, down).float()
        return normed(x, last_norm)

    return forward


def _rotation(model: Model, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cosines, sines), each float32[max_length, size / 2], by position."""
    import torch

    # Newer configurations keep the settings together, older ones the base at the top.
    settings = model.config.get("rope_parameters") or model.config.get("rope_scaling") or {}
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind != "default":
        raise EmbedderError(
            f"{model.folder / 'config.json'}: rotary positions of the type {kind!r} are not supported, only "
            "'default'; choose the engine sentence-transformers"
        )
    base = float(settings.get("rope_theta") or model.config.get("rope_theta") or 10_000.0)
    rates = base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(model.max_length, dtype=torch.float64)[:, None] * rates
    return angles.cos().float().to(device), angles.sin().float().to(device)


def _relative_bias(model: Model, weights: _Weights) -> Tensor:
    """[heads, max_length, max_length]: what MPNet adds to a query's score of a key, by their distance."""
    import torch

    table = weights.floats("encoder.relative_attention_bias.weight", DISTANCE_BUCKETS, model.heads)
    place = np.arange(model.max_length)
    buckets = torch.from_numpy(distance_buckets(place - place[:, None]))
    return table[buckets.to(table.device)].permute(2, 0, 1).to(weights.precision).contiguous()


def _attention(weights: _Weights, heads: int, key_heads: int, *, causal: bool, bias: Tensor | None) -> Attend:
    import torch

    if weights.device.startswith("cuda") and weights.precision is torch.bfloat16 and bias is None:
        return _flash_attention(heads, key_heads, causal)
    operation = _run_operation()

    def attend(
        query: Tensor, key: Tensor, value: Tensor, _starts: Tensor, runs: Tensor, _longest: int
    ) -> Tensor:
        # Called as an operation, it costs the import of torch's compiler: seconds, where nothing is compiled.
        call = operation if torch.compiler.is_compiling() else run_attention
        found: Tensor = call(query, key, value, runs, bias, causal)
        return found

    return attend


def _flash_attention(heads: int, key_heads: int, causal: bool) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.10 and 2.11, which many GPU images hold, call these otherwise or take fewer heads without a word.
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if causal:
        options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if key_heads != heads and "enable_gqa" in known:
        options["enable_gqa"] = True

    def attend(
        query: Tensor, key: Tensor, value: Tensor, starts: Tensor, _runs: Tensor, longest: int
    ) -> Tensor:
        found = varlen_attn(query, key, value, starts, starts, longest, longest, **options)
        return cast("Tensor", found)

    return attend


def run_attention(
    query: Tensor, key: Tensor, value: Tensor, runs: Tensor, bias: Tensor | None, causal: bool
) -> Tensor:
    """Attention over stretches of rows with one length, each stretch at once: no filler and no mask.

    Batches are sorted by length, so the stretches are few. It serves where there is no packed kernel: on a CPU, in
    float32, and with MPNet's bias.
    """
    import torch
    from torch.nn import functional

    found = torch.empty_like(query, memory_format=torch.contiguous_format)
    start = 0
    for rows, length in runs.tolist():
        stop = start + rows * length
        if stop == start:
            continue
        split = [x[start:stop].view(rows, length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value)]
        mixed = functional.scaled_dot_product_attention(
            split[0],
            split[1],
            split[2],
            attn_mask=None if bias is None else bias[:, :length, :length],
            is_causal=causal,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        found[start:stop] = mixed.transpose(1, 2).flatten(0, 1)
        start = stop
    return found


@functools.cache
def _run_operation() -> Any:
    """`run_attention` as one operation for torch.compile, which cannot look into its loop."""
    import torch

    operation = torch.library.custom_op(
        "datamoat::run_attention",
        run_attention,
        mutates_args=(),
        schema="(Tensor query, Tensor key, Tensor value, Tensor runs, Tensor? bias, bool causal) -> Tensor",
    )
    operation.register_fake(
        lambda query, _key, _value, _runs, _bias, _causal: torch.empty_like(
            query, memory_format=torch.contiguous_format
        )
    )
    return operation


class _Weights:
    """Tensors of open safetensors files, checked, in the precision and on the device they are used in."""

    def __init__(self, model: Model, files: list[Any], device: str, precision: torch.dtype) -> None:
        self.device = device
        self.precision = precision
        self._folder = model.folder
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)
        first = (
            "embed_tokens.weight" if model.architecture == "qwen3" else "embeddings.word_embeddings.weight"
        )
        self._prefix = next((prefix for prefix in _PREFIXES if prefix + first in self._files), "")

    def floats(self, name: str, *shape: int | None) -> Tensor:
        """A tensor in float32."""
        import torch

        return self._read(name, *shape).to(self.device, torch.float32)

    def matrix(self, name: str, *shape: int | None) -> Tensor:
        """A tensor in the precision of the matrix products."""
        return self._read(name, *shape).to(self.device, self.precision)

    def norm(self, name: str) -> tuple[Tensor, Tensor]:
        """(scale, shift) of a layer norm."""
        return self.floats(f"{name}.weight", None), self.floats(f"{name}.bias", None)

    def linear(
        self, names: list[str], outputs: int | None, inputs: int | None, *, bias: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """(matrix, bias) of several linear layers of one input as one. A bias that is not demanded may be absent."""
        import torch

        matrix = torch.cat([self.matrix(f"{name}.weight", outputs, inputs) for name in names])
        if not bias and self._prefix + f"{names[0]}.bias" not in self._files:
            return matrix, None
        return matrix, torch.cat([self.matrix(f"{name}.bias", None) for name in names])

    def _read(self, name: str, *shape: int | None) -> Tensor:
        if self._prefix + name not in self._files:
            raise EmbedderError(
                f"{self._folder}: the safetensors file has no tensor {name}; it does not hold the model that config.json describes; "
                "download the model again"
            )
        found: Tensor = self._files[self._prefix + name].get_tensor(self._prefix + name)
        if len(found.shape) != len(shape) or any(
            want is not None and want != have for want, have in zip(shape, found.shape, strict=True)
        ):
            raise EmbedderError(
                f"{self._folder}: the safetensors file's tensor {name} has shape {tuple(found.shape)}, config.json asks for {shape}; "
                "download the model again"
            )
        return found
