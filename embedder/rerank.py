"""A cross-encoder: a model that reads a query and a passage together and says how well they match.

Belongs here: opening such a model's folder, pairs of texts to batches, the head, the scores.
Does not belong here: which passages to score, and what becomes of the scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedder.engines.encoder_graph import Encoded, EncoderGraph
from embedder.engines.openvino import OpenVinoEngine
from embedder.model import (
    TOKENIZER_FILE,
    load_weights,
    read_encoder_config,
    read_json,
    read_max_length,
)
from embedder.protocol import EmbedderError
from embedder.tokens import Tokens, cut_by_budget, open_tokenizer, pad

Floats = npt.NDArray[np.float32]


class Reranker:
    """A BERT, XLM-R or MPNet model for sequence classification with one label, on the CPU."""

    def __init__(self, folder: Path, *, precision: str | None = None, streams: int | None = None) -> None:
        """See `open`."""
        config, architecture, capacity = read_encoder_config(folder)
        labels = config.get("id2label")
        count = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
        if count != 1:
            raise EmbedderError(
                f"{folder / 'config.json'} has {count} labels; a cross-encoder for ranking has one, for example "
                "ms-marco-MiniLM-L6-v2; choose such a model"
            )
        stated = read_json(folder / "sentence_bert_config.json", optional=True).get("max_seq_length")
        self._max_length = read_max_length(folder, stated, capacity)
        self._tokenizer = open_tokenizer(folder / TOKENIZER_FILE)
        self._tokenizer.enable_truncation(self._max_length, strategy="longest_first")
        graph = EncoderGraph(folder, config, architecture, load_weights(folder))
        # Only BERT was trained with token types; the others have one type, or none.
        self._has_types = architecture == "bert"
        types = graph.op.parameter([-1, -1], np.int32, name="types") if self._has_types else None
        encoded = graph.encoded(types)
        inputs = [encoded.ids, encoded.lengths, *([] if types is None else [types])]
        self._engine = OpenVinoEngine(
            _head(graph, encoded, architecture), inputs, precision=precision, streams=streams
        )

    @classmethod
    def open(cls, folder: Path, *, precision: str | None = None, streams: int | None = None) -> Reranker:
        """Open a local folder in Hugging Face layout.

        `precision` None is bf16 where the CPU has it, else f32. Raises EmbedderError for a folder that is not
        such a model.
        """
        return cls(folder, precision=precision, streams=streams)

    def scores(self, query: str, passages: Sequence[str]) -> Floats:
        """float32[n]: the model's logit of each passage for the query, higher being better.

        Of a pair above the model's length the longer text loses its end, token by token. Raises EmbedderError
        for a text that the tokenizer refuses.
        """
        if not passages:
            return np.zeros(0, np.float32)
        try:
            pairs = self._tokenizer.encode_batch([(query, passage) for passage in passages])
        except Exception as error:  # the library raises bare Exception for every refused text
            raise EmbedderError(
                f"the tokenizer refused the query or a passage ({error}); leave it out"
            ) from error
        lengths = np.fromiter(map(len, pairs), np.int32, len(pairs))
        ids = Tokens(np.concatenate([np.array(pair.ids, np.int32) for pair in pairs]), lengths)
        types = Tokens(np.concatenate([np.array(pair.type_ids, np.int32) for pair in pairs]), lengths)
        batches = cut_by_budget(lengths, self._engine.token_budget)
        scores: Floats = np.zeros(len(pairs), np.float32)

        def feed() -> Iterator[list[Any]]:
            for batch in batches:
                chosen = ids.take(batch)
                yield [pad(chosen), chosen.lengths, *([pad(types.take(batch))] if self._has_types else [])]

        def take(number: int, found: Floats) -> None:
            scores[batches[number]] = found[:, 0]

        self._engine.run(feed(), take)
        return scores


def _head(graph: EncoderGraph, encoded: Encoded, architecture: str) -> Any:
    """float32[n, 1] from the first token of each row."""
    inner, outer = (
        ("pooler.dense", "classifier")
        if architecture == "bert"
        else ("classifier.dense", "classifier.out_proj")
    )
    first = graph.pooled(encoded, "cls")
    hidden = graph.op.tanh(graph.dense(first, inner, graph.hidden, graph.hidden))
    return graph.dense(hidden, outer, 1, graph.hidden)
