"""The feedback element in a real browser, against the real service, on a host page with a strict content policy."""

import html
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect, sync_playwright
from psycopg.rows import dict_row

from feedback import tokens
from feedback.access import Caller
from feedback.ids import uuid7
from feedback.secret import ensure_secret
from tests.integration.conftest import FeedbackService

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; base-uri 'none'; "
    "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
OUTPUT = "Print the label in your account and drop the parcel at any shop."
UNSENT = """() => new Promise((resolve, reject) => {
  const opening = indexedDB.open("datamoat-feedback", 1);
  opening.onerror = reject;
  opening.onupgradeneeded = () => opening.result.createObjectStore("unsent", { keyPath: "id" });
  opening.onsuccess = () => {
    const all = opening.result.transaction("unsent").objectStore("unsent").getAll();
    all.onsuccess = () => { opening.result.close(); resolve(all.result.map((entry) => entry.event)); };
  };
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"],
        )
        yield browser
        browser.close()


@dataclass
class Host:
    """A page of somebody's product with the element in it."""

    service: FeedbackService
    context: BrowserContext
    page: Page
    pictures: Path
    interaction: str = field(default_factory=lambda: f"i-{uuid7()}")

    def token(self, user: str = "ana", **wanted: Any) -> str:
        answer = httpx.post(
            f"{self.service.base_url}/v1/tokens",
            json={"interaction_id": self.interaction, "user_id": user, **wanted},
            headers={"Authorization": f"Bearer {self.service.api_key}"},
            trust_env=False,
        )
        assert answer.status_code == 201, answer.text
        return str(answer.json()["token"])

    def show(
        self, attributes: str = "", *, token: str | None = None, output: str = OUTPUT, more: str = ""
    ) -> Locator:
        """Open the page. Returns the element that judges the answer."""
        token = self.token() if token is None else token
        body = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>A product</title>
            <link rel="stylesheet" href="/widget/demo.css"><script type="module" src="/widget/feedback.js"></script>
            <main><div id="answer-1">{html.escape(output)}</div>
            <datamoat-feedback id="main" for="answer-1" token="{token}" {attributes}></datamoat-feedback>{more}</main>"""
        self.page.route(
            "**/host",
            lambda route: route.fulfill(
                body=body, content_type="text/html", headers={"Content-Security-Policy": POLICY}
            ),
        )
        self.page.goto(f"{self.service.base_url}/host")
        return self.page.locator("#main")

    def rows(self, *kinds: str) -> list[dict[str, Any]]:
        """What the log holds on the answer, in the order of arrival."""
        with psycopg.connect(self.service.database_url, row_factory=dict_row) as conn:
            return conn.execute(
                "SELECT * FROM feedback.feedback_event WHERE interaction_id = %s AND (%s = '{}' OR kind = ANY(%s))"
                " ORDER BY received_at, event_id",
                [self.interaction, list(kinds), list(kinds)],
            ).fetchall()

    def stored(self, count: int, *kinds: str) -> list[dict[str, Any]]:
        """``rows`` once there are ``count`` of them."""
        self.until(lambda: len(self.rows(*kinds)) >= count)
        found = self.rows(*kinds)
        assert len(found) == count, found
        return found

    def unsent(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self.page.evaluate(UNSENT)
        return entries

    def heard(self, event: str) -> Callable[[], list[Any]]:
        """Collect the details of an event that the element sends to the page."""
        self.page.evaluate(
            "(type) => { window[type] = []; document.addEventListener(type, (e) => window[type].push(e.detail)); }",
            event,
        )
        return lambda: list(self.page.evaluate("(type) => window[type]", event))

    def until(self, met: Callable[[], Any]) -> None:
        """Wait; the browser's questions to our route handlers are answered meanwhile."""
        deadline = time.monotonic() + 30
        while not met():
            assert time.monotonic() < deadline, "it did not come about"
            self.page.wait_for_timeout(20)

    def picture(self, name: str) -> None:
        self.pictures.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=self.pictures / f"widget-{name}.png", full_page=True)


