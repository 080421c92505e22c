"""An opened model that turns texts into vectors: tokenizer, engine and canary put together.

Belongs here: the engines' interface, proving an engine, running batches, isolating a row that cannot be encoded.
Does not belong here: files of texts or vectors, shards and resume; which engine there is (see `engines`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from embedder import canary, engines
from embedder.model import Model, open_model
from embedder.protocol import EmbedderError
from embedder.tokens import Int64s, Tokeniser, Tokens, cut_by_budget

Floats = npt.NDArray[np.float32]


class Engine(Protocol):
    """What a back end offers."""

    name: str
    device: str
    """'cpu', or 'cuda (2 x NVIDIA H200)'."""
    precision: str
    """'f32' or 'bf16'."""
    streams: int
    """Batches in the making at one time."""
    token_budget: int
    """What one batch may cost; lowered by the encoder when memory runs out."""
    packed: bool
    """True: a batch costs the sum of its lengths; False: its rows times its longest."""

    def encode(self, batches: Iterable[Tokens], take: Callable[[int, Floats], None]) -> None:
        """Run every batch; `take(i, vectors float32[n, d])` is called for batch i, in order, on this thread.

        The vectors are pooled and not yet scaled to unit length; their array may be reused after `take`.
        `batches` is read lazily, and an exception it or `take` raises comes out once the batches in flight are
        done. Raises RuntimeError or MemoryError when a batch cannot be computed; batches not taken are then
        undone. Calls from several threads take turns.
        """


class EngineBroken(EmbedderError):
    """The engine computes nothing any more, so that nothing it refused is known to be at fault."""


@dataclass(frozen=True)
class Encoded:
    """Vectors of a list of token rows."""

    vectors: Floats
    """float32[n, dimensions]; rows named in `errors` are zero."""
    errors: dict[int, str]
    padded_tokens: int
    """Tokens computed, filler included; equal rows are computed once."""


class Embedder:
    """A model ready to encode. The tokenizer and the engine are opened at their first use."""

    def __init__(
        self,
        model: Model,
        *,
        engine: Engine | str = "auto",
        device: str | None = None,
        precision: str | None = None,
        streams: int | None = None,
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        """`engine` is a name (see `engines`) or an opened one; `device`, `precision` and `streams` None mean the
        fastest this machine has; `say` gets notices for a person."""
        self.model = model
        self._engine = engine
        self._device = device
        self._precision = precision
        self._streams = streams
        self._say = say

    @classmethod
    def open(
        cls,
        folder: Path | None = None,
        *,
        engine: str = "auto",
        device: str | None = None,
        precision: str | None = None,
        streams: int | None = None,
        say: Callable[[str], None] = lambda _line: None,
    ) -> Embedder:
        """Open a model folder, or the installed default. Raises EmbedderError, see `open_model`."""
        return cls(
            open_model(folder), engine=engine, device=device, precision=precision, streams=streams, say=say
        )

    @cached_property
    def tokeniser(self) -> Tokeniser:
        """The folder's tokenizer."""
        return Tokeniser(self.model)

    @cached_property
    def engine(self) -> Engine:
        """The opened engine, proved by the canary."""
        return self._open_checked(self._engine) if isinstance(self._engine, str) else self._engine

    def encode(self, texts: Sequence[str], *, as_query: bool = True) -> Floats:
        """float32[n, dimensions] in the order of the texts; over-long texts lose their end.

        Texts get the model's query prompt, or with `as_query=False` its document prompt.
        Raises EmbedderError naming the first text that cannot be encoded.
        """
        prefix = self.model.query_prefix if as_query else self.model.prefix
        tokenised = self.tokeniser.tokenise(texts, prefix=prefix)
        errors = tokenised.errors
        if not errors:
            encoded = self.encode_tokens(tokenised.tokens)
            errors = encoded.errors
        if errors:
            first = min(errors)
            raise EmbedderError(
                f"text {first} of {len(texts)} cannot be encoded: {errors[first]}; leave it out"
            )
        return encoded.vectors

    def encode_tokens(
        self, tokens: Tokens, *, on_batch: Callable[[int], None] = lambda _tokens: None
    ) -> Encoded:
        """Vectors of token rows, in their order, scaled to unit length where the model asks for it.

        Equal rows are computed once. `on_batch(real tokens)` is called on this thread after each batch, every
        row counted once; what it raises stops the encoding. A batch that fails is split until the failing
        rows stand alone; they become errors. Where memory runs out, the engine's budget is halved and kept low.
        Raises EngineBroken when the engine refuses a text that it is known to take as well.
        """
        first, copies = _distinct(tokens)
        distinct = tokens if len(first) == len(copies) else tokens.take(first)
        encoding = _Encoding(self.engine, distinct, self.model.dimensions, on_batch, self._prove)
        encoding.run()
        vectors, errors = encoding.vectors, encoding.errors
        if distinct is not tokens:
            vectors = vectors[copies]
            errors = {i: errors[row] for i, row in enumerate(copies.tolist()) if row in errors}
            on_batch(len(tokens.ids) - len(distinct.ids))
        for i in np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist():
            errors[i] = "the engine gave a vector that is not finite"
            vectors[i] = 0
        if self.model.normalize:
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors /= np.maximum(norms, 1e-12)
        return Encoded(vectors, errors, encoding.padded_tokens)

    def _open_checked(self, wanted: str) -> Engine:
        """The engine, once its vectors of the canary texts are right: as stored, or as it gives in float32."""
        name, device = engines.choose(self.model, wanted, self._device, self._say)

        def opened(precision: str | None) -> Engine:
            return engines.open_engine(
                self.model,
                name,
                device=device,
                precision=precision,
                streams=self._streams,
                say=self._say,
            )

        engine = opened(self._precision)
        reference = canary.stored_vectors(self.model)
        exact = engine
        if reference is None:
            try:
                exact = engine if engine.precision == engines.F32 else opened(engines.F32)
                reference = self._canary_vectors(exact)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._say(
                    f"{engine.precision} vectors are not checked: the model does not fit in {engines.F32}"
                )
                return engine
        cosine = canary.worst_cosine(self._canary_vectors(engine), reference)
        if cosine < canary.MIN_COSINE and engine.precision != engines.F32:
            self._say(
                f"{engine.precision} vectors differ from float32 ones (worst cosine {cosine:.5f}, needed "
                f"{canary.MIN_COSINE}); using {engines.F32}"
            )
            engine = exact if exact is not engine else opened(engines.F32)
            cosine = canary.worst_cosine(self._canary_vectors(engine), reference)
        if cosine < canary.MIN_COSINE:
            raise EmbedderError(
                f"{self.model.folder}: the vectors of the canary texts are wrong on this machine (worst cosine "
                f"{cosine:.5f}, needed {canary.MIN_COSINE}); nothing was written; reinstall {name} at the pinned "
                "version, or run on another machine"
            )
        return engine

    def _prove(self) -> None:
        known = self.tokeniser.tokenise(canary.TEXTS[:1]).tokens
        try:
            self.engine.encode([known], lambda _number, _vectors: None)
        except (RuntimeError, MemoryError) as error:
            raise EngineBroken(
                f"the engine computes nothing any more, also of a text it is known to take ({error}); nothing wrong was "
                "written; look for what broke it (a driver, a GPU), then run the same command again"
            ) from error

    def _canary_vectors(self, engine: Engine) -> Floats:
        tokens = self.tokeniser.tokenise(canary.TEXTS).tokens
        encoding = _Encoding(engine, tokens, self.model.dimensions, lambda _tokens: None, lambda: None)
        encoding.run()
        for row, error in encoding.errors.items():
            self._say(f"canary text {row}: {error}")
            encoding.vectors[row] = np.nan
        return encoding.vectors


