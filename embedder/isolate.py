"""A model in a process of its own, for texts that may end the process they are in.

A library that crashes, or the kernel when memory is short, ends a process without an exception that could be caught.
Here it ends a child; to the caller what the child was doing has failed, as if the engine or the tokenizer had raised,
and the next call starts a new child. So the batch is split until the text stands alone, and the vectors of the others
come out of the same batches as beside a text that is refused. Where the caller ends with its child, as in a container
whose memory is short, a mark in the output folder says what it had asked: the next run takes that for failed.

Belongs here: the child, what travels to and from it, what its end means.
Does not belong here: which texts are suspected (see `shards`), splitting batches (see `encode`).
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np

from embedder import shards
from embedder.encode import Embedder, Floats, out_of_memory
from embedder.failures import ENDED_PROCESS
from embedder.model import Model
from embedder.protocol import EmbedderError
from embedder.tokenise_pool import end_with_parent
from embedder.tokens import Tokenised, Tokeniser, Tokens, joined

_OPENINGS = 2
"""So many children may fail to open the model, which is no text's fault."""

_ITEM, _DONE, _RAISED = "item", "done", "raised"
"""What a child says: an item of its answer, the end of it, or that it raised instead."""


class ChildDied(RuntimeError):
    """The child ended while it worked."""


class IsolatedEmbedder(Embedder):
    """An `Embedder` whose tokenizer and engine work in a child process."""

    def __init__(self, model: Model, open_embedder: Callable[[], Embedder], output: Path) -> None:
        """`open_embedder` opens the same model in the child, so it must be something that can be pickled; `output`
        is the folder of the marks."""
        super().__init__(model)
        self._child = _Child(open_embedder, output)

    @cached_property
    def tokeniser(self) -> Tokeniser:
        """The folder's tokenizer, in the child."""
        return _Tokeniser(self._child)

    @cached_property
    def engine(self) -> _Engine:
        """The engine, in the child."""
        return _Engine(self._child)

    def close(self) -> None:
        """End the child."""
        self._child.close()

    def _prove(self) -> None:
        # A child that refused something is replaced, and the next one proves its engine when it opens it.
        pass


class _Tokeniser(Tokeniser):
    def __init__(self, child: _Child) -> None:
        self._child = child

    def tokenise(self, texts: Sequence[Any], *, prefix: str = "", too_long: str = "truncate") -> Tokenised:
        """See `Tokeniser.tokenise`. A text that ends the child is an error of that row alone."""
        self._child.open("tokeniser")
        try:
            found: Tokenised = self._child.ask("tokenise", list(texts), prefix, too_long)
        except (RuntimeError, MemoryError) as error:
            if len(texts) > 1:
                parts = [self.tokenise([text], prefix=prefix, too_long=too_long) for text in texts]
                return joined(parts, [1] * len(texts))
            none = Tokens(np.zeros(0, np.int32), np.zeros(0, np.int32))
            refused = {0: f"tokenizer refused the text: {error}"}
            return Tokenised(none, np.zeros(0, np.int64), refused, truncated=0, truncated_tokens=0)
        return found


class _Engine:
    """See `embedder.encode.Engine`."""

    def __init__(self, child: _Child) -> None:
        self._child = child
        self._one_by_one = False
        about = child.open("engine")
        self.name: str = about["name"]
        self.device: str = about["device"]
        self.precision: str = about["precision"]
        self.streams: int = about["streams"]
        self.token_budget: int = about["token_budget"]
        self.packed: bool = about["packed"]

    def encode(self, batches: Iterable[Tokens], take: Callable[[int, Floats], None]) -> None:
        """A batch that ends the child raises ChildDied, which is a RuntimeError."""
        waiting = list(batches)
        taken = 0

        def take_next(vectors: Floats) -> None:
            nonlocal taken
            take(taken, vectors)
            taken += 1

        while taken < len(waiting):
            # Of several in the making it is not known which one ended the child.
            sent = waiting[taken : taken + 1] if self._one_by_one else waiting[taken:]
            self._child.open("engine")
            try:
                self._child.ask("encode", sent, take=take_next)
            except ChildDied:
                self._one_by_one = True
                if len(sent) == 1:
                    raise
            except RuntimeError:
                self._child.close()  # what an engine computes after that depends on the engine
                raise
        self._one_by_one = False


