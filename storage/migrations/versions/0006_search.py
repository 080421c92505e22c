"""Postings packed into arrays, searched without reading what cannot matter; filters by number; one set a chunking.

Revision ID: 0006

``retrieval.search`` keeps its arguments, its columns and what it finds. Words find exactly the passages of the highest
BM25: a frequent word is read only where a rare one has found something, as long as it could not lift any other passage
among the best (MaxScore, Turtle and Flood 1995). Reasons and figures are in
docs/decisions/0010-words-and-vectors-are-added.md.

Everything is kept for each chunking apart (``corpus.piece.chunking``), and a search asks those of the live one. What is
indexed stays so: the postings are packed anew from what there is.
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

DROP = """
drop function retrieval.search(text, halfvec, int, text, jsonb, int);
drop function retrieval.matching_passages(int[], float8[], float8[], int[], retrieval.wanted, int);
drop function retrieval.bm25(float8, smallint, smallint, float8);
drop function retrieval.any_gone(int[], retrieval.wanted);
drop function retrieval.surviving_chunks(retrieval.wanted);
drop trigger forget_passages on retrieval.passage;
drop function retrieval.forget_passages();
drop function retrieval.forget_postings(int[]);
-- Whatever is not known to be safe keeps a whole statement from running in parallel.
alter function retrieval.text_configuration(text) parallel safe;
"""

TABLES = """
alter table retrieval.term add column chunking text;
update retrieval.term set chunking = l.chunking from corpus.live_chunking as l;
alter table retrieval.term
  alter column chunking set not null,
  drop constraint term_configuration_lexeme_key,
  add unique (chunking, configuration, lexeme);
comment on table retrieval.term is
  'One row per lexeme of a chunking and a text search configuration, and in how many passages it is.';

alter table retrieval.text_corpus add column chunking text;
update retrieval.text_corpus set chunking = l.chunking from corpus.live_chunking as l;
alter table retrieval.text_corpus
  drop constraint text_corpus_pkey,
  add primary key (chunking, configuration);
comment on table retrieval.text_corpus is
  'One row per chunking and text search configuration: how much text is indexed by it.';

alter table retrieval.passage_text rename to old_text;
alter table retrieval.posting rename to old_posting;
alter table retrieval.old_text rename constraint passage_text_pkey to old_text_pkey;
alter table retrieval.old_posting rename constraint posting_pkey to old_posting_pkey;

create table retrieval.passage_text (
  text_no int generated always as identity primary key,
  passage_no int not null,
  chunking text not null,
  configuration text not null,
  digest text not null,
  length smallint not null,
  terms int[] not null,
  tfs smallint[] not null,
  unique (passage_no, chunking)
);
comment on table retrieval.passage_text is
  'One row per passage that words can find, in each chunking: what it was indexed as, so that it can be indexed anew or
forgotten. Indexed anew, it gets another number, and what the postings say of the old one counts no more.';
comment on column retrieval.passage_text.length is 'Lexemes in it, 32,767 at most.';
comment on column retrieval.passage_text.terms is 'Its terms; tfs: how often each occurs in it.';

create table retrieval.segment (
  segment int primary key,
  chunking text not null,
  texts int not null
);
comment on table retrieval.segment is
  'One row per part of a chunking''s postings: those of its texts from this number up to that of its next segment.';
comment on column retrieval.segment.texts is 'How many texts it was written with; some may be gone.';

create table retrieval.posting (
  term_no int not null,
  segment int not null,
  slope float8 not null,
  peak real not null,
  texts int[] not null,
  impacts real[] not null,
  primary key (term_no, segment)
);
comment on table retrieval.posting is 'One row per term and segment: the texts that have the term, and what it is in each.';
comment on column retrieval.posting.impacts is
  'tf / (tf + 0.3 + slope * length): what the term adds to the score of each text, as a share of the most it can add.';
