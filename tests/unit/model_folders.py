"""Small model folders with random weights, written by transformers as a downloaded model would be."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

NEEDS = "compares with the reference, which the extra `compat` brings"

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    # Random weights of the usual size make every text nearly the same vector; these tell texts apart.
    "initializer_range": 0.3,
}


@cache
def real_text() -> str:
    """40,000 characters of the manual that comes with Python: prose, code and digits, the same in every run."""
    return " ".join(" ".join(topics.topics[name] for name in sorted(topics.topics)).split())[:40_000]


def texts_by_length(tokenizer: Tokenizer, lengths: range | list[int]) -> list[str]:
    """Real texts that have about so many tokens, special ones not counted, each beginning elsewhere."""
    text = real_text()
    ends = [end for _start, end in tokenizer.encode(text, add_special_tokens=False).offsets]
    last = len(ends) - max(lengths) - 1
    starts = [(length * 37) % last for length in lengths]
    return [text[ends[i] : ends[i + n]].strip() or "a" for i, n in zip(starts, lengths, strict=True)]


def write_folder(folder: Path, kind: str, *, head: bool = False, **settings: Any) -> Path:
    """A folder of a tiny 'bert', 'xlm-roberta' or 'mpnet' with random weights; with `head`, a cross-encoder's."""
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    torch = pytest.importorskip("torch", reason=NEEDS)
    tokenizer, ids = _wordpiece(kind) if kind != "xlm-roberta" else _sentencepiece()
    configs = {
        "bert": transformers.BertConfig,
        "xlm-roberta": transformers.XLMRobertaConfig,
        "mpnet": transformers.MPNetConfig,
    }
    config = configs[kind](vocab_size=tokenizer.get_vocab_size(), **{**SHAPE, **ids, **settings})
    torch.manual_seed(7)
    if head:
        config.num_labels = 1
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    else:
        model = transformers.AutoModel.from_config(config)
    with torch.no_grad():  # biases and norms begin as zeros and ones, which would hide that they are left out
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn(parameter.shape) * 0.2
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]")}.get(kind, ("<pad>", "<unk>", "<s>", "</s>"))
    names = zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True)
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": inputs if kind == "bert" else inputs[::2],
            **dict(names),
        },
    )
    return folder


def write_modules(
    folder: Path, pooling: dict[str, Any], *, max_length: int | None, kinds: str = "TPN"
) -> Path:
    """What sentence-transformers adds to a folder; `kinds` are initials of its modules."""
    names = {"T": "Transformer", "P": "Pooling", "N": "Normalize", "D": "Dense"}
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": "" if kind == "T" else f"{number}_{names[kind]}",
            "type": f"sentence_transformers.models.{names[kind]}",
        }
        for number, kind in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    for module in modules[1:]:
        (folder / str(module["path"])).mkdir(exist_ok=True)
    write_json(
        folder / "1_Pooling" / "config.json", {"word_embedding_dimension": SHAPE["hidden_size"], **pooling}
    )
    if max_length is not None:
        write_json(
            folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False}
        )
    return folder


def write_json(path: Path, content: Any) -> None:
    """The file with this content."""
    path.write_text(json.dumps(content), encoding="utf-8")


@cache
def _wordpiece(kind: str) -> tuple[Tokenizer, dict[str, int]]:
    bert = kind == "bert"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if bert else ["<s>", "<pad>", "</s>", "<unk>"]
    begin, end, unknown = ("[CLS]", "[SEP]", "[UNK]") if bert else ("<s>", "</s>", "<unk>")
    tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([real_text()], trainer)
    between = f"{end}" if bert else f"{end} {end}"
    kinds = (":0", ":1") if bert else (":0", ":0")
    tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {between} $B{kinds[1]} {end}{kinds[1]}",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (begin, end)],
    )
    return tokenizer, {"pad_token_id": special.index("[PAD]" if bert else "<pad>")}


@cache
def _sentencepiece() -> tuple[Tokenizer, dict[str, int]]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([real_text()], trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer, {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}
