"""Rubrics, answers and rules: what is accepted, and every refusal names its field; previews match the builders."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assets.datasets.builders import build
from assets.datasets.canonical import digest
from assets.datasets.signals import Signal
from feedback.ids import uuid7
from feedback.review.leases import Assignment, Lease
from feedback.review.preview import WouldBe, preview
from feedback.review.queues import Queue
from feedback.review.rubric import (
    AnswerRefused,
    Question,
    RubricRefused,
    answer_of,
    check_answers,
    check_rubric,
    differing,
    event_of,
    from_json,
    to_json,
)
from feedback.review.rules import Rule, RuleRefused, checked_params

VERDICT = Question("verdict", "choice", "Right?", ("right", "wrong"), required=True)
QUALITY = Question("quality", "score", "How good?", ("1", "2", "3"))
SHARE = Question("share", "score", "How much?")
REMARK = Question("remark", "text", "Else?")
FIX = Question("fix", "correction", "Correct it")
GOLD = Question("gold", "golden", "Golden?")
RUBRIC = (VERDICT, QUALITY, SHARE, REMARK, FIX, GOLD)


def refused(answers: dict[str, Any], output: str | None = "So.", disliked: bool = False) -> str:
    with pytest.raises(AnswerRefused) as caught:
        check_answers(RUBRIC, answers, output=output, disliked=disliked)
    assert caught.value.rule and caught.value.remedy
    return caught.value.field


def test_what_was_not_answered_is_left_out() -> None:
    given_answers = {"verdict": "right", "quality": None, "remark": "  ", "share": "", "fix": None}
    assert check_answers(RUBRIC, given_answers, output="So.") == {"verdict": "right"}
    full = {"verdict": "wrong", "quality": "2", "share": 1, "remark": " a ", "fix": " b ", "gold": True}
    assert check_answers(RUBRIC, full, output="So.") == full


@pytest.mark.parametrize(
    ("answers", "field"),
    [
        ({"verdict": None}, "verdict"),
        ({"verdict": " "}, "verdict"),
        ({"verdict": "perhaps"}, "verdict"),
        ({"verdict": 1}, "verdict"),
        ({"verdict": ["right"]}, "verdict"),
        ({"quality": "4"}, "quality"),
        ({"quality": 0.5}, "quality"),
        ({"share": 1.1}, "share"),
        ({"share": float("nan")}, "share"),
        ({"share": float("-inf")}, "share"),
        ({"share": 10**5000}, "share"),
        ({"share": True}, "share"),
        ({"share": "0.5"}, "share"),
        ({"remark": {"a": 1}}, "remark"),
        ({"gold": "yes"}, "gold"),
        ({"other": "x"}, "other"),
        ({"fix": ""}, "fix"),
        ({"fix": " \n"}, "fix"),
        ({"fix": "So."}, "fix"),
        ({"fix": "\tSo. "}, "fix"),
        ({"fix": 3}, "fix"),
    ],
)
def test_a_refused_answer_names_its_question(answers: dict[str, Any], field: str) -> None:
    assert refused({"verdict": "right"} | answers) == field


def test_an_untouched_prefill_is_no_correction_in_any_unicode_form() -> None:
    assert refused({"verdict": "wrong", "fix": "Cafe\u0301  au\u00a0lait\n"}, "Caf\u00e9 au lait") == "fix"
    check_answers(RUBRIC, {"verdict": "wrong", "fix": "cafe au lait"}, output="Caf\u00e9 au lait")
    check_answers(RUBRIC, {"verdict": "wrong", "fix": "An answer"}, output=None)


def test_no_answer_at_all_is_refused() -> None:
    with pytest.raises(AnswerRefused) as caught:
        check_answers([REMARK], {"remark": " "}, output="So.")
    assert caught.value.field == "answers"


def test_what_was_disliked_becomes_golden_only_when_corrected() -> None:
    gold = {"verdict": "right", "gold": True}
    assert check_answers(RUBRIC, gold, output="So.")
    assert refused(gold, disliked=True) == "gold"
    assert refused(gold, output=" ") == "gold"
    assert refused(gold, output=None) == "gold"
    assert refused(gold | {"quality": "1"}) == "gold"
    assert refused(gold | {"share": 0.4}) == "gold"
    assert check_answers(RUBRIC, gold | {"quality": "1", "fix": "Thus."}, output="So.", disliked=True)
    assert check_answers(RUBRIC, gold | {"gold": False, "quality": "1"}, output="So.", disliked=True)


@pytest.mark.parametrize(
    ("rubric", "field"),
    [
        ((), "rubric"),
        ((VERDICT,) * 51, "rubric"),
        ((VERDICT, VERDICT), "rubric[1].name"),
        ((FIX, replace(FIX, name="fix2")), "rubric"),
        ((GOLD, replace(GOLD, name="gold2")), "rubric"),
        ((replace(VERDICT, kind="bool"),), "rubric[0].kind"),  # type: ignore[arg-type]
        ((replace(VERDICT, title=" "),), "rubric[0].title"),
        ((replace(REMARK, name=""),), "rubric[0].name"),
        ((replace(REMARK, name="a@b.c"),), "rubric[0].name"),
        ((replace(VERDICT, name="call 0123456789"),), "rubric[0].name"),
        ((replace(VERDICT, options=("a", "a")),), "rubric[0].options"),
        ((replace(VERDICT, options=("a",)),), "rubric[0].options"),
        ((replace(VERDICT, options=("a", "b@c")),), "rubric[0].options"),
        ((replace(VERDICT, options=("a", "")),), "rubric[0].options"),
        ((replace(QUALITY, options=("1",)),), "rubric[0].options"),
        ((replace(REMARK, options=("1", "2")),), "rubric[0].options"),
    ],
)
def test_a_refused_rubric_names_the_place(rubric: tuple[Question, ...], field: str) -> None:
    with pytest.raises(RubricRefused) as caught:
        check_rubric(rubric)
    assert caught.value.field == field


def test_a_rubric_survives_its_json() -> None:
    check_rubric(RUBRIC)
    assert from_json(to_json(RUBRIC)) == RUBRIC


@given(
    st.fixed_dictionaries(
        {"verdict": st.sampled_from(["right", "wrong"])},
        optional={
            "quality": st.sampled_from(["1", "2", "3"]),
            "share": st.floats(0, 1),
            "remark": st.text(min_size=1).filter(str.strip),
            "fix": st.text(min_size=1).filter(lambda text: text.strip() not in ("", "So.")),
            "gold": st.booleans(),
        },
    )
)
def test_an_answer_can_be_read_back_from_its_event(answers: dict[str, Any]) -> None:
    blank = dict.fromkeys(("score", "label", "explanation", "correction"))
    for question in RUBRIC:
        if question.name in answers:
            event = blank | event_of(question, answers[question.name])
            assert event["name"] == question.name
            assert answer_of(question, event) == answers[question.name]


def test_what_counts_as_a_difference() -> None:
    def differ(one: dict[str, Any], other: dict[str, Any]) -> tuple[str, ...]:
        return differing(RUBRIC, [one, other])

    assert differ({"verdict": "right", "remark": "x"}, {"verdict": "right", "remark": "y"}) == ()
    assert differ({"verdict": "right"}, {"verdict": "wrong"}) == ("verdict",)
    assert differ({"quality": "1"}, {}) == ()
    assert differ({"quality": "1"}, {"quality": "2"}) == ("quality",)
    assert differ({"fix": "a b"}, {"fix": " a\nb "}) == ()
    assert differ({"fix": "a"}, {}) == ("fix",)
    assert differ({"gold": False}, {}) == ()
    assert differ({"gold": True}, {}) == ("gold",)
    assert differing(RUBRIC, [{"verdict": "right"}]) == ()


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (Rule("high_score", {}), "kind"),  # type: ignore[arg-type]
        (Rule("low_score", {"above": 1}), "params.above"),
        (Rule("flag", {"below": 1}), "params.below"),
        (Rule("low_score", {"below": 1.5}), "params.below"),
        (Rule("low_score", {"below": "0.5"}), "params.below"),
        (Rule("low_score", {"below": True}), "params.below"),
        (Rule("low_score", {"below": float("nan")}), "params.below"),
        (Rule("flag", {}, sample_rate=-0.1), "sample_rate"),
        (Rule("flag", {}, priority=1_001), "priority"),
        (Rule("flag", {}, priority=1.5), "priority"),  # type: ignore[arg-type]
    ],
)
def test_a_refused_rule_names_its_field(rule: Rule, field: str) -> None:
    with pytest.raises(RuleRefused) as caught:
        checked_params(rule)
    assert caught.value.field == field


def test_parameters_have_defaults() -> None:
    assert checked_params(Rule("low_score", {})) == {"below": 0.5}
    assert checked_params(Rule("rare_cluster", {"share_below": 0})) == {"share_below": 0}


PROMPT = [{"role": "user", "content": "How?"}]
NOW = datetime(2026, 11, 1, tzinfo=UTC)


def assigned(
    output: str | None = "So.", train_ok: bool = True, rubric: tuple[Question, ...] = RUBRIC
) -> Assignment:
    queue = Queue(uuid7(), "q", "a", "", rubric, 1, False, 60, 0.0, 30, NOW, None)
    interaction = {"messages": PROMPT, "output": output, "train_ok": train_ok}
    return Assignment(Lease(uuid4(), 1, 1, NOW), queue, interaction, (), (), False)


def built(output: str | None, answers: dict[str, Any], train_ok: bool) -> dict[str, list[Any]]:
    """What the real builders make of the events that these answers become."""
    signals = []
    for place, question in enumerate(sorted(RUBRIC, key=lambda question: question.kind == "correction")):
        if question.name not in answers:
            continue
        event = event_of(question, answers[question.name])
        if event["kind"] not in ("rating", "correction"):
            continue
        signals.append(
            Signal(
                signal_id=str(uuid4()),
                interaction_id="i",
                event_ids=("e",),
                kind=event["kind"],
                occurred_at=NOW + timedelta(microseconds=place),
                session_id=None,
                user_ref=None,
                author_ref="r",
                prompt=({"role": "user", "content": "How?"},),
                prompt_sha256=digest(PROMPT),
                completion=output,
                correction=event.get("correction"),
                is_positive=None if event["kind"] == "correction" else event["score"] >= 0.5,
                context=(),
                sources=(),
                exclusion_reason=None if train_ok else "train_not_ok",
            )
        )
    golden = ["How?"] if answers.get("gold") else []
    kinds = ("sft", "preference", "kto")
    return {kind: [row.content for row in build(kind, signals, golden=golden).rows] for kind in kinds}  # type: ignore[arg-type]


@given(
    st.sampled_from(["So.", "", None]),
    st.booleans(),
    st.fixed_dictionaries(
        {"verdict": st.just("right")},
        optional={
            "quality": st.sampled_from(["1", "2", "3"]),
            "share": st.sampled_from([0.0, 0.5, 1.0]),
            "fix": st.sampled_from(["Thus.", "so."]),
            "gold": st.booleans(),
        },
    ),
)
def test_the_preview_is_what_the_builders_make(
    output: str | None, train_ok: bool, answers: dict[str, Any]
) -> None:
    rows = preview(assigned(output, train_ok), answers)
    expected = built(output, answers, train_ok)
    for kind in ("sft", "preference", "kto"):
        shown = [row for row in rows if row.set == kind]
        contents = [row.content for row in shown if row.content is not None]
        assert sorted(map(repr, contents)) == sorted(map(repr, expected[kind]))
        assert shown and all((row.content is None) == (row.reason is not None) for row in shown)


def test_the_preview_of_a_golden_case() -> None:
    def golden(answers: dict[str, Any]) -> WouldBe:
        return preview(assigned(), answers)[-1]

    assert golden({}) == WouldBe("golden", None, "no_vote")
    assert golden({"gold": True}) == WouldBe("golden", {"prompt": PROMPT, "expected": "So."})
    assert golden({"gold": True, "quality": "1"}) == WouldBe("golden", None, "refused")
    corrected = golden({"gold": True, "quality": "1", "fix": "Thus."})
    assert corrected == WouldBe("golden", {"prompt": PROMPT, "expected": "Thus."})
    assert {row.set for row in preview(assigned(rubric=(VERDICT,)), {})} == {"sft", "preference", "kto"}


@given(
    st.dictionaries(
        st.sampled_from([q.name for q in RUBRIC] + ["x"]), st.none() | st.text() | st.floats() | st.booleans()
    )
)
def test_a_preview_never_fails(answers: dict[str, Any]) -> None:
    assert preview(assigned(), answers)
