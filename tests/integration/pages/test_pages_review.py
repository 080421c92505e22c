"""Reviewing by keyboard: answers, drafts, leases, the connection; nothing is lost, nothing runs that others wrote."""

import json
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from playwright.sync_api import Page, Route, expect

from feedback.review.rubric import Question
from tests.integration.pages.conftest import Site, Tabs, working

OIL = ("Which oil does the gearbox need?", "Use mineral oil.")
HEAT = ("Can it run at 45 °C?", "Yes, up to **50 °C**.")
JSON = ("The record as JSON?", '{"valid": true, "sensor": 7}')
Picture = Callable[[Page, str], None]


def begin(tabs: Tabs, queue: UUID, holder: str = "Ada", output: str | None = None, **settings: Any) -> Page:
    """A tab with the first item of the queue in hand."""
    page = tabs.sign_in(holder, **settings)
    page.goto(f"/review/{queue}")
    working(page, output)
    return page


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def states(page: Page) -> list[str | None]:
    """The dots of the rail."""
    return [one.get_attribute("data-state") for one in page.locator("#items button").all()]


def cut(page: Page) -> None:
    """From now on no request arrives."""
    page.context.set_offline(True)


def test_an_item_is_judged_by_keyboard_alone(site: Site, tabs: Tabs, picture: Picture) -> None:
    page = begin(tabs, site.queue(OIL, HEAT), output=OIL[1])
    expect(page.locator("#count")).to_have_text("0 / 2")
    expect(page.locator("#item .badge").first).to_contain_text("Flag")
    press(page, "3")
    expect(page.get_by_label("wrong")).to_be_checked()
    # The first answer leads on to the next question, a change of mind stays.
    expect(page.locator(".question[data-active]")).to_have_attribute("data-name", "quality")
    press(page, "ArrowUp", "2")
    expect(page.get_by_label("partly right")).to_be_checked()
    expect(page.locator(".question[data-active]")).to_have_attribute("data-name", "verdict")
    press(page, "ArrowDown", "Enter", "0", ".", "2", "5", "Escape", "e")
    expect(page.locator("#correction-text")).to_be_focused()
    expect(page.locator("#correction-text")).to_have_value(OIL[1])
    page.keyboard.press("Control+a")
    page.keyboard.type("Use synthetic oil. 1?")
    press(page, "Escape", "n")
    page.keyboard.type("Seen in the manual")
    expect(page.locator("#difference-body del")).to_have_text("mineral")
    expect(page.locator("#preview details")).to_have_count(4)
    picture(page, "review")
    press(page, "Escape", "d")
    expect(page.locator("#difference-body")).to_have_class("beside")
    picture(page, "review-beside")
    press(page, "d")
    expect(page.locator("#difference")).to_be_hidden()
    press(page, "n", "Control+Enter")
    working(page, "Yes, up to 50 °C.")
    expect(page.locator("#count")).to_have_text("1 / 2")
    assert states(page) == ["done", "current"]
    assert {(name, value) for _, name, value in site.said()} == {
        ("verdict", "partly right"),
        ("quality", "0.25"),
        ("right_answer", "Use synthetic oil. 1?"),
        ("note", "Seen in the manual"),
    }
    press(page, "1", "Control+Enter")
    expect(page.locator("#notice")).to_contain_text("Nothing waits for you")
    assert len(site.said()) == 5


def test_items_are_looked_back_at(site: Site, tabs: Tabs) -> None:
    page = begin(tabs, site.queue(OIL, HEAT), output=OIL[1])
    press(page, "3", "Control+Enter")
    working(page, "Yes, up to 50 °C.")
    press(page, "1", "ArrowLeft")
    expect(page.locator("#past .given")).to_contain_text("wrong")
    expect(page.locator("#past")).to_contain_text("You")
    # What one looks back at cannot be answered again.
    press(page, "2", "Control+Enter")
    press(page, "j")
    expect(page.locator("#past")).to_be_hidden()
    expect(page.get_by_role("radio", name="right", exact=True)).to_be_checked()
    press(page, "k")
    expect(page.locator("#past")).to_be_visible()
    press(page, "Escape")
    expect(page.locator("#past")).to_be_hidden()
    assert len(site.said()) == 1


