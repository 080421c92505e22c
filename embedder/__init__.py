"""The batch-embedding job: Parquet in, Parquet out, runnable by hand on a machine with nothing else.

Belongs here: reading model folders, tokenising, batching, the engines, shards and resume.
Does not belong here: Postgres, contracts, or any part of Dagster except dagster-pipes.
"""
