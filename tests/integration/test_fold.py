"""The fold in SQL against a plain reference: no order, repetition or split of a log changes what it folds to.

Belongs here: ``feedback.current`` and the state API. The dbt model's fold is held to the same reference, and to
``feedback.current``, in ``test_dbt_models.py``.
"""

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feedback.ids import uuid7
from feedback.keys import create_key, revoke_key
from storage.database import Database
from tests.integration.conftest import FeedbackService

START = datetime(2026, 3, 1, tzinfo=UTC)
COLUMNS = "event_id, feedback_id, op, revision, kind, name, score, annotator_kind, interaction_id, occurred_at, received_at"


@dataclass(frozen=True)
class Event:
    """What of an event decides the fold, and a score to tell states apart."""

    event_id: UUID
    feedback_id: UUID
    op: str
    revision: int
    score: float
    occurred_at: datetime
    received_at: datetime

    @property
    def place(self) -> tuple[int, datetime, UUID]:
        # A clock that runs ahead does not win: what counts is when the event arrived, at the latest.
        return (self.revision, min(self.occurred_at, self.received_at), self.event_id)


def fold(events: list[Event]) -> dict[UUID, tuple[UUID, str, int, float]]:
    """The state of every item, by its id."""
    states: dict[UUID, Event] = {}
    for event in events:
        known = states.get(event.feedback_id)
        if known is None or event.place > known.place:
            states[event.feedback_id] = event
    return {key: (last.event_id, last.op, last.revision, last.score) for key, last in states.items()}


moments = st.integers(0, 4).map(lambda hours: START + timedelta(hours=hours))


@st.composite
def logs(draw: st.DrawFn) -> list[Event]:
    """Few items, revisions and hours to choose from, so that every kind of tie is common."""
    items = [UUID(int=number) for number in range(1, draw(st.integers(1, 4)) + 1)]
    count = draw(st.integers(1, 14))
    ids = draw(st.lists(st.uuids(), min_size=count, max_size=count, unique=True))
    return [
        Event(
            event_id,
            draw(st.sampled_from(items)),
            draw(st.sampled_from(["create", "revise", "retract"])),
            draw(st.integers(1, 3)),
            draw(st.sampled_from([0.0, 1.0])),
            draw(moments),
            draw(moments),
        )
        for event_id in ids
    ]


@pytest.fixture(scope="module")
def shared(cluster: Any, template: str) -> Iterator[psycopg.Connection[Any]]:
    url = cluster.new_database(template)
    with Database.from_url(url).connect() as connection:
        yield connection
    cluster.drop_database(url)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(logs(), st.data())
def test_any_order_repetition_and_split_folds_to_one_state(
    shared: psycopg.Connection[Any], log: list[Event], data: st.DataObject
) -> None:
    again = data.draw(st.lists(st.sampled_from(log), max_size=6))
    order = data.draw(st.permutations(log + again))
    cut = data.draw(st.integers(0, len(order)))
    shared.execute("TRUNCATE feedback.feedback_event")
    for arrived, part in ((order[:cut], order[:cut]), (order, order[cut:])):
        add(shared, part)
        assert current(shared) == fold(arrived)
    assert fold(order) == fold(log)


def add(conn: psycopg.Connection[Any], events: list[Event]) -> None:
    """As the service adds a batch: what is known by its id is left alone."""
    rows = [
        {
            **vars(event),
            "event_id": str(event.event_id),
            "feedback_id": str(event.feedback_id),
            "kind": "thumb",
            "name": "thumb",
            "annotator_kind": "HUMAN",
            "interaction_id": "i",
        }
        for event in events
    ]
    conn.execute(
        f"""
        INSERT INTO feedback.feedback_event ({COLUMNS}, api_key_id, body_sha256)
        SELECT {COLUMNS}, '{UUID(int=0)}', '' FROM json_populate_recordset(null::feedback.feedback_event, %s)
        ON CONFLICT (event_id) DO NOTHING
        """,
        [json.dumps(rows, default=datetime.isoformat)],
    )


def current(conn: psycopg.Connection[Any]) -> dict[UUID, tuple[UUID, str, int, float]]:
    rows = conn.execute(
        "SELECT feedback_id, event_id, op, revision, score"
        " FROM feedback.current(ARRAY(SELECT feedback_id FROM feedback.feedback_event))"
    )
    return {row[0]: tuple(row[1:]) for row in rows}