comment on column retrieval.posting.peak is 'The highest of its impacts.';
comment on column retrieval.posting.slope is '0.9 / the average length of the texts when it was written.';
-- Unpacking them would take as long as reading them, and statistics of what is in them serve no plan.
alter table retrieval.posting
  alter column texts set storage external, alter column impacts set storage external,
  alter column texts set statistics 0, alter column impacts set statistics 0;
alter table retrieval.passage_text alter column terms set statistics 0, alter column tfs set statistics 0;

-- Who fills them analyzes them, which before Postgres 17 only an owner may do.
alter table retrieval.passage_text owner to datamoat_writer;
alter table retrieval.segment owner to datamoat_writer;
alter table retrieval.posting owner to datamoat_writer;
"""

# A segment is made of the texts alone, so that it can be written anew without the one that was there.
SEGMENTS = """
create function retrieval.write_segment(chunking text, first int) returns void
language plpgsql
set work_mem = '256MB'
as $$
begin
  delete from retrieval.posting as p using retrieval.segment as s
  where s.chunking = write_segment.chunking and s.segment >= first and p.segment = s.segment;
  delete from retrieval.segment as s where s.chunking = write_segment.chunking and s.segment >= first;
  insert into retrieval.posting (term_no, segment, slope, peak, texts, impacts)
  select u.term_no, first, c.slope, max(i.impact), array_agg(t.text_no), array_agg(i.impact)
  from retrieval.passage_text as t
  join (
    select c.configuration, 0.9::float8 * c.passages / nullif(c.lexemes, 0) as slope
    from retrieval.text_corpus as c
    where c.chunking = write_segment.chunking
  ) as c on c.configuration = t.configuration
  cross join unnest(t.terms, t.tfs) as u (term_no, tf)
  cross join lateral (select (u.tf / (u.tf + 0.3 + c.slope * t.length))::real as impact offset 0) as i
  where t.chunking = write_segment.chunking and t.text_no >= first
  group by u.term_no, c.slope;
  insert into retrieval.segment (segment, chunking, texts)
  select first, write_segment.chunking, count(*)
  from retrieval.passage_text as t
  where t.chunking = write_segment.chunking and t.text_no >= first;
end
$$;
comment on function retrieval.write_segment is
  'Make one segment of all texts of a chunking from a number on, in place of those that begin there or later.';

create function retrieval.merge_segments(chunking text) returns boolean
language plpgsql
as $$
declare
  first int;
begin
  -- One that has fewer texts left than those after it is written together with them, so that each text is written
  -- again about as often as their number doubles. So is one of which more than half is gone.
  select min(s.segment) into first
  from (
    select
      s.segment, s.texts, s.there,
      sum(s.there) over (order by s.segment desc rows between unbounded preceding and 1 preceding) as later
    from (
      select s.segment, s.texts, count(t.text_no) as there
      from (
        select
          s.segment, s.texts, coalesce(lead(s.segment) over (order by s.segment) - 1, 2147483647) as last
        from retrieval.segment as s
        where s.chunking = merge_segments.chunking
      ) as s
      left join retrieval.passage_text as t
        on t.chunking = merge_segments.chunking and t.text_no between s.segment and s.last
      group by s.segment, s.texts
    ) as s
  ) as s
  where s.there < s.later or 2 * s.there < s.texts;
  if first is null then
    return false;
  end if;
  perform retrieval.write_segment(chunking, first);
  return true;
end
$$;
comment on function retrieval.merge_segments is
  'Keep the segments of a chunking few and their texts mostly there; whether anything was written.';
"""

REFILL = """
insert into retrieval.passage_text (passage_no, chunking, configuration, digest, length, terms, tfs)
select
  o.passage_no, l.chunking, o.configuration, o.digest, least(o.length, 32767),
  coalesce(p.terms, '{}'), coalesce(p.tfs, '{}')
