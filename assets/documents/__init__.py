"""Documents: landed files and rows become clean text without personal data, cut into chunks.

Belongs here: reading formats (parse), removing personal data (redact), cutting into chunks (chunk), keeping the
``corpus`` schema equal to what was landed (corpus), and which ways of cutting it has (chunkings). Does not belong here: finding and landing
files (sources), turning chunks into vectors (embeddings), choosing what to train on (datasets).
"""