# ---- the state API ----


@pytest.fixture
def http(feedback_service: FeedbackService) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=feedback_service.base_url, trust_env=False, timeout=60) as opened:
        yield opened


def key(service: FeedbackService, app: str, *scopes: str) -> dict[str, str]:
    with psycopg.connect(service.database_url) as conn:
        return bearer(create_key(conn, app, scopes)[1])


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_what_was_acknowledged_is_read_back_folded(
    feedback_service: FeedbackService, http: httpx.Client
) -> None:
    writer, reader = bearer(feedback_service.api_key), key(feedback_service, "support", "read")
    name = f"i-{uuid7()}"
    thumb = {"kind": "thumb", "score": 1, "interaction_id": name, "author_id": "ana", "identifier": "c-1"}
    first = http.post("/v1/feedback", json=thumb, headers=writer).json()["feedback_id"]
    revision = thumb | {
        "op": "revise",
        "feedback_id": first,
        "revision": 2,
        "score": 0,
        "reasons": ["too_long"],
    }
    last = http.post("/v1/feedback", json=revision, headers=writer).json()["id"]
    other = http.post(
        "/v1/feedback", json=thumb | {"kind": "flag", "label": "x"} | {"score": None}, headers=writer
    )
    assert other.status_code == 201, other.text
    # A retraction names nothing but the item.
    retract = {"kind": "flag", "op": "retract", "feedback_id": other.json()["feedback_id"]}
    assert http.post("/v1/feedback", json=retract, headers=writer).status_code == 201
    answer = http.get("/v1/feedback", params={"interaction_id": [name, "unknown"]}, headers=reader)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    flag, state = answer.json()["feedback"]
    assert (state["feedback_id"], state["event_id"], state["interaction_id"]) == (first, last, name)
    assert (state["score"], state["label"], state["reasons"]) == (0.0, "down", ["too_long"])
    assert (state["revision"], state["op"], state["retracted"]) == (2, "revise", False)
    assert state["identifier"] == "c-1" and "author_ref" not in state
    assert (flag["op"], flag["retracted"], flag["interaction_id"]) == ("retract", True, name)
    only = http.get("/v1/feedback", params={"interaction_id": name, "kind": "thumb"}, headers=reader).json()
    assert [item["kind"] for item in only["feedback"]] == ["thumb"] and only["more"] is False


def test_only_the_app_itself_reads_its_feedback(
    feedback_service: FeedbackService, http: httpx.Client
) -> None:
    name = f"i-{uuid7()}"
    thumb = {"kind": "thumb", "score": 1, "interaction_id": name}
    assert http.post("/v1/feedback", json=thumb, headers=bearer(feedback_service.api_key)).is_success
    asked = {"interaction_id": name}
    for headers, status, found in (
        (key(feedback_service, "support", "read"), 200, 1),
        (key(feedback_service, "other", "read"), 200, 0),
        (bearer(feedback_service.api_key), 403, 0),
        ({}, 401, 0),
    ):
        answer = http.get("/v1/feedback", params=asked, headers=headers)
        assert answer.status_code == status
        assert len(answer.json().get("feedback", ())) == found


@pytest.mark.parametrize(
    "query",
    [{}, {"interaction_id": ["i"] * 101}, {"interaction_id": "\0"}, {"interaction_id": "i", "kind": "mood"}],
    ids=["none", "too many", "NUL", "kind"],
)
def test_a_question_out_of_bounds_is_refused(
    feedback_service: FeedbackService, http: httpx.Client, query: Any
) -> None:
    reader = key(feedback_service, "support", "read")
    answer = http.get("/v1/feedback", params=query, headers=reader)
    assert answer.status_code == 422
    assert answer.json()["error"]["remedy"]


# ---- tokens ----


def minted(http: httpx.Client, service: FeedbackService, **wanted: Any) -> tuple[dict[str, str], str]:
    answer = http.post("/v1/tokens", json=wanted, headers=bearer(service.api_key))
    assert answer.status_code == 201, answer.text
    token = answer.json()["token"]
    return bearer(token), json.loads(decoded(token))["node"]


