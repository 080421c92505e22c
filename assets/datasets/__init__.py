"""Stage 6: training sets from feedback, as immutable versions with lineage.

What belongs here: signals, the rules that make rows of them, and the files and names of versions. What does
not: folding and redacting feedback (dbt), and training itself.
"""
