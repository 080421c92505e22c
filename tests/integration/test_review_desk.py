"""Leases, submissions and adjudication on a real database: one owner per slot, nothing counted twice, nothing shown early."""

import asyncio
import random
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from feedback import log
from feedback.ids import pseudonym, uuid7
from feedback.review.adjudication import (
    AlreadyDecided,
    NoSuchItem,
    NotYet,
    OwnAnswers,
    adjudicate,
    reviewed,
    to_adjudicate,
)
from feedback.review.estimates import control_estimate
from feedback.review.leases import UNREADABLE, Lease, LostLease, assignment, claim, extend, release
from feedback.review.queues import NoSuchQueue, Queue, close_queue, list_queues
from feedback.review.rubric import AnswerRefused, Question, RubricRefused
from feedback.review.rules import Rule, fill, save_rule
from feedback.review.submissions import flag, reviewers_key, skip, submit
from feedback.service import REVIEW_ROLE
from storage.database import Database
from tests.integration.review_desk import APP, GOLD, KEY, RUBRIC, VERDICT, Desk, at_desk, open_desk, reviewer

HISTORY = "SELECT act || coalesce(' ' || reviewer, '') FROM feedback.review_event ORDER BY review_event_id"


async def filled(desk: Desk, count: int = 1, **options: Any) -> Queue:
    """A queue that holds ``count`` interactions."""
    queue = await desk.queue(**{"control_rate": 1.0} | options)
    await desk.interactions(*(f"i{n:03}" for n in range(count)))
    await fill(desk.review, queue.queue_id)
    return queue


async def expire(desk: Desk) -> None:
    """Let every lease run out."""
    async with await psycopg.AsyncConnection.connect(desk.database.url) as owner:
        await owner.execute("UPDATE feedback.review_slot SET leased_until = now() - interval '1 second'")


@at_desk
async def test_a_claim_shows_the_item_and_a_reload_finds_it_again(desk: Desk) -> None:
    queue = await desk.queue()
    await save_rule(desk.admin, queue.queue_id, Rule("low_score", {}, priority=3), actor="boss")
    await desk.interactions("a", model="m1", metadata={"k": 1}, retrieved=[{"document_id": "d"}])
    await desk.feedback("a", "thumb", score=0, reasons=["outdated"])
    await fill(desk.review)
    work = await desk.claim(queue)
    assert work.queue == queue
    assert work.interaction["messages"] == [{"role": "user", "content": "How?"}]
    assert (work.interaction["model"], work.interaction["metadata"]) == ("m1", {"k": 1})
    assert [(said["kind"], said["score"], said["reasons"]) for said in work.feedback] == [
        ("thumb", 0.0, ["outdated"])
    ]
    assert [reason["rule"] for reason in work.why] == ["low_score"]
    assert work.control is False
    assert await desk.claim(queue) == work
    assert await assignment(desk.review, reviewer(), work.lease) == work
    assert await claim(desk.review, queue.queue_id, reviewer("bob")) is None
    assert await desk.column(HISTORY) == ["queued", "claimed ada"]


@at_desk
async def test_the_line_is_by_priority_then_age(desk: Desk) -> None:
    queue = await desk.queue(control_rate=1.0)
    await save_rule(desk.admin, queue.queue_id, Rule("flag", {}, priority=5), actor="boss")
    async with await psycopg.AsyncConnection.connect(desk.database.url) as owner:
        for name, priority, age in (("old", 0, 9), ("new", 0, 1), ("urgent", 5, 0), ("late", -1, 20)):
            await desk.interactions(name)
            await fill(desk.review)
            await owner.execute(
                "UPDATE feedback.review_item SET priority = %s, queued_at = now() - make_interval(hours => %s)"
                " WHERE interaction_id = %s",
                [priority, age, name],
            )
        await owner.commit()
    seen = []
    while work := await claim(desk.review, queue.queue_id, reviewer()):
        seen.append(work.interaction["interaction_id"])
        await desk.submit(work.lease, verdict="right")
    assert seen == ["urgent", "old", "new", "late"]


