"""The start page, and signing in and out.

Belongs here: ``/``, ``/login``, ``/logout``. Does not belong here: how a session is kept (``feedback.pages.session``).
"""

import re

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from feedback.http import Refused
from feedback.log import Unavailable
from feedback.pages.session import Person, Sessions, check_same_site
from feedback.pages.views import page, page_route, read_form, refusal

START = "/review"
_OWN_PATH = re.compile(r"/(?:[A-Za-z0-9._~%?&=+-][A-Za-z0-9._~%?&=+/-]*)?")


def routes(sessions: Sessions) -> list[Route]:
    async def start(request: Request) -> Response:
        try:
            return page("start.html", await sessions.person(request))
        except Unavailable as error:
            return refusal(error, None)

    async def ask_for_key(request: Request) -> Response:
        return page("login.html", None, next=own_path(request.query_params.get("next", "")), error=None)

    async def sign_in(request: Request) -> Response:
        wanted = START
        try:
            check_same_site(request)
            form = await read_form(request)
            wanted = own_path(form.get("next", ""))
            person = await sessions.sign_in(request, form.get("key", "").strip())
        except Refused as error:
            refused = page("login.html", None, error.status, next=wanted, error=error.error)
            refused.headers.update(error.headers or {})
            return refused
        except Unavailable as error:
            return refusal(error, None)
        response = RedirectResponse(wanted, 303, {"Cache-Control": "no-store"})
        sessions.remember(request, response, person)
        return response

    async def sign_out(_: Request, person: Person) -> Response:
        response = RedirectResponse("/login", 303)
        sessions.forget(response, person)
        return response

    async def no_page(request: Request, _: Person) -> Response:
        return RedirectResponse("/", 303)

    return [
        Route("/", start),
        Route("/login", ask_for_key, methods=["GET"]),
        Route("/login", sign_in, methods=["POST"]),
        page_route(sessions, "/logout", no_page, post=sign_out),
    ]


def own_path(wanted: str) -> str:
    """``wanted`` if it is a path of this service, else the review page: a link cannot send people elsewhere."""
    # Browsers read a second slash, also a backward one, as the start of a host.
    return wanted if _OWN_PATH.fullmatch(wanted) else START
