"""Markdown of strangers: formatted where it can be, and never a tag or an address that is not ours."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.pages.markdown import MAX_FORMATTED, to_html
from feedback.pages.start import own_path

OURS = re.compile(
    r"</?(?:p|pre|code|strong|em|hr|br|blockquote|ul|ol|li|table|thead|tbody|tr|th|td)>"
    r'|<p class="h[1-6]">|<ol start="\d+">|</a>'
    r'|<a href="https?://[^\s"<>]*" title="https?://[^\s"<>]*" target="_blank" rel="noopener noreferrer nofollow">'
)


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("plain", "<p>plain</p>"),
        ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
        ("## Title ##", '<p class="h2">Title</p>'),
        ("a **b** *c* _d_ `e*f*`", "<p>a <strong>b</strong> <em>c</em> <em>d</em> <code>e*f*</code></p>"),
        ("2 * 3 * 4 and snake_case_name", "<p>2 * 3 * 4 and snake_case_name</p>"),
        ("- a\n- b\n  - c", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>"),
        ("- a\n  b\n\n  c", "<ul><li>a\nb<p>c</p></li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("> a\n> b", "<blockquote><p>a\nb</p></blockquote>"),
        ("---", "<hr>"),
        ("```py\n<b>\n```", "<pre>&lt;b&gt;</pre>"),
        ("```\nnever closed", "<pre>never closed</pre>"),
        (
            "| a | b |\n|---|:-:|\n| 1 | 2 | 3 |",
            "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>",
        ),
        ('{"b":1}', "<pre>{\n  &quot;b&quot;: 1\n}</pre>"),
        ('{"b":', "<p>{&quot;b&quot;:</p>"),
        ("", ""),
    ],
)
def test_what_models_write_is_laid_out(text: str, html: str) -> None:
    assert to_html(text) == html


def test_links_lead_to_the_web_alone_and_show_where() -> None:
    assert to_html("[x](https://a.example/b?c=1&d)") == (
        '<p><a href="https://a.example/b?c=1&amp;d" title="https://a.example/b?c=1&amp;d" target="_blank"'
        ' rel="noopener noreferrer nofollow">x</a></p>'
    )
    assert ">https://a.example</a>.</p>" in to_html("see https://a.example.")
    for address in ("javascript:x", "data:text/html,x", "//a.example", "/login", "ftp://a", " https://a"):
        assert "<a" not in to_html(f"[x]({address})").replace('<a href="https://a"', ""), address


HOSTILE = st.one_of(
    st.text(alphabet="<>&\"'`*_#-|>[]()!:\\/\n\t ab1.https://", max_size=200),
    st.text(max_size=200),
    st.lists(
        st.sampled_from(
            [
                "<script>",
                "](javascript:x)",
                "![a](https://b)",
                "```",
                "> ",
                "- ",
                "|-|-|",
                "|",
                '"onx="',
                "**",
                "\n",
                "https://a/'\"",
            ]
        )
    ).map("".join),
)


@given(HOSTILE)
def test_no_tag_comes_from_the_text(text: str) -> None:
    rest = OURS.sub("", to_html(text))
    assert "<" not in rest and ">" not in rest


@given(st.text(max_size=300))
def test_no_word_is_lost(text: str) -> None:
    html = re.sub(r"<[^>]*>", " ", to_html(text))
    for word in re.findall(r"[A-Za-z]{3,}", text):
        assert word in html


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text",
    [
        *(
            "*" * 100_000,
            "_a" * 50_000,
            "[" * 100_000,
            "`" * 100_001,
            " " * 100_000 + "|x\n" + " " * 50_000 + "|-",
        ),
        *(
            "> " * 50_000,
            "- " * 50_000,
            "**a" * 30_000,
            "|" * 60_000 + "\n|-|",
            "[a](https://" * 8_000,
            "\n" * 100_000,
        ),
        *("[[" * 5_000 + "1", '{"a":' * 20_000, "x" * (MAX_FORMATTED + 1)),
    ],
    ids=lambda text: text[:8].strip() or "space",
)
def test_no_text_keeps_the_page_waiting(text: str) -> None:
    # Quadratic work on these would take minutes.
    assert to_html(text).startswith("<") or not text.strip()


@pytest.mark.parametrize("depth", [20, 100, 800])
def test_json_does_not_grow_without_bound(depth: int) -> None:
    text = "[" * depth + "0," * 90_000 + "0" + "]" * depth
    assert to_html(text) == f"<pre>{text}</pre>"


def test_own_paths_stay_here() -> None:
    for path in ("/", "/review", "/review/0190-a/rules", "/ask?x=1"):
        assert own_path(path) == path
    for path in ("//a", "/\\a", "https://a", "review", "/a\nb", "/\x00", "/é"):
        assert own_path(path) == "/review", path
