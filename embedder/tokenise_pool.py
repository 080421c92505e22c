"""Tokenising in processes of its own, for machines whose engine outruns one: the same result as `Tokeniser`, sooner.

Texts go out and token ids come back through pipes, in slices, as flat arrays. A machine that embeds 100,000 texts a
second moves some 80 MB through them, a few hundredths of one core, and a killed process leaves no shared memory.

Belongs here: starting, feeding and replacing the processes. Does not belong here: what tokenising is (see `tokens`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from typing import Any

from embedder.machine import usable_cores
from embedder.model import Model
from embedder.protocol import EmbedderError
from embedder.tokens import Tokenised, Tokeniser, joined

SLICE = 1024
"""Texts sent at a time: some ten milliseconds of work. Fewer than two slices are tokenised in this process."""
KEPT_FREE = 2
"""Cores left to what feeds the engine and writes its vectors."""


class TokeniserDied(EmbedderError):
    """Some of the texts may end every process that tokenises them."""


class TokeniserPool:
    """The model's tokenizer in several processes, behind the interface of `Tokeniser`."""

    def __init__(
        self, model: Model, workers: int | None = None, *, say: Callable[[str], None] = lambda _line: None
    ) -> None:
        """`workers` None is every core but two. The processes start with the first work, and end with this one
        however it ends. Raises EmbedderError for a tokenizer that cannot be read."""
        self.workers = workers or max(1, usable_cores() - KEPT_FREE)
        self._model = model
        self._say = say
        self._here = Tokeniser(model)
        self._lock = threading.Lock()
        self._executor: ProcessPoolExecutor | None = None

    def tokenise(self, texts: Sequence[Any], *, prefix: str = "", too_long: str = "truncate") -> Tokenised:
        """See `Tokeniser.tokenise`. Calls from several threads take turns.

        When a process dies, new ones do the work once more. Raises TokeniserDied when one dies again.
        """
        if len(texts) < 2 * SLICE:
            return self._here.tokenise(texts, prefix=prefix, too_long=too_long)
        slices = [texts[start : start + SLICE] for start in range(0, len(texts), SLICE)]
        with self._lock:
            try:
                return self._run(slices, prefix, too_long)
            except BrokenProcessPool:
                self._say("a tokeniser process died; tokenising its texts again in new processes")
            try:
                return self._run(slices, prefix, too_long)
            except BrokenProcessPool as error:
                raise TokeniserDied(
                    f"a tokeniser process died twice over the same {len(texts):,} texts; most likely the machine is "
                    f"out of memory: give it more, or run fewer than {self.workers} processes"
                ) from error

    def close(self) -> None:
        """End the processes."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None

    def __enter__(self) -> TokeniserPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, slices: list[Sequence[Any]], prefix: str, too_long: str) -> Tokenised:
        if self._executor is None:
            # Not forked: a fork of a process with threads and a CUDA context may hang or crash.
            self._executor = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(self._model,),
            )
        try:
            parts = list(self._executor.map(_tokenise, slices, repeat(prefix), repeat(too_long)))
        except BrokenProcessPool:
            self.close()
            raise
        return joined(parts, [len(part) for part in slices])


_tokeniser: Tokeniser | None = None
"""The one of a worker process."""


def _start(model: Model) -> None:
    global _tokeniser
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    end_with_parent()
    _tokeniser = Tokeniser(model)


def end_with_parent() -> None:
    """In a child process: end when the parent does, however it does, and not by a Ctrl-C meant for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker waits on a pipe that its siblings hold open too, so the end of a killed parent does not reach it.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _tokenise(texts: Sequence[Any], prefix: str, too_long: str) -> Tokenised:
    assert _tokeniser is not None
    return _tokeniser.tokenise(texts, prefix=prefix, too_long=too_long)
