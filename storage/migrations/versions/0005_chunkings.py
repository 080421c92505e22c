"""Chunks of several chunkings side by side; the view ``corpus.chunk`` shows those of the live one.

Revision ID: 0005

What there is becomes the live chunking: nothing is cut, embedded or indexed again.
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# dbt's view holds on to the table, whatever its name; the next run makes it, and what reads it, anew.
PIECES = """
drop view if exists staging.stg_corpus__chunks cascade;

alter table corpus.chunk rename to piece;
alter table corpus.piece
  add column chunking text not null default '400-1000/240',
  add column passage_no int;
alter table corpus.piece alter column chunking drop default;
alter table corpus.piece rename constraint chunk_document_id_fkey to piece_document_id_fkey;
alter table corpus.piece drop constraint chunk_pkey, add primary key (chunking, chunk_id);
alter index corpus.chunk_document_id_idx rename to piece_document_id_idx;
alter index corpus.chunk_content_hash_idx rename to piece_content_hash_idx;
drop index corpus.chunk_source_idx;
create index on corpus.piece (source, chunking);

update corpus.piece as c set passage_no = p.passage_no
from retrieval.passage as p where p.content_hash = c.content_hash;
create index on corpus.piece (passage_no);

-- Who numbers its rows analyzes it, which before Postgres 17 only an owner may do.
alter table corpus.piece owner to datamoat_writer;

comment on table corpus.piece is
  'One row per chunk of each chunking: text[start_char:end_char] of its document. Searches read corpus.chunk.';
comment on column corpus.piece.chunking is
  'How documents were to be cut: least and most characters, most tokens, such as 400-1000/240.';
comment on column corpus.piece.chunker is
  'What cut it: the chunking, the version of the code, the language. Empty once its document has another text.';
comment on column corpus.piece.passage_no is
  'Its text in retrieval.passage; null until the index knows it.';
"""

# Moved together with retrieval.live. Who has read either holds a lock on it until the end of the transaction, so that
# both stay as they are until then.
VIEWS = """
create view corpus.live_chunking as select '400-1000/240'::text as chunking;
comment on view corpus.live_chunking is 'One row: the chunking whose chunks are searched.';

create view corpus.chunk as
select
  c.chunk_id, c.document_id, c.source, c.ordinal, c.start_char, c.end_char, c.text, c.content_hash, c.heading,
  c.chunker, c.chunking, c.passage_no
from corpus.piece as c
join corpus.live_chunking as l on l.chunking = c.chunking;
comment on view corpus.chunk is 'One row per chunk of the live chunking: text[start_char:end_char] of its document.';

-- Who promotes a release replaces them, which only an owner may do.
alter view corpus.live_chunking owner to datamoat_writer;
alter view corpus.chunk owner to datamoat_writer;
"""

RELEASES = """
alter table registry.embedding_release add column chunking text not null default '400-1000/240';
alter table registry.embedding_release alter column chunking drop default;
comment on column registry.embedding_release.chunking is 'Whose chunks it embeds; see corpus.piece.chunking.';
comment on table retrieval.passage is
  'One row per distinct text of corpus.piece. Deleting it takes the text out of every release and of the postings.';
"""


def upgrade() -> None:
    for part in (PIECES, VIEWS, RELEASES):
        op.execute(part)
