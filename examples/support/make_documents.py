"""Writes the PDF and DOCX pages of the example handbook, and its planted broken files.

Belongs here: a small reader for the text sources in `documents/` and just enough of the two file formats
for headings, paragraphs, lists and tables, with the standard library only. Does not belong here: reading
such files (assets/documents does that), and general-purpose document writing.

The same sources always give the same bytes: no clock, no compression (zlib's output differs between
builds), no random ids. Run it from anywhere:

    python examples/support/make_documents.py            # rewrites data/handbook
    python examples/support/make_documents.py OUT_FOLDER # writes somewhere else
"""

import io
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "documents"
HANDBOOK = HERE / "data" / "handbook"

TRUNCATED_PDF = "quality/calibration-certificate-0417.pdf"
WRONG_ENCODING = "gateways/anleitung-roost-4.md"
EMPTY_FILE = "procedures/holiday-cover.md"

# A page that a colleague saved on an old Windows machine: cp1252, so its umlauts are not valid UTF-8.
_GERMAN_PAGE = """# Kurzanleitung Roost 4

Das Gerät hört bis zu 40 Logger. Es hält die Messwerte 14 Tage, wenn die Leitung ausfällt.

1. Möglichst hoch aufhängen, Antennen senkrecht, nicht neben Lüftungskanälen.
2. Netzteil oder PoE anschließen. Nach spätestens drei Minuten leuchtet es grün.
3. In Perch »Gateway hinzufügen« wählen und den Code auf der Rückseite einlesen.

Blau heißt: Ethernet ist gestört, das Gerät sendet über LTE-M. Rückfragen an das Büro in Berlin,
berlin@hollowmere.example.com, +49 30 23125 014.
"""


@dataclass(frozen=True)
class Block:
    """One paragraph-like piece of a page. `kind`: h1, h2, p, li, ol or table; `rows` only for tables."""

    kind: str
    text: str = ""
    rows: tuple[tuple[str, ...], ...] = ()


def parse(source: str) -> list[Block]:
    """Reads the plain subset of Markdown that the sources use: headings, paragraphs, lists, pipe tables."""
    blocks: list[Block] = []
    rows: list[tuple[str, ...]] = []

    def close_table() -> None:
        if rows:
            blocks.append(Block("table", rows=tuple(rows)))
            rows.clear()

    for line in source.splitlines():
        if line.startswith("|"):
            cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
            if not all(re.fullmatch(r"-+", cell) for cell in cells):
                rows.append(cells)
            continue
        close_table()
        if line.startswith("## "):
            blocks.append(Block("h2", line[3:]))
        elif line.startswith("# "):
            blocks.append(Block("h1", line[2:]))
        elif line.startswith("- "):
            blocks.append(Block("li", line[2:]))
        elif re.match(r"\d+\. ", line):
            blocks.append(Block("ol", line))
        elif line.strip():
            blocks.append(Block("p", line))
    close_table()
    return blocks


# --- PDF ----------------------------------------------------------------------------------------------

_PAGE_WIDTH, _PAGE_HEIGHT, _MARGIN = 595, 842, 62  # A4 in points
_STYLES = {
    "h1": ("F2", 18, 10),
    "h2": ("F2", 13, 12),
    "p": ("F1", 10.5, 6),
    "li": ("F1", 10.5, 3),
    "ol": ("F1", 10.5, 3),
}
# Widths of Helvetica for the characters from space to tilde, in thousandths of the font size.
_WIDTHS = [
    *(278, 278, 355, 556, 556, 889, 667, 191, 333, 333, 389, 584, 278, 333, 278, 278),
    *(556, 556, 556, 556, 556, 556, 556, 556, 556, 556, 278, 278, 584, 584, 584, 556),
    *(1015, 667, 667, 722, 722, 667, 611, 778, 722, 278, 500, 667, 556, 833, 722, 778),
    *(667, 778, 722, 667, 611, 722, 667, 944, 667, 667, 611, 278, 278, 278, 469, 556),
    *(333, 556, 556, 500, 556, 556, 278, 556, 556, 222, 222, 500, 222, 833, 556, 556),
    *(556, 556, 333, 500, 278, 556, 500, 722, 500, 500, 500, 334, 260, 334, 584),
]


def _text_width(text: str, size: float) -> float:
    units = sum(_WIDTHS[ord(c) - 32] if 32 <= ord(c) < 127 else 556 for c in text)
    return units * size / 1000


def _wrap(text: str, size: float, width: float) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        candidate = f"{line} {word}".strip()
        # Bold is up to a tenth wider than the regular widths above; the reserve keeps it on the page.
        if line and _text_width(candidate, size) > width * 0.92:
            lines.append(line)
            line = word
        else:
            line = candidate
    return [*lines, line]


def _pdf_string(text: str) -> bytes:
    return b"(" + re.sub(rb"([\\()])", rb"\\\1", text.encode("cp1252")) + b")"


