"""What all pages share: templates, security headers, static files, and who may see what.

Belongs here: turning a handler into a route that knows the signed-in person and answers refusals in the right form
(a page for a page, JSON for a script). Does not belong here: any one page.
"""

import asyncio
import functools
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import parse_qsl, quote

import asyncpg
import jinja2
import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from feedback.answers import Error
from feedback.http import Refused, answer, forbidden, read_body
from feedback.log import Unavailable
from feedback.pages.markdown import to_html
from feedback.pages.session import Person, Sessions, check_same_site
from feedback.review.adjudication import AlreadyDecided, NoSuchItem, NotYet, OwnAnswers
from feedback.review.leases import LostLease
from feedback.review.queues import NoSuchQueue
from feedback.review.rubric import AnswerRefused, RubricRefused
from feedback.review.rules import RuleRefused, TooSlow

HERE = Path(__file__).parent
FORM = "application/x-www-form-urlencoded"
# A key and where to go on: who is not signed in yet is given no more room.
MAX_FORM_BYTES = 4096

# Everything comes from this service; scripts and styles from files alone, so that no text can bring its own.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
        " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
}

# What a reader sees of a signal; nothing else tells two of them apart on the page.
_SIGNAL = ("label", "score", "name", "reasons", "explanation", "annotator_kind", "author_role", "correction")

_MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}

# What the functions behind the pages refuse, and how that is said over HTTP.
_REFUSALS: dict[type[Exception], tuple[int, str, str]] = {
    LostLease: (409, "lost_lease", "Take it up again, or go on with the next item; the draft is kept"),
    NoSuchQueue: (404, "not_found", "Choose one of the queues under /review"),
    NoSuchItem: (404, "not_found", "Go on with the next item"),
    NotYet: (409, "not_yet", "Answer it yourself first"),
    AlreadyDecided: (409, "already_decided", "Go on with the next item"),
    OwnAnswers: (409, "own_answers", "Go on with an item that you have not answered"),
    TooSlow: (422, "too_slow", "Save it untried: filling the queue has more time"),
}

P = ParamSpec("P")
T = TypeVar("T")
PageHandler = Callable[[Request, Person], Awaitable[Response]]
CallHandler = Callable[[Person, Any], Awaitable[Any]]


def age(seconds: float | None) -> str:
    """A time span as people say it, in its largest unit."""
    if seconds is None:
        return "–"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def figure(value: Any) -> str:
    """A number with three digits, a list as its members."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def counted(feedback: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], int]]:
    """What was said, each with how often: signals that say the same of the same are one entry, at the first's place."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for number, one in enumerate(feedback):
        said = tuple(str(one[name]) for name in _SIGNAL) if one["kind"] == "implicit" else number
        groups.setdefault(said, []).append(one)
    return [(group[0], len(group)) for group in groups.values()]


_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters |= {
    "formatted": to_html,
    "json": lambda value: json.dumps(value, ensure_ascii=False, indent=2, default=str),
    "day": lambda moment: f"{moment:%Y-%m-%d}",
    "age": age,
    "answering": lambda responses, name: [one for one in responses if name in one.answers],
    "called": lambda name, names: names[name].lower(),
    "figure": figure,
    "counted": counted,
}
_templates.globals["rule_name"] = lambda kind: str(kind).replace("_", " ").capitalize()


def fragment(template: str, **values: Any) -> str:
    """A piece of a page, for a script to put into place; every value in it is escaped."""
    return _templates.get_template(template).render(**values)


async def aside(render: Callable[P, T], *args: P.args, **values: P.kwargs) -> T:
    """``render(...)`` in a thread: for pages with texts of strangers, whose length would keep everybody waiting."""
    call = functools.partial(render, *args, **values)
    return await asyncio.get_running_loop().run_in_executor(_renderers, call)


# Its own, and small: searches, which are slow, have the common one; more at once would only cost memory.
_renderers = ThreadPoolExecutor(2, "render")


