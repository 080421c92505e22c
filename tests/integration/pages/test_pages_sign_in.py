"""Signing in and out, and what keeps others out."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from uuid import UUID

import httpx
import psycopg
import pytest
from playwright.sync_api import Dialog, Page, expect

from feedback.keys import revoke_key
from tests.integration.pages.conftest import Site, Tabs

SAME = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def signed_in(site: Site) -> Iterator[Callable[..., httpx.Client]]:
    """A function that gives a client with a session, which speaks as the pages' own scripts do."""
    with ExitStack() as stack:

        def sign_in(*scopes: str) -> httpx.Client:
            client = stack.enter_context(httpx.Client(base_url=site.url, headers=SAME, timeout=30))
            answer = client.post("/login", data={"key": site.key("Ada", *scopes), "next": "/ask"})
            assert (answer.status_code, answer.headers["location"]) == (303, "/ask")
            return client

        yield sign_in


def test_a_link_brings_the_key_for_one_enter_and_leaves_none_behind(site: Site, tabs: Tabs) -> None:
    page = tabs.open()
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    page.goto(f"/login?next=%2Fask#{site.key('Ada')}")
    # Whoever made the link: nobody is signed in by having followed it.
    expect(page.get_by_text("if it was made for you")).to_be_visible()
    expect(page.get_by_role("button", name="Sign in")).to_be_focused()
    assert ("dm_" not in page.url, page.context.cookies()) == (True, [])
    page.keyboard.press("Enter")
    page.wait_for_url("**/ask")
    expect(page.get_by_text("Ada", exact=True)).to_be_visible()
    assert not any("dm_" in url for url in sent)
    page.go_back()
    assert "dm_" not in page.url
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/")
    assert 11 * 3600 < cookie["expires"] - time.time() <= 12 * 3600
    assert "dm_" not in cookie["value"]


def test_a_typed_key_signs_in_where_one_wanted_to_go(
    site: Site, tabs: Tabs, picture: Callable[[Page, str], None]
) -> None:
    page = tabs.open()
    page.goto("/ask")
    expect(page).to_have_url(f"{site.url}/login?next=%2Fask")
    page.get_by_label("Review key").fill("dm_" + "x" * 40)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("unknown or revoked")
    picture(page, "login")
    page.get_by_label("Review key").fill(site.key("Ada"))
    page.get_by_role("button", name="Sign in").click()
    expect(page).to_have_url(f"{site.url}/ask")


def test_signing_out_ends_the_session_and_clears_what_the_browser_kept(site: Site, tabs: Tabs) -> None:
    page = tabs.sign_in("Ada")
    page.goto("/review")
    person = page.locator("#sign-out").get_attribute("data-person")
    page.evaluate(f"localStorage.setItem('datamoat.draft.{person}.x', '{{\"answers\": {{}}, \"at\": 9e15}}')")
    asked: list[str] = []

    def stay(dialog: Dialog) -> None:
        asked.append(dialog.message)
        dialog.dismiss()

    page.once("dialog", stay)
    page.get_by_role("button", name="Sign out").click()
    assert "1 draft(s)" in asked[0]
    expect(page).to_have_url(f"{site.url}/review")
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Sign out").click()
    expect(page).to_have_url(f"{site.url}/login")
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.includes('draft'))") == []
    page.goto("/review")
    expect(page).to_have_url(f"{site.url}/login?next=%2Freview")


def test_a_copy_of_the_cookie_ends_with_signing_out(
    site: Site, signed_in: Callable[..., httpx.Client]
) -> None:
    client, other = signed_in(), signed_in()
    copy = {"datamoat_session": client.cookies["datamoat_session"]}
    assert client.post("/logout").headers["location"] == "/login"
    assert httpx.get(f"{site.url}/review", cookies=copy).headers["location"] == "/login?next=%2Freview"
    # The same person's other browser stays signed in.
    assert other.get("/review").status_code == 200


def test_a_revoked_key_ends_its_session(site: Site, signed_in: Callable[..., httpx.Client]) -> None:
    client = signed_in()
    assert client.get("/review").status_code == 200
    with psycopg.connect(site.service.database_url) as conn:
        found = conn.execute("select key_id from feedback.api_key where app = %s", [site.app]).fetchone()
        assert found is not None
        revoke_key(conn, found[0])
    deadline = time.monotonic() + 30
    while client.get("/review").status_code != 303:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert client.post("/review/api/progress", json={"queue_id": "0" * 32}).status_code == 401


