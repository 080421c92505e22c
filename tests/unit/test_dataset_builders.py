"""The rules of the three training sets, and that no signal is lost without a reason."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assets.datasets.builders import (
    KINDS,
    REASONS,
    Built,
    Kind,
    Recipe,
    build,
    kto_weights,
    probability_mostly_up,
)
from assets.datasets.canonical import digest, normalise
from tests.unit.dataset_strategies import correction, signal, signal_lists


def texts(built: Built, column: str) -> list[str]:
    return sorted(row.content[column][0]["content"] for row in built.rows)


def pairs(built: Built) -> list[tuple[str, str]]:
    return sorted(
        (row.content["chosen"][0]["content"], row.content["rejected"][0]["content"]) for row in built.rows
    )


# --- what holds for every set ---


@settings(deadline=None)
@given(st.sampled_from(KINDS), signal_lists())
def test_every_signal_is_used_or_dropped_for_one_counted_reason(kind: Kind, signals: list[Any]) -> None:
    built = build(kind, signals)
    used = {signal_id for row in built.rows for signal_id in row.signal_ids}
    assert built.used == len(used)
    assert built.used + sum(built.dropped.values()) == built.signals == len(signals)
    assert set(built.dropped) <= set(REASONS)
    by_id = {s.signal_id: s for s in signals}
    assert all(by_id[signal_id].exclusion_reason is None for signal_id in used)


@settings(deadline=None)
@given(st.sampled_from(KINDS), signal_lists(), st.randoms())
def test_order_of_signals_does_not_matter(kind: Kind, signals: list[Any], random: Any) -> None:
    shuffled = list(signals)
    random.shuffle(shuffled)
    assert build(kind, shuffled) == build(kind, signals)


@settings(deadline=None)
@given(st.sampled_from(KINDS), signal_lists())
def test_rows_are_unique_sorted_and_named_by_their_content(kind: Kind, signals: list[Any]) -> None:
    ids = [row.row_id for row in build(kind, signals).rows]
    assert ids == sorted(set(ids))
    assert all(row.row_id == digest(row.content) for row in build(kind, signals).rows)


@settings(deadline=None)
@given(signal_lists())
def test_the_three_sets_never_contradict_each_other(signals: list[Any]) -> None:
    verdicts: dict[tuple[str, str], bool] = {}
    for row in build("kto", signals).rows:
        key = (digest(row.content["prompt"]), row.content["completion"][0]["content"])
        assert key not in verdicts
        verdicts[key] = row.content["label"]
    for row in build("sft", signals).rows:
        key = (digest(row.content["prompt"]), row.content["completion"][0]["content"])
        assert verdicts[key]
    seen = set()
    for row in build("preference", signals).rows:
        prompt = digest(row.content["prompt"])
        chosen, rejected = row.content["chosen"][0]["content"], row.content["rejected"][0]["content"]
        assert normalise(chosen) != normalise(rejected)
        assert (prompt, rejected, chosen) not in seen
        seen.add((prompt, chosen, rejected))


@settings(deadline=None)
@given(signal_lists(), st.sampled_from(KINDS))
def test_a_prompt_is_never_in_two_splits_of_any_sets(signals: list[Any], first: Kind) -> None:
    splits: dict[str, str] = {}
    recipe = Recipe(validation=0.3, test=0.3)
    for kind in (first, *KINDS):
        for row in build(kind, signals, recipe).rows:
            question = normalise(row.content["prompt"][-1]["content"])
            assert splits.setdefault(question, row.split) == row.split


def test_two_signals_with_one_id_are_refused() -> None:
    with pytest.raises(ValueError, match="signal_id a comes twice"):
        build("sft", [signal("a"), signal("b"), signal("a", up=False)])


def test_nothing_gives_an_empty_set() -> None:
    built = build("sft", [])
    assert (built.rows, built.signals, built.used, built.dropped) == ((), 0, 0, {})


@pytest.mark.parametrize(
    ("unusable", "reason"),
    [
        (signal("x", excluded="not_redacted"), "not_redacted"),
        (signal("x", kind="flag"), "unsupported_kind"),
        (signal("x", question=None), "no_prompt"),
        (signal("x", completion=" "), "no_completion"),
        (signal("x", completion=None), "no_completion"),
        (signal("x", up=None), "no_vote"),
        (correction("x", " "), "no_correction"),
        (correction("x", " YES"), "unchanged_correction"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_reasons_that_exclude_from_every_set(kind: Kind, unusable: Any, reason: str) -> None:
    built = build(kind, [unusable])
    assert built.rows == ()
    assert built.dropped == {reason: 1}


def test_prompts_with_tool_calls_are_counted_as_unsupported() -> None:
    assert build("sft", [replace(signal("x"), prompt=None)]).dropped == {"unsupported_prompt": 1}


# --- golden questions ---


@pytest.mark.parametrize(
    "question",
    [
        "How do I reset the password of my account?",
        "  how do i RESET the password of my account? ",
        "Hello! how do i reset the password of my account? I tried twice.",
    ],
)
def test_golden_questions_stay_out_of_training(question: str) -> None:
    golden = ["How do I reset the password of my account?"]
    built = build("sft", [signal("a", question=question), signal("b", question="ping")], golden=golden)
    assert built.dropped == {"in_golden_set": 1}
    assert built.used == 1


def test_short_golden_questions_match_whole_only() -> None:
    signals = [signal("a", question="ping"), signal("b", question="what does ping do")]
    built = build("sft", signals, golden=["Ping"])
    assert [row.signal_ids for row in built.rows] == [("b",)]
    assert build("sft", signals).golden_digest != built.golden_digest


# --- sft ---


def test_sft_teaches_corrections_and_liked_answers() -> None:
    built = build(
        "sft",
        [
            signal("a", question="how?", completion="so"),
            signal("b", question="why?", completion="because", up=False),
            correction("c", "here", question="where?", completion="there"),
        ],
    )
    assert texts(built, "completion") == ["here", "so"]
    assert {row.origin for row in built.rows} == {"vote", "correction"}
    assert built.dropped == {"negative": 1}


def test_sft_prefers_the_correction_of_a_prompt_over_liked_answers() -> None:
    built = build("sft", [signal("a", completion="good"), correction("b", "best", completion="bad")])
    assert texts(built, "completion") == ["best"]
    assert built.dropped == {"superseded_by_correction": 1}


def test_sft_leaves_contested_answers_out() -> None:
    built = build("sft", [signal("a"), signal("b", up=False)])
    assert built.rows == ()
    assert built.dropped == {"conflict": 2}


def test_equal_rows_are_one_row_with_all_its_provenance() -> None:
    built = build(
        "sft",
        [
            signal("a", sources=("handbook",)),
            signal("b", sources=("tickets",)),
            correction("c", "yes", completion="no"),
        ],
    )
    (row,) = built.rows
    assert row.signal_ids == ("a", "b", "c")
    assert row.event_ids == ("e-a", "e-b", "e-c")
    assert row.interaction_ids == ("i-a", "i-b", "i-c")
    assert row.sources == ("handbook", "tickets")
    assert row.origin == "correction"


# --- kto ---


def test_kto_rows_have_one_verdict() -> None:
    built = build(
        "kto",
        [
            signal("a"),
            signal("b"),
            signal("c", completion="no", up=False),
            correction("d", "so", completion="eh"),
        ],
    )
    labels = {row.content["completion"][0]["content"]: row.content["label"] for row in built.rows}
    assert labels == {"yes": True, "no": False, "so": True, "eh": False}


def test_kto_counts_the_latest_vote_of_each_person() -> None:
    built = build(
        "kto",
        [
            signal("a", author="ann", minute=1),
            signal("b", author="ann", minute=2, up=False),
            signal("c", author="bob", up=False),
        ],
    )
    (row,) = built.rows
    assert row.content["label"] is False
    assert row.signal_ids == ("b", "c")
    assert built.dropped == {"superseded_vote": 1}


def test_kto_one_person_cannot_outvote_two_by_voting_often() -> None:
    loud = [signal(f"a{n}", author="ann") for n in range(20)]
    quiet = [signal("b", author="bob", up=False), signal("c", author="cem", up=False)]
    assert build("kto", [*loud, *quiet]).dropped == {"conflict": 22}


def test_kto_settles_conflicts_only_when_the_posterior_is_sure() -> None:
    down = signal("z", up=False)
    three = [signal(f"a{n}") for n in range(3)]
    four = [signal(f"a{n}") for n in range(4)]
    assert build("kto", [*three, down]).dropped == {"conflict": 4}
    built = build("kto", [*four, down, signal("y")])
    assert [row.content["label"] for row in built.rows] == [True]
    assert built.dropped == {"outvoted": 1}
    flipped = build("kto", [signal("z"), *(signal(f"a{n}", up=False) for n in range(5))])
    assert [row.content["label"] for row in flipped.rows] == [False]


def test_unknown_raters_count_once_per_interaction() -> None:
    votes = [replace(signal(f"a{n}", interaction="i"), author_ref=None) for n in range(9)]
    assert build("kto", [*votes, signal("z", up=False)]).dropped == {"conflict": 10}


@pytest.mark.parametrize(
    ("ups", "downs", "expected"), [(0, 0, 0.5), (1, 0, 0.75), (3, 1, 0.8125), (4, 1, 0.890625)]
)
def test_posterior_known_values(ups: int, downs: int, expected: float) -> None:
    assert probability_mostly_up(ups, downs) == expected


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 60), st.integers(0, 60))
def test_posterior_matches_the_beta_integral(ups: int, downs: int) -> None:
    steps = 2_000  # Simpson's rule over the upper half of the density

    def density(rate: float) -> float:
        constant = math.lgamma(ups + downs + 2) - math.lgamma(ups + 1) - math.lgamma(downs + 1)
        return math.exp(constant) * rate**ups * (1 - rate) ** downs

    points = [
        density(0.5 + 0.5 * i / steps) * (1 if i in (0, steps) else 4 if i % 2 else 2)
        for i in range(steps + 1)
    ]
    assert math.isclose(
        probability_mostly_up(ups, downs), sum(points) * 0.5 / steps / 3, rel_tol=1e-6, abs_tol=1e-9
    )


@settings(deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_kto_weights_bring_the_labels_into_the_band(positives: int, negatives: int) -> None:
    weights = kto_weights(positives, negatives)
    assert weights is not None
    ratio = weights["desirable_weight"] * positives / (weights["undesirable_weight"] * negatives)
    assert 1 <= ratio <= 4 / 3 + 1e-12
    assert min(weights.values()) == 1


def test_kto_weights_need_both_labels() -> None:
    assert kto_weights(0, 5) is None
    assert kto_weights(5, 0) is None


# --- preference ---


def test_a_correction_is_preferred_over_what_it_corrects() -> None:
    assert pairs(build("preference", [correction("a", "right", completion="wrong")])) == [("right", "wrong")]


def test_liked_is_preferred_over_disliked_for_the_same_prompt_and_context() -> None:
    votes = [
        signal("a", completion="good", context=("k1",)),
        signal("b", completion="bad", up=False, context=("k1",)),
    ]
    built = build("preference", votes)
    assert pairs(built) == [("good", "bad")]
    assert built.rows[0].signal_ids == ("a", "b")


def test_answers_from_different_contexts_or_prompts_are_not_compared() -> None:
    liked = signal("a", completion="good", context=("k1",))
    for other in (
        signal("b", completion="bad", up=False, context=("k2",)),
        signal("b", completion="bad", up=False, context=("k1",), question="why?"),
    ):
        built = build("preference", [liked, other])
        assert built.rows == ()
        assert built.dropped == {"no_counterpart": 2}


def test_pairs_that_differ_in_white_space_teach_nothing() -> None:
    built = build("preference", [signal("a", completion="yes"), signal("b", completion=" Yes", up=False)])
    assert built.rows == ()
    assert built.dropped == {"same_text": 2}


@pytest.mark.parametrize("context", [(), ("k1",)])
def test_opposite_corrections_cancel_out(context: tuple[str, ...]) -> None:
    opposed = [correction("a", "x", completion="y"), correction("b", "y", completion="x", context=context)]
    built = build("preference", opposed)
    assert built.rows == ()
    assert built.dropped == {"conflict": 2}


def test_a_correction_that_others_dislike_is_not_preferred() -> None:
    built = build(
        "preference", [correction("a", "new", completion="old"), signal("b", completion="new", up=False)]
    )
    assert built.rows == ()
    assert built.dropped == {"conflict": 2}


def test_pairs_per_prompt_are_capped_corrections_first() -> None:
    votes = [signal(f"u{n}", completion=f"good {n}") for n in range(6)]
    votes += [signal(f"d{n}", completion=f"bad {n}", up=False) for n in range(6)]
    fix = correction("c", "best", completion="worst")
    built = build("preference", [*votes, fix], Recipe(pairs_per_prompt=3))
    assert len(built.rows) == 3
    assert ("best", "worst") in pairs(built)
    assert built.used + sum(built.dropped.values()) == 13
    assert set(built.dropped) == {"over_cap"}
