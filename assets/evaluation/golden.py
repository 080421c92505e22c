"""Golden sets: questions, and what answers each: a document, or a span of its text.

Spans are kept as offsets into the document's text, so that they outlive the chunks it is cut into. Belongs here:
reading a golden set out of ``raw``, finding its answers in the corpus, and saying of a ranking what it got right. Does
not belong here: asking an index (runs) and measures (retrieval).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from assets.datasets.canonical import digest
from assets.documents.corpus import ROW_PARSER
from assets.documents.parse import clean
from assets.sources.contract import Contract, GoldenMapping, key_column

Connection = psycopg.Connection[Any]

# Cleaning and redaction move an answer: by so many characters, and by so much of its offset, it is still the same one.
NEAR = 200
DRIFT = 0.1

_HEADINGS = re.compile(r"(?:#{1,6} [^\n]+\n\n)*")


class Place(NamedTuple):
    """A chunk: where in which document it stands, in code points."""

    chunk_id: str
    document_id: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """What answers a question: a document, or, where ``end`` is not 0, the span of its text from start to end."""

    document_id: str
    start: int = 0
    end: int = 0

    @property
    def name(self) -> str:
        """Names it among judgements."""
        return f"{self.document_id}[{self.start}:{self.end}]" if self.end else self.document_id

    def is_in(self, place: Place) -> bool:
        """Whether the chunk is of the document and, where there is a span, has a part of it."""
        return place.document_id == self.document_id and (
            not self.end or (place.start < self.end and self.start < place.end)
        )


@dataclass(frozen=True, slots=True)
class Unscored:
    """A golden row that cannot be scored, and why.

    ``no_question``, ``no_document``, ``document_not_in_corpus``, ``no_answer`` (none, empty or NaN),
    ``bad_answer_start``, or ``answer_not_in_document``, which redaction may be the reason of.
    """

    question: str
    document_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Golden:
    """A golden set.

    Attributes:
        document_source: The source that was judged, and is searched.
        queries: Question id -> text.
        targets: Question id -> all that answers it.
        unscored: The rows left out.
    """

    source: str
    document_source: str
    queries: dict[str, str]
    targets: dict[str, tuple[Target, ...]]
    unscored: tuple[Unscored, ...]

    @property
    def qrels(self) -> dict[str, dict[str, int]]:
        """Question id -> {name of a target: 1}."""
        return {
            qid: dict.fromkeys((target.name for target in found), 1) for qid, found in self.targets.items()
        }


def ranking(
    targets: Sequence[Target], passages: Iterable[tuple[float, Sequence[Place]]], k: int
) -> dict[str, float]:
    """The k best of what passages stand for, with their scores, to be judged by ``targets``.

    A passage stands for the targets that are in it, wherever its text occurs; where none is, for its document, or, where
    spans are asked for, for itself. What several passages stand for counts once, by the first.

    Args:
        passages: Score and places of each, best first.
    """
    best: dict[str, float] = {}
    for score, places in passages:
        right = [target.name for target in targets if any(map(target.is_in, places))]
        for name in right or [places[0].chunk_id if targets[0].end else places[0].document_id]:
            if name not in best:
                if len(best) == k:
                    return best
                best[name] = score
    return best


def golden_questions(conn: psycopg.Connection[Any], contract: Contract) -> list[str]:
    """All questions of a golden source; none while it has not been landed."""
    assert contract.golden is not None
    source = contract.golden.question_source or contract.name
    landed = conn.execute("select to_regclass(%s)", [f"raw.{source}"]).fetchone()
    if landed is None or landed[0] is None:
        return []
    query = sql.SQL("select {0}::text from {1} where {0} is not null").format(
        sql.Identifier(contract.golden.question), sql.Identifier("raw", source)
    )
    return [row[0] for row in conn.execute(query)]


def read_golden(connection: Connection, contract: Contract, questions: Contract | None = None) -> Golden:
    """The golden set in ``raw.<name>``, as its contract's ``golden`` property maps it.

    Rows with the same question are one question with several right answers. A question is scored only when every one
    of its rows can be; those that cannot come back in ``unscored``.

    Args:
        questions: The contract of ``golden.question_source``, if there is one.
    """
    golden = contract.golden
    assert golden is not None
    rows = _rows(connection, contract.name, golden, questions)
    asked = sorted({document_id for _, document_id, *_ in rows})
    texts = _texts(connection, asked, with_text=golden.answer is not None)
    judged: defaultdict[str, set[Target]] = defaultdict(set)
    unscored: list[Unscored] = []
    for question, document_id, answer, start in rows:
        found: str | list[Target]
        if not question.strip():
            found = "no_question"
        elif document_id == f"{golden.document_source}/":
            document_id, found = "", "no_document"
        elif document_id not in texts:
            found = "document_not_in_corpus"
        elif golden.answer is None:
            found = [Target(document_id)]
        else:
            found = _spans(document_id, *texts[document_id], answer, start)
        if isinstance(found, str):
            unscored.append(Unscored(question, document_id, found))
        else:
            judged[question] |= {*found}
    incomplete = {row.question for row in unscored}
    complete = {question: found for question, found in judged.items() if question not in incomplete}
    return Golden(
        contract.name,
        golden.document_source,
        {_id(question): question for question in complete},
        {_id(question): tuple(_merged(found)) for question, found in complete.items()},
        tuple(unscored),
    )


def _id(question: str) -> str:
    return digest(question)[:16]


def _rows(
    connection: Connection, source: str, golden: GoldenMapping, questions: Contract | None
) -> list[tuple[str, str, Any, Any]]:
    """(question, document id, answer, its start), sorted and without repetitions."""
    table = sql.Identifier("raw", source)
    question: sql.Composable = sql.SQL("g.{}").format(sql.Identifier(golden.question))
    join: sql.Composable = sql.SQL("")
    if golden.question_source is not None:
        assert questions is not None and golden.question_key is not None
        question = sql.SQL("q.{}").format(sql.Identifier(golden.question))
        join = sql.SQL(" left join {} q on q.{}::text = g.{}::text").format(
            sql.Identifier("raw", golden.question_source),
            sql.Identifier(key_column(questions) or ""),
            sql.Identifier(golden.question_key),
        )
    statement = sql.SQL(
        "select distinct coalesce({question}::text, ''), {prefix} || coalesce(g.{document}::text, ''),"
        " to_jsonb({answer}), to_jsonb({start}) from {table} g{join} order by 1, 2, 3, 4"
    ).format(
        question=question,
        prefix=sql.Literal(f"{golden.document_source}/"),
        document=sql.Identifier(golden.document),
        answer=_column(golden.answer),
        start=_column(golden.answer_start),
        table=table,
        join=join,
    )
    return connection.execute(statement).fetchall()


def _column(name: str | None) -> sql.Composable:
    return sql.SQL("null::text") if name is None else sql.SQL("g.{}").format(sql.Identifier(name))


def _texts(connection: Connection, documents: list[str], *, with_text: bool) -> dict[str, tuple[str, str]]:
    """Text and parser of those documents that there are."""
    rows = connection.execute(
        "select document_id, case when %s then text else '' end, parser from corpus.document"
        " where document_id = any(%s)",
        [with_text, documents],
    )
    return {document_id: (text, parser) for document_id, text, parser in rows}


def _spans(document_id: str, text: str, parser: str, answer: Any, start: Any) -> str | list[Target]:
    """The spans of ``text`` that are the answer, or why there are none."""
    alternatives = answer if isinstance(answer, list) else [{"text": answer, "answer_start": start}]
    # A row's document begins with its title and sections, which offsets into the row's text do not count.
    above = _HEADINGS.match(text) if parser == ROW_PARSER else None
    lead = above.end() if above else 0
    spans: list[Target] = []
    for one in alternatives:
        words, offset = (one.get("text"), one.get("answer_start")) if isinstance(one, dict) else (one, None)
        words = clean(words).strip() if isinstance(words, str) else ""
        if not words or words == "NaN":
            return "no_answer"
        if offset is not None and (not isinstance(offset, int) or isinstance(offset, bool) or offset < 0):
            return "bad_answer_start"
        places = list(_occurrences(text, words))
        if offset is not None:
            expected = offset + lead
            near = [place for place in places if abs(place - expected) <= NEAR + DRIFT * offset]
            places = [min(near, key=lambda place: abs(place - expected))] if near else []
        if not places:
            return "answer_not_in_document"
        spans += [Target(document_id, place, place + len(words)) for place in places]
    return spans or "no_answer"


def _occurrences(text: str, words: str) -> Iterator[int]:
    place = text.find(words)
    while place >= 0:
        yield place
        place = text.find(words, place + len(words))


def _merged(targets: Iterable[Target]) -> Iterator[Target]:
    """Spans that overlap are one: alternatives say the same in more words or fewer."""
    held: Target | None = None
    for target in sorted(targets):
        if held is not None and held.document_id == target.document_id and target.start < held.end:
            held = Target(held.document_id, held.start, max(held.end, target.end))
            continue
        if held is not None:
            yield held
        held = target
    if held is not None:
        yield held
