"""Every file becomes text or a ParseError that names the file, the rule and the remedy; never a crash or a hang."""

from __future__ import annotations

import io
import os
import signal
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from assets.documents import parse as parse_module
from assets.documents import parse_worker
from assets.documents.parse import MEDIA_TYPES, Parsed, ParseError, Parser, media_type_of, parse, parser_of

DATA = Path(os.environ.get("DATAMOAT_DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def parser() -> Iterator[Parser]:
    with Parser() as parser:
        yield parser


def refusal(parser: Parser, content: bytes, path: str) -> ParseError:
    with pytest.raises(ParseError) as caught:
        parser.parse(content, path)
    error = caught.value
    assert error.path == path
    assert error.reason
    assert error.remedy
    assert all(part in str(error) for part in (path, error.rule, error.reason, error.remedy))
    return error


def archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def docx(text: str) -> bytes:
    body = (
        f'<w:document xmlns:w="{WORD}"><w:body><w:p><w:r><w:t>{text}</w:t></w:r></w:p></w:body></w:document>'
    )
    kind = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    types = (
        '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/word/document.xml" ContentType="{kind}"/></Types>'
    )
    return archive({"[Content_Types].xml": types.encode(), "word/document.xml": body.encode()})


def pdf(text: str) -> bytes:
    stream = f"BT /F1 24 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    content, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return (
        content
        + b"xref\n0 6\n0000000000 65535 f \n%strailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n"
        % (
            table,
            len(content),
        )
    )


def test_markdown(parser: Parser) -> None:
    parsed = parser.parse(b"intro\r\n\r\n```\n# code\n```\n# The *title*\n\ntext\x00"[:-1], "notes/a.md")
    assert parsed == Parsed(
        "The title", "intro\n\n```\n# code\n```\n# The *title*\n\ntext", "text/markdown", "text/1", ()
    )


def test_front_matter_gives_the_title_and_leaves(parser: Parser) -> None:
    parsed = parser.parse(b'---\nowner: x\ntitle: "Power cuts"\n---\n\n# Other\n\nText.', "a.md")
    assert (parsed.title, parsed.text) == ("Power cuts", "# Other\n\nText.")


def test_a_file_without_title_is_named_after_its_file(parser: Parser) -> None:
    assert parser.parse(b"text", "b/moving-a_fridge.txt").title == "moving a fridge"
    assert parser.parse(b"Title\n=====\n\ntext", "a.rst").title == "Title"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_that_say_what_they_are(parser: Parser, encoding: str) -> None:
    assert parser.parse("Grüße\n日本".encode(encoding), "a.txt").text == "Grüße\n日本"


def test_wrong_encoding_names_the_byte_and_the_cure(parser: Parser) -> None:
    error = refusal(parser, b"caf\xe9 au lait", "it's.txt")
    assert error.rule == "wrong_encoding"
    assert "0xe9 at offset 3" in error.reason
    assert "iconv -f WINDOWS-1252 -t UTF-8 'it'\"'\"'s.txt'" in error.remedy
    error = refusal(parser, "no mark".encode("utf-16-le"), "a.md")
    assert error.rule == "wrong_encoding"
    assert "UTF-16LE" in error.remedy


@pytest.mark.parametrize(
    ("content", "path", "rule"),
    [
        (b"", "a.md", "empty_file"),
        (b"", "a.pdf", "empty_file"),
        (b" \n\t\xef\xbb\xbf", "a.txt", "empty_file"),
        (b"\xef\xbb\xbf", "a.md", "empty_file"),
        (b"PK", "a.xlsx", "unsupported_type"),
        (b"x", "no.such", "unsupported_type"),
        (b"Summary: no name\n\nx", "pkg.dist-info/METADATA", "broken_file"),
        (b"not a pdf", "a.pdf", "broken_file"),
        (pdf("Hello")[:-60], "a.pdf", "broken_file"),
        (pdf("Hello").replace(b"trailer", b"trialer"), "a.pdf", "broken_file"),
        (pdf("Hello")[:20] + pdf("Hello")[29:], "a.pdf", "broken_file"),
        (pdf(""), "a.pdf", "no_text"),
        (docx("Hello")[:-30], "a.docx", "broken_file"),
        (docx(""), "a.docx", "no_text"),
        (archive({"x": b"y"}), "a.docx", "broken_file"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "a.docx", "encrypted"),
        (
            archive({"content.xml": b"x", "META-INF/manifest.xml": b"<manifest:encryption-data/>"}),
            "a.odt",
            "encrypted",
        ),
        (archive({"word/document.xml": bytes(300 << 20)}), "bomb.docx", "too_large"),
        (b"<html><head><script>1</script></head><body></body></html>", "a.html", "empty_file"),
        ("<p>Grüße</p>".encode("latin-1"), "a.html", "wrong_encoding"),
        (b"<meta charset='nonsense'><p>x</p>", "a.html", "wrong_encoding"),
    ],
)
def test_bad_files(parser: Parser, content: bytes, path: str, rule: str) -> None:
    assert refusal(parser, content, path).rule == rule


def test_a_file_that_is_too_large_is_not_read(parser: Parser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse_module, "MAX_BYTES", 10)
    assert refusal(parser, b"x" * 11, "a.md").rule == "too_large"
    monkeypatch.setattr(parse_module, "MAX_CHARS", 5)
    assert refusal(parser, b"x" * 6, "a.md").rule == "too_large"


def test_package_metadata_is_its_description(parser: Parser) -> None:
    content = (
        b"Metadata-Version: 2.1\nName: frobnicator\nVersion: 1.2\nSummary: Frobs things\n"
        b"Classifier: Noise\nRequires-Dist: noise\n\n# Frobnicator\n\nIt frobs: gr\xc3\xbc\xc3\x9fe.\n"
    )
    parsed = parser.parse(content, "frobnicator-1.2.dist-info/METADATA")
    assert parsed.title == "frobnicator: Frobs things"
    assert parsed.text == "# frobnicator\n\nFrobs things\n\n# Frobnicator\n\nIt frobs: grüße."
    old = b"Metadata-Version: 1.1\nName: old\nSummary: UNKNOWN\nDescription: One\n        Two\n        \n        Three\n"
    assert parser.parse(old, "PKG-INFO").text == "# old\n\nOne\nTwo\n\nThree"


PAGE = """<!doctype html><html><head><meta charset="utf-8"><title>Pairing | Help Centre</title>
<style>p{}</style><script>var tracker;</script></head><body>
<header><nav><a href="/">Home</a> <a href="/login">Sign in</a></nav></header>
CONTENT
<footer>Imprint and cookies</footer></body></html>"""
CONTENT = (
    "<h1>Pairing a logger</h1><p>Pairing gives a logger and your account a key of their own.</p>"
    "<h2>Before you start</h2><ul><li>The gateway is online.</li><li>You are within ten metres of it.</li></ul>"
    "<p>Then hold the button for five seconds until the light is green, and compare the four digits shown.</p>"
)


@pytest.mark.parametrize(
    "content",
    [
        f"<main><article>{CONTENT}</article></main>",
        f"<div>{CONTENT}</div>",
        CONTENT.replace("<h2>", '<div class="titlepage"><div><h2 class="title">').replace(
            "</h2>", "</h2></div></div>"
        ),
    ],
)
def test_html_keeps_headings_and_drops_the_frame(parser: Parser, content: str) -> None:
    parsed = parser.parse(PAGE.replace("CONTENT", content).encode(), "help/pairing.html")
    assert parsed.title == "Pairing a logger"
    assert "## Before you start" in parsed.text
    assert "- The gateway is online." in parsed.text
    assert not any(noise in parsed.text for noise in ("Sign in", "Imprint", "tracker", "p{}"))
    assert parsed.parser == parser_of("help/pairing.html")


def test_a_short_page_is_taken_whole(parser: Parser) -> None:
    parsed = parser.parse(b"<title>T</title><body><div>Closed on Sunday.</div></body>", "a.html")
    assert parsed.title == "T"
    assert "Closed on Sunday." in parsed.text


def test_html_in_the_encoding_it_declares(parser: Parser) -> None:
    page = "<meta charset='iso-8859-1'><p>Grüße aus Köln, wo es heute wieder regnet.</p>"
    assert "Grüße aus Köln" in parser.parse(page.encode("latin-1"), "a.html").text


def test_pdf_and_docx(parser: Parser) -> None:
    assert parser.parse(pdf("Hello there"), "a/b-c.pdf") == Parsed(
        "b c", "Hello there", "application/pdf", parser_of("x.pdf"), ()
    )
    assert parser.parse(docx("Hello there"), "b.DOCX").text == "Hello there"


def test_many_files_in_order_with_the_errors_among_them(parser: Parser) -> None:
    files = [
        ("a.md", b"one"),
        ("b.md", b"\xff"),
        ("c.pdf", pdf("three")),
        ("d.pdf", b"%PDF-"),
        ("e.txt", b"five"),
    ]
    results = list(parser.parse_many(files))
    assert [r.rule if isinstance(r, ParseError) else r.text for r in results] == [
        "one",
        "wrong_encoding",
        "three",
        "broken_file",
        "five",
    ]


def test_names_tell_the_parser() -> None:
    assert {path: parser_of(f"x{path}") for path in MEDIA_TYPES}[".md"] == "text/1"
    assert parser_of("x.pdf").startswith("xberg/")
    assert parser_of("x.HTM").startswith("trafilatura/")
    assert media_type_of("LICENSE") == "text/plain"
    assert parse(b"hello", "README").parser == "text/1"


def test_no_file_stops_the_worker_from_reading_the_next(parser: Parser) -> None:
    assert parser.parse(pdf("one"), "a.pdf").text == "one"
    assert parser._worker is not None
    os.kill(parser._worker._process.pid, signal.SIGKILL)
    assert parser.parse(pdf("two"), "a.pdf").text == "two"


def worker_that(behaviour: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a process in the place of the reader that greets and then misbehaves."""
    script = folder / "reader.py"
    script.write_text(
        "import json, os, socket, struct, sys, time\n"
        "channel = socket.socket(fileno=int(sys.argv[1]))\n"
        "def send(message):\n"
        "    data = json.dumps(message).encode()\n"
        "    channel.sendall(struct.pack('!Q', len(data)) + data)\n" + behaviour
    )
    monkeypatch.setattr(parse_worker, "__file__", str(script))


@pytest.mark.parametrize("size", [10, 4 << 20], ids=["waiting for the reply", "sending the file"])
def test_a_file_that_hangs_its_reader_times_out(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker_that("send({'ready': True})\ntime.sleep(60)\n", tmp_path, monkeypatch)
    started = time.monotonic()
    with Parser(seconds=0.3) as parser:
        error = refusal(parser, b"%PDF-" + bytes(size), "evil.pdf")
        assert error.rule == "timeout"
        assert "0.3 s" in error.reason
        monkeypatch.undo()
        assert parser.parse(b"text", "a.md").text == "text"
    assert time.monotonic() - started < 20


def test_a_file_that_kills_its_reader_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker_that("send({'ready': True})\nchannel.recv(1)\nos.abort()\n", tmp_path, monkeypatch)
    with Parser() as parser:
        error = refusal(parser, b"%PDF-" * 1000, "evil.pdf")
        assert error.rule == "broken_file"
        assert "SIGABRT" in error.reason
        monkeypatch.undo()
        assert parser.parse(pdf("fine"), "a.pdf").text == "fine"


def test_a_reader_that_cannot_start_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker_that("send({'failed': 'No module named xberg'})\n", tmp_path, monkeypatch)
    with Parser() as parser, pytest.raises(RuntimeError, match=r"No module named xberg.*install"):
        parser.parse(b"%PDF-", "a.pdf")
    worker_that("sys.exit(3)\n", tmp_path, monkeypatch)
    with Parser() as parser, pytest.raises(RuntimeError, match="exit status 3"):
        parser.parse(b"%PDF-", "a.pdf")


HEADS = st.sampled_from(
    [b"", b"%PDF-1.4\n", b"PK\x03\x04", b"<html>", b"\xff\xfe", b"Name: x\n\n", b"---\ntitle: ", pdf("x")]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head=HEADS,
    tail=st.binary(max_size=300)
    | st.text(alphabet="<>/abc#=-`\n &;\ud7ff\x0b", max_size=200).map(str.encode),
    suffix=st.sampled_from([*MEDIA_TYPES, "", ".bin"]),
)
def test_any_bytes_are_text_or_a_parse_error(parser: Parser, head: bytes, tail: bytes, suffix: str) -> None:
    try:
        parsed = parser.parse(head + tail, f"any{suffix}")
    except ParseError as error:
        assert error.rule in {
            "empty_file",
            "wrong_encoding",
            "unsupported_type",
            "broken_file",
            "encrypted",
            "no_text",
        }
    else:
        assert parsed.text.strip()
        assert parsed.title
        assert "\x00" not in parsed.text + parsed.title
        assert "\r" not in parsed.text


EXPECTED_REFUSALS = {
    "docx/doc-no-coreprops.docx": "no_text",
    "malformed/bad1.pdf": "broken_file",
    "malformed/bad2.pdf": "broken_file",
    "malformed/bad7.pdf": "broken_file",
    "malformed/enc-R3-user-view.pdf": "encrypted",
    "malformed/issue-100.pdf": "broken_file",
    "pdf/imagemagick-images.pdf": "no_text",
    "pdf/libreoffice-writer-password.pdf": "encrypted",
    "text/sample-arabic-1.txt": "wrong_encoding",
    "text/sample-chinese.txt": "wrong_encoding",
    "text/sample-french-1.txt": "wrong_encoding",
}


@pytest.fixture(scope="module")
def real(parser: Parser) -> dict[str, Parsed | ParseError]:
    folder = DATA / "documents_dev"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: set DATAMOAT_DATA_DIR to the folder of the development data")
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in MEDIA_TYPES and path.parent != folder
    }
    return dict(zip(files, parser.parse_many(files.items()), strict=True))


def test_real_documents(real: dict[str, Parsed | ParseError]) -> None:
    refused = {path: result.rule for path, result in real.items() if isinstance(result, ParseError)}
    assert len(real) == 38
    assert refused == EXPECTED_REFUSALS


def test_one_document_says_the_same_in_three_formats(real: dict[str, Parsed | ParseError]) -> None:
    def words(path: str) -> set[str]:
        parsed = real[path]
        assert isinstance(parsed, Parsed)
        return {word for word in parsed.text.lower().split() if word.isalpha() and word.isascii()}

    whole = words("same_document/debian-faq.en.pdf") & words("same_document/debian-faq.en.txt")
    for chapter in ("basic-defs", "choosing", "pkg-basics", "software", "support"):
        page = words(f"same_document/html/{chapter}.en.html")
        assert len(page) > 100
        assert len(page & whole) / len(page) > 0.95, chapter
