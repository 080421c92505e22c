"""Where things are kept: the embedded Postgres, connections, COPY, the lake, and the warehouse schema.

Belongs here: code that reaches a place where data rests and knows nothing of what the data means.
Does not belong here: Dagster, dbt, the feedback service's own schema, or any stage of the pipeline.
"""
