"""A rubric: the questions of a queue, which answers to them are valid, and what an answer says in the log.

Belongs here: the shape of questions, checking a rubric and answers, answer to event and back. Pure.
Does not belong here: who may answer when (``feedback.review.submissions``).
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import msgspec

from feedback.payloads import PayloadError, parse_event

QuestionKind = Literal["choice", "score", "text", "correction", "golden"]

GOLDEN, NOT_GOLDEN = "golden", "not_golden"
MAX_QUESTIONS, MAX_OPTIONS = 50, 100
MAX_TITLE = 1_000
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


class Refused(ValueError):
    """Something given that makes no sense: which field, which rule it breaks, what to do instead."""

    def __init__(self, field: str, rule: str, remedy: str) -> None:
        super().__init__(f"{field}: {rule}. {remedy}")
        self.field, self.rule, self.remedy = field, rule, remedy


class RubricRefused(Refused):
    """A rubric or a queue setting that makes no sense; ``field`` is a path such as ``rubric[1].options``."""


class AnswerRefused(Refused):
    """An answer that cannot be accepted; ``field`` is the name of its question."""


@dataclass(frozen=True)
class Question:
    """One question, and how it is answered.

    choice: one of ``options``, as text. score: one of ``options``, worst first, or without options a number from
    0 to 1. text: free text. correction: the right answer, as text that differs from the output. golden: true to
    make the case a golden one (its expected answer is the correction if there is one, else the output).
    """

    name: str
    kind: QuestionKind
    title: str
    options: tuple[str, ...] = ()
    required: bool = False


def check_rubric(questions: Sequence[Question]) -> None:
    """Raise RubricRefused unless reviewers can answer these questions and the log can hold the answers."""
    if not 1 <= len(questions) <= MAX_QUESTIONS:
        raise RubricRefused("rubric", f"has {len(questions)} questions", f"Ask 1 to {MAX_QUESTIONS}")
    for index, question in enumerate(questions):
        field = f"rubric[{index}]"
        if any(question.name == other.name for other in questions[:index]):
            raise RubricRefused(f"{field}.name", f"{question.name!r} comes twice", "Name each question once")
        if question.kind not in get_args(QuestionKind):
            raise RubricRefused(
                f"{field}.kind",
                f"{question.kind!r} is unknown",
                f"Use one of: {', '.join(get_args(QuestionKind))}",
            )
        if not is_text(question.title, MAX_TITLE):
            raise RubricRefused(
                f"{field}.title",
                "is empty or too long",
                f"Write the question out, in up to {MAX_TITLE} characters",
            )
        _check_options(question, f"{field}.options")
        examples: Sequence[Any] = question.options or {"score": (0.5,), "golden": (True,)}.get(
            question.kind, ("text",)
        )
        for example in examples:
            try:
                parse_event(json.dumps(event_of(question, example) | {"interaction_id": "i"}).encode())
            except PayloadError as error:
                part = "options" if error.field == "label" and question.options else "name"
                raise RubricRefused(
                    f"{field}.{part}", error.message, "Leave out @ and long numbers; 1 to 200 characters"
                ) from None
    for kind in ("correction", "golden"):
        if sum(question.kind == kind for question in questions) > 1:
            raise RubricRefused("rubric", f"has two questions of kind {kind}", "Ask for it once")


def check_answers(
    rubric: Sequence[Question], answers: Mapping[str, Any], *, output: str | None, disliked: bool = False
) -> dict[str, Any]:
    """The given answers in the rubric's order; what was not answered (None, a blank text or choice) is left out.

    ``output`` is what the model said; ``disliked`` whether a person's vote against it stands. A correction is given
    unless it is None: a blank one is refused, so is one that repeats the output. Raises AnswerRefused.
    """
    known = {question.name for question in rubric}
    for name in answers:
        if name not in known:
            raise AnswerRefused(str(name), "is no question of this queue", "Reload the page")
    given: dict[str, Any] = {}
    for question in rubric:
        answer = answers.get(question.name)
        if isinstance(answer, str) and not answer.strip() and question.kind != "correction":
            answer = None
        if answer is not None:
            given[question.name] = _checked(question, answer, output)
        elif question.required:
            raise AnswerRefused(question.name, "is required", "Answer it, or skip the item with a reason")
    if not given:
        raise AnswerRefused("answers", "are empty", "Answer a question, or skip the item with a reason")
    _check_golden(rubric, given, output, disliked)
    return given


def event_of(question: Question, answer: Any) -> dict[str, Any]:
    """What a valid answer says in the log: kind, name and content of a feedback event."""
    event: dict[str, Any] = {"name": question.name}
    if question.kind == "choice":
        return event | {"kind": "category", "label": answer}
    if question.kind == "score" and question.options:
        score = question.options.index(answer) / (len(question.options) - 1)
        return event | {"kind": "rating", "score": score, "label": answer}
    if question.kind == "score":
        return event | {"kind": "rating", "score": answer}
    if question.kind == "text":
        return event | {"kind": "comment", "explanation": answer}
    if question.kind == "correction":
        return event | {"kind": "correction", "correction": answer}
    return event | {"kind": "category", "label": GOLDEN if answer else NOT_GOLDEN}


def answer_of(question: Question, event: Mapping[str, Any]) -> Any:
    """The answer that an event of ``event_of`` was made from."""
    if question.kind == "text":
        return event["explanation"]
    if question.kind == "correction":
        return event["correction"]
    if question.kind == "golden":
        return event["label"] == GOLDEN
    return event["label"] if question.options else event["score"]


def differing(rubric: Sequence[Question], responses: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the questions on which several people's answers differ.

    Remarks are never compared. An unanswered choice or score is no answer, so it does not differ; no correction says
    that the output is right, and no word on golden says that it is none.
    """
    names = []
    for question in rubric:
        if question.kind == "text":
            continue
        answers = [response.get(question.name) for response in responses]
        if question.kind == "correction":
            answers = [answer and squeezed(answer) for answer in answers]
        elif question.kind == "golden":
            answers = [bool(answer) for answer in answers]
        else:
            answers = [answer for answer in answers if answer is not None]
        if len(set(answers)) > 1:
            names.append(question.name)
    return tuple(names)