from retrieval.old_text as o
cross join corpus.live_chunking as l
left join (
  select passage_no, array_agg(term_no) as terms, array_agg(tf) as tfs from retrieval.old_posting group by 1
) as p using (passage_no)
order by o.passage_no;
update retrieval.text_corpus as c set lexemes = t.lexemes
from (select configuration, sum(length) as lexemes from retrieval.passage_text group by 1) as t
where t.configuration = c.configuration;
select retrieval.write_segment(l.chunking, 1) from corpus.live_chunking as l
where exists (select from retrieval.passage_text);
drop table retrieval.old_text, retrieval.old_posting;
analyze retrieval.passage_text;
analyze retrieval.posting;
"""

# Postings have no foreign keys: checking each of millions of them would take most of the time of a load.
FORGET = """
create function retrieval.forget_postings(passages int[], chunking text default null) returns int
language plpgsql
as $$
declare
  forgotten int;
begin
  perform pg_advisory_xact_lock(hashtext('retrieval.posting'));
  with gone as (
    delete from retrieval.passage_text as t
    where t.passage_no = any(passages)
      and (forget_postings.chunking is null or t.chunking = forget_postings.chunking)
    returning t.chunking, t.configuration, t.length, t.terms
  ),
  fewer as (
    select u.term_no, count(*)::int as n from gone as g, unnest(g.terms) as u (term_no) group by 1
  ),
  without_terms as (
    delete from retrieval.term as t using fewer where t.term_no = fewer.term_no and t.df <= fewer.n
    returning t.term_no
  ),
  without_postings as (
    delete from retrieval.posting as p using without_terms as t where p.term_no = t.term_no
  ),
  rarer as (
    update retrieval.term as t set df = t.df - fewer.n from fewer
    where t.term_no = fewer.term_no and t.df > fewer.n
  ),
  smaller as (
    update retrieval.text_corpus as c set passages = c.passages - s.passages, lexemes = c.lexemes - s.lexemes
    from (
      select g.chunking, g.configuration, count(*)::int as passages, sum(g.length) as lexemes
      from gone as g
      group by 1, 2
    ) as s
    where s.chunking = c.chunking and s.configuration = c.configuration
  )
  select count(*) into forgotten from gone;
  return forgotten;
end
$$;
comment on function retrieval.forget_postings is
  'Take passages out of the words of a chunking, or of all of them, and out of their statistics.';

create function retrieval.forget_chunking(chunking text) returns void
language plpgsql
as $$
begin
  perform pg_advisory_xact_lock(hashtext('retrieval.posting'));
  delete from retrieval.posting as p using retrieval.segment as s
  where s.chunking = forget_chunking.chunking and p.segment = s.segment;
  delete from retrieval.segment as s where s.chunking = forget_chunking.chunking;
  delete from retrieval.term as t where t.chunking = forget_chunking.chunking;
  delete from retrieval.text_corpus as c where c.chunking = forget_chunking.chunking;
  delete from retrieval.passage_text as t where t.chunking = forget_chunking.chunking;
end
$$;
comment on function retrieval.forget_chunking is 'Delete the words of a chunking that nothing searches any more.';

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
-- Inlined where it is used: in a plan made for what is wanted, what is not asked for costs nothing.
create function retrieval.surviving_chunks(chunking text, wanted retrieval.wanted)
returns table (chunk_id text, passage_no int, document_id text)
language sql stable
as $$
  select c.chunk_id, c.passage_no, c.document_id
  from corpus.piece as c
  left join corpus.document as d on d.document_id = c.document_id
  where c.chunking = surviving_chunks.chunking
    and c.passage_no is not null
    and c.source = any(wanted.sources)
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
comment on function retrieval.surviving_chunks is 'The chunks of a chunking that have what is wanted.';

create function retrieval.any_gone(passages int[], chunking text, wanted retrieval.wanted) returns boolean
language plpgsql stable
as $$
begin
  return exists (
    select from unnest(passages) as p (passage_no)
    where not exists (
      select from retrieval.surviving_chunks(any_gone.chunking, wanted) as c where c.passage_no = p.passage_no
    )
  );