def test_racing_reviewers_never_share_a_slot_and_old_fences_never_submit(database: Database) -> None:
    """30 people at 40 items with two slots each; leases run out all the time under their hands."""
    people = [f"person {n}" for n in range(30)]

    async def race() -> None:
        async with open_desk(database, size=16) as desk:
            queue = await filled(desk, 40, overlap=2, lease_seconds=600)
            won: list[tuple[Lease, str]] = []
            lost: list[tuple[Lease, str]] = []
            claims = 0

            async def work(name: str) -> None:
                nonlocal claims
                chance = random.Random(name)
                stale: list[Lease] = []
                while found := await claim(desk.review, queue.queue_id, reviewer(name)):
                    claims += 1
                    lease = found.lease
                    dice = chance.random()
                    if dice < 0.3:
                        stale.append(lease)
                        async with desk.review.acquire() as connection:
                            await connection.execute(
                                "UPDATE feedback.review_slot SET leased_until = now() - interval '1 second'"
                                " WHERE item_id = $1 AND slot = $2 AND fence = $3",
                                lease.item_id,
                                lease.slot,
                                lease.fence,
                            )
                    elif dice < 0.4:
                        await release(desk.review, reviewer(name), lease)
                        stale.append(lease)
                    for candidate in [*stale, lease]:
                        try:
                            await desk.submit(candidate, name, verdict=chance.choice(["right", "wrong"]))
                        except LostLease:
                            lost.append((candidate, name))
                        else:
                            won.append((candidate, name))

            await asyncio.gather(*(work(name) for name in people))
            assert claims > 80 and lost
            # Every slot was used once, by different people on each item.
            assert len(won) == len({(lease.item_id, lease.slot) for lease, _ in won}) == 80
            assert len({(lease.item_id, name) for lease, name in won}) == 80
            assert not {(lease, name) for lease, name in won} & {(lease, name) for lease, name in lost}
            assert (await desk.column("SELECT count(*) FROM feedback.feedback_event")) == [80]
            # Each owner of a slot had a fence of its own.
            claimed = await desk.rows(
                "SELECT item_id, slot, fence FROM feedback.review_event WHERE act = 'claimed'"
            )
            assert len(claimed) == len({tuple(row.values()) for row in claimed}) == claims
            assert {row["state"] for row in await desk.rows("SELECT state FROM feedback.review_item")} <= {
                "done",
                "to_adjudicate",
            }

    asyncio.run(race())


def test_hundreds_of_claims_at_once_hand_out_each_slot_once(database: Database) -> None:
    async def race() -> None:
        async with open_desk(database, size=16) as desk:
            queue = await filled(desk, 50, overlap=3)
            found = await asyncio.gather(
                *(claim(desk.review, queue.queue_id, reviewer(f"p{n % 100}")) for n in range(300))
            )
            leases = {(f.lease.item_id, f.lease.slot): f for f in found if f is not None}
            # 100 people, three windows each: every person has one lease, and no two the same.
            assert len(leases) == 100
            assert all(f is not None for f in found)
            held = await desk.rows(
                "SELECT item_id, reviewer FROM feedback.review_slot WHERE reviewer IS NOT NULL"
            )
            assert len(held) == len({tuple(row.values()) for row in held}) == 100
            assert max(Counter(row["item_id"] for row in held).values()) <= 3

    asyncio.run(race())


@at_desk
async def test_an_expired_lease_is_lost_and_its_owner_may_claim_again(desk: Desk) -> None:
    queue = await filled(desk)
    first = (await desk.claim(queue)).lease
    await expire(desk)
    for act in (
        desk.submit(first, verdict="right"),
        extend(desk.review, reviewer(), first),
        release(desk.review, reviewer(), first),
        skip(desk.review, reviewer(), first, "why", "later"),
        assignment(desk.review, reviewer(), first),
    ):
        with pytest.raises(LostLease):
            await act
    second = (await desk.claim(queue, "bob")).lease
    assert (second.item_id, second.slot, second.fence) == (first.item_id, first.slot, first.fence + 1)
    with pytest.raises(LostLease):
        await desk.submit(first, verdict="right")
    # Neither a stolen fence nor somebody else's name helps.
    with pytest.raises(LostLease):
        await desk.submit(second, verdict="right")
    await expire(desk)
    third = (await desk.claim(queue)).lease
    assert third.fence == 3
    # The same person, in a window that was open before the lease was lost.
    with pytest.raises(LostLease):
        await desk.submit(first, verdict="right")
    assert len(await desk.submit(third, verdict="right")) == 1
    assert await desk.column(HISTORY) == [
        "queued",
        "claimed ada",
        "lost ada",
        "claimed bob",
        "lost bob",
        "claimed ada",
        "submitted ada",
    ]


