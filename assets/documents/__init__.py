"""Documents: landed files and rows become clean text without personal data, cut into chunks.

Belongs here: reading formats (parse), removing personal data (redact), cutting into chunks (chunk), and
keeping the ``corpus`` schema equal to what was landed (corpus). Does not belong here: finding and landing
files (sources), turning chunks into vectors (embeddings), choosing what to train on (datasets).
"""