end
$$;
comment on function retrieval.any_gone is
  'Whether some passages do not survive, as when their chunks were deleted and the index does not know yet.';
"""

# BM25 as Robertson and Zaragoza give it (2009), k1 = 1.2 and b = 0.75, its idf kept above zero by adding 1 under the
# logarithm: a term adds scale * tf / (tf + 0.3 + slope * length), which is always less than its scale.
TERMS = """
create type retrieval.sought as (
  term_nos int[], lexemes text[], dfs int[], scales float8[], slopes float8[], rests float8[]
);
comment on type retrieval.sought is
  'The terms of a question, the rarest first. rests: what each and all more frequent ones add to a passage at most.';

create function retrieval.sought_terms(query text, chunking text) returns retrieval.sought
language plpgsql stable
as $$
declare
  configurations text[];
  lexemes text[];
  sought retrieval.sought;
begin
  select array_agg(c.configuration), array_agg(w.lexeme) into configurations, lexemes
  from retrieval.text_corpus as c
  cross join unnest(to_tsvector(c.configuration::regconfig, left(query, 10000))) as w
  where c.chunking = sought_terms.chunking and c.passages > 0;
  select
    array_agg(t.term_no order by t.place), array_agg(t.lexeme order by t.place), array_agg(t.df order by t.place),
    array_agg(t.scale order by t.place), array_agg(t.slope order by t.place), array_agg(t.rest order by t.place)
  into sought
  from (
    select
      t.*,
      -- A passage has the words of one configuration.
      max(t.rest_of_configuration) over (order by t.place desc) as rest
    from (
      select t.*, sum(t.most) over (partition by t.configuration order by t.place desc) as rest_of_configuration
      from (
        select
          t.*,
          (
            -- A little more for what was rounded.
            select 1.000001 * t.scale * max(p.peak * greatest(1, p.slope / t.slope))
            from retrieval.posting as p
            where p.term_no = t.term_no
          ) as most
        from (
          select
            t.term_no, t.lexeme, t.df, t.configuration,
            2.2 * ln(1 + (c.passages - t.df + 0.5) / (t.df + 0.5))::float8 as scale,
            0.9::float8 * c.passages / c.lexemes as slope,
            row_number() over (order by t.df::float8 / c.passages, t.term_no) as place
          from unnest(configurations, lexemes) as w (configuration, lexeme)
          join retrieval.term as t
            on t.chunking = sought_terms.chunking and t.configuration = w.configuration and t.lexeme = w.lexeme
          join retrieval.text_corpus as c
            on c.chunking = sought_terms.chunking and c.configuration = w.configuration
          order by place
          limit 64
        ) as t
      ) as t
    ) as t
  ) as t;
  return sought;
end
$$;
comment on function retrieval.sought_terms is 'The terms of a question, and what they are worth.';

-- Inlined: one look at each passage's own list of terms.
create function retrieval.weights(
  terms int[], tfs smallint[], length smallint, term_nos int[], scales float8[], slopes float8[]
) returns table (place bigint, weight float8)
language sql immutable
as $$
  select t.place, t.scale * o.tf / (o.tf + 0.3 + t.slope * length)
  from unnest(term_nos, scales, slopes) with ordinality as t (term_no, scale, slope, place)
  cross join lateral (select tfs[array_position(terms, t.term_no)]::float8 as tf offset 0) as o
  where o.tf is not null
