"""Full text with real statistics: a BM25 index in tables, and hybrid search over it and the live vectors.

Revision ID: 0003

Callers use one function, ``retrieval.search(query, query_embedding, k, mode, filter)``; the other functions here
are its parts. ``filter`` is a JSON object; each field has a text or an array of texts, any of which may match, and
all fields must::

    {"source": ["handbook"], "document": "handbook/a.md", "path": "guides/", "media_type": "text/markdown",
     "title": "returns", "heading": "deadlines"}

``path`` is a prefix; ``title`` and ``heading`` are contained, whatever their case. ``exact_up_to`` is for measuring: so
many survivors of the filter are compared one by one rather than sought in the graph. Constants are justified in
docs/decisions/0010-words-and-vectors-are-added.md.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# pg_upgrade refuses tables with columns of type regconfig: configurations are kept by name.
TABLES = """
alter table registry.source add column language text not null default 'en';
comment on column registry.source.language is 'ISO 639-1 code of what its texts are written in.';

-- The postings take its place.
alter table corpus.chunk drop column tsv;

create table retrieval.term (
  term_no int generated always as identity primary key,
  configuration text not null,
  lexeme text not null,
  df int not null check (df > 0),
  unique (configuration, lexeme)
);
comment on table retrieval.term is 'One row per lexeme of a text search configuration, and in how many passages it is.';

create table retrieval.posting (
  term_no int not null,
  passage_no int not null,
  tf smallint not null,
  length smallint not null,
  primary key (term_no, passage_no) include (tf, length)
);
comment on table retrieval.posting is
  'One row per term and passage: how often it occurs there, and how many lexemes the passage has.';

create table retrieval.passage_text (
  passage_no int primary key,
  configuration text not null,
  digest text not null,
  length int not null,
  terms int[] not null
);
comment on table retrieval.passage_text is
  'One row per passage that words can find: what it was indexed as, so that it can be indexed anew or forgotten.';

create table retrieval.text_corpus (
  configuration text primary key,
  passages int not null,
  lexemes bigint not null
);
comment on table retrieval.text_corpus is 'One row per text search configuration: how much text is indexed by it.';

-- Who fills them analyzes them, which before Postgres 17 only an owner may do.
alter table retrieval.term owner to datamoat_writer;
alter table retrieval.posting owner to datamoat_writer;
alter table retrieval.passage_text owner to datamoat_writer;
alter table retrieval.text_corpus owner to datamoat_writer;
"""

CONFIGURATION = """
create function retrieval.text_configuration(language text) returns text
language sql stable
return coalesce(
  (
    select c.cfgname::text
    from pg_catalog.pg_ts_config as c
    join (
      values
        ('ar', 'arabic'), ('ca', 'catalan'), ('da', 'danish'), ('de', 'german'), ('el', 'greek'),
        ('en', 'english'), ('es', 'spanish'), ('et', 'estonian'), ('eu', 'basque'), ('fi', 'finnish'),
        ('fr', 'french'), ('ga', 'irish'), ('hi', 'hindi'), ('hu', 'hungarian'), ('hy', 'armenian'),
        ('id', 'indonesian'), ('it', 'italian'), ('lt', 'lithuanian'), ('ne', 'nepali'), ('nl', 'dutch'),
        ('no', 'norwegian'), ('pt', 'portuguese'), ('ro', 'romanian'), ('ru', 'russian'), ('sr', 'serbian'),
        ('sv', 'swedish'), ('ta', 'tamil'), ('tr', 'turkish'), ('yi', 'yiddish')
    ) as known (code, configuration) on known.configuration = c.cfgname
    where known.code = language and c.cfgnamespace = 'pg_catalog'::regnamespace
  ),
  'simple'
);
comment on function retrieval.text_configuration is
  'The text search configuration for a language; simple, which does not stem, where this Postgres has none.';
"""

# Postings have no foreign keys: checking each of millions of them would take most of the time of a load.
FORGET = """
create function retrieval.forget_postings(passages int[]) returns int
language plpgsql
as $$
declare
  forgotten int;
