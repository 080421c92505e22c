"""From a text file's bytes to whole lines of UTF-8, however large the file and whatever is wrong with it.

Belongs here: compression, encodings, line ends, the limit on a line. Does not belong here: what a line means.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from assets.sources.batch import (
    KEPT_OF_LONG_LINE,
    MAX_ROW_BYTES,
    FileRefused,
    RefusedRow,
    SourceFile,
    refuse_changed,
    refuse_unreadable,
)

BLOCK_BYTES = 2 * 1024 * 1024
GZIP_MAGIC = b"\x1f\x8b"


def read_lines(file: SourceFile, encoding: str) -> Iterator[Lines | LongLine]:
    """The file's lines, in order, some at a time.

    Raises:
        FileRefused: ``unreadable_file``, ``broken_file``, ``wrong_encoding`` or ``file_changed``.
    """
    return _whole_lines(_decoded(file, encoding))


@dataclass(frozen=True)
class Lines:
    """Whole lines: ``data`` ends with a newline; ``first`` is the number of its first line."""

    first: int
    data: bytes


@dataclass(frozen=True)
class LongLine:
    """A line longer than a row may be, of which only the beginning was kept."""

    number: int
    start: bytes
    length: int

    def refused(self) -> RefusedRow:
        return RefusedRow(
            self.number,
            "line_too_long",
            f"line {self.number} has {self.length:,} bytes; a row may have {MAX_ROW_BYTES:,}",
            "Shorten the row, or move large contents to a documents source.",
            {"_raw": self.start.decode("utf-8", "ignore"), "_bytes": self.length, "_truncated": True},
        )


def _decompressed(file: SourceFile) -> Iterator[bytes]:
    compressed = file.name.endswith(".gz")
    left = file.size
    try:
        with file.path.open("rb") as plain:
            if compressed and plain.read(2) != GZIP_MAGIC:
                raise FileRefused(
                    file.name,
                    "unreadable_file",
                    "it is not gzip data",
                    "Compress it, or drop .gz from its name.",
                )
            plain.seek(0)
            with gzip.open(plain, "rb") if compressed else plain as stream:
                while block := stream.read(BLOCK_BYTES):
                    left -= len(block)
                    # A file that is being appended to must not be read for ever.
                    if left < 0 and not compressed:
                        refuse_changed(file)
                    yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = "the gzip data ends early" if isinstance(error, EOFError) else f"damaged gzip data: {error}"
        raise FileRefused(file.name, "broken_file", reason, "Deliver the file again.") from error
    except OSError as error:
        refuse_unreadable(file.name, error)


def _decoded(file: SourceFile, encoding: str) -> Iterator[bytes]:
    """The file's text as UTF-8 without byte order mark."""
    is_utf8 = codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")
    decoder = codecs.getincrementaldecoder(encoding)()
    offset = 0
    for block in _decompressed(file):
        text = _decode(file, encoding, decoder, block, offset, final=False)
        if not is_utf8:
            yield text.encode()
        elif offset == 0:
            yield block.removeprefix(codecs.BOM_UTF8)
        else:
            yield block
        offset += len(block)
    text = _decode(file, encoding, decoder, b"", offset, final=True)
    if not is_utf8:
        yield text.encode()


def _decode(
    file: SourceFile,
    encoding: str,
    decoder: codecs.IncrementalDecoder,
    block: bytes,
    offset: int,
    final: bool,
) -> str:
    try:
        return decoder.decode(block, final)
    except UnicodeError as error:
        where = offset
        if isinstance(error, UnicodeDecodeError):
            # The decoder still held what the last block left of a character.
            where += error.start - (len(error.object) - len(block))
        seen = " (it looks like UTF-16)" if block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
        raise FileRefused(
            file.name,
            "wrong_encoding",
            f"the byte at offset {where} is not {encoding}{seen}",
            "Save it as UTF-8, or name its encoding in the contract's server.",
        ) from error


def _whole_lines(blocks: Iterable[bytes]) -> Iterator[Lines | LongLine]:
    """Cut blocks at newlines; the last line gets one if it has none."""
    pending: list[bytes] = []
    length = 0
    number = 1
    for block in blocks:
        end = block.find(b"\n") + 1
        while length + end > MAX_ROW_BYTES and end:
            yield LongLine(number, b"".join([*pending, block])[:KEPT_OF_LONG_LINE], length + end - 1)
            number += 1
            pending, length, block = [], 0, block[end:]
            end = block.find(b"\n") + 1
        cut = block.rfind(b"\n") + 1
        if cut:
            data = b"".join([*pending, block[:cut]])
            yield Lines(number, data)
            number += data.count(b"\n")
            pending, length, block = [], 0, block[cut:]
        length += len(block)
        # Of a line that is already too long, only the beginning and the length matter.
        if length <= MAX_ROW_BYTES or not pending:
            pending.append(block)
        else:
            pending = [b"".join(pending)[:KEPT_OF_LONG_LINE]]
    if length > MAX_ROW_BYTES:
        yield LongLine(number, b"".join(pending)[:KEPT_OF_LONG_LINE], length)
    elif length:
        yield Lines(number, b"".join([*pending, b"\n"]))
