"""The canary: fixed texts whose vectors prove, at every start, that this machine computes what it should.

The stored vectors are made by sentence-transformers in float32, from the default model, with

    python -m embedder.canary

which needs the extra `compat`, and is to be done again only when the texts or the default model change.

Belongs here: the texts, the stored vectors, and the comparison.
Does not belong here: deciding which engine to run instead.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedder.model import DEFAULT_RELEASE, Model, default_folder

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
    "Заказ отправлен утром, но номер отслеживания не работает.",
    "تم استلام الشحنة لكن الفاتورة لم تصل بعد.",
    "Ο πελάτης ζητά αντικατάσταση της μπαταρίας.",
    "我们的退货政策允许在三十天内退款。",
    "고객센터는 평일 오전 아홉 시에 문을 엽니다.",
    "डिलीवरी का समय सुबह दस बजे तय हुआ है।",
    "המכשיר אינו נדלק לאחר העדכון האחרון.",
    "ลูกค้าต้องการเปลี่ยนที่อยู่จัดส่ง",
    "L'écran reste noir ; j'ai déjà redémarré l'appareil trois fois, sans succès.",
    "¿Cuánto cuesta el envío a las islas? ¡No lo encuentro en ninguna parte!",
    "for (int i = 0; i < n; ++i) { total += weights[i] * values[i]; }  // O(n)",
    "GET /v1/search?q=valve%20seal&limit=20 HTTP/1.1 -> 503 Service Unavailable, retry after 30 s",
    "2026-11-20T16:17:38Z WARN disk /dev/sda1 is 91.7 % full, 12,345,678 kB of 13,462,000 kB used",
    "Tighten the M8 bolts crosswise to 25 N·m; torque above 30 N·m cracks the housing (see figure 7-3b).",
    "👍 great service, would buy again 🎉🎉 – 5/5",
    "The patient was given 40 mg of furosemide intravenously, and diuresis began within the hour.",
)

_WORDS = (
    "ok",
    "Reset password",
    "E-4711",
    "¯\\_(ツ)_/¯",
    "价格",
    "über",
    "a b c d e f g h",
    "3.14159265358979",
)

# Longer and longer runs of the sentences, each beginning elsewhere, up to beyond the default model's length.
_RUNS = tuple(
    " ".join(_SENTENCES[(start * 7 + i) % len(_SENTENCES)] for i in range(count))
    for start, count in enumerate((2,) * 12 + (3,) * 9 + (4,) * 5 + (6,) * 3 + (9,) * 2 + (24,))
)

TEXTS: tuple[str, ...] = (*_WORDS, *_SENTENCES, *_RUNS)
"""64 texts from one word to beyond the default model's length, in a dozen scripts, with code and digits."""

STORED_FILE = Path(__file__).with_name("canary_vectors.npy")


def stored_vectors(model: Model) -> npt.NDArray[np.float32] | None:
    """float32[64, d] that an exact float32 forward gives for TEXTS, kept for the default model only."""
    if model.release() != DEFAULT_RELEASE:
        return None
    vectors: npt.NDArray[np.float32] = np.load(STORED_FILE)
    return vectors if vectors.shape == (len(TEXTS), model.dimensions) else None


def worst_cosine(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> float:
    """The smallest cosine between rows of equal number; -1 when any value is not finite."""
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return -1.0
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float((np.sum(left * right, axis=1) / np.maximum(norms, 1e-12)).min())


def reference_vectors(folder: Path, texts: list[str]) -> npt.NDArray[np.float32]:
    """float32[n, d] as sentence-transformers computes them in float32 on the CPU, without any prompt."""
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    vectors: npt.NDArray[np.float32] = reference.encode(texts, prompt="", show_progress_bar=False)
    return vectors


if __name__ == "__main__":
    np.save(STORED_FILE, reference_vectors(default_folder(), list(TEXTS)))
