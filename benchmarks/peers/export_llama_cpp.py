"""Write a BERT folder as a bf16 GGUF file: `export_llama_cpp.py MODEL TARGET`, in the llama-cpp environment.

Names of tensors and keys are those of the GGUF specification and of gguf-py's table for BERT.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np


def main(model: Path, target: str) -> None:
    """Write header, vocabulary and tensors."""
    import gguf

    config = json.loads((model / "config.json").read_text())
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]

    writer = gguf.GGUFWriter(target, "bert")
    writer.add_name("model")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)

    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece(token) for token in tokens])
    writer.add_token_scores([-1000.0] * len(tokens))
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    )
    writer.add_token_type_count(config.get("type_vocab_size", 2))
    for name, token in (
        ("bos", "[CLS]"),
        ("eos", "[SEP]"),
        ("sep", "[SEP]"),
        ("pad", "[PAD]"),
        ("unk", "[UNK]"),
    ):
        getattr(writer, f"add_{name}_token_id")(vocabulary[token])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_bool("tokenizer.ggml.add_eos_token", True)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config["num_hidden_layers"])
    data = (model / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    for key, entry in json.loads(data[8 : 8 + length]).items():
        known = names.get_name(f"bert.{key.removeprefix('bert.')}", try_suffixes=(".weight", ".bias"))
        known = known or names.get_name(key.removeprefix("bert."), try_suffixes=(".weight", ".bias"))
        if key == "__metadata__" or known is None or entry["dtype"] != "F32":
            continue
        begin, end = entry["data_offsets"]
        values = np.frombuffer(data, np.float32, offset=8 + length + begin, count=(end - begin) // 4)
        values = values.reshape(entry["shape"])
        wide = values.ndim > 1 and "token_types" not in known and "position" not in known
        if wide:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(known, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(known, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def piece(token: str) -> str:
    """A WordPiece token as llama.cpp spells it: what begins a word is marked, what goes on is not."""
    if token.startswith("[") and token.endswith("]"):
        return token
    return token[2:] if token.startswith("##") else "\u2581" + token


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
