"""The service as an ASGI app: which rooms it has, and the pages about itself.

Belongs here: putting rooms together, health, the page of the API.
Does not belong here: what a room does, or the process that serves the app (``feedback.server``).
"""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.responses import HTMLResponse

from feedback import capture, log, openapi
from feedback.http import install_errors
from feedback.service import Service

_DOCS = Path(__file__).with_name("docs.html")
_DOCS_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"

# Each room brings its routes, plain Starlette made from the service, and their description.
ROOMS = (capture,)


def create_app(database_url: str, *, pseudonym_key: bytes) -> FastAPI:
    """The service over the database at ``database_url`` (libpq form).

    ``pseudonym_key`` turns people's ids into pseudonyms; with another key the same person looks like another one.
    """
    service = Service(database_url, pseudonym_key)
    app = FastAPI(
        title="Datamoat feedback",
        description=openapi.DESCRIPTION,
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=service.lifespan,
        # Exception texts can hold what people wrote; nothing is exported, whatever the environment asks for.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    install_errors(app)
    paths: dict[str, Any] = {}
    for room in ROOMS:
        app.router.routes.extend(room.routes(service))
        paths |= room.OPENAPI
    docs = _DOCS.read_text(encoding="utf-8")

    @app.get("/healthz", summary="Is the process alive?", tags=["health"])
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Can it write? 503 while the database is away", tags=["health"])
    async def readyz() -> dict[str, str]:
        await log.fetch(service.ingest, "SELECT FROM feedback.api_key LIMIT 1")
        return {"status": "ready"}

    @app.get("/docs", include_in_schema=False)
    async def docs_page() -> HTMLResponse:
        return HTMLResponse(docs, headers={"Content-Security-Policy": _DOCS_POLICY})

    openapi.install(app, paths)
    return app