@at_desk
async def test_a_lease_with_impossible_numbers_is_lost(desk: Desk) -> None:
    lease = (await desk.claim(await filled(desk))).lease
    impossible_numbers: list[dict[str, Any]] = [{"slot": 99_999_999_999}, {"slot": -1}, {"fence": 2**63}]
    for changes in [*impossible_numbers, {"fence": -(10**30)}]:
        impossible = replace(lease, **changes)
        for act in (
            desk.submit(impossible, verdict="right"),
            extend(desk.review, reviewer(), impossible),
            assignment(desk.review, reviewer(), impossible),
        ):
            with pytest.raises(LostLease):
                await act


@at_desk
async def test_metadata_that_cannot_be_read_does_not_stop_the_queue(desk: Desk) -> None:
    queue = await filled(desk)
    async with await psycopg.AsyncConnection.connect(desk.database.url) as owner:
        await owner.execute("ALTER TABLE feedback.interaction DISABLE TRIGGER USER")
        await owner.execute(
            "UPDATE feedback.interaction SET metadata = (repeat('[', 3000) || repeat(']', 3000))::jsonb"
        )
    work = await desk.claim(queue)
    assert work.interaction["metadata"] == UNREADABLE
    assert await desk.submit(work.lease, verdict="right")


def test_who_waits_for_a_lock_in_vain_may_come_again(database: Database) -> None:
    async def run() -> None:
        async with open_desk(database, size=1) as desk:
            queue = await filled(desk)
            async with desk.review.acquire() as connection:
                await connection.execute("SET lock_timeout = '50ms'")
            async with await psycopg.AsyncConnection.connect(desk.database.url) as owner:
                await owner.execute("LOCK TABLE feedback.review_slot")
                with pytest.raises(log.Unavailable):
                    await claim(desk.review, queue.queue_id, reviewer())
            assert await desk.claim(queue)

    asyncio.run(run())


@at_desk
async def test_extending_and_releasing(desk: Desk) -> None:
    queue = await filled(desk, lease_seconds=60)
    lease = (await desk.claim(queue)).lease
    longer = await extend(desk.review, reviewer(), lease)
    assert longer.fence == lease.fence
    assert timedelta(0) < longer.expires_at - lease.expires_at < timedelta(seconds=60)
    await release(desk.review, reviewer(), longer)
    with pytest.raises(LostLease):
        await extend(desk.review, reviewer(), longer)
    assert (await desk.claim(queue, "bob")).lease.fence == 2
    assert await desk.column(HISTORY) == [
        "queued",
        "claimed ada",
        "extended ada",
        "released ada",
        "claimed bob",
    ]


@at_desk
async def test_overlap_takes_as_many_different_people(desk: Desk) -> None:
    queue = await filled(desk, overlap=2)
    lease = (await desk.claim(queue)).lease
    await desk.submit(lease, verdict="right")
    assert await claim(desk.review, queue.queue_id, reviewer()) is None
    assert await desk.column("SELECT state FROM feedback.review_item") == ["open"]
    other = (await desk.claim(queue, "bob")).lease
    assert other.slot != lease.slot
    await desk.submit(other, "bob", verdict="right")
    assert await desk.column("SELECT state FROM feedback.review_item") == ["done"]
    assert await claim(desk.review, queue.queue_id, reviewer("eve")) is None


@at_desk
async def test_two_last_submissions_at_once_finish_the_item(desk: Desk) -> None:
    queue = await filled(desk, 20, overlap=2)
    for _ in range(20):
        ada, bob = (await desk.claim(queue)).lease, (await desk.claim(queue, "bob")).lease
        await asyncio.gather(desk.submit(ada, verdict="right"), desk.submit(bob, "bob", verdict="right"))
    assert await desk.column("SELECT DISTINCT state FROM feedback.review_item") == ["done"]


