"""The child process that opens HTML, PDF, DOCX and ODT: formats whose readers a hostile file can crash or hang.

Belongs here: what needs a library to read, and the limits this process puts on itself. Does not belong
here: formats that plain Python reads (parse), starting and replacing this process (parse), the database.

It is run as a file, not as a module of the project, and imports none of it. It talks over the socket whose
descriptor is its first argument: each message is a JSON object with its length before it; a request is
followed by the bytes of the file. It may write no file.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import socket
import struct
import sys
import zipfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_UNPACKED_BYTES = 256 << 20
MIN_HTML_CHARS = 200


class Refusal(Exception):
    """A file that cannot be read: ``rule``, ``reason`` and ``remedy``."""

    def __init__(self, rule: str, reason: str, remedy: str) -> None:
        super().__init__(rule, reason, remedy)
        self.rule, self.reason, self.remedy = rule, reason, remedy


def receive(channel: socket.socket, size: int) -> bytes:
    """Exactly ``size`` bytes; EOFError when the other side is gone."""
    buffer = bytearray()
    while len(buffer) < size:
        part = channel.recv(min(size - len(buffer), 1 << 20))
        if not part:
            raise EOFError
        buffer += part
    return bytes(buffer)


def receive_message(channel: socket.socket) -> dict[str, Any]:
    """The next JSON message."""
    (size,) = struct.unpack("!Q", receive(channel, 8))
    message: dict[str, Any] = json.loads(receive(channel, size))
    return message


def send_message(channel: socket.socket, message: dict[str, Any], content: bytes = b"") -> None:
    """Send a JSON message, and after it ``content``."""
    data = json.dumps(message).encode()
    channel.sendall(struct.pack("!Q", len(data)) + data)
    if content:
        channel.sendall(content)


def read_pdf(content: bytes) -> tuple[str | None, str, list[str]]:
    """Title, Markdown and warnings of a PDF."""
    _check_pdf_structure(content)
    title, text, warnings, details = _xberg(content, "application/pdf")
    pages = details.get("page_count")
    if not text.strip():
        raise Refusal(
            "no_text",
            f"the PDF has {pages if pages is not None else 'no readable'} page(s) and no text layer",
            "it is probably scanned: run OCR on it and supply the searchable PDF, or supply the original document",
        )
    for name, complaint in (
        ("scanned_pages", "are scans without a text layer"),
        ("fabricated_text_pages", "have a font whose letters had to be guessed"),
        ("implausible_text_pages", "have a text layer that reads as no language"),
    ):
        if found := details.get(name):
            warnings.append(f"pages {', '.join(map(str, found))} {complaint}")
    return title, text, warnings


def _check_pdf_structure(content: bytes) -> None:
    # Readers repair broken files by guessing, which turns a half-uploaded file into a document that lacks
    # its last pages without a word. A file whose table of contents is not where it says is refused instead.
    repair = (
        "supply the file again; if this is how it is, open and save it anew, or repair it with `qpdf in out`"
    )
    header = content.find(b"%PDF-", 0, 1024)
    if header < 0:
        raise Refusal(
            "broken_file", "it does not begin with %PDF-", "supply a PDF, or name the file by its real type"
        )
    position = content.rfind(b"startxref")
    pointer = (
        re.match(rb"startxref\s+(\d{1,12})\s", content[position : position + 64]) if position > 0 else None
    )
    if pointer is None:
        raise Refusal("broken_file", "the end of the PDF (startxref) is missing or damaged", repair)
    start = int(pointer.group(1))
    for offset in (start, start + header):
        table = content[offset : offset + 64].lstrip()
        if re.match(rb"\d+\s+\d+\s+obj", table):
            return
        if table.startswith(b"xref"):
            if re.search(rb"trailer\s*<<", content[offset:]):
                return
            raise Refusal("broken_file", "the PDF's trailer is damaged", repair)
    raise Refusal("broken_file", f"the PDF's object table is not at byte {start}, where it should be", repair)


def read_docx(content: bytes) -> tuple[str | None, str, list[str]]:
    """Title, Markdown and warnings of a Word document."""
    if content.startswith(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"):
        raise Refusal(
            "encrypted",
            "it is an OLE container: a password-protected document, or one of the old binary format",
            "open it, remove the password, and save it as an unprotected .docx",
        )
    _check_archive(content, "word/document.xml")
    title, text, warnings, _ = _xberg(
        content, "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
    )
    return title, text, warnings


def read_odt(content: bytes) -> tuple[str | None, str, list[str]]:
    """Title, Markdown and warnings of an OpenDocument text."""
    archive = _check_archive(content, "content.xml")
    if "META-INF/manifest.xml" in archive.namelist() and b"encryption-data" in archive.read(
        "META-INF/manifest.xml"
    ):
        raise Refusal("encrypted", "it is protected by a password", "open it and save it without a password")
    title, text, warnings, _ = _xberg(content, "application/vnd.oasis.opendocument.text")
    return title, text, warnings


def _check_archive(content: bytes, member: str) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except (zipfile.BadZipFile, ValueError, OSError, struct.error) as error:
        raise Refusal(
            "broken_file",
            f"it is not a whole ZIP archive ({error})",
            "supply the file again, or save it anew",
        ) from error
    entries = archive.infolist()
    if any(entry.flag_bits & 1 for entry in entries):
        raise Refusal("encrypted", "its archive is encrypted", "save it without a password")
    if (unpacked := sum(entry.file_size for entry in entries)) > MAX_UNPACKED_BYTES:
        raise Refusal(
            "too_large",
            f"it unpacks to {unpacked >> 20:,} MiB, more than {MAX_UNPACKED_BYTES >> 20:,}",
            "split the document, or take out its embedded files",
        )
    if member not in archive.namelist():
        raise Refusal(
            "broken_file", f"{member} is missing in it", "save it anew, or name it by its real type"
        )
    return archive


def _xberg(content: bytes, media_type: str) -> tuple[str | None, str, list[str], dict[str, Any]]:
    import asyncio

    import xberg

    # Everything that could reach outside this process or guess at content is off by name.
    config = xberg.ExtractionConfig(
        use_cache=False,
        disable_ocr=True,
        enable_quality_processing=False,
        strict_parse=True,
        output_format="markdown",
        postprocessor=xberg.PostProcessorConfig(enabled=False),
        max_archive_depth=0,
        pdf_options=xberg.PdfConfig(extract_images=False),
        concurrency=xberg.ConcurrencyConfig(max_threads=1),
    )
    source = xberg.ExtractInput(kind=xberg.ExtractInputKind.BYTES, bytes=content, mime_type=media_type)
    try:
        result = asyncio.run(xberg.extract(source, config))
    # The library raises RuntimeError for all that it cannot read, whatever its own exception classes say.
    except (RuntimeError, ValueError, xberg.XbergError) as error:
        raise _refusal(str(error)) from error
    if not result.results:
        raise _refusal("; ".join(item.message for item in result.errors) or "nothing came out of it")
    document = result.results[0]
    details = json.loads(str(document.metadata.format)) if document.metadata.format is not None else {}
    warnings = [
        warning.message
        for warning in document.processing_warnings
        if "Post-processing rewrote" not in warning.message
    ]
    return document.metadata.title, document.content, warnings, details if isinstance(details, dict) else {}


def _refusal(message: str) -> Refusal:
    if "encrypt" in message.lower() or "password" in message.lower():
        return Refusal("encrypted", "it is protected by a password", "supply it without a password")
    return Refusal("broken_file", message[:300], "open it in the program that made it and save it anew")


def read_html(content: bytes) -> tuple[str | None, str, list[str]]:
    """Title, Markdown of the main content, and warnings, of a web page.

    Navigation, header, footer, scripts and forms are left out. Where the page has too little main content to
    tell it from the rest, all that is left of it is kept, and a warning says so.
    """
    import trafilatura
    from lxml import etree, html  # type: ignore[import-untyped]

    try:
        page = html.document_fromstring(_html_text(content))
    except (etree.ParserError, etree.XMLSyntaxError, ValueError) as error:
        raise Refusal("broken_file", f"it is not HTML ({error})", "supply the page as HTML") from error
    title = _html_title(page)
    _prepare(page)
    text = (
        trafilatura.extract(
            page, output_format="markdown", include_comments=False, include_tables=True, include_links=False
        )
        or ""
    )
    if len(text) >= MIN_HTML_CHARS:
        return title, text, []
    rest = (
        b"<html><body>"
        + b"".join(html.tostring(child) for child in page.iterfind("body/*"))
        + b"</body></html>"
    )
    _, whole, warnings, _ = _xberg(rest, "text/html")
    if len(whole.strip()) <= 2 * len(text):
        return title, text or whole, []
    return title, whole, [*warnings, "no main content was found; the whole page was taken"]


def _html_text(content: bytes) -> str:
    if content.startswith(b"\xef\xbb\xbf"):
        encoding = "utf-8-sig"
    elif content.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    else:
        # A page names its own encoding; one that does not must be UTF-8, as any other text.
        declared = re.search(rb"""charset\s*=\s*["']?([\w.:-]{1,40})""", content[:4096], re.IGNORECASE)
        encoding = declared.group(1).decode() if declared else "utf-8"
    try:
        text = content.decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        offset = f" at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
        raise Refusal(
            "wrong_encoding",
            f"it is not {encoding}, its declared or default encoding{offset}",
            "save the page as UTF-8 and declare it with <meta charset='utf-8'>",
        ) from error
    # lxml refuses a str that declares an encoding in an XML prologue.
    return re.sub(r"^\s*<\?xml[^>]*\?>", "", text)