@pytest.fixture
def host(browser: Browser, feedback_service: FeedbackService, tmp_path: Path) -> Iterator[Host]:
    """The host page; nothing may leave to another host, be refused by its policy, or go wrong in its script."""
    context = browser.new_context(viewport={"width": 860, "height": 720}, color_scheme="light")
    context.set_default_timeout(20_000)
    page = context.new_page()
    visited: set[str] = set()
    wrong: list[str] = []
    page.on("request", lambda request: visited.add(urlsplit(request.url).netloc))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("console", lambda said: wrong.append(said.text) if "Content Security" in said.text else None)
    yield Host(
        feedback_service, context, page, Path(os.environ.get("DATAMOAT_SCREENSHOTS") or tmp_path / "pictures")
    )
    context.close()
    assert wrong == []
    assert visited == {f"127.0.0.1:{feedback_service.port}"}


def good(element: Locator) -> Locator:
    return element.get_by_role("button", name="Good answer")


def bad(element: Locator) -> Locator:
    return element.get_by_role("button", name="Bad answer")


def panel(element: Locator) -> Locator:
    return element.get_by_role("dialog")


def pressed(button: Locator, state: bool = True) -> None:
    expect(button).to_have_attribute("aria-pressed", str(state).lower())


# ---- votes ----


def test_a_vote_is_kept_before_the_panel_opens_and_escape_keeps_it(host: Host) -> None:
    held: list[Route] = []
    host.page.route("**/v1/feedback", lambda route: held.append(route))
    element = host.show()
    bad(element).click()
    expect(panel(element)).to_be_visible()
    host.picture("panel")
    (vote,) = [event for event in host.unsent() if event["kind"] == "thumb"]
    assert (vote["op"], vote["score"]) == ("create", 0) and "reasons" not in vote
    assert host.rows() == []
    host.page.unroute("**/v1/feedback")
    for route in held:
        route.continue_()
    (row,) = host.stored(1, "thumb")
    assert str(row["event_id"]) == vote["event_id"]
    assert (row["score"], row["label"], row["reasons"], row["author_role"]) == (0.0, "down", None, "end_user")
    host.page.keyboard.press("Escape")
    expect(panel(element)).to_be_hidden()
    pressed(bad(element))
    expect(bad(element)).to_be_focused()
    assert len(host.rows("thumb")) == 1


def test_switching_revises_and_a_second_click_takes_back(host: Host) -> None:
    element = host.show()
    pressed(good(element), False)
    good(element).click()
    pressed(good(element))
    expect(element.get_by_text("Thank you")).to_be_visible()
    bad(element).click()
    pressed(good(element), False)
    bad(element).click()
    pressed(bad(element), False)
    expect(panel(element)).to_be_hidden()
    good(element).click()
    pressed(good(element))
    expect(good(element)).to_be_focused()
    rows = host.stored(4, "thumb")
    assert [(row["op"], row["revision"], row["score"]) for row in rows] == [
        ("create", 1, 1.0),
        ("revise", 2, 0.0),
        ("retract", 3, None),
        ("revise", 4, 1.0),
    ]
    assert len({row["feedback_id"] for row in rows}) == 1


def test_a_reload_shows_what_was_said(host: Host) -> None:
    element = host.show()
    bad(element).click()
    element.get_by_role("button", name="Too long").click()
    element.get_by_role("textbox", name="Anything to add?").fill("Shops no longer take parcels.")
    panel(element).get_by_role("button", name="Show the right answer").click()
    element.get_by_role("textbox", name="The right answer").fill("Order a courier.")
    element.get_by_role("button", name="Send").click()
    element.get_by_role("button", name="Flag this answer").click()
    host.stored(4, "thumb", "correction", "flag")
    host.page.reload()
    pressed(bad(element))
    pressed(element.get_by_role("button", name="Flag this answer"))
    pencil = element.get_by_role("button", name="Show the right answer")
    pressed(pencil)
    expect(pencil).to_have_attribute("title", "Corrected")
    pencil.click()
    pressed(element.get_by_role("button", name="Too long"))
    expect(element.get_by_role("textbox", name="Anything to add?")).to_have_value(
        "Shops no longer take parcels."
    )
    expect(element.get_by_role("textbox", name="The right answer")).to_have_value("Order a courier.")
    expect(element.get_by_text("This is the answer you sent")).to_be_visible()
    # Another person's browser shows nothing of it.
    other = host.show(token=host.token("bo"))
    host.page.wait_for_load_state("networkidle")
    pressed(bad(other), False)


