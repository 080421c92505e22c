"""Text is cut into chunks: pieces that an embedding model reads whole, with offsets back into the document.

Belongs here: where to cut, which headings stand above a chunk, what of both a model reads, and how chunks are named.
Does not belong here: what a model makes of it (embedder), the database (corpus).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from semantic_text_splitter import MarkdownSplitter

# Of this module, and of what it cuts with: a change means that every document is cut anew.
_VERSION = "2"
_SPLITTER = "semantic-text-splitter/0.33.1"

_MAX_TITLE = 200
# Where a full chunk's characters are likely to be more tokens than there is room for (tables, code, links, scripts
# without spaces), it is cut again, smaller: into these shares of the least and of the most characters.
_SHARES = ((Fraction(1), Fraction(1)), (Fraction(5, 8), Fraction(1, 2)), (Fraction(1, 4), Fraction(1, 4)))
# How many letters of a word cost a token of an English WordPiece vocabulary of 30,522 entries. Measured; a language
# that is not here has words that are as foreign to it as German ones.
_LETTERS = {"en": 6, "es": 4}
_LETTERS_ELSEWHERE = 3

# The splitter's time grows with the square of a line's length where the line has no sentences.
_MAX_LINE = 50_000
_LONG_LINE = re.compile(rf"[^\n]{{{_MAX_LINE}}}")

_BETWEEN = " > "
_FENCE = re.compile(r"[ ]{0,3}(`{3,}|~{3,})")
_ATX = re.compile(r"[ ]{0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
_SETEXT = re.compile(r"[ ]{0,3}(=+|-+)[ \t]*$")


@dataclass(frozen=True)
class Chunking:
    """How documents are cut; as text, and in the settings, ``400-1000/240``.

    Attributes:
        least: A chunk is full from so many characters on.
        most: And has no more than so many.
        tokens: A chunk and the headings above it are fewer tokens, as we count them. MiniLM reads 256 and cuts off
            the rest. Up to a sixth is kept for the headings of a document that has any.
        language: ISO 639-1 code of what the text is written in, which decides how tokens are counted.
    """

    least: int = 400
    most: int = 1000
    tokens: int = 240
    language: str = "en"

    @classmethod
    def parse(cls, text: str) -> Chunking:
        """Read ``least-most/tokens``.

        Raises:
            ValueError: It is something else; the message says what is wanted.
        """
        found = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})/([0-9]{1,5})", text)
        if found is None:
            raise ValueError(
                "give the least and the most characters of a chunk and its most tokens, such as 400-1000/240"
            )
        least, most, tokens = map(int, found.groups())
        if not 50 <= least <= most <= 20_000:
            raise ValueError(
                f"a chunk of {least:,} to {most:,} characters cannot be made: give at least 50, at most 20,000,"
                " and the smaller number first"
            )
        if not 30 <= tokens <= 32_000:
            raise ValueError(f"a chunk of {tokens:,} tokens cannot be made: give from 30 to 32,000")
        return cls(least, most, tokens)

    def __str__(self) -> str:
        return f"{self.least}-{self.most}/{self.tokens}"

    @property
    def name(self) -> str:
        """Names how a text of this language is cut by this code; what was cut by another name is cut anew."""
        letters = "" if self.letters == _LETTERS["en"] else f"+letters/{self.letters}"
        return f"markdown-{self.least}-{self.most}-{self.tokens}-{self.room_above}-{_VERSION}+{_SPLITTER}{letters}"

    @property
    def letters(self) -> int:
        """How many letters of a word are counted as a token."""
        return _LETTERS.get(self.language, _LETTERS_ELSEWHERE)

    @property
    def room_above(self) -> int:
        """Tokens that are kept for headings where there are any."""
        return self.tokens // 6

    def count(self, text: str) -> int:
        """About how many tokens a text has: of words by their letters, of numbers one for two digits, of all else one
        for each character."""
        return len(_token(self.letters).findall(text))


DEFAULT_CHUNKING = Chunking()


@cache
def _token(letters: int) -> re.Pattern[str]:
    return re.compile(rf"[A-Za-z]{{1,{letters}}}|[0-9]{{1,2}}|[^\sA-Za-z0-9]")


@dataclass(frozen=True)
class Chunk:
    """A piece of a document.

    Attributes:
        ordinal: 0 for the first chunk of the document.
        start_char: Offset of its first character in the document's text, in code points.
        end_char: Offset after its last one: ``text == document_text[start_char:end_char]``.
        text: The piece itself, with no blanks around it.
        heading: Titles of the sections it begins in, outermost first, " > " between; "" outside of any.
        chunking: What it was cut by.
    """

    ordinal: int
    start_char: int
    end_char: int
    text: str
    heading: str
    chunking: Chunking = DEFAULT_CHUNKING

    @property
    def content_hash(self) -> str:
        """sha256 of the UTF-8 embedded text, lowercase hex: chunks for which it is equal share a vector."""
        return hashlib.sha256(embedded_text(self.heading, self.text, self.chunking).encode()).hexdigest()

    def chunk_id(self, document_id: str) -> str:
        """32 hex digits that name this piece at this place of this document."""
        name = f"{document_id}\0{self.start_char}\0{self.content_hash}"
        return hashlib.sha256(name.encode()).hexdigest()[:32]


def embedded_text(heading: str, text: str, chunking: Chunking = DEFAULT_CHUNKING) -> str:
    """What a model reads of a chunk: the titles of the sections it stands in, then the chunk.

    A title that the chunk begins with is not said twice. Titles that take more room than the chunk leaves lose words,
    the outermost first.
    """
    if found := headings(text):
        offset, _, title = found[0]
        if offset == 0:
            heading = heading.removesuffix(title[:_MAX_TITLE]).removesuffix(_BETWEEN)
    room = chunking.tokens - chunking.count(text)
    above: list[str] = []
    for word in reversed(heading.split()):
        room -= chunking.count(word)
        if room < 0:
            break
        above.append(word)
    return f"{' '.join(reversed(above))}\n\n{text}" if above else text


def chunk(text: str, chunking: Chunking = DEFAULT_CHUNKING) -> list[Chunk]:
    """The chunks of a Markdown or plain text, in order; together they hold every character but blanks."""
    paths = list(_paths(text))
    above = max((chunking.count(path) for _, path in paths), default=0)
    most = chunking.tokens - min(above, chunking.room_above)
    chunks: list[Chunk] = []
    passed, heading = 0, ""
    for start, end in _joined(text, chunking, most):
        while passed < len(paths) and paths[passed][0] <= start:
            heading = paths[passed][1]
            passed += 1
        chunks.append(Chunk(len(chunks), start, end, text[start:end], heading, chunking))
    return chunks


def _paths(text: str) -> Iterator[tuple[int, str]]:
    """Where each section begins, and its title after those of the sections around it."""
    path: list[tuple[int, str]] = []
    for start, level, title in headings(text):
        path = [(above, name) for above, name in path if above < level]
        path.append((level, title[:_MAX_TITLE]))
        yield start, _BETWEEN.join(name for _, name in path if name)


def _joined(text: str, chunking: Chunking, most: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each chunk. Headings cut off from what follows them say little: they stay together."""
    held: tuple[int, int] | None = None
    for start, piece in _pieces(text, chunking, most):
        end = start + len(piece)
        if held is not None:
            if chunking.count(text[held[0] : end]) <= most:
                start = held[0]
            else:
                yield held
        held = (start, end)
        if not all(_ATX.fullmatch(line) for line in text[start:end].split("\n") if line.strip()):
            yield held
            held = None
    if held is not None:
        yield held


def _pieces(text: str, chunking: Chunking, most: int) -> Iterator[tuple[int, str]]:
    begin = 0
    while begin < len(text):
        end = len(text)
        if long := _LONG_LINE.search(text, begin):
            space = text.rfind(" ", long.start() + _MAX_LINE // 2, long.end())
            end = space if space > 0 else long.end()
        for offset, piece in _split(text[begin:end], chunking, most, 0):
            yield begin + offset, piece
        begin = end


def _split(text: str, chunking: Chunking, most: int, depth: int) -> Iterator[tuple[int, str]]:
    least_share, most_share = _SHARES[depth]
    largest = max(1, int(chunking.most * most_share))
    splitter = _splitter(min(int(chunking.least * least_share), largest), largest)
    for offset, piece in splitter.chunk_indices(text):
        if depth + 1 < len(_SHARES) and chunking.count(piece) > most:
            for inner, part in _split(piece, chunking, most, depth + 1):
                yield offset + inner, part
        elif piece.strip():
            yield offset, piece


@cache
def _splitter(least: int, most: int) -> MarkdownSplitter:
    from semantic_text_splitter import MarkdownSplitter

    return MarkdownSplitter((least, most))


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
