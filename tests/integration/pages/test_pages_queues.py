"""Queues as admins and reviewers see them: making one, its rules, deciding what reviewers disagree on."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import psycopg
from playwright.sync_api import Page, expect

from feedback.review.rubric import Question
from tests.integration.pages.conftest import Site, Tabs, working
from tests.integration.pages.test_pages_review import HEAT, HOSTILE, OIL, begin, press

Picture = Callable[[Page, str], None]


def test_a_queue_is_made_filled_and_closed(site: Site, tabs: Tabs, picture: Picture) -> None:
    site.queue(OIL, HEAT, name="An older queue")
    page = tabs.sign_in("Chief", "review", "admin")
    page.goto("/review")
    page.get_by_role("link", name="New queue").click()
    page.get_by_label("Name").first.fill("Pumps")
    page.get_by_label("What reviewers should know").fill("Pumps only")
    page.get_by_label("Reviewers per item").fill("2")
    look_back = page.get_by_label("Look back (days)")
    assert [look_back.get_attribute(name) for name in ("value", "min", "max")] == ["30", "1", "3660"]
    look_back.fill("90")
    page.get_by_label("Blind").check()
    page.get_by_label("Options").first.fill("right, right")
    picture(page, "new-queue")
    page.get_by_role("button", name="Create queue").click()
    expect(page.locator("#refused")).to_contain_text("Holds an option twice")
    expect(page.get_by_label("Options").first).to_be_focused()
    page.get_by_label("Options").first.fill("right, wrong")
    page.get_by_role("button", name="Remove").last.click()
    page.get_by_role("button", name="Create queue").click()
    expect(page.get_by_role("heading", name="Pumps")).to_be_visible()
    expect(page.locator("#rules")).to_contain_text(
        "2 reviewers per item, blind · 10 minutes per item · 2 % control sample · looks back 90 days"
    )
    expect(page.locator("#rules")).to_contain_text("No rules: only the control sample")

    expect(page.locator("#sentence")).to_have_text("Would have queued 0 of 2 last week.")
    page.get_by_label("Looks for").select_option("flag")
    expect(page.locator("#sentence")).to_have_text("Would have queued 2 of 2 last week.")
    expect(page.locator("#threshold-field")).to_be_hidden()
    assert site.rows("select count(*) from feedback.review_rule join feedback.review_queue using (queue_id)"
                     " where name = 'Pumps' and app = %s", site.app) == [(0,)]  # fmt: skip
    page.get_by_role("button", name="Save rule").click()
    expect(page.get_by_role("button", name="Disable")).to_be_visible()
    page.get_by_role("button", name="Fill now").click()
    expect(page.locator("#filled")).to_have_text("Queued 2 new items.")
    picture(page, "rules")
    page.get_by_role("button", name="Disable").click()
    expect(page.get_by_text("disabled 20")).to_be_visible()

    page.goto("/review")
    row = page.get_by_role("row").filter(has_text="Pumps")
    expect(row).to_contain_text("2 reviewers each, blind")
    assert [cell.inner_text() for cell in row.locator("td.number").all()][:3] == ["2", "0", "0"]
    picture(page, "queues")
    row.get_by_role("link", name="queue and rules").click()
    page.get_by_role("button", name="Close this queue…").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Close this queue…").click()
    page.get_by_role("dialog").get_by_role("button", name="Close queue").click()
    expect(page.get_by_text("closed", exact=True)).to_be_visible()
    expect(page.locator("#new-rule")).to_have_count(0)
    ((key_id,),) = site.rows(
        "select key_id from feedback.api_key where app = %s and holder = 'Chief'", site.app
    )
    assert site.rows(
        "select actor, act from feedback.admin_audit where subject = 'review_queue' and after ->> 'name' = 'Pumps'"
        " and after ->> 'app' = %s order by audit_id",
        site.app,
    ) == [(f"Chief (key {key_id})", "insert"), (f"Chief (key {key_id})", "update")]


def test_a_senseless_rule_is_refused_before_it_is_saved(site: Site, tabs: Tabs) -> None:
    queue = site.queue(OIL)
    page = tabs.sign_in("Chief", "review", "admin")
    page.goto(f"/review/{queue}/rules")
    page.get_by_label("Any rating or thumb below").fill("7")
    page.get_by_role("button", name="Save rule").click()
    # The browser itself holds the form back: out of range.
    assert page.get_by_label("Any rating or thumb below").evaluate("(field) => field.validity.rangeOverflow")
    answer = page.request.post(
        "/review/api/add-rule",
        data={"queue_id": str(queue), "rule": {"kind": "low_score", "params": {"below": 7}}},
        headers={"Sec-Fetch-Site": "same-origin"},
    )
    assert (answer.status, answer.json()["error"]["field"]) == (422, "params.below")


def test_reviewers_read_the_rules_and_change_nothing(site: Site, tabs: Tabs) -> None:
    queue = site.queue(OIL)
    page = tabs.sign_in("Ada")
    page.goto("/review")
    expect(page.get_by_role("link", name="New queue")).to_have_count(0)
    page.goto(f"/review/{queue}/rules")
    expect(page.locator("#rules")).to_contain_text("Flagged")
    expect(page.get_by_role("button", name="Disable")).to_have_count(0)
    assert page.goto("/review/new").status == 403  # type: ignore[union-attr]
    expect(page.get_by_role("alert")).to_contain_text("scope admin")
    rule = {"kind": "flag", "params": {}}
    new = {"name": "x", "rubric": []}
    queue_id = {"queue_id": str(queue)}
    for name, body in (
        ("create", new),
        ("try-rule", queue_id | {"rule": rule}),
        ("add-rule", queue_id | {"rule": rule}),
        ("stop-rule", queue_id | {"rule_id": str(queue)}),
        ("fill", queue_id),
        ("close", queue_id),
    ):
        answer = page.request.post(
            f"/review/api/{name}", data=body, headers={"Sec-Fetch-Site": "same-origin"}
        )
        assert answer.status == 403, name


def test_rules_are_tried_one_at_a_time(site: Site) -> None:
    queue = site.queue(OIL)
    same = {"Sec-Fetch-Site": "same-origin"}
    body = {"queue_id": str(queue), "rule": {"kind": "flag", "params": {}}}
    trying = (
        "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and position('recent AS NOT MATERIALIZED' in query) > 0"
        " and datname = current_database()"
    )
    with (
        psycopg.connect(site.service.database_url) as lock,
        ThreadPoolExecutor(3) as admins,
        httpx.Client(base_url=site.url, headers=same, timeout=30) as client,
    ):
        client.post("/login", data={"key": site.key("Chief", "review", "admin")})
        lock.execute("lock table feedback.interaction")
        answers = [admins.submit(client.post, "/review/api/try-rule", json=body) for _ in range(3)]
        while site.rows(trying) == [(0,)] and not any(answer.done() for answer in answers):
            time.sleep(0.02)
        time.sleep(0.3)
        assert site.rows(trying) == [(1,)]
        lock.rollback()
        assert {answer.result().json()["would_queue"] for answer in answers} == {1}


def test_a_number_as_first_question_has_no_estimate(site: Site, tabs: Tabs) -> None:
    rubric = (Question("grade", "score", "Grade"), Question("verdict", "choice", "Right?", ("yes", "no")))
    site.queue(OIL, rubric=rubric, reason=False)
    page = tabs.sign_in("Ada")
    assert page.goto("/review").status == 200  # type: ignore[union-attr]
    expect(page.locator("main table")).to_contain_text("not enough data, n = 0")


SYNTHETIC, PAO = "Use synthetic oil.", "Use PAO oil."


def answer_differently(
    site: Site, tabs: Tabs, *items: tuple[str, str], corrections: tuple[str, ...] = (SYNTHETIC, PAO)
) -> Page:
    """Ada and Jon have judged each item, differently. Returns a tab of Mia's, on the page that decides."""
    queue = site.queue(*items, overlap=2)
    for holder, verdict, correction in zip(("Ada", "Jon"), "32", corrections, strict=True):
        page = begin(tabs, queue, holder)
        for done in range(len(items)):
            expect(page.locator("#items button")).to_have_count(done + 1)
            press(page, verdict)
            if correction:
                press(page, "e")
                page.locator("#correction-text").fill(correction)
            press(page, "Control+Enter")
        expect(page.locator("#notice")).to_contain_text("Nothing waits")
    page = tabs.sign_in("Mia")
    page.goto(f"/review/{queue}/adjudicate")
    return page


