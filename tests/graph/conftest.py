"""One code location's manifest for all tests of this folder: making it takes seconds.

Belongs here: what several test files start. Does not belong here: any assertion.
"""

import pytest

from orchestration.prepare import write_manifest
from orchestration.settings import Settings


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The support example with a manifest, and no database at all."""
    settings = Settings.from_environment({"DATAMOAT_HOME": str(tmp_path_factory.mktemp("home"))})
    write_manifest(settings)
    return settings
