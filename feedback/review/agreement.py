"""Agreement between reviewers beyond chance: 1 is perfect, 0 is what chance gives, below 0 is worse than chance.

Belongs here: Cohen's kappa, Fleiss' kappa, Krippendorff's alpha, as pure functions.
Does not belong here: which answers are compared (``feedback.review.queues``).

All return None when nothing can be said: no items to compare, or answers that never vary, so that chance alone
explains everything.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

Level = Literal["nominal", "ordinal", "interval"]


def cohen_kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> float | None:
    """Two reviewers, one pair of answers per item (Cohen 1960, Educational and Psychological Measurement 20)."""
    n = len(pairs)
    if not n:
        return None
    agreed = sum(one == other for one, other in pairs) / n
    first = Counter(one for one, _ in pairs)
    second = Counter(other for _, other in pairs)
    return _beyond(agreed, sum(first[answer] * second[answer] for answer in first) / n**2)


def fleiss_kappa(counts: Sequence[Mapping[Any, int]]) -> float | None:
    """N reviewers per item, as how often each answer was given (Fleiss 1971, Psychological Bulletin 76).

    Raises ValueError unless every item has the same number of answers, at least two.
    """
    if not counts:
        return None
    sizes = {sum(item.values()) for item in counts}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(
            "Fleiss' kappa needs the same number of answers, two or more, for every item; "
            "with missing answers use krippendorff_alpha"
        )
    n = sizes.pop()
    total: Counter[Any] = Counter()
    for item in counts:
        total.update(item)
    pairs = sum(times * (times - 1) for item in counts for times in item.values())
    agreed = pairs / (len(counts) * n * (n - 1))
    return _beyond(agreed, sum(times**2 for times in total.values()) / (len(counts) * n) ** 2)


def krippendorff_alpha(items: Sequence[Sequence[Any]], level: Level = "nominal") -> float | None:
    """Any number of answers per item, None for a missing one (Krippendorff 2011, Computing alpha-reliability).

    ordinal: answers can be sorted. interval: answers are numbers.
    """
    units = [Counter(answer for answer in item if answer is not None) for item in items]
    units = [unit for unit in units if unit.total() >= 2]
    values: Counter[Any] = Counter()
    for unit in units:
        values.update(unit)
    distance = _distance(level, values)
    observed = sum(_disagreement(unit, distance) / (unit.total() - 1) for unit in units)
    expected = _disagreement(values, distance) / (values.total() - 1) if units else 0.0
    return None if expected == 0 else 1 - observed / expected


def _beyond(agreed: float, by_chance: float) -> float | None:
    return None if by_chance >= 1 else (agreed - by_chance) / (1 - by_chance)


def _disagreement(values: Counter[Any], distance: Callable[[Any, Any], float]) -> float:
    """The distance summed over all ordered pairs of values."""
    return sum(
        times * others * distance(one, other)
        for one, times in values.items()
        for other, others in values.items()
        if one != other
    )


def _distance(level: Level, values: Counter[Any]) -> Callable[[Any, Any], float]:
    """The squared difference between two values, as the level of measurement sees it."""
    if level == "nominal":
        return lambda one, other: 1.0
    if level == "interval":
        return lambda one, other: float(one - other) ** 2
    # Between two grades lie all answers in between, and half of those that got either grade.
    middle: dict[Any, float] = {}
    below = 0
    for value in sorted(values):
        middle[value] = below + values[value] / 2
        below += values[value]
    return lambda one, other: (middle[one] - middle[other]) ** 2