begin
  perform pg_advisory_xact_lock(hashtext('retrieval.posting'));
  with gone as (
    delete from retrieval.passage_text as p where p.passage_no = any(passages)
    returning p.passage_no, p.configuration, p.length, p.terms
  ),
  pair as (
    select g.passage_no, u.term_no from gone as g, unnest(g.terms) as u (term_no)
  ),
  fewer as (
    select pair.term_no, count(*)::int as n from pair group by pair.term_no
  ),
  without_postings as (
    delete from retrieval.posting as p using pair
    where p.term_no = pair.term_no and p.passage_no = pair.passage_no
  ),
  without_terms as (
    delete from retrieval.term as t using fewer where t.term_no = fewer.term_no and t.df <= fewer.n
  ),
  rarer as (
    update retrieval.term as t set df = t.df - fewer.n from fewer
    where t.term_no = fewer.term_no and t.df > fewer.n
  ),
  smaller as (
    update retrieval.text_corpus as c set passages = c.passages - s.passages, lexemes = c.lexemes - s.lexemes
    from (
      select g.configuration, count(*)::int as passages, sum(g.length) as lexemes from gone as g group by 1
    ) as s
    where s.configuration = c.configuration
  )
  select count(*) into forgotten from gone;
  return forgotten;
end
$$;
comment on function retrieval.forget_postings is 'Take passages out of the postings and of their statistics.';

create function retrieval.forget_passages() returns trigger
language plpgsql
as $$
begin
  if exists (select from gone) then
    perform retrieval.forget_postings(array(select passage_no from gone));
  end if;
  return null;
end
$$;
create trigger forget_passages after delete on retrieval.passage
referencing old table as gone for each statement execute function retrieval.forget_passages();
"""

FILTER = """
create function retrieval.filter_values(filter jsonb, field text) returns text[]
language sql immutable
return case jsonb_typeof(filter -> field)
  when 'string' then array[filter ->> field]
  when 'array' then array(select jsonb_array_elements_text(filter -> field))
end;
comment on function retrieval.filter_values is 'What a filter asks of a field, any of which may match; null: anything.';

create function retrieval.check_filter(filter jsonb) returns void
language plpgsql immutable
as $$
declare
  fields constant text[] := array['source', 'document', 'path', 'media_type', 'title', 'heading'];
  field text;
  wanted jsonb;
begin
  if jsonb_typeof(filter) not in ('object', 'null') then
    raise invalid_parameter_value using message = 'filter must be an object, such as {"source": "handbook"}';
  end if;
  for field, wanted in select * from jsonb_each(case when jsonb_typeof(filter) = 'object' then filter end) loop
    if field <> all(fields) then
      raise invalid_parameter_value using message =
        format('filter.%s: there is no such field; filter by some of %s', field, array_to_string(fields, ', '));
    end if;
    if jsonb_typeof(wanted) not in ('string', 'array')
      or exists (
        select from jsonb_array_elements(case jsonb_typeof(wanted) when 'array' then wanted end) as one
        where jsonb_typeof(one) <> 'string'
      )
    then
      raise invalid_parameter_value using message =
        format('filter.%s: give a text, or an array of texts of which any may match', field);
    end if;
  end loop;
end
$$;

-- Inlined where it is used: with the filter known, what it does not ask for costs nothing.
create function retrieval.surviving_chunks(sources text[], filter jsonb)
returns table (chunk_id text, content_hash text, document_id text)
language sql stable
as $$
  select c.chunk_id, c.content_hash, c.document_id
  from corpus.chunk as c
  left join corpus.document as d on d.document_id = c.document_id
  where c.source = any(sources)
    and (
      retrieval.filter_values(filter, 'document') is null
      or c.document_id = any(retrieval.filter_values(filter, 'document'))
    )
    and (
      retrieval.filter_values(filter, 'path') is null or d.path ^@ any(retrieval.filter_values(filter, 'path'))
    )
    and (
      retrieval.filter_values(filter, 'media_type') is null
      or d.media_type = any(retrieval.filter_values(filter, 'media_type'))
    )
    and (
      retrieval.filter_values(filter, 'title') is null
      or exists (
        select from unnest(retrieval.filter_values(filter, 'title')) as part
        where strpos(lower(d.title), lower(part)) > 0
      )
    )
    and (
      retrieval.filter_values(filter, 'heading') is null
      or exists (
        select from unnest(retrieval.filter_values(filter, 'heading')) as part
        where strpos(lower(c.heading), lower(part)) > 0
      )
    )
