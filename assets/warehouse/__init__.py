"""dbt as assets: every model a node of the same lineage as the Python assets around it.

Belongs here: mapping dbt's manifest to assets and running dbt. Does not belong here: SQL (see dbt_project).
"""
