"""What holds for all tests: their order, an environment for each file, and time for hypothesis on shared machines."""

import os
from collections.abc import Iterator

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


@pytest.fixture(scope="module", autouse=True)
def environment_of_each_file() -> Iterator[None]:
    """What a file's tests, or what they call, set in the environment ends with the file."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