$$;
comment on function retrieval.surviving_chunks is 'The chunks of some sources that a filter lets through.';
"""

# BM25 as Robertson and Zaragoza give it (2009), its idf kept above zero by adding 1 under the logarithm.
BM25 = """
create function retrieval.bm25(idf float8, tf smallint, length smallint, average float8) returns float8
language sql immutable
return idf * tf * (1.2 + 1) / (tf + 1.2 * (1 - 0.75 + 0.75 * length / average));
comment on function retrieval.bm25 is 'What one term adds to the score of a passage: k1 = 1.2, b = 0.75.';

create function retrieval.matching_passages(
  term_nos int[], idfs float8[], averages float8[], sources text[], filter jsonb, survivors int[], depth int
) returns int[]
language plpgsql stable
as $$
#variable_conflict use_column
begin
  if survivors is not null then
    return array(
      select p.passage_no
      from unnest(term_nos, idfs, averages) as t (term_no, idf, average)
      join retrieval.posting as p using (term_no)
      join unnest(survivors) as s (passage_no) using (passage_no)
      group by p.passage_no
      order by sum(retrieval.bm25(t.idf, p.tf, p.length, t.average)) desc, p.passage_no
      limit depth
    );
  end if;
  -- Best first, and asked whether they survive until there are enough: most of those that match are never asked.
  return array(
    select m.passage_no
    from (
      select p.passage_no, sum(retrieval.bm25(t.idf, p.tf, p.length, t.average)) as bm25
      from unnest(term_nos, idfs, averages) as t (term_no, idf, average)
      join retrieval.posting as p using (term_no)
      group by p.passage_no
      order by bm25 desc, p.passage_no
      offset 0
    ) as m
    where exists (
      select from retrieval.passage as p
      join retrieval.surviving_chunks(sources, filter) as c using (content_hash)
      where p.passage_no = m.passage_no
      offset 0
    )
    limit depth
  );
end
$$;
comment on function retrieval.matching_passages is 'The passages that some terms match best, best first.';
"""

SEARCH = """
drop function retrieval.search(text, halfvec, int, text);

create function retrieval.search(
  query text, query_embedding halfvec, k int default 10, mode text default 'hybrid', filter jsonb default null,
  exact_up_to int default null
) returns table (
  chunk_id text, document_id text, source text, title text, heading text, body text, score double precision,
  distance double precision, vector_rank int, bm25 double precision, text_rank int, terms jsonb, also_in text[]
)
language plpgsql stable
-- The right plan depends on the filter, and on how many rows are asked for.
set plan_cache_mode = force_custom_plan
set jit = off
as $$
#variable_conflict use_column
declare
  depth constant int := greatest(100, 2 * k);
  sources constant text[] := array(
    select s.source from registry.source as s
    where 'rag' = any(s.allowed_uses)
      and (
        retrieval.filter_values(filter, 'source') is null
        or s.source = any(retrieval.filter_values(filter, 'source'))
      )
  );
  -- Up to so many survivors it costs less to look at each of them than to walk the graph past those that do not
  -- survive: the walk visits about depth * indexed / survivors vectors.
  few constant int := coalesce(exact_up_to, (
    select greatest(5000, sqrt(3.0 * depth * coalesce(sum(c.passages), 0))) from retrieval.text_corpus as c
  ))::int;
  walk constant text[] := array[
    'hnsw.iterative_scan', 'hnsw.ef_search', 'hnsw.max_scan_tuples', 'hnsw.scan_mem_multiplier',
    'relaxed_order', '100', '100000', '4'
  ];
  before text[];
  surviving int;
  survivors int[];
  nearest int[] := '{}';
  matching int[] := '{}';
  candidates int[];
  distances float8[];
  spread float8 := 1;
  configurations text[];
  lexemes text[];
  term_nos int[];
  idfs float8[];
  averages float8[];
  rare int;