def _html_title(page: Any) -> str | None:
    # The first <h1> names the content; <title> often carries the site's name as well.
    for path in (".//main//h1", ".//article//h1", ".//h1", ".//title"):
        for element in page.iterfind(path):
            if title := " ".join(element.text_content().split()):
                return title
    return None


def _prepare(page: Any) -> None:
    from lxml import etree, html

    etree.strip_elements(
        page, "script", "style", "noscript", "template", "nav", "footer", "form", "aside", with_tail=False
    )
    for heading in list(page.iter("h1", "h2", "h3", "h4", "h5", "h6")):
        # Documentation generators wrap headings in <div class="titlepage">, which the extractor throws out.
        own = " ".join(heading.text_content().split())
        top = heading
        while (
            (up := top.getparent()) is not None
            and up.tag == "div"
            and " ".join(up.text_content().split()) == own
        ):
            top = up
        plain = html.Element(heading.tag)
        plain.text, plain.tail = own, top.tail
        if (parent := top.getparent()) is not None:
            parent.replace(top, plain)
    body = page.find("body")
    if body is not None and page.find(".//main") is None and page.find(".//article") is None:
        # Without a landmark the extractor falls back to paragraphs only, and every heading is lost.
        article = html.Element("article")
        article.text, body.text = body.text, None
        article.extend(list(body))
        body.append(article)


