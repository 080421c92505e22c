"""Rules find what they say, samples are stable, filling is idempotent and misses nothing, a dry run says what it will do."""

import asyncio
import itertools
import json
from typing import Any, LiteralString

import asyncpg
import psycopg
import pytest

from feedback.ids import uuid7
from feedback.review import rules
from feedback.review.queues import NoSuchQueue, close_queue, get_queue, list_queues
from feedback.review.rules import (
    DryRun,
    Filled,
    Rule,
    RuleRefused,
    TooSlow,
    disable_rule,
    dry_run,
    fill,
    fill_now,
    list_rules,
    save_rule,
)
from storage.database import Database
from tests.integration.review_desk import Desk, at_desk, open_desk

QUEUED = "SELECT interaction_id FROM feedback.review_item WHERE queue_id = $1 ORDER BY interaction_id"


async def found(desk: Desk, rule: Rule) -> list[Any]:
    """What one rule chooses into a queue of its own; the dry run must have said so."""
    queue = await desk.queue()
    total = len(await desk.column("SELECT 1 FROM feedback.interaction"))
    said = await dry_run(desk.review, queue.queue_id, rule)
    saved = await save_rule(desk.admin, queue.queue_id, rule, actor="boss")
    control, filled = await fill(desk.review, queue.queue_id)
    assert control == Filled(queue.queue_id, None, "control", 0, 0)
    assert filled == Filled(queue.queue_id, saved.rule_id, rule.kind, said.would_queue, said.would_queue)
    assert said.total == total
    return await desk.column(QUEUED, queue.queue_id)


@at_desk
async def test_low_score(desk: Desk) -> None:
    await desk.interactions(
        "down", "up", "half", "machine", "revised", "withdrawn", "reviewed", "both", "none"
    )
    await desk.feedback("down", "thumb", score=0)
    await desk.feedback("up", "thumb", score=1)
    await desk.feedback("half", "rating", score=0.5)
    await desk.feedback("machine", "rating", score=0.1, annotator_kind="LLM")
    changed = await desk.feedback("revised", "thumb", score=0)
    await desk.feedback("revised", "thumb", score=1, feedback_id=changed, op="revise")
    taken = await desk.feedback("withdrawn", "thumb", score=0)
    await desk.feedback("withdrawn", "thumb", feedback_id=taken, op="retract")
    await desk.feedback("reviewed", "rating", score=0, author_role="reviewer")
    await desk.feedback("both", "rating", score=0.9)
    await desk.feedback("both", "rating", score=0.4)
    await desk.feedback("unknown", "thumb", score=0)
    assert await found(desk, Rule("low_score", {})) == ["both", "down"]
    assert await found(desk, Rule("low_score", {"below": 0.6})) == ["both", "down", "half"]


@at_desk
async def test_judge_disagreement(desk: Desk) -> None:
    async def judged(name: str, person: float, judge: float, annotator: str = "LLM") -> None:
        await desk.interactions(name)
        await desk.feedback(name, "rating", score=person)
        await desk.feedback(name, "rating", name="faithful", score=judge, annotator_kind=annotator)

    await judged("apart", 0.0, 0.9)
    await judged("code", 1.0, 0.5, "CODE")
    await judged("close", 0.6, 0.9)
    await desk.interactions("person only", "judge only", "label", "same label", "other name")
    await desk.feedback("person only", "rating", score=0)
    await desk.feedback("judge only", "rating", score=0, annotator_kind="LLM")
    for name, topic, label in (("label", "t", "b"), ("same label", "t", "a"), ("other name", "u", "b")):
        await desk.feedback(name, "category", name="t", label="a")
        await desk.feedback(name, "category", name=topic, label=label, annotator_kind="LLM")
    assert await found(desk, Rule("judge_disagreement", {})) == ["apart", "code", "label"]
    assert await found(desk, Rule("judge_disagreement", {"at_least": 0.95})) == ["label"]


@at_desk
async def test_high_edit_distance(desk: Desk) -> None:
    output = "Press the red button twice, then wait for the green light."
    await desk.interactions(
        "new", "same", "added", "half", "accepted", "value", "told", "copied", "moved", output=output
    )
    await desk.interactions("no output", output=None)
    await desk.feedback("new", "correction", correction="Call the hotline instead")
    await desk.feedback("same", "correction", correction=output.upper())
    await desk.feedback(
        "added", "correction", correction=output + " It takes a long while, so be patient please!"
    )
    await desk.feedback("half", "correction", correction="Press the red button.")
    await desk.feedback("accepted", "implicit", label="accepted", value={"text": output})
    await desk.feedback("value", "implicit", label="edited", value="No idea.")
    await desk.feedback("told", "implicit", label="edited", value={"retained": 0.4})
    await desk.feedback("copied", "implicit", label="copied", value="No idea.")
    await desk.feedback(
        "moved", "correction", correction="Wait for the green light, then press the red button twice."
    )
    await desk.feedback("no output", "correction", correction="Something")
    assert await found(desk, Rule("high_edit_distance", {})) == ["half", "new", "told", "value"]
    assert await found(desk, Rule("high_edit_distance", {"retained_below": 0.3})) == ["new", "value"]


