"""Roles, schemas and grants; quarantine, registry and corpus tables; hybrid search.

Revision ID: 0001
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

WRITTEN_SCHEMAS = (
    "raw",
    "quarantine",
    "corpus",
    "retrieval",
    "registry",
    "staging",
    "intermediate",
    "marts",
)

# Roles are cluster-wide: another database of the same cluster may have made them, even at this moment.
ROLES = """
do $$
declare
  wanted text;
begin
  foreach wanted in array array['datamoat_owner', 'datamoat_writer', 'datamoat_ingest', 'datamoat_analyst'] loop
    begin
      execute format('create role %I nologin', wanted);
    exception when duplicate_object or unique_violation then null;
    end;
    -- From Postgres 16 on, whoever made a role may give it away but not act as it until granted so.
    if not pg_has_role(current_user, wanted, 'usage') then
      execute format('grant %I to current_user', wanted);
    end if;
  end loop;
end
$$
"""

TABLES = """
create table quarantine.row (
  id bigint generated always as identity primary key,
  source text not null,
  file text not null,
  row_number bigint not null,
  rule text not null,
  reason text not null,
  remedy text not null,
  row jsonb not null,
  content_hash text not null,
  contract_version text not null,
  run_id text,
  first_seen timestamptz not null default now(),
  last_seen timestamptz not null default now(),
  resolved_at timestamptz
);
create unique index on quarantine.row (source, file, row_number, content_hash, rule);
comment on table quarantine.row is 'One row per refused source row: the whole row, the rule it broke and what to do.';

create table quarantine.file (
  id bigint generated always as identity primary key,
  source text not null,
  file text not null,
  rule text not null,
  reason text not null,
  remedy text not null,
  sha256 text,
  size bigint,
  lake_uri text,
  run_id text,
  first_seen timestamptz not null default now(),
  last_seen timestamptz not null default now(),
  resolved_at timestamptz
);
create unique index on quarantine.file (source, file, rule, coalesce(sha256, ''));
comment on table quarantine.file is 'One row per refused file and rule.';

create table registry.source (
  source text primary key,
  version text not null,
  owner text not null,
  description text not null,
  provenance text not null check (provenance in ('proprietary', 'third_party')),
  pii boolean not null,
  allowed_uses text[] not null,
  kind text not null check (kind in ('table', 'documents', 'golden')),
  location text not null,
  contract_sha256 text not null,
  freshness_days numeric,
  updated_at timestamptz not null default now()
);
comment on table registry.source is 'One row per contract: what each source promises and what it may be used for.';

create table registry.source_file (
  source text not null,
  file text not null,
  sha256 text not null,
  size bigint not null,
  rows_in bigint not null,
  rows_landed bigint not null,
  rows_refused bigint not null,
  contract_sha256 text not null,
  landed_at timestamptz not null default now(),
  primary key (source, file),
  check (rows_in = rows_landed + rows_refused)
);
comment on table registry.source_file is 'One row per source file as last landed; every row in is landed or refused.';

create table registry.embedding_release (
  release text primary key,
  fingerprint jsonb not null,
  dimensions int not null,
  created_at timestamptz not null default now(),
  live boolean not null default false
);
create unique index on registry.embedding_release (live) where live;
comment on table registry.embedding_release is 'One row per embedding release (model and chunking); at most one is live.';

create table registry.dataset_version (
  dataset text not null,
  version text not null,
  manifest jsonb not null,
  rows bigint not null,
  uri text not null,
  run_id text,
  created_at timestamptz not null default now(),
  primary key (dataset, version)
);
comment on table registry.dataset_version is 'One row per immutable dataset version, named by the hash of its manifest.';

create table registry.dataset_alias (
  dataset text not null,
  alias text not null,
  version text not null,
  moved_at timestamptz not null default now(),
  moved_by text not null default session_user,
  primary key (dataset, alias),
  foreign key (dataset, version) references registry.dataset_version
);
comment on table registry.dataset_alias is 'One row per name that points at a dataset version; publishing moves the pointer.';

create table registry.evaluation (
  id bigint generated always as identity primary key,
  name text not null,
  release text not null,
  mode text not null,
  metric text not null,
  value double precision not null,
  low double precision,
  high double precision,
  n int not null,
  inputs_sha256 text not null,
  created_at timestamptz not null default now(),
  unique (name, release, mode, metric, inputs_sha256)
);
comment on table registry.evaluation is 'One row per measured figure, with its interval and n.';

create table registry.checkpoint (
  name text primary key,
  value jsonb not null,
  updated_at timestamptz not null default now()
);
comment on table registry.checkpoint is 'One row per reader of a log or set of inputs: how far it has got.';

create table corpus.redaction (
  text_sha256 text not null,
  policy text not null,
  redacted text not null,
  findings jsonb not null,
  primary key (text_sha256, policy)
);
comment on table corpus.redaction is
  'Redaction is a pure function of (text, policy): its results, keyed by the hash of a text that is not kept here.';