READERS: dict[str, Callable[[bytes], tuple[str | None, str, list[str]]]] = {
    "text/html": read_html,
    "application/pdf": read_pdf,
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": read_docx,
    "application/vnd.oasis.opendocument.text": read_odt,
}


def answer(media_type: str, content: bytes) -> dict[str, Any]:
    """The reply to one request: ``title``, ``text``, ``warnings``, or ``rule``, ``reason``, ``remedy``."""
    try:
        title, text, warnings = READERS[media_type](content)
    except Refusal as refusal:
        return {"rule": refusal.rule, "reason": refusal.reason, "remedy": refusal.remedy}
    except MemoryError:
        return {
            "rule": "too_large",
            "reason": "reading it takes too much memory",
            "remedy": "split the document",
        }
    # The libraries promise nothing about what a hostile file makes them raise, and one bad file must not
    # stop the others: whatever it is, it goes back as the reason of the refusal.
    except Exception as error:
        reason = f"its reader failed: {type(error).__name__}: {error}"[:300]
        return {
            "rule": "broken_file",
            "reason": reason,
            "remedy": "open it in its own program and save it anew",
        }
    return {"title": title, "text": text, "warnings": warnings}


def serve(channel: socket.socket, memory_bytes: int, seconds: float) -> None:
    """Answer requests until the other side hangs up.

    A file that takes much longer than ``seconds`` ends this process, even when nobody is left to end it.
    """
    import resource

    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        # Not every system lets a process limit its address space.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))
    try:
        import trafilatura  # noqa: F401
        import xberg  # noqa: F401
    except ImportError as error:
        send_message(channel, {"failed": str(error)})
        return
    send_message(channel, {"ready": True})
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            request = receive_message(channel)
            content = receive(channel, request["size"])
            signal.setitimer(signal.ITIMER_REAL, seconds + 5)
            reply = answer(request["media_type"], content)
            signal.setitimer(signal.ITIMER_REAL, 0)
            send_message(channel, reply)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), float(sys.argv[3]))