RETAINED: tuple[tuple[str, str, float | None], ...] = (
    ("one two three four", "one two", 0.5),
    ("a a a b", "a b b b", 0.5),
    ("Yes.", "yes, but only here", 1.0),
    ("Straße", "STRASSE", 0.0),
    ("cafe\u0301", "Café", 1.0),
    ("価格は百円です", "価格は千円です", 6 / 7),
    ("3.5 € (net)", "3.5 €", 0.75),
    ("!?", "words", None),
    ("", "", None),
    ("word", "", 0.0),
    ("x " * 20_000, "x " * 10_000, 1.0),
)


def test_retained_fraction(conn: psycopg.Connection[Any]) -> None:
    for output, edited, kept in RETAINED:
        row = conn.execute("SELECT feedback.retained(%s, %s)", [output, edited]).fetchone()
        assert row is not None
        assert row[0] == (kept if kept is None else pytest.approx(kept)), output


@at_desk
async def test_rare_cluster(desk: Desk) -> None:
    def retrieved(document: str, **fields: Any) -> list[dict[str, Any]]:
        return [{"document_id": document, **fields}]

    for number in range(17):
        await desk.interactions(f"common {number:02}", retrieved=retrieved("faq"))
    await desk.interactions("rare", retrieved=retrieved("cellar") + retrieved("faq"))
    await desk.interactions("ranked", retrieved=retrieved("faq", rank=2) + retrieved("attic", rank=1))
    await desk.interactions("prompt", prompt_name="joke", retrieved=[])
    await desk.interactions("no cluster")
    # 20 interactions belong to a cluster, one of each rare ones: 5 %.
    assert await found(desk, Rule("rare_cluster", {"share_below": 0.06})) == ["prompt", "ranked", "rare"]
    assert await found(desk, Rule("rare_cluster", {"share_below": 0.05})) == []


@at_desk
async def test_flag(desk: Desk) -> None:
    await desk.interactions("by person", "by judge", "withdrawn", "not")
    await desk.feedback("by person", "flag", label="unsafe")
    await desk.feedback("by judge", "flag", label="unsafe", annotator_kind="LLM")
    taken = await desk.feedback("withdrawn", "flag", label="unsafe")
    await desk.feedback("withdrawn", "flag", op="retract", feedback_id=taken)
    assert await found(desk, Rule("flag", {})) == ["by judge", "by person"]


@at_desk
async def test_only_the_app_and_the_window_are_looked_at(desk: Desk) -> None:
    await desk.interactions("now")
    await desk.interactions("old", occurred_at="2026-01-01T00:00:00Z")
    for name in ("now", "old"):
        await desk.feedback(name, "flag", label="unsafe")
    queue, foreign = await desk.queue(), await desk.queue(app="other")
    assert await dry_run(desk.review, queue.queue_id, Rule("flag", {})) == DryRun(1, 1)
    assert await dry_run(desk.review, queue.queue_id, Rule("flag", {}), days=3660) == DryRun(2, 2)
    assert await dry_run(desk.review, foreign.queue_id, Rule("flag", {})) == DryRun(0, 0)


@at_desk
async def test_an_item_gathers_reasons_and_the_highest_priority(desk: Desk) -> None:
    await desk.interactions("a")
    await desk.feedback("a", "flag", label="unsafe")
    queue = await desk.queue(overlap=3)
    await save_rule(desk.admin, queue.queue_id, Rule("flag", {}, priority=5), actor="boss")
    await fill(desk.review)
    low = await save_rule(desk.admin, queue.queue_id, Rule("low_score", {}, priority=2), actor="boss")
    await desk.feedback("a", "thumb", score=0)
    counts = [(filled.kind, filled.chosen, filled.queued) for filled in await fill(desk.review)]
    assert counts == [("control", 0, 0), ("flag", 0, 0), ("low_score", 1, 0)]
    (item,) = await desk.rows("SELECT item_id, why, priority, control FROM feedback.review_item")
    why = json.loads(item["why"])
    assert [reason["rule"] for reason in why] == ["flag", "low_score"]
    assert why[0]["labels"] == ["unsafe"]
    assert why[1]["score"] == 0 and why[1]["rule_id"] == str(low.rule_id)
    assert (item["priority"], item["control"]) == (5, False)
    assert await desk.column("SELECT slot FROM feedback.review_slot ORDER BY slot") == [1, 2, 3]
    assert await desk.column("SELECT act FROM feedback.review_event") == ["queued"]


