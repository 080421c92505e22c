"""Golden questions kept out of training: a model that has seen the exam cannot be examined.

What belongs here: telling whether a prompt repeats a golden question. What does not: where golden questions
come from (evaluation) and what happens to a hit (builders drop and count it).
"""

from collections import Counter
from collections.abc import Iterable

from assets.datasets.canonical import digest_of_ids, normalise

SHINGLE_WORDS = 5
CONTAINMENT = 0.5


class GoldenQuestions:
    """An index of golden questions.

    A text repeats a question when, case and white space aside, the two are equal, or when the text holds at
    least half of the question's five-word runs. Containment rather than similarity, so that a question
    quoted inside a long prompt is found; questions of fewer than five words only match whole.
    """

    def __init__(self, questions: Iterable[str]) -> None:
        self._questions = sorted({normalise(question) for question in questions} - {""})
        self._exact = set(self._questions)
        self._sizes: dict[int, int] = {}
        self._shingles: dict[str, list[int]] = {}
        for number, question in enumerate(self._questions):
            shingles = _shingles(question)
            self._sizes[number] = len(shingles)
            for shingle in shingles:
                self._shingles.setdefault(shingle, []).append(number)

    @property
    def digest(self) -> str:
        """SHA-256 over the set of normalised questions."""
        return digest_of_ids(self._questions)

    def repeats(self, text: str) -> bool:
        """True when the text repeats one of the questions."""
        normal = normalise(text)
        if normal in self._exact:
            return True
        hits = Counter(number for shingle in _shingles(normal) for number in self._shingles.get(shingle, ()))
        return any(count >= CONTAINMENT * self._sizes[number] for number, count in hits.items())


def _shingles(normal: str) -> set[str]:
    words = normal.split(" ")
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}
