"""The ``corpus`` schema is kept equal to what was landed: documents, their chunks, and what was refused.

Belongs here: finding what changed, and the transactions in which it is written. Does not belong here: how a
file is read (parse), a text redacted (redact) or cut (chunk); landing; vectors.

``corpus`` depends on ``raw`` alone: a file whose new version is refused leaves, and so does one that is gone.
Every function may be stopped at any moment and run again; it then does only what is left to do.

``corpus.piece`` has the chunks of several chunkings side by side (chunkings): each function for chunks is about one.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import psycopg
from psycopg import sql

from assets.documents.chunk import DEFAULT_CHUNKING, Chunking, chunk
from assets.documents.chunkings import STALE, in_language
from assets.documents.parse import Parsed, ParseError, Parser, clean, fallback_title, parser_of
from assets.documents.redact import Redactor, sha256
from assets.progress import Progress
from assets.sources.contract import CorpusMapping

Connection = psycopg.Connection[Any]

ROW_PARSER = "row/1"
# A batch is read, redacted and committed at once; a kill costs one batch of work.
BATCH_FILES = 64
BATCH_BYTES = 32 << 20
BATCH_DOCUMENTS = 200
FEEDBACK_TEXTS = 1000
MAX_TITLE = 300


@dataclass(frozen=True)
class DocumentCounts:
    """What refresh_documents did: ``seen == parsed + reused + unchanged + refused``.

    Attributes:
        seen: Files or rows that the source has.
        parsed: Read and redacted now.
        reused: Renamed or copied: the text of a document with the same content was taken.
        unchanged: Left as they were.
        refused: Now in quarantine.file.
        deleted: Documents removed, because they left the source or are refused now.
    """

    seen: int
    parsed: int
    reused: int
    unchanged: int
    refused: int
    deleted: int


@dataclass(frozen=True)
class ChunkCounts:
    """What refresh_chunks did.

    Attributes:
        documents: Documents that the source has.
        rechunked: Those cut now.
        chunks: Chunks that the source has now.
        deleted: Chunks that are no more because their document was cut anew.
    """

    documents: int
    rechunked: int
    chunks: int
    deleted: int


class _Item(NamedTuple):
    """A file or row of the source. ``sha256`` is of all that its document is made from."""

    path: str
    sha256: str
    size: int
    parser: str


class _Refused(NamedTuple):
    item: _Item
    error: ParseError


class _Document(NamedTuple):
    """A row of corpus.document."""

    document_id: str
    source: str
    path: str
    title: str
    media_type: str
    raw_sha256: str
    text: str
    text_sha256: str
    parser: str
    policy: str
    findings: str


class _Current(NamedTuple):
    raw_sha256: str
    parser: str
    policy: str
    text_sha256: str


class _Reader(Protocol):
    def listing(self) -> tuple[list[_Item], list[_Refused]]: ...

    def read(self, items: Sequence[_Item], parser: Parser) -> Iterator[tuple[_Item, Parsed | ParseError]]: ...


def refresh_documents(
    conn: Connection,
    source: str,
    redactor: Redactor,
    parser: Parser,
    *,
    mapping: CorpusMapping | None = None,
    run_id: str | None = None,
    progress: Progress | None = None,
) -> DocumentCounts:
    """Make the documents of ``source`` those of ``raw.<source>``, parsed and redacted.

    Args:
        conn: Outside of a transaction: each batch is committed on its own.
        source: Name of the source.
        redactor: Its policy is part of what makes a document up to date.
        parser: Open.
        mapping: None for a source of files. For a table: the columns that make a document of each row.
        run_id: Noted beside refused files.
        progress: Called with "documents", how many of the changed ones are done, and how many there are.

    Raises:
        ValueError: Rows without an id, or with the same one.
    """
    reader: _Reader = _Files(conn, source) if mapping is None else _Rows(conn, source, mapping)
    items, refused = reader.listing()
    current = _current(conn, source)
    changed: defaultdict[tuple[str, str], list[_Item]] = defaultdict(list)
    for item in items:
        old = current.get(item.path)
        if old is None or old[:3] != (item.sha256, item.parser, redactor.policy):
            changed[item.sha256, item.parser].append(item)
    total = sum(map(len, changed.values()))
    parsed = reused = done = 0
    for batch in _batches(list(changed.values())):
        alike = _alike(conn, source, redactor.policy, [like[0] for like in batch])
        new: list[_Document] = []
        unread: dict[_Item, list[_Item]] = {}
        for like in batch:
            document = alike.get((like[0].sha256, like[0].parser))
            if document is None:
                unread[like[0]] = like
            else:
                new += _copies(document, like, redactor)
                reused += len(like)
        for first, result in reader.read(list(unread), parser):
            like = unread[first]
            if isinstance(result, ParseError):
                refused += [
                    _Refused(item, ParseError(item.path, result.rule, result.reason, result.remedy))
                    for item in like
                ]
                continue
            new += _documents(source, like, result, redactor)
            parsed, reused = parsed + 1, reused + len(like) - 1
        _write(conn, new, current)
        done += sum(map(len, batch))
        if progress is not None:
            progress("documents", done, total)
    deleted = _finish(conn, source, items, refused, run_id)
    unchanged = len(items) - total
    return DocumentCounts(
        parsed + reused + unchanged + len(refused), parsed, reused, unchanged, len(refused), deleted
    )


def _batches(groups: list[list[_Item]]) -> Iterator[list[list[_Item]]]:
    batch: list[list[_Item]] = []
    size = 0
    for like in groups:
        if batch and (len(batch) == BATCH_FILES or size + like[0].size > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(like)
        size += like[0].size
    if batch:
        yield batch


class _Files:
    """The files of a source of documents."""

    def __init__(self, conn: Connection, source: str) -> None:
        self._conn = conn
        self._table = sql.Identifier("raw", source)

    def listing(self) -> tuple[list[_Item], list[_Refused]]:
        query = sql.SQL("select path, sha256, size from {} order by path").format(self._table)
        items, refused = [], []
        for path, digest, size in _fetch(self._conn, query):
            try:
                items.append(_Item(path, digest, size, parser_of(path)))
            except ParseError as error:
                refused.append(_Refused(_Item(path, digest, size, ""), error))
        return items, refused

    def read(self, items: Sequence[_Item], parser: Parser) -> Iterator[tuple[_Item, Parsed | ParseError]]:
        query = sql.SQL("select path, sha256, content from {} where path = any(%s)").format(self._table)
        contents = {
            (path, digest): content
            for path, digest, content in _fetch(self._conn, query, [[item.path for item in items]])
        }
        # A file that was landed anew since the listing is left to the next run.
        found = [item for item in items if (item.path, item.sha256) in contents]
        yield from zip(
            found,
            parser.parse_many((item.path, bytes(contents[item.path, item.sha256])) for item in found),
            strict=True,
        )


class _Rows:
    """The rows of a table that its contract maps to documents."""

    def __init__(self, conn: Connection, source: str, mapping: CorpusMapping) -> None:
        self._conn = conn
        self._source = source
        self._parts = {
            "table": sql.Identifier("raw", source),
            "id": sql.Identifier(mapping.id),
            "text": sql.Identifier(mapping.text),
            "title": sql.Identifier(mapping.title) if mapping.title else sql.NULL,
            "sections": sql.Identifier(mapping.sections) if mapping.sections else sql.NULL,
            # Left out where there are none: documents made before there could be any stay as they are.
            "hashed": sql.SQL(", {}").format(sql.Identifier(mapping.sections))
            if mapping.sections
            else sql.SQL(""),
        }

    def listing(self) -> tuple[list[_Item], list[_Refused]]:
        query = sql.SQL(
            "select {id}::text,"
            " encode(sha256(convert_to(jsonb_build_array({title}, {text}{hashed})::text, 'UTF8')), 'hex'),"
            " coalesce(octet_length({text}::text), 0)"
            " from {table} order by 1"
        ).format(**self._parts)
        items = [_Item(path, digest, size, ROW_PARSER) for path, digest, size in _fetch(self._conn, query)]
        for before, item in zip([None, *items], items, strict=False):
            if item.path is None or (before is not None and before.path == item.path):
                raise ValueError(
                    f"raw.{self._source}: {'an id is null' if item.path is None else f'two rows have id {item.path!r}'};"
                    " the corpus mapping of its contract needs a column that is required and unique"
                )
        return items, []

    def read(self, items: Sequence[_Item], parser: Parser) -> Iterator[tuple[_Item, Parsed | ParseError]]:
        query = sql.SQL(
            "select {id}::text, coalesce({title}::text, ''), coalesce({text}::text, ''), {sections}::jsonb"
            " from {table} where {id}::text = any(%s)"
        ).format(**self._parts)
        rows = {
            path: (title, text, sections)
            for path, title, text, sections in _fetch(self._conn, query, [[item.path for item in items]])
        }
        for item in items:
            if item.path in rows:
                yield item, _of_row(item.path, *rows[item.path])


def _of_row(path: str, title: str, text: str, sections: Any) -> Parsed | ParseError:
    title, text = _one_line(title), clean(text)
    if not title and not text:
        return ParseError(path, "no_text", "its text is empty", "fill in its text, or delete the row")
    above = [
        title,
        *(_one_line(one) for one in (sections if isinstance(sections, list) else []) if isinstance(one, str)),
    ]
    headings = [f"{'#' * min(level, 6)} {name}" for level, name in enumerate(filter(None, above), start=1)]
    whole = "\n\n".join([*headings, text]).strip()
    return Parsed(title or text.split("\n", 1)[0].strip(), whole, "text/markdown", ROW_PARSER)


def _one_line(text: str) -> str:
    return " ".join(clean(text).split())


def _documents(source: str, like: list[_Item], parsed: Parsed, redactor: Redactor) -> Iterator[_Document]:
    """The same text under each path. A title made from the name of the first file is made anew for the others."""
    redaction = redactor.redact(parsed.text)
    for item in like:
        title = fallback_title(item.path) if parsed.title == fallback_title(like[0].path) else parsed.title
        yield _Document(
            f"{source}/{item.path}",
            source,
            item.path,
            _title(title, redactor),
            parsed.media_type,
            item.sha256,
            redaction.text,
            sha256(redaction.text),
            item.parser,
            redactor.policy,
            json.dumps(redaction.findings),
        )


def _title(title: str, redactor: Redactor) -> str:
    # Cut afterwards: half an address is not recognised.
    return redactor.redact(title).text[:MAX_TITLE]


def _alike(
    conn: Connection, source: str, policy: str, items: list[_Item]
) -> dict[tuple[str, str], _Document]:
    """Documents that were made of the same content in the same way, by (raw_sha256, parser)."""
    columns = sql.SQL(", ").join(map(sql.Identifier, _Document._fields))
    query = sql.SQL(
        "select {} from corpus.document where source = %s and policy = %s and (raw_sha256, parser) in ("
        "select * from unnest(%s::text[], %s::text[]))"
    ).format(columns)
    rows = _fetch(
        conn, query, [source, policy, [item.sha256 for item in items], [item.parser for item in items]]
    )
    documents = (_Document(*row) for row in rows)
    return {(document.raw_sha256, document.parser): document for document in documents}


def _copies(document: _Document, like: list[_Item], redactor: Redactor) -> Iterator[_Document]:
    named_by_path = document.title == _title(fallback_title(document.path), redactor)
    for item in like:
        yield document._replace(
            document_id=f"{document.source}/{item.path}",
            path=item.path,
            title=_title(fallback_title(item.path), redactor) if named_by_path else document.title,
            findings=json.dumps(document.findings),
        )


def _current(conn: Connection, source: str) -> dict[str, _Current]:
    query = "select path, raw_sha256, parser, policy, text_sha256 from corpus.document where source = %s"
    return {path: _Current(*rest) for path, *rest in _fetch(conn, query, [source])}


def _write(conn: Connection, documents: list[_Document], current: dict[str, _Current]) -> None:
    columns = [*_Document._fields]
    upsert = sql.SQL(
        "insert into corpus.document ({columns}) values ({values})"
        " on conflict (document_id) do update set ({columns}, updated_at) = row({excluded}, now())"
    ).format(
        columns=sql.SQL(", ").join(map(sql.Identifier, columns)),
        values=sql.SQL(", ").join(sql.SQL("%s::jsonb" if name == "findings" else "%s") for name in columns),
        excluded=sql.SQL(", ").join(sql.Identifier("excluded", name) for name in columns),
    )
    stale = [
        new.document_id
        for new in documents
        if (old := current.get(new.path)) is not None and old.text_sha256 != new.text_sha256
    ]
    with conn.transaction(), conn.cursor() as cursor:
        cursor.executemany(upsert, documents)
        cursor.execute("update corpus.piece set chunker = %s where document_id = any(%s)", [STALE, stale])


def _finish(
    conn: Connection, source: str, items: list[_Item], refused: list[_Refused], run_id: str | None
) -> int:
    """Delete what the source no longer has, and note what it has that cannot be read."""
    kept = {item.path for item in items} - {item.path for item, _ in refused}
    # Landing writes to quarantine.file as well. What this function writes is told by where the file lies.
    place = f"raw.{source}"
    with conn.transaction(), conn.cursor() as cursor:
        cursor.execute(
            "delete from corpus.document where source = %s and path <> all(%s)", [source, sorted(kept)]
        )
        deleted = cursor.rowcount
        cursor.executemany(
            "insert into quarantine.file (source, file, rule, reason, remedy, sha256, size, lake_uri, run_id)"
            " values (%s, %s, %s, %s, %s, %s, %s, %s, %s)"
            " on conflict (source, file, rule, (coalesce(sha256, ''))) do update set reason = excluded.reason,"
            " remedy = excluded.remedy, run_id = excluded.run_id, last_seen = now(), resolved_at = null",
            [
                (
                    source,
                    item.path,
                    error.rule,
                    error.reason,
                    error.remedy,
                    item.sha256,
                    item.size,
                    place,
                    run_id,
                )
                for item, error in refused
            ],
        )
        cursor.execute(
            "update quarantine.file set resolved_at = now()"
            " where source = %s and lake_uri = %s and resolved_at is null and not exists ("
            "select from unnest(%s::text[], %s::text[], %s::text[]) as still (file, rule, sha256)"
            " where (still.file, still.rule, still.sha256) = (file.file, file.rule, file.sha256))",
            [
                source,
                place,
                [item.path for item, _ in refused],
                [error.rule for _, error in refused],
                [item.sha256 for item, _ in refused],
            ],
        )
    return deleted


def refresh_chunks(
    conn: Connection, source: str, chunking: Chunking = DEFAULT_CHUNKING, progress: Progress | None = None
) -> ChunkCounts:
    """Cut those documents of ``source`` whose text, language or chunker changed, and no other.

    Args:
        conn: Outside of a transaction: each batch is committed on its own.
        source: Name of the source, whose language is that of ``registry.source``.
        chunking: Chunks of others are not touched.
        progress: Called with "documents", how many of those to be cut are done, and how many there are.
    """
    chunking = in_language(conn, source, chunking)
    todo = [
        row[0]
        for row in _fetch(
            conn,
            "select document_id from corpus.document d where source = %(source)s and ("
            " not exists (select from corpus.piece c where c.document_id = d.document_id and c.chunking = %(cut)s)"
            " or exists (select from corpus.piece c where c.document_id = d.document_id and c.chunking = %(cut)s"
            " and c.chunker <> %(chunker)s)"
            ") order by document_id",
            {"source": source, "cut": str(chunking), "chunker": chunking.name},
        )
    ]
    deleted = 0
    for begin in range(0, len(todo), BATCH_DOCUMENTS):
        batch = todo[begin : begin + BATCH_DOCUMENTS]
        with conn.transaction():
            deleted += _cut(conn, source, chunking, batch)
        if progress is not None:
            progress("documents", begin + len(batch), len(todo))
    ((documents, total),) = _fetch(
        conn,
        "select (select count(*) from corpus.document where source = %(source)s),"
        " (select count(*) from corpus.piece where source = %(source)s and chunking = %(cut)s)",
        {"source": source, "cut": str(chunking)},
    )
    return ChunkCounts(documents, len(todo), total, deleted)


def _cut(conn: Connection, source: str, chunking: Chunking, batch: list[str]) -> int:
    """Replace the chunks of some documents; returns how many are no more."""
    # No passage goes until the end of this transaction.
    conn.execute("select pg_advisory_xact_lock_shared(hashtext('retrieval.passage'))")
    # Locked, so that the chunks written are those of the text that is there when they are committed.
    documents = conn.execute(
        "select document_id, text from corpus.document where document_id = any(%s) order by 1 for update",
        [batch],
    ).fetchall()
    chunks = [(document_id, piece) for document_id, text in documents for piece in chunk(text, chunking)]
    rows = conn.execute(
        "delete from corpus.piece where document_id = any(%s) and chunking = %s returning chunk_id",
        [batch, str(chunking)],
    ).fetchall()
    # Texts are numbered now: a row that gets its number later is written twice. In one order, so that two sources with
    # the same texts wait for each other instead of deadlocking; sought first, for a conflict would use up a number.
    hashes = sorted({piece.content_hash for _, piece in chunks})
    conn.execute(
        "insert into retrieval.passage (content_hash) select hash from unnest(%s::text[]) as t (hash)"
        " where not exists (select from retrieval.passage p where p.content_hash = t.hash) order by hash"
        " on conflict do nothing",
        [hashes],
    )
    numbers = dict(
        conn.execute(
            "select content_hash, passage_no from retrieval.passage where content_hash = any(%s)", [hashes]
        ).fetchall()
    )
    with (
        conn.cursor() as cursor,
        cursor.copy(
            "copy corpus.piece (chunking, chunk_id, document_id, source, ordinal, start_char, end_char, text,"
            " content_hash, heading, chunker, passage_no) from stdin"
        ) as copy,
    ):
        for document_id, piece in chunks:
            copy.write_row(
                (
                    str(chunking),
                    piece.chunk_id(document_id),
                    document_id,
                    source,
                    piece.ordinal,
                    piece.start_char,
                    piece.end_char,
                    piece.text,
                    piece.content_hash,
                    piece.heading,
                    chunking.name,
                    numbers[piece.content_hash],
                )
            )
    new = {piece.chunk_id(document_id) for document_id, piece in chunks}
    return sum(chunk_id not in new for (chunk_id,) in rows)


def retire_sources(conn: Connection, kept: Sequence[str]) -> int:
    """Delete the documents of every source but ``kept``, and with them their chunks; returns how many.

    For sources whose contract is gone. Their vectors leave the index with the next load of any other source.
    """
    with conn.transaction():
        return conn.execute("delete from corpus.document where source <> all(%s)", [list(kept)]).rowcount


def feedback_texts(conn: Connection, policy: str) -> Iterator[str]:
    """Each text of the feedback log that has no redaction under ``policy`` yet: prompts, answers, comments, corrections.

    The list is kept on the server while it is read, and ``conn`` is committed after each part of it.
    """
    with conn.cursor(name="feedback_texts", withhold=True) as cursor:
        cursor.execute(
            "select distinct written.text from ("
            " select message ->> 'content' from feedback.interaction, jsonb_array_elements(messages) as message"
            " union all select output from feedback.interaction"
            " union all select explanation from feedback.feedback_event"
            " union all select correction from feedback.feedback_event"
            ") as written (text) where written.text is not null and not exists ("
            " select from corpus.redaction r where r.policy = %s"
            " and r.text_sha256 = encode(sha256(convert_to(written.text, 'UTF8')), 'hex'))",
            [policy],
        )
        while rows := cursor.fetchmany(FEEDBACK_TEXTS):
            # Ends the transaction of the fetch, so that the reader's own may end as well.
            conn.commit()
            for (text,) in rows:
                yield text


def _fetch(conn: Connection, query: Any, parameters: Any = None) -> list[Any]:
    # In a transaction that ends here: none stays open while files are parsed.
    with conn.transaction():
        return conn.execute(query, parameters).fetchall()
