"""The slow path: any model that sentence-transformers can compute, through its own modules.

Belongs here: opening the folder with sentence-transformers, and running padded batches through its modules.
Does not belong here: tokenising and batches, which are the job's own also for these models.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from embedder.engines import BF16, F32
from embedder.model import Model
from embedder.protocol import EmbedderError
from embedder.tokens import Tokens, pad

Floats = npt.NDArray[np.float32]

# Small batches keep the filler low; a GPU needs larger ones to be busy at all.
CPU_TOKENS, CUDA_TOKENS = 1024, 16_384


def open_engine(
    model: Model, *, device: str, precision: str | None, streams: int | None
) -> SentenceTransformersEngine:
    """The engine on the CPU or one CUDA device, one batch at a time whatever `streams` says.

    `precision` None is float32, which is what these models are compared in. Raises EmbedderError when the
    library is not installed or does not take the folder.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise EmbedderError(
            f"{model.folder} (type {model.config.get('model_type')!r}) needs sentence-transformers, which is not "
            "installed; install the extra with pip install 'datamoat[compat]', or choose another model"
        )
    return SentenceTransformersEngine(model, device, precision or F32)


class SentenceTransformersEngine:
    """Vectors from a SentenceTransformer's own modules, given padded token ids."""

    name = "sentence-transformers"
    streams = 1
    packed = False

    def __init__(self, model: Model, device: str, precision: str) -> None:
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        # A bar would be written into the job's log.
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        dtype = {F32: torch.float32, BF16: torch.bfloat16}[precision]
        try:
            self._modules: Any = SentenceTransformer(
                str(model.folder),
                device=device,
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"dtype": dtype},
            ).eval()
        except Exception as error:  # whatever the libraries raise for a folder they cannot read
            raise EmbedderError(
                f"{model.folder}: sentence-transformers cannot open this folder ({error}); choose another model"
            ) from error
        self._device = device
        self._filler = model.padding_id
        self._lock = threading.Lock()
        self.device = device if device == "cpu" else f"cuda (1 x {torch.cuda.get_device_name(device)})"
        self.precision = precision
        self.token_budget = CPU_TOKENS if device == "cpu" else CUDA_TOKENS

    def encode(self, batches: Iterable[Tokens], take: Callable[[int, Floats], None]) -> None:
        """See `embedder.encode.Engine.encode`."""
        import torch

        with self._lock, torch.inference_mode():
            for number, tokens in enumerate(batches):
                ids = pad(tokens, self._filler).astype(np.int64)
                mask = (np.arange(ids.shape[1]) < tokens.lengths[:, None]).astype(np.int64)
                features = {"input_ids": ids, "attention_mask": mask}
                placed = {name: torch.from_numpy(part).to(self._device) for name, part in features.items()}
                take(number, self._modules(placed)["sentence_embedding"].float().cpu().numpy())