$$;
comment on function retrieval.weights is 'What each of some terms adds to the score of a passage that has it.';
"""


# The first {n} terms are read whole, and the {width} passages in which they weigh most are scored by all. What no other
# passage can exceed is told too: where it is less than the score of the last that is found, nothing is missing.
BEST = """
  with top as (
    -- Never less than it is: rounded impacts, and those of another average length, are made up for.
    select p.text_no, sum(p.scale * p.impact) as partial
    from (
      select
        1.000001 * t.scale * greatest(1, p.slope / t.slope) as scale,
        unnest(p.texts) as text_no, unnest(p.impacts) as impact
      from unnest({sought}.term_nos[1:{n}], {sought}.scales[1:{n}], {sought}.slopes[1:{n}]) as t (term_no, scale, slope)
      join retrieval.posting as p using (term_no)
    ) as p
    {among}
    group by p.text_no
    order by partial desc
    {bound}
  ),
  best as materialized (
    select t.passage_no, r.partial, w.score
    from top as r
    join retrieval.passage_text as t using (text_no)
    cross join lateral (
      select sum(w.weight) as score
      from retrieval.weights(t.terms, t.tfs, t.length, {sought}.term_nos, {sought}.scales, {sought}.slopes) as w
    ) as w
    {asked}
    order by r.partial desc
    limit {width}
  )
  select
    array(select b.passage_no from best as b order by b.score desc, b.passage_no limit {depth}),
    (
      select min(b.score) from (select b.score from best as b order by b.score desc limit {depth}) as b
      having count(*) = {depth}
    ),
    {rest} + coalesce((select min(b.partial) from {cut} as b having count(*) = {width}), 0)
  {into}
"""


def best(
    sought: str, n: str, rest: str, width: str, depth: str, among: str = "", asked: str = "", into: str = ""
) -> str:
    """BEST over these expressions.

    Args:
        among: What texts p must meet to be taken into account.
        asked: What passages t must meet, asked one by one until there are enough: most of those that match never are.
        into: Where to select into.
    """
    return BEST.format(
        sought=sought,
        n=n,
        rest=rest,
        width=width,
        depth=depth,
        among=among,
        bound="" if asked else f"limit {width}",
        cut="best" if asked else "top",
        asked=asked,
        into=into,
    )


GIVEN = ("($1)", "$2", "$3", "$4", "$5")
INTO = "into found, last_score, next_score"
# Within an expression the texts are hashed, whose number is not known when the plan is made.
AMONG = "where coalesce(p.text_no in (select s.text_no from unnest(texts) as s (text_no)), false)"
ASKED = """where exists (
      select from retrieval.surviving_chunks($6, $7) as c where c.passage_no = t.passage_no offset 0
    )"""

MATCHING = f"""
create function retrieval.matching_passages(
  chunking text, sought retrieval.sought, survivors int[], wanted retrieval.wanted, depth int
) returns int[]
language plpgsql stable
as $$
declare
  total constant int := coalesce(cardinality(sought.term_nos), 0);
  n int;
  rest float8;
  width int := 4 * depth / 3;
  texts int[];
  found int[];
  last_score float8;
  next_score float8;
begin
  -- Scoring a passage by its own terms costs as much as reading so many postings.
  if 25 * cardinality(survivors) < (select sum(d.df) from unnest(sought.dfs) as d (df)) then
    return array(
      select t.passage_no
      from retrieval.passage_text as t
      cross join lateral (
        select sum(w.weight) as score
        from retrieval.weights(t.terms, t.tfs, t.length, sought.term_nos, sought.scales, sought.slopes) as w
      ) as w
      where t.passage_no = any(survivors) and t.chunking = matching_passages.chunking and w.score is not null
      order by w.score desc, t.passage_no
      limit depth
    );
  end if;
  if survivors is not null then
    texts := array(
      select t.text_no
      from retrieval.passage_text as t
      where t.passage_no = any(survivors) and t.chunking = matching_passages.chunking
    );
  end if;
  -- Few postings are read at once, and those of few texts. Of many, the rarest terms' show which others matter.
  n := (
    select count(*)
    from (
      select sum(d.df) over (order by d.place) - d.df as before, sum(d.df) over () as postings
      from unnest(sought.dfs) with ordinality as d (df, place)
    ) as d
    where d.before < 10 * depth or d.postings < 400 * depth or texts is not null
  );
  loop
    rest := coalesce(sought.rests[n + 1], 0);
    if texts is not null then
      {best("sought", "n", "rest", "width", "depth", among=AMONG, into=INTO)};
    elsif wanted is null then
      {best("sought", "n", "rest", "width", "depth", into=INTO)};
    else
      execute $best${best(*GIVEN, asked=ASKED)}$best$
        into found, last_score, next_score using sought, n, rest, width, depth, chunking, wanted;
    end if;
    exit when next_score = 0 or next_score < last_score;
    width := 4 * width;
    n := greatest(n, (
      select count(*) from unnest(sought.rests) as r (rest) where r.rest >= 0.4 * coalesce(last_score, 0)
    ));
  end loop;
  return found;
