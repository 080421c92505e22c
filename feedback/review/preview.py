"""What answers would create: the live preview beside the rubric.

Belongs here: the rows that the dataset builders would make of one submission by itself. Pure.
Does not belong here: the builders, which also weigh other people's votes, redact, and know the golden set.
"""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from feedback.review.leases import Assignment
from feedback.review.rubric import AnswerRefused, Question, check_answers, event_of

Set = Literal["sft", "preference", "kto", "golden"]


@dataclass(frozen=True)
class WouldBe:
    """One row: ``content`` as the set would hold it, or None with the ``reason`` why there is none.

    Reasons are those that a dataset's manifest counts by: train_not_ok, no_completion, unchanged_correction,
    in_golden_set, negative, no_counterpart, no_vote; for golden also ``refused``.
    """

    set: Set
    content: Mapping[str, Any] | None
    reason: str | None = None


def preview(assignment: Assignment, answers: Mapping[str, Any]) -> list[WouldBe]:
    """At least one entry for sft, preference and kto each, and one for golden if the queue asks for it.

    A correction speaks for its text and against the output; a score from 0.5 up speaks for the output, a lower one against
    it; of several the last counts. Never raises for incomplete answers: it is called while they are being typed.
    """
    rubric, output = assignment.queue.rubric, assignment.interaction["output"]
    given: dict[str, tuple[Question, Any]] = {}
    for question in rubric:
        if question.kind in ("score", "correction"):
            # One at a time: a question that is not answered yet does not hide what the others would create.
            try:
                answer = check_answers([question], {question.name: answers.get(question.name)}, output=output)
            except AnswerRefused:
                continue
            given[question.kind] = (question, answer[question.name])
    correction = given["correction"][1] if "correction" in given else None
    liked = event_of(*given["score"])["score"] >= 0.5 if "score" in given else None
    wants_golden = [q for q in rubric if q.kind == "golden"]
    golden = bool(wants_golden) and answers.get(wants_golden[0].name) is True
    return [
        *_training(assignment.interaction, correction, liked, golden),
        *([_golden(assignment.interaction, correction, liked, golden)] if wants_golden else []),
    ]


def _training(
    interaction: Mapping[str, Any], correction: str | None, liked: bool | None, golden: bool
) -> list[WouldBe]:
    prompt, output = interaction["messages"], interaction["output"]
    nothing = "no_vote"
    if correction is not None and _normal(correction) == _normal(output or ""):
        correction, nothing = None, "unchanged_correction"
    unusable = None
    if not interaction["train_ok"]:
        unusable = "train_not_ok"
    elif not (output or "").strip():
        unusable = "no_completion"
    elif correction is None and liked is None:
        unusable = nothing
    elif golden:
        unusable = "in_golden_set"
    if unusable is not None:
        return [
            WouldBe("sft", None, unusable),
            WouldBe("preference", None, unusable),
            WouldBe("kto", None, unusable),
        ]

    def completed(text: str, **more: Any) -> Mapping[str, Any]:
        return {"prompt": prompt, "completion": _assistant(text), **more}

    if correction is not None:
        pair = {"prompt": prompt, "chosen": _assistant(correction), "rejected": _assistant(output)}
        return [
            WouldBe("sft", completed(correction)),
            WouldBe("preference", pair),
            WouldBe("kto", completed(correction, label=True)),
            WouldBe("kto", completed(output, label=False)),
        ]
    return [
        WouldBe("sft", completed(output)) if liked else WouldBe("sft", None, "negative"),
        WouldBe("preference", None, "no_counterpart"),
        WouldBe("kto", completed(output, label=liked)),
    ]


def _golden(
    interaction: Mapping[str, Any], correction: str | None, liked: bool | None, golden: bool
) -> WouldBe:
    expected = correction if correction is not None else interaction["output"]
    if not golden:
        return WouldBe("golden", None, "no_vote")
    if not (expected or "").strip() or (correction is None and liked is False):
        return WouldBe("golden", None, "refused")
    return WouldBe("golden", {"prompt": interaction["messages"], "expected": expected})


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _normal(text: str) -> str:
    """As the builders compare: without differences in Unicode compatibility forms, case and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
