"""Requests to the application without a socket: what a notebook's page asks its own kernel."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from pellucid.serve.security import Guard


@dataclass(frozen=True)
class LocalResponse:
    """Status, headers and the whole body."""

    status: int
    headers: dict[str, str]
    body: bytes


async def ask(app: Guard, method: str, target: str, body: bytes = b"") -> LocalResponse:
    """The application's answer to a request for `target`, a path with its query.

    Cancelling it is as if a client had gone away: its work ends within a turn.
    """
    path, _, query = target.partition("?")
    given = [{"type": "http.request", "body": body, "more_body": False}]
    said: list[dict[str, Any]] = []
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if given:
            return given.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http",
        "method": method, "path": unquote(path), "raw_path": path.encode(),
        "query_string": query.encode(), "root_path": "", "server": ("127.0.0.1", 0),
        "client": ("127.0.0.1", 0),
        "headers": [(b"host", b"127.0.0.1"), (b"content-length", str(len(body)).encode())],
    }  # fmt: skip
    await app(scope, receive, send)
    gone.set()
    start = next(message for message in said if message["type"] == "http.response.start")
    parts = (message.get("body", b"") for message in said if message["type"].endswith(".body"))
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in start["headers"]}
    return LocalResponse(start["status"], headers, b"".join(parts))
