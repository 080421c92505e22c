"""Every fault of the chaos suite, at its small scale: nothing acknowledged is lost, nothing is stored twice."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache

import pytest

from benchmarks import chaos
from benchmarks.chaos import FAULTS, Stage
from benchmarks.load import Ledger


@pytest.fixture(scope="module")
def stages() -> Iterator[Callable[[bool], Stage]]:
    """Gives the stage that a fault needs; each is set up once. Faults follow one another on it, as in real life."""
    with ExitStack() as stack:

        @cache
        def stage(small_disk: bool) -> Stage:
            try:
                folder = stack.enter_context(chaos.small_disk() if small_disk else chaos.scratch())
            except chaos.Skipped as reason:
                pytest.skip(str(reason))
            return stack.enter_context(chaos.stage(folder, "small", durable=False))

        yield stage


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str, stages: Callable[[bool], Stage]) -> None:
    verdict = chaos.suffer(FAULTS[name], stages(FAULTS[name].small_disk))
    if verdict.skipped:
        pytest.skip(verdict.note)
    assert verdict.passed, verdict
    assert verdict.acknowledged > 0


def test_the_verdict_sees_what_is_lost_and_what_is_new_twice(stages: Callable[[bool], Stage]) -> None:
    stage = stages(False)
    requests = stage.service.target.events(5)
    ledger = Ledger()
    for request in requests[:3]:
        ledger.note(request, 201, b"")
    with stage.connect() as conn:
        assert ledger.check(conn) == (3, 0)
    stage.loads = []
    sent = stage.load(requests).ledger
    sent.note(requests[0], 201, b"")
    with stage.connect() as conn:
        assert sent.check(conn) == (0, 1)
