"""The capture service: an append-only log of interactions and feedback behind an HTTP API.

Belongs here: the ``feedback`` schema and its migrations, the API, API keys.
Does not belong here: Dagster, dbt, datasets, or anything that derives state from the log.
"""