@pytest.mark.parametrize("change", ["claims", "signature", "nothing", "no json"])
def test_a_forged_cookie_is_nobody(site: Site, signed_in: Callable[..., httpx.Client], change: str) -> None:
    client = signed_in()
    payload, signature = client.cookies["datamoat_session"].split(".")
    forged = {
        "claims": f"{payload[:-2]}AA.{signature}",
        "signature": f"{payload}.{signature[:-2]}AA",
        "nothing": "",
        "no json": "bm8.bm8",
    }[change]
    answer = httpx.get(f"{site.url}/review", headers={b"Cookie": f"datamoat_session={forged}".encode()})
    assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=%2Freview")


def test_only_review_keys_open_the_pages(site: Site) -> None:
    answer = httpx.post(f"{site.url}/login", data={"key": site.key("A product", "ingest")}, headers=SAME)
    assert answer.status_code == 403
    assert "--scope review" in answer.text
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "cross-site", "Origin": "SAME"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ],
)
def test_other_sites_cannot_make_the_browser_act(
    site: Site, signed_in: Callable[..., httpx.Client], headers: dict[str, str]
) -> None:
    cookie = signed_in("review", "admin").cookies["datamoat_session"]
    sent = {name: value.replace("SAME", site.url) for name, value in headers.items()}
    with httpx.Client(base_url=site.url, headers=sent, cookies={"datamoat_session": cookie}) as foreign:
        for path in ("/review/api/claim", "/review/api/create", "/ask/api/ask"):
            assert foreign.post(path, json={}).status_code == 403, path
        assert foreign.post("/logout").status_code == 403
        login = foreign.post("/login", data={"key": site.key("Ada")})
        assert (login.status_code, "set-cookie" in login.headers) == (403, False)


def test_a_browser_without_fetch_metadata_is_known_by_its_origin(
    site: Site, signed_in: Callable[..., httpx.Client]
) -> None:
    cookies = {"datamoat_session": signed_in().cookies["datamoat_session"]}
    answer = httpx.post(f"{site.url}/logout", headers={"Origin": site.url}, cookies=cookies)
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")


@pytest.mark.parametrize(
    "wanted",
    [
        *(
            "https://evil.example",
            "//evil.example",
            "///evil.example",
            r"/\evil.example",
            "/\t/evil.example",
            "evil",
            "",
        )
    ],
)
def test_signing_in_leads_nowhere_else(site: Site, wanted: str) -> None:
    answer = httpx.post(f"{site.url}/login", data={"key": site.key("Ada"), "next": wanted}, headers=SAME)
    assert answer.headers["location"] == "/review"


def test_attempts_are_limited(site: Site) -> None:
    # The limit is per address, and loopback has many: the other tests' address keeps its attempts.
    transport = httpx.HTTPTransport(local_address="127.0.0.77")
    with httpx.Client(base_url=site.url, headers=SAME, transport=transport) as client:
        answers = [client.post("/login", data={"key": f"dm_{'x' * 40}{attempt}"}) for attempt in range(12)]
    assert [answer.status_code for answer in answers[:10]] == [401] * 10
    assert answers[11].status_code == 429
    assert int(answers[11].headers["retry-after"]) >= 1


def test_a_right_key_signs_in_whatever_others_tried(site: Site) -> None:
    transport = httpx.HTTPTransport(local_address="127.0.0.78")
    with httpx.Client(base_url=site.url, headers=SAME, transport=transport) as client:
        while client.post("/login", data={"key": f"dm_{'x' * 40}"}).status_code != 429:
            pass
        assert client.post("/login", data={"key": site.key("Ada")}).status_code == 303


def test_every_page_forbids_what_it_does_not_need(signed_in: Callable[..., httpx.Client]) -> None:
    client = signed_in()
    for path in ("/", "/login", "/review", "/ask", "/review/00000000-0000-0000-0000-000000000000"):
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy, path
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "<script>" not in answer.text and "style=" not in answer.text and "onclick" not in answer.text


