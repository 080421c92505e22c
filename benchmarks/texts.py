"""Real text of mixed length that every machine with this project has: the Python manual and the packages' descriptions.

Belongs here: the texts that are embedded in benchmarks. Does not belong here: measuring.
"""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

MEDIAN_WORDS, SIGMA = 48, 0.68
"""Words per text, log-normal: with MiniLM's tokenizer about 20 to 256 tokens, 90 in the mean."""

_RULE = re.compile(r"[-=*~#]{4,}")


def texts(count: int) -> list[str]:
    """The first `count` contiguous pieces, the same on every call; a longer list begins with a shorter one.

    Raises ValueError when there is not so much text here.
    """
    lengths = random.Random(20)
    found: list[str] = []
    piece: list[str] = []
    wanted = _length(lengths)
    for word in _words():
        piece.append(word)
        if len(piece) >= wanted:
            found.append(" ".join(piece))
            if len(found) == count:
                return found
            piece, wanted = [], _length(lengths)
    raise ValueError(
        f"{count:,} texts wanted, but the packages' manuals hold only {len(found):,}; ask for fewer"
    )


def _length(lengths: random.Random) -> int:
    return max(3, round(lengths.lognormvariate(0, SIGMA) * MEDIAN_WORDS))


def _words() -> Iterator[str]:
    for name in sorted(topics.topics):
        yield from _RULE.sub("", topics.topics[name]).split()
    packages = Path(sysconfig.get_paths()["purelib"])
    for path in sorted(packages.glob("*.dist-info/METADATA")):
        _head, _blank, description = path.read_text("utf-8", errors="replace").partition("\n\n")
        yield from _RULE.sub("", re.sub(r"<[^>]+>|https?://\S+", "", description)).split()