def test_another_tab_shows_what_was_answered_before(site: Site, tabs: Tabs) -> None:
    queue = site.queue(OIL, HEAT, JSON)
    page = begin(tabs, queue, output=OIL[1])
    press(page, "3", "Control+Enter")
    working(page, "Yes, up to 50 °C.")
    press(page, "1", "Control+Enter")
    expect(page.locator("#items button")).to_have_count(3)
    page = begin(tabs, queue)
    assert states(page) == ["done", "done", "current"]
    expect(page.locator("#items .title")).to_have_text([OIL[0], HEAT[0], JSON[0]])
    press(page, "ArrowLeft", "ArrowLeft")
    expect(page.locator("#past .given")).to_contain_text("right")
    # Somebody else has answered nothing yet.
    assert states(begin(tabs, site.queue(OIL), "Jon")) == ["current"]


def test_signals_that_say_the_same_are_one_line(site: Site, tabs: Tabs) -> None:
    queue = site.queue(OIL)
    signal = {"kind": "implicit", "interaction_id": f"{site.app}-0"}
    site.send("/v1/feedback", *[signal | {"label": label} for label in ("shown", "copied", "shown", "shown")])
    page = begin(tabs, queue)
    said = page.locator(".opinions li > .badge:first-child").all_inner_texts()
    assert sorted(said) == ["flag wrong", "implicit copied", "implicit shown ×3"]
    expect(page.locator("#preview")).to_have_text("Nothing yet")


def test_keys_are_off_while_typing_and_while_a_dialog_is_open(
    site: Site, tabs: Tabs, picture: Picture
) -> None:
    page = begin(tabs, site.queue(OIL))
    press(page, "n")
    page.keyboard.type("1 e d f ? j k")
    expect(page.locator("[data-name=note] textarea")).to_have_value("1 e d f ? j k")
    expect(page.get_by_role("dialog")).to_have_count(0)
    press(page, "Escape", "?")
    expect(page.get_by_role("dialog")).to_contain_text("submit, next item")
    picture(page, "review-keys")
    press(page, "1", "e", "Control+Enter", "Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.get_by_role("radio", name="right", exact=True)).not_to_be_checked()
    expect(page.locator("#correction")).to_be_hidden()
    assert site.said() == []


@pytest.mark.parametrize("text", ["Use mineral oil.", " Use  mineral oil.\n"])
def test_an_untouched_prefill_is_no_correction(site: Site, tabs: Tabs, text: str) -> None:
    page = begin(tabs, site.queue(OIL))
    press(page, "3", "e")
    page.locator("#correction-text").fill(text)
    press(page, "Control+Enter")
    expect(page.locator("#refused-right_answer")).to_contain_text("unchanged")
    working(page)
    assert site.said() == []
    page.get_by_role("button", name="Discard").click()
    expect(page.locator("#refused-right_answer")).to_be_hidden()
    press(page, "Control+Enter")
    expect(page.locator("#notice")).to_contain_text("Nothing waits")
    assert [name for _, name, _ in site.said()] == ["verdict"]


def test_what_cannot_be_sent_is_said_at_its_question(site: Site, tabs: Tabs) -> None:
    page = begin(tabs, site.queue(OIL))
    press(page, "Control+Enter")
    expect(page.locator("#refused-verdict")).to_have_text("This question needs an answer.")
    press(page, "1")
    expect(page.locator("#refused-verdict")).to_be_hidden()
    page.get_by_label("How well is it put?").fill("7")
    press(page, "Control+Enter")
    expect(page.locator("#refused-quality")).to_have_text("Give a number from 0 to 1.")
    page.get_by_label("How well is it put?").fill("0.1")
    page.get_by_label("Yes").check()
    press(page, "Control+Enter")
    # Only the service knows this rule: an answer that was voted down is no golden one.
    expect(page.locator("#refused-golden")).to_contain_text("voted down")
    assert site.said() == []


def test_a_double_submit_counts_once(site: Site, tabs: Tabs) -> None:
    page = begin(tabs, site.queue(OIL, HEAT))
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url.rsplit("/", 1)[1]))
    press(page, "1")
    page.evaluate(
        """() => { for (let i = 0; i < 5; i += 1) {
            document.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", ctrlKey: true, bubbles: true }));
            document.querySelector("[data-act=submit]").click();
        } }"""
    )
    working(page, "Yes, up to 50 °C.")
    assert sent.count("submit") == 1
    assert len(site.said()) == 1


