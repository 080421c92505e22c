"""A deployment's services run once."""

import os
from pathlib import Path

import pytest

from orchestration.services import ServiceError, only_one
from orchestration.settings import Settings


def test_a_second_holder_is_told_who_the_first_is(tmp_path: Path) -> None:
    settings = Settings.from_environment({"DATAMOAT_HOME": str(tmp_path)})
    other = Settings.from_environment({"DATAMOAT_HOME": str(tmp_path), "EXAMPLE": "none"})
    with only_one(settings):
        with (
            pytest.raises(ServiceError, match=f"running already: process {os.getpid()} since .*Ctrl-C"),
            only_one(settings),
        ):
            pass
        with only_one(other):
            pass
    with only_one(settings):
        pass
