"""Figures keep what each question scored, so that two evaluations can be compared question by question.

Revision ID: 0004
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        "alter table registry.evaluation add column by_question jsonb;"
        "comment on column registry.evaluation.by_question is"
        " 'What each question scored, by the hash of its text; null for figures of earlier versions.'"
    )
