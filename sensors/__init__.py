"""What wakes the graph from outside: new feedback, and enough of it; source files, drift and erasure later.

Belongs here: reading a position in an outside log and turning it into run requests.
Does not belong here: the work those runs do, and conditions between assets (see orchestration.automation).
"""
