"""A search for the ask page, as the pipeline would provide one."""

from typing import Any

PASSAGES = [
    ("x200#12", "X200 manual", "The warranty covers the motor for **24 months**.", 0.912),
    ("terms#3", "Terms", "<script>document.title='owned'</script> Seals are wear parts.", 0.655),
]


def passages(
    question: str, k: int, mode: str = "hybrid", filter: dict[str, list[str]] | None = None
) -> list[dict[str, Any]]:
    """Two passages of the source ``manuals``; nothing for a question about nothing; what goes wrong when there is no index, or a fault."""
    if "no index" in question:
        raise LookupError("No index is live: run `moat run` first")
    if "fault" in question:
        raise RuntimeError("secret detail")
    if "nothing" in question or "manuals" not in (filter or {}).get("source", ["manuals"]):
        return []
    return [
        {
            "chunk_id": chunk,
            "document_id": f"{title}.pdf",
            "source": "manuals",
            "title": title,
            "body": body,
            "score": score,
        }
        for chunk, title, body, score in PASSAGES[:k]
    ]