def test_answers_are_decided_by_picking_or_merging(site: Site, tabs: Tabs, picture: Picture) -> None:
    page = answer_differently(site, tabs, OIL, HEAT)
    expect(page.get_by_text("2 waiting")).to_be_visible()
    expect(page.locator("tr.differs")).to_have_count(2)
    picture(page, "adjudicate")
    page.get_by_role("button", name="Take Jon's").click()
    expect(page.get_by_text("1 waiting")).to_be_visible()
    page.locator("tr[data-question=verdict]").get_by_text("partly right").click()
    page.locator("tr[data-question=right_answer]").get_by_text("Use PAO oil.").click()
    expect(page.locator("#merged-text")).to_have_value("Use PAO oil.")
    page.locator("#merged-text").fill("Use synthetic PAO oil.")
    press(page, "Control+Enter")
    expect(page.get_by_text("Nothing waits for a decision")).to_be_visible()
    final = site.rows(
        "select name, coalesce(label, correction) from feedback.feedback_event"
        " where author_role = 'adjudicator' and interaction_id like %s order by interaction_id, name",
        f"{site.app}-%",
    )
    assert final == [
        ("right_answer", "Use PAO oil."),
        ("verdict", "partly right"),
        ("right_answer", "Use synthetic PAO oil."),
        ("verdict", "partly right"),
    ]


