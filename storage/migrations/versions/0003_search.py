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

-- The postings take its place. The view holds on to every column; the next run makes it, and what reads it, anew.
drop view if exists staging.stg_corpus__chunks cascade;
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
create type retrieval.wanted as (
  sources text[], documents text[], paths text[], media_types text[], titles text[], headings text[]
);
comment on type retrieval.wanted is
  'What a passage must have to be found: of each field one of the values, or anything where it is null.';

create function retrieval.read_filter(filter jsonb) returns retrieval.wanted
language plpgsql stable
as $$
declare
  fields constant text[] := array['source', 'document', 'path', 'media_type', 'title', 'heading'];
  field text;
  given jsonb;
  texts text[];
  wanted retrieval.wanted;
begin
  if jsonb_typeof(filter) not in ('object', 'null') then
    raise invalid_parameter_value using message = 'filter must be an object, such as {"source": "handbook"}';
  end if;
  for field, given in select * from jsonb_each(case when jsonb_typeof(filter) = 'object' then filter end) loop
    if field <> all(fields) then
      raise invalid_parameter_value using message =
        format('filter.%s: there is no such field; filter by some of %s', field, array_to_string(fields, ', '));
    end if;
    if jsonb_typeof(given) = 'string' then
      given := jsonb_build_array(given);
    end if;
    if jsonb_typeof(given) <> 'array' or jsonb_path_exists(given, 'strict $[*] ? (@.type() <> "string")') then
      raise invalid_parameter_value using message =
        format('filter.%s: give a text, or an array of texts of which any may match', field);
    end if;
    texts := array(select jsonb_array_elements_text(given));
    case field
      when 'source' then wanted.sources := texts;
      when 'document' then wanted.documents := texts;
      when 'path' then wanted.paths := texts;
      when 'media_type' then wanted.media_types := texts;
      when 'title' then wanted.titles := texts;
      when 'heading' then wanted.headings := texts;
    end case;
  end loop;
  wanted.sources := array(
    select s.source from registry.source as s
    where 'rag' = any(s.allowed_uses) and (wanted.sources is null or s.source = any(wanted.sources))
  );
  return wanted;
end
$$;
comment on function retrieval.read_filter is
  'A filter as lists of values; its sources are those that may be retrieved, whether it names any or not.';

-- Inlined where it is used: in a plan made for what is wanted, what is not asked for costs nothing.
create function retrieval.surviving_chunks(wanted retrieval.wanted)
returns table (chunk_id text, content_hash text, document_id text)
language sql stable
as $$
  select c.chunk_id, c.content_hash, c.document_id
  from corpus.chunk as c
  left join corpus.document as d on d.document_id = c.document_id
  where c.source = any(wanted.sources)
    and (wanted.documents is null or c.document_id = any(wanted.documents))
    and (wanted.paths is null or d.path ^@ any(wanted.paths))
    and (wanted.media_types is null or d.media_type = any(wanted.media_types))
    and (
      wanted.titles is null
      or exists (select from unnest(wanted.titles) as part where strpos(lower(d.title), lower(part)) > 0)
    )
    and (
      wanted.headings is null
      or exists (select from unnest(wanted.headings) as part where strpos(lower(c.heading), lower(part)) > 0)
    )
$$;
comment on function retrieval.surviving_chunks is 'The chunks that have what is wanted.';

create function retrieval.any_gone(passages int[], wanted retrieval.wanted) returns boolean
language plpgsql stable
as $$
begin
  return exists (
    select from retrieval.passage as p
    where p.passage_no = any(passages)
      and not exists (
        select from retrieval.surviving_chunks(wanted) as c where c.content_hash = p.content_hash
      )
  );
end
$$;
comment on function retrieval.any_gone is
  'Whether some passages do not survive, as when their chunks were deleted and the index does not know yet.';
"""

# BM25 as Robertson and Zaragoza give it (2009), its idf kept above zero by adding 1 under the logarithm.
BM25 = """
create function retrieval.bm25(idf float8, tf smallint, length smallint, average float8) returns float8
language sql immutable
return idf * tf * (1.2 + 1) / (tf + 1.2 * (1 - 0.75 + 0.75 * length / average));
comment on function retrieval.bm25 is 'What one term adds to the score of a passage: k1 = 1.2, b = 0.75.';

