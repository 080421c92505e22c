"""The words of the index: postings of every passage that may be retrieved, and the statistics that BM25 needs.

A passage is indexed once, however many chunks share its text: as the text with the title and section heading of the
first of them, by its id, in the language of that one's source. A passage that no source allows to be retrieved is not
indexed, and its words count nowhere.

Belongs here: keeping the postings equal to the corpus. Does not belong here: searching them (``retrieval.search``), and
forgetting deleted passages, which a trigger does when they are deleted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg

Connection = psycopg.Connection[Any]

# A batch is indexed and committed at once.
BATCH_PASSAGES = 50_000
# Statistics of a table that grew by so many are out of date.
MANY_PASSAGES = 1_000

# The sources whose texts may be retrieved, and by what configuration their words are read.
_SOURCES = """
select coalesce(array_agg(source), '{}'), coalesce(array_agg(retrieval.text_configuration(language)), '{}')
from registry.source
where 'rag' = any(allowed_uses)
"""

# What each passage is to be indexed as.
_WANTED = """
select distinct on (c.passage_no)
  c.passage_no,
  md5(concat_ws(E'\\n', s.configuration, d.title, c.heading)) as digest
from corpus.piece as c
join corpus.document as d using (document_id)
join unnest(%(sources)s::text[], %(configurations)s::text[]) as s (source, configuration) on s.source = c.source
where c.chunking = %(chunking)s and c.passage_no is not null
order by c.passage_no, c.chunk_id
"""

# The text of a passage never changes, but what stands above it does, and whether it may be found at all.
_DIFFERENCES = f"""
select coalesce(w.passage_no, t.passage_no), w.passage_no is not null, t.passage_no is not null
from ({_WANTED}) as w
full join (
  select passage_no, digest from retrieval.passage_text where chunking = %(chunking)s
) as t using (passage_no)
where w.digest is distinct from t.digest
order by 1
"""

# Before one chunk is chosen of those that share a text, so that several processes can read them.
# Postgres takes a megabyte of lexemes at most, and cannot hold more positions of one than 255.
_READ = """
create temporary table read on commit drop as
select
  c.passage_no, c.chunk_id, s.configuration,
  md5(concat_ws(E'\\n', s.configuration, d.title, c.heading)) as digest,
  to_tsvector(
    s.configuration::regconfig, left(d.title || E'\\n' || c.heading, 10000) || E'\\n' || left(c.text, 200000)
  ) as vector
from corpus.piece as c
join corpus.document as d using (document_id)
join unnest(%(sources)s::text[], %(configurations)s::text[]) as s (source, configuration) on s.source = c.source
where c.chunking = %(chunking)s and c.passage_no = any(%(passages)s)
"""

_FRESH = """
create temporary table fresh on commit drop as
select distinct on (r.passage_no) r.passage_no, r.configuration, r.digest, r.vector
from read as r
where not exists (
  select from retrieval.passage_text as t where t.passage_no = r.passage_no and t.chunking = %(chunking)s
)
order by r.passage_no, r.chunk_id
"""

_TERMS = """
insert into retrieval.term as t (chunking, configuration, lexeme, df)
select %(chunking)s, c.configuration, w.word, w.ndoc
from (select distinct configuration from fresh) as c
cross join lateral ts_stat(format('select vector from fresh where configuration = %%L', c.configuration)) as w
on conflict (chunking, configuration, lexeme) do update set df = t.df + excluded.df
"""

_TEXTS = """
insert into retrieval.passage_text (passage_no, chunking, configuration, digest, length, terms, tfs)
select
  f.passage_no, %(chunking)s, f.configuration, f.digest, least(coalesce(w.length, 0), 32767),
  coalesce(w.terms, '{}'), coalesce(w.tfs, '{}')
