"""From texts to batches of token ids: tokenising, cutting to length, ordering and cutting by a token budget.

Belongs here: everything between a string and the arrays an engine takes.
Does not belong here: reading files, and computing vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedder.model import TOKENIZER_FILE, Model
from embedder.protocol import EmbedderError

if TYPE_CHECKING:
    from tokenizers import Encoding

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Tokenised:
    """Token ids of a list of texts; row i belongs to text i."""

    rows: list[TokenIds | None]
    """Ids with special tokens, cut to the model's length; None where the text was refused."""
    errors: dict[int, str]
    """Why each None is one."""
    truncated: int
    """How many texts lost their end."""


class Tokeniser:
    """The model folder's own tokenizer, with its stored padding and truncation switched off."""

    def __init__(self, model: Model) -> None:
        from tokenizers import Tokenizer

        path = model.folder / TOKENIZER_FILE
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every bad file
            raise EmbedderError(f"{path} is not a tokenizer ({error}); download the model again") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._lower_case = model.lower_case
        self._max_length = model.max_length
        special = self._tokenizer.encode("a").special_tokens_mask
        self._tail = next((i for i, is_special in enumerate(reversed(special)) if not is_special), 0)

    def tokenise(self, texts: Sequence[Any], *, prefix: str = "", too_long: str = "truncate") -> Tokenised:
        """Token ids of texts. What is not a non-empty string is an error of that row alone
        (bytes stand for a string that could not be decoded).

        `too_long` says what becomes of a text above the model's length: 'truncate' cuts its end off and
        counts it, 'refuse' makes it an error.
        """
        rows: list[TokenIds | None] = [None] * len(texts)
        errors: dict[int, str] = {}
        good: list[int] = []
        for i, text in enumerate(texts):
            if isinstance(text, bytes):
                errors[i] = "text is not valid UTF-8"
            elif not isinstance(text, str):
                errors[i] = f"text is not a string but {type(text).__name__}"
            elif not text.strip():
                errors[i] = "text is empty"
            else:
                good.append(i)
        prepared = [prefix + (texts[i].lower() if self._lower_case else texts[i]) for i in good]
        truncated = 0
        for i, encoding in zip(good, self._encode(prepared), strict=True):
            if isinstance(encoding, str):
                errors[i] = encoding
                continue
            ids = np.array(encoding.ids, np.int32)
            if len(ids) == 0:
                errors[i] = "text has no tokens"
            elif len(ids) <= self._max_length:
                rows[i] = ids
            elif too_long == "refuse":
                errors[i] = f"text has {len(ids)} tokens, the model takes {self._max_length}"
            else:
                truncated += 1
                rows[i] = np.concatenate([ids[: self._max_length - self._tail], ids[len(ids) - self._tail :]])
        return Tokenised(rows, errors, truncated)

    def _encode(self, texts: list[str]) -> list[Encoding | str]:
        try:
            return list(self._tokenizer.encode_batch_fast(texts))
        except Exception:  # the library raises bare Exception; the next loop finds the texts to blame
            found: list[Encoding | str] = []
            for text in texts:
                try:
                    found.append(self._tokenizer.encode(text))
                except Exception as error:
                    found.append(f"tokenizer refused the text: {error}")
            return found


def cut_by_budget(lengths: npt.NDArray[np.int64], budget: int) -> list[npt.NDArray[np.int64]]:
    """Batches of row numbers, every row in exactly one, longest rows first.

    A batch of n rows whose longest has m tokens costs n * m, at most `budget`; a single row above the budget
    is a batch of its own. Equal lengths keep their order, so the batches depend on nothing but the lengths.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[npt.NDArray[np.int64]] = []
    start = 0
    while start < len(order):
        rows = max(1, budget // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def pad(rows: Sequence[TokenIds]) -> tuple[TokenIds, TokenIds]:
    """(ids int32[n, longest], lengths int32[n]); the filler is 0, which engines mask out by length."""
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), int(lengths.max())), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids, lengths