def squeezed(text: str) -> str:
    """The text in Unicode NFC with single spaces: two texts that differ otherwise differ to a reader."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def is_text(text: str, limit: int) -> bool:
    """Whether a text says something, in at most ``limit`` characters, all of which Postgres can hold."""
    return bool(text.strip()) and len(text) <= limit and not _UNSTORABLE.search(text)


def to_json(questions: Sequence[Question]) -> str:
    return json.dumps([asdict(question) for question in questions])


def from_json(text: str) -> tuple[Question, ...]:
    return msgspec.json.decode(text, type=tuple[Question, ...])


def _check_options(question: Question, field: str) -> None:
    if question.kind in ("choice", "score"):
        least = 2 if question.kind == "choice" or question.options else 0
        if not least <= len(question.options) <= MAX_OPTIONS:
            raise RubricRefused(
                field, f"has {len(question.options)} entries", f"Give {least} to {MAX_OPTIONS} options"
            )
        if len(set(question.options)) != len(question.options):
            raise RubricRefused(field, "holds an option twice", "Name each option once")
    elif question.options:
        raise RubricRefused(field, f"do not belong to kind {question.kind}", "Leave options out")


def _checked(question: Question, answer: Any, output: str | None) -> Any:
    if question.kind == "golden":
        if not isinstance(answer, bool):
            raise AnswerRefused(question.name, "is neither true nor false", "Send true or false")
        return answer
    if question.kind == "score" and not question.options:
        if isinstance(answer, bool) or not isinstance(answer, int | float):
            raise AnswerRefused(question.name, "is no number", "Send a number from 0 to 1")
        if not 0 <= answer <= 1:
            raise AnswerRefused(question.name, "is not from 0 to 1", "Send a number from 0 to 1")
        return float(answer)
    if not isinstance(answer, str):
        raise AnswerRefused(question.name, "is no text", "Send a text")
    if question.options and answer not in question.options:
        raise AnswerRefused(
            question.name, f"{answer!r} is not offered", f"Choose one of: {', '.join(question.options)}"
        )
    if question.kind == "correction":
        if not answer.strip():
            raise AnswerRefused(
                question.name, "is empty", "Write the right answer, or leave the correction out"
            )
        if output is not None and squeezed(answer) == squeezed(output):
            raise AnswerRefused(
                question.name,
                "repeats the output unchanged",
                "Change what is wrong, or leave the correction out if nothing is",
            )
    return answer


def _check_golden(
    rubric: Sequence[Question], given: Mapping[str, Any], output: str | None, disliked: bool
) -> None:
    by_kind = {question.kind: question.name for question in rubric}
    golden = by_kind.get("golden")
    if golden is None or not given.get(golden) or by_kind.get("correction") in given:
        return
    remedy = "Write the right answer as a correction, or do not make this case golden"
    if output is None or not output.strip():
        raise AnswerRefused(golden, "there is no output that could be the expected answer", remedy)
    low = any(
        event_of(question, given[question.name])["score"] < 0.5
        for question in rubric
        if question.kind == "score" and question.name in given
    )
    if low or disliked:
        raise AnswerRefused(golden, "an output that was voted down cannot be the expected answer", remedy)
