"""One shard from texts to a file: the same on this machine and on any worker of a cluster.

Belongs here: how texts become vectors (the settings), the steps of one shard, what came of it.
Does not belong here: which shards there are, their order, stopping, counting (see `job`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedder import engines, shards, texts
from embedder.encode import Embedder, Encoded
from embedder.model import Model, open_model
from embedder.protocol import EmbedderError
from embedder.shards import Shard
from embedder.tokens import Tokenised

TOO_LONG = ("truncate", "refuse")

# Sampled texts: so many from each of so many shards.
_SAMPLE_TEXTS, _SAMPLE_SHARDS = 32, 8


OnRead = Callable[[list[str]], None]
"""Told the keys of texts that have been read, before anything else is done with them."""


@dataclass(frozen=True)
class Settings:
    """How texts become vectors; plain values, so that they can be sent to another process."""

    model: Path | None = None
    """A local folder; None is the installed default."""
    engine: str = "auto"
    device: str | None = None
    precision: str | None = None
    streams: int | None = None
    tokeniser_processes: int | None = None
    """0 tokenises in this process; None is that on a CPU, and as many as the machine has cores for on CUDA."""
    too_long: str = "truncate"

    def __post_init__(self) -> None:
        """Raises EmbedderError for an unknown policy."""
        if self.too_long not in TOO_LONG:
            raise EmbedderError(
                f"unknown policy {self.too_long!r} for over-long texts; choose {' or '.join(TOO_LONG)}"
            )

    def device_for(self, model: Model) -> str:
        """'cpu' or 'cuda', without opening anything. Raises EmbedderError for what does not go together."""
        _engine, device = engines.choose(model, self.engine, self.device, lambda _line: None)
        return device

    def open_embedder(
        self, say: Callable[[str], None] = lambda _line: None, *, model: Model | None = None
    ) -> Embedder:
        """The model; tokenizer and engine open at their first use. `model` saves reading the folder again."""
        return Embedder(
            model or open_model(self.model),
            engine=self.engine,
            device=self.device,
            precision=self.precision,
            streams=self.streams,
            say=say,
        )


@dataclass(frozen=True)
class ShardResult:
    """What came of one shard."""

    shard_id: str
    rows: int
    """Texts of the shard."""
    embedded: int
    failures: dict[str, str]
    """Key -> error."""
    tokens: int
    """Embedded, special tokens included, filler not."""
    padded_tokens: int
    """Computed, filler included."""
    truncated: int
    truncated_tokens: int
    unsound: list[str]
    """What is wrong with the vectors, in words."""
    seconds: float
    """Of encoding."""
    engine: str
    device: str
    precision: str
    streams: int


@dataclass(frozen=True)
class Prepared:
    """A shard whose texts are tokens."""

    shard: Shard
    keys: list[str]
    chunk_ids: pa.Array | None
    tokenised: Tokenised


@dataclass(frozen=True)
class Computed:
    """A shard whose tokens are vectors."""

    prepared: Prepared
    encoded: Encoded
    seconds: float


class ShardStage:
    """Makes shards: one object a process. `embed` does all of it; `prepare`, `encode` and `write` are its steps,
    for a runner that overlaps them (each step by one thread at a time).

    The model, the engine and the input are opened at their first use.
    """

    def __init__(
        self,
        input_file: Path,
        output: Path,
        settings: Settings,
        *,
        embedder: Embedder | None = None,
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self._input_file = input_file
        self._output = output
        self._settings = settings
        self._given = embedder
        self._say = say
        self._opened = ExitStack()

    @cached_property
    def embedder(self) -> Embedder:
        """The model."""
        return self._given or self._settings.open_embedder(self._say)

    @cached_property
    def _reader(self) -> texts.TextReader:
        return self._opened.enter_context(texts.TextReader(self._input_file))

    @cached_property
    def _tokenise(self) -> Callable[..., Tokenised]:
        settings, model, wanted = self._settings, self.embedder.model, self._settings.tokeniser_processes
        if wanted == 0 or (wanted is None and settings.device_for(model) == "cpu"):
            tokenise = self.embedder.tokeniser.tokenise
        else:
            from embedder.tokenise_pool import TokeniserPool

            pool = TokeniserPool(model, wanted, say=self._say)
            self._opened.callback(pool.close)
            tokenise = pool.tokenise
        return partial(tokenise, prefix=model.prefix, too_long=settings.too_long)

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        return self.embedder.model.fingerprint()

    def isolated(self) -> ShardStage:
        """The same with the model in a process of its own, which a text may end without ending this one."""
        from embedder.isolate import IsolatedEmbedder

        model, settings = self.embedder.model, replace(self._settings, tokeniser_processes=0)
        embedder = IsolatedEmbedder(model, partial(settings.open_embedder, model=model), self._output)
        stage = ShardStage(self._input_file, self._output, settings, embedder=embedder, say=self._say)
        stage._opened.callback(embedder.close)
        return stage

    def open(self) -> None:
        """Open the engine now, so that its start-up does not count as embedding."""
        self.embedder.engine  # noqa: B018

    def close(self) -> None:
        """Let go of the input and of the tokeniser's processes."""
        self._opened.close()

    def embed(self, shard: Shard) -> ShardResult:
        """Make one shard: read, tokenise, encode, write. A text that cannot be embedded is one of its failures.

        Raises EmbedderError when the input has changed or the output cannot be written.
        """
        return self.write(self.encode(self.prepare(shard)))

    def prepare(self, shard: Shard, on_read: OnRead = lambda _keys: None) -> Prepared:
        """Read and tokenise; `on_read(keys)` is called between the two."""
        found = self._reader.read(shard.rows)
        if shards.shard_id(self._fingerprint, found.keys) != shard.shard_id:
            raise texts.changed(self._input_file)
        on_read(found.keys)
        return Prepared(shard, found.keys, found.chunk_ids, self._tokenise(found.texts))

    def encode(self, prepared: Prepared, on_batch: Callable[[int], None] = lambda _tokens: None) -> Computed:
        """Compute; `on_batch(real tokens)` is called after each batch, and what it raises ends the shard."""
        started = time.perf_counter()
        encoded = self.embedder.encode_tokens(prepared.tokenised.tokens, on_batch=on_batch)
        return Computed(prepared, encoded, time.perf_counter() - started)

    def write(self, computed: Computed) -> ShardResult:
        """Write the file, if any text has a vector."""
        prepared, encoded, engine = computed.prepared, computed.encoded, self.embedder.engine
        keys, tokenised = prepared.keys, prepared.tokenised
        places = tokenised.places
        failed = {keys[i]: error for i, error in tokenised.errors.items()}
        failed |= {keys[places[row]]: error for row, error in encoded.errors.items()}
        vectors = encoded.vectors
        if encoded.errors:
            good = np.setdiff1d(np.arange(len(places)), list(encoded.errors))
            vectors, places = vectors[good], places[good]
        shards.write_shard(
            self._output,
            prepared.shard,
            [keys[i] for i in places],
            vectors,
            failed,
            chunk_ids=None if prepared.chunk_ids is None else prepared.chunk_ids.take(pa.array(places)),
            fingerprint=self._fingerprint,
            engine=engine.name,
            device=engine.device,
            dtype=engine.precision,
        )
        return ShardResult(
            prepared.shard.shard_id,
            rows=len(keys),
            embedded=len(places),
            failures=failed,
            tokens=len(tokenised.tokens.ids),
            padded_tokens=encoded.padded_tokens,
            truncated=tokenised.truncated,
            truncated_tokens=tokenised.truncated_tokens,
            unsound=_unsound(vectors, len(keys) - len(failed), self.embedder.model),
            seconds=computed.seconds,
            engine=engine.name,
            device=engine.device,
            precision=engine.precision,
            streams=engine.streams,
        )

    def sample(self, wanted: Sequence[Shard], on_read: OnRead = lambda _keys: None) -> float:
        """Tokens per text, from a few texts of shards spread over the input; `on_read` as for `prepare`."""
        if not wanted:
            return 0.0
        spread = [wanted[i * len(wanted) // _SAMPLE_SHARDS] for i in range(_SAMPLE_SHARDS)]
        rows = np.unique(np.concatenate([shard.rows[:_SAMPLE_TEXTS] for shard in spread]))
        with texts.TextReader(self._input_file) as reader:
            found = reader.read(rows)
        on_read(found.keys)
        tokenised = self._tokenise(found.texts)
        return len(tokenised.tokens.ids) / len(rows)


def _unsound(vectors: npt.NDArray[np.float32], expected: int, model: Model) -> list[str]:
    found = []
    if vectors.shape != (expected, model.dimensions):
        found.append(f"vectors of shape {vectors.shape}, expected {(expected, model.dimensions)}")
    if not np.isfinite(vectors).all():
        found.append("a vector is not finite")
    norms = np.linalg.norm(vectors, axis=1)
    if model.normalize and len(norms) and np.abs(norms - 1).max() > 1e-3:
        found.append(f"a vector has length {norms[np.abs(norms - 1).argmax()]:.4f} instead of 1")
    return found