def test_a_service_that_is_slow_to_tell_holds_no_vote_up(host: Host) -> None:
    held: list[Route] = []
    host.page.route("**/v1/feedback?**", lambda route: held.append(route))
    element = host.show()
    good(element).click()
    pressed(good(element))
    host.stored(1, "thumb")
    for route in held:
        route.continue_()


def test_what_was_said_before_the_past_was_known_still_stands(host: Host) -> None:
    element = host.show()
    good(element).click()
    bad(element).click()
    host.stored(2, "thumb")
    held: list[Route] = []
    host.page.route("**/v1/feedback?**", lambda route: held.append(route))
    host.page.reload()
    good(element).click()
    host.stored(3, "thumb")
    for route in held:
        route.continue_()
    rows = host.stored(4, "thumb")
    assert [(row["op"], row["revision"], row["score"]) for row in rows[2:]] == [
        ("create", 1, 1.0),
        ("revise", 3, 1.0),
    ]
    assert len({row["feedback_id"] for row in rows}) == 1
    pressed(good(element))


def test_one_author_has_one_vote_in_two_tabs(host: Host) -> None:
    element = host.show()
    second = host.context.new_page()
    first, host.page = host.page, second
    other = host.show()
    host.page.wait_for_load_state("networkidle")
    good(element).click()
    pressed(good(element))
    good(other).click()
    rows = host.stored(2, "thumb")
    assert len({row["feedback_id"] for row in rows}) == 1
    first.close()


# ---- reasons, notes, corrections ----


def test_reasons_and_a_note_revise_the_vote(host: Host) -> None:
    element = host.show('reasons="too_long, tone=Wrong tone, not_in_scope"')
    bad(element).click()
    chips = element.get_by_role("group", name="What was wrong?").get_by_role("button")
    expect(chips).to_have_text(["Too long", "Wrong tone", "not in scope"])
    chips.nth(0).click()
    chips.nth(1).click()
    chips.nth(0).click()
    note = element.get_by_role("textbox", name="Anything to add?")
    note.fill("x" * 998)
    note.press_sequentially("yyyy")
    expect(element.get_by_text("1000 / 1000")).to_be_visible()
    element.get_by_role("button", name="Send").click()
    expect(panel(element)).to_be_hidden()
    row = host.stored(2, "thumb")[1]
    assert (row["op"], row["reasons"], row["explanation"]) == ("revise", ["tone"], "x" * 998 + "yy")


def test_a_reason_can_be_required_and_escape_still_keeps_the_vote(host: Host) -> None:
    element = host.show("require-reason")
    bad(element).click()
    send = element.get_by_role("button", name="Send")
    expect(send).to_have_attribute("aria-disabled", "true")
    host.page.keyboard.press("Control+Enter")
    expect(element.get_by_text("Choose a reason or add a note")).to_be_visible()
    element.get_by_role("button", name="Other").click()
    send.click()
    expect(panel(element)).to_be_hidden()
    assert host.stored(2, "thumb")[1]["reasons"] == ["other"]