class _Encoding:
    """One list of token rows on its way through an engine."""

    def __init__(
        self,
        engine: Engine,
        tokens: Tokens,
        dimensions: int,
        on_batch: Callable[[int], None],
        prove: Callable[[], None],
    ) -> None:
        """`prove` is called after a row was refused, and raises when that was not the row's fault."""
        self._engine = engine
        self._tokens = tokens
        self._on_batch = on_batch
        self._prove = prove
        self.vectors: Floats = np.zeros((len(tokens.lengths), dimensions), np.float32)
        self.errors: dict[int, str] = {}
        self.padded_tokens = 0

    def run(self) -> None:
        """Fill the vectors, or the errors of the rows the engine refuses even when they stand alone."""
        waiting = self._cut(np.arange(len(self._tokens.lengths)))
        while waiting:
            taken, failure = self._stream(waiting)
            waiting = waiting[taken:]
            if failure is None:
                continue
            # The first batch not taken is the one to suspect; those after it may only have been in its wake.
            suspect, rest = waiting[0], waiting[1:]
            if len(suspect) == 1:
                taken, failure = self._stream([suspect])
                if failure is not None:
                    self._prove()
                    row = int(suspect[0])
                    self.errors[row] = f"the engine refused the text: {failure}".splitlines()[0]
                    self._on_batch(int(self._tokens.lengths[row]))
                waiting = rest
            elif out_of_memory(failure):
                self._engine.token_budget = max(1, self._engine.token_budget // 2)
                waiting = self._cut(np.sort(np.concatenate(waiting)))
            else:
                half = len(suspect) // 2
                waiting = [suspect[:half], suspect[half:], *rest]

    def _stream(self, batches: list[Int64s]) -> tuple[int, Exception | None]:
        """(how many batches have their vectors, what stopped the next one)."""
        taken = 0

        def feed() -> Iterator[Tokens]:
            for batch in batches:
                yield self._tokens.take(batch)

        def take(number: int, found: Floats) -> None:
            nonlocal taken
            batch = batches[number]
            self.vectors[batch] = found
            taken = number + 1
            self.padded_tokens += self._cost(batch)
            self._on_batch(int(self._tokens.lengths[batch].sum()))

        try:
            self._engine.encode(feed(), take)
        except (RuntimeError, MemoryError) as error:
            return taken, error
        return taken, None

    def _cut(self, rows: Int64s) -> list[Int64s]:
        engine = self._engine
        cuts = cut_by_budget(self._tokens.lengths[rows], engine.token_budget, engine.packed)
        return [rows[cut] for cut in cuts]

    def _cost(self, batch: Int64s) -> int:
        lengths = self._tokens.lengths[batch]
        return int(lengths.sum()) if self._engine.packed else len(batch) * int(lengths.max())


def out_of_memory(error: Exception) -> bool:
    """Whether an engine's exception says that memory ran out (torch's is a RuntimeError of its own)."""
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower()


def _distinct(tokens: Tokens) -> tuple[Int64s, Int64s]:
    """(first row of each distinct one, for every row which of those it equals)."""
    data, ends = tokens.ids.tobytes(), (tokens.offsets * tokens.ids.itemsize).tolist()
    seen: dict[bytes, int] = {}
    first: list[int] = []
    copies = np.empty(len(tokens.lengths), np.int64)
    for row in range(len(copies)):
        number = seen.setdefault(data[ends[row] : ends[row + 1]], len(first))
        if number == len(first):
            first.append(row)
        copies[row] = number
    return np.array(first, np.int64), copies
