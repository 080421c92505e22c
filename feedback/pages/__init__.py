"""The pages: sign-in, review queues, asking the corpus. Rendered here, with no framework and nothing from elsewhere.

Belongs here: HTML, the scripts behind it, and the session of who is signed in.
Does not belong here: what reviewing means (``feedback.review``), the API of other programs.
"""

from typing import Any

from starlette.routing import Route

from feedback.pages import ask, queues, review, start
from feedback.pages.session import Sessions
from feedback.pages.views import HERE, static_routes
from feedback.service import Service

OPENAPI: dict[str, Any] = {}


def routes(service: Service) -> list[Route]:
    """All pages, what their scripts ask for, and the files they are made of."""
    sessions = Sessions(service)
    return [
        *start.routes(sessions),
        *queues.routes(service, sessions),
        *review.routes(service, sessions),
        *ask.routes(service, sessions),
        *static_routes("/static", HERE / "static"),
    ]
