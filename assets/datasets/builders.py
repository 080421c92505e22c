"""From signals to training rows: three sets, each signal used or dropped with one counted reason.

What belongs here: the rules that turn votes and corrections into `sft`, `preference` and `kto` rows, as pure
functions. What does not: reading signals, and files, names and statistics of a version (versions).

A correction is read as its author's vote against the answer and for the corrected text, so the three sets
never disagree about an answer.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from assets.datasets.canonical import digest, digest_of_ids, normalise
from assets.datasets.contamination import GoldenQuestions
from assets.datasets.signals import Message, Signal
from assets.datasets.splits import largest_share, place

CODE_VERSION = "1"
"""Raise it with every change of the rules below: it is part of a version's name."""

Kind = Literal["sft", "preference", "kto"]
KINDS: tuple[Kind, ...] = ("sft", "preference", "kto")

# A signal can lose in several places; the count goes to the reason that comes first here.
REASONS = (
    "train_not_ok",
    "source_not_allowed",
    "not_redacted",
    "no_interaction",
    "unsupported_kind",
    "no_prompt",
    "unsupported_prompt",
    "no_completion",
    "no_vote",
    "no_correction",
    "unchanged_correction",
    "in_golden_set",
    "conflict",
    "outvoted",
    "superseded_by_correction",
    "same_text",
    "over_cap",
    "superseded_vote",
    "no_counterpart",
    "negative",
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The parameters of a build; every one is part of the version's name.

    `confidence`: contested answers count when the posterior probability that most people like (or dislike)
    them is at least this. `pairs_per_prompt`: preference pairs kept for one prompt. `validation` and `test`:
    shares of groups, 0 to 1. `salt`: change it only to draw new splits.
    """

    confidence: float = 0.9
    pairs_per_prompt: int = 4
    validation: float = 0.05
    test: float = 0.05
    salt: str = "datamoat"


@dataclass(frozen=True, slots=True)
class Row:
    """One training row: `content` is what the trainer reads, the rest says why the row exists."""

    row_id: str
    split: str
    origin: str
    content: dict[str, Any]
    signal_ids: tuple[str, ...]
    event_ids: tuple[str, ...]
    interaction_ids: tuple[str, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Built:
    """A set before it has files: rows by row id, and where every signal went (used + dropped = signals)."""

    kind: Kind
    recipe: Recipe
    rows: tuple[Row, ...]
    signals: int
    used: int
    dropped: dict[str, int]
    inputs_digest: str
    golden_digest: str
    groups: int
    largest_group_share: float


@dataclass(frozen=True, slots=True)
class _Vote:
    signal: Signal
    prompt: tuple[Message, ...]
    prompt_key: str
    text: str
    positive: bool


@dataclass(frozen=True, slots=True)
class _Answer:
    """One answer to one prompt, with the votes that stand and those their author has taken back."""

    prompt: tuple[Message, ...]
    prompt_key: str
    text: str
    verdict: Literal["up", "down", "conflict"]
    ups: tuple[_Vote, ...]
    downs: tuple[_Vote, ...]
    superseded: tuple[_Vote, ...]


@dataclass(frozen=True, slots=True)
class _Draft:
    origin: str
    content: dict[str, Any]
    signals: tuple[Signal, ...]


_Reasons = list[tuple[Signal, str]]


def build(
    kind: Kind, signals: Iterable[Signal], recipe: Recipe | None = None, golden: Iterable[str] = ()
) -> Built:
    """Rows of one set from all signals; `golden` are the questions that must stay out of training.

    The order of the signals does not matter. Raises ValueError when two signals share an id.
    """
    recipe = recipe or Recipe()
    ordered = sorted(signals, key=lambda signal: signal.signal_id)
    for one, other in itertools.pairwise(ordered):
        if one.signal_id == other.signal_id:
            raise ValueError(
                f"marts.training_signals: signal_id {one.signal_id} comes twice; "
                "the model must give one row per feedback item"
            )
    questions = GoldenQuestions(golden)
    refused = {signal.signal_id: reason for signal in ordered if (reason := unusable(signal, questions))}
    votes = [vote for signal in ordered if signal.signal_id not in refused for vote in _votes(signal)]
    drafts, losses = {"sft": _sft, "preference": _preference, "kto": _kto}[kind](votes, recipe)

    placed = place(ordered, salt=recipe.salt, validation=recipe.validation, test=recipe.test)
    rows = _merge(drafts, placed)
    used = {signal_id for row in rows for signal_id in row.signal_ids}
    dropped = _count_dropped(ordered, used, refused, losses)
    groups = [placed[row.signal_ids[0]][0] for row in rows]
    return Built(
        kind=kind,
        recipe=recipe,
        rows=rows,
        signals=len(ordered),
        used=len(used),
        dropped=dropped,
        inputs_digest=digest_of_ids(signal.fingerprint() for signal in ordered),
        golden_digest=questions.digest,
        groups=len(set(groups)),
        largest_group_share=largest_share(groups),
    )


def unusable(signal: Signal, golden: GoldenQuestions) -> str | None:
    """The reason why a signal can teach nothing in any set, or None."""
    if signal.exclusion_reason is not None:
        return signal.exclusion_reason
    if signal.kind not in ("thumb", "rating", "correction"):
        return "unsupported_kind"
    if signal.prompt is None:
        return "unsupported_prompt"
    if not signal.prompt:
        return "no_prompt"
    if not (signal.completion or "").strip():
        return "no_completion"
    if signal.kind == "correction":
        if not (signal.correction or "").strip():
            return "no_correction"
        if normalise(signal.correction or "") == normalise(signal.completion or ""):
            return "unchanged_correction"
    elif signal.is_positive is None:
        return "no_vote"
    if any(turn["role"] == "user" and golden.repeats(turn["content"]) for turn in signal.prompt):
        return "in_golden_set"
    return None


def probability_mostly_up(ups: int, downs: int) -> float:
    """P(rate > 0.5) under the posterior Beta(1 + ups, 1 + downs), exact: it equals a binomial tail."""
    trials = ups + downs + 1
    favourable = sum(math.comb(trials, successes) for successes in range(ups + 1))
    return favourable / (1 << trials)


def kto_weights(positives: int, negatives: int) -> dict[str, float] | None:
    """Weights for a KTO trainer so that weighted positives to negatives lie between 1:1 and 4:3.

    None when one of the labels is missing: no weight balances that.
    """
    if not positives or not negatives:
        return None
    desirable = undesirable = 1.0
    # The middle of the band (7:6), so that rounding and a few dropped rows do not leave it.
    if positives < negatives:
        desirable = round(negatives / positives * 7 / 6, 4)
    elif 3 * positives > 4 * negatives:
        undesirable = round(positives / negatives * 6 / 7, 4)
    return {"desirable_weight": desirable, "undesirable_weight": undesirable}


def _votes(signal: Signal) -> list[_Vote]:
    prompt, completion = signal.prompt or (), signal.completion or ""
    key = digest(prompt)
    if signal.kind == "correction":
        return [
            _Vote(signal, prompt, key, completion, positive=False),
            _Vote(signal, prompt, key, signal.correction or "", positive=True),
        ]
    return [_Vote(signal, prompt, key, completion, positive=bool(signal.is_positive))]


def _voter(signal: Signal) -> str:
    # Without an author the interaction stands in: one unknown person is never counted twice for one answer.
    if author := signal.author_ref or signal.user_ref:
        return "person:" + author
    return f"interaction:{signal.interaction_id or signal.signal_id}"


def _tally(votes: Iterable[_Vote], confidence: float, *, by_context: bool = False) -> list[_Answer]:
    """Votes by (prompt, text), or by (prompt, context, text); each person's latest vote counts once."""
    ballots: dict[tuple[str, tuple[str, ...], str], dict[str, list[_Vote]]] = {}
    for vote in votes:
        key = (vote.prompt_key, vote.signal.context if by_context else (), vote.text)
        ballots.setdefault(key, {}).setdefault(_voter(vote.signal), []).append(vote)
    answers = []
    for _, people in sorted(ballots.items()):
        standing: list[_Vote] = []
        superseded: list[_Vote] = []
        tally = {True: 0, False: 0}
        for cast_votes in people.values():
            latest = max(cast_votes, key=lambda vote: (vote.signal.occurred_at, vote.signal.signal_id))
            tally[latest.positive] += 1
            for vote in cast_votes:
                (standing if vote.positive == latest.positive else superseded).append(vote)
        first = standing[0]
        answers.append(
            _Answer(
                prompt=first.prompt,
                prompt_key=first.prompt_key,
                text=first.text,
                verdict=_verdict(tally[True], tally[False], confidence),
                ups=tuple(vote for vote in standing if vote.positive),
                downs=tuple(vote for vote in standing if not vote.positive),
                superseded=tuple(superseded),
            )
        )
    return answers


def _verdict(ups: int, downs: int, confidence: float) -> Literal["up", "down", "conflict"]:
    if not downs:
        return "up"
    if not ups:
        return "down"
    probability = probability_mostly_up(ups, downs)
    if probability >= confidence:
        return "up"
    return "down" if 1 - probability >= confidence else "conflict"


def _losses(answer: _Answer) -> _Reasons:
    """The votes that no set can use: taken back, contested or outvoted."""
    lost: _Reasons = [(vote.signal, "superseded_vote") for vote in answer.superseded]
    if answer.verdict == "conflict":
        lost += [(vote.signal, "conflict") for vote in answer.ups + answer.downs]
    else:
        minority = answer.downs if answer.verdict == "up" else answer.ups
        lost += [(vote.signal, "outvoted") for vote in minority]
    return lost


def _assistant(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _signals(votes: Iterable[_Vote]) -> tuple[Signal, ...]:
    return tuple(vote.signal for vote in votes)


def _sft(votes: Sequence[_Vote], recipe: Recipe) -> tuple[list[_Draft], _Reasons]:
    answers = _tally(votes, recipe.confidence)
    by_hand = {
        (answer.prompt_key, answer.text)
        for answer in answers
        if answer.verdict == "up" and any(vote.signal.kind == "correction" for vote in answer.ups)
    }
    prompts_by_hand = {prompt_key for prompt_key, _ in by_hand}
    drafts: list[_Draft] = []
    losses: _Reasons = []
    for answer in answers:
        losses += _losses(answer)
        if answer.verdict == "down":
            losses += [(vote.signal, "negative") for vote in answer.downs]
        elif answer.verdict == "up":
            written = (answer.prompt_key, answer.text) in by_hand
            if not written and answer.prompt_key in prompts_by_hand:
                losses += [(vote.signal, "superseded_by_correction") for vote in answer.ups]
                continue
            content = {"prompt": list(answer.prompt), "completion": _assistant(answer.text)}
            drafts.append(_Draft("correction" if written else "vote", content, _signals(answer.ups)))
    return drafts, losses


def _kto(votes: Sequence[_Vote], recipe: Recipe) -> tuple[list[_Draft], _Reasons]:
    drafts: list[_Draft] = []
    losses: _Reasons = []
    for answer in _tally(votes, recipe.confidence):
        losses += _losses(answer)
        if answer.verdict == "conflict":
            continue
        majority = answer.ups if answer.verdict == "up" else answer.downs
        origin = "correction" if any(vote.signal.kind == "correction" for vote in majority) else "vote"
        content = {
            "prompt": list(answer.prompt),
            "completion": _assistant(answer.text),
            "label": answer.verdict == "up",
        }
        drafts.append(_Draft(origin, content, _signals(majority)))
    return drafts, losses


def _preference(votes: Sequence[_Vote], recipe: Recipe) -> tuple[list[_Draft], _Reasons]:
    answers = _tally(votes, recipe.confidence, by_context=True)
    losses: _Reasons = []
    rejected_texts: set[tuple[str, tuple[str, ...], str]] = set()
    by_prompt: dict[tuple[str, tuple[str, ...]], list[_Answer]] = {}
    for answer in answers:
        losses += _losses(answer)
        context = _context_of(answer)
        by_prompt.setdefault((answer.prompt_key, context), []).append(answer)
        if answer.verdict != "up":
            rejected_texts.add((answer.prompt_key, context, answer.text))

    # (prompt, chosen, rejected) -> what says so; a correction is a comparison by itself, votes need a pair.
    pairs: dict[tuple[str, str, str], list[_Draft]] = {}
    corrections = {vote.signal.signal_id: vote for vote in votes if vote.signal.kind == "correction"}
    for vote in corrections.values():
        signal, chosen, rejected = vote.signal, vote.signal.correction or "", vote.signal.completion or ""
        if (vote.prompt_key, signal.context, chosen) in rejected_texts:
            losses.append((signal, "conflict"))
            continue
        draft = _pair("correction", vote.prompt, chosen, rejected, (signal,))
        pairs.setdefault((vote.prompt_key, chosen, rejected), []).append(draft)
    for group in by_prompt.values():
        voted, lost = _pairs_of_votes(group, recipe.pairs_per_prompt)
        losses += lost
        for key, draft in voted:
            pairs.setdefault(key, []).append(draft)

    candidates: dict[str, list[tuple[bool, str, list[_Draft]]]] = {}
    for (prompt_key, chosen, rejected), drafts in sorted(pairs.items()):
        if (prompt_key, rejected, chosen) in pairs:
            losses += [(signal, "conflict") for draft in drafts for signal in draft.signals]
            continue
        from_votes_only = all(draft.origin == "vote" for draft in drafts)
        candidates.setdefault(prompt_key, []).append((from_votes_only, digest(drafts[0].content), drafts))
    kept: list[_Draft] = []
    for ranked in candidates.values():
        ranked.sort(key=lambda entry: entry[:2])
        for position, (_, _, drafts) in enumerate(ranked):
            if position < recipe.pairs_per_prompt:
                kept += drafts
            else:
                losses += [(signal, "over_cap") for draft in drafts for signal in draft.signals]
    return kept, losses


def _context_of(answer: _Answer) -> tuple[str, ...]:
    return (answer.ups + answer.downs)[0].signal.context


def _pair(
    origin: str, prompt: tuple[Message, ...], chosen: str, rejected: str, signals: tuple[Signal, ...]
) -> _Draft:
    content = {"prompt": list(prompt), "chosen": _assistant(chosen), "rejected": _assistant(rejected)}
    return _Draft(origin, content, signals)


def _pairs_of_votes(
    group: Sequence[_Answer], cap: int
) -> tuple[list[tuple[tuple[str, str, str], _Draft]], _Reasons]:
    """Every liked answer over every disliked one to the same prompt and context, the most voted first."""
    ups = sorted((a for a in group if a.verdict == "up"), key=lambda a: (-len(a.ups), a.text))
    downs = sorted((a for a in group if a.verdict == "down"), key=lambda a: (-len(a.downs), a.text))
    losses: _Reasons = []
    if not ups or not downs:
        losses += [(vote.signal, "no_counterpart") for a in ups for vote in a.ups]
        losses += [(vote.signal, "no_counterpart") for a in downs for vote in a.downs]
        return [], losses
    # Beyond the cap on either side nothing could be kept, and the product would grow with the square.
    losses += [(vote.signal, "over_cap") for a in ups[cap:] for vote in a.ups]
    losses += [(vote.signal, "over_cap") for a in downs[cap:] for vote in a.downs]
    pairs = []
    for up in ups[:cap]:
        for down in downs[:cap]:
            signals = _signals(up.ups + down.downs)
            if normalise(up.text) == normalise(down.text):
                losses += [(signal, "same_text") for signal in signals]
                continue
            draft = _pair("vote", up.prompt, up.text, down.text, signals)
            pairs.append(((up.prompt_key, up.text, down.text), draft))
    return pairs, losses


def _merge(drafts: Iterable[_Draft], placed: dict[str, tuple[str, str]]) -> tuple[Row, ...]:
    """One row per content, provenance united; a correction outranks votes as the origin."""
    merged: dict[str, list[_Draft]] = {}
    for draft in drafts:
        merged.setdefault(digest(draft.content), []).append(draft)
    rows = []
    for row_id, same in sorted(merged.items()):
        signals = {signal.signal_id: signal for draft in same for signal in draft.signals}
        rows.append(
            Row(
                row_id=row_id,
                split=placed[min(signals)][1],
                origin=min(draft.origin for draft in same),
                content=same[0].content,
                signal_ids=tuple(sorted(signals)),
                event_ids=_united(signal.event_ids for signal in signals.values()),
                interaction_ids=_united((s.interaction_id,) for s in signals.values() if s.interaction_id),
                sources=_united(signal.sources for signal in signals.values()),
            )
        )
    return tuple(rows)


def _united(parts: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(sorted({item for part in parts for item in part}))


def _count_dropped(
    signals: Sequence[Signal], used: set[str], refused: dict[str, str], losses: _Reasons
) -> dict[str, int]:
    rank = {reason: position for position, reason in enumerate(REASONS)}
    reasons = dict(refused)
    for signal, reason in losses:
        known = reasons.get(signal.signal_id)
        if known is None or rank[reason] < rank[known]:
            reasons[signal.signal_id] = reason
    counts: dict[str, int] = {}
    for signal in signals:
        if signal.signal_id in used:
            continue
        # A KeyError here is a rule that loses a signal without saying why: never publish such a set.
        reason = reasons[signal.signal_id]
        counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items()))