end
$$;
comment on function retrieval.matching_passages is
  'The passages that some terms match best, best first: of the survivors where they are given, else of those that have
what is wanted, or of all where that is null.';
"""

SEARCH = """
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
  -- Each leg proposes so many.
  depth int := greatest(100, 2 * k);
  -- Read once, so that all of a search is about one.
  asked constant text := (select l.chunking from corpus.live_chunking as l);
  wanted constant retrieval.wanted := retrieval.read_filter(filter);
  -- Whether some of what is indexed must not be found.
  restricted constant boolean := exact_up_to is not null
    or num_nonnulls(wanted.documents, wanted.paths, wanted.media_types, wanted.titles, wanted.headings) > 0
    or exists (
      select from registry.source as s
      where s.source <> all(wanted.sources)
        -- Asked source by source: a join would read all chunks there are.
        and exists (select from corpus.piece as c where c.source = s.source and c.chunking = asked offset 0)
    );
  list_survivors constant text :=
    'select array(select s.passage_no from retrieval.surviving_chunks($1, $2) as s limit $3)';
  -- Relaxed order is almost that of the distance; adding 0 makes the planner sort, and keeps it off the graph.
  list_nearest constant text := 'select
      coalesce(array_agg(n.passage_no order by n.distance + 0, n.passage_no), ''{}''),
      coalesce(array_agg(n.distance order by n.distance + 0, n.passage_no), ''{}'')
    from (
      select v.passage_no, v.embedding <=> $1 as distance from retrieval.live as v where %s order by %s limit $2
    ) as n';
  before text[];
  sample int[];
  few int;
  indexed bigint;
  survivors int[];
  nearest int[] := '{}';
  distances float8[] := '{}';
  matching int[] := '{}';
  others int[];
  spread float8 := 1;
  sought retrieval.sought;
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

  if mode = 'hybrid' or restricted then
    -- A hundred passages taken evenly.
    sample := array(
      select p.passage_no
      from (select min(p.passage_no) as low, max(p.passage_no) as high from retrieval.passage as p) as r
      cross join generate_series(0, 99) as i
      cross join lateral (
        select p.passage_no from retrieval.passage as p
        where p.passage_no >= r.low + (r.high - r.low)::bigint * i / 99
        order by p.passage_no
        limit 1
      ) as p
    );
  end if;
  if restricted then
    if mode = 'vector' then
      -- There is nothing to add to them, and the walk past those that do not survive is long.
      depth := greatest(50, 2 * k);
    end if;
    -- Up to so many survivors it costs less to look at each of them than to walk the graph past those that do not
    -- survive: the walk visits about depth * indexed / survivors vectors. Where the sample leaves no doubt that there
    -- are more, they are not counted.
    select coalesce(sum(c.passages), 0) into indexed from retrieval.text_corpus as c where c.chunking = asked;
    few := coalesce(exact_up_to, greatest(5000, sqrt(3.0 * depth * indexed)));
    if (
      select count(*) * indexed <= 130.0 * few
      from unnest(sample) as p (passage_no)
      where exists (
        select from retrieval.surviving_chunks(asked, wanted) as c where c.passage_no = p.passage_no
      )
    ) then
      execute list_survivors into survivors using asked, wanted, few + 1;
      if cardinality(survivors) > few then
        survivors := null;
      end if;
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
          'exists (select from retrieval.surviving_chunks($3, $4) as c where c.passage_no = v.passage_no offset 0)'
        else 'true' end,
        'v.embedding <=> $1'
      ) into nearest, distances using query_embedding, depth, asked, wanted;
      perform
        set_config('hnsw.iterative_scan', before[1], true), set_config('hnsw.ef_search', before[2], true),
        set_config('hnsw.max_scan_tuples', before[3], true), set_config('hnsw.scan_mem_multiplier', before[4], true);
    end if;
    if survivors is not null or cardinality(nearest) < k or retrieval.any_gone(nearest[1:k], asked, wanted) then
      -- Few survive; or the walk has found fewer than there may be.
      if survivors is null then
        execute list_survivors into survivors using asked, wanted, null::int;
      end if;
      execute format(list_nearest, 'v.passage_no = any($3)', '(v.embedding <=> $1) + 0')
        into nearest, distances using query_embedding, depth, survivors;
    end if;
  end if;

  if mode <> 'vector' then
    sought := retrieval.sought_terms(query, asked);
    matching := retrieval.matching_passages(
      asked, sought, survivors, case when restricted then wanted end, depth
    );
    if retrieval.any_gone(matching[1:k], asked, wanted) then
      matching := retrieval.matching_passages(asked, sought, survivors, wanted, depth);
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
    -- How far apart the distances of this question are at all.
    select stddev_pop(v.embedding <=> query_embedding) into spread
    from unnest(sample) as p (passage_no)
    join retrieval.live as v using (passage_no);
  end if;

  return query
  with scored as (
    select
      c.passage_no, c.distance, w.bm25,
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
    left join retrieval.passage_text as t
      on t.passage_no = case when mode <> 'vector' then c.passage_no end and t.chunking = asked
    left join lateral (
      select sum(w.weight) as bm25
      from retrieval.weights(t.terms, t.tfs, t.length, sought.term_nos, sought.scales, sought.slopes) as w
    ) as w on true
    left join unnest(matching) as m (passage_no) on m.passage_no = c.passage_no
    order by score desc, c.passage_no
    offset 0
  )
  select
    c.chunk_id, c.document_id, c.source, d.title, c.heading, c.text,
    b.score, b.distance, b.vector_rank, b.bm25, b.text_rank, w.terms,
    (array_remove(place.documents, c.document_id))[1:20]
  from scored as b
  -- One after the other, until there are k.
  cross join lateral (
    select min(s.chunk_id) as chunk_id, array_agg(distinct s.document_id) as documents
    from retrieval.surviving_chunks(asked, wanted) as s
    where s.passage_no = b.passage_no
  ) as place
  join corpus.piece as c on c.chunk_id = place.chunk_id and c.chunking = asked
  join corpus.document as d on d.document_id = c.document_id
  left join retrieval.passage_text as t on t.passage_no = b.passage_no and t.chunking = asked
  left join lateral (
    select jsonb_object_agg(sought.lexemes[w.place], round(w.weight::numeric, 3)) as terms
    from retrieval.weights(t.terms, t.tfs, t.length, sought.term_nos, sought.scales, sought.slopes) as w
  ) as w on true
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

# Every vector has its passage, but only of an outer join does the planner know that it may be left out: searches name
# passages by number.
LIVE = """
do $$
begin
  if to_regclass('retrieval.live') is not null then
    execute 'create or replace view retrieval.live as '
      || regexp_replace(pg_get_viewdef('retrieval.live'), '\\m(LEFT )?JOIN\\M', 'LEFT JOIN');
  end if;
end
$$;
"""


def upgrade() -> None:
    for part in (DROP, TABLES, SEGMENTS, REFILL, FORGET, FILTER, TERMS, MATCHING, SEARCH, LIVE):
        op.execute(part)
