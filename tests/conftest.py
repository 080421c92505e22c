"""What holds for all tests: the order of their files, and that hypothesis may be slow where others work as well."""

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")

# Begun last, these would keep one worker busy for minutes while the other has nothing left to do.
LONGEST = (
    "test_loop.py",
    "test_examples_run.py",
    "test_dev.py",
    "test_embedder_ray.py",
    "test_dbt_models.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others as they were found."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