create table corpus.document (
  document_id text primary key,
  source text not null,
  path text not null,
  title text not null,
  media_type text not null,
  raw_sha256 text not null,
  text text not null,
  text_sha256 text not null,
  parser text not null,
  policy text not null,
  findings jsonb not null,
  updated_at timestamptz not null default now()
);
create index on corpus.document (source);
create index on corpus.document (raw_sha256);
comment on table corpus.document is 'One row per document: its redacted text and where it came from.';

create table corpus.chunk (
  chunk_id text primary key,
  document_id text not null references corpus.document on delete cascade,
  source text not null,
  ordinal int not null,
  start_char int not null,
  end_char int not null,
  text text not null,
  content_hash text not null,
  heading text not null default '',
  chunker text not null,
  tsv tsvector generated always as (to_tsvector('english', text)) stored
);
create index on corpus.chunk (document_id);
create index on corpus.chunk (source);
create index on corpus.chunk (content_hash);
create index on corpus.chunk using gin (tsv);
comment on table corpus.chunk is 'One row per chunk: text[start_char:end_char] of its document.';
"""

# Two legs, fused by reciprocal rank (Cormack, Clarke, Buettcher, SIGIR 2009, k = 60). retrieval.live
# appears when the first release is loaded; plpgsql looks it up when the function runs.
SEARCH = """
create function retrieval.search(
  query text, query_embedding halfvec, k int default 10, mode text default 'hybrid'
) returns table (
  chunk_id text, document_id text, source text, title text, heading text, body text,
  score double precision, vector_rank bigint, text_rank bigint
)
language plpgsql volatile
as $$
#variable_conflict use_column
declare
  depth constant int := greatest(5 * k, 50);
  -- Any word may match: requiring all of them finds almost nothing for a whole question.
  words constant tsquery := (
    select string_agg(quote_literal(lexeme), ' | ')::tsquery from unnest(to_tsvector('english', query))
  );
begin
  if mode not in ('hybrid', 'vector', 'text') then
    raise exception 'mode must be hybrid, vector or text, not %', mode;
  end if;
  -- The graph search returns no more rows than this, whatever the limit.
  perform set_config('hnsw.ef_search', least(1000, greatest(100, depth))::text, true);
  return query
  with allowed as (
    select s.source from registry.source as s where 'rag' = any(s.allowed_uses)
  ),
  nearest as (
    select v.content_hash, v.embedding <=> query_embedding as distance
    from retrieval.live as v
    where mode <> 'text'
    order by v.embedding <=> query_embedding
    limit depth
  ),
  vector_leg as (
    select c.chunk_id, row_number() over (order by n.distance, c.chunk_id) as place
    from nearest as n
    join corpus.chunk as c using (content_hash)
    where c.source in (select source from allowed)
  ),
  text_leg as (
    select m.chunk_id, row_number() over (order by m.rank desc, m.chunk_id) as place
    from (
      select c.chunk_id, ts_rank_cd(c.tsv, words, 1) as rank
      from corpus.chunk as c
      where mode <> 'vector' and c.tsv @@ words and c.source in (select source from allowed)
      order by rank desc, c.chunk_id
      limit depth
    ) as m
  ),
  fused as (
    select
      chunk_id,
      coalesce(1.0 / (60 + v.place), 0) + coalesce(1.0 / (60 + t.place), 0) as score,
      v.place as vector_rank,
      t.place as text_rank
    from vector_leg as v
    full join text_leg as t using (chunk_id)
  )
  select
    c.chunk_id, c.document_id, c.source, d.title, c.heading, c.text,
    f.score::double precision, f.vector_rank, f.text_rank
  from fused as f
  join corpus.chunk as c using (chunk_id)
  join corpus.document as d using (document_id)
  order by f.score desc, c.chunk_id
  limit k;
end
$$;
comment on function retrieval.search is 'Hybrid search over the live embedding release: full text and vectors, fused by rank.';
"""


def upgrade() -> None:
    op.execute(ROLES)
    op.execute("create extension if not exists vector")
    for schema in WRITTEN_SCHEMAS:
        op.execute(f"create schema if not exists {schema}")
        op.execute(f"grant usage, create on schema {schema} to datamoat_writer, datamoat_owner")
    op.execute(TABLES)
    op.execute(SEARCH)
    for schema in WRITTEN_SCHEMAS:
        op.execute(
            f"grant select, insert, update, delete on all tables in schema {schema} to datamoat_writer"
        )
    # Analysts read what dbt publishes and the registry. Both hold redacted text at most.
    op.execute("grant usage on schema marts, registry to datamoat_analyst")
    op.execute("grant select on all tables in schema registry to datamoat_analyst")
    op.execute(
        "alter default privileges for role datamoat_writer in schema marts grant select on tables to datamoat_analyst"
    )
