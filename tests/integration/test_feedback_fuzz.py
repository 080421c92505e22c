"""Whatever is sent, the service answers as its API description says, never with an error of its own, and stores
nothing that its own rules refuse."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from psycopg.rows import dict_row
from schemathesis import checks
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok

from benchmarks.load import Load, Request
from benchmarks.processes import Service
from feedback.ids import uuid7
from feedback.payloads import FeedbackEvent, Interaction, parse_event, parse_interaction
from tests.integration.conftest import Cluster

BODIES = 12_000
EXAMPLES = 15


@pytest.fixture(scope="module")
def service(cluster: Cluster, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    url = cluster.new_database(template)
    with Service(url, tmp_path_factory.mktemp("service")) as service:
        yield service
    cluster.drop_database(url)


@schemathesis.serializer(
    "application/x-protobuf", "application/x-ndjson", "application/jsonl", "application/x-jsonlines"
)
def as_bytes(_: object, value: Any) -> bytes:
    """Bodies that are not one JSON document: generated text as it is, anything else a line of JSON."""
    data = getattr(value, "data", value)
    return (
        data
        if isinstance(data, bytes)
        else data.encode()
        if isinstance(data, str)
        else json.dumps(data).encode()
    )


# --- the API description --------------------------------------------------------------------------------------------


def test_every_documented_operation_keeps_its_description(service: Service) -> None:
    base = f"http://127.0.0.1:{service.port}"
    http = requests.Session()
    http.trust_env = False
    http.headers["Authorization"] = f"Bearer {service.key}"
    schema = schemathesis.openapi.from_dict(http.get(f"{base}/openapi.json", timeout=30).json())
    schema.config.update(base_url=base)
    tried: Counter[str] = Counter()
    failures: list[str] = []
    for found in schema.get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def probe(case: schemathesis.Case[Any]) -> None:
            tried[case.operation.label] += 1
            answer = case.call(session=http)
            case.validate_response(
                answer,
                checks=[
                    checks.not_a_server_error,
                    checks.status_code_conformance,
                    checks.content_type_conformance,
                    checks.response_schema_conformance,
                ],
            )

        try:
            probe()
        except FailureGroup as group:
            failures += [f"{operation.label}: {failure}" for failure in group.exceptions]
    assert not failures, "\n\n".join(failures)
    assert {"POST /v1/feedback", "POST /v1/interactions"} <= set(tried)
    http.close()


# --- bodies that are wrong ------------------------------------------------------------------------------------------

_EVENTS = (
    {"kind": "thumb", "score": 1, "interaction_id": "i-1"},
    {"kind": "rating", "score": 0.5, "label": "4 of 5", "scope": "session", "session_id": "s"},
    {"kind": "correction", "correction": "Fourteen days.", "interaction_id": "i-1", "author_id": "u"},
    {"kind": "flag", "label": "unsafe", "reasons": ["a", "b"], "trace_id": "0" * 32},
    {
        "kind": "preference",
        "value": {"chosen": "a"},
        "interaction_id": "i-2",
        "metadata": {"a": [1, {"b": 2}]},
    },
    {
        "kind": "implicit",
        "label": "copied",
        "interaction_id": "i-3",
        "occurred_at": "2026-01-31T12:00:00+02:00",
    },
    {"kind": "comment", "explanation": "Too long", "op": "revise", "interaction_id": "i-1", "revision": 3},
)
_INTERACTION = {
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How long?"}],
    "output": "Thirty days.",
    "session_id": "s",
    "user_id": "u",
    "occurred_at": "2026-01-31T12:00:00Z",
    "retrieved": [{"chunk_id": "c", "rank": 1, "score": 0.5}],
    "input_tokens": 10,
    "cost_usd": 0.01,
    "model": "m",
    "metadata": {"locale": "en"},
}
_STRINGS = (
    "", " ", "x" * 201, "x" * 70_000, "\0", "a\0b", "\ud800", "\U0001f642", "\u202e", "a@b.c", "+49 170 1234567", "null",
    "9" * 40, "2026-13-01T00:00:00Z", "0001-01-01T00:00:00+23:59", "2099-12-31T23:59:59.999999999-14:00", "create", "\n\r\t",
    "{}", "';--", "%s", "\\u0000",
)  # fmt: skip
_NUMBERS = (
    0,
    -0.0,
    -1,
    1,
    2,
    0.1 + 0.2,
    5e-324,
    1.7976931348623157e308,
    2**31,
    2**53 + 1,
    2**63,
    2**64,
    10**40,
    -(10**400),
)
_RAW = (
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"01",
    b"+1",
    b"0x1",
    b"'a'",
    b"undefined",
    b"\xff\xfe",
    b'"\xed\xa0\x80"',
    b"[" * 3000,
    b"[" * 3000 + b"]" * 3000,
)


class Mutator:
    """Bodies made from valid items by a seeded generator: most are wrong in one or two places, some in all."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def body(self, interaction: bool) -> bytes:
        choose = self.random.random()
        if choose < 0.03:
            return self.random.randbytes(self.random.randrange(300))
        if choose < 0.25:
            items = [self.item(interaction) for _ in range(self.random.randrange(6))]
            text = b"[" + b",".join(items) + b"]"
        else:
            text = self.item(interaction)
        return self.damaged(text) if self.random.random() < 0.2 else text

    def item(self, interaction: bool) -> bytes:
        item = dict(_INTERACTION) if interaction else dict(self.random.choice(_EVENTS))
        item["interaction_id" if interaction else "event_id"] = str(uuid7())
        if item.get("op") == "revise":
            item["feedback_id"] = str(uuid7())
        fields = [*(Interaction if interaction else FeedbackEvent).__struct_fields__, "unknown", ""]
        for _ in range(self.random.choice((0, 1, 1, 1, 2, 5))):
            field = self.random.choice(fields)
            if self.random.random() < 0.2:
                item.pop(field, None)
            else:
                item[field] = self.value(item.get(field))
        text = json.dumps(item).encode()
        if self.random.random() < 0.05:
            text = text.replace(b"null", self.random.choice(_RAW), 1)
        return text

    def value(self, old: Any) -> Any:
        made = self.random.randrange(9)
        if made < 3:
            return self.random.choice(_STRINGS)
        if made < 5:
            return self.random.choice(_NUMBERS)
        if made == 5:
            return self.random.choice((None, True, False, [], {}))
        if made == 6:
            return [old] * self.random.choice((1, 2, 60))
        if made == 7:
            return {self.random.choice(_STRINGS): old}
        nested: Any = old
        for depth in range(self.random.choice((3, 60, 150))):
            nested = [nested] if depth % 2 else {"a": nested}
        return nested

    def damaged(self, text: bytes) -> bytes:
        data = bytearray(text)
        for _ in range(self.random.randrange(1, 4)):
            at = self.random.randrange(len(data) + 1)
            if self.random.random() < 0.4:
                del data[at : at + self.random.randrange(1, 20)]
            else:
                data[at:at] = self.random.choice((self.random.randbytes(3), b'"', b"}", b"\0", *_RAW))
        return bytes(data)


