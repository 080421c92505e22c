"""What the tests of the pages share: one service, one browser per file, signed-in tabs, a watch on every request.

Belongs here: fixtures and steps. Does not belong here: any assertion about one page.
"""

import asyncio
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from feedback import log
from feedback.keys import create_key
from feedback.review.queues import create_queue
from feedback.review.rubric import Question
from feedback.review.rules import Rule, fill, save_rule
from feedback.service import ADMIN_ROLE, REVIEW_ROLE
from tests.integration.conftest import Cluster, FeedbackService

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
]

RUBRIC = (
    Question("verdict", "choice", "Is the answer right?", ("right", "partly right", "wrong"), required=True),
    Question("quality", "score", "How well is it put?"),
    Question("right_answer", "correction", "The right answer"),
    Question("golden", "golden", "Use as a golden case?"),
    Question("note", "text", "Note"),
)


@dataclass
class Site:
    """A running service, seen by one app: its keys, its interactions, its queues."""

    service: FeedbackService
    app: str
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.service.base_url

    def key(self, holder: str, *scopes: str) -> str:
        """A person's key, for reviewing unless ``scopes`` say otherwise; made once."""
        if holder not in self.keys:
            with psycopg.connect(self.service.database_url) as conn:
                self.keys[holder] = create_key(conn, self.app, scopes or ("review",), holder=holder)[1]
        return self.keys[holder]

    def send(self, path: str, *items: dict[str, Any]) -> None:
        headers = {"Authorization": f"Bearer {self.key('the product', 'ingest')}"}
        answer = httpx.post(self.url + path, headers=headers, json=items, timeout=30)
        assert answer.status_code == 200, answer.text

    def queue(
        self,
        *items: tuple[str, str],
        rubric: Sequence[Question] = RUBRIC,
        reason: bool = True,
        **settings: Any,
    ) -> UUID:
        """A queue that holds ``items``, pairs of question and output, in this order; each was flagged.

        Without a ``reason`` there is no rule, and they are there as the control sample.
        """

        async def make() -> UUID:
            async with AsyncExitStack() as stack:
                admin, review = [
                    await log.connect(self.service.database_url, role, 1)
                    for role in (ADMIN_ROLE, REVIEW_ROLE)
                ]
                for pool in (admin, review):
                    stack.push_async_callback(log.close, pool)
                options: dict[str, Any] = {"name": "Manuals", "control_rate": 0.0 if reason else 1.0}
                queue = await create_queue(
                    admin, actor="tests", app=self.app, rubric=rubric, **options | settings
                )
                if reason:
                    await save_rule(admin, queue.queue_id, Rule("flag", {}), actor="tests")
                for number, (question, output) in enumerate(items):
                    await asyncio.to_thread(self._flagged, f"{self.app}-{number}", question, output)
                    # One by one: the queue's order is then the order given.
                    await fill(review, queue.queue_id)
                return queue.queue_id

        # Playwright has a loop of its own in this thread.
        with ThreadPoolExecutor(1) as elsewhere:
            return elsewhere.submit(lambda: asyncio.run(make())).result()

    def _flagged(self, interaction_id: str, question: str, output: str) -> None:
        self.send(
            "/v1/interactions",
            {
                "interaction_id": interaction_id,
                "messages": [
                    {"role": "system", "content": "Answer from the manuals."},
                    {"role": "user", "content": question},
                ],
                "output": output,
                "model": "support-large",
                "retrieved": [{"chunk_id": "manual#12", "source": "manuals", "rank": 1, "score": 0.81}],
            },
        )
        self.send("/v1/feedback", {"kind": "flag", "label": "wrong", "interaction_id": interaction_id})

    def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.service.database_url, autocommit=True) as conn:
            return conn.execute(query, parameters).fetchall()

    def said(self) -> list[tuple[Any, ...]]:
        """What reviewers said: interaction, name, and score, label, explanation or correction."""
        return self.rows(
            "select interaction_id, name, coalesce(score::text, label, explanation, correction)"
            " from feedback.feedback_event where author_role in ('reviewer', 'adjudicator')"
            " and interaction_id like %s order by occurred_at",
            f"{self.app}-%",
        )

    def end_leases(self) -> None:
        """Every lease is over, as if its time had passed."""
        with psycopg.connect(self.service.database_url) as conn:
            conn.execute("update feedback.review_slot set leased_until = now() - interval '1 second'")


@dataclass
class Tabs:
    """A browser whose every request is watched: nothing may go to another host, no script may fail."""

    browser: Browser
    site: Site
    hosts: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)
    contexts: list[BrowserContext] = field(default_factory=list)

    def open(self, **settings: Any) -> Page:
        """A tab of a browser that knows nobody."""
        context = self.browser.new_context(
            **{"viewport": {"width": 1440, "height": 860}, "base_url": self.site.url} | settings
        )
        context.set_default_timeout(10_000)
        context.on("request", lambda request: self.hosts.add(re.sub(r"^(\w+://[^/]*).*", r"\1", request.url)))
        context.on("weberror", lambda error: self.failures.append(str(error.error)))
        self.contexts.append(context)
        return context.new_page()

    def sign_in(self, holder: str, *scopes: str, **settings: Any) -> Page:
        """A tab of a person who has signed in."""
        page = self.open(**settings)
        answer = page.request.post(
            "/login", form={"key": self.site.key(holder, *scopes)}, headers={"Sec-Fetch-Site": "same-origin"}
        )
        assert answer.url == f"{self.site.url}/review", answer.text()
        return page

    def close(self) -> None:
        for context in self.contexts:
            context.close()
        self.contexts.clear()


@pytest.fixture(scope="session")
def pages_service(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeedbackService]:
    """One service for all these tests, with a search of ours behind the ask page."""
    service = FeedbackService(
        cluster.new_database(),
        tmp_path_factory.mktemp("pages") / "pseudonym.key",
        environment={"DATAMOAT_SEARCH": "tests.integration.pages.search:passages"},
    )
    service.start()
    yield service
    service.stop()


@pytest.fixture
def site(pages_service: FeedbackService) -> Site:
    """The service as an app of the test's own."""
    return Site(pages_service, f"app-{secrets.token_hex(3)}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH (Debian: apt-get install chromium)")
    expect.set_options(timeout=15_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def tabs(browser: Browser, site: Site) -> Iterator[Tabs]:
    tabs = Tabs(browser, site)
    yield tabs
    tabs.close()
    assert tabs.hosts <= {tabs.site.url}, f"requests left for {tabs.hosts - {tabs.site.url}}"
    assert not tabs.failures, tabs.failures


@pytest.fixture
def picture(tmp_path: Path) -> Callable[[Page, str], None]:
    """Keep a screenshot, in the test's folder or the one that DATAMOAT_SCREENSHOTS names."""
    folder = Path(os.environ.get("DATAMOAT_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)

    def take(page: Page, name: str) -> None:
        page.screenshot(path=folder / f"{name}.png")

    return take


def working(page: Page, output: str | None = None) -> None:
    """Wait until an item is in hand (with this output)."""
    expect(page.locator("#review")).to_have_attribute("data-phase", "working")
    if output is not None:
        expect(page.locator("#output")).to_have_text(output)
