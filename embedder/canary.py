"""The canary: fixed texts whose vectors prove, at every start, that this machine computes what it should.

Belongs here: the texts, the stored float32 vectors of the default model, and the comparison.
Does not belong here: deciding which engine to run instead.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedder.model import DEFAULT_RELEASE, Model

MIN_COSINE = 0.999

_SENTENCES = (
    "The invoice was paid twice and the customer asks for a refund.",
    "Press and hold the button for five seconds until the light turns green.",
    "Error 0x80070057: the parameter is incorrect (module net/http, line 214).",
    "Die Lieferung kam drei Tage zu spät, die Ware war aber in Ordnung.",
    "SELECT customer_id, sum(amount) FROM orders GROUP BY customer_id HAVING count(*) > 3;",
    "東京の倉庫からの出荷は翌日に届きます。",
    "According to section 4.2, the warranty covers parts and labour for 24 months.",
    "She wrote: “never again”, gave one star, and ordered the same thing a week later.",
)

TEXTS: tuple[str, ...] = (
    "ok",
    "Reset password",
    *_SENTENCES,
    " ".join(_SENTENCES[:2]),
    " ".join(_SENTENCES[2:5]),
    " ".join(_SENTENCES[1:6]),
    " ".join(_SENTENCES),
    " ".join(_SENTENCES[::-1] + _SENTENCES[:3]),
    " ".join(_SENTENCES * 3),
)
"""Sixteen texts from one word to beyond the default model's length, with code, digits and other scripts."""

STORED_FILE = Path(__file__).with_name("canary_vectors.npy")


def stored_vectors(model: Model) -> npt.NDArray[np.float32] | None:
    """float32[16, d] that an exact float32 forward gives for TEXTS, kept for the default model only."""
    if model.release() != DEFAULT_RELEASE:
        return None
    vectors: npt.NDArray[np.float32] = np.load(STORED_FILE)
    return vectors if vectors.shape[1] == model.dimensions else None


def worst_cosine(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> float:
    """The smallest cosine between rows of equal number; -1 when any value is not finite."""
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return -1.0
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float((np.sum(left * right, axis=1) / np.maximum(norms, 1e-12)).min())