def test_a_correction_shows_its_changes_and_an_untouched_one_is_not_sent(host: Host) -> None:
    element = host.show()
    correct = element.get_by_role("button", name="Show the right answer")
    answer = element.get_by_role("textbox", name="The right answer")
    correct.click()
    expect(answer).to_have_value(OUTPUT)
    expect(answer).to_be_focused()
    expect(answer).to_have_accessible_description("Nothing changed yet, so no answer is sent")
    answer.fill(f"  {OUTPUT}\n")
    element.get_by_role("button", name="Send").click()
    expect(panel(element)).to_be_hidden()

    correct.click()
    answer.fill("Print the label in your account and give the parcel to a courier.")
    changes = element.get_by_role("region", name="Your changes")
    expect(changes.locator("ins").first).to_have_text("give")
    expect(changes.locator("del")).to_have_text(["drop", "at any shop."])
    expect(changes.locator("ins")).to_have_text(["give", "to a courier."])
    host.picture("correction")
    answer.press("Control+Enter")
    expect(panel(element)).to_be_hidden()
    (row,) = host.stored(1, "correction")
    assert row["correction"] == "Print the label in your account and give the parcel to a courier."
    assert (row["op"], row["score"]) == ("create", None)
    pressed(correct)

    # The same once more says nothing new; going back to the original takes the correction back.
    for text, ops in ((row["correction"], ["create"]), (OUTPUT, ["create", "retract"])):
        correct.click()
        answer.fill(text)
        element.get_by_role("button", name="Send").click()
        expect(panel(element)).to_be_hidden()
        assert [row["op"] for row in host.stored(len(ops), "correction")] == ops
    pressed(correct, False)
    expect(correct).to_have_attribute("title", "Show the right answer")


def test_the_shown_changes_lead_from_one_text_to_the_other(host: Host) -> None:
    generator = random.Random(7)
    words = ["parcel", "label", "shop,", "the", "返品", "方法", "a", "a", "\n", "é", "👍🏽"]
    before, *others = (" ".join(generator.choices(words, k=generator.randrange(4, 25))) for _ in range(15))
    element = host.show()
    element.evaluate("(element, text) => { element.output = text; }", before)
    element.get_by_role("button", name="Show the right answer").click()
    changes = element.get_by_role("region", name="Your changes")
    for after in others:
        element.get_by_role("textbox", name="The right answer").fill(after)
        sides = """(box, left) => new Promise((resolve) => requestAnimationFrame(() => {
          const kept = [...box.childNodes].filter((node) => node.nodeName !== left);
          resolve(kept.map((node) => node.textContent).join("").replace(/\\s/g, ""));
        }))"""
        assert changes.evaluate(sides, "INS") == "".join(before.split())
        assert changes.evaluate(sides, "DEL") == "".join(after.split())


def test_large_texts_are_compared_too(host: Host) -> None:
    words = [f"w{number}" for number in range(30_000)]
    element = host.show(output=" ".join(words))
    element.get_by_role("button", name="Show the right answer").click()
    answer = element.get_by_role("textbox", name="The right answer")
    changes = element.get_by_role("region", name="Your changes")
    answer.fill(" ".join([*words[:15_000], "NEW", *words[15_001:]]))
    expect(changes.locator("ins")).to_have_text("NEW")
    expect(changes.locator("del")).to_have_text("w15000")
    assert len(changes.inner_text()) < 1000
    answer.fill(" ".join(reversed(words)))
    expect(changes.locator("del")).to_have_count(1)


# ---- delivery ----


def test_what_is_said_offline_is_sent_once_when_the_line_is_back(host: Host) -> None:
    element = host.show()
    host.stored(1, "implicit")
    host.context.set_offline(True)
    good(element).click()
    pressed(good(element))
    expect(element.get_by_text("Not sent yet")).to_be_visible()
    host.picture("offline")
    bad(element).click()
    element.get_by_role("button", name="Unsafe").click()
    element.get_by_role("button", name="Send").click()
    assert [event["op"] for event in host.unsent()] == ["create", "revise", "revise"]
    host.context.set_offline(False)
    expect(element.get_by_text("Not sent yet")).to_be_hidden()
    rows = host.stored(3, "thumb")
    assert [(row["score"], row["reasons"]) for row in rows] == [(1.0, None), (0.0, None), (0.0, ["unsafe"])]
    host.until(lambda: host.unsent() == [])
    pressed(bad(element))


