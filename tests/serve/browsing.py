"""A browser before a server with the shipped demo, for tests of the page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from serving import served

from pellucid.language_model import LanguageModel
from pellucid.serve import Engine

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
PROMPT = "def add(a, b):\n    return a"


QUIET = """async () => {
  const frame = () => new Promise(requestAnimationFrame);
  for (let still = 0; still < 3; ) {
    await frame();
    still = document.body.dataset.asking === "0" ? still + 1 : 0;
  }
}"""


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium without a window; skips where it or playwright is missing."""
    api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium")
    with api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Reader:
    """One tab: what it asked for, what it complained about, and shorthands for its state."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.url, self.complaints, self.asked = url, [], []
        size = {"width": 1280, "height": 800}
        self.context = browser.new_context(**{"viewport": size, **options})
        self.tab = self.context.new_page()
        self.tab.on("console", lambda m: m.type == "error" and self.complaints.append(m.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(error.message))
        self.tab.on("request", lambda request: self.asked.append(request.url))

    def open(self, hash: str = "") -> None:
        """Go to a place and wait until the page stands."""
        self.tab.goto("about:blank")
        self.tab.goto(f"{self.url}/{hash}")
        self.tab.wait_for_selector("body[data-ready]")

    def state(self, name: str) -> Any:
        """The value of a signal of state.js."""
        return self.tab.evaluate("name => import('/page/state.js').then(s => s[name].peek())", name)

    def settle(self) -> None:
        """Wait until no request is under way and a frame was drawn."""
        self.tab.evaluate(QUIET)


@contextmanager
def demo(lm: LanguageModel) -> Iterator[str]:
    """The address of a server with a model called demo."""
    with served(Engine(lm, "demo", fast=False)) as client:
        yield str(client.base_url).rstrip("/")
