"""The encoders of the BERT family as a graph of OpenVINO's operations, built straight from the weights.

BERT, XLM-R and MPNet are one shape: what differs is the names of tensors, where positions begin, whether
there are token types, and MPNet's bias of attention by distance.

Belongs here: from token ids to a vector of every token, and the operations that pooling and heads are made of.
Does not belong here: compiling and running (see `openvino`), heads (see `embedder.rerank`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from embedder.model import OFFSET_POSITIONS, padding_id
from embedder.protocol import EmbedderError

Floats = npt.NDArray[np.float32]

# Architecture -> the names of query, key, value, output and norm of attention in a layer; the others are shared.
BERT_NAMES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
)
ATTENTION_NAMES = {
    "bert": BERT_NAMES,
    "xlm-roberta": BERT_NAMES,
    "mpnet": (*(f"attention.attn.{part}" for part in "qkvo"), "attention.LayerNorm"),
}

# A checkpoint with a head keeps the encoder's tensors under the name of its type.
PREFIXES = ("bert.", "roberta.", "mpnet.")

# MPNet's code has both fixed, whatever its config says.
DISTANCE_BUCKETS = 32
DISTANCE_MAX = 128


class Encoded(NamedTuple):
    """Nodes of a graph: an encoder's input and output, for n rows of up to m tokens."""

    ids: Any
    """Parameter int32[n, m], filled up with anything."""
    lengths: Any
    """Parameter int32[n]: how many ids of a row are real."""
    mask: Any
    """float32[n, m]: 1 for a real token, else 0."""
    tokens: Any
    """float32[n, m, hidden]; of filler, anything."""