class _Child:
    """The process and the pipe to it; both begin with the first question, and anew after the process has ended."""

    def __init__(self, open_embedder: Callable[[], Embedder], output: Path) -> None:
        self._open_embedder = open_embedder
        self._output = output
        self._running: tuple[SpawnProcess, Connection] | None = None
        self._lock = threading.RLock()

    def open(self, what: str) -> Any:
        """Have the child open its "tokeniser" or "engine", what is known of it. Raises EmbedderError when it cannot."""
        for _ in range(_OPENINGS):
            try:
                return self.ask(what)
            except (RuntimeError, MemoryError) as error:
                self.close()
                reason = error
        raise EmbedderError(
            f"the model cannot be opened in a process of its own: {reason}; look for what ends it (memory, a driver), then "
            "run the same command again"
        )

    def ask(self, method: str, *arguments: Any, take: Callable[[Any], None] = lambda _item: None) -> Any:
        """The result of a method of `_Server`; `take` gets the items it gives before that.

        Raises ChildDied, also at once for what a dead run had asked last, or what the method raised: EmbedderError,
        MemoryError or RuntimeError.
        """
        # Opening is about no text, so a run that dies meanwhile must not keep the next one from it.
        mark = self._marked(f"asked-{_digest(method, arguments)}") if arguments else contextlib.nullcontext()
        with self._lock, mark:
            if self._running is None:
                self._running = self._started()
            process, pipe = self._running
            answered = False
            try:
                kind, found = self._exchanged(process, pipe, (method, arguments))
                while kind == _ITEM:
                    take(found)
                    kind, found = self._exchanged(process, pipe)
                answered = True
            finally:
                if not answered:  # the rest of the answer must not be taken for the next one
                    self.close()
            if kind == _RAISED:
                raise found
            return found

    @contextlib.contextmanager
    def _marked(self, name: str) -> Iterator[None]:
        if shards.begun(self._output, name):
            raise ChildDied(f"{ENDED_PROCESS} and the whole job")
        shards.begin(self._output, name, [])
        try:
            yield
        finally:
            shards.ended(self._output, name)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._running is not None:
                process, pipe = self._running
                self._running = None
                pipe.close()
                process.kill()
                process.join()
                process.close()

    def _started(self) -> tuple[SpawnProcess, Connection]:
        # Not forked: a fork of a process with threads and a CUDA context may hang or crash.
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, self._open_embedder), daemon=True)
        process.start()
        there.close()  # so that the pipe ends with the child
        return process, here

    @staticmethod
    def _exchanged(process: SpawnProcess, pipe: Connection, question: Any = None) -> tuple[str, Any]:
        try:
            if question is not None:
                pipe.send(question)
            kind, found = pipe.recv()
        except (EOFError, ConnectionError) as error:
            process.join()
            raise ChildDied(f"{ENDED_PROCESS} ({_ending(process.exitcode or 0)})") from error
        return kind, found


def _digest(method: str, arguments: Sequence[Any]) -> str:
    """The same for the same question in another process, which pickle does not promise."""
    found = hashlib.sha256(method.encode())
    for argument in arguments:
        for one in argument if isinstance(argument, list) else [argument]:
            parts = [part.tobytes() for part in one] if isinstance(one, Tokens) else [repr(one).encode()]
            for part in parts:
                found.update(len(part).to_bytes(8, "big") + part)
    return found.hexdigest()[:32]


def _ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"{name}, which the kernel sends when memory is short" if name == "SIGKILL" else name


def _serve(pipe: Connection, open_embedder: Callable[[], Embedder]) -> None:
    """The child: answer until the pipe ends."""
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a service manager signals the whole group
    with contextlib.suppress(OSError):  # when memory is short, this process is the one to end
        Path("/proc/self/oom_score_adj").write_text("1000")
    server = _Server(open_embedder, lambda item: pipe.send((_ITEM, item)))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            method, arguments = pipe.recv()
            try:
                answer = _DONE, getattr(server, method)(*arguments)
            except Exception as error:
                answer = _RAISED, _portable(error)
            pipe.send(answer)


class _Server:
    """What a child can be asked."""

    def __init__(self, open_embedder: Callable[[], Embedder], give: Callable[[Any], None]) -> None:
        self._open_embedder = open_embedder
        self._give = give

    @cached_property
    def _embedder(self) -> Embedder:
        return self._open_embedder()

    def tokeniser(self) -> None:
        self._embedder.tokeniser  # noqa: B018

    def engine(self) -> dict[str, Any]:
        engine = self._embedder.engine
        names = ("name", "device", "precision", "streams", "token_budget", "packed")
        return {name: getattr(engine, name) for name in names}

    def tokenise(self, texts: Sequence[Any], prefix: str, too_long: str) -> Tokenised:
        return self._embedder.tokeniser.tokenise(texts, prefix=prefix, too_long=too_long)

    def encode(self, batches: list[Tokens]) -> None:
        self._embedder.engine.encode(batches, lambda _number, vectors: self._give(vectors))


def _portable(error: Exception) -> Exception:
    """As a type that the parent knows without the engine's library; whatever a text raises, it is refused."""
    if isinstance(error, EmbedderError):
        return EmbedderError(str(error))
    words = f"{type(error).__name__}: {error}" if not isinstance(error, RuntimeError) else str(error)
    return MemoryError(str(error)) if out_of_memory(error) else RuntimeError(words)
