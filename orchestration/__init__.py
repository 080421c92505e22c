"""Assembly: settings, resources, partitions, automation, jobs, schedules, the command line.

Belongs here: how the parts are put together into one Dagster code location and one ``moat`` command.
Does not belong here: work. A function that reads, checks or writes data lives in the stage that owns it.
"""