class EncoderGraph:
    """A graph in the making, with the weights of one folder.

    Every method that names a weight raises EmbedderError when it is missing or has another shape than
    config.json says.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], architecture: str, weights: Mapping[str, Floats]
    ) -> None:
        self.op = import_openvino().opset13
        self.hidden = int(config["hidden_size"])
        self._folder = folder
        self._config = config
        self._architecture = architecture
        self._weights = {
            next((name[len(prefix) :] for prefix in PREFIXES if name.startswith(prefix)), name): values
            for name, values in weights.items()
        }

    def encoded(self, types: Any | None = None) -> Encoded:
        """The encoder. `types` is a parameter int32[n, m] of token types; without it all are of type 0."""
        op, hidden = self.op, self.hidden
        heads = int(self._config["num_attention_heads"])
        names = ATTENTION_NAMES[self._architecture]
        ids = op.parameter([-1, -1], np.int32, name="ids")
        lengths = op.parameter([-1], np.int32, name="lengths")
        columns = op.range(
            self.axis(0), op.gather(op.shape_of(ids), self.axis(1), self.axis(0)), self.axis(1), "i64"
        )
        real = op.less(
            op.unsqueeze(op.convert(columns, "i32"), self.axis(0)), op.unsqueeze(lengths, self.axis(1))
        )
        mask = op.convert(real, "f32")

        x = self.norm(self._embedded(ids, columns, types), "embeddings.LayerNorm")
        bias = op.multiply(op.subtract(op.constant(np.float32(1)), mask), op.constant(np.float32(-1e9)))
        bias = op.unsqueeze(bias, self.integers(1, 2))
        if self._architecture == "mpnet":
            bias = op.add(bias, self._distance_bias(columns, heads))

        def per_head(x: Any) -> Any:
            split = op.reshape(x, self.integers(0, 0, heads, hidden // heads), True)
            return op.transpose(split, self.integers(0, 2, 1, 3))

        for number in range(int(self._config["num_hidden_layers"])):
            layer = f"encoder.layer.{number}"
            query, key, value, output, norm = (f"{layer}.{name}" for name in names)
            fused = self.linear(
                x,
                np.concatenate(
                    [self.weight(f"{part}.weight", hidden, hidden) for part in (query, key, value)]
                ),
                np.concatenate([self.weight(f"{part}.bias", hidden) for part in (query, key, value)]),
            )
            parts = op.variadic_split(fused, self.axis(2), self.integers(hidden, hidden, hidden)).outputs()
            attended = op.scaled_dot_product_attention(*(per_head(part) for part in parts), bias)
            merged = op.reshape(
                op.transpose(attended, self.integers(0, 2, 1, 3)), self.integers(0, 0, hidden), True
            )
            x = self.norm(op.add(self.dense(merged, output, hidden, hidden), x), norm)
            inner = op.gelu(self.dense(x, f"{layer}.intermediate.dense", None, hidden), "erf")
            outer = self.dense(inner, f"{layer}.output.dense", hidden, None)
            x = self.norm(op.add(outer, x), f"{layer}.output.LayerNorm")
        return Encoded(ids, lengths, mask, x)

    def weight(self, name: str, *shape: int | None) -> Floats:
        """A tensor by its name in the bare encoder; None in `shape` stands for any size."""
        found = self._weights.get(name)
        if found is None or len(found.shape) != len(shape):
            raise EmbedderError(
                f"{self._folder} has no usable tensor {name}; its weights are not those of the model that "
                "config.json names; download the model again"
            )
        if any(want is not None and want != have for want, have in zip(shape, found.shape, strict=True)):
            raise EmbedderError(
                f"{self._folder}: tensor {name} has shape {found.shape}, config.json asks for {shape}; download the "
                "model again"
            )
        return found

    def dense(self, x: Any, name: str, outputs: int | None, inputs: int | None) -> Any:
        """The linear layer called `name`."""
        matrix = self.weight(f"{name}.weight", outputs, inputs)
        return self.linear(x, matrix, self.weight(f"{name}.bias", matrix.shape[0]))

    def linear(self, x: Any, matrix: Floats, bias: Floats) -> Any:
        """x times the transposed matrix, plus bias."""
        return self.op.add(self.op.matmul(x, self.constant(matrix), False, True), self.constant(bias))

    def norm(self, x: Any, name: str) -> Any:
        """The layer normalisation called `name`."""
        eps = float(self._config.get("layer_norm_eps", 1e-12))
        scaled = self.op.mvn(x, self.integers(-1), True, eps, "inside_sqrt")
        gamma, beta = self.weight(f"{name}.weight", self.hidden), self.weight(f"{name}.bias", self.hidden)
        return self.op.add(self.op.multiply(scaled, self.constant(gamma)), self.constant(beta))

    def pooled(self, encoded: Encoded, how: str) -> Any:
        """float32[n, hidden]: the mean of a row's tokens, its first one ('cls') or its last one ('lasttoken')."""
        op = self.op
        if how == "cls":
            return op.gather(encoded.tokens, self.axis(0), self.axis(1))
        if how == "lasttoken":
            last = op.unsqueeze(op.subtract(encoded.lengths, op.constant(np.int32(1))), self.axis(1))
            return op.squeeze(op.gather(encoded.tokens, last, self.axis(1), 1), self.axis(1))
        total = op.matmul(op.unsqueeze(encoded.mask, self.axis(1)), encoded.tokens, False, False)
        return op.divide(
            op.squeeze(total, self.axis(1)), op.unsqueeze(op.convert(encoded.lengths, "f32"), self.axis(1))
        )

    def constant(self, values: Floats) -> Any:
        """A float32 constant. Weights are not copied: they stay where they are mapped until they are compiled."""
        return self.op.constant(np.ascontiguousarray(values, np.float32))

    def integers(self, *values: int) -> Any:
        """A list of whole numbers, as operations take axes and shapes."""
        return self.op.constant(np.array(values, np.int64))

    def axis(self, value: int) -> Any:
        """One whole number."""
        return self.op.constant(np.int64(value))

    def _embedded(self, ids: Any, columns: Any, types: Any | None) -> Any:
        op = self.op
        words = self.weight("embeddings.word_embeddings.weight", None, self.hidden)
        places = self.weight("embeddings.position_embeddings.weight", None, self.hidden)
        x = op.gather(self.constant(words), ids, self.axis(0))
        if self._architecture != "mpnet":
            kinds = self.weight("embeddings.token_type_embeddings.weight", None, self.hidden)
            if types is None:
                places = places + kinds[0]
            else:
                x = op.add(x, op.gather(self.constant(kinds), types, self.axis(0)))
        positions = columns
        if self._architecture in OFFSET_POSITIONS:
            # Padding that stands in a text as a word of it does not count, as in the reference.
            padding = op.constant(np.int32(padding_id(self._config, self._architecture)))
            counted = op.convert(op.not_equal(ids, padding), "i32")
            positions = op.add(op.multiply(op.cumsum(counted, self.axis(1)), counted), padding)
        return op.add(x, op.gather(self.constant(places), positions, self.axis(0)))

    def _distance_bias(self, columns: Any, heads: int) -> Any:
        """float32[1, heads, m, m]: what MPNet adds to attention from one column to another."""
        op = self.op
        table = self.weight("encoder.relative_attention_bias.weight", None, heads)
        longest = int(self._config["max_position_embeddings"])
        by_distance = table[distance_buckets(np.arange(1 - longest, longest))]
        distance = op.subtract(op.unsqueeze(columns, self.axis(0)), op.unsqueeze(columns, self.axis(1)))
        rows = op.add(distance, self.axis(longest - 1))
        return op.unsqueeze(op.gather(self.constant(by_distance.T), rows, self.axis(1)), self.axis(0))


def distance_buckets(distances: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The row of MPNet's table for each distance (key minus query): exact when small, else by its logarithm."""
    half = DISTANCE_BUCKETS // 2
    exact = half // 2
    size = np.abs(distances)
    scale = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(DISTANCE_MAX / exact)
    )
    far = np.minimum(exact + (scale * np.float32(half - exact)).astype(np.int64), half - 1)
    buckets: npt.NDArray[np.int64] = np.where(size < exact, size, far) + half * (distances > 0)
    return buckets


def import_openvino() -> Any:
    """The openvino package, loaded so that nothing in this process can send usage data."""
    # OpenVINO's package imports its conversion tools, and those a telemetry client that sends usage data
    # unless it cannot be imported, in which case they fall back to a stub.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino
