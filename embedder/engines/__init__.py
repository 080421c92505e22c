"""The back ends that compute vectors, and which of them serves a model on this machine.

One module an engine; each offers an `open_engine` like the one here, where `device` is 'cpu', 'cuda' or one CUDA
device such as 'cuda:1', and `precision` None means the fastest the device has in hardware. Its heavy library is
imported only when it is opened.

Belongs here: the choice, by name or by what is installed.
Does not belong here: tokenising, choosing batches, checking vectors (see `encode`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from embedder.model import ENCODERS, OTHER, Model
from embedder.protocol import EmbedderError

if TYPE_CHECKING:
    from embedder.encode import Engine

F32 = "f32"
BF16 = "bf16"

OPENVINO = "openvino"
TORCH = "torch"
SENTENCE_TRANSFORMERS = "sentence-transformers"

SUPPORTED = {
    OPENVINO: ENCODERS,
    TORCH: (*ENCODERS, "qwen3"),
    SENTENCE_TRANSFORMERS: (*ENCODERS, "qwen3", OTHER),
}
"""Engine -> architectures it computes."""


def choose(model: Model, name: str, device: str | None, say: Callable[[str], None]) -> tuple[str, str]:
    """(engine, device) for a model; `name` may be 'auto', `device` None. What is slow is said, with the reason.

    Raises EmbedderError for an engine that does not know the model, or a device the engine does not have.
    """
    if name == "auto":
        return _best(model, device, say)
    if name not in SUPPORTED:
        raise EmbedderError(f"unknown engine {name!r}; choose auto, {', '.join(SUPPORTED)}")
    if model.architecture not in SUPPORTED[name]:
        raise EmbedderError(
            f"{model.folder}: the engine {name} does not compute the type {model.config.get('model_type')!r} with "
            f"these settings; choose the engine auto or {SENTENCE_TRANSFORMERS}"
        )
    if name == OPENVINO:
        if device not in (None, "cpu"):
            raise EmbedderError(f"the engine {name} computes on cpu, not on {device}; choose {TORCH}")
        return name, "cpu"
    return name, device or ("cuda" if has_cuda() else "cpu")


def open_engine(
    model: Model,
    name: str,
    *,
    device: str,
    precision: str | None = None,
    streams: int | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> Engine:
    """The engine called `name`, see `choose`. Raises EmbedderError when it cannot be opened here."""
    if name == OPENVINO:
        from embedder.engines import openvino

        return openvino.open_engine(model, device=device, precision=precision, streams=streams)
    if name == TORCH:
        from embedder.engines import torch_packed

        return torch_packed.open_engine(model, device=device, precision=precision, streams=streams, say=say)
    from embedder.engines import sentence_transformers

    return sentence_transformers.open_engine(model, device=device, precision=precision, streams=streams)


def has_cuda() -> bool:
    """Whether torch is installed and sees a CUDA device. Importing torch is left out where there is no driver."""
    # The driver's device files on Linux, and Windows' own inside WSL.
    driver = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))
    if not driver or importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _best(model: Model, device: str | None, say: Callable[[str], None]) -> tuple[str, str]:
    device = device or ("cuda" if has_cuda() else "cpu")
    order = (OPENVINO, TORCH, SENTENCE_TRANSFORMERS) if device == "cpu" else (TORCH, SENTENCE_TRANSFORMERS)
    name = next(engine for engine in order if model.architecture in SUPPORTED[engine])
    if name == SENTENCE_TRANSFORMERS:
        say(
            f"{model.folder} is of the type {model.config.get('model_type')!r} with settings that no engine of ours "
            f"computes: using {SENTENCE_TRANSFORMERS} on {device}, the slow path"
        )
    elif name != order[0]:
        say(f"{model.folder} is of the type {model.config.get('model_type')!r}: using {name} on {device}")
    return name, device