def _pdf_pages(blocks: list[Block]) -> Iterator[bytes]:
    """Yields the content stream of each page."""
    out: list[bytes] = []
    y = float(_PAGE_HEIGHT - _MARGIN)
    width = float(_PAGE_WIDTH - 2 * _MARGIN)

    def put(font: str, size: float, x: float, top: float, text: str) -> None:
        out.append(b"BT /%s %g Tf %.1f %.1f Td %s Tj ET" % (font.encode(), size, x, top, _pdf_string(text)))

    for block in blocks:
        if block.kind == "table":
            column = width / len(block.rows[0])
            pieces = []
            for number, row in enumerate(block.rows):
                cells = [_wrap(cell, 9.5, column - 8) for cell in row]
                pieces.append(("F2" if number == 0 else "F1", cells, max(map(len, cells)) * 12.0 + 4))
        else:
            font, size, before = _STYLES[block.kind]
            indent = 14 if block.kind in ("li", "ol") else 0
            mark = "\u2022 " if block.kind == "li" else ""
            lines = _wrap(mark + block.text, size, width - indent)
            pieces = [(font, [[line]], size * 1.35) for line in lines]
            y -= before
        for font, cells, height in pieces:
            if y - height < _MARGIN:
                yield b"\n".join(out)
                out.clear()
                y = float(_PAGE_HEIGHT - _MARGIN)
            for index, cell in enumerate(cells):
                for row_line, text in enumerate(cell):
                    if block.kind == "table":
                        put(font, 9.5, _MARGIN + index * column, y - 10 - row_line * 12, text)
                    else:
                        put(font, size, _MARGIN + indent, y - size, text)
            y -= height
        if block.kind == "table":
            y -= 6
    yield b"\n".join(out)