def test_the_spool_outlives_the_page(host: Host) -> None:
    away = "**/v1/feedback**"
    host.page.route(away, lambda route: route.abort())
    element = host.show()
    good(element).click()
    expect(element.get_by_text("Not sent yet")).to_be_visible()
    (vote,) = [event for event in host.unsent() if event["kind"] == "thumb"]
    host.page.reload()
    # The service is still away, and the vote is shown from the spool.
    pressed(good(element))
    host.page.unroute(away)
    host.page.reload()
    (row,) = host.stored(1, "thumb")
    assert str(row["event_id"]) == vote["event_id"]


def test_a_service_that_is_gone_holds_no_other_one_up(host: Host) -> None:
    element = host.show('endpoint="/gone"', more=f'<datamoat-feedback id="b" token="{host.token("bo")}">')
    good(element).click()
    expect(element.get_by_text("Not sent yet")).to_be_visible()
    other = host.page.locator("#b")
    good(other).click()
    (row,) = host.stored(1, "thumb")
    host.until(lambda: [event["kind"] for event in host.unsent()].count("thumb") == 1)
    assert str(row["event_id"]) not in [event["event_id"] for event in host.unsent()]
    pressed(good(element))


def test_a_lost_answer_makes_no_second_event(host: Host) -> None:
    lost: list[int] = []

    def lose_first(route: Route) -> None:
        answer = route.fetch()
        lost.append(answer.status)
        if len(lost) == 1:
            route.abort()
        else:
            route.fulfill(response=answer)

    host.page.route("**/v1/feedback", lose_first)
    element = host.show()
    good(element).click()
    pressed(good(element))
    host.stored(1, "thumb")
    host.until(lambda: host.unsent() == [])
    assert len(lost) >= 2
    assert len(host.rows("thumb")) == len(host.rows("implicit")) == 1


def test_a_vote_leaves_with_the_page(host: Host) -> None:
    element = host.show()
    host.stored(1, "implicit")
    good(element).click()
    host.page.goto(f"{host.service.base_url}/widget/demo")
    host.stored(1, "thumb")


def test_a_new_token_lets_the_queue_go_on(host: Host) -> None:
    fresh = host.token()
    element = host.show(token=expired(host))
    asked = host.heard("datamoat-token-expired")
    bad(element).click()
    note = element.get_by_role("textbox", name="Anything to add?")
    note.fill("Half a though")
    host.until(asked)
    assert asked()[0]["code"] == "token_expired"
    expect(element.get_by_text("Not sent yet")).to_be_visible()
    assert host.rows() == []
    element.evaluate("(element, token) => { element.token = token; }", fresh)
    expect(element.get_by_text("Not sent yet")).to_be_hidden()
    host.stored(1, "thumb")
    pressed(bad(element))
    expect(note).to_have_value("Half a though")


def expired(host: Host) -> str:
    """A token of yesterday, as the service would have minted it."""
    secret, created = ensure_secret(host.service.pseudonym_key_file)
    assert not created
    with psycopg.connect(host.service.database_url) as conn:
        row = conn.execute("SELECT key_id::text FROM feedback.api_key WHERE revoked_at IS NULL").fetchone()
    assert row is not None
    wanted = tokens.TokenRequest(interaction_id=host.interaction, user_id="ana", expires_in=60)
    return tokens.mint(secret, Caller(row[0], "support", ("ingest",)), wanted, time.time() - 86_400).token


def test_what_the_service_refuses_is_dropped_and_shown(host: Host) -> None:
    element = host.show('reasons="a@b=Write to us"')
    errors = host.heard("datamoat-error")
    bad(element).click()
    element.get_by_role("button", name="Write to us").click()
    element.get_by_role("button", name="Send").click()
    expect(element.get_by_text("This could not be saved")).to_be_visible()
    assert errors()[0]["field"].startswith("reasons")
    assert errors()[0]["event"]["reasons"] == ["a@b"]
    host.until(lambda: host.unsent() == [])
    # What is shown is again what the service holds: the bare vote.
    pressed(bad(element))
    assert len(host.rows("thumb")) == 1
    good(element).click()
    assert [row["score"] for row in host.stored(2, "thumb")] == [0.0, 1.0]


# ---- what readers do ----