@at_desk
async def test_a_submission_becomes_feedback_of_a_pseudonymous_reviewer(desk: Desk) -> None:
    queue = await filled(desk)
    lease = (await desk.claim(queue)).lease
    ids = await desk.submit(
        lease, verdict="wrong", quality="2", remark=" Hm. ", fix="Thus and thus.", gold=True
    )
    rows = await desk.rows(
        "SELECT event_id, kind, name, score, label, explanation, correction, author_role, author_ref, annotator_kind,"
        " interaction_id, op, metadata->>'item_id' AS item FROM feedback.feedback_event"
        " ORDER BY array_position($1::uuid[], event_id)",
        ids,
    )
    assert [row["event_id"] for row in rows] == ids
    assert [tuple(row.values())[1:7] for row in rows] == [
        ("category", "verdict", None, "wrong", None, None),
        ("rating", "quality", 0.25, "2", None, None),
        ("comment", "remark", None, None, " Hm. ", None),
        ("category", "gold", None, "golden", None, None),
        ("correction", "fix", None, None, None, "Thus and thus."),
    ]
    common = {tuple(row.values())[7:] for row in rows}
    author = pseudonym(reviewers_key(KEY), APP, "ada")
    assert common == {("reviewer", author, "HUMAN", "i000", "create", str(lease.item_id))}
    times = await desk.column(
        "SELECT kind FROM feedback.feedback_event ORDER BY least(occurred_at, received_at), kind"
    )
    assert times[-1] == "correction"
    seen = await reviewed(desk.review, reviewer(), lease.item_id)
    assert seen.responses[0].answers == {
        "verdict": "wrong",
        "quality": "2",
        "remark": " Hm. ",
        "fix": "Thus and thus.",
        "gold": True,
    }
    # A product that calls one of its users "ada" speaks of somebody else.
    await desk.feedback("i000", "thumb", score=1, author_id="ada", author_role="reviewer")
    assert await desk.column(
        "SELECT count(DISTINCT author_ref) FROM feedback.feedback_event WHERE author_role = 'reviewer'"
    ) == [2]


@at_desk
async def test_a_retried_submission_is_answered_the_same(desk: Desk) -> None:
    queue = await filled(desk)
    lease = (await desk.claim(queue)).lease
    answers = {"verdict": "right", "remark": "ok"}
    results = await asyncio.gather(*(desk.submit(lease, **answers) for _ in range(5)))
    assert all(result == results[0] for result in results)
    await expire(desk)
    assert await desk.submit(lease, **answers) == results[0]
    assert await desk.column("SELECT count(*) FROM feedback.feedback_event") == [2]
    assert await desk.column("SELECT count(*) FROM feedback.review_response") == [1]
    with pytest.raises(LostLease, match="other answers"):
        await desk.submit(lease, **answers | {"remark": "not ok"})
    with pytest.raises(LostLease):
        await desk.submit(lease, "bob", **answers)
    with pytest.raises(LostLease):
        await submit(desk.review, KEY, reviewer("ada", "other"), lease, answers)


@at_desk
async def test_a_refused_submission_leaves_everything_as_it_was(desk: Desk) -> None:
    queue = await filled(desk)
    lease = (await desk.claim(queue)).lease
    for answers, field in (
        ({}, "verdict"),
        ({"verdict": "right", "fix": "So and\u00a0 so."}, "fix"),
        ({"verdict": "right", "fix": "  "}, "fix"),
        ({"verdict": "right", "fix": "a\x00b"}, "fix"),
        ({"verdict": "right", "remark": "half \ud800"}, "remark"),
        ({"verdict": "right", "remark": "x" * 1_000_001}, "remark"),
    ):
        with pytest.raises(AnswerRefused) as refused:
            await desk.submit(lease, **answers)
        assert refused.value.field == field
    assert await desk.column("SELECT count(*) FROM feedback.feedback_event") == [0]
    assert await desk.column(HISTORY) == ["queued", "claimed ada"]
    assert await desk.submit(lease, verdict="right")


@at_desk
async def test_an_output_that_was_voted_down_does_not_become_golden_uncorrected(desk: Desk) -> None:
    queue = await filled(desk)
    await desk.feedback("i000", "thumb", score=0)
    lease = (await desk.claim(queue)).lease
    with pytest.raises(AnswerRefused) as refused:
        await desk.submit(lease, verdict="right", gold=True)
    assert refused.value.field == "gold"
    assert await desk.submit(lease, verdict="right", gold=True, fix="Better.")