def test_a_preview_that_comes_late_is_not_taken_for_the_next_item(site: Site, tabs: Tabs) -> None:
    page = begin(tabs, site.queue(OIL, HEAT))
    expect(page.locator("#preview p")).to_have_count(1)
    held: list[Route] = []
    page.route("**/preview", lambda route: held.append(route), times=1)
    with page.expect_request("**/preview"):
        press(page, "3")
    press(page, "Control+Enter")
    working(page, "Yes, up to 50 °C.")
    # By now the lease it asks about has ended.
    held[0].continue_()
    with page.expect_response("**/preview"):
        press(page, "1")
    expect(page.locator("#preview p")).to_have_count(1)
    working(page, "Yes, up to 50 °C.")


def test_a_draft_survives_a_reload(site: Site, tabs: Tabs) -> None:
    page = begin(tabs, site.queue(OIL))
    press(page, "2", "e")
    page.locator("#correction-text").fill("Use synthetic oil.")
    page.get_by_label("Yes").check()
    press(page, "n")
    page.keyboard.type("half a thou")
    press(page, "Control+s")
    expect(page.locator("#toast")).to_have_text("Draft kept in this browser")
    page.reload()
    working(page)
    expect(page.locator("#toast")).to_have_text("Your draft is back")
    expect(page.get_by_label("partly right")).to_be_checked()
    expect(page.locator("#correction-text")).to_have_value("Use synthetic oil.")
    expect(page.get_by_label("Yes")).to_be_checked()
    expect(page.locator("[data-name=note] textarea")).to_have_value("half a thou")
    press(page, "Control+Enter")
    expect(page.locator("#notice")).to_contain_text("Nothing waits")
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.includes('draft'))") == []


def test_a_lost_lease_keeps_the_draft_and_can_be_taken_up_again(
    site: Site, tabs: Tabs, picture: Picture
) -> None:
    page = begin(tabs, site.queue(OIL))
    press(page, "3", "n")
    page.keyboard.type("worth keeping")
    site.end_leases()
    press(page, "Control+Enter")
    expect(page.locator("#notice")).to_contain_text("Your draft is kept")
    expect(page.get_by_role("button", name="Submit")).to_be_disabled()
    picture(page, "review-lost")
    assert (states(page), site.said()) == (["lost"], [])
    page.get_by_role("button", name="Take it up again").click()
    working(page)
    expect(page.locator("#toast")).to_have_text("You have it again")
    expect(page.locator("[data-name=note] textarea")).to_have_value("worth keeping")
    press(page, "Control+Enter")
    expect(page.locator("#notice")).to_contain_text("Nothing waits")
    assert len(site.said()) == 2