@at_desk
async def test_filling_again_only_adds_what_is_new_even_if_it_was_committed_late(desk: Desk) -> None:
    queue = await desk.queue(control_rate=1.0)
    await save_rule(desk.admin, queue.queue_id, Rule("flag", {}), actor="boss")
    await desk.interactions("a", "b")
    assert [f.queued for f in await fill(desk.review)] == [2, 0]
    assert [f.chosen for f in await fill(desk.review)] == [0, 0]

    late = await asyncpg.connect(desk.database.url)
    slow = late.transaction()
    await slow.start()
    await late.execute(
        "INSERT INTO feedback.interaction (interaction_id, app, occurred_at, messages, api_key_id, body_sha256)"
        " VALUES ('late', 'support', now(), '[]', gen_random_uuid(), 'x')"
    )
    await desk.interactions("c")
    assert [f.queued for f in await fill(desk.review)] == [1, 0]
    await slow.commit()
    await late.close()
    assert [f.queued for f in await fill(desk.review)] == [1, 0]
    await desk.feedback("a", "flag", label="unsafe")
    assert [(f.chosen, f.queued) for f in await fill(desk.review)] == [(0, 0), (1, 0)]
    assert await desk.column(QUEUED, queue.queue_id) == ["a", "b", "c", "late"]


@at_desk
async def test_a_restored_database_that_counts_transactions_anew_misses_nothing(desk: Desk) -> None:
    queue = await desk.queue(control_rate=1.0)
    await fill(desk.review)
    with psycopg.connect(desk.database.url) as owner:
        owner.execute("UPDATE feedback.review_progress SET seen = '9000000000'")
    await desk.interactions("a")
    assert [f.queued for f in await fill(desk.review)] == [1]
    assert await desk.column(QUEUED, queue.queue_id) == ["a"]


@at_desk
async def test_fills_at_once_queue_each_interaction_once(desk: Desk) -> None:
    queue = await desk.queue(control_rate=0.5, overlap=2)
    await save_rule(desk.admin, queue.queue_id, Rule("flag", {}), actor="boss")
    await desk.interactions(*(f"i{n}" for n in range(100)))
    for n in range(0, 100, 10):
        await desk.feedback(f"i{n}", "flag", label="x")
    results = await asyncio.gather(*(fill(desk.review) for _ in range(8)))
    items = await desk.column(QUEUED, queue.queue_id)
    assert sum(f.queued for result in results for f in result) == len(items) == len(set(items))
    assert len(await desk.column("SELECT item_id FROM feedback.review_slot")) == 2 * len(items)


@at_desk
async def test_samples_are_stable_nested_and_of_the_right_size(desk: Desk) -> None:
    names = [f"i{n:04}" for n in range(2_000)]
    await desk.interactions(*names)
    samples = []
    queue = await desk.queue()
    for rate in (0.05, 0.1, 0.5, 1.0):
        samples.append(
            await desk.column(
                "SELECT interaction_id FROM feedback.interaction WHERE feedback.draw($1, interaction_id) < $2",
                str(queue.queue_id),
                rate,
            )
        )
        spread = (rate * (1 - rate) * 2_000) ** 0.5
        assert abs(len(samples[-1]) - rate * 2_000) <= 5 * spread
    for small, large in itertools.pairwise(samples):
        assert set(small) < set(large)

    rare = Rule("rare_cluster", {}, sample_rate=0.2)
    first = await dry_run(desk.review, queue.queue_id, rare)
    assert first == await dry_run(desk.review, queue.queue_id, rare) == DryRun(0, 2_000)


