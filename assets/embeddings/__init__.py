"""From chunks to a searchable index: the embedding dataset, the job that embeds it, and pgvector.

Belongs here: exporting chunks, launching the embedder, loading its vectors, choosing the live release.
Does not belong here: how a text becomes a vector (see embedder).
"""
