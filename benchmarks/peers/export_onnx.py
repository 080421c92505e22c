"""Write a model folder as ONNX, in the layout fastembed reads: `export_onnx.py MODEL TARGET`, in the onnx environment."""

import json
import sys
from pathlib import Path


def main(model: str, target: str) -> None:
    """Export, then give the copy the length that the model's own folder asks for."""
    from sentence_transformers import SentenceTransformer

    opened = SentenceTransformer(model, backend="onnx", device="cpu", local_files_only=True)
    opened.save_pretrained(target)
    # fastembed takes the shorter of two lengths in this file; one of them is a left-over of the model's training.
    path = Path(target) / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(config | {"max_length": opened.max_seq_length}), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