def test_no_body_breaks_the_service_or_the_schema(service: Service) -> None:
    mutator = Mutator(20260131)
    paths = [mutator.random.choice(("/v1/feedback", "/v1/interactions")) for _ in range(BODIES)]
    sent = [service.target.request(mutator.body(path == "/v1/interactions"), path=path) for path in paths]
    with psycopg.connect(service.database_url) as conn:
        before = {table: _count(conn, table) for table in ("feedback_event", "interaction")}
    statuses: Counter[int] = Counter()
    created: Counter[bool] = Counter()

    def note(request: Request, status: int, body: bytes) -> None:
        statuses[status] += 1
        answered = json.loads(body)
        count = answered.get("created", 0) if status in (200, 207) else status == 201
        created[b"/v1/interactions" in request.data[:30]] += count
        assert (status < 300) == ("error" not in answered or "id" in answered)

    load = Load(service.target, sent, connections=8, note=note).run()
    assert (load.answers, load.unanswered) == (BODIES, 0)
    assert set(statuses) <= {200, 201, 207, 400, 403, 409, 413, 422}, statuses
    # The generator is worth something only while it reaches every end.
    assert min(statuses[201], statuses[207], statuses[400], statuses[422]) > 100, statuses
    with psycopg.connect(service.database_url) as conn:
        assert _count(conn, "feedback_event") == before["feedback_event"] + created[False]
        assert _count(conn, "interaction") == before["interaction"] + created[True]


def test_what_is_stored_is_valid(service: Service) -> None:
    """After the bodies above: each stored row passes the rules of an item again."""
    with psycopg.connect(service.database_url, row_factory=dict_row) as conn:
        events = conn.execute("SELECT * FROM feedback.feedback_event").fetchall()
        interactions = conn.execute("SELECT * FROM feedback.interaction").fetchall()
    assert len(events) > 500
    assert len(interactions) > 500
    for row in events:
        parse_event(_as_item(row, FeedbackEvent))
        assert len(row["author_ref"] or "0" * 32) == 32
    for row in interactions:
        parse_interaction(_as_item(row, Interaction))
        assert row["app"] == "shop"


def _as_item(row: dict[str, Any], shape: type[FeedbackEvent] | type[Interaction]) -> bytes:
    """The JSON of an item from its row; what the service adds, and pseudonyms, are left out."""

    def plain(value: Any) -> str:
        assert isinstance(value, UUID | datetime)
        return value.isoformat() if isinstance(value, datetime) else str(value)

    item = {name: row[name] for name in shape.__struct_fields__ if row.get(name) is not None}
    return json.dumps(item, default=plain).encode()


def _count(conn: psycopg.Connection[Any], table: str) -> int:
    row = conn.execute(f"SELECT count(*) FROM feedback.{table}").fetchone()
    assert row is not None
    return int(row[0])
