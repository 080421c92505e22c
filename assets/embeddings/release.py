"""An embedding release: a model, and the way texts were cut for it, under one name.

Belongs here: what makes two sets of vectors comparable. Does not belong here: loading or searching them, or which of
them is live (registry).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assets.documents.chunk import DEFAULT_CHUNKING, Chunking


@dataclass(frozen=True)
class Release:
    """One release.

    Attributes:
        name: 12 hex digits naming ``fingerprint``.
        fingerprint: Model digest, tokenizer digest, pooling, prefix, length limit, chunker.
        dimensions: Length of a vector.
        vectors: The embedder's own name for the model's part of the fingerprint; equal ones may be compared.
        model: Folder of the model; None for the installed one.
        chunking: Whose chunks it embeds.
    """

    name: str
    fingerprint: Mapping[str, Any]
    dimensions: int
    vectors: str
    model: Path | None = None
    chunking: Chunking = DEFAULT_CHUNKING

    def folder(self, lake: Path) -> Path:
        """Where the release's vectors lie in the lake."""
        return lake / "embeddings" / "vectors" / self.vectors


@dataclass(frozen=True)
class Setting:
    """What the settings ask of a release.

    Attributes:
        model: Folder of the model. None: the installed one, or, for a candidate, the live release's.
        chunking: None: the default, or, for a candidate, the live release's.
    """

    model: Path | None = None
    chunking: Chunking | None = None

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return self.model is not None or self.chunking is not None


def current_release(model: Path | None, chunking: Chunking = DEFAULT_CHUNKING) -> Release:
    """The release that ``model`` (a folder; None for the installed model) makes of chunks that today's code cuts.

    Raises:
        EmbedderError: The folder holds no model that can be read.
    """
    from embedder.model import open_model

    described = open_model(model)
    fingerprint = {**described.fingerprint(), "chunker": chunking.name}
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
    return Release(digest[:12], fingerprint, described.dimensions, described.release(), model, chunking)


def vectors_of(fingerprint: Mapping[str, Any]) -> str:
    """``Release.vectors`` of a release whose fingerprint is known, its model's folder perhaps no more."""
    from embedder.model import release_id

    return release_id({name: value for name, value in fingerprint.items() if name != "chunker"})