@at_desk
async def test_skip_later_puts_the_item_last_for_this_reviewer(desk: Desk) -> None:
    queue = await filled(desk, 3)
    order = []
    for _ in range(3):
        work = await desk.claim(queue)
        order.append(work.lease.item_id)
        await skip(desk.review, reviewer(), work.lease, "need coffee", "later")
    assert len(set(order)) == 3
    # All were put off: the one put off first comes back first.
    assert (await desk.claim(queue)).lease.item_id == order[0]
    others = (await desk.claim(queue, "bob")).lease.item_id
    assert others == order[1]


@at_desk
async def test_skip_others_hides_the_item_from_this_reviewer_only(desk: Desk) -> None:
    queue = await filled(desk)
    lease = (await desk.claim(queue)).lease
    await skip(desk.review, reviewer(), lease, "my own answer", "others")
    assert await claim(desk.review, queue.queue_id, reviewer()) is None
    assert (await desk.claim(queue, "bob")).lease.item_id == lease.item_id
    (event,) = await desk.rows("SELECT mode, reason FROM feedback.review_event WHERE act = 'skipped'")
    assert event == {"mode": "others", "reason": "my own answer"}


@at_desk
async def test_cannot_judge_uses_the_slot_up(desk: Desk) -> None:
    queue = await filled(desk, overlap=2)
    lease = (await desk.claim(queue)).lease
    await skip(desk.review, reviewer(), lease, "no idea", "cannot_judge")
    with pytest.raises(LostLease):
        await desk.submit(lease, verdict="right")
    assert await claim(desk.review, queue.queue_id, reviewer()) is None
    await skip(
        desk.review, reviewer("bob"), (await desk.claim(queue, "bob")).lease, "no idea", "cannot_judge"
    )
    assert await desk.column("SELECT state FROM feedback.review_item") == ["skipped"]
    assert await desk.column("SELECT count(*) FROM feedback.feedback_event") == [0]


@at_desk
async def test_a_skip_needs_a_reason_and_a_known_mode(desk: Desk) -> None:
    lease = (await desk.claim(await filled(desk))).lease
    for reason, mode, field in (
        ("", "later", "reason"),
        ("x" * 1001, "later", "reason"),
        ("a\0b", "later", "reason"),
        ("half \ud800", "later", "reason"),
        ("x", "never", "mode"),
    ):
        with pytest.raises(AnswerRefused) as refused:
            await skip(desk.review, reviewer(), lease, reason, mode)  # type: ignore[arg-type]
        assert refused.value.field == field


@at_desk
async def test_a_blind_queue_shows_nothing_of_others_until_ones_own_answers_are_in(desk: Desk) -> None:
    queue = await filled(desk, overlap=2, blind=True)
    await desk.feedback("i000", "thumb", score=0)
    ada = await desk.claim(queue)
    assert (ada.feedback, ada.why, ada.control) == ((), (), None)
    assert set(ada.interaction) == {
        "interaction_id",
        "session_id",
        "occurred_at",
        "messages",
        "output",
        "retrieved",
        "train_ok",
    }
    item_id = ada.lease.item_id
    with pytest.raises(NotYet):
        await reviewed(desk.review, reviewer(), item_id)
    await desk.submit(ada.lease, verdict="right")
    seen = await reviewed(desk.review, reviewer(), item_id)
    assert [response.reviewer for response in seen.responses] == ["ada"]
    assert seen.control and "model" in seen.interaction and len(seen.feedback) == 2
    bob = await desk.claim(queue, "bob")
    assert bob.feedback == ()
    with pytest.raises(NotYet):
        await reviewed(desk.review, reviewer("bob"), item_id)
    with pytest.raises(NoSuchItem):
        await reviewed(desk.review, reviewer("ada", "other"), item_id)
    await desk.submit(bob.lease, "bob", verdict="wrong")
    assert (await reviewed(desk.review, reviewer("eve"), item_id)).differing == ("verdict",)


@at_desk
async def test_an_open_queue_shows_what_others_said(desk: Desk) -> None:
    queue = await filled(desk, overlap=2)
    await desk.submit((await desk.claim(queue)).lease, verdict="right")
    bob = await desk.claim(queue, "bob")
    assert [(said["name"], said["author_role"]) for said in bob.feedback] == [("verdict", "reviewer")]