@at_desk
async def test_the_control_sample_does_not_depend_on_rules(desk: Desk) -> None:
    """Two queues can differ in anything but their ids; within one, rules change nothing about who is control."""
    names = [f"i{n:03}" for n in range(300)]
    await desk.interactions(*names)
    for name in names[:150]:
        await desk.feedback(name, "flag", label="x")
    queue = await desk.queue(control_rate=0.2)
    drawn = await desk.column(
        "SELECT interaction_id FROM feedback.interaction WHERE feedback.draw($1, interaction_id) < 0.2 ORDER BY 1",
        f"{queue.queue_id} control",
    )
    await save_rule(desk.admin, queue.queue_id, Rule("flag", {}, priority=9), actor="boss")
    control, flagged = await fill(desk.review)
    assert (control.queued, flagged.chosen) == (len(drawn), 150)
    items = await desk.rows(
        "SELECT interaction_id, control, priority, why FROM feedback.review_item ORDER BY 1"
    )
    assert [item["interaction_id"] for item in items if item["control"]] == drawn
    both = [item for item in items if item["control"] and item["interaction_id"] < names[150]]
    assert both and flagged.queued == 150 - len(both)
    # They keep the control sample's place in line, or those that look bad would be judged first.
    assert {item["priority"] for item in items if item["control"]} == {0}
    assert {item["priority"] for item in items if not item["control"]} == {9}
    assert [reason["rule"] for reason in json.loads(both[0]["why"])] == ["control", "flag"]


@at_desk
async def test_an_item_that_was_queued_by_a_rule_first_still_counts_as_control(desk: Desk) -> None:
    queue = await desk.queue(control_rate=1.0)
    await save_rule(desk.admin, queue.queue_id, Rule("flag", {}, priority=9), actor="boss")
    await desk.interactions("a")
    await desk.feedback("a", "flag", label="x")
    await fill(desk.review)
    with psycopg.connect(desk.database.url) as owner:
        owner.execute("UPDATE feedback.review_item SET control = false, priority = 9, state = 'done'")
        owner.execute("DELETE FROM feedback.review_progress")
    assert [(f.chosen, f.queued) for f in await fill(desk.review)] == [(1, 0), (0, 0)]
    (item,) = await desk.rows("SELECT control, priority, state FROM feedback.review_item")
    assert item == {"control": True, "priority": 0, "state": "done"}


@at_desk
async def test_a_rule_is_replaced_and_disabled_and_a_closed_queue_takes_nothing(desk: Desk) -> None:
    queue = await desk.queue()
    old = await save_rule(desk.admin, queue.queue_id, Rule("low_score", {"below": 0.3}), actor="boss")
    new = await save_rule(
        desk.admin, queue.queue_id, Rule("low_score", {}), actor="boss", replaces=old.rule_id
    )
    rules = await list_rules(desk.review, queue.queue_id)
    assert [(r.rule_id, r.disabled_at is None) for r in rules] == [(old.rule_id, False), (new.rule_id, True)]
    assert new.rule.params == {"below": 0.5}
    assert [f.rule_id for f in await fill(desk.review)] == [None, new.rule_id]
    stopped = await disable_rule(desk.admin, new.rule_id, actor="boss")
    assert (await disable_rule(desk.admin, new.rule_id, actor="boss")) == stopped
    assert [f.rule_id for f in await fill(desk.review)] == [None]
    closed = await close_queue(desk.admin, queue.queue_id, actor="boss")
    assert closed.closed_at is not None
    assert await close_queue(desk.admin, queue.queue_id, actor="boss") == closed
    assert await fill(desk.review) == await fill(desk.review, queue.queue_id) == []
    assert [status.queue for status in await list_queues(desk.review)] == [closed]


@at_desk
async def test_what_makes_no_sense_is_refused(desk: Desk) -> None:
    queue = await desk.queue()
    with pytest.raises(NoSuchQueue):
        await save_rule(desk.admin, uuid7(), Rule("flag", {}), actor="boss")
    with pytest.raises(NoSuchQueue):
        await get_queue(desk.review, uuid7())
    with pytest.raises(RuleRefused, match="no rule"):
        await disable_rule(desk.admin, uuid7(), actor="boss")
    elsewhere = await save_rule(desk.admin, queue.queue_id, Rule("flag", {}), actor="boss")
    other = await desk.queue()
    with pytest.raises(RuleRefused, match="no rule"):
        await save_rule(desk.admin, other.queue_id, Rule("flag", {}), actor="x", replaces=elsewhere.rule_id)
    assert await list_rules(desk.review, other.queue_id) == []
    assert [rule.disabled_at for rule in await list_rules(desk.review, queue.queue_id)] == [None]