def test_those_who_disagree_do_not_decide(site: Site, tabs: Tabs) -> None:
    mia = answer_differently(site, tabs, OIL)
    item = mia.locator("#adjudicate").get_attribute("data-item")
    page = tabs.sign_in("Ada")
    page.goto(mia.url)
    expect(page.locator("main")).to_contain_text("somebody else decides")
    expect(page.get_by_text("waiting")).to_have_count(0)
    page.goto(mia.url.removesuffix("/adjudicate"))
    expect(page.locator("#notice")).to_contain_text("Nothing waits")
    expect(page.locator("#adjudicate")).to_be_hidden()
    answer = page.request.post(
        "/review/api/adjudicate",
        data={"item_id": item, "pick": 1},
        headers={"Sec-Fetch-Site": "same-origin"},
    )
    assert (answer.status, answer.json()["error"]["code"]) == (409, "own_answers")


def test_a_decision_is_checked_as_an_answer_is(site: Site, tabs: Tabs) -> None:
    page = answer_differently(site, tabs, HOSTILE)
    assert page.locator("img, main script, main svg").count() == 0
    page.locator("#merged-text").fill(HOSTILE[1])
    page.get_by_role("button", name="Decide with the chosen answers").click()
    expect(page.locator("#refused")).to_contain_text("unchanged")
    expect(page.get_by_text("1 waiting")).to_be_visible()


def test_what_nobody_corrected_may_still_be_corrected(site: Site, tabs: Tabs) -> None:
    page = answer_differently(site, tabs, OIL, corrections=("", ""))
    page.get_by_text("partly right").click()
    page.locator("#merged-text").fill(PAO)
    press(page, "Control+Enter")
    expect(page.get_by_text("Nothing waits for a decision")).to_be_visible()
    assert {value for *_, value in site.said()} == {"wrong", "partly right", PAO}


def test_the_review_page_leads_to_what_waits_for_a_decision(site: Site, tabs: Tabs) -> None:
    page = answer_differently(site, tabs, OIL)
    page.get_by_role("link", name="Back to the queue").click()
    page.get_by_role("link", name="Adjudicate 1").click()
    expect(page.get_by_text("1 waiting")).to_be_visible()


def test_two_people_work_on_two_items(site: Site, tabs: Tabs) -> None:
    queue = site.queue(OIL, HEAT)
    begin(tabs, queue, "Ada", output=OIL[1])
    page = begin(tabs, queue, "Jon")
    working(page, "Yes, up to 50 °C.")
