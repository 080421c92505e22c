"""Tests of the Dagster graph on an ephemeral instance."""