@at_desk
async def test_an_open_queue_shows_nothing_of_a_blind_one(desk: Desk) -> None:
    blind = await filled(desk, overlap=2, blind=True)
    await desk.feedback("i000", "thumb", score=1)
    lease = (await desk.claim(blind)).lease
    await flag(desk.review, KEY, reviewer(), lease, uuid7(), "unsafe", "")
    await desk.submit(lease, verdict="wrong")
    other = await desk.queue(control_rate=1.0)
    await fill(desk.review, other.queue_id)
    assert [said["kind"] for said in (await desk.claim(other, "bob")).feedback] == ["thumb"]


@at_desk
async def test_a_flag_that_is_sent_again_counts_once(desk: Desk) -> None:
    lease = (await desk.claim(await filled(desk))).lease
    event_id = uuid7()
    for _ in range(3):
        await flag(desk.review, KEY, reviewer(), lease, event_id, "unsafe", " Burns. ")
    for label, note, field in (
        ("other", "Burns.", "label"),
        ("a@b", "", "label"),
        ("x", "half \ud800", "label"),
    ):
        with pytest.raises(AnswerRefused) as refused:
            await flag(desk.review, KEY, reviewer(), lease, event_id, label, note)
        assert refused.value.field == field
    await flag(desk.review, KEY, reviewer(), lease, uuid7(), "other", "")
    rows = await desk.rows(
        "SELECT label, explanation, author_ref, author_role FROM feedback.feedback_event ORDER BY label"
    )
    author = (pseudonym(reviewers_key(KEY), APP, "ada"), "reviewer")
    assert [tuple(row.values()) for row in rows] == [("other", None, *author), ("unsafe", "Burns.", *author)]
    await expire(desk)
    with pytest.raises(LostLease):
        await flag(desk.review, KEY, reviewer(), lease, uuid7(), "other", "")


@at_desk
async def test_nobody_decides_on_their_own_answers(desk: Desk) -> None:
    queue = await filled(desk, overlap=2)
    for name, verdict in (("ada", "right"), ("bob", "wrong")):
        await desk.submit((await desk.claim(queue, name)).lease, name, verdict=verdict)
    (item_id,) = await to_adjudicate(desk.review, queue.queue_id)
    for name in ("ada", "bob"):
        assert await to_adjudicate(desk.review, queue.queue_id, by=reviewer(name)) == []
        with pytest.raises(OwnAnswers):
            await adjudicate(desk.review, KEY, reviewer(name), item_id, pick=1)
    assert await to_adjudicate(desk.review, queue.queue_id, by=reviewer("eve")) == [item_id]
    assert await desk.column("SELECT state FROM feedback.review_item") == ["to_adjudicate"]
    assert await adjudicate(desk.review, KEY, reviewer("eve"), item_id, pick=1)


@at_desk
async def test_answers_that_differ_wait_for_a_decision_by_picking(desk: Desk) -> None:
    queue = await filled(desk, overlap=2)
    ada, bob = (await desk.claim(queue)).lease, (await desk.claim(queue, "bob")).lease
    await desk.submit(ada, verdict="wrong", fix="Better.", remark="x")
    with pytest.raises(AlreadyDecided):
        await adjudicate(desk.review, KEY, reviewer("eve"), ada.item_id, pick=ada.slot)
    await desk.submit(bob, "bob", verdict="right", remark="y")
    assert await to_adjudicate(desk.review, queue.queue_id) == [ada.item_id]
    with pytest.raises(AnswerRefused):
        await adjudicate(desk.review, KEY, reviewer("eve"), ada.item_id)
    with pytest.raises(AnswerRefused):
        await adjudicate(desk.review, KEY, reviewer("eve"), ada.item_id, pick=3)
    with pytest.raises(NoSuchItem):
        await adjudicate(desk.review, KEY, reviewer("eve", "other"), ada.item_id, pick=1)
    attempts = await asyncio.gather(
        *(adjudicate(desk.review, KEY, reviewer("eve"), ada.item_id, pick=ada.slot) for _ in range(4)),
        return_exceptions=True,
    )
    (ids,) = [done for done in attempts if isinstance(done, list)]
    assert sum(isinstance(failed, AlreadyDecided) for failed in attempts) == 3
    rows = await desk.rows(
        "SELECT name, label, correction FROM feedback.feedback_event WHERE author_role = 'adjudicator'"
        " AND event_id = ANY ($1) ORDER BY name",
        ids,
    )
    assert rows == [
        {"name": "fix", "label": None, "correction": "Better."},
        {"name": "remark", "label": None, "correction": None},
        {"name": "verdict", "label": "wrong", "correction": None},
    ]
    seen = await reviewed(desk.review, reviewer("eve"), ada.item_id)
    assert (seen.state, seen.differing) == ("adjudicated", ("verdict", "fix"))
    assert [(r.slot, r.reviewer) for r in seen.responses] == [
        (0, "eve"),
        (ada.slot, "ada"),
        (bob.slot, "bob"),
    ]
    assert await to_adjudicate(desk.review, queue.queue_id) == []