def page(template: str, person: Person | None, status: int = 200, **values: Any) -> HTMLResponse:
    return HTMLResponse(fragment(template, person=person, **values), status, HEADERS)


def page_route(
    sessions: Sessions, path: str, handler: PageHandler, *, post: PageHandler | None = None
) -> Route:
    """A page for signed-in people, others are asked to sign in first; ``post`` takes its form."""

    async def endpoint(request: Request) -> Response:
        person: Person | None = None
        try:
            if request.method == "POST":
                check_same_site(request)
            person = await sessions.person(request)
            if person is None:
                wanted = request.url.path if request.method == "POST" else _relative(request)
                return RedirectResponse(f"/login?next={quote(wanted, safe='')}", 303)
            chosen = post if post is not None and request.method == "POST" else handler
            with _said_over_http():
                return await chosen(request, person)
        except (Refused, Unavailable) as error:
            return refusal(error, person)

    return Route(path, endpoint, methods=["GET", "POST"] if post else ["GET"])


def call_route(sessions: Sessions, path: str, shape: Any, handler: CallHandler) -> Route:
    """What a page's script asks for: POST of JSON of type ``shape``, answered with JSON; refusals are JSON too."""
    decoder = msgspec.json.Decoder(shape)

    async def endpoint(request: Request) -> Response:
        check_same_site(request)
        person = await sessions.person(request)
        if person is None:
            raise Refused(401, Error("signed_out", "You are no longer signed in", remedy="Sign in again"))
        try:
            asked = decoder.decode(await read_body(request))
        except (msgspec.DecodeError, RecursionError) as error:
            raise Refused(422, Error("invalid", str(error), remedy="Reload the page")) from None
        with _said_over_http():
            return answer(200, await handler(person, asked), {"Cache-Control": "no-store"})

    return Route(path, endpoint, methods=["POST"])


@contextmanager
def _said_over_http() -> Iterator[None]:
    try:
        yield
    except (AnswerRefused, RubricRefused, RuleRefused) as error:
        raise Refused(422, Error("refused", error.rule, error.field, error.remedy)) from None
    except tuple(_REFUSALS) as error:
        status, code, remedy = _REFUSALS[type(error)]
        raise Refused(status, Error(code, str(error), remedy=remedy)) from None
    except asyncpg.DataError:
        raise Refused(
            422, Error("invalid", "A value is out of the database's range", remedy="Reload the page")
        ) from None


def refusal(error: Refused | Unavailable, person: Person | None) -> Response:
    """The page that says why not, and what to do."""
    if isinstance(error, Unavailable):
        reason = Error(
            "unavailable", "The database does not answer", remedy="Reload in a moment; nothing was changed"
        )
        return page("error.html", person, 503, error=reason)
    response = page("error.html", person, error.status, error=error.error)
    response.headers.update(error.headers or {})
    return response


def require_admin(person: Person) -> None:
    """Raises Refused with 403."""
    if not person.is_admin:
        raise forbidden(
            "Only a key with scope admin may do this", "Sign in with a key that has scopes review and admin"
        )


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a sent form. Raises Refused."""
    body = await read_body(request, (FORM,), most=MAX_FORM_BYTES)
    try:
        return dict(parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=100))
    except ValueError:
        raise Refused(
            400, Error("malformed_form", "The form is not valid UTF-8", remedy="Send it again")
        ) from None


def static_routes(prefix: str, folder: Path) -> list[Route]:
    """One route per file of ``folder``. Browsers ask each time whether it changed; a few hundred bytes."""
    return [_static(f"{prefix}/{file.name}", file) for file in sorted(folder.iterdir()) if file.is_file()]


def _static(path: str, file: Path) -> Route:
    content = file.read_bytes()
    headers = {
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:20]}"',
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",
    }

    async def endpoint(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=_MEDIA_TYPES[file.suffix])

    return Route(path, endpoint)


def _relative(request: Request) -> str:
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")
