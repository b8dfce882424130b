"""The page as one file: its modules inside, and answers recorded in place of a server.

A module's imports are written anew as names (`page/data/api.js`), which an import map in the file
resolves to the modules' own text. So the same page replays the recorded run from a disk.
"""

from __future__ import annotations

import base64
import json
import posixpath
import re
from collections.abc import Mapping

from pellucid.serve.page_files import PageFiles

Recorded = Mapping[str, tuple[Mapping[str, str], bytes]]  # path with query -> headers, body
_IMPORT = re.compile(r'^(import\s[^;"]*")([^"]+)(";)', re.M)
_LINK = re.compile(r"^\s*<(?:link|script)\b[^>]*>(?:</script>)?\n", re.M)
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline'; img-src data:"
)


def single_file(answers: Recorded, page: PageFiles | None = None) -> str:
    """HTML that shows `answers` without a server; it loads nothing and sends no request.

    answers: what GET of a path (with its query, as the page asks it) would say.
    """
    recording = _script("application/json", json.dumps(_plain(answers)), ' id="recording"')
    return _alone(recording, page)


def bridged_page(hash: str = "") -> str:
    """HTML of the page for a frame in a notebook, opened at a place: it asks the frame's parent."""
    return _alone(_script("application/json", json.dumps(hash), ' id="bridge"'))


def _alone(told: str, page: PageFiles | None = None) -> str:
    """The page with its modules and styles inside, and `told` in its head."""
    held = (page or PageFiles()).held
    modules = {name: data.decode() for name, data in held.items() if name.endswith(".js")}
    named = {f"page/{name}": _data_url(_renamed(name, text)) for name, text in modules.items()}
    styles = "\n".join(data.decode() for name, data in held.items() if name.endswith(".css"))
    head = "\n".join(
        (
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<style>\n{styles}</style>",
            told,
            _script("importmap", json.dumps({"imports": named})),
        )
    )
    start = _script("module", 'import "page/main.js";')
    html = _LINK.sub("", held["index.html"].decode())
    return html.replace("</head>", f"{head}\n</head>").replace("</body>", f"{start}\n</body>")


def _renamed(name: str, text: str) -> str:
    folder = posixpath.dirname(f"page/{name}")

    def absolute(found: re.Match[str]) -> str:
        return found[1] + posixpath.normpath(posixpath.join(folder, found[2])) + found[3]

    return _IMPORT.sub(absolute, text)


def _data_url(text: str) -> str:
    return "data:text/javascript;base64," + base64.b64encode(text.encode()).decode()


def _plain(answers: Recorded) -> dict[str, dict[str, object]]:
    return {
        path: {"headers": dict(headers), "body": base64.b64encode(body).decode()}
        for path, (headers, body) in answers.items()
    }


def _script(kind: str, text: str, more: str = "") -> str:
    """A script element; "<" is written so that no text can end it."""
    safe = text if kind == "module" else text.replace("<", "\\u003c")
    return f'<script type="{kind}"{more}>{safe}</script>'