@at_desk
async def test_a_merged_decision_is_checked_like_a_submission(desk: Desk) -> None:
    queue = await filled(desk, overlap=2)
    for name, verdict in (("ada", "right"), ("bob", "wrong")):
        await desk.submit((await desk.claim(queue, name)).lease, name, verdict=verdict)
    (item_id,) = await to_adjudicate(desk.review, queue.queue_id)
    with pytest.raises(AnswerRefused) as refused:
        await adjudicate(desk.review, KEY, reviewer("eve"), item_id, {"verdict": "perhaps"})
    assert refused.value.field == "verdict"
    ids = await adjudicate(desk.review, KEY, reviewer("eve"), item_id, {"verdict": "wrong", "quality": "1"})
    assert len(ids) == 2


@at_desk
async def test_figures_and_agreement_of_a_queue(desk: Desk) -> None:
    queue = await filled(desk, 12, overlap=2)
    said = [("right", "right")] * 4 + [("wrong", "wrong")] * 4 + [("right", "wrong")] * 2
    for ada, bob in said:
        await desk.submit((await desk.claim(queue)).lease, verdict=ada, quality="3")
        await desk.submit((await desk.claim(queue, "bob")).lease, "bob", verdict=bob)
    await desk.claim(queue)
    for name in ("bob", "eve"):
        work = await desk.claim(queue, name)
        await skip(desk.review, reviewer(name), work.lease, "?", "cannot_judge")
    (status,) = await list_queues(desk.review, APP)
    assert (status.open, status.leased, status.done, status.skipped, status.to_adjudicate) == (1, 1, 8, 0, 2)
    assert status.p90_age_seconds is not None and status.p90_age_seconds >= 0
    # Krippendorff: D_o = 2/10 of pairs, expected from 10 right and 10 wrong.
    assert status.agreement["verdict"] == pytest.approx(1 - (4 / 20) / (2 * 10 * 10 / (20 * 19)))
    assert status.agreement["quality"] is None and status.agreement["gold"] is None
    assert await list_queues(desk.review, "other") == []


@at_desk
async def test_control_estimates_come_from_control_items_alone(desk: Desk) -> None:
    queue = await desk.queue(control_rate=0.5, rubric=(VERDICT, GOLD))
    await save_rule(desk.admin, queue.queue_id, Rule("flag", {}), actor="boss")
    names = [f"i{n:03}" for n in range(120)]
    await desk.interactions(*names)
    for name in names[:30]:
        await desk.feedback(name, "flag", label="bad")
    await fill(desk.review)
    control = set(await desk.column("SELECT interaction_id FROM feedback.review_item WHERE control"))
    wrong = {name for name in names[:30] if name in control}
    few = await control_estimate(desk.review, queue.queue_id, "verdict")
    assert [(e.n, e.rate, e.low, e.waiting) for e in few] == [(0, None, None, len(control))] * 2
    skipped = 0
    while work := await claim(desk.review, queue.queue_id, reviewer()):
        name = work.interaction["interaction_id"]
        if name in control - wrong and not skipped:
            skipped = 1
            await skip(desk.review, reviewer(), work.lease, "?", "cannot_judge")
        else:
            await desk.submit(work.lease, verdict="wrong" if name in names[:30] else "right")
    right, bad = await control_estimate(desk.review, queue.queue_id, "verdict")
    n = len(control) - 1
    assert (bad.label, bad.n, bad.rate, bad.waiting, bad.not_judged) == ("wrong", n, len(wrong) / n, 0, 1)
    assert bad.low is not None and bad.high is not None and bad.low < len(wrong) / n < bad.high
    assert right.rate == pytest.approx(1 - len(wrong) / n)
    # Nobody answered the optional question.
    yes, no = await control_estimate(desk.review, queue.queue_id, "gold")
    assert (yes.n, no.n, yes.not_judged) == (0, 0, len(control))
    with pytest.raises(ValueError, match="no question"):
        await control_estimate(desk.review, queue.queue_id, "other")