begin
  if mode is null or mode not in ('hybrid', 'vector', 'text') then
    raise invalid_parameter_value using message = format('mode must be hybrid, vector or text, not %s', mode);
  end if;
  if k is null or k not between 1 and 1000 then
    raise invalid_parameter_value using message = format('k must be from 1 to 1000, not %s', k);
  end if;
  if mode <> 'text' and query_embedding is null then
    raise invalid_parameter_value using message = format('query_embedding must be given in mode %s', mode);
  end if;
  perform retrieval.check_filter(filter);

  select count(*) into surviving
  from (select from retrieval.surviving_chunks(sources, filter) limit few + 1) as s;
  if surviving <= few then
    survivors := array(
      select p.passage_no from retrieval.passage as p
      where p.content_hash in (select s.content_hash from retrieval.surviving_chunks(sources, filter) as s)
    );
  end if;

  if mode <> 'text' then
    if survivors is null then
      -- By hand, since a function may only be declared with settings that are known when it is restored.
      before := array(
        select current_setting(name) from unnest(walk[1:4]) with ordinality as w (name, place) order by place
      );
      perform set_config(walk[i], walk[4 + i], true) from generate_series(1, 4) as i;
      nearest := array(
        select n.passage_no
        from (
          select v.passage_no, v.embedding <=> query_embedding as distance
          from retrieval.live as v
          where exists (
            select from retrieval.surviving_chunks(sources, filter) as c
            where c.content_hash = v.content_hash
            offset 0
          )
          order by v.embedding <=> query_embedding
          limit depth
        ) as n
        -- Relaxed order is almost that of the distance; adding 0 makes the planner sort.
        order by n.distance + 0, n.passage_no
      );
      perform set_config(walk[i], before[i], true) from generate_series(1, 4) as i;
    end if;
    if cardinality(nearest) < k then
      -- Few survive; or the walk has found fewer than there may be.
      survivors := coalesce(survivors, array(
        select p.passage_no from retrieval.passage as p
        where p.content_hash in (select s.content_hash from retrieval.surviving_chunks(sources, filter) as s)
      ));
      nearest := array(
        select v.passage_no
        from unnest(survivors) as s (passage_no)
        join retrieval.live as v using (passage_no)
        order by (v.embedding <=> query_embedding) + 0, v.passage_no
        limit depth
      );
    end if;
  end if;

  if mode <> 'vector' then
    -- As arrays, whose length the planner knows: it would read all terms otherwise.
    select array_agg(c.configuration), array_agg(w.lexeme) into configurations, lexemes
    from retrieval.text_corpus as c
    cross join unnest(to_tsvector(c.configuration::regconfig, left(query, 10000))) as w
    where c.passages > 0;
    select
      array_agg(t.term_no), array_agg(t.lexeme), array_agg(t.idf), array_agg(t.average),
      count(*) filter (where not t.common)
    into term_nos, lexemes, idfs, averages, rare
    from (
      select
        t.term_no, t.lexeme, t.df > 0.2 * c.passages as common,
        ln(1 + (c.passages - t.df + 0.5) / (t.df + 0.5))::float8 as idf,
        c.lexemes::float8 / c.passages as average
      from unnest(configurations, lexemes) as w (configuration, lexeme)
      join retrieval.term as t using (configuration, lexeme)
      join retrieval.text_corpus as c using (configuration)
      order by t.df::float8 / c.passages, t.term_no
      limit 64
    ) as t;
    -- Rare terms choose the candidates and all terms rank them: the postings of a common term are long and say little.
    matching := retrieval.matching_passages(
      term_nos[1:rare], idfs[1:rare], averages[1:rare], sources, filter, survivors, 2 * depth
    );
    if cardinality(matching) < k and rare < cardinality(term_nos) then
      matching := retrieval.matching_passages(
        term_nos, idfs, averages, sources, filter, survivors, 2 * depth
      );
    end if;
  end if;

  candidates := array(select distinct u from unnest(nearest || matching) as u);
  if mode = 'hybrid' then
    -- How far apart the distances of this question are at all, by a hundred passages taken evenly.
    with sample as materialized (
      select p.passage_no
      from (select min(p.passage_no) as low, max(p.passage_no) as high from retrieval.passage as p) as r
      cross join generate_series(0, 99) as i
      cross join lateral (
        select p.passage_no from retrieval.passage as p
        where p.passage_no >= r.low + (r.high - r.low)::bigint * i / 99
        order by p.passage_no
        limit 1
      ) as p
    )
    select stddev_pop(v.embedding <=> query_embedding) into spread
    from sample
    join retrieval.live as v using (passage_no);
  end if;
  if mode <> 'text' then
    distances := array(
      select v.embedding <=> query_embedding
      from unnest(candidates) with ordinality as c (passage_no, place)
      left join retrieval.live as v using (passage_no)
      order by c.place
    );
  end if;

  return query
  with weight as (
    select p.passage_no, t.lexeme, retrieval.bm25(t.idf, p.tf, p.length, t.average) as weight
    from unnest(term_nos, lexemes, idfs, averages) as t (term_no, lexeme, idf, average)
    join retrieval.posting as p using (term_no)
    where p.passage_no = any(candidates)
  ),
  words as (
    select
      w.passage_no, sum(w.weight) as bm25,
      jsonb_object_agg(w.lexeme, round(w.weight::numeric, 3)) as terms
    from weight as w
    group by w.passage_no
  ),
  scored as (
    select
      c.passage_no, c.distance, w.bm25, w.terms,
      array_position(nearest, c.passage_no) as vector_rank,
      case when c.passage_no = any(matching) then
        row_number() over (partition by c.passage_no = any(matching) order by w.bm25 desc nulls last, c.passage_no)
      end::int as text_rank,
      case mode
        when 'text' then w.bm25
        when 'vector' then 1 - c.distance
        -- A passage that has no vector yet counts as the farthest of the candidates.
        else coalesce(w.bm25, 0)
          + 1.5 / greatest(spread, 0.01) * (1 - coalesce(c.distance, max(c.distance) over (), 1))
      end as score
    from unnest(candidates, distances) as c (passage_no, distance)
    left join words as w using (passage_no)
  ),
  best as (
    select * from scored as s order by s.score desc, s.passage_no limit k
  )
  select
    c.chunk_id, c.document_id, c.source, d.title, c.heading, c.text,
    b.score, b.distance, b.vector_rank, b.bm25, b.text_rank, b.terms,
    (array_remove(place.documents, c.document_id))[1:20]
  from best as b
  join retrieval.passage as p using (passage_no)
  cross join lateral (
    select min(s.chunk_id) as chunk_id, array_agg(distinct s.document_id) as documents
    from retrieval.surviving_chunks(sources, filter) as s
    where s.content_hash = p.content_hash
  ) as place
  join corpus.chunk as c on c.chunk_id = place.chunk_id
  join corpus.document as d on d.document_id = c.document_id
  order by b.score desc, b.passage_no;
end
$$;
comment on function retrieval.search is
  'The k best passages for a question, by words (BM25), by vectors of the live release, or by both.
score: bm25, or 1 - distance, or for both bm25 + 1.5 * (1 - distance) / the spread of the question''s distances.
distance: cosine distance; vector_rank, text_rank: place among those that this leg found, null if it did not.
terms: matched lexemes and what each adds to bm25. also_in: other documents with the same text, 20 at most.';
"""


def upgrade() -> None:
    op.execute(TABLES)
    for part in (CONFIGURATION, FORGET, FILTER, BM25, SEARCH):
        op.execute(part)
