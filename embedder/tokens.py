"""From texts to batches of token ids: tokenising, cutting to length, ordering and cutting by a token budget.

Belongs here: everything between a string and the arrays an engine takes.
Does not belong here: reading files, and computing vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from embedder.model import TOKENIZER_FILE, Model
from embedder.protocol import EmbedderError

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Encoding, Tokenizer

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


_CHARACTERS = 4_000_000
"""Tokenised at a time."""


class Tokens(NamedTuple):
    """Rows of token ids, one after the other, special tokens included, without filler."""

    ids: Int32s
    """int32[T], T being the sum of the lengths."""
    lengths: Int32s
    """int32[n], each at least 1."""

    @property
    def offsets(self) -> Int64s:
        """int64[n + 1]: row i is `ids[offsets[i]:offsets[i + 1]]`."""
        offsets = np.zeros(len(self.lengths) + 1, np.int64)
        np.cumsum(self.lengths, out=offsets[1:])
        return offsets

    def take(self, rows: Int64s) -> Tokens:
        """The rows with these numbers, in this order."""
        lengths = self.lengths[rows]
        return Tokens(self.ids[np.repeat(self.offsets[rows], lengths) + steps(lengths)], lengths)


def steps(lengths: Int32s) -> Int64s:
    """0, 1, ... up to each length, one after the other: where in its row each token of `Tokens` stands."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


@dataclass(frozen=True)
class Tokenised:
    """What became of a list of texts; every text is either a row of `tokens` or an error."""

    tokens: Tokens
    """The good texts, in order, cut to the model's length."""
    places: Int64s
    """int64[n]: which text each row of `tokens` is."""
    errors: dict[int, str]
    """Number of a refused text -> why."""
    truncated: int
    """How many texts of `tokens` were cut."""
    truncated_tokens: int
    """How many tokens those lost."""


def joined(parts: Sequence[Tokenised], sizes: Sequence[int]) -> Tokenised:
    """One list of texts that was tokenised in parts, of so many texts each."""
    starts = list(accumulate(sizes, initial=0))[:-1]
    return Tokenised(
        tokens=Tokens(
            np.concatenate([part.tokens.ids for part in parts]),
            np.concatenate([part.tokens.lengths for part in parts]),
        ),
        places=np.concatenate([part.places + start for start, part in zip(starts, parts, strict=True)]),
        errors={
            start + i: why
            for start, part in zip(starts, parts, strict=True)
            for i, why in part.errors.items()
        },
        truncated=sum(part.truncated for part in parts),
        truncated_tokens=sum(part.truncated_tokens for part in parts),
    )