create function retrieval.matching_passages(
  term_nos int[], idfs float8[], averages float8[], survivors int[], wanted retrieval.wanted, depth int
) returns int[]
language plpgsql stable
as $$
declare
  best constant text := 'select p.passage_no
    from unnest($1, $2, $3) as t (term_no, idf, average)
    join retrieval.posting as p using (term_no)
    %s
    group by p.passage_no
    order by sum(retrieval.bm25(t.idf, p.tf, p.length, t.average)) desc, p.passage_no
    %s';
  statement text;
  found int[];
begin
  if survivors is not null then
    statement := format(best, 'join unnest($4) as s (passage_no) using (passage_no)', 'limit $5');
  elsif wanted is null then
    statement := format(best, '', 'limit $5');
  else
    -- Asked one by one whether they survive until there are enough: most of those that match are never asked.
    statement := 'select m.passage_no from (' || format(best, '', 'offset 0') || ') as m
      where exists (
        select from retrieval.passage as p
        join retrieval.surviving_chunks($6) as c using (content_hash)
        where p.passage_no = m.passage_no
        offset 0
      )
      limit $5';
  end if;
  execute 'select array(' || statement || ')'
    into found using term_nos, idfs, averages, survivors, depth, wanted;
  return found;
end
$$;
comment on function retrieval.matching_passages is
  'The passages that some terms match best, best first: of the survivors where they are given, else of those that have
