"""Draw the README's pictures in headless Chromium.

Belongs here: which pages, in which size, with which example data. The lineage comes from a running ``make dev``; the
feedback service's pages come from a service of their own, over a Postgres that is gone afterwards. ``make figures``
draws all of them, ``python docs/figures.py review ask`` some.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
IMAGES = Path(__file__).parent / "images"
EXAMPLE = ROOT / "examples/support/data"
APP = "help-assistant"
BEFORE, AFTER = 4, 27
REVIEWED = "How often do loggers have to be calibrated?"
ASKED = "How long must a fridge stand before it is plugged in after moving?"


@dataclass(frozen=True)
class Pages:
    """Where the pictures are taken."""

    page: Page
    dagster: str
    feedback: str = ""
    review_key: str = ""
    token: str = ""

    def keep(self, name: str, **options: Any) -> None:
        self.page.screenshot(path=IMAGES / f"{name}.png", **options)

    def sized(self, width: int, height: int) -> Page:
        self.page.set_viewport_size({"width": width, "height": height})
        return self.page


def lineage(pages: Pages) -> None:
    page = pages.sized(1900, 620)
    page.goto(f"{pages.dagster}/asset-groups")
    page.get_by_text("datasets", exact=True).last.wait_for()
    # The layout comes to rest by itself.
    page.wait_for_timeout(4_000)
    pages.keep("lineage")


def review(pages: Pages) -> None:
    """An answer about to be corrected: the difference, and what it will become."""
    page = pages.sized(1360, 800)
    page.goto(f"{pages.feedback}/login#{pages.review_key}")
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("link", name="Review", exact=True).last.click()
    for done in range(BEFORE):
        page.get_by_text(re.compile(f"^{done} / ")).wait_for()
        page.locator("#review[data-phase=working]").wait_for()
        page.keyboard.press("1")
        page.keyboard.press("Control+Enter")
    page.locator("#item").get_by_text(REVIEWED, exact=True).wait_for()
    page.keyboard.press("3")
    page.keyboard.press("e")
    page.locator("#correction-text").fill(
        "In short: Every year where patients depend on it, every two years for food and transit. When the date has"
        " passed the logger shows E31 and goes on measuring and alarming."
    )
    page.locator("#preview summary").first.wait_for()
    pages.keep("review")


def widget(pages: Pages) -> None:
    """The element under an answer, after a thumb down."""
    page = pages.sized(760, 900)
    page.goto(f"{pages.feedback}/widget/demo#token={pages.token}")
    page.get_by_role("button", name="Bad answer").click()
    page.get_by_text("What was wrong?").wait_for()
    page.get_by_role("button", name="Outdated source").click()
    page.wait_for_timeout(500)
    article = page.locator("article").bounding_box()
    assert article is not None
    pages.keep(
        "widget", clip={"x": 0, "y": article["y"] - 16, "width": 760, "height": article["height"] + 32}
    )


def ask(pages: Pages) -> None:
    """Passages for a question, with thumbs."""
    page = pages.sized(1000, 800)
    page.goto(f"{pages.feedback}/login#{pages.review_key}")
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/review")
    page.goto(f"{pages.feedback}/ask")
    page.get_by_label("Question").fill(ASKED)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator(".passage").first.get_by_role("button", name="Good answer").click()
    page.get_by_text("Thank you").first.wait_for()
    page.locator("h1").click()
    page.wait_for_timeout(500)
    pages.keep("ask")


PICTURES: dict[str, Callable[[Pages], None]] = {f.__name__: f for f in (lineage, review, widget, ask)}


def passages(question: str, k: int) -> list[dict[str, Any]]:
    """A search for the pictures, by the words that a paragraph of the example's handbook shares with the question."""
    wanted = set(re.findall(r"\w{4,}", question.lower()))
    found: list[dict[str, Any]] = []
    for file in sorted((EXAMPLE / "handbook").rglob("*.md")):
        text = file.read_text(encoding="utf-8", errors="replace")
        title = text.splitlines()[0].lstrip("# ") if text.strip() else file.stem
        for number, section in enumerate(re.split(r"\n(?=## )", text)[1:]):
            shared = wanted & set(re.findall(r"\w{4,}", section.lower()))
            document = file.relative_to(EXAMPLE).as_posix()
            found.append(
                {
                    "chunk_id": f"{document}#{number}",
                    "document_id": document,
                    "source": "handbook",
                    "title": title,
                    "body": section,
                    "score": round(len(shared) / len(wanted), 3),
                }
            )
    return sorted(found, key=lambda passage: passage["score"], reverse=True)[: min(k, 3)]


