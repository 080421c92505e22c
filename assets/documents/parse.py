"""Files become text: Markdown, plain text, package metadata, HTML, PDF, DOCX and ODT.

Belongs here: which format a file has, reading those that plain Python reads, and the process that reads the
others under limits of time and memory. Does not belong here: the readers of binary formats (parse_worker),
removing personal data (redact), the database (corpus).

Nothing here opens a network connection, and no bad file raises anything but ParseError.
"""

from __future__ import annotations

import codecs
import email
import importlib.metadata
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from types import TracebackType
from typing import Any, Self

from assets.documents import parse_worker
from assets.documents.chunk import headings

MAX_BYTES = 64 << 20
MAX_CHARS = 20_000_000
SECONDS_TO_START = 120.0

METADATA = "text/x-python-metadata"
MEDIA_TYPES = {
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".txt": "text/plain",
    ".text": "text/plain",
    ".rst": "text/x-rst",
    ".tex": "text/x-tex",
    ".html": "text/html",
    ".htm": "text/html",
    ".xhtml": "text/html",
    ".pdf": "application/pdf",
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    ".odt": "application/vnd.oasis.opendocument.text",
}

_BOMS = (
    # UTF-32 first: its little-endian mark begins with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)
_FRONT_TITLE = re.compile(r"""^title:[ \t]*(["']?)(.+?)\1[ \t]*$""", re.MULTILINE)


class ParseError(Exception):
    """A file that could not become text.

    Attributes:
        path: The file, as its source names it.
        rule: empty_file, wrong_encoding, unsupported_type, broken_file, encrypted, no_text, too_large or timeout.
        reason: What is wrong with it.
        remedy: What to do about it.
    """

    def __init__(self, path: str, rule: str, reason: str, remedy: str) -> None:
        super().__init__(f"{path}: {rule}: {reason}; {remedy}")
        self.path, self.rule, self.reason, self.remedy = path, rule, reason, remedy


@dataclass(frozen=True)
class Parsed:
    """What a file says.

    Attributes:
        title: Of one line; the file's name where the file has no title.
        text: Markdown, or plain text; "\\n" between lines, never empty.
        media_type: As in MEDIA_TYPES, or METADATA.
        parser: What read it, "name/version"; equals ``parser_of(path)``.
        warnings: What may be missing or wrong in the text.
    """

    title: str
    text: str
    media_type: str
    parser: str
    warnings: tuple[str, ...] = ()


def media_type_of(path: str) -> str:
    """The media type a file's name promises; ParseError (unsupported_type) if it is none we read."""
    name = PurePosixPath(path)
    if name.name in ("METADATA", "PKG-INFO"):
        return METADATA
    if not name.suffix:
        return "text/plain"
    media_type = MEDIA_TYPES.get(name.suffix.lower())
    if media_type is None:
        raise ParseError(
            path,
            "unsupported_type",
            f"{name.suffix} files are not read",
            f"convert it to one of {', '.join(MEDIA_TYPES)}, or leave it out of the source's path",
        )
    return media_type


def parser_of(path: str) -> str:
    """What would read this file, "name/version": a change of it makes the text worth reading anew."""
    media_type = media_type_of(path)
    if media_type == "text/html":
        return f"{_version('trafilatura')}+{_version('xberg')}"
    if media_type == METADATA:
        return "python-metadata/1"
    if media_type.startswith("text/"):
        return "text/1"
    return _version("xberg")


@cache
def _version(library: str) -> str:
    return f"{library}/{importlib.metadata.version(library)}"


def fallback_title(path: str) -> str:
    """The title of a file that has none of its own."""
    return PurePosixPath(path).stem.replace("_", " ").replace("-", " ").strip() or path


def parse(content: bytes, path: str) -> Parsed:
    """Read one file; for many files, a Parser is faster. Raises ParseError."""
    with Parser() as parser:
        return parser.parse(content, path)


class Parser:
    """Reads files, the hostile ones in a process of their own, which is replaced when it hangs or dies.

    Args:
        seconds: Time limit for one file.
        memory_bytes: Limit on the address space of that process, where the system has such a limit.
    """

    def __init__(self, seconds: float = 30.0, memory_bytes: int = 2 << 30) -> None:
        self._seconds = seconds
        self._memory_bytes = memory_bytes
        self._worker: _Worker | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def parse_many(self, files: Iterable[tuple[str, bytes]]) -> Iterator[Parsed | ParseError]:
        """The text of each (path, content), or why there is none, in the order of the files."""
        for path, content in files:
            try:
                yield self.parse(content, path)
            except ParseError as error:
                yield error

    def parse(self, content: bytes, path: str) -> Parsed:
        """Read one file. Raises ParseError, and RuntimeError when the readers are not installed."""
        media_type = media_type_of(path)
        if not content:
            raise ParseError(path, "empty_file", "it has 0 bytes", "supply the file again, or delete it")
        if len(content) > MAX_BYTES:
            raise ParseError(
                path,
                "too_large",
                f"it has {len(content) >> 20:,} MiB, more than {MAX_BYTES >> 20}",
                "split the document, or take out its images",
            )
        title: str | None
        warnings: tuple[str, ...] = ()
        if media_type == METADATA:
            title, text = _read_metadata(_decode(content, path), path)
        elif media_type.startswith("text/") and media_type != "text/html":
            title, text = _read_text(_decode(content, path), media_type)
        else:
            reply = self._ask(media_type, content, path)
            if "rule" in reply:
                raise ParseError(path, reply["rule"], reply["reason"], reply["remedy"])
            title, text, warnings = reply["title"], reply["text"], tuple(reply["warnings"])
            title = title or next((name for _, level, name in headings(text) if level == 1 and name), None)
        text = clean(text)
        if len(text) > MAX_CHARS:
            raise ParseError(
                path, "too_large", f"it holds more than {MAX_CHARS:,} characters", "split the document"
            )
        if not text:
            # A file of blanks has nothing in it; a document without text may have had pictures.
            raise ParseError(
                path,
                "empty_file" if media_type.startswith("text/") else "no_text",
                "there is no text in it",
                "supply a file with text in it, or delete it",
            )
        title = " ".join(clean(title or "").split()) or fallback_title(path)
        return Parsed(title, text, media_type, parser_of(path), warnings)

    def _ask(self, media_type: str, content: bytes, path: str) -> dict[str, Any]:
        while True:
            worker = self._worker = self._worker or _Worker(self._seconds, self._memory_bytes)
            try:
                reply = worker.ask(media_type, content, self._seconds)
                worker.files += 1
                return reply
            except TimeoutError:
                self._stop()
                raise ParseError(
                    path,
                    "timeout",
                    f"reading it took longer than {self._seconds:g} s",
                    "open it in the program that made it and save it anew, or split it",
                ) from None
            except (EOFError, ConnectionError):
                status = self._stop()
                if worker.files:
                    # What earlier files left behind may be to blame: this one deserves a fresh process.
                    continue
                raise ParseError(
                    path,
                    "broken_file",
                    f"its reader died ({status}), or took more than {self._memory_bytes >> 20:,} MiB",
                    "open it in the program that made it and save it anew, or split it",
                ) from None

    def _stop(self) -> str:
        worker, self._worker = self._worker, None
        return worker.stop() if worker else "never started"


class _Worker:
    """The child process of a Parser."""

    def __init__(self, seconds: float, memory_bytes: int) -> None:
        self.files = 0
        self._channel, theirs = socket.socketpair()
        kept = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "TMPDIR")
        self._process = subprocess.Popen(
            # -P: the folder of this file must not become importable, its names are too plain.
            [
                sys.executable,
                "-P",
                parse_worker.__file__,
                str(theirs.fileno()),
                str(memory_bytes),
                str(seconds),
            ],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # A hostile file that takes the process over finds no passwords in its environment.
            env={name: os.environ[name] for name in kept if name in os.environ},
        )
        theirs.close()
        try:
            self._channel.settimeout(SECONDS_TO_START)
            greeting = parse_worker.receive_message(self._channel)
        except (TimeoutError, EOFError, ConnectionError) as error:
            raise RuntimeError(
                f"the document reader did not start ({self.stop()}); run `python {parse_worker.__file__}` to see why"
            ) from error
        if "failed" in greeting:
            self.stop()
            raise RuntimeError(
                f"the document reader misses a library ({greeting['failed']}); install the project's dependencies anew"
            )

    def ask(self, media_type: str, content: bytes, seconds: float) -> dict[str, Any]:
        """Its reply. Raises TimeoutError, and EOFError or ConnectionError when the process is gone."""
        deadline = time.monotonic() + seconds
        self._channel.settimeout(seconds)
        parse_worker.send_message(self._channel, {"media_type": media_type, "size": len(content)}, content)
        # The reply is made whole before it is sent, so that waiting for its first byte is the long wait.
        self._channel.settimeout(max(deadline - time.monotonic(), 0.001))
        return parse_worker.receive_message(self._channel)

    def stop(self) -> str:
        """End the process; says how it ended."""
        # It ends by itself once the socket is closed, unless it is inside a file.
        self._channel.close()
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _decode(content: bytes, path: str) -> str:
    encoding = next((name for mark, name in _BOMS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ParseError(
            path,
            "wrong_encoding",
            f"byte 0x{content[error.start]:02x} at offset {error.start:,} is not {encoding.upper()}",
            "find out its encoding and convert it, for example "
            f"`iconv -f WINDOWS-1252 -t UTF-8 {shlex.quote(path)} > converted`",
        ) from None
    if (offset := text.find("\0")) >= 0:
        raise ParseError(
            path,
            "wrong_encoding",
            f"character {offset:,} is NUL: it is UTF-16 without a byte order mark, or not text at all",
            f"convert it, for example `iconv -f UTF-16LE -t UTF-8 {shlex.quote(path)} > converted`, "
            "or name the file by its real type",
        )
    return text


def clean(text: str) -> str:
    """Lines end in "\\n"; no control characters or lone surrogates, which Postgres cannot store."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufeff]", "", text).strip()


def _read_text(text: str, media_type: str) -> tuple[str | None, str]:
    text = text.replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff")
    title = None
    if media_type == "text/markdown" and (front := _FRONT_MATTER.match(text)):
        if named := _FRONT_TITLE.search(front.group(1)):
            title = named.group(2)
        # A file of nothing but front matter keeps it: better a poor document than a lost one.
        text = text[front.end() :].strip() or text
    if title is None and media_type in ("text/markdown", "text/x-rst"):
        title = next((name for _, _, name in headings(text) if name), None)
    return title, text


def _read_metadata(text: str, path: str) -> tuple[str, str]:
    message = email.message_from_string(text)
    name, summary = message.get("Name"), message.get("Summary")
    if not name:
        raise ParseError(
            path, "broken_file", "it has no Name header", "supply the METADATA file of a Python package"
        )
    body = message.get_payload()
    if not isinstance(body, str) or not body.strip():
        # Before metadata version 2.1 the description was a header, its lines indented.
        body = re.sub(r"\n(?: {8}|       \|)", "\n", message.get("Description") or "")
    if summary in (None, "UNKNOWN"):
        summary = None
    if body.strip() == "UNKNOWN":
        body = ""
    title = f"{name}: {summary}" if summary else str(name)
    return title, "\n\n".join(part for part in (f"# {name}", summary, body.strip()) if part)
