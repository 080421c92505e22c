"""Tokens: they say what was minted, hold what is sent to it, and cannot be forged, widened or outlive their time."""

import base64
import json
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback import signing, tokens
from feedback.access import Caller
from feedback.http import Refused
from feedback.ids import pseudonym, uuid7
from feedback.payloads import PayloadError, parse_event
from feedback.tokens import MAX_TOKEN_LENGTH, Claims, TokenRequest, bind, mint, read

KEY = b"k" * 32
CALLER = Caller(str(uuid7()), "support", ("ingest",))
NOW = 1_800_000_000.0


def claims(**changes: object) -> Claims:
    wanted = TokenRequest(**({"interaction_id": "i-1", "user_id": "ana", "session_id": "s"} | changes))  # type: ignore[arg-type]
    return read(KEY, mint(KEY, CALLER, wanted, NOW).token, NOW)


def own(node: str) -> str:
    return str(UUID(str(uuid7())[:-12] + node))


def code(token: str, now: float = NOW) -> str:
    with pytest.raises(Refused) as refused:
        read(KEY, token, now)
    assert refused.value.status == 401
    return refused.value.error.code


def test_a_token_says_what_was_minted_and_holds_no_raw_person() -> None:
    token = mint(KEY, CALLER, TokenRequest(interaction_id="i-1", user_id="ana", kinds=["thumb"]), NOW)
    found = read(KEY, token.token, NOW)
    assert (found.interaction_id, found.app, found.kinds) == ("i-1", "support", ("thumb",))
    assert found.author_ref == pseudonym(KEY, "support", "ana")
    assert found.caller.key_id == CALLER.key_id
    assert token.expires_at == found.expires_at == NOW + 86_400
    body = token.token.removeprefix("dmt_").partition(".")[0]
    assert b"ana" not in base64.urlsafe_b64decode(body + "===")


def test_a_token_ends_at_its_time() -> None:
    token = mint(KEY, CALLER, TokenRequest(interaction_id="i", expires_in=60), NOW).token
    assert read(KEY, token, NOW + 59)
    assert code(token, NOW + 60) == "token_expired"


def test_a_changed_or_foreign_token_is_refused() -> None:
    token = mint(KEY, CALLER, TokenRequest(interaction_id="i"), NOW).token
    body, _, signature = token.removeprefix("dmt_").partition(".")
    said = json.loads(base64.urlsafe_b64decode(body + "===")) | {"interaction_id": "j"}
    other = base64.urlsafe_b64encode(json.dumps(said).encode()).decode().rstrip("=")
    for forged in (
        f"dmt_{other}.{signature}",
        f"dmt_{body}.",
        f"dmt_{body}",
        f"dmt_.{signature}",
        f"{body}.{signature}",
        f"dmt_{body}.{signature[:-1]}",
        mint(b"x" * 32, CALLER, TokenRequest(interaction_id="i"), NOW).token,
        "dmt_",
        "",
        "dmt_\udcff.\udcff",
        "dmt_é.é",
        "dmt_" + "a" * 1_000_000,
    ):
        assert code(forged) == "invalid_token", forged[:80]


@given(st.text(max_size=80))
def test_any_text_is_refused_alike(text: str) -> None:
    assert code("dmt_" + text) == "invalid_token"


def test_claims_of_another_version_are_refused() -> None:
    said = json.dumps({"v": 2, "interaction_id": "i"}).encode()
    assert code("dmt_" + signing.sign(tokens._signing_key(KEY), said)) == "invalid_token"


def test_the_largest_token_is_within_the_bound() -> None:
    wide = "\U0001f600" * 200
    caller = Caller(CALLER.key_id, wide, ("ingest",))
    token = mint(KEY, caller, TokenRequest(interaction_id=wide, session_id=wide, user_id=wide), NOW).token
    assert len(token) <= MAX_TOKEN_LENGTH
    assert read(KEY, token, NOW).interaction_id == wide


def test_the_node_follows_from_app_answer_and_author() -> None:
    node = claims().node
    assert len(node) == 12 and int(node, 16) >= 0
    assert claims(session_id="t", expires_in=60).node == node
    assert claims(interaction_id="i-2").node != node
    assert claims(user_id="bo").node != node
    assert claims(user_id=None).node not in (node, claims(user_id=None, session_id="t").node)


def test_the_bearer_of_a_token_may_not_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_buckets", {})
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    for _ in range(int(tokens.BURST)):
        tokens._take("ana")
    with pytest.raises(Refused) as refused:
        tokens._take("ana")
    assert refused.value.status == 429
    assert refused.value.headers == {"Retry-After": "1"}
    tokens._take("bo")


def test_an_event_is_held_to_its_token() -> None:
    found = claims()
    said = {"kind": "thumb", "score": 1, "interaction_id": "i-1", "event_id": own(found.node)}
    item = parse_event(json.dumps(said).encode())
    bind(found, item)
    assert (item.interaction_id, item.session_id, item.author_role) == ("i-1", "s", "end_user")
    assert item.author_id is None


@pytest.mark.parametrize(
    "change",
    [
        {"event_id": None},
        {"event_id": "01932f6e-4a00-7000-8000-0000000000b1"},
        {"event_id": "00000000-0000-4000-8000-{node}"},
        {"feedback_id": "01932f6e-4a00-7000-8000-0000000000b2"},
        {"kind": "comment", "explanation": "x"},
        {"interaction_id": "i-2"},
        {"session_id": "t"},
        {"author_id": "bo"},
        {"author_role": "reviewer"},
        {"annotator_kind": "LLM"},
        {"scope": "session", "session_id": "s"},
        {"trace_id": "0" * 32},
        {"span_id": "0" * 16},
    ],
    ids=str,
)
def test_what_the_token_does_not_allow_is_refused(change: dict[str, str | None]) -> None:
    found = claims(kinds=["thumb", "flag"])
    said: dict[str, object] = {
        "kind": "thumb",
        "score": 1,
        "interaction_id": "i-1",
        "event_id": own(found.node),
    }
    said |= {name: value and value.replace("{node}", found.node) for name, value in change.items()}
    if said["kind"] == "comment":
        del said["score"]
    item = parse_event(json.dumps({name: value for name, value in said.items() if value}).encode())
    with pytest.raises(PayloadError) as refused:
        bind(found, item)
    assert refused.value.field in change
    assert refused.value.code == "forbidden"


def test_strangers_share_nothing_unless_they_share_a_session() -> None:
    def node(**who: str) -> str:
        return read(KEY, mint(KEY, CALLER, TokenRequest(interaction_id="i", **who), NOW).token, NOW).node  # type: ignore[arg-type]

    assert node() != node()
    assert node(session_id="s") == node(session_id="s") != node(session_id="t")
    assert node(user_id="ana") == node(user_id="ana", session_id="s") != node(user_id="bob")
