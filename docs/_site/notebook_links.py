"""Links of notebooks lead to pages of the site: mkdocs-jupyter leaves ``../train.md`` as it stands.

>>> on_page_content('<a href="../train.md#run">', Page("notebooks/5-train.ipynb"))
'<a href="../../train/#run">'
>>> on_page_content('<a href="2-next.ipynb">', Page("notebooks/1-first.ipynb"))
'<a href="../2-next/">'
>>> on_page_content('<a href="../train.md">', Page("index.md"))
'<a href="../train.md">'
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

_LINK = re.compile(r'href="(?!https?:|/)([^"#]+)\.(?:md|ipynb)(?=["#])')


def on_page_content(html: str, page: Any, **others: Any) -> str:
    """Called by mkdocs with the HTML of each page."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return _LINK.sub(r'href="../\1/', html)


def Page(name: str) -> SimpleNamespace:
    """What the examples above need of a page."""
    return SimpleNamespace(file=SimpleNamespace(src_uri=name))