@contextmanager
def example_service(page: Page, dagster: str) -> Iterator[Pages]:
    """A feedback service with some of the example's answers that were voted down, and a queue of them."""
    import httpx
    import psycopg

    from feedback.keys import create_key
    from feedback.migrations import upgrade
    from storage import embedded

    home = Path(tempfile.mkdtemp(prefix="datamoat-figures-"))
    postgres = embedded.EmbeddedPostgres(home, durable=False)
    process = None
    try:
        url = postgres.acquire().url("postgres")
        upgrade(url)
        with psycopg.connect(url) as conn:
            ingest = create_key(conn, APP)[1]
            chief = create_key(conn, APP, ("review", "admin"), holder="Dr. Ines Falk")[1]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "feedback",
                "serve",
                "--port",
                str(port),
                "--search",
                "docs.figures:passages",
            ],
            cwd=ROOT,
            env={
                "PATH": os.environ["PATH"],
                "DATABASE_URL": url,
                "DATAMOAT_PSEUDONYM_KEY_FILE": str(home / "pseudonym.key"),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            token = _post(client, "/v1/tokens", {"interaction_id": "demo-1", "user_id": "reader"}, ingest)[
                "token"
            ]
            _send_example(client, ingest, _make_queue(client, chief))
        yield Pages(page, dagster, f"http://127.0.0.1:{port}", chief, token)
    finally:
        if process is not None:
            process.terminate()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        postgres.release()
        embedded.destroy(home)
        shutil.rmtree(home, ignore_errors=True)


def _post(client: Any, path: str, body: Any, key: str | None = None) -> Any:
    headers = {"Authorization": f"Bearer {key}"} if key else {"Sec-Fetch-Site": "same-origin"}
    answer = client.post(path, json=body, headers=headers)
    answer.raise_for_status()
    return answer.json()


def _send_example(client: Any, key: str, queue: Any) -> None:
    """Answers that were voted down, as if they were of today, queued one by one; the one for the picture after a few."""
    feedback = [json.loads(line) for line in (EXAMPLE / "feedback.jsonl").open()]
    down = {
        event.get("interaction_id")
        for event in feedback
        if event["kind"] == "thumb" and event.get("score") == 0
    }
    answers = [json.loads(line) for line in (EXAMPLE / "interactions.jsonl").open()]
    answers = [one for one in answers if one.get("interaction_id") in down and len(one["messages"]) == 2]
    reviewed = next(one for one in answers if one["messages"][-1]["content"] == REVIEWED)
    others = [one for one in answers if one["messages"][-1]["content"] != REVIEWED]
    for one in [*others[:BEFORE], reviewed, *others[BEFORE : BEFORE + AFTER]]:
        del one["occurred_at"]
        _post(client, "/v1/interactions", one, key)
        thumb = {
            "kind": "thumb",
            "score": 0,
            "reasons": ["not_factual"],
            "interaction_id": one["interaction_id"],
        }
        _post(client, "/v1/feedback", thumb | {"author_role": "end_user"}, key)
        _post(client, "/review/api/fill", queue)


def _make_queue(client: Any, key: str) -> Any:
    login = client.post("/login", data={"key": key}, headers={"Sec-Fetch-Site": "same-origin"})
    assert login.status_code == 303, login.text
    verdict = ["right", "partly right", "wrong"]
    rubric = [
        {"name": "verdict", "kind": "choice", "title": "Is the answer right?", "options": verdict},
        {"name": "right_answer", "kind": "correction", "title": "The right answer"},
        {"name": "golden", "kind": "golden", "title": "Use as a golden case?"},
        {"name": "note", "kind": "text", "title": "Note"},
    ]
    new = {"name": "Answers voted down", "rubric": rubric, "description": "Compare with the handbook."}
    queue = _post(client, "/review/api/create", new)
    rule = {"kind": "low_score", "params": {"below": 0.5}}
    _post(client, "/review/api/add-rule", queue | {"rule": rule})
    return queue


def main() -> int:
    """Draw the pictures; 1 when there is no browser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(PICTURES)}")
    parser.add_argument("--url", default="http://127.0.0.1:3000", help="address of Dagster UI")
    arguments = parser.parse_args()
    names = arguments.names or list(PICTURES)
    if unknown := set(names) - set(PICTURES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(PICTURES)}")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        print("no Chromium on PATH; on Debian: apt-get install chromium", file=sys.stderr)
        return 1
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox", "--disable-background-networking"]
        )
        page = browser.new_page()
        if "lineage" in names:
            lineage(Pages(page, arguments.url))
        if wanted := [name for name in names if name != "lineage"]:
            with example_service(page, arguments.url) as pages:
                for name in wanted:
                    PICTURES[name](pages)
        browser.close()
    for name in names:
        print(IMAGES / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
