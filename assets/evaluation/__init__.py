"""Stage 7: how good the live system is, measured on golden questions.

What belongs here: measures with their intervals, and their record. What does not: indexes and models.
"""
