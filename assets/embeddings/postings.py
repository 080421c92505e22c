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

# A batch is indexed and committed at once; its words are sorted in a temporary table.
BATCH_PASSAGES = 50_000
# Statistics of a table that grew by so many are out of date.
MANY_PASSAGES = 1_000

# What each passage is to be indexed as. Bound to the passages of %(passages)s, or to all when that is null.
_WANTED = """
with s as materialized (  -- or the configuration is looked up for every chunk
  select source, retrieval.text_configuration(language) as configuration
  from registry.source
  where 'rag' = any(allowed_uses)
)
select distinct on (p.passage_no)
  p.passage_no,
  s.configuration,
  d.title || E'\\n' || c.heading as above,
  c.text,
  md5(concat_ws(E'\\n', s.configuration, d.title, c.heading)) as digest
from retrieval.passage as p
join corpus.chunk as c using (content_hash)
join corpus.document as d using (document_id)
join s on s.source = c.source
where %(passages)s::int[] is null or p.passage_no = any(%(passages)s)
order by p.passage_no, c.chunk_id
"""

# The text of a passage never changes, but what stands above it does, and whether it may be found at all.
_DIFFERENCES = f"""
select coalesce(w.passage_no, t.passage_no), w.passage_no is not null, t.passage_no is not null
from ({_WANTED}) as w
full join retrieval.passage_text as t using (passage_no)
where w.digest is distinct from t.digest
order by 1
"""

# Postgres takes a megabyte of lexemes at most, and cannot hold more positions of one than 255.
_FRESH = f"""
create temporary table fresh on commit drop as
select w.passage_no, w.configuration, w.digest, v.vector, l.length
from ({_WANTED}) as w
left join retrieval.passage_text as t using (passage_no)
cross join lateral (
  select to_tsvector(w.configuration::regconfig, left(w.above, 10000) || E'\\n' || left(w.text, 200000)) as vector offset 0
) as v
cross join lateral (
  select coalesce(sum(cardinality(positions)), 0) as length from unnest(v.vector)
) as l
where t.passage_no is null
"""

_TERMS = """
insert into retrieval.term as t (configuration, lexeme, df)
select f.configuration, l.lexeme, count(*) from fresh as f cross join unnest(f.vector) as l group by 1, 2
on conflict (configuration, lexeme) do update set df = t.df + excluded.df
"""

# Sorted by term, so that the postings of one lie side by side.
_POSTINGS = """
with posted as (
  insert into retrieval.posting (term_no, passage_no, tf, length)
  select t.term_no, f.passage_no, cardinality(l.positions), least(f.length, 32767)
  from fresh as f
  cross join unnest(f.vector) as l
  join retrieval.term as t on t.configuration = f.configuration and t.lexeme = l.lexeme
  order by 1, 2
  returning term_no, passage_no
),
terms as (
  select passage_no, array_agg(term_no) as terms from posted group by 1
)
insert into retrieval.passage_text (passage_no, configuration, digest, length, terms)
select f.passage_no, f.configuration, f.digest, f.length, coalesce(t.terms, '{}')
from fresh as f
left join terms as t using (passage_no)
"""

_CORPUS = """
insert into retrieval.text_corpus as c (configuration, passages, lexemes)
select configuration, count(*), sum(length) from fresh group by 1
on conflict (configuration) do update
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


def refresh_postings(connection: Connection) -> PostingsReport:
    """Index the passages that have no postings yet, and take out or index anew those that changed their place.

    Outside of a transaction every batch is committed on its own, so that a kill costs one batch; inside of one,
    everything is the transaction's. Refreshes queue on an advisory lock, which deleting passages takes too.
    """
    added = removed = 0
    with connection.transaction():
        differences = connection.execute(_DIFFERENCES, {"passages": None}).fetchall()
    for start in range(0, len(differences), BATCH_PASSAGES):
        batch = differences[start : start + BATCH_PASSAGES]
        with connection.transaction():
            connection.execute("select pg_advisory_xact_lock(hashtext('retrieval.posting'))")
            removed += _one(
                connection,
                "select retrieval.forget_postings(%s)",
                [[passage for passage, _, indexed in batch if indexed]],
            )
            added += _index(connection, [passage for passage, wanted, _ in batch if wanted])
            if added > MANY_PASSAGES:
                for table in ("term", "posting", "passage_text"):
                    connection.execute(f"analyze retrieval.{table}")
    return PostingsReport(
        added,
        removed,
        _one(connection, "select coalesce(sum(passages), 0) from retrieval.text_corpus", []),
        _one(connection, "select count(*) from retrieval.term", []),
    )


def _index(connection: Connection, passages: list[int]) -> int:
    """Index those of ``passages`` that are not; returns how many they were."""
    connection.execute(_FRESH, {"passages": passages})
    connection.execute("analyze fresh")
    connection.execute(_TERMS)
    added = connection.execute(_POSTINGS).rowcount
    connection.execute(_CORPUS)
    connection.execute("drop table fresh")
    return added


def _one(connection: Connection, query: str, parameters: list[Any]) -> int:
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return int(row[0])
