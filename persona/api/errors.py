"""The outermost middleware: every request gets an answer, and every refusal the error body of its surface.

One log line a request, with the route's template in place of its path; what went wrong unexpectedly is logged by
kind and place, never by its message, which may quote a user.
"""

import secrets
import time
import traceback
from collections.abc import Awaitable, Callable

import structlog
from aiohttp import web

from persona import chat_ollama, chat_openai
from persona.api.services import CALLER, services
from persona.errors import Busy, NotFound, PersonaError, StorageFull

log = structlog.get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id")

# Where OpenAI's clients expect another status than the tree's.
_STATUS = {"context_length_exceeded": 400}
_CLIENT_LEFT = 499  # nginx's word for it
_OLLAMA = ("/api/", "/key/")
_QUIET = frozenset({"/health", "/ready", "/metrics"})
_FULL_RETRY = 60  # seconds until a full disk may have been noticed by somebody
_UNEXPECTED = "Something went wrong on our side; the log names it by this answer's x-request-id."


@web.middleware
async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever the handler raises into a response, and note how it went."""
    request[REQUEST_ID] = secrets.token_hex(8)
    started = time.monotonic()
    status = _CLIENT_LEFT
    try:
        response = await _respond(request, handler)
        status = response.status
    finally:
        _note(request, status, time.monotonic() - started)
    return response


def unexpected(request: web.Request, error: Exception) -> PersonaError:
    """Log an error that is our own fault, and what the client hears of it."""
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f"{place[0].filename.rsplit('/', 1)[-1]}:{place[0].lineno}" if place else "?"
    log.error("request failed", request=request.get(REQUEST_ID), kind=type(error).__name__, where=where)
    return PersonaError(_UNEXPECTED)


def refusal(request: web.Request, error: PersonaError) -> web.Response:
    """The response to a request that cannot be met."""
    status = _STATUS.get(error.code, error.status)
    body = chat_ollama.error_body if request.path.startswith(_OLLAMA) else chat_openai.error_body
    response = web.json_response(body(error), status=status)
    if isinstance(error, Busy):
        response.headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, StorageFull):
        response.headers["Retry-After"] = str(_FULL_RETRY)
    if not isinstance(error, Busy):
        response.headers["x-should-retry"] = "false"
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


async def harden(request: web.Request, response: web.StreamResponse) -> None:
    """No answer is a page, be it opened in a browser: what stands in it is data."""
    response.headers["x-content-type-options"] = "nosniff"
    response.headers["content-security-policy"] = "default-src 'none'; frame-ancestors 'none'; sandbox"


def route_of(request: web.Request) -> str:
    """The template that matched, or a word for none: fit for logs and labels."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unknown"


async def _respond(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        response = await handler(request)
    except PersonaError as error:
        if error.status >= 500 and not isinstance(error, Busy):
            log.error("request refused", request=request[REQUEST_ID], kind=type(error).__name__, code=error.code)
        response = refusal(request, error)
    except web.HTTPException as error:
        response = refusal(request, _translated(error))
    except ConnectionError:
        return web.Response(status=_CLIENT_LEFT)  # nobody reads it
    except Exception as error:
        response = refusal(request, unexpected(request, error))
    if not response.prepared:
        response.headers["x-request-id"] = request[REQUEST_ID]
        response.headers.setdefault("cache-control", "no-store")
    return response


def _translated(error: web.HTTPException) -> PersonaError:
    if error.status == 404:
        return NotFound("There is nothing at this path.")
    refused = PersonaError(f"{error.reason}.", code="method_not_allowed" if error.status == 405 else "invalid_request")
    refused.status = error.status
    return refused


def _note(request: web.Request, status: int, seconds: float) -> None:
    route = route_of(request)
    metrics = services(request).metrics
    metrics.requests.labels(request.method if route != "unknown" else "any", route, str(status)).inc()
    metrics.seconds.labels(route).observe(seconds)
    write = log.debug if route in _QUIET else log.info
    known = request.get(CALLER)
    write(
        f"← {request.method if route != 'unknown' else '?'} {route}",
        status=status,
        ms=round(seconds * 1000),
        user=known.user.name if known else None,
        request=request[REQUEST_ID],
    )
