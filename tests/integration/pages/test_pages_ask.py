"""Asking the corpus: passages, thumbs on each, a better answer; all of it recorded."""

from collections.abc import Callable

from playwright.sync_api import Page, expect

from tests.integration.conftest import FeedbackService
from tests.integration.pages.conftest import Site, Tabs

Picture = Callable[[Page, str], None]


def ask(tabs: Tabs, question: str) -> Page:
    page = tabs.sign_in("Ada")
    page.goto("/ask")
    page.get_by_label("Question").fill(question)
    page.keyboard.press("Enter")
    return page


def test_a_question_finds_passages_and_is_recorded(site: Site, tabs: Tabs, picture: Picture) -> None:
    page = ask(tabs, "  Is the seal covered?  ")
    expect(page.locator(".passage")).to_have_count(2)
    expect(page.locator("#passage-1 strong")).to_have_text("24 months")
    # What a document holds is shown, not run.
    expect(page.locator("#passage-2")).to_contain_text("<script>document.title='owned'</script>")
    assert "owned" not in page.title()
    picture(page, "ask")
    ((interaction, messages, output, retrieved, session, person, provider, model),) = site.rows(
        "select interaction_id, messages, output, retrieved, session_id, user_ref, provider, model"
        " from feedback.interaction where app = %s",
        site.app,
    )
    assert messages == [{"role": "user", "content": "Is the seal covered?"}]
    assert output == "The warranty covers the motor for **24 months**."
    assert [(one["chunk_id"], one["rank"], one["score"]) for one in retrieved] == [
        ("x200#12", 1, 0.912),
        ("terms#3", 2, 0.655),
    ]
    assert (provider, model) == ("datamoat", "retrieval")
    assert session.startswith("page-") and len(person) == 32

    page.locator(".passage").last.get_by_role("button", name="Bad answer").click()
    expect(page.locator(".passage").last.get_by_role("button", name="Bad answer")).to_have_attribute(
        "aria-pressed", "true"
    )
    reasons = page.locator(".passage").last.get_by_role("group", name="What was wrong?").get_by_role("button")
    expect(reasons).to_have_text(["Off topic", "Does not answer it", "Outdated", "Other"])
    page.get_by_label("Do you know a better answer?").fill("Seals are never covered.")
    page.get_by_role("button", name="Save the better answer").click()
    expect(page.locator("#saved")).to_have_text("Saved. Thank you.")
    page.get_by_label("Do you know a better answer?").fill("Seals are covered for 6 months.")
    page.get_by_role("button", name="Change it").click()
    expect(page.locator("#saved")).to_have_text("Saved. Thank you.")
    said = (
        "select kind, name, identifier, score, op, revision, correction, session_id = %s, author_ref = %s"
        " from feedback.feedback_event where interaction_id = %s and kind <> 'implicit' order by received_at"
    )
    thumb = ("thumb", "passage", "terms#3", 0.0, "create", 1, None, True, True)
    first = ("correction", "correction", None, None, "create", 1, "Seals are never covered.", True, True)
    second = (
        "correction",
        "correction",
        None,
        None,
        "revise",
        2,
        "Seals are covered for 6 months.",
        True,
        True,
    )
    for _ in range(50):
        found = site.rows(said, session, person, interaction)
        if len(found) == 3:
            break
        page.wait_for_timeout(100)
    assert set(found) == {thumb, first, second}


def test_what_cannot_be_found_is_said(site: Site, tabs: Tabs) -> None:
    page = ask(tabs, "nothing")
    expect(page.locator("#found")).to_contain_text("No passage was found")
    for question, text in (
        ("no index", "No index is live: run `moat run` first."),
        ("fault", "The search failed (RuntimeError). An operator finds the cause in the service's log."),
    ):
        page.get_by_label("Question").fill(question)
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text(text)
        expect(page.locator(".passage")).to_have_count(0)
    # A question that found nothing is worth knowing; one that could not be searched for is no interaction.
    assert site.rows("select output from feedback.interaction where app = %s", site.app) == [("",)]


def test_without_a_search_the_page_says_what_to_run(
    feedback_service: FeedbackService, tabs: Tabs, picture: Picture
) -> None:
    tabs.site = Site(feedback_service, "support")
    page = tabs.sign_in("Ada")
    page.goto("/ask")
    expect(page.locator(".notice")).to_contain_text("--search orchestration.search:passages")
    picture(page, "ask-unconfigured")
