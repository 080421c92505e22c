"""The feedback element for web pages: one ES module, and a page that shows how to embed it.

Belongs here: serving these files. Does not belong here: tokens (``feedback.tokens``), reading states
(``feedback.state``), or what the element does (``feedback.js``).
"""

import gzip
import hashlib
import re
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from feedback.service import Service

_FOLDER = Path(__file__).parent
_FILES = {
    "/widget/feedback.js": ("feedback.js", "text/javascript"),
    "/widget/demo": ("demo.html", "text/html"),
    "/widget/demo.js": ("demo.js", "text/javascript"),
    "/widget/demo.css": ("demo.css", "text/css"),
}
_HEADERS = {
    # A day without asking, and a week in which the old one may be shown while the new one is fetched.
    "Cache-Control": "public, max-age=86400, stale-while-revalidate=604800",
    "Vary": "Accept-Encoding",
    "X-Content-Type-Options": "nosniff",
    # Modules are fetched with CORS, and the product's own pages are of another origin.
    "Access-Control-Allow-Origin": "*",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
}

_COMMENT_LINE = re.compile(rb"^ *(//|/\*\*).*$", re.MULTILINE)

OPENAPI: dict[str, Any] = {}


def routes(_: Service) -> list[Route]:
    """The files, read and packed once."""
    return [Route(path, _file(*what), methods=["GET"]) for path, what in _FILES.items()]


def served(name: str) -> bytes:
    """What browsers get of a file: of scripts, all but the comments, with the same numbers of lines."""
    content = (_FOLDER / name).read_bytes()
    return _COMMENT_LINE.sub(b"", content) if name.endswith(".js") else content


def _file(name: str, media_type: str) -> Any:
    plain = served(name)
    packed = gzip.compress(plain, 9, mtime=0)
    digest = hashlib.sha256(plain).hexdigest()[:32]

    async def endpoint(request: Request) -> Response:
        zipped = "gzip" in request.headers.get("accept-encoding", "")
        headers = _HEADERS | {"ETag": f'"{digest}{"-gzip" if zipped else ""}"'}
        if digest in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if zipped:
            return Response(packed, 200, headers | {"Content-Encoding": "gzip"}, media_type)
        return Response(plain, 200, headers, media_type)

    return endpoint