what is wanted, or of all where that is null.';
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
-- Each statement is planned once in a session. Those whose right plan depends on what they are given are executed
-- from texts, which are planned every time.
set plan_cache_mode = force_generic_plan
set jit = off
as $$
#variable_conflict use_column
declare
  depth constant int := greatest(100, 2 * k);
  wanted constant retrieval.wanted := retrieval.read_filter(filter);
  -- Whether some of what is indexed must not be found.
  restricted constant boolean := exact_up_to is not null
    or num_nonnulls(wanted.documents, wanted.paths, wanted.media_types, wanted.titles, wanted.headings) > 0
    or exists (
      select from registry.source as s
      where s.source <> all(wanted.sources) and exists (select from corpus.chunk as c where c.source = s.source)
    );
  list_hashes constant text :=
    'select array(select s.content_hash from retrieval.surviving_chunks($1) as s limit $2)';
  list_passages constant text :=
    'select array(select p.passage_no from retrieval.passage as p where p.content_hash = any($1))';
  -- Relaxed order is almost that of the distance; adding 0 makes the planner sort, and keeps it off the graph.
  list_nearest constant text := 'select
      coalesce(array_agg(n.passage_no order by n.distance + 0, n.passage_no), ''{}''),
      coalesce(array_agg(n.distance order by n.distance + 0, n.passage_no), ''{}'')
    from (
      select v.passage_no, v.embedding <=> $1 as distance from retrieval.live as v where %s order by %s limit $2
    ) as n';
  before text[];
  few int;
  hashes text[];
  survivors int[];
  nearest int[] := '{}';
  distances float8[] := '{}';
  matching int[] := '{}';
  others int[];
  spread float8 := 1;
  configurations text[];
  lexemes text[];
  term_nos int[];
  idfs float8[];
  averages float8[];
  rare int;
  all_rare boolean;
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

  if restricted then
    -- Up to so many survivors it costs less to look at each of them than to walk the graph past those that do not
    -- survive: the walk visits about depth * indexed / survivors vectors.
    few := coalesce(exact_up_to, (
      select greatest(5000, sqrt(3.0 * depth * coalesce(sum(c.passages), 0))) from retrieval.text_corpus as c
    ));
    execute list_hashes into hashes using wanted, few + 1;
    if cardinality(hashes) <= few then
      execute list_passages into survivors using hashes;
    end if;
  end if;

  if mode <> 'text' then
    if survivors is null then
      -- By hand, since a function may only be declared with settings that are known when it is restored.
      before := array[
        current_setting('hnsw.iterative_scan'), current_setting('hnsw.ef_search'),
        current_setting('hnsw.max_scan_tuples'), current_setting('hnsw.scan_mem_multiplier')
      ];
      perform
        set_config('hnsw.iterative_scan', 'relaxed_order', true), set_config('hnsw.ef_search', '100', true),
        set_config('hnsw.max_scan_tuples', '100000', true), set_config('hnsw.scan_mem_multiplier', '4', true);
      execute format(
        list_nearest,
        case when restricted then
          'exists (select from retrieval.surviving_chunks($3) as c where c.content_hash = v.content_hash offset 0)'
        else 'true' end,
        'v.embedding <=> $1'
      ) into nearest, distances using query_embedding, depth, wanted;
      perform
        set_config('hnsw.iterative_scan', before[1], true), set_config('hnsw.ef_search', before[2], true),
        set_config('hnsw.max_scan_tuples', before[3], true), set_config('hnsw.scan_mem_multiplier', before[4], true);
    end if;
    if survivors is not null or cardinality(nearest) < k or retrieval.any_gone(nearest[1:k], wanted) then
      -- Few survive; or the walk has found fewer than there may be.
      if survivors is null then
        execute list_hashes into hashes using wanted, null::int;
        execute list_passages into survivors using hashes;
      end if;
      execute format(list_nearest, 'v.passage_no = any($3)', '(v.embedding <=> $1) + 0')
        into nearest, distances using query_embedding, depth, survivors;
    end if;
  end if;

  if mode <> 'vector' then
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
    all_rare := rare = cardinality(term_nos);
    matching := retrieval.matching_passages(
      term_nos[1:rare], idfs[1:rare], averages[1:rare], survivors, case when restricted then wanted end,
      case when all_rare then depth else 2 * depth end
    );
    if not all_rare and cardinality(matching) < k or retrieval.any_gone(matching[1:k], wanted) then
      matching := retrieval.matching_passages(term_nos, idfs, averages, survivors, wanted, 2 * depth);
    end if;
  end if;

  -- What only words found is compared with the question too.
  others := array(select m from unnest(matching) as m where m <> all(nearest));
  if mode = 'hybrid' then
    distances := distances || array(
      select v.embedding <=> query_embedding
      from unnest(others) with ordinality as o (passage_no, place)
      left join retrieval.live as v using (passage_no)
      order by o.place
    );
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

  return query
  with weight as (
    select p.passage_no, t.lexeme, retrieval.bm25(t.idf, p.tf, p.length, t.average) as weight
    from unnest(term_nos, lexemes, idfs, averages) as t (term_no, lexeme, idf, average)
    join retrieval.posting as p using (term_no)
    where p.passage_no = any(nearest || others)
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
      case when c.place <= cardinality(nearest) then c.place end::int as vector_rank,
      case when m.passage_no is not null then
        row_number() over (partition by m.passage_no is null order by w.bm25 desc, c.passage_no)
      end::int as text_rank,
      case mode
        when 'text' then w.bm25
        when 'vector' then 1 - c.distance
        -- A passage that has no vector yet counts as the farthest of the candidates.
        else coalesce(w.bm25, 0)
          + 1.5 / greatest(spread, 0.01) * (1 - coalesce(c.distance, max(c.distance) over (), 1))
      end as score
    from unnest(nearest || others, distances) with ordinality as c (passage_no, distance, place)
    left join words as w using (passage_no)
    left join unnest(matching) as m (passage_no) using (passage_no)
    order by score desc, c.passage_no
  )
  select
    c.chunk_id, c.document_id, c.source, d.title, c.heading, c.text,
    b.score, b.distance, b.vector_rank, b.bm25, b.text_rank, b.terms,
    (array_remove(place.documents, c.document_id))[1:20]
  from scored as b
  join retrieval.passage as p using (passage_no)
  cross join lateral (
    select min(s.chunk_id) as chunk_id, array_agg(distinct s.document_id) as documents
    from retrieval.surviving_chunks(wanted) as s
    where s.content_hash = p.content_hash
  ) as place
  join corpus.chunk as c on c.chunk_id = place.chunk_id
  join corpus.document as d on d.document_id = c.document_id
  order by b.score desc, b.passage_no
  limit k;
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