def test_what_somebody_else_took_over_stays_readable(site: Site, tabs: Tabs) -> None:
    queue = site.queue(OIL, HEAT)
    page = begin(tabs, queue, output=OIL[1])
    press(page, "3", "n")
    page.keyboard.type("worth keeping")
    site.end_leases()
    begin(tabs, queue, "Jon", output=OIL[1])
    press(page, "Control+Enter")
    page.get_by_role("button", name="Take it up again").click()
    working(page, "Yes, up to 50 °C.")
    expect(page.locator("#notice")).to_contain_text("Somebody else has")
    press(page, "k")
    expect(page.locator("#past")).to_contain_text("worth keeping")
    assert site.said() == []


def test_a_lease_lasts_as_long_as_somebody_works(site: Site, tabs: Tabs) -> None:
    page = begin(tabs, site.queue(OIL, lease_seconds=60))
    expect(page.locator("#lease")).to_contain_text("left")
    page.clock.install()
    page.reload()
    working(page)
    with page.expect_response("**/extend") as extended:
        press(page, "2")
        page.clock.run_for(25_000)
    assert extended.value.status == 200
    expect(page.locator("#lease")).to_contain_text("0:5")
    # Nobody there: the lease runs out, and one more try finds out whether it can be kept.
    site.end_leases()
    page.clock.run_for(61_000)
    expect(page.locator("#notice")).to_contain_text("Your time for this item has ended")


@pytest.mark.parametrize(
    ("mode", "label", "after"),
    [
        ("later", "Back to me later", "Use mineral oil."),
        ("others", "To others", None),
        ("cannot_judge", "It cannot be judged", None),
    ],
)
def test_skipping_says_why(
    site: Site, tabs: Tabs, picture: Picture, mode: str, label: str, after: str | None
) -> None:
    page = begin(tabs, site.queue(OIL))
    press(page, "ArrowRight")
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_label("Why?")).to_be_focused()
    dialog.get_by_label(label).check()
    dialog.get_by_role("button", name="Skip").click()
    expect(dialog).to_be_visible()
    dialog.get_by_label("Why?").fill("Not my subject")
    picture(page, "review-skip")
    press(page, "Control+Enter")
    expect(dialog).to_have_count(0)
    if after is None:
        expect(page.locator("#notice")).to_contain_text("Nothing waits")
    else:
        working(page, after)
    assert site.rows(
        "select mode, reason, reviewer from feedback.review_event natural join feedback.review_item"
        " join feedback.review_queue using (queue_id) where act = 'skipped' and app = %s",
        site.app,
    ) == [(mode, "Not my subject", "Ada")]


def test_a_flag_is_an_event(site: Site, tabs: Tabs) -> None:
    page = begin(tabs, site.queue(OIL))
    press(page, "f")
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Unsafe").check()
    dialog.get_by_label("Note").fill("Burns the seal")
    press(page, "Enter")
    expect(page.locator("#toast")).to_have_text("Flagged")
    assert [(name, value) for _, name, value in site.said()] == [("flag", "unsafe")]


