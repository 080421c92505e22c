"""An embedding release: a model, and the way texts were cut for it, under one name.

Belongs here: what makes two sets of vectors comparable. Does not belong here: loading or searching them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assets.documents.chunk import CHUNKER


@dataclass(frozen=True)
class Release:
    """One release.

    Attributes:
        name: 16 hex digits naming ``fingerprint``.
        fingerprint: Model digest, tokenizer digest, pooling, prefix, length limit, chunker.
        dimensions: Length of a vector.
        vectors: The embedder's own name for the model's part of the fingerprint.
    """

    name: str
    fingerprint: Mapping[str, Any]
    dimensions: int
    vectors: str

    def folder(self, lake: Path) -> Path:
        """Where the release's vectors lie in the lake."""
        return lake / "embeddings" / "vectors" / self.vectors


def current_release(model: Path | None) -> Release:
    """The release that ``model`` (a folder; None for the installed model) makes with today's chunker."""
    from embedder.model import open_model

    described = open_model(model)
    fingerprint = {**described.fingerprint(), "chunker": CHUNKER}
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
    return Release(digest[:12], fingerprint, described.dimensions, described.release())
