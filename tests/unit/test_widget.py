"""The element's one file: small, of no other origin, and without a way to turn text into markup or code."""

import gzip
import re
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from feedback import widget

FOLDER = Path(widget.__file__).parent
MAX_PACKED_BYTES = 10 * 1024


@pytest.fixture(scope="module")
def http() -> TestClient:
    # No file needs anything of the service.
    return TestClient(Starlette(routes=widget.routes(None)))  # type: ignore[arg-type]


def test_the_module_is_small(http: TestClient) -> None:
    assert len(gzip.compress(http.get("/widget/feedback.js").content, 9)) <= MAX_PACKED_BYTES


def test_nothing_comes_from_elsewhere_and_no_text_becomes_markup_or_code() -> None:
    for file in FOLDER.iterdir():
        if file.suffix in (".js", ".html", ".css"):
            text = file.read_text(encoding="utf-8")
            # The name space of SVG is a name, which nothing fetches.
            text = text.replace('"http://www.w3.org/2000/svg"', "")
            assert not re.search(r"https?:|[\"'(=]//|@import|url\(|sendBeacon", text), file.name
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc", text
            ), file.name
            assert not re.search(r"\bon[a-z]+=|style=|javascript:", text), file.name


def test_scripts_are_served_without_comments_and_with_the_same_lines() -> None:
    source = (FOLDER / "feedback.js").read_text(encoding="utf-8").splitlines()
    lines = widget.served("feedback.js").decode().splitlines()
    assert len(lines) == len(source)
    dropped = [before for before, after in zip(source, lines, strict=True) if before != after]
    assert dropped and all(line.lstrip().startswith(("//", "/**")) for line in dropped)
    # A comment that ends on a later line would leave its end behind.
    assert all("*/" in line for line in dropped if "/*" in line)


@pytest.mark.parametrize(
    "path", ["/widget/feedback.js", "/widget/demo", "/widget/demo.js", "/widget/demo.css"]
)
def test_files_are_cached_until_they_change(http: TestClient, path: str) -> None:
    packed = http.get(path)
    plain = http.get(path, headers={"Accept-Encoding": "identity"})
    assert packed.status_code == plain.status_code == 200
    assert packed.content == plain.content
    assert packed.headers["content-encoding"] == "gzip" and "content-encoding" not in plain.headers
    assert "max-age=86400" in packed.headers["cache-control"]
    assert packed.headers["etag"] != plain.headers["etag"]
    assert packed.headers["x-content-type-options"] == "nosniff"
    again = http.get(path, headers={"If-None-Match": packed.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert http.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_every_wording_is_there_in_both_languages() -> None:
    source = (FOLDER / "feedback.js").read_text(encoding="utf-8")
    english, german = (
        set(re.findall(r"(\w+): \"", part)) for part in source.partition("const REASONS")[0].split("  de: {")
    )
    assert english == german and len(english) > 20