def test_static_files_are_not_sent_twice(site: Site) -> None:
    first = httpx.get(f"{site.url}/static/review.js")
    assert first.headers["content-type"].startswith("text/javascript")
    again = httpx.get(f"{site.url}/static/review.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_colours_follow_the_system_or_the_person(
    tabs: Tabs, picture: Callable[[Page, str], None]
) -> None:
    page = tabs.sign_in("Ada", color_scheme="dark")
    page.goto("/")

    def ground() -> str:
        return str(page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))

    dark = ground()
    picture(page, "start-dark")
    button = page.get_by_role("button", name="Colours:")
    button.click()
    light = ground()
    assert light != dark
    page.reload()
    assert ground() == light
    button.click()
    page.emulate_media(color_scheme="light")
    assert ground() == dark
    button.click()
    assert ground() == light


def test_the_start_page_leads_everywhere(tabs: Tabs) -> None:
    page = tabs.open()
    page.goto("/")
    assert [link.get_attribute("href") for link in page.locator(".doors a").all()] == [
        *("/review", "/ask", "/docs", "/readyz", "/metrics")
    ]


LEASE = {"item_id": str(UUID(int=7)), "slot": 1, "fence": 1, "expires_at": "2026-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/review/api/claim", b"", 422),
        ("/review/api/claim", b"[]", 422),
        ("/review/api/claim", b'{"queue_id": 1}', 422),
        ("/review/api/claim", b'{"queue_id": "\xff"}', 422),
        ("/review/api/claim", json.dumps({"queue_id": str(UUID(int=7))}).encode(), 404),
        ("/review/api/submit", json.dumps({"lease": LEASE, "answers": {"a": "\0"}}).encode(), 409),
        ("/review/api/submit", json.dumps({"lease": LEASE | {"slot": 2**40}, "answers": {}}).encode(), 409),
        ("/review/api/extend", json.dumps({"lease": LEASE | {"slot": 99_999_999_999}}).encode(), 409),
        ("/review/api/extend", json.dumps({"lease": LEASE | {"fence": 10**30}}).encode(), 409),
        ("/review/api/extend", json.dumps({"lease": LEASE | {"fence": -(2**63) - 1}}).encode(), 409),
        (
            "/review/api/preview",
            json.dumps({"lease": LEASE, "answers": 7})
            .encode()
            .replace(b"7}", b'{"a": %b}}' % (b"[" * 3000 + b"]" * 3000)),
            422,
        ),
        ("/review/api/submit", b'{"lease": ' + b"[" * 100_000, 422),
        ("/review/api/reviewed", json.dumps({"item_id": str(UUID(int=7))}).encode(), 404),
        ("/review/api/create", json.dumps({"name": "x", "rubric": [], "overlap": 2**40}).encode(), 422),
        (
            "/review/api/create",
            json.dumps({"name": "x\0", "rubric": [], "lease_minutes": 1e300}).encode(),
            422,
        ),
        *(
            (
                "/review/api/create",
                json.dumps(
                    {
                        "name": "x",
                        "rubric": [{"name": "a", "kind": "text", "title": "A"}],
                        "lease_minutes": minutes,
                    }
                ).encode(),
                422,
            )
            for minutes in (1e308, -1e308, 0)
        ),
        ("/ask/api/ask", rb'{"question": "\ud800"}', 422),
        ("/ask/api/ask", rb'{"question": "\u0000"}', 422),
        ("/ask/api/ask", json.dumps({"question": "x" * 3000}).encode(), 422),
        ("/ask/api/ask", b"x" * 9_000_000, 413),
        ("/login", b"key=%ff", 400),
        ("/login", b"key=" + "é".encode(), 401),
        ("/login", b"&".join([b"a=b"] * 500), 400),
    ],
    ids=lambda value: str(value)[:40],
)
def test_hostile_bodies_are_refused(
    signed_in: Callable[..., httpx.Client], path: str, body: bytes, status: int
) -> None:
    kind = "application/x-www-form-urlencoded" if path == "/login" else "application/json"
    answer = signed_in("review", "admin").post(path, content=body, headers={"Content-Type": kind})
    assert answer.status_code == status, answer.text


def test_a_link_on_another_site_leads_on_for_who_is_signed_in(site: Site, tabs: Tabs) -> None:
    page = tabs.sign_in("Ada")
    elsewhere = site.url.replace("127.0.0.1", "localhost")
    page.goto(f"{elsewhere}/login")
    page.evaluate(f"location.href = '{site.url}/ask'")
    expect(page).to_have_url(f"{site.url}/ask")
    tabs.hosts.discard(elsewhere)
