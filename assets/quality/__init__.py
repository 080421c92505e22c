"""Quality gates: what a table must look like before anything downstream may read it.

Belongs here: running Great Expectations and turning results into Dagster checks.
Does not belong here: rules about single rows (assets.sources refuses those into quarantine) and relations
between models (dbt tests).
"""
