"""Tests against a real Postgres, a real feedback service and a real browser."""