def pdf(blocks: list[Block]) -> bytes:
    """A PDF 1.4 file with the 14 standard fonts, uncompressed. Characters outside cp1252 raise UnicodeEncodeError."""
    title = next(block.text for block in blocks if block.kind == "h1")
    streams = list(_pdf_pages(blocks))
    first_page = 3 + len(streams)
    pages_id = first_page + len(streams)
    objects = [
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica-Bold /Encoding /WinAnsiEncoding >>",
        *(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream) for stream in streams),
        *(
            b"<< /Type /Page /Parent %d 0 R /MediaBox [0 0 %d %d] /Contents %d 0 R"
            b" /Resources << /Font << /F1 1 0 R /F2 2 0 R >> >> >>"
            % (pages_id, _PAGE_WIDTH, _PAGE_HEIGHT, 3 + number)
            for number in range(len(streams))
        ),
        b"<< /Type /Pages /Count %d /Kids [%s] >>"
        % (len(streams), b" ".join(b"%d 0 R" % (first_page + number) for number in range(len(streams)))),
        b"<< /Type /Catalog /Pages %d 0 R /Lang (en-GB) >>" % pages_id,
        b"<< /Title %s /Author (Hollowmere Instruments) >>" % _pdf_string(title),
    ]
    out = io.BytesIO()
    out.write(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n")
    offsets = []
    for number, body in enumerate(objects, start=1):
        offsets.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
    start = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    out.write(b"".join(b"%010d 00000 n \n" % offset for offset in offsets))
    out.write(
        b"trailer\n<< /Size %d /Root %d 0 R /Info %d 0 R >>\nstartxref\n%d\n%%%%EOF\n"
        % (len(objects) + 1, len(objects) - 1, len(objects), start)
    )
    return out.getvalue()


# --- DOCX ---------------------------------------------------------------------------------------------

_XML = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_MIME = "application/vnd.openxmlformats-officedocument.wordprocessingml"

_DOCX_FIXED_PARTS = {
    "[Content_Types].xml": (
        f'<Types xmlns="{_PACKAGE}/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Default Extension="xml" ContentType="application/xml"/>'
        f'<Override PartName="/word/document.xml" ContentType="{_MIME}.document.main+xml"/>'
        f'<Override PartName="/word/styles.xml" ContentType="{_MIME}.styles+xml"/>'
        f'<Override PartName="/word/numbering.xml" ContentType="{_MIME}.numbering+xml"/></Types>'
    ),
    "_rels/.rels": (
        f'<Relationships xmlns="{_PACKAGE}/relationships">'
        f'<Relationship Id="rId1" Type="{_OFFICE}/officeDocument" Target="word/document.xml"/></Relationships>'
    ),
    "word/_rels/document.xml.rels": (
        f'<Relationships xmlns="{_PACKAGE}/relationships">'
        f'<Relationship Id="rId1" Type="{_OFFICE}/styles" Target="styles.xml"/>'
        f'<Relationship Id="rId2" Type="{_OFFICE}/numbering" Target="numbering.xml"/></Relationships>'
    ),
    "word/styles.xml": (
        f'<w:styles xmlns:w="{_WORD}">'
        '<w:style w:type="paragraph" w:default="1" w:styleId="Normal"><w:name w:val="Normal"/></w:style>'
        '<w:style w:type="paragraph" w:styleId="Heading1"><w:name w:val="heading 1"/><w:basedOn w:val="Normal"/>'
        '<w:pPr><w:outlineLvl w:val="0"/></w:pPr><w:rPr><w:b/><w:sz w:val="36"/></w:rPr></w:style>'
        '<w:style w:type="paragraph" w:styleId="Heading2"><w:name w:val="heading 2"/><w:basedOn w:val="Normal"/>'
        '<w:pPr><w:outlineLvl w:val="1"/></w:pPr><w:rPr><w:b/><w:sz w:val="26"/></w:rPr></w:style></w:styles>'
    ),
    "word/numbering.xml": (
        f'<w:numbering xmlns:w="{_WORD}">'
        '<w:abstractNum w:abstractNumId="0"><w:lvl w:ilvl="0"><w:numFmt w:val="bullet"/><w:lvlText w:val="•"/></w:lvl>'
        '</w:abstractNum><w:abstractNum w:abstractNumId="1"><w:lvl w:ilvl="0"><w:start w:val="1"/>'
        '<w:numFmt w:val="decimal"/><w:lvlText w:val="%1."/></w:lvl></w:abstractNum>'
        '<w:num w:numId="1"><w:abstractNumId w:val="0"/></w:num>'
        '<w:num w:numId="2"><w:abstractNumId w:val="1"/></w:num></w:numbering>'
    ),
}
_DOCX_PARAGRAPH = {
    "h1": '<w:pPr><w:pStyle w:val="Heading1"/></w:pPr>',
    "h2": '<w:pPr><w:pStyle w:val="Heading2"/></w:pPr>',
    "li": '<w:pPr><w:numPr><w:ilvl w:val="0"/><w:numId w:val="1"/></w:numPr></w:pPr>',
    "ol": '<w:pPr><w:numPr><w:ilvl w:val="0"/><w:numId w:val="2"/></w:numPr></w:pPr>',
    "p": "",
}


def _docx_paragraph(text: str, properties: str = "", bold: bool = False) -> str:
    run = "<w:rPr><w:b/></w:rPr>" if bold else ""
    return f'<w:p>{properties}<w:r>{run}<w:t xml:space="preserve">{escape(text)}</w:t></w:r></w:p>'


def _docx_table(rows: tuple[tuple[str, ...], ...]) -> str:
    grid = '<w:gridCol w:w="2400"/>' * len(rows[0])
    body = "".join(
        "<w:tr>"
        + "".join(f"<w:tc><w:tcPr/>{_docx_paragraph(cell, bold=number == 0)}</w:tc>" for cell in row)
        + "</w:tr>"
        for number, row in enumerate(rows)
    )
    return f'<w:tbl><w:tblPr><w:tblW w:w="0" w:type="auto"/></w:tblPr><w:tblGrid>{grid}</w:tblGrid>{body}</w:tbl>'


def docx(blocks: list[Block]) -> bytes:
    """A Word file with real heading styles, numbered lists and tables, stored uncompressed with a fixed date."""
    body = "".join(
        _docx_table(block.rows)
        if block.kind == "table"
        else _docx_paragraph(re.sub(r"^\d+\. ", "", block.text), _DOCX_PARAGRAPH[block.kind])
        for block in blocks
    )
    document = f'<w:document xmlns:w="{_WORD}"><w:body>{body}<w:sectPr/></w:body></w:document>'
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, content in [*_DOCX_FIXED_PARTS.items(), ("word/document.xml", document)]:
            info = zipfile.ZipInfo(name, date_time=(2026, 9, 1, 0, 0, 0))
            info.create_system = 3
            archive.writestr(info, _XML + content)
    return out.getvalue()


# --- all of them --------------------------------------------------------------------------------------


def make_documents(sources: Path = SOURCES) -> dict[str, bytes]:
    """Path inside the handbook -> bytes, for every page that is not kept as plain text in the repository."""
    writers = {".pdf": pdf, ".docx": docx}
    made: dict[str, bytes] = {}
    for source in sorted(sources.rglob("*.md")):
        target = source.relative_to(sources).with_suffix("")
        made[target.as_posix()] = writers[target.suffix](parse(source.read_text(encoding="utf-8")))
    whole = made[TRUNCATED_PDF]
    # Pages, catalogue and cross-reference table come last, so nothing that is left can be repaired.
    made[TRUNCATED_PDF] = whole[: len(whole) // 3]
    made[WRONG_ENCODING] = _GERMAN_PAGE.encode("cp1252")
    made[EMPTY_FILE] = b""
    return made


def main(folder: Path = HANDBOOK) -> None:
    """Writes every made page below `folder`."""
    for path, content in make_documents().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:2]))