def test_a_flag_whose_reply_got_lost_counts_once(site: Site, tabs: Tabs) -> None:
    page = begin(tabs, site.queue(OIL))

    def deliver_and_drop(route: Route) -> None:
        route.fetch()
        route.abort()

    page.route("**/flag", deliver_and_drop, times=1)
    press(page, "f", "Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("alert")).to_contain_text("cannot be reached")
    page.get_by_label("Unsafe").check()
    press(page, "Enter")
    expect(dialog.get_by_role("alert")).to_contain_text("taken with other words")
    page.get_by_label("Personal data").check()
    press(page, "Enter")
    expect(page.locator("#toast")).to_have_text("Flagged")
    assert [value for *_, value in site.said()] == ["personal data"]
    press(page, "f", "Enter")
    expect(dialog).to_have_count(0)
    assert [value for *_, value in site.said()] == ["personal data"] * 2


def test_an_item_that_vanished_makes_room_for_the_next(site: Site, tabs: Tabs) -> None:
    page = tabs.sign_in("Ada")
    lost = {"error": {"code": "lost_lease", "message": "The lease has expired or was given up"}}
    page.route("**/claim", lambda route: route.fulfill(status=409, json=lost), times=1)
    page.goto(f"/review/{site.queue(OIL)}")
    working(page, OIL[1])


def test_answers_wait_for_the_connection(site: Site, tabs: Tabs, picture: Picture) -> None:
    page = begin(tabs, site.queue(OIL, HEAT), output=OIL[1])
    press(page, "3")
    cut(page)
    press(page, "n")
    page.keyboard.type("typed in a tunnel")
    press(page, "Control+Enter")
    expect(page.locator("#outbox")).to_contain_text("1 answer waits")
    expect(page.locator("#notice")).to_contain_text("cannot be reached")
    picture(page, "review-offline")
    assert (states(page), site.said()) == (["waiting"], [])
    page.context.set_offline(False)
    working(page, "Yes, up to 50 °C.")
    expect(page.locator("#outbox")).to_be_hidden()
    assert states(page) == ["done", "current"]
    assert {value for *_, value in site.said()} == {"wrong", "typed in a tunnel"}


def test_an_answer_that_comes_too_late_is_kept_as_a_draft(site: Site, tabs: Tabs) -> None:
    page = begin(tabs, site.queue(OIL))
    press(page, "3")
    cut(page)
    press(page, "Control+Enter")
    expect(page.locator("#outbox")).to_be_visible()
    site.end_leases()
    page.context.set_offline(False)
    # The item is free again, so it comes back with what was said about it.
    working(page)
    expect(page.get_by_label("wrong")).to_be_checked()
    expect(page.locator("#notice")).to_contain_text("was not taken")
    assert site.said() == []


def test_an_answer_whose_reply_got_lost_counts_once(site: Site, tabs: Tabs) -> None:
    page = begin(tabs, site.queue(OIL, HEAT))

    def deliver_and_drop(route: Route) -> None:
        route.fetch()
        route.abort()

    page.route("**/submit", deliver_and_drop, times=1)
    press(page, "3", "Control+Enter")
    working(page, "Yes, up to 50 °C.")
    page.evaluate("dispatchEvent(new Event('online'))")
    expect(page.locator("#outbox")).to_be_hidden()
    assert len(site.said()) == 1


def test_signed_out_in_the_middle_loses_nothing(site: Site, tabs: Tabs) -> None:
    page = begin(tabs, site.queue(OIL))
    press(page, "3", "n")
    page.keyboard.type("worth keeping")
    page.context.clear_cookies()
    press(page, "Control+Enter")
    expect(page.locator("#notice")).to_contain_text("You are signed out")
    page.goto(f"/login?next={page.evaluate('location.pathname')}#{site.key('Ada')}")
    expect(page.get_by_role("button", name="Sign in")).to_be_focused()
    press(page, "Enter")
    working(page)
    expect(page.locator("[data-name=note] textarea")).to_have_value("worth keeping")


HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">",
    "<svg onload=\"document.title='owned'\"> [x](javascript:document.title='owned')"
    " [y](https://a.example\"onmouseover=\"document.title='owned') `</code><script>document.title='owned'</script>`"
    " https://a.example/'><img/src=x>\n\n```\n</pre><script>document.title='owned'</script>\n```\n"
    "| <b>a</b> | b |\n|---|---|\n| <i>x</i> | ![z](http://a.example/p.png) |",
)


