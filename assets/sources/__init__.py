"""Sources: contracts in, typed raw rows out, whatever breaks its promise into quarantine.

``contract`` reads what is promised, ``read`` turns files into batches, ``rows`` decides which rows keep the
promise and ``land`` writes. Does not belong here: parsing documents, redaction, anything after ``raw``.
"""