def test_implicit_signals_are_recorded(host: Host) -> None:
    element = host.show(
        more='<button data-datamoat-copy="answer-1">Copy</button>'
        '<button data-datamoat-regenerate="answer-1">Again</button><p id="elsewhere">Elsewhere</p>'
    )
    (row,) = host.stored(1, "implicit")
    assert (row["label"], row["name"], row["identifier"]) == ("shown", "implicit", None)
    select = "(id) => getSelection().selectAllChildren(document.getElementById(id))"
    host.page.evaluate(select, "elsewhere")
    host.page.keyboard.press("Control+C")
    host.page.evaluate(select, "answer-1")
    host.page.keyboard.press("Control+C")
    host.page.get_by_role("button", name="Copy").click()
    host.page.get_by_role("button", name="Again").click()
    element.evaluate("(element) => element.edited(element.output.replace('drop the parcel', 'take it'))")
    rows = host.stored(5, "implicit")
    assert sorted(row["label"] for row in rows) == ["copied", "copied", "edited", "regenerated", "shown"]
    (edited,) = [row["value"] for row in rows if row["label"] == "edited"]
    assert edited == {"retained": round((len(OUTPUT) - len("drop the parcel ")) / len(OUTPUT), 3)}
    host.page.reload()
    host.until(lambda: [row["label"] for row in host.rows("implicit")].count("shown") == 2)


def test_a_token_decides_what_is_offered(host: Host) -> None:
    element = host.show(token=host.token(kinds=["thumb"]))
    expect(good(element)).to_be_visible()
    expect(element.get_by_role("button")).to_have_count(2)
    good(element).click()
    host.stored(1, "thumb")
    assert host.rows("implicit") == []


def test_two_elements_on_one_page_are_two_judgements(host: Host) -> None:
    token = host.token()
    element = host.show(
        token=token,
        more=f'<datamoat-feedback id="source" name="source" identifier="c-1" token="{token}"></datamoat-feedback>',
    )
    source = host.page.locator("#source")
    expect(source.get_by_role("button", name="Show the right answer")).to_have_count(0)
    good(element).click()
    bad(source).click()
    pressed(good(element))
    pressed(good(source), False)
    rows = host.stored(2, "thumb")
    assert [(row["name"], row["identifier"], row["score"]) for row in rows] == [
        ("thumb", None, 1.0),
        ("source", "c-1", 0.0),
    ]
    assert len({row["feedback_id"] for row in rows}) == 2
    host.page.reload()
    pressed(good(element))
    pressed(bad(source))
    host.until(lambda: len(host.rows("implicit")) == 2)


def test_a_token_of_another_interaction_is_not_used(host: Host) -> None:
    element = host.show('interaction="another"', token="")
    errors = host.heard("datamoat-error")
    element.evaluate("(element, token) => { element.token = token; }", host.token())
    assert [error["code"] for error in errors()] == ["foreign_token"]
    expect(element.get_by_role("button")).to_have_count(0)
    element.evaluate("(element, id) => element.setAttribute('interaction', id)", host.interaction)
    good(element).click()
    host.stored(1, "thumb")


# ---- for everybody ----


def test_the_keyboard_alone_is_enough(host: Host) -> None:
    element = host.show()
    expect(good(element)).to_be_visible()
    keys = host.page.keyboard
    keys.press("Tab")
    expect(good(element)).to_be_focused()
    keys.press("Tab")
    expect(bad(element)).to_be_focused()
    keys.press("Space")
    first = element.get_by_role("button", name="Not factual")
    expect(first).to_be_focused()
    keys.press("Enter")
    pressed(first)
    # Tab stays within the panel, both ways.
    keys.press("Shift+Tab")
    expect(element.get_by_role("button", name="Send")).to_be_focused()
    keys.press("Tab")
    expect(first).to_be_focused()
    keys.press("Escape")
    expect(bad(element)).to_be_focused()
    # The panel opens again as it was left.
    keys.press("Tab")
    keys.press("Enter")
    expect(element.get_by_role("textbox", name="The right answer")).to_be_focused()
    pressed(first)
    keys.press("Control+Enter")
    expect(panel(element)).to_be_hidden()
    assert host.stored(2, "thumb")[1]["reasons"] == ["not_factual"]


