"""A diff's report as it shows itself: text for print, a page for a notebook."""

from __future__ import annotations

import html
import io
from typing import Any

from rich.console import Console

from pellucid.show.diff_page import page
from pellucid.show.diff_terminal import show

_HEIGHT = 620  # pixels of the frame in a notebook


def report_as_text(report: Any) -> str:
    """The report of a diff as ``pellucid diff`` prints it, without colours."""
    out = io.StringIO()
    console = Console(file=out, width=100, color_system=None, highlight=False, legacy_windows=False)
    show(report.to_json(), console, every=False)
    return out.getvalue().rstrip()


def report_as_html(report: Any) -> str:
    """The page of ``pellucid diff --html`` in a frame of its own, for a notebook."""
    whole = html.escape(page(report.to_json(), {}), quote=True)
    return f'<iframe srcdoc="{whole}" width="100%" height="{_HEIGHT}" style="border:0"></iframe>'
