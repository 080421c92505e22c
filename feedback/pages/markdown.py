"""Markdown to HTML for texts nobody vouches for: what a user wrote, what a model answered.

Belongs here: a small, safe subset (headings, lists, quotes, code, tables, emphasis, links). Every character of the
input is escaped; tags come from this module alone, attributes only as the address of an http(s) link.
Does not belong here: raw HTML, images, anything that makes the browser fetch.
"""

import json
import re
from collections.abc import Iterator, Sequence
from html import escape

from markupsafe import Markup

# Above this size a text is shown as it is: nobody reads it formatted. So is JSON that would grow above it when indented:
# deeply nested, it would grow by hundreds of times.
MAX_FORMATTED = 200_000

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[^`]*$")
_HEADING = re.compile(r"^ {0,3}(#{1,6})[ \t]+(.*)$")
_RULE = re.compile(r"^ {0,3}(?:-{3,}|\*{3,}|_{3,})[ \t]*$")
_ITEM = re.compile(r"^( *)([-*+]|\d{1,9}[.)])[ \t]+(.*)$")
_QUOTE = re.compile(r"^ {0,3}> ?(.*)$")
_TABLE_RULE = re.compile(r"^\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?$")
# One pass, leftmost first: code, link, bare address, bold, italic. Each part is bounded, so no input is slow.
_INLINE = re.compile(
    r"`(?P<code>[^`\n]{1,2000})`"
    r"|\[(?P<text>[^\[\]\n]{1,500})\]\((?P<href>https?://[^\s()<>\"]{1,2000})\)"
    r"|(?P<bare>https?://[^\s<>\"'`]{1,2000})"
    r"|\*\*(?P<bold>(?=\S)[^*\n]{1,2000}(?<=\S))\*\*"
    r"|(?<![\w*])\*(?P<italic>(?=\S)[^*\n]{1,2000}(?<=\S))\*(?![\w*])"
    r"|(?<!\w)_(?P<low>(?=\S)[^_\n]{1,2000}(?<=\S))_(?!\w)"
)


def to_html(text: str) -> Markup:
    """``text`` formatted: JSON indented, Markdown rendered, anything very long as it is."""
    if len(text) > MAX_FORMATTED:
        return preformatted(text)
    laid_out = _laid_out_json(text)
    if laid_out is not None:
        return preformatted(laid_out)
    return Markup("".join(_blocks(text.expandtabs(4).splitlines(), depth=0)))


def preformatted(text: str) -> Markup:
    return Markup(f"<pre>{escape(text)}</pre>")


def _laid_out_json(text: str) -> str | None:
    """JSON indented, or as it is where that would be too much; None if it is no JSON."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    indented, size = [], 0
    try:
        for part in json.JSONEncoder(ensure_ascii=False, indent=2).iterencode(json.loads(text)):
            indented.append(part)
            size += len(part)
            if size > MAX_FORMATTED:
                return text
    except (ValueError, RecursionError):
        return None
    return "".join(indented)


def _blocks(lines: Sequence[str], depth: int) -> Iterator[str]:
    """``depth`` counts quotes and lists around these lines; beyond a few, text stays a paragraph."""
    at = 0
    while at < len(lines):
        line = lines[at]
        if not line.strip():
            at += 1
        elif fence := _FENCE.match(line):
            end = at + 1
            while end < len(lines) and not lines[end].strip().startswith(fence[1]):
                end += 1
            yield str(preformatted("\n".join(lines[at + 1 : end])))
            at = end + 1
        elif heading := _HEADING.match(line):
            # The page has its own outline: a heading in a message ranks below it.
            yield f'<p class="h{len(heading[1])}">{_inline(heading[2].rstrip("# "))}</p>'
            at += 1
        elif _RULE.match(line):
            yield "<hr>"
            at += 1
        elif depth < 5 and _QUOTE.match(line):
            end, inner = at, []
            while end < len(lines) and (quote := _QUOTE.match(lines[end])):
                inner.append(quote[1])
                end += 1
            yield f"<blockquote>{''.join(_blocks(inner, depth + 1))}</blockquote>"
            at = end
        elif depth < 5 and _ITEM.match(line):
            html, at = _list(lines, at, depth)
            yield html
        elif "|" in line and _rules_table(lines[at + 1 : at + 2]):
            end = at + 2
            while end < len(lines) and "|" in lines[end]:
                end += 1
            yield _table(line, lines[at + 2 : end])
            at = end
        else:
            end = at + 1
            while end < len(lines) and lines[end].strip() and not _starts_block(lines[end], depth):
                end += 1
            # Line breaks stay what they are; the style sheet decides whether they are seen.
            yield "<p>" + "\n".join(_inline(part.strip()) for part in lines[at:end]) + "</p>"
            at = end


def _starts_block(line: str, depth: int) -> bool:
    if _FENCE.match(line) or _HEADING.match(line) or _RULE.match(line):
        return True
    return depth < 5 and bool(_QUOTE.match(line) or _ITEM.match(line))


def _rules_table(following: Sequence[str]) -> bool:
    return bool(following and "|" in following[0] and _TABLE_RULE.match(following[0].strip()))


def _list(lines: Sequence[str], at: int, depth: int) -> tuple[str, int]:
    """One list from line ``at``: its HTML and the line after it. What is indented deeper belongs to the item above."""
    first = _ITEM.match(lines[at])
    assert first is not None
    indent, ordered = len(first[1]), first[2][0].isdigit()
    items: list[list[str]] = []
    while at < len(lines):
        line = lines[at]
        match = _ITEM.match(line)
        if match and len(match[1]) <= indent:
            if match[2][0].isdigit() != ordered or len(match[1]) < indent:
                break
            items.append([match[3]])
        elif line.startswith(" " * (indent + 2)) and line.strip():
            items[-1].append(line[indent + 2 :])
        elif not line.strip() and at + 1 < len(lines) and lines[at + 1].startswith(" " * (indent + 2)):
            items[-1].append("")
        else:
            break
        at += 1
    body = "".join(f"<li>{_item(item, depth + 1)}</li>" for item in items)
    if not ordered:
        return f"<ul>{body}</ul>", at
    start = int(first[2][:-1])
    return f'<ol start="{start}">{body}</ol>', at


def _item(lines: Sequence[str], depth: int) -> str:
    parts = list(_blocks(lines, depth))
    if parts and parts[0].startswith("<p>"):
        parts[0] = parts[0].removeprefix("<p>").removesuffix("</p>")
    return "".join(parts)


def _table(head: str, rows: Sequence[str]) -> str:
    names = _cells(head)
    top = "".join(f"<th>{_inline(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in _cells(row)[: len(names)]) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().removeprefix("|").removesuffix("|").split("|")]


def _inline(text: str) -> str:
    parts, at = [], 0
    for match in _INLINE.finditer(text):
        parts.append(escape(text[at : match.start()]))
        parts.append(_span(match))
        at = match.end()
    parts.append(escape(text[at:]))
    return "".join(parts)


def _span(match: re.Match[str]) -> str:
    found = match.groupdict()
    if found["code"]:
        return f"<code>{escape(found['code'])}</code>"
    if found["href"]:
        return _link(found["href"], found["text"])
    if found["bare"]:
        address = found["bare"].rstrip(".,;:!?)")
        return _link(address, address) + escape(found["bare"][len(address) :])
    if found["bold"]:
        return f"<strong>{_inline(found['bold'])}</strong>"
    return f"<em>{_inline(found['italic'] or found['low'])}</em>"


def _link(address: str, text: str) -> str:
    return (
        f'<a href="{escape(address)}" title="{escape(address)}" target="_blank"'
        f' rel="noopener noreferrer nofollow">{escape(text)}</a>'
    )
