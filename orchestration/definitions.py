"""Dagster's entry: the code location that ``workspace.yaml`` names."""

from __future__ import annotations

import os

from orchestration.build import build_defs
from orchestration.settings import Settings

defs = build_defs(Settings.from_environment(os.environ))
