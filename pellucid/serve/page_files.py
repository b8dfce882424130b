"""The page's files: read once at the start, complete or not at all."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response

from pellucid.serve.fields import RequestError

INDEX = "index.html"
# Said here: a machine's own table of types may call a module something that browsers refuse to run.
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
    "json": "application/json",
    "woff2": "font/woff2",
}
_NAMED = re.compile(r'(?:href|src)="/page/([^"?#]+)"')


class PageFiles:
    """The files under a folder, by their path in it.

    ValueError, in one line, where the page names a file that is not there.
    """

    def __init__(self, folder: Traversable | None = None) -> None:
        folder = files("pellucid.serve") / "page" if folder is None else folder
        self.held = dict(_read(folder, "")) if folder.is_dir() else {}
        index = self.held.get(INDEX, b"").decode()
        named = _NAMED.findall(index) if index else [INDEX]
        missing = sorted({name for name in named if name not in self.held})
        if missing:
            more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise ValueError(
                f"the page's file {missing[0]}{more} is missing from {folder}: install pellucid "
                "again"
            )

    async def index(self, request: Request) -> Response:
        """GET /."""
        return self.answer(INDEX, request)

    async def file(self, request: Request) -> Response:
        """GET /page/…."""
        return self.answer(request.path_params["path"], request)

    def answer(self, path: str, request: Request) -> Response:
        """A file, which browsers ask for again and keep if it is the same; only what is held."""
        data = self.held.get(path)
        kind = TYPES.get(path.rpartition(".")[2])
        if data is None or kind is None:
            raise RequestError(404, f"the page has no file {path[:80]!r}")
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()[:20]}"',
            "Cache-Control": "no-cache",
        }
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(data, headers={"Content-Type": kind, **headers})


def _read(folder: Traversable, before: str):
    for entry in folder.iterdir():
        path = f"{before}{entry.name}"
        if entry.is_dir():
            yield from _read(entry, f"{path}/")
        elif path.rpartition(".")[2] in TYPES:
            yield path, entry.read_bytes()
