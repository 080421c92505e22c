"""Software-defined assets, one folder a stage, in the order data flows.

``sources`` lands what contracts promise, ``quality`` gates it, ``documents`` parses, redacts and chunks,
``embeddings`` builds vectors and the index, ``warehouse`` runs dbt, ``datasets`` publishes training sets and
``evaluation`` measures retrieval. In each stage the work is plain functions; ``assets.py`` only wires them.
"""