def decoded(token: str) -> bytes:
    return base64.urlsafe_b64decode(token.removeprefix("dmt_").partition(".")[0] + "===")


def own(node: str) -> str:
    return str(uuid7())[:-12] + node


def test_a_token_writes_and_reads_its_own_author_s_feedback(
    feedback_service: FeedbackService, http: httpx.Client
) -> None:
    name = f"i-{uuid7()}"
    ana, node = minted(http, feedback_service, interaction_id=name, user_id="ana", session_id="s")
    bo, other = minted(http, feedback_service, interaction_id=name, user_id="bo")
    thumb = {"kind": "thumb", "score": 1, "interaction_id": name}
    for headers, event_id, status in (
        (ana, own(node), 201),
        (bo, own(other), 201),
        (bo, own(node), 403),
        (ana, str(uuid7()), 403),
    ):
        answer = http.post("/v1/feedback", json=thumb | {"event_id": event_id}, headers=headers)
        assert answer.status_code == status, answer.text
    for headers, theirs in ((ana, node), (bo, other)):
        found = http.get("/v1/feedback", params={"interaction_id": name}, headers=headers).json()["feedback"]
        assert [item["feedback_id"][-12:] for item in found] == [theirs]
    assert http.get("/v1/feedback", params={"interaction_id": "i-2"}, headers=ana).status_code == 403
    with psycopg.connect(feedback_service.database_url) as conn:
        rows = conn.execute(
            "SELECT author_ref, session_id, author_role FROM feedback.feedback_event WHERE interaction_id = %s"
            " ORDER BY session_id",
            [name],
        ).fetchall()
    assert [row[1:] for row in rows] == [("s", "end_user"), (None, "end_user")]
    assert len({row[0] for row in rows}) == 2 and all(len(row[0]) == 32 for row in rows)


def test_a_token_opens_no_other_door(feedback_service: FeedbackService, http: httpx.Client) -> None:
    ana, _ = minted(http, feedback_service, interaction_id="i", user_id="ana")
    interaction = {"interaction_id": str(uuid7()), "messages": [{"role": "user", "content": "?"}]}
    assert http.post("/v1/interactions", json=interaction, headers=ana).status_code == 401
    assert http.post("/v1/tokens", json={"interaction_id": "j"}, headers=ana).status_code == 401


def test_tokens_end_with_the_key_that_made_them(
    feedback_service: FeedbackService, http: httpx.Client
) -> None:
    with psycopg.connect(feedback_service.database_url) as conn:
        record, secret = create_key(conn, "support")
    answer = http.post("/v1/tokens", json={"interaction_id": "i"}, headers=bearer(secret))
    with psycopg.connect(feedback_service.database_url) as conn:
        revoke_key(conn, record.key_id)
    refused = http.get("/v1/feedback", params={"interaction_id": "i"}, headers=bearer(answer.json()["token"]))
    assert refused.status_code == 401
    assert "revoked" in refused.json()["error"]["message"]


def test_tokens_are_minted_in_arrays_and_refused_by_field(
    feedback_service: FeedbackService, http: httpx.Client
) -> None:
    headers = bearer(feedback_service.api_key)
    many = http.post("/v1/tokens", json=[{"interaction_id": f"i-{n}"} for n in range(3)], headers=headers)
    assert [token["interaction_id"] for token in many.json()] == ["i-0", "i-1", "i-2"]
    for body, status, field in (
        ([{"interaction_id": "i"}, {}], 422, "[1]"),
        ({"interaction_id": "i", "expires_in": 10**9}, 422, "expires_in"),
        ({"interaction_id": "i", "kinds": ["mood"]}, 422, "kinds[0]"),
        ({"interaction_id": "i", "user_id": "\ud800"}, 422, None),
        ([{"interaction_id": "i"}] * 1001, 413, None),
        ("i", 400, None),
    ):
        refused = http.post(
            "/v1/tokens", content=json.dumps(body), headers=headers | {"Content-Type": "application/json"}
        )
        assert (refused.status_code, refused.json()["error"].get("field")) == (status, field), refused.text
    reader = key(feedback_service, "support", "read")
    assert http.post("/v1/tokens", json={"interaction_id": "i"}, headers=reader).status_code == 403