def open_tokenizer(path: Path, *, lower_case: bool = False) -> Tokenizer:
    """A folder's tokenizer.json, with its stored padding and truncation switched off.

    `lower_case` puts texts into lower case first. Raises EmbedderError for a file that is not a tokenizer.
    """
    from tokenizers import Tokenizer, normalizers

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every bad file
        raise EmbedderError(f"{path} is not a tokenizer ({error}); download the model again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if lower_case:
        own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    return tokenizer


class Tokeniser:
    """The model folder's own tokenizer, cutting texts to the model's length."""

    def __init__(self, model: Model) -> None:
        self._tokenizer = open_tokenizer(model.folder / TOKENIZER_FILE, lower_case=model.lower_case)
        self._max_length = model.max_length
        # An engine asked for a row that its table lacks may give anything; on a GPU the whole process ends.
        self._vocabulary = int(model.config.get("vocab_size", np.iinfo(np.int32).max))
        special = self._tokenizer.encode("a").special_tokens_mask
        self._tail = next((i for i, is_special in enumerate(reversed(special)) if not is_special), 0)

    def tokenise(self, texts: Sequence[Any], *, prefix: str = "", too_long: str = "truncate") -> Tokenised:
        """Token ids of texts. What is not a non-empty string is an error of that row alone
        (bytes stand for a string that could not be decoded).

        `too_long` says what becomes of a text above the model's length: 'truncate' cuts its end off and
        counts it, 'refuse' makes it an error.
        """
        # Encodings take a hundred bytes a character, ids two: only a few megabytes of text are encodings at a time.
        sizes = [len(text) if isinstance(text, str) else 0 for text in texts]
        groups = np.cumsum(sizes, dtype=np.int64) // _CHARACTERS
        ends = [*(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(texts)]
        if len(ends) == 1:
            return self._tokenise(texts, prefix, too_long)
        parts, start = [], 0
        for end in ends:
            parts.append(self._tokenise(texts[start:end], prefix, too_long))
            start = end
        return joined(parts, np.diff(ends, prepend=0).tolist())

    def _tokenise(self, texts: Sequence[Any], prefix: str, too_long: str) -> Tokenised:
        errors: dict[int, str] = {}
        places: list[int] = []
        for i, text in enumerate(texts):
            if isinstance(text, bytes):
                errors[i] = "text is not valid UTF-8"
            elif not isinstance(text, str):
                errors[i] = f"text is not a string but {type(text).__name__}"
            elif not text.strip():
                errors[i] = "text is empty"
            else:
                places.append(i)
        found = self._encode([prefix + texts[i] for i in places])
        good: list[Encoding] = []
        kept: list[int] = []
        for i, encoding in zip(places, found, strict=True):
            if isinstance(encoding, str):
                errors[i] = encoding
            elif not len(encoding):
                errors[i] = "text has no tokens"
            elif too_long == "refuse" and len(encoding) > self._max_length:
                errors[i] = f"text has {len(encoding)} tokens, the model takes {self._max_length}"
            else:
                good.append(encoding)
                kept.append(i)
        lengths = np.fromiter(map(len, good), np.int32, len(good))
        ids = np.fromiter(chain.from_iterable(one.ids for one in good), np.int32, int(lengths.sum()))
        lost = np.maximum(lengths - self._max_length, 0)
        tokens = self._cut(Tokens(ids, lengths)) if lost.any() else Tokens(ids, lengths)
        known = np.arange(len(kept))
        if len(tokens.ids) and tokens.ids.max() >= self._vocabulary:
            unknown = np.unique(np.repeat(known, tokens.lengths)[tokens.ids >= self._vocabulary])
            errors |= {kept[i]: "text has a token that the model has no weights for" for i in unknown}
            known = np.setdiff1d(known, unknown)
            tokens, lost = tokens.take(known), lost[known]
        return Tokenised(
            tokens,
            np.array(kept, np.int64)[known],
            errors,
            truncated=int(np.count_nonzero(lost)),
            truncated_tokens=int(lost.sum()),
        )

    def _cut(self, tokens: Tokens) -> Tokens:
        """Rows above the model's length lose the end of their text but keep their last special tokens."""
        place = steps(tokens.lengths)
        tail_starts = np.repeat(tokens.lengths - self._tail, tokens.lengths)
        over = np.repeat(tokens.lengths > self._max_length, tokens.lengths)
        keep = ~over | (place < self._max_length - self._tail) | (place >= tail_starts)
        return Tokens(tokens.ids[keep], np.minimum(tokens.lengths, np.int32(self._max_length)))

    def _encode(self, texts: list[str]) -> list[Encoding | str]:
        try:
            return list(self._tokenizer.encode_batch_fast(texts))
        except BaseException as error:  # of every kind; the next loop finds the texts to blame
            _raise_if_not_its_own(error)
            found: list[Encoding | str] = []
            for text in texts:
                try:
                    found.append(self._tokenizer.encode(text))
                except BaseException as refusal:
                    _raise_if_not_its_own(refusal)
                    found.append(f"tokenizer refused the text: {refusal}")
            return found


def _raise_if_not_its_own(error: BaseException) -> None:
    """The library raises bare Exception, and where its Rust panics something that is not even that."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error


def cut_by_budget(lengths: Int32s, budget: int, packed: bool = False) -> list[Int64s]:
    """Batches of row numbers, every row in exactly one, longest rows first.

    A batch costs at most `budget`: the sum of its lengths when `packed`, else its rows times its longest. A
    single row above the budget is a batch of its own. Equal lengths keep their order, so the batches depend
    on nothing but the lengths.
    """
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths[order], dtype=np.int64)
    batches: list[Int64s] = []
    start = 0
    while start < len(order):
        if packed:
            before = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, before + budget, side="right"))
        else:
            stop = start + budget // max(1, int(lengths[order[start]]))
        stop = max(stop, start + 1)
        batches.append(order[start:stop])
        start = stop
    return batches


def pad(tokens: Tokens, filler: int = 0) -> Int32s:
    """ids int32[n, longest]; engines leave the filler out of everything by the lengths."""
    ids = np.full((len(tokens.lengths), int(tokens.lengths.max())), filler, np.int32)
    ids[np.arange(ids.shape[1]) < tokens.lengths[:, None]] = tokens.ids
    return ids