from fresh as f
left join (
  select
    f.passage_no,
    sum(cardinality(l.positions)) as length,
    array_agg(t.term_no) as terms,
    array_agg(cardinality(l.positions)::smallint) as tfs
  from fresh as f
  cross join unnest(f.vector) as l
  join retrieval.term as t
    on t.chunking = %(chunking)s and t.configuration = f.configuration and t.lexeme = l.lexeme
  group by f.passage_no
) as w using (passage_no)
"""

_CORPUS = """
insert into retrieval.text_corpus as c (chunking, configuration, passages, lexemes)
select t.chunking, t.configuration, count(*), sum(t.length)
from retrieval.passage_text as t
where t.chunking = %(chunking)s and t.text_no >= %(first)s
group by 1, 2
on conflict (chunking, configuration) do update
set passages = c.passages + excluded.passages, lexemes = c.lexemes + excluded.lexemes
"""


@dataclass(frozen=True)
class PostingsReport:
    """What one refresh did.

    Attributes:
        added: Passages indexed now, those indexed anew included.
        removed: Passages taken out, those indexed anew included; deleted ones had left before.
        passages: Passages that words can find now.
        terms: Distinct lexemes in them.
    """

    added: int
    removed: int
    passages: int
    terms: int


def refresh_postings(connection: Connection, chunking: str) -> PostingsReport:
    """Index the passages of a chunking that have no postings yet, and take out or index anew those that changed.

    Outside of a transaction every batch is committed on its own, so that a kill costs one batch; inside of one,
    everything is the transaction's. Refreshes queue on an advisory lock, which deleting passages takes too.

    Args:
        chunking: As in ``corpus.piece``.
    """
    added = removed = 0
    with connection.transaction():
        sources, configurations = connection.execute(_SOURCES).fetchone() or ([], [])
        wanted: dict[str, Any] = {"chunking": chunking, "sources": sources, "configurations": configurations}
        differences = connection.execute(_DIFFERENCES, wanted).fetchall()
    for start in range(0, len(differences), BATCH_PASSAGES):
        batch = differences[start : start + BATCH_PASSAGES]
        with connection.transaction():
            connection.execute("select pg_advisory_xact_lock(hashtext('retrieval.posting'))")
            removed += _one(
                connection,
                "select retrieval.forget_postings(%s, %s)",
                [[passage for passage, _, indexed in batch if indexed], chunking],
            )
            added += _index(connection, wanted, [passage for passage, there, _ in batch if there])
            if added > MANY_PASSAGES:
                for table in ("term", "posting", "passage_text"):
                    connection.execute(f"analyze retrieval.{table}")
    if differences:
        with connection.transaction():
            connection.execute("select pg_advisory_xact_lock(hashtext('retrieval.posting'))")
            connection.execute("select retrieval.merge_segments(%s)", [chunking])
    return PostingsReport(
        added,
        removed,
        _one(
            connection,
            "select coalesce(sum(passages), 0) from retrieval.text_corpus where chunking = %s",
            [chunking],
        ),
        _one(connection, "select count(*) from retrieval.term where chunking = %s", [chunking]),
    )


def _index(connection: Connection, wanted: dict[str, Any], passages: list[int]) -> int:
    """Index those of ``passages`` that are not; returns how many they were."""
    if not passages:
        return 0
    # Words are read by several processes, and brought together in memory.
    connection.execute(
        "select set_config('work_mem', '256MB', true), set_config('parallel_tuple_cost', '0', true)"
    )
    connection.execute(_READ, wanted | {"passages": passages})
    connection.execute("analyze read (passage_no)")
    connection.execute(_FRESH, wanted)
    connection.execute("analyze fresh (passage_no, configuration)")
    if connection.execute(_TERMS, wanted).rowcount > MANY_PASSAGES:
        # The planner takes a table that was never analyzed for one of a few rows, and would read it once for each word.
        connection.execute("analyze retrieval.term")
    # Segments are numbered from the first of their texts, of which each gets a higher number than all before.
    first = _one(
        connection, "select nextval(pg_get_serial_sequence('retrieval.passage_text', 'text_no'))", []
    )
    added = connection.execute(_TEXTS, wanted).rowcount
    connection.execute(_CORPUS, wanted | {"first": first})
    connection.execute("select retrieval.write_segment(%s, %s)", [wanted["chunking"], first])
    connection.execute("drop table read, fresh")
    return added


def _one(connection: Connection, query: str, parameters: list[Any]) -> int:
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return int(row[0])