@at_desk
async def test_an_adjudicated_answer_is_what_the_estimate_counts(desk: Desk) -> None:
    queue = await filled(desk, 30, overlap=2)
    for _ in range(30):
        await desk.submit((await desk.claim(queue)).lease, verdict="right")
        await desk.submit((await desk.claim(queue, "bob")).lease, "bob", verdict="wrong")
    waiting = await to_adjudicate(desk.review, queue.queue_id)
    assert (await control_estimate(desk.review, queue.queue_id, "verdict"))[0].waiting == 30
    for number, item_id in enumerate(waiting):
        await adjudicate(
            desk.review, KEY, reviewer("eve"), item_id, {"verdict": "wrong" if number else "right"}
        )
    right, wrong = await control_estimate(desk.review, queue.queue_id, "verdict")
    assert (right.n, right.rate, wrong.rate) == (30, 1 / 30, 29 / 30)


@at_desk
async def test_a_closed_queue_hands_nothing_out_but_lets_work_be_finished(desk: Desk) -> None:
    queue = await filled(desk, 2)
    work = await desk.claim(queue)
    await close_queue(desk.admin, queue.queue_id, actor="boss")
    assert await claim(desk.review, queue.queue_id, reviewer("bob")) is None
    assert await desk.claim(queue) is not None
    assert await desk.submit(work.lease, verdict="right")
    assert await claim(desk.review, queue.queue_id, reviewer()) is None


@at_desk
async def test_queues_of_other_apps_do_not_exist(desk: Desk) -> None:
    queue = await filled(desk)
    for queue_id, app in ((queue.queue_id, "other"), (uuid7(), APP)):
        with pytest.raises(NoSuchQueue):
            await claim(desk.review, queue_id, reviewer("ada", app))


@at_desk
async def test_an_interaction_that_is_erased_takes_its_review_with_it(desk: Desk) -> None:
    queue = await filled(desk, 2)
    lease = (await desk.claim(queue)).lease
    async with await psycopg.AsyncConnection.connect(desk.database.url) as owner:
        await owner.execute("DELETE FROM feedback.interaction")
    with pytest.raises(LostLease):
        await desk.submit(lease, verdict="right")
    assert await claim(desk.review, queue.queue_id, reviewer()) is None
    for table in ("review_item", "review_slot", "review_event"):
        assert await desk.column(f"SELECT count(*) FROM feedback.{table}") == [0]


@at_desk
async def test_settings_that_make_no_sense_are_refused(desk: Desk) -> None:
    for changes, field in (
        ({"name": " "}, "name"),
        ({"description": "a\0b"}, "description"),
        ({"overlap": 0}, "overlap"),
        ({"overlap": 21}, "overlap"),
        ({"lease_seconds": 0}, "lease_seconds"),
        ({"control_rate": 1.5}, "control_rate"),
        ({"control_rate": float("nan")}, "control_rate"),
        ({"window_days": 0}, "window_days"),
        ({"rubric": ()}, "rubric"),
        ({"rubric": (*RUBRIC, VERDICT)}, "rubric[5].name"),
        ({"rubric": (Question("a@b", "text", "t"),)}, "rubric[0].name"),
        ({"rubric": (Question("a", "choice", "t", ("one",)),)}, "rubric[0].options"),
    ):
        with pytest.raises(RubricRefused) as refused:
            await desk.queue(**changes)
        assert refused.value.field == field
    assert await list_queues(desk.review) == []


def test_without_a_database_everything_can_be_tried_again_later() -> None:
    async def run() -> None:
        pool = await log.connect("postgresql://127.0.0.1:1/none", REVIEW_ROLE, size=1)
        with pytest.raises(log.Unavailable):
            await list_queues(pool)
        with pytest.raises(log.Unavailable):
            await release(pool, reviewer(), Lease(uuid7(), 1, 1, datetime.now(UTC)))
        await log.close(pool)

    asyncio.run(run())
