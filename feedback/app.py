"""The service as an ASGI app: which rooms it has, and the pages about itself.

Belongs here: putting rooms together, health, the page of the API.
Does not belong here: what a room does, or the process that serves the app (``feedback.server``).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.responses import HTMLResponse

from feedback import admin, capture, compat, log, metrics, openapi, pages, state, tokens, widget
from feedback import search as searching
from feedback.front import Front
from feedback.http import install_errors
from feedback.service import Service

_DOCS = Path(__file__).with_name("docs.html")
_DOCS_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"

# Each room brings its routes, plain Starlette made from the service, and their description.
ROOMS = (capture, compat, tokens, state, searching, widget, metrics, pages)


def create_app(
    database_url: str,
    *,
    pseudonym_key: bytes,
    allowed_origins: Sequence[str] = (),
    search: str | None = None,
) -> Front:
    """The service over the database at ``database_url`` (libpq form).

    ``pseudonym_key`` turns people's ids into pseudonyms; with another key the same person looks like another one.
    Pages of ``allowed_origins`` may call the API. ``search`` names the function behind searches, as ``module:function``.
    """
    service = Service(database_url, pseudonym_key, search, _observe)
    app = Front(
        allowed_origins=allowed_origins,
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
        for path, operations in room.OPENAPI.items():
            paths[path] = paths.get(path, {}) | operations
    app.direct = {route.path: route.endpoint for route in capture.routes(service)}
    app.include_router(admin.router(service))
    docs = _DOCS.read_text(encoding="utf-8")

    @app.get("/healthz", summary="Is the process alive?", tags=["health"])
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Can it write? 503 while the database is away", tags=["health"])
    async def readyz() -> dict[str, str]:
        ((frozen,),) = await log.fetch(
            service.ingest,
            "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean"
            " FROM (SELECT count(*) FROM (SELECT FROM feedback.api_key LIMIT 1) AS one) AS there",
        )
        if frozen:
            raise log.Unavailable("the database takes no writes")
        return {"status": "ready"}

    @app.get("/docs", include_in_schema=False)
    async def docs_page() -> HTMLResponse:
        return HTMLResponse(docs, headers={"Content-Security-Policy": _DOCS_POLICY})

    openapi.install(app, paths, searching.SCHEMAS)
    return app


def _observe(log_name: str, rows: int, waiting: int, seconds: float) -> None:
    metrics.FLUSH_ROWS.labels(log_name).observe(rows)
    metrics.FLUSH_SECONDS.labels(log_name).observe(seconds)
    metrics.WAITING_ROWS.labels(log_name).set(waiting)
