"""Who may ask: default deny. Without a key only the routes in PUBLIC answer, and LOOPBACK to this machine.

On TCP the key names the caller; on the admin socket, which only its owner can open, a header does. A wrong key
costs the address that sent it, never the key of somebody else behind the same address. A client that knows nothing but
an address may carry the key in its path: it names the caller there and is logged as little as in a header.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address

from aiohttp import web
from aiohttp.typedefs import Middleware

from persona.api.errors import Handler, route_of
from persona.api.services import CALLER, services
from persona.domain import Caller
from persona.errors import Busy, NotFound, Unauthorized

PUBLIC = frozenset({"/health", "/ready"})
LOOPBACK = frozenset({"/metrics"})  # counts only; from elsewhere with any key
KEYED = "/key"  # before a key in the path
USER_HEADER = "x-persona-user"
_ADDRESSES = 4096  # remembered at most; the oldest give way


class Failures:
    """401 answers by address in windows of a minute, in bounded memory."""

    def __init__(self, limit: int, now: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._now = now
        self._windows: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def note(self, address: str) -> None:
        """Count one. Raises Busy (429) once the address has had its share of this minute."""
        now, name = self._now(), _network(address)
        began, count = self._windows.pop(name, (now, 0))
        if now - began >= 60:
            began, count = now, 0
        self._windows[name] = began, count + 1
        while len(self._windows) > _ADDRESSES:
            self._windows.popitem(last=False)
        if count >= self._limit:
            wait = max(1, round(began + 60 - now))
            raise Busy("Too many wrong keys from this address.", retry_after=wait, status=429, code="rate_limited")


def by_key(failures: Failures) -> Middleware:
    """The middleware of the TCP address: `Authorization: Bearer KEY` or /key/KEY/…, or no answer but a refusal."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not _open(request):
            request[CALLER] = await _caller(request, failures)
        return await handler(request)

    return middleware


@web.middleware
async def by_header(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The middleware of the admin socket: `x-persona-user` names the caller of a user's own routes."""
    if route_of(request).startswith(("/v1/", "/api/")):
        name = request.headers.get(USER_HEADER)
        if not name:
            raise Unauthorized(f"Name the user in the header {USER_HEADER}.")
        user = await services(request).users.get(name) if name.isascii() else None
        if user is None:
            raise NotFound("There is no user of that name.", code="user_not_found")
        request[CALLER] = Caller(user, key_id=0, learn=user.learn)
    return await handler(request)


def _open(request: web.Request) -> bool:
    route = route_of(request)
    return route in PUBLIC or (route in LOOPBACK and _is_loopback(request.remote))


async def _caller(request: web.Request, failures: Failures) -> Caller:
    secret = _secret(request)
    known = await services(request).users.authenticate(secret) if secret and secret.isascii() else None
    if known is None:
        services(request).metrics.refused_keys.inc()
        failures.note(request.remote or "")
        raise Unauthorized("Send a valid key as «Authorization: Bearer KEY»; `persona keys add NAME` makes one.")
    return known


def _secret(request: web.Request) -> str:
    """The key in the path, whether or not something lies there, or that of the header."""
    if request.path.startswith(f"{KEYED}/"):
        return request.path.removeprefix(f"{KEYED}/").partition("/")[0]
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""


def _parsed(address: str) -> IPv4Address | IPv6Address:
    """An IPv4 address as itself, also where a socket for both kinds has mapped it. Raises ValueError."""
    parsed = ip_address(address)
    return getattr(parsed, "ipv4_mapped", None) or parsed


def _is_loopback(address: str | None) -> bool:
    try:
        return _parsed(address or "").is_loopback
    except ValueError:
        return False


def _network(address: str) -> str:
    """One household: an IPv4 address, or the /64 that an IPv6 address lies in."""
    try:
        parsed = _parsed(address)
    except ValueError:
        return address
    return str(int(parsed) >> 64) if isinstance(parsed, IPv6Address) else str(parsed)