@at_desk
async def test_the_audit_names_who_made_and_changed_queues_and_rules(desk: Desk) -> None:
    queue = await desk.queue(actor="grace")
    rule = await save_rule(desk.admin, queue.queue_id, Rule("flag", {}), actor="ada")
    await disable_rule(desk.admin, rule.rule_id, actor="eve")
    await disable_rule(desk.admin, rule.rule_id, actor="nobody: it is disabled already")
    await close_queue(desk.admin, queue.queue_id, actor="grace")
    async with desk.admin.acquire() as connection:
        rows = await connection.fetch(
            "SELECT actor, act, subject, after FROM feedback.admin_audit ORDER BY audit_id"
        )
    assert [tuple(row)[:3] for row in rows] == [
        ("grace", "insert", "review_queue"),
        ("ada", "insert", "review_rule"),
        ("eve", "update", "review_rule"),
        ("grace", "update", "review_queue"),
    ]
    assert json.loads(rows[1]["after"])["rule_id"] == str(rule.rule_id)


def test_a_dry_run_that_takes_long_is_given_up(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "DRY_RUN_SECONDS", 0.05)

    async def run() -> None:
        async with open_desk(database, size=1) as desk:
            queue = await desk.queue()
            async with await psycopg.AsyncConnection.connect(database.url) as owner:
                await owner.execute("LOCK TABLE feedback.interaction")
                with pytest.raises(TooSlow):
                    await dry_run(desk.review, queue.queue_id, Rule("flag", {}))
            # The limit was that statement's alone.
            assert await desk.column("SELECT current_setting('statement_timeout')") == ["0"]

    asyncio.run(run())


def test_a_fill_waits_for_the_one_before_it_however_long(database: Database) -> None:
    async def run() -> None:
        async with open_desk(database, size=1) as desk:
            queue = await desk.queue(control_rate=1.0)
            await desk.interactions("a")
            async with desk.review.acquire() as connection:
                await connection.execute("SET lock_timeout = '50ms'")
            async with await psycopg.AsyncConnection.connect(database.url, autocommit=True) as owner:
                lock = [f"fill {queue.queue_id}"]
                await owner.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", lock)
                filling = asyncio.create_task(fill(desk.review))
                waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
                while (
                    not filling.done()
                    and not (
                        await owner.execute(f"{waiting} AND now() - query_start > interval '200 ms'")
                    ).rowcount
                ):
                    await asyncio.sleep(0.02)
                await owner.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", lock)
            assert [filled.queued for filled in await filling] == [1]

    asyncio.run(run())


def test_fill_works_without_an_event_loop(database: Database) -> None:
    async def arrange() -> None:
        async with open_desk(database) as desk:
            await desk.queue(control_rate=1.0)
            await desk.interactions("a", "b")

    asyncio.run(arrange())
    assert [filled.queued for filled in fill_now(database.url)] == [2]
    assert [filled.queued for filled in fill_now(database.url)] == [0]


FORBIDDEN: tuple[tuple[LiteralString, LiteralString], ...] = (
    ("datamoat_ingest", "SELECT * FROM feedback.review_queue"),
    ("datamoat_ingest", "SELECT * FROM feedback.review_item"),
    ("datamoat_ingest", "SELECT * FROM feedback.review_response"),
    ("datamoat_analyst", "SELECT * FROM feedback.review_item"),
    ("datamoat_review", "UPDATE feedback.review_event SET reviewer = 'x'"),
    ("datamoat_review", "DELETE FROM feedback.review_event"),
    ("datamoat_review", "UPDATE feedback.review_response SET reviewer = 'x'"),
    ("datamoat_review", "DELETE FROM feedback.review_item"),
    ("datamoat_review", "UPDATE feedback.review_item SET interaction_id = 'x'"),
    ("datamoat_review", "UPDATE feedback.review_slot SET item_id = gen_random_uuid()"),
    ("datamoat_review", "UPDATE feedback.feedback_event SET score = 1"),
    ("datamoat_review", "UPDATE feedback.review_queue SET blind = false"),
    ("datamoat_review", "UPDATE feedback.review_rule SET disabled_at = now()"),
    ("datamoat_review", "SELECT * FROM feedback.api_key"),
    ("datamoat_admin", "UPDATE feedback.review_queue SET rubric = '[]'"),
    ("datamoat_admin", "UPDATE feedback.review_rule SET params = '{}'"),
    ("datamoat_admin", "DELETE FROM feedback.review_rule"),
    ("datamoat_admin", "SELECT * FROM feedback.review_response"),
)


def test_roles_can_do_their_work_and_no_more(conn: psycopg.Connection[Any]) -> None:
    for role, statement in FORBIDDEN:
        with pytest.raises(psycopg.errors.InsufficientPrivilege), conn.transaction():
            conn.execute("SET LOCAL ROLE " + role)
            conn.execute(statement)
