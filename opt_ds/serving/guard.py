"""Guard of `opt-ds serve`: which requests are answered, and the security headers of every response.

The server has no password. It is protected by being reachable only from programs on this machine. A web page that the
user visits also runs on this machine, so two things are checked before a request is processed:

- **Host**: the name in the address bar. A page whose own name resolves to 127.0.0.1 (DNS rebinding) is refused.
- **Origin** and **Sec-Fetch-Site**: the page that sends the request. Any page except the server's own is refused.

Starlette's TrustedHostMiddleware covers the first check only partly: it cannot parse IPv6 addresses, and answers with
400.
"""

import asyncio
import ipaddress
import itertools
import logging
import re
from collections.abc import Iterable

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOG = logging.getLogger(__name__)
_AUTHORITY = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\s:/?#@\[\]]+)(?::(?P<port>[0-9]{1,5}))?", re.ASCII | re.IGNORECASE)
_ORIGIN = re.compile(r"(?P<scheme>https?)://(?P<authority>[^/?#]+)", re.IGNORECASE)
_ONLY_OURS = "only the server's own page may send it"
_DEFAULT_PORT = {"http": "80", "https": "443"}

SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
        "media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "microphone=(self), camera=(), geolocation=(), display-capture=(), usb=(), payment=()",
    "cache-control": "no-store",
}


class Guard:
    """Outermost ASGI middleware: checks Host and Origin, adds security headers, and handles exceptions.

    A foreign Host or Origin is refused with 403. An exception becomes a 500, and its traceback is logged once.

    Args:
        app: The application.
        host: The address that the server listens on (`--host`).
        allow_hosts: Further names that clients may use (`--allow-host`), without a port.
    """

    def __init__(self, app: ASGIApp, host: str = "127.0.0.1", allow_hosts: Iterable[str] = ()) -> None:
        self._app = app
        self._allowed = {_bare(name) for name in (host, *allow_hosts)}
        self._any_own_address = _is_wildcard(host)
        self._numbers = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        refusal = self._refusal(scope)
        if refusal:
            return await JSONResponse({"detail": refusal}, 403)(scope, receive, send_with_headers)
        try:
            await self._app(scope, receive, send_with_headers)
        except (KeyboardInterrupt, SystemExit):
            raise
        except asyncio.CancelledError:  # the server is stopping and has waited long enough
            if not started:
                await JSONResponse({"detail": "the server is being stopped"}, 503)(scope, receive, send_with_headers)
        except BaseException as error:  # a panic in a Rust library is not an Exception
            number = next(self._numbers)
            _LOG.error("internal error %d: %s %r", number, scope["method"], scope["path"], exc_info=error)
            if started:
                raise  # the response is truncated, so the connection must close
            detail = f"internal error {number}: the server's log has its details"
            await JSONResponse({"detail": detail}, 500)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> str | None:
        """Return why a request is refused, or None."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        match = _AUTHORITY.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None:
            return "the request names no valid Host: use the address that the server printed"
        if not self._is_allowed(match["name"], scope):
            name = match["name"]
            return f'Host "{name}" is not allowed: start the server with --allow-host {name} if this is one of its names'
        origins = headers.getlist("origin")
        if origins and (len(origins) > 1 or not _same_authority(origins[0], match)):
            return f"the request comes from another web page (by its Origin): {_ONLY_OURS}"
        site = headers.get("sec-fetch-site", "none").lower()
        if site not in ("none", "same-origin") and not _opens_page(scope, headers):
            return f"the request comes from another web page (Sec-Fetch-Site: {site}): {_ONLY_OURS}"
        return None

    def _is_allowed(self, name: str, scope: Scope) -> bool:
        name = _bare(name)
        if name == "localhost" or name in self._allowed:
            return True
        address = _address(name)
        if address is None:
            return False
        # Unlike a name, an address cannot be made to resolve to this machine by an attacker.
        own = (scope.get("server") or ("", None))[0]
        return address.is_loopback or (self._any_own_address and address == _address(own))


def _bare(name: str) -> str:
    """Return a name or address in the form used for comparisons.

    That is lower case, without brackets and the root's dot; addresses are in canonical spelling.
    """
    name = name.strip().lower().removeprefix("[").removesuffix("]").removesuffix(".")
    address = _address(name)
    return str(address) if address else name


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.split("%")[0])
    except ValueError:
        return None


def _is_wildcard(host: str) -> bool:
    address = _address(_bare(host))
    return host == "" or (address is not None and address.is_unspecified)


def _same_authority(origin: str, host: re.Match[str]) -> bool:
    """Return whether an Origin ("http://name:port") has the host and port of the Host header.

    The scheme is not compared, because a proxy may change it.
    """
    parts = _ORIGIN.fullmatch(origin.strip())
    authority = _AUTHORITY.fullmatch(parts["authority"]) if parts else None
    if parts is None or authority is None:
        return False  # for example "null"
    default = _DEFAULT_PORT[parts["scheme"].lower()]
    ports = {authority["port"] or default, host["port"] or default}
    return _bare(authority["name"]) == _bare(host["name"]) and len(ports) == 1


def _opens_page(scope: Scope, headers: Headers) -> bool:
    """Return whether the request opens the page by a link in a tab. That is harmless; bookmarks and wikis do it."""
    mode, target = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest", "document")
    return scope["method"] == "GET" and scope["path"] == "/" and mode == "navigate" and target == "document"
