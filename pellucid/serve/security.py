"""Who may enter: the Host and Origin of a request, the key, the size and pace of a body.

A page on the web can send requests to 127.0.0.1. It cannot forge the Origin of what it sends, and
to read an answer it needs a name of its own that resolves to this machine (DNS rebinding), which
then stands in Host. So Host must be an address, localhost or the name that was bound; an address
cannot be rebound. Origin, where there is one, must be the server itself or stated at the start.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pellucid.serve.fields import RequestError

Asgi = Callable[[Any, Any, Any], Awaitable[None]]
OPEN = ("/health", "/")  # without a key, as the page's files
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What was said at the start.

    key          that requests must carry; None: none
    origins      pages elsewhere that may call, such as https://example.org
    most_bytes   of a body; patience  seconds until all of a body must have come
    """

    host: str = "127.0.0.1"
    key: str | None = None
    origins: tuple[str, ...] = ()
    most_bytes: int = 4 << 20
    patience: float = 20.0
    open_paths: tuple[str, ...] = field(default=OPEN)


def check_binding(host: str, key: str | None, insecure: bool) -> None:
    """ValueError where the server would be open to a network without a key."""
    if key is not None and (not key or not key.isascii() or not key.isprintable()):
        raise ValueError("--api-key: expected printable ASCII characters, at least one")
    if not is_loopback(host) and key is None and not insecure:
        raise ValueError(
            f"--host {host} opens the server to a network: add --api-key KEY, or --insecure to let "
            "everyone in"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_known_host(header: str, bound: str) -> bool:
    """Whether a Host header names this server in a way that no other site can take for its own."""
    try:
        name = urlsplit(f"//{header}").hostname
        port = urlsplit(f"//{header}").port
    except ValueError:
        return False
    if not name or "@" in header or "/" in header or (port is None and header.endswith(":")):
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in ("localhost", bound.lower(), socket.gethostname().lower())
    return True


class Guard:
    """Lets through what may enter, and answers the rest; adds the headers that browsers heed."""

    def __init__(self, app: Asgi, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return None
        request = Request(scope, receive)
        allowed = self._allowed_origin(request)

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = {**HEADERS, **self._cors(allowed)}
                there = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((name.lower().encode(), value.encode()) for name, value in extra.items()
                      if name.lower().encode() not in there),
                ]  # fmt: skip
            await send(message)

        try:
            self._check_names(request, allowed)
            if request.method == "OPTIONS":  # a preflight carries no key
                answer = Response(status_code=204 if allowed else 403)
                return await answer(scope, receive, send_guarded)
            self._check_key(request)
        except RequestError as error:
            answer = JSONResponse(error.body, error.status, error.headers)
            return await answer(scope, receive, send_guarded)
        return await self._app(scope, receive, send_guarded)

    def _allowed_origin(self, request: Request) -> str | None:
        origin = request.headers.get("origin")
        return origin if origin in self._rules.origins else None

    @staticmethod
    def _cors(allowed: str | None) -> dict[str, str]:
        if allowed is None:
            return {}
        return {
            "Access-Control-Allow-Origin": allowed,
            "Access-Control-Allow-Headers": "Authorization, Content-Type",
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Max-Age": "600",
            "Vary": "Origin",
        }

    def _check_names(self, request: Request, allowed: str | None) -> None:
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or not is_known_host(hosts[0], self._rules.host):
            raise RequestError(403, "Host names another server; use the address it printed")
        origin = request.headers.get("origin")
        own = (f"http://{hosts[0]}", f"https://{hosts[0]}")
        if origin is not None and allowed is None and origin not in own:
            raise RequestError(403, "this page may not call the server: see --allow-origin")

    def _check_key(self, request: Request) -> None:
        path = request.url.path
        open_ = path in self._rules.open_paths or path.startswith("/page/")
        if self._rules.key is None or open_:
            return
        given = request.headers.get("authorization", "")
        expected = f"Bearer {self._rules.key}"
        if not hmac.compare_digest(given.encode("latin-1"), expected.encode()):
            said = "a key is needed: send the header Authorization: Bearer KEY"
            raise RequestError(401, said, WWW_Authenticate="Bearer")


async def read_body(request: Request, rules: Rules) -> bytes:
    """The body, within the limits of size (413) and time (408)."""
    said = f"the body is larger than {rules.most_bytes:,} bytes"
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 18 or int(length) > rules.most_bytes:
        raise RequestError(413, said)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RequestError(415, "a compressed body is not read: send it plain")
    data = bytearray()
    try:
        async with asyncio.timeout(rules.patience):
            async for part in request.stream():
                data += part
                if len(data) > rules.most_bytes:
                    raise RequestError(413, said)
    except TimeoutError:
        raise RequestError(408, f"the body did not come within {rules.patience:g} s") from None
    return bytes(data)
