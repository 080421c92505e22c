"""The page that describes the API: all of it is there, and its commands work as they are written."""

import os
import re
import shutil
import subprocess
from uuid import uuid4

import httpx
import psycopg
import pytest
from playwright.sync_api import Page, expect

from feedback.keys import create_key
from tests.integration.pages.conftest import Site, Tabs


def opened(tabs: Tabs) -> Page:
    page = tabs.open()
    page.goto("/docs")
    expect(page.locator("h1")).to_have_text("Datamoat feedback")
    return page


def test_every_operation_is_on_the_page(site: Site, tabs: Tabs) -> None:
    page = opened(tabs)
    document = httpx.get(f"{site.url}/openapi.json", timeout=30).json()
    operations = [
        f"{method.upper()}{path}" for path, methods in document["paths"].items() for method in methods
    ]
    headings = page.locator("h2:has(.method)").all_text_contents()
    assert headings == operations
    assert len(page.locator("section:has(.method):has(pre)").all()) == len(operations)
    expect(page.get_by_role("alert")).to_have_count(0)
    assert not re.search(r"undefined|NaN|\[object|could not be shown", page.locator("#page").inner_text())


def test_the_commands_on_the_page_work(site: Site, tabs: Tabs) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl on PATH (Debian: apt-get install curl)")
    commands = [
        text
        for text in opened(tabs).locator("section:has(.method) pre").all_text_contents()
        if text.startswith("curl ")
    ]
    with psycopg.connect(site.service.database_url) as conn:
        spare, _ = create_key(conn, site.app, ("ingest",))
    given = {
        "FEEDBACK_KEY": site.key("a reader", "ingest", "read", "admin"),
        "KEY_ID": str(spare.key_id),
        "INTERACTION_ID": "01932f6e-4a00-7000-8000-0000000000a1",
        "DEAD_LETTER_ID": str(uuid4()),
    }
    statuses = {command: status(command, given) for command in commands}
    # There is no dead letter in a database that took everything.
    wanted = {command: {404} if "/replay" in command else {200, 201, 207} for command in commands}
    assert {command: one for command, one in statuses.items() if one not in wanted[command]} == {}
    # A batch of another format is answered 200 or 207 even if nothing in it could be stored: look at what is there.
    posted = "select count(*) from feedback.{} where app = %s"
    assert site.rows(posted.format("interaction"), site.app) == [(3,)]
    assert site.rows(posted.format("feedback_event"), site.app) == [(5,)]


def status(command: str, variables: dict[str, str]) -> int:
    """Run ``command`` in a shell that has ``variables``; the status of the answer."""
    script = f"{command} -sS --noproxy '*' -o /dev/null -w '%{{http_code}}'"
    done = subprocess.run(
        ["sh", "-euc", script], env=os.environ | variables, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return int(done.stdout)
