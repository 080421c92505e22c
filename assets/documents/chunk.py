"""Text is cut into chunks: pieces that an embedding model reads whole, with offsets back into the document.

Belongs here: where to cut, which headings stand above a chunk, what of both a model reads, and how chunks are named.
Does not belong here: what a model makes of it (embedder), the database (corpus).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from semantic_text_splitter import MarkdownSplitter

# MiniLM reads 256 tokens and cuts off the rest: a chunk and the headings above it are to be fewer, as we count them.
# Up to so many are kept for the headings of a document that has any.
_MAX_PIECES = 240
_ROOM_ABOVE = 40
_MAX_TITLE = 200
# A chunk is full somewhere between 400 and 1,000 characters. Where those characters are likely to be more tokens than
# there is room for (tables, code, links, scripts without spaces), the chunk is cut again, smaller.
_CAPACITIES = ((400, 1000), (250, 500), (100, 250))
# Calibrated against a WordPiece vocabulary of 30,522 entries: words cost a token per six letters or fewer,
# numbers one per two digits, anything else one per character.
_PIECE = re.compile(r"[A-Za-z]{1,6}|[0-9]{1,2}|[^\sA-Za-z0-9]")

CHUNKER = "markdown-400-1000-240-40-2+semantic-text-splitter/0.33.1"
"""Names how text is cut; a change of it means that every document is cut anew."""

# The splitter's time grows with the square of a line's length where the line has no sentences.
_MAX_LINE = 50_000
_LONG_LINE = re.compile(rf"[^\n]{{{_MAX_LINE}}}")

_BETWEEN = " > "
_FENCE = re.compile(r"[ ]{0,3}(`{3,}|~{3,})")
_ATX = re.compile(r"[ ]{0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
_SETEXT = re.compile(r"[ ]{0,3}(=+|-+)[ \t]*$")


@dataclass(frozen=True)
class Chunk:
    """A piece of a document.

    Attributes:
        ordinal: 0 for the first chunk of the document.
        start_char: Offset of its first character in the document's text, in code points.
        end_char: Offset after its last one: ``text == document_text[start_char:end_char]``.
        text: The piece itself, with no blanks around it.
        heading: Titles of the sections it begins in, outermost first, " > " between; "" outside of any.
    """

    ordinal: int
    start_char: int
    end_char: int
    text: str
    heading: str

    @property
    def content_hash(self) -> str:
        """sha256 of the UTF-8 embedded text, lowercase hex: chunks for which it is equal share a vector."""
        return hashlib.sha256(embedded_text(self.heading, self.text).encode()).hexdigest()

    def chunk_id(self, document_id: str) -> str:
        """32 hex digits that name this piece at this place of this document."""
        name = f"{document_id}\0{self.start_char}\0{self.content_hash}"
        return hashlib.sha256(name.encode()).hexdigest()[:32]


def embedded_text(heading: str, text: str) -> str:
    """What a model reads of a chunk: the titles of the sections it stands in, then the chunk.

    A title that the chunk begins with is not said twice. Titles that take more room than the chunk leaves lose words,
    the outermost first.
    """
    if found := headings(text):
        offset, _, title = found[0]
        if offset == 0:
            heading = heading.removesuffix(title[:_MAX_TITLE]).removesuffix(_BETWEEN)
    room = _MAX_PIECES - _count(text)
    above: list[str] = []
    for word in reversed(heading.split()):
        room -= _count(word)
        if room < 0:
            break
        above.append(word)
    return f"{' '.join(reversed(above))}\n\n{text}" if above else text


def chunk(text: str) -> list[Chunk]:
    """The chunks of a Markdown or plain text, in order; together they hold every character but blanks."""
    paths = list(_paths(text))
    above = max((_count(path) for _, path in paths), default=0)
    chunks: list[Chunk] = []
    passed, heading = 0, ""
    for start, end in _joined(text, _MAX_PIECES - min(above, _ROOM_ABOVE)):
        while passed < len(paths) and paths[passed][0] <= start:
            heading = paths[passed][1]
            passed += 1
        chunks.append(Chunk(len(chunks), start, end, text[start:end], heading))
    return chunks


def _paths(text: str) -> Iterator[tuple[int, str]]:
    """Where each section begins, and its title after those of the sections around it."""
    path: list[tuple[int, str]] = []
    for start, level, title in headings(text):
        path = [(above, name) for above, name in path if above < level]
        path.append((level, title[:_MAX_TITLE]))
        yield start, _BETWEEN.join(name for _, name in path if name)


def _joined(text: str, most: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each chunk. Headings cut off from what follows them say little: they stay together."""
    held: tuple[int, int] | None = None
    for start, piece in _pieces(text, most):
        end = start + len(piece)
        if held is not None:
            if _count(text[held[0] : end]) <= most:
                start = held[0]
            else:
                yield held
        held = (start, end)
        if not all(_ATX.fullmatch(line) for line in text[start:end].split("\n") if line.strip()):
            yield held
            held = None
    if held is not None:
        yield held


def _count(text: str) -> int:
    return len(_PIECE.findall(text))


def _pieces(text: str, most: int) -> Iterator[tuple[int, str]]:
    begin = 0
    while begin < len(text):
        end = len(text)
        if long := _LONG_LINE.search(text, begin):
            space = text.rfind(" ", long.start() + _MAX_LINE // 2, long.end())
            end = space if space > 0 else long.end()
        for offset, piece in _split(text[begin:end], most, 0):
            yield begin + offset, piece
        begin = end


def _split(text: str, most: int, depth: int) -> Iterator[tuple[int, str]]:
    for offset, piece in _splitter(depth).chunk_indices(text):
        if depth + 1 < len(_CAPACITIES) and _count(piece) > most:
            for inner, part in _split(piece, most, depth + 1):
                yield offset + inner, part
        elif piece.strip():
            yield offset, piece


@cache
def _splitter(depth: int) -> MarkdownSplitter:
    from semantic_text_splitter import MarkdownSplitter

    return MarkdownSplitter(_CAPACITIES[depth])


def headings(text: str) -> list[tuple[int, int, str]]:
    """(offset, level 1 to 6, title) of each Markdown heading outside of code blocks, in order."""
    found = []
    fence = ""
    above_start, above = 0, ""
    position = 0
    for line in text.split("\n"):
        start, position = position, position + len(line) + 1
        content = line.rstrip()
        if mark := _FENCE.match(content):
            if not fence:
                fence = mark.group(1)
            elif mark.group(1).startswith(fence) and content.strip() == mark.group(1):
                fence = ""
            above = ""
            continue
        if fence:
            continue
        if atx := _ATX.match(content):
            found.append((start, len(atx.group(1)), _plain(atx.group(2) or "")))
            above = ""
        elif above and (line_below := _SETEXT.match(content)) and len(line_below.group(1)) > 2:
            found.append((above_start, 1 if "=" in content else 2, _plain(above)))
            above = ""
        else:
            # A line of dashes alone is a rule, not a title.
            above_start, above = start, content.strip() if re.search(r"\w", content) else ""
    return found


def _plain(title: str) -> str:
    return " ".join(re.sub(r"[*`]|!?\[([^\]]*)\]\([^)]*\)", r"\1", title).split())