def test_assistive_technology_is_told_what_is_what(host: Host) -> None:
    element = host.show()
    bad(element).click()
    expect(panel(element)).to_be_visible()
    expect(element).to_match_aria_snapshot("""
        - group "Rate this answer":
          - button "Good answer"
          - button "Bad answer" [pressed]
          - button "Show the right answer"
          - button "Flag this answer"
          - status: Thank you
        - dialog "What was wrong?":
          - heading "What was wrong?" [level=2]
          - group "What was wrong?":
            - button "Not factual"
            - button "Didn’t follow instructions"
            - button "Too long"
            - button "Unsafe"
            - button "Outdated source"
            - button "Other"
          - text: Anything to add?
          - textbox "Anything to add?"
          - button "Show the right answer"
          - button "Not now"
          - button "Send"
    """)


def test_wordings_follow_the_page_and_the_product(host: Host) -> None:
    element = host.show('lang="de-AT"')
    expect(element.get_by_role("button", name="Gute Antwort")).to_be_visible()
    element.evaluate("(element) => { element.messages = { up: 'Super!' }; }")
    expect(element.get_by_role("button", name="Super!")).to_be_visible()
    expect(element.get_by_role("button", name="Schlechte Antwort")).to_be_visible()
    element = host.show('lang="xx"')
    expect(good(element)).to_be_visible()


def test_texts_stay_texts(host: Host) -> None:
    attack = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    messages = html.escape(json.dumps({"up": attack, "why": attack, "thanks": attack}))
    element = host.show(f'messages="{messages}" reasons="x={html.escape(attack)}"', output=attack)
    element.locator(".down").click()
    expect(panel(element)).to_be_visible()
    expect(element.get_by_role("heading", name="<img")).to_be_visible()
    note = element.get_by_role("textbox", name="Anything to add?")
    note.fill(attack)
    panel(element).get_by_role("button", name="Show the right answer").click()
    answer = element.get_by_role("textbox", name="The right answer")
    expect(answer).to_have_value(attack)
    answer.fill(f"{attack} {attack}")
    expect(element.get_by_role("region", name="Your changes").locator("ins")).to_be_visible()
    element.get_by_role("button", name="Send").click()
    host.stored(1, "correction")
    host.page.reload()
    pressed(element.locator(".down"))
    element.locator(".correct").click()
    expect(note).to_have_value(attack)
    assert host.page.locator("datamoat-feedback img, datamoat-feedback script").count() == 0
    assert host.page.title() == "A product"


def test_it_follows_the_colours_of_the_page(host: Host) -> None:
    ground = "(element) => getComputedStyle(element).backgroundColor"
    element = host.show()
    bad(element).click()
    assert panel(element).evaluate(ground) == "rgb(255, 255, 255)"
    host.page.emulate_media(color_scheme="dark")
    assert panel(element).evaluate(ground) == "rgb(28, 29, 33)"
    panel(element).get_by_role("button", name="Show the right answer").click()
    element.get_by_role("textbox", name="The right answer").fill(OUTPUT.replace("any shop", "our shop"))
    host.picture("dark")
    element.evaluate("(element) => element.style.setProperty('--datamoat-surface', 'rgb(1, 2, 3)')")
    assert panel(element).evaluate(ground) == "rgb(1, 2, 3)"


def test_the_demo_page_shows_how_to_embed_and_works_with_a_token(host: Host) -> None:
    host.page.goto(f"{host.service.base_url}/widget/demo")
    expect(host.page.get_by_text(f"{host.service.base_url}/v1/tokens")).to_be_visible()
    expect(host.page.get_by_role("button", name="Good answer")).to_have_count(0)
    host.page.goto("about:blank")
    host.page.goto(f"{host.service.base_url}/widget/demo#token={host.token()}")
    good(host.page.locator("body")).click()
    host.stored(1, "thumb")
    host.picture("demo")
