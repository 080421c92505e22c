"""An opened model that turns texts into vectors: tokenizer, engine and canary put together.

Belongs here: choosing the precision, running batches, isolating a row that cannot be encoded.
Does not belong here: files of texts or vectors, shards and resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from embedder import canary
from embedder.model import Model, load_weights, open_model
from embedder.openvino_engine import BF16, F32, OpenVinoEngine, fast_precision
from embedder.protocol import EmbedderError
from embedder.tokens import TokenIds, Tokeniser, cut_by_budget, pad

Floats = npt.NDArray[np.float32]


class Engine(Protocol):
    """What a back end offers. `encode` is described at `OpenVinoEngine.encode`."""

    name: str
    precision: str
    streams: int
    token_budget: int

    def encode(
        self, batches: Iterable[tuple[TokenIds, TokenIds]], take: Callable[[int, Floats], None]
    ) -> None: ...


@dataclass(frozen=True)
class Encoded:
    """Vectors of a list of token rows."""

    vectors: Floats
    """float32[n, dimensions]; rows named in `errors` are zero."""
    errors: dict[int, str]
    padded_tokens: int
    """Tokens computed, filler included."""


class Embedder:
    """A model ready to encode. The tokenizer and the engine are opened at their first use."""

    def __init__(
        self,
        model: Model,
        *,
        engine: Engine | None = None,
        precision: str | None = None,
        streams: int | None = None,
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        """`engine` replaces the default; `precision` None means the fastest this CPU has; `say` gets notices."""
        self.model = model
        self._engine = engine
        self._precision = precision
        self._streams = streams
        self._say = say

    @classmethod
    def open(
        cls, model_dir: Path | None = None, *, precision: str | None = None, streams: int | None = None
    ) -> Embedder:
        """Open a model folder, or the installed default. Raises EmbedderError, see `open_model`."""
        return cls(open_model(model_dir), precision=precision, streams=streams)

    @cached_property
    def tokeniser(self) -> Tokeniser:
        """The folder's tokenizer."""
        return Tokeniser(self.model)

    @cached_property
    def engine(self) -> Engine:
        """The compiled engine, proved by the canary."""
        return self._engine or self._open_checked_engine()

    def encode(self, texts: Sequence[str], *, as_query: bool = True) -> Floats:
        """float32[n, dimensions] in the order of the texts; over-long texts lose their end.

        Texts get the model's query prompt, or with `as_query=False` its document prompt.
        Raises EmbedderError naming the first text that cannot be encoded.
        """
        prefix = self.model.query_prefix if as_query else self.model.prefix
        tokenised = self.tokeniser.tokenise(texts, prefix=prefix)
        rows = [row for row in tokenised.rows if row is not None]
        errors = dict(tokenised.errors)
        if not errors:
            encoded = self.encode_tokens(rows)
            errors = encoded.errors
        if errors:
            first = min(errors)
            raise EmbedderError(
                f"text {first} of {len(texts)} cannot be encoded: {errors[first]}; leave it out"
            )
        return encoded.vectors

    def encode_tokens(
        self, rows: Sequence[TokenIds], *, on_batch: Callable[[int], None] = lambda _tokens: None
    ) -> Encoded:
        """Vectors of token rows, in their order, scaled to unit length where the model asks for it.

        `on_batch(real tokens)` is called on this thread before each batch; what it raises stops the encoding.
        A batch that fails is split until the failing rows stand alone; they become errors.
        """
        return _encode_rows(self.engine, rows, self.model.dimensions, self.model.normalize, on_batch)

    def _open_checked_engine(self) -> Engine:
        model = self.model
        weights = load_weights(model)
        precision = self._precision or fast_precision()
        engine = OpenVinoEngine(model, weights, precision=precision, streams=self._streams)
        reference = canary.stored_vectors(model)
        if precision == BF16:
            exact = None
            if reference is None:
                exact = OpenVinoEngine(model, weights, precision=F32, streams=self._streams)
                reference = self._canary_vectors(exact)
            cosine = canary.worst_cosine(self._canary_vectors(engine), reference)
            if cosine >= canary.MIN_COSINE:
                return engine
            self._say(
                f"bf16 vectors differ from float32 ones (worst cosine {cosine:.5f}, needed {canary.MIN_COSINE}); "
                "using f32"
            )
            engine = exact or OpenVinoEngine(model, weights, precision=F32, streams=self._streams)
        vectors = self._canary_vectors(engine)
        cosine = canary.worst_cosine(vectors, vectors if reference is None else reference)
        if cosine < canary.MIN_COSINE:
            raise EmbedderError(
                f"{model.folder}: the vectors of the canary texts are wrong on this machine (worst cosine "
                f"{cosine:.5f}, needed {canary.MIN_COSINE}); nothing was written; reinstall openvino at the pinned "
                "version, or run on another machine"
            )
        return engine

    def _canary_vectors(self, engine: Engine) -> Floats:
        rows = [row for row in self.tokeniser.tokenise(canary.TEXTS).rows if row is not None]
        model = self.model
        return _encode_rows(engine, rows, model.dimensions, model.normalize, lambda _tokens: None).vectors


def _encode_rows(
    engine: Engine,
    rows: Sequence[TokenIds],
    dimensions: int,
    normalize: bool,
    on_batch: Callable[[int], None],
) -> Encoded:
    vectors: Floats = np.zeros((len(rows), dimensions), np.float32)
    batches = cut_by_budget(np.array([len(row) for row in rows], np.int64), engine.token_budget)
    done = [False] * len(batches)
    padded = 0

    def feed() -> Iterable[tuple[TokenIds, TokenIds]]:
        nonlocal padded
        for batch in batches:
            ids, lengths = pad([rows[i] for i in batch])
            on_batch(int(lengths.sum()))
            padded += ids.size
            yield ids, lengths

    def take(number: int, found: Floats) -> None:
        vectors[batches[number]] = found
        done[number] = True

    errors: dict[int, str] = {}
    try:
        engine.encode(feed(), take)
    except (RuntimeError, MemoryError):
        for number, batch in enumerate(batches):
            if not done[number]:
                errors |= _encode_apart(engine, rows, batch, vectors)
    for i in np.flatnonzero(~np.isfinite(vectors).all(axis=1)):
        errors[int(i)] = "the engine gave a vector that is not finite"
        vectors[i] = 0
    if normalize:
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors /= np.maximum(norms, 1e-12)
    return Encoded(vectors, errors, padded)


def _encode_apart(
    engine: Engine, rows: Sequence[TokenIds], batch: npt.NDArray[np.int64], vectors: Floats
) -> dict[int, str]:
    """Encode one batch that failed or was never reached, halving it until failing rows stand alone."""

    def take(_number: int, found: Floats) -> None:
        vectors[batch] = found

    try:
        engine.encode([pad([rows[i] for i in batch])], take)
    except (RuntimeError, MemoryError) as error:
        if len(batch) == 1:
            return {int(batch[0]): f"the engine refused the text: {error}".splitlines()[0]}
        half = len(batch) // 2
        return _encode_apart(engine, rows, batch[:half], vectors) | _encode_apart(
            engine, rows, batch[half:], vectors
        )
    return {}