def test_what_others_wrote_stays_text(site: Site, tabs: Tabs) -> None:
    rubric = (
        Question("verdict", "choice", "<b onclick=x>Right?</b>", ("<i>yes</i>", '"><script>no')),
        Question("right_answer", "correction", "Right answer"),
    )
    page = begin(tabs, site.queue(HOSTILE, name="<script>queue</script>", rubric=rubric))
    expect(page.locator("#item")).to_contain_text("<script>document.title='owned'</script>")
    press(page, "1", "e")
    page.locator("#correction-text").fill(HOSTILE[0])
    expect(page.locator("#difference-body ins").first).to_be_visible()
    expect(page.locator("#preview details").first).to_be_visible()
    page.locator("#preview summary").first.click()
    page.locator(".sources summary").click()
    press(page, "Control+Enter")
    expect(page.locator("#notice")).to_contain_text("Nothing waits")
    press(page, "Escape", "k")
    expect(page.locator("#past")).to_contain_text("<i>yes</i>")
    for address in (page.url, f"{page.url}/rules", f"{site.url}/review"):
        page.goto(address)
        assert "owned" not in page.title()
        assert page.locator("img, main script, main svg, main [onclick], main [onmouseover]").count() == 0
        assert page.locator("a[href^='javascript:']").count() == 0


def test_json_is_laid_out_and_compared_by_content(site: Site, tabs: Tabs) -> None:
    page = begin(tabs, site.queue(JSON))
    expect(page.locator("#output pre")).to_have_text(json.dumps(json.loads(JSON[1]), indent=2))
    press(page, "e")
    page.locator("#correction-text").fill('{"sensor":8,\n"valid":true}')
    expect(page.locator("#difference-body del")).to_have_text("7")
    expect(page.locator("#difference-body ins")).to_have_text("8")


def test_texts_too_long_to_compare_say_so(site: Site, tabs: Tabs) -> None:
    page = begin(tabs, site.queue(("Everything?", " ".join(f"word{n}" for n in range(7000)))))
    press(page, "e")
    page.locator("#correction-text").fill(" ".join(f"other{n}" for n in range(7000)))
    expect(page.locator("#difference-body")).to_contain_text("too long or too different")


def test_a_blind_queue_hides_what_others_said(site: Site, tabs: Tabs) -> None:
    page = begin(tabs, site.queue(OIL, blind=True))
    text = page.locator("#item").inner_text()
    for hidden in ("support-large", "Said before", "Flag", "wrong"):
        assert hidden not in text
    expect(page.locator("#item .badge")).to_have_count(0)


def test_reviewing_works_on_a_telephone_and_in_the_dark(site: Site, tabs: Tabs, picture: Picture) -> None:
    page = begin(tabs, site.queue(OIL, HEAT), viewport={"width": 390, "height": 800}, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    picture(page, "review-telephone")
    page.get_by_text("wrong", exact=True).click()
    page.get_by_role("button", name="Write it").click()
    page.locator("#correction-text").fill("Use synthetic oil.")
    page.get_by_role("button", name="Submit").click()
    working(page, "Yes, up to 50 °C.")
    page.set_viewport_size({"width": 1440, "height": 860})
    press(page, "e")
    page.keyboard.type("No: ")
    expect(page.locator("#difference")).to_be_visible()
    picture(page, "review-dark")


def test_another_app_s_queue_is_not_there(site: Site, tabs: Tabs, pages_service: Any) -> None:
    queue = site.queue(OIL)
    stranger = Tabs(tabs.browser, Site(pages_service, f"{site.app}-other"))
    page = stranger.sign_in("Eve", "review", "admin")
    for path in (f"/review/{queue}", f"/review/{queue}/rules", f"/review/{queue}/adjudicate"):
        assert page.goto(path).status == 404, path  # type: ignore[union-attr]
    calls: list[tuple[str, dict[str, Any]]] = [
        ("claim", {"queue_id": str(queue)}),
        ("fill", {"queue_id": str(queue)}),
        ("close", {"queue_id": str(queue)}),
        ("try-rule", {"queue_id": str(queue), "rule": {"kind": "flag", "params": {}}}),
        ("add-rule", {"queue_id": str(queue), "rule": {"kind": "flag", "params": {}}}),
    ]
    for name, body in calls:
        answer = page.request.post(
            f"/review/api/{name}", data=body, headers={"Sec-Fetch-Site": "same-origin"}
        )
        assert answer.status == 404, name
    stranger.close()
