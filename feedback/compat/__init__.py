"""The ways in that speak others' formats: OTLP, Langfuse's scores, chat logs.

Every item ends in ``feedback.capture.accept`` like those of the JSON routes: the same validation, and a 2xx means
committed. Only the words around it are the others': what an exporter or SDK that exists expects to be answered.

A key may also be sent as Basic credentials, in the place of either Langfuse's public or its secret key; a key that a
browser sends in the open should be one of its own, with scope ingest and a rate.

Belongs here: routes, credentials and answers of foreign protocols, a module each.
Does not belong here: what a foreign record means (``feedback.formats``), our own JSON routes (``feedback.capture``).
"""

from starlette.routing import Route

from feedback.compat import chatlogs, langfuse, otlp
from feedback.service import Service

_PROTOCOLS = (otlp, langfuse, chatlogs)

OPENAPI = {path: item for protocol in _PROTOCOLS for path, item in protocol.OPENAPI.items()}


def routes(service: Service) -> list[Route]:
    """The routes of all foreign protocols."""
    return [route for protocol in _PROTOCOLS for route in protocol.routes(service)]
