"""Sources: contracts in, typed raw rows out, whatever breaks its promise into quarantine.

``contract`` reads what is promised. ``read`` finds files and reads them by ``lines``, ``csv_file``, ``jsonl`` or
``parquet`` into the types of ``batch``. ``rows`` decides which rows keep the promise, ``land`` writes. Does not
belong here: parsing documents, redaction, anything after ``raw``.
"""
