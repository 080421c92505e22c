"""Tests: unit (no services), graph (ephemeral Dagster), integration (real Postgres, service, browser)."""
