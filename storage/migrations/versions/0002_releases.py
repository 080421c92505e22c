"""Passages, embedding releases that are built beside the live one, their failures and promotions.

Revision ID: 0002

Release tables of revision 0001, keyed by the text's hash, and the view over them are dropped: their vectors lie in
the lake, and the next run loads those of texts that are still embedded alike, and embeds the others. Until then a
search finds no vectors.
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

DROP_OLD_RELEASES = """
drop view if exists retrieval.live;
do $$
declare
  old record;
begin
  for old in select release from registry.embedding_release loop
    execute format('drop table if exists retrieval.%I', 'release_' || old.release);
  end loop;
end
$$;
delete from registry.embedding_release;
"""

TABLES = """
create table retrieval.passage (
  passage_no int generated always as identity primary key,
  content_hash text not null unique
);
comment on table retrieval.passage is
  'One row per distinct text of corpus.chunk. Deleting it takes the text out of every release and of the postings.';
-- Who loads vectors refers to it by foreign keys and analyzes it, and before Postgres 17 only an owner may do both.
alter table retrieval.passage owner to datamoat_writer;

alter table registry.embedding_release
  drop column live,
  add column model text,
  add column state text not null default 'candidate' check (state in ('candidate', 'live', 'retired')),
  add column live boolean not null generated always as (state = 'live') stored,
  add column loaded_at timestamptz,
  add column retired_at timestamptz,
  add column checks jsonb not null default '{}',
  add column checked_at timestamptz,
  add check ((state = 'retired') = (retired_at is not null));
create unique index embedding_release_live_idx on registry.embedding_release (live) where live;
comment on column registry.embedding_release.model is 'Folder of the model; null for the installed one.';
comment on column registry.embedding_release.state is
  'candidate: built, and never live or not yet; live: searched; retired: was live, its table is kept for a rollback.';
comment on column registry.embedding_release.loaded_at is 'When vectors were last loaded into its table.';
comment on column registry.embedding_release.checks is 'Newest outcome of each check before promotion, by name.';

create table registry.promotion (
  id bigint generated always as identity primary key,
  action text not null check (action in ('promote', 'rollback')),
  release text not null,
  previous text,
  who text not null,
  why text not null check (why ~ '\\S'),
  forced boolean not null default false,
  checks jsonb not null default '{}',
  at timestamptz not null default now()
);
comment on table registry.promotion is
  'One row per move of retrieval.live: to which release, from which, who, why, and what its checks had said.';

create table retrieval.embedding_failure (
  content_hash text not null references retrieval.passage (content_hash) on delete cascade,
  release text not null references registry.embedding_release on delete cascade,
  error text not null,
  attempts int not null check (attempts > 0),
  next_attempt_at timestamptz not null,
  primary key (release, content_hash)
);
create index on retrieval.embedding_failure (content_hash);
comment on table retrieval.embedding_failure is
  'One row per text that a release has no vector of because embedding it failed; words still find it.';
comment on column retrieval.embedding_failure.next_attempt_at is 'From when a run tries again.';
"""


def upgrade() -> None:
    op.execute(DROP_OLD_RELEASES)
    op.execute(TABLES)
    op.execute(
        "grant select, insert, update, delete on registry.promotion, retrieval.embedding_failure to datamoat_writer"
    )
    op.execute("grant select on registry.promotion to datamoat_analyst")
