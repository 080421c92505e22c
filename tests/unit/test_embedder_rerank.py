"""The cross-encoder gives the logits of transformers, for every architecture, length and cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from embedder.model import open_model
from embedder.protocol import EmbedderError
from embedder.rerank import Reranker
from embedder.tokens import open_tokenizer
from tests.unit.model_folders import NEEDS, texts_by_length, write_folder, write_json

QUERY = "How are passages found by their words and by their vectors?"
LONGEST = 64

SETTINGS: dict[str, dict[str, Any]] = {
    "bert": {"max_position_embeddings": LONGEST},
    "xlm-roberta": {"max_position_embeddings": LONGEST + 2},
    "mpnet": {"max_position_embeddings": LONGEST + 2},
}


def reference(folder: Path, query: str, passages: list[str]) -> npt.NDArray[np.float32]:
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    torch = pytest.importorskip("torch", reason=NEEDS)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found: list[float] = []
    with torch.inference_mode():
        for passage in passages:
            features = tokenizer(
                query, passage, truncation="longest_first", max_length=LONGEST, return_tensors="pt"
            )
            found.append(float(model(**features).logits[0, 0]))
    return np.array(found, np.float32)


@pytest.mark.parametrize("kind", SETTINGS)
def test_scores_are_the_logits_of_the_reference(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path, kind, head=True, **SETTINGS[kind])
    passages = texts_by_length(open_tokenizer(tmp_path / "tokenizer.json"), [*range(1, LONGEST + 8, 3), 400])
    reranker = Reranker.open(tmp_path, precision="f32", streams=2)
    # The second query is the longer text of most pairs, so that it is the one to be cut.
    for query in (QUERY, passages[-1]):
        expected = reference(tmp_path, query, passages)
        assert np.ptp(expected) > 0.5
        found = reranker.scores(query, passages)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2e-4 * max(1.0, float(np.abs(expected).max())))
    assert reranker.scores(QUERY, []).shape == (0,)
    with pytest.raises(EmbedderError, match="tokenizer refused the query or a passage"):
        reranker.scores(QUERY, ["good", "\ud800"])


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "bert", "id2label": {"0": "A", "1": "B"}}, "has 2 labels"),
        ({"model_type": "bert"}, "has 2 labels"),
        ({"model_type": "deberta-v2"}, "'deberta-v2' with these settings is not one of bert"),
        ({"model_type": "bert", "hidden_act": "gelu_new"}, "is not one of bert"),
        ({"model_type": "bert", "id2label": {"0": "A"}}, "model.safetensors cannot be read"),
    ],
)
def test_a_folder_that_is_no_cross_encoder_is_refused(
    tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    write_json(tmp_path / "config.json", {**shape, **config})
    open_tokenizer(open_model().folder / "tokenizer.json").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(EmbedderError, match=r"; (choose|download)") as caught:
        Reranker.open(tmp_path)
    assert says in str(caught.value)
